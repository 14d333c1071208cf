"""What happened in a run, read from its directory alone: the page, the table and the JSON are made from this.

What counts and what was abandoned is the fold's (`beringia.history`); this adds what a page needs beside it: when each
thing happened, on which chip, and how long work took. Reads `events.jsonl`, `recipe.json` and which checkpoints still
lie on disk; writes nothing. Works on a run that is still going on (a torn last line is left for later), that never
crossed, that was killed and started again, and that did the same step number more than once: such steps are all here,
and only the last of each is `kept`. Of a run in which several roles worked it shows one.

Times are seconds since the run began. While no supervisor ran, the clock stands still (`pauses` says for how long).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from beringia.errors import RunError
from beringia.history.fold import Fold, Status
from beringia.history.log import read_events
from beringia.history.situation import Situation
from beringia.records.events import (
    LEARNER,
    Alarm,
    Answered,
    AnyEvent,
    Canary,
    CheckDone,
    CheckpointRejected,
    CheckpointTrusted,
    CheckpointWritten,
    ChipOpened,
    Crossing,
    Decision,
    Evaluated,
    Event,
    Exported,
    Fallback,
    Fault,
    Qualified,
    RecipeChanged,
    Resumed,
    RunFinished,
    RunStarted,
    StepDone,
    Unqualified,
)
from beringia.records.identity import ChipIdentity
from beringia.records.run_directory import RunDirectory

SHORTEST_PAUSE_SECONDS = 2.0
"""A supervisor that starts again sooner than this did not leave a gap that anyone could see."""

E = TypeVar("E", bound=Event)
F = TypeVar("F", bound=Event)


@dataclass(frozen=True, slots=True)
class At(Generic[E]):
    """An event, when it happened and on which chip (the label; the chip in use where the event names none)."""

    seconds: float
    chip: str | None
    event: E


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step. Not `kept` when the run later went back behind it."""

    seconds: float
    chip: str
    event: StepDone
    kept: bool


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as it was written, and what became of it."""

    seconds: float
    chip: str
    event: CheckpointWritten
    state: Literal["pending", "trusted", "rejected"]
    kept: bool
    """It can be loaded: it is not rejected, and the run did not go back behind it."""
    on_disk: bool


@dataclass(frozen=True)
class Chip:
    """One chip of the recipe, with everything it said it was (more than one identity if a device was replaced)."""

    label: str
    asked: str
    used: str
    identities: tuple[ChipIdentity, ...]
    opened: ChipOpened

    @property
    def identity(self) -> ChipIdentity:
        """The last one."""
        return self.identities[-1]


@dataclass(frozen=True)
class Segment:
    """One time of work on one chip, from the decision that began it to the fault, decision or end that closed it."""

    chip: str
    began: float
    trained_from: float | None
    """When its first step began; None if it never did one."""
    trained_to: float | None
    ended: float


@dataclass(frozen=True)
class Pause:
    """No supervisor ran; the clock of this history stood still."""

    seconds: float
    """When, on this history's clock."""
    length_seconds: float


