"""Whether two machines come to what one machine comes to. Prints one JSON object.

    python benchmarks/qualify_two_machines.py --json [--cases 20 --store FILE]

For defects of the detection benchmark's test half: the command with a bundle that `beringia reference` made before, as
it is copied between machines, signed with another machine's key, and the command without one. Must hold: the same
verdict and the same first operator.
Results go to the store one by one, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qualify_cases import Case, cases

from beringia.machine.threads import usable_cores


def chosen(count: int) -> list[Case]:
    """One severe defect of each kind, until there are enough."""
    severe = [case for case in cases("test", 1) if case.strength == "severe"]
    return severe[:count]


def command(*arguments: str) -> dict[str, Any]:
    """What the command answers. Its progress goes to standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "beringia", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def outcome(case: Case, script: str, out: Path, *against: str) -> tuple[str, str | None]:
    """Verdict and first operator."""
    answer = command(
        *("qualify", case.chip, "--model", "r2-nano", "--seed", str(case.world), "--faults", script),
        *("--out", str(out), "--memory", "0", *against),
    )["certificate"]
    first = answer["first_wrong"]
    place = None if first is None else first["check"]
    named = None if place is None else f"{place['module']}|{place['operator']}|{place['direction']}|{place['ordinal']}"
    return answer["verdict"], named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--store", type=Path, default=Path("two-machines.jsonl"))
    options = parser.parse_args()
    lines = options.store.read_text().splitlines() if options.store.exists() else []
    rows = {row["case"]: row for row in map(json.loads, lines)}
    with tempfile.TemporaryDirectory() as name:
        directory, signer = Path(name), ""
        for case in chosen(options.cases):
            if case.name in rows:
                continue
            bundle = directory / f"{case.world}.bundle"
            if not bundle.exists():
                signer = command(
                    *("reference", "cpu", "--model", "r2-nano", "--seed", str(case.world), "--dtype", "bfloat16"),
                    *("--out", str(bundle), "--key", str(directory / "another-machine.pem")),
                )["public_key"]
            script = case.write(directory)
            two = outcome(case, script, directory / "out", "--against", str(bundle), "--trusted-key", signer)
            one = outcome(case, script, directory / "out")
            rows[case.name] = {"case": case.name, "one_machine": one, "two_machines": two, "same": one == two}
            with options.store.open("a") as store:
                store.write(json.dumps(rows[case.name]) + "\n")
            print(f"{case.name}: {one} {two}", file=sys.stderr, flush=True)
    document = {
        "benchmark": "qualify-two-machines",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {usable_cores()} cores",
        "cases": list(rows.values()),
        "same": sum(row["same"] for row in rows.values()),
        "of": len(rows),
        "holds": all(row["same"] for row in rows.values()),
    }
    print(json.dumps(document, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
