"""Probing a chip for a model, as work of a far end: its document is a `QualifyOrder`, its lines are evidence.

A fault of the chip ends it with a finding; it may also hang or die, which its starter notices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.errors import ChipUnavailable
from beringia.machine.memory import keep_few_kernels, keep_freed_memory
from beringia.machine.threads import usable_cores
from beringia.processes.far_end import FarEnd
from beringia.processes.protocol import Ended
from beringia.qualify.bundle import read_bundle
from beringia.qualify.candidate import Extent, probe_candidate
from beringia.qualify.evidence import Begun, Fact, Opened, Probed, QualifyOrder
from beringia.qualify.fitting import check_fits, parameters_of
from beringia.qualify.recomputed import recompute
from beringia.qualify.reference import make_bundle
from beringia.qualify.subject import DecoderSubject
from beringia.qualify.trace import TraceExtent

Write = Callable[[Fact], None]


def work(document: dict[str, Any], far_end: FarEnd) -> Ended:
    """Carry out one order."""
    keep_freed_memory()
    keep_few_kernels()
    order = QualifyOrder.model_validate(document, strict=False)
    if order.task == "reference" and order.chip == "cpu":
        _settle_threads(parameters_of(order.model, order.vocabulary_size))
    _work(order, far_end.channel.line)
    return Ended(why="done")


SMALL_PARAMETERS = 5_000_000
"""Of a model in whose operators waking a second thread takes longer than its half of the work: measured, with 1.9
million parameters one thread records a reference in three quarters of the time."""


def _settle_threads(parameters: int) -> None:
    """One for a small model, unless the user has set another number than that of the cores."""
    if parameters < SMALL_PARAMETERS and torch.get_num_threads() == usable_cores():
        torch.set_num_threads(1)


def _work(order: QualifyOrder, write: Write) -> None:
    chip = open_chip(order.chip, faults=order.faults, seed=order.seed)
    dtype = _dtype(order.compute_dtype, chip)
    write(Opened(name=chip.name, identity=chip.identity, compute_dtype=str(dtype).removeprefix("torch.")))
    if order.task == "describe":
        return
    check_fits(order.model, order.layers, order.vocabulary_size)
    subject = DecoderSubject(
        order.model,
        order.seed,
        order.samples,
        order.tokens,
        order.layers,
        run_tokens=order.run_tokens,
        vocabulary_size=order.vocabulary_size,
    )
    if order.task == "reference":
        _make_reference(order, subject, chip, dtype, write)
    else:
        _probe(order, subject, chip, write)


def _make_reference(order: QualifyOrder, subject: DecoderSubject, chip: Chip, dtype: torch.dtype, write: Write) -> None:
    plan = TraceExtent(order.batches, order.steps, order.extent == "whole")

    def say(text: str) -> None:
        write(Begun(probe=text))

    key = None if order.key is None else Path(order.key)
    make_bundle(subject, chip, dtype, Path(order.bundle), plan=plan, limit_bytes=order.limit_bytes, key=key, say=say)


def _probe(order: QualifyOrder, subject: DecoderSubject, chip: Chip, write: Write) -> None:
    extent = Extent(order.longest, order.memory_bytes, order.soak_seconds, order.speed)
    bundle = read_bundle(Path(order.bundle), order.bundle_hash)
    if order.recompute:
        write(Begun(probe="the bundle's float64"))
        write(Probed(result=recompute(subject, bundle)))
    for line in probe_candidate(chip, subject, bundle, extent):
        if isinstance(line, Begun):
            _say(line.probe)
        write(line)


def _dtype(name: str | None, chip: Chip) -> torch.dtype:
    if name is None:
        return chip.capabilities.compute_dtype
    dtype = getattr(torch, name, None)
    if dtype not in chip.capabilities.dtypes:
        raise ChipUnavailable(f"{chip.name} does not compute in {name!r}: choose one that it has, or leave it out.")
    assert isinstance(dtype, torch.dtype)
    return dtype


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
