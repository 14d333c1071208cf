"""One sample of what a site did in a step, and its replay: the same inputs, output gradients, choice of experts and
weights, on the CPU and in a dtype of the caller's choice.

What is found and what is replayed are tensors by name (`mlp.output`, `self_attn.input.gradient`), to be compared one by
one. The head has one more, what the objective sends back to it (`logits.gradient`).

B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from beringia.model import Decoder, forcing_routes
from beringia.model.decoder import DecoderLayer, MultiTokenLayer
from beringia.model.experts import Experts
from beringia.model.layers import Linear, RMSNorm
from beringia.numerics.replay import Call, Taps, run
from beringia.train.guard.capture import HEAD, LAYER, SiteCapture, inner_parts, layer_index
from beringia.train.objective import Objective

Tensors = dict[str, torch.Tensor]
Change = Callable[[torch.Tensor], torch.Tensor]


class Sample:
    """One sample of what a site did, on the CPU."""

    def __init__(self, capture: SiteCapture, number: int) -> None:
        self.site = capture.site
        self._calls = last_pass(capture.calls)
        last = next(reversed(self._calls.values())).output
        self.dtype, self.batch = last.dtype, last.shape[0]
        self.number = number % self.batch
        self._routes = capture.routes_MK
        self.tensors = self._seen()

    def chosen(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the experts' block got, T D, and the experts that were chosen for it, T K; None where there are none."""
        routes_TK = self._own_routes()
        return None if routes_TK is None else (self._cut(self._calls["mlp"].inputs[0])[0], routes_TK)

    def replay(self, replica: nn.Module, dtype: torch.dtype, change: Change = lambda tensor: tensor) -> Tensors:
        """The judged tensors, from the replica computing in `dtype`; inputs and output gradients are changed first."""

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return change(self._cut(tensor)).to(dtype)

        found = self._replay_layer(replica, own) if LAYER in self._calls else {}
        for name in self._single_parts():
            call = self._calls[name]
            part = replica.get_submodule(name)
            output, gradients = run(part, own(call.inputs[0]), own(_output_gradient(call)))
            found |= _named(name, output, gradients[0])
        return found

    def _seen(self) -> Tensors:
        found: Tensors = {}
        for name, call in self._calls.items():
            gradient = call.input_gradient
            found |= _named(name, self._cut(call.output), None if gradient is None else self._cut(gradient))
        return found

    def _replay_layer(self, replica: nn.Module, own: Change) -> Tensors:
        call = self._calls[LAYER]
        rope = tuple(table.cpu() for table in call.inputs[1])
        with Taps(inner_parts(replica), lambda tensor: tensor) as taps, forcing_routes(replica, self._own_routes()):
            run(lambda x: replica(x, rope), own(call.inputs[0]), own(_output_gradient(call)))
        calls = {name: taps.calls[name][0] for name in ("self_attn", "mlp", LAYER)}
        found: Tensors = {}
        for name, inner in calls.items():
            found |= _named(name, inner.output, inner.input_gradient)
        return found

    def _own_routes(self) -> torch.Tensor | None:
        if self._routes is None:
            return None
        tokens = self._calls[LAYER].output.shape[1]
        start = self.number * tokens
        return self._routes[start : start + tokens].cpu()

    def _single_parts(self) -> list[str]:
        inner = (LAYER, "self_attn", "mlp") if LAYER in self._calls else ()
        return [name for name in self._calls if name not in inner]

    def _cut(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self.number : self.number + 1].cpu()


class HeadSample(Sample):
    """Likewise at the head, with what the objective makes of the chip's own logits."""

    def __init__(self, capture: SiteCapture, number: int, objective: Objective) -> None:
        super().__init__(capture, number)
        self._objective = objective
        self._targets = {name: self._cut(target) for name, target in capture.targets.items()}
        self._scales = {name: scale.cpu() for name, scale in capture.scales.items()}

    def replay(self, replica: nn.Module, dtype: torch.dtype, change: Change = lambda tensor: tensor) -> Tensors:
        found = super().replay(replica, dtype, change)
        logits_1TV = change(self._cut(self._calls["lm_head"].output)).to(dtype)
        gradient_1TV = self._objective.logits_gradient(logits_1TV, self._targets, self._scales)
        return found | {"logits.gradient": gradient_1TV}

    def _seen(self) -> Tensors:
        return super()._seen() | {"logits.gradient": self._cut(_output_gradient(self._calls["lm_head"]))}


def sample_of(capture: SiteCapture, number: int, objective: Objective) -> Sample:
    """Sample `number` of what a capture saw, counted round."""
    return HeadSample(capture, number, objective) if capture.site == HEAD else Sample(capture, number)


def longest_of(capture: SiteCapture, number: int) -> int:
    """A sample that is as long as any: `number`, where that is one. Long is a sample that something is learned from
    late. Shorter ones are filled up behind, and what is wrong past a length is in long ones alone."""
    learned_BT = _output_gradient(next(iter(last_pass(capture.calls).values()))).any(-1)
    ends_T = torch.arange(1, learned_BT.shape[1] + 1, device=learned_BT.device)
    lengths_B = (learned_BT * ends_T).amax(-1).cpu()
    number %= len(lengths_B)
    return number if lengths_B[number] == lengths_B.max() else int(lengths_B.argmax())


_FORWARD = ("enorm", "hnorm", "eh_proj", "self_attn", "mlp", LAYER, "shared_head.norm", "norm", "lm_head")
_BACKWARD = ("logits", "lm_head", "norm", "shared_head.norm", "mlp", "self_attn", LAYER, "eh_proj", "hnorm", "enorm")
_ORDER = [
    *(f"{part}.output" for part in _FORWARD),
    "logits.gradient",
    *(f"{part}.input.gradient" for part in _BACKWARD),
]


def in_order(tensors: Tensors) -> list[str]:
    """Names in the order in which a step computes them: forward through the parts, backward through the gradients."""
    return [name for place in _ORDER if (name := place.removeprefix(".")) in tensors]


def _output_gradient(call: Call) -> torch.Tensor:
    assert call.output_gradient is not None
    return call.output_gradient


def last_pass(calls: Mapping[str, list[Call]]) -> dict[str, Call]:
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


def weights_as_used(
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
