"""The log of a run: numbered without gaps, whatever ended the writer before; followed while it grows."""

from __future__ import annotations

from pathlib import Path

import pytest
from histories import alarm, called_in, started, step

from beringia.errors import RunError
from beringia.history.log import EventLog, Tail, read_events
from beringia.records.jsonl import read_lines
from beringia.records.run_directory import RunDirectory


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


def validations(names: list[str]) -> int:
    return sum(name.startswith("compiled validate_") for name in names)


def test_each_event_is_parsed_once_when_it_is_read_and_not_at_all_when_it_is_appended(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_steps(run, 1, 20)
    assert validations(called_in(lambda: list(read_events(run.events)))) == 20
    assert validations(called_in(lambda: EventLog(run).close())) == 20
    log, told = EventLog(run), step(21)
    assert validations(called_in(lambda: log.append(told, epoch=1))) == 0
    log.close()


def test_what_append_returns_is_what_a_reader_reads(tmp_path: Path) -> None:
    run, heard = RunDirectory(tmp_path), []
    log = EventLog(run, heard.append)
    appended = [
        log.append(started(), epoch=1),
        log.append(alarm(5), epoch=2, chip="first"),
        log.append(alarm(6).model_copy(update={"chip": "second"}), epoch=3, chip="first", role="candidate:second"),
    ]
    log.close()
    assert list(read_events(run.events)) == appended == heard
    assert [(event.sequence, event.epoch, event.chip, event.role) for event in appended] == [
        (0, 1, None, "learner"),
        (1, 2, "first", "learner"),
        (2, 3, "second", "candidate:second"),
    ]
    assert (log.situation().alarm, log.situation("candidate:second").alarm) == (appended[1], appended[2])


def test_a_number_that_json_does_not_have_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    log = EventLog(run)
    with pytest.raises(ValueError, match="JSON"):
        log.append(step(1).model_copy(update={"loss": float("nan")}), epoch=1)
    log.close()
    assert (run.events.read_bytes(), log.fold.length) == (b"", 0)


def test_a_follower_gets_each_event_once_and_leaves_a_torn_line_for_later(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    tail = Tail(run.events)
    assert list(tail.new()) == [], "there is no file yet"
    write_steps(run, 1, 3)
    whole = run.events.read_bytes()
    run.events.write_bytes(whole[:-5])
    assert [event.sequence for event in tail.new()] == [0, 1]
    assert list(tail.new()) == []
    run.events.write_bytes(whole)
    assert [event.sequence for event in Tail(run.events, tail.offset).new()] == [2], "another reader goes on from here"
    assert [event.sequence for event in tail.new()] == [2]
    assert tail.offset == len(whole)


def test_a_line_that_is_no_event_is_named_to_whoever_reads_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_steps(run, 1, 3)
    tail = Tail(run.events)
    assert len(list(tail.new())) == 3
    with open(run.events, "ab") as file:
        file.write(b'{"kind": "teleport"}\n{"kind": nonsense}\n')
    for read in (lambda: list(tail.new()), lambda: list(read_events(run.events)), lambda: EventLog(run)):
        with pytest.raises(RunError, match="line 4, is not an event that this version knows"):
            read()
    whole = run.events.read_bytes()
    run.events.write_bytes(whole.replace(b'{"kind": "teleport"}\n', b""))
    with pytest.raises(RunError, match="line 4, is not JSON"):
        list(tail.new())
