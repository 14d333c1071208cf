"""A result of another number, shape, dtype or layout is a finding; large and infinite numbers are compared as such."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import calls_of
from torch.nn import functional as F

from beringia.qualify.operators.check import WRONG_FORM, check, has_wrong_integers, wrong_form_words
from beringia.qualify.operators.watch import Call
from beringia.qualify.recording import Recording
from beringia.qualify.wrong_calls import judge_operators
from beringia.records.certificate import Measure, OperatorCheck

MOST = torch.finfo(torch.float32).max


@functools.cache  # so that an operator is the only call of its function
def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


OPERATORS: dict[str, Callable[[], object]] = {
    "mm": lambda: random(4, 6) @ random(6, 5, seed=1),
    "mm in bfloat16": lambda: random(4, 6, dtype=torch.bfloat16) @ random(6, 5, seed=1, dtype=torch.bfloat16),
    "add_": lambda: random(4, 5).clone().add_(random(4, 5, seed=1)),
    "mul of two dtypes": lambda: random(4, 5, dtype=torch.bfloat16) * random(4, 5, seed=1),
    "_to_copy": lambda: random(4, 5).to(torch.bfloat16),
    "sum": lambda: random(4, 5).sum(1),
    "sum in another dtype": lambda: random(4, 5, dtype=torch.bfloat16).sum(1, dtype=torch.float32),
    "softmax": lambda: random(4, 5).softmax(-1),
    "topk": lambda: random(4, 5).topk(2),
    "argmax": lambda: random(4, 5).argmax(1),
    "index": lambda: random(4, 5)[torch.tensor([1, 0])],
    "embedding": lambda: F.embedding(torch.tensor([[1, 2], [0, 3]]), random(4, 5)),
    "cumsum of integers": lambda: torch.arange(12).view(3, 4).cumsum(1),
    "eq": lambda: random(4, 5) == 1.0,
    "layer norm": lambda: F.layer_norm(random(4, 5), (5,)),
    "attention": lambda: F.scaled_dot_product_attention(random(1, 2, 6, 8), random(1, 2, 6, 8), random(1, 2, 6, 8)),
    "foreach": lambda: torch._foreach_add([random(3), random(4)], 1.0),
}


def last_call(operator: str, among: Mapping[str, Callable[[], object]] = OPERATORS) -> Call:
    among[operator]()  # draws its tensors
    return calls_of(among[operator])[-1]


def measures(call: Call) -> dict[str, Measure]:
    found = check(call)
    assert found is not None
    return {measure.name: measure for measure in found.measures}


def used(call: Call) -> dict[str, float]:
    return {name: measure.used for name, measure in measures(call).items()}


def with_first(call: Call, result: torch.Tensor) -> Call:
    return replace(call, results=(result, *call.results[1:]))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_result_of_another_form_is_a_finding_and_torch_s_own_is_none(operator: str) -> None:
    call = last_call(operator)
    own = call.results[0]
    sound = check(call)
    assert sound is None or WRONG_FORM not in {measure.name for measure in sound.measures}
    flat = own.flatten()
    of_shape = {
        "longer": torch.cat((flat, flat[:1])),
        "shorter": flat[:-1],
        "empty": flat[:0],
        "with one more dimension": own.unsqueeze(0),
        "broadcast": flat[:1],
    }
    if own.dim() > 1:
        of_shape["transposed"] = own.mT[..., :-1] if own.shape[-1] == own.shape[-2] else own.mT
    for other in of_shape.values():
        assert used(with_first(call, other)) == {WRONG_FORM: 2.0}
    for dtype in {torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool} - {own.dtype}:
        reason = measures(with_first(call, own.to(dtype)))[WRONG_FORM].reason
        assert str(dtype).removeprefix("torch.") in reason.split(" where torch gives ")[0]
        assert str(own.dtype).removeprefix("torch.") in reason.split(" where torch gives ")[1]
    assert "sparse_coo" in measures(with_first(call, own.to_sparse()))[WRONG_FORM].reason


@pytest.mark.parametrize("operator", ["topk", "foreach"])
def test_a_result_that_is_missing_is_a_finding(operator: str) -> None:
    call = last_call(operator)
    assert used(replace(call, results=call.results[:1])) == {WRONG_FORM: 2.0}


# ---- whatever a chip gives, it is judged

TYPICAL: dict[str, Callable[[], object]] = OPERATORS | {
    "add in bfloat16": lambda: random(4, 5, dtype=torch.bfloat16) + random(4, 5, seed=1, dtype=torch.bfloat16),
    "exp": lambda: random(4, 5).exp(),
    "div": lambda: random(4, 5) / random(4, 5, seed=1),
    "silu": lambda: F.silu(random(4, 5)),
    "mean to a scalar": lambda: random(4, 5).mean(),
    "sum of a scalar": lambda: random().sum(),
    "norm": lambda: torch.linalg.vector_norm(random(4, 5)),
    "cat": lambda: torch.cat((random(4, 5), random(4, 5, seed=1))),
    "sort": lambda: random(4, 5).sort(dim=0, descending=True),
    "max with places": lambda: random(4, 5).max(1),
    "min with places, kept": lambda: random(4, 5).min(0, keepdim=True),
    "median with places": lambda: random(4, 5).median(1),
    "argmin of all": lambda: random(4, 5).argmin(),
    "argmax of a scalar": lambda: random().argmax(),
    "max of integers": lambda: torch.arange(12).view(3, 4).max(),
    "max_pool": lambda: F.max_pool2d(random(2, 3, 4, 4).requires_grad_(), 2),
    "max_pool of three": lambda: F.max_pool3d(random(1, 2, 4, 4, 4).requires_grad_(), 2),
    "gather": lambda: random(4, 5).gather(1, torch.tensor([[0, 2], [1, 1], [4, 3], [0, 0]])),
    "scatter_add": lambda: random(4, 5).scatter_add(0, torch.tensor([[0, 1, 1, 3, 2]]), random(1, 5)),
    "index_put": lambda: random(4, 5).index_put((torch.tensor([-1, 2]),), random(2, 5), accumulate=True),
    "nonzero": lambda: (random(4, 5) > 0).nonzero(),
    "where": lambda: torch.where(random(4, 5) > 0, random(4, 5), 0.5),
    "native_batch_norm": lambda: F.batch_norm(random(4, 5), None, None, training=True),
    "conv": lambda: F.conv1d(random(2, 3, 8), random(4, 3, 3)),
    "lerp of lists": lambda: torch._foreach_lerp([random(3), random(4)], [random(3), random(4)], 0.5),
    "product of complex numbers": lambda: complex_numbers(4, 5) * complex_numbers(4, 5, seed=1),
    "fft": lambda: torch.fft.rfft(random(4, 8)),
}


@functools.cache
def complex_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.view_as_complex(random(*shape, 2, seed=seed)).clone()


DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
)


def replaced(own: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a chip may give in place of a result."""
    filled = {f"{value} {own.dtype}": own.clone().fill_(value) for value in (0, 1, 7)}
    if own.is_floating_point() or own.is_complex():
        filled |= {str(value): torch.full_like(own, value) for value in (math.nan, math.inf, -math.inf)}
        filled["one NaN"] = own.clone(memory_format=torch.contiguous_format)
        filled["one NaN"].view(-1)[:1] = math.nan
    elif own.dtype != torch.bool:
        filled |= {str(value): torch.full_like(own, value) for value in (-1, 10**6, -(2**62), 2**62)}
    with warnings.catch_warnings(action="ignore"):  # torch's, that the imaginary part is left out
        casts = {str(dtype): own.to(dtype) for dtype in DTYPES}
    flat = own.reshape(-1)
    shapes = {"flat": flat, "shorter": flat[:-1], "empty": flat[:0], "scalar": own.new_zeros(()), "more": own[None]}
    return filled | casts | shapes | {"transposed": own.mT if own.dim() > 1 else own, "sparse": own.to_sparse()}


