"""The campaign's last stage: the exported model answers the task's held-out questions on the inference chip.

Two processes, one a chip: the inference chip answers, with log-probabilities; the chip that trained last says how
likely the same tokens are to it. What they differ by is the seed of the handover's proof.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from beringia.campaign.answering_work import AnsweringOrder, Answers
from beringia.data import choose_tokenizer, open_stream
from beringia.errors import Refusal
from beringia.processes.child import lines_of, start
from beringia.processes.files.remote import FarFiles
from beringia.records.events import Answered
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.chip_command import chip_command, patience_of
from beringia.train.evaluation import MARK_TOKENS, wilson_interval

_WORK = "beringia.campaign.answering_work"


def answer(recipe: Recipe, run: RunDirectory, trained_on: str, step: int) -> Answered:
    """Answer on `serve.chip`. Raises HandshakeError where a chip's process ends without a result, Refusal where its
    requests fail."""
    serve = recipe.serve
    assert serve.chip is not None
    tokenizer = choose_tokenizer(recipe.data, recipe.model)
    stream = open_stream(recipe.data, seed=recipe.seed, directory=run.data, split="held-out", tokenizer=tokenizer)
    task = stream.task
    assert task is not None, "the recipe's own check"
    questions_BT = task.questions(0, serve.questions, "held-out")
    prompts = questions_BT.tolist()
    room = task.text_tokens(long=True) + MARK_TOKENS
    served = _run(recipe, run, serve.chip, prompts, max_tokens=room)
    answers = [tokens[len(prompt) :] for tokens, prompt in zip(served.tokens, prompts, strict=True)]
    right = sum(task.check(prompt, _tensor(tokens)) for prompt, tokens in zip(questions_BT, answers, strict=True))
    scored = _run(recipe, run, trained_on, served.tokens, max_tokens=None)
    differences = [
        abs(there - here)
        for mine, theirs, prompt in zip(served.logprobs, scored.logprobs, prompts, strict=True)
        for here, there in zip(mine, theirs[len(prompt) - 1 :], strict=True)
    ]
    low, high = wilson_interval(right, len(prompts))
    new_tokens = sum(map(len, answers))
    return Answered(
        step=step,
        used=served.chip,
        identity_hash=served.identity_hash,
        sku=served.sku,
        truth=served.truth,
        trained_on=trained_on,
        weights_hash=served.weights_hash,
        compute_dtype=served.dtype,
        operators=served.operators,
        questions=len(prompts),
        accuracy=right / len(prompts),
        accuracy_low=low,
        accuracy_high=high,
        chance=task.chance,
        new_tokens=new_tokens,
        tokens_a_second=new_tokens / served.seconds,
        mean_logprob_difference=sum(differences) / len(differences),
        largest_logprob_difference=max(differences),
    )


def _tensor(tokens: list[int]) -> torch.Tensor:
    return torch.tensor(tokens)


def _run(recipe: Recipe, run: RunDirectory, label: str, prompts: list[list[int]], *, max_tokens: int | None) -> Answers:
    """One chip's process, in its own interpreter."""
    section = recipe.chips[label]
    command = chip_command(label, section, _WORK, run)
    log = run.answers / f"{label}.log"
    model, faults = str(run.export), section.faults
    if section.root is not None:
        files = FarFiles(command, log, patience_of(recipe.supervise))
        model = files.send_input(run.export, "export")
        faults = files.send_input(Path(faults), "faults") if faults and Path(faults).is_file() else faults
    order = AnsweringOrder(
        chip=section.use, faults=faults, model=model, seed=recipe.seed, prompts=prompts, max_tokens=max_tokens
    )
    # It says nothing until it has answered all.
    patience = replace(patience_of(recipe.supervise), silence_seconds=_seconds(recipe))
    (line,) = lines_of(start(command, order, log, patience=patience))
    answers = Answers.model_validate(line, strict=False)
    if answers.error is not None:
        raise Refusal(f"The engine on {label} could not answer: {answers.error}")
    return answers


def _seconds(recipe: Recipe) -> float:
    return recipe.supervise.start_seconds + recipe.supervise.hang_seconds
