"""The campaign's story on machines that are really apart. Prints one JSON object.

    python benchmarks/two_machines.py --json [--python .venv-torch-2.10/bin/python] [--recipe recipes/r2-nano.toml]

Each chip has a machine of its own (a mount namespace with a file system that no other process sees, behind a launch
prefix), with an interpreter of its own; `--python` is that of the second chip, for instance one with another torch
(`make second-torch`). The starter sees none of their files, they see none of its.

Must hold: the whole story passes (qualification with index and collective probes, training, a rollback, the crossing,
answering), with state hashes equal at the crossing; and the same with kills on either side: the second chip's worker is
killed twice, the supervisor once, and no step that a trusted checkpoint held is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from machines import Machine  # noqa: E402

from beringia.history.fold import Fold  # noqa: E402
from beringia.machine.threads import usable_cores  # noqa: E402
from beringia.records.events import LEARNER, AnyEvent, parse_event  # noqa: E402
from beringia.records.jsonl import read_lines  # noqa: E402

KILLS = (("worker", 30), ("supervisor", 60), ("worker", 90))
"""Who is killed once so many steps were told of."""


def events(run: Path) -> list[AnyEvent]:
    return [parse_event(line) for _, line in read_lines(run / "events.jsonl")]


def measure(recipe: Path, second_python: str | None, ranks: int, kill: bool) -> dict[str, Any]:
    """One story."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        home = directory / "home"
        pythons = {"first-lot": None, "second-lot": second_python, "fallback": None}
        machines: dict[str, Machine] = {}
        try:
            for label, python in pythons.items():
                machines[label] = Machine(directory / label, hides=home, mebibytes=1024, python=python)
            return told(home / "run", carried(recipe, home / "run", machines, ranks, kill), machines)
        finally:
            for machine in machines.values():
                machine.close()


def carried(recipe: Path, run: Path, machines: dict[str, Machine], ranks: int, kill: bool) -> float:
    """The campaign to its end, perhaps with kills; the seconds it took."""
    command = [sys.executable, "-m", "beringia", "campaign", str(recipe), "--out", str(run), "--json"]
    for label, machine in machines.items():
        for key, value in machine.chip.items():
            command += ["--set", f"chips.{label}.{key}={json.dumps(value)}"]
    command += ["--set", f"chips.second-lot.ranks={ranks}"]
    started = time.perf_counter()
    left = list(KILLS) if kill else []
    log = run.parent / "campaign.log"
    while True:
        with open(log, "ab") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
            while process.poll() is None:
                time.sleep(0.2)
                steps = sum(event.kind == "step" for event in events(run)) if (run / "events.jsonl").exists() else 0
                if left and steps >= left[0][1]:
                    end(left.pop(0)[0], process, machines)
        if process.returncode == 0:
            return time.perf_counter() - started
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"The campaign ended with {process.returncode}: {log.read_text()[-2000:]}")


def end(whom: str, supervisor: subprocess.Popen[bytes], machines: dict[str, Machine]) -> None:
    """Kill the supervisor, or the worker that trains on any of the machines."""
    if whom == "supervisor":
        supervisor.kill()
        supervisor.wait()
        return
    pythons = {machine.python.encode() for machine in machines.values()}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0] in pythons and b"beringia.train.worker" in words:
                os.kill(int(entry.name), signal.SIGKILL)


def told(run: Path, seconds: float, machines: dict[str, Machine]) -> dict[str, Any]:
    """What the run's record says."""
    happened = events(run)
    crossing = next(event for event in happened if event.kind == "crossing")
    verdicts = {event.chip: event.verdict for event in happened if event.kind == "qualified"}
    finish = [event for event in happened if event.kind == "finish"][-1]
    opened = {event.chip: event.identity.torch for event in happened if event.kind == "chip"}
    answers = next((event for event in happened if event.kind == "answers"), None)
    probes = {}
    for label in machines:
        signed = json.loads((run / "certificates" / f"{label}.json").read_text())
        found = signed.get("certificate", signed.get("record", {}))["probes"]
        probes[label] = {
            "indices": sum(one["subject"].startswith("indices") for one in found),
            "collectives": sum(one["probe"] == "collectives" for one in found),
        }
    faults = [event.code for event in happened if event.kind == "fault"]
    holds = {
        "nothing trusted was lost": goes_on_from_what_is_trusted(happened),
        "done": finish.status == "done",
        "first lot refused": verdicts["first-lot"] == "infer",
        "crossed with equal state": crossing.state_hash_before == crossing.state_hash_after != "",
        "answered": answers is not None,
        "no root sees another": not any(machine.sees(run) for machine in machines.values()),
    }
    return {
        "seconds": seconds,
        "verdicts": verdicts,
        "probes": probes,
        "torch": opened,
        "decisions": [event.action for event in happened if event.kind == "decision"],
        "faults": faults,
        "accuracy": None if answers is None else answers.accuracy,
        "logprob_difference": None if answers is None else answers.mean_logprob_difference,
        "holds": holds,
    }


def goes_on_from_what_is_trusted(happened: list[AnyEvent]) -> bool:
    """No decision about training went back behind a checkpoint that was trusted then."""
    fold = Fold()
    for event in happened:
        decided = event.kind == "decision" and event.role == LEARNER and event.action != "stop"
        if decided and (event.to_step or 0) < (fold.situation().newest_trusted or 0):
            return False
        fold.add(event)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/r2-nano.toml"))
    parser.add_argument("--python", default=None, help="of the second chip")
    parser.add_argument("--ranks", type=int, default=1, help="of the second chip; with more its collectives are probed")
    parser.add_argument("--no-kills", action="store_true", help="only the story without kills")
    options = parser.parse_args()
    # Not resolved: a venv's interpreter is a link, and is known by its place.
    python = None if options.python is None else str(Path(options.python).absolute())
    result: dict[str, Any] = {
        "benchmark": "two-machines",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {usable_cores()} cores",
        "story": measure(options.recipe, python, options.ranks, kill=False),
    }
    if not options.no_kills:
        result["with_kills"] = measure(options.recipe, python, options.ranks, kill=True)
    print(json.dumps(result, indent=None if options.json else 2))
    stories = [result["story"], *([result["with_kills"]] if "with_kills" in result else [])]
    sys.exit(0 if all(all(story["holds"].values()) for story in stories) else 1)


if __name__ == "__main__":
    main()
