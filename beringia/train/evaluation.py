"""Held-out loss, and accuracy of sampled answers where the task has a checker.

Every rank does the same evaluation on the same data: it takes part in collectives then, and all ranks agree without
one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from beringia.chips.chip import Chip
from beringia.data import Stream, Task
from beringia.model import Decoder, sample
from beringia.records.events import Evaluated
from beringia.records.recipe import TrainSection
from beringia.train.objective import LOSS, Objective

_Z_95 = 1.959964
_BATCH = 64


MARK_TOKENS = 8
"""Room for the marks around an answer, beyond the tokens of the longest question and chain of thought."""


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers with its Wilson 95 % interval, and what guessing would give."""

    value: float
    low: float
    high: float
    samples: int
    chance: float


def evaluate(
    module: nn.Module,
    decoder: Decoder,
    objective: Objective,
    held_out: Stream,
    train: TrainSection,
    chip: Chip,
    *,
    step: int,
    seed: int,
    end_token: int,
    beat: Callable[[], None],
) -> Evaluated:
    """Everything an evaluation measures, as the event that reports it. `module`: what ranks call for losses. `beat` is
    called again and again, equally often on every rank; what it raises ends the evaluation."""
    started = time.perf_counter()
    loss = held_out_loss(module, objective, held_out, train.evaluation_sequences, chip, beat)
    measured: dict[str, Any] = {}
    if held_out.task is not None and train.accuracy_samples > 0:
        room = held_out.task.text_tokens(long=True) + MARK_TOKENS
        accuracy = sampled_accuracy(
            decoder,
            held_out.task,
            train.accuracy_samples,
            seed=seed + step,
            end_token=end_token,
            max_new_tokens=room,
            chip=chip,
            beat=beat,
        )
        measured = {
            "accuracy": accuracy.value,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            "samples": accuracy.samples,
            "chance": accuracy.chance,
        }
    return Evaluated(
        step=step,
        loss=loss if math.isfinite(loss) else None,
        sequences=train.evaluation_sequences,
        seconds=time.perf_counter() - started,
        **measured,
    )


@torch.no_grad()
def held_out_loss(
    module: nn.Module,
    objective: Objective,
    stream: Stream,
    sequences: int,
    chip: Chip,
    beat: Callable[[], None],
) -> float:
    """Mean of the objective's loss per target over the first `sequences` samples of a held-out stream."""
    total, count = 0.0, 0
    module.eval()
    for start in range(0, sequences, _BATCH):
        batch = stream.samples(start, min(_BATCH, sequences - start))
        targets = objective.targets(batch)
        there = {name: target.to(chip.device) for name, target in targets.items()}
        sums = module(batch.tokens_BT.to(chip.device), targets=there, criterion=objective, mtp=False)
        total += float(sums[LOSS])
        count += objective.counts(targets)[LOSS]
        beat()
    module.train()
    return total / count if count else math.nan


@torch.no_grad()
def sampled_accuracy(
    decoder: Decoder,
    task: Task,
    questions: int,
    *,
    seed: int,
    end_token: int,
    max_new_tokens: int,
    chip: Chip,
    beat: Callable[[], None],
) -> Accuracy:
    """Sample one answer to each of the first held-out questions at temperature 1 and check it."""
    prompts_BT = task.questions(0, questions, "held-out")
    generator = torch.Generator().manual_seed(seed)
    decoder.eval()
    answers_BT = sample(decoder, prompts_BT.to(chip.device), max_new_tokens, end_token, 1.0, generator, beat).cpu()
    decoder.train()
    right = sum(task.check(prompt, answer) for prompt, answer in zip(prompts_BT, answers_BT, strict=True))
    low, high = wilson_interval(right, questions)
    return Accuracy(right / questions, low, high, questions, task.chance)


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): honest also near 0 and 1, where the normal one leaves [0, 1]."""
    share, square = right / count, _Z_95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)
