"""The state hash: additive over shards, the same wherever it is computed, changed by the faults it is there for."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beringia.numerics import state_hash
from beringia.numerics.keyed_sum import BLOCK_WORDS, KeyedSumKernel, multipliers, open_kernel, table
from beringia.numerics.state_hash import combine, hash_state, hash_tensor, key_of, runs_in_whole

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def some_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return (raw & 1).view(torch.bool).reshape(shape) if dtype == torch.bool else raw.view(dtype).reshape(shape)


def value_by_definition(tensor: torch.Tensor, name: str) -> int:
    width = min(tensor.dtype.itemsize, 4)
    words = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(f"u{width}").tolist()
    inner, outer = table().tolist(), multipliers(key_of(name), 0, len(words) // BLOCK_WORDS + 1).tolist()
    return sum(w * inner[g % BLOCK_WORDS] * outer[g // BLOCK_WORDS] for g, w in enumerate(words)) % 2**64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, BLOCK_WORDS + 1), (2, 3, 5)])
def test_the_value_is_the_sum_that_the_docstring_defines(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = some_tensor(shape, dtype)
    assert hash_tensor(tensor, "a") == value_by_definition(tensor, "a")


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[tuple[tuple[int, ...], torch.Tensor]]]:
    """A tensor and a division of it into rectangular pieces: cuts along each dimension, some pieces empty."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    if draw(st.booleans()):
        shape = (*shape, 1500)
    tensor = some_tensor(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9)))
    pieces = [((0,) * len(shape), tensor)]
    for dimension, size in enumerate(shape):
        cuts = [0, *sorted(draw(st.lists(st.integers(0, size), max_size=3))), size]
        pieces = [
            ((*offsets[:dimension], a, *offsets[dimension + 1 :]), piece.narrow(dimension, a, b - a))
            for offsets, piece in pieces
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
    return tensor, pieces


@given(cut_tensors())
def test_values_of_pieces_add_up_to_the_value_of_the_whole(
    cut: tuple[torch.Tensor, list[tuple[tuple[int, ...], torch.Tensor]]],
) -> None:
    tensor, pieces = cut
    parts = [hash_tensor(piece, "w", offsets=offsets, shape=tuple(tensor.shape)) for offsets, piece in pieces]
    assert sum(parts) % 2**64 == hash_tensor(tensor, "w")


@given(st.data())
def test_stretches_cover_each_element_of_a_piece_once_at_its_place_in_the_whole(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    offsets = tuple(data.draw(st.integers(0, size)) for size in shape)
    sizes = tuple(data.draw(st.integers(0, size - start)) for size, start in zip(shape, offsets, strict=True))
    whole = np.arange(math.prod(shape)).reshape(shape)
    piece = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].reshape(-1)
    covered = [
        (start + i, first + i) for start, length, first in runs_in_whole(offsets, sizes, shape) for i in range(length)
    ]
    assert covered == list(enumerate(piece.tolist()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 2 * BLOCK_WORDS + 5])
def test_torch_integers_on_a_device_give_what_the_host_gives(dtype: torch.dtype, rows: int) -> None:
    whole = some_tensor((rows + 4, 3), dtype)
    piece = whole[2 : 2 + rows]
    runs = list(runs_in_whole((2, 0), (rows, 3), (rows + 4, 3)))
    # The device path is plain aten operators, which the CPU has too.
    assert state_hash._hash_on_device(piece, "w", runs) == hash_tensor(piece, "w", offsets=(2, 0), shape=(rows + 4, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_gives_what_the_compiled_kernel_gives(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not open_kernel().compiled:
        pytest.skip(f"nothing to compare: {open_kernel().reason}")
    tensor = some_tensor((7, 3 * BLOCK_WORDS + 1), dtype)
    compiled = hash_tensor(tensor[1:], "w", offsets=(1, 0), shape=tuple(tensor.shape))
    monkeypatch.setattr(state_hash, "open_kernel", lambda: KeyedSumKernel(compiled=False, reason="asked for by a test"))
    assert hash_tensor(tensor[1:], "w", offsets=(1, 0), shape=tuple(tensor.shape)) == compiled


def test_the_hash_does_not_depend_on_strides() -> None:
    tensor = some_tensor((50, 70))
    assert hash_tensor(tensor.t().contiguous().t(), "w") == hash_tensor(tensor, "w")


def test_multipliers_in_a_block_cannot_cancel_two_swapped_words_or_two_sign_flips() -> None:
    # Words differ by at most 32 bits, sign bits are bit 31: m_i - m_j and m_i + m_j must not be divisible by 2^33.
    low = table() & np.uint64(2**33 - 1)
    negated = (np.uint64(2**33) - low) & np.uint64(2**33 - 1)
    assert np.unique(np.concatenate([low, negated])).size == 2 * BLOCK_WORDS


def flip_a_bit(state: dict[str, torch.Tensor]) -> None:
    state["model.w"].view(torch.int32)[17, 3] ^= 1 << 5


def flip_a_sign(state: dict[str, torch.Tensor]) -> None:
    state["model.w"][11, 2] *= -1


def flip_every_sign(state: dict[str, torch.Tensor]) -> None:
    state["model.w"].neg_()


def flip_two_signs_in_different_blocks(state: dict[str, torch.Tensor]) -> None:
    state["model.w"][0, 0] *= -1
    state["model.w"][-1, -1] *= -1


def negate_zero(state: dict[str, torch.Tensor]) -> None:
    state["model.zero"].neg_()


def transpose_a_shard(state: dict[str, torch.Tensor]) -> None:
    state["model.w"][:64, :64] = state["model.w"][:64, :64].t().clone()


def swap_two_rows(state: dict[str, torch.Tensor]) -> None:
    state["model.w"][[3, 90]] = state["model.w"][[90, 3]]


def reverse(state: dict[str, torch.Tensor]) -> None:
    state["model.w"].copy_(state["model.w"].flip(0))


def lose_a_moment(state: dict[str, torch.Tensor]) -> None:
    del state["optimizer.exp_avg.model.w"]


def zero_a_moment(state: dict[str, torch.Tensor]) -> None:
    state["optimizer.exp_avg.model.w"].zero_()


def swap_two_tensors(state: dict[str, torch.Tensor]) -> None:
    state["model.w"], state["optimizer.exp_avg.model.w"] = state["optimizer.exp_avg.model.w"], state["model.w"]


def rename_a_tensor(state: dict[str, torch.Tensor]) -> None:
    state["model.v"] = state.pop("model.w")


def reshape_a_tensor(state: dict[str, torch.Tensor]) -> None:
    state["model.w"] = state["model.w"].reshape(50, 200)


def reinterpret_a_tensor(state: dict[str, torch.Tensor]) -> None:
    state["model.w"] = state["model.w"].view(torch.int32)


def carry_no_router_bias(state: dict[str, torch.Tensor]) -> None:
    state["model.bias"].zero_()


FAULTS = [
    flip_a_bit,
    flip_a_sign,
    flip_every_sign,
    flip_two_signs_in_different_blocks,
    negate_zero,
    transpose_a_shard,
    swap_two_rows,
    reverse,
    lose_a_moment,
    zero_a_moment,
    swap_two_tensors,
    rename_a_tensor,
    reshape_a_tensor,
    reinterpret_a_tensor,
    carry_no_router_bias,
]


def training_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "model.w": torch.randn(100, 100, generator=generator),
        "model.bias": torch.full((8,), 1e-3),
        "model.zero": torch.zeros(1),
        "optimizer.exp_avg.model.w": torch.randn(100, 100, generator=generator) * 1e-3,
        "optimizer.step": torch.tensor(400.0),
    }


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_hash_changes_under(fault: Callable[[dict[str, torch.Tensor]], None]) -> None:
    progress = {"step": 400, "cursor": 12_800}
    state = training_state()
    before = hash_state(state, progress)
    assert hash_state(training_state(), progress) == before
    fault(state)
    assert hash_state(state, progress) != before


def test_the_hash_changes_when_the_cursor_is_off_by_one() -> None:
    state = training_state()
    assert hash_state(state, {"step": 400, "cursor": 12_800}) != hash_state(state, {"step": 400, "cursor": 12_801})


@given(st.integers(0, 9_999), st.integers(0, 31))
def test_any_single_bit_changes_the_value(element: int, bit: int) -> None:
    tensor = some_tensor((10_000,), torch.int32)
    before = hash_tensor(tensor, "w")
    mask = torch.tensor(-(2**31) if bit == 31 else 1 << bit, dtype=torch.int32)
    tensor[element] ^= mask
    assert hash_tensor(tensor, "w") != before


@given(st.integers(0, 19_999), st.integers(0, 19_999), st.integers(0, 9))
def test_any_two_sign_flips_change_the_value(one: int, other: int, seed: int) -> None:
    tensor = torch.randn(20_000, generator=torch.Generator().manual_seed(seed))
    before = hash_tensor(tensor, "w")
    tensor[one] *= -1
    if one != other:
        tensor[other] *= -1
    assert hash_tensor(tensor, "w") != before


def test_a_piece_outside_the_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="does not lie inside"):
        hash_tensor(torch.zeros(3), "w", offsets=(2,), shape=(4,))


def test_values_and_layout_must_name_the_same_tensors() -> None:
    with pytest.raises(ValueError, match="different tensors"):
        combine({"a": 1}, {"b": ("float32", (1,))}, {})


def test_the_hash_is_the_same_in_the_next_version() -> None:
    # Pinned: a changed definition needs a new manifest schema, since old checkpoints could not be compared any more.
    state = {"w": torch.arange(10_000, dtype=torch.float32).reshape(100, 100), "step": torch.tensor(3)}
    assert hash_state(state, {"step": 3}) == PINNED


PINNED = "090655a4afcacc06121e34a4cfc712f6f637fd6996a52c3194aa2f7d9d060bb9"
