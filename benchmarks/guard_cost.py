"""What the guard costs a training step. Prints one JSON object.

    python benchmarks/guard_cost.py --json [--steps 1500] [--share 0.01] [--preset r2-micro] [--chip cpu]

Two trainers from the same weights on the same data, one with the guard and one without, take their steps in turn, the
first of a pair changing from pair to pair. The cost is the difference of a pair over the mean step without the guard;
its 95 % interval is a bootstrap over blocks of consecutive pairs, because checks come a block of steps at a time and
a machine's noise lasts. Given in wall-clock time and in processor time (of all threads), which other processes
disturb less. Also what the guard says of itself (`guard_seconds`), and what is left in the steps without a check,
which should be nothing. Must hold: the interval lies below 1 % at a share of 1 %.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from typing import Any

import numpy as np
from guard_false_alarms import make_trainer

WARM_STEPS = 120
"""Steps before measuring: every site's first visit measures its noise, which later visits seldom do."""
BLOCK_PAIRS = 48
RESAMPLES = 4000
LIMIT = 0.01


def timed_step(trainer: Any) -> tuple[float, float, float]:
    """Wall-clock seconds, processor seconds, and the guard's own account of one step."""
    wall, processor = time.perf_counter(), time.process_time()
    result = trainer.train_step()
    if trainer.guard is not None:
        trainer.guard.take_events()
    return time.perf_counter() - wall, time.process_time() - processor, result.guard_seconds


def interval(differences: np.ndarray, base: np.ndarray, generator: np.random.Generator) -> dict[str, float]:
    """Mean difference over mean base, with a block bootstrap's 95 % interval."""
    blocks = len(base) // BLOCK_PAIRS
    shape = (blocks, BLOCK_PAIRS)
    sums = differences[: blocks * BLOCK_PAIRS].reshape(shape).sum(1)
    bases = base[: blocks * BLOCK_PAIRS].reshape(shape).sum(1)
    drawn = generator.integers(0, blocks, (RESAMPLES, blocks))
    ratios = sums[drawn].sum(1) / bases[drawn].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"mean": float(sums.sum() / bases.sum()), "low": float(low), "high": float(high)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Pairs of steps, and what they say."""
    plain, guarded = (
        make_trainer(options.chip, share=share, steps=options.steps + WARM_STEPS, preset=options.preset)
        for share in (None, options.share)
    )
    for _ in range(WARM_STEPS):
        timed_step(plain)
        timed_step(guarded)
    rows = []
    for pair in range(options.steps):
        order = (plain, guarded) if pair % 2 == 0 else (guarded, plain)
        found = {id(trainer): timed_step(trainer) for trainer in order}
        rows.append((*found[id(plain)][:2], *found[id(guarded)]))
        if pair % 100 == 99:
            print(f"{pair + 1} pairs", file=sys.stderr)
    table = np.array(rows)
    generator = np.random.default_rng(0)
    quiet = table[:, 4] < 1e-3 * table[:, 0]
    return {
        "step_milliseconds": 1e3 * statistics.median(table[:, 0]),
        "wall": interval(table[:, 2] - table[:, 0], table[:, 0], generator),
        "processor": interval(table[:, 3] - table[:, 1], table[:, 1], generator),
        "own_account": float(table[:, 4].sum() / (table[:, 2].sum() - table[:, 4].sum())),
        "steps_with_checks": int((~quiet).sum()),
        "left_in_steps_without_checks": float(
            np.median(table[quiet, 2] - table[quiet, 0]) / np.median(table[quiet, 0])
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--preset", default="r2-micro")
    parser.add_argument("--chip", default="cpu")
    options = parser.parse_args()
    measured = measure(options)
    document = {
        "benchmark": "guard-cost",
        "machine": platform.processor() or platform.machine(),
        "chip": options.chip,
        "model": f"{options.preset}, 32 x 64 tokens",
        "share": options.share,
        "pairs": options.steps,
        **measured,
        "must_hold": {"limit": LIMIT, "holds": measured["wall"]["high"] < LIMIT},
    }
    print(json.dumps(document, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
