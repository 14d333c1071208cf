"""How often, and how soon, the guard sees faults that nobody planted for it. Prints one JSON object.

    python benchmarks/guard_foreign.py --json [--half first second] [--shares 0.1 0.01] [--into FILE]

The faults (`guard_foreign_faults.py`) are planted beside the emulator's fault module. As in `guard_detection.py`, each
trial goes on from the same trained state with one fault that stays from a drawn step on, and what a fault does is
established without the guard: the gradients that the update gets (after clipping) of one step with the fault and
without it, from the same state and data, in some layer, over what the sound chip's differ there from the CPU's in the
same dtype. Those above `HARM` count.

Checks and bounds were made with the first half of the faults in sight, and frozen (commit 05e3ee5) before the second
half was run against them.

Results of single trials are appended to the file that `--into` names, and those in it are not run again.

Must hold: at least 95 % seen within 50 steps at a share of 10 %, 90 % within 200 at 1 %.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from guard_detection import HARM, LATEST_ONSET, WARM_STEPS, WITHIN, Gradients, State, distances, wilson
from guard_false_alarms import make_trainer
from guard_foreign_faults import FIRST_HALF, PRESENT, SECOND_HALF, Fault

HALVES = {"first": FIRST_HALF, "second": SECOND_HALF}
REQUIRED = {0.1: 0.95, 0.01: 0.9}


class Bench:
    """One chip, one trained state, and what a sound step is there."""

    def __init__(self, chip: str) -> None:
        self.chip = chip
        sound = make_trainer(chip, share=None, steps=1000)
        for _ in range(WARM_STEPS):
            sound.train_step()
        self.state = State(sound)
        dtype = str(sound.decoder.compute_dtype).removeprefix("torch.")
        on_cpu = make_trainer(f"cpu:{dtype}", share=None, steps=1000)
        self.state.restore(on_cpu)
        self.noise = distances(clipped_gradients(sound), clipped_gradients(on_cpu))

    def trainer(self, fault: Fault, share: float | None, seed: int) -> Any:
        """A trainer at the trained state with the fault in it, which is not present yet."""
        PRESENT.now = False
        trainer = make_trainer(self.chip, share=share, steps=1000)
        self.state.restore(trainer)
        if trainer.guard is not None:
            trainer.guard.seed = seed
        fault.plant(trainer)
        return trainer

    def harm(self, fault: Fault) -> tuple[float, str]:
        """Most, over layers, of the fault's effect in units of the noise, and the layer."""
        trainer = self.trainer(fault, None, 0)
        PRESENT.now = True
        for _ in range(fault.past_steps):
            trainer.train_step()
        found = clipped_gradients(trainer)
        PRESENT.now = False
        found = distances(found, clipped_gradients(trainer))
        name = max(found, key=lambda name: found[name] / self.noise[name])
        return found[name] / self.noise[name], name

    def trial(self, fault: Fault, seed: int, share: float, within: int) -> dict[str, Any]:
        """Train with the fault from a drawn onset on until the guard alarms."""
        onset = self.state.step + random.Random(seed).randrange(8, LATEST_ONSET)
        trainer = self.trainer(fault, share, seed)
        while trainer.step < onset + within - 1:
            PRESENT.now = trainer.step + 1 >= onset
            result = trainer.train_step()
            alarms = [event for event in trainer.guard.take_events() if event.kind == "alarm"]
            if alarms:
                first = alarms[0]
                return {
                    "delay": result.step - onset + 1,
                    "detector": first.detector,
                    "site": first.site,
                    "tensor": first.tensor,
                    "message": first.message,
                }
        return {"delay": None}


def clipped_gradients(trainer: Any) -> Gradients:
    """What the update of the step that is due would get, joined by layer, float64 on the CPU."""
    trainer.chip.begin_step(trainer.step + 1)
    trainer._accumulate_gradients()
    trainer.clipping.clip()
    groups: dict[str, list[torch.Tensor]] = {}
    for name, parameter in trainer.decoder.named_parameters():
        if parameter.grad is not None:
            place = name.split(".")[:3] if ".layers." in name else name.split(".")[:2]
            groups.setdefault(".".join(place), []).append(parameter.grad.detach().cpu().double().flatten())
    trainer._forget_pass()
    return {name: torch.cat(parts) for name, parts in groups.items()}


class Kept:
    """Results of trials by their key, in a file of lines of JSON where one is named."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self._found: dict[str, Any] = dict(json.loads(line) for line in lines)

    def of(self, key: str, make: Any) -> Any:
        """What was found under this key, or what `make` finds now."""
        if key not in self._found:
            self._found[key] = make()
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps([key, self._found[key]]) + "\n")
        return self._found[key]


def summarise(share: float, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Rate of one share, over faults that harm."""
    within = WITHIN.get(share, 200)
    above = [trial for trial in trials if trial["harm"] > HARM]
    seen = [trial for trial in above if trial["delay"] is not None and 1 <= trial["delay"] <= within]
    return {
        "share": share,
        "within_steps": within,
        "above_bound": len(above),
        "seen": len(seen),
        "rate": len(seen) / max(1, len(above)),
        "rate_95": wilson(len(seen), len(above)),
        "alarms_before_onset": sum(trial["delay"] is not None and trial["delay"] < 1 for trial in trials),
        "missed": [trial["fault"] for trial in above if trial not in seen],
        "trials": trials,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--half", nargs="+", default=list(HALVES), choices=list(HALVES))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.01])
    parser.add_argument("--chip", default="emulated:h800")
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    make_trainer(options.chip, share=None, steps=1)  # the device is there before autograd makes its queues
    bench, kept = Bench(options.chip), Kept(options.into)
    faults = [
        (seed, fault) for half in options.half for seed, fault in enumerate(HALVES[half]) if options.only in fault.name
    ]
    shares = []
    for share in options.shares:
        trials = []
        for seed, fault in faults:
            harm, layer = kept.of(f"{options.chip} harm {fault.name}", partial(bench.harm, fault))
            trial = {"fault": fault.name, "harm": harm, "layer": layer}
            if harm > 1.0:
                key = f"{options.chip} {share} {seed} {fault.name}"
                trial |= kept.of(key, partial(bench.trial, fault, seed, share, WITHIN.get(share, 200)))
            trials.append({"delay": None} | trial)
            print(
                f"{share} {fault.name}: harm {harm:.3g} in {layer}, {trial.get('detector')} after "
                f"{trial.get('delay')}: {trial.get('message', '')[:160]}",
                file=sys.stderr,
            )
        shares.append(summarise(share, trials))
    holds = all(found["rate"] >= REQUIRED.get(found["share"], 0.0) for found in shares)
    document = {
        "benchmark": "guard-foreign",
        "chip": options.chip,
        "model": "r2-nano, 32 x 64 tokens",
        "halves": options.half,
        "harm_needed": HARM,
        "shares": shares,
        "must_hold": {"rate": {str(share): rate for share, rate in REQUIRED.items()}, "holds": holds},
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
