"""One reading of a run: fold, decision, summary and page say the same of every history, sound or odd."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from histories import (
    CANDIDATE,
    CHIPS,
    alarm,
    any_history,
    called_in,
    check,
    fault,
    finished,
    next_decision,
    opened,
    play,
    played,
    recipe,
    resumed,
    started,
    step,
    trained,
    trusted,
    unqualified,
    written,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from beringia.history.fold import Fold
from beringia.history.log import EventLog, read_events
from beringia.records.events import (
    LEARNER,
    AnyEvent,
    CheckpointRejected,
    CheckpointTrusted,
    CheckpointWritten,
    Decision,
    Evaluated,
    RunFinished,
    RunStarted,
    StepDone,
)
from beringia.records.run_directory import RunDirectory
from beringia.report.history import History, read_history
from beringia.report.page import render_report
from beringia.report.summary import summarise

DATA = Path(__file__).parent / "data"
ODD = [
    started(), opened("first"), resumed(0), trained(8), step(3), written(3), written(5), trusted(5), step(9), alarm(9),
    finished("stopped"), started(), "decide", trained(6), fault("persistent"), "decide", unqualified(),
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


def page_of(history: list[AnyEvent], directory: Path) -> History:
    (directory / "events.jsonl").write_text("".join(event.model_dump_json() + "\n" for event in history))
    return read_history(directory)


def of_learner(history: list[AnyEvent]) -> list[AnyEvent]:
    return [event for event in history if event.role == LEARNER or isinstance(event, RunStarted | RunFinished)]


def goes_back(event: AnyEvent) -> bool:
    return isinstance(event, Decision) and event.action != "stop"


def kept_by_definition(history: list[AnyEvent]) -> list[tuple[str | None, int]]:
    """The steps that count, each with its chip's label: none of them done again, or gone back behind, later."""
    kept = []
    for place, event in enumerate(history):
        later = history[place + 1 :]
        if (
            isinstance(event, StepDone)
            and not any(isinstance(one, StepDone) and one.step <= event.step for one in later)
            and not any(goes_back(one) and (one.to_step or 0) < event.step for one in later)  # type: ignore[union-attr]
        ):
            kept.append((event.chip, event.step))
    return kept


def checkpoints_by_definition(history: list[AnyEvent]) -> dict[int, bool]:
    """Complete checkpoints, and whether each is trusted, remembering nothing but what lies on the disk of a run that
    does not tidy up."""
    found: dict[int, bool] = {}
    at = 0
    for event in history:
        if isinstance(event, CheckpointWritten):
            found[event.step] = False
        elif isinstance(event, CheckpointTrusted) and event.step in found:
            found[event.step] = True
        elif isinstance(event, CheckpointRejected):
            found.pop(event.step, None)
        elif isinstance(event, StepDone):
            again, at = event.step <= at, event.step
            found = {one: mark for one, mark in found.items() if not again or one < event.step}
        elif isinstance(event, Decision) and goes_back(event):
            at = event.to_step or 0
            found = {one: mark for one, mark in found.items() if one <= at}
    return found


@example(played(ODD))
@given(any_history())
def test_the_steps_and_checkpoints_that_count_are_those_that_were_not_abandoned(history: list[AnyEvent]) -> None:
    situation = Fold(history).situation()
    mine = of_learner(history)
    steps = [step for _, step in kept_by_definition(mine)]
    assert [step for stretch in situation.stretches for step in range(stretch.first, stretch.last + 1)] == steps
    checkpoints = checkpoints_by_definition(mine)
    assert situation.complete.keys() == checkpoints.keys()
    assert situation.trusted == {step for step, is_trusted in checkpoints.items() if is_trusted}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@example(played(ODD))
@given(any_history())
def test_fold_summary_page_and_decision_agree_on_every_history(directory: Path, history: list[AnyEvent]) -> None:
    probe = Evaluated(step=1, loss=1.0, sequences=1, seconds=0.0, time=2000.0)
    fold = Fold([*history, probe])
    situation, page = fold.situation(), page_of([*history, probe], directory)
    summary, decision = summarise(page), next_decision(history, recipe())

    assert summary.status == page.status == fold.status
    assert (decision is None) == (summary.status in ("done", "given-up"))
    assert summary.steps == page.step == situation.step
    kept = [one for one in page.steps if one.kept]
    assert [one.event.step for one in kept] == [step for _, step in kept_by_definition(of_learner(history))]
    assert {chip.label: chip.kept_steps for chip in summary.chips} == {
        chip.label: situation.steps_on(chip.label) for chip in page.chips
    }
    complete = {one.event.step: one for one in page.checkpoints if one.kept}
    assert len(complete) == sum(one.kept for one in page.checkpoints)
    assert {step: one.event.state_hash for step, one in complete.items()} == situation.complete
    assert {step for step, one in complete.items() if one.state == "trusted"} == situation.trusted
    told = [event for event in of_learner(history) if isinstance(event, Decision)]
    assert summary.lost_steps == page.lost_steps == situation.lost_steps == sum(one.lost_steps for one in told)
    assert page.evaluations[-1].chip == situation.chip
    if decision is None:
        return
    assert decision.to_step is None or decision.to_step in complete
    if decision.action == "rollback":
        assert decision.to_step == situation.newest_trusted
    if decision.action != "stop":
        assert decision.lost_steps == situation.steps_after(decision.to_step)
    if decision.action in ("retry", "rollback", "exclude"):
        assert decision.to_chip == situation.chip


