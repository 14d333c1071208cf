"""The choice of experts, recomputed from the layer's own input: every chosen expert must have been among the best.

Near a tie the choice may fall either way, because scores are rounded. So an expert that was not chosen may be better
than one that was, by as much as the rounding of both scores allows: of products, `numerics.metrics`' floor times the
sum of magnitudes (Higham, Accuracy and Stability, section 3.1), through the slope of the score; and of what comes
after them, `ELEMENTARY_ULPS`. Where experts are chosen within groups, a group's score has the margins of the two that
it adds up; experts count as passed over only in groups that were kept for certain.

T tokens, D hidden, E experts, K experts a token, G groups.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from beringia.model.experts import Router
from beringia.model.layers import precise
from beringia.numerics.metrics import ELEMENTARY_ULPS, UNIT_ROUNDOFF, accumulation_floor, rounding_floor
from beringia.train.guard.finding import Finding

_SLOPE = {False: 0.25, True: 0.5}
"""Most that a score changes with its product, where scores are sigmoids; and with the largest change of any product,
where they are shares of 1 (p (1 - p) times twice that)."""


def judge_routes(detector: str, site: str, router: Router, x_TD: torch.Tensor, chosen_TK: torch.Tensor) -> Finding:
    """Hold the experts of some tokens against scores in float64; `router` has the weights that the chip used."""
    scores_TE, margins_TE = _scores(router, x_TD)
    bias_E = router.e_score_correction_bias
    if bias_E is not None:
        scores_TE = scores_TE + bias_E.to(torch.float64)
    margins_TE = margins_TE + rounding_floor(precise(x_TD.dtype)) * scores_TE.abs()
    missed = shortfall(scores_TE, margins_TE, chosen_TK, router.num_groups, router.num_groups_kept)
    what = "how much better an expert was that was not chosen, over what the rounding of scores allows,"
    return Finding(detector, site, "mlp.experts", missed, 1.0, what)


def _scores(router: Router, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores before the bias, float64, and how far from them a sound chip's may be."""
    dtype = precise(x_TD.dtype)
    x_TD, weight_ED = x_TD.to(torch.float64), router.weight.detach().to(torch.float64)
    products_TE = F.linear(x_TD, weight_ED)
    scores_TE = router.squash(products_TE)
    per_product = rounding_floor(dtype) + accumulation_floor(x_TD.shape[1], dtype)
    errors_TE = per_product * F.linear(x_TD.abs(), weight_ED.abs())
    if router.shares:
        errors_TE = errors_TE.amax(-1, keepdim=True).expand_as(errors_TE)
    rounding = 2.0 * ELEMENTARY_ULPS * UNIT_ROUNDOFF[dtype]
    return scores_TE, _SLOPE[router.shares] * errors_TE + rounding * scores_TE


def shortfall(
    scores_TE: torch.Tensor, margins_TE: torch.Tensor, chosen_TK: torch.Tensor, groups: int = 1, kept: int = 1
) -> float:
    """The most, over tokens, by which a chosen expert (or its group) was worse than one that was passed over, in units
    of the margins of both; infinite where an expert was chosen twice, or by what is no number, 0 where none was
    worse."""
    chosen_twice = (chosen_TK.sort(-1).values.diff(dim=-1) == 0).any()
    if chosen_twice or not (scores_TE + margins_TE).isfinite().all():
        return float("inf")
    passed_over_TE = torch.ones_like(scores_TE, dtype=torch.bool).scatter_(1, chosen_TK, False)
    of_groups = 0.0
    if kept < groups:
        of_groups, certain_TE = _group_shortfall(scores_TE, margins_TE, chosen_TK, groups, kept)
        passed_over_TE &= certain_TE
    better_TKE = scores_TE.unsqueeze(1) - scores_TE.gather(1, chosen_TK).unsqueeze(-1)
    margins_TKE = margins_TE.unsqueeze(1) + margins_TE.gather(1, chosen_TK).unsqueeze(-1)
    missed_TKE = (better_TKE / margins_TKE).masked_fill(~passed_over_TE.unsqueeze(1), 0.0)
    return max(0.0, of_groups, missed_TKE.max().item())


def _group_shortfall(
    scores_TE: torch.Tensor, margins_TE: torch.Tensor, chosen_TK: torch.Tensor, groups: int, kept: int
) -> tuple[float, torch.Tensor]:
    """Likewise of the groups that chosen experts are in; and which experts are in groups that were kept for certain."""
    size = scores_TE.shape[1] // groups
    two_TG2 = scores_TE.view(-1, groups, size).topk(2, dim=-1).values
    margins_TG = margins_TE.view(-1, groups, size).amax(-1) * 2.0
    scores_TG = two_TG2.sum(-1)
    ranked_TG = scores_TG.sort(dim=-1, descending=True).values
    margin_T1 = 2.0 * margins_TG.amax(-1, keepdim=True)
    last_in_T1, first_out_T1 = ranked_TG[:, kept - 1 : kept], ranked_TG[:, kept : kept + 1]
    missed_TK = (last_in_T1 - scores_TG.gather(1, chosen_TK // size)) / margin_T1
    certain_TG = scores_TG - first_out_T1 > margin_T1
    return missed_TK.max().item(), certain_TG.repeat_interleave(size, dim=1)
