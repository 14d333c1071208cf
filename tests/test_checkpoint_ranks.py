"""Checkpoints of several ranks: FSDP2 state over gloo, saved by two ranks, loaded by one, and back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import GIVE_UP_SECONDS

from beringia.checkpoint.directory import CheckpointDirectory
from beringia.checkpoint.store import CheckpointStore
from beringia.errors import CheckpointDamaged, StorageFull
from beringia.numerics.state_hash import hash_state

PROGRAM = r"""
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from beringia.checkpoint import storage
from beringia.checkpoint.store import CheckpointStore
from beringia.errors import BeringiaError, StorageFull

directory, rank, ranks, meeting, verbs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:]

def build(seed):
    torch.manual_seed(seed)
    # Rows that two ranks cannot share evenly, and one row for two ranks.
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 1), nn.Linear(1, 300, bias=False))
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for part in model:
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer

def step(model, optimizer):
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()

def state_of(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for parameter, name in names.items():
        for key, tensor in optimizer.state[parameter].items():
            state[f"optimizer.{key}.model.{name}"] = tensor
    state["random.host"] = torch.arange(100, dtype=torch.uint8)
    return state

group = None
if ranks > 1:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    group = dist.group.WORLD
model, optimizer = build(seed=0 if "save" in verbs else 99)
step(model, optimizer)
if "fill" in verbs and rank == 1:
    def full(*_): raise StorageFull("The disk is full: planted.")
    storage.write_hashed = full
store = CheckpointStore(Path(directory), epoch=1, epoch_file=None, keep=9, recipe_hash="r", chip_identity="c",
                        process_group=group)
state, result = state_of(model, optimizer), {}
try:
    if "load" in verbs:
        result["progress"] = store.load(1, state)
        result["loaded_hash"] = store.state_hash(state, result["progress"])
    if "save" in verbs:
        manifest = store.save(1, state, {"step": 1}).result()
        result["saved_hash"], result["files"] = manifest.state_hash, [entry.name for entry in manifest.files]
    result["sums"] = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).double().sum().item()
        for name, tensor in state.items()
    }
except BeringiaError as error:
    result["error"] = [type(error).__name__, str(error)]
finally:
    # An open store keeps its gloo group alive into the end of the interpreter, where torch may abort the process.
    store.close()
print(json.dumps(result), flush=True)
if ranks > 1:
    dist.destroy_process_group()
"""


def run_ranks(directory: Path, ranks: int, *verbs: str) -> list[dict[str, Any]]:
    meeting = directory.parent / f"meeting-{len(list(directory.parent.glob('meeting-*')))}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(directory), str(rank), str(ranks), str(meeting), *verbs],
            stdout=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=GIVE_UP_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks
    # gloo may greet on standard output first (torch 2.10).
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A checkpoint of step 1 by two ranks, and what each of them said."""
    root = tmp_path_factory.mktemp("ranks") / "checkpoints"
    return root, run_ranks(root, 2, "save")


def load_alone(root: Path) -> tuple[CheckpointStore, dict[str, torch.Tensor], dict[str, Any]]:
    """Step 1 as one process loads it, into plain tensors."""
    store = CheckpointStore(root, epoch=1, epoch_file=None, keep=1, recipe_hash="r", chip_identity="c")
    tensors = store.manifest(1).tensors
    state = {name: torch.zeros(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in tensors.items()}
    return store, state, store.load(1, state)


def test_two_ranks_to_one_to_two_keeps_the_state_hash(
    saved_by_two: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    root, two = saved_by_two
    expected = CheckpointDirectory(root).verify(1).state_hash
    assert [result["saved_hash"] for result in two] == [expected] * 2
    assert {name[:9] for name in two[0]["files"]} == {"rank00000", "rank00001"}

    store, state, progress = load_alone(root)
    assert store.state_hash(state, progress) == hash_state(state, progress) == expected
    assert {name: tensor.double().sum().item() for name, tensor in state.items()} == two[0]["sums"]
    store.close()
    alone = CheckpointStore(tmp_path / "one", epoch=1, epoch_file=None, keep=1, recipe_hash="r", chip_identity="c")
    assert alone.save(1, state, progress).result().state_hash == expected
    alone.close()

    again = run_ranks(tmp_path / "one", 2, "load")
    assert [result["loaded_hash"] for result in again] == [expected] * 2
    assert again[0]["sums"] == two[0]["sums"]


def test_a_replicated_tensor_is_written_once_and_every_sharded_row_once(
    saved_by_two: tuple[Path, list[dict[str, Any]]],
) -> None:
    manifest = CheckpointDirectory(saved_by_two[0]).manifest(1)
    assert len(manifest.tensors["random.host"].chunks) == 1
    weight = manifest.tensors["model.0.weight"]
    assert [(chunk.offsets, chunk.sizes) for chunk in weight.chunks] == [((0, 0), (3, 6)), ((3, 0), (2, 6))]


@pytest.mark.slow
def test_a_file_damaged_for_one_rank_is_an_error_on_every_rank(
    saved_by_two: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(saved_by_two[0], root)
    path = next((root / "step-000001").glob("rank00001-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    results = run_ranks(root, 2, "load")
    assert [result["error"][0] for result in results] == [CheckpointDamaged.__name__] * 2
    assert all(path.name in result["error"][1] for result in results)


@pytest.mark.slow
def test_a_disk_full_for_one_rank_stops_every_rank_and_publishes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    results = run_ranks(root, 2, "save", "fill")
    assert [result["error"][0] for result in results] == [StorageFull.__name__] * 2
    assert CheckpointDirectory(root).steps() == []
    assert list(root.iterdir()) == []
