"""The shadow of one site: one sample's way through it, forward and backward, replayed on the CPU and compared; and that
of a sample that is as long as any, where the first is shorter.

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
as that, if it is not one sample's ill condition, is in most of them. What stays within the bound adds up over samples
and visits (`evidence.py`).

T tokens, D hidden, V vocabulary, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import nn

from beringia.model import Decoder, fusing_attention
from beringia.model.experts import Router
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
from beringia.train.guard.evidence import ALLOWED, BOUND, DRAWS, Evidence, Place
from beringia.train.guard.finding import Finding
from beringia.train.guard.routes import judge_routes
from beringia.train.guard.sample import (
    Change,
    Sample,
    Tensors,
    empty_replica,
    in_order,
    longest_of,
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
GATHERED_SAMPLES = 2 * BOUND
"""Most samples of one step that evidence is looked for in, after the first."""
_NET = f"samples, net, in which the {{}} is more than {ALLOWED:g} times that of each of {DRAWS} replays"
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


MEASURES = ("relative error", "error of the largest element", "signed error")
Limits = tuple[float, float, float]
"""One for each measure."""


@dataclass(frozen=True)
class Measured:
    """What one tensor is from its reference, and what its bounds need to know of that."""

    errors: Limits
    peak: float
    """Largest magnitude of the reference over its root mean square."""
    rows: float
    """Independent ones of the reference."""


@dataclass(frozen=True)
class Replayed:
    """A sample beside its replay."""

    seen: Sample
    replica: nn.Module
    reference: Tensors

    @property
    def site(self) -> str:
        """Where it was."""
        return self.seen.site

    @cached_property
    def measured(self) -> dict[str, Measured]:
        """By tensor, in the order of the computation."""
        return {name: _measured(self.seen.tensors[name], self.reference[name]) for name in in_order(self.reference)}


class Shadow:
    """Replays sites of one decoder. Holds an empty replica of each site it has met, each site's noise, and the
    evidence of all samples."""

    def __init__(self, decoder: Decoder, objective: Objective) -> None:
        self._decoder = decoder
        self._objective = objective
        self._replicas: dict[str, nn.Module] = {}
        self._noise: dict[str, dict[str, StorageError]] = {}
        self._visits: dict[str, int] = {}
        self._evidence = Evidence()

    def judge(self, capture: SiteCapture, weights: Mapping[str, torch.Tensor], sample: int) -> list[Finding]:
        """Findings about a layer or the head, in the order of the computation; `weights` are the site's, whole. Looked
        at is a sample, and one that is as long as any where it is shorter."""
        first = sample_of(capture, sample, self._objective)
        dtype = REFERENCE_DTYPE[first.dtype]
        replica = self._replica(capture.site, weights, first.dtype, dtype)

        def replayed(number: int) -> Replayed:
            seen = first if number == first.number else sample_of(capture, number, self._objective)
            return Replayed(seen, replica, seen.replay(replica, dtype))

        chosen = tuple(dict.fromkeys((first.number, longest_of(capture, first.number))))
        after = ((first.number + step) % first.batch for step in range(1, first.batch))
        rest = [number for number in after if number not in chosen]
        gathered = map(replayed, rest)
        findings: list[Finding] = []
        for one in map(replayed, chosen):
            others = map(replayed, (*rest, *(number for number in chosen if number != one.seen.number)))
            findings += self._judge_routes(one.seen, replica) + self._judge_batch(one, others, gathered)
            if _alarming(findings):
                break
        return findings

    def _judge_routes(self, seen: Sample, replica: nn.Module) -> list[Finding]:
        chosen = seen.chosen()
        if chosen is None or not bool(chosen[0].isfinite().all()):
            return []
        router = replica.get_submodule("mlp.gate")
        assert isinstance(router, Router)
        return [judge_routes(DETECTOR, seen.site, router, *chosen)]

    def _judge_batch(self, first: Replayed, others: Iterator[Replayed], gathered: Iterator[Replayed]) -> list[Finding]:
        """A sample, and others where it leaves a doubt; of `gathered`, which is shared, none is weighed twice. Where
        there are no others, a small excess is one visit's evidence and no alarm."""
        visits = self._visits[first.site] = self._visits.get(first.site, -1) + 1
        findings = self._judge_sample(first, fresh=visits % NOISE_VISITS == 0)
        if _alarming(findings) and max(finding.used for finding in findings) <= MARGIN:
            judged = [self._judge_sample(one, fresh=True) for one in islice(others, CONFIRMING_SAMPLES)]
            clean = [found for found in judged if not _alarming(found)]
            if not judged:
                findings = [finding for finding in findings if not finding.alarming]
            elif 2 * len(clean) > len(judged):
                findings = clean[0]
        if _alarming(findings):
            return findings
        return findings + self._gather(first, islice(gathered, GATHERED_SAMPLES))

    def _judge_sample(self, one: Replayed, *, fresh: bool) -> list[Finding]:
        """Against the remembered noise where that suffices, against this sample's own, against further draws of it."""
        site = one.site
        if fresh:
            self._noise[site] = _noise(one)
        findings = self._compare(one, self._noise[site])
        if not fresh and _alarming(findings):
            self._noise[site] = _noise(one)
            findings = self._compare(one, self._noise[site])
        if _alarming(findings):
            findings = self._compare(one, _largest_noise(one, CONFIRMING_REPLAYS, self._noise[site]))
        return findings

    # What is within the bound of one sample

    def _gather(self, first: Replayed, others: Iterator[Replayed]) -> list[Finding]:
        """Evidence of this sample, and of further ones of the step for as long as there is any: what there is."""
        places = self._weigh(first, self._noise[first.site])
        while any(0 < self._evidence.score(place) <= BOUND for place in places):
            other = next(others, None)
            if other is None:
                break
            self._weigh(other, None)
        scores = {place: self._evidence.score(place) for place in places}
        return [
            Finding(DETECTOR, site, name, float(score), float(BOUND), _NET.format(measure))
            for (site, name, measure), score in scores.items()
            if score > 0
        ]

    def _weigh(self, one: Replayed, remembered: Mapping[str, StorageError] | None) -> list[Place]:
        """Note whether each error is larger than draws of this sample allow; draws are made where it is larger than
        the noise that is remembered allows, if any is."""
        exceeding = None if remembered is None else self._exceeding(one, remembered)
        if exceeding is None or exceeding:
            exceeding = self._exceeding(one, _largest_noise(one, DRAWS))
        places = [(one.site, name, measure) for name in one.measured for measure in MEASURES]
        for one_place in places:
            self._evidence.add(one_place, largest=one_place in exceeding)
        return places

    def _exceeding(self, one: Replayed, noise: Mapping[str, StorageError]) -> set[Place]:
        length = longest_product(self._decoder)
        return {
            (one.site, name, measure)
            for name, measured in one.measured.items()
            if noise[name].finite
            for measure, value, limit in zip(
                MEASURES,
                measured.errors,
                persistent_limits(measured, noise[name], one.seen.dtype, length),
                strict=True,
            )
            if not value <= limit
        }

    def _replica(
        self, site: str, weights: Mapping[str, torch.Tensor], rounded: torch.dtype, dtype: torch.dtype
    ) -> nn.Module:
        if site not in self._replicas:
            self._replicas[site] = empty_replica(self._decoder, site)
        replica = self._replicas[site]
        place(replica, weights_as_used(replica, weights, rounded, dtype))
        return replica

    def _compare(self, one: Replayed, noise: Mapping[str, StorageError]) -> list[Finding]:
        length = longest_product(self._decoder)
        return [
            judge_tensor(one.site, name, measured, noise[name], one.seen.dtype, length)
            for name, measured in one.measured.items()
            if noise[name].finite
        ]


