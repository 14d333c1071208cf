"""The result of qualifying a chip for a model: evidence, verdict, reasons. What `certificates/*.json` hold.

A certificate is for one chip identity and for what was tried on it: a model (its configuration, its weights, how many
of its layers), a dtype, beside a reference. `records/signature.py` signs it. Numbers that were not finite are written
as null.

Schema 1 said nothing of layers, files of weights and bundles. Such a certificate reads as it did, is written and signed
without them, and what it does not say is not compared.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from beringia.records.identity import ChipIdentity
from beringia.records.record import Record

CERTIFICATE_SCHEMA = 2
_SINCE_2 = ("layers", "weight_files", "bundle")
NO_COLLECTIVES = "collectives"
"""Among what was not tried, where none was."""

Verdict = Literal["train", "infer", "unfit", "inconclusive"]
"""train: training and inference; infer: inference only; unfit: neither; inconclusive: too little evidence."""

Use = Literal["train", "infer", "neither"]
"""What a probe that failed rules out: `train` rules out training, `infer` rules out both, `neither` is only told."""

PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""Of who signs: Ed25519, 32 bytes in hexadecimal."""

Direction = Literal["forward", "backward", "optimizer", "decode"]


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Finite = Annotated[float | None, BeforeValidator(_finite_or_none)]
"""A number, or None for what JSON has no word for: infinities and NaN."""


class Measure(Record):
    """One measured quantity beside its bound."""

    name: str
    value: Finite
    """None: not a finite number, which no bound allows."""
    bound: float
    """The largest value that a sound chip has."""
    unit: str = ""
    reason: str
    """Where the bound comes from."""

    @property
    def used(self) -> float:
        """Share of the bound; above 1 it is broken. Infinite where the value is no finite number, and where only 0 is
        allowed and it is another."""
        if self.value is None or not math.isfinite(self.value):
            return math.inf
        if self.bound == 0:
            return 0.0 if self.value == 0 else math.inf
        return abs(self.value) / self.bound


POWER_NEEDED = 0.8
"""Chance with which a sound chip must be found equal: with less, the schema leaves the verdict open."""
NOISE_FLOORS = "noise floors"
"""Unit of effects: a distance from float64 over that of the reference's draws."""
REFERENCES = "reference's"
"""Unit of a distance from float64 over the reference's own."""


class ProbeResult(Record):
    """What one probe found."""

    probe: str
    """`arithmetic`, `operators`, `lockstep`, `repeat`, `layers`, `experts`, `clipping`, `replay`, `lengths`,
    `reference`, `collectives`, `memory`, `soak` or `speed`."""
    subject: str
    """What was looked at: a layer, a collective, a length, a dtype."""
    outcome: Literal["passed", "failed", "inconclusive", "told"]
    """told: a fact without a bound (a speed, a capacity)."""
    rules_out: Use = "neither"
    """What it rules out when it failed, or leaves open when it was inconclusive."""
    summary: str
    """One sentence for a reader."""
    measures: tuple[Measure, ...] = ()
    seconds: float = 0.0


class OperatorCheck(Record):
    """One operator call on the candidate, held against float64 with the inputs that it really had."""

    module: str
    """Path of the module that called it; empty outside any module."""
    operator: str
    """`aten.mm.default`."""
    direction: Direction
    ordinal: int
    """Which call of this operator in this module and direction, from 0."""
    position: int
    """Place in the order of execution."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the tensors among its arguments."""
    dtype: str
    """Of its first result that is a tensor."""
    attributes: str = ""
    """Its other arguments, as text."""
    basis: str
    """How its bound is derived."""
    error: Finite
    """Root mean square of the error over that of the float64 result."""
    reference_error: Finite = None
    """The same on the reference chip, where it made the same call."""
    measures: tuple[Measure, ...]
    worst_element: tuple[int, ...] = ()
    """Index of the element that used most of its bound."""
    found: Finite = None
    """The element's value on the chip."""
    expected: Finite = None
    """The element's value in float64."""
    wrong_share: float = 0.0
    """Share of the elements beyond their bound."""
    wrong_from: tuple[int, ...] = ()
    """Lowest index of such an element, in each dimension."""
    wrong_to: tuple[int, ...] = ()
    """Highest index of such an element, in each dimension."""
    factor: Finite = None
    """What the float64 result has to be multiplied with to be nearest to the chip's; only where the bound is broken."""
    refused: str = ""
    """The chip's words where it could not carry out the operator."""

    @property
    def used(self) -> float:
        """The largest share of a bound."""
        return float("inf") if self.refused else max((measure.used for measure in self.measures), default=0.0)

    @property
    def name(self) -> str:
        """For a reader: `model.layers.0.mlp: aten.mm.default (backward, call 2)`."""
        return f"{self.module or 'outside the modules'}: {self.operator} ({self.direction}, call {self.ordinal})"


