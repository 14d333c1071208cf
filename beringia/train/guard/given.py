"""What a step was given, as it arrived on the chip: tokens, targets and the tables of positions are the host's, bit for
bit. Replays take them from the chip, so what changed on the way would be followed and not seen.

B samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from beringia.model import Decoder
from beringia.numerics.replay import Call
from beringia.train.guard.capture import EMBEDDING, HEAD, LAYER, SiteCapture
from beringia.train.guard.finding import Finding

_WHAT = "number of elements that are not what the host gave"


@dataclass(frozen=True)
class Given:
    """One accumulation step on the host."""

    tokens_BT: torch.Tensor
    targets: Mapping[str, torch.Tensor]


def judge_given(detector: str, decoder: Decoder, capture: SiteCapture, given: Sequence[Given]) -> list[Finding]:
    """Of the embedding its tokens, of the head the last accumulation step's targets, of a layer its positions."""
    if capture.site == EMBEDDING:
        differing = sum(_differing_tokens(capture.calls[EMBEDDING], given)) if given else 0
        return [Finding(detector, EMBEDDING, "tokens", float(differing), 0.0, _WHAT)]
    if capture.site == HEAD:
        pairs = [(name, target, capture.targets[name]) for name, target in given[-1].targets.items()] if given else []
        return [
            Finding(detector, HEAD, name, float(_differing(here, there)), 0.0, _WHAT) for name, here, there in pairs
        ]
    return [Finding(detector, capture.site, "positions", float(_differing_positions(decoder, capture)), 0.0, _WHAT)]


def _differing_tokens(calls: Sequence[Call], given: Sequence[Given]) -> list[int]:
    """In each lookup; the multi-token layer looks up all tokens but each sample's first."""
    lookups = len(calls) // len(given)
    return [
        _differing(given[number // lookups].tokens_BT[:, -call.inputs[0].shape[1] :], call.inputs[0])
        for number, call in enumerate(calls)
    ]


def _differing_positions(decoder: Decoder, capture: SiteCapture) -> int:
    (call, *_) = capture.calls[LAYER]
    tables = decoder.rope_at(0, call.output.shape[1], torch.device("cpu"))
    return sum(_differing(here, there) for here, there in zip(tables, call.inputs[1], strict=True))


def _differing(here: torch.Tensor, there: torch.Tensor) -> int:
    there = there.cpu()
    return int(((here != there) & ~(here.isnan() & there.isnan())).sum())
