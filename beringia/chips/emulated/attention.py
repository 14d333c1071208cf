"""Scaled dot-product attention and its backward, as one operator of the device.

Torch's own CPU kernels would hide both products from the matrix unit, and a composite of twenty small operators would
cost time; hardware has one fused kernel too. Here, as there: scores and softmax are float32, probabilities are rounded
to the operands' dtype before they meet the values, and the backward recomputes them from the saved log-sum-exp.

Letters: B batch, H heads, G heads of keys and values, T queries, S keys, D head size, V value head size.
Dropout is left to torch's composite of single operators (see `device.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch._ops import OpOverload

from beringia.chips.emulated.device import Kernel

aten = torch.ops.aten


class CastTo(Protocol):
    """Numbers in another format."""

    def __call__(self, number: torch.Tensor, dtype: torch.dtype, /) -> torch.Tensor: ...


def plain_cast(number: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to nearest, as the CPU does it."""
    return number.to(dtype)


class Attention:
    """Forward and backward from a chip's products, exponential and casts."""

    def __init__(
        self,
        products: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        exp: Callable[[torch.Tensor], torch.Tensor],
        *,
        cast: CastTo = plain_cast,
        native: bool = False,
    ) -> None:
        self._product = _native_product if native else products
        self._exp = exp
        self._cast = cast

    def kernels(self) -> dict[OpOverload, Kernel]:
        return {
            aten._scaled_dot_product_fused_attention_overrideable.default: self.forward,
            aten._scaled_dot_product_fused_attention_overrideable_backward.default: self.backward,
        }

    def forward(
        self,
        q_BHTD: torch.Tensor,
        k_BGSD: torch.Tensor,
        v_BGSV: torch.Tensor,
        bias: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        k_BHSD, v_BHSV = _spread(k_BGSD, q_BHTD), _spread(v_BGSV, q_BHTD)
        scores_BHTS = self._scores(q_BHTD, k_BHSD, bias, is_causal, scale)
        largest_BHT1 = scores_BHTS.amax(dim=-1, keepdim=True)
        # A query that sees no key has minus infinity as its largest score; its weights become zero, not NaN.
        largest_BHT1 = largest_BHT1.masked_fill(largest_BHT1 == float("-inf"), 0.0)
        weight_BHTS = self._exp(scores_BHTS - largest_BHT1)
        sum_BHT1 = weight_BHTS.sum(dim=-1, keepdim=True)
        weight_BHTS = weight_BHTS / sum_BHT1.clamp_min(torch.finfo(sum_BHT1.dtype).tiny)
        out_BHTV = self._times(self._cast(weight_BHTS, q_BHTD.dtype), v_BHSV)
        logsumexp_BHT = (largest_BHT1 + sum_BHT1.log()).squeeze(-1)
        nothing = torch.empty(0, dtype=torch.int64)
        sizes = q_BHTD.shape[-2], k_BGSD.shape[-2]
        return self._cast(out_BHTV, q_BHTD.dtype), logsumexp_BHT, nothing, nothing, *sizes, nothing, nothing, nothing

    def backward(
        self,
        grad_BHTV: torch.Tensor,
        q_BHTD: torch.Tensor,
        k_BGSD: torch.Tensor,
        v_BGSV: torch.Tensor,
        bias: torch.Tensor | None,
        wanted: list[bool],
        out_BHTV: torch.Tensor,
        logsumexp_BHT: torch.Tensor,
        cum_seq_q: Any,
        cum_seq_k: Any,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        philox_seed: Any,
        philox_offset: Any,
        *,
        scale: float | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        dtype = q_BHTD.dtype
        factor = _factor(q_BHTD, scale)
        k_BHSD, v_BHSV = _spread(k_BGSD, q_BHTD), _spread(v_BGSV, q_BHTD)
        scores_BHTS = self._scores(q_BHTD, k_BHSD, bias, is_causal, scale)
        weight_BHTS = self._exp(scores_BHTS - logsumexp_BHT.unsqueeze(-1)).nan_to_num_(0.0)
        grad_v = self._times(self._cast(weight_BHTS, dtype).transpose(-1, -2), grad_BHTV)
        grad_weight_BHTS = self._times(grad_BHTV, v_BHSV.transpose(-1, -2))
        row_BHT1 = (wide(grad_BHTV) * wide(out_BHTV)).sum(dim=-1, keepdim=True)
        grad_scores_BHTS = weight_BHTS * (grad_weight_BHTS - row_BHT1)
        narrow_BHTS = self._cast(grad_scores_BHTS, dtype)
        grad_q = self._times(narrow_BHTS, k_BHSD) * factor
        grad_k = self._times(narrow_BHTS.transpose(-1, -2), q_BHTD) * factor
        grad_bias = None
        if wanted[3] and bias is not None:
            grad_bias = self._cast(grad_scores_BHTS.sum_to_size(bias.shape), bias.dtype)
        heads = k_BGSD.shape[1]
        return (
            self._cast(grad_q, dtype),
            self._cast(_gather(grad_k, heads), dtype),
            self._cast(_gather(grad_v, heads), dtype),
            grad_bias,
        )

    def _scores(
        self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, is_causal: bool, scale: float | None
    ) -> torch.Tensor:
        scores = self._times(q, k.transpose(-1, -2)) * _factor(q, scale)
        if is_causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
            scores = scores.masked_fill_(hidden, float("-inf"))
        return scores if bias is None else scores + bias

    def _times(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Product of the last two dimensions, the others being a batch."""
        lead = a.shape[:-2]
        product = self._product(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]))
        return product.reshape(*lead, *product.shape[-2:])


def _native_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return wide(a) @ wide(b)


def wide(number: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where it is that."""
    return number if number.dtype == torch.float64 else number.float()


def _factor(q: torch.Tensor, scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5) if scale is None else scale


def _spread(x_BGSD: torch.Tensor, q_BHTD: torch.Tensor) -> torch.Tensor:
    """Repeat each head of keys or values for the queries that share it."""
    times = q_BHTD.shape[1] // x_BGSD.shape[1]
    return x_BGSD if times == 1 else x_BGSD.repeat_interleave(times, dim=1)


def _gather(x_BHSD: torch.Tensor, heads: int) -> torch.Tensor:
    """Add up what `_spread` repeated."""
    return x_BHSD if x_BHSD.shape[1] == heads else torch.unflatten(x_BHSD, 1, (heads, -1)).sum(dim=2)
