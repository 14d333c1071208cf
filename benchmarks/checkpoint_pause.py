"""How long a checkpoint of at least 1 GB stops training, and how fast it is loaded and checked. Prints one JSON object.

    python benchmarks/checkpoint_pause.py --json [--rounds 11] [--directory DIR]

Each round measures everything once, in turn, so that a noisy machine disturbs all alike: a plain copy of the state in
memory, our save's pause and write, the same with the hash in numpy, torch's own asynchronous save to Hugging Face
files, `sha256sum` over the checkpoint's files, our verified load, and torch's Hugging Face load, which checks nothing.
The copy is the better of two ways: tensor by tensor, and the whole state as one flat tensor. Ratios are taken within a
round; figures are medians with 95 % intervals (order statistics). Files are in the page cache ("warm"), and then not
("cold": the cache is asked to forget them). Must hold: pause <= 2 x copy, load rate >= 0.5 x sha256sum's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as torch_checkpoint

from beringia.checkpoint.store import CheckpointStore
from beringia.machine.threads import usable_cores
from beringia.numerics.keyed_sum import KeyedSumKernel

PAUSE_LIMIT = 2.0
LOAD_LIMIT = 0.5


def gigabyte_state() -> dict[str, torch.Tensor]:
    """Weights and both moments of 90M parameters in float32, in the shapes of a decoder of 12 layers."""
    generator = torch.Generator().manual_seed(7)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (16_384, 768), "norm.weight": (768,)}
    for layer in range(12):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"layers.{layer}.self_attn.{name}.weight"] = (768, 768)
        for name in ("gate_proj", "up_proj"):
            shapes[f"layers.{layer}.mlp.{name}.weight"] = (1792, 768)
        shapes[f"layers.{layer}.mlp.down_proj.weight"] = (768, 1792)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{layer}.{name}.weight"] = (768,)
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes[f"layers.{layer}.self_attn.{name}.bias"] = (768,)
    parts = ("model", "optimizer.exp_avg.model", "optimizer.exp_avg_sq.model")
    state = {
        f"{part}.{name}": torch.randn(shape, generator=generator) for part in parts for name, shape in shapes.items()
    }
    return {**state, "optimizer.step": torch.tensor(400.0)}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median_with_interval(values: list[float]) -> dict[str, float]:
    """The median and its distribution-free 95 % interval; the whole range where there are fewer than 6 values."""
    ordered, count = sorted(values), len(values)
    rank = 0
    while sum(math.comb(count, k) for k in range(rank + 1)) * 2 / 2**count < 0.05 and rank + 1 < count / 2:
        rank += 1
    rank = max(rank - 1, 0)
    return {
        "median": round(statistics.median(ordered), 4),
        "low": round(ordered[rank], 4),
        "high": round(ordered[count - 1 - rank], 4),
    }


def forget(directory: Path) -> None:
    """Ask the page cache to drop the files of a directory; they are on the disk already."""
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Rounds:
    """Everything that is measured, once per call of `measure`."""

    def __init__(self, directory: Path) -> None:
        self.state = gigabyte_state()
        self.bytes = sum(tensor.nbytes for tensor in self.state.values())
        self.copies = {name: tensor.clone() for name, tensor in self.state.items()}
        self.flat = torch.cat([tensor.reshape(-1) for tensor in self.state.values()])
        self.flat_copy = self.flat.clone()
        self.loaded = {name: torch.zeros_like(tensor) for name, tensor in self.state.items()}
        self.store = self._store(directory / "compiled")
        self.store_numpy = self._store(directory / "numpy")
        self.torch_directory = directory / "torch"
        self.kernel = self.store.hash_kernel
        self.seconds: dict[str, list[float]] = {}

    def _store(self, directory: Path) -> CheckpointStore:
        store = CheckpointStore(
            directory, epoch=1, epoch_file=None, keep=1, recipe_hash="benchmark", chip_identity="benchmark"
        )
        store.prepare(self.state)
        return store

    def measure(self, step: int) -> None:
        self._note("copy_by_tensor", seconds(self._copy))
        self._note("copy_flat", seconds(lambda: self.flat_copy.copy_(self.flat)))
        self._note("copy", min(self.seconds["copy_by_tensor"][-1], self.seconds["copy_flat"][-1]))
        self._save("save", self.store, step)
        with mock.patch("beringia.checkpoint.staging.open_kernel", lambda: KeyedSumKernel(False, "benchmark")):
            self._save("save_numpy", self.store_numpy, step)
        self._save_with_torch()
        ours = self.store.directory.path(step)
        for state, prepare in (("warm", lambda path: None), ("cold", forget)):
            prepare(ours)
            self._note(f"sha256sum_{state}", seconds(lambda: sha256sum(ours)))
            prepare(ours)
            self._note(f"load_{state}", seconds(lambda: self.store.load(step, self.loaded)))
            prepare(self.torch_directory)
            self._note(f"torch_load_unchecked_{state}", seconds(self._load_with_torch))
        assert all(torch.equal(self.loaded[name], tensor) for name, tensor in self.state.items())

    def _note(self, name: str, value: float) -> None:
        self.seconds.setdefault(name, []).append(value)

    def _copy(self) -> None:
        for name, tensor in self.state.items():
            self.copies[name].copy_(tensor)

    def _save(self, name: str, store: CheckpointStore, step: int) -> None:
        pending = store.save(step, self.state, {"step": step})
        pending.result()
        self._note(f"{name}_pause", pending.pause_seconds)
        self._note(f"{name}_write", pending.write_seconds)

    def _save_with_torch(self) -> None:
        shutil.rmtree(self.torch_directory, ignore_errors=True)
        writer = torch_checkpoint.HuggingFaceStorageWriter(str(self.torch_directory))
        started = time.perf_counter()
        future = torch_checkpoint.async_save(dict(self.state), storage_writer=writer, no_dist=True)
        self._note("torch_pause", time.perf_counter() - started)
        future.result()  # type: ignore[union-attr]  # a future unless a staging future was asked for
        self._note("torch_write", time.perf_counter() - started)

    def _load_with_torch(self) -> None:
        reader = torch_checkpoint.HuggingFaceStorageReader(str(self.torch_directory))
        torch_checkpoint.load(dict(self.loaded), storage_reader=reader, no_dist=True)


def sha256sum(directory: Path) -> None:
    files = sorted(str(path) for path in directory.glob("*.safetensors"))
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)


def ratio(seconds_: dict[str, list[float]], over: str, under: str) -> dict[str, float]:
    return median_with_interval([a / b for a, b in zip(seconds_[over], seconds_[under], strict=True)])


def report(rounds: Rounds) -> dict[str, Any]:
    taken = rounds.seconds
    pause = ratio(taken, "save_pause", "copy")
    warm, cold = (ratio(taken, f"sha256sum_{state}", f"load_{state}") for state in ("warm", "cold"))
    return {
        "benchmark": "checkpoint_pause",
        "machine": {"processor": platform.processor() or platform.machine(), "cores": usable_cores()},
        "torch": torch.__version__,
        "rounds": len(taken["copy"]),
        "state": {"bytes": rounds.bytes, "tensors": len(rounds.state)},
        "hash_kernel": "compiled" if rounds.kernel.compiled else f"numpy: {rounds.kernel.reason}",
        "seconds": {name: median_with_interval(values) for name, values in taken.items()},
        "pause_over_copy": pause,
        "pause_over_copy_with_numpy_hash": ratio(taken, "save_numpy_pause", "copy"),
        "torch_pause_over_copy": ratio(taken, "torch_pause", "copy"),
        "load_rate_over_sha256sum_warm": warm,
        "load_rate_over_sha256sum_cold": cold,
        "limits": {"pause_over_copy": PAUSE_LIMIT, "load_rate_over_sha256sum": LOAD_LIMIT},
        "holds": pause["median"] <= PAUSE_LIMIT and min(warm["median"], cold["median"]) >= LOAD_LIMIT,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line instead of an indented object")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--directory", type=Path, help="where to write; a temporary directory otherwise")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's save says each time that it is not distributed
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        rounds = Rounds(Path(directory))
        rounds.measure(1)
        rounds.seconds.clear()  # the first round warms files, buffers and imports
        for step in range(2, options.rounds + 2):
            rounds.measure(step)
            print(f"round {step - 1} of {options.rounds}", file=sys.stderr)
        result = report(rounds)
        rounds.store.close()
        rounds.store_numpy.close()
    print(json.dumps(result, indent=None if options.json else 2))
    return 0 if result["holds"] else 3


if __name__ == "__main__":
    sys.exit(main())
