"""The charts under the timeline, on the same time axis: loss, accuracy, and how much of its bound each check used.

Draws; reads nothing but the history. Work that was thrown away is dashed; the crossing is a bold upright line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from markupsafe import Markup

from beringia.records.events import Alarm, CheckDone, Evaluated
from beringia.report.answer import labelled
from beringia.report.charts import (
    Chart,
    Point,
    Scale,
    Shape,
    linear_ticks,
    log_range,
    log_ticks,
    nice_range,
    spaced,
    text_width,
)
from beringia.report.history import At, History, Step
from beringia.report.timeline import Canvas, crossing_times, series_of, share_of_bound
from beringia.report.words import percent, power_of_ten, significant

PLOT_TOP_PIXELS = 40
PLOT_BOTTOM_PIXELS = 38
SHAPES: tuple[Shape, ...] = ("circle", "square", "diamond", "triangle", "circle")
"""The mark of each colour, so that chips differ by more than colour."""
MOST_DECADES = 4
"""Checks that used less of their bound than this are drawn on the lowest line."""
MOST_CHECK_MARKS = 1500
"""More checks than this are drawn as the span of each pixel column."""


def draw_loss(history: History, width: int) -> Markup:
    """Loss of each step in nats per token; held-out loss as rings."""
    values = [step.event.loss for step in history.steps if step.event.loss is not None]
    values += [at.event.loss for at in history.evaluations if at.event.loss is not None]
    low, high = nice_range(values)
    chart = _chart(history, width, 230, low, high, "Training and held-out loss over time")
    chart.vertical_axis(linear_ticks(low, high), "loss (nats per token)")
    _guides(chart, history, labels=True)
    for style, fate, piece in _stretches(history):
        points = [Point(step.seconds, step.event.loss or 0.0, str(step.event.step)) for step in piece]
        chart.curve(points, style, partial(_loss_words, fate))
    broken = [step for step in history.steps if step.event.loss is None]
    for index in spaced([step.seconds for step in broken], chart.x, 10):
        words = f"step {broken[index].event.step}: loss not finite"
        chart.mark(Point(broken[index].seconds, high, words), "cross", "alarm")
    for at in _apart(history.evaluations, chart.x, 14):
        if at.event.loss is not None:
            words = f"step {at.event.step}: held-out loss {significant(at.event.loss, 4)}, {labelled(history, at.chip)}"
            chart.mark(Point(at.seconds, at.event.loss, words), "ring", _series(history, at.chip), radius=5)
    _name_lines(chart, history)
    return chart.svg()


def _loss_words(fate: str, point: Point) -> str:
    return f"step {point.text}: loss {significant(point.y, 4)}, {fate}"


def _stretches(history: History) -> Iterator[tuple[str, str, list[Step]]]:
    """(style, words, steps) of the pieces of the loss that belong together: one chip, kept or not, steps in a row."""
    piece: list[Step] = []
    for step in (*history.steps, None):
        if piece and (step is None or not _follows(piece[-1], step)):
            style = _series(history, piece[0].chip) + ("" if piece[0].kept else " thrown-away")
            chip = labelled(history, piece[0].chip)
            yield style, chip + ("" if piece[0].kept else ", thrown away"), piece
            piece = []
        if step is not None and step.event.loss is not None:
            piece.append(step)


def _follows(earlier: Step, later: Step) -> bool:
    same = earlier.chip == later.chip and earlier.kept == later.kept
    return same and later.event.loss is not None and later.event.step == earlier.event.step + 1


def _apart(evaluations: Sequence[At[Evaluated]], x: Scale, pixels: float) -> list[At[Evaluated]]:
    """Evaluations whose marks do not touch; the table has all of them."""
    return [evaluations[index] for index in spaced([at.seconds for at in evaluations], x, pixels)]


def _name_lines(chart: Chart, history: History) -> None:
    """Each chip's name where its first line begins, inside the plot's top."""
    free = 0.0
    for chip in history.chips:
        first = next((step for step in history.steps if step.chip == chip.label), None)
        if first is None:
            continue
        words = labelled(history, chip.label)
        x = min(max(chart.x(first.seconds) + 8, free), chart.x.pixel_high - text_width(words) - 14)
        series = series_of(history, chip.label)
        chart.rectangle(x, chart.y.pixel_high + 6, x + 9, chart.y.pixel_high + 15, f"swatch series-{series}")
        chart.text(x + 14, chart.y.pixel_high + 15, words, "label halo")
        free = x + 24 + text_width(words)


def draw_accuracy(history: History, width: int) -> Markup:
    """Accuracy of sampled answers with its 95 % interval; chance as a dashed line."""
    sampled = [at for at in history.evaluations if at.event.accuracy is not None]
    highest = max((at.event.accuracy_high or at.event.accuracy or 0.0 for at in sampled), default=1.0)
    _, high = nice_range([min(1.0, highest)], from_zero=True)
    chart = _chart(history, width, 180, 0.0, min(1.0, high), "Accuracy of sampled answers over time")
    ticks = [(value / 100, label) for value, label in linear_ticks(0, 100 * min(1.0, high), 4)]
    chart.vertical_axis(ticks, "accuracy (%)")
    _guides(chart, history)
    chance = next((at.event.chance for at in sampled if at.event.chance is not None), None)
    if chance is not None:
        chart.line(chart.x.pixel_low, chart.y(chance), chart.x.pixel_high, chart.y(chance), "reference")
    for at in _apart(sampled, chart.x, 11):
        event, series = at.event, series_of(history, at.chip or "")
        low_end, high_end = event.accuracy_low, event.accuracy_high
        if low_end is not None and high_end is not None:
            chart.interval(at.seconds, low_end, high_end, f"series-{series}")
        words = f"step {event.step}: {percent(event.accuracy)}" + (
            f" ({percent(low_end)} to {percent(high_end)})" if low_end is not None else ""
        )
        shape = SHAPES[series - 1]
        chart.mark(
            Point(at.seconds, event.accuracy or 0.0, f"{words}, {labelled(history, at.chip)}"),
            shape,
            f"series-{series}",
        )
    if chance is not None:
        chart.text(chart.x.pixel_low + 6, chart.y(chance) - 5, f"chance {percent(chance, 0)}", "small halo")
    return chart.svg()


@dataclass(frozen=True, slots=True)
class GuardCheck:
    """One check as the chart shows it: how much of its bound it used."""

    seconds: float
    chip: str | None
    share: float
    event: CheckDone | Alarm

    def words(self, history: History) -> str:
        """For hover."""
        used = "nothing" if self.share == 0 else f"{significant(self.share)} ×"
        where = f"step {self.event.step}, {self.event.detector} of {self.event.site} {self.event.tensor}"
        return f"{where}: {used} of its bound, {labelled(history, self.chip)}"


def guard_checks(history: History) -> list[GuardCheck]:
    """Every alarm, and every check that raised none. An alarm names the first tensor that was wrong, and the check
    beside it the one that used most of its bound: they are one."""
    alarmed = {_visit(at.event) for at in history.alarms}
    quiet = [at for at in history.checks if _visit(at.event) not in alarmed]
    moments: list[At[CheckDone] | At[Alarm]] = [*quiet, *history.alarms]
    checks = [
        GuardCheck(at.seconds, at.chip, share_of_bound(at.event.value, at.event.bound), at.event) for at in moments
    ]
    return sorted(checks, key=lambda check: check.seconds)


def _visit(event: CheckDone | Alarm) -> tuple[int, int | None, int, str, str]:
    """One look at one place; a worker that takes the step again, or another rank, looks again."""
    return event.epoch, event.rank, event.step, event.detector, event.site


def draw_guard(history: History, width: int) -> Markup:
    """Each check as its share of the bound, logarithmic; beyond 1 is an alarm."""
    checks = guard_checks(history)
    low, high = log_range([check.share for check in checks], include=1.0, decades=MOST_DECADES)
    chart = _chart(history, width, 210, low, high, "Share of its bound that each check of the guard used", log=True)
    chart.vertical_axis(log_ticks(low, high), "value ÷ bound (log scale)")
    chart.rectangle(chart.x.pixel_low, chart.y.pixel_high, chart.x.pixel_high, chart.y(1.0), "beyond")
    _guides(chart, history)
    chart.line(chart.x.pixel_low, chart.y(1.0), chart.x.pixel_high, chart.y(1.0), "reference")
    for check in _thinned([check for check in checks if check.share <= 1], chart.x):
        series = series_of(history, check.chip or "")
        point = Point(check.seconds, check.share, check.words(history))
        chart.mark(point, SHAPES[series - 1], f"series-{series} dot", radius=2.5)
    for check in _thinned([check for check in checks if check.share > 1], chart.x):
        chart.mark(Point(check.seconds, check.share, check.words(history)), "triangle", "alarm", radius=5)
    chart.text(chart.x.pixel_high - 4, chart.y(1.0) - 5, "beyond its bound: alarm", "small halo", "end")
    return chart.svg()


def _thinned(checks: list[GuardCheck], x: Scale) -> list[GuardCheck]:
    """All of them, or the largest and smallest of every third pixel column and chip when there are too many."""
    if len(checks) <= MOST_CHECK_MARKS:
        return checks
    kept = []
    for _, group in groupby(checks, key=lambda check: (int(x(check.seconds) / 3), check.chip)):
        column = list(group)
        low, high = min(column, key=lambda check: check.share), max(column, key=lambda check: check.share)
        kept += [low] if low is high else [low, high]
    return kept


def _chart(
    history: History, width: int, height: int, low: float, high: float, title: str, *, log: bool = False
) -> Chart:
    canvas = Canvas(width, history.seconds)
    y = Scale(low, high, height - PLOT_BOTTOM_PIXELS, PLOT_TOP_PIXELS, log)
    chart = Chart(canvas.x, y, width, height, title)
    canvas.time_axis(chart)
    return chart


def _guides(chart: Chart, history: History, *, labels: bool = False) -> None:
    """Upright lines where the run went back (thin, with the decision's number) and where it crossed (bold)."""
    top, bottom = chart.y.pixel_high, chart.y.pixel_low
    crossed = {at.seconds for at, done in crossing_times(history) if done}
    free = 0.0
    for number, at in enumerate(history.decisions, start=1):
        if at.event.action == "start":
            continue
        x = chart.x(at.seconds)
        chart.line(x, top, x, bottom, "crossing thin" if at.seconds in crossed else "guide")
        words = "crossing" if at.seconds in crossed and labels else str(number)
        if x - text_width(words) / 2 > free:
            chart.text(x, top - 5, words, "small strong" if words == "crossing" else "small", "middle")
            free = x + text_width(words) / 2 + 4


def _series(history: History, label: str | None) -> str:
    return f"series-{series_of(history, label or '')}"


def lowest_power(history: History) -> str | None:
    """The floor of the guard's chart, if checks lie below it."""
    shares = [check.share for check in guard_checks(history)]
    low, _ = log_range(shares, include=1.0, decades=MOST_DECADES)
    return power_of_ten(round(math.log10(low))) if any(share < low for share in shares) else None
