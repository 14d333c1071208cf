"""The stream: a pure function of (seed, split, sample number), whatever slices it is read in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beringia.data import Batch, Stream, load_tokenizer, open_stream
from beringia.data.alphabet import END_TOKEN, THOUGHT_MARK, TOKENS, tokens_of
from beringia.data.counter import Permutation, below, derive_key, random_words
from beringia.errors import DataError
from beringia.records.recipe import DataSection

TASKS = ("digit-sum", "digit-product", "digit-sort")


def open_task(name: str, *, seed: int = 7, split: str = "train", **options: object) -> Stream:
    data = DataSection(task=name, **options)  # type: ignore[arg-type]
    return open_stream(data, seed=seed, directory=Path("unused"), split=split, tokenizer=load_tokenizer("digits"))  # type: ignore[arg-type]


def write_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(30):
        words = [f"word{number}.{place}" for place in range(5 * number)]
        (folder / f"{number}.txt").write_text(f"Document {number}: " + " ".join(words))
    turns = [(f"Question {number}?", "yes " * (number % 9 + 1)) for number in range(50)]
    chats = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    ]
    (folder.parent / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return folder


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stream]]:
    """One stream of each kind: a task, a folder, chats."""
    root = tmp_path_factory.mktemp("data")
    folder = write_folder(root / "texts")
    common = {"seed": 3, "directory": root / "packed", "split": "train", "tokenizer": load_tokenizer("bytes")}
    yield {
        "task": open_task("digit-sum"),
        "text": open_stream(DataSection(text=str(folder), sequence_length=48), **common),  # type: ignore[arg-type]
        "chat": open_stream(DataSection(chat=str(root / "chats.jsonl"), sequence_length=96), **common),  # type: ignore[arg-type]
    }


def join(*batches: Batch) -> Batch:
    return Batch(torch.cat([b.tokens_BT for b in batches]), torch.cat([b.labels_BT for b in batches]))


def assert_equal(one: Batch, other: Batch) -> None:
    assert torch.equal(one.tokens_BT, other.tokens_BT)
    assert torch.equal(one.labels_BT, other.labels_BT)


@pytest.mark.parametrize("kind", ["task", "text", "chat"])
@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 10_000), parts=st.lists(st.integers(1, 17), min_size=1, max_size=4))
def test_any_split_of_a_slice_gives_the_same_samples(
    streams: dict[str, Stream], kind: str, start: int, parts: list[int]
) -> None:
    edges = np.cumsum([start, *parts]).tolist()
    pieces = [streams[kind].samples(first, last - first) for first, last in zip(edges, edges[1:], strict=False)]
    assert_equal(join(*pieces), streams[kind].samples(start, sum(parts)))


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_ranks_read_disjoint_rows_whose_union_is_an_epoch(streams: dict[str, Stream], kind: str) -> None:
    stream = streams[kind]
    assert stream.epoch_samples is not None
    whole = stream.samples(0, stream.epoch_samples)
    rows = {tuple(row) for row in torch.cat([whole.tokens_BT, whole.labels_BT], dim=1).tolist()}
    shares = [
        {tuple(row) for number in range(rank, stream.epoch_samples, 4) for row in _rows(stream.samples(number, 1))}
        for rank in range(4)
    ]
    assert set.union(*shares) == rows
    assert sum(map(len, shares)) == len(rows) == stream.epoch_samples


def _rows(batch: Batch) -> list[list[int]]:
    rows: list[list[int]] = torch.cat([batch.tokens_BT, batch.labels_BT], dim=1).tolist()
    return rows


def test_every_epoch_has_the_same_rows_in_another_order(streams: dict[str, Stream]) -> None:
    stream = streams["text"]
    assert stream.epoch_samples is not None
    first, second = (_rows(stream.samples(epoch * stream.epoch_samples, stream.epoch_samples)) for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_every_token_of_a_folder_is_a_target_once_an_epoch(streams: dict[str, Stream]) -> None:
    stream = streams["text"]
    assert stream.epoch_samples is not None
    rows = stream.source
    total = sum(len(shard.tokens) for shard in rows.shards)  # type: ignore[attr-defined]
    labels_BT = stream.samples(0, stream.epoch_samples).labels_BT
    assert int((labels_BT != -100).sum()) == total - len(rows.shards)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["task", "text", "chat"])
def test_a_label_is_the_next_token_or_no_loss(streams: dict[str, Stream], kind: str) -> None:
    batch = streams[kind].samples(0, 40)
    tokens, labels = batch.tokens_BT[:, 1:], batch.labels_BT[:, :-1]
    assert torch.equal(labels[labels != -100], tokens[labels != -100])
    assert bool((batch.labels_BT != -100).any())
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64


@pytest.mark.parametrize("name", TASKS)
def test_seed_and_split_each_give_other_samples(name: str) -> None:
    streams = [open_task(name), open_task(name, seed=8), open_task(name, split="held-out")]
    assert len({stream.fingerprint(0, 8) for stream in streams}) == 3
    assert len({stream.identity for stream in streams}) == 3


def test_fingerprints_are_those_of_the_samples_and_differ_by_one_sample() -> None:
    stream = open_task("digit-sum")
    assert stream.fingerprint(64, 32) == open_task("digit-sum").fingerprint(64, 32)
    assert stream.fingerprint(64, 32) != stream.fingerprint(65, 32)


def test_fingerprints_do_not_change_between_versions() -> None:
    """A run that resumes under another version must get the samples that were due."""
    known = {
        "digit-sum": "bdd5f77d4f2ce730",
        "digit-product": "9661ed335e72dc77",
        "digit-sort": "af4b8f9aaf9548de",
    }
    assert {name: open_task(name).fingerprint(1000, 32)[:16] for name in TASKS} == known


@pytest.mark.parametrize("name", TASKS)
def test_question_digits_carry_no_loss_and_everything_after_them_does(name: str) -> None:
    operator = TOKENS[{"digit-sum": "+", "digit-product": "*", "digit-sort": "<"}[name]]
    batch = open_task(name).samples(0, 16)
    for tokens, labels in zip(batch.tokens_BT.tolist(), batch.labels_BT.tolist(), strict=True):
        inside = 0
        for token, label in zip(tokens, labels, strict=True):
            inside = 11 if token == operator else inside - 1
            asked = 1 < inside <= 11 or token == END_TOKEN
            assert (label == -100) == asked


@pytest.mark.parametrize("sequence_length", [24, 64, 200])
def test_the_share_of_long_completions_is_the_recipes(sequence_length: int) -> None:
    stream = open_task("digit-sum", long_fraction=0.2, sequence_length=sequence_length)
    labels = stream.samples(0, 40_000 // sequence_length).labels_BT
    tokens = stream.samples(0, 40_000 // sequence_length).tokens_BT
    # The mark of each completion is the first label after the question, so it is seen for long and short alike.
    marks = labels[:, 10:][(tokens[:, :-10] == TOKENS["+"])]
    long = int((marks == THOUGHT_MARK).sum())
    assert set(marks.tolist()) <= {THOUGHT_MARK, TOKENS["="]}
    deviation = (0.2 * 0.8 * len(marks)) ** 0.5
    assert abs(long - 0.2 * len(marks)) < 4 * deviation  # a fixed seed: four standard deviations, once in 16,000


def test_the_row_is_full_and_starts_with_a_question() -> None:
    tokens_BT = open_task("digit-sum").samples(0, 100).tokens_BT
    assert bool((tokens_BT[:, 0] == TOKENS["+"]).all())
    assert not bool((tokens_BT == TOKENS["<pad>"]).any())


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_reaches_every_place_once(length: int, key: int) -> None:
    places = Permutation(length, key)(np.arange(length))
    assert sorted(places.tolist()) == list(range(length))


def test_a_permutation_of_something_huge_needs_no_table() -> None:
    length = 10**15
    places = Permutation(length, 5)(np.arange(1000) + length - 1000)
    assert len(set(places.tolist())) == 1000
    assert bool((places < length).all())


def test_counter_randomness_is_uniform_and_neighbours_are_independent() -> None:
    draws = below(random_words(derive_key("test", 1), np.arange(100_000)), 10)
    pairs = np.bincount(draws[:-1] * 10 + draws[1:], minlength=100)
    expected = len(draws[1:]) / 100
    chi_squared = float(((pairs - expected) ** 2 / expected).sum())
    assert 50 < chi_squared < 165  # 99 degrees of freedom: mean 99, deviation 14; both tails beyond four deviations


def test_a_row_too_short_for_one_completion_is_refused() -> None:
    with pytest.raises(DataError, match="needs 24 tokens a sample"):
        open_task("digit-sum", sequence_length=23)


def test_a_task_refuses_a_tokenizer_that_cannot_write_it() -> None:
    with pytest.raises(DataError, match="digits tokenizer"):
        data = DataSection(task="digit-sum")
        open_stream(data, seed=0, directory=Path("unused"), split="train", tokenizer=load_tokenizer("bytes"))


def test_a_completion_reads_as_documented() -> None:
    tokens = open_task("digit-sum").samples(0, 1).tokens_BT[0].tolist()
    end = tokens.index(END_TOKEN)
    question, completion = tokens[1:11], tokens[11:end]
    digits = [token - TOKENS["0"] for token in question]
    sums = [str(sum(digits[: place + 1]) % 10) for place in range(10)]
    texts = [f"={sums[-1]}", ":" + "".join(sums) + f"={sums[-1]}"]
    assert completion in [tokens_of(text) for text in texts]
