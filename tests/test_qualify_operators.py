"""Every operator call against float64: where a call belongs, what it should have given, and how far off it may be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONFIGS, SmallSubject, calls_of, opened, watched
from torch import nn
from torch.nn import functional as F

from beringia.chips.emulated import matmul
from beringia.numerics.metrics import UNIT_ROUNDOFF, rounding_floor
from beringia.qualify.operators import parts
from beringia.qualify.operators.bounds import bound_of
from beringia.qualify.operators.check import check, refused
from beringia.qualify.operators.float64 import NotKnown, in_float64
from beringia.qualify.operators.watch import Call, NotJudged, Place, Watch, changed
from beringia.qualify.refusals import first_line
from beringia.qualify.trace import make_optimizer
from beringia.records.certificate import OperatorCheck

DEVICES = ["cpu", "emulated:exact"]
FLOAT64_AGREEMENT = 1e-12
"""Relative: two orders of a few hundred float64 operations."""


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def only_call(function: Callable[[], object], operator: str) -> Call:
    (call,) = (call for call in calls_of(function) if call.func.overloadpacket.__name__ == operator)
    return call


def judged(call: Call) -> OperatorCheck:
    found = check(call)
    assert found is not None
    return found


def with_result(call: Call, *results: torch.Tensor) -> Call:
    return replace(call, results=results)


def broken(call: Call) -> set[str]:
    """Names of the measures beyond their bounds."""
    return {measure.name for measure in judged(call).measures if measure.used > 1.0}


def optimizer_calls(fused: bool) -> list[Call]:
    """The calls on lists of an optimizer's second step, with weights of several sizes."""
    weights = [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(5, 7), (3,), (11, 2)])]
    optimizer = make_optimizer(nn.ParameterList(weights), fused=fused)

    def step() -> None:
        for weight in weights:
            weight.grad = random(*weight.shape, seed=9)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    calls: list[Call] = []

    def take(call: Call) -> None:
        # Copies: on the CPU the arguments are the optimizer's own tensors, which the next call changes.
        args, results = (changed(value, torch.clone) for value in (call.args, call.results))
        calls.append(replace(call, args=args, results=results))

    step()
    with Watch(nn.Identity(), torch.device("cpu"), take):
        step()
    return [call for call in calls if call.place.operator.startswith(("aten._foreach_", "aten._fused_"))]


# ---- where a call belongs


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


class Function(nn.Module):
    """A custom autograd function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x)


class Chain(nn.Module):
    """Modules with products of different shapes; `inner` is used twice, each time with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.doubled = Function(Doubled)
        self.inner = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Tanh())
        self.last = nn.Linear(5, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.inner(self.doubled(self.first(x)))))


def places(calls: list[Call], direction: str, *operators: str) -> list[tuple[Any, ...]]:
    """Module, operator, ordinal and first result's shape of these operators' calls."""
    return [
        (c.place.module, c.place.operator.split(".")[1], c.place.ordinal, tuple(c.results[0].shape))
        for c in calls
        if c.place.direction == direction and c.place.operator.split(".")[1] in operators
    ]


def chain_step(device: str) -> list[Call]:
    """A training step of the chain."""
    calls: list[Call] = []
    with opened(device) as chip:
        model = Chain().to(chip.device)
        x = torch.ones(2, 3).to(chip.device)
        optimizer = make_optimizer(model, fused=chip.capabilities.fused_optimizer)
        with Watch(model, chip.device, calls.append) as watch:
            model(x).sum().backward()
            with watch.direction("optimizer"):
                optimizer.step()
    return calls


@pytest.mark.parametrize("device", DEVICES)
def test_products_of_both_passes_belong_to_the_module_that_made_them(device: str) -> None:
    calls = chain_step(device)
    assert places(calls, "forward", "addmm", "mm") == [
        ("first", "addmm", 0, (2, 5)),
        ("inner.0", "mm", 0, (2, 5)),
        ("inner.0", "mm", 1, (2, 5)),
        ("last", "mm", 0, (2, 7)),
    ]
    backward = places(calls, "backward", "addmm", "mm")
    assert [place[0] for place in backward] == ["last"] * 2 + ["inner.0"] * 4 + ["first"]
    by_module: dict[str, list[tuple[int, ...]]] = {}
    for module, _, ordinal, shape in backward:
        assert ordinal == len(by_module.setdefault(module, []))
        by_module[module].append(shape)
    assert sorted(by_module["last"]) == [(2, 5), (7, 5)]
    assert sorted(by_module["inner.0"]) == [(2, 5), (2, 5), (5, 5), (5, 5)]
    assert by_module["first"] == [(5, 3)]


@pytest.mark.parametrize("device", DEVICES)
def test_the_backward_of_a_custom_function_belongs_to_the_module_that_applied_it(device: str) -> None:
    calls = chain_step(device)
    (forward,) = (call.place for call in calls if call.place.module == "doubled" and call.place.direction == "forward")
    (backward,) = (
        call.place for call in calls if call.place.module == "doubled" and call.place.direction == "backward"
    )
    assert forward.operator == backward.operator == "aten.mul.Tensor"


