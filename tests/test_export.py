"""A run's model as a Hugging Face directory: the values, and who can read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import beringia, small_recipe, write_recipe

from beringia.checkpoint.reader import open_checkpoint
from beringia.cli import main
from beringia.model import load_model

DEFAULT, HALF = "float32", "bf16"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of a few steps and its exports by dtype, made on the command line."""
    directory = tmp_path_factory.mktemp("exported")
    recipe = write_recipe(directory, small_recipe(train={"steps": 4, "evaluate_every": 4}))
    assert beringia("train", str(recipe), "--out", str(directory / "run")).returncode == 0
    for dtype, words in {DEFAULT: [], HALF: ["--dtype", HALF]}.items():
        done = beringia("export", str(directory / "run"), "--to", str(directory / dtype), *words)
        assert done.returncode == 0, done.stderr
    return directory


def nearest_even(values: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16 by the definition, on the bits: up when more than half is cut off, or half and odd."""
    bits = values.contiguous().numpy().view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.from_numpy(rounded.astype(np.uint16)).view(torch.bfloat16).reshape(values.shape)


def weights(directory: Path) -> Mapping[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.slow
def test_bf16_values_are_those_of_float32_rounded_to_nearest_even(exported: Path) -> None:
    whole, half = weights(exported / DEFAULT), weights(exported / HALF)
    assert whole.keys() == half.keys()
    biases = {name for name in whole if name.endswith("e_score_correction_bias")}
    assert biases and all(torch.equal(whole[name], half[name]) for name in biases), "never rounded"
    for name in whole.keys() - biases:
        assert half[name].dtype == torch.bfloat16
        assert torch.equal(half[name].view(torch.int16), nearest_even(whole[name]).view(torch.int16)), name


def test_by_default_every_bit_of_the_masters_is_kept(exported: Path) -> None:
    loaded = dict(load_model(exported / DEFAULT).named_parameters())
    with open_checkpoint(exported / "run" / "checkpoints" / "step-000004") as reader:
        assert all(reader.holds(name, parameter) for name, parameter in loaded.items())
    assert {tensor.dtype for tensor in weights(exported / DEFAULT).values()} == {torch.float32}


@pytest.mark.parametrize(("asked", "dtype"), [(DEFAULT, torch.float32), (HALF, torch.bfloat16)])
def test_the_config_says_the_dtype_and_transformers_holds_the_weights_in_it(
    exported: Path, asked: str, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    config: dict[str, Any] = json.loads((exported / asked / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    theirs = AutoModelForCausalLM.from_pretrained(exported / asked)
    assert theirs.model.embed_tokens.weight.dtype == dtype
    stored = weights(exported / asked)
    assert torch.equal(theirs.lm_head.weight, stored["lm_head.weight"])
    assert AutoTokenizer.from_pretrained(exported / asked).encode("+12") == AutoTokenizer.from_pretrained(
        exported / DEFAULT
    ).encode("+12")


def test_a_dtype_that_nothing_is_exported_in_is_a_sentence(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["export", str(exported / "run"), "--to", str(exported / "other"), "--dtype", "int8"])
    assert refused.value.code == 2 and "bf16" in capsys.readouterr().err
    assert not (exported / "other").exists()


def test_an_export_appears_with_its_tokenizer_or_not_at_all(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from beringia.campaign.export import export
    from beringia.records.run_directory import RunDirectory
    from beringia.train import trained_model

    class Killed(Exception):
        pass

    def die(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(trained_model, "_write_tokenizer_of", die)
    before = {path.name for path in exported.iterdir()}
    with pytest.raises(Killed):
        export(RunDirectory(exported / "run"), exported / "half-done")
    assert {path.name for path in exported.iterdir()} == before


def test_every_template_of_the_tokenizer_goes_along(tmp_path: Path) -> None:
    from beringia.data import load_tokenizer, write_tokenizer
    from beringia.records.recipe import parse_recipe
    from beringia.train.trained_model import write_model

    source = tmp_path / "tokenizer"
    write_tokenizer("bytes", source)
    (source / "chat_template.jinja").write_text("plain")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    recipe = parse_recipe(small_recipe() | {"data": {"text": "unused", "tokenizer": str(source)}}, "test")
    decoder = load_model("r2-nano", vocabulary_size=load_tokenizer(source).vocabulary_size)
    write_model(decoder, recipe, tmp_path / "written")
    before, after = load_tokenizer(source), load_tokenizer(tmp_path / "written")
    assert (after.tool_template, after.chat_template, after.hash) == ("with tools", "plain", before.hash)
