"""A campaign from its recipe to its page, and one that is taken up again where it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import beringia, events, of_kind, small_recipe, write_recipe

from beringia.cli import main
from beringia.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a campaign that nothing disturbed; its answer lies beside it."""
    directory = tmp_path_factory.mktemp("campaign")
    chips = {"first": {"use": "cpu"}, "served": {"use": "emulated:ascend-910b", "faults": "r2-2025-first-lot"}}
    train = {"steps": 20, "accuracy_samples": 8, "evaluate_every": 20}
    document = small_recipe(chips=chips, serve={"chip": "served", "questions": 24}, train=train)
    recipe = write_recipe(directory, document)
    done = beringia("campaign", str(recipe), "--out", str(directory / "run"), "--json")
    assert done.returncode == 0, done.stderr
    (directory / "answer.json").write_text(done.stdout)
    return directory


def test_it_answers_with_one_object_and_leaves_page_and_export(finished: Path) -> None:
    answer = json.loads((finished / "answer.json").read_text())
    assert {"chips", "crossings", "lost_steps", "alarms", "accuracy", "report"} <= answer.keys()
    assert (finished / "run" / "report.html").stat().st_size > 10_000
    config = json.loads((finished / "run" / "export" / "config.json").read_text())
    assert config["topk_method"] == "noaux_tc" and config["eos_token_id"] == load_tokenizer("digits").end


def test_transformers_computes_the_same_logits_from_the_export(finished: Path) -> None:
    (exported,) = of_kind(finished / "run", "export")
    assert 0 < exported.largest_difference <= exported.bound


def test_what_was_trained_answers_on_the_inference_chip_and_is_compared_with_the_one_that_trained(
    finished: Path,
) -> None:
    (answered,) = of_kind(finished / "run", "answers")
    assert (answered.chip, answered.truth, answered.trained_on) == ("served", "emulated", "first")
    assert answered.questions == 24 and answered.accuracy_low <= answered.accuracy <= answered.accuracy_high
    assert answered.compute_dtype == "bfloat16" and answered.tokens_a_second > 0
    # Rounding to bfloat16 (2^-9 of a logit, logits of some units, four layers) moves log-probabilities a little.
    assert 1e-5 < answered.mean_logprob_difference < 0.1
    assert "Served answers" in (finished / "run" / "report.html").read_text()


@pytest.mark.slow
def test_one_interrupted_between_export_and_comparison_goes_on_and_answers_only_once(finished: Path) -> None:
    run = finished / "run"
    card = run / "export" / "README.md"
    card.write_text("what this model is for")
    kept = [event for event in events(run) if event.kind != "export"]
    (run / "events.jsonl").write_text("".join(event.model_dump_json() + "\n" for event in kept))
    again = beringia("campaign", str(run / "recipe.toml"), "--out", str(run), "--json")
    assert again.returncode == 0, again.stderr + again.stdout
    (exported,) = of_kind(run, "export")
    assert exported.largest_difference <= exported.bound
    assert len(of_kind(run, "answers")) == 1
    (aside,) = (run / "set-aside").glob("export-*")
    assert (aside / "README.md").read_text() == "what this model is for" and not card.exists()


def test_a_campaign_whose_own_signature_would_not_count_is_refused_before_it_qualifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    qualify = {"unqualified": "refuse", "trusted_keys": ["ab" * 32]}
    recipe = write_recipe(tmp_path, small_recipe(qualify=qualify))
    with pytest.raises(SystemExit) as refused:
        main(["campaign", str(recipe), "--out", str(tmp_path / "run")])
    assert refused.value.code == 2 and "not in qualify.trusted_keys" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)  # two campaigns, several processes each, which a busy machine gives little
def test_a_run_that_was_given_more_steps_is_exported_and_answers_anew(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, small_recipe(serve={"chip": "first", "questions": 8}, train={"steps": 6}))
    run, weights = tmp_path / "run", []
    for steps in (6, 8):
        done = beringia("campaign", str(recipe), "--out", str(run), "--set", f"train.steps={steps}", "--json")
        assert done.returncode == 0, done.stderr + done.stdout
        weights.append((run / "export" / "model.safetensors").read_bytes())
    assert [[event.step for event in of_kind(run, kind)] for kind in ("export", "answers")] == [[6, 8], [6, 8]]
    assert not (run / "set-aside").exists() or not list((run / "set-aside").glob("export-*"))
    assert weights[0] != weights[1] and "Changes of the recipe" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_chip_that_qualification_refuses_is_passed_over_and_the_next_one_trains(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        small_recipe(
            chips={
                "bad-lot": {"use": "emulated:ascend-910b", "faults": "r2-2025-first-lot"},
                "sound": {"use": "emulated:h800"},
            },
            train={"prefer": ["bad-lot", "sound"], "steps": 5, "evaluate_every": 5},
            qualify={"unqualified": "refuse"},
        ),
    )
    run = tmp_path / "run"
    done = beringia("campaign", str(recipe), "--out", str(run), "--json", XDG_CONFIG_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr + done.stdout
    verdicts = {event.chip: event for event in of_kind(run, "qualified")}
    assert verdicts["bad-lot"].verdict == "infer" and verdicts["sound"].verdict == "train"
    assert "attention" in verdicts["bad-lot"].first_wrong and "(backward" in verdicts["bad-lot"].first_wrong
    assert [decision.action for decision in of_kind(run, "decision")] == ["start", "skip"]
    assert {step.chip for step in of_kind(run, "step")} == {"sound"}
    for label in ("bad-lot", "sound"):
        assert beringia("verify", str(run / "certificates" / f"{label}.json")).returncode == 0
        assert (run / "certificates" / f"{label}.html").stat().st_size > 10_000
