"""Loading and exporting a model hold its weights once: beside them nothing of their size, at no moment."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import SMALL
from torch import nn

from beringia.checkpoint.store import CheckpointStore
from beringia.model import Decoder, DecoderConfig, initialise, save_model
from beringia.records.recipe import parse_recipe
from beringia.records.run_directory import RunDirectory

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="peaks are read from /proc/self/status")

ALLOWED = 1.2
"""Times the weights that are held."""
OWN_BYTES = 6 << 20
"""What the process takes besides, a third more than the 4.6 MB measured for a model of no size (parsers, first calls of
operators)."""

CONFIG = DecoderConfig(
    vocab_size=16_384,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    tie_word_embeddings=True,
)
"""Half of it is the embedding: a second copy of that alone would break the bound."""

PEAK = """
import json, sys, beringia, torch
from pathlib import Path
import beringia.model, beringia.campaign.export as exporting
from beringia.records.run_directory import RunDirectory
def peak_bytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
FIRST
before = peak_bytes()
CALL
print(peak_bytes() - before)
"""


def peak_of(call: str, *arguments: object, first: str = "") -> int:
    """How far the peak of a fresh process goes beyond its imports."""
    code = PEAK.replace("CALL", call).replace("FIRST", first)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


def bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = Decoder(CONFIG)
    initialise(made, 1)
    return made


@pytest.fixture(scope="module")
def directory(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "model"
    save_model(decoder, place)
    return place


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "float64"))]
)
def test_loading_holds_the_weights_once(decoder: Decoder, directory: Path, dtype: str) -> None:
    held = bytes_of(decoder) * getattr(torch, dtype).itemsize // 4
    peak = peak_of(f"model = beringia.load(sys.argv[1], dtype=torch.{dtype})", directory)
    assert held < peak < ALLOWED * held + OWN_BYTES


@pytest.mark.slow
def test_loading_holds_the_weights_once_where_new_memory_is_written_to(decoder: Decoder, directory: Path) -> None:
    """With deterministic algorithms torch fills what it allocates: what is never used is held then too."""
    call = "model = beringia.load(sys.argv[1], dtype=torch.bfloat16)"
    peak = peak_of(call, directory, first="torch.use_deterministic_algorithms(True)")
    assert peak < ALLOWED * bytes_of(decoder) // 2 + OWN_BYTES


@pytest.mark.slow
def test_loading_a_few_layers_holds_no_others(decoder: Decoder, directory: Path) -> None:
    layer = (
        bytes_of(decoder)
        - bytes_of(Decoder(CONFIG))
        + sum(parameter.numel() * 4 for parameter in decoder.layers[0].parameters())
    )
    held = bytes_of(decoder) - 2 * layer
    peak = peak_of("model = beringia.model.load_model(sys.argv[1], layers=1)", directory)
    assert peak < ALLOWED * held + OWN_BYTES


def test_exporting_a_run_holds_the_weights_once_and_no_moments(
    decoder: Decoder, directory: Path, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    recipe = parse_recipe(SMALL | {"model": {"path": str(directory)}}, "test")
    run.root.mkdir()
    run.resolved_recipe.write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    weights = {name: tensor.detach() for name, tensor in decoder.named_parameters()}
    moments = {
        f"optimizer.{kind}.{name}": tensor + 1 for kind in ("exp_avg", "exp_avg_sq") for name, tensor in weights.items()
    }
    store = CheckpointStore(
        run.checkpoints, epoch=1, epoch_file=None, keep=1, recipe_hash=recipe.hash, chip_identity="c"
    )
    store.save(5, weights | moments, {"step": 5}).result()
    store.close()
    call = "exporting.export(RunDirectory(Path(sys.argv[1])), Path(sys.argv[2]))"
    peak = peak_of(call, run.root, tmp_path / "out")
    assert bytes_of(decoder) < peak < ALLOWED * bytes_of(decoder) + OWN_BYTES
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
