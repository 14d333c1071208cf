"""The process that trains on one chip: opens it, goes through a session of training, reports how it ended.

Started by the supervisor through the chip's interpreter and launch prefix (`python -m beringia.train.worker`), it hears
an `Order` on standard input and answers with messages on standard output (`records/messages.py`). It decides nothing:
on an alarm or a fault of the chip it says so and ends. With several ranks on one machine the first process starts
torchrun, whose processes are the ranks; inside a torchrun or Slurm environment that already exists, it is a rank at
once.
"""

from __future__ import annotations

import time

_STARTED = time.perf_counter()  # before the imports, which it measures

import itertools  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402
from types import FrameType  # noqa: E402
from typing import NoReturn  # noqa: E402

import torch  # noqa: E402

from beringia.chips.chip import Chip  # noqa: E402
from beringia.chips.open import check_present, open_chip  # noqa: E402
from beringia.errors import BeringiaError  # noqa: E402
from beringia.machine.memory import keep_freed_memory  # noqa: E402
from beringia.records.events import CheckpointRejected, Fault  # noqa: E402
from beringia.records.messages import ORDER_VARIABLE, Ended, Hello, Order  # noqa: E402
from beringia.records.run_directory import RunDirectory  # noqa: E402
from beringia.train import sharding  # noqa: E402
from beringia.train.channel import Channel, Watchdog  # noqa: E402
from beringia.train.ranks import Ranks, ranks_from_environment  # noqa: E402
from beringia.train.session import CanaryRefused, Session, UnusableCheckpoint  # noqa: E402
from beringia.version import __version__  # noqa: E402


def main() -> int:
    """Be a worker, or start the ranks that are."""
    keep_freed_memory()
    order = Order.model_validate_json(os.environ.get(ORDER_VARIABLE) or sys.stdin.readline(), strict=False)
    ranks = ranks_from_environment()
    if ranks is None and order.ranks > 1:
        return _start_ranks(order)
    return _work(order, ranks or Ranks())


def _start_ranks(order: Order) -> int:
    # torchrun starts them, watches them and ends all when one fails; they inherit our standard streams.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={order.ranks}"]
    environment = os.environ | {ORDER_VARIABLE: order.model_dump_json()}
    return subprocess.run([*command, "-m", "beringia.train.worker"], env=environment, check=False).returncode


def _work(order: Order, ranks: Ranks) -> NoReturn:
    channel = Channel(rank=ranks.rank)
    channel.listen()
    _note_signals(channel)
    if ranks.first:
        channel.send(_hello())
    try:
        ended = _train(order, ranks, channel)
    except BeringiaError as problem:
        ended = Ended(why="error", message=str(problem), error=type(problem).__name__)
    except Exception as problem:  # the process boundary: the traceback to the log first, the supervisor ends us then
        traceback.print_exc()
        channel.send(Ended(why="error", message=str(problem), error=type(problem).__name__))
        raise
    if ranks.first or ended.why != "done":
        channel.send(ended)
    sharding.leave()
    # All is written and said. Taking the interpreter down would only keep the supervisor waiting (1.5 s), and torch may
    # abort there over a gloo group that something still holds.
    sys.stderr.flush()
    os._exit(0)


def _train(order: Order, ranks: Ranks, channel: Channel) -> Ended:
    if order.greeting:
        section = order.recipe.chips[order.chip]
        check_present(section.use, faults=section.faults)
        return Ended(why="done")
    chip = _open(order, ranks)
    logs = RunDirectory(Path(order.root)).logs
    channel.watchdog = Watchdog(
        logs / f"stacks-{order.chip}-{order.epoch}-rank{ranks.rank}.txt", order.recipe.supervise.hang_seconds
    )
    session = Session(order, chip, ranks, channel)
    try:
        sharding.join(ranks, chip, order.epoch)
        session.open()
        return Ended(why=session.train())
    except UnusableCheckpoint as problem:
        channel.event(CheckpointRejected(step=problem.step, file=problem.file, message=str(problem)))
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
        channel.event(Fault(step=step, code=fault.code, category=fault.category, message=fault.message))
        return Ended(why="fault", message=fault.message)
    finally:
        channel.watchdog.close()


def _open(order: Order, ranks: Ranks) -> Chip:
    section = order.recipe.chips[order.chip]
    memory = RunDirectory(Path(order.root)).chip_memory(order.chip)
    usable = (device for device in itertools.count() if device not in order.excluded_devices)
    index = next(itertools.islice(usable, ranks.local, None))
    return open_chip(section.use, index=index, faults=section.faults, seed=order.recipe.seed, memory=memory)


def _hello() -> Hello:
    return Hello(
        beringia=__version__,
        torch=torch.__version__,
        python=f"{platform.python_version()} at {sys.executable}",
        imports_seconds=time.perf_counter() - _STARTED,
    )


def _note_signals(channel: Channel) -> None:
    def note(number: int, frame: FrameType | None) -> None:
        channel.stop_requested.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)


if __name__ == "__main__":
    sys.exit(main())
