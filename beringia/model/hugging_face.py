"""Checkpoints in Hugging Face form: `config.json` with one `model.safetensors`, or shards and their index.

Reads float32, bfloat16 and float16 weights into float32 masters; a tensor that is missing, unexpected or of another
shape is an error that names it. Writes a directory aside and renames it when it is complete. Experts, stacked in
memory, are one tensor each on disk; the multi-token layer's copies of embedding and head are written, and checked when
read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from beringia.errors import ModelError
from beringia.model.config import DecoderConfig
from beringia.model.decoder import Decoder
from beringia.model.hugging_face_config import config_from_document, document_of
from beringia.model.presets import PRESETS, preset
from beringia.records.files import publish_directory, reporting_full_disk, write_text

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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


@torch.no_grad()
def initialise(decoder: Decoder, seed: int) -> None:
    """Fill the decoder from the seed: matrices normal(0, initializer_range), norms one, biases zero.

    Each tensor has its own generator, seeded by its published name, and is drawn on the CPU: device, order of modules
    and stacking of experts do not matter.
    """
    for name, tensor in checkpoint_tensors(decoder):
        if tensor.dim() >= 2:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
            tensor.copy_(drawn * decoder.config.initializer_range)
        else:
            tensor.fill_(1.0 if name.endswith("norm.weight") else 0.0)


def load_model(directory_or_preset: str | Path, *, seed: int = 0, vocabulary_size: int | None = None) -> Decoder:
    """A decoder on the CPU in float32, from a Hugging Face directory or a preset (initialised from `seed`).

    `vocabulary_size` resizes a preset; a directory must agree with it. Raises ModelError. A checkpoint that announces a
    multi-token layer but holds nothing of it (transformers drops it) is loaded without one.
    """
    if not Path(directory_or_preset).is_dir():
        return _load_preset(str(directory_or_preset), seed, vocabulary_size)
    directory = Path(directory_or_preset)
    config = read_config(directory)
    if vocabulary_size not in (None, config.vocab_size):
        raise ModelError(f"{directory} has {config.vocab_size} tokens, but the tokenizer has {vocabulary_size}.")
    files = _tensor_files(directory)
    mtp_prefix = f"model.layers.{config.num_hidden_layers}."
    if not any(name.startswith(mtp_prefix) for name in files):
        config = replace(config, num_nextn_predict_layers=0)
    decoder = Decoder(config)
    _read_tensors(decoder, directory, files)
    return decoder


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


def _load_preset(name: str, seed: int, vocabulary_size: int | None) -> Decoder:
    if name not in PRESETS and ("/" in name or os.sep in name):
        raise ModelError(f"There is no directory {name}; give a Hugging Face directory or one of {', '.join(PRESETS)}.")
    decoder = Decoder(preset(name, vocabulary_size))
    initialise(decoder, seed)
    return decoder


def _tensor_files(directory: Path) -> dict[str, str]:
    """Which file holds each tensor."""
    if (directory / INDEX).is_file():
        try:
            weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise ModelError(f"{directory / INDEX} is not an index of safetensors shards.") from None
        return dict(weight_map)
    if not (directory / SINGLE).is_file():
        raise ModelError(f"{directory} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read.")
    with _open(directory / SINGLE) as file:
        return dict.fromkeys(file.keys(), SINGLE)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelError(f"{path} is missing, though the index names it.") from None
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged: {error}.") from None


@torch.no_grad()
def _read_tensors(decoder: Decoder, directory: Path, files: dict[str, str]) -> None:
    targets, copies = dict(checkpoint_tensors(decoder)), shared_copies(decoder)
    _refuse_names("lacks", directory, sorted(set(targets) - set(files)))
    _refuse_names("has unexpected", directory, sorted(set(files) - set(targets) - set(copies)))
    # Copies are compared with what was read, so they come last.
    for wanted in (targets, copies):
        for file_name in sorted({files[name] for name in wanted if name in files}):
            with _open(directory / file_name) as file:
                held = set(file.keys())
                for name in sorted(name for name in wanted if files.get(name) == file_name):
                    if name not in held:
                        raise ModelError(f"{directory / file_name} lacks {name}, though the index places it there.")
                    _place(wanted[name], file.get_tensor(name), name, compare=wanted is copies)


def _refuse_names(verb: str, directory: Path, names: list[str]) -> None:
    if names:
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ModelError(f"The checkpoint {directory} {verb} {', '.join(names[:3])}{rest}, for what its config says.")


def _place(target: torch.Tensor, read: torch.Tensor, name: str, *, compare: bool) -> None:
    if read.shape != target.shape:
        raise ModelError(f"{name} has shape {list(read.shape)}; the config asks for {list(target.shape)}.")
    if read.dtype not in READABLE:
        raise ModelError(f"{name} is stored as {str(read.dtype).removeprefix('torch.')}; convert it to bfloat16 first.")
    if not compare:
        target.copy_(read)
    elif not torch.equal(target, read.to(target.dtype)):
        raise ModelError(f"{name} differs from the tensor it repeats; this model shares the two.")


def save_model(
    decoder: Decoder,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the decoder in Hugging Face form; `directory` must not exist and appears complete.

    Weights are stored as `dtype`, the routers' correction biases as float32 always (they are small, and near-ties hang
    on them). Raises ModelError where the directory exists, StorageFull where the disk is full.
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
        shard = {name: _on_host(tensors[name], _stored(name, dtype)) for name in names}
        with reporting_full_disk(directory / file_name):
            save_file(shard, directory / file_name, metadata={"format": "pt"})
            _flush(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")


def _stored(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith("e_score_correction_bias") else dtype


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


def _on_host(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # clone: safetensors refuses two tensors that share memory, which stacked experts do.
    return tensor.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