@dataclass(frozen=True)
class History:
    """The run, in order."""

    directory: Path
    name: str
    recipe: dict[str, Any] | None
    recipe_hash: str | None
    beringia: str | None
    started: float | None
    """Seconds since 1970, UTC."""
    seconds: float
    """Length of the whole run, pauses left out."""
    planned_steps: int | None
    status: Status
    message: str
    signal: int | None
    """Number of the signal that stopped it."""
    situation: Situation
    """What the events amount to: the fold that decisions are made from."""
    chips: tuple[Chip, ...] = ()
    segments: tuple[Segment, ...] = ()
    pauses: tuple[Pause, ...] = ()
    steps: tuple[Step, ...] = ()
    evaluations: tuple[At[Evaluated], ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    rejections: tuple[At[CheckpointRejected], ...] = ()
    checks: tuple[At[CheckDone], ...] = ()
    alarms: tuple[At[Alarm], ...] = ()
    faults: tuple[At[Fault], ...] = ()
    decisions: tuple[At[Decision], ...] = ()
    canaries: tuple[At[Canary], ...] = ()
    crossings: tuple[At[Crossing], ...] = ()
    resumes: tuple[At[Resumed], ...] = ()
    recipe_changes: tuple[At[RecipeChanged], ...] = ()
    fallbacks: tuple[At[Fallback], ...] = ()
    qualified: tuple[At[Qualified], ...] = ()
    unqualified: tuple[At[Unqualified], ...] = ()
    exports: tuple[At[Exported], ...] = ()
    answers: tuple[At[Answered], ...] = ()

    def chip(self, label: str) -> Chip | None:
        """The chip with this label, if it was ever opened."""
        return next((chip for chip in self.chips if chip.label == label), None)

    @property
    def step(self) -> int:
        """How far the run is: steps done that still count."""
        return self.situation.step

    @property
    def lost_steps(self) -> int:
        """Steps that decisions threw away: done after the checkpoint that the run went back to."""
        return self.situation.lost_steps

    @property
    def accuracy(self) -> At[Evaluated] | None:
        """The last evaluation that sampled answers."""
        return next((at for at in reversed(self.evaluations) if at.event.accuracy is not None), None)

    @property
    def held_out(self) -> At[Evaluated] | None:
        """The last evaluation with a finite loss."""
        return next((at for at in reversed(self.evaluations) if at.event.loss is not None), None)

    def canary_of(self, crossing: At[Crossing]) -> Canary | None:
        """The canary of this crossing: the last one on the new chip before it, if it came after the decision."""
        before = [at.seconds for at in self.decisions if at.event.action == "cross" and at.seconds <= crossing.seconds]
        since = max(before, default=0.0)
        mine = (at.event for at in reversed(self.canaries) if since <= at.seconds <= crossing.seconds)
        return next((canary for canary in mine if canary.passed), None)

    def resume_of(self, crossing: At[Crossing]) -> Resumed | None:
        """How the new chip loaded the state that it went on from."""
        earlier = (at.event for at in reversed(self.resumes) if at.seconds <= crossing.seconds)
        return next((resume for resume in earlier if resume.step == crossing.event.step), None)

    def seconds_on(self, label: str) -> float:
        """Wall time on one chip, starting included."""
        return sum(segment.ended - segment.began for segment in self.segments if segment.chip == label)


def same_state(crossing: Crossing) -> bool | None:
    """Whether both chips held the same state; None where the old chip never got as far as holding one."""
    if not crossing.state_hash_before:
        return None
    return crossing.state_hash_before == crossing.state_hash_after


def read_history(run_directory: Path | str, role: str = LEARNER) -> History:
    """The history of a run. Raises RunError where there is no run, or a line of its record cannot be read."""
    run = RunDirectory(Path(run_directory))
    if not run.root.is_dir() or not (run.events.exists() or run.resolved_recipe.exists() or run.recipe.exists()):
        raise RunError(
            f"{run.root} is not a run: it has no events.jsonl. Give the directory of a run, e.g. runs/r2-nano."
        )
    reader = _Reader(role)
    for event in read_events(run.events):
        reader.read(event)
    return _history(reader, run)


def _history(reader: _Reader, run: RunDirectory) -> History:
    moments, fold = reader.moments, reader.fold
    situation = fold.situation(reader.role)
    recipe = _read_recipe(run.resolved_recipe)
    first, last_start = reader.first_start, fold.last(RunStarted)
    return History(
        directory=run.root,
        name=first.name if first else str((recipe or {}).get("name", run.root.resolve().name)),
        recipe=recipe,
        recipe_hash=last_start.recipe_hash if last_start else None,
        beringia=last_start.beringia if last_start else None,
        started=reader.started,
        seconds=reader.seconds,
        planned_steps=last_start.steps if last_start else None,
        status=fold.status,
        message=fold.message,
        signal=fold.signal,
        situation=situation,
        chips=_chips(moments, last_start.prefer if last_start else ()),
        segments=_segments(moments),
        pauses=tuple(reader.pauses),
        steps=_steps(moments, situation),
        evaluations=_of(moments, Evaluated),
        checkpoints=_checkpoints(reader.written, situation, run.root),
        rejections=_of(moments, CheckpointRejected),
        checks=_of(moments, CheckDone),
        alarms=_of(moments, Alarm),
        faults=_of(moments, Fault),
        decisions=_of(moments, Decision),
        canaries=_of(moments, Canary),
        crossings=_of(moments, Crossing),
        resumes=_of(moments, Resumed),
        recipe_changes=_of(moments, RecipeChanged),
        fallbacks=_of(moments, Fallback),
        qualified=_of(moments, Qualified),
        unqualified=_of(moments, Unqualified),
        exports=_of(moments, Exported),
        answers=_of(moments, Answered),
    )


def _read_recipe(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not JSON ({error}): the file was altered or damaged.") from None
    inner = document.get("recipe", document)
    return inner if isinstance(inner, dict) else None


@dataclass
class _Written:
    """A checkpoint, and what became of it so far."""

    at: At[CheckpointWritten]
    state: Literal["pending", "trusted", "rejected"] = "pending"


@dataclass
class _Reader:
    """Puts every event on the history's clock and on a chip, and folds it.

    The clock never runs backwards (a machine's clock may be set while a run goes on). It begins with the first event,
    or with the qualification that this event is the end of.
    """

    role: str
    fold: Fold = field(default_factory=Fold)
    moments: list[At[AnyEvent]] = field(default_factory=list)
    """Of this role, and of all roles."""
    written: list[_Written] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    first_start: RunStarted | None = None
    started: float | None = None
    seconds: float = 0.0
    now: float = 0.0

    def read(self, event: AnyEvent) -> None:
        """Take the next event."""
        if self.started is None:
            self.seconds = event.seconds if isinstance(event, Qualified) else 0.0
            self.started, self.now = event.time - self.seconds, event.time
        self._advance(event)
        before = self.fold.situation(self.role).chip
        self.fold.add(event)
        if isinstance(event, RecipeChanged) and event.anew:
            self.first_start = None
        if isinstance(event, RunStarted):
            self.first_start = self.first_start or event
        elif event.role != self.role and not isinstance(event, RunFinished | RecipeChanged):
            return
        # A decision belongs to the chip it was made about, whatever chip it leads to.
        chip = self.fold.situation(self.role).chip
        label = before or event.chip if isinstance(event, Decision) else event.chip or chip
        self.moments.append(At(self.seconds, label, event))
        self._note_checkpoint(At(self.seconds, label, event))

    def _advance(self, event: AnyEvent) -> None:
        gap = max(0.0, event.time - self.now)
        if isinstance(event, RunStarted | RecipeChanged) and gap > SHORTEST_PAUSE_SECONDS:
            self.pauses.append(Pause(self.seconds, gap))
            gap = 0.0
        self.now, self.seconds = max(self.now, event.time), self.seconds + gap

    def _note_checkpoint(self, at: At[AnyEvent]) -> None:
        """A later mark belongs to the last checkpoint written at its step (a step done again is written again)."""
        event = at.event
        if isinstance(event, CheckpointWritten):
            self.written.append(_Written(At(at.seconds, at.chip, event)))
        elif isinstance(event, CheckpointRejected):
            self._mark(event.step, "rejected")
        elif isinstance(event, CheckpointTrusted) and event.step in self.fold.situation(self.role).trusted:
            self._mark(event.step, "trusted")

    def _mark(self, step: int, state: Literal["trusted", "rejected"]) -> None:
        for one in reversed(self.written):
            if one.at.event.step == step:
                one.state = state
                return


def _of(moments: list[At[AnyEvent]], kind: type[F]) -> tuple[At[F], ...]:
    return tuple(At(at.seconds, at.chip, at.event) for at in moments if isinstance(at.event, kind))


def _chips(moments: list[At[AnyEvent]], prefer: tuple[str, ...]) -> tuple[Chip, ...]:
    """Every chip that was opened, in the recipe's order of preference."""
    chips: dict[str, Chip] = {}
    for at in _of(moments, ChipOpened):
        label, opened = at.chip or at.event.asked, at.event
        known = chips[label].identities if label in chips else ()
        identities = known if opened.identity in known else (*known, opened.identity)
        chips[label] = Chip(label, opened.asked, opened.used, identities, opened)
    order = {label: place for place, label in enumerate(prefer)}
    return tuple(sorted(chips.values(), key=lambda chip: order.get(chip.label, len(order))))


def _steps(moments: list[At[AnyEvent]], situation: Situation) -> tuple[Step, ...]:
    """All steps; kept is the last doing of each step that counts."""
    steps: list[Step] = []
    later: set[int] = set()
    for at in reversed(moments):
        event = at.event
        if isinstance(event, StepDone):
            kept = event.step not in later and situation.counts(event.step)
            steps.append(Step(at.seconds, at.chip or "?", event, kept))
            later.add(event.step)
    return tuple(reversed(steps))


def _checkpoints(written: list[_Written], situation: Situation, root: Path) -> tuple[Checkpoint, ...]:
    """All checkpoints; kept is the last one of each step that is still complete."""
    found: list[Checkpoint] = []
    later: set[int] = set()
    for one in reversed(written):
        at, step = one.at, one.at.event.step
        kept = step not in later and step in situation.complete
        on_disk = (root / at.event.directory / "manifest.json").exists()
        found.append(Checkpoint(at.seconds, at.chip or "?", at.event, one.state, kept, on_disk))
        later.add(step)
    return tuple(reversed(found))


@dataclass
class _OpenSegment:
    chip: str
    began: float
    ended: float
    trained_from: float | None = None
    trained_to: float | None = None

    def close(self) -> Segment:
        return Segment(self.chip, self.began, self.trained_from, self.trained_to, self.ended)


@dataclass
class _SegmentReader:
    """Follows the events and notes when work on a chip begins and ends."""

    done: list[Segment] = field(default_factory=list)
    current: _OpenSegment | None = None
    decided: float | None = None

    def read(self, at: At[AnyEvent]) -> None:
        event = at.event
        if isinstance(event, ChipOpened):
            if self.current is None or not event.rank:
                self._open(at)
        elif isinstance(event, Fault | Decision | RunFinished):
            self._end(at.seconds)
        elif isinstance(event, RunStarted):
            self._end(None)
        else:
            if self.current is None and isinstance(event, Resumed | StepDone):  # the same worker went on
                self._open(at)
            if self.current is not None:
                self._extend(self.current, at)
        if isinstance(event, Decision | RunStarted):
            self.decided = at.seconds

    def _open(self, at: At[AnyEvent]) -> None:
        self._end(None)
        began = at.seconds if self.decided is None else self.decided
        self.current = _OpenSegment(at.chip or "?", began, at.seconds)
        self.decided = None

    def _extend(self, segment: _OpenSegment, at: At[AnyEvent]) -> None:
        segment.ended = at.seconds
        if isinstance(at.event, StepDone):
            if segment.trained_from is None:
                segment.trained_from = max(segment.began, at.seconds - at.event.seconds)
            segment.trained_to = at.seconds

    def _end(self, seconds: float | None) -> None:
        if self.current is not None:
            if seconds is not None:
                self.current.ended = seconds
            self.done.append(self.current.close())
            self.current = None


def _segments(moments: list[At[AnyEvent]]) -> tuple[Segment, ...]:
    reader = _SegmentReader()
    for at in moments:
        reader.read(at)
    reader._end(None)
    return tuple(reader.done)
