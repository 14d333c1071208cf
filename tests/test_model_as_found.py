"""Directories as people have them: what does no harm is read and told, what is not what it looks like is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_runs import beringia
from test_model_parity import OF_FAMILY, SMALL, drawn

from beringia.data import check_vocabulary, load_tokenizer, write_tokenizer
from beringia.errors import DataError, ModelError
from beringia.model import config_of, load_model, preset, save_model
from beringia.model.families import FAMILIES
from beringia.model.hugging_face_config import config_from_document, document_of
from beringia.model.hugging_face_names import multi_token_names
from beringia.qualify.subject import DecoderSubject

NAMES = [family.model_type for family in FAMILIES]
TINY = replace(preset("r2-nano"), hidden_size=16, intermediate_size=24, moe_intermediate_size=8, vocab_size=261)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small model with a multi-token layer, and its tokenizer."""
    from beringia.model import Decoder, initialise

    decoder = Decoder(TINY)
    initialise(decoder, 3)
    save_model(decoder, tmp_path / "model")
    write_tokenizer("bytes", tmp_path / "model")
    return tmp_path / "model"


def edit(directory: Path, **settings: Any) -> None:
    document = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(document | settings))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def logits_of(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(directory)(torch.arange(20)[None])


# What does no harm


@pytest.mark.parametrize(
    "name", ["layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq", "rotary_emb.cos_cached"]
)
def test_rotary_tables_in_files_are_not_read(name: str, directory: Path) -> None:
    before = logits_of(directory)
    rewrite(directory, lambda tensors: tensors.update({f"model.{name}": torch.randn(7)}))
    assert torch.equal(logits_of(directory), before)


@pytest.mark.parametrize("method", [{"quant_method": "fp8", "fmt": "e4m3"}, {"quant_method": "gptq", "bits": 4}])
def test_a_stale_word_about_quantisation_is_told_and_the_weights_are_read(
    method: dict[str, Any], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = logits_of(directory)
    edit(directory, quantization_config=method)
    assert torch.equal(logits_of(directory), before)
    assert "quantization_config" in caplog.text and "no tensor in its files is" in caplog.text


FLOAT8 = torch.float8_e4m3fn
QUANTISED: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "a scale beside": lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}),
    "float8": lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(FLOAT8)}),
    "packed integers": lambda tensors: tensors.update({"lm_head.weight": torch.zeros(4, 4, dtype=torch.int32)}),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_weights_that_are_quantised_are_refused_and_the_key_is_named(kind: str, directory: Path) -> None:
    edit(directory, quantization_config={"quant_method": "fp8"})
    rewrite(directory, QUANTISED[kind])
    with pytest.raises(ModelError, match=r"is quantised, as its config says \(quantization_config, 'fp8'\)"):
        load_model(directory)


def test_quantised_weights_without_a_word_in_the_config_are_refused_too(directory: Path) -> None:
    rewrite(directory, QUANTISED["a scale beside"])
    with pytest.raises(ModelError, match=r"weight_scale_inv.*look like a quantised model's"):
        load_model(directory)


