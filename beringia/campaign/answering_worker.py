"""The process that has the chip: `python -m beringia.campaign.answering_worker`, a job as JSON on standard input.

Writes its result to the file that the job names, complete or not at all.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

from beringia.chips.open import open_chip
from beringia.engine import Engine, Sampling
from beringia.records.files import write_text
from beringia.records.record import Record

TEMPERATURE = 1.0
"""As evaluation inside training samples."""


class AnsweringJob(Record):
    """Answer prompts, or say how likely their tokens are."""

    chip: str
    faults: str | None
    model: str
    """A Hugging Face directory."""
    seed: int
    prompts: list[list[int]]
    max_tokens: int | None
    """New tokens at most; None: none are wanted, only the prompts' log-probabilities."""
    result: str


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


def main() -> None:
    """Do one job."""
    job = AnsweringJob.model_validate_json(sys.stdin.read())
    chip = open_chip(job.chip, faults=job.faults, seed=job.seed)
    engine = Engine(job.model, chip)
    began = time.perf_counter()
    completions = engine.generate(job.prompts, [_sampling(job, number) for number in range(len(job.prompts))])
    seconds = time.perf_counter() - began
    told = [one.prompt_logprobs if job.max_tokens is None else one.logprobs for one in completions]
    new = [() if job.max_tokens is None else one.tokens for one in completions]
    answers = Answers(
        chip=chip.name,
        sku=chip.identity.sku,
        truth=chip.identity.truth,
        identity_hash=chip.identity.hash,
        weights_hash=engine.weights_hash,
        dtype=str(engine.dtype).removeprefix("torch."),
        operators=engine.operators,
        tokens=[[*prompt, *tokens] for prompt, tokens in zip(job.prompts, new, strict=True)],
        logprobs=[[one.chosen for one in logprobs] for logprobs in told],
        seconds=seconds,
        error=next((one.error for one in completions if one.error is not None), None),
    )
    chip.close()
    write_text(Path(job.result), answers.model_dump_json())


def _sampling(job: AnsweringJob, number: int) -> Sampling:
    if job.max_tokens is None:
        return Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    return Sampling(max_tokens=job.max_tokens, temperature=TEMPERATURE, seed=job.seed + number, logprobs=0)


if __name__ == "__main__":
    main()
