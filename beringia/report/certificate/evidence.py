"""What stands on a certificate's page beside the map: facts, probes by kind, tables of all data, who was compared.

Reads the certificate; knows no HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from beringia.records.certificate import POWER_NEEDED, Certificate, Measure, OperatorCheck, ProbeResult
from beringia.records.identity import ChipIdentity
from beringia.report.certificate.model_map import Cell, ModelMap, shape_words
from beringia.report.certificate.sentence import largest_share, operator_words
from beringia.report.frame import Fact, PageTable
from beringia.report.words import duration, percent, share_words, short_hash, significant

KINDS = (
    "reference",
    "arithmetic",
    "operators",
    "replay",
    "lengths",
    "layers",
    "experts",
    "clipping",
    "repeat",
    "lockstep",
    "collectives",
    "memory",
    "soak",
    "speed",
)
"""In the order of the page; kinds that are not named here follow."""
MOST_ROWS = 300
MOST_WRONG = 20
"""Wrong operators that are listed under the map."""
MOST_SHOWN = 8
"""Rows of passed probes that are not folded."""
_GRAVITY = {"failed": 0, "inconclusive": 1, "passed": 2, "told": 3}


@dataclass(frozen=True)
class ProbeGroup:
    """Probes of one kind, the gravest first."""

    kind: str
    shown: tuple[ProbeResult, ...]
    folded: tuple[ProbeResult, ...]
    told: tuple[ProbeResult, ...]
    words: str
    """`2 failed, 40 passed`."""


@dataclass(frozen=True)
class Compared:
    """One field of the two identities."""

    name: str
    chip: str
    reference: str

    @property
    def differs(self) -> bool:
        """Whether the two are different in it."""
        return self.chip != self.reference


def facts_of(certificate: Certificate, model: ModelMap) -> list[Fact]:
    """The few numbers at the top."""
    beyond = sum(cell.beyond for cell in model.cells)
    outcomes = [probe.outcome for probe in certificate.probes]
    failed, unsure = outcomes.count("failed"), outcomes.count("inconclusive")
    return [
        Fact("Train on it", _allowed(certificate, "train")),
        Fact("Serve on it", _allowed(certificate, "infer")),
        Fact("Operator checks", f"{len(certificate.operators):,}", f"{beyond:,} beyond the bound"),
        Fact("Probes", f"{len(outcomes):,}", f"{failed:,} failed" + (f", {unsure:,} undecided" if unsure else "")),
        Fact(
            "Enough batches",
            "✓ yes" if certificate.power >= POWER_NEEDED else "✗ no",
            f"a sound chip passes with a chance of {percent(certificate.power, 0)}; {percent(POWER_NEEDED, 0)} needed",
        ),
        Fact("Time", duration(certificate.seconds), "for all of it"),
    ]


def basis_of(certificate: Certificate) -> list[Fact]:
    """What the certificate rests on, and what ends it."""
    made = [Fact("made by", certificate.command)] if certificate.command else []
    identity, weights = short_hash(certificate.identity_hash), short_hash(certificate.model.weights)
    return [
        Fact("bounds of probes", _held_words(certificate)),
        Fact("operator calls", _calls_words(certificate.operators)),
        *_tried(certificate),
        *made,
        Fact("single device", _device_words(certificate.identity)),
        Fact(
            "holds for",
            f"this chip with its software and switches (identity {identity}), these weights ({weights}), and products "
            f"in {certificate.compute_dtype}",
        ),
        Fact(
            "ends",
            "when the part, driver, runtime, torch, plugin or a numeric switch changes, or with other weights or "
            "another dtype of products. It has no last day, but chips age: qualify again after a repair or a fault",
        ),
    ]


def _tried(certificate: Certificate) -> list[Fact]:
    """Ways of serving and training, and those that were left out."""
    if not certificate.extent:
        return []
    how = "a subset that covers them" if certificate.extent == "quick" else "all of them"
    return [
        Fact("tried", f"{'; '.join(certificate.scenarios) or 'batches alone'} ({certificate.extent}: {how})"),
        Fact("not tried", "; ".join(certificate.untried) or "nothing that is known"),
    ]


def _held_words(certificate: Certificate) -> str:
    """`152 hold, 3 are broken`: of the probes that were judged."""
    used = [measure.used for probe in certificate.probes if probe.outcome != "told" for measure in probe.measures]
    broken = sum(share > 1.0 for share in used)
    return f"{len(used) - broken:,} hold, {broken:,} {'is' if broken == 1 else 'are'} broken"


def _calls_words(checks: Sequence[OperatorCheck]) -> str:
    """Right and wrong ones, of those that the certificate lists."""
    wrong = sum(check.used > 1.0 for check in checks)
    listed = "of those listed here: the wrong ones, and of the others the worst of each operator"
    return f"{len(checks) - wrong:,} right, {wrong:,} wrong or refused, {listed}"


def _device_words(identity: ChipIdentity) -> str:
    if identity.truth == "emulated":
        return "none, the chip is emulated"
    return identity.device or "its driver tells none, so this stands for the kind of chip and not for one card"


def _allowed(certificate: Certificate, use: Literal["train", "infer"]) -> str:
    if certificate.verdict == "inconclusive" and not certificate.rules_out(use):
        return "? open"
    return "✓ yes" if certificate.allows(use) else "✗ no"


def by_kind(probes: Sequence[ProbeResult]) -> dict[str, list[ProbeResult]]:
    """Probes by kind, in the order of the page."""
    kinds = dict.fromkeys([*KINDS, *(probe.probe for probe in probes)])
    groups = {kind: [probe for probe in probes if probe.probe == kind] for kind in kinds}
    return {kind: group for kind, group in groups.items() if group}


def probe_groups(probes: Sequence[ProbeResult]) -> list[ProbeGroup]:
    """What each kind of probe found, speeds and other facts apart."""
    return [_group(kind, group) for kind, group in by_kind(probes).items()]


def _group(kind: str, probes: Sequence[ProbeResult]) -> ProbeGroup:
    judged = sorted(
        (probe for probe in probes if probe.outcome != "told"),
        key=lambda probe: (_GRAVITY[probe.outcome], -largest_share(probe)),
    )
    grave = sum(probe.outcome != "passed" for probe in judged)
    # Lockstep has a row for every parameter, and the chart above shows them: what passed is folded.
    end = len(judged) if len(judged) - grave <= MOST_SHOWN else grave
    outcomes = [probe.outcome for probe in probes]
    names = {"failed": "failed", "inconclusive": "undecided", "passed": "passed", "told": "told"}
    words = [f"{outcomes.count(outcome):,} {name}" for outcome, name in names.items() if outcome in outcomes]
    told = tuple(probe for probe in probes if probe.outcome == "told")
    return ProbeGroup(kind, tuple(judged[:end]), tuple(judged[end:]), told, ", ".join(words))


def telling(measures: Sequence[Measure]) -> list[Measure]:
    """Measures that found anything; all of them where none did."""
    return [measure for measure in measures if measure.used > 0] or list(measures)


def error_words(check: OperatorCheck) -> str:
    """The error beside the reference chip's own: `0.0370 of the result; the reference chip's own is 0.00210`."""
    if check.error is None:
        return "not a number"
    own = check.reference_error
    if own is None:
        return f"{significant(check.error)}; the reference chip's own is not known"
    times = f" (this chip: {significant(check.error / own, 2)} times it)" if own > 0 else ""
    return f"{significant(check.error)}; the reference chip's own is {significant(own)}{times}"


def index_words(index: Sequence[int]) -> str:
    """`[3, 7]`."""
    return f"[{', '.join(str(place) for place in index)}]"


def data_tables(certificate: Certificate, model: ModelMap) -> list[PageTable]:
    """Everything that the pictures show, as tables; the highest shares where there are too many rows."""
    tables = [_cells(model), _probe_measures(certificate.probes)]
    return [table for table in tables if table.rows]


def beyond_table(model: ModelMap) -> PageTable:
    """Operators beyond their bound in the order of execution, for the part of the page that is printed."""
    cells = sorted(model.beyond, key=lambda cell: cell.calls[0].position)
    columns = ("Module", "Operator", "Direction", "#Share of bound", "#Error", "#Reference's own")
    rows = [tuple(_cell_row(cell)[place] for place in (0, 1, 2, 5, 6, 7)) for cell in cells[:MOST_WRONG]]
    return PageTable("Operators beyond their bound", columns, rows, _left_out(len(cells), MOST_WRONG))


def _cells(model: ModelMap) -> PageTable:
    return PageTable(
        "Operators", *_cell_rows(model.cells[:MOST_ROWS]), note=_left_out(len(model.cells), MOST_ROWS, "highest shares")
    )


def _left_out(rows: int, most: int, which: str = "first") -> str:
    return "" if rows <= most else f"The {most:,} {which} of {rows:,} rows; the certificate's JSON file has all calls."


def _cell_rows(cells: Sequence[Cell]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns = ("Module", "Operator", "Direction", "#Calls", "#Beyond", "#Share of bound", "#Error", "#Reference's own")
    return (*columns, "Dtype", "Worst element", "#Found", "#Expected", "Shapes"), [_cell_row(cell) for cell in cells]


def _cell_row(cell: Cell) -> tuple[str, ...]:
    check = cell.worst
    return (
        check.module or "none",
        operator_words(check.operator),
        check.direction,
        f"{len(cell.calls):,}",
        f"{cell.beyond:,}",
        "refused" if check.refused else share_words(check.used),
        "" if check.refused else significant(check.error),
        "" if check.reference_error is None else significant(check.reference_error),
        check.dtype,
        index_words(check.worst_element) if check.worst_element else "",
        "" if check.found is None else significant(check.found),
        "" if check.expected is None else significant(check.expected),
        shape_words(check, 6),
    )


def _probe_measures(probes: Sequence[ProbeResult]) -> PageTable:
    pairs = [(probe, measure) for probe in probes for measure in probe.measures]
    pairs.sort(key=lambda pair: -pair[1].used)
    columns = ("Probe", "Subject", "Measure", "#Value", "#Bound", "#Share of bound", "Unit", "Rules out", "Reason")
    rows = [
        (
            probe.probe,
            probe.subject,
            measure.name,
            significant(measure.value),
            significant(measure.bound),
            share_words(measure.used),
            measure.unit,
            {"train": "training", "infer": "training and serving", "neither": "nothing"}[probe.rules_out],
            measure.reason,
        )
        for probe, measure in pairs[:MOST_ROWS]
    ]
    note = _left_out(len(pairs), MOST_ROWS, "highest shares")
    return PageTable("Measures of the probes", columns, rows, note)


def compared_identities(chip: ChipIdentity, reference: ChipIdentity) -> list[Compared]:
    """Field by field, all switches too."""
    here, there = _fields(chip), _fields(reference)
    return [
        Compared(name, here.get(name, "absent"), there.get(name, "absent")) for name in dict.fromkeys([*here, *there])
    ]


def _fields(identity: ChipIdentity) -> dict[str, str]:
    fields = identity.model_dump(exclude={"switches", "note"})
    return {name: str(value) for name, value in fields.items()} | dict(sorted(identity.switches.items()))
