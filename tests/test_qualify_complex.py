"""Complex numbers are judged as pairs of reals: a sound CPU is a reference for a model with them, and a wrong product
is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import calls_of, opened
from torch import nn
from wrong_kernels import emulated_with

from beringia.qualify.operators.check import check
from beringia.qualify.operators.float64 import NotKnown, in_float64
from beringia.qualify.operators.watch import Call
from beringia.qualify.qualification import qualify_here
from beringia.qualify.recording import Recorder
from beringia.qualify.reference import make_bundle
from beringia.qualify.subject import Batch, ModuleSubject
from beringia.qualify.trace import TraceExtent
from beringia.records.certificate import OperatorCheck

PLAN = TraceExtent(batches=6, steps=2)


def complex_numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    pairs = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(seed))
    return torch.view_as_complex(pairs.to(dtype))


Operator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
OPERATORS: dict[str, Operator] = {
    "mul": lambda a, b: a * b,
    "mul by a conjugate": lambda a, b: a * b.conj(),
    "mul by a real": lambda a, b: a * b.real,
    "mul by a number": lambda a, b: a * (0.3 - 2j),
    "div": lambda a, b: a / b,
    "add": lambda a, b: torch.add(a, b, alpha=2j),
    "sub": lambda a, b: a - b,
    "sum": lambda a, b: a.sum(0),
    "mean": lambda a, b: a.mean(),
    "mm": lambda a, b: a @ b.mT,
    "abs": lambda a, b: a.abs(),
    "angle": lambda a, b: a.angle(),
    "exp": lambda a, b: a.exp(),
    "polar": lambda a, b: torch.polar(a.abs(), b.real),
    "complex": lambda a, b: torch.complex(a.real, b.imag),
    "cat": lambda a, b: torch.cat((a, b)),
    "index": lambda a, b: a[torch.tensor([1, -1])],
    "index_add": lambda a, b: a.index_add(0, torch.tensor([0] * len(a)), b),
    "fft": lambda a, b: torch.fft.fft(a),
    "rfft": lambda a, b: torch.fft.rfft(a.real),
    "irfft": lambda a, b: torch.fft.irfft(a),
    "norm": lambda a, b: torch.linalg.vector_norm(a),
}


def last_call(operator: str, a: torch.Tensor, b: torch.Tensor) -> Call:
    return calls_of(lambda: OPERATORS[operator](a, b))[-1]


def judged(call: Call) -> OperatorCheck:
    found = check(call)
    assert found is not None
    return found


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(2, 40), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_the_cpu_is_within_its_bounds(operator: str, dtype: torch.dtype, seed: int, rows: int, scale: float) -> None:
    a, b = (complex_numbers(rows, 12, seed=seed + one, dtype=dtype) * scale for one in (0, 1))
    found = judged(last_call(operator, a, b))
    assert found.used <= 1.0, found.measures


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("part", ["both", "real", "imaginary", "one element"])
def test_a_factor_of_one_per_cent_in_either_part_is_found(operator: str, part: str) -> None:
    call = last_call(operator, complex_numbers(6, 12), complex_numbers(6, 12, seed=1))
    wrong = call.results[0].clone()
    if wrong.is_complex() and part != "one element":
        pairs = torch.view_as_real(wrong)
        pairs[..., {"both": slice(None), "real": 0, "imaginary": 1}[part]] *= 1.01
    else:
        wrong.view(-1)[-1] *= 1.01
    found = judged(replace(call, results=(wrong, *call.results[1:])))
    assert next(measure.used for measure in found.measures if measure.name == "worst element") > 1.0
    if wrong.is_complex():
        *where, which = found.worst_element
        assert len(where) == wrong.dim() and (
            part in ("both", "one element") or which == ("real", "imaginary").index(part)
        )


def test_float64_s_result_has_both_parts_in_float64() -> None:
    a, b = complex_numbers(4, 5), complex_numbers(4, 5, seed=1)
    (exact,) = in_float64(last_call("mul", a, b))
    assert exact.dtype == torch.complex128
    assert torch.equal(exact, a.to(torch.complex128) * b.to(torch.complex128))


def test_a_nan_in_one_part_is_found_and_a_real_result_has_another_form() -> None:
    call = last_call("mul", complex_numbers(4, 5), complex_numbers(4, 5, seed=1))
    struck = call.results[0].clone()
    torch.view_as_real(struck)[2, 3, 1] = float("nan")
    found = judged(replace(call, results=(struck,)))
    assert found.used > 1.0 and found.worst_element == (2, 3, 1)
    (measure,) = judged(replace(call, results=(call.results[0].real.clone(),))).measures
    assert measure.reason == "[4, 5] in float32 where torch gives [4, 5] in complex64"


def test_an_operator_whose_bound_nobody_knows_for_complex_numbers_is_not_judged() -> None:
    numbers = complex_numbers(4, 5)
    (call,) = calls_of(lambda: numbers.tanh())
    with pytest.raises(NotKnown, match="complex numbers"):
        check(call)


class Rotary(nn.Module):
    """Positions as turns of complex numbers: Llama's first form of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        batch, tokens, width = hidden.shape
        places, pairs = (torch.arange(count, device=x.device, dtype=x.dtype) for count in (tokens, width // 2))
        angles = torch.outer(places, 10000.0 ** (-pairs / 8))
        turns = torch.polar(torch.ones_like(angles), angles)
        turned = torch.view_as_complex(hidden.reshape(batch, tokens, width // 2, 2)) * turns
        return self.down(torch.tanh(torch.view_as_real(turned).flatten(-2)))


class Fourier(Rotary):
    """A layer that mixes tokens by their transform."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.fft.fft(torch.fft.fft(self.up(x), dim=-1), dim=-2).real)


def subject(model: type[nn.Module]) -> ModuleSubject:
    def batch(number: int) -> Batch:
        return {"x": torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(number))}

    def outputs(model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(batch["x"].to(next(model.parameters()).dtype))

    return ModuleSubject("mine", model, batch, lambda model, batch: outputs(model, batch).square().mean(), outputs)


@pytest.mark.parametrize("model", [Rotary, Fourier])
def test_a_sound_cpu_is_a_reference_for_a_model_with_complex_numbers(model: type[nn.Module], tmp_path: Path) -> None:
    with opened("cpu") as chip:
        make_bundle(subject(model), chip, torch.float32, tmp_path / "x.bundle", plan=PLAN, limit_bytes=2**20)
        assert qualify_here(chip, subject(model), PLAN).verdict == "train"


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_chip_whose_complex_product_is_wrong_is_found_in_its_first_call(factor: float) -> None:
    def times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = torch.mul(a, b)
        return product * factor if product.is_complex() else product

    with emulated_with({torch.ops.aten.mul.Tensor: times}) as chip:
        recorder = Recorder(subject(Rotary), chip, torch.float32)
        recorder.watch_again(1, lambda check: check)
        checks = [one for one in recorder._recording.checks if one.direction == "forward"]
    (product,) = (one for one in checks if one.dtype == "complex64" and one.operator == "aten.mul.Tensor")
    wrong = [one for one in checks if one.used > 1.0]
    assert wrong == ([] if factor == 1.0 else [product])
    assert product.factor == (None if factor == 1.0 else pytest.approx(factor, rel=1e-5))
