"""The object of `beringia campaign --json`, and the table at the end of a campaign."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from report_story import EMULATED, PROCESSOR, Story, write_story
from rich.console import Console

from beringia.records.events import CheckpointRejected, StepDone
from beringia.report.history import read_history
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
