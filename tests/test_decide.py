"""The supervisor's rules: what is decided, for stories and for any history whatever."""

from __future__ import annotations

from typing import Any

import pytest
from histories import (
    CHIPS,
    alarm,
    any_history,
    canary,
    check,
    crossing,
    fault,
    finished,
    last_decision,
    next_decision,
    opened,
    play,
    recipe,
    rejected,
    resumed,
    situation_of,
    spike,
    started,
    step,
    trusted,
    unqualified,
    written,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beringia.records.events import (
    Alarm,
    AnyEvent,
    CheckpointTrusted,
    Decision,
    Fault,
    RecipeChanged,
    RunFinished,
    Unqualified,
)
from beringia.records.recipe import Recipe
from beringia.supervise.decide import decide


def test_a_new_run_starts_on_the_first_chip_from_the_initial_state() -> None:
    decision = last_decision(play())
    assert (decision.action, decision.to_chip, decision.to_step) == ("start", "first", None)


def test_a_transient_fault_is_retried_from_the_newest_checkpoint_trusted_or_not() -> None:
    decision = last_decision(
        play(step(100), written(100), trusted(100), step(150), written(150), step(160), fault("transient"), "decide")
    )
    assert (decision.action, decision.to_chip, decision.to_step, decision.lost_steps) == ("retry", "first", 150, 10)


def test_the_fourth_transient_fault_within_the_window_crosses() -> None:
    story = [act for number in range(4) for act in (step(100 + number), fault("transient", 100 + number), "decide")]
    history = play(*story)
    actions = [event.action for event in history if isinstance(event, Decision)]
    assert actions == ["start", "retry", "retry", "retry", "cross"]


def test_a_machine_that_stays_away_is_left_and_one_that_answers_again_starts_afresh() -> None:
    away = Fault(step=None, code="unreachable", category="transient", message="no route to host")
    history = play(written(50), trusted(50), step(60), away, "decide", away, "decide")
    assert situation_of(history).unanswered == 2
    assert situation_of([*history, opened()]).unanswered == 0
    left = play(written(50), trusted(50), step(60), *[away, "decide"] * 4)
    assert (last_decision(left).action, last_decision(left).to_step) == ("cross", 50)
    assert situation_of(left).unanswered == 0


def test_transient_faults_far_apart_are_retried_for_ever() -> None:
    story = [
        act
        for number in range(1, 20)
        for act in (step(300 * number), written(300 * number), fault("transient", 300 * number), "decide")
    ]
    assert last_decision(play(*story)).action == "retry"


def test_an_alarm_goes_back_to_the_last_trusted_checkpoint_not_to_a_newer_pending_one() -> None:
    decision = last_decision(
        play(step(100), written(100), trusted(100), step(150), written(150), step(160), alarm(160), "decide")
    )
    assert (decision.action, decision.to_step, decision.lost_steps) == ("rollback", 100, 60)


def test_the_same_alarm_after_a_rollback_crosses() -> None:
    history = play(
        step(100), written(100), trusted(100), step(160), alarm(160), "decide",
        step(150), written(150), trusted(150), step(170), alarm(170), "decide",
    )  # fmt: skip
    decision = last_decision(history)
    assert (decision.action, decision.to_chip, decision.to_step) == ("cross", "second", 150)


def test_an_alarm_at_another_site_crosses_unless_a_checkpoint_past_the_first_alarm_was_trusted_in_between() -> None:
    begun = [written(100), trusted(100), step(160), alarm(160, "layers.0"), "decide"]
    other = [alarm(220, "layers.1"), "decide"]
    assert last_decision(play(*begun, *other)).action == "cross"
    assert last_decision(play(*begun, written(150), trusted(150), *other)).action == "cross"
    assert last_decision(play(*begun, written(200), trusted(200), *other)).action == "rollback"


def test_a_spike_that_comes_again_at_the_very_step_is_gone_through() -> None:
    history = play(written(50), trusted(50), step(90), spike(90), "decide", spike(90), "decide")
    first, second = (event for event in history[-3:] if isinstance(event, Decision))
    assert (first.action, first.to_step, first.accepted_spike) == ("rollback", 50, None)
    assert (second.action, second.to_step, second.accepted_spike) == ("rollback", 50, 90)
    assert situation_of(history).accepted_spikes == [90]


def test_a_spike_at_another_step_after_a_rollback_crosses_unless_a_checkpoint_was_trusted_in_between() -> None:
    begun = [written(50), trusted(50), step(90), spike(90), "decide"]
    assert last_decision(play(*begun, spike(80), "decide")).action == "cross"
    assert last_decision(play(*begun, written(100), trusted(100), spike(170), "decide")).action == "rollback"


def test_a_spike_with_a_layer_that_computes_wrongly_is_that_layers_alarm() -> None:
    history = play(written(50), trusted(50), step(90), alarm(91), spike(90), "decide", alarm(91), spike(90), "decide")
    assert last_decision(history).action == "cross" and last_decision(history).reason.startswith("shadow: ")


def test_an_alarm_outranks_the_fault_that_follows_from_it() -> None:
    history = play(step(100), written(100), step(110), fault("transient"), alarm(110), "decide")
    assert last_decision(history).action == "rollback"


def test_a_persistent_fault_crosses_at_once_from_a_trusted_checkpoint() -> None:
    decision = last_decision(
        play(step(100), written(100), trusted(100), written(150), step(150), fault("persistent"), "decide")
    )
    assert (decision.action, decision.to_chip, decision.to_step, decision.lost_steps) == ("cross", "second", 100, 50)


def test_without_a_trusted_checkpoint_a_crossing_starts_over() -> None:
    decision = last_decision(play(step(100), written(100), fault("persistent"), "decide"))
    assert (decision.action, decision.to_step, decision.lost_steps) == ("cross", None, 100)


def test_a_lost_device_is_left_out_while_others_remain() -> None:
    history = play(
        fault("persistent"), "decide", fault("persistent"), "decide", step(10), fault("device-lost"), "decide"
    )
    decision = last_decision(history)
    assert (decision.action, decision.to_chip, decision.excluded_device) == ("exclude", "third", 0)
    assert situation_of(history).excluded == {0}


def test_the_last_device_lost_ends_a_chip() -> None:
    assert last_decision(play(step(10), fault("device-lost"), "decide")).action == "cross"


def test_a_canary_beyond_its_band_refuses_the_crossing_and_tries_the_next_chip_from_the_same_state() -> None:
    history = play(step(100), written(100), trusted(100), fault("persistent"), "decide", canary(False), "decide")
    decision = last_decision(history)
    assert (decision.action, decision.to_chip, decision.to_step) == ("cross", "third", 100)


def test_the_canary_stays_due_until_it_has_passed() -> None:
    before = play(step(100), written(100), trusted(100), fault("persistent"), "decide", fault("transient"), "decide")
    assert situation_of(before).canary_due
    after = [*before, canary(True), crossing()]
    assert not situation_of(after).canary_due
    assert situation_of(after).came_from is None


def test_with_no_chip_left_the_run_is_given_up_with_the_reason() -> None:
    history = play(*[act for _ in CHIPS for act in (fault("persistent"), "decide")])
    decision = last_decision(history)
    assert decision.action == "stop"
    assert "no chip of train.prefer is left" in decision.reason and "507014" in decision.reason


def test_a_damaged_checkpoint_sends_the_run_back_to_the_one_before() -> None:
    history = play(
        step(100), written(100), step(150), written(150), fault("transient"), "decide", rejected(150), "decide"
    )
    assert last_decision(history).to_step == 100
    assert situation_of(history).damaged == {150}


def test_checkpoints_of_an_abandoned_future_do_not_come_back() -> None:
    history = play(
        step(100), written(100), trusted(100), step(150), written(150), step(160), alarm(160), "decide",
        step(110), fault("transient"), "decide",
    )  # fmt: skip
    assert last_decision(history).to_step == 100


def test_a_restarted_supervisor_goes_on_from_the_newest_checkpoint() -> None:
    decision = last_decision(play(step(100), written(100), step(120), started(), "decide"))
    assert (decision.action, decision.to_step, decision.lost_steps) == ("retry", 100, 20)
    assert decision.reason == "goes on from step 100"


def test_a_chip_that_may_not_train_is_passed_over_and_the_next_one_starts_from_the_initial_state() -> None:
    history = play(opened(), unqualified(), "decide")
    decision, situation = last_decision(history), situation_of(history)
    assert (decision.action, decision.to_chip, decision.to_step, decision.lost_steps) == ("skip", "second", None, 0)
    assert "first may not train: no certificate" in decision.reason
    assert (situation.chip, situation.came_from, situation.canary_due) == ("second", None, False)


def test_a_crossing_to_a_chip_that_may_not_train_goes_on_to_the_next_from_the_chip_that_had_the_state() -> None:
    begun = [opened(), resumed(0), step(100), written(100), trusted(100), step(120), fault("persistent"), "decide"]
    history = play(*begun, opened(), unqualified(), "decide")
    decision, situation = last_decision(history), situation_of(history)
    assert (decision.action, decision.to_chip, decision.to_step, decision.lost_steps) == ("skip", "third", 100, 0)
    assert (situation.came_from, situation.canary_due) == ("first", True)


def test_a_chip_that_has_trained_and_no_longer_may_is_left_by_a_crossing_from_a_trusted_checkpoint() -> None:
    begun = [opened(), resumed(0), step(100), written(100), trusted(100), written(150), step(150)]
    decision = last_decision(play(*begun, fault("transient"), "decide", opened(), unqualified(), "decide"))
    assert (decision.action, decision.to_chip, decision.to_step, decision.lost_steps) == ("cross", "second", 100, 50)


NONE_MAY = [act for _ in CHIPS for act in (opened(), unqualified(), "decide")]
AGAIN = [finished("stopped"), started(), "decide"]


def test_with_no_chip_that_may_train_the_run_stops_and_says_why() -> None:
    history = play(*NONE_MAY)
    assert [event.action for event in history if isinstance(event, Decision)] == ["start", "skip", "skip", "stop"]
    reason = last_decision(history).reason
    assert "third may not train: no certificate" in reason and "no chip of train.prefer is left" in reason


def test_a_run_that_stopped_for_want_of_certificates_asks_all_its_chips_again_in_their_order() -> None:
    history = play(*NONE_MAY, *AGAIN, opened(), unqualified(), "decide", opened(), resumed(0), step(10))
    decisions = [(event.action, event.to_chip) for event in history if isinstance(event, Decision)]
    assert decisions[4:] == [("start", "first"), ("skip", "second")]
    assert situation_of(history).chip == "second"


def test_asked_again_are_the_chips_that_were_not_let_train_and_the_state_is_the_trusted_one() -> None:
    begun = [opened(), resumed(0), step(100), written(100), trusted(100), step(120), fault("persistent"), "decide"]
    others = [opened(), unqualified(), "decide"] * 2
    history = play(*begun, *others, *AGAIN)
    decision, situation = last_decision(history), situation_of(history)
    assert (decision.action, decision.to_chip, decision.to_step) == ("start", "second", 100)
    assert (situation.came_from, situation.canary_due, situation.step) == ("first", True, 100)


def test_a_stop_by_the_user_right_after_a_refusal_asks_that_chip_again() -> None:
    history = play(opened(), unqualified(), *AGAIN)
    assert (last_decision(history).action, last_decision(history).to_chip) == ("start", "first")


def test_a_finished_run_needs_no_decision() -> None:
    assert next_decision([*play(), finished("done")], recipe()) is None


def test_a_stopped_run_goes_on() -> None:
    history = [*play(step(50), written(50)), finished("stopped", 50)]
    decision = next_decision(history, recipe())
    assert decision is not None and (decision.action, decision.to_step) == ("retry", 50)


BEFORE_A_STOP = [step(100), written(100), trusted(100), step(150), written(150), step(170)]


def test_an_alarm_is_not_forgotten_when_a_stop_coincides() -> None:
    decision = last_decision(play(*BEFORE_A_STOP, alarm(170), *AGAIN))
    assert (decision.action, decision.to_step, decision.lost_steps) == ("rollback", 100, 70)


def test_an_alarm_is_not_forgotten_when_the_supervisor_is_killed() -> None:
    decision = last_decision(play(*BEFORE_A_STOP, alarm(170), started(), "decide"))
    assert (decision.action, decision.to_step) == ("rollback", 100)


def test_an_alarm_told_twice_around_a_stop_is_one_rollback_for_two_lives() -> None:
    history = play(*BEFORE_A_STOP, alarm(170), *AGAIN, step(170), alarm(170), *AGAIN)
    assert [event.action for event in history if isinstance(event, Decision)] == ["start", "rollback", "cross"]


@pytest.mark.parametrize(
    ("trouble", "action", "to_chip", "to_step"),
    [
        (fault("persistent"), "cross", "second", 100),
        (fault("device-lost"), "cross", "second", 100),
        (fault("transient"), "retry", "first", 150),
        (canary(False), "cross", "second", 100),
        (rejected(150), "retry", "first", 100),
    ],
    ids=["persistent", "device-lost", "transient", "canary", "rejected"],
)
def test_what_went_wrong_before_a_stop_is_decided_about_when_the_run_goes_on(
    trouble: AnyEvent, action: str, to_chip: str, to_step: int
) -> None:
    decision = last_decision(play(*BEFORE_A_STOP, trouble, *AGAIN))
    assert (decision.action, decision.to_chip, decision.to_step) == (action, to_chip, to_step)
    assert decision.reason != "goes on from step 150"


def test_what_the_user_was_told_to_mend_is_not_decided_about_again() -> None:
    decision = last_decision(play(*BEFORE_A_STOP, fault("ours"), "decide", *AGAIN))
    assert (decision.action, decision.to_step, decision.reason) == ("retry", 150, "goes on from step 150")


def test_an_alarm_outranks_a_checkpoint_that_cannot_be_used() -> None:
    decision = last_decision(play(*BEFORE_A_STOP, rejected(120), alarm(170), "decide"))
    assert (decision.action, decision.to_step) == ("rollback", 100)


def test_a_run_given_up_and_taken_up_again_decides_about_what_it_was_given_up_for() -> None:
    all_tried = [act for _ in CHIPS for act in (fault("persistent"), "decide")]
    more = recipe().model_copy(update={"train": recipe().train.model_copy(update={"prefer": (*CHIPS, "fourth")})})
    decision = next_decision([*play(*all_tried), finished("given-up"), started()], more)
    assert decision is not None and (decision.action, decision.to_chip) == ("cross", "fourth")


@example(play(*BEFORE_A_STOP, alarm(170), finished("stopped"), started()))
@example([*play(*BEFORE_A_STOP, resumed(0), unqualified(), alarm(170)), finished("stopped"), started()])
@given(any_history())
def test_after_an_alarm_that_no_decision_answered_the_run_goes_on_from_a_trusted_checkpoint_or_the_start(
    history: list[AnyEvent],
) -> None:
    mine = [event for event in history if event.role == "learner"]
    answered = [isinstance(event, Decision) and event.action != "stop" for event in mine]
    since = len(mine) - answered[::-1].index(True) if any(answered) else 0
    decision = next_decision(history, recipe())
    if decision is None or not any(isinstance(event, Alarm) for event in mine[since:]):
        return
    assert decision.action in ("start", "rollback", "skip", "cross", "stop")
    assert decision.to_step in (None, situation_of(history).newest_trusted)
    assert decision.to_step in (None, *(event.step for event in mine if isinstance(event, CheckpointTrusted)))


_NEW_CHIP = ("start", "skip", "cross")
_STEPS = st.integers(1, 400)
_EVENTS = st.one_of(
    _STEPS.map(step),
    _STEPS.map(check),
    _STEPS.map(written),
    _STEPS.map(trusted),
    st.builds(alarm, _STEPS, st.sampled_from(["layers.0", "layers.1", "model"])),
    st.sampled_from(["transient", "device-lost", "persistent"]).map(fault),
    st.booleans().map(canary),
    st.just(unqualified()),
    _STEPS.map(resumed),
    _STEPS.map(rejected),
    st.just("decide"),
)


def _play_any(acts: list[Any], rules: Recipe) -> list[AnyEvent]:
    """Play any acts; events after the run was stopped are dropped, as no worker exists then."""
    history = play(rules=rules)
    for act in acts:
        if last_decision(history).action == "stop":
            break
        if act == "decide":
            decision = next_decision(history, rules)
            assert decision is not None
            history.append(decision)
        else:
            history.append(act)
    return history


@given(st.lists(_EVENTS, max_size=40))
def test_the_same_history_always_gives_the_same_decision(acts: list[Any]) -> None:
    history = _play_any(acts, recipe())
    assert next_decision(history, recipe()) == next_decision(list(history), recipe())


@given(st.lists(_EVENTS, max_size=40))
def test_no_decision_goes_on_from_a_checkpoint_that_is_missing_damaged_or_for_a_crossing_not_trusted(
    acts: list[Any],
) -> None:
    history = _play_any(acts, recipe())
    situation, decision = situation_of(history), next_decision(history, recipe())
    assert decision is not None
    if decision.to_step is not None:
        assert decision.to_step in situation.complete
        assert decision.to_step not in situation.damaged
    if decision.action in ("skip", "cross", "rollback"):
        assert decision.to_step is None or decision.to_step in situation.trusted


@given(st.lists(_EVENTS, max_size=40))
def test_a_run_crosses_only_forward_through_the_chips_that_the_recipe_prefers(acts: list[Any]) -> None:
    history = _play_any([*acts, "decide"], recipe())
    used = [event.to_chip for event in history if isinstance(event, Decision) and event.action in _NEW_CHIP]
    assert used == list(CHIPS[: len(used)])


@settings(max_examples=50)
@given(
    st.lists(
        st.sampled_from(["transient", "device-lost", "persistent", "alarm", "canary", "unqualified"]),
        min_size=60,
        max_size=60,
    )
)
def test_trouble_without_progress_always_ends(kinds: list[str]) -> None:
    events = {"alarm": alarm(5), "canary": canary(False), "unqualified": unqualified()}
    acts = [act for kind in kinds for act in (events.get(kind) or fault(kind), "decide")]
    assert last_decision(_play_any(acts, recipe())).action == "stop"


@given(st.lists(_EVENTS, max_size=40))
def test_a_chip_that_may_not_train_is_not_the_next_one_and_the_state_stays_with_the_chip_that_held_it(
    acts: list[Any],
) -> None:
    history = _play_any([*acts, "decide"], recipe())
    before = situation_of(history)
    if last_decision(history).action == "stop":
        return
    refused = [*history, unqualified()]
    decision = next_decision(refused, recipe())
    assert decision is not None and decision.action in ("skip", "cross", "stop")
    assert decision.to_chip != before.chip
    if decision.action == "skip":
        after = situation_of([*refused, decision])
        assert (after.came_from, after.canary_due, after.complete) == (
            before.came_from,
            before.canary_due,
            {step: digest for step, digest in before.complete.items() if step <= (decision.to_step or 0)},
        )


@given(st.lists(_EVENTS, max_size=40), st.lists(st.just(unqualified()), min_size=3, max_size=3))
def test_a_run_that_stopped_for_want_of_certificates_always_has_a_next_chip(
    acts: list[Any], refusals: list[Any]
) -> None:
    told = [act for refusal in refusals for act in (refusal, "decide")]
    history = _play_any([*acts, "decide", *told], recipe())
    if not isinstance(situation_of(history).trouble, Unqualified):
        return
    decision = next_decision([*history, *AGAIN[:2]], recipe())  # type: ignore[list-item]
    assert decision is not None and decision.action in ("start", "retry") and decision.to_chip in CHIPS


@example([written(1), trusted(1), fault("device-lost")])
@given(st.lists(_EVENTS, max_size=40))
def test_lost_steps_are_never_negative(acts: list[Any]) -> None:
    for event in _play_any([*acts, "decide"], recipe()):
        if isinstance(event, Decision):
            assert event.lost_steps >= 0


def recipe_change(**changes: Any) -> RecipeChanged:
    names = {"steps": "train.steps", "prefer": "train.prefer", "keep": "train.keep", "ranks": "chips.third.ranks"}
    return RecipeChanged(changes={names[name]: pair for name, pair in changes.items()}, bitwise=True, message="")


ONE_CHIP = recipe().model_copy(update={"train": recipe().train.model_copy(update={"prefer": ("first",)})})
GIVEN_UP = [
    *(step(20), written(20), trusted(20), step(40), written(40), step(42), fault("persistent", 42), "decide"),
    finished("given-up", 42),
]


def test_a_run_that_was_given_up_goes_on_with_a_chip_that_was_not_tried_and_with_nothing_less() -> None:
    history = play(*GIVEN_UP, rules=ONE_CHIP)
    assert last_decision(history).action == "stop" and next_decision(history, recipe()) is None
    less = recipe_change(steps=(1000, 1200), keep=(3, 5), prefer=(["first"], ["first", "first"]))
    assert next_decision([*history, less], recipe()) is None
    added = [*history, recipe_change(prefer=(["first"], ["first", "second"]))]
    decision = next_decision(added, recipe())
    assert decision is not None
    assert (decision.action, decision.to_chip, decision.to_step, decision.lost_steps) == ("cross", "second", 20, 22)
    situation = situation_of([*added, decision])
    assert situation.chip == "second" and not situation.given_up and situation.canary_due


def test_a_run_that_is_done_goes_on_with_more_steps_and_with_nothing_else() -> None:
    history = play(step(1000), written(1000), finished("done", 1000))
    kept = recipe_change(keep=(3, 5), prefer=(["first"], ["first", "second"]))
    assert next_decision([*history, kept], recipe()) is None
    decision = next_decision([*history, recipe_change(steps=(1000, 1200))], recipe())
    assert decision is not None
    assert (decision.action, decision.to_chip, decision.to_step, decision.lost_steps) == ("retry", "first", 1000, 0)


def test_devices_that_were_left_out_are_counted_anew_when_a_chip_has_other_ranks() -> None:
    rules = recipe().model_copy(update={"train": recipe().train.model_copy(update={"prefer": ("third",)})})
    history = play(fault("device-lost"), "decide", rules=rules)
    assert situation_of(history).excluded == {0}
    assert situation_of([*history, recipe_change(keep=(3, 5))]).excluded == {0}
    assert situation_of([*history, recipe_change(ranks=(2, 4))]).excluded == set()


def test_ranks_that_a_launcher_started_are_not_made_fewer_and_its_user_is_told() -> None:
    lost = fault("device-lost", 60).model_copy(update={"rank": 3})
    history = play(written(50), trusted(50), step(60), lost)
    eight = {"first": recipe().chips["first"].model_copy(update={"ranks": 8})}
    pool = recipe().model_copy(update={"chips": {**recipe().chips, **eight}})
    alone, launched = decide(situation_of(history), pool), decide(situation_of(history), pool, launched=True)
    assert alone is not None and (alone.action, alone.excluded_device) == ("exclude", 3)
    assert launched is not None and (launched.action, launched.to_chip) == ("cross", "second")
    only = pool.model_copy(update={"train": pool.train.model_copy(update={"prefer": ("first",)})})
    told = decide(situation_of(history), only, launched=True)
    assert told is not None and told.action == "stop" and "rank 3" in told.reason
    stopped = [*history, RunFinished(status="stopped", step=60, message=told.reason, signal=None, told=True)]
    again = decide(situation_of([*stopped, started()]), only)
    assert again is not None and (again.action, again.to_step) == ("retry", 50)
