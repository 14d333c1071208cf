"""Open a chip by the name a user gives it, and say which chips are here.

Names: `cpu`, `cuda` (NVIDIA, or AMD where torch is built for ROCm), `npu`, `emulated:<profile>` (in the fast fidelity;
`emulated:<profile>@exact` in the bit-exact one), and `auto`, the first present of cuda, npu, cpu. A chip's file is
found by the name it says and imported only when that chip is asked for: two vendors' plugins cannot share a process,
and opening the CPU must not load one.

Opens at most the one chip asked for; holds no registry and no state.
"""

from __future__ import annotations

import difflib
import importlib
import re
from pathlib import Path
from types import ModuleType

import beringia.chips as chips
from beringia.chips.chip import Chip, Opening, Presence, ServeArguments
from beringia.errors import ChipUnavailable

_AUTO = ("cuda", "npu", "cpu")
_EMULATED = "emulated:"
_NAMED = re.compile(r'^CHIP_NAME = "([\w-]+)"', re.MULTILINE)
_PROFILES = Path(__file__).parent / "catalogue" / "arithmetic"


def open_chip(
    name: str, *, index: int = 0, faults: str | None = None, seed: int = 0, memory: Path | None = None
) -> Chip:
    """Open device `index` of the chip called `name`; `.name` of the result has `auto` resolved.

    `faults` (a script), `seed` and `memory` (a file that remembers which faults have struck, across restarts) belong to
    emulated chips; a real chip refuses `faults`, and has no use for the other two.
    Raises ChipUnavailable with what was looked for, what was found and what to do.
    """
    if name.startswith(_EMULATED):
        return _open_emulated(name.removeprefix(_EMULATED), index, faults, seed, memory)
    chip: Chip = _driver(name, faults).open_device(index)
    chip.opening = Opening(index)
    return chip


def check_present(name: str, *, faults: str | None = None) -> None:
    """Raise the ChipUnavailable that `open_chip` would raise for a chip that is not here; opens no device but an
    emulated one."""
    if name.startswith(_EMULATED):
        _open_emulated(name.removeprefix(_EMULATED), 0, faults, 0, None).close()
    else:
        _driver(name, faults)


def first_present() -> str:
    """What `auto` means on this machine: the first present of cuda, npu, cpu."""
    return next(name for name in _AUTO if any(found.here for found in _look_for(name)))


def serve_arguments(name: str, quantization: str | None, *, latent: bool, experts: bool) -> ServeArguments:
    """What vLLM needs to serve a model on a real chip, which need not be here: vLLM opens it in its own interpreter.

    `quantization`: of the model's files, as its configuration names it; `latent`: whether its attention is latent;
    `experts`: whether it has routed ones. Raises ChipUnavailable for a chip that vLLM cannot use.
    """
    if name.startswith(_EMULATED):
        raise ChipUnavailable(f"vLLM cannot serve on {name}: emulated chips are served by the engine (--engine own).")
    name = first_present() if name == "auto" else name
    if name not in _files():
        raise ChipUnavailable(_unknown(name))
    found: ServeArguments = _module(_files()[name][0]).serve_arguments(quantization, latent=latent, experts=experts)
    return found


def present() -> list[Presence]:
    """The chips that are here, and the emulated ones, which always are. Opens none of them."""
    return [found for found in survey() if found.here]


def _files() -> dict[str, tuple[str, ...]]:
    """Name -> modules that may drive it: the files here that say `CHIP_NAME = "..."`. Each has
    `find() -> list[Presence]` and `open_device(index) -> Chip`. Read as text: importing one may load a plugin."""
    found: dict[str, list[str]] = {}
    for path in sorted(path for folder in chips.__path__ for path in Path(folder).glob("*.py")):
        if named := _NAMED.search(path.read_text()):
            found.setdefault(named[1], []).append(f"{chips.__name__}.{path.stem}")
    return {name: tuple(found[name]) for name in sorted(found)}


def survey() -> list[Presence]:
    """Every chip that could be here; one that is not says in `state` what was looked for and what to do."""
    real = [found for name in _files() for found in _look_for(name)]
    emulated = [
        Presence(f"{_EMULATED}{profile}", profile, "emulated", None, here=True, state="in software")
        for profile in emulated_profiles()
    ]
    return real + emulated


def emulated_profiles() -> list[str]:
    """Names that may follow `emulated:`."""
    return sorted(path.stem for path in _PROFILES.glob("*.toml"))


def _look_for(name: str) -> list[Presence]:
    found = [presence for module in _files()[name] for presence in _module(module).find()]
    # NVIDIA and AMD share a name: where one is here, the other's absence is no news.
    return [presence for presence in found if presence.here] or found


def _driver(name: str, faults: str | None) -> ModuleType:
    """The module that drives a real chip which is here."""
    if name != "auto" and name not in _files():
        raise ChipUnavailable(_unknown(name))
    if faults is not None:
        raise ChipUnavailable(
            f"faults = {faults!r} was asked for on {name!r}, but only emulated chips have planted faults: "
            "use an emulated chip (emulated:<profile>), or leave faults out."
        )
    name = first_present() if name == "auto" else name
    absent: list[str] = []
    for path in _files()[name]:
        module = _module(path)
        found = module.find()
        if any(presence.here for presence in found):
            return module
        absent += [presence.state for presence in found]
    raise ChipUnavailable(f"{name!r} was asked for, but it is not here: {'; '.join(absent)}.")


def _open_emulated(name: str, index: int, faults: str | None, seed: int, memory: Path | None) -> Chip:
    profile, _, fidelity = name.partition("@")
    emulated = _module("beringia.chips.emulated")
    chip: Chip = emulated.EmulatedChip(
        profile, faults=faults, seed=seed, memory=memory, index=index, fidelity=fidelity or "fast"
    )
    return chip


def _module(path: str) -> ModuleType:
    return importlib.import_module(path)


def _unknown(name: str) -> str:
    known = ["auto", *_files(), *(f"{_EMULATED}{profile}" for profile in emulated_profiles())]
    if name == _EMULATED.removesuffix(":"):
        return f"{name!r} needs a profile, as in 'emulated:h800'. Known: {', '.join(known)}."
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
    return f"There is no chip called {name!r}. {hint}"
