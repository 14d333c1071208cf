"""What NVIDIA's and AMD's chips share: torch drives both under the name `cuda`.

`TorchCuda` opens such a device, sets the switches that make a run repeat bit for bit, and answers for memory and
streams. `nvidia.py` and `amd.py` add who the chip is, what it can do and what its errors mean;
`torch.version.hip` tells them apart. Identity is assembled by a pure function from `Facts`, so that it can be checked
without a device.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beringia.chips.chip import Chip, Memory
from beringia.errors import ChipUnavailable
from beringia.machine.tools import ToolFailed, run_tool
from beringia.numerics.deterministic import use_deterministic_algorithms
from beringia.records.identity import ChipIdentity

_WORKSPACE = ":4096:8"
"""CUBLAS_WORKSPACE_CONFIG: eight buffers of 4 MiB. cuBLAS repeats its results only with a fixed workspace, and torch
refuses deterministic products without it. `:16:8` repeats too and is slower."""
_REPEATING_WORKSPACES = (_WORKSPACE, ":16:8")


@dataclass(frozen=True)
class Facts:
    """What torch and the driver say about one device; everything an identity is made of."""

    name: str
    """As the driver gives it: `NVIDIA H100 80GB HBM3`, `AMD Instinct MI300X`."""
    architecture: str
    """`9.0` (compute capability) or `gfx942:sramecc+:xnack-`."""
    driver: str
    runtime: str
    """CUDA or ROCm version that torch was built with."""
    deep_learning_library: str
    """cuDNN's or MIOpen's version."""
    torch: str
    switches: dict[str, str]


class TorchCuda(Chip):
    """One device that torch calls `cuda:<index>`."""

    name = "cuda"

    def __init__(self, index: int = 0) -> None:
        """Set the switches, select the device, read who it is. Raises ChipUnavailable if there is no such device."""
        found = torch.cuda.device_count()
        if index >= found:
            raise ChipUnavailable(
                f"cuda:{index} was asked for, but torch sees {found} device{'s' * (found != 1)}: "
                "ask for a lower index, or look at nvidia-smi or rocm-smi."
            )
        make_repeatable()
        torch.cuda.set_device(index)
        self._device = torch.device("cuda", index)
        self._facts = self._read_facts()

    @abstractmethod
    def _read_facts(self) -> Facts: ...

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def collective_backend(self) -> str:
        # RCCL answers to the same name.
        return "nccl"

    def memory(self) -> Memory:
        """Total of the device; used and peak by this process's tensors."""
        total_bytes = torch.cuda.get_device_properties(self._device).total_memory
        return Memory(
            total_bytes, torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        )

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]  # torch: untyped

    def close(self) -> None:
        torch.cuda.empty_cache()


def make_repeatable() -> None:
    """Switches under which the same program repeats bit for bit on the same device. Raises ChipUnavailable."""
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACE)
    if workspace not in _REPEATING_WORKSPACES:
        raise ChipUnavailable(
            f"CUBLAS_WORKSPACE_CONFIG={workspace} is set, but products repeat only with "
            f"{' or '.join(_REPEATING_WORKSPACES)}: unset it."
        )
    use_deterministic_algorithms()
    # Filling every new tensor changes no number of a correct program and costs a pass over memory.
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    # Benchmarking picks the convolution that was fastest this time.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # TF32 keeps 10 of 23 fraction bits; torch leaves it on for convolutions.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    # Split-K may otherwise add partial sums in the storage format.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_accumulation = False


def read_switches(*environment: str) -> dict[str, str]:
    """The switches in force, read back, and the named environment variables that change numbers."""
    matmul = torch.backends.cuda.matmul
    switches = {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "tf32_matmul": matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
        "fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction,
        "fp16_accumulation": matmul.allow_fp16_accumulation,
    }
    # The collective algorithm sets the order of a reduction.
    variables = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO", *environment)
    return {name: str(value) for name, value in switches.items()} | {
        name: os.environ.get(name, "unset") for name in variables
    }


def identity_from(facts: Facts, vendor: str, library: str, device: str = "") -> ChipIdentity:
    """Who the chip is; `library` names the deep-learning library (`cuDNN`, `MIOpen`), `device` is its UUID. Pure."""
    return ChipIdentity(
        vendor=vendor,
        sku=f"{facts.name} ({facts.architecture})",
        truth="real",
        driver=facts.driver,
        runtime=f"{facts.runtime}, {library} {facts.deep_learning_library}",
        torch=facts.torch,
        plugin="none",
        switches=facts.switches,
        device=device,
    )


def device_uuid(device: torch.device) -> str:
    """The single device's UUID, from the driver."""
    return str(torch.cuda.get_device_properties(device).uuid)


def deep_learning_library() -> str:
    """cuDNN's version, or MIOpen's, which answers under cuDNN's name."""
    return str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def compiler_missing(architecture_supported: bool) -> str | None:
    """Why torch.compile cannot compile for such a device here, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton, and it is not installed beside this torch: install triton."
    # triton compiles what starts its kernels with the machine's own compiler, against this Python's headers.
    if os.environ.get("CC") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "torch.compile needs a C compiler, and neither gcc nor clang is on the path: install gcc or set CC."
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return f"torch.compile needs Python's headers, and {header} is not there: install Python's development package."
    if not architecture_supported:
        return "torch.compile has no code generator for a device this old."
    return None


def command_output(*command: str) -> str | None:
    """What a vendor's command prints, or None if it is not here, fails or hangs."""
    try:
        return run_tool(command, seconds=10).strip()
    except ToolFailed:
        return None
