"""Beringia carries a language model across the gap between accelerator vendors.

>>> import beringia                                       # before torch: it sets the OpenMP runtime up
>>> chip = beringia.chip("emulated:ascend-910b")         # Chip: .device, .identity, .capabilities, ...
>>> model = beringia.load("a/hugging-face/dir", chip)    # nn.Module: logits_BTV = model(tokens_BT)
>>> beringia.save(model, "another/dir")                  # Hugging Face form
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from beringia.threads import prepare_threads

if TYPE_CHECKING:
    from beringia.chips.chip import Chip
    from beringia.model import Decoder

__version__ = "0.1.0"

__all__ = ["chip", "load", "save"]

# Before anything imports torch: OpenMP reads its settings once, when it is loaded.
prepare_threads()


def chip(name: str, *, index: int = 0, faults: str | None = None, seed: int = 0) -> Chip:
    """Open a chip: `cpu`, `cuda`, `npu`, `auto` or `emulated:<profile>`. Raises ChipUnavailable."""
    from beringia.chips.open import open_chip

    return open_chip(name, index=index, faults=faults, seed=seed)


def load(directory_or_preset: str | Path, chip: Chip | None = None, *, seed: int = 0) -> Decoder:
    """A model from a Hugging Face directory or a preset, on a chip (None: the CPU) in that chip's compute dtype.

    Weights stay float32. Raises ModelError.
    """
    from beringia.model import load_model

    decoder = load_model(directory_or_preset, seed=seed)
    if chip is not None:
        decoder.set_compute_dtype(chip.capabilities.compute_dtype)
        decoder.to(chip.device)
    return decoder


def save(model: Decoder, directory: str | Path) -> None:
    """Write a model in Hugging Face form; the directory appears complete or not at all."""
    from beringia.model import save_model

    save_model(model, Path(directory))
