"""Packing a recipe's folder of text or chats where that folder is, as work of a far end on the supervisor's machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beringia.data.stream import open_stream
from beringia.data.tokenizer import choose_tokenizer
from beringia.processes.far_end import FarEnd
from beringia.processes.protocol import Ended
from beringia.records.orders import PackOrder


def work(document: dict[str, Any], far_end: FarEnd) -> Ended:
    """Pack, or find it packed."""
    order = PackOrder.model_validate(document, strict=False)
    recipe = order.recipe
    tokenizer = choose_tokenizer(recipe.data, recipe.model)
    open_stream(recipe.data, seed=recipe.seed, directory=Path(order.directory), split="train", tokenizer=tokenizer)
    return Ended(why="done")
