"""Evidence as it comes out of the process that probes a chip: one line a fact.

A chip may hang or die in a probe; what was written before that is evidence, and the probe that was begun last says
where it happened.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from beringia.records.certificate import Departure, OperatorCheck, ProbeResult
from beringia.records.identity import ChipIdentity
from beringia.records.record import Record


class Opened(Record):
    """The chip is open."""

    kind: Literal["opened"] = "opened"
    name: str
    identity: ChipIdentity
    compute_dtype: str
    """What it trains in by default."""


class Begun(Record):
    """A probe begins."""

    kind: Literal["begun"] = "begun"
    probe: str


class Probed(Record):
    """A probe's result."""

    kind: Literal["probed"] = "probed"
    result: ProbeResult


class Checked(Record):
    """One operator call, in the order of execution."""

    kind: Literal["checked"] = "checked"
    check: OperatorCheck


class Unrepeatable(Record):
    """A call, or nothing that could be named, that gives other bits the second time."""

    kind: Literal["unrepeatable"] = "unrepeatable"
    module: str
    operator: str
    direction: str
    ordinal: int


class Departed(Record):
    """Where a model first differs, though no operator was wrong."""

    kind: Literal["departed"] = "departed"
    departure: Departure


Fact = Annotated[
    Opened | Begun | Probed | Checked | Unrepeatable | Departed,
    Field(discriminator="kind"),
]
fact_adapter: TypeAdapter[Fact] = TypeAdapter(Fact)


def failure(probe: str, what: str) -> ProbeResult:
    """A chip that fails while it is probed can be used for nothing."""
    return ProbeResult(
        probe=probe, subject="the chip", outcome="failed", rules_out="infer", summary=f"while probing {probe}: {what}"
    )


class QualifyOrder(Record):
    """What the process is asked to do."""

    task: Literal["describe", "reference", "candidate"]
    chip: str
    faults: str | None = None
    model: str
    seed: int = 0
    samples: int = 4
    tokens: int = 64
    layers: int | None = None
    vocabulary_size: int | None = Field(default=None, exclude_if=lambda size: size is None)
    """Of a preset that is tried with another one than its own."""
    compute_dtype: str | None = None
    """None: the chip's own."""
    bundle: str = ""
    """Where it is written, or read, on that machine."""
    bundle_hash: str | None = None
    """Of the bundle that is to be read there."""
    recompute: bool = False
    """Whether it was made by another, so that what can be computed again there is."""
    key: str | None = None
    """Private key that a bundle is signed with; None: that machine's."""
    batches: int = 6
    steps: int = 6
    extent: Literal["quick", "whole"] = "quick"
    run_tokens: int | None = None
    limit_bytes: int = 64 * 2**20
    longest: int = 8200
    """Tokens: attention is not tried beyond."""
    memory_bytes: int = 0
    """0: the memory is not tested."""
    soak_seconds: float = 0.0
    speed: bool = False
