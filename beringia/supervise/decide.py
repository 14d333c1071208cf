"""What to do next with a run: a pure function of what its history amounts to.

No clock, no files, no processes: `decide(situation, recipe)` takes what the events so far were folded into
(`history/situation.py`) and returns the next decision, or None when the run is over. The same history always gives the
same decision, so a supervisor that was killed goes on where it was, and the rules can be tested by properties.

The rules, in order:

- an alarm of the guard: the state may be corrupt, so go back to the last *trusted* checkpoint; after
  `supervise.rollbacks` of them on one chip, at one site or with no trusted checkpoint past the alarm in between, cross
- a spike of the loss or of gradients is no proof of a fault: training has its own. One that comes again at the very
  step, while no layer computes wrongly, is the training's, and the run goes through it; another one, with no trusted
  checkpoint past the first in between, crosses
- an alarm of a step whose numbers are not finite, or whose loss is far worse than guessing, may be the training's own.
  The run goes back once, whatever `supervise.rollbacks` says, and before the step is taken again its worker finds out
  (`train/divergence.py`): if it is as bad on the CPU, the training diverges, the run is given up, and no chip is
  crossed from
- a transient fault, a hang, a lost worker, a machine that no longer answers: try again from the newest complete
  checkpoint; after `supervise.transient_retries` within `supervise.transient_window` steps, cross
- a lost device: leave it out where other devices of the chip remain, else cross; where a launcher has started the
  ranks it is its user who leaves it out, so cross, or stop and say so
- a persistent fault, or a canary beyond its band: cross
- a chip that may not train (`supervise/admission.py`): on to the next one, with no crossing from a chip that never
  held the state; with no chip left the run stops, and when it is started again every such chip is asked again
- what went wrong before the run was stopped, or its supervisor killed, is decided about when it goes on, but for what
  the user was told to mend
- crossing goes to the next chip of `train.prefer`, always from a trusted checkpoint or from the start; with no chip
  left the run is given up with a reason
- a recipe that has changed: more steps take up a run that was done, and a chip that was not tried takes up one that was
  given up, as a crossing
"""

from __future__ import annotations

from beringia.history.situation import Situation
from beringia.records.events import (
    DIVERGENCE,
    SPIKE,
    Alarm,
    Canary,
    CheckpointRejected,
    Decision,
    Fault,
    Unqualified,
    going_on,
)
from beringia.records.recipe import Recipe


def decide(situation: Situation, recipe: Recipe, *, launched: bool = False) -> Decision | None:
    """The next decision, or None when the run is over. `launched`: torchrun or Slurm has started the ranks, and starts
    no fewer."""
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
        return _after_fault(situation, recipe, trouble, launched=launched)
    if isinstance(trouble, Unqualified):
        return _after_unqualified(situation, recipe, trouble)
    if isinstance(trouble, Canary):
        return _cross(situation, recipe, f"the canary on {situation.chip} lies beyond its band: {trouble.message}")
    if isinstance(trouble, CheckpointRejected):
        return _go_back(
            situation, "retry", f"checkpoint {trouble.step} cannot be used: {trouble.message}", situation.newest
        )
    reason = going_on(situation.newest) if situation.restarted else "the worker ended before its work"
    return _go_back(situation, "retry", reason, situation.newest)


def decide_beside(situation: Situation, recipe: Recipe, chip: str) -> Decision:
    """The next decision about a role beside the learner: start it, try it again, or leave it. Never the run's end."""
    trouble = situation.trouble
    if trouble is None:
        reason = "the run goes on" if situation.decided else "beside the learner"
        return Decision(action="start", reason=reason, to_chip=chip)
    what = f"{trouble.code}: {trouble.message}" if isinstance(trouble, Fault) else trouble.kind
    transient = isinstance(trouble, Fault) and trouble.category == "transient"
    if transient and len(situation.transient_steps) <= recipe.supervise.transient_retries:
        return Decision(action="retry", reason=what, to_chip=chip)
    return Decision(action="stop", reason=f"{what}; the run goes on without it")


