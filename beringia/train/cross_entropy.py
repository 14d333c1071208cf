"""Pretraining's objective: cross-entropy of the next token, and of the token after it where the model has a multi-token
layer (DeepSeek-V3 section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from beringia.model import IGNORED, Decoder, Sums, Targets, cross_entropy_sum
from beringia.records.recipe import TrainSection
from beringia.train.objective import LOSS, MTP_LOSS, Objective, Rise, Term

LEAST_RISE = Rise(sudden=0.9, lasting=0.35)
"""A loss of 2.5 times the median, or 1.4 times for four steps: quiet stretches end, and what is normal after one was
not seen in it. `docs/guard.md` has the rises of sound runs."""


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """In nats, means over the labels that are not -100."""

    mtp_weight: float = 0.0
    """Of the multi-token layer's term; 0 leaves the layer out."""

    name = "cross-entropy"
    carries = ("labels_BT",)

    @classmethod
    def of(cls, decoder: Decoder, train: TrainSection) -> CrossEntropy:
        """As a recipe asks for it, for a model that may have no multi-token layer."""
        return cls(train.mtp_weight if decoder.mtp is not None else 0.0)

    @property
    def terms(self) -> tuple[Term, ...]:
        main = Term(LOSS, rise=LEAST_RISE, nats=True)
        if self.mtp_weight == 0.0:
            return (main,)
        return (main, Term(MTP_LOSS, self.mtp_weight, LEAST_RISE, ahead=True, nats=True))

    def sums(self, logits_BTV: torch.Tensor, targets: Targets) -> Sums:
        return {LOSS: cross_entropy_sum(logits_BTV, targets["labels_BT"])}

    def sums_ahead(self, logits_BTV: torch.Tensor, targets: Targets) -> Sums:
        return {MTP_LOSS: cross_entropy_sum(logits_BTV, targets["labels_BT"])}

    def counts(self, targets: Targets) -> Mapping[str, int]:
        kept_BT = targets["labels_BT"] != IGNORED
        return {LOSS: int(kept_BT.sum()), MTP_LOSS: int(kept_BT[:, 1:].sum())}
