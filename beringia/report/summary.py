"""What a run comes to, as one object (`beringia campaign --json`) and as a table for the terminal.

Made from a History; reads and writes nothing. The table's last line is the path of the page.
"""

from __future__ import annotations

from pydantic import ConfigDict, Field
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beringia.records.record import Record
from beringia.records.run_directory import RunDirectory
from beringia.report.answer import answer
from beringia.report.history import Chip, History, same_state
from beringia.report.toll import toll_of
from beringia.report.words import count, duration, percent, short_hash, significant

TABLE_COLUMNS = 100


class ChipSummary(Record):
    """What one chip did."""

    label: str
    used: str
    """The chip's name: what `auto` became."""
    identity_hash: str
    sku: str
    truth: str
    """`real` or `emulated`."""
    steps: int
    """Steps done on it, those thrown away included."""
    kept_steps: int
    seconds: float
    """Wall time, starting included."""
    faults: int
    alarms: int
    note: str = ""


class UnopenedSummary(Record):
    """A chip that has no identity, since it never opened."""

    label: str
    faults: int


class CrossingSummary(Record):
    """One crossing; in JSON its chips are called `from` and `to`."""

    # Aliases since `from` is a word of Python; the object printed says `from` and `to`.
    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    from_chip: str = Field(alias="from")
    to_chip: str = Field(alias="to")
    step: int
    state_hashes_equal: bool | None
    """None: the old chip never got as far as holding a state."""
    band: float | None
    difference: float | None
    seconds: float


class AlarmSummary(Record):
    """One alarm of the guard."""

    chip: str
    step: int
    detector: str
    site: str
    tensor: str
    value: float | None
    bound: float


class DecisionSummary(Record):
    """One decision of the supervisor."""

    action: str
    chip: str | None
    to_chip: str | None
    to_step: int | None
    lost_steps: int
    reason: str


class AccuracySummary(Record):
    """Accuracy of sampled answers with its 95 % interval."""

    value: float
    low: float | None
    high: float | None
    samples: int
    chance: float | None


class QualificationSummary(Record):
    """A chip that had no certificate to train the model."""

    chip: str
    found: str
    """`none`, or what its certificate said: `verdict infer`."""
    trained: bool
    """Whether the recipe let it train all the same."""
    reason: str


class Summary(Record):
    """What `beringia campaign --json` prints."""

    name: str
    status: str
    """`done`, `given-up`, `stopped`, `unfinished` or `empty`."""
    message: str
    signal: int | None
    """Number of the signal that stopped it."""
    answer: str
    """The run in one sentence."""
    steps: int
    planned_steps: int | None
    chips: tuple[ChipSummary, ...]
    crossings: tuple[CrossingSummary, ...]
    decisions: tuple[DecisionSummary, ...]
    unqualified: tuple[QualificationSummary, ...]
    """Chips without a certificate, in the order in which they were opened, each once, as it was at last."""
    unopened: tuple[UnopenedSummary, ...]
    """Chips that were tried and never opened."""
    lost_steps: int
    """Steps that were done and thrown away, over all decisions."""
    redone_steps: int
    """Steps that were done and do not count: they were done again, or the run went back behind them."""
    lost: str
    """All that was lost, in words."""
    unusable_checkpoints: int
    """Checkpoints that could not be loaded."""
    restarts_from_0: int
    """How often all of the work was thrown away."""
    steps_without_loss: int
    """Steps that count, and whose loss is no finite number."""
    untold_steps: int
    """Steps that count, and of which nothing is recorded."""
    alarms: tuple[AlarmSummary, ...]
    loss: float | None
    """Held-out loss, nats per token."""
    accuracy: AccuracySummary | None
    seconds: float
    report: str


