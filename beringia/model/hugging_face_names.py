"""Names of tensors in Hugging Face form: stacked experts one by one, what a file repeats. Reads and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from beringia.model.config import DecoderConfig
from beringia.model.decoder import Decoder, MultiTokenLayer


def checkpoint_tensors(decoder: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint under its published name, as a view of the live parameter or buffer.

    Stacked experts come out one by one. Copies (a tied head, the multi-token layer's embedding and head) do not.
    """
    for name, tensor in decoder.state_dict(keep_vars=True).items():
        if name == "lm_head.weight" and decoder.config.tie_word_embeddings:
            continue
        yield from split_experts(name, tensor)


def split_experts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor under its published name; stacked experts one by one."""
    prefix, _, leaf = name.rpartition(".")
    if leaf == "gate_up_proj":
        for expert, (gate, up) in enumerate(matrix.chunk(2) for matrix in tensor.unbind(0)):
            yield f"{prefix}.{expert}.gate_proj.weight", gate
            yield f"{prefix}.{expert}.up_proj.weight", up
    elif leaf == "down_proj":
        for expert, down in enumerate(tensor.unbind(0)):
            yield f"{prefix}.{expert}.down_proj.weight", down
    else:
        yield name, tensor


def shared_copies(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Names under which a checkpoint repeats a tensor: what the multi-token layer shares, and a tied head."""
    copies = {}
    if decoder.config.tie_word_embeddings:
        copies["lm_head.weight"] = decoder.model.embed_tokens.weight
    if decoder.mtp is not None:
        prefix = f"model.layers.{decoder.config.num_hidden_layers}"
        copies[f"{prefix}.embed_tokens.weight"] = decoder.model.embed_tokens.weight
        copies[f"{prefix}.shared_head.head.weight"] = decoder.lm_head.weight
    return copies


def multi_token_prefix(config: DecoderConfig) -> str:
    """With which the names of the multi-token layer begin."""
    return f"model.layers.{config.num_hidden_layers}."


def multi_token_names(config: DecoderConfig) -> frozenset[str]:
    """Of the multi-token layer's own tensors."""
    with torch.device("meta"):
        layer = MultiTokenLayer(config)
    prefix = multi_token_prefix(config)
    state = layer.state_dict(keep_vars=True)
    return frozenset(each for name in state for each, _ in split_experts(prefix + name, state[name]))
