"""State that lies on a device: staged, hashed there, and loaded back, on the emulated device and the cards present."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from beringia.checkpoint.store import CheckpointStore
from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.errors import ChipUnavailable
from beringia.numerics.state_hash import hash_state, hash_tensor

PROGRESS = {"step": 3}


@pytest.fixture(params=["emulated:h800", "emulated:ascend-910b", "cuda", "npu"])
def chip(request: pytest.FixtureRequest) -> Iterator[Chip]:
    try:
        chip = open_chip(request.param)
    except ChipUnavailable as absent:
        pytest.skip(str(absent))
    yield chip
    chip.close()


def host_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "model.weight": torch.randn(300, 41, generator=generator),
        "model.half": torch.randn(77, generator=generator).bfloat16(),
        "model.counts": torch.randint(-9, 9, (5000,), generator=generator),
        "optimizer.step": torch.tensor(3.0),
        "random.host": torch.arange(200, dtype=torch.uint8),
    }


def on(chip: Chip, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state as training holds it: on the chip, the random state on the host."""
    return {name: tensor if name.startswith("random") else tensor.to(chip.device) for name, tensor in state.items()}


def test_a_state_on_a_device_is_saved_hashed_and_loaded_as_on_the_host(chip: Chip, tmp_path: Path) -> None:
    state = host_state()
    live = on(chip, state)
    store = CheckpointStore(
        tmp_path, epoch=1, epoch_file=None, keep=1, recipe_hash="r", chip_identity=chip.identity.hash, chip=chip
    )
    manifest = store.save(3, live, PROGRESS).result()
    assert manifest.state_hash == hash_state(state, PROGRESS) == store.state_hash(live, PROGRESS)
    loaded = on(chip, {name: torch.zeros_like(tensor) for name, tensor in state.items()})
    assert store.load(3, loaded) == PROGRESS
    for name, tensor in state.items():
        assert torch.equal(loaded[name].cpu(), tensor), name
    store.close()


def test_a_device_with_exact_integers_gives_the_hosts_value(chip: Chip) -> None:
    if not chip.capabilities.exact_int64:
        pytest.skip(f"{chip.name} hashes on the host")
    for name, tensor in host_state().items():
        assert hash_tensor(tensor.to(chip.device), name, on_device=True) == hash_tensor(tensor, name)
