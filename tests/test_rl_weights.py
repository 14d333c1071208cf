"""Weights arrive bit for bit, whole or as changes; and what is damaged, or made for others, is never taken for them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beringia.errors import RunError
from beringia.numerics.state_hash import hash_state
from beringia.rl.weights.delta import apply, encode_delta, encode_whole
from beringia.rl.weights.versions import Held, WeightVersions

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]
SAME_DIRECTORY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def weights(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (40, 16), "layers.0.up.weight": (64, 16), "norm.weight": (16,), "scale": ()}
    return {name: (0.02 * torch.randn(shape, generator=draw)).to(dtype) for name, shape in shapes.items()}


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return hash_state(one, {}) == hash_state(other, {})


@given(dtype=st.sampled_from(DTYPES), share=st.sampled_from([0.0, 0.01, 0.3, 1.0]), seed=st.integers(0, 2**31))
def test_a_change_makes_of_the_old_weights_the_new_ones_bit_for_bit(
    dtype: torch.dtype, share: float, seed: int
) -> None:
    before, other = weights(0, dtype), weights(seed, dtype)
    draw = torch.Generator().manual_seed(seed)
    now = {
        name: torch.where(torch.rand(old.shape, generator=draw) < share, other[name].float(), old.float()).to(dtype)
        for name, old in before.items()
    }
    held = copied(before)
    apply(encode_delta(before, now), held)
    assert same_bits(held, now)
    empty = {name: torch.zeros_like(tensor) for name, tensor in now.items()}
    apply(encode_whole(now), empty)
    assert same_bits(empty, now)


def test_nan_and_the_sign_of_zero_are_numbers_like_others() -> None:
    before = {"w": torch.tensor([0.0, -0.0, float("nan"), 1.0]).bfloat16()}
    now = {"w": torch.tensor([-0.0, -0.0, float("nan"), float("inf")]).bfloat16()}
    held = copied(before)
    apply(encode_delta(before, now), held)
    assert torch.equal(held["w"].view(torch.int16), now["w"].view(torch.int16))


@pytest.mark.parametrize("rate", [1e-6, 3e-6, 1e-5])
def test_a_change_takes_no_more_than_twice_its_entropy(rate: float) -> None:
    """Every weight, of 0.02 in root mean square, moves by the whole rate, as in Adam's first step. Where a share p
    changes, which ones is H(p) bits a number, and up or down another p."""
    draw = torch.Generator().manual_seed(0)
    master = 0.02 * torch.randn(512, 1024, generator=draw)
    moved = master - rate * torch.randn(master.shape, generator=draw).sign()
    before, now = {"w": master.bfloat16()}, {"w": moved.bfloat16()}
    p = float((before["w"] != now["w"]).float().mean())
    bits = -p * math.log2(p) - (1 - p) * math.log2(1 - p) + p
    assert len(encode_delta(before, now)) <= 2.0 * bits / 8.0 * master.numel()


@given(
    places=st.lists(st.integers(0, 5000), min_size=1, max_size=20, unique=True),
    steps=st.lists(st.integers(-(2**15), 2**15 - 1).filter(bool), min_size=20, max_size=20),
)
def test_places_far_apart_and_side_by_side_come_back(places: list[int], steps: list[int]) -> None:
    before = {"w": torch.zeros(5001, dtype=torch.bfloat16)}
    now = copied(before)
    for place, step in zip(places, steps, strict=False):
        now["w"].view(torch.int16)[place] += step
    held = copied(before)
    apply(encode_delta(before, now), held)
    assert same_bits(held, now)


@pytest.mark.parametrize(
    "changed",
    [
        {"embed.weight": torch.zeros(40, 15).bfloat16()},
        {"embed.weight": torch.zeros(40, 16)},
        {"more": torch.zeros(1).bfloat16()},
    ],
)
def test_weights_of_another_form_are_refused_and_nothing_is_written(changed: dict[str, torch.Tensor]) -> None:
    before = weights(0)
    with pytest.raises(ValueError):
        encode_delta(before, {**before, **changed})
    held = copied(before)
    with pytest.raises(RunError, match="cannot be applied"):
        apply(encode_whole({**weights(1), **changed}), held)
    assert same_bits(held, before)


def test_a_change_of_fewer_numbers_is_refused_by_fewer() -> None:
    long, short = {"w": torch.zeros(1000).bfloat16()}, {"w": torch.zeros(10).bfloat16()}
    now = copied(long)
    now["w"][900] = 1.0
    with pytest.raises(RunError, match="w has 10 numbers, and others are to change"):
        apply(encode_delta(long, now), short)


@SAME_DIRECTORY
@given(place=st.floats(0.0, 1.0, exclude_max=True), change=st.integers(1, 255))
def test_any_other_byte_is_seen(place: float, change: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    versions = WeightVersions(tmp_path_factory.mktemp("weights"))
    versions.write(0, weights(0))
    path = versions.path(0) / "weights.zst"
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= change
    path.write_bytes(content)
    held = Held(-1, copied(weights(3)))
    with pytest.raises(RunError, match="is damaged"):
        versions.load(0, held)
    assert held.version == -1


def published(
    directory: Path, count: int, whole_every: int = 4
) -> tuple[WeightVersions, list[dict[str, torch.Tensor]]]:
    versions, all_of_them = WeightVersions(directory), [weights(0)]
    versions.write(0, all_of_them[0])
    for version in range(1, count):
        now = copied(all_of_them[-1])
        now["layers.0.up.weight"][version % 64] *= 1.5
        before = None if version % whole_every == 0 else Held(version - 1, all_of_them[-1])
        versions.write(version, now, before)
        all_of_them.append(now)
    return versions, all_of_them


def test_every_version_is_reached_from_any_that_is_held_and_from_none(tmp_path: Path) -> None:
    versions, those = published(tmp_path, 10)
    assert versions.there() == [*range(10)]
    for start in (-1, 0, 3, 5, 9):
        for wanted in range(10):
            held = Held(start, copied(those[start] if start >= 0 else weights(99)))
            told = versions.load(wanted, held)
            assert same_bits(held.tensors, those[wanted]) and held.version == wanted
            assert told.hash == hash_state(those[wanted], {})


def test_two_hundred_changes_end_at_the_learner_s_weights(tmp_path: Path) -> None:
    versions, those = published(tmp_path, 201, whole_every=1000)
    held = Held(0, copied(those[0]))
    for version in range(1, 201):
        versions.load(version, held)
    assert same_bits(held.tensors, those[200])
    assert (
        sum(versions.manifest(version).bytes for version in range(1, 201)) < 200 * versions.manifest(0).whole_bytes / 4
    )


def test_a_change_of_other_weights_than_are_held_is_seen_by_the_hash(tmp_path: Path) -> None:
    versions, those = published(tmp_path, 2)
    held = Held(0, copied(weights(5)))
    with pytest.raises(RunError, match="hashes to .* here, and .* was published"):
        versions.load(1, held)
    assert held.version == -1
    versions.load(0, held)
    assert same_bits(held.tensors, those[0])


def test_a_version_never_changes_and_the_same_may_be_published_again(tmp_path: Path) -> None:
    versions, those = published(tmp_path, 2)
    assert versions.write(1, those[1]).base == 0
    with pytest.raises(RunError, match="a version never changes"):
        versions.write(1, those[0])


def test_a_version_that_lacks_its_base_is_asked_for_whole(tmp_path: Path) -> None:
    versions, _ = published(tmp_path, 4)
    (versions.path(2) / "manifest.json").unlink()
    with pytest.raises(RunError, match="version 2 is needed for it"):
        versions.load(3, Held(-1, weights(1)))


def test_versions_that_nobody_needs_are_dropped_and_no_other(tmp_path: Path) -> None:
    versions, those = published(tmp_path, 10)
    versions.drop_before(6)
    assert versions.there() == [4, 5, 6, 7, 8, 9]
    held = Held(-1, weights(1))
    versions.load(9, held)
    assert same_bits(held.tensors, those[9])


@pytest.mark.parametrize("left", ["manifest.json", "weights.zst"])
def test_a_removal_that_was_killed_leaves_no_version(left: str, tmp_path: Path) -> None:
    versions, those = published(tmp_path, 2)
    for file in versions.path(0).iterdir():
        if file.name != left:
            file.unlink()
    with pytest.raises(RunError, match=r"cannot be read|is needed for it"):
        versions.load(1, Held(-1, weights(9)))
    if left == "manifest.json":  # `drop_before` removes that first
        with pytest.raises(RunError, match="cannot be read"):
            versions.write(0, those[0])
    else:
        versions.write(0, those[0])
        held = Held(-1, weights(9))
        versions.load(1, held)
        assert same_bits(held.tensors, those[1])


def test_a_version_is_never_read_as_another(tmp_path: Path) -> None:
    versions, _ = published(tmp_path, 2)
    versions.path(0).rename(versions.path(7))
    with pytest.raises(RunError, match="is of version 0.*not version 7"):
        versions.load(7, Held(-1, weights(1)))


@pytest.mark.parametrize("base", [-1, 3, 4])
def test_a_version_is_made_of_an_earlier_one(base: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"version 3 cannot be made of version {base}"):
        WeightVersions(tmp_path).write(3, weights(1), Held(base, weights(0)))


def test_weights_that_share_memory_are_refused_by_name() -> None:
    tied = torch.ones(4)
    for encode in (encode_whole, lambda now: encode_delta({"embed": tied * 2, "head": tied * 2}, now)):
        with pytest.raises(ValueError, match="embed and head share memory"):
            encode({"embed": tied, "head": tied})
