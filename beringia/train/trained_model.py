"""The model that a checkpoint of a run holds: as a decoder, or as a Hugging Face directory with its tokenizer.

Reads the checkpoint and what the run's recipe names; writes the directory it is told to, complete or not at all. On the
CPU. Knows no run directories: which checkpoint, the caller says.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from beringia.checkpoint.reader import open_checkpoint
from beringia.data import Tokenizer, choose_tokenizer, write_tokenizer
from beringia.data.tokenizer import KINDS
from beringia.errors import ModelError
from beringia.machine.aside import directory_beside
from beringia.model import Decoder, config_of, filled, save_model
from beringia.records.files import publish_directory, write_bytes
from beringia.records.recipe import Recipe

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def decoder_of(checkpoint: Path, recipe: Recipe) -> Decoder:
    """The model of a run's recipe with the weights of a checkpoint, on the CPU in float32: they alone are read.

    Raises RunError, CheckpointDamaged, ModelError.
    """
    tokenizer = choose_tokenizer(recipe.data, recipe.model)
    size = tokenizer.vocabulary_size if recipe.model.preset is not None else None
    config = config_of(recipe.model.path or recipe.model.preset or "", size)
    with open_checkpoint(checkpoint) as reader:
        return filled(config, reader).eval()


def write_model(decoder: Decoder, recipe: Recipe, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a model of the recipe with its tokenizer. Weights that are stored in less than float32 are rounded to the
    nearest, ties to even; routers' correction biases never are. Raises ModelError where the directory exists."""
    if directory.exists():
        raise ModelError(f"{directory} exists already; give a new directory.")
    tokenizer = choose_tokenizer(recipe.data, recipe.model)
    if decoder.config.eos_token_id is None:  # a preset's: whoever generates from it would not stop at the end
        decoder.config = replace(decoder.config, eos_token_id=tokenizer.end)
    with directory_beside(directory) as aside:
        model = aside / "model"  # whoever saves a model makes its directory
        save_model(decoder, model, dtype=dtype)
        _write_tokenizer_of(tokenizer, model)
        publish_directory(model, directory)


def _write_tokenizer_of(tokenizer: Tokenizer, directory: Path) -> None:
    """The tokenizer's files into `directory`, as AutoTokenizer reads them."""
    for kind in KINDS:
        if tokenizer.source == kind:
            write_tokenizer(kind, directory)
            return
    source = Path(tokenizer.source)
    templates = [path.relative_to(source) for path in sorted(source.glob("additional_chat_templates/*.jinja"))]
    for name in (*map(Path, _TOKENIZER_FILES), *templates):
        if (source / name).exists():
            write_bytes(directory / name, (source / name).read_bytes())
