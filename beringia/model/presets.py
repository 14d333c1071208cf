"""Models by name: seeded random weights instead of a directory.

`r2-nano` and `r2-micro` are small enough for a laptop's CPU and have every part of the big model; `r2-small` fits one
GPU; `deepseek-v3` and `deepseek-r1` are the published configuration with 671 billion parameters, for planning and shape
tests.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from beringia.errors import ModelError
from beringia.model.config import DecoderConfig, RopeConfig

R2_MICRO = DecoderConfig(
    vocab_size=54,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    latent=True,
    q_lora_rank=96,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    first_k_dense_replace=1,
    moe_intermediate_size=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
)

R2_NANO = replace(
    R2_MICRO,
    hidden_size=64,
    intermediate_size=128,
    head_dim=32,
    q_lora_rank=48,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    moe_intermediate_size=32,
    # One over the root of the width: drawn with the 0.02 of large models, a width of 64 was still at chance after
    # 1,200 steps of digit-sum (docs/data.md).
    initializer_range=0.125,
)

R2_SMALL = replace(
    R2_MICRO,
    vocab_size=32768,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=10,
    num_attention_heads=8,
    num_key_value_heads=8,
    q_lora_rank=256,
    moe_intermediate_size=256,
    n_routed_experts=16,
    n_group=4,
    topk_group=2,
)

DEEPSEEK_V3 = DecoderConfig(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    head_dim=64,
    max_position_embeddings=163840,
    rope=RopeConfig(kind="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
    bos_token_id=0,
    eos_token_id=1,
    latent=True,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    first_k_dense_replace=3,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
)

PRESETS = {
    "r2-nano": R2_NANO,
    "r2-micro": R2_MICRO,
    "r2-small": R2_SMALL,
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-r1": DEEPSEEK_V3,
}


def preset(name: str, vocabulary_size: int | None = None) -> DecoderConfig:
    """The configuration of a named model, with another vocabulary if one is given. Raises ModelError."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known are {', '.join(PRESETS)}."
        raise ModelError(f"There is no preset {name!r}. {hint}")
    config = PRESETS[name]
    return config if vocabulary_size is None else replace(config, vocab_size=vocabulary_size)
