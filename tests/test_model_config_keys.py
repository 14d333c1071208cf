"""Every key of transformers' configs is obeyed, without effect, or refused by name.

Over all attributes of the configs of our families: a model is made with another value of the attribute than the
default, written by transformers, and read by both. Either our logits are transformers', or the refusal names the key.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_model_parity import OF_FAMILY, SMALL, drawn
from transformers.generation import GenerationConfig

from beringia.errors import ModelError
from beringia.model import load_model
from beringia.model.families import FAMILIES
from beringia.model.hugging_face_keys import HARMLESS, fixed_keys, read_keys, unknown_keys

FAMILY_NAMES = [family.model_type for family in FAMILIES]
# Two float32 programs with logits of the order of 10; what a setting changes is of the order of 1.
AGREEMENT = 1e-3

# What transformers reads of a config beside its declared attributes: arguments under other names, and what its modeling
# code looks for in any config (`getattr(config, ...)`).
BESIDE = {
    *("model_type", "num_labels", "torch_dtype", "name_or_path", "_commit_hash", "attn_implementation"),
    *("experts_implementation", "per_layer_config", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    *("original_max_position_embeddings", "is_causal", "attention_chunk_size", "sliding_window", "layer_types"),
    *("tie_last_hidden_states", "quantization_config", "transformers_weights", "fusion_config", "head_dim"),
    *("gradient_checkpointing", "distributed_config", "mtp_hidden_states_first", "kv_sharing_modes", "mlp_bias"),
    *("logits_mup_width_multiplier", "unpadded_vocab_size", "tokenizer_class", "sep_token_id", "auto_map"),
    *("classifier_dropout", "token_classification_bias", "qk_head_dim", "attention_bias"),
}
"""Of names that begin with an underscore none but these are read from files."""


def attributes(name: str) -> set[str]:
    """Every key that a file of this family may have."""
    config = transformers.AutoConfig.for_model(name)
    declared = {field.name for field in dataclasses.fields(config)}
    mapped = set(type(config).attribute_map) | set(type(config).attribute_map.values())
    return declared | mapped | set(config.to_dict()) | set(GenerationConfig._get_default_generation_params()) | BESIDE


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_table_has_every_key_of_transformers(name: str) -> None:
    assert unknown_keys({key: None for key in attributes(name)} | {"model_type": name}) == []


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_NAMES)
def test_no_key_is_both_without_effect_and_read(family: Any) -> None:
    assert not HARMLESS & (read_keys(family) | fixed_keys(family).keys())


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
VALUES: dict[str, list[Any]] = {
    "vocab_size": [67],
    "hidden_size": [48],
    "intermediate_size": [40],
    "num_hidden_layers": [2, 4],
    "num_attention_heads": [2, 8],
    "num_key_value_heads": [1, 2, None],
    "head_dim": [6, 16, None],
    "qk_head_dim": [20, 24],
    "hidden_act": ["gelu", "swish", "relu"],
    "max_position_embeddings": [64, 4096],
    "initializer_range": [0.05],
    "rms_norm_eps": [1e-2, 1],
    "layer_types": [["full_attention"] * 3, ["sliding_attention"] * 3, ["full_attention"] * 2, "full_attention"],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 100.0}, {**YARN, "rope_theta": 50.0}, None, [], "yarn"],
    "rope_scaling": [YARN, {"type": "linear", "factor": 2.0}, {"factor": 2.0}, {}, None, [], "yarn"],
    "rope_theta": [100.0, 1000, None],
    "partial_rotary_factor": [0.5, 1.0, None],
    "original_max_position_embeddings": [16, None],
    "attention_dropout": [0.5, 0, None],
    "bos_token_id": [5, None],
    "eos_token_id": [5, [5, 6], [], None],
    "pad_token_id": [5, 60, None],
    "dtype": ["float16", "bfloat16"],
    "torch_dtype": ["float16"],
    "mlp_only_layers": [[1], [], None],
    "decoder_sparse_step": [2, 1],
    "num_experts_per_tok": [1, 3],
    "num_experts": [6],
    "num_local_experts": [6],
    "n_routed_experts": [12],
    "n_group": [1, 4, None],
    "topk_group": [2, None],
    "first_k_dense_replace": [0, 2, None],
    "q_lora_rank": [None, 8],
    "kv_lora_rank": [8],
    "qk_nope_head_dim": [4],
    "qk_rope_head_dim": [4],
    "v_head_dim": [6],
    "moe_intermediate_size": [12],
    "n_shared_experts": [2],
    "routed_scaling_factor": [1, 0.5],
    "norm_topk_prob": [True, False, None],
    "rope_interleave": [False, None],
    "num_mtp_layers": [0, 2],
    "num_nextn_predict_layers": [0, 2],
    "sliding_window": [4, None],
    "max_window_layers": [1],
    "per_layer_config": [{"1": {"intermediate_size": 24}}, {"1": {"num_key_value_heads": 1}}, {}],
    "quantization_config": [{"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}, "fp8"],
    "architectures": [["OtherModel"]],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "label2id": [{"a": 0}],
    "problem_type": ["regression"],
    "attn_implementation": ["eager"],
    "experts_implementation": ["eager"],
    "transformers_version": ["4.0.0"],
    "is_causal": [False, None, 1],
    "transformers_weights": ["other.safetensors"],
    "tie_word_embeddings": [True, None],
    "use_sliding_window": [True, None],
    "mlp_bias": [True, None],
    "attention_bias": [True, None],
    "attention_chunk_size": [4],
}
ANY_TYPE: list[Any] = [True, 3]


def cases(name: str) -> Iterator[tuple[str, Any]]:
    for key in sorted(attributes(name) - {"model_type"}):
        for value in VALUES.get(key, ANY_TYPE):
            yield key, value


def make(name: str, key: str, value: Any, directory: Path) -> None:
    """Write a model of transformers with this value in its config, the key as it was given."""
    settings = {**SMALL, **OF_FAMILY.get(name, {})}
    try:
        drawn(name, settings | {key: value}, 1).save_pretrained(directory)
    except Exception:  # a value that transformers refuses; the file says it all the same
        drawn(name, settings, 1).save_pretrained(directory)
    path = directory / "config.json"
    document = json.loads(path.read_text())
    if key.startswith("rope_") and key != "rope_interleave":
        document = {each: said for each, said in document.items() if each not in ("rope_parameters", "rope_theta")}
    for names in (("num_experts", "num_local_experts"), ("num_mtp_layers", "num_nextn_predict_layers")):
        if key in names:
            document = {each: said for each, said in document.items() if each not in names}
    path.write_text(json.dumps(document | {key: value}))


def theirs(directory: Path, tokens: torch.Tensor) -> torch.Tensor | None:
    """transformers' logits, where it takes the directory."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return model(tokens, use_cache=False, return_dict=True).logits
    except Exception:  # it refuses with classes of several libraries: there is nothing to compare with
        return None


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY_NAMES)
@torch.no_grad()
def test_another_value_of_any_key_is_obeyed_or_refused_by_name(name: str, tmp_path: Path) -> None:
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(3))
    wrong = []
    for number, (key, value) in enumerate(cases(name)):
        directory = tmp_path / str(number)
        make(name, key, value, directory)
        try:
            ours = load_model(directory)(tokens)
        except ModelError as error:
            if key not in str(error) and theirs(directory, tokens) is not None:
                wrong.append(f"{key} = {value!r}: {error}")
            continue
        wanted = theirs(directory, tokens)
        if wanted is not None and not torch.allclose(ours, wanted, rtol=0, atol=AGREEMENT):
            wrong.append(f"{key} = {value!r}: logits differ by {float((ours - wanted).abs().max()):.3g}")
    assert not wrong, "\n".join(wrong)
