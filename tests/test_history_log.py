"""The log of a run: numbered without gaps, whatever ended the writer before; followed while it grows."""

from __future__ import annotations

from pathlib import Path

import pytest

from beringia.history.log import EventLog
from beringia.records.events import StepDone
from beringia.records.jsonl import read_lines
from beringia.records.run_directory import RunDirectory


def step(number: int) -> StepDone:
    return StepDone(step=number, loss=1.0, gradient_norm=1.0, learning_rate=1e-3, tokens=1, seconds=0.1, cursor=number)


def write_steps(run: RunDirectory, first: int, last: int) -> EventLog:
    log = EventLog(run)
    for number in range(first, last + 1):
        log.append(step(number), epoch=1)
    log.close()
    return log


def written(run: RunDirectory) -> list[tuple[int, int]]:
    return [(line["sequence"], line["step"]) for _, line in read_lines(run.events)]


def test_every_event_is_in_the_file_numbered_across_restarts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_steps(run, 1, 30)
    log = write_steps(run, 31, 50)
    assert written(run) == [(number - 1, number) for number in range(1, 51)]
    assert (log.fold.length, log.situation().step) == (50, 50)


@pytest.mark.parametrize("lost", range(1, 8))
def test_a_line_torn_by_a_kill_is_cut_off_and_its_number_given_again(tmp_path: Path, lost: int) -> None:
    run = RunDirectory(tmp_path)
    write_steps(run, 1, 3)
    run.events.write_bytes(run.events.read_bytes()[:-lost])
    write_steps(run, 3, 4)
    assert written(run) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_an_only_line_that_is_torn_leaves_an_empty_log(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_steps(run, 1, 1)
    run.events.write_bytes(run.events.read_bytes()[:10])
    write_steps(run, 1, 1)
    assert written(run) == [(0, 1)]


def test_the_steps_that_led_to_a_checkpoint_are_those_of_its_own_line(tmp_path: Path) -> None:
    """Steps 1 to 6, back to 3, then 4 to 8 again with other losses: what led to 7 is 1 to 3 and the second 4 to 7."""
    run = RunDirectory(tmp_path)
    log = EventLog(run)
    for number in (1, 2, 3, 4, 5, 6):
        log.append(step(number), epoch=1)
    for number in (4, 5, 6, 7, 8):
        log.append(step(number).model_copy(update={"loss": 2.0}), epoch=2)
    log.close()
    again = EventLog(run)
    again.close()
    for one in (log, again):
        found = [(done.step, done.loss) for done in one.situation().steps_before(7)]
        assert found == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]
        assert one.situation().steps_before(0) == []
