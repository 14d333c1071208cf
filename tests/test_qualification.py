"""The gate: which chips may train, by the certificates in the run directory and what the recipe says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from certificates import IDENTITY, certificate
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from small_runs import beringia, events, of_kind, small_recipe, write_recipe

from beringia.chips.open import open_chip
from beringia.errors import RecipeError
from beringia.records.certificate import NO_COLLECTIVES, Certificate, ModelFingerprint, ProbeResult
from beringia.records.events import ChipOpened, Fallback, Unqualified
from beringia.records.identity import ChipIdentity
from beringia.records.inputs import weights_of
from beringia.records.model_source import configuration_hash
from beringia.records.recipe import Recipe, parse_recipe
from beringia.records.run_directory import RunDirectory
from beringia.records.signature import load_or_create_key, public_key_of, sign, write_signed
from beringia.report.history import read_history
from beringia.report.page import render_report
from beringia.report.summary import summarise
from beringia.supervise.admission import admission

KEY = Ed25519PrivateKey.generate()


def opened(identity: ChipIdentity = IDENTITY, used: str = "emulated:h800") -> ChipOpened:
    return ChipOpened(
        asked=used,
        used=used,
        identity=identity,
        identity_hash=identity.hash,
        ranks=1,
        compute_dtype="bfloat16",
        sharding="none",
    )


def recipe(model: dict[str, Any] | None = None, **qualify: Any) -> Recipe:
    """The small recipe with qualification as it is by default, but for these keys."""
    return parse_recipe(small_recipe(model=model or {}, qualify={"unqualified": "refuse"} | qualify), "test")


def put(tmp_path: Path, *certificates: Certificate) -> RunDirectory:
    """A run directory with these certificates, signed."""
    run = RunDirectory(tmp_path)
    for number, one in enumerate(certificates):
        write_signed(run.certificates / f"{number}.json", sign(one, KEY))
    return run


def refusal(tmp_path: Path, *certificates: Certificate, of: ChipOpened | None = None) -> Unqualified:
    told = admission(of or opened(), recipe(), put(tmp_path, *certificates))
    assert isinstance(told, Unqualified)
    return told


def test_a_chip_with_a_certificate_to_train_this_model_is_let_train_without_a_word(tmp_path: Path) -> None:
    assert admission(opened(), recipe(), put(tmp_path, certificate())) is None


def test_several_ranks_train_with_a_certificate_that_tried_collectives_and_with_no_other(tmp_path: Path) -> None:
    several = opened().model_copy(update={"ranks": 8})
    tried = put(tmp_path / "tried", certificate(untried=("collectives on more than 2 ranks",)))
    assert admission(several, recipe(), tried) is None
    without = put(tmp_path / "without", certificate(untried=(NO_COLLECTIVES,)))
    assert admission(opened(), recipe(), without) is None
    told = admission(several, recipe(), without)
    assert told is not None and "without trying collectives, and the run has 8 ranks" in told.reason


def test_the_note_of_an_identity_and_the_users_name_for_the_chip_do_not_matter(tmp_path: Path) -> None:
    other = IDENTITY.model_copy(update={"note": "another"})
    assert admission(opened(other, "auto"), recipe(), put(tmp_path, certificate())) is None


def test_a_chip_without_a_certificate_is_refused_unless_the_recipe_allows_it(tmp_path: Path) -> None:
    told = refusal(tmp_path)
    assert (told.found, told.used, told.identity_hash) == ("none", "emulated:h800", IDENTITY.hash)
    assert "no certificate for emulated:h800" in told.reason and "r2-nano" in told.reason
    allowed = admission(opened(), recipe(unqualified="allow"), RunDirectory(tmp_path))
    assert isinstance(allowed, Fallback)
    assert (allowed.what, allowed.asked, allowed.used) == ("qualification", "certificate", "none")


@pytest.mark.parametrize("verdict", ["infer", "unfit", "inconclusive"])
def test_another_verdict_than_train_is_a_refusal_with_its_reason(tmp_path: Path, verdict: str) -> None:
    bad = certificate(verdict=verdict, reasons=("the gradient of attention is wrong",))
    told = refusal(tmp_path, bad)
    assert told.found == f"verdict {verdict}" and "the gradient of attention is wrong" in told.reason
    for qualify in ({"unqualified": "allow"}, {"on_refusal": "try"}):
        tried = admission(opened(), recipe(**qualify), RunDirectory(tmp_path))
        assert isinstance(tried, Fallback) and tried.used == f"verdict {verdict}"


def test_trying_a_refused_chip_does_not_mean_one_that_was_never_qualified(tmp_path: Path) -> None:
    told = admission(opened(), recipe(on_refusal="try"), RunDirectory(tmp_path))
    assert isinstance(told, Unqualified)


def test_a_certificate_for_another_identity_of_the_chip_names_what_differs(tmp_path: Path) -> None:
    other = IDENTITY.model_copy(update={"switches": {"fidelity": "fast", "threads": "2"}})
    told = refusal(tmp_path, certificate(other))
    assert told.found == "none" and "threads 2, here 1" in told.reason


def test_a_certificate_for_another_chip_or_another_model_does_not_count(tmp_path: Path) -> None:
    other_chip = certificate(IDENTITY.model_copy(update={"sku": "MI300X"}))
    micro = ModelFingerprint(
        name="r2-micro", configuration=configuration_hash("r2-micro", None), weights="", parameters=1
    )
    told = refusal(tmp_path, other_chip, certificate(model=micro))
    assert "another chip, MI300X" in told.reason and "another model, r2-micro" in told.reason


def test_a_certificate_for_computing_in_another_dtype_does_not_count(tmp_path: Path) -> None:
    told = refusal(tmp_path, certificate(compute_dtype="float32"))
    assert told.found == "none" and "computing in float32, and the run computes in bfloat16" in told.reason


def test_only_the_keys_that_the_recipe_trusts_count_where_it_names_some(tmp_path: Path) -> None:
    run, other = put(tmp_path, certificate()), Ed25519PrivateKey.generate()
    trusting = recipe(trusted_keys=[public_key_of(other), public_key_of(KEY)])
    assert admission(opened(), trusting, run) is None
    told = admission(opened(), recipe(trusted_keys=[public_key_of(other)]), run)
    assert isinstance(told, Unqualified) and told.found == "none"
    assert public_key_of(KEY) in told.reason and public_key_of(other) in told.reason


def test_what_is_no_public_key_is_refused_with_the_recipe() -> None:
    with pytest.raises(RecipeError, match="trusted_keys"):
        recipe(trusted_keys=["ab12"])


def test_a_model_directory_is_compared_by_its_configuration(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 64}')
    asked = recipe(model={"preset": None, "path": str(model)})
    own = ModelFingerprint(name="m", configuration=configuration_hash(None, str(model)), weights="", parameters=1)
    assert admission(opened(), asked, put(tmp_path / "run", certificate(model=own))) is None
    (model / "config.json").write_text('{"hidden_size": 65}')
    assert isinstance(admission(opened(), asked, RunDirectory(tmp_path / "run")), Unqualified)
    (model / "config.json").unlink()
    told = admission(opened(), asked, RunDirectory(tmp_path / "run"))
    assert isinstance(told, Unqualified) and "config.json" in told.reason


def test_a_certificate_for_some_of_the_layers_never_admits_the_whole_model(tmp_path: Path) -> None:
    told = refusal(tmp_path, certificate(layers=2))
    assert told.found == "none" and "2 of the model's layers, and the run trains all of them" in told.reason


def test_a_certificate_for_as_many_layers_as_the_model_has_is_for_the_whole_model(tmp_path: Path) -> None:
    assert admission(opened(), recipe(), put(tmp_path / "preset", certificate(layers=3))) is None
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 5}')
    asked = recipe(model={"preset": None, "path": str(tmp_path)})
    own = ModelFingerprint(name="m", configuration=configuration_hash(None, str(tmp_path)), weights="", parameters=1)
    assert admission(opened(), asked, put(tmp_path / "whole", certificate(model=own, layers=5))) is None
    told = admission(opened(), asked, put(tmp_path / "part", certificate(model=own, layers=3)))
    assert isinstance(told, Unqualified) and "3 of the model's layers" in told.reason


def _of_vocabulary(size: int | None) -> ModelFingerprint:
    configuration = configuration_hash("r2-nano", None, size)
    return ModelFingerprint(name="r2-nano", configuration=configuration, weights="", parameters=1, vocabulary_size=size)


def test_a_certificate_of_a_preset_counts_only_for_the_vocabulary_that_was_tried(tmp_path: Path) -> None:
    digits, text = (opened().model_copy(update={"vocabulary_size": size}) for size in (54, 261))
    own, other = put(tmp_path / "own", certificate()), put(tmp_path / "other", certificate(model=_of_vocabulary(261)))
    assert admission(digits, recipe(), own) is None
    assert admission(text, recipe(), other) is None
    told, back = admission(text, recipe(), own), admission(digits, recipe(), other)
    assert isinstance(told, Unqualified) and isinstance(back, Unqualified)
    assert "with a vocabulary of 54, and the run trains it with one of 261" in told.reason
    assert "`beringia qualify emulated:h800 --model r2-nano --vocabulary 261`" in told.reason
    assert "with a vocabulary of 261, and the run trains it with one of 54" in back.reason


def test_a_certificate_is_for_the_weights_of_the_directory_that_the_recipe_names(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 64}')
    (model / "model.safetensors").write_bytes(b"weights")
    asked = recipe(model={"preset": None, "path": str(model)})
    own = ModelFingerprint(name="m", configuration=configuration_hash(None, str(model)), weights="", parameters=1)
    run = put(tmp_path / "run", certificate(model=own, weight_files=weights_of(str(model))))
    assert admission(opened(), asked, run) is None
    (model / "tokenizer.json").write_text("{}")
    assert admission(opened(), asked, run) is None, "no weights changed"
    (model / "model.safetensors").write_bytes(b"other weights")
    told = admission(opened(), asked, run)
    assert isinstance(told, Unqualified) and "other weights of m" in told.reason


def test_what_a_certificate_of_schema_1_does_not_say_is_not_compared(tmp_path: Path) -> None:
    old = certificate(schema_version=1)
    written = old.model_dump(mode="json")
    assert not {"layers", "weight_files", "bundle"} & written.keys()
    assert admission(opened(), recipe(), put(tmp_path, old)) is None


def test_a_certificate_of_schema_1_names_no_weights_and_a_later_one_that_names_none_is_of_none(tmp_path: Path) -> None:
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    own = ModelFingerprint(name="m", configuration=configuration_hash(None, str(model)), weights="", parameters=1)
    asked = recipe(model={"preset": None, "path": str(model)})
    for version, counts in ((1, True), (2, False)):
        run = put(tmp_path / f"run {version}", certificate(schema_version=version, model=own))
        told = admission(opened(), asked, run)
        assert (told is None) == counts


def test_a_certificate_that_was_altered_or_is_damaged_does_not_count_and_is_told(tmp_path: Path) -> None:
    run = put(tmp_path, certificate(verdict="infer"))
    path = run.certificates / "0.json"
    path.write_text(path.read_text().replace('"infer"', '"train"'))
    (run.certificates / "1.json").write_text("{")
    told = admission(opened(), recipe(), run)
    assert isinstance(told, Unqualified) and told.found == "none"
    assert "0.json does not count" in told.reason and "altered" in told.reason and "1.json" in told.reason


def test_of_several_certificates_the_newest_with_a_verdict_counts(tmp_path: Path) -> None:
    old, new, newest = (f"2026-11-{day}T00:00:00Z" for day in (10, 20, 30))
    later_unfit = put(tmp_path / "a", certificate(created=old), certificate(created=new, verdict="unfit"))
    assert isinstance(admission(opened(), recipe(), later_unfit), Unqualified)
    repaired = put(tmp_path / "b", certificate(created=new), certificate(created=old, verdict="unfit"))
    assert admission(opened(), recipe(), repaired) is None
    open_verdict = certificate(created=newest, verdict="inconclusive", probes=())
    too_little = put(tmp_path / "c", certificate(created=new), open_verdict)
    assert admission(opened(), recipe(), too_little) is None


def test_a_later_open_verdict_counts_where_a_probe_of_it_ruled_training_out(tmp_path: Path) -> None:
    failed = ProbeResult(probe="lockstep", subject="update", outcome="failed", rules_out="train", summary="it differs")
    sound = certificate(created="2026-11-10T00:00:00Z")
    later = certificate(created="2026-11-20T00:00:00Z", verdict="inconclusive", probes=(failed,))
    assert isinstance(admission(opened(), recipe(), put(tmp_path, sound, later)), Unqualified)


def _emulated(name: str) -> ChipOpened:
    chip = open_chip(name)
    chip.close()
    return opened(chip.identity, chip.name)


def test_a_certificate_of_the_exact_emulator_does_not_stand_for_the_fast_one_nor_the_other_way_round(
    tmp_path: Path,
) -> None:
    fast, exact = _emulated("emulated:h800"), _emulated("emulated:h800@exact")
    for certified, other in ((fast, exact), (exact, fast)):
        place = tmp_path / certified.identity.switches["fidelity"]
        run = put(place, certificate(certified.identity, chip=certified.used))
        assert admission(certified, recipe(), run) is None
        told = admission(other, recipe(), run)
        assert isinstance(told, Unqualified) and "fidelity" in told.reason


# Real runs


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run whose only chip has no certificate; its last words lie beside it."""
    directory = tmp_path_factory.mktemp("refused")
    path = write_recipe(directory, small_recipe(qualify={"unqualified": "refuse"}, train={"steps": 6}))
    done = beringia("train", str(path), "--out", str(directory / "run"))
    assert done.returncode == 3, done.stderr
    (directory / "stderr").write_text(done.stderr)
    return directory


