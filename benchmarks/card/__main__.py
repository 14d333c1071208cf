"""Run the parts one after another, each in a process of its own; say what each found, and what was not run.

    python -m benchmarks.card --chip cuda --out DIR [--only PART] [--limit SECONDS] [--json]

Every part leaves `DIR/<part>.json` when it ends, whatever becomes of the others; a part that was not run leaves the
file of an earlier run alone. A part that breaks, or takes longer than its share, is recorded as such, and the next one
starts. Exit code 1 where a part that was asked for is not done; figures that do not hold are findings, and told.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.card.parts import PARTS, TOTAL_SECONDS, Part, PartRecord, Size
from beringia.records.files import write_text

ROOT = Path(__file__).parents[2]
LIMITS: dict[Size, float] = {"full": TOTAL_SECONDS, "small": 1800.0}
"""Of all parts together. Small ones take minutes, on a machine that is busy with other work many."""
LEAST_SECONDS = 15.0
"""A part is not started with less: it would spend that on imports."""
_LAST_WORDS = 4000


@dataclass(frozen=True)
class Ended:
    """How a process came to its end."""

    status: int | None
    """Exit status; minus the signal's number; None: it was ended because its time was over."""
    said: str
    """The end of what it printed."""


def run_within(command: Sequence[str], seconds: float, environment: dict[str, str]) -> Ended:
    """Run a command to its end, or end it and all that it started."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_group(process)
        output.seek(0)
        return Ended(status, output.read()[-_LAST_WORDS:].decode(errors="replace"))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process and its children: one that broke may have left some behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run_part(part: Part, chip: str, size: Size, seconds: float, out: Path) -> PartRecord:
    """Run one part; its record is in its file afterwards in any case."""
    file = out / f"{part.name}.json"
    with tempfile.TemporaryDirectory(dir=out) as aside:
        written = Path(aside) / file.name
        command = [sys.executable, "-m", "benchmarks.card.run_part", part.name, chip, size, str(written)]
        began = time.monotonic()
        ended = run_within(command, seconds, surroundings())
        if written.exists():
            record = PartRecord.model_validate_json(written.read_text())
        else:
            record = PartRecord(
                part=part.name,
                chip=chip,
                size=size,
                state="out of time" if ended.status is None else "failed",
                date=time.strftime("%Y-%m-%d"),
                seconds=time.monotonic() - began,
                error=f"{_why(ended, seconds)}\n{ended.said}".strip(),
            )
    write_text(file, record.model_dump_json(indent=2) + "\n")
    return record


def _why(ended: Ended, seconds: float) -> str:
    if ended.status is None:
        return f"The part was ended after {seconds:.0f} s."
    if ended.status < 0:
        return f"The part's process was ended by {signal.Signals(-ended.status).name}."
    return f"The part's process ended with status {ended.status} and left no record."


def surroundings() -> dict[str, str]:
    """The environment of a part: it finds this checkout and the other benchmarks, and asks no network for anything."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run_all(parts: Sequence[Part], chip: str, size: Size, limit: float, out: Path) -> dict[str, str]:
    """Run the parts within the limit; what became of each."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit
    became = {}
    for part in parts:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            became[part.name] = "not run"
            print(f"{part.name:9} not run: {max(0.0, left):.0f} s of {limit:.0f} are left", file=sys.stderr)
            continue
        record = run_part(part, chip, size, min(part.seconds, left) if size == "full" else left, out)
        became[part.name] = record.state
        print(line_of(record), file=sys.stderr)
    return became


def line_of(record: PartRecord) -> str:
    """A part in a line."""
    head = f"{record.part:9} {record.state} in {record.seconds:.0f} s"
    if record.error:
        return f"{head}: {record.error.strip().splitlines()[-1]}"
    broken = [name for name, held in record.holds.items() if not held]
    return f"{head}, all {len(record.holds)} hold" if not broken else f"{head}; does not hold: {', '.join(broken)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="cuda", help="as `beringia chips` calls it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the parts' records")
    parser.add_argument("--only", action="append", choices=[part.name for part in PARTS], help="repeatable")
    parser.add_argument("--size", choices=("full", "small"), help="default: small on cpu and emulated chips, else full")
    parser.add_argument("--limit", type=float, help="seconds for all parts together; default 480, small 1800")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    in_software = options.chip == "cpu" or options.chip.startswith("emulated:")
    size: Size = options.size or ("small" if in_software else "full")
    parts = [part for part in PARTS if options.only is None or part.name in options.only]
    limit = LIMITS[size] if options.limit is None else options.limit
    became = run_all(parts, options.chip, size, limit, options.out.resolve())
    if options.json:
        print(json.dumps({"chip": options.chip, "size": size, "out": str(options.out), "parts": became}))
    sys.exit(0 if set(became.values()) == {"done"} else 1)


if __name__ == "__main__":
    main()
