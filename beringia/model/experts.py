"""Routed experts as DeepSeek-V3 has them (arXiv 2412.19437 section 2.1.2): sigmoid scores, groups, a correction bias.

The bias only decides *which* experts are chosen, never their weights, and moves after each optimizer step so that loads
even out (`update_router_biases`); no auxiliary loss, no dropped tokens. Expert weights are stacked in memory and split
into one tensor an expert on disk.

The choice of experts can be recorded and forced, because a replay in float64 must follow the chip's own choices: near a
tie another choice is not an error of arithmetic.

M rows (tokens), D hidden, E experts, K experts a token, A = M K assignments, C slots an expert, S = E C slots, F expert
width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from beringia.model.config import DecoderConfig
from beringia.model.layers import FeedForward, precise


class Router(nn.Module):
    """Scores experts and chooses K of them for each token; computes in float32 (float64 for float64)."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_experts, self.num_chosen = config.n_routed_experts, config.num_experts_per_tok
        self.num_groups, self.num_groups_kept = config.n_group, config.topk_group
        self.normalises, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts))

    def scores(self, x_MD: torch.Tensor) -> torch.Tensor:
        """Affinity of each token for each expert, in (0, 1)."""
        dtype = precise(x_MD.dtype)
        return F.linear(x_MD.to(dtype), self.weight.to(dtype)).sigmoid()

    def choose(self, scores_ME: torch.Tensor) -> torch.Tensor:
        """Indices M K of the experts with the best biased scores, within the best groups."""
        biased_ME = scores_ME.detach() + self.e_score_correction_bias
        if self.num_groups_kept < self.num_groups:
            biased_MGE = biased_ME.unflatten(-1, (self.num_groups, -1))
            group_MG = biased_MGE.topk(2, dim=-1).values.sum(-1)
            kept_MG = torch.zeros_like(group_MG, dtype=torch.bool)
            kept_MG.scatter_(1, group_MG.topk(self.num_groups_kept, dim=-1).indices, True)
            biased_ME = biased_MGE.masked_fill(~kept_MG.unsqueeze(-1), float("-inf")).flatten(1)
        return biased_ME.topk(self.num_chosen, dim=-1).indices

    def weigh(self, scores_ME: torch.Tensor, chosen_MK: torch.Tensor) -> torch.Tensor:
        """Weight of each chosen expert, from the unbiased scores."""
        weights_MK = scores_ME.gather(1, chosen_MK)
        if self.normalises:
            weights_MK = weights_MK / (weights_MK.sum(-1, keepdim=True) + 1e-20)
        return weights_MK * self.scaling


