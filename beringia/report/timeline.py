"""The picture of a run: one lane per chip, stages as bars, the rest as marks, decisions as labelled arrows.

A lane, from top to bottom: the chip's name with its truth, the decisions (each an arrow back to the checkpoint that the
run went on from), checkpoints with their step, the bar, faults and alarms. The crossing is the one bold line between
lanes. Stages differ in height, not only in colour. Draws; reads nothing but the history.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from markupsafe import Markup

from beringia.records.events import Decision
from beringia.report.charts import Chart, Scale, Shape, mark, text_width, time_ticks, time_unit
from beringia.report.history import At, Checkpoint, Chip, History, Segment
from beringia.report.words import count, duration

TITLE_PIXELS = 24
NARROW_TITLE_PIXELS = 40
DECISION_ROW_PIXELS = 22
CHECKPOINT_PIXELS = 28
BAR_PIXELS = 20
MARKS_PIXELS = 24
BETWEEN_LANES_PIXELS = 18
AXIS_PIXELS = 38
CLOSEST_MARKS_PIXELS = 11
"""Marks nearer to each other than this are drawn as one, with their number."""
CLOSEST_CHECKPOINTS_PIXELS = 14
NUMBER_PIXELS = 22
"""Numbers of decisions nearer to each other than this touch, and are drawn as a range..."""
RANGE_PIXELS = 52
"""...which is at most this long."""
MOST_DECISION_ROWS = 3
NARROW_PIXELS = 600
"""Below this width decisions show their number only; the list of decisions has the words."""


@dataclass(frozen=True)
class Canvas:
    """Width and margins of every picture on the page, so that all share one time axis."""

    width: int
    seconds: float

    @property
    def narrow(self) -> bool:
        return self.width < NARROW_PIXELS

    @property
    def x(self) -> Scale:
        """Seconds since the run began to pixels."""
        left, right = (40, 8) if self.narrow else (58, 14)
        return Scale(0.0, max(self.seconds, 1e-3), left, self.width - right)

    def time_axis(self, chart: Chart, *, grid: bool = True) -> None:
        """The common axis."""
        name = f"{time_unit(self.seconds)[1]} since the run began"
        chart.horizontal_axis(time_ticks(self.seconds, 5 if self.narrow else 10), name, grid=grid)


@dataclass(frozen=True)
class PlacedDecision:
    """A decision with its number in the list, its row in the lane, and the words beside it (empty: no room)."""

    number: int
    at: At[Decision]
    target: Checkpoint | None
    row: int
    label: str


@dataclass
class Lane:
    """Where the parts of one chip's lane lie, in pixels from the top of the picture."""

    chip: Chip
    series: int
    top: float
    narrow: bool
    decisions: list[PlacedDecision] = field(default_factory=list)

    @property
    def title(self) -> float:
        """Bottom of the title: one line, or two where it is narrow."""
        return self.top + (NARROW_TITLE_PIXELS if self.narrow else TITLE_PIXELS)

    @property
    def rows(self) -> int:
        return max((decision.row + 1 for decision in self.decisions), default=0)

    def row(self, row: int) -> float:
        """Middle of a row of decisions, counted from the bar upwards."""
        return self.title + (self.rows - row - 0.5) * DECISION_ROW_PIXELS

    @property
    def checkpoints(self) -> float:
        return self.title + self.rows * DECISION_ROW_PIXELS

    @property
    def bar(self) -> float:
        return self.checkpoints + CHECKPOINT_PIXELS

    @property
    def marks(self) -> float:
        return self.bar + BAR_PIXELS + 11

    @property
    def bottom(self) -> float:
        return self.bar + BAR_PIXELS + MARKS_PIXELS


def series_of(history: History, label: str) -> int:
    """Which of the five colours a chip has, the same everywhere on the page: 1 to 5."""
    labels = [chip.label for chip in history.chips]
    return labels.index(label) % 5 + 1 if label in labels else 5


def crossing_times(history: History) -> list[tuple[At[Decision], bool]]:
    """Each decision to cross, and whether the crossing came about before the next decision."""
    found = []
    for place, at in enumerate(history.decisions):
        if at.event.action == "cross":
            until = history.decisions[place + 1].seconds if place + 1 < len(history.decisions) else float("inf")
            found.append((at, any(at.seconds <= crossing.seconds <= until for crossing in history.crossings)))
    return found


