"""Starting a training worker where its chip is."""

from __future__ import annotations

from pathlib import Path

from beringia.processes.child import Child, start
from beringia.records.orders import Order
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.chip_command import chip_command, patience_of

WORKER = "beringia.train.worker"


def start_worker(label: str, recipe: Recipe, order: Order, run: RunDirectory, log: str) -> Child:
    """A training worker where the chip of this label is. Raises HandshakeError."""
    chip = recipe.chips[label]
    stacks = f"stacks-{label}-{order.epoch}-rank{{rank}}.txt"
    return start(
        chip_command(label, chip, WORKER, run),
        order,
        run.logs / f"{log}.log",
        patience=patience_of(recipe.supervise),
        ranks=order.ranks,
        stacks=str(RunDirectory(Path(order.root)).logs / stacks),
        shared_input=True,
    )
