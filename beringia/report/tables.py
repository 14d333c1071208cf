"""What the charts show, as tables for the folded part of the page. Long ones are thinned, and say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from beringia.records.events import CheckDone
from beringia.report.answer import labelled
from beringia.report.frame import PageTable
from beringia.report.history import At, History, Step
from beringia.report.timeline import share_of_bound
from beringia.report.words import duration, percent, short_hash, significant, size

MOST_ROWS = 300
T = TypeVar("T")


def data_tables(history: History) -> list[PageTable]:
    """Every table that has rows."""
    tables = [
        _alarms(history),
        _faults(history),
        _checkpoints(history),
        _evaluations(history),
        _sites(history),
        _steps(history),
    ]
    return [table for table in tables if table.rows]


def _thinned(items: Sequence[T]) -> tuple[list[T], str]:
    """Evenly spread items, first and last among them, with a note if some were left out."""
    if len(items) <= MOST_ROWS:
        return list(items), ""
    stride = (len(items) - 1) / (MOST_ROWS - 1)
    shown = [items[round(place * stride)] for place in range(MOST_ROWS)]
    return shown, f"{len(shown):,} of {len(items):,} rows, evenly spread; events.jsonl has all of them."


def _alarms(history: History) -> PageTable:
    shown, note = _thinned(history.alarms)
    rows = [
        (
            f"{at.event.step:,}",
            labelled(history, at.chip),
            at.event.detector,
            at.event.site,
            at.event.tensor,
            significant(at.event.value),
            significant(at.event.bound),
            significant(share_of_bound(at.event.value, at.event.bound), 2),
            at.event.message,
        )
        for at in shown
    ]
    columns = ("#Step", "Chip", "Detector", "Site", "Tensor", "#Value", "#Bound", "#Times bound", "Message")
    return PageTable("Alarms of the guard", columns, rows, note)


def _faults(history: History) -> PageTable:
    shown, note = _thinned(history.faults)
    rows = [
        (
            duration(at.seconds),
            "" if at.event.step is None else f"{at.event.step:,}",
            labelled(history, at.chip),
            at.event.code,
            at.event.category,
            at.event.message,
        )
        for at in shown
    ]
    return PageTable(
        "Faults as the chips reported them", ("#After", "#Step", "Chip", "Code", "Category", "Message"), rows, note
    )


def _checkpoints(history: History) -> PageTable:
    shown, note = _thinned(history.checkpoints)
    rows = [
        (
            f"{one.event.step:,}",
            labelled(history, one.chip),
            one.state if one.kept or one.state == "rejected" else f"{one.state}, thrown away",
            "yes" if one.on_disk else "no longer",
            size(one.event.bytes),
            significant(1000 * one.event.pause_seconds),
            significant(1000 * one.event.write_seconds),
            short_hash(one.event.state_hash),
        )
        for one in shown
    ]
    columns = ("#Step", "Chip", "State", "On disk", "#Size", "#Pause (ms)", "#Writing (ms)", "State hash")
    return PageTable("Checkpoints", columns, rows, note)


def _evaluations(history: History) -> PageTable:
    shown, note = _thinned(history.evaluations)
    rows = []
    for at in shown:
        event = at.event
        between = ""
        if event.accuracy_low is not None and event.accuracy_high is not None:
            between = f"{100 * event.accuracy_low:.1f} to {100 * event.accuracy_high:.1f}"
        sampled = event.accuracy is not None
        rows.append(
            (
                f"{event.step:,}",
                labelled(history, at.chip),
                significant(event.loss, 4),
                f"{event.sequences:,}",
                f"{100 * event.accuracy:.1f}" if event.accuracy is not None else "",
                between,
                f"{event.samples:,}" if sampled else "",
                percent(event.chance, 0) if event.chance is not None else "",
            )
        )
    columns = ("#Step", "Chip", "#Loss (nats)", "#Sequences", "#Accuracy (%)", "#95 % interval", "#Samples", "#Chance")
    return PageTable("Evaluations", columns, rows, note)


def _sites(history: History) -> PageTable:
    """The guard's checks gathered by what they looked at."""
    groups: dict[tuple[str, str, str, str], list[At[CheckDone]]] = {}
    for at in history.checks:
        key = (labelled(history, at.chip), at.event.detector, at.event.site, at.event.tensor)
        groups.setdefault(key, []).append(at)
    rows = [_site_row(key, checks) for key, checks in sorted(groups.items())]
    columns = ("Chip", "Detector", "Site", "Tensor", "#Checks", "#Largest share of bound", "#At step", "#Time (s)")
    shown, note = _thinned(rows)
    return PageTable("Checks of the guard", columns, shown, note)


def _site_row(key: tuple[str, str, str, str], checks: list[At[CheckDone]]) -> tuple[str, ...]:
    worst = max(checks, key=lambda at: share_of_bound(at.event.value, at.event.bound))
    share = share_of_bound(worst.event.value, worst.event.bound)
    told = f"{significant(share)} (the data explain it)" if worst.event.explained else significant(share)
    spent = sum(at.event.seconds for at in checks)
    return (*key, f"{len(checks):,}", told, f"{worst.event.step:,}", significant(spent))


def _steps(history: History) -> PageTable:
    shown, note = _thinned(history.steps)
    columns = (
        "#Step",
        "Chip",
        "Kept",
        "#Loss (nats)",
        "#Gradient norm",
        "#Learning rate",
        "#Tokens",
        "#Time (s)",
        "#Guard (s)",
    )
    return PageTable("Steps", columns, [_step_row(history, step) for step in shown], note)


def _step_row(history: History, step: Step) -> tuple[str, ...]:
    event = step.event
    return (
        f"{event.step:,}",
        labelled(history, step.chip),
        "yes" if step.kept else "thrown away",
        significant(event.loss, 4),
        significant(event.gradient_norm),
        significant(event.learning_rate),
        f"{event.tokens:,}",
        significant(event.seconds),
        significant(event.guard_seconds),
    )
