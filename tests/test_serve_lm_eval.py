"""EleutherAI's lm-eval asks the server, and finds what the model itself says."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from served import serving
from waiting import GIVE_UP_SECONDS

from beringia.data.tokenizer import load_tokenizer, write_tokenizer
from beringia.model import Decoder, greedy, load_model, save_model

PROGRAM = Path(__file__).parents[1] / ".venv-peers/bin/lm_eval"
SAME_LOGPROB = 1e-4  # see test_engine.py
NUM_QUESTIONS, NEW_TOKENS = 12, 16

CHOOSING = """
task: choosing
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
WRITING = f"""
task: writing
output_type: generate_until
doc_to_target: "0"
generation_kwargs: {{until: ["3"], do_sample: false, temperature: 0.0, max_gen_toks: {NEW_TOKENS}}}
metric_list: [{{metric: exact_match}}]
"""
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""


@pytest.mark.slow
@pytest.mark.skipif(not PROGRAM.exists(), reason="lm-eval is not installed (make peers)")
def test_lm_eval_finds_the_model_s_own_likelihoods_and_text(tmp_path: Path) -> None:
    model, directory = load_model("r2-nano").eval(), tmp_path / "r2-nano"
    save_model(model, directory)
    write_tokenizer("digits", directory)
    drawn = random.Random(1)
    questions = [f"+{drawn.randrange(10**9)}" for _ in range(NUM_QUESTIONS)]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": q, "choices": ["=1", "=23", "7"]}) + "\n" for q in questions))
    for name, task in (("choosing", CHOOSING), ("writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(task + COMMON.format(data=data))
    with serving(directory, "--chip", "cpu") as server:
        samples = evaluated(server.url, directory, tmp_path)
        assert server.metric("beringia_requests_open") == 0
    for sample in samples["choosing"]:
        for (said, _), choice in zip(sample["filtered_resps"], sample["doc"]["choices"], strict=True):
            assert float(said) == pytest.approx(likelihood(model, sample["doc"]["question"], choice), abs=SAME_LOGPROB)
    for sample in samples["writing"]:
        assert sample["filtered_resps"] == [written(model, sample["doc"]["question"])]
    assert [len(found) for found in samples.values()] == [NUM_QUESTIONS, NUM_QUESTIONS]


def evaluated(url: str, model: Path, tasks: Path) -> dict[str, list[dict[str, Any]]]:
    arguments = f"model=r2-nano,base_url={url}/v1/completions,tokenizer={model},tokenizer_backend=huggingface"
    command = [str(PROGRAM), "--model", "local-completions", "--model_args", f"{arguments},num_concurrent=4"]
    command += ["--tasks", "choosing,writing", "--include_path", str(tasks), "--log_samples"]
    command += ["--output_path", str(tasks / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "cache")}
    ended = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=GIVE_UP_SECONDS)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return {
        name: [
            json.loads(line)
            for path in (tasks / "out").rglob(f"samples_{name}_*")
            for line in path.read_text().splitlines()
        ]
        for name in ("choosing", "writing")
    }


def likelihood(model: Decoder, question: str, choice: str) -> float:
    tokenizer = load_tokenizer("digits")
    prompt, rest = tokenizer.encode(question), tokenizer.encode(choice)
    with torch.no_grad():
        logprobs_TV = model.logits(torch.tensor([prompt + rest]))[0].log_softmax(-1)
    return sum(float(logprobs_TV[len(prompt) - 1 + place, token]) for place, token in enumerate(rest))


def written(model: Decoder, question: str) -> str:
    tokenizer = load_tokenizer("digits")
    tokens = greedy(model, tokenizer.encode(question), NEW_TOKENS, tokenizer.end)
    return tokenizer.decode(tokens, skip_special_tokens=True).partition("3")[0]
