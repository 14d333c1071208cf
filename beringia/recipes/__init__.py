"""The recipes that ship, and how one is found by its name: `r2-nano` is the file `r2-nano.toml` beside this one.

In the repository `recipes/` is a link to this folder. Reads no recipe: that is `records/recipe.py`.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from beringia.errors import RecipeError

DIRECTORY = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """Every recipe that ships, by name."""
    return {path.stem: path for path in sorted(DIRECTORY.glob("*.toml"))}


def find_recipe(asked: str) -> Path:
    """The file that a user means by a path or by the name of a recipe that ships. Raises RecipeError.

    A word that is both, a file here and a recipe that ships, is refused: `./WORD` is the file. A directory of that name
    is no recipe, and in nobody's way.
    """
    path, named = Path(asked), shipped().get(asked)
    if named is None:
        _refuse_unknown_name(asked, path)
        return path
    if path.is_file():
        raise RecipeError(
            f"{asked} is a file here and the name of a recipe that ships with Beringia: write ./{asked} for the file, "
            f"or {named} for the recipe that ships."
        )
    return named


def _refuse_unknown_name(asked: str, path: Path) -> None:
    """A bare word that is no file was meant as a name; anything else is a path, and reading it says what is wrong."""
    if path.exists() or len(path.parts) != 1 or path.suffix:
        return
    close = difflib.get_close_matches(asked, shipped(), n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"These ship: {', '.join(shipped())}."
    raise RecipeError(f"There is no recipe named {asked!r}, and no file here that is called so. {hint}")
