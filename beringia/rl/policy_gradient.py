"""A policy gradient as training's objective: the trainer, the evaluation and the guard take it as they take a
cross-entropy, and the head's check learns it.

A batch carries what is known of its tokens (`RolloutBatch`). Labels are the sampled tokens, -100 where a token is the
prompt's or padding.

B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from beringia.model import IGNORED, Sums, Targets
from beringia.rl.algorithms.algorithm import Algorithm, Tokens
from beringia.train.objective import LOSS, Objective, Term

CLIPPED, KL, ENTROPY = "clipped share", "kl to the reference", "entropy"


@dataclass(frozen=True)
class RolloutBatch:
    """Samples with what is known of their tokens, B T each."""

    tokens_BT: torch.Tensor
    """int64"""
    labels_BT: torch.Tensor
    """int64; of position t the token after it"""
    old_logprobs_BT: torch.Tensor
    """Of the labels, under the policy before the update: the learner's own."""
    advantages_BT: torch.Tensor
    """The sample's, at each of its positions."""
    corrections_BT: torch.Tensor
    """Weights that correct for the mismatch of sampling and learning."""
    reference_logprobs_BT: torch.Tensor
    """Of the labels, under the policy that it must not go far from; zeros where there is none."""


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """The loss of an algorithm, perhaps with a distance from a reference; beside it what is only measured."""

    algorithm: Algorithm
    temperature: float = 1.0
    """Of sampling: the policy is the softmax of the logits over it."""
    kl_weight: float = 0.0
    """Of the distance from the reference, by the unbiased estimator exp(d) - d - 1 with d = log(pi_ref / pi)
    (Schulman 2020, "Approximating KL divergence", k3), over the algorithm's own count."""

    name = "policy gradient"
    carries = ("labels_BT", "old_logprobs_BT", "advantages_BT", "corrections_BT", "reference_logprobs_BT")

    @property
    def terms(self) -> tuple[Term, ...]:
        """A policy's loss may be negative, and its size says nothing: no rise of it is a fault."""
        measured = (Term(CLIPPED, weight=0.0), Term(ENTROPY, weight=0.0))
        distance = (Term(KL, weight=self.kl_weight),) if self.kl_weight else ()
        return (Term(LOSS), *distance, *measured)

    def sums(self, logits_BTV: torch.Tensor, targets: Targets) -> Sums:
        logits_BTV = logits_BTV if self.temperature == 1.0 else logits_BTV / self.temperature
        labels_BT = targets["labels_BT"]
        sampled_BT = labels_BT != IGNORED
        logprobs_BT = label_logprobs(logits_BTV, labels_BT)
        tokens = Tokens(
            logprobs_BT, targets["old_logprobs_BT"], targets["advantages_BT"], sampled_BT, targets["corrections_BT"]
        )
        found = self.algorithm.loss(tokens)
        sums = {LOSS: found.loss, CLIPPED: found.clipped.to(found.loss.dtype)}
        if self.kl_weight:
            sums[KL] = self._distance(tokens, targets["reference_logprobs_BT"])
        sums[ENTROPY] = (_entropies(logits_BTV.detach()) * sampled_BT).sum()
        return {term.name: sums[term.name] for term in self.terms}

    def counts(self, targets: Targets) -> Mapping[str, int]:
        sampled_BT = targets["labels_BT"] != IGNORED
        tokens, own = int(sampled_BT.sum()), self.algorithm.count(sampled_BT)
        return {term.name: own if term.name in (LOSS, KL) else tokens for term in self.terms}

    def _distance(self, tokens: Tokens, reference_BT: torch.Tensor) -> torch.Tensor:
        """As the algorithm weighs tokens: its own surrogate of what each costs, where nothing is clipped."""
        apart_BT = torch.where(tokens.sampled_NT, reference_BT - tokens.logprobs_NT, 0.0)
        return self.algorithm.weighted_sum(apart_BT.exp() - apart_BT - 1.0, tokens.sampled_NT)


def label_logprobs(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Log-probability of each label, 0 where there is none; in the dtype of the logits."""
    flat = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="none")
    return -flat.view(labels_BT.shape)


def _entropies(logits_BTV: torch.Tensor) -> torch.Tensor:
    probabilities_BTV = logits_BTV.softmax(-1)
    entropies_BT: torch.Tensor = torch.special.entr(probabilities_BTV).sum(-1)  # 0 log 0 is 0
    return entropies_BT
