"""The verdict, as properties of whatever evidence there is."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from beringia.qualify.verdict import judge
from beringia.records.certificate import POWER_NEEDED, Located, Measure, OperatorCheck, ProbeResult

ENOUGH, THIN = 0.97, 0.5
IMPROVES = ("unfit", "infer", "inconclusive", "train")
"""From what is worst to have to what is best: an open verdict has refuted nothing yet."""

measures = st.builds(
    Measure,
    name=st.just("effect"),
    value=st.none() | st.floats(0, 100),
    bound=st.floats(0.1, 10),
    reason=st.just("a test's"),
)


def probes(
    outcomes: tuple[str, ...] = ("passed", "failed", "inconclusive", "told"),
    uses: tuple[str, ...] = ("train", "infer", "neither"),
) -> st.SearchStrategy[ProbeResult]:
    return st.builds(
        ProbeResult,
        probe=st.sampled_from(["lockstep", "operators", "memory"]),
        subject=st.text("abc", max_size=3),
        outcome=st.sampled_from(outcomes),
        rules_out=st.sampled_from(uses),
        summary=st.text("xyz", min_size=1, max_size=6),
        measures=st.lists(measures, max_size=2).map(tuple),
    )


evidence = st.lists(probes(), max_size=12)
powers = st.sampled_from([ENOUGH, THIN, 0.0, POWER_NEEDED])


def failing(found: list[ProbeResult], use: str) -> bool:
    return any(probe.outcome == "failed" and probe.rules_out == use for probe in found)


def open_for(found: list[ProbeResult]) -> bool:
    return any(probe.outcome == "inconclusive" and probe.rules_out != "neither" for probe in found)


@given(evidence, probes(("failed",), ("infer",)), powers)
def test_a_failure_that_rules_out_inference_makes_a_chip_unfit(
    found: list[ProbeResult], failure: ProbeResult, power: float
) -> None:
    assert judge([*found, failure], None, power).verdict == "unfit"


@given(evidence, probes(("failed",), ("train",)), powers)
def test_failures_that_rule_out_only_training_leave_inference_unless_that_is_open(
    found: list[ProbeResult], failure: ProbeResult, power: float
) -> None:
    found = [probe for probe in found if not (probe.outcome == "failed" and probe.rules_out == "infer")]
    open_to_serve = any(probe.outcome == "inconclusive" and probe.rules_out == "infer" for probe in found)
    assert judge([*found, failure], None, power).verdict == ("inconclusive" if open_to_serve else "infer")


@given(evidence, st.floats(0, 1))
def test_where_nothing_failed_only_enough_power_and_no_open_question_let_train(
    found: list[ProbeResult], power: float
) -> None:
    found = [probe for probe in found if probe.outcome != "failed" or probe.rules_out == "neither"]
    sound = power >= POWER_NEEDED and not open_for(found)
    assert judge(found, None, power).verdict == ("train" if sound else "inconclusive")


@given(evidence, powers)
def test_the_verdict_is_train_only_where_nothing_that_counts_failed_or_is_open(
    found: list[ProbeResult], power: float
) -> None:
    if judge(found, None, power).verdict == "train":
        assert not failing(found, "infer") and not failing(found, "train") and not open_for(found)
        assert power >= POWER_NEEDED


@given(evidence, probes(("failed",)), powers)
def test_another_failure_never_improves_the_verdict(
    found: list[ProbeResult], failure: ProbeResult, power: float
) -> None:
    before, after = judge(found, None, power).verdict, judge([*found, failure], None, power).verdict
    assert IMPROVES.index(after) <= IMPROVES.index(before)


@given(evidence, probes(("passed", "told")), powers)
def test_what_passed_or_was_only_told_changes_no_verdict(
    found: list[ProbeResult], more: ProbeResult, power: float
) -> None:
    assert judge(found, None, power).verdict == judge([*found, more], None, power).verdict


@given(st.data(), evidence, powers)
def test_the_order_of_the_evidence_changes_no_verdict(
    data: st.DataObject, found: list[ProbeResult], power: float
) -> None:
    other = data.draw(st.permutations(found))
    assert judge(found, None, power).verdict == judge(other, None, power).verdict


@given(evidence, powers)
def test_every_verdict_has_a_reason(found: list[ProbeResult], power: float) -> None:
    judgement = judge(found, None, power)
    assert judgement.reasons and all(judgement.reasons)


@given(st.lists(probes(("failed",)), min_size=2, max_size=6), powers)
def test_the_gravest_failure_stands_first(found: list[ProbeResult], power: float) -> None:
    def used(probe: ProbeResult) -> float:
        return max((measure.used for measure in probe.measures), default=0.0)

    found = [probe.model_copy(update={"summary": str(number)}) for number, probe in enumerate(found)]
    for use in ("infer", "train"):
        grave = [probe for probe in found if probe.rules_out == use]
        if grave:
            first = judge(found, None, power).reasons[0]
            assert first in {probe.summary for probe in grave if used(probe) == max(map(used, grave))}
            return


def located() -> Located:
    check: dict[str, Any] = {
        "module": "model.layers.0",
        "operator": "aten.mm.default",
        "direction": "backward",
        "ordinal": 1,
        "position": 5,
        "shapes": (),
        "dtype": "bfloat16",
        "basis": "",
        "error": None,
        "measures": (),
    }
    return Located(check=OperatorCheck(**check), consistent_with=("a fault",), mitigations=("a remedy",))


def probe(outcome: str, rules_out: str, summary: str = "a probe") -> ProbeResult:
    return ProbeResult(probe="p", subject="s", outcome=outcome, rules_out=rules_out, summary=summary)  # type: ignore[arg-type]


def test_the_first_wrong_operator_is_the_first_reason_and_brings_its_remedy() -> None:
    for use in ("infer", "train"):
        judgement = judge([probe("failed", use, "the gradient differs")], located(), ENOUGH)
        assert judgement.reasons == (
            "the first wrong operator is model.layers.0: aten.mm.default (backward, call 1)",
            "the gradient differs",
        )
        assert judgement.mitigations == ("a remedy",)


def test_many_failures_are_counted_and_not_all_named() -> None:
    judgement = judge([probe("failed", "train", f"number {index}") for index in range(9)], None, ENOUGH)
    assert len(judgement.reasons) == 5 and judgement.reasons[-1] == "and 5 more like these"


def test_too_little_power_says_what_to_do() -> None:
    (reason,) = judge([probe("passed", "train")], None, THIN).reasons
    assert "50%" in reason and "80%" in reason and "more batches" in reason


def test_what_a_verdict_to_train_rests_on_counts_what_is_broken_and_rules_nothing_out() -> None:
    (sound,) = judge([probe("passed", "train")], None, ENOUGH).reasons
    assert "broken" not in sound
    (reason,) = judge([probe("passed", "train"), probe("failed", "neither")], None, ENOUGH).reasons
    assert reason.startswith(sound) and "1 probe failed" in reason and "rules nothing out" in reason
