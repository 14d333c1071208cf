"""The shadow of one site: one sample's way through it, forward and backward, replayed on the CPU and compared.

The replay has the chip's own inputs, output gradients, choice of experts and weights, and computes in float64 (float32
where the chip computes in 16 bits). Judged are outputs and gradients of inputs: of the layer, its attention, its
experts; of the norms and products beside it; at the head also the gradient that the loss sends back.

**The bound.** How much a layer magnifies rounding depends on its weights and inputs, so it is measured: the same
replay in the chip's storage dtype, one rounding at every operation, has the error `noise`. The bound is
`NOISE_ALLOWED` times that, and never below what storing the result and adding up the longest product may cost
(`numerics.metrics`). The noise is remembered for a site and measured again every `NOISE_VISITS` visits, and whenever
a tensor exceeds the remembered bound. One replay is one draw of the roundings, and where a sample's gradients nearly
cancel, draws differ by more than any factor allows for: a tensor that exceeds the bound of this very sample, too, is
held against the largest of `CONFIRMING_REPLAYS` further draws, whose inputs are moved by up to a
rounding, and half of which compute attention as one kernel. What exceeds
that by little, up to `MARGIN` times, is looked for in `CONFIRMING_SAMPLES` other samples of the step: a fault as weak
as that, if it is not one sample's ill condition, is in most of them.

T tokens, D hidden, V vocabulary, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from beringia.model import Decoder, fusing_attention
from beringia.model.layers import precise
from beringia.numerics.metrics import (
    UNIT_ROUNDOFF,
    accumulation_floor,
    difference,
    independent_rows,
    rounding_floor,
)
from beringia.numerics.replay import REFERENCE_DTYPE, place
from beringia.train.guard.capture import SiteCapture
from beringia.train.guard.finding import Finding
from beringia.train.guard.sample import (
    Change,
    Sample,
    Tensors,
    empty_replica,
    in_order,
    sample_of,
    weights_as_used,
)
from beringia.train.objective import Objective

NOISE_ALLOWED = 4.0
"""Twice, because a chip that truncates has twice the unit roundoff of one that rounds to nearest; and twice again,
because it may round at other places than the CPU's kernels, and at up to four times as many (errors add up in
squares)."""
LARGEST_ALLOWED = 2.0 * NOISE_ALLOWED
"""The largest of some thousand errors is itself uncertain by a factor of two from one draw of the roundings to
another."""
NOISE_VISITS = 8
CONFIRMING_REPLAYS = 16
"""Further draws before an alarm. Another draw from the same distribution exceeds the largest of these in one case of
seventeen, and then the factors above still stand between it and the bound."""
MARGIN = 2.0
"""Beyond this many times its bound one sample alarms alone. Of 3,800 shadows of sound emulated H800s one exceeded the
bound of all draws, by 1.04."""
CONFIRMING_SAMPLES = 3
DETECTOR = "layer-shadow"


@dataclass(frozen=True)
class StorageError:
    """Error of a replay in the chip's own storage dtype."""

    relative: float
    largest: float
    gain: float = 0.0

    def or_larger(self, other: StorageError) -> StorageError:
        """The larger of both, each by itself."""
        return StorageError(
            max(self.relative, other.relative), max(self.largest, other.largest), max(self.gain, other.gain)
        )

    @property
    def finite(self) -> bool:
        """Not where numbers are too large for the dtype: then nothing can be said of what a chip makes of them."""
        return math.isfinite(self.relative)


class Shadow:
    """Replays sites of one decoder. Holds an empty replica of each site it has met, and each site's noise."""

    def __init__(self, decoder: Decoder, objective: Objective) -> None:
        self._decoder = decoder
        self._objective = objective
        self._replicas: dict[str, nn.Module] = {}
        self._noise: dict[str, dict[str, StorageError]] = {}
        self._visits: dict[str, int] = {}

    def judge(self, capture: SiteCapture, weights: Mapping[str, torch.Tensor], sample: int) -> list[Finding]:
        """Findings about a layer or the head, in the order of the computation; `weights` are the site's, whole."""
        seen = sample_of(capture, sample, self._objective)
        dtype = REFERENCE_DTYPE[seen.dtype]
        replica = self._replica(capture.site, weights, seen.dtype, dtype)
        visits = self._visits[seen.site] = self._visits.get(seen.site, -1) + 1
        findings = self._judge_sample(seen, replica, dtype, fresh=visits % NOISE_VISITS == 0)
        if not _alarming(findings) or max(finding.used for finding in findings) > MARGIN:
            return findings
        others = [
            self._judge_sample(sample_of(capture, sample + place, self._objective), replica, dtype, fresh=True)
            for place in range(1, min(CONFIRMING_SAMPLES, seen.batch - 1) + 1)
        ]
        clean = [other for other in others if not _alarming(other)]
        return clean[0] if 2 * len(clean) > len(others) else findings

    def _judge_sample(self, seen: Sample, replica: nn.Module, dtype: torch.dtype, *, fresh: bool) -> list[Finding]:
        """Against the remembered noise where that suffices, against this sample's own, against further draws of it."""
        reference = seen.replay(replica, dtype)
        if fresh:
            self._noise[seen.site] = _noise(seen, replica, reference)
        findings = self._compare(seen, reference, self._noise[seen.site])
        if not fresh and _alarming(findings):
            self._noise[seen.site] = _noise(seen, replica, reference)
            findings = self._compare(seen, reference, self._noise[seen.site])
        if _alarming(findings):
            largest = _largest_noise(seen, replica, reference, self._noise[seen.site])
            findings = self._compare(seen, reference, largest)
        return findings

    def _replica(
        self, site: str, weights: Mapping[str, torch.Tensor], rounded: torch.dtype, dtype: torch.dtype
    ) -> nn.Module:
        if site not in self._replicas:
            self._replicas[site] = empty_replica(self._decoder, site)
        replica = self._replicas[site]
        place(replica, weights_as_used(replica, weights, rounded, dtype))
        return replica

    def _compare(self, seen: Sample, reference: Tensors, noise: Mapping[str, StorageError]) -> list[Finding]:
        length = longest_product(self._decoder)
        return [
            judge_tensor(seen.site, name, seen.tensors[name], reference[name], noise[name], seen.dtype, length)
            for name in in_order(reference)
            if noise[name].finite
        ]


