"""The words under a record's fields, for the pages that are generated from them.

Read from the source when a page is made: pydantic reads them when a class is made, which was a third of the time that
every process of ours needed to import its own code.
"""

from __future__ import annotations

import ast
import inspect
import textwrap

from pydantic import BaseModel


def words_under(model: type[BaseModel]) -> dict[str, str]:
    """What stands under each field of a model, on one line and fit for a table; those it inherits included."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            found |= _own_words(kind)
    return found


def one_line(text: str | None) -> str:
    """Text for a cell of a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


def _own_words(model: type[BaseModel]) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = one_line(text)
    return found
