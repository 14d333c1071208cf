"""The planted defects of the detection benchmark: drawn from a seed, by half.

The development half has some kinds, sites and seeds; the test half has those kinds at other sites, and kinds of its
own. A case is a fault script's table on an emulated chip.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHIPS = ("emulated:ascend-910b", "emulated:h800", "emulated:mi300x", "emulated:a100")
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 78, 156
"""Matrix products in a forward and a backward pass of r2-nano on an emulated chip (attention apart)."""
LAYERS = 4
"""With the multi-token layer: as many attention calls."""


@dataclass(frozen=True)
class Case:
    """One defect on one chip."""

    name: str
    half: str
    kind: str
    strength: str
    chip: str
    world: int
    """Seed of the model and its data."""
    fault: dict[str, Any]

    def write(self, directory: Path) -> str:
        """The fault script as a file."""
        lines = ['summary = "one planted defect"', "[[faults]]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in self.fault.items()]
        path = directory / f"{self.name}.toml"
        path.write_text("\n".join(lines) + "\n")
        return str(path)


def _forward(draw: random.Random) -> dict[str, Any]:
    return {"direction": "forward", "sites": sorted(draw.sample(range(FORWARD_PRODUCTS), 2))}


def _backward(draw: random.Random) -> dict[str, Any]:
    return {"direction": "backward", "sites": sorted(draw.sample(range(BACKWARD_PRODUCTS), 4))}


def _layers(draw: random.Random) -> dict[str, Any]:
    return {"sites": sorted(draw.sample(range(LAYERS), draw.choice([1, 2])))}


def wrong_attention_gradient(draw: random.Random, severe: bool) -> dict[str, Any]:
    strength = draw.uniform(0.5, 1.0) if severe else draw.uniform(0.15, 0.4)
    return {"kind": "wrong-backward", "length": draw.randrange(0, 40), "strength": strength} | _layers(draw)


def wrong_linear_gradient(draw: random.Random, severe: bool) -> dict[str, Any]:
    strength = draw.uniform(0.4, 1.0) if severe else draw.uniform(0.08, 0.3)
    sites = sorted(draw.sample(range(FORWARD_PRODUCTS), 4))
    return {"kind": "wrong-backward", "operator": "linear", "strength": strength, "sites": sites}


def mask_ignored(draw: random.Random, severe: bool) -> dict[str, Any]:
    length = draw.randrange(0, 24) if severe else draw.randrange(30, 56)
    return {"kind": "mask-ignored", "length": length} | ({} if severe else _layers(draw))


def mask_ignored_far_out(draw: random.Random, severe: bool) -> dict[str, Any]:
    """Beyond every captured length."""
    return {"kind": "mask-ignored", "length": draw.randrange(70, 500) if severe else draw.randrange(600, 2000)}


def stuck_tile(draw: random.Random, severe: bool) -> dict[str, Any]:
    tile = {"row": draw.randrange(4), "column": draw.randrange(2), "value": draw.choice([0.0, 1.0, -8.0])}
    sites = sorted(draw.sample(range(FORWARD_PRODUCTS), 8 if severe else 2))
    return {"kind": "stuck-tile", "direction": "forward", "sites": sites} | tile


def stuck_tile_in_gradients(draw: random.Random, severe: bool) -> dict[str, Any]:
    tile = {"row": draw.randrange(2), "column": draw.randrange(2), "value": draw.choice([0.0, 0.01, -0.1])}
    sites = sorted(draw.sample(range(BACKWARD_PRODUCTS), 24 if severe else 6))
    return {"kind": "stuck-tile", "direction": "backward", "sites": sites} | tile


def flipped_activations(draw: random.Random, severe: bool) -> dict[str, Any]:
    flips = {
        "flips": draw.choice([16, 64]) if severe else draw.choice([1, 4]),
        "bits": [22, 29] if severe else [20, 27],
    }
    sites = sorted(draw.sample(range(FORWARD_PRODUCTS), 6 if severe else 2))
    return {"kind": "bit-flip", "target": "activations", "sites": sites} | flips


def flipped_gradients(draw: random.Random, severe: bool) -> dict[str, Any]:
    flips = {"flips": 16 if severe else 2, "bits": [25, 30] if severe else [22, 28]}
    sites = sorted(draw.sample(range(BACKWARD_PRODUCTS), 4))
    return {"kind": "bit-flip", "target": "gradients", "sites": sites} | flips


def flipped_weights(draw: random.Random, severe: bool) -> dict[str, Any]:
    flips = {"flips": 64 if severe else 4, "bits": [26, 29] if severe else [23, 27]}
    return {"kind": "bit-flip", "target": "weights", "sites": sorted(draw.sample(range(40), 4))} | flips


def flipped_moments(draw: random.Random, severe: bool) -> dict[str, Any]:
    flips = {"flips": 64 if severe else 8, "bits": [26, 29] if severe else [23, 27]}
    return {"kind": "bit-flip", "target": "optimizer-state", "sites": sorted(draw.sample(range(40), 4))} | flips


def truncating_cast(draw: random.Random, severe: bool) -> dict[str, Any]:
    if severe:
        return {"kind": "wrong-cast", "rounding": "scaled", "strength": draw.uniform(0.02, 0.1)}
    return {"kind": "wrong-cast", "rounding": draw.choice(["truncate", "floor"])}


def short_accumulator(draw: random.Random, severe: bool) -> dict[str, Any]:
    bits = draw.choice([4, 5]) if severe else draw.choice([6, 7])
    return {"kind": "short-accumulator", "bits": bits, "attention": draw.random() < 0.5}


def short_accumulator_backward(draw: random.Random, severe: bool) -> dict[str, Any]:
    bits = draw.choice([3, 4]) if severe else draw.choice([5, 6])
    return {"kind": "short-accumulator", "bits": bits, "direction": "backward"}


def saturation(draw: random.Random, severe: bool) -> dict[str, Any]:
    return {"kind": "saturate", "limit": draw.uniform(0.5, 1.0) if severe else draw.uniform(1.5, 3.0)}


def flushed(draw: random.Random, severe: bool) -> dict[str, Any]:
    """As a format with few exponents would: mild strengths strike the smallest gradients only."""
    threshold = 10 ** (draw.uniform(-4.0, -3.0) if severe else draw.uniform(-5.5, -4.5))
    return {"kind": "flush", "threshold": threshold, "direction": "backward"}


def flushed_forward(draw: random.Random, severe: bool) -> dict[str, Any]:
    return {
        "kind": "flush",
        "threshold": draw.uniform(0.2, 0.5) if severe else draw.uniform(0.05, 0.15),
        "direction": "forward",
    }


def wrong_function(draw: random.Random, severe: bool) -> dict[str, Any]:
    family = draw.choice(["rsqrt", "silu", "sigmoid", "mean"])
    strength = draw.uniform(0.1, 0.5) if severe else draw.uniform(0.02, 0.06)
    return {"kind": "wrong-function", "operator": family, "strength": strength}


def wrong_function_backward(draw: random.Random, severe: bool) -> dict[str, Any]:
    family = draw.choice(["sum", "mul", "add", "sigmoid", "log_softmax", "attention"])
    strength = draw.uniform(0.2, 0.6) if severe else draw.uniform(0.06, 0.15)
    return {"kind": "wrong-function", "operator": family, "strength": strength, "direction": "backward"} | (
        {"sites": list(range(0, 400, 3))} if family in ("mul", "add") else {}
    )


def wrong_layout(draw: random.Random, severe: bool) -> dict[str, Any]:
    sites = sorted(draw.sample(range(FORWARD_PRODUCTS), 16 if severe else 4))
    return {
        "kind": "wrong-layout",
        "strength": draw.uniform(0.5, 1.0) if severe else draw.uniform(0.1, 0.3),
        "sites": sites,
    }


def garbage_index(draw: random.Random, severe: bool) -> dict[str, Any]:
    return {"kind": "garbage-index", "beyond": draw.randrange(6, 12) if severe else draw.randrange(40, 47)}


def lost_additions(draw: random.Random, severe: bool) -> dict[str, Any]:
    operator = draw.choice(["embedding", "sum", "any"])
    return {
        "kind": "lost-additions",
        "operator": operator,
        "strength": draw.uniform(0.2, 0.5) if severe else draw.uniform(0.03, 0.1),
    }


def wrong_optimizer(draw: random.Random, severe: bool) -> dict[str, Any]:
    error = draw.choice(["stale-moment", "lost-update", "scaled"] if severe else ["scaled", "lost-update"])
    strength = draw.uniform(0.5, 1.0) if severe else draw.uniform(0.2, 0.4)
    fields: dict[str, Any] = {"kind": "wrong-optimizer", "error": error}
    fields |= {} if error == "stale-moment" else {"strength": strength}
    return fields | {"sites": sorted(draw.sample(range(40), 8))}


def wrong_optimizer_everywhere(draw: random.Random, severe: bool) -> dict[str, Any]:
    if severe:
        return {"kind": "wrong-optimizer", "error": draw.choice(["stale-moment", "no-bias-correction"])}
    return {"kind": "wrong-optimizer", "error": "scaled", "strength": draw.uniform(0.2, 0.4)}


def intermittent(draw: random.Random, severe: bool) -> dict[str, Any]:
    """Comes and goes: one pass in two or three."""
    rate = {"rate": draw.uniform(0.4, 0.6)}
    return (
        wrong_attention_gradient(draw, severe) | rate if draw.random() < 0.5 else flipped_gradients(draw, True) | rate
    )


def unrepeatable_order(draw: random.Random, severe: bool) -> dict[str, Any]:
    """Harmless: another order of additions each time."""
    return {"kind": "nondeterministic-reduction"}


def nan_to_zero(draw: random.Random, severe: bool) -> dict[str, Any]:
    """Harmless where nothing overflows."""
    return {"kind": "nan-to-zero"}


def low_bits(draw: random.Random, severe: bool) -> dict[str, Any]:
    """Harmless: the last bits of a few numbers."""
    target = draw.choice(["activations", "gradients"])
    return {
        "kind": "bit-flip",
        "target": target,
        "sites": [draw.randrange(FORWARD_PRODUCTS)],
        "flips": draw.choice([1, 4]),
        "bits": [16, 18],
    }


def long_accumulator(draw: random.Random, severe: bool) -> dict[str, Any]:
    """Harmless: an accumulator shorter than float32, longer than what is stored."""
    return {"kind": "short-accumulator", "bits": draw.randrange(11, 16)}


def high_limit(draw: random.Random, severe: bool) -> dict[str, Any]:
    """Harmless: saturation far above every number."""
    return {"kind": "saturate", "limit": 10 ** draw.uniform(3, 30)}


def low_threshold(draw: random.Random, severe: bool) -> dict[str, Any]:
    """Harmless: numbers flushed that are too small to matter."""
    return {"kind": "flush", "threshold": 10 ** draw.uniform(-30, -10)}


def half_away(draw: random.Random, severe: bool) -> dict[str, Any]:
    """Harmless: ties of casts rounded away from zero."""
    return {"kind": "wrong-cast", "rounding": "half-away"}


def slight_function(draw: random.Random, severe: bool) -> dict[str, Any]:
    """Harmless: a function off by a few units of float32."""
    return {
        "kind": "wrong-function",
        "operator": draw.choice(["rsqrt", "sigmoid", "silu"]),
        "strength": draw.uniform(1e-6, 3e-5),
    }


DEVELOPED = (
    wrong_attention_gradient,
    mask_ignored,
    stuck_tile,
    flipped_activations,
    flipped_weights,
    truncating_cast,
    short_accumulator,
    saturation,
    wrong_function,
    wrong_optimizer,
    wrong_linear_gradient,
    intermittent,
)
"""Kinds of both halves."""
UNSEEN = (
    mask_ignored_far_out,
    stuck_tile_in_gradients,
    flipped_gradients,
    flipped_moments,
    short_accumulator_backward,
    flushed,
    flushed_forward,
    wrong_function_backward,
    wrong_layout,
    garbage_index,
    lost_additions,
    wrong_optimizer_everywhere,
)
"""Kinds of the test half alone."""
HARMLESS_DEVELOPED = (unrepeatable_order, low_bits, long_accumulator, high_limit)
HARMLESS_UNSEEN = (nan_to_zero, low_threshold, half_away, slight_function)


def cases(half: str, per_kind: int) -> list[Case]:
    """All cases of a half: every kind, mild and severe, `per_kind` of each; harmless kinds as many."""
    kinds = DEVELOPED if half == "development" else DEVELOPED + UNSEEN
    harmless = HARMLESS_DEVELOPED if half == "development" else HARMLESS_DEVELOPED + HARMLESS_UNSEEN
    worlds = (0, 1) if half == "development" else (100, 101, 102)
    made = []
    for kind in (*kinds, *harmless):
        strengths = ("harmless",) if kind in harmless else ("mild", "severe")
        for strength in strengths:
            for number in range(per_kind if kind not in harmless else 2 * per_kind):
                draw = random.Random(f"{half}/{kind.__name__}/{strength}/{number}")
                made.append(
                    Case(
                        name=f"{half}-{kind.__name__}-{strength}-{number}",
                        half=half,
                        kind=kind.__name__,
                        strength=strength,
                        chip=CHIPS[draw.randrange(len(CHIPS))],
                        world=worlds[draw.randrange(len(worlds))],
                        fault=kind(draw, strength == "severe"),
                    )
                )
    return made
