"""A campaign from its recipe to its page, and one that is taken up again where it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import beringia, events, of_kind, small_recipe, write_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a campaign that nothing disturbed; its answer lies beside it."""
    directory = tmp_path_factory.mktemp("campaign")
    recipe = write_recipe(directory, small_recipe(train={"steps": 20, "accuracy_samples": 8, "evaluate_every": 20}))
    done = beringia("campaign", str(recipe), "--out", str(directory / "run"), "--json")
    assert done.returncode == 0, done.stderr
    (directory / "answer.json").write_text(done.stdout)
    return directory


def test_it_answers_with_one_object_and_leaves_page_and_export(finished: Path) -> None:
    answer = json.loads((finished / "answer.json").read_text())
    assert {"chips", "crossings", "lost_steps", "alarms", "accuracy", "report"} <= answer.keys()
    assert (finished / "run" / "report.html").stat().st_size > 10_000
    assert json.loads((finished / "run" / "export" / "config.json").read_text())["topk_method"] == "noaux_tc"


def test_transformers_computes_the_same_logits_from_the_export(finished: Path) -> None:
    (exported,) = of_kind(finished / "run", "export")
    assert 0 < exported.largest_difference <= exported.bound


def test_one_interrupted_between_export_and_comparison_goes_on(finished: Path) -> None:
    run = finished / "run"
    kept = [event for event in events(run) if event.kind != "export"]
    (run / "events.jsonl").write_text("".join(event.model_dump_json() + "\n" for event in kept))
    again = beringia("campaign", str(run / "recipe.toml"), "--out", str(run), "--json")
    assert again.returncode == 0, again.stderr + again.stdout
    (exported,) = of_kind(run, "export")
    assert exported.largest_difference <= exported.bound