def _alarming(findings: list[Finding]) -> bool:
    return any(finding.alarming for finding in findings)


def _noise(one: Replayed, change: Change = lambda tensor: tensor) -> dict[str, StorageError]:
    """Errors of one replay in the chip's storage dtype, its inputs changed first."""
    # float64 has nothing wider to be compared with: float32's error, scaled by the ratio of their unit roundoffs.
    dtype = torch.float32 if one.seen.dtype == torch.float64 else one.seen.dtype
    scale = UNIT_ROUNDOFF[one.seen.dtype] / UNIT_ROUNDOFF[dtype]
    rounded = one.seen.replay(one.replica, dtype, change)
    errors = {name: difference(rounded[name], reference) for name, reference in one.reference.items()}
    return {
        name: StorageError(scale * error.relative, scale * error.largest, scale * abs(error.gain))
        for name, error in errors.items()
    }


def _largest_noise(
    one: Replayed, draws: int, noise: Mapping[str, StorageError] | None = None
) -> dict[str, StorageError]:
    """The largest errors of several draws: replays whose inputs and output gradients are moved by up to a rounding."""
    generator = torch.Generator().manual_seed(one.seen.number)
    roundoff = UNIT_ROUNDOFF[torch.float32 if one.seen.dtype == torch.float64 else one.seen.dtype]

    def move(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.to(REFERENCE_DTYPE[tensor.dtype])
        return wide * (1.0 + torch.empty_like(wide).uniform_(-roundoff, roundoff, generator=generator))

    largest = dict(noise or {name: StorageError(0.0, 0.0) for name in one.reference})
    for number in range(draws):
        with fusing_attention(one.replica) if number % 2 else nullcontext():
            drawn = _noise(one, move)
        largest = {name: error.or_larger(drawn[name]) for name, error in largest.items()}
    return largest


def _measured(found: torch.Tensor, reference: torch.Tensor) -> Measured:
    error = difference(found, reference)
    return Measured(
        (error.relative, error.largest, abs(error.gain)), peak=_peak(reference), rows=independent_rows(reference)
    )


def persistent_limits(measured: Measured, noise: StorageError, dtype: torch.dtype, length: int) -> Limits:
    """What each measure may be in sample after sample, given the largest errors of a few draws."""
    # One rounding to nearest, where the bound of one sample has one in whatever direction.
    floor = UNIT_ROUNDOFF[dtype] + accumulation_floor(length, precise(dtype))
    floors = floor, floor * measured.peak, floor
    drawn = noise.relative, noise.largest, noise.gain
    relative, largest, gain = (max(ALLOWED * one, least) for one, least in zip(drawn, floors, strict=True))
    return relative, largest, gain


def judge_tensor(
    site: str, name: str, measured: Measured, noise: StorageError, dtype: torch.dtype, length: int
) -> Finding:
    """The one of the three measures of a tensor that used most of its bound."""
    floor = rounding_floor(dtype) + accumulation_floor(length, precise(dtype))
    relative = max(NOISE_ALLOWED * noise.relative, floor)
    # Zero-mean errors cancel over rows; those of truncating accumulators do not.
    gain = max(relative / math.sqrt(measured.rows), floor)
    if noise.gain > gain:  # an overflow inside (the square of a norm, say) has one sign, on the CPU too
        gain = NOISE_ALLOWED * noise.gain
    # One element's rounding is relative to itself, the largest error to the tensor's root mean square.
    largest = max(LARGEST_ALLOWED * noise.largest, floor * measured.peak)
    bounds = relative, largest, gain
    findings = [
        Finding(DETECTOR, site, name, value, bound, f"{what} against the replay on the CPU")
        for what, value, bound in zip(MEASURES, measured.errors, bounds, strict=True)
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
