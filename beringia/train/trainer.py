"""The training loop, one for one rank and many: a step, its update, and what is measured of it.

Knows the model, the data and the chip; not the supervisor, files or events. `worker.py` drives it.

B samples, T tokens.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from beringia.chips.chip import Chip
from beringia.data import Batch, Stream
from beringia.errors import ModelError, RecipeError
from beringia.model import Decoder, Targets, update_router_biases
from beringia.model.attention import Attention
from beringia.model.layers import FeedForward
from beringia.processes.ranks import Ranks
from beringia.records.recipe import Recipe
from beringia.train.clipping import Clipping
from beringia.train.guard import Guard
from beringia.train.guard.check import GRADIENT
from beringia.train.objective import LOSS, MTP_LOSS, Objective
from beringia.train.optimizer import learning_rate, make_optimizer, set_learning_rate
from beringia.train.sharding import Sharding, shard, sum_over_ranks, without_gradient_sync


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step was."""

    step: int
    numbers: Mapping[str, float]
    """Means of the objective's terms over all ranks, by name."""
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    guard_seconds: float

    @property
    def loss(self) -> float:
        """Mean per target; of cross-entropy in nats."""
        return self.numbers[LOSS]

    @property
    def mtp_loss(self) -> float | None:
        """Likewise of the multi-token layer; None where it takes no part."""
        return self.numbers.get(MTP_LOSS)


