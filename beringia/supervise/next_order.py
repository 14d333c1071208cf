"""The order that a learner's next worker gets, from what the run's history amounts to."""

from __future__ import annotations

from collections.abc import Sequence

from beringia.history.situation import Situation
from beringia.records.events import StepDone
from beringia.records.orders import Order, StepNumbers
from beringia.records.recipe import Recipe, TrainSection

_RECENT_STEPS = 512
"""Of which a new worker is told: what the guard's spike test remembers."""


def order_for(recipe: Recipe, situation: Situation, root: str, epoch: int) -> Order:
    """What the worker is to do. `root` is the run directory as it sees it."""
    assert situation.chip is not None
    target = situation.resume_step
    canary = situation.canary_due and target is not None
    steps = {target or 0, situation.canary_from if canary else 0}
    return Order(
        root=root,
        chip=situation.chip,
        recipe=recipe,
        recipe_hash=recipe.hash,
        epoch=epoch,
        resume_step=target,
        state_hashes={step: situation.complete[step] for step in steps if step in situation.complete},
        canary_from=situation.canary_from if canary else None,
        canary_compute_dtype=_compute_dtype(situation, situation.came_from) if canary else None,
        ranks=ranks_for(recipe, situation.chip, len(situation.excluded)),
        excluded_devices=tuple(sorted(situation.excluded)),
        evaluate=_evaluation_due(situation, recipe.train),
        recent=_recent(situation.steps_before(target or 0)),
        accepted_spikes=tuple(situation.accepted_spikes),
        doubted_steps=tuple(sorted(situation.doubted)),
    )


def ranks_for(recipe: Recipe, label: str, left_out: int) -> int:
    """As many ranks as the recipe says. Where devices are left out, as many of the others as share the batch evenly:
    the batch stays, and what its loss is a mean over."""
    ranks, train = recipe.chips[label].ranks, recipe.train
    if left_out == 0:
        return ranks
    even = (count for count in range(ranks - left_out, 0, -1) if train.batch % (train.accumulate * count) == 0)
    return next(even, 1)


def _evaluation_due(situation: Situation, train: TrainSection) -> bool:
    """Whether the checkpoint's step is one that is evaluated, and nobody has told what came of it."""
    step = situation.resume_step
    planned = step is not None and (step % train.evaluate_every == 0 or step == train.last_step)
    return planned and step not in situation.evaluated


def _recent(steps: Sequence[StepDone]) -> tuple[StepNumbers, ...]:
    """The numbers of these steps, as far as they are numbers."""
    return tuple(
        StepNumbers(loss=step.loss, mtp_loss=step.mtp_loss, gradient_norm=step.gradient_norm)
        for step in steps[-_RECENT_STEPS:]
        if step.loss is not None and step.gradient_norm is not None
    )


def _compute_dtype(situation: Situation, label: str | None) -> str | None:
    last = situation.opened.get(label) if label is not None else None
    return last.compute_dtype if last is not None else None
