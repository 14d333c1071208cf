"""Attention with any scale: a sound chip is within its bounds, a wrong one is beyond them."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import calls_of, opened
from torch.nn import functional as F

from beringia.qualify.operators.check import check
from beringia.qualify.operators.watch import Call, changed

SCALES = st.one_of(
    st.tuples(st.floats(-30, 30), st.sampled_from([-1.0, 1.0])).map(lambda drawn: drawn[1] * 10.0 ** drawn[0]),
    st.floats(-40, 40),
    st.sampled_from([0.0, -0.0, 10.0, -10.0, 100.0, 1e4, 1e8, 1e30, -1e30]),
)

SMALLEST_SCALE = 1e-37
"""Below, a scale is no normal float32, and may be 0 in a kernel."""


@functools.cache
def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention_calls(
    device: str, dtype: torch.dtype, scale: float, tokens: int = 16, width: int = 8, seed: int = 0, groups: int = 2
) -> list[Call]:
    """Forward and backward of two heads; causal with positive scales: torch's own kernel on the CPU multiplies minus
    infinity, where it hides a token, with the scale."""
    with opened(device) as chip:
        q, k, v = (
            random(1, heads, tokens, width, seed=3 * seed + number).to(dtype).to(chip.device).requires_grad_()
            for number, heads in enumerate((2, groups, groups))
        )
        gradient = random(1, 2, tokens, width, seed=3 * seed + 99).to(dtype).to(chip.device)

        def both() -> None:
            out = F.scaled_dot_product_attention(
                q, k, v, scale=scale, is_causal=scale > SMALLEST_SCALE, enable_gqa=groups == 1
            )
            out.backward(gradient)

        calls = calls_of(both, device=chip.device.type)
    return [call for call in calls if "attention" in call.place.operator]


@pytest.mark.parametrize("device", ["cpu", "emulated:h800"])
@settings(max_examples=25, deadline=None)
@given(
    SCALES,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([(1, 4), (7, 8), (16, 8), (40, 64)]),
    st.integers(0, 20),
    st.integers(1, 2),
)
def test_no_scale_makes_a_sound_chip_wrong(
    device: str, scale: float, dtype: torch.dtype, sizes: tuple[int, int], seed: int, groups: int
) -> None:
    calls = attention_calls(device, dtype, scale, *sizes, seed=seed, groups=groups)
    assert len(calls) == 2
    for call in calls:
        found = check(call)
        assert found is not None and found.used <= 1.0, (call.place.operator, found.measures if found else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [-3.0, 0.0, 0.2, 1.0, 3.0, 10.0])
def test_a_result_that_is_too_large_throughout_is_found(dtype: torch.dtype, scale: float) -> None:
    """By two per cent, about twice what rounding to bfloat16 costs; gradients by five."""
    for call, factor in zip(attention_calls("cpu", dtype, scale, 64, 32), (1.02, 1.05), strict=True):
        wrong = Call(call.place, call.func, call.args, call.kwargs, changed(call.results, lambda x, f=factor: x * f))
        found = check(wrong)
        assert found is not None and found.used > 1.0


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("device", ["cpu", "emulated:h800"])
def test_requests_that_are_copies_of_each_other_make_no_sound_operator_wrong(device: str) -> None:
    """Their errors are the same, and a mean over 64 of them scatters as one over the few that are unlike: much where a
    row looks at few tokens."""
    for seed in range(10):
        drawn = [random(1, 9, length, 64, seed=3 * seed + place) for place, length in enumerate((1, 49, 49))]
        drawn[0] = 3.0 * drawn[0]
        with opened(device) as chip:
            q, k, v = (one.repeat(64, 1, 1, 1).bfloat16().to(chip.device) for one in drawn)
            (call,) = calls_of(functools.partial(attend, q, k, v), device=chip.device.type)
        found = check(call)
        assert found is not None and found.used <= 1.0, (seed, found and found.measures)
