"""Whether defects are found in a model that was trained, where noise is not even. Prints one JSON object.

    python benchmarks/qualify_trained.py --json --model SMOLLM2 [--store FILE]

SMOLLM2 is a directory that `recipes/prepare_smollm2.py` wrote. The detection benchmark has a small model with random
weights; here the command itself qualifies an emulated H800 (fast fidelity) for SmolLM2-135M in bfloat16: once without a
fault and once with each of `DEFECTS`, which strike one of its operators. Must hold: the sound chip is fit to
train, no other is, and the first wrong operator is the one that was struck. Results go to the store one by one, so an
interrupted benchmark goes on; a qualification takes about four minutes on two cores.
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

from beringia.machine.threads import usable_cores

CHIP = "emulated:h800"
PRODUCT = ("model.layers.25.self_attn", "aten.mm.default", "forward")
"""Product 100 of a forward pass, of four in each layer: queries, keys and values are one."""
ATTENTION = ("model.layers.14.self_attn", "aten._scaled_dot_product_fused_attention_overrideable_backward.default")
DEFECTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "none": ({}, ()),
    "gradient of one layer's attention, past 16 positions": (
        {"kind": "wrong-backward", "sites": [14], "length": 16, "strength": 0.3},
        (*ATTENTION, "backward"),
    ),
    "seven bits in one product's accumulator": (
        {"kind": "short-accumulator", "bits": 7, "direction": "forward", "sites": [100]},
        PRODUCT,
    ),
    "a stuck tile in one product": (
        {"kind": "stuck-tile", "direction": "forward", "sites": [100], "row": 1, "column": 1, "value": 1.0},
        PRODUCT,
    ),
}
"""What strikes, and where it must be found first."""


def command(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "beringia", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def qualified(model: str, bundle: Path, fault: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Verdict and first wrong operator."""
    script = directory / "faults.toml"
    struck = "".join(f"{name} = {json.dumps(value)}\n" for name, value in fault.items())
    script.write_text('summary = "one planted defect"\n' + (f"[[faults]]\n{struck}" if fault else ""))
    planted = ("--faults", str(script)) if fault else ()
    paths = ("--against", str(bundle), "--out", str(directory / "out"))
    certificate = command("qualify", CHIP, "--model", model, *paths, *planted)["certificate"]
    first = certificate["first_wrong"]
    check = first["check"] if first else {}
    failed = [probe for probe in certificate["probes"] if probe["outcome"] == "failed" and probe["probe"] == "lockstep"]
    return {
        "verdict": certificate["verdict"],
        "named": [check[part] for part in ("module", "operator", "direction")] if first else [],
        "consistent_with": first["consistent_with"] if first else [],
        "error_of_the_call": check.get("error"),
        "lockstep_failed": len(failed),
        "seconds": certificate["seconds"],
    }


def holds(row: dict[str, Any]) -> bool:
    """Whether the verdict and the operator are right."""
    _, where = DEFECTS[row["defect"]]
    return (row["verdict"] == "train") == (not where) and row["named"] == list(where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--model", required=True)
    parser.add_argument("--store", type=Path, default=Path("trained.jsonl"))
    options = parser.parse_args()
    lines = options.store.read_text().splitlines() if options.store.exists() else []
    rows = {row["defect"]: row for row in map(json.loads, lines)}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        bundle = directory / "reference.bundle"
        for defect, (fault, _) in DEFECTS.items():
            if defect in rows:
                continue
            if not bundle.exists():
                command("reference", "cpu", "--model", options.model, "--dtype", "bfloat16", "--out", str(bundle))
            rows[defect] = {"defect": defect, "fault": fault, **qualified(options.model, bundle, fault, directory)}
            with options.store.open("a") as store:
                store.write(json.dumps(rows[defect]) + "\n")
            print(f"{defect}: {rows[defect]['verdict']} {rows[defect]['named']}", file=sys.stderr, flush=True)
    document = {
        "benchmark": "qualify-trained",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {usable_cores()} cores",
        "chip": CHIP,
        "cases": list(rows.values()),
        "holds": all(holds(row) for row in rows.values()),
    }
    print(json.dumps(document, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
