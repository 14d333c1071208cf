"""The training loop, one for one rank and many: a step, its update, and what is measured of it.

Knows the model, the data and the chip; not the supervisor, files or events. `worker.py` drives it.

B samples, T tokens.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from beringia.chips.chip import Chip
from beringia.data import Batch, Stream
from beringia.errors import RecipeError
from beringia.model import IGNORED, Decoder, update_router_biases
from beringia.model.attention import Attention
from beringia.model.layers import FeedForward
from beringia.processes.ranks import Ranks
from beringia.records.recipe import Recipe
from beringia.train.clipping import Clipping
from beringia.train.guard import Guard
from beringia.train.optimizer import learning_rate, make_optimizer, set_learning_rate
from beringia.train.sharding import Sharding, shard, sum_over_ranks, without_gradient_sync


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step was."""

    step: int
    loss: float
    """Mean cross-entropy per target token over all ranks, nats."""
    mtp_loss: float | None
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    guard_seconds: float


class Trainer:
    """Decoder, optimizer, data and guard of one run on one chip, at one step.

    `step` and `cursor` say how far it is: steps done and samples consumed. Loading a checkpoint sets both.
    """

    def __init__(self, recipe: Recipe, chip: Chip, ranks: Ranks, decoder: Decoder, stream: Stream) -> None:
        self.recipe = recipe
        self.chip = chip
        self.ranks = ranks
        self.decoder = decoder
        self.stream = stream
        self.step = 0
        self.cursor = 0
        if decoder.mtp is not None and recipe.train.mtp_weight == 0:
            decoder.mtp.requires_grad_(False)
        self.module, self.sharding = self._spread()
        self._forward = self.module
        self.optimizer = make_optimizer(
            decoder.named_parameters(), recipe.train, fused=chip.capabilities.fused_optimizer
        )
        self._clipping = Clipping(decoder, recipe.train.clip)
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
            sums = self._accumulate_gradients()
        if self.guard is not None:
            self.guard.gradients_ready()
        norm, norms_G = self._clipping.clip()
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
        return self._result(sums, norm, norms_G, rate, started)

    def check_sites(self, sites: Sequence[str]) -> None:
        """Have the guard check these sites with the weights as they are, in the pass of a step that is not taken."""
        assert self.guard is not None, "there is a guard to ask"
        self.guard.demand(sites)
        self.guard.begin_step(self.step + 1)
        with self.while_computing():
            self._accumulate_gradients()
        self.guard.gradients_ready()
        self.optimizer.zero_grad(set_to_none=True)
        for count in self.decoder.expert_counts().values():
            count.zero_()

    def batches(self) -> list[Batch]:
        """This rank's share of the step that is due, one batch for each accumulation step."""
        train = self.recipe.train
        count = train.batch // (train.accumulate * self.ranks.count)
        starts = (self.cursor + (part * self.ranks.count + self.ranks.rank) * count for part in range(train.accumulate))
        return [self.stream.samples(start, count) for start in starts]

    def _accumulate_gradients(self) -> torch.Tensor:
        """Gradients of the mean loss over all targets of all ranks. Returns (main, mtp) loss, global means, float32."""
        batches = self.batches()
        targets = self._count_targets(batches)
        means = torch.zeros(2, dtype=torch.float32, device=self.chip.device)
        for number, batch in enumerate(batches, start=1):
            with without_gradient_sync(self.module, last=number == len(batches)):
                means += self._backward(batch, targets)
        return sum_over_ranks(means)

    def _backward(self, batch: Batch, targets: tuple[int, int]) -> torch.Tensor:
        device = self.chip.device
        mtp_weight = self.recipe.train.mtp_weight
        tokens_BT, labels_BT = batch.tokens_BT.to(device), batch.labels_BT.to(device)
        losses = self._forward(tokens_BT, labels_BT, mtp=mtp_weight > 0)
        main = losses.main_sum / targets[0]
        mtp = losses.mtp_sum / max(1, targets[1])
        # FSDP2 and DDP average gradients over ranks; ours are shares of one global mean, to be summed.
        ((main + mtp_weight * mtp) * self.ranks.count).backward()
        return torch.stack((main.detach(), mtp.detach()))

    def _count_targets(self, batches: list[Batch]) -> tuple[int, int]:
        """Targets of the main loss and of the multi-token loss in this step, over all ranks."""
        own = [
            sum(int((batch.labels_BT != IGNORED).sum()) for batch in batches),
            sum(int((batch.labels_BT[:, 1:] != IGNORED).sum()) for batch in batches),
        ]
        if self.ranks.count == 1:
            return own[0], own[1]
        main, mtp = sum_over_ranks(torch.tensor(own, dtype=torch.int64, device=self.chip.device)).tolist()
        return main, mtp

    def _balance_experts(self) -> None:
        counts = self.decoder.expert_counts()
        if counts:
            for count in counts.values():
                sum_over_ranks(count)
            update_router_biases(self.decoder, counts, self.recipe.train.router_bias_speed)

    def _result(
        self, means: torch.Tensor, norm: torch.Tensor, norms_G: torch.Tensor, rate: float, started: float
    ) -> StepResult:
        # One transfer, one wait: the only point in a step where the host waits for the device.
        norms = torch.cat((norm.reshape(1), norms_G)).to(means.dtype)
        loss, mtp_loss, gradient_norm, *group_norms = torch.cat((means, norms)).tolist()
        has_mtp = self.decoder.mtp is not None and self.recipe.train.mtp_weight > 0
        tokens = self.recipe.train.batch * self.recipe.data.sequence_length
        if self.guard is not None:
            self.guard.end_step(
                loss,
                mtp_loss if has_mtp else None,
                gradient_norm,
                dict(zip(self._clipping.names, group_norms, strict=True)),
            )
        return StepResult(
            step=self.step,
            loss=loss,
            mtp_loss=mtp_loss if has_mtp else None,
            gradient_norm=gradient_norm,
            learning_rate=rate,
            tokens=tokens,
            seconds=time.perf_counter() - started,
            guard_seconds=self.guard.seconds_in_step if self.guard is not None else 0.0,
        )


def finite(value: float | None) -> float | None:
    """A number as events can carry it: null for NaN and the infinities."""
    return value if value is not None and math.isfinite(value) else None


def _check_batch(recipe: Recipe, ranks: Ranks) -> None:
    shares = recipe.train.accumulate * ranks.count
    if recipe.train.batch % shares:
        raise RecipeError(
            f"train.batch is {recipe.train.batch}, which {recipe.train.accumulate} accumulation steps on {ranks.count} "
            f"ranks cannot share evenly: make it a multiple of {shares}."
        )