def plan_slots(chosen_MK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay the assignments out expert by expert, C slots each, where C is the largest load: no token is dropped.

    Returns the slot (expert times C plus rank) of each assignment, M K, and the row whose copy each of the S slots
    holds, M for an empty one. So every product is one batched product over experts, and rows move either way by a
    gather: no atomic additions, the same result on every run. Waits for the device once, for C.
    """
    expert_A = chosen_MK.flatten()
    load_E = count(expert_A, num_experts)
    capacity = int(load_E.max())
    order_A = expert_A.argsort(stable=True)
    first_E = load_E.cumsum(0) - load_E
    # Slots in sorted order: the expert's first slot, plus how many of its assignments came before.
    expert_sorted_A = expert_A[order_A]
    place_A = torch.arange(len(order_A), device=order_A.device)
    slot_sorted_A = expert_sorted_A * capacity + place_A - first_E[expert_sorted_A]
    slot_A = torch.empty_like(order_A).scatter_(0, order_A, slot_sorted_A)
    row_S = torch.full((num_experts * capacity,), len(chosen_MK), dtype=order_A.dtype, device=order_A.device)
    row_S.scatter_(0, slot_sorted_A, order_A // chosen_MK.shape[1])
    return slot_A.view_as(chosen_MK), row_S


def spread(x_MD: torch.Tensor, row_S: torch.Tensor) -> torch.Tensor:
    """Copy rows to their slots; empty slots are zero."""
    padded_D = torch.cat((x_MD, x_MD.new_zeros(1, x_MD.shape[1])))
    return padded_D.index_select(0, row_S)


def gather_sum(x_SD: torch.Tensor, slot_MK: torch.Tensor) -> torch.Tensor:
    """For each row the sum over its K slots."""
    return x_SD.index_select(0, slot_MK.flatten()).view(*slot_MK.shape, -1).sum(1)


class Dispatch(torch.autograd.Function):
    """`spread`, whose adjoint is `gather_sum`."""

    @staticmethod
    def forward(ctx: Any, x_MD: torch.Tensor, slot_MK: torch.Tensor, row_S: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slot_MK)
        return spread(x_MD, row_S)

    @staticmethod
    def backward(ctx: Any, grad_SD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slot_MK,) = ctx.saved_tensors
        return gather_sum(grad_SD, slot_MK), None, None


class Combine(torch.autograd.Function):
    """`gather_sum`, whose adjoint is `spread`."""

    @staticmethod
    def forward(ctx: Any, x_SD: torch.Tensor, slot_MK: torch.Tensor, row_S: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row_S)
        return gather_sum(x_SD, slot_MK)

    @staticmethod
    def backward(ctx: Any, grad_MD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (row_S,) = ctx.saved_tensors
        return spread(grad_MD, row_S), None, None


class Experts(nn.Module):
    """All experts' weights, stacked: gate above up (E 2F D), and down (E D F)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        num, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.num_experts = num
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, width))

    def forward(self, x_MD: torch.Tensor, chosen_MK: torch.Tensor, weights_MK: torch.Tensor) -> torch.Tensor:
        slot_MK, row_S = plan_slots(chosen_MK, self.num_experts)
        x_ECD = Dispatch.apply(x_MD, slot_MK, row_S).view(self.num_experts, -1, x_MD.shape[1])
        gate_ECF, up_ECF = self._product(x_ECD, self.gate_up_proj).chunk(2, dim=-1)
        # The weight of an assignment commutes with the linear down projection, and F is smaller than D.
        weight_S = torch.zeros_like(row_S, dtype=x_MD.dtype).scatter(
            0, slot_MK.flatten(), weights_MK.flatten().to(x_MD.dtype)
        )
        h_ECF = F.silu(gate_ECF) * up_ECF * weight_S.view(self.num_experts, -1, 1)
        return Combine.apply(self._product(h_ECF, self.down_proj).flatten(0, 1), slot_MK, row_S)

    def _product(self, x_ECK: torch.Tensor, weight_ENK: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x_ECK, weight_ENK.to(x_ECK.dtype).transpose(1, 2))


def count(expert_A: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert occurs, int64, shape E."""
    zeros_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_A.device)
    return zeros_E.scatter_add_(0, expert_A, torch.ones_like(expert_A))


class MixtureOfExperts(nn.Module):
    """Each token goes to its K chosen experts and to the shared ones."""

    expert_counts: torch.Tensor
    """Tokens each expert got in training mode since the last `update_router_biases`, int64, not saved."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = FeedForward(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        self.register_buffer("expert_counts", torch.zeros(config.n_routed_experts, dtype=torch.int64), persistent=False)
        self.records = False
        self.chosen: torch.Tensor | None = None
        self.forced: torch.Tensor | None = None

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_MD = x_BTD.flatten(0, -2)
        scores_ME = self.gate.scores(x_MD)
        chosen_MK = self.gate.choose(scores_ME) if self.forced is None else self.forced
        self._note(chosen_MK)
        routed_MD = self.experts(x_MD, chosen_MK, self.gate.weigh(scores_ME, chosen_MK))
        return routed_MD.view_as(x_BTD) + self.shared_experts(x_BTD)

    def _note(self, chosen_MK: torch.Tensor) -> None:
        if self.records:
            self.chosen = chosen_MK.detach()
        if self.training and self.forced is None:
            self.expert_counts += count(chosen_MK.flatten(), self.gate.num_experts)


@contextmanager
def recording_routes(layer: nn.Module) -> Iterator[None]:
    """Inside, `layer.mlp.chosen` is the M K expert indices of the last forward pass (None for a dense layer)."""
    mlp = layer.mlp
    if not isinstance(mlp, MixtureOfExperts):
        yield
        return
    mlp.records, mlp.chosen = True, None
    try:
        yield
    finally:
        mlp.records = False


@contextmanager
def forcing_routes(layer: nn.Module, indices_MK: torch.Tensor | None) -> Iterator[None]:
    """Inside, the layer sends its tokens to these experts and counts nothing. None (a dense layer) changes nothing."""
    mlp = layer.mlp
    if not isinstance(mlp, MixtureOfExperts) or indices_MK is None:
        yield
        return
    mlp.forced = indices_MK
    try:
        yield
    finally:
        mlp.forced = None
