"""The compiled operators on NaN, infinities, subnormal and the largest numbers give what torch gives in float32 on the
same numbers.

Where terms of a sum are so large that the order decides whether it overflows, torch differs with the shape: there a
result is infinite, NaN or right, but never another number.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from beringia.engine.cache import CacheLayout
from beringia.engine.operators.compiled import Compiled
from beringia.engine.operators.in_torch import InTorch
from beringia.engine.operators.operators import Operators
from beringia.engine.places import Places
from beringia.model import preset
from beringia.model.experts import Router

UNIT = 2.0**-24
"""Relative error of one float32 rounding."""
MOST = torch.finfo(torch.float32).max
SMALLEST = 2.0**-149
LOST = 2.0**-100
"""What a term of a bfloat16 product loses at most where subnormal weights count as zeros (`compiled.c`)."""

SPECIALS = [
    *(math.nan, math.inf, -math.inf, MOST, -MOST, 3e38, 1e30, -1e30, 1.5e19),
    *(0.0, -0.0, SMALLEST, -1e-40, 1.1e-38, 2.0**-126, 1e-30),
    *(-87.0, -87.5, -88.8, -90.0, -103.9, -104.1, -200.0, 88.5, 88.8, 89.5, 104.0, 1e4, -1e4),
]
"""With the ends of the exponential's range, from where its value is subnormal, zero or infinite."""
FORMATS = st.sampled_from([torch.float32, torch.bfloat16])
PLANTS = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(SPECIALS)), max_size=4)


def drawn(*shape: int, seed: int = 0, plants: list[tuple[int, float]] | None = None) -> torch.Tensor:
    """Normal numbers with special ones among them."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for place, special in plants or ():
        numbers.view(-1)[place % numbers.numel()] = special
    return numbers


def rounded(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return numbers.to(dtype).float()


def size_of(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Sum of the sizes of a product's finite terms, in float64."""
    left, right = (part.double().nan_to_num(0, 0, 0).abs() for part in (left, right))
    return left @ right


