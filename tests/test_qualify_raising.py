"""A chip that raises where no operator is missing has a certificate all the same, and is no reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_models import SmallSubject
from torch import nn
from torch.nn import functional as F
from wrong_kernels import emulated_with

from beringia.chips.chip import ChipFault
from beringia.chips.cpu import Cpu
from beringia.errors import ChipUnavailable, Refusal
from beringia.qualify import candidate
from beringia.qualify.candidate import Extent
from beringia.qualify.evidence import Probed
from beringia.qualify.qualification import qualify_here
from beringia.qualify.reference import make_bundle
from beringia.qualify.refusals import NotJudged
from beringia.qualify.subject import Batch
from beringia.qualify.trace import TraceExtent

SUBJECT = SmallSubject("llama")
PLAN = TraceExtent(batches=3, steps=1)
WHOLE = TraceExtent(batches=6, steps=1)
"""With as many batches as show a loss equal."""
aten = torch.ops.aten
SILU, SORT = aten.silu.default, aten.sort.stable


def raising_past(rows: int, error: Exception) -> Callable[[torch.Tensor], torch.Tensor]:
    """A kernel that does not take so many tokens at once, which no watched call has."""

    def silu(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2] > rows:
            raise error
        return F.silu(x)

    return silu


def wrong_order(*arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Places past the end: what is done with them raises."""
    values, places = SORT(*arguments, **options)
    return values, places + 1000


ERRORS = [
    RuntimeError("tile of 512 rows: no such kernel\nat some place"),
    NotImplementedError("more than 100 rows"),
    IndexError("index 7 is out of bounds"),
    ValueError("workspace of -1 bytes"),
]
OF_EACH_KIND = [
    pytest.param(error, id=type(error).__name__, marks=[pytest.mark.slow] if number else [])
    for number, error in enumerate(ERRORS)
]