MULTI_TOKEN = sorted(multi_token_names(TINY))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(missing=st.sets(st.sampled_from(MULTI_TOKEN), min_size=1))
def test_a_multi_token_layer_that_is_not_whole_is_left_out_and_told(
    missing: set[str], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = directory.with_name("copy")
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(directory, here)
    rewrite(here, lambda tensors: [tensors.pop(name) for name in missing])
    caplog.clear()
    assert load_model(here).mtp is None
    assert torch.equal(logits_of(here), logits_of(directory))
    if missing != set(MULTI_TOKEN):
        assert f"multi-token layer lacks {min(missing)}" in caplog.text


def test_a_multi_token_layer_that_the_config_denies_is_left_out_and_told(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(directory, num_nextn_predict_layers=0)
    assert load_model(directory).mtp is None
    assert "num_nextn_predict_layers = 0: left out" in caplog.text


def test_a_layer_more_than_the_config_says_is_no_multi_token_layer(directory: Path) -> None:
    edit(directory, num_hidden_layers=2, num_nextn_predict_layers=0)
    with pytest.raises(ModelError, match=r"unexpected model\.layers\.2"):
        load_model(directory)


def test_keys_that_nothing_is_known_of_are_told(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = logits_of(directory)
    edit(directory, logit_sofcap=30.0, use_cache=False)
    assert torch.equal(logits_of(directory), before)
    assert "its config sets logit_sofcap, of which nothing is known here" in caplog.text
    assert "use_cache" not in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_null_key_value_heads_are_as_many_as_the_query_heads(name: str, tmp_path: Path) -> None:
    theirs = drawn(name, {**SMALL, **OF_FAMILY.get(name, {})}, 1)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, num_key_value_heads=None)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


# End tokens


@pytest.mark.parametrize("of_generation", [5, [5, 6], None, "no file"])
@pytest.mark.parametrize("of_config", [4, [3, 4], None])
def test_end_tokens_are_those_at_which_transformers_ends(of_config: Any, of_generation: Any, tmp_path: Path) -> None:
    drawn("llama", SMALL, 1).save_pretrained(tmp_path)
    edit(tmp_path, eos_token_id=of_config)
    (tmp_path / "generation_config.json").unlink()
    if of_generation != "no file":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": of_generation}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    found = config_of(tmp_path).eos_token_id
    assert (list(found) if isinstance(found, tuple) else found) == theirs


def test_a_generation_config_that_names_no_end_token_leaves_that_of_the_config(directory: Path) -> None:
    edit(directory, eos_token_id=7)
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    assert config_of(directory).eos_token_id == 7


# What is not what it looks like

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
OF_MODEL = ("config.json", "generation_config.json", "model.safetensors")
OF_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def reading(name: str) -> tuple[Callable[[Path], Any], type[Exception]]:
    return (load_model, ModelError) if name in OF_MODEL else (load_tokenizer, DataError)


@pytest.mark.parametrize("name", [*OF_MODEL, *OF_TOKENIZER, "chat_template.jinja"])
def test_a_git_lfs_pointer_is_said_to_be_one(name: str, directory: Path) -> None:
    (directory / name).write_text(POINTER)
    read, kind = reading(name)
    with pytest.raises(kind, match=rf"{name} is a Git-LFS pointer and not the file itself: run git lfs pull"):
        read(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_run_where_a_model_is_meant_is_said_to_be_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    read, kind = reading(name)
    with pytest.raises(kind, match=rf"{tmp_path} is a run: `beringia export {tmp_path} --to DIR` makes a directory"):
        read(tmp_path)


@pytest.mark.parametrize("name", [*OF_MODEL, *OF_TOKENIZER, "chat_template.jinja"])
def test_a_link_to_nothing_is_said_to_be_one(name: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("../../blobs/4d7a")
    read, kind = reading(name)
    with pytest.raises(kind, match=rf"{name} is a link to \.\./\.\./blobs/4d7a, which is not there"):
        read(directory)


@pytest.mark.parametrize("shard", ["pointer", "link"])
def test_a_shard_that_is_no_file_is_said_to_be_what_it_is(shard: str, tmp_path: Path) -> None:
    save_model(load_model("r2-nano"), tmp_path / "model", max_shard_bytes=500_000)
    path = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    path.unlink()
    if shard == "pointer":
        path.write_text(POINTER)
    else:
        path.symlink_to("gone")
    with pytest.raises(ModelError, match=f"{path.name} is a (Git-LFS pointer|link to gone)"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("read", [load_model, load_tokenizer, config_of])
def test_what_is_no_directory_is_said_to_be_what_it_is(read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    (tmp_path / "link").symlink_to("gone")
    wrong: dict[Any, str] = {
        "Qwen/Qwen3-8B": "no directory Qwen/Qwen3-8B. If this is a model's name on the Hugging Face hub: nothing is",
        tmp_path / "weights.safetensors": "is a file; give the directory that it lies in",
        tmp_path / "link": "is a link to gone, which is not there",
        tmp_path / "none": "There is no directory",
    }
    for name, words in wrong.items():
        with pytest.raises((ModelError, DataError), match=words):
            read(name)


def test_two_sets_of_weights_are_refused_and_both_are_named(directory: Path) -> None:
    single = directory / "model.safetensors"
    shutil.copy(single, directory / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"two sets of weights, model\.safetensors and model-00001-of-00002"):
        load_model(directory)
    names = dict.fromkeys(load_file(single), "model-00001-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match=r"two sets of weights, .*index\.json and model\.safetensors"):
        load_model(directory)
    single.unlink()
    load_model(directory)
    shutil.copy(directory / "model-00001-of-00002.safetensors", directory / "model-00001-of-00003.safetensors")
    with pytest.raises(ModelError, match=r"two sets of weights, .*index\.json and model-00001-of-00003"):
        load_model(directory)


def test_shards_without_their_index_and_adapters_are_said_to_be_that(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ModelError, match=r"holds model-00001-of-00002\.safetensors and lacks model\.safetensors\.index"
    ):
        load_model(directory)
    (directory / "model-00001-of-00002.safetensors").unlink()
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        load_model(directory)


# Files of the wrong shape

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.just(10**30), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)
KEYS = sorted(document_of(TINY)) + ["rope_parameters", "layer_types", "quantization_config", "head_dim"]


@settings(max_examples=400, deadline=None)
@given(change=st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=2))
def test_a_config_with_values_of_any_shape_is_read_or_refused(change: dict[str, Any]) -> None:
    document = document_of(TINY) | change
    try:
        config_from_document(document)
    except ModelError as error:
        assert any(key in str(error) for key in change) or "expert" in str(error)


@settings(max_examples=60, deadline=None)
@given(document=values)
def test_a_config_that_is_no_config_is_refused(document: Any) -> None:
    with pytest.raises(ModelError):
        config_from_document(document)


@pytest.mark.parametrize("content", ["[]", '"yarn"', "3", "null", "{", "", "[" * 10000, "\x00"])
@pytest.mark.parametrize("name", [*OF_MODEL[:2], *OF_TOKENIZER])
def test_a_file_that_holds_no_object_is_one_sentence(name: str, content: str, directory: Path) -> None:
    (directory / name).write_text(content)
    read, kind = reading(name)
    with pytest.raises(kind, match=f"{name} (is not valid JSON|holds no JSON object)"):
        read(directory)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_tokenizer_with_parts_of_any_shape_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    write_tokenizer("bytes", tmp_path)
    name = data.draw(st.sampled_from(OF_TOKENIZER[:3]))
    document = json.loads((tmp_path / name).read_text())
    key = data.draw(st.sampled_from([*document, "added_tokens_decoder", "additional_special_tokens", "new_token"]))
    document[key] = data.draw(values)
    (tmp_path / name).write_text(json.dumps(document))
    with suppress(DataError):
        load_tokenizer(tmp_path).encode("text")


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["model"].update(type="NewPairs"),
        lambda document: document.update(pre_tokenizer={"type": "FutureSplit"}),
        lambda document: document.update(normalizer={"type": "FutureForm"}),
        lambda document: document.update(decoder={"type": "FutureText"}),
        lambda document: document.update(post_processor={"type": "FutureEnds"}),
        lambda document: document.update(version="9.0"),
        lambda document: document.clear(),
    ],
)
def test_a_part_that_the_library_does_not_know_is_one_sentence(change: Any, directory: Path) -> None:
    document = json.loads((directory / "tokenizer.json").read_text())
    change(document)
    (directory / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"is no tokenizer that tokenizers [\d.]+ can read \("):
        load_tokenizer(directory)


@pytest.mark.slow
def test_the_command_line_says_it_in_one_sentence_or_in_json(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")
    (directory / "config.json").write_text("[]")
    for arguments in (("serve", str(directory)), ("qualify", "cpu", "--model", str(directory))):
        done = beringia(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.startswith("beringia: ")
        done = beringia(*arguments, "--json")
        assert done.returncode == 2 and json.loads(done.stdout).keys() == {"error", "message"}


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_anything_is_qualified(tmp_path: Path) -> None:
    save_model(load_model("r2-nano"), tmp_path / "model")
    write_tokenizer("bytes", tmp_path / "model")
    with pytest.raises(DataError, match="has 261 tokens, but the model's vocabulary has only 54"):
        DecoderSubject(str(tmp_path / "model")).batch(0)


@pytest.mark.parametrize("family", NAMES)
def test_the_built_in_bytes_serve_a_model_of_any_family(family: str, tmp_path: Path) -> None:
    write_tokenizer("bytes", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": 261}))
    tokenizer = load_tokenizer(tmp_path)
    check_vocabulary(tokenizer, 261)
    text = "Bytes 1,234 - as they are.\n"
    assert tokenizer.encode(text) == load_tokenizer("bytes").encode(text)
    assert (tokenizer.end, tokenizer.pad) == (load_tokenizer("bytes").end, load_tokenizer("bytes").pad)
