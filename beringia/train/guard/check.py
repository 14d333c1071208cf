"""What a check of the guard is: a name, when it runs, what it looks at in a step, and how it judges what it saw.

    class Sign(Check[torch.Tensor]):                        # checks/sign.py: one file, and nothing else changes
        name = "sign"
        when = When(look=Moment.BEFORE_UPDATE, judge=(Moment.BEFORE_UPDATE,), weight=0.05)

        def look(self, step):
            return [self.training.decoder.lm_head.weight.grad]

        def judge(self, gradient, step):
            wrong = float((gradient < 0).all())
            return [Finding(self.name, "head", "weight.gradient", wrong, 0.0, "1 where no element is positive")]

The guard does the rest: it plans, times, charges, waits for the device, reports events and raises the alarm. A check
reads the run's tensors and changes none; where it uses a collective, it decides by nothing but what all ranks know.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import ClassVar, Generic, TypeVar

import torch

from beringia.chips.chip import Chip
from beringia.model import Decoder
from beringia.processes.ranks import Ranks
from beringia.train.clipping import Clipping
from beringia.train.guard.finding import Finding
from beringia.train.guard.given import Given
from beringia.train.objective import Objective
from beringia.train.sharding import Sharding

GRADIENT = "gradient"
"""Name of the gradient's norm among a step's numbers."""

Look = TypeVar("Look")
Item = TypeVar("Item")


class Moment(Enum):
    """Points of a step, in their order, at which checks look and judge."""

    FORWARD = auto()
    """Before the forward pass: hooks are put in."""
    GRADIENTS = auto()
    """Gradients are complete and not clipped; all hooks are out again."""
    BEFORE_UPDATE = auto()
    """Gradients are clipped."""
    AFTER_UPDATE = auto()
    """Weights and moments are those of this step."""
    END = auto()
    """The step's numbers are on the host."""

    @property
    def waits(self) -> bool:
        """Whether the device may still be at work on what checks look at: waiting for it is not their time."""
        return self in (Moment.GRADIENTS, Moment.BEFORE_UPDATE, Moment.AFTER_UPDATE)


@dataclass(frozen=True)
class When:
    """In which steps a check runs, and at which moments of them."""

    look: Moment
    judge: tuple[Moment, ...]
    """Where what was seen is judged, in this order; a moment that has passed is the next step's."""
    weight: float = 0.0
    """Of its account among the checks', from which it is paid (`schedule.py`). 0: in every step, paid before all
    others, and told only once in a while."""
    order: int = 100
    """Place in the plan, smallest first. The first gets what the others' accounts cannot use."""

    @property
    def every_step(self) -> bool:
        """Whether it has no account."""
        return self.weight == 0.0


@dataclass(frozen=True)
class Training:
    """What a check may read of the training that it watches."""

    decoder: Decoder
    optimizer: torch.optim.Optimizer
    objective: Objective
    chip: Chip
    ranks: Ranks
    sharding: Sharding
    sites: tuple[str, ...]
    """Every part of the decoder that is checked by itself, in the order of the forward pass."""
    clipping: Clipping | None = None
    """How gradients are clipped, where that is to be checked."""


@dataclass
class Step:
    """What a check is told of the step that it runs in; the guard fills it in as the step goes on."""

    number: int
    seed: int
    demanded: tuple[str, ...] = ()
    """Sites that must be checked in this step, whosever turn it is."""
    compiled: bool = False
    """Whether parts of the layers are compiled: what is inside kernels no log can see."""
    accepted_spikes: tuple[int, ...] = ()
    """Steps from which on spikes are known."""
    given: tuple[Given, ...] = ()
    """What the host gave this rank for each accumulation step; once it did."""
    moment: Moment = Moment.FORWARD
    numbers: Mapping[str, float] = field(default_factory=dict)
    """At the end: the objective's terms and the norm of the gradient, by name."""
    layer_numbers: Mapping[str, float] = field(default_factory=dict)
    """At the end: norms of the gradients of each part, by name."""
    hooks: ExitStack = field(default_factory=ExitStack)
    """Closed after the backward pass and before anything is judged: what a check hangs into the model goes in here."""

    def draw(self, purpose: str) -> int:
        """A number that all ranks draw alike, from seed and step."""
        digest = hashlib.sha256(f"{self.seed} {self.number} {purpose}".encode()).digest()
        return int.from_bytes(digest[:6], "little")


class Check(ABC, Generic[Look]):
    """One detector. Made once for a training; `look` and `judge` are called as `when` says."""

    name: ClassVar[str]
    """Of its account; unique."""
    when: ClassVar[When]
    vouches: ClassVar[bool] = False
    """Whether a site in which it found nothing is clean. Trust in checkpoints stands on such checks, and they alone
    answer when sites are demanded."""

    def __init__(self, training: Training) -> None:
        self.training = training

    @abstractmethod
    def look(self, step: Step) -> Sequence[Look]:
        """What is to be judged of this step, one event for each; nothing where there is nothing to see."""

    @abstractmethod
    def judge(self, look: Look, step: Step) -> Sequence[Finding]:
        """Findings in the order of the computation: the first beyond its bound is the alarm."""

    def remember(self, earlier: Sequence[Mapping[str, float]]) -> None:  # noqa: B027 (most checks need no past)
        """The numbers of earlier steps, oldest first, as `Step.numbers` has them; told after a restart."""

    def explained(self) -> None:  # noqa: B027 (most checks judge no numbers)
        """The data explain every spike of the step that was just judged: it says nothing of the weights."""


class Turns(Generic[Item]):
    """Items that are looked at one after another, over and over; all ranks count alike."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items
        self._number = 0

    def next(self) -> Item:
        """The item whose turn it is."""
        item = self._items[self._number % len(self._items)]
        self._number += 1
        return item
