"""A run's newest checkpoint as a Hugging Face directory, compared with transformers.

Reads the run directory; writes the directory it is told to, complete or not at all. Runs on the CPU in float32.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from beringia.checkpoint.directory import CheckpointDirectory
from beringia.checkpoint.reader import open_checkpoint
from beringia.data import Tokenizer, choose_tokenizer, open_stream, write_tokenizer
from beringia.data.tokenizer import KINDS
from beringia.errors import RunError
from beringia.model import Decoder, config_of, filled, load_model, save_model
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.run_files import recorded_recipe

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

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
    tokenizer = choose_tokenizer(recipe.data, recipe.model)
    size = tokenizer.vocabulary_size if recipe.model.preset is not None else None
    config = config_of(recipe.model.path or recipe.model.preset or "", size)
    with open_checkpoint(directory.path(step)) as reader:
        return filled(config, reader).eval(), step


def export(run: RunDirectory, directory: Path, step: int | None = None) -> int:
    """Write the checkpoint of `step` (default: the newest) with its tokenizer; returns the step. Raises RunError."""
    recipe = recorded_recipe(run)
    decoder, step = load_trained(run, recipe, step)
    tokenizer = choose_tokenizer(recipe.data, recipe.model)
    if decoder.config.eos_token_id is None:  # a preset's: whoever generates from it would not stop at the end
        decoder.config = replace(decoder.config, eos_token_id=tokenizer.end)
    save_model(decoder, directory)
    write_tokenizer_of(tokenizer, directory)
    return step


def write_tokenizer_of(tokenizer: Tokenizer, directory: Path) -> None:
    """The tokenizer's files into `directory`, as AutoTokenizer reads them."""
    for kind in KINDS:
        if tokenizer.source == kind:
            write_tokenizer(kind, directory)
            return
    for name in _TOKENIZER_FILES:
        source = Path(tokenizer.source) / name
        if source.exists():
            shutil.copyfile(source, directory / name)


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
