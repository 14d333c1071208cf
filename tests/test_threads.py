"""OpenMP's settings are made before torch loads, in one place, and can be overridden."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from beringia.machine.threads import prepare_threads, usable_cores
from beringia.qualify.worker import SMALL_PARAMETERS


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


@pytest.mark.slow
def test_a_reference_for_a_small_model_is_recorded_on_one_thread_unless_the_user_set_another_number() -> None:
    code = (
        "import sys, beringia, torch\nfrom beringia.qualify import worker\nworker.usable_cores = lambda: 3\n"
        "torch.set_num_threads(int(sys.argv[1]))\nworker._settle_threads(int(sys.argv[2]))\n"
        "print(torch.get_num_threads())"
    )

    def threads(given: int, parameters: int) -> str:
        argv = [sys.executable, "-c", code, str(given), str(parameters)]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    small, large = SMALL_PARAMETERS - 1, SMALL_PARAMETERS
    assert [threads(3, small), threads(3, large), threads(2, small)] == ["1", "3", "2"]
