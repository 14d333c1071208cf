"""The stream of training samples: a pure function from (seed, split, sample number) to one row of tokens and labels.

The data cursor of a run is one integer, the number of samples that all ranks have consumed. Any rank takes any slice,
so a run resumes exactly on any number of ranks, and which rank read what is nowhere recorded.

Axes: B rows, T tokens of a row, M questions of a row, L tokens of a question with its completion.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from beringia.data.alphabet import PAD_TOKEN
from beringia.data.counter import Booleans, Integers, Permutation, chance, derive_key, random_words
from beringia.data.documents import DataKind
from beringia.data.pack import Packed, pack
from beringia.data.row_plan import RowPlan, plan_rows, rows_without_targets
from beringia.data.shards import OpenShard, gather, open_shards
from beringia.data.tasks import Split, Task, make_task
from beringia.data.tokenizer import Tokenizer, load_tokenizer
from beringia.errors import DataError
from beringia.records.recipe import DataSection

NO_LOSS = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Batch:
    """Rows of a stream. `labels_BT[b, t]` is the target for position t (already shifted); -100 means no loss there."""

    tokens_BT: torch.Tensor
    """int64"""
    labels_BT: torch.Tensor
    """int64"""


class Rows(Protocol):
    """Where rows come from."""

    def rows(self, indices_B: Integers) -> tuple[Integers, Integers]:
        """Tokens and labels, int64 (B, T) each, of the samples with these numbers."""


@dataclass(frozen=True)
class Stream:
    """Samples by number."""

    source: Rows
    task: Task | None
    """The task with its checker, where the data is a task."""
    identity: str
    """SHA-256 of what the samples are made from; a run that resumes on other data can be told."""
    epoch_samples: int | None = None
    """Samples until data repeats; None where it never does."""
    notes: tuple[str, ...] = ()
    """What was left out or cut, one sentence each, for the caller to report."""

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


def open_stream(data: DataSection, *, seed: int, directory: Path, split: Split, tokenizer: Tokenizer) -> Stream:
    """The stream a recipe asks for; folders are packed under `directory` first. Raises DataError."""
    if data.task is not None:
        return _open_task(data, data.task, seed, split, tokenizer)
    kind: DataKind = "text" if data.text is not None else "chat"
    _ = tokenizer.end  # an evaluation needs one: refused before packing and training, not after
    folder = Path(data.text or data.chat or "")  # the recipe lets exactly one source through
    packed = pack(folder, tokenizer, directory, kind=kind, held_out_fraction=data.held_out_fraction)
    return open_packed(packed, data.sequence_length, seed=seed, split=split, pad=tokenizer.pad)


def open_packed(packed: Packed, sequence_length: int, *, seed: int, split: Split, pad: int) -> Stream:
    """The stream over packed data: every epoch is another permutation of the same rows. Raises DataError."""
    shards = open_shards(packed.directory, packed.manifest, split)
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
    return Stream(rows, None, identity, plan.rows, (*packed.notes, *notes))


def _open_task(data: DataSection, name: str, seed: int, split: Split, tokenizer: Tokenizer) -> Stream:
    task = make_task(name, digits=data.digits, seed=seed, held_out_fraction=data.held_out_fraction)
    if tokenizer.hash != load_tokenizer("digits").hash:
        raise DataError(
            f"{name} is written in the 54 symbols of the digits tokenizer, not those of {tokenizer.source}."
        )
    rows = TaskRows(task, split, data.sequence_length, data.long_fraction)
    parts = (name, data.digits, str(data.long_fraction), str(data.held_out_fraction), data.sequence_length, seed, split)
    return Stream(rows, task, _identity(parts))


def _identity(parts: tuple[object, ...]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class PackedRows:
    """Rows of packed shards, in an order that is a permutation of its own in every epoch."""

    shards: list[OpenShard]
    plan: RowPlan
    key: int
    sequence_length: int
    pad: int

    def rows(self, indices_B: Integers) -> tuple[Integers, Integers]:
        """Tokens and labels, int64 (B, T) each."""
        epochs_B, places_B = np.divmod(indices_B, self.plan.rows)
        chosen_B = np.empty_like(places_B)
        for epoch in np.unique(epochs_B):
            here = epochs_B == epoch
            chosen_B[here] = Permutation(self.plan.rows, derive_key(self.key, int(epoch)))(places_B[here])
        tokens, learned = gather(self.shards, self.plan.spans(chosen_B), self.sequence_length + 1, self.pad)
        labels_BT = np.where(learned[:, 1:], tokens[:, 1:], NO_LOSS)
        return np.ascontiguousarray(tokens[:, :-1]), labels_BT


@dataclass(frozen=True)
class TaskRows:
    """Rows of questions with their completions, one after the other from the row's first token, the last one cut off.

    Cutting the last keeps the mix honest: whether it is short or long is decided by a mark that is seen before its
    length matters, so the share of long completions among the marks of a row is `long_fraction` (Wald's identity),
    while dropping what does not fit would favour short ones. The question's own digits are random: no loss on them.
    """

    task: Task
    split: Split
    sequence_length: int
    long_fraction: float

    def __post_init__(self) -> None:
        longest = self.task.text_tokens(long=True)
        if longest > self.sequence_length + 1:
            raise DataError(
                f"{self.task.name} with {self.task.digits} digits needs {longest - 1} tokens a sample; "
                f"data.sequence_length is {self.sequence_length}: raise it or take fewer digits."
            )

    def rows(self, indices_B: Integers) -> tuple[Integers, Integers]:
        """Tokens and labels, int64 (B, T) each."""
        digits_BMN, long_BM = self._draw(indices_B)
        tokens_BML, lengths_BM = self._texts(digits_BMN, long_BM)
        starts_BM = lengths_BM.cumsum(axis=1) - lengths_BM
        places_L = np.arange(tokens_BML.shape[-1])
        width = self.sequence_length + 1
        # Everything past the row's end, or past a text's end, lands in one column too many, which is then cut off.
        columns_BML = np.where(places_L < lengths_BM[..., None], starts_BM[..., None] + places_L, width)
        columns_BML = np.minimum(columns_BML, width)
        rows_B = np.arange(len(indices_B))[:, None, None]
        tokens = np.full((len(indices_B), width + 1), PAD_TOKEN, dtype=np.int64)
        targets = np.full_like(tokens, NO_LOSS)
        tokens[rows_B, columns_BML] = tokens_BML
        targets[rows_B, columns_BML] = np.where(places_L > self.task.digits, tokens_BML, NO_LOSS)
        return np.ascontiguousarray(tokens[:, : width - 1]), np.ascontiguousarray(targets[:, 1:width])

    def _draw(self, indices_B: Integers) -> tuple[Integers, Booleans]:
        words_a_question = self.task.digits + 1
        counters_BM = indices_B[:, None] * self._questions() + np.arange(self._questions())
        counters = counters_BM[..., None] * words_a_question + np.arange(words_a_question)
        words = random_words(derive_key(self.task.seed, self.task.name, self.split, "samples"), counters)
        return self.task.draw(words[..., :-1], self.split), chance(words[..., -1], self.long_fraction)

    def _texts(self, digits_BMN: Integers, long_BM: Booleans) -> tuple[Integers, Integers]:
        completions = self.task.long_tokens(digits_BMN)
        short = self.task.short_tokens(digits_BMN)
        head = completions[..., : short.shape[-1]]
        head[...] = np.where(long_BM[..., None], head, short)
        tokens_BML = np.concatenate([self.task.question_tokens(digits_BMN), completions], axis=-1)
        lengths_BM = np.where(long_BM, self.task.text_tokens(long=True), self.task.text_tokens(long=False))
        return tokens_BML, lengths_BM

    def _questions(self) -> int:
        """How many of the shortest texts it takes to fill a row."""
        return -(-(self.sequence_length + 1) // self.task.text_tokens(long=False))
