"""More speaks against a chip than against any sound one, and nothing alone rules a use out: training is left open."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beringia.qualify.doubt import ALONE, NEAR, doubt, left_open
from beringia.qualify.effects import BESIDE_REFERENCE, OVERALL
from beringia.qualify.verdict import judge
from beringia.records.certificate import Measure, OperatorCheck, ProbeResult


def check(used: float) -> OperatorCheck:
    measure = Measure(name="root mean square error", value=used, bound=1.0, reason="")
    return OperatorCheck(
        module="model.layers.0.mlp",
        operator="aten.mm.default",
        direction="forward",
        ordinal=0,
        position=0,
        shapes=((2, 2),),
        dtype="bfloat16",
        basis="",
        error=used,
        measures=(measure,),
    )


def effect(used: float, subject: str = "gradient weight", **fields: Any) -> ProbeResult:
    measure = Measure(name="effect", value=1.5 * used, bound=1.5, reason="")
    outcome = "failed" if used > 1.0 else "passed"
    given = {"probe": "lockstep", "subject": subject, "outcome": outcome, "rules_out": "train", "summary": subject}
    return ProbeResult.model_validate({**given, "measures": (measure,), **fields})


def overall(outcome: str) -> ProbeResult:
    return effect(0.0, OVERALL, outcome=outcome, rules_out="neither", summary="1.3 times as far as the reference")


RIGHT, WRONG = check(0.9), check(4.0)
shares = st.floats(0.0, 1.0)


def verdict(effects: list[ProbeResult], checks: list[OperatorCheck]) -> str:
    return judge([*effects, *doubt(checks, effects)], None, power=1.0).verdict


@given(used=st.lists(shares, min_size=1))
def test_where_every_operator_is_right_no_share_of_a_bound_leaves_anything_open(used: list[float]) -> None:
    assert verdict([effect(one) for one in used], [RIGHT]) == "train"


@given(used=st.lists(shares, min_size=1))
def test_a_wrong_operator_beside_harm_near_its_bound_leaves_training_open_and_no_other(used: list[float]) -> None:
    found = verdict([effect(one) for one in used], [RIGHT, WRONG])
    assert found == ("inconclusive" if max(used) >= NEAR else "train")


@given(used=shares)
def test_all_groups_beyond_any_sound_chip_leave_training_open_whatever_operators_do(used: float) -> None:
    for checks in ([RIGHT], [WRONG]):
        assert verdict([effect(used), overall("told")], checks) == "inconclusive"
    assert verdict([effect(used), overall("passed")], [RIGHT]) == "train"


@pytest.mark.parametrize(("rules_out", "expected"), [("train", "infer"), ("infer", "unfit")])
def test_what_an_effect_has_decided_stays_decided(rules_out: str, expected: str) -> None:
    effects = [effect(1.5, rules_out=rules_out), effect(0.95), overall("told")]
    assert verdict(effects, [WRONG]) == expected


def test_the_reason_names_the_operator_and_what_is_near_its_bound() -> None:
    (open_question,) = doubt([RIGHT, WRONG], [effect(0.2), effect(0.9, "gradient model.norm.weight")])
    assert "model.layers.0.mlp: aten.mm.default (forward, call 0) is wrong (4 times its bound)" in open_question.summary
    assert "90% of a bound is used by gradient model.norm.weight" in open_question.summary


def beside(used: float, subject: str = "decode", rules_out: str = "infer") -> ProbeResult:
    """Judged beside the reference's own distance."""
    measure = Measure(name=BESIDE_REFERENCE, value=1.6 * used, bound=1.6, reason="")
    return effect(used, subject, measures=(measure,), rules_out=rules_out)


@given(
    served=st.lists(st.floats(0.0, 1.5), min_size=1, max_size=4),
    learned=st.lists(st.floats(0.0, 1.5), max_size=4),
    other=st.floats(0.0, 1.2),
)
def test_one_way_of_serving_alone_that_leaves_its_bound_by_little_is_left_open(
    served: list[float], learned: list[float], other: float
) -> None:
    effects = [
        *(beside(one, f"serve {number}") for number, one in enumerate(served)),
        *(beside(one, f"gradient {number}", "train") for number, one in enumerate(learned)),
        effect(other, "losses"),
    ]
    beyond = [one for one in served if one > 1.0]
    alone = len(beyond) == 1 and max(beyond) <= ALONE and max([*learned, other]) <= 1.0
    found = left_open(effects)
    for before, after in zip(effects, found, strict=True):
        expected = "inconclusive" if alone and before.outcome == "failed" else before.outcome
        assert (after.outcome, after.measures, after.rules_out) == (expected, before.measures, before.rules_out)
    if alone:
        assert verdict(found, [WRONG]) == "inconclusive"


def test_an_effect_beyond_the_draws_is_never_left_open() -> None:
    far = effect(1.01, "serve 1", rules_out="infer")
    assert left_open([far]) == [far]


@pytest.mark.parametrize("subject", ["outputs", "gradient model.norm.weight", "update model.layers.0"])
def test_what_is_of_several_batches_is_never_left_open(subject: str) -> None:
    far = beside(1.1, subject)
    assert left_open([far]) == [far]
    assert [one.outcome for one in left_open([beside(1.1, "decode")])] == ["inconclusive"]
