"""Which model a recipe or a certificate is about, as far as it can be told without loading one.

The supervisor compares a certificate with its recipe by this hash, and has no torch: a preset is known by its name, a
directory by its `config.json`. Weights are not looked at; a certificate names them by a hash of their own.
"""

from __future__ import annotations

from pathlib import Path

from beringia.errors import ModelError
from beringia.records.files import sha256_of_file
from beringia.records.given_files import why_no_directory, why_unreadable
from beringia.records.record import canonical_hash


def configuration_hash(preset: str | None, path: str | None) -> str:
    """SHA-256 of the configuration of a preset or of a Hugging Face directory; exactly one of them is given.

    Raises ModelError where the directory has no `config.json` that can be read here.
    """
    if (preset is None) == (path is None):
        raise ValueError("give exactly one of preset and path")
    if path is None:
        return canonical_hash({"preset": preset})
    file = Path(path) / "config.json"
    wrong = why_no_directory(path) or why_unreadable(file)
    if wrong is not None:
        raise ModelError(f"The model at {path} was asked for: {wrong} Give a Hugging Face directory.")
    return sha256_of_file(file)
