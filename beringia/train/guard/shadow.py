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
held against the largest of `CONFIRMING_REPLAYS` further draws, whose inputs are moved by up to a rounding. What exceeds
that by little, up to `MARGIN` times, is looked for in `CONFIRMING_SAMPLES` other samples of the step: a fault as weak
as that, if it is not one sample's ill condition, is in most of them.

T tokens, D hidden, V vocabulary, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from beringia.model import IGNORED, Decoder, forcing_routes
from beringia.model.decoder import DecoderLayer, MultiTokenLayer
from beringia.model.experts import Experts
from beringia.model.layers import Linear, RMSNorm, precise
from beringia.numerics.metrics import (
    UNIT_ROUNDOFF,
    accumulation_floor,
    difference,
    independent_rows,
    rounding_floor,
)
from beringia.numerics.replay import REFERENCE_DTYPE, Call, Taps, place, run
from beringia.train.guard.capture import HEAD, LAYER, Capture, inner_parts, layer_index
from beringia.train.guard.finding import Finding

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

Tensors = dict[str, torch.Tensor]
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Noise:
    """Error of a replay in the chip's own storage dtype."""

    relative: float
    largest: float

    def or_larger(self, other: Noise) -> Noise:
        """The larger of both, each by itself."""
        return Noise(max(self.relative, other.relative), max(self.largest, other.largest))


class Shadow:
    """Replays sites of one decoder. Holds an empty replica of each site it has met, and each site's noise."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._replicas: dict[str, nn.Module] = {}
        self._noise: dict[str, dict[str, Noise]] = {}
        self._visits: dict[str, int] = {}

    def judge(self, capture: Capture, weights: Mapping[str, torch.Tensor], sample: int) -> list[Finding]:
        """Findings about a layer or the head, in the order of the computation; `weights` are the site's, whole."""
        seen = _Sample(capture, sample)
        dtype = REFERENCE_DTYPE[seen.dtype]
        replica = self._replica(capture.site, weights, seen.dtype, dtype)
        visits = self._visits[seen.site] = self._visits.get(seen.site, -1) + 1
        findings = self._judge_sample(seen, replica, dtype, fresh=visits % NOISE_VISITS == 0)
        if not _alarming(findings) or max(finding.used for finding in findings) > MARGIN:
            return findings
        others = [
            self._judge_sample(_Sample(capture, sample + place), replica, dtype, fresh=True)
            for place in range(1, min(CONFIRMING_SAMPLES, seen.batch - 1) + 1)
        ]
        clean = [other for other in others if not _alarming(other)]
        return clean[0] if 2 * len(clean) > len(others) else findings

    def _judge_sample(self, seen: _Sample, replica: nn.Module, dtype: torch.dtype, *, fresh: bool) -> list[Finding]:
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
        place(replica, _as_used(replica, weights, rounded, dtype))
        return replica

    def _compare(self, seen: _Sample, reference: Tensors, noise: Mapping[str, Noise]) -> list[Finding]:
        length = longest_product(self._decoder)
        return [
            judge_tensor(seen.site, name, seen.tensors[name], reference[name], noise[name], seen.dtype, length)
            for name in _in_order(reference)
        ]


def _alarming(findings: list[Finding]) -> bool:
    return any(finding.alarming for finding in findings)


def _noise(
    seen: _Sample, replica: nn.Module, reference: Tensors, change: Change = lambda tensor: tensor
) -> dict[str, Noise]:
    """Errors of one replay in the chip's storage dtype, its inputs changed first."""
    # float64 has nothing wider to be compared with: float32's error, scaled by the ratio of their unit roundoffs.
    dtype = torch.float32 if seen.dtype == torch.float64 else seen.dtype
    scale = UNIT_ROUNDOFF[seen.dtype] / UNIT_ROUNDOFF[dtype]
    rounded = seen.replay(replica, dtype, change)
    errors = {name: difference(rounded[name], reference[name]) for name in reference}
    return {name: Noise(scale * error.relative, scale * error.largest) for name, error in errors.items()}


