"""Small charts as SVG text: scales, ticks, axes, lines, intervals, marks. No run, no page, no file.

Used by every page. Colours come from the style sheet through classes (`series-1` to `series-5`, Okabe-Ito), so a chart
follows the reader's light or dark setting. Every text that goes into a chart is escaped here. A chart is drawn for a
width in pixels; pages draw a wide and a narrow one rather than shrink the letters.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from markupsafe import Markup, escape

from beringia.report.words import power_of_ten

LETTER_WIDTH_PIXELS = 6.6
"""Mean advance of a letter at 12 px in the system fonts; used to see whether a label has room."""

Shape = Literal["circle", "square", "diamond", "triangle", "cross", "ring"]
Tick = tuple[float, str]


class Point(NamedTuple):
    """One value, with the words that a hover shows for it."""

    x: float
    y: float
    text: str = ""


@dataclass(frozen=True)
class Scale:
    """From values to pixels, linear or logarithmic."""

    low: float
    high: float
    pixel_low: float
    pixel_high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside are drawn at the edge."""
        value = min(max(value, self.low), self.high)
        low, high = self._position(self.low), self._position(self.high)
        share = (self._position(value) - low) / (high - low) if high > low else 0.5
        return self.pixel_low + share * (self.pixel_high - self.pixel_low)

    def _position(self, value: float) -> float:
        return math.log10(value) if self.log else value


def nice_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides `span` into at most about `count` parts."""
    if span <= 0:
        return 1.0
    rough = span / max(count, 1)
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def linear_ticks(low: float, high: float, count: int = 5) -> list[Tick]:
    """Round values within [low, high] with labels of equal digits."""
    step = nice_step(high - low, count)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(place * step, f"{place * step:,.{digits}f}".replace("-", "−")) for place in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[Tick]:
    """Powers of ten within [low, high]."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / count))
    plain = {-2: "0.01", -1: "0.1", 0: "1", 1: "10", 2: "100"}
    exponents = [exponent for exponent in range(first, last + 1) if exponent % stride == 0]
    return [(10.0**exponent, plain.get(exponent, power_of_ten(exponent))) for exponent in exponents]


_TIME_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def time_unit(seconds: float) -> tuple[float, str]:
    """(seconds in the unit, its name) in which a run of this length reads best."""
    return next((unit for unit in _TIME_UNITS if seconds >= 3 * unit[0]), _TIME_UNITS[-1])


def time_ticks(seconds: float, count: int = 8) -> list[Tick]:
    """Ticks in seconds, labelled in `time_unit(seconds)`."""
    unit, _ = time_unit(seconds)
    return [(value * unit, label) for value, label in linear_ticks(0, seconds / unit, count)]


