"""The stream of training samples: a pure function from (seed, split, sample number) to one row of tokens and labels.

The data cursor of a run is one integer, the number of samples that all ranks have consumed. Any rank takes any slice,
so a run resumes exactly on any number of ranks, and which rank read what is nowhere recorded. Of several data sets each
has a cursor of its own, which follows from that one.

Axes: B rows, T tokens of a row.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from beringia.data.alphabet import END_TOKEN, SPECIALS, SYMBOLS
from beringia.data.counter import Integers, derive_key
from beringia.data.documents import DataKind
from beringia.data.mixture import MixedRows, interleave
from beringia.data.pack import Packed, pack
from beringia.data.row_plan import plan_rows, rows_without_targets
from beringia.data.rows import PackedRows, Respelled, Rows, TaskRows
from beringia.data.shards import open_shards
from beringia.data.tasks import Split, Task, make_task
from beringia.data.tokenizer import Tokenizer, load_tokenizer
from beringia.errors import DataError
from beringia.records.files import Beat, at_rest
from beringia.records.recipe import DataSection
from beringia.records.shares import rows_in_a_period


@dataclass(frozen=True)
class Batch:
    """Rows of a stream. `labels_BT[b, t]` is the target for position t (already shifted); -100 means no loss there."""

    tokens_BT: torch.Tensor
    """int64"""
    labels_BT: torch.Tensor
    """int64"""


@dataclass(frozen=True)
class Stream:
    """Samples by number."""

    source: Rows
    task: Task | None
    """The task with its checker, where the data is a task."""
    identity: str
    """SHA-256 of what the samples are made from; a run that resumes on other data can be told."""
    rows_of_each: tuple[int | None, ...] = (None,)
    """Rows of each data set; None where it is a task, which never repeats."""
    notes: tuple[str, ...] = ()
    """What was left out or cut, one sentence each, for the caller to report."""

    @property
    def epoch_samples(self) -> int | None:
        """Samples until data repeats; None where it never does. Of several data sets as many as they hold together."""
        known = [rows for rows in self.rows_of_each if rows is not None]
        return sum(known) if len(known) == len(self.rows_of_each) else None

    def cursors(self, cursor: int) -> list[int] | None:
        """The cursor of each data set when the stream's is `cursor`; None where there is one."""
        return self.source.order.cursors(cursor) if isinstance(self.source, MixedRows) else None

    def samples(self, start: int, count: int) -> Batch:
        """Samples start, ..., start + count - 1."""
        tokens_BT, labels_BT = self.source.rows(np.arange(start, start + count, dtype=np.int64))
        return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(labels_BT))

    def fingerprint(self, start: int, count: int) -> str:
        """SHA-256 of the tokens and labels of those samples."""
        batch = self.samples(start, count)
        digest = hashlib.sha256()
        for values_BT in (batch.tokens_BT, batch.labels_BT):
            digest.update(np.ascontiguousarray(values_BT.numpy().astype("<i8")).tobytes())
        return digest.hexdigest()


def open_stream(
    data: DataSection, *, seed: int, directory: Path, split: Split, tokenizer: Tokenizer, beat: Beat = at_rest
) -> Stream:
    """The stream a recipe asks for; folders are packed under `directory` first. `beat` is called again and again while
    that takes. Raises DataError."""
    if data.mix:
        return _open_mixture(data, seed, directory, split, tokenizer, beat)
    if data.task is not None:
        return _open_task(data, data.task, seed, split, tokenizer)
    kind: DataKind = "text" if data.text is not None else "chat"
    _ = tokenizer.end  # an evaluation needs one: refused before packing and training, not after
    folder = Path(data.text or data.chat or "")  # the recipe lets exactly one source through
    packed = pack(folder, tokenizer, directory, kind=kind, held_out_fraction=data.held_out_fraction, beat=beat)
    return open_packed(packed, data.sequence_length, seed=seed, split=split, pad=tokenizer.pad, beat=beat)


