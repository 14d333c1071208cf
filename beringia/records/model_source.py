"""Which model a recipe or a certificate is about, as far as it can be told without loading one.

The supervisor compares a certificate with its recipe by this hash, and has no torch: a preset is known by its name and
its vocabulary, which a run's tokenizer decides, a directory by its `config.json`. Weights are not looked at; a
certificate names them by a hash of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from beringia.errors import ModelError
from beringia.records.files import sha256_of_file
from beringia.records.given_files import json_object, why_no_directory, why_unreadable
from beringia.records.record import canonical_hash


class OwnSize(NamedTuple):
    """Of a preset, as `model/presets.py` has it; a test holds the two against each other."""

    layers: int
    vocabulary: int


OWN_SIZES = {
    "r2-nano": OwnSize(3, 54),
    "r2-micro": OwnSize(3, 54),
    "r2-small": OwnSize(10, 32768),
    "deepseek-v3": OwnSize(61, 129280),
    "deepseek-r1": OwnSize(61, 129280),
}


def other_vocabulary(preset: str | None, size: int | None) -> int | None:
    """The size of a vocabulary that is not the preset's own; None where it is, and for a directory, which has its
    own always."""
    own = OWN_SIZES.get(preset or "")
    return None if own is None or size == own.vocabulary else size


def vocabulary_of(model: str, size: int | None) -> int | None:
    """What a user asks for with `--vocabulary`, as `other_vocabulary` has it. Raises ModelError for a model that is no
    preset."""
    if size is not None and model not in OWN_SIZES:
        raise ModelError(
            f"--vocabulary {size} was asked for, and {model} is no preset: leave it out, a directory has its own."
        )
    return other_vocabulary(model, size)


def layers_of(preset: str | None, path: str | None) -> int | None:
    """How many layers the whole model has; None where that cannot be told here."""
    if path is None:
        own = OWN_SIZES.get(preset or "")
        return None if own is None else own.layers
    try:
        count = json_object(Path(path) / "config.json", ModelError).get("num_hidden_layers")
    except ModelError:
        return None
    return count if type(count) is int else None


def configuration_hash(preset: str | None, path: str | None, vocabulary_size: int | None = None) -> str:
    """SHA-256 of the configuration of a preset or of a Hugging Face directory; exactly one of them is given. A preset
    with a vocabulary of another size is another model.

    Raises ModelError where the directory has no `config.json` that can be read here.
    """
    if (preset is None) == (path is None):
        raise ValueError("give exactly one of preset and path")
    if path is None:
        other = other_vocabulary(preset, vocabulary_size)
        return canonical_hash({"preset": preset} | ({} if other is None else {"vocabulary_size": other}))
    file = Path(path) / "config.json"
    wrong = why_no_directory(path) or why_unreadable(file)
    if wrong is not None:
        raise ModelError(f"The model at {path} was asked for: {wrong} Give a Hugging Face directory.")
    return sha256_of_file(file)
