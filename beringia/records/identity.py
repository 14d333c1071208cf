"""Who a chip is: the chip together with the software that drives it. Evidence holds for one identity only."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from beringia.records.record import Record, canonical_hash

_BESIDE = {"note", "device"}
"""Fields that change no number."""


class ChipIdentity(Record):
    """Everything that can change a chip's numbers. Two chips with the same hash may share evidence."""

    vendor: str
    """`cpu`, `nvidia`, `amd`, `ascend`, `emulated`."""
    sku: str
    """The part as its driver names it, down to the variant: the variant changes results (752T and 560T differ)."""
    truth: Literal["real", "emulated"]
    """Whether silicon computes, or our emulator."""
    driver: str
    """Driver and firmware version, or `none`."""
    runtime: str
    """CUDA, ROCm or CANN version; for a CPU its instruction set as torch uses it."""
    torch: str
    plugin: str
    """Version of the torch plugin (torch_npu), or `none`."""
    switches: dict[str, str]
    """Numeric switches in force: deterministic level, TF32/HF32, INF_NAN mode, fidelity of an emulator, ..."""
    note: str = ""
    """What a reader must know before trusting this, e.g. "contract-tested, never run on Ascend"."""
    device: str = Field(default="", exclude_if=lambda device: not device)
    """Which single device it was, as its driver tells (a UUID); empty where it does not. Evidence is about the kind, so
    it is not in the hash."""

    @property
    def hash(self) -> str:
        """SHA-256 over all fields but the note and the device."""
        return canonical_hash(self.model_dump(mode="json", exclude=_BESIDE))

    def differences(self, other: ChipIdentity) -> dict[str, tuple[str, str]]:
        """What the two are different in, by field or switch: (here, there)."""
        here, there = ({**one.model_dump(exclude={"switches", "device"}), **one.switches} for one in (self, other))
        pairs = {name: (here.get(name, "absent"), there.get(name, "absent")) for name in here.keys() | there.keys()}
        return {name: pairs[name] for name in sorted(pairs) if pairs[name][0] != pairs[name][1]}
