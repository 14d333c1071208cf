"""Checkpoints in Hugging Face form: `config.json` with one `model.safetensors`, or shards and their index.

Reads float32, bfloat16, float16 and float64 weights, into float32 masters unless told otherwise; a tensor that is
missing, unexpected or of another shape is an error that names it. Writes a directory aside and renames it when it is
complete. Both go block by block: beside the weights nothing of their size is held. Experts, stacked in memory, are one
tensor each on disk; the multi-token layer's copies of embedding and head are written, and checked when read.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from beringia.checkpoint.blocks import content_of
from beringia.checkpoint.reader import INDEX, SINGLE, TensorReader
from beringia.checkpoint.tensor_file import lay_out, write_streamed
from beringia.errors import ModelError
from beringia.machine.aside import directory_beside
from beringia.model.config import DecoderConfig
from beringia.model.decoder import Decoder
from beringia.model.filling import check_fits, draw, dtype_of_buffer, fill, unfilled
from beringia.model.hugging_face_config import document_of
from beringia.model.hugging_face_directory import is_scale, open_directory, read_held
from beringia.model.hugging_face_names import checkpoint_tensors, shared_copies
from beringia.model.presets import PRESETS, preset
from beringia.numerics.state_hash import dtype_name
from beringia.records.files import publish_directory, write_text
from beringia.records.given_files import is_there, why_no_directory

SHARD_BYTES = 5 * 10**9

_LOG = logging.getLogger(__name__)


def initialise(decoder: Decoder, seed: int) -> None:
    """Fill the decoder from the seed: matrices normal(0, initializer_range), norms one, biases zero.

    Each tensor is drawn by its published name: device, order of modules and stacking of experts do not matter.
    """
    draw(checkpoint_tensors(decoder), seed, decoder.config.initializer_range)


def load_model(
    directory_or_preset: str | Path,
    *,
    seed: int = 0,
    vocabulary_size: int | None = None,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder from a Hugging Face directory or a preset (initialised from `seed`).

    `vocabulary_size` resizes a preset; a directory must agree with it. `layers`: only so many of its first layers, and
    its multi-token layer; no others are read. `dtype`: what weights are held in (what products run in is
    `set_compute_dtype`'s). Raises ModelError. What a directory says and its files do not hold (a multi-token layer, a
    quantisation) is left out; this and keys of its config that are not known here are told in the log.
    """
    if not Path(directory_or_preset).is_dir():
        whole = _preset_config(str(directory_or_preset), vocabulary_size)
        decoder = unfilled(_first_layers(whole, layers), dtype, device)
        named = _published(checkpoint_tensors(decoder), decoder.config, whole)
        draw(named.items(), seed, whole.initializer_range)
        return decoder
    with open_directory(Path(directory_or_preset)) as reader:
        held = read_held(reader)
        whole = _of_size(held.config, reader.place, vocabulary_size)
        kept = _first_layers(whole, layers)
        _check_names(_on_meta(whole), reader, held.left_out)
        decoder = unfilled(kept, dtype, device)
        _read_tensors(decoder, whole, reader)
    for note in held.notes:
        _LOG.warning("%s: %s", directory_or_preset, note)
    return decoder


def config_of(directory_or_preset: str | Path, vocabulary_size: int | None = None) -> DecoderConfig:
    """The configuration of the decoder that `load_model` makes. Raises ModelError."""
    if not Path(directory_or_preset).is_dir():
        return _preset_config(str(directory_or_preset), vocabulary_size)
    with open_directory(Path(directory_or_preset)) as reader:
        return _of_size(read_held(reader).config, reader.place, vocabulary_size)


def _preset_config(name: str, vocabulary_size: int | None) -> DecoderConfig:
    wrong = why_no_directory(name)
    if wrong is not None and name not in PRESETS and (os.sep in name or is_there(Path(name))):
        raise ModelError(f"{wrong} Or give one of {', '.join(PRESETS)}.")
    return preset(name, vocabulary_size)


def _of_size(config: DecoderConfig, directory: Path, vocabulary_size: int | None) -> DecoderConfig:
    if vocabulary_size not in (None, config.vocab_size):
        raise ModelError(f"{directory} has {config.vocab_size} tokens, but the tokenizer has {vocabulary_size}.")
    return config


