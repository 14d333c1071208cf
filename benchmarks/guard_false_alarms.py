"""How often the guard alarms where nothing is wrong. Prints one JSON object.

    python benchmarks/guard_false_alarms.py --json [--steps 2000] [--share 0.1] [--chips cpu cpu:bfloat16 emulated:h800]

Trains r2-nano on digit sums, from the first step with its steep loss on, on each chip in a process of its own, with a
share well above the default so that every detector is asked more often. Says how many checks each detector made and how
much of its bound the worst used, with the median. Must hold: no alarm in 2,000 steps on cpu, emulated:h800 and
emulated:ascend-910b.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

DEFAULT_CHIPS = ("cpu", "cpu:bfloat16", "emulated:h800", "emulated:ascend-910b")


def make_trainer(
    chip: str,
    *,
    share: float | None,
    steps: int,
    seed: int = 7,
    preset: str = "r2-nano",
    faults: str | None = None,
    **train: Any,
) -> Any:
    """A trainer on digit sums, 32 samples of 64 tokens; `chip` may end in a compute dtype, as in `cpu:bfloat16`, and
    `train` says what else the recipe's section does."""
    import torch

    from beringia.chips.open import open_chip
    from beringia.data import choose_tokenizer, open_stream
    from beringia.machine.memory import keep_freed_memory
    from beringia.model import load_model
    from beringia.processes.ranks import Ranks
    from beringia.records.recipe import parse_recipe
    from beringia.train.compute import choose_compute_dtype
    from beringia.train.cross_entropy import CrossEntropy
    from beringia.train.guard import Guard
    from beringia.train.trainer import Trainer

    keep_freed_memory()  # as training's worker does
    name, _, last = chip.rpartition(":")
    chip, compute = (name, last) if last in ("bfloat16", "float32") else (chip, "auto")
    document = {
        "name": "guarded",
        "seed": seed,
        "model": {"preset": preset},
        "chips": {"chip": {"use": chip}},
        "data": {"task": "digit-sum"},
        "train": {"prefer": ["chip"], "steps": steps, "compute": compute} | train,
    }
    recipe = parse_recipe(document, "the benchmark's recipe")
    opened = open_chip(chip, faults=faults, seed=seed)
    tokenizer = choose_tokenizer(recipe.data, recipe.model)
    stream = open_stream(recipe.data, seed=seed, directory=Path("unused"), split="train", tokenizer=tokenizer)
    decoder = load_model(preset, seed=seed, vocabulary_size=tokenizer.vocabulary_size)
    decoder.set_compute_dtype(choose_compute_dtype(recipe.train.compute, opened))
    decoder.to(opened.device)
    decoder.train()
    trainer = Trainer(recipe, opened, Ranks(), decoder, CrossEntropy.of(decoder, recipe.train), stream)
    torch.manual_seed(seed)
    if share is not None:
        trainer.guard = Guard(
            decoder,
            trainer.optimizer,
            trainer.objective,
            opened,
            Ranks(),
            share=share,
            seed=seed,
            sharding=trainer.sharding,
            clipping=trainer.clipping,
        )
    return trainer


def train(chip: str, steps: int, share: float, seed: int) -> dict[str, Any]:
    """Train and count."""
    trainer = make_trainer(chip, share=share, steps=steps, seed=seed)
    used: dict[str, list[float]] = defaultdict(list)
    alarms: list[str] = []
    losses, guard_seconds, seconds = [], 0.0, 0.0
    started = time.perf_counter()
    for _ in range(steps):
        result = trainer.train_step()
        losses.append(result.loss)
        guard_seconds += result.guard_seconds
        seconds += result.seconds
        for event in trainer.guard.take_events():
            if event.kind == "alarm":
                alarms.append(event.message)
            else:
                share_used = event.value / event.bound if event.bound else event.value
                used[event.detector].append(share_used)
    return {
        "chip": chip,
        "identity": trainer.chip.identity.sku,
        "compute_dtype": str(trainer.decoder.compute_dtype).removeprefix("torch."),
        "steps": steps,
        "alarms": len(alarms),
        "messages": alarms[:5],
        "loss_first": losses[0],
        "loss_last": statistics.mean(losses[-50:]),
        "share_taken": guard_seconds / (seconds - guard_seconds),
        "seconds": time.perf_counter() - started,
        "detectors": {
            name: {"checks": len(values), "used_median": statistics.median(values), "used_most": max(values)}
            for name, values in sorted(used.items())
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--chips", nargs="+", default=list(DEFAULT_CHIPS))
    parser.add_argument("--one", help="train on this chip only, in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train(options.one, options.steps, options.share, options.seed)))
        return
    runs = []
    for chip in options.chips:
        command = [sys.executable, __file__, "--one", chip, "--steps", str(options.steps)]
        command += ["--share", str(options.share), "--seed", str(options.seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{chip}: {runs[-1]['alarms']} alarms in {options.steps} steps", file=sys.stderr)
    document = {
        "benchmark": "guard-false-alarms",
        "machine": platform.processor() or platform.machine(),
        "share": options.share,
        "runs": runs,
        "must_hold": {"alarms": 0, "holds": all(run["alarms"] == 0 for run in runs)},
    }
    print(json.dumps(document, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
