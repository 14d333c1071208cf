"""Runs as lists of events, for tests of what is made of them: short words for each event, a run that the rules play,
and any history whatever (`any_history`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from hypothesis import strategies as st

from beringia.history.fold import Fold
from beringia.history.situation import Situation
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
    Resumed,
    RunFinished,
    RunStarted,
    StepDone,
    Unqualified,
)
from beringia.records.identity import ChipIdentity
from beringia.records.recipe import Recipe, parse_recipe
from beringia.supervise.decide import decide

CHIPS = ("first", "second", "third")
CANDIDATE = "candidate:second"


def recipe(**supervise: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "rules",
            "model": {"preset": "r2-nano"},
            "chips": {label: {"use": "cpu", "ranks": 2 if label == "third" else 1} for label in CHIPS},
            "data": {"task": "digit-sum"},
            "train": {"prefer": list(CHIPS), "steps": 1000},
            "supervise": supervise,
        },
        "test",
    )


def step(number: int) -> StepDone:
    return StepDone(step=number, loss=1.0, gradient_norm=1.0, learning_rate=1e-3, tokens=1, seconds=0.1, cursor=number)


def written(number: int) -> CheckpointWritten:
    return CheckpointWritten(
        step=number, directory="", bytes=1, state_hash=f"hash-{number}", pause_seconds=0, write_seconds=0
    )


def trusted(number: int) -> CheckpointTrusted:
    return CheckpointTrusted(step=number, state_hash=f"hash-{number}", checks=())


def rejected(number: int) -> CheckpointRejected:
    return CheckpointRejected(step=number, file="x.safetensors", message="x.safetensors is truncated")


def started() -> RunStarted:
    return RunStarted(name="r", recipe_hash="", beringia="", steps=1000, prefer=CHIPS)


def finished(status: Any, number: int = 0) -> RunFinished:
    return RunFinished(status=status, step=number, message=f"it is {status}")


def alarm(number: int, site: str = "layers.0") -> Alarm:
    return Alarm(step=number, detector="shadow", site=site, tensor="output", value=2.0, bound=1.0, message="wrong")


def spike(number: int) -> Alarm:
    return Alarm(step=number, detector=SPIKE, site="model", tensor="loss", value=2.0, bound=1.0, message="high")


def check(number: int) -> CheckDone:
    return CheckDone(step=number, detector="shadow", site="layers.0", tensor="output", value=0.5, bound=1.0, seconds=0)


def fault(category: Any, number: int | None = None) -> Fault:
    return Fault(step=number, code="507014", category=category, message="aicore timeout")


def opened(label: str | None = None) -> ChipOpened:
    identity = ChipIdentity(
        vendor="v", sku="s", truth="real", driver="d", runtime="r", torch="t", plugin="p", switches={}
    )
    return ChipOpened(
        chip=label,
        asked="cpu",
        used="cpu",
        identity=identity,
        identity_hash=identity.hash,
        ranks=1,
        compute_dtype="float32",
        sharding="none",
    )


def resumed(number: int) -> Resumed:
    return Resumed(step=number, cursor=number, state_hash_expected="h", state_hash="h", load_seconds=0)


def unqualified() -> Unqualified:
    return Unqualified(used="cpu", identity_hash="", found="none", reason="no certificate")


def canary(passed: bool) -> Canary:
    return Canary(from_step=50, to_step=100, difference=0.5, band=0.1, parts={}, passed=passed, seconds=1)


def crossing() -> Crossing:
    return Crossing(
        from_chip="first",
        to_chip="second",
        step=100,
        state_hash_before="h",
        state_hash_after="h",
        band=0.1,
        difference=0.05,
        seconds=1,
        imports_seconds=1,
        load_seconds=1,
        canary_seconds=1,
    )


def play(*acts: AnyEvent | str, rules: Recipe | None = None) -> list[AnyEvent]:
    """The history of these events; "decide" lets the rules speak."""
    rules = rules or recipe()
    history: list[AnyEvent] = [started()]
    for act in ("decide", *acts):
        if isinstance(act, str):
            decision = next_decision(history, rules)
            assert decision is not None
            history.append(decision)
        else:
            history.append(act)
    return history


def situation_of(history: Sequence[AnyEvent]) -> Situation:
    return Fold(history).situation()


def next_decision(history: Sequence[AnyEvent], rules: Recipe) -> Decision | None:
    return decide(situation_of(history), rules)


def last_decision(history: Sequence[AnyEvent]) -> Decision:
    return next(event for event in reversed(history) if isinstance(event, Decision))


def called_in(work: Callable[[], object]) -> list[str]:
    """The functions that were called, in order: what work costs, on a machine however busy."""
    names: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            names.append(frame.f_code.co_name if event == "call" else f"compiled {argument.__name__}")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return names


# Any history whatever

Act = AnyEvent | str | Callable[[Situation], list[AnyEvent]]
"""An event; "decide" (the rules speak, and a stop is carried out); or what follows from how the run stands."""

NUMBERS = st.integers(0, 60)
CATEGORIES = ("transient", "device-lost", "persistent", "ours")
STATUSES = ("stopped", "stopped", "stopped", "given-up", "done")


def trained(count: int) -> Callable[[Situation], list[AnyEvent]]:
    """So many steps on from where the run stands, a checkpoint every 5, trusted 3 steps later."""

    def steps(situation: Situation) -> list[AnyEvent]:
        told: list[AnyEvent] = []
        for number in range(situation.step + 1, situation.step + count + 1):
            told += [step(number), check(number)]
            told += [written(number)] if number % 5 == 0 else []
            told += [trusted(number - 3)] if number % 5 == 3 and number > 5 else []
        return told

    return steps


def _begun(situation: Situation) -> list[AnyEvent]:
    """A worker opens its chip and loads what it was told to."""
    return [opened(situation.chip or "first"), resumed(situation.resume_step or 0)]


def _arrived(situation: Situation) -> list[AnyEvent]:
    """The end of a crossing."""
    return [canary(True), crossing()] if situation.came_from is not None else []


def _newest_rejected(situation: Situation) -> list[AnyEvent]:
    return [rejected(situation.newest)] if situation.newest is not None else []


SCENES: st.SearchStrategy[Act] = st.one_of(
    st.integers(1, 20).map(trained),
    st.sampled_from([_begun, _arrived, _newest_rejected]),
    st.just("decide"),
)
"""What happens to a run that is as it should be."""


def _told(event: AnyEvent, chip: str | None, role: str) -> AnyEvent:
    return event.model_copy(update={"chip": chip, "role": role})


EVENTS: st.SearchStrategy[AnyEvent] = st.one_of(
    NUMBERS.map(step),
    NUMBERS.map(check),
    NUMBERS.map(written),
    NUMBERS.map(trusted),
    NUMBERS.map(rejected),
    NUMBERS.map(resumed),
    NUMBERS.map(spike),
    st.builds(alarm, NUMBERS, st.sampled_from(["layers.0", "layers.1"])),
    st.builds(fault, st.sampled_from(CATEGORIES), st.none() | NUMBERS),
    st.booleans().map(canary),
    st.sampled_from(CHIPS).map(opened),
    st.just(unqualified()),
    st.just(crossing()),
    st.builds(
        Decision,
        action=st.sampled_from(["start", "retry", "rollback", "exclude", "skip", "cross", "stop"]),
        reason=st.just("odd"),
        to_chip=st.sampled_from(CHIPS),
        to_step=st.none() | NUMBERS,
        lost_steps=NUMBERS,
    ),
)
"""Events in no order that makes sense."""

OF_ALL_ROLES: st.SearchStrategy[AnyEvent] = st.one_of(
    st.just(started()), st.builds(finished, st.sampled_from(STATUSES), NUMBERS)
)

ODD: st.SearchStrategy[AnyEvent] = st.one_of(
    st.builds(_told, EVENTS, st.sampled_from([None, *CHIPS]), st.sampled_from(["learner", "learner", CANDIDATE])),
    OF_ALL_ROLES,
)


def played(acts: Sequence[Act]) -> list[AnyEvent]:
    """The history of these acts, dated: a second an event, as the log would."""
    told: list[AnyEvent] = []
    fold = Fold()
    for act in acts:
        for event in _acted(act, fold):
            dated = event.model_copy(update={"sequence": fold.length, "time": 1000.0 + fold.length})
            told.append(dated)
            fold.add(dated)
    return told


def _acted(act: Act, fold: Fold) -> list[AnyEvent]:
    situation = fold.situation()
    if isinstance(act, str):
        decision = decide(situation, recipe())
        if decision is None:
            return []
        decision = decision.model_copy(update={"chip": situation.chip})
        return [decision, *_carried_out(situation, decision)]
    return act(situation) if callable(act) else [act]


def _carried_out(situation: Situation, decision: Decision) -> list[AnyEvent]:
    """What a supervisor tells after a decision to stop."""
    if decision.action != "stop":
        return []
    trouble = situation.trouble
    mendable = isinstance(trouble, Unqualified) or (isinstance(trouble, Fault) and trouble.category == "ours")
    return [finished("stopped" if mendable else "given-up", situation.step)]


def any_history(odd: bool = True) -> st.SearchStrategy[list[AnyEvent]]:
    """Histories of runs: of several supervisors, stopped, killed and taken up again, with what the rules decide about
    every trouble; with `odd`, also such as no supervisor would write."""
    troubles = st.one_of(
        st.integers(1, 60).map(alarm),
        st.builds(fault, st.sampled_from(CATEGORIES)),
        st.just(canary(False)),
        st.just(unqualified()),
        NUMBERS.map(spike),
    )
    acts = [SCENES, SCENES, troubles, OF_ALL_ROLES, *([ODD, ODD] if odd else [])]
    return st.lists(st.one_of(acts), max_size=30).map(played)
