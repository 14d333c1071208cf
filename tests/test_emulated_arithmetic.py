"""The arithmetic of emulated chips, by value: products, rounding, overflow, subnormals, sums, functions."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from beringia.chips.arithmetic.products import Products
from beringia.chips.arithmetic.profile import Direction, Profile, Reduction, read_profile
from beringia.chips.arithmetic.reductions import Reduce
from beringia.chips.arithmetic.rounding import flush_subnormals_, perturb_, round_fraction_, saturate_
from beringia.chips.emulated import EmulatedChip, kernels

aten = torch.ops.aten

CHUNK = 128
"""Terms between two roundings, as the fidelity promises: stated again, so that a change of it is seen."""


def profile_with(name: str, **changes: object) -> Profile:
    """A profile of the catalogue with some groups changed, through validation."""
    document = read_profile(name).model_dump(mode="json")
    for group, values in changes.items():
        document[group] |= values
    return Profile.model_validate_json(json.dumps(document))


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- products


def cut(number: float, bits: int, *, nearest: bool) -> float:
    """Round to `bits` fraction bits with rationals: an emulation that shares nothing with the one under test."""
    if number == 0.0:
        return 0.0
    exponent = math.frexp(number)[1] - 1
    scaled = Fraction(number) / Fraction(2) ** (exponent - bits)
    whole = round(scaled) if nearest else math.trunc(scaled)
    return float(whole * Fraction(2) ** (exponent - bits))


def fast_reference(a: torch.Tensor, b: torch.Tensor, bits: int, *, nearest: bool) -> torch.Tensor:
    """`fast` in float64 and rationals: chunk sums are exact for the integers used here."""
    rows, terms, columns = a.shape[0], a.shape[1], b.shape[1]
    result = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            total = 0.0
            for start in range(0, terms, CHUNK):
                chunk = (a[i, start : start + CHUNK].double() * b[start : start + CHUNK, j].double()).sum().item()
                assert abs(chunk) < 2**24 and chunk == int(chunk)
                total = cut(total + chunk, bits, nearest=nearest)
            result[i, j] = total
    return result


def integers(*shape: int, seed: int) -> torch.Tensor:
    """Integers that bfloat16 holds exactly; mostly positive, so that sums outgrow 24 bits and rounding is visible."""
    return torch.randint(-3, 128, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(("name", "nearest"), [("h800", False), ("a100", False), ("ascend-910b", True)])
def test_a_bfloat16_product_equals_an_independent_emulation_bit_for_bit(name: str, nearest: bool) -> None:
    a, b = integers(3, 8192 + 40, seed=1), integers(8192 + 40, 4, seed=2)
    expected = fast_reference(a, b, 23, nearest=nearest)
    found = Products(read_profile(name))(a, b)
    assert torch.equal(found.double(), expected)
    exact = a.double() @ b.double()
    assert not torch.equal(expected, exact), "rounding must be visible, else this test shows nothing"


def test_the_device_s_bfloat16_product_is_that_product_rounded_once() -> None:
    a, b = integers(3, 8192, seed=1), integers(8192, 4, seed=2)
    expected = fast_reference(a, b, 23, nearest=False).float().bfloat16()
    chip = EmulatedChip("h800")
    found = a.to(chip.device) @ b.to(chip.device)
    batched = torch.bmm(a.to(chip.device).expand(2, -1, -1), b.to(chip.device).expand(2, -1, -1))
    chip.close()
    assert torch.equal(found.cpu(), expected) and torch.equal(batched.cpu()[1], expected)


def test_hopper_s_fp8_sums_keep_thirteen_bits() -> None:
    a = torch.randint(0, 9, (2, 2048), generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    b = torch.randint(0, 9, (2048, 3), generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    expected = fast_reference(a, b, 13, nearest=False)
    assert torch.equal(Products(read_profile("h800"))(a, b).double(), expected)
    assert not torch.equal(Products(read_profile("b200"))(a, b).double(), expected)


def signed_bias(name: str, terms: int) -> float:
    """mean(error * sign(exact)) / rms(error): about 0 for rounding to nearest, toward -1 for truncation."""
    a, b = seeded(64, terms, seed=1).bfloat16(), seeded(terms, 64, seed=2).bfloat16()
    exact = a.double() @ b.double()
    error = Products(read_profile(name))(a, b).double() - exact
    return ((error * exact.sign()).mean() / error.square().mean().sqrt()).item()


def test_truncating_accumulators_are_biased_toward_zero_and_rounding_ones_are_not() -> None:
    # 4096 errors of unit rms: the mean of unbiased ones has a standard error of 1/64.
    for name in ("h800", "a100", "b200"):
        assert signed_bias(name, 2048) < -0.5, name
    for name in ("ascend-910b", "mi250x"):
        assert abs(signed_bias(name, 2048)) < 5 / 64, name


def test_the_bias_of_truncation_grows_with_the_number_of_terms() -> None:
    def mean_error(terms: int) -> float:
        a, b = seeded(64, terms, seed=1).bfloat16().abs(), seeded(terms, 64, seed=2).bfloat16().abs()
        exact = a.double() @ b.double()
        return ((Products(read_profile("h800"))(a, b).double() - exact) / exact).mean().item()

    assert 4 * mean_error(1024) > mean_error(8192), "about linear in the number of roundings"
    assert mean_error(1024) < 0


def test_mi300x_rounds_its_accumulator_down_whatever_the_sign() -> None:
    # The first chunk leaves 1 + 2**-23 in the accumulator, the second brings -1024: its exponent, 10, leaves the
    # accumulator a grid of 2**(10 - 24), on which 1 + 2**-23 becomes 1 and its negative -(1 + 2**-14).
    a = torch.zeros(1, 2 * CHUNK)
    a[0, 0], a[0, 1], a[0, CHUNK] = 1.0, 2.0**-23, -1024.0
    b = torch.ones(2 * CHUNK, 1).bfloat16()
    products = Products(read_profile("mi300x"))
    assert products(a.bfloat16(), b).item() == -1023.0
    assert products(-a.bfloat16(), b).item() == 1023.0 - 2.0**-14
    symmetric = Products(read_profile("h800"))
    assert symmetric(a.bfloat16(), b).item() == -symmetric(-a.bfloat16(), b).item()


def test_mi250x_flushes_subnormal_operands_and_results() -> None:
    tiny = torch.full((1, 1), 2.0**-20, dtype=torch.float16)  # subnormal in float16, a normal number in float32
    one = torch.ones(1, 1, dtype=torch.float16)
    assert Products(read_profile("mi250x"))(tiny, one).item() == 0.0
    assert Products(read_profile("mi300x"))(tiny, one).item() == 2.0**-20
    small = torch.full((1, 1), 2.0**-70).bfloat16()
    assert Products(read_profile("mi250x"))(small, small).item() == 0.0
    assert Products(read_profile("h800"))(small, small).item() == 2.0**-140


@pytest.mark.parametrize(("format_", "rounding"), [("tfloat32", "truncate"), ("hfloat32", "half-away")])
def test_float32_products_in_a_short_format_lose_the_operands_low_bits(format_: str, rounding: str) -> None:
    name = "a100" if format_ == "tfloat32" else "ascend-910b"
    changed = profile_with(name, float32_products={"format": format_, "input_rounding": rounding})
    number = torch.full((1, 1), 1 + 2.0**-10 + 2.0**-11)
    found = Products(changed)(number, torch.ones(1, 1)).item()
    assert found == (1 + 2.0**-10 if rounding == "truncate" else 1 + 2.0**-9)
    assert Products(read_profile(name))(number, torch.ones(1, 1)).item() == number.item()


def test_a_format_without_a_unit_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Tesla V100.* has no matrix unit for torch.bfloat16"):
        Products(read_profile("v100"))(torch.ones(2, 2).bfloat16(), torch.ones(2, 2).bfloat16())
    with pytest.raises(RuntimeError, match="no matrix unit for torch.float64"):
        Products(read_profile("ascend-910b"))(torch.ones(2, 2).double(), torch.ones(2, 2).double())


def test_every_product_of_torch_goes_through_the_unit() -> None:
    table = kernels.kernels_of(read_profile("h800"))
    products = Products(read_profile("h800"))
    a, b, c = seeded(3, 300, seed=1).bfloat16(), seeded(300, 5, seed=2).bfloat16(), seeded(5, seed=3).bfloat16()
    total = products(a, b)
    assert not torch.equal(total, a.float() @ b.float())
    vector = b[:, 0].contiguous()
    cases = {
        aten.mm.default: ((a, b), total.bfloat16()),
        aten.addmm.default: ((c, a, b), (total + c).bfloat16()),
        aten.bmm.default: ((a[None], b[None]), total[None].bfloat16()),
        aten.baddbmm.default: ((c[None, None], a[None], b[None]), (total + c)[None].bfloat16()),
        aten.mv.default: ((a, vector), products(a, vector[:, None])[:, 0].bfloat16()),
        aten.dot.default: ((a[0], vector), products(a[:1], vector[:, None])[0, 0].bfloat16()),
        aten._grouped_mm.default: (
            (a, torch.stack([b, b + 1]), torch.tensor([1, 3], dtype=torch.int32)),
            torch.cat([products(a[:1], b), products(a[1:], b + 1)]).bfloat16(),
        ),
    }
    for operator, (arguments, expected) in cases.items():
        assert torch.equal(table[operator](*arguments), expected), operator


# ---- rounding and what else happens to bits


@pytest.mark.parametrize("direction", ["truncate", "floor", "nearest-even", "half-away"])
@example(1 + 2.0**-8, 7).via("a tie, even below")
@example(-1 - 3 * 2.0**-8, 7).via("a tie, even above")
@given(st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 2.0**-100), st.integers(1, 22))
def test_rounding_equals_rational_arithmetic(direction: Direction, number: float, bits: int) -> None:
    exponent = math.frexp(number)[1] - 1
    scaled = Fraction(number) / Fraction(2) ** (exponent - bits)
    away = math.floor(abs(scaled) + Fraction(1, 2)) * (1 if scaled >= 0 else -1)
    whole = {
        "truncate": math.trunc(scaled),
        "floor": math.floor(scaled),
        "nearest-even": round(scaled),
        "half-away": away,
    }[direction]
    expected = float(whole * Fraction(2) ** (exponent - bits))
    for dtype in (torch.float32, torch.float64):
        found = round_fraction_(torch.tensor([number], dtype=dtype), bits, direction)
        assert found.item() == expected


@pytest.mark.parametrize("direction", ["truncate", "floor", "nearest-even", "half-away"])
def test_rounding_leaves_infinities_and_nan(direction: Direction) -> None:
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])
    found = round_fraction_(special.clone(), 10, direction)
    assert found[0] == math.inf and found[1] == -math.inf and found[2].isnan()
    assert torch.equal(found[3:].signbit(), torch.tensor([False, True]))


def test_casts_follow_the_profile_s_rounding() -> None:
    between = torch.tensor([1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -(1 + 2.0**-8)])  # half a step of bfloat16, and above
    results = {}
    for rounding in ("nearest-even", "truncate", "half-away", "floor"):
        cast = kernels.Cast(profile_with("h800", casts={"rounding": rounding}))
        results[rounding] = cast(between, torch.bfloat16).tolist()
    step = 1 + 2.0**-7
    assert results == {
        "nearest-even": [1.0, step, -1.0],
        "truncate": [1.0, 1.0, -1.0],
        "half-away": [step, step, -step],
        "floor": [1.0, 1.0, -step],
    }


def test_a_saturating_chip_has_no_infinities_and_no_nan() -> None:
    chip = EmulatedChip("ascend-910a")
    half = torch.tensor([12.0, -1.0, 70.0], dtype=torch.float16, device=chip.device)
    assert half.exp().tolist() == pytest.approx([65504.0, math.exp(-1.0), 65504.0], rel=2**-10)
    assert half.sqrt()[1].item() == 0.0
    product = torch.full((1, 4), 300.0, dtype=torch.float16, device=chip.device)
    assert (product @ product.t()).item() == 65504.0
    hidden = torch.zeros(2, device=chip.device).masked_fill_(torch.tensor([True, False], device=chip.device), -math.inf)
    assert hidden[0].item() == -math.inf, "a mask is stored, not computed"
    assert hidden.softmax(0).tolist() == [0.0, 1.0]
    chip.close()
    ieee = EmulatedChip("ascend-910b")
    assert torch.tensor([12.0], dtype=torch.float16, device=ieee.device).exp().item() == math.inf
    ieee.close()
    assert saturate_(torch.tensor([math.inf, -math.inf, math.nan, 1.0])).tolist() == [
        torch.finfo(torch.float32).max,
        torch.finfo(torch.float32).min,
        0.0,
        1.0,
    ]


def test_flushing_keeps_signs_normal_numbers_and_nan() -> None:
    numbers = torch.tensor([1e-40, -1e-40, 2.0**-126, -1.0, math.nan, math.inf])
    flushed = flush_subnormals_(numbers.clone())
    assert flushed[:4].tolist() == [0.0, -0.0, 2.0**-126, -1.0] and flushed[1].signbit()
    assert flushed[4].isnan() and flushed[5] == math.inf


# ---- elementary functions


def ulps_between(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return found.view(torch.int32).long() - expected.view(torch.int32).long()


@pytest.mark.parametrize("ulps", [1, 2, 5])
def test_the_error_of_a_function_stays_within_its_ulps_and_reaches_them(ulps: int) -> None:
    argument = seeded(20_000)
    expected = torch.exp(argument)
    distance = ulps_between(perturb_(expected.clone(), argument, ulps), expected)
    counts = torch.bincount(distance + ulps, minlength=2 * ulps + 1)
    assert len(counts) == 2 * ulps + 1
    # Each of the 2 ulps + 1 distances is equally likely; 6 standard deviations of a binomial count.
    share = 1 / (2 * ulps + 1)
    assert ((counts / 20_000 - share).abs() < 6 * math.sqrt(share / 20_000)).all()


def test_the_same_argument_has_the_same_error_wherever_it_stands() -> None:
    exp = kernels.kernels_of(read_profile("h800"))[aten.exp.default]
    argument = seeded(1000)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(exp(argument)[order], exp(argument[order]))
    assert torch.equal(exp(argument.view(10, 100).t()), exp(argument).view(10, 100).t())
    assert not torch.equal(exp(argument), torch.exp(argument))


def test_special_values_of_functions_are_exact() -> None:
    exp = kernels.kernels_of(read_profile("h800"))[aten.exp.default]
    assert exp(torch.tensor([0.0, -math.inf, math.inf])).tolist() == [1.0, 0.0, math.inf]
    assert exp(torch.tensor([math.nan])).isnan().all()
    power = kernels.kernels_of(read_profile("h800"))[aten.pow.Tensor_Scalar]
    argument = seeded(100).abs()
    assert torch.equal(power(argument, 2), argument * argument)
    assert not torch.equal(power(argument, 1.7), argument**1.7)


def test_every_emulated_function_is_near_float64() -> None:
    table = kernels.kernels_of(read_profile("ascend-910b"))
    argument = seeded(500).abs() + 0.1
    for name in ("exp", "log", "tanh", "sigmoid", "silu", "rsqrt", "erf", "sin", "log1p"):
        operator = getattr(aten, name).default
        expected = operator(argument.double())
        # The CPU's own function is within 1 ULP (SLEEF), the profile's error is 2, one ULP is at most 2**-23 relative.
        assert ((table[operator](argument).double() - expected).abs() <= 4 * 2.0**-23 * expected.abs()).all(), name


# ---- sums


def lanes_by_hand(numbers: list[float], lanes: int, serial: int) -> float:
    """The declared order with scalars: each addition rounded to float32."""

    def add(x: float, y: float) -> float:
        return torch.tensor(x + y, dtype=torch.float64).float().item()

    def tree(values: list[float]) -> float:
        width = 1 << (len(values).bit_length() - 1)
        values = [add(v, values[i + width]) if i + width < len(values) else v for i, v in enumerate(values[:width])]
        while len(values) > 1:
            half = len(values) // 2
            values = [add(values[i], values[i + half]) for i in range(half)]
        return values[0]

    if len(numbers) <= lanes:
        return tree(numbers)
    serial = min(serial, math.ceil(len(numbers) / lanes))
    padded = numbers + [0.0] * (-len(numbers) % (lanes * serial))
    sums = []
    for piece in range(0, len(padded), lanes * serial):
        for lane in range(lanes):
            terms = padded[piece + lane : piece + lanes * serial : lanes]
            total = terms[0]
            for term in terms[1:]:
                total = add(total, term)
            sums.append(total)
    return tree(sums)


@pytest.mark.parametrize("count", [1, 3, 8, 21, 64, 100])
def test_sums_add_in_the_declared_order(count: int) -> None:
    reduction = Reduction(mark="assumed", source="test", scheme="lanes", lanes=8, serial=4)
    numbers = seeded(3, count)
    expected = [lanes_by_hand(row.tolist(), 8, 4) for row in numbers]
    assert Reduce(reduction)(numbers, -1, False)[0].tolist() == expected
    assert Reduce(reduction)(numbers.t(), 0, False)[0].tolist() == expected


def test_a_sequential_sum_is_one() -> None:
    reduction = Reduction(mark="assumed", source="test", scheme="sequential")
    numbers = torch.tensor([1.0] + [2.0**-25] * 8)
    assert Reduce(reduction)(numbers, None, False)[0].item() == 1.0
    assert Reduce(reduction)(numbers.flip(0), None, False)[0].item() > 1.0


@pytest.mark.parametrize("dim", [None, 0, 1, -1, (0, 2), (1, 2), ()])
@pytest.mark.parametrize("keepdim", [False, True])
def test_sums_over_any_dimensions_are_sums(dim: int | tuple[int, ...] | None, keepdim: bool) -> None:
    table = kernels.kernels_of(read_profile("h800"))
    numbers = seeded(6, 7, 130)
    dims = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
    for operator in (aten.sum.dim_IntList, aten.mean.dim):
        expected = operator(numbers.double(), dims, keepdim)
        found = operator(numbers, dims, keepdim) if operator not in table else table[operator](numbers, dims, keepdim)
        assert found.shape == expected.shape
        # At most 11 levels of additions and one division: 12 roundings of at most sum(|x|).
        bound = 12 * 2.0**-24 * operator(numbers.double().abs(), dims, keepdim)
        assert ((found.double() - expected).abs() <= bound).all()


# ---- the device


@pytest.mark.parametrize("name", ["h800", "ascend-910b", "mi300x", "mi250x"])
def test_the_same_step_twice_gives_the_same_bits(name: str) -> None:
    chip = EmulatedChip(name)
    x = seeded(40, 300).bfloat16().to(chip.device).requires_grad_()
    w = seeded(300, 20, seed=1).bfloat16().to(chip.device)
    results = []
    for _ in range(2):
        x.grad = None
        loss = torch.nn.functional.silu(x @ w).float().logsumexp(-1).mean()
        loss.backward()
        assert x.grad is not None
        results.append((loss.item(), x.grad.cpu().clone()))
    chip.close()
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