def the_same(
    found: torch.Tensor,
    by_torch: torch.Tensor,
    allowed: torch.Tensor | float,
    undecided: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
) -> None:
    """NaN where torch has NaN, its infinities, and its numbers within `allowed`. Where the order of a sum decides:
    not finite, or `exact` within `allowed`."""
    decided = torch.ones_like(found, dtype=torch.bool) if undecided is None else ~undecided
    near = (found.double() - by_torch.double()).abs() <= allowed
    equal = torch.where(by_torch.isfinite(), near, (found == by_torch) | (found.isnan() & by_torch.isnan()))
    assert bool((equal | ~decided).all()), (found[~equal & decided], by_torch[~equal & decided])
    if exact is not None:
        right = ~found.isfinite() | ((found.double() - exact).abs() <= allowed)
        assert bool((right | decided).all()), (found[~right & ~decided], exact[~right & ~decided])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 19), st.integers(1, 40), st.integers(1, 120), FORMATS, st.booleans(), st.booleans(), *[PLANTS] * 3
)
def test_a_product_s_special_values_are_torch_s(
    rows: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    biased: bool,
    added: bool,
    in_x: list[tuple[int, float]],
    in_weight: list[tuple[int, float]],
    beside: list[tuple[int, float]],
) -> None:
    x, matrix = drawn(rows, k, plants=in_x), drawn(n, k, seed=1, plants=in_weight).to(dtype)
    bias = drawn(n, seed=2, plants=beside) if biased else None
    before = drawn(rows, n, seed=3, plants=beside) if added else None
    operators = Compiled()
    found = operators.linear(x, operators.weight(matrix), bias, None if before is None else before.clone())
    narrow, wide = rounded(x, dtype), matrix.float()
    plain = InTorch().linear(narrow, wide, bias, None if before is None else before.clone())
    more = [term.double() for term in (bias, before) if term is not None]
    size = size_of(narrow, wide.T) + sum(term.nan_to_num(0, 0, 0).abs() for term in more)
    exact = narrow.double() @ wide.double().T + sum(more)
    lost = LOST if dtype == torch.bfloat16 else SMALLEST
    the_same(found, plain, 4 * (k + 2) * (UNIT * size + lost), size >= MOST * (1 - (k + 2) * UNIT), exact)


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 13])
@pytest.mark.parametrize(("small", "large"), [(1e-39, 1e38), (1e38, 1e-39), (SMALLEST, 3e38), (2e-39, 1e10)])
def test_subnormal_numbers_count_beside_large_ones(rows: int, small: float, large: float) -> None:
    """In the middle row alone: the others are multiplied as ever."""
    x, matrix = drawn(rows, 10), drawn(100, 10, seed=1).to(torch.bfloat16)
    operators = Compiled()
    before = operators.linear(x, operators.weight(matrix))
    x[rows // 2], matrix[3] = small, large
    found = operators.linear(x, operators.weight(matrix))
    exact = rounded(x, torch.bfloat16)[rows // 2].double() @ matrix[3].double()
    assert float(found[rows // 2, 3]) == pytest.approx(float(exact), rel=1e-6, abs=10 * LOST)
    others = [row for row in range(rows) if row != rows // 2]
    assert torch.equal(found[others][:, 4:], before[others][:, 4:])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 20), st.integers(1, 20), FORMATS, PLANTS, PLANTS)
def test_a_head_s_product_s_special_values_are_torch_s(
    rows: int,
    heads: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    in_x: list[tuple[int, float]],
    in_weight: list[tuple[int, float]],
) -> None:
    x, matrix = drawn(rows, heads, k, plants=in_x), drawn(heads, n, k, seed=1, plants=in_weight).to(dtype)
    operators = Compiled()
    found = operators.by_head(x, operators.weight(matrix))
    narrow, wide = rounded(x, dtype), matrix.float()
    size = size_of(narrow.transpose(0, 1), wide.mT).transpose(0, 1)
    exact = (narrow.double().transpose(0, 1) @ wide.double().mT).transpose(0, 1)
    lost = LOST if dtype == torch.bfloat16 else SMALLEST
    undecided = size >= MOST * (1 - k * UNIT)
    the_same(found, InTorch().by_head(narrow, wide), 4 * k * (UNIT * size + lost), undecided, exact)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), FORMATS, PLANTS)
def test_tokens_and_cached_rows_keep_their_special_values(
    n: int, k: int, dtype: torch.dtype, plants: list[tuple[int, float]]
) -> None:
    operators, matrix, tokens = Compiled(), drawn(n, k, plants=plants).to(dtype), torch.arange(n).flip(0)
    found = operators.embed(operators.weight(matrix), tokens)
    assert torch.allclose(found, matrix.float().flip(0), rtol=0, atol=0, equal_nan=True)
    rows, cache = drawn(n, k, plants=plants), torch.zeros(2, n, k, dtype=dtype)
    operators.keep(cache, tokens, rows)
    assert torch.allclose(cache[0].flip(0).float(), rounded(rows, dtype), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=100)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 50), PLANTS, PLANTS)
def test_a_norm_s_special_values_are_torch_s(
    rows: int, count: int, width: int, in_x: list[tuple[int, float]], in_weight: list[tuple[int, float]]
) -> None:
    x, weight = drawn(rows, count, width, plants=in_x), drawn(width, seed=1, plants=in_weight)
    found, plain = (operators.norm(x, weight, 1e-6) for operators in (Compiled(), InTorch()))
    squares = x.double().square().sum(-1, keepdim=True)
    near_the_end = ((squares / MOST - 1).abs() < 1e-4).expand_as(x)
    the_same(found, plain, 4 * (width + 4) * (UNIT * plain.double().abs() + SMALLEST), near_the_end)


