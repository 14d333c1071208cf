"""What the events so far amount to for one role: the rules by which a run's future is abandoned, or trusted.

A run that goes back does steps again. What counts is one line of steps: a decision abandons everything after the
checkpoint that it goes on from, and a step done again abandons what came of it before, its checkpoints included. A
checkpoint is complete from the event that says so until it is rejected or abandoned, and trusted once an event says so
of the very state that was written. Loading a state abandons nothing: the decision that led to it did.

An alarm is pending until a decision has answered it, across stops and restarts: it says that the state is in doubt.

Grows with what happens to a run, not with its steps. Reads and writes no files; `Fold` feeds it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from beringia.records.events import (
    SPIKE,
    TRANSFER,
    UNREACHABLE,
    Alarm,
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
    Fault,
    RecipeChanged,
    Resumed,
    RunFinished,
    RunStarted,
    StepDone,
    Unqualified,
)

_RECENT_STEPS = 768
"""Kept in memory: the 512 that the guard's spike test is given after a restart, and some that may yet be abandoned."""

Setback = Fault | Canary | CheckpointRejected | Unqualified


@dataclass(slots=True)
class Stretch:
    """Steps in a row on one chip, all of which count."""

    chip: str | None
    first: int
    last: int


@dataclass(slots=True)
class Situation:
    """One role's part of a run. Changes as events are folded: ask the fold again rather than keep it."""

    chip: str | None = None
    """Label of the chip in use."""
    tried: list[str] = field(default_factory=list)
    """Chips used or passed over so far, in order."""
    passed_over: set[str] = field(default_factory=set)
    """Those of them that were not let train, and never held the run's state."""
    held_state: bool = False
    """Whether the chip in use has loaded a state."""
    excluded: set[int] = field(default_factory=set)
    """Devices of the chip in use that are left out."""
    opened: dict[str, ChipOpened] = field(default_factory=dict)
    """How each chip introduced itself last, by label."""
    initial_hashes: dict[str, str] = field(default_factory=dict)
    """State hash of the initial state as each chip first held it, by label."""

    step: int = 0
    """Steps done that count."""
    stretches: list[Stretch] = field(default_factory=list)
    """The steps that count and were told of, in order. (A worker may die after a checkpoint and before it tells of the
    step; then a decision goes on from a step that no event told of.)"""
    lost_steps: int = 0
    """Steps that decisions threw away."""
    resume_step: int | None = None
    """Checkpoint that the last decision goes on from; None is the initial state."""
    complete: dict[int, str] = field(default_factory=dict)
    """Checkpoints that can be loaded: step to state hash."""
    trusted: set[int] = field(default_factory=set)
    """Those of them that are trusted."""
    damaged: set[int] = field(default_factory=set)
    """Checkpoints that could not be loaded and have not been written anew."""
    evaluated: set[int] = field(default_factory=set)
    """Steps whose state was evaluated."""
    recent: deque[StepDone] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    """The last steps that count."""

    futures: list[tuple[int, int]] = field(default_factory=list)
    """Every future that a decision abandoned: its epoch, and the step after which it began."""

    transient_steps: list[int] = field(default_factory=list)
    """Steps at which transient faults struck the chip in use."""
    unanswered: int = 0
    """How often in a row the machine of the chip in use could not be reached."""
    spikes: set[int] = field(default_factory=set)
    """Steps of spikes for which the run was rolled back on the chip in use."""
    accepted_spikes: list[int] = field(default_factory=list)
    """Steps of spikes that are the training's own."""
    doubted: set[int] = field(default_factory=set)
    """Steps of alarms on the chip in use that may be the training's own, and for which the run was rolled back."""
    rollbacks: dict[str, int] = field(default_factory=dict)
    """Rollbacks on the chip in use, by site of the alarm."""
    rollbacks_in_vain: int = 0
    """Rollbacks on the chip in use since a checkpoint past their alarms was found trustworthy. One before the alarm is
    no progress: a chip that is wrong from some step on would be tried again for each of its layers."""
    alarm_step: int = 0
    """Latest step of an alarm for which the run was rolled back on the chip in use."""
    came_from: str | None = None
    """Label of the chip before this one, while the crossing from it is not complete."""
    canary_due: bool = False
    """The run crossed to this chip and its canary has not passed yet."""

    alarm: Alarm | None = None
    """The first alarm that no decision has answered: until then the state is in doubt."""
    setback: Setback | None = None
    """The first other thing that went wrong since the last decision."""
    restarted: bool = False
    """A supervisor took the run over since the last decision."""
    decided: bool = False
    finished: bool = False
    """The run is done or was given up, and nobody has taken it up again."""
    given_up: bool = False
    """It ended for want of a chip, and no decision has taken it up since."""

    @property
    def trouble(self) -> Alarm | Setback | None:
        """What is to be decided about. A chip that is refused is left, whatever else it did; else an alarm outranks the
        fault that it may cause a moment later, and a checkpoint that cannot be used."""
        if self.alarm is None or isinstance(self.setback, Canary | Unqualified):
            return self.setback
        return self.alarm

    @property
    def newest(self) -> int | None:
        """Newest checkpoint that can be loaded."""
        return max(self.complete, default=None)

    @property
    def newest_trusted(self) -> int | None:
        """Newest checkpoint that is trusted."""
        return max(self.trusted, default=None)

    @property
    def canary_from(self) -> int:
        """The trusted checkpoint before the newest trusted one; 0, the initial state, where there is none."""
        return max((step for step in self.trusted if step != self.newest_trusted), default=0)

    def steps_after(self, checkpoint: int | None) -> int:
        """Steps done since `checkpoint`; None is the initial state. A worker may die before it told of a step whose
        checkpoint is complete: none is lost then."""
        return max(0, self.step - (checkpoint or 0))

    def steps_before(self, resume_step: int) -> list[StepDone]:
        """The last steps that led to `resume_step`, oldest first."""
        return [done for done in self.recent if done.step <= resume_step]

    def abandoned(self, step: int, epoch: int) -> bool:
        """Whether a decision went back behind this step after a worker of this epoch had done it."""
        return any(epoch <= decided and step > after for decided, after in self.futures)

    def counts(self, step: int) -> bool:
        """Whether a step that was told of counts: it was done, and not abandoned since."""
        return any(stretch.first <= step <= stretch.last for stretch in reversed(self.stretches))

    def steps_on(self, chip: str | None) -> int:
        """Steps that count and were done on this chip."""
        return sum(stretch.last - stretch.first + 1 for stretch in self.stretches if stretch.chip == chip)

    # Folding

    def fold(self, event: AnyEvent) -> None:
        """Take the next event of this role, or one about all roles."""
        match event:
            case StepDone():
                self._fold_step(event)
            case CheckDone():
                pass
            case Evaluated():
                self.evaluated.add(event.step)
            case CheckpointWritten() | CheckpointTrusted() | CheckpointRejected():
                self._fold_checkpoint(event)
            case Alarm():
                self.alarm = self.alarm or event
            case Fault() | Unqualified() | Canary():
                self._fold_setback(event)
            case ChipOpened() | Resumed() | Crossing():
                self._fold_chip(event)
            case Decision():
                self._fold_decision(event)
            case RunStarted():
                self.restarted, self.finished = self.decided, False
            case RecipeChanged():
                self._fold_change(event)
            case RunFinished():
                self._fold_finish(event)
            case _:
                pass

    def _fold_step(self, done: StepDone) -> None:
        if done.step <= self.step:
            self._abandon_after(done.step - 1)
        self.step = done.step
        self.recent.append(done)
        chip = done.chip or self.chip
        last = self.stretches[-1] if self.stretches else None
        if last is not None and last.chip == chip and last.last == done.step - 1:
            last.last = done.step
        else:
            self.stretches.append(Stretch(chip, done.step, done.step))

    def _abandon_after(self, step: int) -> None:
        self.step = step
        self.complete = {at: state_hash for at, state_hash in self.complete.items() if at <= step}
        self.trusted &= self.complete.keys()
        self.evaluated = {at for at in self.evaluated if at <= step}
        while self.recent and self.recent[-1].step > step:
            self.recent.pop()
        while self.stretches and self.stretches[-1].first > step:
            self.stretches.pop()
        if self.stretches:
            self.stretches[-1].last = min(self.stretches[-1].last, step)

    def _fold_checkpoint(self, event: CheckpointWritten | CheckpointTrusted | CheckpointRejected) -> None:
        step = event.step
        if isinstance(event, CheckpointWritten):
            if event.found:  # nobody may have told of its step either
                self.step = max(self.step, step)
            self.complete[step] = event.state_hash
            self.damaged.discard(step)
            self.trusted.discard(step)
        elif isinstance(event, CheckpointRejected):
            self.complete.pop(step, None)
            self.trusted.discard(step)
            self.damaged.add(step)
            self.setback = self.setback or event
        elif self.complete.get(step) == event.state_hash:
            self.trusted.add(step)
            if step >= self.alarm_step:
                self.rollbacks_in_vain = 0

    def _fold_setback(self, event: Fault | Unqualified | Canary) -> None:
        if isinstance(event, Canary) and event.passed:
            self.canary_due = False
            return
        if isinstance(event, Fault):
            self.unanswered += event.code in (UNREACHABLE, TRANSFER)
            if event.category == "transient":
                self.transient_steps.append(event.step if event.step is not None else self.step)
        self.setback = self.setback or event

    def _fold_chip(self, event: ChipOpened | Resumed | Crossing) -> None:
        if isinstance(event, ChipOpened):
            self._fold_opened(event)
        elif isinstance(event, Resumed):
            self.held_state = True
            label = event.chip or self.chip
            if event.step == 0 and label is not None:
                self.initial_hashes.setdefault(label, event.state_hash)
        else:
            self.came_from = None

    def _fold_opened(self, opened: ChipOpened) -> None:
        self.unanswered = 0
        if self.chip is None:  # work that no decision began
            self._change_chip(opened.chip or opened.asked)
        assert self.chip is not None
        self.opened[opened.chip or self.chip] = opened

    def _fold_decision(self, decision: Decision) -> None:
        self.decided = True
        self.restarted = False
        self.given_up = self.given_up and decision.action == "stop"
        self.lost_steps += decision.lost_steps
        if decision.accepted_spike is not None:
            self.accepted_spikes.append(decision.accepted_spike)
        elif decision.action == "rollback" and isinstance(self.trouble, Alarm):
            self._count_rollback(self.trouble)
        if decision.excluded_device is not None:
            self.excluded.add(decision.excluded_device)
        if decision.action in ("start", "skip", "cross"):
            self._leave_chip(decision)
        if decision.action != "stop":  # a stop that was not carried out must be decided again
            self.resume_step = decision.to_step
            self.futures.append((decision.epoch, decision.to_step or 0))
            self._abandon_after(decision.to_step or 0)
            self.alarm = self.setback = None

    def _leave_chip(self, decision: Decision) -> None:
        assert decision.to_chip is not None
        if decision.action == "cross":
            self.came_from = self.chip
            self.canary_due = True
        elif self.chip is not None:  # passed over: the state is still where it was
            self.passed_over.add(self.chip)
        self._change_chip(decision.to_chip)

    def _change_chip(self, to_chip: str) -> None:
        self.chip = to_chip
        self.tried.append(to_chip)
        self.held_state = False
        self.excluded, self.transient_steps, self.rollbacks = set(), [], {}
        self.spikes, self.doubted = set(), set()
        self.rollbacks_in_vain = self.alarm_step = self.unanswered = 0

    def _count_rollback(self, alarm: Alarm) -> None:
        self.rollbacks_in_vain += 1
        self.alarm_step = max(self.alarm_step, alarm.step)
        if alarm.unexplained:
            self.doubted.add(alarm.step)
        if alarm.detector == SPIKE:
            self.spikes.add(alarm.step)
        else:
            self.rollbacks[alarm.site] = self.rollbacks.get(alarm.site, 0) + 1

    def _fold_change(self, change: RecipeChanged) -> None:
        """More steps take up a run that was done, a chip that was not tried one that was given up."""
        if f"chips.{self.chip}.ranks" in change.changes:
            self.excluded = set()  # counted in devices that may be others now
        untried = set(change.changes.get("train.prefer", ((), ()))[1]) - set(self.tried)
        if untried if self.given_up else "train.steps" in change.changes:
            self.finished = False

    def _fold_finish(self, finish: RunFinished) -> None:
        """What went wrong before a stop is decided about when the run goes on, but for what the user was told to mend:
        a fault of ours, a device that a launcher must leave out, and certificates that were wanting."""
        self.finished = finish.status != "stopped"
        self.given_up = finish.status == "given-up"
        if self.finished:
            return
        if isinstance(self.setback, Unqualified):
            self._ask_again()
            self.setback = None
        elif isinstance(self.setback, Fault) and (self.setback.category == "ours" or finish.told):
            self.setback = None

    def _ask_again(self) -> None:
        """After a stop for want of certificates: there may be some when the run goes on."""
        if self.chip is not None and not self.held_state:
            self.passed_over.add(self.chip)
            self.chip = None
        self.tried = [label for label in self.tried if label not in self.passed_over]
        self.passed_over = set()
