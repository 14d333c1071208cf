"""What a chip makes of a model, small enough to travel: losses, outputs, gradients and updates, as sketches.

A trace has three parts. From the same weights, each of several batches gives its loss, its outputs and its gradients;
so forward and backward pass are seen without what an optimizer makes of them. The same weights are served in several
ways (`serving.py`), and give gradients that are added up over unlike batches (`unlike_batches.py`). Then training steps
from those weights give losses, the update of the weights, and what buffers are then.

Two traces are compared by distances between their sketches (`sketches.py`).

Discrete choices (which experts) are taken from float64 in all traces: near a tie another one is no error of arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from beringia.chips.chip import Chip
from beringia.machine.memory import return_freed_memory
from beringia.numerics.replay import Taps
from beringia.qualify.operators.float64 import to_wide
from beringia.qualify.rounding_draw import Change, RoundingDraw
from beringia.qualify.serving import Around, Serving, Step
from beringia.qualify.sketches import sketches_of
from beringia.qualify.subject import TRAINING, Batch, Routes, Subject, nothing_around, on_device
from beringia.train import optimizer as training_optimizer


@dataclass(frozen=True)
class TraceExtent:
    """How much a trace holds."""

    batches: int = 6
    steps: int = 6
    whole: bool = False
    """Whether all ways of serving and training are tried, and not only a subset that covers them."""
    scenarios: bool = True
    """Whether any is, beside the batches."""


@dataclass(frozen=True)
class Trace:
    """Sketches by name (`outputs/0`, `gradient/0/model.norm.weight`, `decode`, `serve/decoding 1 at 597`,
    `accumulated/model.norm.weight`, `update/model.norm.weight`, `buffer/norm.running_mean`); losses."""

    sketches: Mapping[str, torch.Tensor]
    losses_K: torch.Tensor
    """Of the batches, float64."""
    losses_N: torch.Tensor
    """Of the training steps, float64."""


@dataclass(frozen=True)
class ChosenRoutes:
    """Which experts float64 chose, in the batches, the training steps, the servings and the unlike batches."""

    batches: tuple[Routes, ...]
    steps: tuple[Routes, ...]
    servings: tuple[Routes, ...] = ()
    unlike: tuple[Routes, ...] = ()


class Tracer:
    """Makes traces of one subject."""

    def __init__(self, subject: Subject, plan: TraceExtent) -> None:
        self._subject = subject
        self._plan = plan
        self._batches = [subject.batch(number) for number in range(max(plan.batches, plan.steps))]
        self._servings = subject.servings(whole=plan.whole) if plan.scenarios else ()
        self._unlike = subject.micro_batches(whole=plan.whole) if plan.scenarios else ()

    @property
    def servings(self) -> tuple[Serving, ...]:
        """Ways of serving that are in its traces."""
        return self._servings

    @property
    def unlike(self) -> tuple[Batch, ...]:
        """Batches whose gradients are added up in its traces."""
        return self._unlike

    @property
    def unlike_words(self) -> tuple[str, ...]:
        """What a training step over its unlike batches is, for who reads a certificate."""
        return (self._subject.micro_batches_in_words(self._unlike),) if self._unlike else ()

    def in_float64(self) -> tuple[Trace, ChosenRoutes]:
        """On the CPU, and the routes for all others."""
        made = self._run(self._exact_model(), fused=False, routes=None, begin_step=lambda: None, at_once=True)
        return_freed_memory()
        return made

    def traffic(self, routes: ChosenRoutes) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What float64 sends through each layer in the first batch: its input, and its output's gradient."""
        model = self._exact_model()
        with Taps(self._subject.layers_of(model), lambda tensor: tensor) as taps:
            self._backward(model, self._batches[0], routes.batches[0])
        calls = {name: seen[0] for name, seen in taps.calls.items() if seen}
        return {
            name: (call.inputs[0], call.output_gradient)
            for name, call in calls.items()
            if call.output_gradient is not None
        }

    def _exact_model(self) -> nn.Module:
        return self._subject.place(self._subject.build(), torch.device("cpu"), torch.float64)

    def on_chip(
        self,
        chip: Chip,
        dtype: torch.dtype,
        routes: ChosenRoutes,
        *,
        begin_step: Callable[[], None],
        served: dict[str, torch.Tensor] | None = None,
        change: Change | None = None,
    ) -> Trace:
        """On a chip in `dtype`; `begin_step` is called before each pass, `change` alters the weights first. `served`:
        what `serve` gave there already."""
        return_freed_memory()
        model = self._subject.build()
        if change is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(change(name, parameter))
        model = self._subject.place(model, chip.device, dtype)
        fused = chip.capabilities.fused_optimizer
        at_once = change is not None  # noise is that of rounding, whatever a prompt is cut into
        with change.moving_results() if isinstance(change, RoundingDraw) else nullcontext():
            trace, _ = self._run(
                model, fused=fused, routes=routes, begin_step=begin_step, at_once=at_once, served=served
            )
        return trace

    def served_on_chip(
        self,
        chip: Chip,
        dtype: torch.dtype,
        routes: ChosenRoutes,
        *,
        begin_step: Callable[[], None],
        served: dict[str, torch.Tensor],
    ) -> Trace:
        """Of a trace what no training is needed for: outputs, decoding, and `served`, which `serve` gave; no losses."""
        model = self._subject.place(self._subject.build(), chip.device, dtype)
        sketches = dict(served)
        for number in range(self._plan.batches):
            begin_step()
            sketches |= sketches_of(
                f"outputs/{number}", "outputs", self._outputs(model, number, routes.batches[number])
            )
        begin_step()
        return Trace(sketches | self._decode(model), torch.zeros(0), torch.zeros(0))

    def serve(
        self, model: nn.Module, routes: ChosenRoutes, around: Callable[[Step], Around] = nothing_around
    ) -> dict[str, torch.Tensor]:
        """The sketches of all servings by a model that is placed, call by call, as they are served; `around` each."""
        sketches: dict[str, torch.Tensor] = {}
        for serving, chosen in zip(self._servings, routes.servings, strict=True):
            sketches |= _served(self._subject.serve(model, serving, chosen, around))
        return sketches

    def first_pass(
        self, chip: Chip, dtype: torch.dtype, routes: ChosenRoutes, *, begin_step: Callable[[], None]
    ) -> dict[str, torch.Tensor]:
        """The sketches of a trace's first batch once more."""
        model = self._subject.place(self._subject.build(), chip.device, dtype)
        return self._pass(model, 0, routes, begin_step)[0]

    def _run(
        self,
        model: nn.Module,
        *,
        fused: bool,
        routes: ChosenRoutes | None,
        begin_step: Callable[[], None],
        at_once: bool,
        served: dict[str, torch.Tensor] | None = None,
    ) -> tuple[Trace, ChosenRoutes]:
        sketches: dict[str, torch.Tensor] = {}
        losses: list[float] = []
        chosen: list[Routes] = []
        for number in range(self._plan.batches):
            found, loss, own = self._pass(model, number, routes, begin_step)
            sketches |= found
            losses.append(loss)
            chosen.append(own)
        begin_step()
        sketches |= self._decode(model)
        if served is None or routes is None:
            served, chosen_servings = self._serve(model, routes, begin_step, at_once=at_once)
        else:
            chosen_servings = routes.servings
        accumulated, chosen_unlike = self._accumulate(model, routes, begin_step)
        training, chosen_steps, updates = self._train(model, fused, routes, begin_step)
        return (
            Trace(
                sketches | served | accumulated | updates,
                torch.tensor(losses, dtype=torch.float64),
                torch.tensor(training, dtype=torch.float64),
            ),
            ChosenRoutes(tuple(chosen), tuple(chosen_steps), chosen_servings, chosen_unlike),
        )

    def _decode(self, model: nn.Module) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            batch = on_device(self._batches[0], _device(model))
            return sketches_of("decode", "decode", self._subject.decode(model, batch))

    def _serve(
        self, model: nn.Module, routes: ChosenRoutes | None, begin_step: Callable[[], None], *, at_once: bool
    ) -> tuple[dict[str, torch.Tensor], tuple[Routes, ...]]:
        """What is compared of every serving, from calls as they are served or from one pass over each."""
        sketches: dict[str, torch.Tensor] = {}
        chosen: list[Routes] = []
        for number, serving in enumerate(self._servings):
            known = None if routes is None else routes.servings[number]
            begin_step()
            with torch.no_grad():
                if at_once or known is None:
                    found, own = self._subject.serve_at_once(model, serving, known)
                else:
                    found, own = self._subject.serve(model, serving, known), known
            chosen.append(own)
            sketches |= _served(found)
        return sketches, tuple(chosen)

    def _accumulate(
        self, model: nn.Module, routes: ChosenRoutes | None, begin_step: Callable[[], None]
    ) -> tuple[dict[str, torch.Tensor], tuple[Routes, ...]]:
        """Gradients of the mean loss over all targets of the unlike batches, added up batch by batch."""
        targets = [self._subject.targets_in(batch) for batch in self._unlike]
        chosen: list[Routes] = []
        if self._unlike:
            begin_step()
        for number, batch in enumerate(self._unlike):
            known = None if routes is None else routes.unlike[number]
            _, own = self._backward(model, batch, known, share=targets[number] / sum(targets))
            chosen.append(own)
        sketches: dict[str, torch.Tensor] = {}
        for name, grad in _gradients(model) if self._unlike else ():
            sketches |= sketches_of(f"accumulated/{name}", name, grad)
        model.zero_grad(set_to_none=True)
        return sketches, tuple(chosen)

    def _pass(
        self, model: nn.Module, number: int, routes: ChosenRoutes | None, begin_step: Callable[[], None]
    ) -> tuple[dict[str, torch.Tensor], float, Routes]:
        """Gradients, loss and outputs of one batch, and the routes taken."""
        begin_step()
        loss, own = self._backward(model, self._batches[number], None if routes is None else routes.batches[number])
        sketches: dict[str, torch.Tensor] = {}
        for name, grad in _gradients(model):
            sketches |= sketches_of(f"gradient/{number}/{name}", name, grad)
        model.zero_grad(set_to_none=True)
        begin_step()
        sketches |= sketches_of(f"outputs/{number}", "outputs", self._outputs(model, number, own))
        return sketches, loss, own

    def _backward(
        self, model: nn.Module, batch: Batch, routes: Routes | None, share: float = 1.0
    ) -> tuple[float, Routes]:
        """Forward and backward pass of this share of the loss; the loss, and the routes taken."""
        batch = on_device(batch, _device(model))
        recorded: Routes = {}
        if routes is None:
            with self._subject.recording_routes(model) as recorded:
                loss = self._subject.loss(model, batch)
        else:
            with self._subject.forcing_routes(model, routes):
                loss = self._subject.loss(model, batch)
        (loss if share == 1.0 else loss * share).backward()  # type: ignore[no-untyped-call]  # untyped in torch
        return float(loss.detach()), recorded if routes is None else routes

    def _outputs(self, model: nn.Module, number: int, routes: Routes) -> torch.Tensor:
        with torch.no_grad(), self._subject.forcing_routes(model, routes):
            return self._subject.outputs(model, on_device(self._batches[number], _device(model)))

    def _train(
        self, model: nn.Module, fused: bool, routes: ChosenRoutes | None, begin_step: Callable[[], None]
    ) -> tuple[list[float], list[Routes], dict[str, torch.Tensor]]:
        before = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
        optimizer = make_optimizer(model, fused=fused)
        losses: list[float] = []
        chosen: list[Routes] = []
        for number in range(self._plan.steps):
            begin_step()
            loss, own = self._backward(model, self._batches[number], None if routes is None else routes.steps[number])
            losses.append(loss)
            chosen.append(own)
            nn.utils.clip_grad_norm_(model.parameters(), TRAINING.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        begin_step()
        updates: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            updates |= sketches_of(f"update/{name}", name, _change_of(before[name], parameter.detach().cpu()))
        for name, buffer in kept_buffers(model):
            updates |= sketches_of(f"buffer/{name}", name, buffer)
        return losses, chosen, updates


def kept_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Those that a checkpoint of the model has: what passes may change beside its parameters."""
    kept = model.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _change_of(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """In float64; of whole numbers and truth values, which are other ones."""
    if now.is_floating_point() or now.is_complex():
        return to_wide(now) - to_wide(before)
    return (now != before).double()


def make_optimizer(model: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    """Training's own."""
    return training_optimizer.make_optimizer(model.named_parameters(), TRAINING, fused=fused)


def _served(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sketches of what a serving gave, by scenario."""
    sketches: dict[str, torch.Tensor] = {}
    for scenario, logits in found.items():
        sketches |= sketches_of(f"serve/{scenario}", scenario, logits)
    return sketches


def _gradients(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