def _largest_noise(seen: _Sample, replica: nn.Module, reference: Tensors, noise: dict[str, Noise]) -> dict[str, Noise]:
    """The largest errors of several draws: replays whose inputs and output gradients are moved by up to a rounding."""
    generator = torch.Generator().manual_seed(seen.sample)
    roundoff = UNIT_ROUNDOFF[torch.float32 if seen.dtype == torch.float64 else seen.dtype]

    def move(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.to(REFERENCE_DTYPE[tensor.dtype])
        return wide * (1.0 + torch.empty_like(wide).uniform_(-roundoff, roundoff, generator=generator))

    for _ in range(CONFIRMING_REPLAYS):
        drawn = _noise(seen, replica, reference, move)
        noise = {name: one.or_larger(drawn[name]) for name, one in noise.items()}
    return noise


_FORWARD = ("enorm", "hnorm", "eh_proj", "self_attn", "mlp", LAYER, "shared_head.norm", "norm", "lm_head")
_BACKWARD = ("logits", "lm_head", "norm", "shared_head.norm", "mlp", "self_attn", LAYER, "eh_proj", "hnorm", "enorm")
_ORDER = [
    *(f"{part}.output" for part in _FORWARD),
    "logits.gradient",
    *(f"{part}.input.gradient" for part in _BACKWARD),
]


def _in_order(tensors: Tensors) -> list[str]:
    """Names in the order in which a step computes them: forward through the parts, backward through the gradients."""
    return [name for place in _ORDER if (name := place.removeprefix(".")) in tensors]


def judge_tensor(
    site: str,
    name: str,
    found: torch.Tensor,
    reference: torch.Tensor,
    noise: Noise,
    dtype: torch.dtype,
    length: int,
) -> Finding:
    """The one of the three measures of a tensor that used most of its bound."""
    error = difference(found, reference)
    floor = rounding_floor(dtype) + accumulation_floor(length, precise(dtype))
    relative = max(NOISE_ALLOWED * noise.relative, floor)
    # Zero-mean errors cancel over rows; those of truncating accumulators do not.
    gain = max(relative / math.sqrt(independent_rows(reference)), floor)
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


class _Sample:
    """One sample of what a site did, on the CPU."""

    def __init__(self, capture: Capture, sample: int) -> None:
        self.site = capture.site
        self._calls = _last_pass(capture.calls)
        last = next(reversed(self._calls.values())).output
        self.dtype, self.batch = last.dtype, last.shape[0]
        self.sample = sample % self.batch
        self._routes = capture.routes_MK
        self._labels, self._scale = capture.labels_BT, capture.loss_scale
        self.tensors = self._seen()

    def replay(self, replica: nn.Module, dtype: torch.dtype, change: Change = lambda tensor: tensor) -> Tensors:
        """The judged tensors, from the replica computing in `dtype`; inputs and output gradients are changed first."""

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return change(self._cut(tensor)).to(dtype)

        found: Tensors = {}
        if LAYER in self._calls:
            found |= self._replay_layer(replica, own)
        for name in self._single_parts():
            call = self._calls[name]
            part = replica.get_submodule(name)
            output, gradients = run(part, own(call.inputs[0]), own(_output_gradient(call)))
            found |= _named(name, output, gradients[0])
        if self.site == HEAD:
            found["logits.gradient"] = self._loss_gradient(own(self._calls["lm_head"].output))
        return found

    def _seen(self) -> Tensors:
        found: Tensors = {}
        for name, call in self._calls.items():
            gradient = call.input_gradient
            found |= _named(name, self._cut(call.output), None if gradient is None else self._cut(gradient))
        if self.site == HEAD:
            found["logits.gradient"] = self._cut(_output_gradient(self._calls["lm_head"]))
        return found

    def _replay_layer(self, replica: nn.Module, own: Change) -> Tensors:
        call = self._calls[LAYER]
        rope = tuple(table.cpu() for table in call.inputs[1])
        routes = self._routes
        if routes is not None:
            tokens = call.output.shape[1]
            start = self.sample * tokens
            routes = routes[start : start + tokens].cpu()
        with Taps(inner_parts(replica), lambda tensor: tensor) as taps, forcing_routes(replica, routes):
            run(lambda x: replica(x, rope), own(call.inputs[0]), own(_output_gradient(call)))
        calls = {name: taps.calls[name][0] for name in ("self_attn", "mlp", LAYER)}
        found: Tensors = {}
        for name, inner in calls.items():
            found |= _named(name, inner.output, inner.input_gradient)
        return found

    def _loss_gradient(self, logits_1TV: torch.Tensor) -> torch.Tensor:
        """Of summed cross-entropy: softmax minus one at the label, zero at ignored positions, times the loss's
        scale."""
        assert self._labels is not None and self._scale is not None
        labels_1T = self._cut(self._labels)
        wide = logits_1TV.to(precise(logits_1TV.dtype))
        gradient = wide.softmax(-1)
        gradient.scatter_add_(-1, labels_1T.clamp_min(0).unsqueeze(-1), -torch.ones_like(gradient[..., :1]))
        kept = (labels_1T != IGNORED).unsqueeze(-1).to(wide.dtype)
        return (gradient * kept * self._scale.cpu().to(wide.dtype)).to(logits_1TV.dtype)

    def _single_parts(self) -> list[str]:
        inner = (LAYER, "self_attn", "mlp") if LAYER in self._calls else ()
        return [name for name in self._calls if name not in inner]

    def _cut(self, tensor: torch.Tensor) -> torch.Tensor:
        start = self.sample
        return tensor[start : start + 1].cpu()


def _output_gradient(call: Call) -> torch.Tensor:
    assert call.output_gradient is not None
    return call.output_gradient


def _last_pass(calls: Mapping[str, list[Call]]) -> dict[str, Call]:
    """The call of each part in the last accumulation step; of the head, which the multi-token layer uses too, the
    first call in it, which is the model's own."""
    last = {name: part[-1] for name, part in calls.items()}
    if "lm_head" in calls:
        passes = len(calls["norm"])
        last["lm_head"] = calls["lm_head"][-(len(calls["lm_head"]) // passes)]
    return last


def _named(part: str, output: torch.Tensor, gradient: torch.Tensor | None) -> Tensors:
    prefix = f"{part}." if part else ""
    found = {f"{prefix}output": output}
    return found if gradient is None else found | {f"{prefix}input.gradient": gradient}


def empty_replica(decoder: Decoder, site: str) -> nn.Module:
    """The modules of a layer or of the head without weights, to be filled by `place`."""
    config, index = decoder.config, layer_index(site)
    with torch.device("meta"):
        if index is None:
            norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            head = Linear(config.hidden_size, config.vocab_size, bias=False)
            return nn.ModuleDict({"norm": norm, "lm_head": head})
        if index == config.num_hidden_layers:
            return MultiTokenLayer(config)
        return DecoderLayer(config, index)


def _as_used(
    replica: nn.Module, weights: Mapping[str, torch.Tensor], rounded: torch.dtype, dtype: torch.dtype
) -> Tensors:
    """Weights on the CPU as the layer uses them: of products as rounded to the chip's dtype, of norms and router
    whole."""
    products = {name for name, part in replica.named_modules() if isinstance(part, Linear | Experts)}

    def used(name: str, weight: torch.Tensor) -> torch.Tensor:
        here = weight.detach().cpu()
        if not here.is_floating_point():
            return here
        return here.to(rounded).to(dtype) if name.rpartition(".")[0] in products else here.to(dtype)

    return {name: used(name, weight) for name, weight in weights.items()}