def draw_timeline(history: History, width: int) -> Markup:
    """The whole picture."""
    canvas = Canvas(width, history.seconds)
    lanes = _lay_out(history, canvas)
    height = int((lanes[-1].bottom if lanes else 40) + AXIS_PIXELS + 4)
    y = Scale(0, 1, height - AXIS_PIXELS, 4)
    chart = Chart(canvas.x, y, width, height, f"Timeline of {history.name}: {len(lanes)} lanes, one for each chip")
    canvas.time_axis(chart)
    _draw_pauses(chart, history)
    for lane in lanes:
        _draw_stages(chart, history, lane)
        _draw_checkpoints(chart, history, lane)
        _draw_decisions(chart, lane)
        _draw_marks(chart, history, lane, canvas)
    _draw_crossings(chart, history, lanes, canvas)
    for lane in lanes:
        _draw_title(chart, lane)
    return chart.svg()


def _lay_out(history: History, canvas: Canvas) -> list[Lane]:
    lanes: list[Lane] = []
    top = 6.0
    for chip in history.chips:
        lane = Lane(chip, series_of(history, chip.label), top, canvas.narrow)
        lane.decisions = _place_decisions(history, chip.label, canvas)
        lanes.append(lane)
        top = lane.bottom + BETWEEN_LANES_PIXELS
    return lanes


def lane_of(history: History, at: At[Decision]) -> str | None:
    """The lane that shows a decision: the chip in use, or the one it starts when there is none yet."""
    label = at.chip or at.event.to_chip
    return label if label is not None and history.chip(label) else (at.event.to_chip or label)


def _place_decisions(history: History, label: str, canvas: Canvas) -> list[PlacedDecision]:
    """Rows, counted from the bar upwards; later decisions first, so that earlier ones step up and to the left."""
    rows = _Rows(canvas)
    placed = []
    for number, at in reversed(list(enumerate(history.decisions, start=1))):
        if lane_of(history, at) == label:
            target = _target(history, at)
            x = canvas.x(at.seconds)
            back = canvas.x(target.seconds) if target and target.chip == label else x
            row, words = rows.place(min(x, back), x, "" if canvas.narrow else decision_label(at.event))
            placed.append(PlacedDecision(number, at, target, row, words))
    return placed[::-1]


@dataclass
class _Rows:
    """Finds a row where neither the arrow nor the words of a decision run into those of another."""

    canvas: Canvas
    taken: list[tuple[int, float, float]] = field(default_factory=list)
    """Row, left and right of what lies in it."""
    uprights: list[tuple[int, float]] = field(default_factory=list)
    """Row from which a line goes down to the bar, and where."""

    def place(self, back: float, x: float, words: str) -> tuple[int, str]:
        """(row, words if there is room for them) for an arrow from `x` back to `back`, in pixels."""
        row, shown, right = self._find(back, x, words)
        self.taken.append((row, back - 8, right))
        self.uprights += [(row, back), (row, x)]
        return row, shown

    def _find(self, back: float, x: float, words: str) -> tuple[int, str, float]:
        for shown in (words, ""):
            right = x + (16 + text_width(shown) if shown else 11)
            for row in range(MOST_DECISION_ROWS):
                if right <= self.canvas.width + 4 and self._free(row, back, x, right):
                    return row, shown, right
        return MOST_DECISION_ROWS - 1, "", x + 11

    def _free(self, row: int, back: float, x: float, right: float) -> bool:
        beside = all(right < low or back - 8 > high for other, low, high in self.taken if other == row)
        uncrossed = all(not back - 4 < place < right for other, place in self.uprights if other > row)
        below = [(low, high) for other, low, high in self.taken if other < row]
        return beside and uncrossed and all(not low < place < high for low, high in below for place in (back, x))