def nice_range(values: Iterable[float], *, from_zero: bool = False) -> tuple[float, float]:
    """A range of round numbers around the values; from zero if asked, or if the values come near it anyway."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    if from_zero or 0 <= low < 0.5 * high:
        low = 0.0
    smallest = sys.float_info.min
    if high - low < smallest:  # equal, or so near each other that a part of their distance would be zero
        high = low + (abs(low) if abs(low) >= smallest else 1.0)
    step = nice_step(high - low, 4)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def decimate(points: Sequence[Point], scale: Scale) -> list[Point]:
    """At most the first, lowest, highest and last of each pixel column: the line looks the same, peaks stay."""
    if len(points) <= 2 * abs(scale.pixel_high - scale.pixel_low):
        return list(points)
    columns: dict[int, list[Point]] = {}
    for point in points:
        columns.setdefault(int(scale(point.x)), []).append(point)
    kept: list[Point] = []
    for column in columns.values():
        extremes = (
            column[0],
            min(column, key=lambda point: point.y),
            max(column, key=lambda point: point.y),
            column[-1],
        )
        kept += sorted(set(extremes), key=lambda point: point.x)
    return kept


def spaced(places: Sequence[float], scale: Scale, pixels: float) -> list[int]:
    """Indices of places at least so many pixels apart, the last one always among them."""
    kept: list[int] = []
    for index in reversed(range(len(places))):
        if not kept or scale(places[kept[-1]]) - scale(places[index]) >= pixels:
            kept.append(index)
    return kept[::-1]


@dataclass
class Chart:
    """A drawing that grows by calls; `svg()` gives the text. Values go through `x` and `y`; pixels say so."""

    x: Scale
    y: Scale
    width: int
    height: int
    title: str
    """Said to those who do not see the picture."""
    parts: list[str] = field(default_factory=list)
    hovers: list[tuple[float, float, str]] = field(default_factory=list)

    def add(self, piece: str) -> None:
        """Append SVG that the caller has escaped."""
        self.parts.append(piece)

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "start") -> None:
        """Words at a pixel position."""
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(words)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """A straight line between pixel positions."""
        self.add(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>')

    def rectangle(self, x1: float, y1: float, x2: float, y2: float, style: str, words: str = "") -> None:
        """A box between pixel positions, at least one pixel wide; `words` show on hover."""
        width, height = max(1.0, x2 - x1), max(0.5, y2 - y1)
        box = f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{width:.1f}" height="{height:.1f}" class="{style}"'
        self.add(f"{box}>{_title(words)}</rect>" if words else f"{box}/>")

    def path(self, commands: str, style: str) -> None:
        """An SVG path in pixels."""
        self.add(f'<path d="{commands}" class="{style}"/>')

    def horizontal_axis(self, ticks: Sequence[Tick], name: str, *, grid: bool = True) -> None:
        """Ticks and the axis' name (with its unit) below the plot."""
        top, bottom = self.y.pixel_high, self.y.pixel_low
        for value, label in ticks:
            place = self.x(value)
            if grid:
                self.line(place, top, place, bottom, "grid")
            self.text(place, bottom + 16, label, "tick", "middle")
        self.line(self.x.pixel_low, bottom, self.x.pixel_high, bottom, "axis")
        self.text(self.x.pixel_high, bottom + 32, name, "axis-name", "end")

    def vertical_axis(self, ticks: Sequence[Tick], name: str) -> None:
        """Ticks left of the plot, and the axis' name (with its unit) above it."""
        for value, label in ticks:
            place = self.y(value)
            self.line(self.x.pixel_low, place, self.x.pixel_high, place, "grid")
            self.text(self.x.pixel_low - 7, place + 4, label, "tick", "end")
        self.text(0, self.y.pixel_high - 22, name, "axis-name")

    def curve(self, points: Sequence[Point], style: str, describe: Callable[[Point], str]) -> None:
        """A line through values, thinned to the pixels there are; hover shows `describe` of its points."""
        shown = decimate(points, self.x)
        if len(shown) == 1:
            self.mark(shown[0], "circle", style, radius=1.5)
        placed = [(self.x(point.x), self.y(point.y)) for point in shown]
        if len(placed) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            self.add(f'<polyline points="{path}" class="curve {style}"/>')
        self.hovers += [(x, y, describe(point)) for (x, y), point in zip(placed, shown, strict=True)]

    def interval(self, x: float, low: float, high: float, style: str) -> None:
        """An upright bar with ends: from `low` to `high` at `x`."""
        place, bottom, top = self.x(x), self.y(low), self.y(high)
        self.path(f"M{place - 4:.1f} {bottom:.1f}h8m-4 0V{top:.1f}m-4 0h8", f"interval {style}")

    def mark(self, point: Point, shape: Shape, style: str, radius: float = 4.0) -> None:
        """A mark at a value."""
        x, y = self.x(point.x), self.y(point.y)
        self.add(mark(x, y, shape, style, point.text, radius))
        if point.text:
            self.hovers.append((x, y, point.text))

    def svg(self) -> Markup:
        """The picture, as wide as its place but never wider than drawn."""
        hovers = json.dumps([[round(x, 1), round(y, 1), text] for x, y, text in self.hovers], ensure_ascii=False)
        data = Markup(' data-hover="{}"').format(hovers) if self.hovers else ""
        return Markup(
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}" '
            f'role="img" aria-label="{escape(self.title)}"{data}>{"".join(self.parts)}</svg>'
        )


def mark(x: float, y: float, shape: Shape, style: str, words: str = "", radius: float = 4.0) -> str:
    """A mark at a pixel position; `words` show on hover and are read aloud."""
    r = radius
    outlines: dict[Shape, str] = {
        "circle": f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        "ring": f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        "diamond": f"M{x:.1f} {y - r * 1.2:.1f}l{r} {r * 1.2:.1f}l{-r} {r * 1.2:.1f}l{-r} {-r * 1.2:.1f}z",
        "triangle": f"M{x:.1f} {y - r:.1f}l{r * 1.1:.1f} {2 * r}h{-2.2 * r:.1f}z",
        "cross": f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}",
    }
    tag = f'<path d="{outlines[shape]}" class="mark {shape} {style}"'
    return f"{tag}>{_title(words)}</path>" if words else f"{tag}/>"


def _title(words: str) -> str:
    return f"<title>{escape(words)}</title>"


def text_width(words: str) -> float:
    """About how many pixels a label takes."""
    return len(words) * LETTER_WIDTH_PIXELS


def log_range(values: Iterable[float], *, include: float, decades: int = 6) -> tuple[float, float]:
    """Whole decades around the positive values and `include`, at most `decades` of them below `include`."""
    shares = [value for value in values if value > 0 and math.isfinite(value)]
    low = math.floor(math.log10(min([include, *shares])) + 1e-9)
    high = math.ceil(math.log10(max([include, *shares])) - 1e-9)
    ground = math.floor(math.log10(include)) - decades
    return 10.0 ** max(low, ground), 10.0 ** (high if 10.0**high > include else high + 1)
