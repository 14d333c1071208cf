"""Faults planted in the state between two chips: each must stop it, though every file has the right SHA-256."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import beringia, events, of_kind, small_recipe, write_recipe

from beringia.checkpoint.directory import read_manifest, write_manifest
from beringia.records.files import sha256_of_file
from beringia.records.manifest import CheckpointManifest

Tensors = dict[str, torch.Tensor]
MOMENT = "optimizer.exp_avg_sq.model.layers.1.self_attn.o_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 4 and 8 that was stopped there: its state is about to move."""
    directory = tmp_path_factory.mktemp("interrupted")
    recipe = write_recipe(directory, small_recipe(train={"steps": 12, "checkpoint_every": 4}))
    run = directory / "run"
    assert beringia("train", str(recipe), "--out", str(run)).returncode == 0
    lines = [json.dumps(event.model_dump(mode="json")) for event in events(run)]
    until = next(n for n, event in enumerate(events(run)) if event.kind == "checkpoint" and event.step == 8)
    (run / "events.jsonl").write_text("\n".join(lines[: until + 1]) + "\n")
    shutil.rmtree(run / "checkpoints" / "step-000012")
    return directory


def _rewrite(checkpoint: Path, change: Callable[[Tensors], None], manifest: CheckpointManifest) -> CheckpointManifest:
    """Change tensors on disk and make the manifest's file hashes agree, as a faulty transfer program would."""
    entries = []
    for entry in manifest.files:
        path = checkpoint / entry.name
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        entries.append(entry.model_copy(update={"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}))
    return manifest.model_copy(update={"files": tuple(entries)})


def zero_moment(checkpoint: Path, manifest: CheckpointManifest) -> CheckpointManifest:
    def change(tensors: Tensors) -> None:
        for key in _keys(manifest, MOMENT):
            if key in tensors:
                tensors[key] = torch.zeros_like(tensors[key])

    return _rewrite(checkpoint, change, manifest)


def transpose_shard(checkpoint: Path, manifest: CheckpointManifest) -> CheckpointManifest:
    def change(tensors: Tensors) -> None:
        for key, tensor in tensors.items():
            if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]:
                tensors[key] = tensor.t().contiguous()

    return _rewrite(checkpoint, change, manifest)


def lose_bias(checkpoint: Path, manifest: CheckpointManifest) -> CheckpointManifest:
    def change(tensors: Tensors) -> None:
        for key in _keys(manifest, BIAS):
            if key in tensors:
                tensors[key] = torch.zeros_like(tensors[key])

    return _rewrite(checkpoint, change, manifest)


def move_cursor(checkpoint: Path, manifest: CheckpointManifest) -> CheckpointManifest:
    return manifest.model_copy(update={"progress": manifest.progress | {"cursor": manifest.progress["cursor"] + 1}})


def drop_moment(checkpoint: Path, manifest: CheckpointManifest) -> CheckpointManifest:
    return manifest.model_copy(update={"tensors": {k: v for k, v in manifest.tensors.items() if k != MOMENT}})


def _keys(manifest: CheckpointManifest, name: str) -> set[str]:
    return {chunk.key for chunk in manifest.tensors[name].chunks}


@pytest.mark.slow
@pytest.mark.parametrize("plant", [zero_moment, drop_moment, transpose_shard, lose_bias, move_cursor])
def test_a_planted_transfer_fault_stops_the_state_from_being_used(
    interrupted: Path, tmp_path: Path, plant: Callable[[Path, CheckpointManifest], CheckpointManifest]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted / "run", run)
    newest = run / "checkpoints" / "step-000008"
    write_manifest(newest, plant(newest, read_manifest(newest)))
    done = beringia("train", str(interrupted / "small.toml"), "--out", str(run))
    assert done.returncode == 0, done.stderr
    (rejected,) = of_kind(run, "rejected")
    assert rejected.step == 8
    first: Any = next(event for event in events(run)[events(run).index(rejected) :] if event.kind == "step")
    assert first.step == 5, "the run went back to the checkpoint before"
