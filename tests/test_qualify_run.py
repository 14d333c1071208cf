"""Qualification as users run it: real processes, sound and broken chips, exit codes, signed certificates."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from certificates import certificate
from small_runs import beringia, worker_of

from beringia.chips.chip import Memory
from beringia.chips.cpu import host_memory, taken_memory_bytes
from beringia.errors import HandshakeError, InputError, ModelError, Refusal
from beringia.processes.command import Command
from beringia.qualify import fitting
from beringia.qualify.bundle import DEFAULT_LIMIT_BYTES, read_manifest
from beringia.qualify.fitting import check_fits
from beringia.qualify.issue import exit_code, issue
from beringia.qualify.probing import gather
from beringia.qualify.qualification import Request, qualify, record_reference
from beringia.records.certificate import Certificate, ProbeResult
from beringia.report.certificate.sentence import verdict_sentence

ATTENTION_BACKWARD = """summary = "attention's backward past 16 positions"
[[faults]]
kind = "wrong-backward"
length = 16
strength = 0.8
"""


def small(chip: str = "emulated:h800", **changes: Any) -> Request:
    """One layer of r2-nano, and little of everything."""
    sizes: dict[str, Any] = {"layers": 1, "batches": 4, "steps": 2, "samples": 2, "tokens": 32}
    spared: dict[str, Any] = {"longest": 0, "memory_bytes": 0, "collectives": False}
    return Request(chip, "r2-nano", compute_dtype="bfloat16", **(sizes | spared | changes))


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "small.bundle"
    record_reference(small("cpu"), path, DEFAULT_LIMIT_BYTES)
    return path


def script(directory: Path, text: str) -> str:
    path = directory / "faults.toml"
    path.write_text(text)
    return str(path)


# ---- in little time


def test_a_sound_chip_is_fit_to_train(small_bundle: Path) -> None:
    said: list[str] = []
    found = qualify(small(), small_bundle, said.append)
    assert (found.verdict, found.first_wrong) == ("train", None)
    assert found.chip == "emulated:h800" and found.identity.truth == "emulated" and found.reference.vendor == "cpu"
    assert (found.compute_dtype, found.model.name) == ("bfloat16", "r2-nano")
    assert found.power > 0.8 and not [probe for probe in found.probes if probe.outcome == "failed"]
    assert {probe.probe for probe in found.probes} >= {"arithmetic", "operators", "lockstep", "repeat", "replay"}
    assert {check.direction for check in found.operators} == {"forward", "backward", "optimizer", "decode"}
    assert all(check.used <= 1.0 for check in found.operators)
    assert [word for word in said if word in ("operators", "lockstep")] == ["operators", "lockstep"]


def command(directory: Path, body: str) -> Command:
    """A shell script in the place of Python."""
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return Command("the chip", python=str(path))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("echo driver not loaded; sleep 600", r"waited for in vain \(its hello, 3 s\): driver not loaded"),
        ("echo driver not loaded; exit 7", r"did not start \(status 7\): driver not loaded"),
        ("kill -9 $$", r"did not start \(signal SIGKILL\): it said nothing"),
    ],
)
def test_a_process_that_does_not_open_its_chip_is_an_error_with_its_last_words(
    tmp_path: Path, body: str, words: str
) -> None:
    order = small().order("describe", tmp_path / "none")
    with pytest.raises(HandshakeError, match=words):
        gather(order, command(tmp_path, body), tmp_path / "log", patience_seconds=3.0 if "sleep" in body else 60.0)


def test_the_exit_code_is_about_the_use_that_was_asked_for() -> None:
    codes = {
        verdict: (exit_code(certificate(verdict=verdict), "train"), exit_code(certificate(verdict=verdict), "infer"))
        for verdict in ("train", "infer", "unfit", "inconclusive")
    }
    assert codes == {"train": (0, 0), "infer": (3, 0), "unfit": (3, 3), "inconclusive": (4, 4)}


@pytest.mark.parametrize(
    ("changes", "dtype_asked", "name"),
    [
        ({}, False, "cpu-r2-nano"),
        ({"layers": 2}, False, "cpu-r2-nano-layers-2"),
        ({"seed": 5, "compute_dtype": "float32"}, True, "cpu-r2-nano-seed-5-float32"),
    ],
)
def test_a_certificate_s_file_is_named_after_what_it_is_for_where_that_is_not_the_whole_model(
    tmp_path: Path, changes: dict[str, Any], dtype_asked: bool, name: str
) -> None:
    made = certificate(chip="cpu", **({"seed": 0} | changes))
    paths = issue(made, tmp_path, tmp_path / "key.pem", dtype_asked=dtype_asked).paths
    assert Path(paths["certificate"]).name == f"{name}.json"


def test_the_headline_says_that_it_is_for_some_layers_only() -> None:
    assert "serve on it, for 2 of the layers of r2-nano: " in str(verdict_sentence(certificate(layers=2)))
    assert "of the layers" not in str(verdict_sentence(certificate()))


def test_an_open_verdict_is_a_clear_no_to_training_where_a_probe_ruled_that_out() -> None:
    failed = ProbeResult(probe="lockstep", subject="update", outcome="failed", rules_out="train", summary="it differs")
    made = certificate(verdict="inconclusive", probes=(failed,))
    assert (exit_code(made, "train"), exit_code(made, "infer")) == (3, 4)


def test_a_model_that_does_not_fit_says_how_many_layers_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own advice: so many layers fit, and one more does not."""
    with_memory(monkeypatch, gibibytes=100)
    check_fits("r2-small", None)
    with_memory(monkeypatch, gibibytes=4)
    with pytest.raises(ModelError, match=r"r2-small needs .* GiB .* has 4.0 GiB: .* GiB are missing") as refused:
        check_fits("r2-small", None)
    words = str(refused.value)
    advice = re.search(r"--layers (\d+)", words)
    assert advice is not None
    check_fits("r2-small", int(advice[1]))
    with pytest.raises(ModelError):
        check_fits("r2-small", int(advice[1]) + 1)
    needed, has, missing = (float(number) for number in re.findall(r"([\d.]+) GiB", words))
    assert needed - has == pytest.approx(missing, abs=0.11)
    with_memory(monkeypatch, gibibytes=0.01)
    with pytest.raises(ModelError, match="use a machine with more memory"):
        check_fits("r2-small", None)


