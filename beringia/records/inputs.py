"""The files that a run is made from, by content: `inputs.json` in the run directory, written when the run first starts.

Model directories, folders of text or chats, tokenizers: each file's size, time and SHA-256. A file whose size and time
are as they were is not read again. What the supervisor's machine does not see (a path on a chip's own machine, a word
such as `bytes`) has no files here.

Reads the inputs and writes nothing. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from beringia.records.files import sha256_of_file
from beringia.records.recipe import Recipe
from beringia.records.record import Record, canonical_hash

INPUTS_SCHEMA = 1

Section = TypeVar("Section", bound=Record)

_MODEL_FILES = {".json", ".jinja", ".safetensors"}
"""What is read of a Hugging Face directory; a README beside them changes nothing."""
_WEIGHTS = ".safetensors"


class InputFile(Record):
    """One file, as it was when it was last looked at."""

    name: str
    """Relative to the input's path; of an input that is one file, its suffix."""
    bytes: int
    modified_ns: int
    sha256: str | None
    """Null where it cannot be read."""


class Input(Record):
    """What lies at one path of the recipe."""

    path: str
    """As the recipe has it."""
    place: str | None = None
    """The whole path, where it was last seen: where to look from another working directory."""
    files: tuple[InputFile, ...]

    @property
    def content(self) -> str | None:
        """SHA-256 over names and contents, not over where and when; None where there are no files."""
        return canonical_hash([[file.name, file.sha256] for file in self.files]) if self.files else None

    @property
    def weights(self) -> str | None:
        """SHA-256 over names and contents of the files that hold weights; None where there are none."""
        held = [[file.name, file.sha256] for file in self.files if file.name.endswith(_WEIGHTS)]
        return canonical_hash(held) if held else None


class Inputs(Record):
    """All inputs of a run, by key of the recipe."""

    schema_version: int = INPUTS_SCHEMA
    inputs: dict[str, Input]

    def content(self, key: str) -> str | None:
        """Hash of what lies at the path under `key`; None where nothing is named or nothing can be seen."""
        return self.inputs[key].content if key in self.inputs else None

    def differences(self, before: Inputs, key: str) -> list[str]:
        """Names of files that are not as they were, come or gone."""
        then, now = (
            {file.name: file.sha256 for file in (one.inputs[key].files if key in one.inputs else ())}
            for one in (before, self)
        )
        return sorted(name for name in then.keys() | now.keys() if then.get(name, "") != now.get(name, ""))


NO_INPUTS = Inputs(inputs={})


def look_at_inputs(recipe: Recipe, before: Inputs = NO_INPUTS) -> Inputs:
    """What the recipe's paths hold now. What can no longer be seen where it was counts as unchanged."""
    return Inputs(inputs={key: look_at(key, path, before.inputs.get(key)) for key, path in _paths(recipe) if path})


def weights_of(path: str, known: Inputs = NO_INPUTS) -> str | None:
    """Hash of the weights in a model's directory; files that `known` has as they are now are not read again."""
    place = str(Path(path).absolute())
    before = next((one for one in known.inputs.values() if one.place == place), None)
    return look_at("model.path", path, before and before.model_copy(update={"path": path})).weights


def _paths(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    """The keys that name files, with what they name."""
    yield "model.path", recipe.model.path
    yield "data.text", recipe.data.text
    yield "data.chat", recipe.data.chat
    for number, source in enumerate(recipe.data.mix):
        yield f"data.mix.{number}.text", source.text
        yield f"data.mix.{number}.chat", source.chat
    yield "data.tokenizer", recipe.data.tokenizer


def placed(recipe: Recipe, inputs: Inputs) -> Recipe:
    """The recipe with whole paths, where its inputs and fault scripts are seen: it means the same in any directory."""
    places = {key: one.place for key, one in inputs.inputs.items() if one.place is not None}
    mix = tuple(_placed(one, f"data.mix.{number}", places) for number, one in enumerate(recipe.data.mix))
    chips = {label: chip.model_copy(update={"faults": _whole(chip.faults)}) for label, chip in recipe.chips.items()}
    data = _placed(recipe.data, "data", places).model_copy(update={"mix": mix})
    return recipe.model_copy(update={"model": _placed(recipe.model, "model", places), "data": data, "chips": chips})


def _placed(section: Section, above: str, places: dict[str, str]) -> Section:
    names = type(section).model_fields
    return section.model_copy(update={name: places[f"{above}.{name}"] for name in names if f"{above}.{name}" in places})


def _whole(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path is not None and Path(path).is_file() else path


def look_at(key: str, path: str, before: Input | None) -> Input:
    """What lies at a path that a key names. What can no longer be seen where it was counts as unchanged."""
    there = before if before is not None and before.path == path else None
    known = {file.name: file for file in there.files} if there is not None else {}
    suffixes = _MODEL_FILES if key in ("model.path", "data.tokenizer") else None
    place = _place(path, there)
    files = tuple(_look_at_file(name, file, known.get(name)) for name, file in _files(place, suffixes))
    if there is not None and not files:
        return there
    return Input(path=path, place=str(place.absolute()) if files else None, files=files)


def _place(path: str, before: Input | None) -> Path:
    """Where a path of the recipe leads from here, or led when it was last seen."""
    if not Path(path).exists() and before is not None and before.place is not None:
        return Path(before.place)
    return Path(path)


def _look_at_file(name: str, file: Path, known: InputFile | None) -> InputFile:
    try:
        found = file.stat()
        if known is not None and (known.bytes, known.modified_ns) == (found.st_size, found.st_mtime_ns):
            return known
        digest = sha256_of_file(file)
    except OSError:
        return InputFile(name=name, bytes=0, modified_ns=0, sha256=None)
    return InputFile(name=name, bytes=found.st_size, modified_ns=found.st_mtime_ns, sha256=digest)


def _files(path: Path, suffixes: set[str] | None) -> Iterator[tuple[str, Path]]:
    """Name and place of every visible regular file, in order of names."""
    if path.is_file():
        yield path.suffix, path
        return
    found = []
    for parent, directories, names in os.walk(path):
        directories[:] = [name for name in directories if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    kept = (file for file in found if file.is_file() and (suffixes is None or file.suffix in suffixes))
    yield from sorted((file.relative_to(path).as_posix(), file) for file in kept)