def test_a_run_without_a_certificate_ends_with_3_and_says_what_is_missing_and_what_to_do(refused: Path) -> None:
    (sentence,) = (line for line in (refused / "stderr").read_text().splitlines() if line.startswith("beringia: "))
    for words in ("first may not train", "no certificate for cpu", "r2-nano", "certificates", 'unqualified = "allow"'):
        assert words in sentence
    run = refused / "run"
    kinds = [event.kind for event in events(run)]
    assert kinds == ["run", "decision", "chip", "unqualified", "decision", "finish"]
    assert not list((run / "checkpoints").glob("*"))
    assert of_kind(run, "finish")[0].status == "stopped"


def test_page_and_summary_say_that_a_chip_was_not_let_train(refused: Path) -> None:
    history = read_history(refused / "run")
    (told,) = summarise(history).unqualified
    assert (told.chip, told.found, told.trained) == ("first", "none", False)
    page = render_report(history)
    assert "first was not let train" in page and "no certificate for cpu" in page


def test_with_a_signed_certificate_the_same_command_trains(refused: Path) -> None:
    run = RunDirectory(refused / "run")
    identity = of_kind(run.root, "chip")[0].identity
    key = load_or_create_key(refused / "key.pem")
    write_signed(run.certificates / "cpu.json", sign(certificate(identity, chip="cpu", compute_dtype="float32"), key))
    done = beringia("train", str(refused / "small.toml"), "--out", str(run.root), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "done"
    assert [event.step for event in of_kind(run.root, "step")] == list(range(1, 7))
    assert [event.action for event in of_kind(run.root, "decision")] == ["start", "stop", "start"]
    assert not of_kind(run.root, "fallback")


def test_a_run_with_another_tokenizer_than_the_certificate_s_is_refused_by_its_vocabulary(
    refused: Path, tmp_path: Path
) -> None:
    """The worker says how many tokens its tokenizer has, and the gate looks at that."""
    identity = of_kind(refused / "run", "chip")[0].identity
    assert {event.vocabulary_size for event in of_kind(refused / "run", "chip")} == {54}
    run = put(tmp_path / "run", certificate(identity, chip="cpu", compute_dtype="float32"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text(f"Text number {number}. " * 20)
    document = small_recipe(qualify={"unqualified": "refuse"}, train={"steps": 2})
    document["data"] = {"text": str(texts), "tokenizer": "bytes", "sequence_length": 24}
    done = beringia("train", str(write_recipe(tmp_path, document)), "--out", str(run.root))
    assert done.returncode == 3 and "with a vocabulary of 54, and the run trains it with one of 261" in done.stderr
    assert [event.vocabulary_size for event in of_kind(run.root, "chip")] == [261]
    assert not of_kind(run.root, "step")


@pytest.mark.slow
def test_a_chip_that_may_not_train_is_passed_over_for_one_that_may(refused: Path, tmp_path: Path) -> None:
    identity = of_kind(refused / "run", "chip")[0].identity
    document = small_recipe(
        chips={"preferred": {"use": "emulated:h800"}, "fallback": {"use": "cpu"}},
        qualify={"unqualified": "refuse"},
        train={"prefer": ["preferred", "fallback"], "steps": 4},
    )
    run = put(tmp_path / "run", certificate(identity, chip="cpu", compute_dtype="float32"))
    done = beringia("train", str(write_recipe(tmp_path, document)), "--out", str(run.root))
    assert done.returncode == 0, done.stderr
    decisions = [(event.action, event.to_chip, event.to_step) for event in of_kind(run.root, "decision")]
    assert decisions == [("start", "preferred", None), ("skip", "fallback", None)]
    assert {event.chip for event in of_kind(run.root, "step")} == {"fallback"}
    assert not of_kind(run.root, "crossing") and not of_kind(run.root, "canary")
    assert "evidence  preferred, without a certificate, was not let train" in done.stdout
    assert "skip to fallback from the start" in (run.root / "report.html").read_text()


def test_what_the_recipe_lets_train_without_a_certificate_is_told_at_each_opening(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, small_recipe(train={"steps": 2}))
    done = beringia("train", str(path), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    (told,) = (event for event in of_kind(tmp_path / "run", "fallback") if event.what == "qualification")
    assert (told.chip, told.asked, told.used) == ("first", "certificate", "none")
    assert "evidence  first, without a certificate, trained, as the recipe allows" in done.stdout
