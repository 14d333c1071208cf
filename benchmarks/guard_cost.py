"""What the guard costs a training step. Prints one JSON object.

    python benchmarks/guard_cost.py --json [--steps 4000] [--share 0.01] [--preset r2-micro] [--chip cpu]

Two trainers from the same weights on the same data, one with the guard and one without, take their steps in turn, the
first of a pair changing from pair to pair. The cost is what the guarded steps take more, over the steps without; its
95 % interval is a bootstrap over blocks of consecutive pairs, because checks come a block of steps at a time and a
machine's noise lasts.

Steps of this length vary by many times the cost. So the cost is also taken in two parts that are each known well: the
guard's own account (`guard_seconds`, its mean: exact but for the clock) and the rest of the difference, which checks
could only cause by hooks and cold caches in most steps alike, as the mean of the middle half. Must hold:
the interval of the two parts together lies below 1 % at a share of 1 %. The plain differences, in wall-clock and in
processor time, stand beside it.
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
TRIM = 0.25
"""Cut from each end of the rest of the differences: their tails are the machine's, and would widen the interval."""
LIMIT = 0.01


def timed_step(trainer: Any) -> tuple[float, float, float]:
    """Wall-clock seconds, processor seconds, and the guard's own account of one step."""
    wall, processor = time.perf_counter(), time.process_time()
    result = trainer.train_step()
    if trainer.guard is not None:
        trainer.guard.take_events()
    return time.perf_counter() - wall, time.process_time() - processor, result.guard_seconds


def drawn_blocks(pairs: int, generator: np.random.Generator) -> np.ndarray:
    """Indices of pairs, RESAMPLES rows of them: blocks of consecutive pairs, drawn with replacement."""
    blocks = pairs // BLOCK_PAIRS
    starts = BLOCK_PAIRS * generator.integers(0, blocks, (RESAMPLES, blocks))
    return (starts[:, :, None] + np.arange(BLOCK_PAIRS)).reshape(RESAMPLES, -1)


def cost(differences: np.ndarray, base: np.ndarray, exact: np.ndarray, *, trim: float) -> np.ndarray:
    """Over the last axis, as a share of the mean of `base`: the mean of `exact` and the trimmed mean of the rest."""
    rest = np.sort(differences - exact, axis=-1)
    cut = int(trim * rest.shape[-1])
    return (exact.mean(-1) + rest[..., cut : rest.shape[-1] - cut].mean(-1)) / base.mean(-1)


def with_interval(
    differences: np.ndarray, base: np.ndarray, exact: np.ndarray, drawn: np.ndarray, trim: float = 0.0
) -> dict[str, float]:
    """The cost, with a block bootstrap's 95 % interval."""
    low, high = np.quantile(cost(differences[drawn], base[drawn], exact[drawn], trim=trim), [0.025, 0.975])
    return {"mean": float(cost(differences, base, exact, trim=trim)), "low": float(low), "high": float(high)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Pairs of steps, and what they say."""
    plain, guarded = (
        make_trainer(options.chip, share=share, steps=options.steps + options.warm, preset=options.preset)
        for share in (None, options.share)
    )
    for _ in range(options.warm):
        timed_step(plain)
        timed_step(guarded)
    rows = []
    for pair in range(options.steps):
        order = (plain, guarded) if pair % 2 == 0 else (guarded, plain)
        found = {id(trainer): timed_step(trainer) for trainer in order}
        rows.append((*found[id(plain)][:2], *found[id(guarded)]))
        if pair % 100 == 99:
            print(f"{pair + 1} pairs", file=sys.stderr)
    plain_wall, plain_processor, wall, processor, own = np.array(rows).T
    drawn = drawn_blocks(len(rows), np.random.default_rng(0))
    none = np.zeros_like(own)
    return {
        "step_milliseconds": 1e3 * statistics.median(plain_wall),
        "cost": with_interval(wall - plain_wall, plain_wall, own, drawn, trim=TRIM),
        "own_account": with_interval(own, plain_wall, none, drawn),
        "rest_trimmed": with_interval(wall - plain_wall - own, plain_wall, none, drawn, trim=TRIM),
        "plain_wall": with_interval(wall - plain_wall, plain_wall, none, drawn),
        "plain_processor": with_interval(processor - plain_processor, plain_processor, none, drawn),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--warm", type=int, default=WARM_STEPS)
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
        "must_hold": {"limit": LIMIT, "holds": measured["cost"]["high"] < LIMIT},
    }
    print(json.dumps(document, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
