"""Routed experts as DeepSeek-V3 has them (arXiv 2412.19437 section 2.1.2): sigmoid scores, groups, a correction bias.

The bias only decides *which* experts are chosen, never their weights, and moves after each optimizer step so that loads
even out (`update_router_biases`); no auxiliary loss, no dropped tokens. Expert weights are stacked in memory and split
into one tensor an expert on disk.

The choice of experts can be recorded and forced, because a replay in float64 must follow the chip's own choices: near a
tie another choice is not an error of arithmetic.

M rows (tokens), D hidden, E experts, K experts a token, A = M K assignments, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
            biased_MGE = biased_ME.view(len(biased_ME), self.num_groups, -1)
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


def sort_by_expert(chosen_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of each assignment when assignments are sorted by expert (A), and where each one went (M K)."""
    order_A = chosen_MK.flatten().argsort(stable=True)
    place_A = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=order_A.device))
    return order_A // chosen_MK.shape[1], place_A.view_as(chosen_MK)


def gather_sum(x_AD: torch.Tensor, place_MK: torch.Tensor) -> torch.Tensor:
    """For each row the sum over its K assignments."""
    return x_AD.index_select(0, place_MK.flatten()).view(*place_MK.shape, -1).sum(1)


class Dispatch(torch.autograd.Function):
    """Copies each row to its K places. Its adjoint is a gather too: no atomic additions, the same sum on every run."""

    @staticmethod
    def forward(ctx: Any, x_MD: torch.Tensor, row_A: torch.Tensor, place_MK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_MK)
        return x_MD.index_select(0, row_A)

    @staticmethod
    def backward(ctx: Any, grad_AD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (place_MK,) = ctx.saved_tensors
        return gather_sum(grad_AD, place_MK), None, None


class Combine(torch.autograd.Function):
    """Sums each row's K places: the adjoint of `Dispatch`, and the other way round."""

    @staticmethod
    def forward(ctx: Any, x_AD: torch.Tensor, row_A: torch.Tensor, place_MK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row_A)
        return gather_sum(x_AD, place_MK)

    @staticmethod
    def backward(ctx: Any, grad_MD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (row_A,) = ctx.saved_tensors
        return grad_MD.index_select(0, row_A), None, None


def grouped_linear(x_AD: torch.Tensor, weight_EFD: torch.Tensor, loads: list[int]) -> torch.Tensor:
    """Rows sorted by expert, each multiplied with its expert's matrix; `loads` says how many rows each expert has."""
    weights = weight_EFD.to(x_AD.dtype).unbind(0)
    return torch.cat([F.linear(x, weight) for x, weight in zip(torch.split(x_AD, loads), weights, strict=True)])


class Experts(nn.Module):
    """All experts' weights, stacked: gate above up (E 2F D), and down (E D F)."""

    __call__: Callable[..., torch.Tensor]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        num, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.num_experts = num
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, width))

    def forward(self, x_MD: torch.Tensor, chosen_MK: torch.Tensor, weights_MK: torch.Tensor) -> torch.Tensor:
        # The sizes of the products depend on the data: the host waits for the device here, once.
        loads = count(chosen_MK.flatten(), self.num_experts).tolist()
        row_A, place_MK = sort_by_expert(chosen_MK)
        x_AD: torch.Tensor = Dispatch.apply(x_MD, row_A, place_MK)  # type: ignore[no-untyped-call]  # untyped in torch
        gate_AF, up_AF = grouped_linear(x_AD, self.gate_up_proj, loads).chunk(2, dim=-1)
        # An assignment's weight commutes with the linear down projection, and F is smaller than D.
        weight_A = weights_MK.new_empty(len(row_A)).scatter(0, place_MK.flatten(), weights_MK.flatten())
        h_AF = F.silu(gate_AF) * up_AF * weight_A.unsqueeze(-1).to(x_MD.dtype)
        out_AD = grouped_linear(h_AF, self.down_proj, loads)
        out_MD: torch.Tensor = Combine.apply(out_AD, row_A, place_MK)  # type: ignore[no-untyped-call]  # untyped in torch
        return out_MD


def count(expert_A: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert occurs, int64, shape E."""
    zeros_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_A.device)
    return zeros_E.scatter_add_(0, expert_A, torch.ones_like(expert_A))


def run(experts: Experts, x_MD: torch.Tensor, chosen_MK: torch.Tensor, weights_MK: torch.Tensor) -> torch.Tensor:
    """Call the experts."""
    return experts(x_MD, chosen_MK, weights_MK)


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
        self.run_experts = run
        self.records = False
        self.chosen: torch.Tensor | None = None
        self.forced: torch.Tensor | None = None

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_MD = x_BTD.flatten(0, -2)
        scores_ME = self.gate.scores(x_MD)
        chosen_MK = self.gate.choose(scores_ME) if self.forced is None else self.forced
        self._note(chosen_MK)
        routed_MD = self.run_experts(self.experts, x_MD, chosen_MK, self.gate.weigh(scores_ME, chosen_MK))
        return routed_MD.view_as(x_BTD) + self.shared_experts(x_BTD)

    def leave_experts_eager(self) -> None:
        """Keep `torch.compile` out of the routed experts."""
        # Not at import: this loads the compiler, which takes a second.
        self.run_experts = torch.compiler.disable(run)  # type: ignore[no-untyped-call]  # untyped in torch

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
