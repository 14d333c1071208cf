"""A decoder's weights as inference multiplies with them: cast once, products of the same input joined.

These are the *effective* weights: what the engine computes with, and what it reports a hash of. Loading other weights
writes into the same tensors, so that nothing that refers to them has to be made again.

Names are paths as in the checkpoint, up to what is joined: `qkv`, `q_kv_down`, `gate_up`. Latent attention's
`kv_b_proj` is split in the two matrices of the absorbed form (DeepSeek-V2, arXiv 2405.04434 section 2.1.2).

D hidden, N heads, G key-value heads, H head width without its rotary part P, V width of values, R latent rank,
E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from beringia.model import Decoder
from beringia.model.attention import GroupedQueryAttention, LatentAttention
from beringia.model.decoder import DecoderLayer
from beringia.model.experts import MixtureOfExperts
from beringia.model.layers import Affine, FeedForward
from beringia.numerics.state_hash import hash_state

Named = Iterator[tuple[str, torch.Tensor]]


class Weights:
    """The effective weights by name, on a device, in a dtype; norms and routers in float32."""

    def __init__(self, decoder: Decoder, device: torch.device, dtype: torch.dtype) -> None:
        self.config = decoder.config
        self.dtype = dtype
        self.device = device
        self._tensors = {
            name: tensor.detach().to(device, _dtype_of(name, dtype), copy=True).contiguous()
            for name, tensor in effective(decoder)
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def get(self, name: str) -> torch.Tensor | None:
        """A tensor that some models have: a bias, a norm of heads."""
        return self._tensors.get(name)

    @property
    def head(self) -> torch.Tensor:
        """V D; the embedding itself where they are tied."""
        return self._tensors.get("head", self._tensors["embed"])

    def load(self, decoder: Decoder) -> None:
        """Other weights of the same model, in place."""
        for name, tensor in effective(decoder):
            self._tensors[name].copy_(tensor.detach())

    @property
    def hash(self) -> str:
        """Of the effective weights: equal exactly where two engines multiply with the same numbers."""
        return hash_state(self._tensors, {})


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """As in the decoder: norms and routers compute in float32."""
    precise = name.endswith("norm") or ".router" in name
    return torch.float32 if precise else dtype


def effective(decoder: Decoder) -> Named:
    """The effective weights of a decoder, in its own dtype."""
    trunk = decoder.model
    yield "embed", trunk.embed_tokens.weight
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        yield from _of_layer(f"layers.{index}", layer)
    yield "norm", trunk.norm.weight
    if decoder.lm_head.weight is not trunk.embed_tokens.weight:
        yield "head", decoder.lm_head.weight


def _of_layer(path: str, layer: DecoderLayer) -> Named:
    yield f"{path}.input_norm", layer.input_layernorm.weight
    attention = layer.self_attn
    if isinstance(attention, LatentAttention):
        yield from _of_latent(f"{path}.attention", attention)
    else:
        assert isinstance(attention, GroupedQueryAttention)
        yield from _of_grouped(f"{path}.attention", attention)
    yield f"{path}.post_norm", layer.post_attention_layernorm.weight
    if isinstance(layer.mlp, MixtureOfExperts):
        yield from _of_experts(f"{path}.experts", layer.mlp)
        yield from _of_feed_forward(f"{path}.shared", layer.mlp.shared_experts)
    else:
        assert isinstance(layer.mlp, FeedForward)
        yield from _of_feed_forward(f"{path}.mlp", layer.mlp)


def _of_grouped(path: str, attention: GroupedQueryAttention) -> Named:
    yield from _joined(f"{path}.qkv", attention.q_proj.affine, attention.k_proj.affine, attention.v_proj.affine)
    if attention.norms_heads:
        yield f"{path}.q_norm", attention.q_norm.weight
        yield f"{path}.k_norm", attention.k_norm.weight
    yield from _joined(f"{path}.o", attention.o_proj.affine)


def _of_latent(path: str, attention: LatentAttention) -> Named:
    kv_down = attention.by_halves(attention.kv_a_proj_with_mqa.affine, attention.rank)
    if attention.compresses_queries:
        yield from _joined(f"{path}.q_kv_down", attention.q_a_proj.affine, kv_down)
        yield f"{path}.q_norm", attention.q_a_layernorm.weight
        yield from _joined(f"{path}.q_up", attention.by_halves(attention.q_b_proj.affine, attention.nope))
    else:
        yield from _joined(f"{path}.q_kv_down", attention.by_halves(attention.q_proj.affine, attention.nope), kv_down)
    yield f"{path}.kv_norm", attention.kv_a_layernorm.weight
    up_NXR = attention.kv_b_proj.weight.view(-1, attention.nope + attention.value, attention.rank)
    yield f"{path}.k_up_NHR", up_NXR[:, : attention.nope]
    yield f"{path}.v_up_NRV", up_NXR[:, attention.nope :].mT
    yield from _joined(f"{path}.o", attention.o_proj.affine)


def _of_feed_forward(path: str, block: FeedForward) -> Named:
    yield from _joined(f"{path}.gate_up", block.gate_proj.affine, block.up_proj.affine)
    yield from _joined(f"{path}.down", block.down_proj.affine)


def _of_experts(path: str, mixture: MixtureOfExperts) -> Named:
    yield f"{path}.router", mixture.gate.weight
    yield f"{path}.router_bias", mixture.gate.e_score_correction_bias
    yield f"{path}.gate_up_EFD", mixture.experts.gate_up_proj
    yield f"{path}.down_EDF", mixture.experts.down_proj


def _joined(path: str, *parts: Affine) -> Named:
    yield path, torch.cat([weight for weight, _ in parts])
    biases = [bias for _, bias in parts if bias is not None]
    if biases:
        assert len(biases) == len(parts), "all parts have a bias or none"
        yield f"{path}.bias", torch.cat(biases)
