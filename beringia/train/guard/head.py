"""What the whole batch gives beside the layers: the loss, and gradients of weights that no layer's second run gives.

The loss is recomputed from the chip's own logits, in float64. Gradients of the head, of the last norm, and of what the
multi-token layer has before and after its layer are held against the inputs and output gradients of all their calls: of
a product by projection (`products.py`), of a norm element by element.

M positions, T tokens, D inputs, V outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from beringia.model.layers import Linear, RMSNorm, precise
from beringia.numerics.metrics import (
    ELEMENTARY_ULPS,
    UNIT_ROUNDOFF,
    accumulation_floor,
    reduction_floor,
    rounding_floor,
)
from beringia.numerics.replay import REFERENCE_DTYPE, Call
from beringia.train.guard.capture import HEAD, LAYER, SiteCapture, parts_of, root_of
from beringia.train.guard.check import Training
from beringia.train.guard.finding import Finding
from beringia.train.guard.products import PROJECTION_ALLOWED, random_signs
from beringia.train.guard.sample import last_pass
from beringia.train.sharding import sum_of_host_values, whole

_ROWS = 1024
"""Rows that are widened at a time: all logits of a batch would not fit."""


def judge_sums(detector: str, training: Training, capture: SiteCapture) -> list[Finding]:
    """The objective's sums over the last accumulation step, of terms whose formula is known: cross-entropies."""
    calls = capture.calls["lm_head"]
    passes = len(capture.calls["norm"])
    own = last_pass(capture.calls)["lm_head"]
    ahead = calls[-1] if len(calls) > passes else None
    found = {False: own, True: ahead}
    return [
        _judge_sum(detector, training, capture, call, term.name, ahead=term.ahead)
        for term in training.objective.terms
        if term.nats
        and term.name in capture.sums
        and (call := found[term.ahead]) is not None
        # Of logits that are none the second run of the head tells, or whoever gave it what it had.
        and bool(call.output.isfinite().all())
    ]


