"""The campaign, end to end, beside an uninterrupted run on the fallback chip alone. Prints one JSON object.

    python benchmarks/campaign.py --json [--recipe recipes/r2-nano.toml]

Must hold: at most 8 minutes with qualification, exit status 0, a chip that is refused and passed over, a transient
retry, a rollback, the crossing with equal state hashes, held-out loss within the band of the uninterrupted run,
sampled accuracy above chance by its 95 % interval.

The band: the held-out losses of uninterrupted runs with other seeds (five by default) scatter with a standard
deviation s; the campaign's loss may differ from their mean by Student's t at 99 % times s sqrt(1 + 1/n), a prediction
interval.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scipy import stats

from beringia.machine.threads import usable_cores
from beringia.records.events import AnyEvent, parse_event
from beringia.records.jsonl import read_lines

LIMIT_SECONDS = 480.0


def run(verb: str, recipe: str, out: Path, *changes: str) -> tuple[dict[str, Any], float]:
    """One command to its end: its JSON answer and its seconds."""
    command = [sys.executable, "-m", "beringia", verb, recipe, "--out", str(out), "--json"]
    for change in changes:
        command += ["--set", change]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stdout} {done.stderr[-2000:]}")
    return json.loads(done.stdout), seconds


def events(out: Path) -> list[AnyEvent]:
    return [parse_event(line) for _, line in read_lines(out / "events.jsonl")]


def measure(recipe: str, seeds: int) -> dict[str, Any]:
    """The campaign and the uninterrupted runs."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        summary, seconds = run("campaign", recipe, root / "campaign")
        told = events(root / "campaign")
        alone = (
            'train.prefer=["fallback"]',
            "guard.share=0.01",
            "train.accuracy_samples=0",
            'qualify.unqualified="allow"',
        )
        losses = [
            run("train", recipe, root / f"alone-{n}", *alone, f"seed={n}")[0]["loss"] for n in range(7, 7 + seeds)
        ]
    spread = statistics.stdev(losses)
    band = float(stats.t.ppf(0.995, seeds - 1)) * spread * math.sqrt(1 + 1 / seeds)
    decisions = [event.action for event in told if event.kind == "decision"]
    crossing = next(event for event in told if event.kind == "crossing")
    accuracy = summary["accuracy"]
    difference = summary["loss"] - statistics.mean(losses)
    return {
        "seconds": seconds,
        "limit_seconds": LIMIT_SECONDS,
        "decisions": decisions,
        "verdicts": {event.chip: event.verdict for event in told if event.kind == "qualified"},
        "qualify_seconds": {event.chip: event.seconds for event in told if event.kind == "qualified"},
        "faults": [event.code for event in told if event.kind == "fault"],
        "alarms": [[event.detector, event.site, event.step] for event in told if event.kind == "alarm"],
        "state_hashes_equal": crossing.state_hash_before == crossing.state_hash_after,
        "canary": {"difference": crossing.difference, "band": crossing.band},
        "lost_steps": summary["lost_steps"],
        "loss": summary["loss"],
        "uninterrupted_losses": losses,
        "loss_difference": difference,
        "loss_band": band,
        "accuracy": accuracy,
        "holds": {
            "time": seconds <= LIMIT_SECONDS,
            "story": {"skip", "retry", "rollback", "cross"} <= set(decisions),
            "state": crossing.state_hash_before == crossing.state_hash_after,
            "loss": abs(difference) <= band,
            "accuracy": accuracy["low"] > accuracy["chance"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--recipe", default=str(Path(__file__).parents[1] / "recipes" / "r2-nano.toml"))
    parser.add_argument("--seeds", type=int, default=5, help="uninterrupted runs")
    options = parser.parse_args()
    result = {
        "benchmark": "campaign",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {usable_cores()} cores",
        **measure(options.recipe, options.seeds),
    }
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
