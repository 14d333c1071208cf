"""What to do next with a run: a pure function of its history.

No clock, no files, no processes: `decide(history, recipe)` reads the events of a run and returns the next decision, or
None when the run is over. The same history always gives the same decision, so a supervisor that was killed goes on
where it was, and the rules can be tested by properties.

The rules, in order:

- an alarm of the guard: the state may be corrupt, so go back to the last *trusted* checkpoint; after
  `supervise.rollbacks` of them on one chip, at one site or with no trusted checkpoint past the alarm in between, cross
- a spike of the loss or of gradients is no proof of a fault: training has its own. One that comes again at the very
  step, while no layer computes wrongly, is the training's, and the run goes through it; another one, with no trusted
  checkpoint past the first in between, crosses
- a transient fault, a hang, a lost worker, a machine that no longer answers: try again from the newest complete
  checkpoint; after `supervise.transient_retries` within `supervise.transient_window` steps, cross
- a lost device: leave it out where other devices of the chip remain, else cross
- a persistent fault, or a canary beyond its band: cross
- a chip that may not train (`supervise/qualification.py`): on to the next one, with no crossing from a chip that never
  held the state; with no chip left the run stops, and when it is started again every such chip is asked again
- crossing goes to the next chip of `train.prefer`, always from a trusted checkpoint or from the start; with no chip
  left the run is given up with a reason
- a recipe that has changed: more steps take up a run that was done, and a chip that was not tried takes up one that was
  given up, as a crossing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from beringia.records.events import (
    SPIKE,
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
    Fault,
    RecipeChanged,
    Resumed,
    RunFinished,
    RunStarted,
    StepDone,
    Unqualified,
)
from beringia.records.recipe import Recipe

UNREACHABLE = "unreachable"
"""Code of the fault that a worker did not start on a chip whose worker has started before."""
TRANSFER = "transfer"
"""Code of the fault that state did not get to the chip's machine, or from it."""


@dataclass
class Situation:
    """What the history amounts to."""

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
    step: int = 0
    """Last step done."""
    resume_step: int | None = None
    """Checkpoint that the last decision goes on from; None is the initial state."""
    complete: dict[int, str] = field(default_factory=dict)
    """Checkpoints that can be loaded: step to state hash."""
    trusted: set[int] = field(default_factory=set)
    damaged: set[int] = field(default_factory=set)
    """Checkpoints that could not be loaded and have not been written anew."""
    transient_steps: list[int] = field(default_factory=list)
    """Steps at which transient faults struck the chip in use."""
    unanswered: int = 0
    """How often in a row the machine of the chip in use could not be reached."""
    spikes: set[int] = field(default_factory=set)
    """Steps of spikes for which the run was rolled back on the chip in use."""
    accepted_spikes: list[int] = field(default_factory=list)
    """Steps of spikes that are the training's own."""
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
    trouble: Alarm | Fault | Canary | CheckpointRejected | Unqualified | None = None
    """The first thing that went wrong since the last decision."""
    restarted: bool = False
    """A supervisor took the run over since the last decision."""
    decided: bool = False
    finished: bool = False
    given_up: bool = False
    """It ended for want of a chip, and no decision has taken it up since."""

    @property
    def newest(self) -> int | None:
        """Newest checkpoint that can be loaded."""
        return max(self.complete, default=None)

    @property
    def newest_trusted(self) -> int | None:
        """Newest checkpoint that is trusted and can be loaded."""
        return max(self.trusted & self.complete.keys(), default=None)

    @property
    def canary_from(self) -> int:
        """The trusted checkpoint before the newest trusted one; 0, the initial state, where there is none."""
        return max((step for step in self.trusted & self.complete.keys() if step != self.newest_trusted), default=0)

    def steps_after(self, checkpoint: int | None) -> int:
        """Steps done since `checkpoint`; None is the initial state. A worker may die before it told of a step whose
        checkpoint is complete: none is lost then."""
        return max(0, self.step - (checkpoint or 0))


def read_situation(history: Sequence[AnyEvent]) -> Situation:
    """Fold the events into a situation."""
    situation = Situation()
    for event in history:
        _fold(situation, event)
    return situation


def remember(history: list[AnyEvent], event: AnyEvent) -> None:
    """Add an event to a history as far as `read_situation` looks at it: of checks nothing, of steps in a row the last.

    A history kept this way grows with what happens to a run, not with its steps.
    """
    if isinstance(event, CheckDone):
        return
    if isinstance(event, StepDone) and history and isinstance(history[-1], StepDone):
        history.pop()
    history.append(event)


