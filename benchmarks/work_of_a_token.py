"""How many weights a token is multiplied with, and what that makes in operations and in bytes read. From shapes alone.

Matrices count, norms and biases do not (under a thousandth). The embedding is a look-up; where it is the head too, it
counts as the head. Of routed experts those count that are chosen. The multi-token layer does not count.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from beringia.model import Decoder
from beringia.model.experts import Experts


def weights_read(decoder: Decoder, rows: int = 1) -> float:
    """Weights that a step of so many rows reads: of E experts those that any row chose, E (1 - (1 - k/E)^rows) where
    choices are even (an expert that two rows chose is read once)."""
    config, total = decoder.config, 0.0
    if config.n_routed_experts:
        share = config.num_experts_per_tok / config.n_routed_experts
        read = 1 - (1 - share) ** rows
    for matrix, routed in _matrices(decoder):
        total += matrix.numel() * (read if routed else 1.0)
    return total


def training_operations(decoder: Decoder, tokens: int) -> float:
    """Floating-point operations of one token's forward and backward pass in a sequence of `tokens`.

    Two a weight forwards, and twice that backwards (PaLM, arXiv 2204.02311, appendix B). Causal attention's two
    products read half of the sequence on average.
    """
    config = decoder.config
    if config.latent:
        widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        widths = 2 * config.head_dim
    attention = config.num_hidden_layers * config.num_attention_heads * widths * tokens
    return 6 * weights_read(decoder) + 3 * attention


def _matrices(decoder: Decoder) -> Iterator[tuple[torch.Tensor, bool]]:
    """Each matrix once, and whether only tokens that chose its expert read it."""
    routed = {id(p) for module in decoder.modules() if isinstance(module, Experts) for p in module.parameters()}
    beside = set() if decoder.mtp is None else {id(parameter) for parameter in decoder.mtp.parameters()}
    if decoder.lm_head.weight is not decoder.model.embed_tokens.weight:
        beside.add(id(decoder.model.embed_tokens.weight))
    for parameter in decoder.parameters():
        if parameter.ndim >= 2 and id(parameter) not in beside:
            yield parameter, id(parameter) in routed
