"""Work of a far end for tests: does what its document says, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from beringia.errors import error_of
from beringia.processes.far_end import FarEnd
from beringia.processes.protocol import Ended
from beringia.records.record import Record


class Errand(Record):
    """What to do, step by step: `[["say", "a"], ["sleep", 3600]]`."""

    steps: list[list[Any]]


class Said(Record):
    """A line."""

    text: str


def work(document: dict[str, Any], far_end: FarEnd) -> Ended:
    for verb, *arguments in document["steps"]:
        if verb == "say":
            far_end.channel.line(Said(text=str(arguments[0])))
        elif verb == "print":
            print(arguments[0], flush=True)
        elif verb == "complain":
            print(arguments[0], file=sys.stderr, flush=True)
        elif verb == "sleep":
            time.sleep(arguments[0])
        elif verb == "exit":
            os._exit(arguments[0])
        elif verb == "raise":
            raise error_of(arguments[0])(*arguments[1:])
        elif verb == "break":
            raise ValueError(arguments[0])
        elif verb == "spawn":  # in a session of its own, as torchrun starts its ranks
            code = "import time; time.sleep(3600)"
            child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
            far_end.channel.line(Said(text=str(child.pid)))
        elif verb == "variable":
            far_end.channel.line(Said(text=os.environ.get(arguments[0], "none")))
        elif verb == "write":
            assert far_end.root is not None
            (far_end.root / arguments[0]).write_text(arguments[1])
        elif verb == "wait-for-go":
            far_end.channel.go.wait()
            far_end.channel.line(Said(text="go"))
    return Ended(why="done")