def summarise(history: History) -> Summary:
    """The run as one object."""
    held_out, toll = history.held_out, toll_of(history)
    return Summary(
        name=history.name,
        status=history.status,
        message=history.message,
        signal=history.signal,
        answer=answer(history),
        steps=history.step,
        planned_steps=history.planned_steps,
        chips=tuple(_chip(history, chip) for chip in history.chips),
        crossings=_crossings(history),
        decisions=_decisions(history),
        unqualified=_unqualified(history),
        unopened=_unopened(history),
        lost_steps=toll.steps,
        redone_steps=sum(not step.kept for step in history.steps),
        lost=toll.short(),
        unusable_checkpoints=toll.unusable,
        restarts_from_0=toll.from_the_start,
        steps_without_loss=toll.no_number,
        untold_steps=toll.untold,
        alarms=_alarms(history),
        loss=held_out.event.loss if held_out else None,
        accuracy=_accuracy(history),
        seconds=history.seconds,
        report=str(RunDirectory(history.directory).report),
    )


def _chip(history: History, chip: Chip) -> ChipSummary:
    mine = [step for step in history.steps if step.chip == chip.label]
    return ChipSummary(
        label=chip.label,
        used=chip.used,
        identity_hash=chip.opened.identity_hash,
        sku=chip.identity.sku,
        truth=chip.identity.truth,
        steps=len(mine),
        kept_steps=sum(step.kept for step in mine),
        seconds=history.seconds_on(chip.label),
        faults=sum(at.chip == chip.label for at in history.faults),
        alarms=sum(at.chip == chip.label for at in history.alarms),
        note=chip.identity.note,
    )


def _crossings(history: History) -> tuple[CrossingSummary, ...]:
    return tuple(
        CrossingSummary(
            from_chip=at.event.from_chip,
            to_chip=at.event.to_chip,
            step=at.event.step,
            state_hashes_equal=same_state(at.event),
            band=at.event.band,
            difference=at.event.difference,
            seconds=at.event.seconds,
        )
        for at in history.crossings
    )


def _decisions(history: History) -> tuple[DecisionSummary, ...]:
    return tuple(
        DecisionSummary(
            action=at.event.action,
            chip=at.chip,
            to_chip=at.event.to_chip,
            to_step=at.event.to_step,
            lost_steps=at.event.lost_steps,
            reason=at.event.reason,
        )
        for at in history.decisions
    )


def _unqualified(history: History) -> tuple[QualificationSummary, ...]:
    allowed = [at for at in history.fallbacks if at.event.what == "qualification"]
    told = [(at.seconds, at.chip, at.event.used, True, at.event.reason) for at in allowed]
    told += [(at.seconds, at.chip, at.event.found, False, at.event.reason) for at in history.unqualified]
    # A chip is opened again after each fault, and what is said of it then is mostly the same: its last word counts.
    last = {
        chip: (seconds, QualificationSummary(chip=chip or "?", found=found, trained=trained, reason=reason))
        for seconds, chip, found, trained, reason in sorted(told, key=lambda one: one[0])
    }
    # One that was refused, was given its certificate, and trained then, was let train.
    trained = {step.chip: step.seconds for step in history.steps}
    return tuple(one for seconds, one in last.values() if one.trained or trained.get(one.chip, -1.0) < seconds)


def _unopened(history: History) -> tuple[UnopenedSummary, ...]:
    faults = [at.chip or "?" for at in history.faults]
    labels = [label for label in dict.fromkeys(faults) if history.chip(label) is None]
    return tuple(UnopenedSummary(label=label, faults=faults.count(label)) for label in labels)


def _alarms(history: History) -> tuple[AlarmSummary, ...]:
    return tuple(
        AlarmSummary(
            chip=at.chip or "?",
            step=at.event.step,
            detector=at.event.detector,
            site=at.event.site,
            tensor=at.event.tensor,
            value=at.event.value,
            bound=at.event.bound,
        )
        for at in history.alarms
    )


