"""The chart of lockstep: how far each layer's gradients, updates and outputs are from float64, beside their bounds.

Rows are layers, the effect runs to the right on a logarithmic scale: names of layers are long, a telephone is narrow.
Draws; reads nothing but the certificate's probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from beringia.records.certificate import ProbeResult
from beringia.report.certificate.model_map import layer_of
from beringia.report.charts import Chart, Scale, Shape, log_range, log_ticks, mark, text_width
from beringia.report.words import count, significant

ROW_PIXELS = 21
TOP_PIXELS = 24
BOTTOM_PIXELS = 40
MOST_DECADES = 3
"""Effects that are smaller against their bound are drawn at the left edge."""
MARKS: dict[str, tuple[Shape, str]] = {
    "gradient": ("circle", "series-1"),
    "update": ("square", "series-3"),
    "outputs": ("diamond", "series-2"),
    "decode": ("triangle", "series-4"),
    "losses": ("ring", "series-5"),
}
"""Shape and colour of each kind."""


@dataclass(frozen=True)
class Effect:
    """One effect beside its bound."""

    kind: str
    row: str
    subject: str
    value: float | None
    bound: float

    @property
    def beyond(self) -> bool:
        """Whether the bound is broken."""
        return self.value is None or self.value > self.bound

    @property
    def words(self) -> str:
        """For hover."""
        return f"{self.subject}: effect {significant(self.value)}, bound {significant(self.bound)}"


def effects_of(probes: Sequence[ProbeResult]) -> list[Effect]:
    """Every effect that lockstep found; the loss, which is in nats, is no effect."""
    return [
        Effect(_kind(probe), _row(probe), probe.subject, measure.value, measure.bound)
        for probe in probes
        if probe.probe == "lockstep"
        for measure in probe.measures
        if measure.name == "effect"
    ]


def draw_effects(effects: Sequence[Effect], width: int) -> Markup:
    """Each effect as a mark in its layer's row; triangles lie beyond their bound."""
    rows = list(dict.fromkeys(effect.row for effect in effects))
    chart = _chart(effects, rows, width)
    for number, row in enumerate(rows):
        chart.text(chart.x.pixel_low - 8, _height(number) + 4, _shortened(row), "tick", "end")
        chart.line(chart.x.pixel_low, _height(number), chart.x.pixel_high, _height(number), "grid")
    _draw_bounds(chart, effects, rows)
    for effect in sorted(effects, key=lambda effect: effect.beyond):
        _draw_effect(chart, effect, _height(rows.index(effect.row)))
    return chart.svg()


def effects_caption(effects: Sequence[Effect]) -> str:
    """What to see."""
    beyond = [effect for effect in effects if effect.beyond]
    words = f"What to see: all {count(len(effects), 'mark')} lie left of the dashed bound."
    if beyond:
        worst = max(beyond, key=lambda effect: float("inf") if effect.value is None else effect.value / effect.bound)
        lie = "lies" if len(beyond) == 1 else "lie"
        words = (
            f"What to see: {len(beyond):,} of {count(len(effects), 'mark')} {lie} right of the dashed bound "
            f"(triangles), furthest {worst.subject}."
        )
    floor = [effect for effect in effects if effect.value is not None and effect.value < _range(effects)[0]]
    other = {effect.row: effect.bound for effect in effects if effect.bound != effects[0].bound}
    words += "".join(f" The bound of {row} is {significant(bound, 2)}." for row, bound in list(other.items())[:3])
    words += f" Smaller effects are drawn at {significant(_range(effects)[0], 1)}." if floor else ""
    return words + (
        " The effect is the distance from float64, over that of the reference chip whose weights were moved by one "
        "unit in the last place."
    )


def _kind(probe: ProbeResult) -> str:
    return probe.subject.split(" ")[0]


def _row(probe: ProbeResult) -> str:
    """The layer of a gradient's parameter or of an update; everything else has a row of its own."""
    kind, _, name = probe.subject.partition(" ")
    if kind not in ("gradient", "update") or not name:
        return probe.subject
    layer = layer_of(name)
    return layer if kind == "update" or layer != name else name.rpartition(".")[0] or name


def _range(effects: Sequence[Effect]) -> tuple[float, float]:
    bound = min(effect.bound for effect in effects)
    return log_range(
        [effect.value for effect in effects if effect.value is not None], include=bound, decades=MOST_DECADES
    )


def _height(row: int) -> float:
    return TOP_PIXELS + (row + 0.5) * ROW_PIXELS


def _shortened(row: str) -> str:
    """The last letters of a long name: they tell layers apart."""
    return row if len(row) <= 20 else "…" + row[-19:]


def _chart(effects: Sequence[Effect], rows: list[str], width: int) -> Chart:
    bottom = TOP_PIXELS + len(rows) * ROW_PIXELS
    left = max(text_width(_shortened(row)) for row in rows) + 24
    low, high = _range(effects)
    x = Scale(low, high, left, width - 12, log=True)
    y = Scale(0, 1, bottom, TOP_PIXELS)
    chart = Chart(x, y, width, round(bottom + BOTTOM_PIXELS), "Effects of lockstep by layer, beside their bounds")
    chart.horizontal_axis(log_ticks(low, high), "effect (noise floors, log scale)")
    return chart


def _draw_bounds(chart: Chart, effects: Sequence[Effect], rows: list[str]) -> None:
    """The bound of each row as an upright dashed line; neighbours with the same one share it."""
    bounds = {effect.row: effect.bound for effect in effects}
    place = 0
    for bound, group in groupby(rows, key=lambda row: bounds[row]):
        size = len(list(group))
        top, bottom = TOP_PIXELS + place * ROW_PIXELS, TOP_PIXELS + (place + size) * ROW_PIXELS
        chart.rectangle(chart.x(bound), top, chart.x.pixel_high, bottom, "beyond")
        chart.line(chart.x(bound), top, chart.x(bound), bottom, "reference")
        if place == 0:
            chart.text(chart.x(bound), top - 8, f"bound {significant(bound, 2)}", "small", "middle")
        place += size


def _draw_effect(chart: Chart, effect: Effect, y: float) -> None:
    shape, style = MARKS.get(effect.kind, ("circle", "series-1"))
    x = chart.x.pixel_high if effect.value is None else chart.x(effect.value)
    raised = {"gradient": -3.0, "update": 4.0}.get(effect.kind, 0.0)
    if effect.beyond:
        shape, style = ("cross" if effect.value is None else "triangle"), "alarm"
    chart.add(mark(x, y + raised, shape, style, effect.words))
    chart.hovers.append((x, y + raised, effect.words))
