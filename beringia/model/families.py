"""Published families: which `config.json` keys each has, and which flags of a decoder it stands for.

A family is stated by its difference from what all have (`COMMON` in `hugging_face_keys.py`), so that another one is
one more statement here. Nothing else in the package knows a family's name: what is computed is asked of the flags in
`DecoderConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """How one family's `config.json` says what a decoder is made of."""

    model_type: str
    architecture: str
    """The class in transformers that the file names."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `DecoderConfig` that all its models share, and that the file has no key for."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Its own keys, and the field of `DecoderConfig` that each states."""
    drafts: bool = False
    """Its files say how many multi-token prediction layers follow the last layer."""
    spellings: Mapping[str, str] = field(default_factory=dict)
    """Other names of keys, which transformers writes."""
    silent: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes where a file lacks a key and our default is another (published files are never
    silent)."""
    null: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes null for, where a value is needed."""
    window_switch: bool = False
    """Its files say apart from the width whether windows slide at all."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Its own keys with one value that is computed here; another one is refused."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """What is written whatever the model is; the keys of `fixed` that readers insist on, and what published files
    say."""


def same(*names: str) -> dict[str, str]:
    """Keys that are called as the fields they state."""
    return {name: name for name in names}


_LATENT = same("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave")
_ROUTING = same(
    "first_k_dense_replace",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)
_NO_BLOCK_BIAS = {"mlp_bias": False}
_DEEPSEEK_ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        keys=same("head_dim"),
        silent={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        flags={"attention_bias": True, "output_bias": False},
        keys=same("head_dim"),
        silent={"num_key_value_heads": 32, "max_position_embeddings": 32768},
        window_switch=True,
        fixed=_NO_BLOCK_BIAS,
        # Its readers know without being told.
        written={"attention_bias": False},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        flags={"qk_norm": True},
        keys=same("head_dim"),
        silent={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
        window_switch=True,
        fixed=_NO_BLOCK_BIAS,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        flags={"qk_norm": True, "router": "softmax", "n_shared_experts": 0},
        keys=same("head_dim", "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob")
        | {"num_experts": "n_routed_experts"},
        spellings={"num_local_experts": "num_experts"},
        silent={"num_key_value_heads": 4, "max_position_embeddings": 32768, "norm_topk_prob": False},
        window_switch=True,
        fixed=_NO_BLOCK_BIAS | {"decoder_sparse_step": 1, "mlp_only_layers": []},
        written={"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        flags={"latent": True},
        drafts=True,
        spellings={"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"},
        keys=_LATENT | _ROUTING,
        silent={
            "routed_scaling_factor": 2.5,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "num_nextn_predict_layers": 1,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        null={"norm_topk_prob": False, "rope_interleave": False},
        fixed=_NO_BLOCK_BIAS | _DEEPSEEK_ROUTING,
        # vLLM refuses to route without the first two; the others are what the published file says.
        written=_DEEPSEEK_ROUTING | {"ep_size": 1},
    ),
)
