"""Checkpoints in Hugging Face form: `config.json` with one `model.safetensors`, or shards and their index.

Reads float32, bfloat16, float16 and float64 weights, into float32 masters unless told otherwise; a tensor that is
missing, unexpected or of another shape is an error that names it. Writes a directory aside and renames it when it is
complete. Both go block by block: beside the weights nothing of their size is held. Experts, stacked in memory, are one
tensor each on disk; the multi-token layer's copies of embedding and head are written, and checked when read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from beringia.checkpoint.blocks import content_of
from beringia.checkpoint.reader import INDEX, SINGLE, TensorReader, open_hugging_face
from beringia.checkpoint.tensor_file import lay_out, write_streamed
from beringia.errors import ModelError
from beringia.model.config import DecoderConfig
from beringia.model.decoder import Decoder
from beringia.model.filling import check_fits, draw, dtype_of_buffer, fill, unfilled
from beringia.model.hugging_face_config import config_from_document, document_of
from beringia.model.presets import PRESETS, preset
from beringia.numerics.state_hash import dtype_name
from beringia.records.files import publish_directory, write_text

SHARD_BYTES = 5 * 10**9


def checkpoint_tensors(decoder: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint under its published name, as a view of the live parameter or buffer.

    Stacked experts come out one by one. Copies (a tied head, the multi-token layer's embedding and head) do not.
    """
    for name, tensor in decoder.state_dict(keep_vars=True).items():
        if name == "lm_head.weight" and decoder.config.tie_word_embeddings:
            continue
        yield from _split_experts(name, tensor)


def _split_experts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    prefix, _, leaf = name.rpartition(".")
    if leaf == "gate_up_proj":
        for expert, (gate, up) in enumerate(matrix.chunk(2) for matrix in tensor.unbind(0)):
            yield f"{prefix}.{expert}.gate_proj.weight", gate
            yield f"{prefix}.{expert}.up_proj.weight", up
    elif leaf == "down_proj":
        for expert, down in enumerate(tensor.unbind(0)):
            yield f"{prefix}.{expert}.down_proj.weight", down
    else:
        yield name, tensor


def shared_copies(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Names under which a checkpoint repeats a tensor: what the multi-token layer shares, and a tied head."""
    copies = {}
    if decoder.config.tie_word_embeddings:
        copies["lm_head.weight"] = decoder.model.embed_tokens.weight
    if decoder.mtp is not None:
        prefix = f"model.layers.{decoder.config.num_hidden_layers}"
        copies[f"{prefix}.embed_tokens.weight"] = decoder.model.embed_tokens.weight
        copies[f"{prefix}.shared_head.head.weight"] = decoder.lm_head.weight
    return copies


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
    `set_compute_dtype`'s). Raises ModelError. A checkpoint that announces a multi-token layer but holds nothing of it
    (transformers drops it) is loaded without one.
    """
    if not Path(directory_or_preset).is_dir():
        whole = _preset_config(str(directory_or_preset), vocabulary_size)
        decoder = unfilled(_first_layers(whole, layers), dtype, device)
        named = _published(checkpoint_tensors(decoder), decoder.config, whole)
        draw(named.items(), seed, whole.initializer_range)
        return decoder
    announced = _announced_config(Path(directory_or_preset), vocabulary_size)
    with open_hugging_face(Path(directory_or_preset)) as reader:
        whole = _held_config(announced, reader)
        decoder = unfilled(_first_layers(whole, layers), dtype, device)
        _read_tensors(decoder, whole, reader)
        return decoder


def config_of(directory_or_preset: str | Path, vocabulary_size: int | None = None) -> DecoderConfig:
    """The configuration of the decoder that `load_model` makes. Raises ModelError."""
    if not Path(directory_or_preset).is_dir():
        return _preset_config(str(directory_or_preset), vocabulary_size)
    announced = _announced_config(Path(directory_or_preset), vocabulary_size)
    with open_hugging_face(Path(directory_or_preset)) as reader:
        return _held_config(announced, reader)


def read_config(directory: Path) -> DecoderConfig:
    """The configuration of a Hugging Face directory. Raises ModelError."""
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory} has no config.json; give a directory in Hugging Face form.")
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from None
    return config_from_document(document)


def _preset_config(name: str, vocabulary_size: int | None) -> DecoderConfig:
    if name not in PRESETS and ("/" in name or os.sep in name):
        raise ModelError(f"There is no directory {name}; give a Hugging Face directory or one of {', '.join(PRESETS)}.")
    return preset(name, vocabulary_size)


def _announced_config(directory: Path, vocabulary_size: int | None) -> DecoderConfig:
    config = read_config(directory)
    if vocabulary_size not in (None, config.vocab_size):
        raise ModelError(f"{directory} has {config.vocab_size} tokens, but the tokenizer has {vocabulary_size}.")
    return config


def _held_config(config: DecoderConfig, reader: TensorReader) -> DecoderConfig:
    """Without the multi-token layer where the files hold nothing of it."""
    mtp_prefix = f"model.layers.{config.num_hidden_layers}."
    if not any(name.startswith(mtp_prefix) for name in reader.tensors):
        config = replace(config, num_nextn_predict_layers=0)
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
    _check_names(decoder if decoder.config == whole else _on_meta(whole), reader)
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


def _check_names(decoder: Decoder, reader: TensorReader) -> None:
    targets, copies = dict(checkpoint_tensors(decoder)).keys(), shared_copies(decoder).keys()
    _refuse_names("lacks", reader.place, sorted(targets - reader.tensors.keys()))
    _refuse_names("has unexpected", reader.place, sorted(reader.tensors.keys() - targets - copies))


def _refuse_names(verb: str, directory: Path, names: list[str]) -> None:
    if names:
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ModelError(f"The checkpoint {directory} {verb} {', '.join(names[:3])}{rest}, for what its config says.")


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
    aside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    aside.mkdir()
    try:
        _write_shards(decoder, aside, dtype, max_shard_bytes)
        document = document_of(decoder.config, str(dtype).removeprefix("torch."))
        write_text(aside / "config.json", json.dumps(document, indent=2) + "\n")
        publish_directory(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
