"""Error measures and floors have the values that their definitions give."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beringia.numerics.metrics import (
    UNIT_ROUNDOFF,
    accumulation_floor,
    difference,
    independent_rows,
    rounding_floor,
    unlike_rows,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_tensor_does_not_differ_from_itself() -> None:
    x = random(4, 8)
    error = difference(x, x)
    assert (error.relative, error.largest, error.gain) == (0.0, 0.0, 0.0)


@given(st.floats(-0.9, 3.0), st.integers(0, 100))
def test_a_wrong_factor_is_the_relative_error_and_with_its_sign_the_gain(factor: float, seed: int) -> None:
    x = random(5, 7, seed=seed)
    error = difference(x * (1 + factor), x)
    assert error.relative == pytest.approx(abs(factor), rel=1e-9, abs=1e-12)
    assert error.gain == pytest.approx(factor, rel=1e-9, abs=1e-12)


def test_the_largest_error_is_counted_in_root_mean_squares_of_the_reference() -> None:
    reference = torch.full((10,), 2.0, dtype=torch.float64)
    found = reference.clone()
    found[3] += 5.0
    assert difference(found, reference).largest == pytest.approx(2.5)


def test_what_is_not_finite_differs_by_nan() -> None:
    found = torch.tensor([1.0, math.inf], dtype=torch.float64)
    assert math.isnan(difference(found, torch.ones(2, dtype=torch.float64)).relative)


def test_rounding_to_nearest_has_no_gain_and_truncation_has() -> None:
    x = random(64, 64).to(torch.float32)
    nearest = x.to(torch.bfloat16).to(torch.float32)
    truncated = (x.view(torch.int32) & -65536).view(torch.float32)
    assert abs(difference(nearest, x).gain) < 1e-4
    assert difference(truncated, x).gain < -1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_storing_in_a_dtype_stays_below_its_rounding_floor(dtype: torch.dtype) -> None:
    x = random(1000)
    assert difference(x.to(dtype), x).relative < rounding_floor(dtype) / 2


def test_unit_roundoff_is_half_the_distance_from_one_to_the_next_number() -> None:
    for dtype, roundoff in UNIT_ROUNDOFF.items():
        assert roundoff == torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("length", [64, 512, 4096])
def test_sums_truncated_once_a_block_of_four_stay_below_the_accumulation_floor(length: int) -> None:
    """The worst arithmetic that the floor allows for, computed: float32 partial sums cut off, not rounded."""
    terms = random(200, length)
    total = torch.zeros(200, dtype=torch.float32)
    for block in terms.split(4, dim=1):
        exact = total.to(torch.float64) + block.sum(1)
        nearest = exact.to(torch.float32)
        away = nearest.to(torch.float64).abs() > exact.abs()
        total = torch.where(away, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
    assert difference(total, terms.sum(1)).relative < accumulation_floor(length)
    assert difference(total, terms.sum(1)).relative > accumulation_floor(length) / 100  # and is no empty promise


@given(rows=st.integers(1, 9), copies=st.integers(1, 8), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_rows_that_are_copies_of_each_other_count_once(rows: int, copies: int, width: int, seed: int) -> None:
    """As of requests that are alike: their errors are the same."""
    x = random(rows, width, seed=seed)
    order = torch.randperm(rows * copies, generator=torch.Generator().manual_seed(seed))
    copied = x.repeat(copies, 1)[order]
    assert independent_rows(copied) == pytest.approx(copies * independent_rows(x))
    assert unlike_rows(copied) == pytest.approx(independent_rows(x))
    assert unlike_rows(copied.view(-1, 1, width)) == unlike_rows(copied)


def test_a_tensor_that_lives_in_one_row_has_one_independent_row() -> None:
    x = torch.zeros(16, 4, dtype=torch.float64)
    x[3] = 1.0
    assert independent_rows(x) == pytest.approx(1.0)
    assert independent_rows(torch.ones(16, 4, dtype=torch.float64)) == pytest.approx(16.0)