@pytest.mark.parametrize("device", DEVICES)
def test_the_addition_of_two_gradients_belongs_to_the_module_of_the_parameter(device: str) -> None:
    assert places(chain_step(device), "backward", "add") == [("inner.0", "add", 0, (5, 5))]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_added_to_those_of_an_earlier_pass_belong_to_the_module_of_the_parameter(device: str) -> None:
    calls: list[Call] = []
    with opened(device) as chip:
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7)).to(chip.device)
        x = torch.ones(2, 3).to(chip.device)
        model(x).sum().backward()
        with Watch(model, chip.device, calls.append):
            model(x).sum().backward()
    added = {place[0::3] for place in places(calls, "backward", "add", "add_")}
    assert added == {("0", (5, 3)), ("0", (5,)), ("1", (7, 5)), ("1", (7,))}


def test_calls_of_an_optimizer_are_named_after_the_parameter_or_its_gradient() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(3, 4, bias=False)})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    calls: list[Call] = []
    with Watch(model, torch.device("cpu"), calls.append) as watch, watch.direction("optimizer"), torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(0.5)
            parameter.add_(parameter.grad, alpha=-1.0)
        torch.ones(2) * 2
    assert [(call.place.module, call.place.operator) for call in calls] == [
        ("a.weight", "aten.mul_.Tensor"),
        ("a.weight", "aten.add_.Tensor"),
        ("b.weight", "aten.mul_.Tensor"),
        ("b.weight", "aten.add_.Tensor"),
        ("", "aten.ones.default"),
        ("", "aten.mul.Tensor"),
    ]


def test_a_tensor_in_the_place_of_a_freed_gradient_does_not_get_its_name() -> None:
    model = nn.Linear(2, 3)
    calls: list[Call] = []
    with Watch(model, torch.device("cpu"), calls.append) as watch:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with watch.direction("optimizer"), torch.no_grad():
            model.zero_grad(set_to_none=True)
            fresh = [torch.ones(3, 2) for _ in range(200)]
            for tensor in fresh:
                tensor.mul_(2)
    assert {call.place.module for call in calls if call.place.direction == "optimizer"} == {""}


def test_positions_count_all_calls_in_the_order_of_execution() -> None:
    calls = chain_step("emulated:exact")
    assert [call.place.position for call in calls] == list(range(len(calls)))
    directions = [call.place.direction for call in calls]
    assert directions == sorted(directions, key=["forward", "backward", "optimizer"].index)


def test_hooks_leave_the_model_with_the_watch_and_numbers_do_not_change() -> None:
    model, x = Chain(), torch.ones(2, 3)
    before = model(x)
    with Watch(model, torch.device("cpu"), lambda call: None):
        inside = model(x)
    assert torch.equal(before, inside)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_call_holds_the_arguments_of_before_and_the_results_of_after() -> None:
    x = torch.tensor([1.0, 2.0])
    (call,) = calls_of(lambda: x.add_(3.0))
    assert call.args[0].tolist() == [1.0, 2.0] and [t.tolist() for t in call.results] == [[4.0, 5.0]]


# ---- what the chip does not have


class ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return F.conv1d(gradient, torch.ones(4, 4, 1).to(gradient.device))


@pytest.mark.parametrize(
    ("module", "direction", "shapes"),
    [
        (nn.Conv1d(4, 4, 1), "forward", ((2, 4, 6), (4, 4, 1), (4,))),
        (Function(ConvolutionBackward), "backward", ((2, 4, 6), (4, 4, 1))),
    ],
)
def test_an_operator_that_the_chip_lacks_is_a_finding_in_its_module(
    module: nn.Module, direction: str, shapes: tuple[Any, ...]
) -> None:
    with opened("emulated:h800") as chip:
        model = nn.Sequential(nn.Linear(6, 6), module).to(chip.device)
        watch = Watch(model, chip.device, lambda call: None)
        with pytest.raises(NotImplementedError), watch:
            model(torch.ones(2, 4, 6).to(chip.device)).sum().backward()
    assert watch.refused is not None
    found = refused(watch.refused)
    assert (found.module, found.operator, found.direction) == ("1", "aten.convolution.default", direction)
    assert found.shapes == shapes and "not emulated" in found.refused and found.used == float("inf")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_error_of_the_judge_comes_out_of_the_watch_and_is_none_of_those_that_a_chip_raises(
    device: str, direction: str
) -> None:
    def take(call: Call) -> None:
        if call.place.direction == direction:
            raise RuntimeError("the judge's own")

    with opened(device) as chip:
        model = nn.Linear(3, 2).to(chip.device)
        with pytest.raises(NotJudged, match="the judge's own"), Watch(model, chip.device, take):
            model(torch.ones(4, 3).to(chip.device)).sum().backward()


