"""Routed experts: scores, the choice within groups, weights, and beside them a shared block, where there is one.

Sigmoid scores are DeepSeek-V3's (arXiv 2412.19437 section 2.1.2), with a correction bias that only decides *which*
experts are chosen, never their weights, and moves after each optimizer step so that loads even out
(`update_router_biases`); softmax scores are Qwen3-MoE's (arXiv 2505.09388), and nothing evens out their loads here. No
auxiliary loss, no dropped tokens. Expert weights are stacked in memory and split into one tensor an expert on disk.

The choice of experts can be recorded and forced, because a replay in float64 must follow the chip's own choices: near a
tie another choice is not an error of arithmetic.

M rows (tokens), D hidden, E experts, K experts a token, A = M K assignments, P places for them, F expert width.
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

UNIT = 64
"""Rows: an expert's are filled up to a multiple of it in `UNIT_FORMATS`, whose products are compiled anew for every
shape (oneDNN on CPUs) or want aligned sizes (matrix units); how many rows an expert has changes with every step."""
UNIT_FORMATS = (torch.bfloat16, torch.float16)


class Router(nn.Module):
    """Scores experts and chooses K of them for each token; computes in float32 (float64 for float64)."""

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_experts, self.num_chosen = config.n_routed_experts, config.num_experts_per_tok
        self.num_groups, self.num_groups_kept = config.n_group, config.topk_group
        self.normalises, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.shares = config.router == "softmax"
        bias_E = None if self.shares else torch.zeros(self.num_experts)
        self.register_buffer("e_score_correction_bias", bias_E)

    def scores(self, x_MD: torch.Tensor) -> torch.Tensor:
        """Affinity of each token for each expert, in (0, 1)."""
        dtype = precise(x_MD.dtype)
        return self.squash(F.linear(x_MD.to(dtype), self.weight.to(dtype)))

    def squash(self, logits_ME: torch.Tensor) -> torch.Tensor:
        """Scores from products: each by itself, or as shares of 1."""
        return logits_ME.softmax(-1) if self.shares else logits_ME.sigmoid()

    def choose(self, scores_ME: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        """Indices M K of the experts with the best biased scores, within the best groups."""
        biased_ME = scores_ME.detach() if bias_E is None else scores_ME.detach() + bias_E
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


def sort_by_expert(
    chosen_MK: torch.Tensor, num_experts: int, unit: int = 1
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Places for all assignments, sorted by expert: the row of each place (P), the place of each assignment (M K), and
    how many places each expert has, a multiple of `unit`. A place that is left over holds row 0."""
    expert_A = chosen_MK.flatten()
    arange_A = torch.arange(len(expert_A), device=expert_A.device)
    rank_A = torch.empty_like(expert_A).scatter_(0, expert_A.argsort(stable=True), arange_A)
    load_E = count(expert_A, num_experts)
    left_over_E = -load_E % unit
    place_A = rank_A + (left_over_E.cumsum(0) - left_over_E)[expert_A]
    # The sizes of the products depend on the data: the host waits for the device here, once.
    places = (load_E + left_over_E).tolist()
    row_P = expert_A.new_zeros(sum(places)).scatter_(0, place_A, arange_A // chosen_MK.shape[1])
    return row_P, place_A.view_as(chosen_MK), places


def gather_sum(x_PD: torch.Tensor, place_MK: torch.Tensor) -> torch.Tensor:
    """For each row the sum over its K assignments."""
    return x_PD.index_select(0, place_MK.flatten()).view(*place_MK.shape, -1).sum(1)


class Dispatch(torch.autograd.Function):
    """Copies each row to its K places. Its adjoint is a gather too: no atomic additions, the same sum on every run."""

    @staticmethod
    def forward(ctx: Any, x_MD: torch.Tensor, row_P: torch.Tensor, place_MK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_MK)
        return x_MD.index_select(0, row_P)

    @staticmethod
    def backward(ctx: Any, grad_PD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (place_MK,) = ctx.saved_tensors
        return gather_sum(grad_PD, place_MK), None, None


class Combine(torch.autograd.Function):
    """Sums each row's K places: the adjoint of `Dispatch`, and the other way round.

    A place that is left over gets the gradient of row 0, which is multiplied with its weight of 0.
    """

    @staticmethod
    def forward(ctx: Any, x_PD: torch.Tensor, row_P: torch.Tensor, place_MK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row_P)
        return gather_sum(x_PD, place_MK)

    @staticmethod
    def backward(ctx: Any, grad_MD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (row_P,) = ctx.saved_tensors
        return grad_MD.index_select(0, row_P), None, None


def grouped_linear(x_PD: torch.Tensor, weight_EFD: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Rows sorted by expert, each multiplied with its expert's matrix; `places` says how many rows each expert has."""
    weights = weight_EFD.to(x_PD.dtype).unbind(0)
    return torch.cat([F.linear(x, weight) for x, weight in zip(torch.split(x_PD, places), weights, strict=True)])


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
        row_P, place_MK, places = sort_by_expert(chosen_MK, self.num_experts, self.unit(chosen_MK, x_MD.dtype))
        x_PD: torch.Tensor = Dispatch.apply(x_MD, row_P, place_MK)  # type: ignore[no-untyped-call]  # untyped in torch
        gate_PF, up_PF = grouped_linear(x_PD, self.gate_up_proj, places).chunk(2, dim=-1)
        # An assignment's weight commutes with the linear down projection, and F is smaller than D.
        weight_P = weights_MK.new_zeros(len(row_P)).scatter(0, place_MK.flatten(), weights_MK.flatten())
        h_PF = F.silu(gate_PF) * up_PF * weight_P.unsqueeze(-1).to(x_MD.dtype)
        out_PD = grouped_linear(h_PF, self.down_proj, places)
        out_MD: torch.Tensor = Combine.apply(out_PD, row_P, place_MK)  # type: ignore[no-untyped-call]  # untyped in torch
        return out_MD

    def unit(self, chosen_MK: torch.Tensor, dtype: torch.dtype) -> int:
        """What each expert's rows are filled up to a multiple of; nothing where that could more than double them."""
        return UNIT if dtype in UNIT_FORMATS and chosen_MK.numel() >= UNIT * self.num_experts else 1


def count(expert_A: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert occurs, int64, shape E."""
    zeros_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_A.device)
    return zeros_E.scatter_add_(0, expert_A, torch.ones_like(expert_A))


def run(experts: Experts, x_MD: torch.Tensor, chosen_MK: torch.Tensor, weights_MK: torch.Tensor) -> torch.Tensor:
    """Call the experts."""
    return experts(x_MD, chosen_MK, weights_MK)


class MixtureOfExperts(nn.Module):
    """Each token goes to its K chosen experts, and through the shared block if there is one."""

    expert_counts: torch.Tensor
    """Tokens each expert got in training mode since the last `update_router_biases`, int64, not saved."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = FeedForward(config.hidden_size, shared) if shared else None
        self.register_buffer("expert_counts", torch.zeros(config.n_routed_experts, dtype=torch.int64), persistent=False)
        self.run_experts = run
        self.records = False
        self.chosen: torch.Tensor | None = None
        self.forced: torch.Tensor | None = None

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_MD = x_BTD.flatten(0, -2)
        scores_ME = self.gate.scores(x_MD)
        bias_E = self.gate.e_score_correction_bias
        chosen_MK = self.gate.choose(scores_ME, bias_E) if self.forced is None else self.forced
        self._note(chosen_MK)
        routed_MD = self.run_experts(self.experts, x_MD, chosen_MK, self.gate.weigh(scores_ME, chosen_MK))
        routed_BTD = routed_MD.view_as(x_BTD)
        return routed_BTD if self.shared_experts is None else routed_BTD + self.shared_experts(x_BTD)

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
