"""How long a crossing takes, and how far sound chips lie within the canary's band. Prints one JSON object.

    python benchmarks/crossing.py --json [--rounds 3]

Each round trains r2-nano on each of several emulated chips until a device exception that persists, and crosses to the
CPU. Must hold: from the decision to the first new step at most 2 x (the worker's imports + a verified load); the
canary apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from beringia.machine.threads import usable_cores
from beringia.records.events import AnyEvent, parse_event
from beringia.records.jsonl import read_lines

LIMIT = 2.0
CHIPS = ("ascend-910b", "h800", "mi300x")
LOST = 'summary = "lost"\n[[faults]]\nkind = "exception"\nat_step = 45\ncode = "{code}"\n'
CODES = {
    "ascend-910b": "HBM MULTI BIT ECC ERROR",
    "h800": "cudaErrorECCUncorrectable",
    "mi300x": "hipErrorECCNotCorrectable",
}
RECIPE = """
name = "crossing"
seed = {seed}
[model]
preset = "r2-nano"
[chips.old]
use = "emulated:{chip}"
faults = "{script}"
[chips.new]
use = "{to}"
[data]
task = "digit-sum"
sequence_length = 24
[train]
prefer = ["old", "new"]
steps = 50
batch = 84
learning_rate = 3e-3
checkpoint_every = 10
evaluate_every = 1000
evaluation_sequences = 4
accuracy_samples = 0
[guard]
share = 0.5
[qualify]
unqualified = "allow"
"""


def cross(chip: str, seed: int, directory: Path, to: str = "cpu") -> tuple[Any, Any]:
    """One run that crosses from an emulated chip to another; returns its crossing and its canary."""
    script = directory / "lost.toml"
    script.write_text(LOST.format(code=CODES[chip]))
    recipe = directory / "crossing.toml"
    recipe.write_text(RECIPE.format(seed=seed, chip=chip, script=script, to=to))
    command = [sys.executable, "-m", "beringia", "train", str(recipe), "--out", str(directory / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{chip}: status {done.returncode}: {done.stderr[-2000:]}")
    told: list[AnyEvent] = [parse_event(line) for _, line in read_lines(directory / "run" / "events.jsonl")]
    crossing, canary = (next(event for event in told if event.kind == kind) for kind in ("crossing", "canary"))
    return crossing, canary


def difference_over_noise(canary: Any) -> float:
    """The canary's difference over what weights nudged by their last bit make."""
    return float(canary.difference / max(value for name, value in canary.parts.items() if name.startswith("perturbed")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for seed in range(options.rounds):
        for chip in CHIPS:
            with tempfile.TemporaryDirectory() as directory:
                crossing, canary = cross(chip, seed, Path(directory))
            rows.append(
                {
                    "chip": chip,
                    "seconds": crossing.seconds,
                    "imports_seconds": crossing.imports_seconds,
                    "load_seconds": crossing.load_seconds,
                    "canary_seconds": crossing.canary_seconds,
                    "factor": crossing.seconds / (crossing.imports_seconds + crossing.load_seconds),
                    "difference_over_noise": difference_over_noise(canary),
                    "hashes_equal": crossing.state_hash_before == crossing.state_hash_after,
                }
            )
    factors = [row["factor"] for row in rows]
    result = {
        "benchmark": "crossing",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {usable_cores()} cores",
        "factor_median": statistics.median(factors),
        "factor_range": [min(factors), max(factors)],
        "limit": LIMIT,
        "canary_difference_over_noise": sorted(row["difference_over_noise"] for row in rows),
        "rows": rows,
        "holds": {"time": statistics.median(factors) <= LIMIT, "state": all(row["hashes_equal"] for row in rows)},
    }
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
