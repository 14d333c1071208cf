"""Attention, router and sparsity do not know of each other: combinations that no family here has compute what others'
code computes, learn, and answer in the engine as in training."""

from __future__ import annotations

import copy
import importlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_parity import FLOAT64_AGREEMENT, Float64Torch, batch, distance, gradients

from beringia.chips.open import open_chip
from beringia.engine import Engine, Limits, Sampling
from beringia.errors import ModelError
from beringia.model import Decoder, DecoderConfig, forcing_routes, greedy, initialise, recording_routes, save_model
from beringia.model import update_router_biases as update
from beringia.model.families import FAMILIES
from beringia.model.hugging_face_config import config_from_document, document_of

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
LATENT: dict[str, Any] = {
    "latent": True,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
ROUTED: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "first_k_dense_replace": 1}

DECODERS = {
    "latent, dense": DecoderConfig(**SIZES, **LATENT),
    "latent, softmax router": DecoderConfig(**SIZES, **LATENT, **ROUTED, router="softmax", n_shared_experts=0),
    "grouped, sigmoid router": DecoderConfig(**SIZES, **GROUPED, **ROUTED, **GROUPS),
    "grouped, sigmoid router, norms, biases": DecoderConfig(
        **SIZES, **GROUPED, **ROUTED, **GROUPS, qk_norm=True, attention_bias=True, mlp_bias=True, n_shared_experts=2
    ),
    "grouped, softmax router, shared": DecoderConfig(
        **SIZES, **GROUPED, **ROUTED, router="softmax", output_bias=True, norm_topk_prob=False
    ),
    "grouped, sigmoid router, no shared": DecoderConfig(**SIZES, **GROUPED, **ROUTED, n_shared_experts=0),
}
DRAFTING = {name: replace(config, num_nextn_predict_layers=1) for name, config in DECODERS.items()}


def built(config: DecoderConfig, seed: int = 0) -> Decoder:
    """With weights that exercise every term: norms not one, biases not zero."""
    decoder = Decoder(config)
    initialise(decoder, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.copy_(name.endswith("norm.weight") + 0.1 * torch.randn(tensor.shape, generator=generator))
    return decoder


def loss_of(decoder: Decoder) -> torch.Tensor:
    tokens, labels = batch()
    losses = decoder(tokens, labels)
    main = losses.main_sum / losses.target_count
    return main + losses.mtp_sum / losses.mtp_count if decoder.mtp is not None else main


# float32's own error next to float64's, over a dozen products in a row; a lost term is of order 1.
FLOAT32_AGREEMENT = 100 * 2.0**-24


@pytest.mark.parametrize("name", DRAFTING)
def test_a_step_s_gradients_are_those_of_float64(name: str) -> None:
    decoder = built(DRAFTING[name])
    exact = copy.deepcopy(decoder).double()
    exact.set_compute_dtype(torch.float64)
    routes = {}
    for index, layer in enumerate(decoder.model.layers):
        with recording_routes(layer):
            loss_of(decoder)
            routes[index] = getattr(layer.mlp, "chosen", None)
    with_routes = [forcing_routes(layer, routes[index]) for index, layer in enumerate(exact.model.layers)]
    for context in with_routes:
        context.__enter__()
    loss_of(exact).backward()
    loss_of(decoder).backward()
    for (place, found), wanted in zip(decoder.named_parameters(), exact.parameters(), strict=True):
        assert wanted.grad is not None and found.grad is not None, place
        assert distance(found.grad.double(), wanted.grad) <= FLOAT32_AGREEMENT, place


@pytest.mark.parametrize("name", DRAFTING)
def test_float64_gradients_are_the_slopes_of_the_loss(name: str) -> None:
    """Along a random direction, routes held: the central difference is off by its third derivative times h^2."""
    decoder = built(DRAFTING[name]).double()
    decoder.set_compute_dtype(torch.float64)
    for layer in decoder.model.layers:
        with recording_routes(layer):
            loss_of(decoder)
        forcing_routes(layer, getattr(layer.mlp, "chosen", None)).__enter__()
    loss_of(decoder).backward()
    generator = torch.Generator().manual_seed(4)
    directions = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in decoder.parameters()]
    slope = sum(
        float((p.grad * d).sum()) for p, d in zip(decoder.parameters(), directions, strict=True) if p.grad is not None
    )
    step = 1e-5
    with torch.no_grad():
        for parameter, direction in zip(decoder.parameters(), directions, strict=True):
            parameter += step * direction
        above = float(loss_of(decoder))
        for parameter, direction in zip(decoder.parameters(), directions, strict=True):
            parameter -= 2 * step * direction
        below = float(loss_of(decoder))
    assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-6)
