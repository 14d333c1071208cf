"""Loading and exporting a model hold its weights once: beside them nothing of their size, at no moment."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import SMALL
from torch import nn

from beringia.checkpoint.store import CheckpointStore
from beringia.checkpoint.tensor_file import PIECE_BYTES
from beringia.model import Decoder, DecoderConfig, initialise, load_model, save_model
from beringia.records.recipe import parse_recipe
from beringia.records.run_directory import RunDirectory

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="peaks are read from /proc/self/status")

ALLOWED = 1.2
"""Times the weights that are held."""
OWN_BYTES = 4 * PIECE_BYTES
"""What reading takes besides: the block that a tensor is read through, and a second one seen at times."""

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
import sys, beringia, torch
from pathlib import Path
import beringia.model, beringia.campaign.export as exporting
from beringia.machine.memory import return_freed_memory
from beringia.records.run_directory import RunDirectory
FIRST
def work(source, target):
    return CALL
def peak_bytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
work(Path(sys.argv[1]) / "small", Path(sys.argv[2]) / "small")
return_freed_memory()
Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
before = peak_bytes()
made = work(Path(sys.argv[1]) / "large", Path(sys.argv[2]) / "large")
print(peak_bytes() - before)
"""


def peak_of(call: str, sources: Path, targets: Path = Path(), first: str = "") -> int:
    """How far the peak of a fresh process goes beyond what it held after the same call on a small model.

    That call maps the libraries' code: how many pages of it depends on what the page cache holds (4.5 to 12 MB seen).
    """
    code = PEAK.replace("CALL", call).replace("FIRST", first)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(sources), str(targets)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


def bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """The large one."""
    made = Decoder(CONFIG)
    initialise(made, 1)
    return made


@pytest.fixture(scope="module")
def models(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`large` and `small`, the same but for their sizes."""
    place = tmp_path_factory.mktemp("models")
    small = Decoder(replace(CONFIG, vocab_size=64, hidden_size=64, intermediate_size=64))
    initialise(small, 1)
    save_model(small, place / "small")
    save_model(decoder, place / "large")
    return place


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "float64"))]
)
def test_loading_holds_the_weights_once(decoder: Decoder, models: Path, dtype: str) -> None:
    held = bytes_of(decoder) * getattr(torch, dtype).itemsize // 4
    peak = peak_of(f"beringia.load(source, dtype=torch.{dtype})", models)
    assert held < peak < ALLOWED * held + OWN_BYTES


@pytest.mark.slow
def test_loading_holds_the_weights_once_where_new_memory_is_written_to(decoder: Decoder, models: Path) -> None:
    """With deterministic algorithms torch fills what it allocates: what is never used is held then too."""
    call = "beringia.load(source, dtype=torch.bfloat16)"
    peak = peak_of(call, models, first="torch.use_deterministic_algorithms(True)")
    assert peak < ALLOWED * bytes_of(decoder) // 2 + OWN_BYTES


@pytest.mark.slow
def test_loading_a_few_layers_holds_no_others(decoder: Decoder, models: Path) -> None:
    layer = sum(parameter.numel() * 4 for parameter in decoder.layers[0].parameters())
    held = bytes_of(decoder) - 2 * layer
    peak = peak_of("beringia.model.load_model(source, layers=1)", models)
    assert peak < ALLOWED * held + OWN_BYTES


def test_exporting_a_run_holds_the_weights_once_and_no_moments(decoder: Decoder, models: Path, tmp_path: Path) -> None:
    for name in ("small", "large"):
        leave_a_run(tmp_path / "runs" / name, models / name)
    (tmp_path / "out").mkdir()
    peak = peak_of("exporting.export(RunDirectory(source), target)", tmp_path / "runs", tmp_path / "out")
    assert bytes_of(decoder) < peak < ALLOWED * bytes_of(decoder) + OWN_BYTES
    exported = tmp_path / "out" / "large" / "model.safetensors"
    assert exported.read_bytes() == (models / "large" / "model.safetensors").read_bytes()


def leave_a_run(root: Path, model: Path) -> None:
    """What a run that trains the model leaves behind, as far as an export reads it: a checkpoint, with moments."""
    run = RunDirectory(root)
    recipe = parse_recipe(SMALL | {"model": {"path": str(model)}}, "test")
    run.root.mkdir(parents=True)
    run.resolved_recipe.write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    weights = {name: tensor.detach() for name, tensor in load_model(model).named_parameters()}
    moments = {
        f"optimizer.{kind}.{name}": tensor + 1 for kind in ("exp_avg", "exp_avg_sq") for name, tensor in weights.items()
    }
    store = CheckpointStore(
        run.checkpoints, epoch=1, epoch_file=None, keep=1, recipe_hash=recipe.hash, chip_identity="c"
    )
    store.save(5, weights | moments, {"step": 5}).result()
    store.close()
