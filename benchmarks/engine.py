"""Offline generation, tokens a second: our engine beside transformers' `generate` and vLLM on the CPU.

    python benchmarks/engine.py --json [--model r2-micro --requests 64 --tokens 64 --rounds 7]

Every side is a process of its own with the same weights, prompts and length, greedy, in the same dtype; rounds take
turns. vLLM takes part where `.venv-vllm` has it. Reported are medians and quartiles of tokens a second and of the ratio
of ours to each peer's, and how many requests got the same tokens. On r2-micro ours must be at least twice vLLM's and
five times transformers'.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import IO, Any

PROMPT_TOKENS = 32
REQUIRED = {"vllm": 2.0, "transformers": 5.0}
VLLM = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
Answers = list[list[int]]
Generate = Callable[[], Answers]


# ---- the sides, each in its own process


def ours(directory: str, prompts: Answers, tokens: int, dtype: str) -> Generate:
    import torch

    from beringia.chips.open import open_chip
    from beringia.engine import Engine, Sampling

    engine = Engine(directory, open_chip("cpu"), dtype=getattr(torch, dtype))
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_end=True)

    def generate() -> Answers:
        return [list(completion.tokens) for completion in engine.generate(prompts, sampling)]

    return generate


def transformers(directory: str, prompts: Answers, tokens: int, dtype: str) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    batch = torch.tensor(prompts)

    def generate() -> Answers:
        with torch.inference_mode():
            made = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        answers: Answers = made[:, batch.shape[1] :].tolist()
        return answers

    return generate


def vllm(directory: str, prompts: Answers, tokens: int, dtype: str) -> Generate:
    # Its latent attention fails on the CPU for our sizes; without it, it keeps whole keys and values.
    os.environ["VLLM_MLA_DISABLE"] = "1"
    from vllm import LLM, SamplingParams

    model = LLM(directory, dtype=dtype, block_size=32, enable_prefix_caching=False, disable_log_stats=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]

    def generate() -> Answers:
        return [list(answer.outputs[0].token_ids) for answer in model.generate(asked, sampling, use_tqdm=False)]

    return generate


SIDES = {"ours": ours, "transformers": transformers, "vllm": vllm}


def work(side: str, job: dict[str, Any], answers_to: IO[str]) -> None:
    """Load, say so, then generate once for each line that comes."""
    began = time.perf_counter()
    generate = SIDES[side](job["directory"], job["prompts"], job["tokens"], job["dtype"])
    loaded = time.perf_counter() - began

    def tell(document: dict[str, Any]) -> None:
        answers_to.write(json.dumps(document) + "\n")
        answers_to.flush()

    tell({"loaded_seconds": loaded})
    for _ in sys.stdin:
        began = time.perf_counter()
        answers = generate()
        tell({"seconds": time.perf_counter() - began, "answers": answers})


# ---- the comparison


class Side:
    """A side's process."""

    def __init__(self, name: str, job: Path) -> None:
        python = str(VLLM) if name == "vllm" else sys.executable
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            [python, __file__, "--side", name, "--job", str(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.loaded_seconds: float = self._read()["loaded_seconds"]

    def generate(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("once more\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args}: ended without an answer")
        document: dict[str, Any] = json.loads(line)
        return document


def compare(options: argparse.Namespace, names: list[str], directory: str) -> dict[str, Any]:
    prompts = _prompts(options.requests, options.model, directory)
    job = Path(directory, "job.json")
    job.write_text(
        json.dumps({"directory": directory, "prompts": prompts, "tokens": options.tokens, "dtype": options.dtype})
    )
    sides = {name: Side(name, job) for name in names}
    answers = {name: side.generate()["answers"] for name, side in sides.items()}  # not timed: the first is slower
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, side in sides.items():
            seconds[name].append(side.generate()["seconds"])
    for side in sides.values():
        side.close()
    count = options.requests * options.tokens
    ratios = {
        name: [theirs / own for theirs, own in zip(seconds[name], seconds["ours"], strict=True)]
        for name in names
        if name != "ours"
    }
    return {
        "tokens_a_second": {name: _spread([count / one for one in taken]) for name, taken in seconds.items()},
        "ours_to": {name: _spread(own) for name, own in ratios.items()},
        "loaded_seconds": {name: side.loaded_seconds for name, side in sides.items()},
        "same_answers_as_ours": {
            name: sum(one == own for one, own in zip(answers[name], answers["ours"], strict=True)) for name in ratios
        },
        "must_hold": {name: REQUIRED[name] for name in ratios},
        "holds": {name: statistics.median(own) >= REQUIRED[name] for name, own in ratios.items()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def _prompts(requests: int, model: str, directory: str) -> Answers:
    """Prompts of drawn tokens; no two begin alike, so that nobody can share what is computed."""
    import random

    vocabulary = json.loads(Path(directory, "config.json").read_text())["vocab_size"]
    drawn = random.Random(5)
    return [[drawn.randrange(4, vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(requests)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--model", default="r2-micro", help="a preset or a Hugging Face directory")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        # Libraries print to standard output; answers go to what it was.
        answers_to = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        work(options.side, json.loads(options.job.read_text()), answers_to)
        return
    names = ["ours", "transformers", *(["vllm"] if VLLM.exists() else [])]
    with tempfile.TemporaryDirectory() as directory:
        _write_model(options.model, directory)
        found = compare(options, names, directory)
    document = {
        "benchmark": "engine",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: getattr(options, name) for name in ("requests", "tokens", "dtype", "rounds")},
        "model": Path(options.model).name,
        **found,
    }
    print(json.dumps(document, indent=None if options.json else 2))


def _write_model(model: str, directory: str) -> None:
    """The model without its multi-token layer, which transformers and vLLM's CPU path leave out."""
    import beringia

    if Path(model).is_dir():
        for file in Path(model).iterdir():
            Path(directory, file.name).symlink_to(file.resolve())
        return
    decoder = beringia.load(model)
    beringia.save(decoder, Path(directory, "model"))
    for file in Path(directory, "model").iterdir():
        file.rename(Path(directory, file.name))


if __name__ == "__main__":
    main()
