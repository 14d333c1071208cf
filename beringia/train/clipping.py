"""Gradient clipping by the global norm, which on the way gives the norm of every layer's gradients for nothing.

The groups are the embedding, each layer, and the last norm with the head; a tied weight belongs to the embedding.
"""

from __future__ import annotations

import torch
from torch import nn

from beringia.model import Decoder
from beringia.train.sharding import whole

EPSILON = 1e-6
"""What torch adds to the norm before it divides the limit by it."""


class Clipping:
    """Clips the gradients of one decoder."""

    def __init__(self, decoder: Decoder, limit: float) -> None:
        self.limit = limit
        self.groups = _groups(decoder)
        """Parameters by the name of their group."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the groups, in the order of the norms."""
        return tuple(self.groups)

    def clip(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale all gradients so that their norm is at most the limit. Returns (norm, norms_G), both before that, on
        the device, float32; a group without gradients has norm 0."""
        norms = [nn.utils.get_total_norm(_gradients(group)) for group in self.groups.values()]
        device = next(norm.device for norm, group in zip(norms, self.groups.values(), strict=True) if group)
        norms_G = torch.stack([whole(norm).to(device) for norm in norms])
        norm = torch.linalg.vector_norm(norms_G)
        everything = [parameter for group in self.groups.values() for parameter in group]
        nn.utils.clip_grads_with_norm_(everything, self.limit, norm)
        return norm, norms_G


def _gradients(group: list[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in group if parameter.grad is not None]


def _groups(decoder: Decoder) -> dict[str, list[nn.Parameter]]:
    modules: list[tuple[str, nn.Module]] = [("embed_tokens", decoder.model.embed_tokens)]
    modules += [(f"layers.{index}", layer) for index, layer in enumerate(decoder.model.layers)]
    modules += [("head", nn.ModuleList([decoder.model.norm, decoder.lm_head]))]
    taken: set[int] = set()
    groups: dict[str, list[nn.Parameter]] = {}
    for name, module in modules:
        groups[name] = [parameter for parameter in module.parameters() if id(parameter) not in taken]
        taken |= {id(parameter) for parameter in groups[name]}
    return groups
