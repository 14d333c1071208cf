"""A small trainer with its guard, in this process, for tests and benchmarks of the guard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beringia.chips.emulated.device import register
from beringia.chips.open import open_chip
from beringia.data import choose_tokenizer, open_stream
from beringia.model import load_model
from beringia.processes.ranks import Ranks
from beringia.records.events import Alarm
from beringia.records.recipe import Recipe, parse_recipe
from beringia.train.cross_entropy import CrossEntropy
from beringia.train.guard import Guard
from beringia.train.guard.check import Check
from beringia.train.guard.checks import all_checks
from beringia.train.guard.schedule import Schedule
from beringia.train.objective import Objective
from beringia.train.trainer import Trainer

# torch's autograd makes its queues at the first backward pass of a process and learns of no device later.
register()


def recipe(chip: str = "cpu", *, preset: str = "r2-nano", seed: int = 3, **train: Any) -> Recipe:
    """Digit sums on one chip."""
    document = {
        "name": "guarded",
        "seed": seed,
        "model": {"preset": preset},
        "chips": {"first": {"use": chip}},
        "data": {"task": "digit-sum", "digits": 4, "sequence_length": 32},
        "train": {"prefer": ["first"], "steps": 100, "batch": 4, "warmup_steps": 10} | train,
    }
    return parse_recipe(document, "a test's recipe")


def trainer(
    chip: str = "cpu",
    *,
    share: float | None = 0.2,
    dtype: torch.dtype | None = None,
    faults: str | None = None,
    asked: Recipe | None = None,
    objective: Objective | None = None,
) -> Trainer:
    """A trainer at step 0; `share` None leaves the guard out."""
    asked = asked or recipe(chip)
    opened = open_chip(chip, faults=faults, seed=asked.seed)
    tokenizer = choose_tokenizer(asked.data, asked.model)
    stream = open_stream(asked.data, seed=asked.seed, directory=Path("unused"), split="train", tokenizer=tokenizer)
    decoder = load_model(asked.model.preset or "", seed=asked.seed, vocabulary_size=tokenizer.vocabulary_size)
    decoder.set_compute_dtype(dtype or opened.capabilities.compute_dtype)
    if dtype == torch.float64:
        decoder.double()
    decoder.to(opened.device)
    decoder.train()
    made = Trainer(asked, opened, Ranks(), decoder, objective or CrossEntropy.of(decoder, asked.train), stream)
    if share is not None:
        made.guard = guard(made, share)
    return made


def guard(made: Trainer, share: float, *more: type[Check[Any]]) -> Guard:
    """A guard for a trainer, with these checks beside its own."""
    made_guard = Guard(
        made.decoder,
        made.optimizer,
        made.objective,
        made.chip,
        Ranks(),
        share=share,
        seed=made.recipe.seed,
        sharding=made.sharding,
        clipping=made.clipping,
        checks=[*all_checks(), *more],
    )
    # By the clock, a busy machine would decide what is checked when.
    weights = {check.name: check.when.weight for check in made_guard.checks if not check.when.every_step}
    made_guard._schedule = DeclaredTimes(weights, share)
    return made_guard


class DeclaredTimes(Schedule):
    """A schedule for which every step takes a second and every check a tenth of one, whatever was measured."""

    def step_took(self, seconds: float, frequent_seconds: float) -> None:
        super().step_took(1.0, 0.0)

    def check_took(self, kind: str, seconds: float) -> None:
        super().check_took(kind, 0.1)


def alarms_of_a_full_check(made: Trainer) -> list[Alarm]:
    """What checking every site once, with the weights as they are, finds."""
    assert made.guard is not None
    made.guard.take_events()
    made.check_sites(made.guard.sites)
    return [event for event in made.guard.take_events() if isinstance(event, Alarm)]


def steps_until_alarm(made: Trainer, steps: int) -> tuple[int | None, list[Alarm]]:
    """Train until the guard alarms or the steps are done: the step of the first alarm, and the alarms."""
    assert made.guard is not None
    for _ in range(steps):
        result = made.train_step()
        alarms = [event for event in made.guard.take_events() if isinstance(event, Alarm)]
        if alarms:
            return result.step, alarms
    return None, []


@contextmanager
def changed_output(module: nn.Module, change: Any) -> Iterator[None]:
    """Inside, `module` returns `change(output)`."""
    handle = module.register_forward_hook(lambda _, inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def changing_gradient(change: Any) -> Any:
    """A function that leaves a tensor as it is and changes the gradient that comes back through it."""

    class Change(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            changed: torch.Tensor = change(gradient)
            return changed

    return Change.apply
