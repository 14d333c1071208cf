"""Operators in torch's own, on any device that torch computes on.

Letters as in `operators.py`; G key-value heads, J heads a group, T rows of one sequence, Y = J T, S tokens in the
cache, C sequences that decode.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from beringia.engine.operators.operators import CacheLayout, Operators
from beringia.engine.places import Places
from beringia.model import rope as rotary
from beringia.model.experts import Router, grouped_linear, sort_by_expert
from beringia.model.layers import precise
from beringia.model.rope import Rope

TILE = 16
"""Rows that are computed together where a row's result may not depend on how many there are: libraries choose another
kernel, with another order of sums, for another shape."""


class InTorch(Operators):
    """Activations have the weights' dtype; norms, softmax and router compute in float32."""

    name = "torch"

    def __init__(self, *, batch_invariant: bool = False) -> None:
        """`batch_invariant`: every product has the same shape in every step, so that a row's bits do not depend on the
        others. Attention is computed for each sequence by itself, in tiles of positions."""
        self.batch_invariant = batch_invariant

    def weight(self, tensor_XNK: torch.Tensor) -> torch.Tensor:
        return tensor_XNK

    def replace(self, weight: torch.Tensor, tensor_XNK: torch.Tensor) -> None:
        weight.copy_(tensor_XNK)

    def plain(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def embed(self, weight_VD: torch.Tensor, token_M: torch.Tensor) -> torch.Tensor:
        return weight_VD.index_select(0, token_M)

    def norm(
        self, x_MXD: torch.Tensor, weight_D: torch.Tensor, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        def of(x_MXD: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x_MXD.to(weight_D.dtype), weight_D.shape, weight_D, eps).to(x_MXD.dtype)

        normed = self._in_tiles(of, x_MXD)
        return normed if out is None else out.copy_(normed)

    def linear(
        self,
        x_MK: torch.Tensor,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None = None,
        add_to: torch.Tensor | None = None,
    ) -> torch.Tensor:
        product = self._in_tiles(lambda x: F.linear(x, weight_NK, bias_N), x_MK.to(weight_NK.dtype))
        return product if add_to is None else add_to.add_(product)

    def by_head(self, x_MNK: torch.Tensor, weight_NXK: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        product = self._in_tiles(lambda x: (x.transpose(0, 1) @ weight_NXK.mT).transpose(0, 1), x_MNK)
        return product if out is None else out.copy_(product)

    def rotate(self, x_MNP: torch.Tensor, rope: Rope, position_M: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        cos_M1Q, sin_M1Q = (table_LQ.index_select(0, position_M).unsqueeze(1) for table_LQ in rope)
        return out.copy_(rotary.rotate(x_MNP, (cos_M1Q, sin_M1Q)))

    def keep(self, cache: torch.Tensor, slot_M: torch.Tensor, row_MW: torch.Tensor) -> None:
        cache.flatten(0, 1).index_copy_(0, slot_M, row_MW)

    def attend(
        self, q_MNH: torch.Tensor, cache: torch.Tensor, layout: CacheLayout, places: Places, scale: float, start: int
    ) -> torch.Tensor:
        out_MNV = q_MNH.new_empty(*q_MNH.shape[:2], layout.value_width)
        if self.batch_invariant:
            for tile in places.tiles(TILE):
                q_NTH = q_MNH.new_zeros(q_MNH.shape[1], TILE, q_MNH.shape[2])
                q_NTH[:, tile.within] = q_MNH[tile.rows].transpose(0, 1)
                end = tile.start + TILE
                beyond_S = _outside(tile.table_B, cache, start, tile.start + tile.within.stop)
                k_GSH, v_GSV = (part[:, :end] for part in _parts(cache, tile.table_B, layout, beyond_S))
                hidden_TS = _hidden(tile.start, end, start, q_MNH.device)
                found_NTV = _softmax(q_NTH, k_GSH, v_GSV, hidden_TS, scale)
                out_MNV[tile.rows] = found_NTV[:, tile.within].transpose(0, 1)
            return out_MNV
        decoding = places.decoding
        if decoding is not None:
            hidden_CS = decoding.beyond_CS.clone()
            hidden_CS[:, :start] = True
            k_CGSH, v_CGSV = _parts(cache, decoding.table_CB, layout, hidden_CS)
            q_CN1H = q_MNH.index_select(0, decoding.rows_C).unsqueeze(2)
            found_CN1V = _softmax(q_CN1H, k_CGSH, v_CGSV, hidden_CS[:, None, None, None], scale)
            out_MNV.index_copy_(0, decoding.rows_C, found_CN1V.squeeze(2))
        for prompt in places.prompts:
            beyond_S = _outside(prompt.table_B, cache, start, prompt.end)
            k_GSH, v_GSV = (part[:, : prompt.end] for part in _parts(cache, prompt.table_B, layout, beyond_S))
            q_NTH = q_MNH[prompt.rows].transpose(0, 1)
            found_NTV = _softmax(q_NTH, k_GSH, v_GSV, _hidden(prompt.start, prompt.end, start, q_MNH.device), scale)
            out_MNV[prompt.rows] = found_NTV.transpose(0, 1)
        return out_MNV

    def gate(self, x_MF: torch.Tensor) -> torch.Tensor:
        gate, up = x_MF.chunk(2, dim=-1)
        return self._in_tiles(F.silu, gate) * up

    def route(
        self, x_MD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, router: Router
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores_ME = self._in_tiles(lambda x: router.squash(F.linear(x, weight_ED)), x_MD.to(weight_ED.dtype))
        chosen_MA = router.choose(scores_ME, bias_E)
        return chosen_MA, self._in_tiles(router.weigh, scores_ME, chosen_MA)

    def experts(
        self,
        x_MD: torch.Tensor,
        chosen_MA: torch.Tensor,
        weights_MA: torch.Tensor,
        gate_up_EFD: torch.Tensor,
        down_EDF: torch.Tensor,
    ) -> torch.Tensor:
        row_P, place_MA, places = sort_by_expert(chosen_MA, len(gate_up_EFD))
        gate_PF, up_PF = self._by_expert(x_MD.index_select(0, row_P), gate_up_EFD, places).chunk(2, -1)
        weight_P = weights_MA.new_zeros(len(row_P)).scatter(0, place_MA.flatten(), weights_MA.flatten())
        h_PF = self._in_tiles(F.silu, gate_PF) * up_PF * weight_P.unsqueeze(-1).to(x_MD.dtype)
        out_PD = self._by_expert(h_PF, down_EDF, places)
        return out_PD.index_select(0, place_MA.flatten()).view(*place_MA.shape, -1).sum(1)

    def _by_expert(self, x_PK: torch.Tensor, weight_EXK: torch.Tensor, places: list[int]) -> torch.Tensor:
        if not self.batch_invariant:
            return grouped_linear(x_PK, weight_EXK, places)
        parts = zip(torch.split(x_PK, places), weight_EXK.unbind(0), strict=True)
        return torch.cat([self.linear(x, weight) for x, weight in parts])

    def _in_tiles(self, operator: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
        """What an operator makes of each row."""
        count = len(rows[0])
        if not self.batch_invariant or not count:
            return operator(*rows)
        whole = [torch.cat((x_MX, x_MX.new_zeros(-count % TILE, *x_MX.shape[1:]))) for x_MX in rows]
        tiles = zip(*(torch.split(x_MX, TILE) for x_MX in whole), strict=True)
        return torch.cat([operator(*tile) for tile in tiles])[:count]


def _outside(table_B: torch.Tensor, cache: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Which tokens of a sequence's blocks are not its own."""
    token_S = torch.arange(len(table_B) * cache.shape[1], device=cache.device)
    return (token_S < start) | (token_S >= end)


def _parts(
    cache: torch.Tensor, table_XB: torch.Tensor, layout: CacheLayout, outside_XS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys X G S H and values X G S V of the blocks in a table.

    What is outside a sequence is another's, or was: zeros stand there, because a NaN times a share of 0 is a NaN.
    """
    blocks = cache.index_select(0, table_XB.flatten())
    rows_XSW = blocks.view(*table_XB.shape[:-1], -1, blocks.shape[-1]).masked_fill_(outside_XS.unsqueeze(-1), 0.0)
    if layout.groups == 1:
        one = rows_XSW.unsqueeze(-3)
        return one[..., : layout.key_width], one[..., layout.value_start :][..., : layout.value_width]
    width = layout.groups * layout.group_step
    k, v = (
        rows_XSW[..., start : start + width].view(*rows_XSW.shape[:-1], layout.groups, layout.group_step)
        for start in (0, layout.value_start)
    )
    return k.transpose(-3, -2), v.transpose(-3, -2)


def _softmax(
    q_XNTH: torch.Tensor, k_XGSH: torch.Tensor, v_XGSV: torch.Tensor, hidden: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of ... N T rows, in float32; `hidden`, which broadcasts to ... G J T S, is not attended to."""
    wide = precise(q_XNTH.dtype)
    *lead, heads, new, width = q_XNTH.shape
    groups, tokens = k_XGSH.shape[-3:-1]
    # The heads of a group read the same keys: one product.
    q_XGYH = (q_XNTH.to(wide) * scale).reshape(*lead, groups, -1, width)
    scores_XGYS = q_XGYH @ k_XGSH.to(wide).mT
    scores_XGYS.view(*lead, groups, -1, new, tokens).masked_fill_(hidden, -torch.inf)
    out_XGYV = scores_XGYS.softmax(-1) @ v_XGSV.to(wide)
    return out_XGYV.view(*lead, heads, new, -1).to(q_XNTH.dtype)


def _hidden(first: int, end: int, start: int, device: torch.device) -> torch.Tensor:
    """For rows at positions `first` to `end`, T S: tokens after a row's own, and before `start`."""
    hidden_TS = torch.ones(end - first, end, dtype=torch.bool, device=device).triu(first + 1)
    hidden_TS[:, :start] = True
    # A row before `start` has no token, and is not read.
    return hidden_TS
