"""How often, and how soon, the guard sees planted faults. Prints one JSON object.

    python benchmarks/guard_detection.py --json [--trials 60] [--shares 0.01 0.03 0.1] [--chip emulated:h800]

Each trial goes on from the same trained state, on an emulated chip, with one persistent fault whose kind, onset,
layer or product, and strength are drawn from the trial's seed; the same trials are run at every share. The guard
knows nothing of the fault: it is planted inside the device, through a fault script.

A fault counts where it is **above the bound**, which is established without the guard: one step's gradients with the
fault and without it, from the same state and data, must differ in some layer by more than `HARM` times the noise, which
is what the sound chip's differ there from the CPU's in the same dtype. (For faults in optimizer state: more than `HARM`
roundoffs of bfloat16 in the moment struck.) Faults between the noise and the bound are run too and reported apart;
those below the noise do no harm that could be told from another chip's roundings, and are only counted.

Must hold: at least 90 % of them seen within 200 steps at a share of 1 %, within 50 steps at 10 %.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from guard_false_alarms import make_trainer

HARM = 4.0
"""Times the noise, as in the guard's own bounds, but of whole gradients and not of a layer's replay."""
WARM_STEPS = 40
LATEST_ONSET = 40
WITHIN = {0.01: 200, 0.03: 100, 0.1: 50}
REQUIRED = 0.9
FORWARD_PRODUCTS = 78
"""Matrix products in a forward pass of r2-nano; the backward pass has twice as many, half of them input gradients."""

Gradients = dict[str, torch.Tensor]


def draw_fault(seed: int) -> tuple[str, dict[str, Any]]:
    """Kind and fields of a fault script's table, without the onset."""
    draw = random.Random(seed)
    kind = draw.choice(
        ["wrong-backward", "wrong-linear", "mask-ignored", "stuck-tile", "stuck-tile-everywhere"]
        + ["flip-activations", "flip-gradients", "flip-weights", "flip-optimizer-state"]
    )
    strength = 10 ** draw.uniform(-1.0, 0.0)
    flips = {"flips": draw.choice([1, 4, 16, 64]), "bits": [20, 30], "width": draw.choice([1, 2])}
    tile = {"row": draw.randrange(16), "column": draw.randrange(4), "value": draw.choice([0.0, 1.0, -8.0])}
    forward, either = ({"sites": [draw.randrange(number)]} for number in (FORWARD_PRODUCTS, 3 * FORWARD_PRODUCTS))
    backward = {"sites": [draw.randrange(2 * FORWARD_PRODUCTS)]}
    tensor = {"sites": sorted(draw.sample(range(48), 4))}
    layer = {"sites": [draw.randrange(4)], "length": draw.randrange(0, 48)}
    fields: dict[str, dict[str, Any]] = {
        "wrong-backward": {"kind": "wrong-backward", "strength": strength} | layer,
        "wrong-linear": {"kind": "wrong-backward", "operator": "linear", "strength": strength} | forward,
        "mask-ignored": {"kind": "mask-ignored"} | layer,
        "stuck-tile": {"kind": "stuck-tile"} | tile | either,
        "stuck-tile-everywhere": {"kind": "stuck-tile"} | tile,
        "flip-activations": {"kind": "bit-flip", "target": "activations"} | flips | forward,
        "flip-gradients": {"kind": "bit-flip", "target": "gradients"} | flips | backward,
        "flip-weights": {"kind": "bit-flip", "target": "weights"} | flips | tensor,
        "flip-optimizer-state": {"kind": "bit-flip", "target": "optimizer-state"} | flips | tensor,
    }
    return kind, fields[kind]