class Trainer:
    """Decoder, objective, optimizer, data and guard of one run on one chip, at one step.

    `step` and `cursor` say how far it is: steps done and samples consumed. Loading a checkpoint sets both.
    """

    def __init__(
        self, recipe: Recipe, chip: Chip, ranks: Ranks, decoder: Decoder, objective: Objective, stream: Stream
    ) -> None:
        self.recipe = recipe
        self.chip = chip
        self.ranks = ranks
        self.decoder = decoder
        self.objective = objective
        self.stream = stream
        self.step = 0
        self.cursor = 0
        if decoder.mtp is not None and not objective.looks_ahead:
            decoder.mtp.requires_grad_(False)
        _check_layer_that_looks_ahead(decoder, objective)
        self.module, self.sharding = self._spread()
        self._forward = self.module
        self.optimizer = make_optimizer(
            decoder.named_parameters(), recipe.train, fused=chip.capabilities.fused_optimizer
        )
        self.clipping = Clipping(decoder, recipe.train.clip)
        self.guard: Guard | None = None
        self.while_computing: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        """Entered around forward and backward of each step; the canary perturbs the weights in it."""
        _check_batch(recipe, ranks)

    def _spread(self) -> tuple[nn.Module, Sharding]:
        return shard(self.decoder, self.chip, self.ranks)

    def compile(self) -> None:
        """Compile the forward and backward pass; the first steps take as long as that does.

        Under a guard, part by part: hooks inside compiled code are either not seen or compile it anew.
        """
        self.decoder.leave_experts_eager()
        if self.guard is None:
            self._forward = torch.compile(self.module)  # type: ignore[assignment]  # a module in, a module out
            return
        self.guard.expect_compiled()
        for part in self.decoder.model.layers.modules():
            if isinstance(part, Attention | FeedForward):
                part.forward = torch.compile(part.forward)  # type: ignore[method-assign]

    def train_step(self) -> StepResult:
        """One optimizer step."""
        started = time.perf_counter()
        number = self.step + 1
        rate = learning_rate(self.recipe.train, number)
        self.chip.begin_step(number)
        if self.guard is not None:
            self.guard.begin_step(number)
        with self.while_computing():
            means_N = self._accumulate_gradients()
        if self.guard is not None:
            self.guard.gradients_ready()
        norm, norms_G = self.clipping.clip()
        if self.guard is not None:
            self.guard.before_update()
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        if self.guard is not None:
            self.guard.after_update()
        self.optimizer.zero_grad(set_to_none=True)
        self._balance_experts()
        self.step = number
        self.cursor += self.recipe.train.batch
        return self._result(means_N, norm, norms_G, rate, started)

    def check_sites(self, sites: Sequence[str]) -> None:
        """Have the guard check these sites with the weights as they are, in the pass of a step that is not taken."""
        assert self.guard is not None, "there is a guard to ask"
        self.guard.demand(sites)
        self.guard.begin_step(self.step + 1)
        with self.while_computing():
            self._accumulate_gradients()
        self.guard.gradients_ready()
        self._forget_pass()

    def _forget_pass(self) -> None:
        """What a forward and backward pass left behind that no update follows."""
        self.optimizer.zero_grad(set_to_none=True)
        for count in self.decoder.expert_counts().values():
            count.zero_()

    def batches(self) -> list[Batch]:
        """This rank's share of the step that is due, one batch for each accumulation step."""
        return [self.stream.samples(start, count) for start, count in self._shares()]

    def _shares(self) -> list[tuple[int, int]]:
        """First sample and number of samples of each of them."""
        train = self.recipe.train
        count = train.batch // (train.accumulate * self.ranks.count)
        parts = range(train.accumulate)
        return [(self.cursor + (part * self.ranks.count + self.ranks.rank) * count, count) for part in parts]

    @property
    def number_names(self) -> tuple[str, ...]:
        """Of what `numbers_of` gives."""
        return (*(term.name for term in self.objective.terms), GRADIENT)

    def counts(self) -> dict[str, int]:
        """Targets of each term in the step that is due, over all ranks, 1 where there are none: what sums are divided
        by."""
        return self._count([self.objective.targets(batch) for batch in self.batches()])

    def samples(self) -> Iterator[Batch]:
        """This rank's share of the step that is due, one by one."""
        for start, count in self._shares():
            for number in range(start, start + count):
                yield self.stream.samples(number, 1)

    def numbers_of(self, batch: Batch, counts: Mapping[str, int]) -> dict[str, float]:
        """What some rows are of a step with these counts, with the weights as they are: their part of the objective's
        terms, and the norm of their gradient (with that of the other ranks' rows). The gradient is dropped again."""
        found = self.all_numbers_of(batch, counts)
        return {name: found[name] for name in self.number_names}

    def all_numbers_of(self, batch: Batch, counts: Mapping[str, int]) -> dict[str, float]:
        """Likewise, with the norms of the gradients of each part."""
        return self._numbers(self._backward(batch, self.objective.targets(batch), counts))

    def numbers_of_step(self) -> dict[str, float]:
        """What the step that is due would be with the weights as they are: all its numbers. The gradient is dropped
        again."""
        return self._numbers(self._accumulate_gradients())

    @contextlib.contextmanager
    def one_step_back(self) -> Iterator[None]:
        """Inside, the step that was just taken is due again: its samples, not its weights."""
        self.step, self.cursor = self.step - 1, self.cursor - self.recipe.train.batch
        try:
            yield
        finally:
            self.step, self.cursor = self.step + 1, self.cursor + self.recipe.train.batch

    def _numbers(self, means_N: torch.Tensor) -> dict[str, float]:
        """The objective's terms and the norms of the gradients as they are, by the guard's names for them."""
        norm, norms_G = self.clipping.clip()
        self._forget_pass()
        values = torch.cat((means_N, torch.cat((norm.reshape(1), norms_G)).to(means_N.dtype))).tolist()
        names = (*self.number_names, *(f"{GRADIENT} of {name}" for name in self.clipping.names))
        return dict(zip(names, values, strict=True))

    def _accumulate_gradients(self) -> torch.Tensor:
        """Gradients of the objective over all targets of all ranks. Returns its terms' global means, float32."""
        batches = self.batches()
        targets = [self.objective.targets(batch) for batch in batches]
        if self.guard is not None:
            self.guard.given(batches, targets)
        counts = self._count(targets)
        means_N = torch.zeros(len(self.objective.terms), dtype=torch.float32, device=self.chip.device)
        for number, (batch, own) in enumerate(zip(batches, targets, strict=True), start=1):
            with without_gradient_sync(self.module, last=number == len(batches)):
                means_N += self._backward(batch, own, counts)
        return sum_over_ranks(means_N)

    def _backward(self, batch: Batch, targets: Targets, counts: Mapping[str, int]) -> torch.Tensor:
        device, objective = self.chip.device, self.objective
        targets = {name: target.to(device) for name, target in targets.items()}
        sums = self._forward(
            batch.tokens_BT.to(device), targets=targets, criterion=objective, mtp=objective.looks_ahead
        )
        means = {name: sums[name] / count for name, count in counts.items()}
        # FSDP2 and DDP average gradients over ranks; ours are shares of one global mean, to be summed.
        total = objective.total(means) * self.ranks.count
        total.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        return torch.stack([mean.detach() for mean in means.values()])

    def _count(self, targets: Sequence[Targets]) -> dict[str, int]:
        """Targets of each term in this step, over all ranks, in the order of the terms; 1 where there are none."""
        parts = [self.objective.counts(part) for part in targets]
        counts = [sum(part[term.name] for part in parts) for term in self.objective.terms]
        if self.ranks.count > 1:
            counts = sum_over_ranks(torch.tensor(counts, dtype=torch.int64, device=self.chip.device)).tolist()
        return {term.name: max(1, count) for term, count in zip(self.objective.terms, counts, strict=True)}

    def _balance_experts(self) -> None:
        counts = self.decoder.expert_counts()
        if counts:
            for count in counts.values():
                sum_over_ranks(count)
            update_router_biases(self.decoder, counts, self.recipe.train.router_bias_speed)

    def _result(
        self, means_N: torch.Tensor, norm: torch.Tensor, norms_G: torch.Tensor, rate: float, started: float
    ) -> StepResult:
        # One transfer, one wait: the only point in a step where the host waits for the device.
        norms = torch.cat((norm.reshape(1), norms_G)).to(means_N.dtype)
        values = torch.cat((means_N, norms)).tolist()
        means, (gradient_norm, *group_norms) = values[: len(means_N)], values[len(means_N) :]
        numbers = {term.name: mean for term, mean in zip(self.objective.terms, means, strict=True)}
        if self.guard is not None:
            self.guard.end_step(numbers, gradient_norm, dict(zip(self.clipping.names, group_norms, strict=True)))
        return StepResult(
            step=self.step,
            numbers=numbers,
            gradient_norm=gradient_norm,
            learning_rate=rate,
            tokens=self.recipe.train.batch * self.recipe.data.sequence_length,
            seconds=time.perf_counter() - started,
            guard_seconds=self.guard.seconds_in_step if self.guard is not None else 0.0,
        )


def finite(value: float | None) -> float | None:
    """A number as events can carry it: null for NaN and the infinities."""
    return value if value is not None and math.isfinite(value) else None


def _check_layer_that_looks_ahead(decoder: Decoder, objective: Objective) -> None:
    ahead = [term.name for term in objective.terms if term.ahead]
    if ahead and decoder.mtp is None:
        raise ModelError(
            f"The objective {objective.name} has a term of the multi-token layer ({ahead[0]}), and this model has no "
            "such layer: leave the term out, or take a model that has one."
        )


def _check_batch(recipe: Recipe, ranks: Ranks) -> None:
    shares = recipe.train.accumulate * ranks.count
    if recipe.train.batch % shares:
        raise RecipeError(
            f"train.batch is {recipe.train.batch}, which {recipe.train.accumulate} accumulation steps on {ranks.count} "
            f"ranks cannot share evenly: make it a multiple of {shares}."
        )
