"""The map of the model: layers in order, in each its modules, in each module one cell for each operator and direction.

A cell stands for all calls of one operator by one module in one direction, and shows the one that uses most of its
bound.
Reads operator checks; draws nothing (the template does). Cells get a card with their details, the gravest first, as
long as the page stays small.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import get_args

from beringia.records.certificate import Direction, OperatorCheck
from beringia.report.certificate.sentence import operator_words
from beringia.report.words import count, share_words

NEAR = 0.9
"""Share of its bound from which a cell is near it. The root mean square of correct rounding is 0.8 of what is allowed
(`qualify/operators/check.py` allows 1.25 times of it), so a sound chip has most of its cells there."""
LEVELS = (0.25, 0.5, 0.75, NEAR, 1.0)
"""Upper ends of the colours. None at 0.8: sound cells would flicker between two colours."""
MOST_CARDS = 500
"""More would make the page of a large model larger than 2 MB."""
MOST_OPEN = 12
"""Rows of the map that are all shown; of more, sound ones are folded."""
_DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
OUTSIDE = "outside the modules"


@dataclass(frozen=True)
class Cell:
    """Calls of one operator by one module in one direction."""

    calls: tuple[OperatorCheck, ...]
    card: int | None = None
    """Number of its card; None: it has none."""

    @property
    def worst(self) -> OperatorCheck:
        """The call that uses most of its bound, the first of equals."""
        return max(self.calls, key=lambda call: call.used)

    @property
    def used(self) -> float:
        """The largest share of a bound."""
        return self.worst.used

    @property
    def beyond(self) -> int:
        """Calls beyond their bound."""
        return sum(call.used > 1 for call in self.calls)

    @property
    def style(self) -> str:
        """Class of its colour: `u0` (exact) to `u5`, `beyond`, `refused`."""
        if any(call.refused for call in self.calls):
            return "refused"
        return style_of(self.used)

    @property
    def title(self) -> str:
        """For hover: operator, calls, share, dtype, shapes."""
        worst = self.worst
        calls = f", {count(len(self.calls), 'call')}" if len(self.calls) > 1 else ""
        return f"{operator_words(worst.operator)}{calls}: {used_words(worst)}; {worst.dtype} {shape_words(worst, 3)}"


@dataclass(frozen=True)
class Block:
    """One module: its cells by direction, in the order of execution."""

    name: str
    lines: tuple[tuple[Direction, tuple[Cell, ...]], ...]

    @property
    def beyond(self) -> int:
        """Cells beyond their bound."""
        return sum(cell.used > 1 for _, cells in self.lines for cell in cells)


@dataclass(frozen=True)
class Layer:
    """One row of the map."""

    name: str
    blocks: tuple[Block, ...]

    @property
    def beyond(self) -> int:
        """Cells beyond their bound."""
        return sum(block.beyond for block in self.blocks)


@dataclass(frozen=True)
class Run:
    """Layers that follow each other; folded: many in which nothing is wrong."""

    layers: tuple[Layer, ...]
    folded: bool

    @property
    def name(self) -> str:
        """`model.layers.1 to model.layers.27`."""
        return f"{self.layers[0].name} to {self.layers[-1].name}"

    @property
    def worst(self) -> OperatorCheck:
        """The call that uses most of its bound."""
        cells = (cell for layer in self.layers for block in layer.blocks for _, line in block.lines for cell in line)
        return max(cells, key=lambda cell: cell.used).worst


@dataclass(frozen=True)
class ModelMap:
    """All rows, and all cells with the gravest first."""

    layers: tuple[Layer, ...]
    cells: tuple[Cell, ...]
    directions: tuple[Direction, ...]

    @property
    def runs(self) -> list[Run]:
        """All rows; in a deep model, long runs of sound layers are folded, so that a wrong one is seen at once."""
        if len(self.layers) <= MOST_OPEN:
            return [Run(self.layers, folded=False)]
        # The first layers stay open to show what a sound one looks like.
        shown = [place < 3 or place >= len(self.layers) - 3 or row.beyond > 0 for place, row in enumerate(self.layers)]
        runs = groupby(zip(self.layers, shown, strict=True), key=lambda one: one[1])
        rows = [(tuple(layer for layer, _ in run), open_) for open_, run in runs]
        return [Run(layers, folded=not open_ and len(layers) > 1) for layers, open_ in rows]

    @property
    def cards(self) -> list[Cell]:
        """Cells that have a card."""
        return [cell for cell in self.cells if cell.card is not None]

    @property
    def beyond(self) -> list[Cell]:
        """Cells beyond their bound."""
        return [cell for cell in self.cells if cell.used > 1]


def model_map(checks: Iterable[OperatorCheck]) -> ModelMap:
    """The map of these checks."""
    cells = _with_cards(_cells(checks))
    by_module: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: _order(cell.calls[0])):
        by_module.setdefault(place_of(cell.worst), []).append(cell)
    # A layer stands where its first module ran; loss and optimizer, which belong to no module, stand last.
    names = list(dict.fromkeys(layer_of(module) for module in by_module if module))
    layers = [_layer(name, {m: c for m, c in by_module.items() if m and layer_of(m) == name}) for name in names]
    if "" in by_module:
        layers.append(Layer(OUTSIDE, (_block("", by_module[""]),)))
    present = {cell.worst.direction for cell in cells}
    return ModelMap(tuple(layers), tuple(cells), tuple(one for one in _DIRECTIONS if one in present))


def layer_of(module: str) -> str:
    """`model.layers.3.mlp` is of `model.layers.3`; what has no numbered layer is its own."""
    numbered = re.match(r"(.*?\.\d+)(\.|$)", module)
    return numbered[1] if numbered else module


def place_of(check: OperatorCheck) -> str:
    """The module in whose block it stands. An optimizer's calls name parameters: they stand with the whole layer."""
    if check.direction != "optimizer":
        return check.module
    layer = layer_of(check.module)
    return layer if layer != check.module else layer.rpartition(".")[0]