def _accuracy(history: History) -> AccuracySummary | None:
    found = history.accuracy
    if found is None or found.event.accuracy is None:
        return None
    event = found.event
    return AccuracySummary(
        value=found.event.accuracy,
        low=event.accuracy_low,
        high=event.accuracy_high,
        samples=event.samples,
        chance=event.chance,
    )


def print_table(summary: Summary, console: Console) -> None:
    """The end of a campaign on a terminal: at most 100 columns; the last line is the path of the page."""
    width = min(TABLE_COLUMNS, console.width)
    console.print(Text(summary.answer, style="bold"), width=width)
    console.print(_table(summary), width=width)
    for crossing in summary.crossings:
        console.print(Text(_crossing_line(crossing)), width=width)
    for line in _closing_lines(summary):
        console.print(Text(line), width=width)
    console.print(Text(summary.report), soft_wrap=True)


def _table(summary: Summary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, left in _HEADINGS:
        whole = heading not in ("chip", "what it is")  # a hash or a number broken over two lines cannot be read
        table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=whole)
    for chip in summary.chips:
        truth = Text(chip.truth, style="reverse" if chip.truth == "emulated" else "bold")
        # What an emulated chip assumes is on the page; a real chip's warning must be seen.
        note = f"\n{chip.note}" if chip.note and chip.truth == "real" else ""
        table.add_row(
            Text(chip.label),
            Text(chip.sku + note),
            truth,
            Text(short_hash(chip.identity_hash)),
            f"{chip.steps:,}",
            f"{chip.steps - chip.kept_steps:,}",
            str(chip.faults),
            str(chip.alarms),
            duration(chip.seconds),
        )
    return table


_HEADINGS = (
    ("chip", True),
    ("what it is", True),
    ("truth", True),
    ("identity", True),
    ("steps", False),
    ("redone", False),
    ("faults", False),
    ("alarms", False),
    ("time", False),
)


def _crossing_line(crossing: CrossingSummary) -> str:
    state = {True: "state identical", False: "STATE DIFFERENT", None: "from the start"}[crossing.state_hashes_equal]
    canary = ""
    if crossing.difference is not None and crossing.band is not None:
        canary = f", canary {significant(crossing.difference)} within {significant(crossing.band)}"
        if crossing.difference > crossing.band:
            canary = canary.replace("within", "OUTSIDE")
    took = duration(crossing.seconds)
    return f"crossing  {crossing.from_chip} → {crossing.to_chip} at step {crossing.step:,}: {state}{canary}, {took}"


def _closing_lines(summary: Summary) -> list[str]:
    lines = [f"evidence  {_qualification_words(chip)}" for chip in summary.unqualified]
    lines += [f"unopened  {one.label}: {count(one.faults, 'fault')}, and it never opened" for one in summary.unopened]
    lines += [f"lost      {summary.lost}"]
    if summary.accuracy is not None:
        lines.append(f"accuracy  {accuracy_words(summary.accuracy)}")
    if summary.loss is not None:
        lines.append(f"loss      {significant(summary.loss)} nats per held-out token")
    if summary.status in ("given-up", "stopped"):
        lines.append(f"{summary.status:<9} {summary.message}")
    return lines


def _qualification_words(chip: QualificationSummary) -> str:
    found = "without a certificate" if chip.found == "none" else f"with the {chip.found}"
    allowed = "trained, as the recipe allows" if chip.trained else "was not let train"
    return f"{chip.chip}, {found}, {allowed}"


def accuracy_words(accuracy: AccuracySummary) -> str:
    """`42.0 % (36.5 to 48.0 %, 256 samples; chance 10 %)`."""
    between = ""
    if accuracy.low is not None and accuracy.high is not None:
        between = f"{100 * accuracy.low:.1f} to {percent(accuracy.high)}, "
    chance = f"; chance {percent(accuracy.chance, 0)}" if accuracy.chance is not None else ""
    return f"{percent(accuracy.value)} ({between}{accuracy.samples:,} samples{chance})"
