"""A decoder with weights: made empty in the dtype and on the device where they are held, then filled tensor by tensor.

Nothing is held twice on the way: not in another dtype, not on another device, not as a file's pages. Knows no names of
published checkpoints (`hugging_face.py` does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from beringia.checkpoint.reader import Stored, TensorReader
from beringia.errors import ModelError
from beringia.model.config import DecoderConfig
from beringia.model.decoder import Decoder
from beringia.numerics.state_hash import dtype_name

HELD = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What weights can be held in, and read from."""

_READABLE = {dtype_name(dtype) for dtype in HELD}


def is_readable(dtype: str) -> bool:
    """Whether weights that are stored in this dtype, by torch's name, are read."""
    return dtype in _READABLE


def dtype_of_buffer(dtype: torch.dtype) -> torch.dtype:
    """Routers' correction biases are never held in less than float32: they are small, and near-ties hang on them."""
    return torch.promote_types(dtype, torch.float32)


def unfilled(config: DecoderConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Decoder:
    """A decoder whose weights are allocated and not yet written; buffers are zero. Raises ModelError."""
    if dtype not in HELD:
        held = ", ".join(sorted(_READABLE))
        raise ModelError(f"Weights were asked for in {dtype_name(dtype)}; they are held in {held}.")
    with torch.device("meta"):
        decoder = Decoder(config)
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied one stays one
    for module in decoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                # Not empty_like: of a meta tensor it loads sympy, 2 s and 37 MB.
                made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
            setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            kind = dtype_of_buffer(dtype) if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, torch.zeros(buffer.shape, dtype=kind, device=device))
    return decoder


def filled(config: DecoderConfig, reader: TensorReader, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder on the CPU from what a run saved of it: its own names, experts stacked. Raises ModelError."""
    decoder = unfilled(config, dtype)
    live = dict(decoder.state_dict(keep_vars=True))
    if config.tie_word_embeddings:
        del live["lm_head.weight"]
    missing = live.keys() - reader.tensors.keys()
    if missing:
        raise ModelError(f"The checkpoint {reader.place} lacks {', '.join(sorted(missing)[:3])}: another model's?")
    fill(live, reader)
    return decoder


def fill(targets: Mapping[str, torch.Tensor], reader: TensorReader) -> None:
    """Read every target, in the order of the files. Raises ModelError naming what does not fit."""
    for name, stored in reader.tensors.items():
        if name in targets:
            check_fits(name, stored, targets[name])
            reader.read(name, targets[name])


def check_fits(name: str, stored: Stored, target: torch.Tensor) -> None:
    """Raise ModelError unless the stored tensor can become the target."""
    if stored.shape != tuple(target.shape):
        raise ModelError(
            f"{stored.file}: {name} has shape {list(stored.shape)}; the config asks for {list(target.shape)}."
        )
    if not is_readable(stored.dtype):
        raise ModelError(f"{stored.file}: {name} is stored as {stored.dtype}; convert it to bfloat16 first.")


@torch.no_grad()
def draw(named: Iterable[tuple[str, torch.Tensor]], seed: int, spread: float) -> None:
    """Fill tensors from the seed: matrices normal(0, spread), norms one, biases zero.

    Each tensor has its own generator, seeded by its name, and is drawn on the CPU in float32: device, dtype and order
    do not matter.
    """
    for name, tensor in named:
        if tensor.dim() >= 2:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
            tensor.copy_(drawn.mul_(spread))
        else:
            tensor.fill_(1.0 if name.endswith("norm.weight") else 0.0)
