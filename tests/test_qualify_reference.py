"""A reference is judged before it is one: a faulty chip, also a faulty CPU, makes no bundle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import SmallSubject, opened
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode
from wrong_kernels import emulated_with

from beringia.chips.chip import Chip
from beringia.chips.cpu import Cpu
from beringia.errors import InputError, Refusal
from beringia.model import Decoder
from beringia.qualify.bundle import read_bundle
from beringia.qualify.effects import DRAW_ALLOWED, RoundingNoise, judge_trace
from beringia.qualify.issue import issue
from beringia.qualify.operators.check import WRONG_FORM
from beringia.qualify.qualification import qualify_here
from beringia.qualify.recording import Recorder
from beringia.qualify.reference import make_bundle
from beringia.qualify.rounded_float64 import RoundedFloat64
from beringia.qualify.rounding_draw import RoundingDraw
from beringia.qualify.sound_reference import (
    Reference,
    _check_draws,
    _drawn,
    capped,
    check_operators,
    keeping_its_bounds,
)
from beringia.qualify.subject import Batch, ModuleSubject
from beringia.qualify.trace import ChosenRoutes, Trace, TraceExtent, Tracer
from beringia.qualify.wrong_calls import USED_AT_MOST, beside_reference, beside_reference_again, error_key
from beringia.records.certificate import Certificate, Measure, OperatorCheck
from beringia.records.signature import read_signed

SUBJECT = SmallSubject("llama")
PLAN = TraceExtent(batches=3, steps=1)


def record(chip: Chip, path: Path, *, subject: SmallSubject = SUBJECT, dtype: torch.dtype = torch.bfloat16) -> None:
    make_bundle(subject, chip, dtype, path, plan=PLAN, limit_bytes=0)


@contextmanager
def silu_times(factor: float, first: int = 0) -> Iterator[None]:
    """This machine's CPU with a `silu` that is wrong by a factor in every dtype but float64, from a token on."""
    library = torch.library.Library("aten", "IMPL")

    def silu(x: torch.Tensor) -> torch.Tensor:
        right = x * torch.sigmoid(x)
        if x.dtype != torch.float64:
            right[..., first:, :] *= factor
        return right

    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch's, that a kernel is replaced
        library.impl("silu", silu, "CPU")
    try:
        yield
    finally:
        library._destroy()


@pytest.mark.parametrize(
    ("fault", "operator"),
    [
        ('kind = "wrong-backward"\nlength = 8\nstrength = 0.8', "attention"),
        pytest.param('kind = "mask-ignored"\nlength = 8', "attention", marks=pytest.mark.slow),
        ('kind = "short-accumulator"\nbits = 4', "aten.mm"),
        pytest.param(
            'kind = "stuck-tile"\ndirection = "forward"\nrow = 0\ncolumn = 1\nvalue = 1.0',
            "aten.mm",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_chip_whose_fault_harms_the_model_is_no_reference(tmp_path: Path, fault: str, operator: str) -> None:
    with opened("emulated:h800", fault, tmp_path) as chip, pytest.raises(Refusal, match="not sound") as refused:
        record(chip, tmp_path / "x.bundle")
    words = str(refused.value)
    assert operator in words and "times its bound" in words and "\n" not in words
    assert not (tmp_path / "x.bundle").exists()


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1.2), (torch.float32, 1.01)])
def test_a_cpu_with_a_wrong_kernel_is_no_reference_although_all_that_it_draws_has_the_same_fault(
    tmp_path: Path, dtype: torch.dtype, factor: float
) -> None:
    with silu_times(factor), pytest.raises(Refusal, match=r"model\.layers\.0\.mlp: aten\.silu\.default \(forward"):
        record(Cpu(), tmp_path / "x.bundle", dtype=dtype)
    assert not (tmp_path / "x.bundle").exists()


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1.5), (torch.float32, 1.01)])
def test_a_cpu_that_is_wrong_past_a_length_is_no_reference_although_no_batch_and_no_draw_shows_it(
    tmp_path: Path, dtype: torch.dtype, factor: float
) -> None:
    with silu_times(factor, first=100), pytest.raises(Refusal, match=r"serving.* differs from float64"):
        record(Cpu(), tmp_path / "x.bundle", dtype=dtype)
    assert not (tmp_path / "x.bundle").exists()


def struck_in(chip: Chip, words: str, path: Path, strike: Callable[[bool], None]) -> None:
    """A bundle of a chip that a fault strikes while it says so."""

    def say(text: str) -> None:
        strike(text.startswith(words))

    make_bundle(SUBJECT, chip, torch.bfloat16, path, plan=PLAN, limit_bytes=0, say=say)