def decision_label(decision: Decision) -> str:
    """`rollback to step 100`, for the picture."""
    if decision.only_goes_on:
        return decision.reason
    where = " the start" if decision.to_step is None else f" step {decision.to_step:,}"
    if decision.action in ("skip", "cross"):
        return f"{decision.action} to {decision.to_chip} from{where}"
    if decision.action in ("start", "stop"):
        return decision.action
    return f"{decision.action} {'to' if decision.action == 'rollback' else 'from'}{where}"


def _target(history: History, at: At[Decision]) -> Checkpoint | None:
    """The checkpoint that the decision goes on from."""
    if at.event.to_step is None or at.event.action == "stop":
        return None
    before = (checkpoint for checkpoint in reversed(history.checkpoints) if checkpoint.seconds <= at.seconds)
    return next((checkpoint for checkpoint in before if checkpoint.event.step == at.event.to_step), None)


def _draw_title(chart: Chart, lane: Lane) -> None:
    # One text element a line, so that the truth follows the name whatever font the reader has.
    identity, label = lane.chip.identity, lane.chip.label
    x, y = 0.0 if lane.narrow else chart.x.pixel_low, lane.top + 13
    chart.rectangle(x, y - 9, x + 10, y + 1, f"swatch series-{lane.series}")
    words = Markup('<text x="{}" y="{}" class="lane-title halo">{} <tspan class="plain">{}</tspan></text>')
    truth = identity.truth.upper()
    plain = f"· {truth}" if lane.narrow else f"{identity.sku} · {truth}"
    chart.add(words.format(f"{x + 16:.1f}", f"{y:.1f}", label, plain))
    if lane.narrow:
        chart.text(x + 16, y + 16, identity.sku, "halo")


def _draw_stages(chart: Chart, history: History, lane: Lane) -> None:
    style = f"series-{lane.series}"
    for at in history.qualified:
        if at.chip == lane.chip.label:
            words = f"qualification, {duration(at.event.seconds)}: {at.event.verdict}"
            _box(chart, lane, at.seconds - at.event.seconds, at.seconds, 1.0, f"stage pale {style}", words)
    for segment in history.segments:
        if segment.chip == lane.chip.label:
            _draw_segment(chart, lane, segment, style)
    for x1, x2, steps in _lost_stretches(history, lane.chip.label):
        _box(chart, lane, x1, x2, 1.0, "lost", f"{count(steps, 'step')} done here and thrown away later")
    for evaluation in history.evaluations:
        if evaluation.chip == lane.chip.label:
            x1, words = evaluation.seconds - evaluation.event.seconds, f"evaluation at step {evaluation.event.step}"
            _box(chart, lane, x1, evaluation.seconds, 1.0, "erased")
            _box(chart, lane, x1, evaluation.seconds, 0.55, f"stage pale {style}", words)
    for canary in history.canaries:
        if canary.chip == lane.chip.label:
            words = f"canary: steps {canary.event.from_step} to {canary.event.to_step} replayed"
            x1 = canary.seconds - canary.event.seconds
            _box(chart, lane, x1, canary.seconds, 1.0, "erased")
            _box(chart, lane, x1, canary.seconds, 0.55, "stage canary", words)


def _draw_segment(chart: Chart, lane: Lane, segment: Segment, style: str) -> None:
    first = segment.ended if segment.trained_from is None else segment.trained_from
    _box(chart, lane, segment.began, first, 0.25, f"stage pale {style}", f"starting, {duration(first - segment.began)}")
    if segment.trained_from is not None and segment.trained_to is not None:
        words = f"training, {duration(segment.trained_to - segment.trained_from)}"
        _box(chart, lane, segment.trained_from, segment.trained_to, 1.0, f"stage {style}", words)
        rest = segment.ended - segment.trained_to
        _box(chart, lane, segment.trained_to, segment.ended, 0.25, f"stage pale {style}", f"no step, {duration(rest)}")


def _box(chart: Chart, lane: Lane, began: float, ended: float, share: float, style: str, words: str = "") -> None:
    """A stage: `share` of the bar's height, standing on its ground."""
    x1, x2 = chart.x(began), chart.x(ended)
    if x2 - x1 > 0.2:
        ground = lane.bar + BAR_PIXELS
        chart.rectangle(x1, ground - share * BAR_PIXELS, x2, ground, style, words)


