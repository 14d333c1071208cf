"""What is kept of one step, for one site: inputs, outputs and gradients of its parts.

Hooks are put in before the forward pass of a step that checks, and taken out after its backward pass; in all other
steps there are none. Of a step with several accumulation steps the last one is judged.

B samples, T tokens, D hidden, M = B T rows, K experts a token.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from beringia.model import Decoder, Sums, Targets, recording_routes
from beringia.numerics.replay import Call, Taps
from beringia.train.sharding import whole

EMBEDDING, HEAD = "embed_tokens", "head"
LAYER = ""
"""Name of the part that is the whole layer."""
_MULTI_TOKEN_PARTS = ("enorm", "hnorm", "eh_proj", "shared_head.norm")


def sites_of(decoder: Decoder, *, mtp: bool) -> tuple[str, ...]:
    """Every part of the decoder that is checked by itself, in the order of the forward pass."""
    layers = decoder.model.layers if mtp or decoder.mtp is None else decoder.layers
    return (EMBEDDING, *(f"layers.{index}" for index in range(len(layers))), HEAD)


def layer_index(site: str) -> int | None:
    """The number of the layer that a site names, or None for the two ends."""
    kind, _, index = site.partition(".")
    return int(index) if kind == "layers" else None


def root_of(decoder: Decoder, site: str) -> dict[str, nn.Module]:
    """The modules that hold a site's weights, by the prefix that their names get."""
    index = layer_index(site)
    if index is not None:
        return {LAYER: decoder.model.layers[index]}
    if site == EMBEDDING:
        return {"embed_tokens": decoder.model.embed_tokens}
    return {"norm": decoder.model.norm, "lm_head": decoder.lm_head}


def parts_of(root: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules of a site whose tensors are judged."""
    layer = root.get(LAYER)
    if layer is None:
        return root
    parts = {name: module for name, module in layer.named_modules() if name in _MULTI_TOKEN_PARTS}
    return inner_parts(layer) | parts


def inner_parts(layer: nn.Module) -> dict[str, nn.Module]:
    """A layer, its attention, its experts or feed-forward block."""
    return {LAYER: layer, "self_attn": layer.get_submodule("self_attn"), "mlp": layer.get_submodule("mlp")}


def weights_of(decoder: Decoder, site: str) -> dict[str, torch.Tensor]:
    """A site's live weights and buffers, whole (a collective where they are sharded)."""
    return {
        f"{prefix}.{name}" if prefix else name: whole(tensor)
        for prefix, module in root_of(decoder, site).items()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


class SiteCapture:
    """Watches one site from its creation until `close()`, which is due after the backward pass."""

    def __init__(self, decoder: Decoder, site: str) -> None:
        self.site = site
        self.targets: Targets = {}
        """Of the decoder's last call; only at the head."""
        self.sums: Sums = {}
        """The objective's sums in that call; only at the head."""
        self.scales: dict[str, torch.Tensor] = {}
        """Gradients of these sums, by term; only at the head."""
        root = root_of(decoder, site)
        self._layer = root.get(LAYER)
        self._stack = ExitStack()
        # Tensors are held, not copied: nothing in the model writes to one in place while autograd may still read it.
        self._taps = self._stack.enter_context(Taps(parts_of(root), lambda tensor: tensor))
        if self._layer is not None:
            self._stack.enter_context(recording_routes(self._layer))
        elif site == HEAD:
            self._watch_loss(decoder)

    def close(self) -> None:
        """Take every hook away; what was seen stays."""
        self._stack.close()

    @property
    def calls(self) -> dict[str, list[Call]]:
        """The calls of each part in this step, in order."""
        return self._taps.calls

    @property
    def complete(self) -> bool:
        """Whether forward and backward pass came by every part."""
        return all(calls and calls[-1].output_gradient is not None for calls in self.calls.values())

    @property
    def routes_MK(self) -> torch.Tensor | None:
        """The experts that the tokens of the last call went to; None for a dense layer."""
        mlp = None if self._layer is None else self._layer.get_submodule("mlp")
        return getattr(mlp, "chosen", None)

    def _watch_loss(self, decoder: Decoder) -> None:
        def note_targets(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            self.targets = options["targets"]

        def note_scale(name: str, gradient: torch.Tensor) -> None:
            self.scales[name] = gradient.detach()

        def note_sums(module: nn.Module, inputs: tuple[Any, ...], sums: Sums) -> None:
            self.sums, self.scales = {name: term_sum.detach() for name, term_sum in sums.items()}, {}
            for name, term_sum in sums.items():
                if term_sum.requires_grad:
                    term_sum.register_hook(partial(note_scale, name))  # type: ignore[no-untyped-call]  # in torch

        for handle in (
            decoder.register_forward_pre_hook(note_targets, with_kwargs=True),
            decoder.register_forward_hook(note_sums),
        ):
            self._stack.callback(handle.remove)