def _start(situation: Situation, recipe: Recipe) -> Decision:
    first = next(label for label in recipe.train.prefer if label not in situation.tried)
    reason = "the chips that were not let train are asked again" if situation.decided else "first chip of train.prefer"
    target = situation.newest_trusted
    if target is None and not situation.decided and situation.trouble is None:
        target = situation.newest  # its events were lost: its checkpoints are all that is known
    return Decision(
        action="start", reason=reason, to_chip=first, to_step=target, lost_steps=situation.steps_after(target)
    )


def _after_unqualified(situation: Situation, recipe: Recipe, unqualified: Unqualified) -> Decision:
    decision = _cross(situation, recipe, f"{situation.chip} may not train: {unqualified.reason}")
    if situation.held_state or decision.action == "stop":
        return decision
    return decision.model_copy(update={"action": "skip"})


def _after_alarm(situation: Situation, recipe: Recipe, alarm: Alarm) -> Decision:
    what = f"{alarm.detector}: {alarm.message}"
    if alarm.detector == DIVERGENCE:
        return Decision(action="stop", reason=_advice(alarm, recipe))
    spike = alarm.detector == SPIKE
    if spike and alarm.step in situation.spikes and alarm.step not in situation.accepted_spikes:
        own = f"{what} (again at the same step, and every layer computes rightly there: the training's own)"
        decision = _go_back(situation, "rollback", own, situation.newest_trusted)
        return decision.model_copy(update={"accepted_spike": alarm.step})
    earlier = max(0 if spike else situation.rollbacks.get(alarm.site, 0), situation.rollbacks_in_vain)
    unexplained = alarm.unexplained and alarm.step not in situation.doubted
    if earlier < recipe.supervise.rollbacks + unexplained:
        return _go_back(situation, "rollback", what, situation.newest_trusted)
    return _cross(situation, recipe, f"{what} (again, after {_times(earlier, 'rollback')})")


def _advice(alarm: Alarm, recipe: Recipe) -> str:
    train = recipe.train
    return (
        f"{alarm.message} No chip is at fault, and none is crossed from. Begin another run with a smaller "
        f"train.learning_rate ({train.learning_rate:g}) or weight_decay ({train.weight_decay:g}), or more warmup_steps "
        f"({train.warmup_steps}), and look at the samples of step {alarm.step}"
    )


def _after_fault(situation: Situation, recipe: Recipe, fault: Fault, *, launched: bool) -> Decision:
    what = f"{fault.code}: {fault.message.splitlines()[0] if fault.message else 'no message'}"
    if fault.category == "ours":
        return Decision(action="stop", reason=what, lost_steps=0)
    if fault.category == "device-lost":
        return (_without_rank if launched else _without_device)(situation, recipe, fault, what)
    if fault.category == "persistent":
        return _cross(situation, recipe, what)
    window = recipe.supervise.transient_window
    recent = [step for step in situation.transient_steps if step > situation.step - window]
    if len(recent) > recipe.supervise.transient_retries:
        return _cross(situation, recipe, f"{what} ({_times(len(recent), 'transient fault')} within {window} steps)")
    return _go_back(situation, "retry", what, situation.newest)


def _without_device(situation: Situation, recipe: Recipe, fault: Fault, what: str) -> Decision:
    section = recipe.chips.get(situation.chip or "")  # work that no decision began may bear another name
    ranks = section.ranks if section is not None else 1
    device = _device_of(fault.rank or 0, ranks, situation.excluded)
    if ranks - len(situation.excluded) <= 1:
        return _cross(situation, recipe, f"{what} (no device of {situation.chip} is left)")
    decision = _go_back(situation, "exclude", f"{what} (device {device} is left out)", situation.newest)
    return decision.model_copy(update={"excluded_device": device})


def _without_rank(situation: Situation, recipe: Recipe, fault: Fault, what: str) -> Decision:
    left_out = f"{what} (rank {fault.rank or 0}; the launcher starts all ranks or none)"
    decision = _cross(situation, recipe, left_out)
    return decision if decision.action == "cross" else decision.model_copy(update={"reason": left_out})


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
