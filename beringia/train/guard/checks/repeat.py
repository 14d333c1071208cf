"""The same layer once more on the chip: with the step's own whole inputs, compared with the step bit for bit.

Output, input gradient, and every parameter's gradient before clipping (where the step's gradient is of one pass on one
rank, so that nothing else was added to it). A sound chip set to be deterministic gives the same bits; a difference is a
fault that comes and goes, a race, or memory that changed since. A fault that repeats itself is invisible here, so a few
of the products and sums of the second run are held against their operands (`products.py`).

M rows, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from beringia.model import Decoder, forcing_routes
from beringia.numerics.replay import place, run
from beringia.train.guard.capture import LAYER, SiteCapture, root_of, weights_of
from beringia.train.guard.check import Check, Moment, Step, Training, Turns, When
from beringia.train.guard.finding import Finding
from beringia.train.guard.products import Product, ProductLog, Sum, judge_product, judge_sum
from beringia.train.guard.sample import empty_replica

PRODUCTS_CHECKED = 8
"""And as many sums."""
DETECTOR = "repeat"

Logged = TypeVar("Logged", Product, Sum)


class Repeat(Check[SiteCapture]):
    """A layer in turn; the two ends have nothing to repeat."""

    name = DETECTOR
    when = When(look=Moment.FORWARD, judge=(Moment.GRADIENTS,), weight=0.4, order=10)

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self._turns = Turns(training.sites[1:-1])

    def look(self, step: Step) -> Sequence[SiteCapture]:
        capture = SiteCapture(self.training.decoder, self._turns.next())
        step.hooks.callback(capture.close)
        return [capture]

    def judge(self, look: SiteCapture, step: Step) -> Sequence[Finding]:
        if not look.complete:
            return []  # a part of the model that this step did not use
        decoder, weights = self.training.decoder, weights_of(self.training.decoder, look.site)
        again = Again(decoder, sharded=self.training.sharding == "fsdp2", alone=self.training.ranks.count == 1)
        return again.judge(look, weights, step.draw("products"), compiled=step.compiled)


@dataclass(frozen=True)
class Again:
    """Runs layers of one decoder again on their own chip."""

    decoder: Decoder
    sharded: bool
    alone: bool

    def judge(
        self, capture: SiteCapture, weights: Mapping[str, torch.Tensor], draw: int, *, compiled: bool = False
    ) -> list[Finding]:
        """Findings about a captured layer; `draw` chooses the products that are checked."""
        layer = self._layer(capture.site, weights)
        call = capture.calls[LAYER][-1]
        assert call.output_gradient is not None
        names, parameters = zip(*layer.named_parameters(), strict=True)
        log = ProductLog()
        with nullcontext() if compiled else log, forcing_routes(layer, capture.routes_MK):
            output, gradients = run(
                lambda x: layer(x, call.inputs[1]), call.inputs[0], call.output_gradient, parameters
            )
        pairs: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {"output": (call.output, output)}
        if call.input_gradient is not None:
            pairs["input.gradient"] = (call.input_gradient, gradients[0])
        if self.alone and len(capture.calls[LAYER]) == 1:
            pairs |= self._parameter_gradients(capture.site, dict(zip(names, gradients[1:], strict=True)))
        findings = _compare(capture.site, pairs)
        findings += [judge_product(capture.site, product, draw) for product in _some(log.products, draw)]
        return findings + [judge_sum(capture.site, added) for added in _some(log.sums, draw)]

    def _layer(self, site: str, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        """The live layer; where its weights are sharded, another one that holds them whole, on the chip."""
        if not self.sharded:
            return root_of(self.decoder, site)[LAYER]
        layer = empty_replica(self.decoder, site)
        place(layer, weights, trainable=True)
        return layer

    def _parameter_gradients(
        self, site: str, again: Mapping[str, torch.Tensor | None]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
        layer = root_of(self.decoder, site)[LAYER]
        return {
            f"{name}.gradient": (parameter.grad, again[name])
            for name, parameter in layer.named_parameters()
            if parameter.grad is not None
        }


def _compare(site: str, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]) -> list[Finding]:
    present = {name: (first, second) for name, (first, second) in pairs.items() if second is not None}
    # Compared where they lie; one transfer of one number each.
    counts = torch.stack([(first != second).sum() for first, second in present.values()]).tolist()
    return [
        Finding(DETECTOR, site, name, float(count), 0.0, "number of elements that another run gives other bits")
        for name, count in zip(present, counts, strict=True)
    ]


def _some(items: list[Logged], draw: int) -> list[Logged]:
    """`PRODUCTS_CHECKED` neighbours from a drawn place on, so that visits in turn come by all of them."""
    if len(items) <= PRODUCTS_CHECKED:
        return items
    start = draw % len(items)
    return (items + items)[start : start + PRODUCTS_CHECKED]
