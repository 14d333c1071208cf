"""Training speed: our compiled decoder beside transformers, in turns, as tokens a second and as a share of peak.

Same weights, batches and optimizer (fused AdamW), no dropped tokens, no multi-token prediction; ours with float32
weights and products in bfloat16, repeatable bit for bit as training is; theirs without such switches, as plain loops
with each of the ways that transformers has for routed experts, the fastest of which counts. `bfloat16 weights` keeps
its weights in bfloat16 too: faster, and not what one trains with. A way of theirs that fails says why. Each side has a
process of its own; a figure is the median over rounds, with the interval that order statistics give.

Operations are counted, not measured (`work_of_a_token.py`); peaks are the datasheet's, and what a large product of
matrices reaches here.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from turns import Side, SideEnded, answer_turns
from work_of_a_token import training_operations

from benchmarks.card.parts import Size
from beringia.chips.chip import Chip
from beringia.chips.datasheets import datasheet_of_device
from beringia.chips.open import open_chip
from beringia.model import load_model, save_model
from beringia.qualify.hardware.rates import product, time_calls

LEARNING_RATE = 3e-4
LOSS_WITHIN = {"bfloat16": 2.0**-8, "float32": 2.0**-16}
"""Relative difference of the first losses, of the same weights on the same tokens: a unit roundoff of bfloat16 for a
mean over thousands of targets, whose own roundings average out; in float32 256 of them, for about as many products
one after another."""
OURS = "ours compiled"


@dataclass(frozen=True)
class Plan:
    """How much is trained."""

    model: str
    dtype: str
    batch: int
    tokens: int
    rounds: int
    steps: int
    product: int
    """Size of the square matrices whose product stands for the reachable peak."""


SIZES: dict[Size, Plan] = {
    "full": Plan("r2-small", "bfloat16", 16, 1024, rounds=7, steps=4, product=8192),
    "small": Plan("r2-nano", "float32", 8, 32, rounds=3, steps=2, product=512),
}


@dataclass(frozen=True)
class Way:
    """How transformers trains."""

    experts: str
    bfloat16_weights: bool = False


WAYS: dict[str, Way] = {
    "transformers eager": Way("eager"),
    "transformers grouped_mm": Way("grouped_mm"),
    "transformers grouped_mm, bfloat16 weights": Way("grouped_mm", bfloat16_weights=True),
}

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def measure(chip_name: str, size: Size) -> tuple[dict[str, Any], dict[str, bool]]:
    """Speeds, ratios, shares of peak; the first losses must agree."""
    plan, chip = SIZES[size], open_chip(chip_name)
    ways = {name: way for name, way in WAYS.items() if plan.dtype == "bfloat16" or not way.bfloat16_weights}
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent, "model")
        decoder = load_model(plan.model, seed=0)
        save_model(decoder, directory)
        job = {"plan": asdict(plan), "directory": str(directory), "chip": chip_name, "device": str(chip.device)}
        file = Path(parent, "job.json")
        file.write_text(json.dumps(job))
        sides = {
            name: Side([sys.executable, "-m", "benchmarks.card.training", name, str(file)]) for name in (OURS, *ways)
        }
        ready, broken = wait_for(sides)
        rounds = take_turns({name: sides[name] for name in ready}, plan)
        for name in ready:
            sides[name].close()
    found = speeds(rounds, plan) | {
        "plan": asdict(plan),
        "ready": ready,
        "broken": broken,
        "share_of_peak": shares_of_peak(rounds, plan, training_operations(decoder, plan.tokens), chip),
    }
    losses = {name: one["loss"] for name, one in ready.items()}
    limit = LOSS_WITHIN[plan.dtype] * losses[OURS]
    theirs = [loss for name, loss in losses.items() if name != OURS and "weights" not in name]
    return found, {"first losses": bool(theirs) and all(abs(loss - losses[OURS]) <= limit for loss in theirs)}


def wait_for(sides: dict[str, Side]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What each side says when it is ready; and why some of transformers' are not."""
    ready, broken = {}, {}
    for name, side in sides.items():
        try:
            ready[name] = side.hear()
        except SideEnded as ended:
            if name == OURS:
                raise
            broken[name] = str(ended)[-1500:]
    if len(ready) == 1:
        raise SideEnded("no way of transformers trains here: " + "\n".join(broken.values()))
    return ready, broken


