"""Answering on one chip, as work of a far end: its document is an `AnsweringOrder`, its one line are the answers."""

from __future__ import annotations

import time
from typing import Any, Literal

from beringia.chips.open import open_chip
from beringia.engine import Engine, Sampling
from beringia.processes.far_end import FarEnd
from beringia.processes.protocol import Ended
from beringia.records.record import Record

TEMPERATURE = 1.0
"""As evaluation inside training samples."""


class AnsweringOrder(Record):
    """Answer prompts, or say how likely their tokens are."""

    chip: str
    faults: str | None
    model: str
    """A Hugging Face directory."""
    seed: int
    prompts: list[list[int]]
    max_tokens: int | None
    """New tokens at most; None: none are wanted, only the prompts' log-probabilities."""


class Answers(Record):
    """What came of it."""

    chip: str
    sku: str
    truth: Literal["real", "emulated"]
    identity_hash: str
    weights_hash: str
    dtype: str
    operators: str
    tokens: list[list[int]]
    """Prompts with their answers."""
    logprobs: list[list[float]]
    """Of the new tokens; of all prompt tokens but the first where none were wanted."""
    seconds: float
    error: str | None = None
    """What the chip said, where a request failed."""


def work(document: dict[str, Any], far_end: FarEnd) -> Ended:
    """Answer one order."""
    order = AnsweringOrder.model_validate(document)
    chip = open_chip(order.chip, faults=order.faults, seed=order.seed)
    engine = Engine(order.model, chip)
    began = time.perf_counter()
    completions = engine.generate(order.prompts, [_sampling(order, number) for number in range(len(order.prompts))])
    seconds = time.perf_counter() - began
    told = [one.prompt_logprobs if order.max_tokens is None else one.logprobs for one in completions]
    new = [() if order.max_tokens is None else one.tokens for one in completions]
    answers = Answers(
        chip=chip.name,
        sku=chip.identity.sku,
        truth=chip.identity.truth,
        identity_hash=chip.identity.hash,
        weights_hash=engine.weights_hash,
        dtype=str(engine.dtype).removeprefix("torch."),
        operators=engine.operators,
        tokens=[[*prompt, *tokens] for prompt, tokens in zip(order.prompts, new, strict=True)],
        logprobs=[[one.chosen for one in logprobs] for logprobs in told],
        seconds=seconds,
        error=next((one.error for one in completions if one.error is not None), None),
    )
    chip.close()
    far_end.channel.line(answers)
    return Ended(why="done")


def _sampling(order: AnsweringOrder, number: int) -> Sampling:
    if order.max_tokens is None:
        return Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    return Sampling(max_tokens=order.max_tokens, temperature=TEMPERATURE, seed=order.seed + number, logprobs=0)