def _alarming(findings: list[Finding]) -> bool:
    return any(finding.alarming for finding in findings)


def _noise(
    seen: Sample, replica: nn.Module, reference: Tensors, change: Change = lambda tensor: tensor
) -> dict[str, StorageError]:
    """Errors of one replay in the chip's storage dtype, its inputs changed first."""
    # float64 has nothing wider to be compared with: float32's error, scaled by the ratio of their unit roundoffs.
    dtype = torch.float32 if seen.dtype == torch.float64 else seen.dtype
    scale = UNIT_ROUNDOFF[seen.dtype] / UNIT_ROUNDOFF[dtype]
    rounded = seen.replay(replica, dtype, change)
    errors = {name: difference(rounded[name], reference[name]) for name in reference}
    return {
        name: StorageError(scale * error.relative, scale * error.largest, scale * abs(error.gain))
        for name, error in errors.items()
    }


def _largest_noise(
    seen: Sample, replica: nn.Module, reference: Tensors, noise: dict[str, StorageError]
) -> dict[str, StorageError]:
    """The largest errors of several draws: replays whose inputs and output gradients are moved by up to a rounding."""
    generator = torch.Generator().manual_seed(seen.number)
    roundoff = UNIT_ROUNDOFF[torch.float32 if seen.dtype == torch.float64 else seen.dtype]

    def move(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.to(REFERENCE_DTYPE[tensor.dtype])
        return wide * (1.0 + torch.empty_like(wide).uniform_(-roundoff, roundoff, generator=generator))

    for number in range(CONFIRMING_REPLAYS):
        with fusing_attention(replica) if number % 2 else nullcontext():
            drawn = _noise(seen, replica, reference, move)
        noise = {name: one.or_larger(drawn[name]) for name, one in noise.items()}
    return noise


def judge_tensor(
    site: str,
    name: str,
    found: torch.Tensor,
    reference: torch.Tensor,
    noise: StorageError,
    dtype: torch.dtype,
    length: int,
) -> Finding:
    """The one of the three measures of a tensor that used most of its bound."""
    error = difference(found, reference)
    floor = rounding_floor(dtype) + accumulation_floor(length, precise(dtype))
    relative = max(NOISE_ALLOWED * noise.relative, floor)
    # Zero-mean errors cancel over rows; those of truncating accumulators do not.
    gain = max(relative / math.sqrt(independent_rows(reference)), floor)
    if noise.gain > gain:  # an overflow inside (the square of a norm, say) has one sign, on the CPU too
        gain = NOISE_ALLOWED * noise.gain
    # One element's rounding is relative to itself, the largest error to the tensor's root mean square.
    peak = _peak(reference)
    largest = max(LARGEST_ALLOWED * noise.largest, floor * peak)
    measures = [
        ("relative error", error.relative, relative),
        ("error of the largest element", error.largest, largest),
        ("signed error", abs(error.gain), gain),
    ]
    findings = [
        Finding(DETECTOR, site, name, value, bound, f"{what} against the replay on the CPU")
        for what, value, bound in measures
    ]
    return max(findings, key=lambda finding: finding.used)


def _peak(tensor: torch.Tensor) -> float:
    """Largest magnitude over root mean square."""
    norm = torch.linalg.vector_norm(tensor).item()
    return torch.linalg.vector_norm(tensor, math.inf).item() * math.sqrt(tensor.numel()) / norm if norm else 1.0


def longest_product(decoder: Decoder) -> int:
    """Most terms that one sum inside a layer or the head has, forward or backward."""
    config = decoder.config
    heads = config.num_attention_heads
    shared = max(1, config.n_shared_experts) if config.n_routed_experts else 0
    widths = (
        config.hidden_size,
        config.intermediate_size,
        config.moe_intermediate_size * shared,
        config.vocab_size,
        heads * (config.head_dim if not config.latent else config.qk_nope_head_dim + config.v_head_dim),
    )
    return max(widths)
