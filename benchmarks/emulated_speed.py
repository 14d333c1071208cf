"""What emulation costs: our own eager training step of r2-micro on each emulated chip against the same on the CPU.

The bound is 5 times the CPU's step (float32, 32 x 64 tokens, eager). Steps are interleaved, so that what else the
machine does falls on both; medians, with the 95 % interval of the ratio of medians from a bootstrap. Prints one JSON
object.

    python benchmarks/emulated_speed.py --profiles h800 ascend-910b --steps 30

A name with `@exact` is that profile in the exact fidelity, which has no bound.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import beringia  # noqa: F401  # sets the threads before torch loads

# isort: split
import torch

from beringia.chips.chip import Chip
from beringia.chips.cpu import Cpu
from beringia.chips.open import open_chip
from beringia.machine.memory import keep_freed_memory
from beringia.model import Decoder, initialise, preset
from beringia.records.recipe import TrainSection
from beringia.train.optimizer import make_optimizer

BATCH, TOKENS = 32, 64
WARM_UP_STEPS = 3
BOUND = 5.0
RESAMPLES = 2000


def make_step(chip: Chip, dtype: torch.dtype) -> Callable[[], float]:
    """A function that trains one step and returns its seconds."""
    train = TrainSection(prefer=("x",), steps=1000, learning_rate=1e-3)
    decoder = Decoder(preset("r2-micro"))
    initialise(decoder, 0)
    decoder = decoder.to(chip.device)
    decoder.set_compute_dtype(dtype)
    optimizer = make_optimizer(decoder.named_parameters(), train, fused=True)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, decoder.config.vocab_size, (BATCH, TOKENS + 1), generator=generator).to(chip.device)

    def step() -> float:
        start = time.perf_counter()
        losses = decoder(tokens[:, :-1], tokens[:, 1:].contiguous())
        (losses.main_sum / losses.target_count + 0.1 * losses.mtp_sum / losses.mtp_count).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def interval_of_ratio(above: list[float], below: list[float]) -> tuple[float, float]:
    """95 % interval of median(above) / median(below)."""
    source = random.Random(0)
    ratios = sorted(
        statistics.median(source.choices(above, k=len(above))) / statistics.median(source.choices(below, k=len(below)))
        for _ in range(RESAMPLES)
    )
    return ratios[int(0.025 * RESAMPLES)], ratios[int(0.975 * RESAMPLES)]


def measure(profile: str, steps: int) -> dict[str, object]:
    """Interleaved steps on the CPU and on one emulated chip."""
    chip = open_chip(f"emulated:{profile}")
    on_cpu, on_chip = make_step(Cpu(), torch.float32), make_step(chip, chip.capabilities.compute_dtype)
    seconds: dict[str, list[float]] = {"cpu": [], "chip": []}
    for number in range(steps + WARM_UP_STEPS):
        pair = {"cpu": on_cpu(), "chip": on_chip()}
        if number >= WARM_UP_STEPS:
            for name, value in pair.items():
                seconds[name].append(value)
    chip.close()
    low, high = interval_of_ratio(seconds["chip"], seconds["cpu"])
    return {
        "cpu_milliseconds": round(1e3 * statistics.median(seconds["cpu"]), 1),
        "chip_milliseconds": round(1e3 * statistics.median(seconds["chip"]), 1),
        "ratio": round(statistics.median(seconds["chip"]) / statistics.median(seconds["cpu"]), 2),
        "interval": [round(low, 2), round(high, 2)],
        "ratio_of_minima": round(min(seconds["chip"]) / min(seconds["cpu"]), 2),
        "compute": str(chip.capabilities.compute_dtype).removeprefix("torch."),
    }


def main() -> None:
    """Measure the profiles asked for and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profiles", nargs="+", default=["exact", "h800", "ascend-910b", "mi300x"])
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    keep_freed_memory()  # as training's worker does
    results = {profile: measure(profile, arguments.steps) for profile in arguments.profiles}
    fast = [result for name, result in results.items() if "@" not in name]
    within = all(result["ratio"] <= BOUND for result in fast)  # type: ignore[operator]
    facts = {"model": "r2-micro", "batch": BATCH, "tokens": TOKENS, "threads": torch.get_num_threads(), "bound": BOUND}
    print(json.dumps({**facts, "within_bound": within, "profiles": results}))


if __name__ == "__main__":
    main()
