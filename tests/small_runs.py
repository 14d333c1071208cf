"""Small real runs for tests of training and supervision: recipes, the command line, what a run leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from beringia.records.events import AnyEvent, parse_event
from beringia.records.jsonl import read_lines

SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "model": {"preset": "r2-nano"},
    "chips": {"first": {"use": "cpu"}},
    "data": {"task": "digit-sum", "digits": 4, "sequence_length": 24},
    "train": {
        "prefer": ["first"],
        "steps": 60,
        "batch": 4,
        "warmup_steps": 2,
        "checkpoint_every": 20,
        "evaluate_every": 1000,
        "evaluation_sequences": 4,
        "accuracy_samples": 0,
    },
    "guard": {"share": 0.2},
    "qualify": {"unqualified": "allow"},
}


def small_recipe(**sections: Any) -> dict[str, Any]:
    """The small recipe with some sections changed: `train={"steps": 20}` keeps the other keys of train."""
    document = json.loads(json.dumps(SMALL))
    for name, change in sections.items():
        if isinstance(change, dict) and name != "chips":
            document.setdefault(name, {}).update(change)
        else:
            document[name] = change
    return document


def write_recipe(directory: Path, document: dict[str, Any]) -> Path:
    """The recipe as a TOML file in `directory`."""
    path = directory / f"{document['name']}.toml"
    path.write_text("\n".join(_toml(document, ())) + "\n")
    return path


def _toml(table: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [f"[{'.'.join(path)}]"] if path else []
    lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _toml(value, (*path, key))
    return lines


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`beringia` with these arguments, in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "beringia", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def first_rank_tells_slowly(place: Path) -> dict[str, str]:
    """An environment in which the first of several ranks is slow to tell of what takes long, as on a busy machine.
    `place`: a directory of its own."""
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import os, time\n"
        "if os.environ.get('RANK') == '0':\n"
        "    from beringia.train.reporting import Reporting\n"
        "    tell = Reporting.event\n"
        "    def slowly(self, event):\n"
        "        if event.kind in ('checkpoint', 'evaluation', 'canary'):\n"
        "            time.sleep(1)\n"
        "        tell(self, event)\n"
        "    Reporting.event = slowly\n"
    )
    return {"PYTHONPATH": f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def beringia(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`beringia` with these arguments, to its end."""
    with start(*arguments, **environment) as process:
        output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def worker_of(supervisor: int) -> int | None:
    """Process number of the worker, found among the supervisor's children."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children")
    numbers = children.read_text().split() if children.exists() else []
    return int(numbers[0]) if numbers else None


def gone(process: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def events(run: Path) -> list[AnyEvent]:
    """All events of a run directory."""
    return [parse_event(line) for _, line in read_lines(run / "events.jsonl")]


def of_kind(run: Path, kind: str) -> list[Any]:
    """The events of one kind."""
    return [event for event in events(run) if event.kind == kind]


def final_hash(run: Path) -> str:
    """State hash of the newest checkpoint, from its manifest."""
    newest = max((run / "checkpoints").glob("step-*"))
    return str(json.loads((newest / "manifest.json").read_text())["state_hash"])
