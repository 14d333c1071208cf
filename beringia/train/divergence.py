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
from dataclasses import dataclass, replace

import torch

from beringia.chips.cpu import Cpu
from beringia.data import Batch
from beringia.model import Decoder
from beringia.processes.ranks import Ranks
from beringia.records.events import DIVERGENCE, Alarm
from beringia.train.guard.check import GRADIENT
from beringia.train.sharding import sum_of_host_values, whole
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
    """Largest that is not; the same on all ranks, as the name is."""

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
    return _beyond(numbers, _limits(trainer))


def _beyond(numbers: Mapping[str, float], limits: Mapping[str, float]) -> Divergence | None:
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
        if _agreed(_of_one_sample(trainer, found, sample, counts), trainer, _limits(trainer)) is not None:
            numbers = copy_on_the_cpu(trainer, beat).numbers_of(sample, counts)
            return _agreed(_of_one_sample(trainer, numbers, sample, counts), trainer, _limits(trainer))
        sums.update({name: abs(value) for name, value in found.items()})
    limits = _limits_of_sums(trainer)
    too_large = _beyond(sums, limits)
    own = None if too_large is None else replace(too_large, value=math.inf)
    return _agreed(own, trainer, limits)


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


def _limits_of_sums(trainer: Trainer) -> dict[str, float]:
    """Of what samples add up to at most, by the triangle inequality: what one of them is, is held against `_limits`."""
    return dict.fromkeys(trainer.number_names, LARGEST_FLOAT32) | {GRADIENT: LARGEST_NORM}


def _agreed(own: Divergence | None, trainer: Trainer, limits: Mapping[str, float]) -> Divergence | None:
    """The first of the numbers that any rank finds beyond judging, with the largest of their values: the same on every
    rank, since what is done next is done by all together."""
    names, ranks = trainer.number_names, trainer.ranks
    told_RN2 = torch.zeros(ranks.count, len(names), 2)
    if own is not None:
        told_RN2[ranks.rank, names.index(own.name)] = torch.tensor([1.0, own.value])
    flags_RN, values_RN = sum_of_host_values(told_RN2, trainer.chip.device).unbind(-1)
    for name, flags_R, values_R in zip(names, flags_RN.T, values_RN.T, strict=True):
        if flags_R.any():
            return Divergence(name, values_R.max().item(), limits[name])
    return None


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
