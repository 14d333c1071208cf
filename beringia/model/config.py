"""What a decoder is made of: one frozen config for the families deepseek_v3, llama, qwen2 and qwen3.

Field names are those of Hugging Face's `config.json`. Translating from and to that file, and refusing what this model
does not compute, is in `hugging_face_config.py`. Reads and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Family = Literal["deepseek_v3", "llama", "qwen2", "qwen3"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: frequencies and how they are stretched for longer contexts."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    """Context length before stretching (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    """0 where the file does not say."""
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder. Fields after `q_lora_rank` matter to `deepseek_v3` only."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    """Width of a head where attention is grouped-query; for `deepseek_v3` the rotary part, as transformers has it."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Bias of all attention projections; `qwen2` has one on q, k and v always."""
    mlp_bias: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_interleave: bool = True
    """Rotary pairs lie next to each other in the weights (the published checkpoints), not half a head apart."""
    first_k_dense_replace: int = 0
    """The first layers, this many, are dense."""
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    """1: a multi-token prediction module follows the last layer; 0: none."""

    @property
    def latent(self) -> bool:
        """Whether attention is latent (`deepseek_v3`) and not grouped-query."""
        return self.family == "deepseek_v3"

    def is_sparse(self, index: int) -> bool:
        """Whether layer `index` routes its tokens to experts."""
        return self.latent and index >= self.first_k_dense_replace
