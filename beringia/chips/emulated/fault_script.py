"""Fault scripts as data: what goes wrong on an emulated chip, and when.

One TOML file per script in `beringia/chips/catalogue/faults`, a list of `[[faults]]` tables told apart by `kind`. What
the kinds do is in `faults.py`. A script knows training steps and operators, as hardware would: no layers, no names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from beringia.chips.arithmetic.profile import parse, unknown
from beringia.errors import ChipUnavailable
from beringia.records.record import Record

SCRIPTS = Path(__file__).parent.parent / "catalogue" / "faults"


class Scheduled(Record):
    """When a fault is present. Without any of these it always is, from the first step on."""

    at_step: int | None = Field(default=None, ge=0)
    """In this step only."""
    from_step: int = Field(default=1, ge=0)
    to_step: int | None = Field(default=None, ge=0)
    """Last step; None: for ever."""
    every: int = Field(default=1, ge=1)
    """Every so many steps from `from_step` on."""
    rate: float = Field(default=1.0, gt=0, le=1)
    """Probability in each of those steps, drawn from (seed, step, position in the script)."""
    once: bool = False
    """One occurrence in the life of the chip (`at_step`, or one stretch from `from_step` to `to_step`): a run that is
    rolled back, or a process that is started again, does not meet it a second time."""
    device: int | None = Field(default=None, ge=0)
    """Only on the device with this index; None: on every one."""

    @model_validator(mode="after")
    def _one_way_of_saying_when(self) -> Self:
        if self.at_step is not None and self.model_fields_set & {"from_step", "to_step", "every"}:
            raise ValueError("give either at_step, or from_step, to_step and every")
        if self.to_step is not None and self.to_step < self.from_step:
            raise ValueError("to_step lies before from_step")
        return self

    def due(self, step: int) -> bool:
        """Whether the schedule names this step, before `rate` and `once`."""
        if self.at_step is not None:
            return step == self.at_step
        last = step if self.to_step is None else self.to_step
        return self.from_step <= step <= last and (step - self.from_step) % self.every == 0


class AtSites(Scheduled):
    """Faults of single operators, chosen by counting those that match since the step began."""

    sites: tuple[int, ...] | None = None
    """Which of them, from 0; None: all."""


class WrongBackward(AtSites):
    """Gradients past a length are wrong: each position loses `strength` times its neighbour's.

    So the error's norm is `strength` times the norm of what it falls on. In attention (queries', keys' and values'
    gradients) sites count forward calls, so 0 is the first layer; in a linear map (its input's gradient) they count in
    the order of the backward pass, and the length is in rows.
    """

    kind: Literal["wrong-backward"]
    operator: Literal["attention", "linear"] = "attention"
    length: int = Field(default=0, ge=0)
    """Positions from here on are wrong."""
    strength: float = Field(default=1.0, gt=0)


class MaskIgnored(AtSites):
    """Attention's mask, causal or given, is ignored for queries past a length."""

    kind: Literal["mask-ignored"]
    length: int = Field(default=0, ge=0)


class BitFlip(AtSites):
    """Bits flip in numbers of a kind. `sites` counts products for activations (forward) and gradients (backward), and
    is the tensor's place in the optimizer's order for weights and its state, which are struck between two steps."""

    kind: Literal["bit-flip"]
    target: Literal["weights", "optimizer-state", "activations", "gradients"]
    sites: tuple[int, ...] | None = (0,)
    flips: int = Field(default=1, ge=1)
    """Numbers struck at each site, at places drawn from the seed."""
    bits: tuple[int, int] = (0, 31)
    """Lowest and highest bit that may flip; bit 0 is the last of the fraction. Bits that a format lacks count down from
    its highest: 30 is the highest exponent bit of float32, and of bfloat16."""
    width: int = Field(default=1, ge=1, le=16)
    """Neighbouring bits that flip together."""


class StuckTile(AtSites):
    """A tile of the product's output always holds one value."""

    kind: Literal["stuck-tile"]
    row: int = Field(default=0, ge=0)
    column: int = Field(default=0, ge=0)
    """Place of the tile, in tiles."""
    size: int = Field(default=16, ge=1)
    value: float = 0.0


class NanToZero(Scheduled):
    """NaN in any result becomes 0, so that overflow leaves no trace."""

    kind: Literal["nan-to-zero"]


class NondeterministicReduction(Scheduled):
    """Products and sums add their terms in an order that differs from call to call."""

    kind: Literal["nondeterministic-reduction"]


class DeviceException(Scheduled):
    """The device reports an error, in its vendor's words, at a product of the step."""

    kind: Literal["exception"]
    code: str
    """`507014`, `EI0002`, `UCE ERROR`, `HBM MULTI BIT ECC ERROR`; on NVIDIA and AMD a name as
    `cudaErrorECCUncorrectable`."""
    operator: int = Field(default=0, ge=0)
    """At which product of the step."""
    sticky: bool = False
    """Everything on the device fails from then on, until the process ends."""


class CollectiveTimeout(Scheduled):
    """A collective operation waits for a rank and gives up. Without collectives (one rank) nothing happens."""

    kind: Literal["collective-timeout"]
    seconds: float = Field(default=0.0, ge=0)
    """How long it waits first."""


class Hang(Scheduled):
    """A product does not return."""

    kind: Literal["hang"]
    operator: int = Field(default=0, ge=0)
    seconds: float | None = Field(default=None, gt=0)
    """None: for ever."""


class OutOfMemory(Scheduled):
    """An allocation fails, in the vendor's words."""

    kind: Literal["out-of-memory"]
    operator: int = Field(default=0, ge=0)


class Slowness(Scheduled):
    """Everything takes `factor` times as long."""

    kind: Literal["slowness"]
    factor: float = Field(gt=1)


Fault = Annotated[
    WrongBackward
    | MaskIgnored
    | BitFlip
    | StuckTile
    | NanToZero
    | NondeterministicReduction
    | DeviceException
    | CollectiveTimeout
    | Hang
    | OutOfMemory
    | Slowness,
    Field(discriminator="kind"),
]


class FaultScript(Record):
    """What goes wrong on a chip."""

    summary: str
    """One sentence for lists."""
    faults: tuple[Fault, ...] = ()


def script_names() -> list[str]:
    """Scripts of the catalogue."""
    return sorted(path.stem for path in SCRIPTS.glob("*.toml"))


def read_script(name: str) -> FaultScript:
    """A script by name, or by the path of a TOML file. Raises ChipUnavailable."""
    path = Path(name) if name.endswith(".toml") else SCRIPTS / f"{name}.toml"
    if not path.is_file():
        raise ChipUnavailable(unknown("fault script", name, script_names()))
    return parse(FaultScript, path)
