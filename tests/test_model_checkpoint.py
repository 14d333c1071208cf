"""Reading and writing checkpoints: nothing changes on the way, and what cannot be read is refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from beringia.errors import ModelError
from beringia.model import Decoder, checkpoint_tensors, initialise, load_model, preset, save_model
from beringia.model.hugging_face_config import config_from_document, document_of

TINY = replace(preset("r2-nano"), hidden_size=16, intermediate_size=24, moe_intermediate_size=8, vocab_size=20)


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