def decide(history: Sequence[AnyEvent], recipe: Recipe) -> Decision | None:
    """The next decision, or None when the run is over."""
    situation = read_situation(history)
    if situation.finished:
        return None
    if situation.chip is None:
        return _start(situation, recipe)
    if situation.given_up:
        return _cross(situation, recipe, f"the run was given up on {situation.chip}, and there is another chip now")
    trouble = situation.trouble
    if isinstance(trouble, Alarm):
        return _after_alarm(situation, recipe, trouble)
    if isinstance(trouble, Fault):
        return _after_fault(situation, recipe, trouble)
    if isinstance(trouble, Unqualified):
        return _after_unqualified(situation, recipe, trouble)
    if isinstance(trouble, Canary):
        return _cross(situation, recipe, f"the canary on {situation.chip} lies beyond its band: {trouble.message}")
    if isinstance(trouble, CheckpointRejected):
        return _go_back(
            situation, "retry", f"checkpoint {trouble.step} cannot be used: {trouble.message}", situation.newest
        )
    reason = "the supervisor was restarted" if situation.restarted else "the worker ended before its work"
    return _go_back(situation, "retry", reason, situation.newest)


def _start(situation: Situation, recipe: Recipe) -> Decision:
    first = next(label for label in recipe.train.prefer if label not in situation.tried)
    reason = "the chips that were not let train are asked again" if situation.decided else "first chip of train.prefer"
    return Decision(action="start", reason=reason, to_chip=first, to_step=situation.newest_trusted)


def _after_unqualified(situation: Situation, recipe: Recipe, unqualified: Unqualified) -> Decision:
    decision = _cross(situation, recipe, f"{situation.chip} may not train: {unqualified.reason}")
    if situation.held_state or decision.action == "stop":
        return decision
    return decision.model_copy(update={"action": "skip"})


def _after_alarm(situation: Situation, recipe: Recipe, alarm: Alarm) -> Decision:
    what = f"{alarm.detector}: {alarm.message}"
    spike = alarm.detector == SPIKE
    if spike and alarm.step in situation.spikes and alarm.step not in situation.accepted_spikes:
        own = f"{what} (again at the same step, and every layer computes rightly there: the training's own)"
        decision = _go_back(situation, "rollback", own, situation.newest_trusted)
        return decision.model_copy(update={"accepted_spike": alarm.step})
    earlier = max(0 if spike else situation.rollbacks.get(alarm.site, 0), situation.rollbacks_in_vain)
    if earlier < recipe.supervise.rollbacks:
        return _go_back(situation, "rollback", what, situation.newest_trusted)
    return _cross(situation, recipe, f"{what} (again, after {_times(earlier, 'rollback')})")


def _after_fault(situation: Situation, recipe: Recipe, fault: Fault) -> Decision:
    what = f"{fault.code}: {fault.message.splitlines()[0] if fault.message else 'no message'}"
    if fault.category == "ours":
        return Decision(action="stop", reason=what, lost_steps=0)
    if fault.category == "device-lost":
        return _without_device(situation, recipe, fault, what)
    if fault.category == "persistent":
        return _cross(situation, recipe, what)
    window = recipe.supervise.transient_window
    recent = [step for step in situation.transient_steps if step > situation.step - window]
    if len(recent) > recipe.supervise.transient_retries:
        return _cross(situation, recipe, f"{what} ({_times(len(recent), 'transient fault')} within {window} steps)")
    return _go_back(situation, "retry", what, situation.newest)


def _without_device(situation: Situation, recipe: Recipe, fault: Fault, what: str) -> Decision:
    assert situation.chip is not None
    ranks = recipe.chips[situation.chip].ranks
    device = _device_of(fault.rank or 0, ranks, situation.excluded)
    if ranks - len(situation.excluded) <= 1:
        return _cross(situation, recipe, f"{what} (no device of {situation.chip} is left)")
    decision = _go_back(situation, "exclude", f"{what} (device {device} is left out)", situation.newest)
    return decision.model_copy(update={"excluded_device": device})


def _device_of(rank: int, ranks: int, excluded: set[int]) -> int:
    remaining = [device for device in range(ranks) if device not in excluded]
    return remaining[min(rank, len(remaining) - 1)]


def _cross(situation: Situation, recipe: Recipe, reason: str) -> Decision:
    left = [label for label in recipe.train.prefer if label not in situation.tried]
    if not left:
        return Decision(action="stop", reason=f"{reason}; no chip of train.prefer is left")
    target = situation.newest_trusted
    return Decision(
        action="cross",
        reason=reason,
        to_chip=left[0],
        to_step=target,
        lost_steps=situation.steps_after(target),
    )


