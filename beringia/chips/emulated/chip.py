"""An emulated chip: a profile's arithmetic and a script's faults behind the interface that every chip has.

One emulated chip is open in a process at a time: two vendors' chips never share one, and torch has room for one plugin
device. Opening the same profile again takes the device over (its faults start anew); another profile has to wait until
the first is closed.

`memory` (a small JSON file) is what the emulated hardware remembers across restarts of the process: which one-time
faults have struck. It is written before the fault strikes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch

from beringia.chips.arithmetic.products import Fidelity
from beringia.chips.arithmetic.profile import Format, Profile, read_profile
from beringia.chips.chip import Capabilities, Chip, ChipFault, Memory, Opening
from beringia.chips.cpu import classify_cpu, host_memory, make_repeatable
from beringia.chips.emulated import device, kernels
from beringia.chips.emulated import faults as planted
from beringia.chips.emulated.fault_script import read_script
from beringia.errors import ChipUnavailable
from beringia.records.identity import ChipIdentity
from beringia.records.record import canonical_hash
from beringia.version import __version__

_GIBIBYTE = 2**30
_DTYPES: dict[Format, torch.dtype | None] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tfloat32": None,
    "hfloat32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
}
_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool})


class EmulatedChip(Chip):
    """One opened emulated device.

    >>> chip = EmulatedChip("h800")
    >>> model.to(chip.device)
    """

    _open: ClassVar[EmulatedChip | None] = None

    def __init__(
        self,
        profile_name: str,
        *,
        faults: str | None = None,
        seed: int = 0,
        memory: Path | None = None,
        device_name: str = "emu",
        index: int = 0,
        fidelity: Fidelity = "fast",
    ) -> None:
        """Register the device and give it this profile's arithmetic and these faults.

        `faults`: a script's name, or the path of a TOML file. `index`: which of several such devices this process sees
        as its only one; a script may strike one of them. Raises ChipUnavailable.
        """
        if fidelity not in get_args(Fidelity):
            raise ChipUnavailable(
                f"Fidelity {fidelity!r} was asked for; emulated chips compute in {' or '.join(get_args(Fidelity))}."
            )
        self.name = f"emulated:{profile_name}" if fidelity == "fast" else f"emulated:{profile_name}@{fidelity}"
        profile = read_profile(profile_name)
        script = read_script(faults or "none")
        opened = EmulatedChip._open
        if opened is not None and (opened._profile.hash, opened._fidelity) != (profile.hash, fidelity):
            raise ChipUnavailable(
                f"{self.name} was asked for, but {opened.name} is open in this process: one process drives "
                "one vendor's chip; close it, or start another process."
            )
        self._profile: Profile = profile
        self._fidelity: Fidelity = fidelity
        make_repeatable()
        self._faults = planted.Device(script, vendor=profile.vendor, seed=seed, index=index, memory=memory)
        self._device = device.register(device_name)
        device.install(
            kernels.kernels_of(profile, fidelity), [*kernels.results_of(profile), *self._faults.interposers()]
        )
        self._identity = _identity(profile, fidelity, faults)
        self.opening = Opening(index, faults, seed, remembers=memory is not None)
        EmulatedChip._open = self

    @property
    def profile(self) -> Profile:
        """The arithmetic that it computes with."""
        return self._profile

    @property
    def faults(self) -> planted.Device:
        """What is planted in it, and what has struck: for benchmarks, which know the truth."""
        return self._faults

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def identity(self) -> ChipIdentity:
        return self._identity

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            dtypes=_INTEGERS | {dtype for name in self._profile.storage.formats if (dtype := _DTYPES[name])},
            compute_dtype=getattr(torch, self._profile.storage.compute),
            sharding="ddp",
            compile=False,
            exact_int64=True,
            pinned_memory=False,
            streams=False,
            fused_optimizer=True,
        )

    @property
    def collective_backend(self) -> str:
        return "gloo"

    def memory(self) -> Memory:
        """Total as the part has it; used and peak are what this process holds of the host's memory."""
        host = host_memory()
        return Memory(self._profile.memory.gibibytes * _GIBIBYTE, host.used_bytes, host.peak_bytes)

    def synchronize(self) -> None:
        """Operators end before they return."""

    def classify(self, error: BaseException) -> ChipFault | None:
        """By the tables of the vendor whose words the profile's faults use; torch's and gloo's own errors by the
        CPU's."""
        return _vendor_fault(self._profile.vendor, error) or classify_cpu(error)

    def stream(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def begin_step(self, step: int) -> None:
        """The training step that begins: faults are scheduled by it."""
        self._faults.begin_step(step)

    def close(self) -> None:
        """Give the device back; tensors on it stay readable, and another profile may be opened."""
        if EmulatedChip._open is self:
            EmulatedChip._open = None


def register_device(
    name: str, profile: str, module_extras: dict[str, Any] | None = None, **options: Any
) -> EmulatedChip:
    """The emulated device under another name (`npu`), with attributes for its module (`torch.npu`).

    So that a vendor's adapter can be exercised on it without the vendor's software. `options` as for `EmulatedChip`.
    """
    chip = EmulatedChip(profile, device_name=name, **options)
    device.register(name, module_extras)
    return chip


def _identity(profile: Profile, fidelity: str, faults: str | None) -> ChipIdentity:
    overall, order = profile.float32_products, profile.reduction
    units = {
        f"unit.{name}": f"{unit.scheme}, {unit.result_bits} bits, {unit.final}" for name, unit in profile.units.items()
    }
    return ChipIdentity(
        vendor="emulated",
        sku=profile.part,
        truth="emulated",
        driver="none",
        runtime=f"beringia {__version__} on {torch.backends.cpu.get_cpu_capability()}",
        torch=torch.__version__,
        plugin="none",
        switches={
            "fidelity": fidelity,
            # Two lots of a part are two chips as far as evidence goes.
            "lot": "sound" if faults is None else canonical_hash(read_script(faults))[:12],
            "profile": profile.hash,
            "arithmetic": profile.arithmetic,
            "float32_products": f"{overall.format}, {overall.input_rounding}",
            "casts": profile.casts.rounding,
            "overflow": profile.overflow.mode,
            "subnormals": profile.subnormals.mode,
            "reduction": f"{order.scheme}, {order.lanes} lanes, {order.serial} serial",
            # The CPU's own sums inside a chunk depend on how many threads share them.
            "threads": str(torch.get_num_threads()),
            **units,
        },
        note=_note(profile),
    )


def _note(profile: Profile) -> str:
    assumed = profile.assumed_in_words()
    told = f"Documented by nobody, so assumed: {assumed}" if assumed else "Nothing about it is assumed"
    return f"Emulated: software computed it, by the arithmetic that is declared of this part. {told}."


def _vendor_fault(vendor: str, error: BaseException) -> ChipFault | None:
    if vendor == "ascend":
        from beringia.chips.ascend_faults import classify_ascend

        return classify_ascend(error)
    if vendor == "nvidia":
        from beringia.chips.cuda_faults import classify_cuda

        return classify_cuda(error)
    if vendor == "amd":
        from beringia.chips.cuda_faults import classify_rocm

        return classify_rocm(error)
    return None
