"""Training on one chip, as work of a far end: opens the chip, goes through a session, says how that ended.

Its document is an `Order`, its lines are events. It decides nothing: on an alarm or a fault of the chip it says so and
ends.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from beringia.checkpoint.directory import CheckpointDirectory, Owner
from beringia.chips.chip import Chip
from beringia.chips.open import check_present, open_chip
from beringia.errors import BeringiaError
from beringia.machine.memory import keep_freed_memory
from beringia.processes.far_end import FarEnd
from beringia.processes.protocol import Ended
from beringia.processes.ranks import Ranks
from beringia.records.events import CheckpointRejected, Fault
from beringia.records.orders import Order
from beringia.records.run_directory import RunDirectory
from beringia.train import sharding
from beringia.train.reporting import Reporting
from beringia.train.session import CanaryRefused, Session, UnusableCheckpoint

STOPS = True


def work(document: dict[str, Any], far_end: FarEnd) -> Ended:
    """Carry out one order."""
    keep_freed_memory()
    order = Order.model_validate(document, strict=False)
    if order.greeting:
        section = order.recipe.chips[order.chip]
        check_present(section.use, faults=section.faults)
        return Ended(why="done")
    if far_end.root is not None:  # files of its own, which the supervisor does not see
        owner = Owner(order.run_identity, frozenset({order.recipe_hash}))
        CheckpointDirectory(RunDirectory(far_end.root).checkpoints).refuse_foreign(owner)
    reporting = Reporting(far_end.channel)
    chip = _open(order, far_end.ranks)
    session = Session(order, chip, far_end.ranks, reporting)
    far_end.afterwards(sharding.leave)  # last: it may wait for ranks that have failed
    try:
        sharding.join(far_end.ranks, chip, order.epoch)
        session.open()
        return Ended(why=session.train())
    except UnusableCheckpoint as problem:
        reporting.event(CheckpointRejected(step=problem.step, file=problem.file, message=str(problem)))
        return Ended(why="refused", message=str(problem))
    except CanaryRefused as refusal:
        return Ended(why="refused", message=str(refusal))
    except BeringiaError:
        raise
    except Exception as problem:  # anything may be the chip's way to say that it failed: it knows its own words
        fault = chip.classify(problem)
        if fault is None:
            raise
        step = session.step
        reporting.event(Fault(step=step, code=fault.code, category=fault.category, message=fault.message))
        return Ended(why="fault", message=fault.message)


def _open(order: Order, ranks: Ranks) -> Chip:
    section = order.recipe.chips[order.chip]
    memory = RunDirectory(Path(order.root)).chip_memory(order.chip)
    usable = (device for device in itertools.count() if device not in order.excluded_devices)
    index = next(itertools.islice(usable, ranks.local, None))
    return open_chip(section.use, index=index, faults=section.faults, seed=order.recipe.seed, memory=memory)