@pytest.mark.parametrize("operator", TYPICAL)
def test_whatever_stands_in_the_place_of_a_result_is_judged(operator: str) -> None:
    call = last_call(operator, TYPICAL)
    assert (sound := check(call)) is None or sound.used <= 1.0
    for place, own in enumerate(call.results):
        for name, other in replaced(own).items():
            results = (*call.results[:place], other, *call.results[place + 1 :])
            found = check(replace(call, results=results))
            of_form = (other.dtype, other.shape, other.layout) == (own.dtype, own.shape, own.layout)
            alike = of_form and torch.equal(other, own)
            # Handed to its own backward pass and no one else.
            of_its_own = operator in ("layer norm", "native_batch_norm", "attention") and place > 0
            assert alike or of_its_own or (found is not None and found.used > 1.0), (operator, place, name)


NAMING = ["topk", "sort", "max with places", "min with places, kept", "argmax", "argmin of all", "max_pool"]


@pytest.mark.parametrize("operator", NAMING)
def test_an_index_that_points_at_nothing_is_a_wrong_integer_and_one_at_another_number_is_wrong(operator: str) -> None:
    call = last_call(operator, TYPICAL)
    indices = call.results[-1]
    for value in (-1, 10**6):
        beyond = indices.clone()
        beyond.view(-1)[-1] = value
        found = check(replace(call, results=(*call.results[:-1], beyond)))
        assert found is not None and has_wrong_integers(found) and found.found == value
    other = indices.clone()
    if operator in ("topk", "sort"):  # which name each element once
        other[..., [0, 1]] = other[..., [1, 0]]
    else:
        other.view(-1)[0] = (other.view(-1)[0] + 1) % 4
    found = check(replace(call, results=(*call.results[:-1], other)))
    assert found is not None and not has_wrong_integers(found) and found.used > 1.0


