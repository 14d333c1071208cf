"""Taking the model of another run's checkpoint, as work of a far end on the supervisor's machine: it needs torch, and
the supervisor loads none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beringia.machine.memory import keep_freed_memory
from beringia.processes.far_end import FarEnd
from beringia.processes.protocol import Ended
from beringia.records.orders import TakeModelOrder
from beringia.train.trained_model import decoder_of, write_model


def work(document: dict[str, Any], far_end: FarEnd) -> Ended:
    """Write it as a Hugging Face directory."""
    keep_freed_memory()
    order = TakeModelOrder.model_validate(document, strict=False)
    decoder = decoder_of(Path(order.checkpoint), order.recipe)
    far_end.channel.beat()
    write_model(decoder, order.recipe, Path(order.directory))
    return Ended(why="done")