def open_packed(
    packed: Packed, sequence_length: int, *, seed: int, split: Split, pad: int, beat: Beat = at_rest
) -> Stream:
    """The stream over packed data: every epoch is another permutation of the same rows. Raises DataError."""
    shards = open_shards(packed.directory, packed.manifest, split, beat)
    plan, notes = plan_rows(shards, packed.manifest.settings.kind, sequence_length)
    silent = rows_without_targets(shards, plan)
    if len(silent) == plan.rows:
        raise DataError(
            f"The {split} part of {packed.manifest.folder} holds nothing to learn within data.sequence_length = "
            f"{sequence_length} tokens: raise it or add data."
        )
    if silent:
        notes += (f"{len(silent)} of {plan.rows} rows hold nothing to learn (the first: row {silent[0]}, from 0).",)
    if split == "held-out":  # the same sentence with another number is said of what is trained on
        notes = tuple(f"Held out: {note}" for note in notes)
    rows = PackedRows(shards, plan, derive_key(seed, split), sequence_length, pad)
    identity = _identity((packed.manifest.identity, sequence_length, seed, split))
    return Stream(rows, None, identity, (plan.rows,), (*packed.notes, *notes))


def _open_task(data: DataSection, name: str, seed: int, split: Split, tokenizer: Tokenizer) -> Stream:
    if tokenizer.hash != load_tokenizer("digits").hash:
        raise DataError(
            f"{name} is written in the 54 symbols of the digits tokenizer, not those of {tokenizer.source}."
        )
    task = make_task(name, digits=data.digits, seed=seed, held_out_fraction=data.held_out_fraction)
    rows = TaskRows(task, split, data.sequence_length, data.long_fraction)
    parts = (name, data.digits, str(data.long_fraction), str(data.held_out_fraction), data.sequence_length, seed, split)
    return Stream(rows, task, _identity(parts))


def _open_mixture(
    data: DataSection, seed: int, directory: Path, split: Split, tokenizer: Tokenizer, beat: Beat
) -> Stream:
    """The sources of `mix` in one order. Each is a stream of its own, with a seed and a directory of its own: two that
    are alike are read in different orders, and one that is not here any more cannot be taken for another."""
    streams = [
        _open_source(source, derive_key(seed, "mix", number), directory / f"mix-{number}", split, tokenizer, beat)
        for number, source in enumerate(data.sources)
    ]
    shares = rows_in_a_period([one.weight for one in data.mix])
    notes = (
        f"data.mix.{number} ({source.words}): {note}"
        for number, (source, stream) in enumerate(zip(data.sources, streams, strict=True))
        for note in stream.notes
    )
    return Stream(
        MixedRows([stream.source for stream in streams], interleave(shares)),
        None,
        _identity((shares, [stream.identity for stream in streams])),
        tuple(stream.epoch_samples for stream in streams),
        tuple(notes),
    )


def _open_source(
    data: DataSection, seed: int, directory: Path, split: Split, tokenizer: Tokenizer, beat: Beat
) -> Stream:
    digits = load_tokenizer("digits")
    if data.task is None or tokenizer.hash == digits.hash:
        return open_stream(data, seed=seed, directory=directory, split=split, tokenizer=tokenizer, beat=beat)
    stream = open_stream(data, seed=seed, directory=directory, split=split, tokenizer=digits)
    rows = Respelled(stream.source, _symbols_of(tokenizer, data.task))
    return Stream(rows, stream.task, _identity((stream.identity, tokenizer.hash)))


def _symbols_of(tokenizer: Tokenizer, task: str) -> Integers:
    """The token of each symbol that tasks are written in. Raises DataError where one has none of its own."""
    tokens = np.full(len(SYMBOLS), tokenizer.pad, dtype=np.int64)
    tokens[END_TOKEN] = tokenizer.end
    for number, symbol in enumerate(SYMBOLS[len(SPECIALS) :], len(SPECIALS)):
        spelled = tokenizer.encode(symbol)
        if len(spelled) != 1:
            raise DataError(
                f"{task} is written symbol by symbol, and {symbol!r} is {len(spelled)} tokens for the tokenizer of "
                f"{tokenizer.source}: leave the task out of data.mix, or take a tokenizer that has it as one."
            )
        tokens[number] = spelled[0]
    return tokens


def _identity(parts: tuple[object, ...]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