def test_of_equal_numbers_any_may_be_named() -> None:
    x = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    call = calls_of(lambda: x.argmax(1))[-1]
    assert max(used(with_first(call, torch.tensor([3]))).values()) <= 1.0
    assert max(used(with_first(call, torch.tensor([2]))).values()) > 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_indices_of_another_kind_are_of_another_form(dtype: torch.dtype) -> None:
    call = last_call("topk")
    found = check(replace(call, results=(call.results[0], call.results[1].to(dtype))))
    assert found is not None
    assert wrong_form_words(found) == f"[4, 2] in {str(dtype).removeprefix('torch.')} where torch gives [4, 2] in int64"


def test_a_result_of_another_form_rules_its_use_out() -> None:
    call = last_call("mm")
    found = check(with_first(call, call.results[0].mT))
    assert isinstance(found, OperatorCheck) and found.used > 1.0
    (forward, *_) = judge_operators([found], Recording())
    assert (forward.outcome, forward.rules_out) == ("failed", "infer")
    assert "[5, 4] in float32 where torch gives [4, 5] in float32" in forward.summary


# ---- large and infinite numbers

LARGE = st.sampled_from([MOST, -MOST, 3e38, -3e38, 1e30, math.inf, -math.inf, math.nan, 0.0, 1.0, -0.7])
PAIRS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "sub": lambda a, b: a - b,
    "add": lambda a, b: a + b,
    "lerp": lambda a, b: torch.lerp(a, b, 0.5),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b, value=0.5),
    "mul": lambda a, b: a * b,
    "mm": lambda a, b: a.view(1, -1) @ b.view(-1, 1),
    "sum": lambda a, b: torch.cat((a, b)).sum(),
    "mean": lambda a, b: torch.stack((a, b)).mean(0),
    "norm": lambda a, b: torch.linalg.vector_norm(torch.stack((a, b)), dim=0),
    "softmax": lambda a, b: torch.stack((a, b), dim=1).softmax(-1),
    "log_softmax": lambda a, b: torch.stack((a, b)).log_softmax(0),
    "logcumsumexp": lambda a, b: torch.stack((a, b)).logcumsumexp(0),
    "silu": lambda a, b: F.silu(a),
    "softplus": lambda a, b: F.softplus(a),
    "cat": lambda a, b: torch.cat((a, b)),
}


@pytest.mark.parametrize("operator", PAIRS)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(LARGE, LARGE), min_size=3, max_size=9),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_large_and_infinite_numbers_make_no_sound_operator_wrong(
    operator: str, pairs: list[tuple[float, float]], dtype: torch.dtype
) -> None:
    a, b = (torch.tensor(numbers, dtype=torch.float64).to(dtype) for numbers in zip(*pairs, strict=True))
    for call in calls_of(lambda: PAIRS[operator](a, b)):
        found = check(call)
        assert found is None or found.used <= 1.0, (call.place.operator, found.measures)


@pytest.mark.parametrize("operator", ["logcumsumexp", "softplus", "sub", "lerp", "log_softmax"])
def test_an_infinity_in_its_results_hides_no_wrong_number(operator: str) -> None:
    a, b = random(8).clone(), random(8, seed=1).clone()
    a[0] = b[0] = -math.inf
    if operator != "logcumsumexp":  # without a rule of its own: all of its elements are allowed what the largest is
        b[1] = MOST
    call = [call for call in calls_of(lambda: PAIRS[operator](a, b)) if check(call) is not None][-1]
    assert max(used(call).values()) <= 1.0
    found = call.results[0].clone()
    found.view(-1)[7] += 0.05 * found.view(-1)[7].abs() + 1.0
    assert max(used(with_first(call, found)).values()) > 1.0
    found.view(-1)[7] = math.nan
    assert used(with_first(call, found))["not finite on one side"] > 1.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_measure_that_is_no_finite_number_is_beyond_its_bound(value: float) -> None:
    assert Measure(name="it", value=value, bound=1.0, reason="none").used == math.inf
