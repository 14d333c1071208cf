"""The supervisor's log of a run: numbered without gaps, whatever ended the writer before."""

from __future__ import annotations

from pathlib import Path

import pytest

from beringia.records.events import StepDone
from beringia.records.jsonl import read_lines
from beringia.records.run_directory import RunDirectory
from beringia.supervise.event_log import EventLog


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


def test_every_event_is_in_the_file_numbered_across_restarts_while_memory_holds_the_last_step(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_steps(run, 1, 30)
    log = write_steps(run, 31, 50)
    assert written(run) == [(number - 1, number) for number in range(1, 51)]
    assert [event.step for event in log.history if isinstance(event, StepDone)] == [50]


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
