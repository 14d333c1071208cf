"""The models of the foreign benchmark: one with random weights, four that were trained here, of all attention kinds.

    python -m benchmarks.foreign.models --into DIR

They are made once, by `beringia train` and `beringia export`, from seeds and the documentation of this repository, and
lie as Hugging Face directories in DIR. Mostly of r2-nano's size: what is asked of them is what trained weights do to
rounding (outliers, experts that are seldom chosen, attention that has become sharp), not what they know.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from beringia.data.tokenizer import load_tokenizer, write_tokenizer
from beringia.model import Decoder, DecoderConfig, initialise, preset, save_model

_TEXT = Path(__file__).resolve().parents[2] / "docs"
_BYTES = load_tokenizer("bytes").vocabulary_size

_DENSE = DecoderConfig(
    vocab_size=_BYTES,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    initializer_range=0.125,
)


@dataclass(frozen=True)
class Trained:
    """A model that is trained here."""

    name: str
    config: DecoderConfig
    about: str
    steps: int = 300
    learning_rate: float = 3e-3
    head_times: float = 1.0
    """What the head's weights are multiplied with before training: logits are as much larger at its beginning."""

    def recipe(self, model: Path) -> str:
        """As `beringia train` reads it."""
        return f"""
name = "{self.name}"
seed = 11
[model]
path = {json.dumps(str(model))}
[chips.here]
use = "cpu"
[data]
text = {json.dumps(str(_TEXT))}
sequence_length = 128
[train]
prefer = ["here"]
steps = {self.steps}
batch = 16
learning_rate = {self.learning_rate}
warmup_steps = 30
weight_decay = 0.1
checkpoint_every = 1000
evaluate_every = 1000
accuracy_samples = 0
compute = "float32"
[guard]
share = 0
[qualify]
unqualified = "allow"
"""


PRESET = "r2-nano"
"""With random weights."""
TRAINED = (
    Trained("latent", preset("r2-nano", _BYTES), "latent attention, experts, a multi-token layer (deepseek_v3)"),
    Trained("grouped", replace(_DENSE, qk_norm=True), "grouped queries, normed (qwen3)"),
    Trained(
        "tied",
        replace(_DENSE, attention_bias=True, output_bias=False, tie_word_embeddings=True, num_key_value_heads=4),
        "tied head, biases (qwen2)",
    ),
    Trained(
        "odd",
        replace(
            _DENSE, hidden_size=75, intermediate_size=101, num_attention_heads=3, num_key_value_heads=1, head_dim=26
        ),
        "odd sizes (llama)",
    ),
    Trained("sharp", replace(_DENSE, hidden_size=96), "large logits (llama)", 400, 1e-2, head_times=8.0),
)


def make(trained: Trained, directory: Path) -> Path:
    """The trained model's directory below `directory`; made unless it lies there."""
    made = directory / trained.name
    if made.exists():
        return made
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        work = Path(name)
        decoder = Decoder(trained.config)
        initialise(decoder, 11)
        decoder.lm_head.weight.data *= trained.head_times
        save_model(decoder, work / "begin")
        write_tokenizer("bytes", work / "begin")
        (work / "recipe.toml").write_text(trained.recipe(work / "begin"))
        _beringia("train", str(work / "recipe.toml"), "--out", str(work / "run"))
        _beringia("export", str(work / "run"), "--to", str(work / "model"))
        shutil.move(work / "model", made)
    return made


def _beringia(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "beringia", *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Make them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, required=True)
    directory = parser.parse_args().into
    for trained in TRAINED:
        print(make(trained, directory), trained.about)


if __name__ == "__main__":
    main()
