"""The object of `beringia campaign --json`, and the table at the end of a campaign."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import pytest
from histories import any_history
from hypothesis import given, settings
from report_story import EMULATED, PROCESSOR, Story, write_story
from rich.console import Console

from beringia.records.events import (
    Alarm,
    AnyEvent,
    CheckpointRejected,
    CheckpointWritten,
    Fallback,
    Fault,
    StepDone,
    Unqualified,
)
from beringia.report.curves import guard_checks
from beringia.report.history import read_history
from beringia.report.page import render_report
from beringia.report.summary import Summary, print_table, summarise


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return summarise(read_history(write_story(tmp_path_factory.mktemp("runs") / "r2-nano")))


def printed(summary: Summary, width: int = 100) -> list[str]:
    text = io.StringIO()
    print_table(summary, Console(file=text, width=width, force_terminal=False))
    return text.getvalue().rstrip("\n").split("\n")


def test_the_object_has_what_the_command_line_promises(summary: Summary) -> None:
    document = summary.model_dump(mode="json")
    assert {"chips", "crossings", "lost_steps", "alarms", "accuracy", "report"} <= document.keys()
    assert document["lost_steps"] == document["redone_steps"] == 137
    assert document["crossings"][0]["from"] == "preferred"
    assert document["crossings"][0]["to"] == "fallback"
    assert document["crossings"][0]["state_hashes_equal"] is True
    assert document["accuracy"]["low"] < document["accuracy"]["value"] < document["accuracy"]["high"]
    assert [alarm["site"] for alarm in document["alarms"]] == ["layers.0", "layers.0", "layers.1"]


def test_each_chip_is_given_its_own_work_and_identity(summary: Summary) -> None:
    preferred, fallback = summary.chips
    assert (preferred.steps, preferred.kept_steps, fallback.steps) == (337, 200, 400)
    assert (preferred.identity_hash, fallback.identity_hash) == (EMULATED.hash, PROCESSOR.hash)
    assert (preferred.truth, fallback.truth) == ("emulated", "real")
    assert preferred.seconds + fallback.seconds <= summary.seconds + 1e-6


def test_the_summary_survives_json(summary: Summary) -> None:
    assert Summary.model_validate_json(summary.model_dump_json()) == summary


@pytest.mark.parametrize("width", [60, 100, 180])
def test_the_table_fits_and_ends_with_the_path_of_the_page(summary: Summary, width: int) -> None:
    lines = printed(summary, width)
    assert lines[-1] == summary.report
    assert max(map(len, lines[:-1])) <= min(width, 100)


def test_the_table_says_which_chip_is_emulated_and_what_was_lost(summary: Summary) -> None:
    text = "\n".join(printed(summary))
    assert "emulated" in text
    assert "real" in text
    assert "137 steps of work, no state" in text
    assert "42.0 % (36.5 to 48.0 %, 256 samples; chance 10 %)" in text


def test_words_in_brackets_are_printed_and_not_taken_for_markup(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    story.open("fallback", PROCESSOR.model_copy(update={"sku": "[red]chip[/red]"}))
    assert "[red]chip" in "\n".join(printed(summarise(read_history(story.end()))))


@settings(max_examples=50)
@given(any_history(odd=False))
def test_what_was_done_again_and_every_fault_is_counted_once(history: list[AnyEvent]) -> None:
    """So the table's columns add up to what the page says in one number."""
    with tempfile.TemporaryDirectory() as directory:
        lines = (event.model_copy(update={"epoch": 1}).model_dump_json() for event in history)
        Path(directory, "events.jsonl").write_text("".join(f"{line}\n" for line in lines))
        read = read_history(directory)
    summary = summarise(read)
    assert summary.lost_steps == summary.redone_steps
    assert sum(one.faults for one in (*summary.chips, *summary.unopened)) == len(read.faults)


def test_a_chip_that_was_let_train_in_the_end_is_not_said_to_have_been_refused(tmp_path: Path) -> None:
    """It had no certificate, was given one, and the same command went on."""
    story = Story(tmp_path / "run", steps=60)
    story.begin()
    story.decide("start", "first", to_chip="fallback")
    story.open("fallback")
    story.tell(Unqualified(used="cpu", identity_hash="", found="none", reason="there is no certificate for cpu"))
    refused = summarise(read_history(story.run.root))
    assert [(one.chip, one.trained) for one in refused.unqualified] == [("fallback", False)]
    assert "not let train" in render_report(read_history(story.run.root))
    story.open("fallback")
    story.train(1, 20)
    trained = summarise(read_history(story.run.root))
    assert trained.unqualified == ()
    assert "not let train" not in render_report(read_history(story.run.root)) + "\n".join(printed(trained))
    # A second lot in the same machine is refused again: that is said.
    story.tell(Unqualified(used="cpu", identity_hash="", found="verdict infer", reason="it is another"), after=1.0)
    assert [one.found for one in summarise(read_history(story.end())).unqualified] == ["verdict infer"]


