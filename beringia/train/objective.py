"""What training minimises, as a value: trainer, evaluation and guard take it, and none of them knows a formula.

An objective is some named terms. Each is a sum over the targets of a batch; divided by the number of its targets in the
step, over all ranks, it is one of the step's numbers, and times its weight it is added to what is differentiated. The
sums are made inside the decoder's forward pass (`model.decoder.Criterion`). The guard makes those of one sample once
more, on the CPU and in a wider dtype, to check what the loss sends back to the head: so a term is a sum over samples
that know nothing of each other. What they must know (an advantage within its group, say) the batch carries.

`cross_entropy.py` is the one of pretraining. B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch

from beringia.errors import DataError
from beringia.model import Sums, Targets
from beringia.model.layers import precise

LOSS, MTP_LOSS = "loss", "mtp loss"
"""Terms that every run's history tells by these names. Every objective has the first."""


@dataclass(frozen=True)
class Rise:
    """Up to where no rise above the running median is believed to be a fault, in logarithms: of a single step, and of
    a few steps in a row."""

    sudden: float
    lasting: float


@dataclass(frozen=True)
class Term:
    """One summand of an objective."""

    name: str
    weight: float = 1.0
    """In what is differentiated; 0 for a term that is only measured."""
    rise: Rise | None = None
    """How the guard's spike test judges the term's mean. None: not at all, for what may be negative has no logarithm;
    that it is finite is checked of every term."""
    ahead: bool = False
    """Whether it is of the multi-token layer's predictions."""
    nats: bool = False
    """Whether it is a cross-entropy over the vocabulary, in nats: what guessing costs is known."""


class Objective(ABC):
    """Terms, and how they are summed and counted. See `cross_entropy.py` for one."""

    name: ClassVar[str]
    carries: ClassVar[tuple[str, ...]]
    """What every batch carries for it beside `tokens_BT`: attributes, tensors B T each. Those of later positions are
    shifted for the multi-token layer, so what belongs to a whole sample stands at each of its positions."""

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """In the order in which they are told. The same for as long as the objective lives."""

    @abstractmethod
    def sums(self, logits_BTV: torch.Tensor, targets: Targets) -> Sums:
        """The terms of the model's predictions. Logits are float32 in training, float64 in a replay of float32."""

    def sums_ahead(self, logits_BTV: torch.Tensor, targets: Targets) -> Sums:
        """The terms of the multi-token layer's predictions, whose targets are already shifted."""
        return {}

    @abstractmethod
    def counts(self, targets: Targets) -> Mapping[str, int]:
        """How many targets each term has in these tensors on the host: what its sum is divided by, added up over
        accumulation steps and ranks."""

    # What follows is the same for all

    @property
    def looks_ahead(self) -> bool:
        """Whether the multi-token layer takes part."""
        return any(term.ahead for term in self.terms)

    def targets(self, batch: object) -> Targets:
        """What a batch carries for this objective. Raises DataError where it lacks something."""
        missing = [name for name in self.carries if not hasattr(batch, name)]
        if missing:
            raise DataError(
                f"The objective {self.name} needs {' and '.join(missing)} of every batch; these batches are "
                f"{type(batch).__name__}, which has none: take data that carries it, or another objective."
            )
        return {name: getattr(batch, name) for name in self.carries}

    def total(self, means: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The scalar that is differentiated."""
        weighted = [
            means[term.name] if term.weight == 1.0 else term.weight * means[term.name]
            for term in self.terms
            if term.weight != 0.0
        ]
        return reduce(operator.add, weighted)

    def logits_gradient(
        self, logits_BTV: torch.Tensor, targets: Targets, scales: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """What goes back to logits of the model when the terms' sums get these gradients, replayed in the dtype of the
        logits; sums are made as wide as training makes them, or wider."""
        wide = precise(logits_BTV.dtype)
        logits_BTV = logits_BTV.detach().requires_grad_()
        with torch.enable_grad():
            sums = self.sums(logits_BTV.to(wide), {name: _widened(target, wide) for name, target in targets.items()})
            scaled = [scale.to(wide) * sums[name] for name, scale in scales.items() if name in sums]
            return torch.autograd.grad(reduce(operator.add, scaled), logits_BTV)[0]


def _widened(target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return target.to(dtype) if target.is_floating_point() else target
