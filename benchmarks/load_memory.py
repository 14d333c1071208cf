"""How much memory a model takes while it is loaded or exported, beside its weights. Prints one JSON object.

    python benchmarks/load_memory.py --json [--model SMOLLM2 --rounds 3]

SMOLLM2 is a directory that `recipes/prepare_smollm2.py` wrote; without it a drawn model of the same shape is used. Each
case runs in a fresh process, which says how far its peak (VmHWM) went beyond that after its imports; of several rounds
the worst counts. `run` reads the model of a run's checkpoint, which holds moments too; `export` writes it out as well.
transformers loads the same directory. A loaded model's weights are then read once: transformers maps a file whose dtype
is the one asked for, and only reading brings it into memory. Must hold, ours: at most 1.2 times the bytes of the
weights that are held.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import beringia  # noqa: F401  # before torch: it sets the OpenMP runtime up
from beringia.checkpoint.store import CheckpointStore
from beringia.machine.threads import usable_cores
from beringia.model import DecoderConfig, load_model, save_model
from beringia.model.filling import unfilled
from beringia.model.hugging_face import initialise
from beringia.records.recipe import parse_recipe
from beringia.records.run_directory import RunDirectory

LIMIT_TIMES = 1.2

SMOLLM2_SHAPE = DecoderConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
)

CHATS = Path(__file__).parents[1] / "recipes" / "capitals.jsonl"

_CASE = """
import json, sys, time, beringia, torch
IMPORTS
def peak_bytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
imported, began = peak_bytes(), time.perf_counter()
CALL
for weight in model.parameters() if model else ():
    weight.detach().flatten()[:: 4096 // weight.element_size()].sum()  # one element of every page
seconds, peak = time.perf_counter() - began, peak_bytes()
held = sum(weight.numel() * weight.element_size() for weight in model.parameters()) if model else 0
print(json.dumps({"imported": imported, "beyond": peak - imported, "held": held, "seconds": seconds}))
"""
_OURS = "import beringia.model"
_RUN = """
from pathlib import Path
from beringia.campaign.export import export, load_trained
from beringia.records.run_directory import RunDirectory
from beringia.supervise.run_files import recorded_recipe
"""
_THEIRS = "from transformers import AutoModelForCausalLM, LlamaForCausalLM"

CASES = {
    "load float32": (_OURS, "model = beringia.load(sys.argv[1])"),
    "load bfloat16": (_OURS, "model = beringia.load(sys.argv[1], dtype=torch.bfloat16)"),
    "run float32": (
        _RUN,
        "run = RunDirectory(Path(sys.argv[2])); model, _ = load_trained(run, recorded_recipe(run))",
    ),
    "export float32": (_RUN, "export(RunDirectory(Path(sys.argv[2])), Path(sys.argv[3])); model = None"),
    "transformers float32": (
        _THEIRS,
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)",
    ),
    "transformers bfloat16": (
        _THEIRS,
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)",
    ),
}
"""Name: what is imported before, what is measured."""


def draw_model(directory: Path) -> None:
    """A model of SmolLM2-135M's shape."""
    decoder = unfilled(SMOLLM2_SHAPE)
    initialise(decoder, seed=0)
    save_model(decoder, directory)


def write_run(run: RunDirectory, model: Path) -> None:
    """A run directory with one checkpoint, weights and moments, as training this model leaves it."""
    tokenized = (model / "tokenizer.json").exists()
    data = {"chat": str(CHATS)} if tokenized else {"task": "digit-sum"}
    document = {"name": "memory", "model": {"path": str(model)}, "chips": {"here": {"use": "cpu"}}, "data": data}
    recipe = parse_recipe(document | {"train": {"prefer": ["here"], "steps": 1, "batch": 1}}, "benchmark")
    run.root.mkdir()
    run.resolved_recipe.write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    weights = {name: weight.detach() for name, weight in load_model(model).named_parameters()}
    moments = {f"optimizer.{kind}.{name}": one for kind in ("exp_avg", "exp_avg_sq") for name, one in weights.items()}
    store = CheckpointStore(
        run.checkpoints, epoch=1, epoch_file=None, keep=1, recipe_hash=recipe.hash, chip_identity="benchmark"
    )
    store.save(1, weights | moments, {"step": 1}).result()
    store.close()


def measure(case: str, model: Path, run: Path, place: Path) -> dict[str, Any]:
    """One fresh process."""
    imports, call = CASES[case]
    code = _CASE.replace("IMPORTS", imports).replace("CALL", call)
    command = [sys.executable, "-c", code, str(model), str(run), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def worst(case: str, model: Path, run: Path, rounds: int, held_bytes: int) -> dict[str, Any]:
    """The round with the largest peak; an export holds what its run's model does."""
    found = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=run.parent) as place:
            found.append(measure(case, model, run, Path(place) / "out"))
    most = max(found, key=lambda one: one["beyond"])
    held = most["held"] or held_bytes
    return {
        "imported_bytes": most["imported"],
        "beyond_imports_bytes": most["beyond"],
        "held_bytes": held,
        "times_held": most["beyond"] / held,
        "seconds": min(one["seconds"] for one in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model = options.model or Path(place) / "smollm2-135m-shape"
        if options.model is None:
            draw_model(model)
        run = RunDirectory(Path(place) / "run")
        write_run(run, model)
        held = sum(weight.numel() * weight.element_size() for weight in load_model(model).parameters())
        cases = {case: worst(case, model, run.root, options.rounds, held) for case in CASES}
    result = {
        "benchmark": "load-memory",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {usable_cores()} cores",
        "model": model.name,
        "limit_times": LIMIT_TIMES,
        "cases": cases,
        "holds": {
            case: found["times_held"] <= LIMIT_TIMES
            for case, found in cases.items()
            if not case.startswith("transformers")
        },
    }
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
