"""Reading and writing checkpoints: nothing changes on the way, and what cannot be read is refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from beringia.errors import ModelError
from beringia.model import Decoder, DecoderConfig, checkpoint_tensors, initialise, load_model, preset, save_model
from beringia.model.hugging_face_config import config_from_document, document_of
from beringia.numerics.state_hash import hash_state

TINY = replace(preset("r2-nano"), hidden_size=16, intermediate_size=24, moe_intermediate_size=8, vocab_size=20)

TINY_DENSE = DecoderConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)


def tiny(seed: int = 3) -> Decoder:
    decoder = Decoder(TINY)
    initialise(decoder, seed)
    return decoder


def saved(tmp_path: Path) -> Path:
    save_model(tiny(), tmp_path / "model")
    return tmp_path / "model"


def rewrite(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory: Path, **settings: Any) -> None:
    document = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(document | settings))


@pytest.mark.parametrize("limit", [10**9, 20_000, 1])
def test_a_saved_model_loads_bit_for_bit_in_one_file_or_many(limit: int, tmp_path: Path) -> None:
    decoder = tiny()
    decoder.model.layers[1].mlp.gate.e_score_correction_bias.normal_()
    save_model(decoder, tmp_path / "model", max_shard_bytes=limit)
    assert (tmp_path / "model" / "model.safetensors").exists() == (limit == 10**9)
    loaded = dict(checkpoint_tensors(load_model(tmp_path / "model")))
    for name, tensor in checkpoint_tensors(decoder):
        assert torch.equal(loaded[name], tensor), name


def test_bfloat16_weights_are_read_as_float32_and_the_correction_bias_is_never_rounded(tmp_path: Path) -> None:
    decoder = tiny()
    bias = decoder.model.layers[1].mlp.gate.e_score_correction_bias.normal_()
    save_model(decoder, tmp_path / "model", dtype=torch.bfloat16)
    loaded = load_model(tmp_path / "model")
    assert loaded.lm_head.weight.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, decoder.lm_head.weight.bfloat16().float())
    assert torch.equal(loaded.model.layers[1].mlp.gate.e_score_correction_bias, bias)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_held_in_the_dtype_that_is_asked_for_and_correction_biases_in_no_less_than_float32(
    dtype: torch.dtype, stored: torch.dtype, tmp_path: Path
) -> None:
    decoder = tiny()
    decoder.model.layers[1].mlp.gate.e_score_correction_bias.normal_()
    save_model(decoder, tmp_path / "model", dtype=stored)
    loaded = dict(checkpoint_tensors(load_model(tmp_path / "model", dtype=dtype)))
    for name, tensor in checkpoint_tensors(decoder):
        if name.endswith("e_score_correction_bias"):
            assert loaded[name].dtype == torch.promote_types(dtype, torch.float32)
            assert torch.equal(loaded[name], tensor.to(loaded[name].dtype))
        else:
            assert loaded[name].dtype == dtype
            assert torch.equal(loaded[name], tensor.to(stored).to(dtype)), name


def test_a_preset_in_another_dtype_is_the_same_draw_rounded() -> None:
    drawn = dict(load_model("r2-nano", seed=4).named_parameters())
    for name, parameter in load_model("r2-nano", seed=4, dtype=torch.bfloat16).named_parameters():
        assert torch.equal(parameter, drawn[name].bfloat16()), name


def test_a_dtype_that_weights_are_not_held_in_is_refused() -> None:
    with pytest.raises(ModelError, match="asked for in int8; they are held in bfloat16, float16, float32, float64"):
        load_model("r2-nano", dtype=torch.int8)


DRAWN = {
    ("r2-nano", 7, None): "ec61c245862686e57ccd4ff974f0b0d20c0a88af6a543a035dfe040ec19657b8",
    ("r2-nano", 3, 261): "1ba2428ccbe2228cb89490fbb546b5ccbfac1a93599da4062d0b86349bb6fd1f",
    ("r2-micro", 1, None): "0208de1404dbd1f8b75541cd58d4d051a574a0eeb62048db74c2164fc84b9d38",
}
"""State hashes of presets by name, seed and vocabulary, as the first runs were drawn."""


@pytest.mark.parametrize("asked", DRAWN, ids=str)
def test_a_seed_draws_the_weights_that_it_drew_for_the_first_runs(asked: tuple[str, int, int | None]) -> None:
    name, seed, size = asked
    assert hash_state(load_model(name, seed=seed, vocabulary_size=size).state_dict(), {}) == DRAWN[asked]


@pytest.mark.parametrize("source", ["preset", "directory"])
def test_only_so_many_layers_are_the_first_of_the_whole_and_its_multi_token_layer(source: str, tmp_path: Path) -> None:
    save_model(load_model("r2-nano", seed=2), tmp_path / "model")
    origin = "r2-nano" if source == "preset" else tmp_path / "model"
    whole, part = load_model(origin, seed=2).state_dict(), load_model(origin, seed=2, layers=2)
    assert part.config.num_hidden_layers == len(part.layers) == 2 and part.mtp is not None
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, whole[name.replace("model.layers.2.", "model.layers.3.")]), name


@pytest.mark.parametrize("layers", [0, 4])
def test_layers_that_the_model_has_not_are_refused(layers: int) -> None:
    with pytest.raises(ModelError, match=f"--layers {layers} was asked for; the model has 3"):
        load_model("r2-nano", layers=layers)


def test_what_is_not_read_of_a_model_of_more_layers_is_still_expected_to_be_there(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    rewrite(directory, lambda tensors: tensors.pop("model.layers.2.input_layernorm.weight"))
    with pytest.raises(ModelError, match=r"lacks model\.layers\.2\.input_layernorm"):
        load_model(directory, layers=1)


def test_a_tied_head_is_one_tensor_with_the_embedding_and_a_copy_of_it_on_the_disk_must_be_equal(
    tmp_path: Path,
) -> None:
    tied = replace(TINY_DENSE, tie_word_embeddings=True)
    decoder = Decoder(tied)
    initialise(decoder, 1)
    save_model(decoder, tmp_path / "model")
    loaded = load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    embedding = decoder.model.embed_tokens.weight.detach()
    rewrite(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    load_model(tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ModelError, match=r"model\.safetensors: lm_head\.weight differs from the tensor it repeats"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_file_is_byte_for_byte_what_safetensors_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "model", dtype=dtype)
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert content == save(load_file(tmp_path / "model" / "model.safetensors"), metadata={"format": "pt"})


def test_names_on_disk_are_those_of_deepseek(tmp_path: Path) -> None:
    names = set(load_file(saved(tmp_path) / "model.safetensors"))
    assert "model.layers.0.self_attn.q_a_proj.weight" in names
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in names
    assert "model.layers.2.mlp.gate.e_score_correction_bias" in names
    mtp = {name.removeprefix("model.layers.3.") for name in names if name.startswith("model.layers.3.")}
    extra = {"enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm", "shared_head.head"}
    assert {f"{name}.weight" for name in extra} < mtp
    assert not any("expert_counts" in name for name in names)


def test_config_carries_what_vllm_needs() -> None:
    document = document_of(preset("r2-micro"))
    assert document["topk_method"] == "noaux_tc"
    assert document["scoring_func"] == "sigmoid"
    assert document["architectures"] == ["DeepseekV3ForCausalLM"]


def test_saving_over_something_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    with pytest.raises(ModelError, match="exists already"):
        save_model(tiny(), directory)


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beringia.model.hugging_face.document_of", lambda *_: {"not JSON": object()})
    with pytest.raises(TypeError):
        save_model(tiny(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@given(seed=st.integers(0, 2**40))
@settings(max_examples=5, deadline=None)
def test_initialisation_depends_on_seed_and_name_alone(seed: int) -> None:
    first, second = tiny(seed), Decoder(replace(TINY, num_hidden_layers=2, num_nextn_predict_layers=0))
    torch.manual_seed(seed)
    initialise(second, seed)
    wanted = dict(checkpoint_tensors(first))
    for name, tensor in checkpoint_tensors(second):
        assert torch.equal(tensor, wanted[name]), name
    assert not torch.equal(tiny(seed + 1).lm_head.weight, first.lm_head.weight)


def test_initial_weights_have_the_stated_spread() -> None:
    decoder = load_model("r2-micro", seed=1)
    weight = decoder.model.layers[1].mlp.experts.gate_up_proj.detach()
    # Standard error of a standard deviation from n samples: sigma / sqrt(2 n); five of them.
    assert abs(float(weight.std()) / 0.02 - 1) < 5 / (2 * weight.numel()) ** 0.5
    assert torch.equal(decoder.model.norm.weight, torch.ones(128))


def test_loading_a_preset_leaves_the_process_wide_random_state_alone() -> None:
    before = torch.get_rng_state()
    load_model("r2-nano", seed=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_r2_presets_have_the_stated_sizes() -> None:
    def trunk(name: str) -> int:
        with torch.device("meta"):
            decoder = Decoder(replace(preset(name), num_nextn_predict_layers=0))
        return sum(parameter.numel() for parameter in decoder.parameters())

    assert trunk("r2-micro") == 1_357_216
    assert 80e6 < trunk("r2-small") < 120e6
    assert sum(parameter.numel() for parameter in load_model("r2-nano").parameters()) < 450_000


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("r2-mikro", "Did you mean 'r2-micro'"),
        ("gpt", "Known are"),
        ("no/such/directory", "There is no directory"),
    ],
)
def test_an_unknown_model_is_refused_with_a_hint(name: str, found: str) -> None:
    with pytest.raises(ModelError, match=found):
        load_model(name)


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(tmp_path)


def test_a_vocabulary_other_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="20 tokens, but the tokenizer has 54"):
        load_model(saved(tmp_path), vocabulary_size=54)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": None}, "no model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "wobble": 1}}, "wobble"),
        ({"num_nextn_predict_layers": 2}, "2 multi-token"),
        ({"n_group": 3}, "3 equal groups"),
        ({"num_key_value_heads": 2}, "as many key as query heads"),
        ({"kv_lora_rank": None}, "lacks kv_lora_rank"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"n_shared_experts": 0}, "n_shared_experts"),
    ],
)
def test_a_setting_that_is_not_computed_here_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        config_from_document(document_of(TINY) | settings)


def test_sliding_window_is_refused() -> None:
    document = {"model_type": "qwen2", "use_sliding_window": True, "vocab_size": 8, "hidden_size": 8}
    with pytest.raises(ModelError, match="use_sliding_window"):
        config_from_document(document)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    rewrite(directory, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        load_model(directory)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    rewrite(directory, lambda tensors: tensors.update({"model.layers.0.mystery": torch.zeros(1)}))
    with pytest.raises(ModelError, match=r"has unexpected model\.layers\.0\.mystery"):
        load_model(directory)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    rewrite(directory, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(17)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[17\]; the config asks for \[16\]"):
        load_model(directory)


def test_an_fp8_tensor_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    rewrite(
        directory, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(16, dtype=torch.float8_e4m3fn)})
    )
    with pytest.raises(ModelError, match="float8_e4m3fn"):
        load_model(directory)


def test_a_copy_that_differs_from_what_it_repeats_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    rewrite(directory, lambda tensors: tensors["model.layers.3.embed_tokens.weight"].add_(1))
    with pytest.raises(ModelError, match=r"model\.layers\.3\.embed_tokens\.weight differs"):
        load_model(directory)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load_model(file.parent)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "model", max_shard_bytes=20_000)
    (tmp_path / "model" / "model-00002-of-00010.safetensors").unlink(missing_ok=True)
    shard = sorted((tmp_path / "model").glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ModelError, match="is missing, though the index names it"):
        load_model(tmp_path / "model")


def test_a_checkpoint_without_the_multi_token_layer_loads_without_it(tmp_path: Path) -> None:
    directory = saved(tmp_path)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    rewrite(directory, drop)
    loaded = load_model(directory)
    assert loaded.mtp is None
    assert loaded.config.num_nextn_predict_layers == 0


def test_published_and_new_spelling_of_rotary_settings_are_the_same() -> None:
    published = document_of(preset("deepseek-v3"))
    scaling = published.pop("rope_scaling")
    new = published | {"rope_parameters": {**scaling, "rope_theta": published.pop("rope_theta")}}
    assert config_from_document(new) == preset("deepseek-v3")