@settings(max_examples=100)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 12), PLANTS)
def test_a_rotation_s_special_values_are_torch_s(
    rows: int, heads: int, half: int, plants: list[tuple[int, float]]
) -> None:
    x, angles = drawn(rows, heads, 2 * half, plants=plants), drawn(20, half, seed=1)
    rope, positions = (angles.cos(), angles.sin()), torch.arange(rows)
    found, plain = (operators.rotate(x, rope, positions, torch.empty_like(x)) for operators in (Compiled(), InTorch()))
    size = x.double().nan_to_num(0, 0, 0).abs().unflatten(-1, (2, half)).sum(-2).repeat(1, 1, 2)
    the_same(found, plain, 4 * UNIT * size + 2 * SMALLEST, size >= MOST)


@settings(max_examples=200)
@given(st.integers(1, 5), st.integers(1, 40), PLANTS)
def test_a_gate_s_special_values_are_torch_s(rows: int, width: int, plants: list[tuple[int, float]]) -> None:
    x = drawn(rows, 2 * width, plants=plants)
    found, plain = (operators.gate(x) for operators in (Compiled(), InTorch()))
    gate, up = x.double().chunk(2, -1)
    # Before it is multiplied, a subnormal may be off by its last place.
    allowed = 16 * UNIT * plain.double().abs() + 4 * SMALLEST * (1 + up.nan_to_num(0, 0, 0).abs())
    near_the_end = ((gate * gate.sigmoid() * up).abs() / MOST - 1).abs() < 16 * UNIT
    near_the_end |= (gate + 88.7228).abs() < 1e-3  # where e^-gate becomes infinite
    the_same(found, plain, allowed, near_the_end)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 6), in_x=PLANTS, in_weight=PLANTS, dtype=FORMATS)
def test_a_router_s_special_values_are_torch_s(
    kind: str, rows: int, in_x: list[tuple[int, float]], in_weight: list[tuple[int, float]], dtype: torch.dtype
) -> None:
    """All experts are chosen, so that no near tie decides anything."""
    config = preset("r2-nano")
    count = config.n_routed_experts
    every = {"num_experts_per_tok": count, "n_group": 1, "topk_group": 1, "router": kind}
    router, operators = Router(dataclasses.replace(config, **every)), Compiled()
    x, weight = drawn(rows, 12, plants=in_x), drawn(count, 12, seed=1, plants=in_weight).to(dtype)
    narrow, wide = rounded(x, dtype), weight.float()

    def dense(operators: Operators, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        chosen, weights = operators.route(x, operators.weight(weight), None, router)
        return torch.zeros(rows, count).scatter(1, chosen, weights)

    found, plain = dense(operators, x, weight), dense(InTorch(), narrow, wide)
    size = size_of(narrow, wide.T)
    logits = narrow.double() @ wide.double().T
    # Logits of 1000 are off by more than a score can be told from another by; of such a row only its NaN are compared.
    uncertain = ((size > 1e3) & (logits.abs() < 200 + size * 24 * UNIT)) | (size >= MOST * (1 - 12 * UNIT))
    uncertain |= (logits.abs() - 88.7228).abs() < 1e-2
    if kind == "softmax":
        near = (logits.max(-1, keepdim=True).values - logits).abs() < 200 + size.max(
            -1, keepdim=True
        ).values * 24 * UNIT
        uncertain |= near & (size.max(-1, keepdim=True).values > 1e3)
    skipped = uncertain.any(-1, keepdim=True).expand_as(found)
    the_same(found, plain, 1e-4 * plain.double().abs() + 1e-30, skipped)
    finite = torch.isfinite(logits) & (size < MOST * (1 - 12 * UNIT))
    assert bool(found[finite.all(-1)].isfinite().all()), "finite logits have finite scores"


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), FORMATS, PLANTS, PLANTS, PLANTS)
def test_the_experts_special_values_are_torch_s(
    rows: int,
    dtype: torch.dtype,
    in_x: list[tuple[int, float]],
    in_up: list[tuple[int, float]],
    in_down: list[tuple[int, float]],
) -> None:
    hidden, width, count, operators = 10, 6, 3, Compiled()
    x = rounded(drawn(rows, hidden, plants=in_x), dtype)
    gate_up = drawn(count, 2 * width, hidden, seed=1, plants=in_up).to(dtype)
    down = drawn(count, hidden, width, seed=2, plants=in_down).to(dtype)
    chosen, shares = torch.arange(rows)[:, None] % count, drawn(rows, 1, seed=3)
    found = operators.experts(x, chosen, shares, operators.weight(gate_up), operators.weight(down))
    for row in range(rows):
        into, back = gate_up[row % count].float(), down[row % count].float()
        both = x[row] @ into.T
        gate, up = both.chunk(2)
        gated = rounded(F.silu(gate) * up * shares[row], dtype)
        plain = gated @ back.T
        size = size_of(gated, back.T)
        # What is infinite only by the order of a sum, or by rounding, is another test's.
        terms = size_of(x[row], into.T).max()
        large = float(torch.stack((terms, terms**2, size.max())).max())
        step = 2.0**-7 if dtype == torch.bfloat16 else 1e-4
        the_same(
            found[row],
            plain,
            step * size + 1e-25 * (1 + step * size),
            torch.full_like(plain, large > 1e38, dtype=torch.bool),
        )


