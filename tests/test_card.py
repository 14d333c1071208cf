"""The card script on the CPU, so that it is never found broken on a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from benchmarks.card.__main__ import ROOT, run_within
from benchmarks.card.parts import PARTS, TOTAL_SECONDS
from benchmarks.card.site import NEVER, SERVER, requirements
from benchmarks.work_of_a_token import training_operations, weights_read
from beringia.chips.arithmetic.profile import PROFILES, read_profile
from beringia.model import load_model


def card(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make card` to its end."""
    return subprocess.run(
        ["make", "--no-print-directory", "card", f"PYTHON={sys.executable}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def runner(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What `make card` calls."""
    command = [sys.executable, "-m", "benchmarks.card", "--size", "small", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def record(out: Path, part: str) -> Any:
    return json.loads((out / f"{part}.json").read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all parts left their records."""
    out = tmp_path_factory.mktemp("card") / "out"
    done = card("CHIP=cpu", f"OUT={out}")
    assert done.returncode == 0, done.stderr
    return out


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1900)]


def test_every_part_is_done_and_says_on_what(measured: Path) -> None:
    for part in PARTS:
        found = record(measured, part.name)
        assert (found["part"], found["chip"], found["size"], found["state"]) == (part.name, "cpu", "small", "done")
        assert found["error"] == "" and found["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert sorted(path.name for path in measured.iterdir()) == sorted(f"{part.name}.json" for part in PARTS)


def test_the_parts_fit_into_eight_minutes() -> None:
    assert sum(part.seconds for part in PARTS) <= TOTAL_SECONDS == 8 * 60


def test_the_cards_tests_ran_and_passed(measured: Path) -> None:
    found = record(measured, "tests")
    assert found["holds"] == {"tests": True}
    passed = found["found"]["passed"]
    assert "tests.test_chip_paths::test_the_engine_answers_as_on_the_cpu[cpu]" in passed
    assert "tests.test_chip_cuda::test_nvidia_smi_s_list_is_read" in passed
    assert found["found"]["failure"] == found["found"]["error"] == {}


def test_the_cpu_is_in_no_catalogue_and_is_compared_with_itself(measured: Path, tmp_path: Path) -> None:
    found = record(measured, "profile")["found"]
    assert "in no catalogue" in found["compared_with"] and found["identity"]["vendor"] == "cpu"
    assert "No float32 results of bfloat16 operands" in found["formats"]["bfloat16"]["not_compared"]
    assert set(found["formats"]["float32"]["differ"]) == {"normal", "wide range", "near subnormal"}
    path = tmp_path / "measured.toml"
    path.write_text(found["profile_toml"])
    assert "units.bfloat16" in read_profile(str(path)).assumed()


def test_qualification_says_train(measured: Path) -> None:
    found = record(measured, "qualify")
    assert found["found"]["verdict"] == "train" and found["holds"]["verdict"]
    assert found["found"]["model"] == "r2-nano" and found["found"]["peak_bytes"] > 2**27


def test_a_run_crosses_from_an_emulated_chip_with_the_same_state(measured: Path) -> None:
    found = record(measured, "crossing")
    assert found["holds"] == {"same state on cpu": True, "canary on cpu": True}
    crossing = found["found"]["cpu"]
    assert crossing["from"] == "emulated:h800" and 0 < crossing["at_step"] <= 45
    assert crossing["state_hash_before"] == crossing["state_hash_after"] and len(crossing["state_hash_after"]) == 64
    assert 0 < crossing["canary_difference"] <= crossing["canary_band"]


def test_both_sides_train_the_same_model(measured: Path) -> None:
    found = record(measured, "training")
    assert found["holds"] == {"first losses": True} and found["found"]["broken"] == {}
    assert set(found["found"]["ready"]) == {"ours compiled", "transformers eager", "transformers grouped_mm"}
    share = found["found"]["share_of_peak"]
    speed = found["found"]["tokens_a_second"]["ours compiled"]["median"]
    rate = share["sides"]["ours compiled"]["operations_a_second"]
    assert rate == pytest.approx(speed * share["operations_of_a_token"], rel=1e-6)
    assert share["sides"]["ours compiled"]["of_datasheet"] is None


def test_the_engine_answers_one_request_and_several_as_transformers_does(measured: Path) -> None:
    found = record(measured, "engine")
    assert found["holds"] == {"same answers, 1": True, "same answers, 4": True}
    for requests in (1, 4):
        one = found["found"][f"requests {requests}"]
        assert one["tokens_a_second"]["ours"]["median"] > 0 and one["ours_to"]["transformers"]["median"] > 0
        assert 0 < one["bandwidth"]["share"] < 1 and one["bandwidth"]["share_of_datasheet"] is None


def test_the_guards_cost_is_told_and_judged_only_from_enough_steps(measured: Path) -> None:
    found = record(measured, "guard")
    assert found["found"]["own_account"]["mean"] > 0 and found["found"]["preset"] == "r2-nano"
    assert found["found"]["judged"] is False and found["holds"] == {}


def test_only_one_part_is_repeated_and_the_others_are_left_alone(measured: Path) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in measured.iterdir()}
    done = card("CHIP=cpu", f"OUT={measured}", "PARTS=profile")
    assert done.returncode == 0, done.stderr
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in measured.iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["profile.json"]


def test_a_part_that_fails_says_why_and_the_others_run(tmp_path: Path) -> None:
    done = runner("--chip", "cdua", "--out", str(tmp_path), "--only", "profile", "--only", "tests")
    assert done.returncode == 1
    failed = record(tmp_path, "profile")
    assert failed["state"] == "failed" and "There is no chip called 'cdua'. Did you mean 'cuda'?" in failed["error"]
    assert record(tmp_path, "tests")["state"] == "done"
    assert "profile   failed" in done.stderr and "tests     done" in done.stderr


def test_what_the_time_does_not_suffice_for_is_not_run_and_named(tmp_path: Path) -> None:
    done = runner("--chip", "cpu", "--out", str(tmp_path), "--limit", "3", "--json")
    assert done.returncode == 1 and list(tmp_path.iterdir()) == []
    assert json.loads(done.stdout)["parts"] == {part.name: "not run" for part in PARTS}
    assert "guard     not run" in done.stderr


def test_the_catalogues_unit_makes_every_bit_of_its_chip_and_another_is_told_from_it(tmp_path: Path) -> None:
    """The exact fidelity is a chip whose catalogue's profile is true; a changed unit under its name is not."""
    found = {}
    other = read_profile("h800").model_dump(mode="json", exclude_none=True)
    other["units"]["bfloat16"]["fraction_bits"] = 24
    path = tmp_path / "other.toml"
    path.write_text(tomli_w.dumps(other))
    for name in (PROFILES / "h800.toml", path):
        out = tmp_path / name.stem
        assert card(f"CHIP=emulated:{name}@exact", f"OUT={out}", "PARTS=profile").returncode == 0
        found[name.stem] = record(out, "profile")
    assert found["h800"]["found"]["compared_with"] == found["other"]["found"]["compared_with"] == "h800"
    assert found["h800"]["holds"] == dict.fromkeys(
        ("float32", "bfloat16", "float16", "float8_e4m3", "float8_e5m2"), True
    )
    assert found["h800"]["found"]["facts_that_differ"] == {}
    assert [name for name, held in found["other"]["holds"].items() if not held] == ["bfloat16"]
    bfloat16 = found["other"]["found"]["formats"]["bfloat16"]
    assert bfloat16["differ"]["normal"] > 0 and bfloat16["first"]["found"] != bfloat16["first"]["wanted"]
    assert len(bfloat16["first"]["left"]) == bfloat16["first"]["terms"] == 64
    assert found["other"]["found"]["facts_that_differ"] == {"bfloat16.fraction_bits": [24, 25]}


def test_a_process_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"import subprocess, time; open({str(child)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))\n"
    ended = run_within([sys.executable, "-c", code + "print('said', flush=True); time.sleep(60)"], 5, dict(os.environ))
    assert ended.status is None and ended.said == "said\n"
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child.read_text()}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child.read_text()}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child.read_text()}").exists()


def test_a_process_that_is_killed_says_by_what() -> None:
    ended = run_within([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 60, dict(os.environ))
    assert ended.status == -9


def test_what_is_carried_is_what_the_project_needs_less_what_the_machine_has() -> None:
    names = [line.split(">")[0] for line in requirements(["scipy", "transformers"])]
    assert {"pydantic", "typer", "cryptography", "tokenizers", "pytest"} <= set(names)
    assert not {*NEVER, *SERVER, "scipy", "transformers"} & set(names)


def test_a_tokens_work_is_that_of_the_weights_it_meets() -> None:
    decoder = load_model("r2-micro")
    active = weights_read(decoder)
    whole = weights_read(decoder, rows=10_000)
    routed = sum(p.numel() for layer in decoder.layers[1:] for p in layer.mlp.experts.parameters())
    assert whole - active == pytest.approx(routed * (1 - 2 / 8))
    # By hand: three layers' attention, one dense block, two routers with 2 of 8 experts and the shared one, the head.
    assert active == 3 * 266_240 + 98_304 + 2 * (1_024 + 196_608 * 2 / 8 + 24_576) + 6_912
    # 3 layers of 4 heads, keys 128 and values 64 wide, 3 passes.
    assert training_operations(decoder, 100) - 6 * active == 3 * 3 * 4 * (128 + 64) * 100