def write_script(directory: Path, fields: dict[str, Any], from_step: int) -> str:
    """A fault script with this one fault."""
    lines = ['summary = "one planted fault"', "[[faults]]", f"from_step = {from_step}"]
    lines += [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    path = directory / "fault.toml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


class State:
    """Weights, moments and progress of a trainer, to begin trials from."""

    def __init__(self, trainer: Any) -> None:
        self.tensors = {name: tensor.detach().cpu().clone() for name, tensor in _live(trainer).items()}
        self.step, self.cursor = trainer.step, trainer.cursor

    def restore(self, trainer: Any) -> None:
        """Put it into another trainer."""
        from beringia.train.state import adopt_progress

        with torch.no_grad():
            for name, tensor in _live(trainer).items():
                tensor.copy_(self.tensors[name])
        adopt_progress({"step": self.step}, trainer.optimizer)
        trainer.step, trainer.cursor = self.step, self.cursor


def _live(trainer: Any) -> dict[str, torch.Tensor]:
    from beringia.train.state import live_tensors

    return live_tensors(trainer.decoder, trainer.optimizer)


def gradients(trainer: Any) -> Gradients:
    """Of the step that is due, joined by layer, on the CPU in float64; the trainer stays as it was."""
    trainer.chip.begin_step(trainer.step + 1)
    trainer._accumulate_gradients()
    groups: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, parameter in trainer.decoder.named_parameters():
        if parameter.grad is not None:
            place = name.split(".")[:3] if ".layers." in name else name.split(".")[:2]
            groups[".".join(place)].append(parameter.grad.detach().cpu().double().flatten())
    trainer.optimizer.zero_grad(set_to_none=True)
    for count in trainer.decoder.expert_counts().values():
        count.zero_()
    return {name: torch.cat(parts) for name, parts in groups.items()}


def distances(found: Gradients, reference: Gradients) -> dict[str, float]:
    """Relative error of each layer's gradient; infinite where it is not finite."""
    values = {name: ((found[name] - whole).norm() / whole.norm()).item() for name, whole in reference.items()}
    return {name: value if math.isfinite(value) else math.inf for name, value in values.items()}


class Bench:
    """One chip, one trained state, and what a sound step is there."""

    def __init__(self, chip: str, directory: Path) -> None:
        self.chip = chip
        self.directory = directory
        sound = make_trainer(chip, share=None, steps=1000)
        for _ in range(WARM_STEPS):
            sound.train_step()
        self.state = State(sound)
        self.sound = gradients(sound)
        dtype = str(sound.decoder.compute_dtype).removeprefix("torch.")
        on_cpu = make_trainer(f"cpu:{dtype}", share=None, steps=1000)
        self.state.restore(on_cpu)
        self.noise = distances(self.sound, gradients(on_cpu))

    def trainer(self, fields: dict[str, Any], from_step: int, share: float | None, seed: int) -> Any:
        """A trainer on the chip with the fault, at the trained state; one step is done so that the device has met
        the optimizer's tensors."""
        script = write_script(self.directory, fields, from_step)
        trainer = make_trainer(self.chip, share=share, steps=1000, seed=7, faults=script)
        self.state.restore(trainer)
        if trainer.guard is not None:
            trainer.guard.seed = seed  # which sites come first is a draw of the trial too
        return trainer

    def harm(self, fields: dict[str, Any]) -> float:
        """Most, over layers, of the fault's effect in units of the noise."""
        target = fields.get("target")
        if target in ("weights", "optimizer-state"):
            return self._harm_at_rest(fields, target)
        trainer = self.trainer(fields, 0, None, 0)
        found = distances(gradients(trainer), self.sound)
        return max(found[name] / self.noise[name] for name in found)

    def _harm_at_rest(self, fields: dict[str, Any], target: str) -> float:
        trainer = self.trainer(fields, self.state.step + 2, None, 0)
        trainer.train_step()
        before = {name: tensor.detach().cpu().double().clone() for name, tensor in _live(trainer).items()}
        sound = gradients_without_striking(trainer)
        trainer.chip.begin_step(trainer.step + 1)
        after = {name: tensor.detach().cpu().double() for name, tensor in _live(trainer).items()}
        if target == "optimizer-state":
            change = max(((after[n] - b).norm() / (b.norm() + 1e-300)).item() for n, b in before.items())
            return change / 2.0**-8 if math.isfinite(change) else math.inf
        found = distances(gradients_without_striking(trainer), sound)
        return max(found[name] / self.noise[name] for name in found)

    def trial(self, fields: dict[str, Any], seed: int, share: float, limit: int) -> dict[str, Any]:
        """Train with the fault from a drawn onset on until the guard alarms."""
        onset = self.state.step + random.Random(seed + 1_000_003).randrange(8, LATEST_ONSET)
        trainer = self.trainer(fields, onset, share, seed)
        while trainer.step < onset + limit - 1:
            result = trainer.train_step()
            for event in trainer.guard.take_events():
                if event.kind == "alarm":
                    delay = result.step - onset + 1
                    found = {"detector": event.detector, "site": event.site, "tensor": event.tensor}
                    return {"delay": delay, "false": delay < 1} | found
        return {"delay": None, "false": False, "detector": None, "site": None, "tensor": None}


def gradients_without_striking(trainer: Any) -> Gradients:
    """`gradients`, without telling the chip that a step begins."""
    begin, trainer.chip.begin_step = trainer.chip.begin_step, lambda step: None
    try:
        return gradients(trainer)
    finally:
        trainer.chip.begin_step = begin


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    if trials == 0:
        return 0.0, 1.0
    z, p = 1.959964, successes / trials
    centre, spread = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return (centre - spread) / (1 + z * z / trials), (centre + spread) / (1 + z * z / trials)


def summarise(share: float, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates and delays of one share."""
    within = WITHIN.get(share, 200)
    above = [trial for trial in trials if trial["harm"] > HARM]
    seen = [trial for trial in above if trial["delay"] is not None and trial["delay"] <= within]
    low, high = wilson(len(seen), len(above))
    kinds = sorted({trial["kind"] for trial in trials})
    delays = sorted(trial["delay"] for trial in seen)
    return {
        "share": share,
        "within_steps": within,
        "above_bound": len(above),
        "seen": len(seen),
        "rate": len(seen) / max(1, len(above)),
        "rate_95": [low, high],
        "delay_median": statistics.median(delays) if delays else None,
        "delay_90": delays[math.ceil(0.9 * len(delays)) - 1] if delays else None,
        "between_noise_and_bound": len(trials) - len(above),
        "between_noise_and_bound_seen": sum(t["delay"] is not None for t in trials if t["harm"] <= HARM),
        "alarms_before_onset": sum(trial["false"] for trial in trials),
        "by_kind": {
            kind: f"{sum(t in seen for t in above if t['kind'] == kind)}/{sum(t['kind'] == kind for t in above)}"
            for kind in kinds
        },
        "by_detector": {
            name: sum(t["detector"] == name for t in seen) for name in sorted({t["detector"] for t in seen})
        },
        "missed": [trial for trial in above if trial not in seen],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.03, 0.01])
    parser.add_argument("--chip", default="emulated:h800")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    # The device must be there before torch's autograd makes its queues.
    make_trainer(options.chip, share=None, steps=1)
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(options.chip, Path(directory))
        faults = []
        for seed in range(options.seed, options.seed + options.trials):
            kind, fields = draw_fault(seed)
            faults.append((seed, kind, fields, bench.harm(fields)))
            print(f"{seed} {kind}: harm {faults[-1][3]:.3g} times the noise", file=sys.stderr)
        shares = []
        for share in options.shares:
            trials = []
            for seed, kind, fields, harm in faults:
                if harm <= 1.0:
                    continue
                trial = bench.trial(fields, seed, share, WITHIN.get(share, 200))
                trials.append({"seed": seed, "kind": kind, "harm": harm, "fault": fields} | trial)
                print(f"{share} {seed} {kind}: {trial['detector']} after {trial['delay']}", file=sys.stderr)
            shares.append(summarise(share, trials))
    must = {str(share): REQUIRED for share in (0.01, 0.1)}
    holds = all(found["rate"] >= must.get(str(found["share"]), 0.0) for found in shares)
    document = {
        "benchmark": "guard-detection",
        "chip": options.chip,
        "model": "r2-nano, 32 x 64 tokens",
        "trials": options.trials,
        "noise": bench.noise,
        "harm_needed": HARM,
        "shares": shares,
        "must_hold": {"rate": must, "holds": holds},
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(_without_infinities(document), indent=None if options.json else 2))


def _without_infinities(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    return [_without_infinities(item) for item in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    main()