def one_sequence(tokens: int, rows: int, block_tokens: int) -> Places:
    """The last rows of a sequence; its blocks lie in order."""
    blocks = -(-tokens // block_tokens)
    return Places(
        ((tokens - rows, tokens),),
        block_tokens,
        token_M=torch.zeros(rows, dtype=torch.int64),
        position_M=torch.arange(tokens - rows, tokens),
        slot_M=torch.zeros(rows, dtype=torch.int64),
        sequence_M=torch.zeros(rows, dtype=torch.int64),
        table_CB=torch.arange(blocks).unsqueeze(0),
    )


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 100),
    st.sampled_from([(1, 2, 32, 16), (1, 9, 24, 10), (2, 1, 16, 16)]),
    FORMATS,
    *[PLANTS] * 3,
    st.sampled_from([0.0, MOST, -1e5, 60.0]),
)
def test_attention_s_special_values_are_torch_s(
    tokens: int,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    in_q: list[tuple[int, float]],
    in_keys: list[tuple[int, float]],
    in_values: list[tuple[int, float]],
    all_values: float,
) -> None:
    """One row, which sees all tokens; keys and values lie apart, so that each has special values of its own."""
    groups, heads, key_width, value_width = sizes
    step = key_width + value_width
    layout = CacheLayout(groups, key_width, value_width, step, key_width)
    width = groups * step
    cache = drawn(-(-tokens // 16) * 16, width, seed=6)
    for part, plants, wide in ((0, in_keys, key_width), (key_width, in_values, value_width)):
        for place, special in plants:
            cache[place % tokens, part + place // tokens % wide] = special
    if all_values:
        cache[:, key_width] = all_values
    cache = cache.to(dtype).view(-1, 16, width)
    q = drawn(1, groups * heads, key_width, seed=7, plants=in_q)
    places = one_sequence(tokens, 1, 16)
    found = Compiled().attend(q, cache, layout, places, 0.3, 0)
    seen = cache.flatten(0, 1)[:tokens].float()
    for head in range(groups * heads):
        first = head // heads * step
        k, v = seen[:, first : first + key_width], seen[:, first + key_width :][:, :value_width]
        scaled = q[0, head] * 0.3
        plain = (k @ scaled).softmax(0) @ v
        size, scores = size_of(k, scaled), k.double() @ scaled.double()
        error = 2 * key_width * UNIT * float(size.max())
        if float(size.max()) >= MOST / 2:
            continue  # the order decides whether a score is infinite
        if error > 1e-3 and bool(torch.isfinite(scores).all()):
            best = scores.topk(min(2, tokens)).values
            if tokens > 1 and best[0] - best[1] < 200 + 2 * error:
                continue  # rounding decides which of two tokens is seen
        p = scores.softmax(0)
        mean = size_of(p, v)
        allowed = 4 * (error + (key_width + tokens + 20) * UNIT) * mean + tokens * SMALLEST * (
            1 + size_of(torch.ones(tokens), v)
        )
        undecided = mean > MOST * (1 - 1e-4)
        the_same(found[0, head], plain, allowed, undecided, p @ v.double())