# ---- what a call should have given


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"mask": "additive"},
    "truth mask": {"mask": "truth"},
    "scaled": {"scale": 0.3},
    "grouped heads": {"enable_gqa": True, "is_causal": True},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_in_float64_is_what_autograd_gives_in_float64(device: str, case: str) -> None:
    options = dict(ATTENTION[case])
    groups = 2 if options.get("enable_gqa") else 4
    kind = options.pop("mask", None)
    if kind == "additive":
        options["attn_mask"] = random(2, 4, 6, 9, seed=5)
    if kind == "truth":
        options["attn_mask"] = torch.ones(6, 9, dtype=torch.bool).tril(2)
    keys = 6 if options.get("is_causal") else 9
    inputs = random(2, 4, 6, 8), random(2, groups, keys, 8, seed=1), random(2, groups, keys, 8, seed=2)
    gradient = random(2, 4, 6, 8, seed=3)

    def attention(where: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        q, k, v = (tensor.to(where, dtype, copy=True).requires_grad_() for tensor in inputs)
        given = {
            name: value.to(where, dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in options.items()
        }
        out = F.scaled_dot_product_attention(q, k, v, **given)
        out.backward(gradient.to(where, dtype))
        assert q.grad is not None and k.grad is not None and v.grad is not None
        return out.detach(), q.grad, k.grad, v.grad

    with opened(device) as chip:
        calls = calls_of(lambda: attention(chip.device, torch.float32), device=chip.device.type)
    forward, backward = (call for call in calls if "attention" in call.place.operator)
    exact = attention(torch.device("cpu"), torch.float64)
    found = (in_float64(forward)[0], *in_float64(backward))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float64 and one.shape == other.shape
        assert (one - other).norm() <= FLOAT64_AGREEMENT * other.norm()
    assert judged(forward).used <= 1.0 and judged(backward).used <= 1.0


def test_an_operator_in_float64_is_the_operator_of_the_arguments_in_float64() -> None:
    a, b = random(3, 40, dtype=torch.bfloat16), random(40, 5, seed=1, dtype=torch.bfloat16)
    call = only_call(lambda: a @ b, "mm")
    (exact,) = in_float64(call)
    assert torch.equal(exact, a.double() @ b.double())


def test_what_an_operator_writes_in_place_is_judged_and_what_it_only_reads_is_not() -> None:
    x, y = random(6), random(6, seed=1)
    expected = x.double() + 2.0 * y.double()
    call = only_call(lambda: x.add_(y, alpha=2.0), "add_")
    (exact,) = in_float64(call)
    assert torch.equal(exact, expected) and judged(call).used <= 1.0
    assert broken(with_result(call, call.results[0] * 1.5)) >= {"worst element"}


def test_random_draws_are_not_judged() -> None:
    (call,) = (call for call in calls_of(lambda: torch.randn(4)) if "randn" in call.place.operator)
    with pytest.raises(NotKnown, match="random"):
        check(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "moves",
    [
        lambda x: x.fill_(0.1),
        lambda x: x.masked_fill(x > 0, 0.1),
        lambda x: x.clamp(min=0.1),
        lambda x: torch.full((3,), 0.1, dtype=x.dtype),
        lambda x: F.pad(x, (1, 1), value=0.1),
    ],
)
def test_a_constant_that_the_dtype_does_not_have_may_be_rounded(dtype: torch.dtype, moves: Any) -> None:
    x = random(20, dtype=dtype)
    checks: list[OperatorCheck | None] = []
    with Watch(nn.Identity(), torch.device("cpu"), lambda call: checks.append(check(call))):
        moves(x)
    assert checks and all(found is None or found.used == 0.0 for found in checks)


# ---- sound chips are within the bounds

SOUND = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    ("emulated:h800", torch.bfloat16),
    ("emulated:mi300x", torch.bfloat16),
    ("emulated:a100", torch.bfloat16),
    ("emulated:v100", torch.float16),
    ("emulated:ascend-910b", torch.bfloat16),
    ("emulated:h800@exact", torch.bfloat16),
]
QUICK = {
    ("cpu", torch.float32, "deepseek_v3"),
    ("cpu", torch.bfloat16, "qwen2"),
    ("emulated:h800", torch.bfloat16, "qwen3"),
    ("emulated:ascend-910b", torch.bfloat16, "deepseek_v3"),
    ("emulated:v100", torch.float16, "llama"),
}


@pytest.mark.parametrize(
    ("chip", "dtype", "family"),
    [
        pytest.param(
            chip,
            dtype,
            family,
            id=f"{chip}-{str(dtype).removeprefix('torch.')}-{family}",
            marks=[] if (chip, dtype, family) in QUICK else [pytest.mark.slow],
        )
        for chip, dtype in SOUND
        for family in CONFIGS
    ],
)
def test_every_call_of_a_step_on_a_sound_chip_is_judged_and_within_its_bound(
    chip: str, dtype: torch.dtype, family: str
) -> None:
    with opened(chip) as there:
        checks = watched(SmallSubject(family), there, dtype)  # raises NotKnown where one cannot be judged
    wrong = [(found.name, found.used) for found in checks if found.used > 1.0]
    assert not wrong
    assert {found.direction for found in checks} == {"forward", "backward", "optimizer", "decode"}
    assert len(checks) > 400


def test_attention_on_the_cpu_in_bfloat16_is_within_its_bounds_where_heads_share_keys() -> None:
    """Its log-sum-exp comes from an exponential of 20 bits, and it stores each head's gradient of the keys."""
    for seed in (2, 4):
        with opened("cpu") as chip:
            checks = watched(SmallSubject("qwen2", seed=seed), chip, torch.bfloat16)
        attention = [found for found in checks if "attention" in found.operator]
        assert len(attention) == 8 and max(found.used for found in attention) <= 1.0


@given(seed=st.integers(0, 2**31), sharpness=st.floats(1.0, 30.0))
@settings(max_examples=25, deadline=None)
def test_attention_on_the_cpu_in_float16_has_no_sign_in_its_errors_however_peaked_it_is(
    seed: int, sharpness: float
) -> None:
    """Of peaked attention some results are far larger than most, and so are their roundings."""
    q, k, v = (random(4, 4, 64, 16, seed=seed + place).to(torch.float16) for place in range(3))
    v = v * torch.tensor([8.0 if row % 16 == 0 else 0.25 for row in range(64)], dtype=torch.float16)[:, None]
    calls = calls_of(lambda: F.scaled_dot_product_attention(q * sharpness, k, v, is_causal=True))
    assert not any("signed error" in broken(call) for call in calls if "attention" in call.place.operator)


# ---- what each measure sees


def product(dtype: torch.dtype) -> Call:
    a, b = random(512, 64).to(dtype), random(64, 32, seed=1).to(dtype)
    return only_call(lambda: a @ b, "mm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_element_that_is_off_by_four_roundings_is_found_and_named(dtype: torch.dtype) -> None:
    call = product(dtype)
    assert not broken(call)
    found = call.results[0].clone()
    middle = found.abs().flatten().median()
    place = divmod(int((found.abs().flatten() == middle).int().argmax()), 32)
    exact = in_float64(call)[0][place]
    found[place] = (exact * (1.0 + 4 * UNIT_ROUNDOFF[dtype])).to(dtype)
    wrong = judged(with_result(call, found))
    assert wrong.used > 1.0 and wrong.worst_element == place
    assert wrong.wrong_from == wrong.wrong_to == place and wrong.wrong_share == 1 / found.numel()
    assert wrong.found == pytest.approx(float(found[place])) and wrong.expected == pytest.approx(float(exact))
    assert {m.name for m in wrong.measures if m.used > 1.0} == {"worst element"}


def truncated(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded towards zero to bfloat16: the upper half of a float32."""
    assert dtype == torch.bfloat16
    bits = exact.float().view(torch.int32) & -65536
    return bits.view(torch.float32).to(dtype)


def test_truncation_everywhere_shows_in_the_sign_of_the_errors_and_in_no_single_element() -> None:
    call = product(torch.bfloat16)
    found = truncated(in_float64(call)[0], torch.bfloat16)
    assert broken(with_result(call, found)) >= {"signed error"}
    worst = next(m for m in judged(with_result(call, found)).measures if m.name == "worst element")
    assert worst.used <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_factor_of_one_per_cent_is_found_and_measured(dtype: torch.dtype) -> None:
    call = product(dtype)
    wrong = judged(with_result(call, (in_float64(call)[0] * 1.01).to(dtype)))
    used = {measure.name: measure.used for measure in wrong.measures}
    assert used["root mean square error"] > 1.0 and used["signed error"] > 1.0
    assert wrong.factor == pytest.approx(1.01, abs=2e-3)
    assert wrong.error == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_subnormal_results_that_became_zero_are_found_by_their_own_measure(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    x = (random(400).abs() + 0.5).to(dtype)
    call = only_call(lambda: x * (tiny / 8), "mul")
    assert not broken(call)
    flushed = torch.where(call.results[0].abs() < tiny, 0.0, call.results[0].double()).to(dtype)
    assert int((flushed == 0).sum()) > 100
    assert "small numbers lost" in broken(with_result(call, flushed))
    half = call.results[0].clone()
    half[: len(half) // 3] = 0
    assert "small numbers lost" not in broken(with_result(call, half))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_infinity_or_nan_on_one_side_only_is_found(value: float) -> None:
    call = product(torch.float32)
    found = call.results[0].clone()
    found[3, 4] = value
    wrong = judged(with_result(call, found))
    assert broken(with_result(call, found)) == {"not finite on one side"}
    assert (wrong.worst_element, wrong.found) == ((3, 4), None)
    assert wrong.expected == pytest.approx(float(call.results[0][3, 4]))
    assert wrong.wrong_from == wrong.wrong_to == (3, 4) and wrong.wrong_share == 1 / found.numel()
    x = torch.tensor([[1.0, value], [0.5, 2.0]])
    both = only_call(lambda: x * 2.0, "mul")
    assert not broken(both)
    finite = both.results[0].nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30)
    assert broken(with_result(both, finite)) == {"not finite on one side"}


def test_the_other_infinity_is_not_the_same_infinity() -> None:
    x = torch.tensor([float("inf"), 1.0])
    call = only_call(lambda: x * 2.0, "mul")
    assert broken(with_result(call, torch.tensor([-float("inf"), 2.0]))) == {"not finite on one side"}


def test_an_overflow_that_float64_has_too_is_no_fault() -> None:
    x = torch.full((4,), 3e38)
    assert not broken(only_call(lambda: x * 10.0, "mul"))
    half = torch.full((4,), 6e4, dtype=torch.float16)
    assert not broken(only_call(lambda: half * 10.0, "mul"))


def test_one_wrong_integer_is_found() -> None:
    x = torch.arange(12).view(3, 4)
    call = only_call(lambda: x.cumsum(1), "cumsum")
    assert not broken(call)
    found = call.results[0].clone()
    found[1, 2] += 1
    wrong = judged(with_result(call, found))
    assert broken(with_result(call, found)) == {"other integers"}
    assert wrong.worst_element == (1, 2) and wrong.expected == float(call.results[0][1, 2])


def test_topk_may_name_any_of_equal_values_and_nothing_else() -> None:
    x = torch.tensor([[3.0, 1.0, 3.0, 2.0]])
    call = only_call(lambda: x.topk(1), "topk")
    for index in (0, 2):
        assert not broken(with_result(call, torch.tensor([[3.0]]), torch.tensor([[index]])))
    for index in (1, 3):
        assert broken(with_result(call, torch.tensor([[3.0]]), torch.tensor([[index]])))
    assert broken(with_result(call, torch.tensor([[2.0]]), torch.tensor([[3]]))), "the second largest, consistently"
    assert broken(with_result(call, torch.tensor([[3.0]]), torch.tensor([[4]]))), "an index past the end"


@pytest.mark.parametrize("move", [lambda x: x[torch.tensor([2, 0])], lambda x: torch.cat([x, x]), lambda x: x.clone()])
def test_what_only_moves_numbers_must_keep_every_bit(move: Any) -> None:
    x = random(4, 6, dtype=torch.bfloat16)
    call = next(call for call in calls_of(lambda: move(x)) if call.results[0].is_floating_point())
    assert not broken(call)
    bits = call.results[0].clone().view(torch.int16)
    bits[1, 3] ^= 1
    wrong = judged(with_result(call, bits.view(torch.bfloat16)))
    assert wrong.used > 1.0 and wrong.worst_element == (1, 3)


def test_a_cast_may_round_once_and_not_twice() -> None:
    x = random(500, 20) * 3
    call = only_call(lambda: x.to(torch.bfloat16), "_to_copy")
    assert not broken(call)
    assert broken(with_result(call, truncated(x.double(), torch.bfloat16))) >= {"signed error"}
    found = call.results[0].clone()
    found[7, 3] *= 1 + 2.0**-6
    assert broken(with_result(call, found)) == {"worst element"}


def test_an_operator_without_a_rule_is_measured_on_the_cpu() -> None:
    x = random(6, 5).abs()
    call = only_call(lambda: x.logcumsumexp(1), "logcumsumexp")
    assert judged(call).basis.startswith("measured") and not broken(call)
    assert broken(with_result(call, call.results[0] * 1.001))


def mixed_product() -> Call:
    """As on a chip that multiplies bfloat16 with float32, which torch's own devices refuse."""
    alike = only_call(lambda: random(2, 4, 8) @ random(2, 8, 3, seed=1), "bmm")
    a, b = alike.args
    return replace(alike, args=(a.bfloat16(), b), results=((a.bfloat16().float() @ b).bfloat16(),))


def test_a_dtype_that_no_device_here_can_say_is_told_and_the_numbers_are_judged() -> None:
    call = mixed_product()
    told = judged(call)
    assert "whether its dtype is right is not known here" in told.basis and not broken(call)
    assert broken(with_result(call, call.results[0] * 1.1))


@pytest.mark.parametrize("makes_its_gradients", [False, True])
def test_the_dtypes_of_an_attention_of_mixed_arguments_are_those_of_what_it_is_about(makes_its_gradients: bool) -> None:
    q, k, v = (random(1, 2, 5, 8, seed=seed, dtype=torch.bfloat16).requires_grad_() for seed in range(3))
    mask = torch.zeros(5, 5, dtype=torch.bfloat16)
    calls = calls_of(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward())
    wanted = "attention_for_cpu_backward" if makes_its_gradients else "attention_for_cpu"
    call = next(call for call in calls if call.func.overloadpacket.__name__.endswith(wanted))
    wider = tuple(one.float() if getattr(one, "shape", None) == mask.shape else one for one in call.args)
    mixed = replace(call, args=wider)
    assert not broken(mixed)
    first, *others = call.results
    assert broken(replace(mixed, results=(first.float(), *others))) >= {"results of another form"}


def test_an_operator_that_the_cpu_refuses_in_float64_is_not_judged_and_says_why() -> None:
    a, b = random(16, 32).to(torch.float8_e4m3fn), random(32, 16, seed=1).to(torch.float8_e4m3fn)
    one = torch.ones(())
    call = Call(
        Place("", "aten._scaled_mm.default", "forward", 0, 0),
        torch.ops.aten._scaled_mm.default,
        (a, b, one, one),
        {"out_dtype": torch.bfloat16},
        ((a.float() @ b.float()).bfloat16(),),
    )
    with pytest.raises(NotKnown, match="^ValueError: "):
        check(call)


def test_a_refusal_without_words_is_told_by_its_kind() -> None:
    assert first_line(NotImplementedError()) == "NotImplementedError: "
    assert first_line(RuntimeError("\n no kernel\nand more")) == "RuntimeError: no kernel"


# ---- products, whatever the numbers

_SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 6))


@st.composite
def products(draw: st.DrawFn) -> Call:
    """A product of wide exponents, some of whose terms cancel."""
    rows, terms, columns = draw(_SHAPES)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    spread = draw(st.sampled_from([0, 4, 15]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def drawn(*shape: int) -> torch.Tensor:
        exponents = torch.randint(-spread, spread + 1, shape, generator=generator)
        return torch.ldexp(torch.randn(shape, generator=generator), exponents).to(dtype)

    a, b = drawn(rows, terms), drawn(terms, columns)
    if draw(st.booleans()):
        half = terms // 2
        a[:, half : 2 * half] = a[:, :half]
        b[half : 2 * half] = -b[:half]
    return only_call(lambda: a @ b, "mm")


@settings(max_examples=150)
@given(products())
def test_a_product_of_the_cpu_is_within_its_bound_in_every_element(call: Call) -> None:
    used = {measure.name: measure.used for measure in judged(call).measures}
    assert used["worst element"] <= 1.0 and used["not finite on one side"] == 0.0


@settings(max_examples=25)
@given(st.sampled_from(["v100", "a100", "h800", "mi300x"]), st.integers(1, 700), st.booleans(), st.integers(0, 2**32))
def test_a_product_of_a_published_unit_is_within_its_bound_in_every_element(
    unit: str, terms: int, one_sign: bool, seed: int
) -> None:
    """Bit for bit as the unit computes: of one sign, what it cuts from every block adds up."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(3, terms, generator=generator), torch.randn(terms, 3, generator=generator)
    a, b = (a.abs(), b.abs()) if one_sign else (a, b)
    a, b = a.half(), b.half()
    call = only_call(lambda: a @ b, "mm")
    used = {measure.name: measure.used for measure in judged(with_result(call, matmul(a, b, unit=unit))).measures}
    assert used["worst element"] <= 1.0 and used["root mean square error"] <= 1.0


# ---- sums by index


def _sum_by_index(name: str, rows_MD: torch.Tensor, places_M: torch.Tensor) -> torch.Tensor:
    """Rows added up in eight places, as an operator of that name does it."""
    width = rows_MD.shape[1]
    into = torch.zeros(8, width, dtype=rows_MD.dtype)
    if name == "embedding_dense_backward":
        return torch.ops.aten.embedding_dense_backward(rows_MD, places_M, 8, -1, False)
    if name == "index_add":
        return into.index_add(0, places_M, rows_MD, alpha=-3)
    if name == "scatter_add":
        return into.scatter_add(0, places_M[:, None].expand(-1, width), rows_MD)
    return into.index_put((places_M,), rows_MD, accumulate=True)


BY_INDEX = ["embedding_dense_backward", "index_add", "scatter_add", "index_put"]


@pytest.mark.parametrize("name", BY_INDEX)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(seed=st.integers(0, 2**31), count=st.integers(1, 400), mean=st.sampled_from([0.0, 0.3, 3.0]))
@settings(max_examples=15, deadline=None)
def test_rows_that_meet_in_one_place_may_be_added_in_their_own_dtype(
    name: str, dtype: torch.dtype, seed: int, count: int, mean: float
) -> None:
    rows_MD = (random(count, 48, seed=seed) + mean).to(dtype)
    places_M = torch.randint(0, 8, (count,), generator=torch.Generator().manual_seed(seed)).clamp_max(5)
    assert not broken(only_call(lambda: _sum_by_index(name, rows_MD, places_M), name))


@pytest.mark.parametrize("name", BY_INDEX)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_that_is_missing_from_such_a_sum_is_wrong(name: str, dtype: torch.dtype) -> None:
    rows_MD, places_M = random(40, 48, dtype=dtype), torch.arange(40) % 8
    call = only_call(lambda: _sum_by_index(name, rows_MD, places_M), name)
    less = _sum_by_index(name, rows_MD.index_fill(0, torch.tensor([11]), 0.0), places_M)
    assert "root mean square error" in broken(with_result(call, less))


MASK = torch.tensor([True, False, True, True, False])
PLACES: dict[str, tuple[Any, int]] = {
    "truth values": (MASK, 1),
    "truth values of two dimensions": (MASK[:, None] & torch.tensor([True, False, True, True]), 1),
    "from the end": (torch.tensor([-1, 4, 0, -5, 4]), 3),
    "of a later dimension": ((slice(None), torch.tensor([0, -1, 3])), 2),
    "several together": ((torch.tensor([0, 1, 0, 0]), torch.tensor([1, 1, 1, -3])), 3),
    "several that are broadcast": ((torch.tensor([[0], [2]]), torch.tensor([1, 1, 3])), 2),
    "none": (torch.zeros(5, dtype=torch.bool), 0),
}
"""Ways to name places in five rows of four, and how often the commonest is named."""


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_places_are_counted_however_they_are_named(name: str, dtype: torch.dtype) -> None:
    places, hits = PLACES[name]

    def taken() -> None:
        random(5, 4, dtype=dtype).requires_grad_()[places].sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch

    call = only_call(taken, "index_put")
    assert bound_of(call, in_float64(call)).terms == hits + 1
    assert not broken(call)
    if hits:
        assert "worst element" in broken(with_result(call, call.results[0] * 1.02))


@pytest.mark.parametrize("name", PLACES)
def test_a_write_to_places_is_judged_however_they_are_named(name: str) -> None:
    places, _ = PLACES[name]

    def written() -> None:
        random(5, 4).clone()[places] = 0.1

    call = only_call(written, "index_put_")
    assert not broken(call)
    assert "worst element" in broken(with_result(call, call.results[0].roll(1, 0)))


def test_a_mean_by_index_has_as_many_terms_as_its_sum() -> None:
    into, rows, places = random(4), random(9), torch.tensor([0, 1, 1, 2, 1, 1, 0, 3, 3])
    for include_self in (True, False):
        call = only_call(
            lambda own=include_self: into.scatter_reduce(0, places, rows, "mean", include_self=own), "scatter_reduce"
        )
        assert bound_of(call, in_float64(call)).terms == 4 + include_self
        assert not broken(call)


@pytest.mark.parametrize("name", ["sum", "mean"])
@given(seed=st.integers(0, 2**31), terms=st.integers(2, 600), left=st.sampled_from([0.0, 1e-7, 1e-4]))
@settings(max_examples=25, deadline=None)
def test_a_sum_whose_terms_cancel_may_be_off_by_what_adding_them_costs(
    name: str, seed: int, terms: int, left: float
) -> None:
    rows_MN = random(48, terms, seed=seed)
    rows_MN[:, -1] = left - rows_MN[:, :-1].double().sum(1)
    call = only_call(lambda: getattr(rows_MN, name)(1), name)
    backwards = getattr(rows_MN.flip(1), name)(1)
    assert not broken(call) and not broken(with_result(call, backwards))


def test_a_term_that_is_missing_from_a_sum_that_cancels_is_wrong() -> None:
    rows_MN = random(48, 128)
    rows_MN[:, -1] = 1e-4 - rows_MN[:, :-1].double().sum(1)
    call = only_call(lambda: rows_MN.sum(1), "sum")
    assert "root mean square error" in broken(with_result(call, rows_MN[:, 1:].sum(1)))


# ---- calls on lists


@pytest.mark.parametrize("fused", [True, False])
def test_a_call_on_lists_is_judged_alike_in_one_piece_and_in_parts(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A norm's bound goes by the longest sum of its part, so it is not the same.
    calls = [call for call in optimizer_calls(fused) if "_foreach_norm" not in call.place.operator]
    whole = [check(call) for call in calls]
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    assert {len(list(parts.in_parts(call))) for call in calls} == {5 + 3 + 11}  # rows of the three weights
    for call, one_piece in zip(calls, whole, strict=True):
        found = check(call)
        assert found is not None and one_piece is not None
        worst, value = ([m for m in c.measures if m.name == "worst element"][0] for c in (found, one_piece))
        assert (worst, found.worst_element, found.found) == (value, one_piece.worst_element, one_piece.found)


@pytest.mark.parametrize("fused", [True, False])
def test_a_wrong_entry_of_a_list_is_found_in_whichever_part_it_is(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    for call in optimizer_calls(fused):
        for index, result in enumerate(call.results):
            wrong = result.clone()
            wrong.flatten()[-1] += 1.0
            results = (*call.results[:index], wrong, *call.results[index + 1 :])
            found = judged(with_result(call, *results))
            last = tuple(size - 1 for size in result.shape)
            assert found.used > 1.0 and found.worst_element == last, (call.func, index)


@pytest.mark.parametrize("fused", [True, False])
def test_a_call_on_some_entries_of_its_lists_is_judged_by_these_alone(fused: bool) -> None:
    for call in optimizer_calls(fused):
        count = parts.num_entries(call)
        for index in range(len(call.results)):
            wrong = (*call.results[:index], call.results[index] + 1.0, *call.results[index + 1 :])
            struck, entry = with_result(call, *wrong), index % count
            spared = [place for place in range(count) if place != entry]
            assert judged(parts.of_entries(struck, [entry])).used > 1.0, (call.func, index)
            assert judged(parts.of_entries(struck, spared)).used <= 1.0, (call.func, index)


@settings(max_examples=150)
@given(products(), st.data())
def test_an_element_of_a_product_beyond_its_bound_is_found_where_it_is(call: Call, data: st.DataObject) -> None:
    (exact,) = in_float64(call)
    allowed = bound_of(call, (exact,)).allowed[0]
    found = call.results[0].clone()
    place = tuple(data.draw(st.integers(0, size - 1)) for size in found.shape)
    sign = data.draw(st.sampled_from([-1.0, 1.0]))
    limit = allowed[place] + rounding_floor(found.dtype) * exact[place].abs()
    # Half a bound more than the bound, and what its own rounding may take away.
    moved = exact[place] + sign * 1.5 * limit
    found[place] = (moved + sign * rounding_floor(found.dtype) * moved.abs()).to(found.dtype)
    wrong = judged(with_result(call, found))
    assert wrong.worst_element == place and wrong.wrong_from == wrong.wrong_to == place
    assert {m.name for m in wrong.measures if m.used > 1.0} >= {"worst element"}


# ---- numbers beside tensors

NUMBERS = st.one_of(
    st.floats(-1e4, 1e4, allow_subnormal=False), st.integers(-1000, 1000), st.sampled_from([0, -1, 1.0, -1e-3, 0.5])
)
drawn = functools.cache(random)


WITH_NUMBERS: dict[str, Callable[[Any, Any], torch.Tensor]] = {
    "addmm": lambda a, b: torch.addmm(drawn(6, 5), drawn(6, 8, seed=1), drawn(8, 5, seed=2), alpha=a, beta=b),
    "baddbmm": lambda a, b: torch.baddbmm(
        drawn(2, 6, 5), drawn(2, 6, 8, seed=1), drawn(2, 8, 5, seed=2), alpha=a, beta=b
    ),
    "addbmm": lambda a, b: torch.addbmm(drawn(6, 5), drawn(9, 6, 8, seed=1), drawn(9, 8, 5, seed=2), alpha=a, beta=b),
    "addmv": lambda a, b: torch.addmv(drawn(6), drawn(6, 8, seed=1), drawn(8, seed=2), alpha=a, beta=b),
    "add": lambda a, b: torch.add(drawn(6, 5), drawn(6, 5, seed=1), alpha=a),
    "sub": lambda a, b: torch.sub(drawn(6, 5), drawn(6, 5, seed=1), alpha=a),
    "rsub": lambda a, b: torch.rsub(drawn(6, 5), drawn(6, 5, seed=1), alpha=a),
    "addcmul": lambda a, b: torch.addcmul(drawn(6, 5), drawn(6, 5, seed=1), drawn(6, 5, seed=2), value=a),
    "addcdiv": lambda a, b: torch.addcdiv(drawn(6, 5), drawn(6, 5, seed=1), drawn(6, 5, seed=2), value=a),
    "lerp": lambda a, b: torch.lerp(drawn(6, 5), drawn(6, 5, seed=1), a),
    "mul": lambda a, b: drawn(6, 5) * a,
    "index_add": lambda a, b: torch.index_add(drawn(6, 5), 0, torch.tensor([0, 0, 3, 0]), drawn(4, 5, seed=1), alpha=a),
    "_foreach_add": lambda a, b: torch._foreach_add([drawn(3), drawn(4)], [a, b])[0],
    "_foreach_lerp": lambda a, b: torch._foreach_lerp([drawn(30), drawn(4)], [drawn(30, seed=1), drawn(4)], a)[0],
}


@pytest.mark.parametrize("operator", WITH_NUMBERS)
@given(NUMBERS, NUMBERS)
@settings(max_examples=40, deadline=None)
def test_no_number_beside_the_tensors_makes_a_sound_chip_wrong(operator: str, alpha: float, beta: float) -> None:
    """Whatever its sign and size, and a wrong product of normal numbers is found whatever they are."""
    if operator in ("index_add",) and isinstance(alpha, int):
        alpha = float(alpha)
    WITH_NUMBERS[operator](alpha, beta)  # draws its tensors: no call to be judged
    calls = [call for call in calls_of(lambda: WITH_NUMBERS[operator](alpha, beta)) if check(call) is not None]
    for call in calls:
        assert not broken(call), (call.place.operator, [(one.name, one.used) for one in judged(call).measures])
    last = calls[-1]
    size = max(float(result.abs().max()) for result in last.results)
    wrong = with_result(last, *(result + 0.01 * size for result in last.results))
    assert size < torch.finfo(torch.float32).tiny or broken(wrong)


@pytest.mark.parametrize("scale", [-3.0, -0.25, 0.0, 3.0])
def test_attention_with_any_scale_is_judged_alike(scale: float) -> None:
    q, k, v = (random(1, 2, 16, 8, seed=seed).requires_grad_() for seed in range(3))
    calls = calls_of(lambda: F.scaled_dot_product_attention(q, k, v, scale=scale).sum().backward())
    judgements = [found for call in calls if (found := check(call)) is not None]
    assert all(measure.used <= 1.0 for found in judgements for measure in found.measures)


TRUTHS = torch.tensor([[True, False, True], [False, False, True]])
OF_TRUTHS = {
    "product": lambda: TRUTHS * ~TRUTHS,
    "finite": lambda: (torch.ones(2, 3) / TRUTHS).isfinite(),
    "written": lambda: TRUTHS.clone().index_put_((torch.tensor([0]),), torch.tensor(True)),
    "any": lambda: TRUTHS.any(1),
}


@pytest.mark.parametrize("name", OF_TRUTHS)
def test_truths_are_compared_exactly(name: str) -> None:
    judged: list[OperatorCheck] = []

    def take(call: Call) -> None:
        for results in (call.results, tuple(~one if one.dtype == torch.bool else one for one in call.results)):
            found = check(replace(call, results=results))
            assert found is not None
            judged.append(found)

    with Watch(nn.Identity(), torch.device("cpu"), take):
        OF_TRUTHS[name]()
    of_truths = [one for one in judged if any("integers" in measure.name for measure in one.measures)]
    assert of_truths and {one.used > 1.0 for one in of_truths} == {False, True}
    assert not any(one.used > 1.0 for one in judged[::2])
