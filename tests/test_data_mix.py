"""Several data sets in one stream: the shares of each, their order, and a run that goes on exactly."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from small_runs import beringia, final_hash, of_kind, small_recipe, start, worker_of
from waiting import until

from beringia.checkpoint.directory import CheckpointDirectory
from beringia.data import Stream, load_tokenizer, open_stream
from beringia.data.mixture import interleave
from beringia.data.rows import PackedRows
from beringia.data.stream import MixedRows
from beringia.errors import DataError, RecipeError
from beringia.records.recipe import DataSection, MixSection, Recipe, parse_recipe
from beringia.records.shares import LONGEST_PERIOD, rows_in_a_period

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=7)
BYTES = load_tokenizer("bytes")


@given(weights=WEIGHTS)
@example(weights=[19, 39, 35, 37, 1, 3])  # here the source that lacks most, taken first, leaves another 1.02 rows short
def test_after_every_row_each_source_is_within_one_row_of_its_share(weights: list[int]) -> None:
    rows = rows_in_a_period(weights)
    order, count = interleave(rows), 2 * sum(rows)
    sources, _ = order.locate(np.arange(count))
    for number, weight in enumerate(weights):
        taken = np.cumsum(sources == number)
        # In whole numbers: |taken - n * weight / total| < 1.
        assert (np.abs(taken * sum(weights) - np.arange(1, count + 1) * weight) < sum(weights)).all()


@given(weights=WEIGHTS, start=st.integers(0, 10**12), count=st.integers(1, 300))
def test_each_source_gives_its_rows_in_order_none_twice_and_its_cursor_follows(
    weights: list[int], start: int, count: int
) -> None:
    order = interleave(rows_in_a_period(weights))
    before, after = order.cursors(start), order.cursors(start + count)
    assert sum(before) == start and sum(after) == start + count
    sources, numbers = order.locate(np.arange(start, start + count))
    for source, (first, last) in enumerate(zip(before, after, strict=True)):
        assert numbers[sources == source].tolist() == list(range(first, last))


@given(weights=st.lists(st.fractions(Fraction(1, 30), 5, max_denominator=30), min_size=1, max_size=3))
def test_weights_mean_the_fractions_that_somebody_means_by_them(weights: list[Fraction]) -> None:
    exact = [weight / sum(weights) for weight in weights]
    assume(math.lcm(*(share.denominator for share in exact)) <= LONGEST_PERIOD)  # longer ones are refused
    rows = rows_in_a_period([float(weight) for weight in weights])
    assert [Fraction(one, sum(rows)) for one in rows] == exact


@pytest.mark.parametrize(
    ("weights", "rows"), [((0.7, 0.3), (7, 3)), ((1 / 3, 2 / 3), (1, 2)), ((2.0, 2.0, 1.0), (2, 2, 1)), ((0.1,), (1,))]
)
def test_known_weights(weights: tuple[float, ...], rows: tuple[int, ...]) -> None:
    assert rows_in_a_period(weights) == rows


def test_weights_whose_shares_take_too_long_to_come_true_are_refused_in_the_recipe() -> None:
    mix = [{"task": "digit-sum", "weight": 1.0}, {"task": "digit-sort", "weight": LONGEST_PERIOD + 0.5}]
    with pytest.raises(RecipeError, match="write them with fewer digits"):
        parse_recipe(small_recipe() | {"data": {"mix": mix}}, "test")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"mix": []}, "exactly one of task, text, chat and mix"),
        ({"mix": [{"task": "digit-sum"}], "task": "digit-sum"}, "exactly one of task, text, chat and mix"),
        ({"mix": [{"weight": 1.0}]}, "data.mix.0.*exactly one of task, text and chat"),
        ({"mix": [{"task": "a", "chat": "b"}]}, "data.mix.0.*exactly one of task, text and chat"),
        ({"mix": [{"task": "a", "weight": 0.0}]}, "data.mix.0.weight.*greater than 0"),
        ({"mix": [{"task": "a", "wieght": 1.0}]}, "data.mix.0.wieght.*Did you mean 'weight'"),
    ],
)
def test_what_is_no_mix_is_one_sentence(data: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        parse_recipe(small_recipe() | {"data": data}, "test")


def write_sources(root: Path) -> None:
    """Two folders of text and a file of chats; every text says which folder it is from."""
    for name, count in (("left", 40), ("right", 9)):
        (root / name).mkdir()
        for number in range(count):
            (root / name / f"{number:02d}.txt").write_text(f"{name} {number} " * (number % 5 + 6))
    turns = [({"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}) for n in range(30)]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))


def mixed(root: Path, *sources: dict[str, Any], length: int = 48) -> DataSection:
    mix = tuple(MixSection(**{k: str(root / v) if k in ("text", "chat") else v for k, v in s.items()}) for s in sources)
    return DataSection(mix=mix, tokenizer="bytes", sequence_length=length)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mix")
    write_sources(directory)
    return directory


SOURCES = (
    {"text": "left", "weight": 0.5},
    {"chat": "chats.jsonl", "weight": 0.3},
    {"task": "digit-sum", "weight": 0.2},
)


@pytest.fixture(scope="module")
def stream(root: Path) -> Iterator[Stream]:
    yield open_mix(root, mixed(root, *SOURCES))


def open_mix(root: Path, data: DataSection, seed: int = 3, split: Any = "train", packed: str = "packed") -> Stream:
    return open_stream(data, seed=seed, directory=root / packed, split=split, tokenizer=BYTES)


@settings(max_examples=25)
@given(start=st.integers(0, 10_000), parts=st.lists(st.integers(1, 17), min_size=1, max_size=4))
def test_any_split_of_a_slice_gives_the_same_samples(stream: Stream, start: int, parts: list[int]) -> None:
    """So ranks and accumulation steps read what one rank would have read, wherever they begin."""
    edges = np.cumsum([start, *parts]).tolist()
    pieces = [stream.samples(first, last - first) for first, last in zip(edges, edges[1:], strict=False)]
    whole = stream.samples(start, sum(parts))
    assert np.concatenate([piece.tokens_BT.numpy() for piece in pieces]).tolist() == whole.tokens_BT.tolist()
    assert np.concatenate([piece.labels_BT.numpy() for piece in pieces]).tolist() == whole.labels_BT.tolist()


def test_rows_are_those_of_the_sources_one_after_the_other(stream: Stream) -> None:
    assert isinstance(stream.source, MixedRows)
    batch, parts = stream.samples(0, 60), stream.source.sources
    sources, numbers = stream.source.order.locate(np.arange(60))
    for row, (source, number) in enumerate(zip(sources.tolist(), numbers.tolist(), strict=True)):
        tokens, labels = parts[source].rows(np.array([number]))
        assert batch.tokens_BT[row].tolist() == tokens[0].tolist()
        assert batch.labels_BT[row].tolist() == labels[0].tolist()


def test_a_task_is_written_in_the_mixs_tokens_with_its_questions_unlearned(root: Path) -> None:
    batch = open_mix(root, mixed(root, {"task": "digit-sum"})).samples(0, 1)
    text = BYTES.decode(batch.tokens_BT[0].tolist())
    assert text.startswith("+") and text[1:11].isdecimal() and text[11] in "=:"
    assert (batch.labels_BT[0, :10] == -100).all() and (batch.labels_BT[0, 10:20] != -100).any()
    said = BYTES.decode([label for label in batch.labels_BT[0, 10:].tolist() if label != -100])
    assert "=" in said and BYTES.end in batch.labels_BT[0].tolist()


def test_a_task_for_which_a_tokenizer_has_no_symbols_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    from beringia.data import write_tokenizer

    write_tokenizer("bytes", tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    document["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="digit-sum is written symbol by symbol, and '0' is 2 tokens"):
        open_stream(
            mixed(root, {"task": "digit-sum"}),
            seed=0,
            directory=root / "other",
            split="train",
            tokenizer=load_tokenizer(tmp_path),
        )


def test_seed_split_weights_and_order_each_make_another_stream(root: Path) -> None:
    left, right = {"text": "left"}, {"text": "right"}
    streams = [
        open_mix(root, mixed(root, left, right)),
        open_mix(root, mixed(root, left, right), seed=4),
        open_mix(root, mixed(root, left, right), split="held-out"),
        open_mix(root, mixed(root, left, right | {"weight": 2.0})),
        open_mix(root, mixed(root, right, left), packed="turned"),
    ]
    assert len({stream.identity for stream in streams}) == len({one.fingerprint(0, 16) for one in streams}) == 5
    same = mixed(root, left | {"weight": 3.0}, right | {"weight": 3.0})
    assert open_mix(root, same).identity == streams[0].identity, "shares, not weights"


def test_one_data_set_named_twice_is_read_in_two_orders(root: Path) -> None:
    stream = open_mix(root, mixed(root, {"text": "left"}, {"text": "left"}))
    rows = stream.samples(0, 40).tokens_BT
    assert rows[::2].tolist() != rows[1::2].tolist()


def test_notes_name_the_data_set_that_they_are_about(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "right", tmp_path / "right")
    (tmp_path / "right" / "picture.png").write_bytes(b"\0\1")
    stream = open_mix(tmp_path, mixed(tmp_path, {"task": "digit-sum"}, {"text": "right"}))
    (note,) = stream.notes
    assert note.startswith(f"data.mix.1 ({tmp_path / 'right'}): 1 of 10 files") and "picture.png" in note


def test_an_epoch_is_as_many_rows_as_all_hold_and_a_task_has_no_end(root: Path) -> None:
    stream = open_mix(root, mixed(root, {"text": "left", "weight": 0.1}, {"text": "right", "weight": 0.9}))
    assert isinstance(stream.source, MixedRows)
    plans = [one.plan.rows for one in stream.source.sources if isinstance(one, PackedRows)]
    assert len(plans) == 2 and stream.epoch_samples == sum(plans)
    assert open_mix(root, mixed(root, {"text": "left"}, {"task": "digit-sum"})).epoch_samples is None


def test_sources_that_are_not_here_any_more_are_not_taken_for_one_another(root: Path, tmp_path: Path) -> None:
    for name in ("left", "right"):
        shutil.copytree(root / name, tmp_path / name)
    data = mixed(tmp_path, {"text": "left"}, {"text": "right"})
    before = open_mix(tmp_path, data)
    for name in ("left", "right"):
        shutil.rmtree(tmp_path / name)
    after = open_mix(tmp_path, data)
    assert (after.identity, after.fingerprint(0, 64)) == (before.identity, before.fingerprint(0, 64))
    assert all("is not here" in note for note in after.notes)


TOML = """
name = "mixed"
seed = 3
[model]
preset = "r2-nano"
[chips.first]
use = "cpu"
[data]
sequence_length = 32
tokenizer = "bytes"
[[data.mix]]
text = "left"
weight = 0.5
[[data.mix]]
chat = "chats.jsonl"
weight = 0.3
[[data.mix]]
task = "digit-sum"
weight = 0.2
[train]
prefer = ["first"]
steps = 80
batch = 4
warmup_steps = 2
checkpoint_every = 5
evaluate_every = 1000
evaluation_sequences = 4
[guard]
share = 0.2
[qualify]
unqualified = "allow"
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of a mix, beside its recipe and data."""
    directory = tmp_path_factory.mktemp("mixed")
    write_sources(directory)
    (directory / "mixed.toml").write_text(TOML)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        done = beringia("train", "mixed.toml", "--out", "run")
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.slow
def test_a_checkpoint_says_how_far_each_data_set_is(undisturbed: Path) -> None:
    progress = CheckpointDirectory(undisturbed / "run" / "checkpoints").manifest(80).progress
    assert progress["cursor"] == 320 and progress["cursors"] == [160, 96, 64]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_of_a_mix_that_is_killed_comes_to_the_same_state(
    undisturbed: Path, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(undisturbed)
    run = undisturbed / f"run-{how.name}"
    with start("train", "mixed.toml", "--out", run.name) as process:
        until(lambda: (run / "events.jsonl").exists() and len(of_kind(run, "step")) > 12, "twelve steps")
        worker = worker_of(process.pid)
        os.kill(process.pid, how)
        if how is signal.SIGKILL and worker is not None:
            os.kill(worker, how)
    assert len(of_kind(run, "step")) < 80
    assert beringia("train", "mixed.toml", "--out", run.name).returncode == 0
    assert final_hash(run) == final_hash(undisturbed / "run")


@pytest.mark.slow
def test_two_ranks_read_the_rows_of_one_and_go_on_exactly(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(undisturbed)
    ranks = ("--set", "chips.first.ranks=2", "--set", "train.steps=12", "--set", "train.schedule_steps=12")
    assert beringia("train", "mixed.toml", "--out", "two", *ranks).returncode == 0
    with start("train", "mixed.toml", "--out", "two-killed", *ranks) as process:
        until(lambda: Path("two-killed/checkpoints/step-000005/manifest.json").exists(), "a checkpoint")
        os.kill(process.pid, signal.SIGKILL)
    assert beringia("train", "mixed.toml", "--out", "two-killed", *ranks).returncode == 0
    assert final_hash(Path("two")) == final_hash(Path("two-killed"))
    one = CheckpointDirectory(undisturbed / "run" / "checkpoints").manifest(80).progress
    two = CheckpointDirectory(Path("two/checkpoints")).manifest(10).progress
    assert two["cursors"] == [20, 12, 8] and two["data"] == one["data"]


@pytest.mark.slow
def test_a_mix_with_other_weights_is_another_run(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(undisturbed)
    (undisturbed / "other.toml").write_text(TOML.replace("0.3", "0.4"))
    refused = beringia("train", "other.toml", "--out", "run")
    assert refused.returncode == 2 and "data.mix.1.weight was 0.3 and is 0.4" in refused.stderr


def test_a_recipe_with_a_mix_reads_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mixed.toml").write_text(TOML)
    from beringia.records.recipe import read_recipe

    recipe = read_recipe(tmp_path / "mixed.toml")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert [source.words for source in recipe.data.sources] == ["left", "chats.jsonl", "digit-sum"]
