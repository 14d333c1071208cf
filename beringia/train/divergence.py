"""Whether the training diverges: whether the numbers of a step are as bad wherever it is computed, and no chip is at
fault.

A step is *beyond judging* when one of its numbers is not finite, or a cross-entropy is many times what guessing costs.
There a guard's bounds say little: sums overflow, attention saturates, gradients cancel, and two sound chips may have
nothing in common. Whether a chip led there is found out by going back and taking the steps again. When the very step is
due again, its samples are passed through the model one by one, with the weights as they are. The first that is beyond
judging is computed on the CPU from the same weights, in the same dtype: if it is beyond judging there too, that is what
these weights make of this sample. Where each sample by itself is not, only their sum can be too large, and the triangle
inequality says whether it can.

Changes nothing of the run. The host holds the weights and one gradient of them meanwhile (8 bytes a parameter), and
computes one sample a rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from beringia.chips.cpu import Cpu
from beringia.data import Batch
from beringia.model import Decoder
from beringia.processes.ranks import Ranks
from beringia.records.events import DIVERGENCE, Alarm
from beringia.train.guard.check import GRADIENT
from beringia.train.sharding import sum_over_ranks, whole
from beringia.train.trainer import Trainer

LARGEST_FLOAT32 = torch.finfo(torch.float32).max
LARGEST_NORM = math.sqrt(LARGEST_FLOAT32)
"""From here on the square of a norm is too large for float32, in which norms are added up: 1.8e19."""
GUESSES = 10.0
"""How many times the cost of guessing among all tokens alike, log V, no training that learns comes to. A new model
starts at once that, a trained one below it; spikes that were recovered from reach two or three times."""


@dataclass(frozen=True)
class Divergence:
    """One of a step's numbers that is beyond judging."""

    name: str
    value: float
    limit: float
    """Largest that is not."""

    @property
    def layers_judged(self) -> bool:
        """Whether the guard's bounds still say something there."""
        return self.limit == LARGEST_FLOAT32

    def alarm(self, step: int) -> Alarm:
        """The event of a step that is so wherever it is computed."""
        return Alarm(
            step=step,
            detector=DIVERGENCE,
            site="model",
            tensor=self.name,
            value=self.value if math.isfinite(self.value) else None,
            bound=self.limit,
            message=f"the training diverges: with the weights before step {step} and its samples, {self._what()} on "
            "the CPU, too.",
        )

    def _what(self) -> str:
        if not math.isfinite(self.value):
            return f"the {self.name} is no finite number"
        return f"the {self.name} is {self.value:.4g} nats (guessing costs {self.limit / GUESSES:.3g})"


def beyond_judging(trainer: Trainer, numbers: Mapping[str, float]) -> Divergence | None:
    """The first of a step's numbers that is beyond judging."""
    limits = _limits(trainer)
    beyond = (Divergence(name, value, limits[name]) for name, value in numbers.items() if not value <= limits[name])
    return next(beyond, None)


def divergence(trainer: Trainer, beat: Callable[[], None]) -> Divergence | None:
    """What is beyond judging of the step that is due, wherever it is computed; None where it is not so on the CPU, or
    on the chip any more.

    With several ranks their samples are taken together, and all ranks get the same answer. `beat` is called often.
    """
    counts = trainer.counts()
    sums: Counter[str] = Counter()
    for sample in trainer.samples():
        found = trainer.numbers_of(sample, counts)
        beat()
        if _agreed(_of_one_sample(trainer, found, sample, counts), trainer) is not None:
            numbers = copy_on_the_cpu(trainer, beat).numbers_of(sample, counts)
            return _agreed(_of_one_sample(trainer, numbers, sample, counts), trainer)
        sums.update({name: abs(value) for name, value in found.items()})
    return _agreed(_of_the_sum(sums), trainer)


def _limits(trainer: Trainer) -> dict[str, float]:
    guess = math.log(trainer.decoder.config.vocab_size)
    terms = {term.name: GUESSES * guess if term.nats else LARGEST_FLOAT32 for term in trainer.objective.terms}
    return terms | {GRADIENT: LARGEST_FLOAT32}


def _of_one_sample(
    trainer: Trainer, numbers: Mapping[str, float], sample: Batch, counts: Mapping[str, int]
) -> Divergence | None:
    """`numbers` are the sample's share of the step's: what it is by itself is held against the limits."""
    own = trainer.objective.counts(trainer.objective.targets(sample))
    by_itself = {
        name: value * counts[name] / max(1, own[name]) if name in own else value for name, value in numbers.items()
    }
    return beyond_judging(trainer, by_itself)


def _of_the_sum(sums: Mapping[str, float]) -> Divergence | None:
    limits = {name: LARGEST_NORM if name == GRADIENT else LARGEST_FLOAT32 for name in sums}
    return next(
        (Divergence(name, math.inf, limits[name]) for name, value in sums.items() if value >= limits[name]), None
    )


def _agreed(own: Divergence | None, trainer: Trainer) -> Divergence | None:
    """The first of the numbers that any rank finds beyond judging, with the largest of their values."""
    names, device = trainer.number_names, trainer.chip.device
    flags = sum_over_ranks(torch.tensor([int(own is not None and own.name == name) for name in names], device=device))
    name = next((name for name, flag in zip(names, flags.tolist(), strict=True) if flag), None)
    if name is None or (own is not None and own.name == name):
        return own if name is not None else None
    return Divergence(name, math.inf, LARGEST_FLOAT32)  # another rank's, which tells of it


def copy_on_the_cpu(trainer: Trainer, beat: Callable[[], None]) -> Trainer:
    """The same weights as a decoder of its own, and what computes with it: this rank's samples alone."""
    source = trainer.decoder
    decoder = Decoder(source.config)
    decoder.set_compute_dtype(source.compute_dtype)
    decoder.train()
    live = source.state_dict()
    with torch.no_grad():
        for name, tensor in decoder.state_dict().items():
            tensor.copy_(whole(live[name]).cpu())
    for layer in decoder.model.layers:
        layer.register_forward_hook(lambda *_: beat())
        layer.register_full_backward_hook(lambda *_: beat())
    return Trainer(trainer.recipe, Cpu(), Ranks(), decoder, trainer.objective, trainer.stream)
