"""Samples survive the way through a file, and what is damaged is refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beringia.errors import RunError
from beringia.rl.samples import NO_LOSS, Sample, Source, read_samples, rows_of, scored, write_samples

SOURCES = [
    Source(
        worker=f"rollout:{number}",
        chip="first",
        identity_hash="ab" * 32,
        version=number,
        weights_hash="cd" * 8,
        dtype="bfloat16",
        temperature=1.0,
    )
    for number in range(3)
]
tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
float32 = st.floats(-30.0, 0.0, width=32)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    new = draw(tokens)
    return Sample(
        prompt=draw(st.integers(0, 2**62)),
        number=draw(st.integers(0, 2**31 - 1)),
        prompt_tokens=tuple(draw(tokens)),
        tokens=tuple(new),
        logprobs=tuple(draw(st.lists(float32, min_size=len(new), max_size=len(new)))),
        finish=draw(st.sampled_from(["stop", "length"])),
        source=draw(st.sampled_from(SOURCES)),
        reward=draw(st.none() | st.floats(-1e9, 1e9)),
    )


SAME_DIRECTORY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@SAME_DIRECTORY
@given(given=st.lists(samples(), max_size=8))
def test_what_is_read_is_what_was_written(given: list[Sample], tmp_path: Path) -> None:
    path = tmp_path / "samples.safetensors"
    sha256 = write_samples(path, given)
    assert read_samples(path, sha256) == given
    assert write_samples(path, given) == sha256


ONE = Sample(7, 0, (1, 2, 3), (4, 5), (-0.5, -1.5), "stop", SOURCES[0], 1.0)
OTHER = Sample(7, 1, (1, 2, 3), (6,), (-0.25,), "length", SOURCES[1])


@SAME_DIRECTORY
@given(place=st.floats(0.0, 1.0, exclude_max=True), change=st.integers(1, 255))
def test_any_other_byte_is_seen_by_the_hash_and_never_ends_in_an_error_of_ours(
    place: float, change: int, tmp_path: Path
) -> None:
    path = tmp_path / "samples.safetensors"
    sha256 = write_samples(path, [ONE, OTHER])
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= change
    path.write_bytes(content)
    with pytest.raises(RunError, match="their hash is another"):
        read_samples(path, sha256)
    try:
        read_samples(path)
    except RunError as refused:
        assert "damaged" in str(refused)


@pytest.mark.parametrize("size", [0, 7, 100])
def test_a_file_that_was_cut_off_is_damaged(size: int, tmp_path: Path) -> None:
    path = tmp_path / "samples.safetensors"
    write_samples(path, [ONE, OTHER])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RunError, match="are damaged"):
        read_samples(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="absent.*No such file"):
        read_samples(tmp_path / "absent")


def test_rows_have_the_next_new_token_as_label_and_nothing_else() -> None:
    rows = rows_of([ONE, OTHER], pad=9)
    assert rows.tokens_NT.tolist() == [[1, 2, 3, 4], [1, 2, 3, 9]]
    assert rows.labels_NT.tolist() == [[NO_LOSS, NO_LOSS, 4, 5], [NO_LOSS, NO_LOSS, 6, NO_LOSS]]
    assert rows.logprobs_NT.tolist() == [[0.0, 0.0, -0.5, -1.5], [0.0, 0.0, -0.25, 0.0]]


@given(given=st.lists(samples(), min_size=1, max_size=8))
def test_every_new_token_is_one_label_with_its_log_probability(given: list[Sample]) -> None:
    rows = rows_of(given, pad=0)
    for row, sample in enumerate(given):
        learned = rows.labels_NT[row] != NO_LOSS
        assert tuple(rows.labels_NT[row][learned]) == sample.tokens
        assert np.allclose(rows.logprobs_NT[row][learned], sample.logprobs)
        assert not rows.logprobs_NT[row][~learned].any()


def test_samples_are_scored_one_by_one_and_none_is_left_over() -> None:
    assert [one.reward for one in scored([ONE, OTHER], [0.0, None])] == [0.0, None]
    with pytest.raises(ValueError, match="shorter|longer"):
        scored([ONE, OTHER], [1.0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"logprobs": (-0.5,)},
        {"logprobs": (-0.5, float("nan"))},
        {"logprobs": (0.5, -1.0)},
        {"logprobs": (-1e39, -1.0)},
        {"tokens": (), "logprobs": ()},
        {"prompt_tokens": ()},
        {"finish": "abort"},
    ],
)
def test_rubbish_is_no_sample(wrong: dict[str, object]) -> None:
    fields = {name: getattr(ONE, name) for name in ONE.__dataclass_fields__}
    with pytest.raises(ValueError):
        Sample(**(fields | wrong))