def take_turns(sides: dict[str, Side], plan: Plan) -> dict[str, list[float]]:
    """Seconds of a step, by side and round; the order turns from round to round."""
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(plan.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rounds[name].append(sides[name].ask({"steps": plan.steps})["seconds"])
    return rounds


def speeds(rounds: dict[str, list[float]], plan: Plan) -> dict[str, Any]:
    """Tokens a second of each side, and how many times transformers' best ours is."""
    tokens = plan.batch * plan.tokens
    best = min((name for name in rounds if name != OURS), key=lambda name: statistics.median(rounds[name]))
    same_weights = [name for name in rounds if name != OURS and "weights" not in name]
    fair = min(same_weights, key=lambda name: statistics.median(rounds[name])) if same_weights else best
    return {
        "tokens_a_second": {name: spread([tokens / one for one in taken]) for name, taken in rounds.items()},
        "transformers_best": best,
        "ours_to_transformers_best": spread(ratios(rounds, best)),
        "transformers_best_with_float32_weights": fair,
        "ours_to_that": spread(ratios(rounds, fair)),
    }


def ratios(rounds: dict[str, list[float]], peer: str) -> list[float]:
    """Times the peer's tokens a second, round by round."""
    return [theirs / own for theirs, own in zip(rounds[peer], rounds[OURS], strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def shares_of_peak(rounds: dict[str, list[float]], plan: Plan, operations: float, chip: Chip) -> dict[str, Any]:
    """Operations a second of each side, over the datasheet's peak and over what a large product reaches here."""
    dtype = getattr(torch, plan.dtype)
    seconds = time_calls(chip, product(chip, dtype, plan.product, plan.product, plan.product)).median
    reached = 2 * plan.product**3 / seconds
    sheet = datasheet_of_device(chip.identity.sku)
    peak = None if sheet is None or plan.dtype != "bfloat16" else sheet.peak.get("bf16")
    shares = {}
    for name, taken in rounds.items():
        rate = operations * plan.batch * plan.tokens / statistics.median(taken)
        shares[name] = {
            "operations_a_second": rate,
            "of_a_large_product": rate / reached,
            "of_datasheet": None if peak is None else rate / peak.base,
        }
    return {"operations_of_a_token": operations, "large_product_operations_a_second": reached, "sides": shares}


# ---- in a side's process


def batches(plan: Plan, vocabulary: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Drawn tokens and their followers; what they say does not matter to the speed."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (4, plan.batch, plan.tokens + 1), generator=generator).to(device)
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]


def our_step(job: dict[str, Any], plan: Plan) -> Step:
    chip = open_chip(job["chip"])
    decoder = load_model(job["directory"])
    decoder.set_compute_dtype(getattr(torch, plan.dtype))
    decoder.to(chip.device)
    if decoder.mtp is not None:
        decoder.mtp.requires_grad_(False)
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=chip.capabilities.fused_optimizer)
    decoder.leave_experts_eager()
    decoder.compile()

    def step(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        losses = decoder(tokens_BT, labels_BT, mtp=False)
        loss = losses.main_sum / losses.target_count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def their_step(way: Way, job: dict[str, Any], plan: Plan) -> Step:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = torch.bfloat16 if way.bfloat16_weights else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["directory"], dtype=dtype, experts_implementation=way.experts
    ).train()
    device = torch.device(job["device"])
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    mixed = plan.dtype == "bfloat16" and not way.bfloat16_weights

    def step(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            logits = model(tokens_BT, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels_BT.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def serve(name: str, job: dict[str, Any]) -> None:
    """A side: its first two steps at once (compilation is in the first), then so many steps for each question."""
    plan = Plan(**job["plan"])

    def prepare() -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
        step = our_step(job, plan) if name == OURS else their_step(WAYS[name], job, plan)
        vocabulary = json.loads(Path(job["directory"], "config.json").read_text())["vocab_size"]
        data = batches(plan, vocabulary, torch.device(job["device"]))
        done = 0

        def train(steps: int) -> tuple[float, float]:
            """Seconds of a step, and the last one's loss: reading it waits for the device."""
            nonlocal done
            began = time.perf_counter()
            for _ in range(steps):
                loss = step(*data[done % len(data)])
                done += 1
            last = float(loss)
            return (time.perf_counter() - began) / steps, last

        first_seconds, loss = train(1)
        train(1)
        return {"loss": loss, "first_step_seconds": first_seconds}, lambda question: {
            "seconds": train(question["steps"])[0]
        }

    answer_turns(prepare)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
