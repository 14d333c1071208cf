"""What an operator call should have given: the same operator in float64 on the CPU, from the call's own arguments.

Attention is one operator on most chips and not the same one on any two of them; here it is its definition (arXiv
1706.03762, and its gradient), found by the names of the arguments.

Letters: B batch, H heads, G heads of keys and values, T queries, S keys, D head size, V value head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from beringia.numerics.metrics import UNIT_ROUNDOFF, accumulation_floor, rounding_floor
from beringia.qualify.operators.watch import Call, changed, results_of, written_arguments
from beringia.qualify.refusals import REFUSALS, first_line

_WIDE = torch.float64


class NotKnown(Exception):
    """This machine's CPU cannot compute this operator, in float64 or as it was called."""


def in_float64(call: Call) -> tuple[torch.Tensor, ...]:
    """The results in float64 (integers and truth values as they are), in the order of `call.results`.

    Raises NotKnown for an operator that draws random numbers, or that the CPU does not have and whose definition is not
    known here.
    """
    attention = Attention.of(call)
    if attention is not None:
        return attention.gradients() if attention.grad_BHTV is not None else attention.forward()
    if torch.Tag.nondeterministic_seeded in call.func.tags:
        raise NotKnown("it draws random numbers")
    return evaluate(call.func, call.args, call.kwargs)