def test_a_chip_that_never_opened_has_its_faults_counted_and_told(tmp_path: Path) -> None:
    story = Story(tmp_path / "run", steps=60)
    story.begin()
    story.decide("start", "first", to_chip="preferred")
    for _ in range(2):
        story.tell(Fault(code="start", category="transient", message="it did not start", chip="preferred", step=None))
    story.open("fallback")
    history = read_history(story.end())
    summary = summarise(history)
    assert [(one.label, one.faults) for one in summary.unopened] == [("preferred", 2)]
    assert "unopened  preferred: 2 faults, and it never opened" in printed(summary)
    assert "preferred never opened</b>: 2 faults" in render_report(history)


def test_the_page_draws_as_many_alarms_as_the_summary_counts(tmp_path: Path) -> None:
    """Also where the alarm names another tensor than the check beside it, and another chip takes the step again."""
    story = Story(tmp_path / "run", steps=60)
    story.begin()
    story.open_preferred()
    story.check(3, "layers.0", share=4.6)
    alarm = Alarm(
        step=3, detector="layer-shadow", site="layers.0", tensor="self_attn", value=2.0, bound=1.0, message=""
    )
    story.tell(alarm)
    story.epoch += 1
    story.open("fallback")
    story.check(3, "layers.0", share=0.1)
    history = read_history(story.end())
    drawn = guard_checks(history)
    assert [check.share for check in drawn if check.share > 1] == [2.0]
    assert sum(check.share <= 1 for check in drawn) == len(history.checks) - 1
    assert len(summarise(history).alarms) == sum(chip.alarms for chip in summarise(history).chips) == 1
    assert f"Triangles went beyond their bound: 1 of {len(drawn)} checks." in render_report(history)


def test_what_is_told_again_at_every_opening_stands_once_on_the_page(tmp_path: Path) -> None:
    story = Story(tmp_path / "run", steps=60)
    story.begin()
    for _ in range(3):
        story.open("fallback")
        story.tell(Fallback(what="chip", asked="auto", used="cpu", reason="no accelerator is here"))
    page = render_report(read_history(story.end()))
    assert page.count("no accelerator is here") == 1 and "<b>chip</b> on fallback, 3 times" in page


def test_a_run_that_never_evaluated_has_no_accuracy(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    summary = summarise(read_history(story.end()))
    assert summary.accuracy is None
    assert summary.chips == ()
    assert printed(summary)[-1] == summary.report


def test_what_was_lost_is_counted_from_what_happened(tmp_path: Path) -> None:
    """Every sentence that nothing, or no state, was lost holds only where the record bears it out."""
    story = Story(tmp_path / "run", steps=60)
    story.begin()
    story.decide("start", "first", to_chip="fallback")
    story.open("fallback")
    story.train(1, 20)
    unharmed = summarise(read_history(story.run.root))
    assert unharmed.answer.endswith("; no step was lost.") and unharmed.lost == "0 steps of work, no state"
    story.decide("retry", "exit", to_step=10, lost_steps=10, to_chip="fallback")
    story.train(11, 20)
    assert "10 steps of work were lost, no state was lost." in summarise(read_history(story.run.root)).answer
    story.tell(CheckpointRejected(step=20, file=None, message="damaged"))
    story.decide("retry", "damaged", to_step=None, lost_steps=20, to_chip="fallback")
    story.tell(StepDone(step=1, loss=None, gradient_norm=None, learning_rate=0, tokens=1, seconds=1, cursor=1))
    lost = summarise(read_history(story.end()))
    assert lost.answer.endswith(
        "; 30 steps of work were lost, the run began again from step 0 once, 1 checkpoint could not be used, "
        "the loss was no finite number in 1 step."
    )
    assert (lost.lost_steps, lost.unusable_checkpoints, lost.restarts_from_0, lost.steps_without_loss) == (30, 1, 1, 1)
    assert "no state" not in "\n".join(printed(lost))


def test_steps_of_which_nothing_is_recorded_are_counted(tmp_path: Path) -> None:
    """A worker whose supervisor was killed goes on to a checkpoint, which is taken up: its last steps were told to
    nobody."""
    story = Story(tmp_path / "run", steps=60)
    story.begin()
    story.decide("start", "first", to_chip="fallback")
    story.open("fallback")
    story.train(1, 17)
    found = CheckpointWritten(
        step=20, directory="", bytes=0, state_hash="0", pause_seconds=0, write_seconds=0, found=True
    )
    story.tell(found)
    story.train(21, 60)
    summary = summarise(read_history(story.end()))
    assert summary.answer.endswith("; no step was lost, nothing is recorded of 3 steps.")
    assert (summary.untold_steps, summary.redone_steps) == (3, 0)
    assert "the record of 3 steps" in "\n".join(printed(summary))
