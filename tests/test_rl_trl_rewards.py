"""TRL's reward functions run unchanged: ten in the forms that its documentation and its users publish, in words of our
own; and what a function may do wrong is one sentence."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from beringia.errors import InputError
from beringia.rl.rewards.trl_function import Completions, TrlFunction

TEXTS = ["<think>2 + 2</think>4", "four", "<think>hm</think>5"]
PLAIN = Completions(
    prompts=["2 + 2 ="] * 3,
    completions=TEXTS,
    completion_ids=[[1, 2, 3], [4], [5, 6]],
    columns={"answer": ["4", "4", "4"], "task": ["math", "code", "math"]},
    step=3,
    steps=10,
)
TALK = Completions(
    prompts=[[{"role": "user", "content": "2 + 2 ="}]] * 3,
    completions=TEXTS,
    completion_ids=PLAIN.completion_ids,
    columns=PLAIN.columns,
)


# ---- ten functions, as they are published


def by_length(completions: list[str], **kwargs: Any) -> list[float]:
    return [-abs(20 - len(completion)) for completion in completions]


def by_length_in_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[int]:
    return [len(tokens) for tokens in completion_ids]


def unlike_characters(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def thinks_first(completions: list[Any], **kwargs: Any) -> list[float]:
    texts = [completion[0]["content"] if isinstance(completion, list) else completion for completion in completions]
    return [1.0 if re.fullmatch(r"<think>.*?</think>.*", text, re.DOTALL) else 0.0 for text in texts]


def is_the_answer(
    prompts: list[Any], completions: list[list[dict[str, str]]], answer: list[str], **kwargs: Any
) -> list[float]:
    said = [completion[0]["content"].rpartition(">")[2] for completion in completions]
    return [2.0 if one == wanted else 0.0 for one, wanted in zip(said, answer, strict=True)]


def of_math_alone(completions: list[str], task: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
    rows = zip(completions, task, answer, strict=True)
    return [float(wanted in text) if kind == "math" else None for text, kind, wanted in rows]


async def asks_a_service(completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float("4" in completion) for completion in completions]


def tells_more(completions: list[str], log_extra: Any = None, log_metric: Any = None, **kwargs: Any) -> list[float]:
    right = [float("4" in completion) for completion in completions]
    log_extra("said", completions)
    log_metric("share right", sum(right) / len(right))
    return right


def more_later(completions: list[str], trainer_state: Any = None, **kwargs: Any) -> list[float]:
    return [trainer_state.global_step / trainer_state.max_steps for _ in completions]


class TooLong:
    """As TRL's factory of punishments for long answers gives one."""

    def __init__(self, most: int, from_there: int) -> None:
        self.most, self.from_there = most, from_there

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> torch.Tensor:
        over = torch.tensor([len(tokens) - (self.most - self.from_there) for tokens in completion_ids])
        return -(over.clamp(min=0) / self.from_there)


@pytest.mark.parametrize(
    ("function", "asked", "rewards"),
    [
        (by_length, PLAIN, (-1.0, -16.0, -2.0)),
        (by_length_in_tokens, PLAIN, (3.0, 1.0, 2.0)),
        (unlike_characters, PLAIN, (12.0, 4.0, 10.0)),
        (thinks_first, PLAIN, (1.0, 0.0, 1.0)),
        (thinks_first, TALK, (1.0, 0.0, 1.0)),
        (is_the_answer, TALK, (2.0, 0.0, 0.0)),
        (of_math_alone, PLAIN, (1.0, None, 0.0)),
        (asks_a_service, PLAIN, (1.0, 0.0, 0.0)),
        (tells_more, PLAIN, (1.0, 0.0, 0.0)),
        (more_later, PLAIN, (0.3, 0.3, 0.3)),
        (TooLong(4, 2), PLAIN, (-0.5, 0.0, 0.0)),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_published_function_runs_unchanged(
    function: Any, asked: Completions, rewards: tuple[float | None, ...]
) -> None:
    assert TrlFunction("one", function).score(asked).rewards == rewards


def test_what_it_logs_is_told() -> None:
    scores = TrlFunction("tells", tells_more).score(PLAIN)
    assert scores.metrics == {"share right": pytest.approx(1 / 3)}
    assert scores.extra == {"said": tuple(TEXTS)}


def raising(completions: list[str], **kwargs: Any) -> list[float]:
    raise LookupError("no such column")


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (raising, "raised LookupError: no such column"),
        (lambda completions, **_: [1.0], "gave 1 numbers for 3 completions"),
        (lambda completions, **_: 1.0, "gave a float; a list of numbers was asked for"),
        (lambda completions, **_: "111", "gave a str; a list of numbers was asked for"),
        (lambda completions, **_: {0: 1.0, 1: 0.0, 2: 0.0}, "gave a dict; a list of numbers was asked for"),
        (lambda completions, **_: torch.tensor(1.0), "gave a Tensor; a list of numbers was asked for"),
        (lambda completions, **_: [1.0, float("nan"), 0.0], "gave nan for completion 1: give a finite number, or None"),
        (lambda completions, **_: [1.0, 0.0, "right"], "gave 'right' for completion 2; a number or None"),
        (lambda prompts, completions: [0.0] * 3, "raised TypeError.*unexpected keyword argument"),
    ],
)
def test_what_a_function_does_wrong_is_one_sentence(function: Any, found: str) -> None:
    with pytest.raises(InputError, match=f"The reward mine {found}"):
        TrlFunction("mine", function).score(PLAIN)


FILE = "from math import sqrt\n\ndef {name}(completions, **kwargs):\n    return [len(one) for one in completions]\n"


def test_a_function_is_loaded_from_a_file_or_a_module(tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(FILE.format(name="long"))
    for spec in (f"{file}:long", str(file), "test_rl_trl_rewards:unlike_characters"):
        assert TrlFunction.load(spec).score(PLAIN).rewards[1] == 4.0
    file.write_text(file.read_text() + FILE.format(name="longer"))
    assert TrlFunction.load(f"{file}:longer").name == "longer"


@pytest.mark.parametrize(
    ("spec", "content", "found"),
    [
        ("absent.py", None, "is no file"),
        ("rewards.py:shorter", FILE.format(name="long"), "has no function shorter; it has long"),
        ("rewards.py", FILE.format(name="long") + FILE.format(name="longer"), "it has long, longer: say which"),
        ("rewards.py", "x = 3\n", "no function of its own: say which"),
        ("rewards.py", "import absent_module\n", "raised ModuleNotFoundError"),
        ("absent_module:f", None, "cannot be imported"),
        (":f", None, "no module cannot be imported"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(
    spec: str, content: str | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "rewards.py").write_text(content)
    with pytest.raises(InputError, match=found):
        TrlFunction.load(spec)
