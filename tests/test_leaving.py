"""A command that a signal ends leaves no process and no file, and says by its exit code which signal that was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import events, of_kind, small_recipe, start, write_recipe
from waiting import until

from beringia.machine.aside import remove_abandoned

STOPS = [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
IMPORTS = """
from beringia.processes.leaving import leaving_on_signals
with leaving_on_signals():
    try:
        import slow
        while True:
            pass
    finally:
        print("cleaned up after", slow.__doc__)
"""
SLOW = """'a whole import'
import os, time
print("imports", flush=True)
while not os.path.exists("asked"):
    time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell has what it starts in the background ignore SIGINT, and `nohup` SIGHUP; children inherit that."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number, _ in STOPS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_what_is_being_imported_is_imported_first(number: signal.Signals, code: int, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "-c", IMPORTS]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "imports\n"
        process.send_signal(number)
        (tmp_path / "asked").touch()
        said, errors = process.communicate()
    assert (process.returncode, said, errors) == (code, "cleaned up after a whole import\n", "")


def test_what_is_to_be_ignored_is(tmp_path: Path) -> None:
    """As `nohup` has it."""
    ignoring = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    works = "with leaving_on_signals():\n    signal.raise_signal(signal.SIGHUP)\n    print('goes on')"
    code = f"{ignoring}from beringia.processes.leaving import leaving_on_signals\n{works}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [*STOPS, (signal.SIGKILL, -signal.SIGKILL)])
def test_a_qualification_that_is_ended_leaves_no_process_and_no_file(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "beringia", "qualify", "cpu", "--model", "r2-nano", "--layers", "1", "--out", "c"]
    environment = os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "operators" in line or "Traceback" in line)
        assert "Traceback" not in said
        children = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert children
        process.send_signal(number)
        rest = process.stderr.read()  # to the end: children that have it open are gone, too
    assert process.returncode == code, rest
    assert "Traceback" not in rest
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), "its children are gone")
    assert not (tmp_path / "c").exists()
    if number == signal.SIGKILL:
        remove_abandoned(scratch / "beringia")  # as the next command does
    assert [path.name for path in scratch.iterdir() if path.name.startswith(".beringia")] == []


@pytest.mark.slow
def test_a_terminal_that_goes_stops_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", write_recipe(tmp_path, small_recipe(train={"steps": 4000}))
    with start("train", str(recipe), "--out", str(run)) as process:
        until(lambda: (run / "events.jsonl").exists() and len(of_kind(run, "step")) >= 13, "step 13")
        process.send_signal(signal.SIGHUP)
    assert process.returncode == 129
    assert of_kind(run, "checkpoint")[-1].step == of_kind(run, "step")[-1].step
    assert [(event.status, event.signal) for event in of_kind(run, "finish")] == [("stopped", 1)], events(run)[-3:]