def _go_back(situation: Situation, action: str, reason: str, step: int | None) -> Decision:
    return Decision.model_validate(
        {
            "action": action,
            "reason": reason,
            "to_chip": situation.chip,
            "to_step": step,
            "lost_steps": situation.steps_after(step),
        }
    )


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _fold(situation: Situation, event: AnyEvent) -> None:
    match event:
        case RunStarted():
            situation.restarted = situation.decided
        case RecipeChanged():
            _fold_change(situation, event)
        case Decision():
            _fold_decision(situation, event)
        case StepDone():
            situation.step = event.step
        case CheckpointWritten():
            situation.complete[event.step] = event.state_hash
            situation.damaged.discard(event.step)
            situation.trusted.discard(event.step)
        case CheckpointTrusted():
            situation.trusted.add(event.step)
            if event.step >= situation.alarm_step:
                situation.rollbacks_in_vain = 0
        case CheckpointRejected():
            situation.complete.pop(event.step, None)
            situation.trusted.discard(event.step)
            situation.damaged.add(event.step)
            _trouble(situation, event)
        case Alarm():
            _trouble(situation, event)
        case ChipOpened():
            situation.unanswered = 0
        case Fault():
            situation.unanswered += event.code in (UNREACHABLE, TRANSFER)
            if event.category == "transient":
                situation.transient_steps.append(event.step if event.step is not None else situation.step)
            _trouble(situation, event)
        case Unqualified():
            _trouble(situation, event)
        case Resumed():
            situation.held_state = True
        case Canary(passed=True):
            situation.canary_due = False
        case Crossing():
            situation.came_from = None
        case Canary():
            _trouble(situation, event)
        case RunFinished():
            situation.finished = event.status != "stopped"
            situation.given_up = event.status == "given-up"
            if isinstance(situation.trouble, Unqualified):
                _ask_again(situation)
            situation.trouble = None
        case _:
            pass


def _fold_change(situation: Situation, change: RecipeChanged) -> None:
    if f"chips.{situation.chip}.ranks" in change.changes:
        situation.excluded = set()  # counted in devices that may be others now
    untried = set(change.changes.get("train.prefer", ((), ()))[1]) - set(situation.tried)
    if untried if situation.given_up else "train.steps" in change.changes:
        situation.finished = False


def _ask_again(situation: Situation) -> None:
    """After a stop for want of certificates: there may be some when the run goes on."""
    if situation.chip is not None and not situation.held_state:
        situation.passed_over.add(situation.chip)
        situation.chip = None
    situation.tried = [label for label in situation.tried if label not in situation.passed_over]
    situation.passed_over = set()


def _trouble(situation: Situation, event: Alarm | Fault | Canary | CheckpointRejected | Unqualified) -> None:
    # An alarm outranks the fault it may cause a moment later: it says that the state itself is in doubt.
    if situation.trouble is None or (isinstance(event, Alarm) and isinstance(situation.trouble, Fault)):
        situation.trouble = event


def _fold_decision(situation: Situation, decision: Decision) -> None:
    situation.decided = True
    situation.restarted = False
    situation.given_up = situation.given_up and decision.action == "stop"
    if decision.accepted_spike is not None:
        situation.accepted_spikes.append(decision.accepted_spike)
    elif decision.action == "rollback" and isinstance(situation.trouble, Alarm):
        _count_rollback(situation, situation.trouble)
    if decision.action == "exclude" and decision.excluded_device is not None:
        situation.excluded.add(decision.excluded_device)
    if decision.action in ("start", "skip", "cross"):
        assert decision.to_chip is not None
        _change_chip(situation, decision.action, decision.to_chip)
    if decision.action != "stop":  # a stop that was not carried out must be decided again
        _forget_after(situation, decision)
        situation.trouble = None


def _change_chip(situation: Situation, action: str, to_chip: str) -> None:
    if action == "cross":
        situation.came_from = situation.chip
        situation.canary_due = True
    elif situation.chip is not None:  # passed over: the state is still where it was
        situation.passed_over.add(situation.chip)
    situation.chip = to_chip
    situation.tried.append(to_chip)
    situation.held_state = False
    situation.excluded, situation.transient_steps, situation.rollbacks = set(), [], {}
    situation.spikes = set()
    situation.rollbacks_in_vain = situation.alarm_step = situation.unanswered = 0


def _count_rollback(situation: Situation, alarm: Alarm) -> None:
    situation.rollbacks_in_vain += 1
    situation.alarm_step = max(situation.alarm_step, alarm.step)
    if alarm.detector == SPIKE:
        situation.spikes.add(alarm.step)
    else:
        situation.rollbacks[alarm.site] = situation.rollbacks.get(alarm.site, 0) + 1


def _forget_after(situation: Situation, decision: Decision) -> None:
    # After going back, later checkpoints belong to an abandoned future: one from a suspect state must not come back.
    situation.resume_step = decision.to_step
    kept = decision.to_step if decision.to_step is not None else 0
    situation.step = kept
    situation.complete = {step: digest for step, digest in situation.complete.items() if step <= kept}
    situation.trusted &= situation.complete.keys()
