"""One part, in this process: measures it and writes its record. Started by `__main__.py`.

python -m benchmarks.card.run_part PART CHIP SIZE FILE
"""

from __future__ import annotations

import importlib
import platform
import sys
import time
import traceback
from pathlib import Path

import beringia  # noqa: F401  # sets the threads before torch loads

# isort: split
import torch

from benchmarks.card.parts import PartRecord, Size
from beringia.errors import BeringiaError
from beringia.machine.threads import usable_cores
from beringia.records.files import write_text


def run(part: str, chip: str, size: Size) -> PartRecord:
    """Measure; whatever goes wrong becomes part of the record."""
    began = time.perf_counter()
    found, holds, error = {}, {}, ""
    try:
        found, holds = importlib.import_module(f"benchmarks.card.{part}").measure(chip, size)
    except BeringiaError as problem:
        error = str(problem)
    except (Exception, SystemExit):  # the record is the only witness of what happened on that machine
        error = traceback.format_exc()
    return PartRecord(
        part=part,
        chip=chip,
        size=size,
        state="failed" if error else "done",
        date=time.strftime("%Y-%m-%d"),
        seconds=time.perf_counter() - began,
        machine=machine(),
        found=found,
        holds=holds,
        error=error,
    )


def machine() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "architecture": platform.machine(),
        "cores": str(usable_cores()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    part, chip, size, file = sys.argv[1:]
    record = run(part, chip, "full" if size == "full" else "small")
    write_text(Path(file), record.model_dump_json(indent=2) + "\n")
    sys.exit(0 if record.state == "done" else 1)


if __name__ == "__main__":
    main()
