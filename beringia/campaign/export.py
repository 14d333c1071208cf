"""A run's newest checkpoint as a Hugging Face directory, compared with transformers.

Reads the run directory; writes the directory it is told to, complete or not at all. Runs on the CPU in float32; what is
written is float32, the masters bit for bit, unless bfloat16 is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from beringia.checkpoint.directory import CheckpointDirectory
from beringia.data import choose_tokenizer, open_stream
from beringia.errors import RunError
from beringia.model import Decoder, load_model
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.run_files import recorded_recipe
from beringia.train.trained_model import decoder_of, write_model

ExportDtype = Literal["float32", "bf16", "bfloat16"]
"""`bf16` is bfloat16: the one by its short name."""

COMPARED_SAMPLES = 4

ERROR_SHARE = 5.0
"""How many of our own float32 errors (against our float64) the logits may differ from transformers'. Two sound float32
evaluations of one formula differ by at most the sum of their errors; transformers orders its operations otherwise, so
its error is allowed to be four times ours."""


@dataclass(frozen=True)
class Comparison:
    """Float32 logits of the exported directory: transformers' against ours."""

    largest_difference: float
    bound: float

    @property
    def same(self) -> bool:
        """Whether they are the same function, up to float32 rounding."""
        return self.largest_difference <= self.bound


def load_trained(run: RunDirectory, recipe: Recipe, step: int | None = None) -> tuple[Decoder, int]:
    """The model of a run at a checkpoint (default: the newest), on the CPU in float32: its weights alone are read.

    Raises RunError, CheckpointDamaged, ModelError.
    """
    directory = CheckpointDirectory(run.checkpoints)
    steps = directory.steps()
    if not steps:
        raise RunError(f"{run.root} has no checkpoint yet: train first.")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise RunError(f"{run.root} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}.")
    return decoder_of(directory.path(step), recipe), step


def export(run: RunDirectory, directory: Path, step: int | None = None, dtype: ExportDtype = "float32") -> int:
    """Write the checkpoint of `step` (default: the newest) with its tokenizer; returns the step. Raises RunError."""
    recipe = recorded_recipe(run)
    decoder, step = load_trained(run, recipe, step)
    write_model(decoder, recipe, directory, torch.float32 if dtype == "float32" else torch.bfloat16)
    return step


@torch.no_grad()
def compare_with_transformers(run: RunDirectory, directory: Path) -> Comparison:
    """Logits of the exported directory on held-out samples: transformers against ours."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # It lists the multi-token layer as unexpected, which it does not implement: expected here, and no news.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    recipe = recorded_recipe(run)
    tokenizer = choose_tokenizer(recipe.data, recipe.model)
    stream = open_stream(recipe.data, seed=recipe.seed, directory=run.data, split="held-out", tokenizer=tokenizer)
    tokens_BT = stream.samples(0, COMPARED_SAMPLES).tokens_BT
    ours_BTV = load_model(directory).eval()(tokens_BT)
    exact_BTV = _in_float64(load_model(directory).eval())(tokens_BT)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    theirs_BTV = theirs(tokens_BT).logits
    own_error = float((ours_BTV.double() - exact_BTV).abs().max())
    return Comparison(float((ours_BTV - theirs_BTV).abs().max()), ERROR_SHARE * own_error)


def _in_float64(decoder: Decoder) -> Decoder:
    decoder = decoder.to(torch.float64)
    decoder.set_compute_dtype(torch.float64)
    return decoder
