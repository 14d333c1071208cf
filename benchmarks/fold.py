"""How long it takes to read and fold a long run's record, and a further event. Prints one JSON object.

    python benchmarks/fold.py --json [--events 300000] [--rounds 5]

The record is that of a run of some hundred thousand steps: of every four events three are steps and one is a check of
the guard; a checkpoint every 500 steps, trusted 300 later; a transient fault and its retry every 20,000. Each round
measures everything once: reading and parsing alone, folding what was parsed, both together as a log does when it opens,
and then 2,000 further events, folded, and appended to the log (most of that is writing the line). Times are of the
process's own processor time, which a busy machine disturbs less, and by the clock beside it; figures are medians with
the whole range. Must hold, processor time: parsing and folding together <= 3 s, a further event <= 1 ms.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from beringia.history.fold import Fold
from beringia.history.log import EventLog, read_events
from beringia.machine.threads import usable_cores
from beringia.records.events import (
    AnyEvent,
    CheckDone,
    CheckpointTrusted,
    CheckpointWritten,
    Decision,
    Fault,
    Resumed,
    RunStarted,
    StepDone,
)
from beringia.records.run_directory import RunDirectory

OPEN_LIMIT_SECONDS = 3.0
EVENT_LIMIT_SECONDS = 1e-3
FURTHER = 2000
EVERY, TRUSTED_AFTER, FAULT_EVERY = 500, 300, 20_000


def run_of(count: int) -> Iterator[AnyEvent]:
    """The first `count` events of a long run."""
    for told, event in enumerate(itertools.islice(_long_run(), count)):
        yield event.model_copy(update={"sequence": told, "time": 1.7e9 + told / 4, "epoch": 1, "chip": "preferred"})


def _long_run() -> Iterator[AnyEvent]:
    yield RunStarted(name="long", recipe_hash="ab" * 32, beringia="0", steps=10**6, prefer=("preferred", "fallback"))
    yield Decision(action="start", reason="first chip of train.prefer", to_chip="preferred")
    step, done = 0, 0
    while True:
        step, done = step + 1, done + 1
        yield step_done(step)
        if step % 3 == 0:
            yield check_done(step)
        if step % EVERY == 0:
            yield CheckpointWritten(
                step=step,
                directory=f"checkpoints/step-{step:06d}",
                bytes=10**9,
                state_hash=f"{step:064x}",
                pause_seconds=0.01,
                write_seconds=1.0,
            )
        if step % EVERY == TRUSTED_AFTER and step > EVERY:
            yield CheckpointTrusted(step=step - TRUSTED_AFTER, state_hash=f"{step - TRUSTED_AFTER:064x}", checks=())
        if done % FAULT_EVERY == FAULT_EVERY - 1:
            yield Fault(step=step, code="507014", category="transient", message="aicore timeout")
            back = step - step % EVERY
            yield Decision(action="retry", reason="507014", to_chip="preferred", to_step=back, lost_steps=step - back)
            yield Resumed(step=back, cursor=32 * back, state_hash_expected="", state_hash="", load_seconds=1.0)
            step = back


def step_done(step: int) -> StepDone:
    return StepDone(
        step=step,
        loss=1.0 + 1e-6 * step,
        mtp_loss=1.3456789,
        gradient_norm=0.4321,
        learning_rate=2e-3,
        tokens=1664,
        seconds=0.333,
        cursor=32 * step,
        guard_seconds=0.003,
    )


def check_done(step: int) -> CheckDone:
    return CheckDone(
        step=step,
        detector="layer-shadow",
        site="layers.0",
        tensor="input.gradient",
        value=1.23e-4,
        bound=3.1e-3,
        seconds=0.02,
    )


class Rounds:
    """What each round measured, in seconds: processor time, and by the clock."""

    def __init__(self) -> None:
        self.processor: dict[str, list[float]] = {}
        self.clock: dict[str, list[float]] = {}

    def measure(self, name: str, work: Callable[[], object], times: int = 1) -> None:
        gc.collect()
        began, began_clock = time.process_time(), time.perf_counter()
        work()
        self.processor.setdefault(name, []).append((time.process_time() - began) / times)
        self.clock.setdefault(name, []).append((time.perf_counter() - began_clock) / times)

    def round(self, run: RunDirectory, parsed: list[AnyEvent]) -> None:
        self.measure("parse", lambda: _drain(read_events(run.events)))
        self.measure("fold", lambda: Fold(parsed))
        self.measure("parse_and_fold", lambda: Fold(read_events(run.events)))
        fold = Fold(parsed)
        further = [step_done(fold.situation().step + number) for number in range(1, FURTHER + 1)]
        self.measure("further_event", lambda: [fold.add(event) for event in further], FURTHER)
        log = EventLog(run)
        self.measure("append", lambda: [log.append(event, epoch=1, chip="preferred") for event in further], FURTHER)
        log.close()


def _drain(events: Iterator[AnyEvent]) -> None:
    for _ in events:
        pass


def summary(values: list[float]) -> dict[str, float]:
    ordered = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: float(f"{value:.4g}") for name, value in ordered.items()}


def report(rounds: Rounds, events: int, size: int) -> dict[str, Any]:
    processor = {name: summary(values) for name, values in rounds.processor.items()}
    whole, further = processor["parse_and_fold"]["median"], processor["further_event"]["median"]
    return {
        "benchmark": "fold",
        "machine": {"processor": platform.processor() or platform.machine(), "cores": usable_cores()},
        "python": platform.python_version(),
        "rounds": len(rounds.processor["parse"]),
        "events": events,
        "bytes": size,
        "processor_seconds": processor,
        "clock_seconds": {name: summary(values) for name, values in rounds.clock.items()},
        "limits": {"parse_and_fold": OPEN_LIMIT_SECONDS, "further_event": EVENT_LIMIT_SECONDS},
        "holds": whole <= OPEN_LIMIT_SECONDS and further <= EVENT_LIMIT_SECONDS,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line instead of an indented object")
    parser.add_argument("--events", type=int, default=300_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rounds = Rounds()
    with tempfile.TemporaryDirectory() as directory:
        run = RunDirectory(Path(directory))
        lines = "".join(event.model_dump_json() + "\n" for event in run_of(options.events))
        for _ in range(options.rounds):
            run.events.write_text(lines)
            rounds.round(run, list(read_events(run.events)))
    result = report(rounds, options.events, len(lines))
    print(json.dumps(result, indent=None if options.json else 2))
    return 0 if result["holds"] else 3


if __name__ == "__main__":
    sys.exit(main())
