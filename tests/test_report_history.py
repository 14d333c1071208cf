"""The history of a run, computed from its directory alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_story import PROCESSOR, Story, state_hash, write_story

from beringia.errors import RunError
from beringia.records import events
from beringia.report.answer import answer
from beringia.report.history import read_history


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_story(tmp_path_factory.mktemp("runs") / "r2-nano")


def test_every_step_counts_once_however_often_it_was_done(story: Path) -> None:
    history = read_history(story)
    kept = [step.event.step for step in history.steps if step.kept]
    assert kept == list(range(1, 601))
    assert len(history.steps) == 600 + 36 + 63 + 38
    assert history.lost_steps == 36 + 63 + 38
    assert history.step == 600


def test_steps_thrown_away_are_those_behind_the_checkpoint_that_was_gone_back_to(story: Path) -> None:
    thrown = [step.event.step for step in read_history(story).steps if not step.kept]
    assert thrown == [*range(51, 87), *range(101, 164), *range(201, 239)]


def test_work_is_attributed_to_the_chip_that_did_it(story: Path) -> None:
    history = read_history(story)
    assert [chip.label for chip in history.chips] == ["preferred", "fallback"]
    assert [chip.identity.truth for chip in history.chips] == ["emulated", "real"]
    assert {step.chip for step in history.steps if step.event.step <= 200} == {"preferred"}
    assert {step.chip for step in history.steps if step.event.step > 238} == {"fallback"}
    assert [segment.chip for segment in history.segments] == ["preferred", "preferred", "preferred", "fallback"]


def test_segments_do_not_overlap_and_cover_every_step(story: Path) -> None:
    history = read_history(story)
    for earlier, later in zip(history.segments, history.segments[1:], strict=False):
        assert earlier.began <= earlier.ended <= later.began
    for step in history.steps:
        assert any(part.began <= step.seconds <= part.ended and part.chip == step.chip for part in history.segments)


def test_a_checkpoint_written_again_is_another_checkpoint_with_its_own_trust(story: Path) -> None:
    at_150 = [one.state for one in read_history(story).checkpoints if one.event.step == 150]
    assert at_150 == ["pending", "trusted"]


def test_a_checkpoint_that_was_deleted_is_not_on_disk(story: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(story, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "step-000250")
    states = {one.event.step: one.on_disk for one in read_history(copy).checkpoints}
    assert states[250] is False
    assert states[300] is True


def test_the_canary_loading_an_older_checkpoint_throws_no_step_away(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    story.open_preferred()
    story.train(1, 100)
    story.decide("cross", "lost", to_chip="fallback", to_step=100)
    story.open("fallback")
    story.resume(50)
    story.cross(100, canary_from=50)
    history = read_history(story.end())
    assert all(step.kept for step in history.steps)


def test_a_decision_takes_effect_before_its_first_new_step(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    story.open_preferred()
    story.train(1, 70)
    story.decide("retry", "507014", to_step=50, lost_steps=20)
    assert read_history(story.end()).step == 50


def test_going_back_without_a_checkpoint_goes_back_to_the_start(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    story.open_preferred()
    story.train(1, 20)
    story.decide("cross", "persistent", to_chip="fallback", to_step=None, lost_steps=20)
    assert read_history(story.end()).step == 0


def test_a_torn_last_line_is_left_for_later(story: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(story, tmp_path / "copy")
    content = (copy / "events.jsonl").read_bytes()
    (copy / "events.jsonl").write_bytes(content[:-9])
    history = read_history(copy)
    assert history.status == "unfinished"
    assert history.step == 600


@given(cut=st.integers(min_value=0, max_value=290_000))
def test_every_prefix_of_a_record_can_be_read(cut: int, story: Path) -> None:
    """A run may be looked at, or killed, at any moment."""
    target = story.parent / "prefix"
    target.mkdir(exist_ok=True)
    (target / "events.jsonl").write_bytes((story / "events.jsonl").read_bytes()[:cut])
    history = read_history(target)
    assert answer(history)
    assert history.status in ("unfinished", "empty")
    kept = [step.event.step for step in history.steps if step.kept]
    assert kept == list(range(1, len(kept) + 1))


def test_the_time_in_which_nothing_ran_is_cut_out(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    story.open("fallback")
    story.train(1, 60)
    before = story.time
    story.time += 8 * 3600
    story.begin()
    story.decide("retry", "the supervisor was restarted", to_step=50, lost_steps=10)
    story.open("fallback")
    story.train(51, 70)
    history = read_history(story.end())
    assert [pause.length_seconds for pause in history.pauses] == [pytest.approx(8 * 3600)]
    assert history.seconds == pytest.approx(story.time - 8 * 3600 - 1_764_000_000)
    assert history.pauses[0].seconds == pytest.approx(before - 1_764_000_000)


def test_a_clock_set_back_does_not_turn_the_axis_round(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    story.open("fallback")
    story.train(1, 10)
    story.time -= 3600
    story.train(11, 20)
    seconds = [step.seconds for step in read_history(story.end()).steps]
    assert seconds == sorted(seconds)


def test_a_run_taken_up_again_after_its_end_is_not_finished(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    story.finish("stopped", "asked to stop")
    story.begin()
    assert read_history(story.end()).status == "unfinished"


def test_a_replaced_device_shows_as_a_second_identity_of_the_same_chip(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    story.open("fallback")
    story.open("fallback", PROCESSOR.model_copy(update={"driver": "550.1"}))
    story.open("fallback")
    (chip,) = read_history(story.end()).chips
    assert [identity.driver for identity in chip.identities] == ["none", "550.1"]


def test_a_decision_to_cross_belongs_to_the_chip_that_is_left(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    story.open_preferred()
    story.tell(events.Decision(chip="fallback", action="cross", reason="x", to_chip="fallback", to_step=None))
    assert read_history(story.end()).decisions[0].chip == "preferred"


def test_a_directory_that_is_no_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        read_history(tmp_path)


def test_a_damaged_line_is_named(story: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(story, tmp_path / "copy")
    lines = (copy / "events.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "events.jsonl").write_bytes(b"".join([*lines[:6], b'{"kind": nonsense}\n', *lines[6:]]))
    with pytest.raises(RunError, match="line 7, is not JSON"):
        read_history(copy)


def test_an_event_of_a_later_version_is_named(story: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(story, tmp_path / "copy")
    with open(copy / "events.jsonl", "ab") as file:
        file.write(b'{"kind": "teleport"}\n')
    with pytest.raises(RunError, match="is not an event that this version knows"):
        read_history(copy)


def test_the_answer_says_what_happened_and_which_chip_was_emulated(story: Path) -> None:
    assert answer(read_history(story)) == (
        "r2-nano is done, all 600 steps: it crossed from Ascend 910B (emulated) to Intel Xeon Platinum 8481C (real) "
        "at step 200 with exactly the same state; 137 steps of work were done again, no state was lost."
    )


def test_the_answer_shouts_when_the_state_was_not_the_same(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    story.open_preferred()
    story.train(1, 100)
    story.decide("cross", "lost", to_chip="fallback", to_step=100)
    story.open("fallback")
    story.cross(100, canary_from=50, after_hash=state_hash(99))
    assert "A DIFFERENT STATE" in answer(read_history(story.end()))


def test_the_answer_for_a_run_given_up_says_where(tmp_path: Path) -> None:
    story = Story(tmp_path / "run", steps=80)
    story.begin()
    story.open_preferred()
    story.train(1, 70)
    story.finish("given-up", "no chip is left")
    assert answer(read_history(story.end())).startswith(
        "r2-nano was given up at step 70 of 80, on Ascend 910B (emulated);"
    )
