"""Samples as files: what was sampled from which prompt, by whom, with which log-probabilities, and what it was worth.

One safetensors file, lists of unlike lengths laid flat beside their lengths; who sampled is its metadata. It appears
complete or not at all. No torch: whoever moves samples between machines has none.

N samples, T tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from beringia.errors import RunError
from beringia.records.files import write_bytes
from beringia.records.record import Record

NO_LOSS = -100
"""The label that a loss leaves out."""
_FINISHES = ("stop", "length")
_FORMAT = 1
_LEAST_LOGPROB = -3.0e38
"""They are kept in float32."""
_META = "beringia.samples"


class Source(Record):
    """Who sampled: equal for all samples of one worker with one version of the weights."""

    worker: str
    chip: str
    """Label in the recipe."""
    identity_hash: str
    """Of that chip."""
    version: int
    """Of the weights: the learner's steps that are in them."""
    weights_hash: str
    """Of the weights as the sampler multiplied with them."""
    dtype: str
    temperature: float


@dataclass(frozen=True)
class Sample:
    """One completion of a prompt."""

    prompt: int
    """Its number in the order of prompts; samples of one prompt are a group."""
    number: int
    """Within its group."""
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    """The new ones, the end token among them."""
    logprobs: tuple[float, ...]
    """Of the new tokens, as they were sampled: over the temperature, before any filter."""
    finish: str
    """`stop`, or `length` where it was cut off."""
    source: Source
    reward: float | None = None
    """None: not scored, or no reward applies."""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.logprobs) or not self.tokens or not self.prompt_tokens:
            raise ValueError(
                "a sample has a prompt and at least one new token, each new token with its log-probability"
            )
        if not all(_LEAST_LOGPROB <= one <= 0.0 for one in self.logprobs):
            raise ValueError("a log-probability is a finite number of at most 0")
        if self.finish not in _FINISHES:
            raise ValueError(f"a sample ends by {' or '.join(_FINISHES)}")


@dataclass(frozen=True)
class Rows:
    """Samples as rows of equal length, padded at their ends."""

    tokens_NT: NDArray[np.int64]
    """Prompt and new tokens but the last."""
    labels_NT: NDArray[np.int64]
    """Of each position the new token after it, -100 where that is none."""
    logprobs_NT: NDArray[np.float32]
    """Of the labels, as they were sampled; 0 where there is none."""


def write_samples(path: Path, samples: Sequence[Sample]) -> str:
    """Write them; returns the file's SHA-256. Raises StorageFull, NotWritable."""
    sources = list(dict.fromkeys(sample.source for sample in samples))
    columns = {
        "prompt": np.array([sample.prompt for sample in samples], np.int64),
        "number": np.array([sample.number for sample in samples], np.int32),
        "source": np.array([sources.index(sample.source) for sample in samples], np.int32),
        "finish": np.array([_FINISHES.index(sample.finish) for sample in samples], np.uint8),
        "reward": np.array([math.nan if one.reward is None else one.reward for one in samples], np.float64),
        "prompt_lengths": np.array([len(sample.prompt_tokens) for sample in samples], np.int32),
        "lengths": np.array([len(sample.tokens) for sample in samples], np.int32),
        "prompt_tokens": np.array([token for sample in samples for token in sample.prompt_tokens], np.int32),
        "tokens": np.array([token for sample in samples for token in sample.tokens], np.int32),
        "logprobs": np.array([one for sample in samples for one in sample.logprobs], np.float32),
    }
    told = {"format": _FORMAT, "sources": [source.model_dump(mode="json") for source in sources]}
    content = save(columns, {_META: json.dumps(told)})
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def read_samples(path: Path, sha256: str | None = None) -> list[Sample]:
    """The samples of a file, which has this hash. Raises RunError where it is not there, damaged, or another one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"The samples at {path} cannot be read: {error.strerror}.") from None
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise RunError(f"The samples at {path} are not those that were told of: their hash is another.")
    try:
        told, columns = _metadata(content), load(content)
        sources = [Source.model_validate(source) for source in told["sources"]]
        return [*_samples(columns, sources)]
    except (SafetensorError, ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise RunError(
            f"The samples at {path} are damaged, or of another version of Beringia ({str(error).splitlines()[0]})."
        ) from None


def scored(samples: Iterable[Sample], rewards: Iterable[float | None]) -> list[Sample]:
    """The samples with their rewards. Raises ValueError where there are more of one than of the other."""
    return [replace(sample, reward=reward) for sample, reward in zip(samples, rewards, strict=True)]


def rows_of(samples: Sequence[Sample], pad: int) -> Rows:
    """As rows that a model takes, each as long as the longest needs."""
    width = max((len(one.prompt_tokens) + len(one.tokens) - 1 for one in samples), default=0)
    tokens_NT = np.full((len(samples), width), pad, np.int64)
    labels_NT = np.full((len(samples), width), NO_LOSS, np.int64)
    logprobs_NT = np.zeros((len(samples), width), np.float32)
    for row, sample in enumerate(samples):
        whole = (*sample.prompt_tokens, *sample.tokens)
        end, first = len(whole) - 1, len(sample.prompt_tokens) - 1
        tokens_NT[row, :end] = whole[:-1]
        labels_NT[row, first:end] = sample.tokens
        logprobs_NT[row, first:end] = sample.logprobs
    return Rows(tokens_NT, labels_NT, logprobs_NT)


def _metadata(content: bytes) -> dict[str, list[dict[str, object]]]:
    """Of a safetensors file: eight bytes of length, then JSON."""
    (length,) = struct.unpack("<Q", content[:8])
    told = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_META])
    if told["format"] != _FORMAT:
        raise ValueError(f"format {told['format']}, and {_FORMAT} is known here")
    found: dict[str, list[dict[str, object]]] = told
    return found


def _samples(columns: dict[str, NDArray[np.generic]], sources: list[Source]) -> Iterable[Sample]:
    lists = {name: column.tolist() for name, column in columns.items()}
    prompt_start = start = 0
    for row, (prompt_length, length) in enumerate(zip(lists["prompt_lengths"], lists["lengths"], strict=True)):
        reward = lists["reward"][row]
        if min(lists["source"][row], lists["finish"][row]) < 0:
            raise ValueError("a source or an end that there is not")
        yield Sample(
            prompt=lists["prompt"][row],
            number=lists["number"][row],
            prompt_tokens=tuple(lists["prompt_tokens"][prompt_start : prompt_start + prompt_length]),
            tokens=tuple(lists["tokens"][start : start + length]),
            logprobs=tuple(lists["logprobs"][start : start + length]),
            finish=_FINISHES[lists["finish"][row]],
            source=sources[lists["source"][row]],
            reward=None if math.isnan(reward) else reward,
        )
        prompt_start, start = prompt_start + prompt_length, start + length
    if (prompt_start, start) != (len(lists["prompt_tokens"]), len(lists["tokens"])):
        raise ValueError("its lengths are not those of its tokens")
