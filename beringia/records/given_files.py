"""Files and directories that somebody else made: read, or said to be what they are instead.

A copy of a model often is not what it looks like: a link whose target was left behind, a Git-LFS pointer in place of
the content, a name that only a hub knows. Reads nothing but what it is asked for, and knows no models.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from beringia.errors import InputError

_POINTER = b"version https://git-lfs"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_there(path: Path) -> bool:
    """Whether there is something of this name, be it a link to nothing."""
    return os.path.lexists(path)


def why_unreadable(path: Path) -> str | None:
    """What stands in place of a file's content, and what to do about it; None where nothing is known to be wrong."""
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {os.readlink(path)}, which is not there: copy what links point to (cp -rL)."
    if path.is_dir():
        return f"{path} cannot be read: it is a directory and not a file."
    try:
        with open(path, "rb") as file:
            first = file.read(len(_POINTER))
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}."
    if first == _POINTER:
        return f"{path} is a Git-LFS pointer and not the file itself: run git lfs pull where it was cloned."
    return None


def json_object(path: Path, kind: type[InputError]) -> dict[str, Any]:
    """The object that a file holds. Raises `kind`."""
    wrong = why_unreadable(path)
    if wrong is not None:
        raise kind(wrong)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise kind(f"{path} holds no JSON object but {json.dumps(content):.40}.")
    return content


def why_no_directory(name: str) -> str | None:
    """What a name is where a directory is meant; None where it is one."""
    path = Path(name)
    if path.is_dir():
        return None
    if path.is_symlink() and not path.exists():
        return f"{name} is a link to {os.readlink(path)}, which is not there."
    if path.exists():
        return f"{name} is a file; give the directory that it lies in."
    if _HUB_NAME.fullmatch(name) and not path.parent.is_dir():
        return (
            f"There is no directory {name}. If this is a model's name on the Hugging Face hub: nothing is downloaded "
            f"here; get it first (hf download {name} --local-dir DIR) and give that directory."
        )
    return f"There is no directory {name}."


def why_no_model(directory: Path) -> str | None:
    """What a directory is that holds no model in Hugging Face form; None where nothing is known of it."""
    if (directory / "recipe.json").is_file() and (directory / "checkpoints").is_dir():
        return f"{directory} is a run: `beringia export {directory} --to DIR` makes a directory of its model."
    return None
