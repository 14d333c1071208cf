"""The chart of lockstep: how far each layer's gradients, updates and outputs are from float64, as shares of the bound.

Rows are layers, the share runs to the right on a logarithmic scale: names of layers are long, a telephone is narrow.
Draws; reads nothing but the certificate's probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from beringia.records.certificate import NOISE_FLOORS, REFERENCES, ProbeResult
from beringia.report.certificate.model_map import layer_of
from beringia.report.charts import Chart, Scale, Shape, log_range, log_ticks, mark, text_width
from beringia.report.words import count, significant

ROW_PIXELS = 21
TOP_PIXELS = 24
BOTTOM_PIXELS = 40
MOST_DECADES = 3
"""Effects that are smaller shares of their bounds are drawn at the left edge."""
MARKS: dict[str, tuple[Shape, str]] = {
    "gradient": ("circle", "series-1"),
    "update": ("square", "series-3"),
    "outputs": ("diamond", "series-2"),
    "decode": ("triangle", "series-4"),
    "serve": ("triangle", "series-2"),
    "accumulated": ("circle", "series-3"),
    "buffer": ("square", "series-4"),
    "losses": ("ring", "series-5"),
}
"""Shape and colour of each kind."""


@dataclass(frozen=True)
class Effect:
    """One effect beside its bound; of a probe with several, the one that uses most of it."""

    kind: str
    row: str
    subject: str
    value: float | None
    bound: float

    @property
    def share(self) -> float | None:
        """Of the bound; None where no number is, as of a bound that allows 0 alone."""
        if self.bound == 0:
            return 0.0 if self.value == 0 else None
        return None if self.value is None else self.value / self.bound

    @property
    def beyond(self) -> bool:
        """Whether the bound is broken."""
        return self.share is None or self.share > 1.0

    @property
    def words(self) -> str:
        """For hover."""
        return f"{self.subject}: effect {significant(self.value)}, bound {significant(self.bound)}"


def effects_of(probes: Sequence[ProbeResult]) -> list[Effect]:
    """Every effect that lockstep found; the loss, which is in nats, is no effect."""
    found = []
    for probe in probes:
        effects = [measure for measure in probe.measures if measure.unit in (NOISE_FLOORS, REFERENCES)]
        if probe.probe == "lockstep" and effects:
            worst = max(effects, key=lambda measure: measure.used)
            found.append(Effect(_kind(probe), _row(probe), probe.subject, worst.value, worst.bound))
    return found


def draw_effects(effects: Sequence[Effect], width: int) -> Markup:
    """Each effect as a mark in its layer's row; triangles lie beyond their bound."""
    rows = list(dict.fromkeys(effect.row for effect in effects))
    chart = _chart(effects, rows, width)
    for number, row in enumerate(rows):
        chart.text(chart.x.pixel_low - 8, _height(number) + 4, _shortened(row), "tick", "end")
        chart.line(chart.x.pixel_low, _height(number), chart.x.pixel_high, _height(number), "grid")
    _draw_bound(chart, len(rows))
    for effect in sorted(effects, key=lambda effect: effect.beyond):
        _draw_effect(chart, effect, _height(rows.index(effect.row)))
    return chart.svg()


def effects_caption(effects: Sequence[Effect]) -> str:
    """What to see."""
    beyond = [effect for effect in effects if effect.beyond]
    words = f"What to see: all {count(len(effects), 'mark')} lie left of the dashed bound."
    if beyond:
        worst = max(beyond, key=lambda effect: float("inf") if effect.share is None else effect.share)
        lie = "lies" if len(beyond) == 1 else "lie"
        words = (
            f"What to see: {len(beyond):,} of {count(len(effects), 'mark')} {lie} right of the dashed bound "
            f"(triangles), furthest {worst.subject}."
        )
    low = _range(effects)[0]
    small = any(effect.share is not None and effect.share < low for effect in effects)
    words += f" Smaller shares are drawn at {significant(low, 1)}." if small else ""
    return words + (
        " The effect is the distance from float64, over that of the reference chip whose weights were moved as "
        "rounding may move them; the bound is 1.5, twice that for losses of training, and more where draws were far "
        "apart themselves. In 16 bits it is also the distance over the reference's own, where that uses more of its "
        "bound, 1.6. Each mark tells both."
    )


def _kind(probe: ProbeResult) -> str:
    return probe.subject.split(" ")[0]


def _row(probe: ProbeResult) -> str:
    """The layer of a gradient's parameter or of an update; all serving together; everything else by itself."""
    kind, _, name = probe.subject.partition(" ")
    if kind == "serve":
        return "serving"
    if kind not in ("gradient", "accumulated", "update") or not name:
        return probe.subject
    layer = layer_of(name)
    return layer if kind != "gradient" or layer != name else name.rpartition(".")[0] or name


def _range(effects: Sequence[Effect]) -> tuple[float, float]:
    shares = [effect.share for effect in effects if effect.share is not None]
    return log_range(shares, include=1.0, decades=MOST_DECADES)


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
    chart = Chart(x, y, width, round(bottom + BOTTOM_PIXELS), "Effects of lockstep by layer, as shares of their bounds")
    chart.horizontal_axis(log_ticks(low, high), "effect as a share of its bound (log scale)")
    return chart


def _draw_bound(chart: Chart, rows: int) -> None:
    top, bottom = TOP_PIXELS, TOP_PIXELS + rows * ROW_PIXELS
    chart.rectangle(chart.x(1.0), top, chart.x.pixel_high, bottom, "beyond")
    chart.line(chart.x(1.0), top, chart.x(1.0), bottom, "reference")
    chart.text(chart.x(1.0), top - 8, "bound", "small", "middle")


def _draw_effect(chart: Chart, effect: Effect, y: float) -> None:
    shape, style = MARKS.get(effect.kind, ("circle", "series-1"))
    x = chart.x.pixel_high if effect.share is None else chart.x(effect.share)
    raised = {"gradient": -3.0, "accumulated": 0.0, "update": 4.0}.get(effect.kind, 0.0)
    if effect.beyond:
        shape, style = ("cross" if effect.value is None else "triangle"), "alarm"
    chart.add(mark(x, y + raised, shape, style, effect.words))
    chart.hovers.append((x, y + raised, effect.words))
