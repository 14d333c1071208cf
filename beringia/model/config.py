"""What a decoder is made of: sizes, and flags that are independent of each other.

Attention is grouped-query or latent, its projections have biases or none, routers are of one kind or the other, layers
are dense or sparse: every combination is a decoder. Which of them a published family has is in `families.py`, and only
there; everything else asks the flags. Names are those of Hugging Face's `config.json`, translated from and to it in
`hugging_face_config.py`. Reads and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from beringia.errors import ModelError


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
    """Sizes and flags of a decoder. Raises ModelError where they contradict each other."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    """How much of a head is rotated: all of it where attention is grouped-query, `qk_rope_head_dim` where it is latent
    (as transformers has it)."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Bias of the projections to queries, keys and values; of latent attention's, those down to its latents."""
    output_bias: bool = False
    """Bias of attention's output projection."""
    mlp_bias: bool = False
    """Biases of dense blocks."""
    qk_norm: bool = False
    """Grouped-query attention norms queries and keys, head by head, before it rotates them."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    latent: bool = False
    """Attention reads keys and values from a low-rank latent (DeepSeek-V2), and is not grouped-query; the widths that
    follow, up to `v_head_dim`, are its own."""
    q_lora_rank: int | None = None
    """Rank of the queries' latent; None: queries have none."""
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_interleave: bool = True
    """Rotary pairs lie next to each other in the weights (the published checkpoints), not half a head apart."""

    n_routed_experts: int = 0
    """0: all layers are dense; else the fields that follow, up to `routed_scaling_factor`, say how layers route."""
    first_k_dense_replace: int = 0
    """The first layers, this many, are dense."""
    moe_intermediate_size: int = 0
    """Width of one expert."""
    num_experts_per_tok: int = 0
    n_shared_experts: int = 1
    """How many experts wide the block is that every token goes through beside its chosen experts; 0: there is none."""
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    """`sigmoid`: an expert's score is its own, and a correction bias that evens out loads takes part in the choice
    (DeepSeek-V3). `softmax`: scores are shares of 1, and choose alone (Qwen3-MoE)."""
    n_group: int = 1
    topk_group: int = 1
    """A token's experts are chosen within this many of the `n_group` groups; a group scores as its two best experts."""
    norm_topk_prob: bool = True
    """The chosen experts' weights are divided by their sum."""
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    """1: a multi-token prediction module follows the last layer; 0: none."""

    def __post_init__(self) -> None:
        _check_attention(self)
        if self.n_routed_experts:
            _check_routing(self)
        if self.num_nextn_predict_layers not in (0, 1):
            raise ModelError(
                f"The config asks for {self.num_nextn_predict_layers} multi-token prediction layers "
                "(num_nextn_predict_layers, or num_mtp_layers); 0 and 1 are supported."
            )

    @property
    def key_width(self) -> int:
        """Width of a head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.latent else self.head_dim

    @property
    def value_width(self) -> int:
        """Width of a head's values."""
        return self.v_head_dim if self.latent else self.head_dim

    @cached_property  # asked for every token of every request
    def context_tokens(self) -> int:
        """The longest sequence that the model is made for: what the file says, or what its linear or yarn scaling
        stretches that to (whoever adds such a block seldom changes the other)."""
        lengths = {"linear": self.max_position_embeddings, "yarn": self.rope.original_max_position_embeddings}
        return max(self.max_position_embeddings, int(lengths.get(self.rope.kind, 0) * self.rope.factor))

    def is_sparse(self, index: int) -> bool:
        """Whether layer `index` routes its tokens to experts."""
        return self.n_routed_experts > 0 and index >= self.first_k_dense_replace


def _check_attention(config: DecoderConfig) -> None:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if config.head_dim % 2:
        raise ModelError(f"Rotary embedding turns pairs; the config's head_dim {config.head_dim} is odd.")
    if not config.latent:
        if heads % groups:
            raise ModelError(
                f"{heads} attention heads cannot share {groups} key-value heads evenly (num_attention_heads, "
                "num_key_value_heads)."
            )
        return
    if heads != groups:
        raise ModelError(
            f"Latent attention has as many key as query heads; the config has num_key_value_heads {groups} and "
            f"num_attention_heads {heads}."
        )
    if config.head_dim != config.qk_rope_head_dim:
        raise ModelError(
            f"Latent attention rotates qk_rope_head_dim; the config has {config.qk_rope_head_dim}, and "
            f"{config.head_dim} as head_dim."
        )
    if config.qk_norm:
        raise ModelError("Latent attention norms its latents; the config asks for qk_norm, which is of whole heads.")


def _check_routing(config: DecoderConfig) -> None:
    experts, groups, kept = config.n_routed_experts, config.n_group, config.topk_group
    # A group is scored by its two best experts (DeepSeek-V3 section 2.1.2), so it needs two.
    if experts % groups or experts // groups < 2:
        raise ModelError(
            f"{experts} experts (n_routed_experts) cannot form {groups} equal groups (n_group) of at least two."
        )
    if not 1 <= kept <= groups or config.num_experts_per_tok > kept * (experts // groups):
        raise ModelError(
            f"{config.num_experts_per_tok} experts a token (num_experts_per_tok) do not fit into {kept} of {groups} "
            "groups (topk_group, n_group)."
        )