def test_what_other_processes_hold_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    total = host_memory().total_bytes
    assert host_memory().used_bytes <= taken_memory_bytes() < total
    check_fits("r2-nano", None)
    monkeypatch.setattr(fitting, "taken_memory_bytes", lambda: total - 2**30)
    with pytest.raises(ModelError, match="beside what is in use, has 1.0 GiB"):
        check_fits("r2-nano", None)


def with_memory(patch: pytest.MonkeyPatch, *, gibibytes: float) -> None:
    patch.setattr(fitting, "host_memory", lambda: Memory(2**40, 2**40 - int(gibibytes * 2**30), 0))


@pytest.mark.slow
def test_a_model_that_does_not_fit_says_how_much_memory_is_missing(tmp_path: Path) -> None:
    done = beringia(
        "qualify", "emulated:h800", "--model", "deepseek-v3", "--dtype", "bfloat16", "--out", str(tmp_path / "out")
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (sentence,) = done.stderr.strip().splitlines()
    assert "deepseek-v3 needs" in sentence and "GiB are missing" in sentence
    assert not (tmp_path / "out").exists()


# ---- where it is started


@pytest.mark.slow
def test_a_folder_named_beringia_where_it_is_started_stops_no_process_of_a_qualification(tmp_path: Path) -> None:
    """The reference's, the candidate's, and those of indices and collectives."""
    (tmp_path / "beringia").mkdir()
    (tmp_path / "beringia" / "__init__.py").write_text("raise SystemExit(7)")
    script = (
        "import os, beringia, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_qualify_run import small\n"
        "from beringia.qualify.qualification import qualify\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "found = qualify(small(batches=1, steps=1, collectives=True))\n"
        "print(sorted({probe.probe for probe in found.probes}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "collectives" in done.stdout and "operators" in done.stdout and "arithmetic" in done.stdout


# ---- through the command line, with everything

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`beringia` with its key in a directory of its own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return beringia


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `beringia reference` records of the CPU for r2-nano."""
    path = tmp_path_factory.mktemp("reference") / "nano.bundle"
    done = beringia("reference", "cpu", "--model", "r2-nano", "--dtype", "bfloat16", "--out", str(path), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    manifest = read_manifest(path)
    assert told["bundle"] == str(path) and told["bytes"] == path.stat().st_size < 64 * 2**20
    assert (told["calls"], told["calls_left_out"]) == (len(manifest.calls), 0) and told["calls"] > 300
    return path


def against(bundle: Path) -> tuple[str, ...]:
    """The options by which another machine's bundle is read."""
    with zipfile.ZipFile(bundle) as archive:
        return "--against", str(bundle), "--trusted-key", json.loads(archive.read("manifest.json"))["public_key"]


@pytest.mark.slow
def test_a_sound_chip_gets_a_signed_certificate_to_train(run: Run, tmp_path: Path) -> None:
    done = run("qualify", "emulated:h800", "--model", "r2-nano", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    stem = tmp_path / "emulated-h800-r2-nano"
    assert done.stdout.strip().endswith(f"{stem}.html")
    assert stem.with_suffix(".html").exists() and stem.with_suffix(".xml").exists()
    checked = run("verify", f"{stem}.json", "--json")
    assert checked.returncode == 0, checked.stdout
    says = json.loads(checked.stdout)
    assert (says["verdict"], says["chip"], says["model"]) == ("train", "emulated:h800", "r2-nano")
    found = json.loads(stem.with_suffix(".json").read_text())["certificate"]
    kinds = {probe["probe"] for probe in found["probes"]}
    assert kinds >= {"arithmetic", "operators", "lockstep", "replay", "lengths", "memory", "collectives"}
    altered = stem.with_suffix(".json").read_text().replace("emulated:h800", "emulated:h200")
    (tmp_path / "altered.json").write_text(altered)
    assert run("verify", str(tmp_path / "altered.json")).returncode != 0


def answer(done: Any) -> tuple[dict[str, Any], Certificate]:
    """The one JSON object on standard output, and the certificate in it."""
    (line,) = done.stdout.strip().splitlines()
    document = json.loads(line)
    return document, Certificate.model_validate(document["certificate"], strict=False)


@pytest.mark.slow
def test_a_wrong_backward_of_attention_leaves_inference_and_is_named_with_and_without_a_bundle(
    run: Run, bundle: Path, tmp_path: Path
) -> None:
    faults = script(tmp_path, ATTENTION_BACKWARD)
    asked = ("qualify", "emulated:h800", "--model", "r2-nano", "--faults", faults, "--out", str(tmp_path), "--json")
    with_bundle = run(*asked, *against(bundle))
    assert with_bundle.returncode == 3, with_bundle.stderr
    _, found = answer(with_bundle)
    assert found.bundle is not None and found.bundle.public_key in against(bundle)
    assert [probe.subject for probe in found.probes if probe.probe == "reference"] == ["computed again here"]
    assert found.verdict == "infer" and found.first_wrong is not None
    first = found.first_wrong.check
    assert "attention" in first.operator and "backward" in first.operator and first.direction == "backward"
    assert first.module.endswith("self_attn") and first.wrong_from[-2] == 16
    assert any(word.startswith("a mask or a length") for word in found.first_wrong.consistent_with)
    assert any(first.operator in reason for reason in found.reasons)
    assert {p.subject for p in found.probes if p.outcome == "failed" and p.rules_out == "infer"} == set()

    without = run(*asked, "--for", "infer")
    assert without.returncode == 0, "fit to serve"
    _, other = answer(without)
    assert other.verdict == found.verdict and other.first_wrong is not None
    assert other.first_wrong.check.name == first.name
    assert other.first_wrong.consistent_with == found.first_wrong.consistent_with


@pytest.mark.slow
def test_a_mask_that_is_ignored_makes_a_chip_unfit_for_both_uses(run: Run, bundle: Path, tmp_path: Path) -> None:
    faults = script(tmp_path, 'summary = "mask"\n[[faults]]\nkind = "mask-ignored"\nlength = 16\n')
    asked = ("qualify", "emulated:h800", "--model", "r2-nano", *against(bundle), "--faults", faults)
    done = run(*asked, "--out", str(tmp_path), "--for", "infer", "--json")
    assert done.returncode == 3, done.stderr
    _, found = answer(done)
    assert found.verdict == "unfit" and found.first_wrong is not None
    assert found.first_wrong.check.direction == "forward" and "attention" in found.first_wrong.check.operator


@pytest.mark.slow
def test_collectives_are_tried_on_as_many_ranks_as_are_asked_for_and_more_are_not_claimed(
    run: Run, tmp_path: Path
) -> None:
    asked = ("qualify", "cpu", "--model", "r2-nano", "--layers", "1", "--ranks", "3", "--out", str(tmp_path), "--json")
    _, found = answer(run(*asked))
    sums = next(probe for probe in found.probes if probe.subject == "all-reduce, float32")
    assert (sums.outcome, "on 3 ranks" in sums.summary) == ("passed", True)
    assert "collectives on more than 3 ranks" in found.untried


@pytest.mark.slow
def test_only_some_layers_are_another_model_with_fewer_operators(run: Run, tmp_path: Path) -> None:
    asked = ("qualify", "emulated:h800", "--model", "r2-nano", "--layers", "1", "--batches", "4", "--memory", "1")
    done = run(*asked, "--out", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    document, found = answer(done)
    assert found.verdict == "train" and set(document) == {"certificate", "page", "junit"}
    layers = {check.module.split(".")[2] for check in found.operators if check.module.startswith("model.layers.")}
    assert layers == {"0", "1"}, "the first layer, and the multi-token one"


@pytest.mark.slow
def test_load_and_rates_are_in_the_certificate_if_they_were_asked_for(small_bundle: Path) -> None:
    found = qualify(small(soak_seconds=1.0, speed=True, collectives=True), small_bundle)
    (soak,) = (probe for probe in found.probes if probe.probe == "soak")
    assert (soak.outcome, soak.rules_out) == ("passed", "train")
    speeds = {probe.subject: probe for probe in found.probes if probe.probe == "speed"}
    assert {"products of bfloat16", "copies on the device", "all-reduce of 64 MiB, 2 ranks"} < set(speeds)
    assert {(probe.outcome, probe.rules_out) for probe in speeds.values()} == {("told", "neither")}


@pytest.mark.slow
def test_more_layers_than_the_model_has_are_refused(run: Run, tmp_path: Path) -> None:
    done = run("qualify", "emulated:h800", "--model", "r2-nano", "--layers", "9", "--out", str(tmp_path), "--json")
    assert done.returncode == 2
    told = json.loads(done.stdout)
    assert told["error"] == "ModelError" and "--layers 9" in told["message"] and "3" in told["message"]


# ---- references that are none


@pytest.mark.slow
def test_a_reference_that_is_not_sound_is_refused_with_3_in_one_sentence(tmp_path: Path) -> None:
    order = small().order("reference", tmp_path / "x.bundle")
    order = order.model_copy(update={"faults": script(tmp_path, ATTENTION_BACKWARD)})
    with pytest.raises(Refusal, match=r"is not sound: .*attention.*\(backward") as refused:
        gather(order, Command("the reference"), tmp_path / "log")
    assert refused.value.exit_code == 3 and "\n" not in str(refused.value)
    assert not (tmp_path / "x.bundle").exists()


# ---- chips that fail while they are probed


@pytest.mark.slow
def test_a_chip_that_hangs_is_unfit_and_the_probe_is_named(small_bundle: Path, tmp_path: Path) -> None:
    faults = script(tmp_path, 'summary = "hang"\n[[faults]]\nkind = "hang"\nat_step = 2\noperator = 5\n')
    found = qualify(small(faults=faults, patience_seconds=60.0), small_bundle)
    assert found.verdict == "unfit"
    (failure,) = (probe for probe in found.probes if probe.outcome == "failed")
    assert (
        failure.summary.startswith("while probing operators")
        and "waited for in vain (its work, 60 s)" in failure.summary
    )
    assert {probe.probe for probe in found.probes} == {"arithmetic", "operators"}


@pytest.mark.slow
def test_a_chip_whose_process_dies_is_unfit_and_what_was_seen_before_is_kept(small_bundle: Path) -> None:
    def kill(word: str) -> None:
        if word == "lockstep":
            worker = worker_of(os.getpid())
            assert worker is not None
            assert b"beringia.qualify.worker" in Path(f"/proc/{worker}/cmdline").read_bytes()
            os.kill(worker, signal.SIGKILL)

    found = qualify(small(longest=8200), small_bundle, kill)
    assert found.verdict == "unfit"
    (failure,) = (probe for probe in found.probes if probe.outcome == "failed")
    assert "the process of the chip was lost (signal SIGKILL)" in failure.summary and failure.rules_out == "infer"
    assert len(found.operators) > 100 and any(probe.subject == "forward" for probe in found.probes)


@pytest.mark.slow
def test_a_chip_that_reports_an_error_is_unfit_with_the_vendors_words(small_bundle: Path, tmp_path: Path) -> None:
    faults = script(
        tmp_path, 'summary = "lost"\n[[faults]]\nkind = "exception"\nat_step = 1\ncode = "HBM MULTI BIT ECC ERROR"\n'
    )
    found = qualify(replace(small("emulated:ascend-910b"), faults=faults), small_bundle)
    assert found.verdict == "unfit"
    (failure,) = (probe for probe in found.probes if probe.outcome == "failed")
    assert failure.summary.startswith("while probing operators") and "HBM MULTI BIT ECC ERROR" in failure.summary


@pytest.mark.slow
def test_one_batch_proves_nothing_and_condemns_nothing(tmp_path: Path) -> None:
    path = tmp_path / "one.bundle"
    record_reference(small("cpu", batches=1, steps=1), path, DEFAULT_LIMIT_BYTES)
    found = qualify(small(), path)
    assert found.verdict == "inconclusive" and found.power == 0.0
    assert not [probe for probe in found.probes if probe.outcome == "failed"]
    assert any("more batches" in reason for reason in found.reasons)


@pytest.mark.slow
def test_what_only_the_user_can_mend_is_an_error_and_no_finding(small_bundle: Path) -> None:
    with pytest.raises(InputError, match="faults|script|fault"):
        qualify(small(faults="/nowhere/faults.toml"), small_bundle)
    with pytest.raises(InputError, match="emulated:nothing|nothing"):
        qualify(small("emulated:nothing"), small_bundle)