def style_of(used: float) -> str:
    """The class of a share's colour."""
    if used == 0:
        return "u0"
    level = next((number for number, end in enumerate(LEVELS, start=1) if used <= end), None)
    return f"u{level}" if level else "beyond"


def used_words(check: OperatorCheck) -> str:
    """`0.80 of its bound`, `5.1 times its bound`, `refused`."""
    if check.refused:
        return "refused"
    if check.used == 0:
        return "as float64 has it"
    if check.used == float("inf"):
        return "not a number"
    return f"{share_words(check.used)} {'times' if check.used > 1 else 'of'} its bound"


def shape_words(check: OperatorCheck, most: int | None = None) -> str:
    """`4×64, 64×32`; only so many shapes, if asked."""
    shown = check.shapes[:most]
    words = ["×".join(str(length) for length in shape) or "scalar" for shape in shown]
    return ", ".join(words) + (", …" if len(check.shapes) > len(shown) else "")


def _order(check: OperatorCheck) -> tuple[bool, int]:
    # Modules stand in the order of the forward pass; the backward pass has another one.
    return check.direction != "forward", check.position


def _cells(checks: Iterable[OperatorCheck]) -> list[Cell]:
    groups: dict[tuple[str, str, Direction], list[OperatorCheck]] = {}
    for check in checks:
        groups.setdefault((place_of(check), check.operator, check.direction), []).append(check)
    return [Cell(tuple(sorted(group, key=lambda check: check.position))) for group in groups.values()]


def _with_cards(cells: Sequence[Cell]) -> list[Cell]:
    """The gravest first, numbered: what is near its bound, then the highest of each module, then the rest."""
    graded = sorted(cells, key=lambda cell: -cell.used)
    seen: set[tuple[str, Direction]] = set()
    ranked: list[tuple[bool, bool, int, Cell]] = []
    for cell in graded:
        place = place_of(cell.worst), cell.worst.direction
        ranked.append((cell.used <= NEAR, place in seen, len(ranked), cell))
        seen.add(place)
    cards = [cell for *_, cell in sorted(ranked, key=lambda one: one[:3]) if cell.used > 0][:MOST_CARDS]
    numbers = {id(cell): number for number, cell in enumerate(cards)}
    return [Cell(cell.calls, numbers.get(id(cell))) for cell in graded]


def _layer(name: str, modules: dict[str, list[Cell]]) -> Layer:
    alone = list(modules) == [name]
    blocks = [
        _block("" if alone else module.removeprefix(name).removeprefix(".") or "the layer itself", cells)
        for module, cells in modules.items()
    ]
    return Layer(name, tuple(blocks))


def _block(name: str, cells: list[Cell]) -> Block:
    ordered = sorted(cells, key=lambda cell: (_DIRECTIONS.index(cell.worst.direction), cell.calls[0].position))
    lines = groupby(ordered, key=lambda cell: cell.worst.direction)
    return Block(name, tuple((direction, tuple(line)) for direction, line in lines))
