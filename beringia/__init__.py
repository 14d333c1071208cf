"""Beringia carries a language model across the gap between accelerator vendors.

>>> import beringia                                       # before torch: it sets the OpenMP runtime up
>>> chip = beringia.chip("emulated:ascend-910b")         # Chip: .device, .identity, .capabilities, ...
>>> model = beringia.load("a/hugging-face/dir", chip)    # nn.Module: logits_BTV = model(tokens_BT)
>>> beringia.save(model, "another/dir")                  # Hugging Face form
>>> certificate = beringia.certify("emulated:ascend-910b", "a/hugging-face/dir")
>>> engine = beringia.Engine("a/hugging-face/dir", chip)
>>> completions = engine.generate([[1, 2, 3]], beringia.Sampling(max_tokens=64))
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beringia.machine.threads import prepare_threads
from beringia.version import __version__

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from beringia.chips.chip import Chip
    from beringia.engine import Engine, Sampling
    from beringia.engine.endpoint import Endpoint
    from beringia.model import Decoder
    from beringia.qualify.subject import Subject
    from beringia.records.certificate import Certificate

__all__ = ["Endpoint", "Engine", "Sampling", "__version__", "certify", "chip", "load", "save"]

# Before anything imports torch: OpenMP reads its settings once, when it is loaded.
prepare_threads()


def __getattr__(name: str) -> Any:
    # Not at import: they load torch.
    if name in ("Engine", "Sampling"):
        from beringia import engine

        return getattr(engine, name)
    if name == "Endpoint":
        from beringia.engine.endpoint import Endpoint

        return Endpoint
    raise AttributeError(f"module 'beringia' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def chip(name: str, *, index: int = 0, faults: str | None = None, seed: int = 0) -> Chip:
    """Open a chip: `cpu`, `cuda`, `npu`, `auto` or `emulated:<profile>`. Raises ChipUnavailable."""
    from beringia.chips.open import open_chip

    return open_chip(name, index=index, faults=faults, seed=seed)


def load(
    directory_or_preset: str | Path, chip: Chip | None = None, *, seed: int = 0, dtype: torch.dtype | None = None
) -> Decoder:
    """A model from a Hugging Face directory or a preset, on a chip (None: the CPU) in that chip's compute dtype.

    Weights are held in `dtype`, None: float32; while they are read, nothing of their size is held beside them. Raises
    ModelError.
    """
    import torch

    from beringia.model import load_model

    device = "cpu" if chip is None else chip.device
    decoder = load_model(directory_or_preset, seed=seed, dtype=dtype or torch.float32, device=device)
    if chip is not None:
        decoder.set_compute_dtype(chip.capabilities.compute_dtype)
    return decoder


def save(model: Decoder, directory: str | Path) -> None:
    """Write a model in Hugging Face form; the directory appears complete or not at all."""
    from beringia.model import save_model

    save_model(model, Path(directory))


def certify(
    chip: str | Chip,
    model: str | Path | Subject,
    *,
    against: str | Path | None = None,
    trusted_keys: Collection[str] = (),
    seed: int = 0,
) -> Certificate:
    """Whether a chip is fit to train a model, to serve it, or neither: evidence and a verdict.

    A model by preset or Hugging Face directory is qualified in processes of its own, on the chip of that name, or on
    what an opened chip was opened with (its faults, too), against a bundle (`against`, signed by one of `trusted_keys`,
    none: by this machine's) or the CPU of this machine, which is refused as a reference where it is not sound. A
    `Subject` (`beringia.qualify.subject.ModuleSubject` makes one of any `nn.Module`) is qualified in this process, on
    the opened chip, or on one opened here. Raises InputError, also where such a process would open another chip.
    """
    from beringia.qualify import qualification

    if isinstance(model, str | Path):
        bundle = None if against is None else Path(against)
        request = (
            qualification.Request(chip, str(model), seed=seed)
            if isinstance(chip, str)
            else qualification.request_for(chip, str(model), seed)
        )
        given = frozenset({"seed"} if seed else ())
        request = replace(request, trusted_keys=tuple(trusted_keys), given=given)
        return qualification.qualify(request, bundle, opened=None if isinstance(chip, str) else chip.identity)
    from beringia.chips.open import open_chip
    from beringia.errors import InputError

    of_a_bundle = {"against": against is not None, "trusted_keys": bool(trusted_keys), "seed": seed != 0}
    if any(of_a_bundle.values()):
        named = " and ".join(name for name, is_given in of_a_bundle.items() if is_given)
        raise InputError(
            f"{named} was given for a Subject, which has a seed of its own and is compared with the CPU of this "
            f"machine: leave {named} out, or give the model as a preset or directory."
        )
    if not isinstance(chip, str):
        return qualification.qualify_here(chip, model)
    opened = open_chip(chip)
    try:
        return qualification.qualify_here(opened, model)
    finally:
        opened.close()
