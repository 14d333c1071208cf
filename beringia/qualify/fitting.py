"""Whether a model fits on the machine that qualifies it, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from beringia.chips.cpu import host_memory, taken_memory_bytes
from beringia.errors import ModelError
from beringia.model import Decoder, config_of

BYTES_PER_PARAMETER = 54
"""Of float64: weights, gradients, two moments, and the weights before training (40); the rest are the weights as they
were read and what is in hand. Training itself takes 16."""
BYTES_BESIDE = 2**30
"""The interpreter, torch, activations. Both numbers from SmolLM2-135M, whose largest process takes 8.3 GB, and from
r2-micro with 1.9 million parameters and 1.0 GB (`benchmarks/qualify_time.py`)."""


def parameters_of(source: str, vocabulary_size: int | None = None) -> int:
    """How many a model has, by its configuration alone. Raises what reading that raises."""
    with torch.device("meta"):
        decoder = Decoder(config_of(source, vocabulary_size))
    return sum(parameter.numel() for parameter in decoder.parameters())


def check_fits(source: str, layers: int | None, vocabulary_size: int | None = None) -> None:
    """Raise ModelError where the machine's memory is too small, saying how much is missing and how many layers fit."""
    config = config_of(source, vocabulary_size)
    with torch.device("meta"):
        decoder = Decoder(config)
    inside = sum(parameter.numel() for parameter in decoder.layers.parameters())
    outside = sum(parameter.numel() for parameter in decoder.parameters()) - inside
    layer = inside / config.num_hidden_layers
    count = config.num_hidden_layers if layers is None else layers
    memory = host_memory()
    free = memory.total_bytes - max(memory.used_bytes, taken_memory_bytes())
    needed = BYTES_BESIDE + BYTES_PER_PARAMETER * (outside + layer * count)
    if needed <= free:
        return
    fitting = int(((free - BYTES_BESIDE) / BYTES_PER_PARAMETER - outside) / layer)
    advice = f"give --layers {fitting}" if fitting >= 1 else "use a machine with more memory"
    raise ModelError(
        f"{Path(source).name} needs {needed / 2**30:.1f} GiB to be qualified (float64, gradients, moments), and this "
        f"machine, beside what is in use, has {free / 2**30:.1f} GiB: {(needed - free) / 2**30:.1f} GiB are missing; "
        f"{advice}."
    )
