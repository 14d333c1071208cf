"""How fast the exact fidelity multiplies matrices, for every published unit. Prints one JSON object.

    python benchmarks/exact_products.py --json [--size 512] [--rounds 7]

Must hold: at least 200 million multiply-adds a second on two cores for each. Units take turns; medians, and the slowest
round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import beringia  # noqa: F401  # sets the threads before torch loads

# isort: split
import torch

from beringia.chips.arithmetic import matmul
from beringia.chips.arithmetic.profile import Format, read_profile

PARTS = ("v100", "a100", "l40s", "h100", "b200", "mi250x", "mi300x")
DTYPES: dict[Format, torch.dtype] = {
    "tfloat32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
}
LIMIT = 200e6


def seconds(part: str, format_: Format, size: int) -> float:
    """One product of size x size matrices."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(size, size, generator=generator).to(DTYPES[format_]) for _ in range(2))
    started = time.perf_counter()
    matmul(a, b, unit=part, format=format_)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    units = [(part, name) for part in PARTS for name in read_profile(part).units if name in DTYPES]
    taken: dict[tuple[str, Format], list[float]] = {unit: [] for unit in units}
    for part, name in units:
        seconds(part, name, 64)  # compiles, loads
    for _ in range(options.rounds):
        for part, name in units:
            taken[part, name].append(seconds(part, name, options.size))
    rates = {
        f"{part} {name}": {
            "median": round(options.size**3 / statistics.median(values) / 1e6),
            "low": round(options.size**3 / max(values) / 1e6),
        }
        for (part, name), values in taken.items()
    }
    slowest = min(rate["median"] for rate in rates.values())
    result = {
        "benchmark": "exact-products",
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "size": options.size,
        "million_multiply_adds_a_second": rates,
        "must_hold": {"limit": LIMIT / 1e6, "slowest": slowest, "holds": slowest * 1e6 >= LIMIT},
    }
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