def evaluate(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """An operator with everything that is floating made float64 (complex: complex128): what it wrote in place, then
    what it returned."""
    writes = written_arguments(func)
    wide_args = tuple(_wide(value, copy=place in writes) for place, value in enumerate(args))
    wide_kwargs = {name: _wide(value, copy=name in writes) for name, value in kwargs.items()}
    place = _place_of(func, "half_to_float")
    if place is not None and place < len(wide_args):
        wide_args = (*wide_args[:place], False, *wide_args[place + 1 :])
    try:
        result = func(*wide_args, **wide_kwargs)
    except REFUSALS as error:  # `_scaled_mm` takes nothing but 8 bits
        raise NotKnown(first_line(error)) from error
    return results_of(func, wide_args, wide_kwargs, result)


def in_own_dtypes(call: Call, device: str) -> tuple[torch.Tensor, ...]:
    """The same call on another device of this machine, in its own dtypes: what it wrote in place, then what it
    returned. Raises NotKnown where that device has no such call."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device(device)
        return changed(value, lambda tensor: tensor.to(device, copy=True))

    args, kwargs = tuple(moved(value) for value in call.args), {name: moved(one) for name, one in call.kwargs.items()}
    try:
        result = call.func(*args, **kwargs)
    except REFUSALS as error:
        raise NotKnown(first_line(error)) from error
    return results_of(call.func, args, kwargs, result)


def to_wide(tensor: torch.Tensor, *, copy: bool = False) -> torch.Tensor:
    """In float64, or of complex numbers in pairs of it; what has neither as it is."""
    return tensor.to(_wide_dtype(tensor.dtype), copy=copy)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return _WIDE if dtype.is_floating_point else torch.complex128 if dtype.is_complex else dtype


def _wide(value: Any, *, copy: bool) -> Any:
    """In float64 on the CPU, a copy where it will be written; dtypes become float64, devices the CPU."""
    if isinstance(value, torch.dtype):
        return _wide_dtype(value)
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return changed(value, lambda tensor: to_wide(tensor, copy=copy))


def _place_of(func: OpOverload, name: str) -> int | None:
    names = [argument.name for argument in func._schema.arguments]
    return names.index(name) if name in names else None


@dataclass(frozen=True)
class Attention:
    """One call of a fused attention, forward or backward, in float64."""

    q_BHTD: torch.Tensor
    k_BHSD: torch.Tensor
    v_BHSV: torch.Tensor
    groups: int
    bias: torch.Tensor | None
    is_causal: bool
    scale: float
    grad_BHTV: torch.Tensor | None
    spacing: float = 0.0
    """Of the smallest numbers in the operands' dtype."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Of its own results: the output's is the queries'; the gradients' are those of what they are of."""
    asked: tuple[int, ...] = (0, 1, 2)
    """Of which of queries, keys and values a gradient is asked for: weights may be frozen."""

    @staticmethod
    def of(call: Call) -> Attention | None:
        """The attention that a call is, or None. Of torch's own operators alone: a maker's may lay its arguments out
        otherwise under the same names (`npu_fusion_attention` says so in `input_layout`), or mask by other ones."""
        name = call.func.overloadpacket.__name__
        if "attention" not in name or call.func.namespace != "aten":
            return None
        given = {
            argument.name: value for argument, value in zip(call.func._schema.arguments, call.args, strict=False)
        } | dict(call.kwargs)
        if not {"query", "key", "value"} <= given.keys():
            return None
        q, k, v = (given[part].to(_WIDE) for part in ("query", "key", "value"))
        bias = given.get("attn_bias", given.get("attn_mask"))
        scale = given.get("scale")
        grad = given.get("grad_out_", given.get("grad_out"))
        mask = given.get("grad_input_mask", (True, True, True))
        asked = tuple(place for place in range(3) if mask[place])
        operands = [given[part].dtype for part in ("query", "key", "value")]
        return Attention(
            q,
            _spread(k, q),
            _spread(v, q),
            k.shape[1],
            _as_bias(bias),
            bool(given.get("is_causal", False)),
            q.shape[-1] ** -0.5 if scale is None else scale,
            None if grad is None else grad.to(_WIDE),
            torch.finfo(given["query"].dtype).smallest_normal * torch.finfo(given["query"].dtype).eps,
            (operands[0],) if grad is None else tuple(operands[place] for place in asked),
            asked,
        )

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax of the scores (B H T S) and their log-sum-exp (B H T)."""
        scores = self.q_BHTD @ self.k_BHSD.mT * self.scale
        if self.bias is not None:
            scores = scores + self.bias
        if self.is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        logsumexp = torch.logsumexp(scores, -1)
        return torch.exp(scores - logsumexp.unsqueeze(-1)).nan_to_num(0.0), logsumexp

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Output and log-sum-exp."""
        weights, logsumexp = self.weights()
        return weights @ self.v_BHSV, logsumexp

    def gradients(self) -> tuple[torch.Tensor, ...]:
        """Of queries, keys and values."""
        weights, _ = self.weights()
        dscores = self._dscores(weights)
        dq = dscores @ self.k_BHSD * self.scale
        dk = dscores.mT @ self.q_BHTD * self.scale
        return self._of_asked(dq, self.joined(dk), self.joined(weights.mT @ self._grad))

    def stored(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Output, or gradients, where weights and scores' gradients are stored in `dtype` before the second product:
        what a sound chip loses inside."""

        def rounded(x: torch.Tensor) -> torch.Tensor:
            return x.to(dtype).double()

        weights, logsumexp = self.weights()
        if self.grad_BHTV is None:
            return rounded(weights) @ self.v_BHSV, logsumexp + rounded(weights).sum(-1).log()
        output = rounded(rounded(weights) @ self.v_BHSV)
        dweights = self._grad @ self.v_BHSV.mT
        dscores = rounded(weights * (dweights - (self._grad * output).sum(-1, keepdim=True)))
        dq = dscores @ self.k_BHSD * self.scale
        dk, dv = dscores.mT @ self.q_BHTD * self.scale, rounded(weights).mT @ self._grad
        if self.groups < self.q_BHTD.shape[1]:
            dk, dv = rounded(dk), rounded(dv)  # a head's, before those that share keys are added up
        return self._of_asked(dq, self.joined(dk), self.joined(dv))

    def _of_asked(self, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(gradients[place] for place in self.asked)

    def joined(self, x_BHSD: torch.Tensor) -> torch.Tensor:
        """Added up over the heads that share keys."""
        if x_BHSD.shape[1] == self.groups:
            return x_BHSD
        return torch.unflatten(x_BHSD, 1, (self.groups, -1)).sum(2)

    def _dscores(self, weights: torch.Tensor) -> torch.Tensor:
        dweights = self._grad @ self.v_BHSV.mT
        return weights * (dweights - (weights * dweights).sum(-1, keepdim=True))

    @property
    def _grad(self) -> torch.Tensor:
        assert self.grad_BHTV is not None
        return self.grad_BHTV

    def forward_allowed(self, storing: float, computing: float) -> tuple[torch.Tensor, ...]:
        """How far output and log-sum-exp may be from exact, elementwise and without the rounding of the result.

        Weights are stored in the operands' dtype before they meet the values (`storing` relative to each), and moved by
        the scores' error: D products of size |q||k|, each rounded (`computing` a term).
        """
        weights, logsumexp = self.weights()
        scores = self._score_error(computing)
        relative = storing + computing * (4 + weights.shape[-1] ** 0.5)
        out = (weights * relative + self._moved(scores) + self._underflow()) @ self.v_BHSV.abs()
        return out, storing + scores.amax(-1) + computing * (8 + logsumexp.abs())

    def gradients_allowed(self, storing: float, computing: float) -> tuple[torch.Tensor, ...]:
        """The same for the gradients of queries, keys and values."""
        weights, _ = self.weights()
        grad, moved = self._grad.abs(), self._moved(self._score_error(computing), anew=computing) + self._underflow()
        products = grad @ self.v_BHSV.abs().mT
        centre = (weights * products).sum(-1, keepdim=True)
        relative = storing + computing * (8 + weights.shape[-1] ** 0.5)
        # The centre is made from the stored output, rounded; what is subtracted may be larger than what is left.
        dscores = weights * (products + centre) * (relative + computing * self.v_BHSV.shape[-1])
        dscores += moved * (products + centre) + (weights + moved) * (moved * products).sum(-1, keepdim=True)
        dscores = dscores * abs(self.scale) + self._underflow() * (1.0 + abs(self.scale))
        dq = dscores @ self.k_BHSD.abs()
        dk = dscores.mT @ self.q_BHTD.abs()
        return self._of_asked(dq, self.joined(dk), self.joined((weights * relative + moved).mT @ grad))

    def noise(self) -> tuple[torch.Tensor, ...]:
        """What the scores' error does to output and log-sum-exp, or to the gradients, in root mean square: how large
        the errors of a sound chip are, where the bounds above say how large they may be.

        A score is off by what adding its D products up costs, relative to its size or that of a random walk of its
        terms; errors of different scores are independent of each other, so their squares add up. Beside one weight of
        almost 1 a score's gradient is a difference of equal numbers, of which their roundings are left.
        """
        weights, _ = self.weights()
        score_error = self._score_noise()
        # Few errors are six times their root mean square; what even those move in the first order is left out.
        anew = 0.0 if self.grad_BHTV is None else rounding_floor(torch.float32)
        if anew:
            score_error = score_error + anew * self.weights()[1].abs().unsqueeze(-1)
        moved = weights * score_error
        moved += (self._moved(_FAR * score_error, anew=_FAR * anew) - _FAR * 2.0 * moved).clamp_min(0.0)
        squares = moved.square()
        if self.grad_BHTV is None:
            return (squares @ self.v_BHSV.square()).sqrt(), (weights * score_error).square().sum(-1).sqrt()
        products = self._grad @ self.v_BHSV.mT
        centre = (weights * products).sum(-1, keepdim=True)
        sizes = (self._grad.square() @ self.v_BHSV.square().mT).sqrt() + products.abs() + centre.abs()
        of_products = _adding_up(self.v_BHSV.shape[-1]) * sizes
        of_centre = (squares * products.square()).sum(-1, keepdim=True) + of_products.square()
        dscores = squares * (products - centre).square() + (weights + moved).square() * of_centre
        dq = (dscores @ self.k_BHSD.square()).sqrt() * abs(self.scale)
        dk = self.joined(dscores.mT @ self.q_BHTD.square()).sqrt() * abs(self.scale)
        return self._of_asked(dq, dk, self.joined(squares.mT @ self._grad.square()).sqrt())

    def storing_noise(self, roundoff: float) -> tuple[torch.Tensor, ...]:
        """What the roundings in `stored` do in root mean square: where few elements count, one draw of them says
        little. A rounding is off by a unit roundoff over the root of three."""
        weights, logsumexp = self.weights()
        squares = weights.square() * (roundoff**2 / 3.0)
        if self.grad_BHTV is None:
            # Exponentials need be no better than their stored form, and may be off alike.
            return (squares @ self.v_BHSV.square()).sqrt(), torch.full_like(logsumexp, roundoff / math.sqrt(3.0))
        products = self._grad @ self.v_BHSV.mT
        of_output = (self._grad * (weights @ self.v_BHSV)).square().sum(-1, keepdim=True) * (roundoff**2 / 3.0)
        of_centre = of_output + (squares * products.square()).sum(-1, keepdim=True)
        dscores = self._dscores(weights).square() * (roundoff**2 / 3.0) + weights.square() * of_centre
        # They may be stored with the scale in them, and are small numbers then.
        dscores = dscores * self.scale**2 + self._underflow().square()
        dq = (dscores @ self.k_BHSD.square()).sqrt()
        dk = self.joined(dscores.mT @ self.q_BHTD.square()).sqrt()
        return self._of_asked(dq, dk, self.joined(squares.mT @ self._grad.square()).sqrt())

    def overflows(self) -> torch.Tensor:
        """Rows B H T in which a score may overflow in float32, or a weight that is computed anew for the gradients."""
        size = self.q_BHTD.abs() @ self.k_BHSD.abs().mT
        rows = (size * max(1.0, abs(self.scale))).amax(-1) >= torch.finfo(torch.float32).max / 2
        if self.grad_BHTV is None:
            return rows
        _, logsumexp = self.weights()
        return rows | (16.0 * UNIT_ROUNDOFF[torch.float32] * logsumexp.abs() >= math.log(_LARGEST_EXPONENTIAL_32))

    def _score_error(self, computing: float) -> torch.Tensor:
        terms = self.q_BHTD.shape[-1] + 4
        size = self.q_BHTD.abs() @ self.k_BHSD.abs().mT * abs(self.scale)
        return computing * terms * size

    def _score_noise(self) -> torch.Tensor:
        walk = self.q_BHTD.square() @ self.k_BHSD.square().mT
        score = self.q_BHTD @ self.k_BHSD.mT
        return _adding_up(self.q_BHTD.shape[-1]) * abs(self.scale) * (walk + score.square()).sqrt()

    def _moved(self, errors: torch.Tensor, *, anew: float = 0.0) -> torch.Tensor:
        """How far the weights may move where each score is off by up to its error: from p to p e^d / sum of p e^d, with
        the sum between e^-c and e^c, c the logarithm of the sum of p e^|d|. To 1 at most, from 1 to 0 at most.

        For gradients kernels compute them anew as e^(score - log-sum-exp), both rounded (`anew` relative to these):
        what is large then is not divided by a sum that is as large.
        """
        weights, logsumexp = self.weights()
        logarithms, errors = weights.log(), errors.clamp_max(_LARGEST_ERROR)
        both = errors + torch.logsumexp(logarithms + errors, -1, keepdim=True)
        largest = 0.0
        if anew:
            both, largest = both + anew * (8.0 + logsumexp.abs().unsqueeze(-1)), _LARGEST_LOGARITHM
        raised = torch.exp((logarithms + both).clamp_max(largest)) - weights
        return torch.maximum(raised, -weights * torch.expm1(-both)).nan_to_num(0.0)

    def _underflow(self) -> torch.Tensor:
        """What a weight, or a score's gradient, may lose as too small a number: an exponential below 2^-126, and in
        float16 a subnormal's last place."""
        weights, _ = self.weights()
        lost = max(torch.finfo(torch.float32).tiny, self.spacing)
        return torch.where(weights > 0, lost, 0.0)


_FAR = 6.0
"""Root mean squares: once in 10^9."""
_LARGEST_LOGARITHM = 230.0
"""Of what a weight may become: far beyond float32, and its squares are numbers in float64."""
_LARGEST_EXPONENTIAL_32 = 1e30
"""Of a weight, with which a gradient in float32 is a number for certain."""
_LARGEST_ERROR = 1e30
"""Of a score, whose exponential is infinite long before."""


def _adding_up(terms: int) -> float:
    """Relative error of a sum that is stored in float32."""
    return accumulation_floor(terms) + rounding_floor(torch.float32)


def _spread(x_BGSD: torch.Tensor, q_BHTD: torch.Tensor) -> torch.Tensor:
    """Keys or values repeated for the heads that share them."""
    repeats = q_BHTD.shape[1] // x_BGSD.shape[1]
    return x_BGSD if repeats == 1 else x_BGSD.repeat_interleave(repeats, 1)


def _as_bias(mask: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=_WIDE).masked_fill(~mask, -torch.inf)
    return mask.to(_WIDE)
