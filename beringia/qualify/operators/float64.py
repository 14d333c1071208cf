"""What an operator call should have given: the same operator in float64 on the CPU, from the call's own arguments.

Attention is one operator on most chips and not the same one on any two of them; here it is its definition (arXiv
1706.03762, and its gradient), found by the names of the arguments.

Letters: B batch, H heads, G heads of keys and values, T queries, S keys, D head size, V value head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from beringia.qualify.operators.watch import Call, changed, tensors_in, written_arguments, written_values

_WIDE = torch.float64


class NotKnown(Exception):
    """There is no float64 form of this operator here."""


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
    """An operator with everything that is floating made float64: what it wrote in place, then what it returned."""
    writes = written_arguments(func)
    wide_args = tuple(_wide(value, copy=place in writes) for place, value in enumerate(args))
    wide_kwargs = {name: _wide(value, copy=name in writes) for name, value in kwargs.items()}
    for name in ("half_to_float",):
        place = [argument.name for argument in func._schema.arguments].index(name) if _has(func, name) else -1
        if 0 <= place < len(wide_args):
            wide_args = (*wide_args[:place], False, *wide_args[place + 1 :])
    try:
        result = func(*wide_args, **wide_kwargs)
    except NotImplementedError as error:
        raise NotKnown(str(error)) from error
    written = written_values(func, wide_args, wide_kwargs)
    first = list(tensors_in(written))
    return (*first, *(tensor for tensor in tensors_in(result) if not any(tensor is one for one in first)))


def _wide(value: Any, *, copy: bool) -> Any:
    """In float64 on the CPU, a copy where it will be written; dtypes become float64, devices the CPU."""
    if isinstance(value, torch.dtype):
        return _WIDE if value.is_floating_point else value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return changed(value, lambda tensor: tensor.to(_WIDE if tensor.is_floating_point() else tensor.dtype, copy=copy))


def _has(func: OpOverload, name: str) -> bool:
    return any(argument.name == name for argument in func._schema.arguments)


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

    @staticmethod
    def of(call: Call) -> Attention | None:
        """The attention that a call is, or None."""
        name = call.func.overloadpacket.__name__
        if "attention" not in name:
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
        return Attention(
            q,
            _spread(k, q),
            _spread(v, q),
            k.shape[1],
            _as_bias(bias),
            bool(given.get("is_causal", False)),
            q.shape[-1] ** -0.5 if scale is None else scale,
            None if grad is None else grad.to(_WIDE),
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
        return dq, self.joined(dk), self.joined(weights.mT @ self._grad)

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
        return dq, self.joined(dk), self.joined(dv)

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

        Weights are stored in the operands' dtype before they meet the values (`storing` relative to each), and carry
        the scores' error: D products of size |q||k|, each rounded (`computing` a term).
        """
        weights, logsumexp = self.weights()
        scores = self._score_error(computing)
        relative = storing + scores + computing * (4 + weights.shape[-1] ** 0.5)
        out = (weights * relative) @ self.v_BHSV.abs()
        # An error of the log-sum-exp is a relative error of the weights.
        return out, storing + scores.amax(-1) + computing * (8 + logsumexp.abs())

    def gradients_allowed(self, storing: float, computing: float) -> tuple[torch.Tensor, ...]:
        """The same for the gradients of queries, keys and values."""
        weights, _ = self.weights()
        grad = self._grad.abs()
        products = grad @ self.v_BHSV.abs().mT
        centre = (weights * products).sum(-1, keepdim=True)
        relative = storing + 2 * self._score_error(computing) + computing * (8 + weights.shape[-1] ** 0.5)
        # The centre is made from the stored output, rounded; what is subtracted may be larger than what is left.
        dscores = weights * (products + centre) * (relative + computing * self.v_BHSV.shape[-1])
        dq = dscores @ self.k_BHSD.abs() * abs(self.scale)
        dk = dscores.mT @ self.q_BHTD.abs() * abs(self.scale)
        return dq, self.joined(dk), self.joined((weights * relative).mT @ grad)

    def _score_error(self, computing: float) -> torch.Tensor:
        terms = self.q_BHTD.shape[-1] + 4
        size = self.q_BHTD.abs() @ self.k_BHSD.abs().mT * abs(self.scale)
        return computing * terms * size


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
