"""OpenMP's settings are made before torch loads, in one place, and can be overridden."""

from __future__ import annotations

import os
import subprocess
import sys

from beringia.machine.threads import prepare_threads, usable_cores


def in_a_new_process(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def test_openmp_itself_reports_passive_waiting_after_beringia_was_imported_first() -> None:
    said = in_a_new_process("import beringia, torch; torch.ones(9).sum()", OMP_DISPLAY_ENV="TRUE")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in said


def test_torch_uses_the_cores_that_this_process_may_run_on() -> None:
    assert in_a_new_process("import beringia, torch; print(torch.get_num_threads())").split() == [str(usable_cores())]


def test_what_the_user_set_stays() -> None:
    said = in_a_new_process("import beringia, torch; print(torch.get_num_threads())", OMP_NUM_THREADS="1")
    assert said.split() == ["1"]
    environment = {"OMP_WAIT_POLICY": "ACTIVE"}
    assert prepare_threads(environment)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_processes_that_share_a_machine_share_its_cores() -> None:
    assert prepare_threads({}, processes=10**6)["OMP_NUM_THREADS"] == "1"
