"""A stand-in for torch_npu with exactly the names and signatures that a wheel has, as recorded in `tests/data/`.

A name that the wheel does not have raises AttributeError, and a call that its signature does not accept raises
TypeError, so code that runs against the stand-in uses torch_npu as it is. What the recorded functions answer is made up
(`Answers`): a device of 64 GiB called Ascend910B2. Switches are remembered, so that what was set can be read.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

DATA = Path(__file__).parent / "data"
RECORDS = sorted(DATA.glob("torch_npu_*_signatures.json"))


def read_record(version: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((DATA / f"torch_npu_{version}_signatures.json").read_text())
    return record


def signature(arguments: str) -> inspect.Signature:
    """From the recorded text of a definition's arguments, such as `device=..., priority=..., **kwargs`."""
    return inspect.signature(eval(f"lambda {arguments}: None"))


class Answers:
    """What the made-up device answers; one method for each function that the adapter calls."""

    def __init__(self) -> None:
        self.jit_compile = True
        self.level = 0
        self.calls: list[str] = []

    def device_count(self) -> int:
        return 1

    def set_device(self, device: torch.device) -> None: ...

    def set_deterministic_level(self, level: int) -> None:
        self.level = level

    def set_compile_mode(self, jit_compile: bool = False) -> None:
        self.jit_compile = jit_compile

    def is_jit_compile_false(self) -> bool:
        return not self.jit_compile

    def are_compatible_impl_enabled(self) -> bool:
        return False

    def is_bf16_supported(self) -> bool:
        return True

    def is_support_inf_nan(self) -> bool:
        return True

    def get_device_name(self, device_name: Any = None) -> str:
        return "Ascend910B2"

    def get_soc_version(self) -> int:
        return 222

    def get_cann_version(self, module: str = "CANN") -> str:
        return {"CANN": "8.5.0", "DRIVER": "25.3.0"}[module]

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return 60 * 2**30, 64 * 2**30

    def memory_allocated(self, device: Any = None) -> int:
        return 3 * 2**30

    def max_memory_allocated(self, device: Any = None) -> int:
        return 4 * 2**30

    def synchronize(self, device: Any = None) -> None: ...

    def Stream(self, device: Any = None) -> str:  # noqa: N802  # the wheel's name
        return "a stream"

    def stream(self, stream: Any) -> Any:
        return nullcontext(stream)

    def empty_cache(self) -> None: ...


class _Switch:
    """`torch_npu.npu.matmul` and its like: only the recorded attributes can be set and read."""

    def __init__(self, settable: list[str], readable: list[str], initial: bool) -> None:
        self.__dict__.update(_settable=settable, _readable=readable, _values={}, _initial=initial)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._settable:
            raise AttributeError(f"torch_npu has no switch {name!r} here")
        self._values[name] = value

    def __getattr__(self, name: str) -> Any:
        if name not in self._readable:
            raise AttributeError(f"torch_npu cannot read {name!r} here")
        return self._values.get(name, self._initial)


def stand_in(version: str, answers: Answers | None = None) -> ModuleType:
    """A module that has the names of the recorded wheel of that version, and no others."""
    record = read_record(version)
    answers = answers or Answers()
    modules = {name: ModuleType(name) for name in record["modules"]}
    for module_name, entries in record["modules"].items():
        for name, entry in entries.items():
            setattr(modules[module_name], name, _attribute(name, entry, modules, answers, version))
    return modules["torch_npu"]


def install(version: str) -> tuple[ModuleType, Answers]:
    """Make `import torch_npu` give the stand-in in this process."""
    answers = Answers()
    module = stand_in(version, answers)
    sys.modules["torch_npu"] = module
    return module, answers


def _attribute(name: str, entry: dict[str, Any], modules: dict[str, ModuleType], answers: Answers, version: str) -> Any:
    if "module" in entry:
        return modules[entry["module"]]
    if "value" in entry:
        return version
    if "settable" in entry:
        # HF32 is on for convolutions in a fresh process; starting on shows that it is switched off.
        return _Switch(entry["settable"], entry["readable"], initial=True)
    return _callable(name, entry.get("function", entry.get("class", "")), answers)


def _callable(name: str, arguments: str, answers: Answers) -> Callable[..., Any]:
    accepted = signature(arguments)

    def call(*positional: Any, **keywords: Any) -> Any:
        accepted.bind(*positional, **keywords)
        answers.calls.append(name)
        return getattr(answers, name)(*positional, **keywords)

    return call
