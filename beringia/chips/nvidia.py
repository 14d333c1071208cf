"""NVIDIA's chips, through torch's CUDA.

Opening one switches TF32 and everything nondeterministic off, and records it (`torch_cuda.py`). Bfloat16 products are
native from compute capability 8.0 (Ampere) and 8-bit floating-point products from 8.9 (Ada); older devices store them.

Reads nvidia-smi for the driver's version and for what is here; does not open a device to find it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from beringia.chips.chip import Capabilities, ChipFault, Presence, ServeArguments
from beringia.chips.cuda_faults import classify_cuda
from beringia.chips.torch_cuda import (
    Facts,
    TorchCuda,
    command_output,
    compiler_missing,
    deep_learning_library,
    device_uuid,
    identity_from,
    read_switches,
)
from beringia.records.identity import ChipIdentity

CHIP_NAME = "cuda"
"""By which recipes ask for it; `open.py` finds this file by it."""

__all__ = ["Nvidia", "capabilities_of", "classify_cuda", "find", "open_device"]

_MEBIBYTE = 1024 * 1024
_NUMBERS_ENVIRONMENT = (
    "NVIDIA_TF32_OVERRIDE",
    "CUBLASLT_WORKSPACE_SIZE",
    # From CUDA 12.9 on cuBLAS makes float32 products of bfloat16 ones, and float64 of integers, where these say so.
    "CUBLAS_EMULATE_SINGLE_PRECISION",
    "CUBLAS_EMULATE_DOUBLE_PRECISION",
    "CUBLAS_EMULATION_STRATEGY",
)
"""Variables that change numbers, beside those that AMD's libraries read too."""
_BFLOAT16_SINCE = (8, 0)
_FLOAT8_SINCE = (8, 9)
_COMPILES_SINCE = (7, 0)
"""Compute capability: Ampere's tensor cores, Ada's, and the oldest that triton generates code for (Volta)."""


class Nvidia(TorchCuda):
    """One NVIDIA device."""

    @property
    def identity(self) -> ChipIdentity:
        return identity_from(self._facts, "nvidia", "cuDNN", device_uuid(self._device))

    @property
    def capabilities(self) -> Capabilities:
        return capabilities_of(self._capability, compiles=self.compiler_missing() is None)

    def compiler_missing(self) -> str | None:
        return compiler_missing(self._capability >= _COMPILES_SINCE)

    def classify(self, error: BaseException) -> ChipFault | None:
        return classify_cuda(error)

    @property
    def _capability(self) -> tuple[int, int]:
        major, minor = torch.cuda.get_device_capability(self._device)
        return major, minor

    def _read_facts(self) -> Facts:
        return Facts(
            name=torch.cuda.get_device_name(self._device),
            architecture=".".join(map(str, self._capability)),
            driver=driver_version(),
            runtime=f"CUDA {torch.version.cuda}",
            deep_learning_library=deep_learning_library(),
            torch=torch.__version__,
            switches=read_switches(*_NUMBERS_ENVIRONMENT),
        )


def capabilities_of(capability: tuple[int, int], *, compiles: bool) -> Capabilities:
    """What a device of a compute capability can do. Pure."""
    dtypes = {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
    if capability >= _FLOAT8_SINCE:
        dtypes |= {torch.float8_e4m3fn, torch.float8_e5m2}
    return Capabilities(
        dtypes=frozenset(dtypes),
        compute_dtype=torch.bfloat16 if capability >= _BFLOAT16_SINCE else torch.float32,
        sharding="fsdp2",
        compile=compiles,
        exact_int64=True,
        pinned_memory=True,
        streams=True,
        fused_optimizer=True,
    )


def driver_version() -> str:
    """The driver's version, from nvidia-smi or the kernel module, else `unknown`."""
    printed = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if printed:
        return printed.splitlines()[0].strip()
    module = Path("/sys/module/nvidia/version")
    return module.read_text().strip() if module.exists() else "unknown"


def find() -> list[Presence]:
    """The NVIDIA devices that torch sees, or one entry that says why there is none."""
    if torch.version.cuda is None:
        return [
            _absent(f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch where a card is")
        ]
    count = torch.cuda.device_count()
    if count == 0:
        return [_absent(f"torch is built for CUDA {torch.version.cuda} but sees no device; look at nvidia-smi")]
    listed = parse_listing(
        command_output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    )
    # CUDA_VISIBLE_DEVICES may hide or reorder what nvidia-smi lists.
    known = listed if len(listed) == count else [("NVIDIA device, not opened", None)] * count
    return [
        Presence("cuda", sku, "real", memory_bytes, here=True, state="not opened", index=index)
        for index, (sku, memory_bytes) in enumerate(known)
    ]


def parse_listing(printed: str | None) -> list[tuple[str, int | None]]:
    """Name and memory in bytes of each device in nvidia-smi's list (`NVIDIA H100 80GB HBM3, 81559`)."""
    devices: list[tuple[str, int | None]] = []
    for line in (printed or "").splitlines():
        name, _, mebibytes = line.rpartition(",")
        # A device on Grace says [N/A]: it shares the host's memory.
        devices.append((name.strip(), int(mebibytes) * _MEBIBYTE if mebibytes.strip().isdigit() else None))
    return devices


def serve_arguments(quantization: str | None, *, latent: bool, experts: bool) -> ServeArguments:
    """vLLM is made for these: it chooses by itself."""
    return ServeArguments()


def open_device(index: int) -> Nvidia:
    """Open it. Raises ChipUnavailable if there is no such device."""
    return Nvidia(index)


def _absent(state: str) -> Presence:
    return Presence("cuda", "NVIDIA", "real", None, here=False, state=state)
