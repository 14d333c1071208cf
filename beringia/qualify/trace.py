"""What a chip makes of a model, small enough to travel: losses, outputs, gradients and updates, as sketches.

A trace has three parts. From the same weights, each of several batches gives its loss, its outputs and its gradients;
so forward and backward pass are seen without what an optimizer makes of them. The same weights are served in several
ways (`serving.py`), and give gradients that are added up over unlike batches (`unlike_batches.py`). Then training steps
from those weights give losses, the update of the weights, and what buffers are then.

Two traces are compared by distances between their sketches. A sketch of a tensor with more than `WIDTH` elements adds
its elements up, with random signs, in `WIDTH` places: sketches of differences are differences of sketches, and their
norms are those of the tensors within sqrt(2 / WIDTH), 4 % (Charikar, Chen and Farach-Colton 2002).

Discrete choices (which experts) are taken from float64 in all traces: near a tie another one is no error of arithmetic.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from beringia.chips.chip import Chip
from beringia.machine.memory import return_freed_memory
from beringia.numerics.metrics import UNIT_ROUNDOFF
from beringia.numerics.replay import Taps
from beringia.qualify.operators.float64 import to_wide
from beringia.qualify.operators.watch import in_backward
from beringia.qualify.serving import Around, Serving, Step
from beringia.qualify.subject import TRAINING, Batch, Routes, Subject, nothing_around, on_device
from beringia.train import optimizer as training_optimizer

WIDTH = 1024
Change = Callable[[str, torch.Tensor], torch.Tensor]
"""Another parameter for each, by name."""


@dataclass(frozen=True)
class RoundingDraw:
    """One draw of what rounding may do to a model on a sound chip, as changes of what goes into exact arithmetic.

    Weights move by up to a unit in the last place of `dtype`; where `dtype` has the accumulator's precision, by as much
    more as it costs to add a row's products up, products in the backward pass likewise, and elementary functions as
    their makers say. Drawn on the CPU.
    """

    seed: int
    dtype: torch.dtype

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A parameter, moved; whole numbers and truth values are not rounded."""
        if not (weight.is_floating_point() or weight.is_complex()):
            return weight
        # A unit in the last place is two roundoffs.
        largest = 2.0 * UNIT_ROUNDOFF[self.dtype] * _adding_up(weight, self.dtype)
        return (to_wide(weight) * (1.0 + largest * self._drawn(name, weight.shape))).to(weight.dtype)

    def moving_results(self) -> AbstractContextManager[object]:
        """Inside, products and sums of the backward pass are off by what adding them up costs, and elementary functions
        by what their makers say. In 16-bit dtypes that is nothing beside the roundings of results."""
        rounds_to_less = UNIT_ROUNDOFF[self.dtype] > UNIT_ROUNDOFF[_accumulator(self.dtype)]
        return nullcontext() if rounds_to_less else _MovedResults(self)

    def added_up(self, name: str, result: torch.Tensor, squares: torch.Tensor, terms: int) -> torch.Tensor:
        """Sums of so many terms, given the sums of their squares, moved by the error of a sum of random signs: that of
        `_adding_up`, of the size of the terms and not of their sum. Where they nearly cancel, as a trained model's
        gradients do over the rows of a batch, that is most of a gradient's error."""
        largest = math.sqrt(3.0) * UNIT_ROUNDOFF[_accumulator(self.dtype)] * math.sqrt(terms / 6.0)
        return result + largest * self._drawn(name, result.shape).to(result.device, result.dtype) * squares.sqrt()

    def elementary(self, name: str, result: torch.Tensor) -> torch.Tensor:
        """A result of elementary functions, moved by up to `ELEMENTARY_ULPS`."""
        largest = ELEMENTARY_ULPS * 2.0 * UNIT_ROUNDOFF[self.dtype]
        return result * (1.0 + largest * self._drawn(name, result.shape).to(result.device, result.dtype))

    def _drawn(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        draw = torch.empty(tuple(shape), dtype=torch.float64)
        return draw.uniform_(-1.0, 1.0, generator=_generator(f"{self.seed}/{name}"))


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
_SUM = torch.ops.aten.sum.dim_IntList


_ELEMENTARY = re.compile(r"exp2?|expm1|log(2|10|1p)?|rsqrt|erfc?|.*(tanh|sigmoid|silu|gelu|softmax).*")
"""Operators that are made of elementary functions, forward and backward, by their whole name."""
ELEMENTARY_ULPS = 4.0
"""The most that any maker documents for float32 (`operators/bounds.py`)."""


class _MovedResults(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class hook is untyped
    """Inside, a draw moves the products and sums of the backward pass, and what elementary functions give."""

    def __init__(self, draw: RoundingDraw) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._draw = draw
        self._calls = itertools.count()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if in_backward() and func in (*_PRODUCTS, _SUM) and result.dtype == self._draw.dtype:
            return self._added_up(func, result, args)
        if not _ELEMENTARY.fullmatch(func.overloadpacket.__name__):
            return result
        if not isinstance(result, tuple):
            return self._moved(result)
        # What a forward pass hands on to the backward pass beside its result has roundings of its own.
        own = len(result) if in_backward() else 1
        return (*map(self._moved, result[:own]), *result[own:])

    def _added_up(self, func: OpOverload, result: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor:
        name = f"sum {next(self._calls)}"
        if func is not _SUM:
            one, other = args
            return self._draw.added_up(name, result, one.square() @ other.square(), one.shape[-1])
        squares = _SUM(args[0].square(), *args[1:])
        return self._draw.added_up(name, result, squares, args[0].numel() // max(1, result.numel()))

    def _moved(self, result: Any) -> Any:
        """Of a tensor in the draw's dtype; all else as it is."""
        if not isinstance(result, torch.Tensor) or result.dtype != self._draw.dtype or result.device.type == "meta":
            return result
        return self._draw.elementary(f"elementary {next(self._calls)}", result)


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


def moved_by_rounding(seed: int, dtype: torch.dtype) -> RoundingDraw:
    """A draw of what rounding to `dtype` may do."""
    return RoundingDraw(seed, dtype)


def sketch(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it is small, else its elements added up with signs drawn from its name; float64.

    Infinities and NaN have sketches of their own (`not_finite`): here they are zeros.
    """
    flat = _as_reals(tensor.detach().cpu()).flatten()
    found = _added_with_signs(name, flat)
    # A sum is finite only if its terms are.
    return found if _all_finite(found) else _added_with_signs(name, flat.double().nan_to_num(0.0, 0.0, 0.0))


def _as_reals(tensor: torch.Tensor) -> torch.Tensor:
    """Complex numbers as pairs."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _added_with_signs(name: str, flat: torch.Tensor) -> torch.Tensor:
    """Rows of `WIDTH`, added up a block at a time: of a large tensor neither a copy in float64 nor a product with its
    signs is made whole, which would take several passes over memory."""
    if flat.numel() <= WIDTH:
        return flat.to(torch.float64, copy=True)
    signs, found = _signs(name, flat.numel()), torch.zeros(WIDTH, dtype=torch.float64)
    for start in range(0, flat.numel(), _BLOCK):
        signed = flat[start : start + _BLOCK].double() * signs[start : start + _BLOCK]
        whole = signed.numel() // WIDTH * WIDTH
        found += signed[:whole].view(-1, WIDTH).sum(0)
        found[: signed.numel() - whole] += signed[whole:]
    return found


def _all_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


_BLOCK = 256 * WIDTH
"""Elements; in float64 they fit in a core's cache."""
NOT_FINITE = "#not-finite"
"""Follows the name of a sketch that says where its tensor is infinite or NaN."""
_APART = 1e200
"""Of such a sketch: one element that is not the same on two sides is farther off than any number's error."""


def sketches_of(name: str, kind: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensor's sketch under its name, and, if not all is finite, the one that says what is not. `kind`: what the
    signs are drawn from."""
    flat = _as_reals(tensor.detach().cpu()).flatten()  # a faulty chip must not judge itself
    found = _added_with_signs(kind, flat)
    if _all_finite(found) or _all_finite(flat):
        return {name: found}
    codes = flat.isnan() * 4.0 + flat.isposinf() * 2.0 + flat.isneginf() * 1.0
    return {name: sketch(kind, flat), name + NOT_FINITE: sketch(kind, codes) * _APART}


def _served(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sketches of what a serving gave, by scenario."""
    sketches: dict[str, torch.Tensor] = {}
    for scenario, logits in found.items():
        sketches |= sketches_of(f"serve/{scenario}", scenario, logits)
    return sketches


def _adding_up(weight: torch.Tensor, dtype: torch.dtype) -> float:
    """How much larger the error of a product is with the roundings of its sum than without.

    One term after another, rounded to nearest, K terms of random sign are off by u sqrt(K / 6) in root mean square,
    relative to their sum (roundings of u / sqrt(3) of partial sums that grow as sqrt(k); Higham and Mary 2019). A sound
    chip may add so. Weights that move by up to 2 u cost 2 u / sqrt(3). In 16-bit dtypes this is 1.
    """
    if weight.dim() < 2:
        return 1.0
    summed = UNIT_ROUNDOFF[_accumulator(dtype)] * math.sqrt(weight.shape[-1] / 6.0)
    return math.hypot(1.0, summed / (2.0 * UNIT_ROUNDOFF[dtype] / math.sqrt(3.0)))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """In which sums of products are made."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _signs(name: str, count: int) -> torch.Tensor:
    """Plus or minus one, int8: the bits of random bytes."""
    draws = torch.randint(0, 256, (-(-count // 8), 1), generator=_generator(name), dtype=torch.uint8)
    bits = (draws >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1)
    return bits.view(torch.int8).mul_(2).sub_(1).flatten()[:count]


def _generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _gradients(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
