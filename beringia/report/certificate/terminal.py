"""A certificate on a terminal: the verdict, why, the first wrong operator, the largest shares; at most 100 columns."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beringia.records.certificate import Certificate, OperatorCheck
from beringia.report.certificate.evidence import by_kind, error_words, index_words
from beringia.report.certificate.model_map import used_words
from beringia.report.certificate.sentence import place_words, verdict_sentence, wrong_words
from beringia.report.summary import TABLE_COLUMNS
from beringia.report.words import share_words, significant

MOST_SHARES = 5
_STATES = {True: Text("✗ beyond", style="bold red"), False: Text("✓ within", style="green")}


def print_certificate(certificate: Certificate, console: Console) -> None:
    """The end of a qualification; the caller prints the page's path under it."""
    width = min(TABLE_COLUMNS, console.width)
    console.print(Text(str(verdict_sentence(certificate)), style="bold"), width=width)
    _print_named("for", (certificate.scope,), console, width)
    _print_named("because", certificate.reasons, console, width)
    if certificate.first_wrong is not None:
        _print_named("wrong", _first_wrong_lines(certificate), console, width)
    _print_named("helps", certificate.mitigations, console, width)
    table = _shares(certificate)
    if table.row_count:
        console.print(table, width=width)


def _print_named(name: str, lines: tuple[str, ...], console: Console, width: int) -> None:
    """Lines beside their name; long ones are broken inside their column."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=9, no_wrap=True)
    grid.add_column(overflow="fold")
    for place, line in enumerate(lines):
        grid.add_row(name if place == 0 else "", Text(line))
    if lines:
        console.print(grid, width=width)


def _first_wrong_lines(certificate: Certificate) -> tuple[str, ...]:
    located = certificate.first_wrong
    if located is None:
        return ()
    check = located.check
    lines = [f"{wrong_words(check)}: {check.refused or used_words(check)}"]
    if not check.refused:
        lines.append(f"relative error {error_words(check)}")
    if check.worst_element:
        place = index_words(check.worst_element)
        lines.append(f"element {place}: {significant(check.found, 6)} instead of {significant(check.expected, 6)}")
    known = located.consistent_with[:2] or ("no fault that is known here",)
    lines += [f"consistent with {one}" for one in known]
    return tuple(lines)


def _shares(certificate: Certificate) -> Table:
    """The largest share of each kind of probe, the largest first."""
    largest: dict[str, tuple[float, str, str]] = {}
    for kind, probes in by_kind(certificate.probes).items():
        found = [(measure.used, probe.subject, measure.name) for probe in probes for measure in probe.measures]
        largest |= {kind: max(found)} if found else {}
    worst = max(certificate.operators, key=lambda check: check.used, default=None)
    if worst is not None and worst.used >= largest.get("operators", (0.0,))[0]:
        largest["operators"] = worst.used, f"{place_words(worst)} ({worst.direction})", _measure_name(worst)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("probe", no_wrap=True)
    table.add_column("largest share", overflow="fold")
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    ranked = sorted(largest.items(), key=lambda one: -one[1][0])[:MOST_SHARES]
    for kind, (used, subject, measure) in ranked:
        table.add_row(Text(kind), Text(f"{subject}: {measure}"), share_words(used), _STATES[used > 1])
    return table


def _measure_name(check: OperatorCheck) -> str:
    if check.refused:
        return "refused"
    return max(check.measures, key=lambda measure: measure.used).name if check.measures else ""