def _first_layers(config: DecoderConfig, count: int | None) -> DecoderConfig:
    """The configuration with only its first layers (and its multi-token layer)."""
    if count is None:
        return config
    if not 1 <= count <= config.num_hidden_layers:
        raise ModelError(
            f"--layers {count} was asked for; the model has {config.num_hidden_layers}: give 1 to that many."
        )
    return replace(config, num_hidden_layers=count)


def _published(
    named: Iterable[tuple[str, torch.Tensor]], config: DecoderConfig, whole: DecoderConfig
) -> dict[str, torch.Tensor]:
    """Tensors of a decoder with fewer layers under their names in the whole model: the multi-token layer comes last."""
    here, there = (f"model.layers.{one.num_hidden_layers}." for one in (config, whole))
    return {there + name.removeprefix(here) if name.startswith(here) else name: tensor for name, tensor in named}


def _read_tensors(decoder: Decoder, whole: DecoderConfig, reader: TensorReader) -> None:
    fill(_published(checkpoint_tensors(decoder), decoder.config, whole), reader)
    for name, tensor in _published(shared_copies(decoder).items(), decoder.config, whole).items():
        if name in reader.tensors:
            check_fits(name, reader.tensors[name], tensor)
            if not reader.holds(name, tensor):
                file = reader.tensors[name].file
                raise ModelError(f"{file}: {name} differs from the tensor it repeats; this model shares the two.")


def _on_meta(config: DecoderConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


def _check_names(decoder: Decoder, reader: TensorReader, left_out: frozenset[str]) -> None:
    """Before anything of the model's size is made: what the config says is what the files hold."""
    targets, copies = dict(checkpoint_tensors(decoder)), shared_copies(decoder)
    missing, found = sorted(targets.keys() - reader.tensors.keys()), reader.tensors.keys()
    if missing:
        raise ModelError(f"The checkpoint {reader.place} lacks {_some(missing)}, for what its config says.")
    unexpected = sorted(found - targets.keys() - copies.keys() - left_out)
    if unexpected:
        scales = " They look like a quantised model's: convert it first." if any(map(is_scale, unexpected)) else ""
        raise ModelError(
            f"The checkpoint {reader.place} has unexpected {_some(unexpected)}, for what its config says.{scales}"
        )
    for name, target in targets.items():
        check_fits(name, reader.tensors[name], target)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def save_model(
    decoder: Decoder,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the decoder in Hugging Face form; `directory` must not exist and appears complete.

    Weights are stored as `dtype`, the routers' correction biases as float32 at least. Raises ModelError where the
    directory exists, StorageFull where the disk is full.
    """
    final = Path(directory)
    if final.exists():
        raise ModelError(f"{final} exists already; give a new directory.")
    final.parent.mkdir(parents=True, exist_ok=True)
    with directory_beside(final) as aside:
        _write_shards(decoder, aside, dtype, max_shard_bytes)
        document = document_of(decoder.config, str(dtype).removeprefix("torch."))
        write_text(aside / "config.json", json.dumps(document, indent=2) + "\n")
        publish_directory(aside, final)


def _write_shards(decoder: Decoder, directory: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    tensors = dict(checkpoint_tensors(decoder))
    tensors |= {name: tensor for name, tensor in shared_copies(decoder).items() if name != "lm_head.weight"}
    sizes = {name: tensor.numel() * _stored(name, dtype).itemsize for name, tensor in tensors.items()}
    shards = _partition(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory, file_name, {name: (tensors[name], _stored(name, dtype)) for name in names})
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")


def _stored(name: str, dtype: torch.dtype) -> torch.dtype:
    return dtype_of_buffer(dtype) if name.endswith("e_score_correction_bias") else dtype


def _write_shard(directory: Path, file_name: str, tensors: dict[str, tuple[torch.Tensor, torch.dtype]]) -> None:
    described = [(name, dtype_name(dtype), tuple(tensor.shape)) for name, (tensor, dtype) in tensors.items()]
    layout = lay_out(file_name, described)
    write_streamed(directory, layout, chain.from_iterable(content_of(*tensors[slot.key]) for slot in layout.slots))


def _partition(sizes: dict[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
