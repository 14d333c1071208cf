"""How much worse than a sound chip must a chip be, for its qualification to tell? Prints one JSON object.

    python -m benchmarks.qualify_power --models DIR --bundles DIR --json

A sound chip's trace is moved away from float64's: every distance two, three and four times what it is. Of each quantity
that is judged (outputs, ways of serving, gradients, updates) it is counted how often its own bound is broken by that,
which is the power of that bound; and whether the chip as a whole, all of it so much worse, is refused or left open.
Models as in `qualify_foreign.py`; chips are another vendor's, and the reference itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.foreign.faults import ALL
from benchmarks.qualify_foreign import Workshop
from beringia.chips.emulated.device import register
from beringia.chips.open import open_chip
from beringia.qualify.doubt import doubt
from beringia.qualify.effects import judge_trace
from beringia.qualify.trace import Trace, Tracer
from beringia.records.certificate import ProbeResult

TIMES = (1, 2, 3, 4)
CHIPS = ("emulated:h100", "emulated:ascend-910b")
DTYPES = ("bfloat16", "float32", "float16")


def farther(exact: Trace, found: Trace, times: float) -> Trace:
    """The trace of a chip that is so many times as far from float64, in every number."""

    def moved(right: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return right + times * (other - right)

    return Trace(
        {name: moved(exact.sketches[name], sketch) for name, sketch in found.sketches.items()},
        moved(exact.losses_K, found.losses_K),
        moved(exact.losses_N, found.losses_N),
    )


def kind_of(result: ProbeResult) -> str:
    """`gradient`, `update`, ...: of what a bound is."""
    words = {"loss": "losses", "losses of training": "losses", "distance overall": "all together"}
    return words.get(result.subject, result.subject.split()[0])


def measure(workshop: Workshop, model: str, dtype: str) -> Iterator[dict[str, Any]]:
    """One row for each chip and each number of times."""
    subject = workshop.subject(model)
    bundle = workshop.bundle(subject, dtype)
    tracer = Tracer(subject, bundle.plan)
    for name in CHIPS:
        chip = open_chip(name)
        sound = tracer.on_chip(chip, getattr(torch, dtype), bundle.routes, begin_step=lambda: None)
        chip.close()
        for times in TIMES:
            effects = judge_trace(bundle.noise, farther(bundle.noise.exact, sound, times))
            failed: dict[str, list[bool]] = defaultdict(list)
            for result in effects:
                failed[kind_of(result)].append(result.outcome in ("failed", "told"))
            yield {
                "model": model,
                "dtype": dtype,
                "chip": name,
                "times": times,
                "refused": any(result.outcome == "failed" for result in effects),
                "left_open": bool(doubt([], effects)) or any(one.outcome == "inconclusive" for one in effects),
                "bounds": {kind: [sum(found), len(found)] for kind, found in failed.items()},
            }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares by dtype and number of times."""
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        for times in TIMES:
            own = [row for row in rows if (row["dtype"], row["times"]) == (dtype, times)]
            kinds = sorted({kind for row in own for kind in row["bounds"]})
            found[f"{dtype}, {times} times"] = {
                "chips": len(own),
                "refused": sum(row["refused"] for row in own),
                "refused_or_open": sum(row["refused"] or row["left_open"] for row in own),
                "power": {
                    kind: round(
                        sum(row["bounds"].get(kind, [0, 0])[0] for row in own)
                        / max(1, sum(row["bounds"].get(kind, [0, 0])[1] for row in own)),
                        3,
                    )
                    for kind in kinds
                },
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--bundles", type=Path, default=Path("foreign-bundles"))
    parser.add_argument("--of", default=",".join(ALL), help="models")
    options = parser.parse_args()
    torch.set_num_threads(1)
    register()
    workshop, started, rows = Workshop(options.models, options.bundles), time.perf_counter(), list[dict[str, Any]]()
    for model in options.of.split(","):
        for dtype in DTYPES:
            rows += measure(workshop, model, dtype)
            print(f"{model} {dtype}: {rows[-len(TIMES) :]}", file=sys.stderr, flush=True)
    document = {
        "benchmark": "qualify-power",
        "summary": summarise(rows),
        "rows": rows,
        "seconds": round(time.perf_counter() - started),
    }
    print(json.dumps(document, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
