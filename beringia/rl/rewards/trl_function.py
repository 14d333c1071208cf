"""A user's reward function as TRL calls it, unchanged.

    f(prompts, completions, completion_ids=None, trainer_state=None, log_extra=None, log_metric=None, **columns)
        -> list[float | None]

Everything is given by keyword, one entry a completion; columns are those of the data set. None says that no reward
applies. Where prompts are lists of messages, completions are lists of one message. The function may be asynchronous.
(TRL 1.16, `trl/trainer/grpo_trainer.py`, and its documentation's "Using a custom reward function".)

Whoever calls this in the process that trains waits as long as the function takes.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from beringia.errors import InputError

Messages = list[dict[str, Any]]
Text = str | Messages
"""A text, or a conversation."""


@dataclass(frozen=True)
class Completions:
    """What a reward function is asked about; lists of equal length."""

    prompts: Sequence[Text]
    completions: Sequence[str]
    """As text; where the prompt is a conversation, the assistant's answer to it."""
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Of the data set, one value a completion."""
    step: int = 0
    steps: int = 0
    """In all."""


@dataclass(frozen=True)
class Scores:
    """What it said."""

    rewards: tuple[float | None, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What it gave to `log_metric`; of several values under one name the mean."""
    extra: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Columns that it gave to `log_extra`."""


class TrlFunction:
    """One such function."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self._function = function

    @staticmethod
    def load(spec: str) -> TrlFunction:
        """From `module:function` or `file.py:function`; the function of a file that has only one need not be named.
        Raises InputError."""
        place, _, name = spec.partition(":")
        module = _module_of(place, spec)
        own = [one for one, value in vars(module).items() if _is_own_function(value, module)]
        if not name and len(own) != 1:
            raise InputError(f"The reward {spec} names no function, and {_listed(own)}: say which, as {place}:name.")
        function = getattr(module, name or own[0], None)
        if not callable(function):
            raise InputError(f"The reward {spec} was asked for, and {place} has no function {name}; {_listed(own)}.")
        return TrlFunction(name or own[0], function)

    def score(self, asked: Completions) -> Scores:
        """Call it. Raises InputError where it raises something, or gives no number or None for each completion."""
        metrics: dict[str, list[float]] = {}
        extra: dict[str, tuple[Any, ...]] = {}
        talks = bool(asked.prompts) and not isinstance(asked.prompts[0], str)
        given = {
            **{name: list(values) for name, values in asked.columns.items()},
            "prompts": list(asked.prompts),
            "completions": [_as_answer(one) if talks else one for one in asked.completions],
            "completion_ids": [list(tokens) for tokens in asked.completion_ids],
            "trainer_state": SimpleNamespace(global_step=asked.step, max_steps=asked.steps),
            "log_extra": lambda column, values: extra.update({column: tuple(values)}),
            "log_metric": lambda name, value: metrics.setdefault(name, []).append(float(value)),
        }
        try:
            found = self._function(**given)
            if inspect.isawaitable(found):
                found = asyncio.run(_awaited(found))
        except Exception as error:  # the user's own function
            raise InputError(f"The reward {self.name} raised {type(error).__name__}: {error}.") from error
        return Scores(
            self._rewards(found, len(asked.completions)),
            {name: sum(values) / len(values) for name, values in metrics.items()},
            extra,
        )

    def _rewards(self, found: Any, count: int) -> tuple[float | None, ...]:
        if isinstance(found, str | Mapping) or not getattr(found, "ndim", 1) or not hasattr(found, "__len__"):
            raise InputError(f"The reward {self.name} gave a {type(found).__name__}; a list of numbers was asked for.")
        if len(found) != count:
            raise InputError(f"The reward {self.name} gave {len(found)} numbers for {count} completions.")
        return tuple(self._reward(number, value) for number, value in enumerate(found))

    def _reward(self, number: int, value: Any) -> float | None:
        if value is None:
            return None
        try:
            reward = float(value)
        except (TypeError, ValueError):
            raise InputError(
                f"The reward {self.name} gave {value!r} for completion {number}; a number or None was asked for."
            ) from None
        if not math.isfinite(reward):
            raise InputError(
                f"The reward {self.name} gave {reward} for completion {number}: give a finite number, or None where no "
                "reward applies."
            )
        return reward


def _module_of(place: str, spec: str) -> ModuleType:
    if place.endswith(".py"):
        return _module_of_file(Path(place), spec)
    try:
        return importlib.import_module(place)
    except Exception as error:  # of the user's own module, or a name that is none
        raise InputError(
            f"The reward {spec} was asked for, and {place or 'no module'} cannot be imported: {error}."
        ) from error


def _module_of_file(file: Path, spec: str) -> ModuleType:
    if not file.is_file():
        raise InputError(f"The reward {spec} was asked for, and {file} is no file.")
    name = f"beringia_reward_{file.stem}"
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None and found.loader is not None, "its name ends as a Python file's"
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look there for their module
    try:
        found.loader.exec_module(module)
    except Exception as error:  # the user's own file
        raise InputError(
            f"The reward {spec} was asked for, and {file} raised {type(error).__name__}: {error}."
        ) from error
    return module


def _is_own_function(value: Any, module: ModuleType) -> bool:
    return inspect.isfunction(value) and value.__module__ == module.__name__ and not value.__name__.startswith("_")


def _listed(names: Sequence[str]) -> str:
    return f"it has {', '.join(names)}" if names else "it has no function of its own"


def _as_answer(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


async def _awaited(found: Any) -> Any:
    return await found
