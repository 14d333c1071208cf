"""A learner and a candidate at once, on two chips: what happens to one leaves the other alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from small_runs import beringia, events, final_hash, of_kind, small_recipe, start, write_recipe
from waiting import until

from beringia.history.fold import Fold
from beringia.records.events import LEARNER, Alarm, Fault
from beringia.records.recipe import parse_recipe
from beringia.supervise.decide import decide, decide_beside

CANDIDATE = "candidate:second"


def roles_recipe(steps: int) -> dict[str, Any]:
    chips = {"first": {"use": "cpu"}, "second": {"use": "emulated:h800"}}
    return small_recipe(chips=chips, train={"steps": steps, "checkpoint_every": 20})


def workers(module: str, run: Path) -> list[int]:
    """Far ends that do this work for that run: started by one of ours, with the run's path in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                cwd = os.readlink(entry / "cwd")
            except OSError:
                continue
            if module.encode() in words and cwd == str(run.parent):
                found.append(int(entry.name))
    return found


def test_an_event_of_one_role_is_no_trouble_of_another() -> None:
    recipe = parse_recipe(roles_recipe(20), "test")
    fault = Fault(step=None, code="exit", category="transient", message="gone", role=CANDIDATE)
    fold = Fold([decide(Fold().situation(), recipe), decide_beside(Fold().situation(), recipe, "second"), fault])  # type: ignore[list-item]
    learner, candidate = fold.situation(LEARNER), fold.situation(CANDIDATE)
    assert learner.trouble is None and candidate.trouble == fault
    assert decide_beside(candidate, recipe, "second").action == "retry"


def test_a_candidate_that_goes_on_failing_is_left_and_never_ends_the_run() -> None:
    recipe = parse_recipe(roles_recipe(20), "test")
    fold, actions = Fold(), []
    for _ in range(recipe.supervise.transient_retries + 2):
        decision = decide_beside(fold.situation(CANDIDATE), recipe, "second").model_copy(update={"role": CANDIDATE})
        actions.append(decision.action)
        fold.add(decision)
        fold.add(Fault(step=None, code="exit", category="transient", message="gone", role=CANDIDATE))
    assert actions == ["start", *["retry"] * recipe.supervise.transient_retries, "stop"]
    assert decide_beside(fold.situation(CANDIDATE), recipe, "second").action == "stop"
    assert fold.situation(LEARNER).trouble is None


def test_a_learners_alarm_does_not_touch_the_candidate() -> None:
    alarm = Alarm(step=1, detector="memory", site="x", tensor="y", value=1.0, bound=0.0, message="wrong")
    fold = Fold([alarm])
    assert fold.situation(LEARNER).alarm == alarm and fold.situation(CANDIDATE).alarm is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killing_the_candidate_leaves_the_learner_alone_and_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, run = str(write_recipe(tmp_path, roles_recipe(400))), tmp_path / "run"
    with start("train", recipe, "--out", str(run), "--qualify", "second") as supervisor:
        until(lambda: of_kind(run, "step") and workers("beringia.campaign.candidate_work", run), "both at work")
        (candidate,) = workers("beringia.campaign.candidate_work", run)
        os.kill(candidate, signal.SIGKILL)
        until(
            lambda: len([event for event in events(run) if event.role == CANDIDATE]) >= 3, "the candidate tried again"
        )
        until(lambda: workers("beringia.campaign.candidate_work", run), "its process")
        (candidate,) = workers("beringia.campaign.candidate_work", run)
        until(lambda: of_kind(run, "checkpoint"), "a checkpoint")
        (learner,) = workers("beringia.train.worker", run)
        os.kill(learner, signal.SIGKILL)
        until(lambda: len(of_kind(run, "resume")) >= 2, "the learner back")
        assert workers("beringia.campaign.candidate_work", run) == [candidate], "the candidate was left alone"
        supervisor.communicate()
    assert supervisor.returncode == 0
    told = {role: [event for event in events(run) if event.role == role] for role in (LEARNER, CANDIDATE)}
    assert [event.kind for event in told[CANDIDATE]] == ["decision", "fault", "decision", "qualified"]
    assert [event.code for event in told[LEARNER] if event.kind == "fault"] == ["exit"]
    assert {event.action for event in told[LEARNER] if event.kind == "decision"} == {"start", "retry"}
    assert (run / "certificates" / "second.json").exists()
    alone = str(write_recipe(tmp_path, roles_recipe(400) | {"name": "alone"}))
    assert beringia("train", alone, "--out", str(tmp_path / "alone")).returncode == 0
    assert final_hash(run) == final_hash(tmp_path / "alone")


def test_a_chip_that_the_recipe_does_not_have_cannot_be_qualified(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, roles_recipe(4)))
    done = beringia("train", recipe, "--out", str(tmp_path / "run"), "--qualify", "third")
    assert done.returncode == 2 and "'third' is to be qualified, but the recipe's chips are" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_candidate_of_a_run_that_is_done_is_qualified_once(tmp_path: Path) -> None:
    """`--qualify` asks for a certificate: whether the run is done, or was stopped while it waited for that."""
    recipe, run = str(write_recipe(tmp_path, roles_recipe(4))), tmp_path / "run"
    assert beringia("train", recipe, "--out", str(run)).returncode == 0
    asked = ("train", recipe, "--out", str(run), "--qualify", "second", "--qualify", "second")
    with start(*asked) as process:
        until(lambda: [event for event in of_kind(run, "decision") if event.role == CANDIDATE], "the candidate's start")
        process.terminate()
    assert process.returncode == 143 and not (run / "certificates" / "second.json").exists()
    for _ in range(2):
        assert beringia(*asked).returncode == 0
    assert [event.chip for event in of_kind(run, "qualified")] == ["second"]
    assert [event.step for event in of_kind(run, "step")] == [1, 2, 3, 4]
