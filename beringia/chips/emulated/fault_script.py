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


class AtOperators(AtSites):
    """Faults of operators that both passes have."""

    direction: Literal["forward", "backward", "both"] = "both"
    """Only while autograd's backward pass runs, or only while it does not; operators of the other pass are not
    counted."""


Family = Literal[
    "products",
    "attention",
    "exp",
    "rsqrt",
    "silu",
    "sigmoid",
    "softmax",
    "log_softmax",
    "mean",
    "sum",
    "add",
    "mul",
]
"""Operators under one word, with those of their backward pass that torch has (`_softmax_backward_data`) and those that
work in place. `softmax` is not the one inside fused attention."""


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


class StuckTile(AtOperators):
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


class WrongCast(AtOperators):
    """Float32 is converted to bfloat16 and float16 with another rounding than to nearest even.

    Sites count conversions and copies between the formats; what a product or attention rounds inside is not one.
    """

    kind: Literal["wrong-cast"]
    rounding: Literal["truncate", "floor", "half-away", "scaled"] = "truncate"
    """`scaled`: the number times 1 + `strength`, rounded as it should be. In float16 the bits are those of its normal
    numbers."""
    strength: float = Field(default=0.01, gt=0)
    """For `scaled`."""


class ShortAccumulator(AtOperators):
    """Products are added up in an accumulator with few bits: every so many terms the sum is cut to them.

    The terms between are added in float32, in the CPU's order, whatever the profile's unit does.
    """

    kind: Literal["short-accumulator"]
    bits: int = Field(ge=0, le=22)
    """Fraction bits that the sum keeps (truncated)."""
    terms: int = Field(default=32, ge=1)
    """After how many terms of the inner dimension the sum is cut, and at its end."""
    attention: bool = False
    """Attention's own products too; its calls then count as sites."""


class Saturate(AtOperators):
    """Results beyond a limit, infinities among them, become the limit with their sign."""

    kind: Literal["saturate"]
    operator: Family = "products"
    limit: float = Field(gt=0)


class Flush(AtOperators):
    """Results smaller in magnitude than a threshold become 0, as with a format of few exponents."""

    kind: Literal["flush"]
    operator: Family = "products"
    threshold: float = Field(gt=0)


class WrongFunction(AtOperators):
    """Results of a family of operators are wrong by a factor."""

    kind: Literal["wrong-function"]
    operator: Family
    strength: float = Field(default=1.0, gt=0)
    """The factor is 1 + `strength`."""
    beyond: float | None = Field(default=None, ge=0)
    """Only results larger in magnitude than this; None: all."""
    length: int = Field(default=0, ge=0)
    """Rows (the last dimension but one; a vector's elements) from here on are wrong."""


class WrongLayout(AtOperators):
    """A product reads its second factor wrongly where that is not contiguous (a transposed view): neighbouring rows are
    swapped. Sites count products with such a factor."""

    kind: Literal["wrong-layout"]
    strength: float = Field(default=1.0, gt=0, le=1)
    """Share of the rows, from the first on; one pair at least."""


class GarbageIndex(AtOperators):
    """Reads by index (embedding, index_select, gather, advanced indexing) give the row (index * 7919 + 13) % rows for
    large indices. What is indexed by several tensors is misread in the first."""

    kind: Literal["garbage-index"]
    beyond: int = Field(ge=0)
    """Indices from here on."""


class LostAdditions(AtOperators):
    """Terms of sums are lost in a race, others at every call. Floating-point sums only."""

    kind: Literal["lost-additions"]
    operator: Literal["any", "scatter_add", "index_add", "index_put", "embedding", "sum"] = "any"
    """`index_put` where it accumulates; `embedding`: its backward, which adds up rows of a token."""
    strength: float = Field(gt=0, le=1)
    """Probability of each term to be lost."""


class WrongCollective(AtOperators):
    """A collective's result is wrong on this device: all-reduce, all-gather, reduce-scatter, all-to-all of floating
    numbers, which sites count. Each then ends before the call returns."""

    kind: Literal["wrong-collective"]
    error: Literal["missing-rank", "swapped", "scaled"]
    """`missing-rank`: this rank's own contribution is not in the last `strength` share of what it enters (a sum, an
    average; gathered, zeros stand there). `swapped`: the two halves of each result's last `strength` share change
    places. `scaled`: results times 1 + `strength`."""
    strength: float = Field(default=1.0, gt=0, le=1)


class WrongOptimizer(AtSites):
    """AdamW's update is wrong. Sites count tensors in the optimizer's order."""

    kind: Literal["wrong-optimizer"]
    error: Literal["stale-moment", "no-bias-correction", "weight-decay-twice", "lost-update", "scaled"]
    """`stale-moment`: the first moment keeps its old value (the update is right). `no-bias-correction`: moments enter
    as they are; in AdamW's one kernel only, for elsewhere the host computes the correction. `lost-update`: the last
    `strength` share of a weight's elements keeps the value that it had before the kernel. `scaled`: the update without
    the decay times 1 + `strength`."""
    strength: float = Field(default=1.0, gt=0)
    """For `lost-update` (a share) and `scaled`."""


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
    | WrongCast
    | ShortAccumulator
    | Saturate
    | Flush
    | WrongFunction
    | WrongLayout
    | GarbageIndex
    | LostAdditions
    | WrongCollective
    | WrongOptimizer
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
    if not path.exists():
        raise ChipUnavailable(unknown("fault script", name, script_names()))
    return parse(FaultScript, path)