class Located(Record):
    """The first operator that is wrong."""

    check: OperatorCheck
    consistent_with: tuple[str, ...] = ()
    """Known faults that leave such traces."""
    mitigations: tuple[str, ...] = ()


class Departure(Record):
    """Where a model first left what rounding explains, while every operator call was right."""

    module: str
    """Path of the module, called by itself with float64's input; empty where each by itself is right."""
    quantity: str
    """`output`, `input's gradient`, `weight's gradient`; without a module a scenario of serving, the loss."""
    times: float | None
    """How much of what rounding explains; None: more than any multiple."""


def _says_nothing(value: object) -> bool:
    """Of a field that came later: left out where it is empty, so that what was signed before still verifies."""
    return not value


class ModelFingerprint(Record):
    """Which model the evidence is about."""

    name: str
    """As the user named it: a preset, a directory's last part, a class."""
    configuration: str
    """SHA-256 of the configuration."""
    weights: str
    """Hash of names, shapes and values of all weights."""
    parameters: int
    vocabulary_size: int | None = Field(default=None, gt=0, exclude_if=_says_nothing)
    """Tokens of a preset that was tried with another vocabulary than its own; None: its own, or a directory's."""


class BundleOrigin(Record):
    """Which recording of a reference the chip was compared with."""

    hash: str
    """SHA-256 of the bundle's manifest, which has that of its tensors."""
    public_key: PublicKey
    """Who signed it."""


class Certificate(Record):
    """All of it, to be signed."""

    schema_version: int = CERTIFICATE_SCHEMA
    created: str
    """UTC, ISO 8601."""
    beringia: str
    chip: str
    """As the user named it, `auto` resolved."""
    identity: ChipIdentity
    identity_hash: str
    reference: ChipIdentity
    """The chip whose numbers it was compared with, beside float64."""
    bundle: BundleOrigin | None = None
    """Its recording."""
    model: ModelFingerprint
    layers: int | None = None
    """Only so many of the model's layers were tried; None: all."""
    weight_files: str | None = None
    """Hash of the files that hold the weights, of a model directory; None for a preset."""
    compute_dtype: str
    seed: int
    verdict: Verdict
    reasons: tuple[str, ...]
    mitigations: tuple[str, ...]
    power: float = Field(ge=0, le=1)
    """Probability that a chip no different from the reference is found equivalent; below 0.8 the verdict is open."""
    first_wrong: Located | None
    probes: tuple[ProbeResult, ...]
    operators: tuple[OperatorCheck, ...]
    seconds: float
    command: str = Field(default="", exclude_if=_says_nothing)
    """The command line that made it; empty where none did."""
    first_departure: Departure | None = Field(default=None, exclude_if=_says_nothing)
    """Where no operator was wrong, and the model differs all the same."""
    extent: Literal["", "quick", "whole"] = Field(default="", exclude_if=_says_nothing)
    """How many ways of serving and training were tried; empty in certificates from before that was a question."""
    scenarios: tuple[str, ...] = Field(default=(), exclude_if=_says_nothing)
    """Those that were, beside the batches."""
    untried: tuple[str, ...] = Field(default=(), exclude_if=_says_nothing)
    """What people do with such a model, and was not tried."""

    @model_validator(mode="after")
    def _has_what_its_schema_had(self) -> Self:
        """What the serializer leaves out is in no signature: whoever set it altered the certificate."""
        added = [name for name in _SINCE_2 if getattr(self, name) is not None]
        if self.schema_version <= 1 and added:
            raise ValueError(f"schema {self.schema_version} has no {' and no '.join(added)}, so nobody signed that")
        return self

    @model_serializer(mode="wrap")
    def _as_its_schema_has_it(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A signature is over the fields that its schema had."""
        document: dict[str, Any] = write(self)
        return {name: value for name, value in document.items() if self.schema_version > 1 or name not in _SINCE_2}

    @property
    def scope(self) -> str:
        """What it is for, beside the chip: `r2-nano, 2 of its layers, in bfloat16`."""
        part = "" if self.layers is None else f", {self.layers} of its layers"
        size = self.model.vocabulary_size
        tokens = "" if size is None else f" with {size} tokens"
        return f"{self.model.name}{tokens}{part}, in {self.compute_dtype}"

    @property
    def tried(self) -> tuple[str, ...]:
        """Kinds of probes that it has."""
        return tuple(dict.fromkeys(probe.probe for probe in self.probes))

    def allows(self, use: Literal["train", "infer"]) -> bool:
        """Whether the chip may be used so."""
        return self.verdict == "train" or self.verdict == use

    def rules_out(self, use: Literal["train", "infer"]) -> bool:
        """Whether a probe failed that rules this use out: also an open verdict may be a clear no to training."""
        failed = {probe.rules_out for probe in self.probes if probe.outcome == "failed"}
        return "infer" in failed or use in failed