def _lost_stretches(history: History, label: str) -> Iterator[tuple[float, float, int]]:
    """(began, ended, steps) of each stretch of steps that were thrown away."""
    for (chip, kept), group in groupby(history.steps, key=lambda step: (step.chip, step.kept)):
        if chip == label and not kept:
            steps = list(group)
            yield steps[0].seconds - steps[0].event.seconds, steps[-1].seconds, len(steps)


def _draw_checkpoints(chart: Chart, history: History, lane: Lane) -> None:
    """Where checkpoints stand closer than their marks, one of each cluster is drawn, the last trusted one if any."""
    y = lane.bar - 7
    last_label = -1e9
    mine = [checkpoint for checkpoint in history.checkpoints if checkpoint.chip == lane.chip.label]
    for _, group in groupby(mine, key=lambda checkpoint: int(chart.x(checkpoint.seconds) / CLOSEST_CHECKPOINTS_PIXELS)):
        cluster = list(group)
        shown = next((one for one in reversed(cluster) if one.state == "trusted"), cluster[-1])
        x, step = chart.x(shown.seconds), f"{shown.event.step:,}"
        more = f" (and {len(cluster) - 1} more here)" if len(cluster) > 1 else ""
        words = f"checkpoint at step {step}: {shown.state}{more}"
        chart.line(x, y, x, lane.bar + BAR_PIXELS, "tick-mark")
        chart.add(mark(x, y, "cross" if shown.state == "rejected" else "circle", f"checkpoint {shown.state}", words))
        if x - last_label > text_width(step) + 6:
            chart.text(x, y - 8, step, "small halo", "middle")
            last_label = x


def _draw_decisions(chart: Chart, lane: Lane) -> None:
    for decision in lane.decisions:
        x, y = chart.x(decision.at.seconds), lane.row(decision.row)
        chart.line(x, y, x, lane.bar + BAR_PIXELS, "arrow")
        if decision.target is not None and decision.target.chip == lane.chip.label:
            _draw_arrow_back(chart, x, y, chart.x(decision.target.seconds), lane.bar - 24)
    for cluster in _clusters(chart, lane.decisions):
        _draw_numbers(chart, lane.row(cluster[0].row), cluster)


def _clusters(chart: Chart, decisions: list[PlacedDecision]) -> list[list[PlacedDecision]]:
    """Decisions whose numbers would touch go together, so that the range of their numbers has room."""
    clusters: list[list[PlacedDecision]] = []
    for decision in decisions:
        group = clusters[-1] if clusters else []
        near = group and chart.x(decision.at.seconds) - chart.x(group[0].at.seconds) < RANGE_PIXELS
        touching = group and chart.x(decision.at.seconds) - chart.x(group[-1].at.seconds) < NUMBER_PIXELS
        if near and (touching or len(group) > 1) and decision.row == group[0].row and not group[-1].label:
            group.append(decision)
        else:
            clusters.append([decision])
    return clusters


def _draw_arrow_back(chart: Chart, x: float, y: float, target: float, tip: float) -> None:
    bend = min(6.0, max(0.0, (x - target) / 2))
    chart.path(f"M{x:.1f} {y:.1f}H{target + bend:.1f}q{-bend:.1f} 0 {-bend:.1f} {bend:.1f}V{tip - 4:.1f}", "arrow")
    chart.path(f"M{target:.1f} {tip:.1f}l-3.5 -6h7z", "arrow-head")


def _draw_numbers(chart: Chart, y: float, cluster: list[PlacedDecision]) -> None:
    first, last = cluster[0], cluster[-1]
    x = (chart.x(first.at.seconds) + chart.x(last.at.seconds)) / 2
    number = f"{first.number}" if first is last else f"{first.number}–{last.number}"
    words = "; ".join(
        f"decision {one.number}: {decision_label(one.at.event)}, {one.at.event.reason}" for one in cluster
    )
    width = 8 + 7 * len(number)
    box = Markup('<g class="number"><title>{}</title><rect x="{}" y="{}" width="{}" height="15" rx="7.5"/>')
    chart.add(box.format(words, f"{x - width / 2:.1f}", f"{y - 7.5:.1f}", width))
    chart.text(x, y + 4, number, "", "middle")
    chart.add("</g>")
    if last.label:
        chart.text(x + width / 2 + 4, y + 4, last.label, "label halo")


