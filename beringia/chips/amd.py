"""AMD's chips, through torch built for ROCm, which wears CUDA's names (`torch.version.hip` tells).

What a device can do follows from its architecture name (`gfx942:sramecc+:xnack-`): gfx90a is MI210 and MI250X, gfx942
MI300X, gfx950 MI350. MI200's matrix unit flushes subnormal 16-bit inputs and outputs, which no switch changes; the
MI300's 8-bit formats are the FNUZ ones, whose bits mean other numbers than NVIDIA's.
"""

from __future__ import annotations

from pathlib import Path

import torch

from beringia.chips.chip import Capabilities, ChipFault, Presence
from beringia.chips.cuda_faults import classify_rocm
from beringia.chips.torch_cuda import (
    Facts,
    TorchCuda,
    compiler_missing,
    deep_learning_library,
    device_uuid,
    identity_from,
    read_switches,
)
from beringia.records.identity import ChipIdentity

CHIP_NAME = "cuda"
"""By which recipes ask for it; `open.py` finds this file by it."""

__all__ = ["Amd", "capabilities_of", "classify_rocm", "find", "open_device"]

_FLOAT8: dict[str, frozenset[torch.dtype]] = {
    "gfx942": frozenset({torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}),
    "gfx950": frozenset({torch.float8_e4m3fn, torch.float8_e5m2}),
}
_BFLOAT16 = ("gfx90a", "gfx942", "gfx950")
"""Architectures with bfloat16 products at the matrix unit's full rate."""

_ENVIRONMENT = (
    # Chooses fp16 products in bfloat16 on MI200, to keep subnormals.
    "ROCBLAS_INTERNAL_FP16_ALT_IMPL",
    "MIOPEN_DEBUG_CONVOLUTION_ATTRIB_FP16_ALT_IMPL",
    # Chooses the library that multiplies.
    "TORCH_BLAS_PREFER_HIPBLASLT",
    "HIPBLASLT_ALLOW_TF32",
)


class Amd(TorchCuda):
    """One AMD device."""

    @property
    def identity(self) -> ChipIdentity:
        return identity_from(self._facts, "amd", "MIOpen", device_uuid(self._device))

    @property
    def capabilities(self) -> Capabilities:
        return capabilities_of(self._facts.architecture, compiles=self.compiler_missing() is None)

    def compiler_missing(self) -> str | None:
        return compiler_missing(self._facts.architecture.startswith("gfx9"))

    def classify(self, error: BaseException) -> ChipFault | None:
        return classify_rocm(error)

    def _read_facts(self) -> Facts:
        properties = torch.cuda.get_device_properties(self._device)
        return Facts(
            name=properties.name,
            architecture=properties.gcnArchName,
            driver=driver_version(),
            runtime=f"ROCm {torch.version.hip}",
            deep_learning_library=deep_learning_library(),
            torch=torch.__version__,
            switches=read_switches(*_ENVIRONMENT),
        )


def capabilities_of(architecture: str, *, compiles: bool) -> Capabilities:
    """What a device of an architecture (`gfx942:sramecc+:xnack-`) can do. Pure."""
    family = architecture.split(":")[0]
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
    return Capabilities(
        dtypes=frozenset(dtypes | _FLOAT8.get(family, frozenset())),
        compute_dtype=torch.bfloat16 if family in _BFLOAT16 else torch.float32,
        sharding="fsdp2",
        compile=compiles,
        exact_int64=True,
        pinned_memory=True,
        streams=True,
        fused_optimizer=True,
    )


def driver_version() -> str:
    """The amdgpu kernel module's version; a module that came with the kernel has none."""
    module = Path("/sys/module/amdgpu/version")
    return module.read_text().strip() if module.exists() else "in-kernel amdgpu"


def find() -> list[Presence]:
    """The AMD devices that torch sees, or one entry that says why there is none."""
    if torch.version.hip is None:
        return [_absent("torch is built without ROCm")]
    count = torch.cuda.device_count()
    if count == 0:
        return [_absent(f"torch is built for ROCm {torch.version.hip} but sees no device; look at rocm-smi")]
    return [
        Presence("cuda", "AMD device, not opened", "real", None, here=True, state="not opened", index=index)
        for index in range(count)
    ]


def open_device(index: int) -> Amd:
    """Open it. Raises ChipUnavailable if there is no such device."""
    return Amd(index)


def _absent(state: str) -> Presence:
    return Presence("cuda", "AMD", "real", None, here=False, state=state)