@pytest.mark.parametrize("error", OF_EACH_KIND)
def test_what_a_chip_raises_in_a_pass_that_is_not_watched_is_a_finding(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with emulated_with({SILU: raising_past(100, error)}) as chip, caplog.at_level(logging.WARNING):
        certificate = qualify_here(chip, SUBJECT, PLAN)
    first_line = str(error).partition("\n")[0]
    assert certificate.verdict == "unfit"
    assert any(f"raised {type(error).__name__}: {first_line}" in reason for reason in certificate.reasons)
    assert certificate.operators, "what was seen before is kept"
    assert "Traceback" in caplog.text


@pytest.mark.slow
def test_an_operator_that_was_wrong_before_is_named() -> None:
    def wrong_then_raising(x: torch.Tensor) -> torch.Tensor:
        return raising_past(100, ERRORS[0])(x) * 1.2

    with emulated_with({SILU: wrong_then_raising}) as chip:
        certificate = qualify_here(chip, SUBJECT, PLAN)
    assert certificate.verdict == "unfit"
    assert certificate.first_wrong is not None and certificate.first_wrong.check.operator == "aten.silu.default"


@pytest.mark.slow
def test_places_past_the_end_that_raise_elsewhere_are_a_finding_with_the_operator_that_gave_them() -> None:
    with emulated_with({SORT: wrong_order}) as chip:
        certificate = qualify_here(chip, SmallSubject("deepseek_v3"), PLAN)
    assert certificate.verdict == "unfit"
    assert certificate.first_wrong is not None and certificate.first_wrong.check.operator == "aten.sort.stable"


@pytest.mark.parametrize("error", OF_EACH_KIND)
def test_a_chip_that_raises_is_no_reference(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "x.bundle"
    words = rf"not sound: it raised {type(error).__name__}: .* No bundle was written"
    with emulated_with({SILU: raising_past(100, error)}) as chip, pytest.raises(Refusal, match=words) as refused:
        make_bundle(SUBJECT, chip, torch.bfloat16, path, plan=PLAN, limit_bytes=0)
    assert not path.exists() and "\n" not in str(refused.value)


class WrongLoss(SmallSubject):
    """Of which another chip than the CPU makes another loss, with operators that are all right."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        right = super().loss(model, batch)
        return right if right.device.type == "cpu" else right * 1.2


class Mixing(SmallSubject):
    """A model whose mistake another dtype than float64 shows."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        if model.compute_dtype != torch.float64:
            raise TypeError("a float32 beside a bfloat16")
        return super().loss(model, batch)


def test_what_this_machines_cpu_raises_is_the_models_mistake_and_no_finding(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a float32 beside"):
        make_bundle(Mixing("llama"), Cpu(), torch.bfloat16, tmp_path / "x.bundle", plan=PLAN, limit_bytes=0)


def missing(*_: object, **__: object) -> None:
    raise NotImplementedError("no such kernel here")


ADAMW = aten._fused_adamw_.default


def test_a_chip_that_only_training_needs_more_of_is_tried_in_all_that_it_serves() -> None:
    with emulated_with({ADAMW: missing}) as chip:
        certificate = qualify_here(chip, SUBJECT, PLAN)
    assert certificate.verdict == "infer"
    assert any("does not have it" in reason for reason in certificate.reasons)
    served = {probe.subject for probe in certificate.probes if probe.probe == "lockstep" and probe.outcome == "passed"}
    assert {"outputs", "decode"} <= served
    assert certificate.scenarios and all(f"serve {scenario}" in served for scenario in certificate.scenarios)
    assert any(clause.startswith("a step over batches") for clause in certificate.untried)


def test_a_chip_without_an_operator_of_training_is_unfit_where_what_it_serves_is_wrong() -> None:
    with emulated_with({ADAMW: missing, SILU: lambda x: 1.5 * F.silu(x)}) as chip:
        certificate = qualify_here(chip, SUBJECT, PLAN)
    assert certificate.verdict == "unfit"


@pytest.mark.slow
def test_no_way_of_serving_counts_as_tried_where_a_pass_raised_something() -> None:
    with emulated_with({SILU: raising_past(100, ERRORS[0])}) as chip:
        certificate = qualify_here(chip, SUBJECT, PLAN)
    assert certificate.scenarios == ()
    assert any(clause.startswith("decoding 64 at") for clause in certificate.untried)


def judge_breaks(*_: object, **__: object) -> Iterator[None]:
    raise RuntimeError("a mistake of the probing")
    yield


@pytest.mark.parametrize(
    "probe", ["first_departure", *(pytest.param(one, marks=pytest.mark.slow) for one in ("probe_layers", "replay"))]
)
def test_a_part_that_cannot_be_probed_by_itself_changes_no_verdict(
    probe: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        candidate, probe, lambda *_, **__: judge_breaks() if probe == "probe_layers" else next(judge_breaks())
    )
    with emulated_with({}) as chip, caplog.at_level(logging.WARNING):
        certificate = qualify_here(chip, WrongLoss("llama"), WHOLE)
    assert certificate.verdict == "infer"
    assert certificate.first_departure is not None
    assert "a mistake of the probing" in caplog.text


@pytest.mark.parametrize("judge", ["judge_operators", "judge_trace", "doubt"])
def test_where_the_judging_breaks_there_is_no_certificate(judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidate, judge, lambda *_: next(judge_breaks()))
    with emulated_with({}) as chip, pytest.raises(NotJudged, match="a mistake of the probing"):
        qualify_here(chip, SUBJECT, PLAN)


@pytest.mark.parametrize(("probe", "open_to"), [("probe_choices", "infer"), ("probe_clipping", "train")])
def test_a_part_that_cannot_be_probed_leaves_open_what_it_is_asked_for(
    probe: str, open_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate, probe, lambda *_, **__: next(judge_breaks()))
    with emulated_with({}) as chip:
        certificate = qualify_here(chip, SUBJECT, WHOLE)
    assert certificate.verdict == "inconclusive"
    assert [one.rules_out for one in certificate.probes if one.outcome == "inconclusive"] == [open_to]


HARDWARE = Extent(longest=0, memory_bytes=2**20, soak_seconds=0.1, speed=True)


@pytest.mark.parametrize(
    ("probe", "rules_out", "outcome"),
    [
        ("probe_speed", "neither", "told"),
        ("probe_memory", "infer", "inconclusive"),
        ("probe_soak", "train", "inconclusive"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 256 MiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 268435456 bytes."),
        MemoryError(),
        RuntimeError("no such kernel"),
    ],
    ids=["device memory", "host memory", "python's memory", "a mistake"],
)
def test_a_probe_of_the_hardware_that_breaks_leaves_open_what_it_is_asked_for(
    probe: str, rules_out: str, outcome: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate, probe, raising(error))
    results = [fact.result for fact in candidate._hardware(Cpu(), HARDWARE) if isinstance(fact, Probed)]
    (broken,) = [result for result in results if result.subject == "carried out"]
    assert (broken.rules_out, broken.outcome) == (rules_out, outcome)
    assert type(error).__name__ in broken.summary or "out-of-memory" in broken.summary


def test_a_fault_of_the_chip_in_a_probe_of_the_hardware_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Cpu):
        def classify(self, error: BaseException) -> ChipFault:
            return ChipFault("507014", "persistent", str(error))

    monkeypatch.setattr(candidate, "probe_speed", raising(RuntimeError("aicore timeout")))
    with pytest.raises(RuntimeError, match="aicore timeout"):
        list(candidate._hardware(Failing(), HARDWARE))


def test_a_chip_that_multiplies_nothing_cannot_be_soaked_and_that_leaves_training_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(candidate, "matrix_load", raising(ChipUnavailable("multiplies no matrices")))
    results = [fact.result for fact in candidate._hardware(Cpu(), HARDWARE) if isinstance(fact, Probed)]
    assert [(one.outcome, one.rules_out) for one in results if one.probe == "soak"] == [("inconclusive", "train")]


def raising(error: Exception) -> Callable[..., None]:
    def probe(*arguments: object, **options: object) -> None:
        raise error

    return probe