class _Incident(NamedTuple):
    seconds: float
    kind: str
    name: str
    message: str


def _incidents(history: History, label: str) -> list[_Incident]:
    faults = [
        _Incident(at.seconds, "fault", at.event.code, at.event.message) for at in history.faults if at.chip == label
    ]
    alarms = [
        _Incident(at.seconds, "alarm", at.event.site, at.event.message) for at in history.alarms if at.chip == label
    ]
    return sorted(faults + alarms)


def _draw_marks(chart: Chart, history: History, lane: Lane, canvas: Canvas) -> None:
    """Faults and alarms under the bar; those too near to tell apart as one mark with their number."""
    crossed = [chart.x(at.seconds) for at, _ in crossing_times(history)]
    incidents = _incidents(history, lane.chip.label)
    groups = groupby(incidents, key=lambda one: (int(chart.x(one.seconds) / CLOSEST_MARKS_PIXELS), one.kind))
    clusters = [list(group) for _, group in groups]
    obstacles = [chart.x(cluster[0].seconds) for cluster in clusters] + crossed + [float(chart.width)]
    free = 0.0
    for cluster in clusters:
        x, kind = chart.x(cluster[0].seconds), cluster[0].kind
        label = cluster[0].name + (f" ×{len(cluster)}" if len(cluster) > 1 else "")
        # Beside the bold line of the crossing, not under it.
        before = any(abs(x - place) < CLOSEST_MARKS_PIXELS for place in crossed)
        x -= CLOSEST_MARKS_PIXELS if before else 0
        shape: Shape = "cross" if kind == "fault" else "triangle"
        chart.add(mark(x, lane.marks, shape, kind, f"{kind} {label}: {cluster[0].message}"))
        width = text_width(label)
        if before and not canvas.narrow and x - width - 8 > free:
            chart.text(x - 8, lane.marks + 4, label, "small halo", "end")
        elif not before and not canvas.narrow and not any(x < other < x + width + 14 for other in obstacles):
            chart.text(x + 9, lane.marks + 4, label, "small halo")
            free = x + 16 + width
        free = max(free, x + 9)


def _draw_crossings(chart: Chart, history: History, lanes: list[Lane], canvas: Canvas) -> None:
    by_label = {lane.chip.label: lane for lane in lanes}
    for at, done in crossing_times(history):
        source, target = by_label.get(at.chip or ""), by_label.get(at.event.to_chip or "")
        if source is None or target is None:
            continue
        x = chart.x(at.seconds)
        down = target.top > source.top
        start = source.bar + (BAR_PIXELS if down else 0)
        end = target.bar + (0 if down else BAR_PIXELS)
        tip = -9 if down else 9
        chart.line(x, start, x, end + tip, "crossing" if done else "crossing refused")
        chart.path(f"M{x:.1f} {end:.1f}l-6.5 {tip * 1.2:.1f}h13z", "crossing-head")
        words = f"crossing at step {at.event.to_step:,}" if at.event.to_step is not None else "crossing"
        words = words if done else words + ", not completed"
        room_right = x + 12 + 1.1 * text_width(words) < canvas.width
        y = (source.bottom if down else target.bottom) + 16
        chart.text(x + (12 if room_right else -12), y, words, "crossing-label halo", "start" if room_right else "end")


def _draw_pauses(chart: Chart, history: History) -> None:
    for pause in history.pauses:
        x = chart.x(pause.seconds)
        chart.line(x, chart.y.pixel_high, x, chart.y.pixel_low, "pause")
        length = duration(pause.length_seconds)
        chart.add(mark(x, chart.y.pixel_low, "diamond", "pause", f"nothing ran for {length}; the axis leaves it out"))


def share_of_bound(value: float | None, bound: float) -> float:
    """How much of its bound a check used; infinite when it was not finite, or not zero where zero was asked."""
    if value is None:
        return float("inf")
    if bound == 0:
        return 0.0 if value == 0 else float("inf")
    return abs(value) / bound