@pytest.mark.parametrize(
    ("words", "beside"),
    [("noise, draw", "its own trace"), pytest.param("noise, draw 2", "the median draw", marks=pytest.mark.slow)],
)
def test_a_chip_whose_draws_alone_are_struck_is_no_reference_for_bounds_are_made_of_them(
    words: str, beside: str, tmp_path: Path
) -> None:
    factor = [1.0]

    def silu(x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * factor[0]

    def strike(now: bool) -> None:
        factor[0] = 1.5 if now else 1.0

    with (
        emulated_with({torch.ops.aten.silu.default: silu}) as chip,
        pytest.raises(Refusal, match=f"times that of {beside}"),
    ):
        struck_in(chip, words, tmp_path / "x.bundle", strike)
    assert not (tmp_path / "x.bundle").exists()


def test_a_cpu_whose_loss_alone_is_wrong_is_no_reference_although_no_gradient_shows_it(tmp_path: Path) -> None:
    library = torch.library.Library("aten", "IMPL")

    def loss(
        x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: int, ignored: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counted = target != ignored
        picked = -x.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1) * counted
        count = counted.sum().to(x.dtype)
        right = (picked, picked.sum() / count, picked.sum())[reduction]
        return right * (1.0 if x.dtype == torch.float64 else 1.1), count

    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch's, that a kernel is replaced
        library.impl("nll_loss_forward", loss, "CPU")
    try:
        with pytest.raises(Refusal, match="the loss differs from float64's"):
            record(Cpu(), tmp_path / "x.bundle")
    finally:
        library._destroy()
    assert not (tmp_path / "x.bundle").exists()


def of_one_weight(seed: int) -> nn.Module:
    """The same every time."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_draws_of_one_weight_which_are_all_of_one_number_may_be_uneven(dtype: torch.dtype) -> None:
    def batch(seed: int, number: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(16, 1, generator=torch.Generator().manual_seed(100 * seed + number))}

    def outputs(model: nn.Module, batch: Batch) -> torch.Tensor:
        found: torch.Tensor = model(batch["x"].to(next(model.parameters()).dtype))
        return found

    for seed in range(12):
        subject = ModuleSubject(
            "one",
            partial(of_one_weight, seed),
            partial(batch, seed),
            lambda model, batch: outputs(model, batch).double().square().mean(),
            outputs,
        )
        tracer = Tracer(subject, TraceExtent(batches=6, steps=6))
        exact, routes = tracer.in_float64()

        def traced(change: RoundingDraw | None = None) -> Trace:
            return tracer.on_chip(Cpu(), dtype, routes, begin_step=lambda: None, change=change)  # noqa: B023 (called here)

        noise = RoundingNoise.of(exact, traced(), (traced(RoundingDraw(number, dtype)) for number in range(4)))
        _check_draws(Reference(Cpu(), subject, dtype, routes), noise, None)


def checked(used: float, *names: str) -> OperatorCheck:
    measures = tuple(Measure(name=name, value=used, bound=1.0, reason="a test") for name in names)
    return OperatorCheck(
        position=0,
        module="m",
        operator="aten.mm.default",
        direction="forward",
        ordinal=0,
        shapes=(),
        dtype="bfloat16",
        basis="",
        error=0.1,
        measures=measures,
    )


def test_what_is_computed_between_two_draws_is_not_drawn() -> None:
    tracer = Tracer(SUBJECT, TraceExtent(batches=1, steps=0, scenarios=False))
    reference = Reference(Cpu(), SUBJECT, torch.bfloat16, tracer.in_float64()[1])
    draws = _drawn(reference, tracer, RoundedFloat64)
    next(draws)
    assert _get_current_dispatch_mode() is None
    draws.close()


@given(st.floats(0.0, USED_AT_MOST))
def test_a_bound_is_loosened_for_a_reference_that_used_more_and_only_in_how_far_numbers_are_off(used: float) -> None:
    check = checked(1.0, "worst element", "root mean square error", "signed error", "small numbers lost")
    beside = beside_reference(check, {error_key("m", "aten.mm.default", "forward", 0): (0.1, used)})
    *errors, lost = (measure.bound for measure in beside.measures)
    assert lost == 1.0
    assert all(1.0 <= bound <= USED_AT_MOST and bound >= used for bound in errors)


def test_a_call_of_a_further_pass_is_held_beside_the_worst_of_its_operator_in_its_module() -> None:
    errors = {
        error_key("m", "aten.mm.default", "forward", number): (0.1, used) for number, used in enumerate((0.2, 1.3, 0.9))
    }
    errors |= {error_key("m", "aten.mm.default", "backward", 0): (0.1, 1.5)}
    errors |= {error_key("m.k", "aten.mm.default", "forward", 0): (0.1, 1.5)}
    check = checked(1.37, "root mean square error").model_copy(update={"ordinal": 70})
    assert beside_reference(check, errors).used == 1.37
    assert beside_reference_again(check, errors).used == pytest.approx(1.37 / min(1.25 * 1.3, USED_AT_MOST))
    assert beside_reference_again(check, {}).used == 1.37


@pytest.mark.slow
def test_a_chip_whose_angles_are_wrong_past_a_length_is_no_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = Decoder.rope_at

    def rope_at(model: Decoder, start: int, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = sound(model, start, length, device)
        if device.type != "cpu":
            sin = sin.clone()
            sin[max(0, 90 - start) :] *= 0.9
        return cos, sin

    monkeypatch.setattr(Decoder, "rope_at", rope_at)
    with opened("emulated:h800") as chip, pytest.raises(Refusal, match="differs from float64"):
        record(chip, tmp_path / "x.bundle")


@dataclass(frozen=True)
class WrongLoss(SmallSubject):
    """Of which another chip than the CPU makes another loss, with operators that are all right."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        right = super().loss(model, batch)
        return right if right.device.type == "cpu" else right * 1.2


@pytest.mark.slow
def test_a_chip_whose_loss_is_wrong_in_all_that_it_draws_is_no_reference(tmp_path: Path) -> None:
    with opened("emulated:h800") as chip, pytest.raises(Refusal, match="the gradient of .* differs from float64"):
        record(chip, tmp_path / "x.bundle", subject=WrongLoss("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chip", ["emulated:h800", "emulated:mi300x", "emulated:ascend-910b"])
def test_a_sound_chip_is_a_reference(tmp_path: Path, chip: str, dtype: torch.dtype) -> None:
    with opened(chip) as sound:
        record(sound, tmp_path / "x.bundle", subject=SmallSubject("deepseek_v3"), dtype=dtype)
    assert (tmp_path / "x.bundle").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_a_sound_cpu_is_a_reference(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    record(Cpu(), tmp_path / "x.bundle", subject=SmallSubject(family), dtype=dtype)
    assert (tmp_path / "x.bundle").exists()


@pytest.mark.slow
def test_the_call_that_no_effect_excuses_is_named_and_not_an_earlier_one_that_effects_may_excuse() -> None:
    def wrong(module: str, measure: Measure) -> OperatorCheck:
        return OperatorCheck(
            module=module,
            operator="aten.mm.default",
            direction="forward",
            ordinal=0,
            position=0,
            shapes=(),
            dtype="bfloat16",
            basis="",
            error=None,
            measures=(measure,),
        )

    mild = wrong("first", Measure(name="worst element", value=2.0, bound=1.0, reason="a rounding"))
    grave = wrong("second", Measure(name=WRONG_FORM, value=1.0, bound=0.5, reason="[2] where torch gives [3]"))
    with opened("cpu") as chip:
        reference = Reference(chip, SUBJECT, torch.bfloat16, Tracer(SUBJECT, PLAN).in_float64()[1])
        check_operators(reference, [mild])
        with pytest.raises(Refusal, match=r"second: .* is \[2\] where torch gives \[3\]"):
            check_operators(reference, [mild, grave])


def test_a_harmless_wrong_call_of_the_reference_excuses_no_more_of_a_candidate_than_the_limit(tmp_path: Path) -> None:
    with silu_times(1.01):
        record(Cpu(), tmp_path / "x.bundle")
        errors = read_bundle(tmp_path / "x.bundle").manifest.errors
        assert max(used for _, used in errors.values()) == USED_AT_MOST
        tracer = Tracer(SUBJECT, PLAN)
        found = Recorder(SUBJECT, Cpu(), torch.bfloat16).record(tracer, tracer.in_float64()[1])
    beside = [beside_reference(check, errors) for check in found.checks]
    assert {check.operator for check in beside if check.used > 1.0} == {"aten.silu.default"}


def test_float64_rounded_is_the_same_whatever_the_kernels_are() -> None:
    batch = SUBJECT.batch(0)

    def gradients() -> list[torch.Tensor]:
        model = SUBJECT.place(SUBJECT.build(), torch.device("cpu"), torch.bfloat16)
        with RoundedFloat64():
            SUBJECT.loss(model, batch).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    sound = gradients()
    with silu_times(3.0):
        struck = gradients()
    assert len(sound) > 10 and all(torch.equal(one, other) for one, other in zip(sound, struck, strict=True))


# ---- no numbers


@dataclass(frozen=True)
class ChangedSubject(SmallSubject):
    """With its embeddings changed."""

    change: Callable[[torch.Tensor], torch.Tensor] = torch.clone

    def build(self) -> Decoder:
        decoder = super().build()
        with torch.no_grad():
            weight = decoder.get_parameter("model.embed_tokens.weight")
            weight.copy_(self.change(weight))
        return decoder


def test_a_model_that_gives_nan_in_float64_is_an_input_error(tmp_path: Path) -> None:
    subject = ChangedSubject("llama", change=lambda weight: weight * float("nan"))
    with pytest.raises(InputError, match="llama .* already in float64"):
        record(Cpu(), tmp_path / "x.bundle", subject=subject)


@pytest.mark.slow
def test_a_dtype_that_does_not_hold_the_models_numbers_is_an_input_error_that_names_others(tmp_path: Path) -> None:
    subject = ChangedSubject("llama", change=lambda weight: weight * 1e5)
    record(Cpu(), tmp_path / "x.bundle", subject=subject)
    with pytest.raises(InputError, match="in float16.*the model overflows.*bfloat16"):
        record(Cpu(), tmp_path / "y.bundle", subject=subject, dtype=torch.float16)
    assert not (tmp_path / "y.bundle").exists()


# ---- its own trace


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=5), st.floats(0, float("inf")))
def test_its_own_trace_counts_for_no_more_than_the_farthest_draw_allows(draws: list[float], own: float) -> None:
    cell = ("outputs", "", "0")
    nothing = torch.zeros(0)
    noise = RoundingNoise(Trace({}, nothing, nothing), {cell: own}, tuple({cell: far} for far in draws), *[nothing] * 2)
    assert capped(noise).own[cell] == min(own, DRAW_ALLOWED * max(draws))


NOTHING = torch.zeros(0)
OF_ONE = ("update/model.norm.weight", "accumulated/model.norm.weight", "decode")
OF_SIX = tuple(f"gradient/{batch}/weight" for batch in range(6))


LOSS, LOSSES = "the batches' losses", "the training steps' losses"


def trace(times: dict[str, float], seed: int) -> Trace:
    """Errors of rounding, some of them so many times as large."""
    generator = torch.Generator().manual_seed(seed)

    def errors(name: str, count: int) -> torch.Tensor:
        return 1e-3 * times.get(name, 1.0) * torch.randn(count, generator=generator, dtype=torch.float64)

    sketches = {name: errors(name, 50) for name in (*OF_ONE, *OF_SIX)}
    # Of one sign where they are off: the mean is what counts.
    loss = errors(LOSS, 6) if LOSS not in times else 1e-3 * times[LOSS] * torch.ones(6, dtype=torch.float64)
    return Trace(sketches, 1.0 + loss, 1.0 + errors(LOSSES, 6))


EXACT = trace(dict.fromkeys((*OF_ONE, *OF_SIX, LOSS, LOSSES), 0.0), 0)
DRAWN = [trace({}, seed) for seed in (1, 2, 3, 4)]


def kept(own: Trace, dtype: torch.dtype) -> RoundingNoise:
    reference = Reference(Cpu(), SUBJECT, dtype, ChosenRoutes((), ()))
    return keeping_its_bounds(reference, RoundingNoise.of(EXACT, own, DRAWN), own)


def failed(noise: RoundingNoise, found: Trace) -> list[str]:
    return [one.subject for one in judge_trace(noise, found) if one.outcome == "failed"]


tips = st.dictionaries(st.sampled_from([*OF_ONE, OF_SIX[2], LOSS, LOSSES]), st.floats(1.0, 8.0), max_size=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@given(times=tips, seed=st.integers(10, 1000))
def test_a_chip_with_the_references_very_bits_is_never_refused(
    dtype: torch.dtype, times: dict[str, float], seed: int
) -> None:
    own = trace(times, seed)
    try:
        noise = kept(own, dtype)
    except Refusal as refusal:
        assert max(times.values()) > 2.0 and "is not sound: " in str(refusal), "or there is no such reference"
    else:
        assert failed(noise, own) == []


@pytest.mark.parametrize("name", [*OF_ONE, OF_SIX[2]])
def test_where_the_reference_tipped_over_no_more_is_allowed_than_its_own_distance_and_elsewhere_nothing_more(
    name: str,
) -> None:
    noise = kept(trace({name: 3.4}, 9), torch.float32)
    assert {cell[0] for cell in noise.tipped} == {name.partition("/")[0]}
    assert failed(noise, trace({name: 3.4}, 9)) == [] and len(failed(noise, trace({name: 3.4 * 1.3}, 9))) == 1
    others = {other: 3.4 for other in (*OF_ONE, OF_SIX[2]) if other != name}
    assert len(failed(noise, trace(others, 9))) == 3


@pytest.mark.parametrize(("name", "times", "subject"), [(LOSS, 3.0, "loss"), (LOSSES, 2.4, "losses of training")])
def test_so_it_is_with_losses(name: str, times: float, subject: str) -> None:
    own, farther = trace({name: times}, 9), trace({name: times * 1.3}, 9)
    assert subject in failed(replace(kept(own, torch.float32), tipped_loss=0.0, tipped_training=0.0), own)
    assert failed(kept(own, torch.float32), own) == [] and failed(kept(own, torch.float32), farther) == [subject]


def test_beyond_its_limit_it_is_no_reference() -> None:
    with pytest.raises(Refusal, match="the update after training steps of model.norm differs from float64"):
        kept(trace({OF_ONE[0]: 6.0}, 9), torch.bfloat16)


def test_a_bundle_knows_where_its_reference_tipped_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {("update", "model.norm", ""): 0.25}
    monkeypatch.setattr(
        "beringia.qualify.reference.keeping_its_bounds",
        lambda reference, noise, trace: replace(capped(noise), tipped=cells, tipped_loss=0.5, tipped_training=4.0),
    )
    record(Cpu(), tmp_path / "x.bundle")
    noise = read_bundle(tmp_path / "x.bundle").noise
    assert (noise.tipped, noise.tipped_loss, noise.tipped_training) == (cells, 0.5, 4.0)


def test_a_reference_that_is_off_in_its_own_trace_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that strikes while nobody watches, and not when the draws are made."""
    record_all = Recorder.record

    def struck(self: Recorder, *arguments: object) -> object:
        found = record_all(self, *arguments)  # type: ignore[arg-type]
        assert found.trace is not None
        moved = {name: sketch * 1.5 for name, sketch in found.trace.sketches.items()}
        found.trace = replace(found.trace, sketches=moved)
        return found

    monkeypatch.setattr(Recorder, "record", struck)
    with pytest.raises(Refusal, match="times what rounding explains"):
        record(Cpu(), tmp_path / "x.bundle")


# ---- candidates without numbers


def nan_first(x: torch.Tensor) -> torch.Tensor:
    """`silu` with NaN in its first element."""
    right = torch.nn.functional.silu(x.cpu())
    right.view(-1)[0] = float("nan")
    return right.to(x.device)


@pytest.mark.slow
def test_a_candidate_that_gives_nan_is_unfit_and_its_certificate_can_be_signed_and_read(tmp_path: Path) -> None:
    with emulated_with({torch.ops.aten.silu.default: nan_first}) as chip:
        found = qualify_here(chip, SUBJECT, PLAN)
    assert found.verdict == "unfit" and found.first_wrong is not None
    assert found.first_wrong.check.operator == "aten.silu.default" and found.first_wrong.check.found is None
    issued = issue(found, tmp_path, tmp_path / "key.pem")
    assert read_signed(Path(issued.paths["certificate"]), Certificate).record == found


class Recurrent(nn.Module):
    """An LSTM, which the CPU has as one operator without a float64 form."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, 5)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        head: torch.Tensor = self.head(self.lstm(x_BTD)[0])
        return head


def of_sequences(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"x": torch.randn(4, 6, 8, generator=generator)}


def recurrent_outputs(model: nn.Module, batch: Batch) -> torch.Tensor:
    outputs: torch.Tensor = model(batch["x"].to(next(model.parameters()).dtype))
    return outputs


def test_a_module_with_an_operator_that_float64_cannot_replay_is_judged_by_lockstep_and_told() -> None:
    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        return recurrent_outputs(model, batch).square().mean()

    subject = ModuleSubject("recurrent", Recurrent, of_sequences, loss, recurrent_outputs)
    found = qualify_here(Cpu(), subject, TraceExtent(batches=4, steps=1))
    told = [probe.summary for probe in found.probes if probe.subject == "not judged"]
    assert any("rnn" in words for words in told) and all("without a float64 form" in words for words in told)
    lockstep = {probe.subject for probe in found.probes if probe.probe == "lockstep" and probe.outcome == "passed"}
    assert {"outputs", "gradient lstm.weight_hh_l0", "update lstm"} <= lockstep
    assert found.verdict == "train"
