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

from beringia.engine.operators.operators import Operators, Weight
from beringia.model import Decoder
from beringia.model.attention import GroupedQueryAttention, LatentAttention
from beringia.model.decoder import DecoderLayer
from beringia.model.experts import MixtureOfExperts
from beringia.model.layers import Affine, FeedForward, precise
from beringia.numerics.state_hash import combine, dtype_name, hash_tensor

Named = Iterator[tuple[str, torch.Tensor]]


class Weights:
    """The effective weights by name, on a device, in a dtype; norms and routers in float32 (float64 for float64).

    Matrices are as the operators keep them, vectors are tensors.
    """

    def __init__(
        self, decoder: Decoder, operators: Operators, device: torch.device, dtype: torch.dtype, *, drafts: bool = False
    ) -> None:
        """`drafts`: with those of the multi-token prediction layer."""
        self._drafts = drafts
        self.config = decoder.config
        self.dtype = dtype
        self.device = device
        self._operators = operators
        self._matrices: dict[str, Weight] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        for name, tensor in effective(decoder, drafts=self._drafts):
            cast = tensor.detach().to(device, _dtype_of(name, dtype), copy=True).contiguous()
            if tensor.dim() == 1:
                self._vectors[name] = cast
            else:
                self._matrices[name] = operators.weight(cast)

    def matrix(self, name: str) -> Weight:
        """What a product multiplies with."""
        return self._matrices[name]

    def vector(self, name: str) -> torch.Tensor:
        """A norm, a router's bias."""
        return self._vectors[name]

    def bias(self, name: str) -> torch.Tensor | None:
        """Of a product that has one."""
        return self._vectors.get(f"{name}.bias")

    def has(self, name: str) -> bool:
        """Whether this model has such a weight."""
        return name in self._matrices or name in self._vectors

    @property
    def head(self) -> Weight:
        """V D; the embedding itself where they are tied."""
        return self._matrices.get("head", self._matrices["embed"])

    def load(self, decoder: Decoder) -> None:
        """Other weights of the same model, in place."""
        for name, tensor in effective(decoder, drafts=self._drafts):
            if name in self._vectors:
                self._vectors[name].copy_(tensor.detach())
            else:
                cast = tensor.detach().to(self.device, _dtype_of(name, self.dtype))
                self._operators.replace(self._matrices[name], cast)

    @property
    def hash(self) -> str:
        """Of the effective weights: equal exactly where two engines multiply with the same numbers."""
        values, layout = {}, {}
        for name in sorted([*self._vectors, *self._matrices]):  # one at a time: a plain matrix may be a copy
            vector = self._vectors.get(name)
            tensor = self._operators.plain(self._matrices[name]) if vector is None else vector
            values[name] = hash_tensor(tensor, name)
            layout[name] = dtype_name(tensor.dtype), tuple(tensor.shape)
        return combine(values, layout, {})


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """As in the decoder: norms and routers compute in float32 (float64 for float64)."""
    return precise(dtype) if name.endswith("norm") or ".router" in name else dtype


def effective(decoder: Decoder, *, drafts: bool = False) -> Named:
    """The effective weights of a decoder, in its own dtype; `drafts`: with the multi-token prediction layer's."""
    trunk = decoder.model
    yield "embed", trunk.embed_tokens.weight
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        yield from _of_layer(f"layers.{index}", layer)
    yield "norm", trunk.norm.weight
    if decoder.lm_head.weight is not trunk.embed_tokens.weight:
        yield "head", decoder.lm_head.weight
    if drafts:
        mtp = decoder.mtp
        assert mtp is not None
        yield "draft.embed_norm", mtp.enorm.weight
        yield "draft.hidden_norm", mtp.hnorm.weight
        yield from _joined("draft.join", mtp.eh_proj.affine)
        yield from _of_layer(f"layers.{len(decoder.layers)}", mtp)
        yield "draft.norm", mtp.shared_head.norm.weight


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
        if layer.mlp.shared_experts is not None:
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
    yield f"{path}.k_up_NRH", up_NXR[:, : attention.nope].mT
    yield f"{path}.v_up_NVR", up_NXR[:, attention.nope :]
    yield from _joined(f"{path}.o", attention.o_proj.affine)


def _of_feed_forward(path: str, block: FeedForward) -> Named:
    yield from _joined(f"{path}.gate_up", block.gate_proj.affine, block.up_proj.affine)
    yield from _joined(f"{path}.down", block.down_proj.affine)


def _of_experts(path: str, mixture: MixtureOfExperts) -> Named:
    yield f"{path}.router", mixture.gate.weight
    if mixture.gate.e_score_correction_bias is not None:
        yield f"{path}.router_bias", mixture.gate.e_score_correction_bias
    yield f"{path}.gate_up_EFD", mixture.experts.gate_up_proj
    yield f"{path}.down_EDF", mixture.experts.down_proj


def _joined(path: str, *parts: Affine) -> Named:
    yield path, torch.cat([weight for weight, _ in parts])
    biases = [bias for _, bias in parts if bias is not None]
    if biases:
        assert len(biases) == len(parts), "all parts have a bias or none"
        yield f"{path}.bias", torch.cat(biases)