def _judge_sum(
    detector: str, training: Training, capture: SiteCapture, call: Call, name: str, *, ahead: bool
) -> Finding:
    sums = training.objective.sums_ahead if ahead else training.objective.sums
    dtype = precise(call.output.dtype)
    total = magnitude = rounding = 0.0
    samples = max(1, _ROWS // call.output.shape[1])
    for start in range(0, len(call.output), samples):
        some = slice(start, start + samples)
        logits_BTV = call.output[some].cpu().to(torch.float64)
        targets = {of: target[some, int(ahead) :].cpu() for of, target in capture.targets.items()}
        value = sums(logits_BTV, targets)[name].item()
        total, magnitude = total + value, magnitude + abs(value)
        rounding += _of_log_softmax(logits_BTV, dtype)
    positions = call.output.shape[0] * call.output.shape[1]
    scale = magnitude or 1.0
    error, bound = abs(capture.sums[name].item() - total) / scale, rounding / scale + reduction_floor(positions, dtype)
    return Finding(detector, HEAD, name, error, bound, "relative error of the sum over the batch")


def _of_log_softmax(logits_BTV: torch.Tensor, dtype: torch.dtype) -> float:
    """What rounding may cost the log-probabilities of some samples together, made in `dtype`: the logarithm of the sum
    of exponentials, the largest logit that is taken off and added again, and the difference."""
    largest_BT = logits_BTV.abs().amax(-1)
    vocabulary = logits_BTV.shape[-1]
    rounding = 2.0 * ELEMENTARY_ULPS * UNIT_ROUNDOFF[dtype]
    per_token_BT = rounding * (2.0 * largest_BT + math.log(vocabulary) + 1.0) + reduction_floor(vocabulary, dtype)
    return float(per_token_BT.sum())


def judge_gradients(detector: str, training: Training, capture: SiteCapture, seed: int) -> list[Finding]:
    """Gradients of the weights of single parts; of a tied head the embedding's is in the same tensor."""
    root = root_of(training.decoder, capture.site)
    parts = {name: part for name, part in parts_of(root).items() if not _in_the_layer(root, name)}
    if training.decoder.config.tie_word_embeddings:
        parts.pop("lm_head", None)
    return [
        _judge_part(detector, training, capture, name, part, seed)
        for name, part in parts.items()
        if isinstance(part, Linear | RMSNorm) and part.weight.grad is not None
    ]


def _in_the_layer(root: Mapping[str, nn.Module], name: str) -> bool:
    return LAYER in root and name in (LAYER, "self_attn", "mlp")


def _judge_part(
    detector: str, training: Training, capture: SiteCapture, name: str, part: Linear | RMSNorm, seed: int
) -> Finding:
    calls = [call for call in capture.calls[name] if call.output_gradient is not None]
    gradient = whole(part.weight.grad).detach().cpu().to(torch.float64)  # type: ignore[arg-type]  # it has one
    positions = training.ranks.count * sum(math.prod(call.output.shape[:-1]) for call in calls)

    def over_ranks(values: torch.Tensor) -> torch.Tensor:
        # Ranks average their gradients, so the sum of what they expect is shared out alike.
        return sum_of_host_values(values, training.chip.device) / training.ranks.count

    tensor = f"{name}.weight.gradient"
    if isinstance(part, RMSNorm):
        expected_2D = over_ranks(_norm_gradient(calls, part.eps))
        used = _used_by_norm(gradient, expected_2D, positions)
        return Finding(detector, capture.site, tensor, used, 1.0, "largest error of an element over its roundings'")
    signs_D = random_signs(gradient.shape[1], torch.Generator().manual_seed(seed))
    expected_V = over_ranks(_projected(calls, signs_D))
    error = torch.linalg.vector_norm(gradient @ signs_D - expected_V).item()
    size = torch.linalg.vector_norm(gradient).item()
    bound = _bound_of_product(calls, positions, size)
    value = error / size if size else error
    return Finding(detector, capture.site, tensor, value, bound, "projected error relative to the gradient")


def _rows(call: Call, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and output gradients of one call, some rows at a time, widened on the CPU."""
    tensors = (call.inputs[0].flatten(0, -2), _own(call).flatten(0, -2))
    for x, gradient in zip(*(torch.split(tensor, _ROWS) for tensor in tensors), strict=True):
        yield x.cpu().to(dtype), gradient.cpu().to(dtype)


def _projected(calls: Sequence[Call], signs_D: torch.Tensor) -> torch.Tensor:
    """The gradient of a product's weight, V D, times a vector of signs: V."""
    wide = REFERENCE_DTYPE[calls[0].output.dtype]
    rows = (pair for call in calls for pair in _rows(call, wide))
    parts = [(gradient_MV.T @ (x_MD @ signs_D.to(wide))).to(torch.float64) for x_MD, gradient_MV in rows]
    return torch.stack(parts).sum(0)


def _bound_of_product(calls: Sequence[Call], positions: int, size: float) -> float:
    """As of a single product; what every call adds is stored in the compute dtype first, and may cancel in the sum."""
    norms = [(torch.linalg.vector_norm(c.inputs[0].float()), torch.linalg.vector_norm(_own(c).float())) for c in calls]
    typical = sum(float(x * gradient) for x, gradient in norms) / math.sqrt(max(1, positions))
    dtype = calls[0].output.dtype
    roundings = rounding_floor(dtype) + accumulation_floor(positions, precise(dtype))
    return PROJECTION_ALLOWED * roundings * (max(1.0, typical / size) if size else 1.0)


def _own(call: Call) -> torch.Tensor:
    assert call.output_gradient is not None
    return call.output_gradient


def _norm_gradient(calls: Sequence[Call], eps: float) -> torch.Tensor:
    """The gradient of a norm's weight above the sum of its terms' magnitudes, 2 D."""
    terms = []
    for call in calls:
        for x_MD, gradient_MD in _rows(call, torch.float64):
            terms_MD = gradient_MD * x_MD * torch.rsqrt(x_MD.square().mean(-1, keepdim=True) + eps)
            terms.append(torch.stack((terms_MD.sum(0), terms_MD.abs().sum(0))))
    return torch.stack(terms).sum(0)


def _used_by_norm(gradient_D: torch.Tensor, expected_2D: torch.Tensor, positions: int) -> float:
    """The largest error of an element over what a term's own roundings and adding up the terms may cost."""
    expected_D, magnitude_D = expected_2D
    floor = 2.0 * ELEMENTARY_ULPS * UNIT_ROUNDOFF[torch.float32]
    floor += accumulation_floor(len(gradient_D)) + reduction_floor(positions)
    bound_D = floor * magnitude_D + torch.finfo(torch.float32).tiny
    return float(((gradient_D - expected_D).abs() / bound_D).max())
