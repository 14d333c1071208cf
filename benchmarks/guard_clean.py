"""Sound runs of several shapes and rates, up to divergence: how often the guard alarms. Prints one JSON object.

    python benchmarks/guard_clean.py --json [--steps 500] [--share 0.1] [--chip cpu:bfloat16] [--seed 11] [--into FILE]

Four shapes (latent attention with experts and a multi-token layer; grouped queries, dense; grouped queries with experts
of the softmax kind; a tied head), five learning rates each; now and then a batch is hard. A spike is looked into as a
session does: where every layer computes rightly and the data explain it, it is no alarm. A run ends where it is beyond
judging (`train/divergence.py`): then alarms are doubtful, and the training's own. Results are appended to the file that
`--into` names, and those in it are not run again. Must hold: no alarm.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from guard_false_alarms import make_trainer
from guard_foreign import Kept

RATES = (1e-3, 3e-3, 1e-2, 2e-2, 4e-2)
HARD_EVERY = 120
"""Steps from one hard batch to the next: its labels are a token that never comes."""


@dataclass(frozen=True)
class WithHardBatches:
    """A stream, one in so many of whose batches is hard."""

    stream: Any
    batch: int
    token: int

    def samples(self, start: int, count: int) -> Any:
        given = self.stream.samples(start, count)
        if start // self.batch % HARD_EVERY != HARD_EVERY - 1:
            return given
        return replace(given, labels_BT=given.labels_BT.masked_fill(given.labels_BT >= 0, self.token))


def name_shapes() -> tuple[str, ...]:
    """Make the shapes known as presets; their names."""
    from beringia.model.presets import PRESETS, R2_NANO

    dense = replace(
        R2_NANO,
        latent=False,
        q_lora_rank=None,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=0,
        num_nextn_predict_layers=0,
        intermediate_size=192,
    )
    experts = replace(
        dense, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, router="softmax", qk_norm=True
    )
    PRESETS.update(
        {
            "grouped": replace(dense, qk_norm=True),
            "grouped-experts": replace(experts, n_shared_experts=0, routed_scaling_factor=1.0),
            "tied": replace(dense, tie_word_embeddings=True, attention_bias=True),
        }
    )
    return ("r2-nano", "grouped", "grouped-experts", "tied")


def run(shape: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """One run: its alarms, and the spikes that the data explained."""
    from beringia.records.events import SPIKE
    from beringia.train.divergence import beyond_judging
    from beringia.train.guard.check import GRADIENT
    from beringia.train.hard_batch import explained_by_data

    trainer = make_trainer(
        options.chip, share=options.share, steps=options.steps, seed=options.seed, preset=shape, learning_rate=rate
    )
    batch, token = trainer.recipe.train.batch, trainer.decoder.config.vocab_size - 1
    trainer.stream = WithHardBatches(trainer.stream, batch, token)
    alarms: list[str] = []
    explained: list[str] = []
    most_used: dict[str, float] = {}
    result = None
    while trainer.step < options.steps:
        result = trainer.train_step()
        events = trainer.guard.take_events()
        if beyond_judging(trainer, dict(result.numbers) | {GRADIENT: result.gradient_norm}) is not None:
            break
        found = [event for event in events if event.kind == "alarm"]
        spikes = [event for event in found if event.detector == SPIKE]
        if spikes:
            with trainer.one_step_back():
                for first in range(0, len(trainer.guard.sites), 2):
                    trainer.check_sites(trainer.guard.sites[first : first + 2])
            found += [event for event in trainer.guard.take_events() if event.kind == "alarm"]
            if len(found) == len(spikes) and explained_by_data(trainer, spikes, lambda: None):
                explained += [event.message for event in spikes]
                trainer.guard.explained()
                found = []
        alarms += [event.message for event in found]
        for event in events:
            if event.kind == "check" and event.detector != SPIKE and event.bound:
                most_used[event.detector] = max(most_used.get(event.detector, 0.0), event.value / event.bound)
    return {
        "shape": shape,
        "rate": rate,
        "steps": trainer.step,
        "loss": None if result is None else result.loss,
        "alarms": alarms,
        "explained": explained,
        "most_used": most_used,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--chip", default="cpu:bfloat16")
    parser.add_argument("--shapes", nargs="+", default=list(name_shapes()))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    started, kept, runs = time.perf_counter(), Kept(options.into), []
    for shape in options.shapes:
        for rate in options.rates:
            of_seed = "" if options.seed == parser.get_default("seed") else f" seed {options.seed}"
            key = f"{options.chip} {options.share} {options.steps} {shape} {rate}{of_seed}"
            runs.append(kept.of(key, partial(run, shape, rate, options)))
            print(f"{key}, {time.perf_counter() - started:.0f} s: {runs[-1]}", file=sys.stderr)
    document = {
        "benchmark": "guard-clean",
        "chip": options.chip,
        "share": options.share,
        "runs": runs,
        "must_hold": {"alarms": 0, "holds": not any(one["alarms"] for one in runs)},
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
