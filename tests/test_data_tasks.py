"""Tasks: splits that never meet, checkers that accept the right answer and nothing else."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beringia.data import Task, load_tokenizer, make_task, open_stream
from beringia.data.alphabet import END_TOKEN, SYMBOLS, TOKENS, ZERO, spell, tokens_of
from beringia.errors import DataError
from beringia.records.recipe import DataSection

TASKS = ("digit-sum", "digit-product", "digit-sort")


def python_answer(name: str, digits: list[int]) -> str:
    """The answer in plain Python, written another way than the task does it."""
    if name == "digit-sum":
        return str(int(str(sum(digits))[-1]))
    if name == "digit-product":
        return "0123456789a"[math.prod(digits) % 11]
    return "".join(sorted(map(str, digits)))


def question_digits(question: list[int]) -> list[int]:
    return [token - ZERO for token in question[1:]]


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), digits=st.integers(2, 12), index=st.integers(0, 10**9), long=st.booleans())
def test_the_checker_accepts_the_gold_answer_with_and_without_a_thought(
    name: str, seed: int, digits: int, index: int, long: bool
) -> None:
    task = make_task(name, digits=digits, seed=seed)
    question = task.questions(index, 1, "held-out")[0]
    completion = task.gold(question, long=long)
    assert task.check(question, completion)
    assert spell(completion).endswith(f"={python_answer(name, question_digits(question.tolist()))}<end>")


@pytest.mark.parametrize("name", TASKS)
def test_the_checker_refuses_every_other_answer(name: str) -> None:
    task = make_task(name, digits=10, seed=0)
    for question in task.questions(0, 5, "train").tolist():
        gold = task.gold(question, long=False)
        for place, symbol in itertools.product(range(1, len(gold) - 1), range(len(SYMBOLS))):
            other = [*gold[:place], symbol, *gold[place + 1 :]]
            assert task.check(question, other) == (other == gold)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("=9E", True),
        (":0000000000=9E", True),  # the thought may say what it likes
        ("=3=9E", True),  # the last answer counts
        ("=9E=3E", True),  # nothing after the end counts
        ("=9", False),  # no end
        ("9E", False),  # no answer mark
        ("=E", False),
        ("=99E", False),
        ("=9=E", False),
        ("", False),
    ],
)
def test_what_counts_is_the_answer_between_the_last_mark_and_the_end(completion: str, right: bool) -> None:
    task = make_task("digit-sum", digits=10, seed=0)
    tokens = [END_TOKEN if character == "E" else TOKENS[character] for character in completion]
    assert task.check(tokens_of("+3141592653"), tokens) is right


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("digits", [2, 3, 10])
def test_held_out_questions_never_occur_in_training(name: str, digits: int) -> None:
    task = make_task(name, digits=digits, seed=1)
    for split, expected in (("train", False), ("held-out", True)):
        questions = task.questions(0, 3000, split)  # type: ignore[arg-type]
        assert bool((task.is_held_out(questions.numpy()[:, 1:] - ZERO) == expected).all())


@pytest.mark.parametrize("name", TASKS)
def test_samples_of_the_training_stream_ask_no_held_out_question(name: str) -> None:
    data = DataSection(task=name, digits=4)
    stream = open_stream(data, seed=0, directory=None, split="train", tokenizer=load_tokenizer("digits"))  # type: ignore[arg-type]
    task = stream.task
    assert task is not None
    rows = stream.samples(0, 300).tokens_BT.numpy()
    starts = np.argwhere(rows[:, :-5] == TOKENS[task.operator])
    digits = np.array([rows[row, column + 1 : column + 5] - ZERO for row, column in starts])
    assert len(digits) > 1000
    assert not task.is_held_out(digits).any()


@pytest.mark.parametrize("name", TASKS)
def test_the_split_is_the_same_for_every_seed_and_covers_all_questions(name: str) -> None:
    tasks = [make_task(name, digits=3, seed=seed, held_out_fraction=0.1) for seed in (0, 1)]
    every = np.array(list(itertools.product(tasks[0].values, repeat=3)))
    sides = [task.is_held_out(every) for task in tasks]
    assert bool((sides[0] == sides[1]).all())
    pairs = len(tasks[0].values) ** 2
    assert sides[0].mean() == pytest.approx(round(0.1 * pairs) / pairs)
    drawn = {tuple(row) for row in (tasks[0].questions(0, 20_000, "held-out").numpy()[:, 1:] - ZERO).tolist()}
    assert drawn == {tuple(row) for row in every[sides[0]].tolist()}


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_the_frequency_of_the_commonest_answer(name: str) -> None:
    task = make_task(name, digits=3, seed=0)
    every = np.array(list(itertools.product(task.values, repeat=3)))
    _, counts = np.unique(task.answer(every), axis=0, return_counts=True)
    assert task.chance == pytest.approx(counts.max() / len(every))


def test_thoughts_are_what_they_say() -> None:
    def thought(name: str, question: str) -> str:
        return spell(make_task(name, digits=len(question) - 1, seed=0).gold(tokens_of(question), long=True))

    assert thought("digit-sum", "+3141592653") == ":3489435169=9<end>"
    assert thought("digit-product", "*3247592653") == ":3623436341=1<end>"
    assert thought("digit-sort", "<3141592653") == ":0212121001=1123345569<end>"


def test_questions_have_one_length_and_depend_on_the_index_alone() -> None:
    task: Task = make_task("digit-sum", digits=10, seed=5)
    whole = task.questions(0, 64, "held-out")
    assert whole.shape == (64, 11)
    assert whole[17:40].equal(task.questions(17, 23, "held-out"))


@pytest.mark.parametrize("digits", [1, 36])
def test_a_number_of_digits_out_of_range_is_refused(digits: int) -> None:
    with pytest.raises(DataError, match="takes 2 to 35 digits"):
        make_task("digit-sort", digits=digits, seed=0)


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="the tasks are digit-sum, digit-product, digit-sort"):
        make_task("digit-quotient", digits=3, seed=0)