@settings(deadline=None)
@given(any_history(odd=False))
@pytest.mark.slow
def test_the_page_prints_what_the_fold_says(directory: Path, history: list[AnyEvent]) -> None:
    situation = Fold(history).situation()
    text = " ".join(re.sub(r"<[^>]*>", " ", render_report(page_of(history, directory))).split())
    assert f"Steps {situation.step:,} of" in text
    assert f"Work thrown away {situation.lost_steps:,} steps" in text


@settings(deadline=None)
@example(played(ODD))
@given(any_history())
def test_folding_event_by_event_is_folding_anew_at_every_moment(history: list[AnyEvent]) -> None:
    growing = Fold()
    for count, event in enumerate(history, start=1):
        growing.add(event)
        anew = Fold(history[:count])
        assert (growing.length, growing.status, growing.message) == (count, anew.status, anew.message)
        assert growing.roles == anew.roles
        for role in growing.roles:
            assert growing.situation(role) == anew.situation(role)


@settings(deadline=None)
@given(any_history())
@example([opened(), fault("device-lost")])
def test_deciding_changes_nothing(history: list[AnyEvent]) -> None:
    fold = Fold(history)
    first = next_decision(history, recipe())
    assert next_decision(history, recipe()) == first
    assert fold.situation() == Fold(history).situation()


@settings(deadline=None)
@given(any_history())
def test_no_role_sees_another_ones_events(directory: Path, history: list[AnyEvent]) -> None:
    assert Fold(history).situation() == Fold(of_learner(history)).situation()
    others = [event for event in history if event.role == CANDIDATE or isinstance(event, RunStarted | RunFinished)]
    assert Fold(history).situation(CANDIDATE) == Fold(others).situation(CANDIDATE)
    page = page_of(history, directory)
    assert {at.event.role for at in (*page.decisions, *page.alarms, *page.faults, *page.checks)} <= {LEARNER}
    assert {one.event.role for one in (*page.steps, *page.checkpoints)} <= {LEARNER}


def test_each_role_has_its_own_chip_and_its_own_trouble() -> None:
    others = [
        event.model_copy(update={"role": CANDIDATE})
        for event in (opened("second"), resumed(0), step(7), fault("persistent"))
    ]
    fold = Fold([*play(opened("first"), step(1)), *others, step(2)])
    learner, candidate = fold.situation(), fold.situation(CANDIDATE)
    assert (fold.roles, fold.situation("rollout:0").chip) == ((LEARNER, CANDIDATE), None)
    assert (learner.chip, learner.step, learner.trouble) == ("first", 2, None)
    assert (candidate.chip, candidate.step) == ("second", 7) and candidate.trouble is not None


def test_the_run_ends_and_is_taken_up_again_for_all_roles() -> None:
    roles = (LEARNER, CANDIDATE, "rollout:0", "rollout:1")
    late = step(1).model_copy(update={"role": "rollout:0"})
    fold = Fold([*play(step(1)), step(1).model_copy(update={"role": CANDIDATE}), finished("done"), late])
    assert all(fold.situation(role).finished for role in roles)
    fold.add(started())
    assert not any(fold.situation(role).finished for role in roles)


def test_a_mark_of_trust_is_for_the_state_that_was_written_not_for_another_one_at_its_step() -> None:
    other = trusted(5).model_copy(update={"state_hash": "of an abandoned future"})
    assert Fold([*play(step(5), written(5)), other]).situation().trusted == set()
    assert Fold(play(step(5), written(5), trusted(5))).situation().trusted == {5}


def test_the_steps_that_are_remembered_do_not_grow_with_the_run() -> None:
    fold = Fold(play())
    for number in range(1, 3001):
        fold.add(step(number))
        fold.add(check(number))
    situation = fold.situation()
    assert (len(situation.stretches), len(situation.recent), situation.step) == (1, 768, 3000)


def test_a_further_event_takes_as_many_calls_however_long_the_history() -> None:
    def calls(history_length: int) -> int:
        fold = Fold(play(*[step(number) for number in range(1, history_length)]))
        return len(called_in(lambda: fold.add(step(history_length))))

    assert calls(10) == calls(5000)


def test_work_that_no_decision_began_is_on_the_chip_that_opened() -> None:
    assert Fold([started(), opened("second"), step(1)]).situation().chip == "second"
    assert Fold([started()]).situation().chip is None


def test_a_record_of_schema_2_is_read_as_the_learners_and_goes_on(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    shutil.copy(DATA / "events-schema-2.jsonl", run.events)
    events = list(read_events(run.events))
    assert {event.schema_version for event in events} == {2} and {event.role for event in events} == {LEARNER}
    fold = Fold(events)
    assert (fold.situation().chip, fold.situation().step, fold.situation().trusted) == ("second", 7, {5})
    decision = next_decision(events, recipe())
    assert decision is not None and (decision.action, decision.to_step) == ("rollback", 5)
    log = EventLog(run)
    log.append(decision, epoch=2)
    log.close()
    page = read_history(tmp_path)
    assert (page.step, page.decisions[-1].event.schema_version, page.decisions[-1].event.sequence) == (5, 3, 23)


@settings(deadline=None)
@given(any_history(odd=False), st.sampled_from(CHIPS))
def test_a_candidate_that_fails_does_not_change_what_is_decided_about_the_learner(
    history: list[AnyEvent], chip: str
) -> None:
    failure = fault("persistent").model_copy(update={"role": CANDIDATE, "chip": chip})
    assert next_decision([*history, failure], recipe()) == next_decision(history, recipe())
