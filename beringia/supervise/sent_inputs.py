"""What a recipe names by path, for a chip whose machine has files of its own: sent there by hash, and named anew.

Model directory, tokenizer directory and fault script go as they are. A folder of text or chats stays: the tokens packed
from it go (`run.data`), and its name stays the recipe's, by which the packed tokens are known.
"""

from __future__ import annotations

from pathlib import Path

from beringia.processes.files.remote import FarFiles
from beringia.records.recipe import ChipSection, DataSection, ModelSection, Recipe


def send_inputs(files: FarFiles, label: str, recipe: Recipe) -> Recipe:
    """Send them; returns the recipe as it is read there."""
    model, data, chip = recipe.model, recipe.data, recipe.chips[label]
    if model.path is not None:
        model = ModelSection(path=files.send_input(Path(model.path), "model"))
    if data.tokenizer is not None and Path(data.tokenizer).exists():
        there = files.send_input(Path(data.tokenizer), "tokenizer")
        data = DataSection.model_validate(data.model_dump() | {"tokenizer": there})
    if chip.faults is not None and Path(chip.faults).is_file():
        there = files.send_input(Path(chip.faults), "faults")
        chip = ChipSection.model_validate(chip.model_dump() | {"faults": there})
    chips = recipe.chips | {label: chip}
    return recipe.model_copy(update={"model": model, "data": data, "chips": chips})
