"""Tokens a second of our engine and of transformers' `generate`, for one request and for many, in turns.

Both have the same weights, prompts, dtype and device. Beside our speed stands which share of the memory's bandwidth it
is: the weights that a step reads, by the steps a second; bandwidth as measured here, and as the datasheet has it.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from engine import bandwidth, open_sides, take_turns, write_model

from benchmarks.card.parts import Size
from beringia.chips.datasheets import datasheet_of_device
from beringia.chips.open import open_chip

SIZES = {
    "full": {"model": "r2-small", "requests": (1, 64), "tokens": 64, "rounds": 5, "dtype": "bfloat16"},
    "small": {"model": "r2-nano", "requests": (1, 4), "tokens": 8, "rounds": 3, "dtype": "float32"},
}
SAME_ANSWERS = 0.5
"""Of requests, in float32: both take the most likely token, and random weights have few near ties. In bfloat16 a tie
within one rounding is common and everything after it differs, so nothing is asked there."""


def measure(chip: str, size: Size) -> tuple[dict[str, Any], dict[str, bool]]:
    """Speeds by number of requests."""
    plan = SIZES[size]
    found: dict[str, Any] = {key: value for key, value in plan.items() if key != "requests"}
    holds = {}
    sheet = datasheet_of_device(open_chip(chip).identity.sku)
    published = None if sheet is None or sheet.memory.bandwidth is None else sheet.memory.bandwidth.base
    with tempfile.TemporaryDirectory() as directory:
        write_model(plan["model"], directory)
        options = argparse.Namespace(**plan | {"chip": chip, "requests": max(plan["requests"])})
        sides, found["loaded_seconds"] = open_sides(options, ["ours", "transformers"], directory)
        for requests in plan["requests"]:
            one = take_turns(sides, requests, plan["tokens"], plan["rounds"])
            speed = one["tokens_a_second"]["ours"]["median"]
            one["bandwidth"] = bandwidth(chip, directory, plan["dtype"], requests=requests, tokens_a_second=speed)
            one["bandwidth"]["share_of_datasheet"] = published and one["bandwidth"]["used_bytes_a_second"] / published
            found[f"requests {requests}"] = one
            if plan["dtype"] == "float32":
                same = one["same_answers_as_ours"]["transformers"] / requests
                holds[f"same answers, {requests}"] = same >= SAME_ANSWERS
        for side in sides.values():
            side.close()
    return found, holds
