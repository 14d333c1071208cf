"""Packing a recipe's folders of text and chats where they are, as work of a far end on the supervisor's machine. Its
one line says how many rows to train on there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beringia.data.stream import open_stream
from beringia.data.tokenizer import choose_tokenizer
from beringia.processes.far_end import FarEnd
from beringia.processes.protocol import Ended
from beringia.records.orders import PackOrder, RowCounts


def work(document: dict[str, Any], far_end: FarEnd) -> Ended:
    """Pack, or find it packed."""
    order = PackOrder.model_validate(document, strict=False)
    data, seed = order.recipe.data, order.recipe.seed
    tokenizer, channel = choose_tokenizer(data, order.recipe.model), far_end.channel
    stream = open_stream(
        data, seed=seed, directory=Path(order.directory), split="train", tokenizer=tokenizer, beat=channel.beat
    )
    channel.line(RowCounts(rows=stream.rows_of_each))
    return Ended(why="done")
