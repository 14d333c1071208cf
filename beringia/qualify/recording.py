"""All that one chip does with a model, seen and judged where it can be judged alone: what evidence is made of.

The same on the reference and on the candidate. Order matters: planted and real faults may depend on what ran before,
so the training steps that are watched come first and are those of training.

1. two training steps, and a pass over a batch with ignored targets, operator calls held against float64
   (`operators/`): all in the first step, later those of a few layers and their weights (`left_out_later`); weights and
   moments must not change between the steps
2. a step of decoding, likewise
3. every way of serving, some calls of which are watched, and all of which are compared
4. the rest of the trace (`trace.py`), not watched
5. the first pass of the trace again: the same bits
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from beringia.chips.chip import Chip
from beringia.qualify.operators.check import check, refused, worse_than_reference
from beringia.qualify.operators.float64 import NotKnown
from beringia.qualify.operators.parts import num_entries, of_entries
from beringia.qualify.operators.watch import Call, CallCounts, Place, Watch, tensors_in
from beringia.qualify.refusals import REFUSALS, judging
from beringia.qualify.serving import Around, Step
from beringia.qualify.sketches import NOT_FINITE
from beringia.qualify.subject import TRAINING, Batch, Subject, on_device
from beringia.qualify.trace import ChosenRoutes, Trace, Tracer, kept_buffers, make_optimizer
from beringia.records.certificate import Measure, OperatorCheck

WATCHED_STEPS = 2
LAYERS_LATER = 6
AT_REST = "memory at rest"
"""Stands for an operator where numbers changed that nothing wrote."""


@dataclass
class Recording:
    """What was seen on one chip."""

    checks: list[OperatorCheck] = field(default_factory=list)
    """In the order of execution; of a pass with an operator that is refused, nothing comes after it."""
    not_judged: dict[str, str] = field(default_factory=dict)
    """Operators without a float64 form, and why."""
    trace: Trace | None = None
    """Where the chip has every operator."""
    served: Trace | None = None
    """Where it lacks one of training: what it serves."""
    unrepeatable: tuple[str, ...] = ()
    """Sketches that had other bits the second time."""
    raised: Exception | None = None
    """What the chip raised in a pass that was not carried out to its end, where no watched operator is missing."""
    first_unrepeatable: Place | None = None
    """The first operator that gave other bits from the same arguments, where a pass made twice has other bits."""
    batch_invariant: bool | None = None
    """Whether a sample's outputs have the same bits alone and in a batch; None where that was not, or cannot be,
    tried."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By part."""


class Recorder:
    """Makes the recording of one subject on one chip."""

    def __init__(
        self, subject: Subject, chip: Chip, dtype: torch.dtype, *, also: Callable[[Call], None] | None = None
    ) -> None:
        """`also` is handed every watched call, too, but those of servings."""
        self._also = also
        self._subject = subject
        self._chip = chip
        self._dtype = dtype
        self._step = 0
        self._counts: CallCounts = Counter()
        self._recording = Recording()

    def record(self, tracer: Tracer, routes: ChosenRoutes) -> Recording:
        """Everything; where the chip refuses an operator, or raises something, what came before it."""
        found = self._recording
        try:
            self._record(tracer, routes)
        except REFUSALS as problem:
            found.raised = problem
        return found

    def _record(self, tracer: Tracer, routes: ChosenRoutes) -> None:
        found = self._recording
        with self._timed("operators"):
            # The short ones, for the loss of ignored targets: the layers, which know nothing of them, were watched.
            trains = self._watch_training() and self._watch_unlike(tracer.unlike[-1:], left_out=self._layers)
            decodes = self._watch_decoding()
            served = self._watch_serving(tracer, routes, lambda step: step.watched) if decodes else None
        if served is None:
            return
        if not trains:
            found.served = tracer.served_on_chip(
                self._chip, self._dtype, routes, begin_step=self.begin_step, served=served
            )
            return
        with self._timed("trace"):
            found.trace = tracer.on_chip(self._chip, self._dtype, routes, begin_step=self.begin_step, served=served)
        with self._timed("repeat"):
            found.unrepeatable = self._repeat(tracer, routes, found.trace)
            if found.unrepeatable:
                found.first_unrepeatable = self._first_unrepeatable()
            found.batch_invariant = self._batch_invariant()

    def watch_again(self, passes: int, judged: Callable[[OperatorCheck], OperatorCheck]) -> list[OperatorCheck]:
        """Further passes of a training step, watched until one has a wrong call: for faults that come and go.

        Returns the wrong calls as they are `judged` beside the reference's, in the order of execution.
        """
        for number in range(passes):
            seen = len(self._recording.checks)
            self._watch_step(self._take, number)
            wrong = self._wrong_since(seen, judged)
            if wrong:
                return wrong
        return []

    def watch_where_it_failed(
        self,
        tracer: Tracer,
        routes: ChosenRoutes,
        failed: Sequence[str],
        judged: Callable[[OperatorCheck], OperatorCheck],
    ) -> list[OperatorCheck]:
        """The first way of serving that failed, and the unlike batches where these did, watched as a whole: for what is
        wrong only in such shapes. `failed`: subjects of effects (`serve decoding 1 at 597`, `accumulated model.norm`).

        Returns the wrong calls as they are `judged` beside the reference's, in the order of execution.
        """
        seen = len(self._recording.checks)
        serving = next((subject.removeprefix("serve ") for subject in failed if subject.startswith("serve ")), None)
        if serving is not None:
            self._watch_serving(tracer, routes, lambda step: step.scenario == serving)
        if any(subject.startswith("accumulated ") for subject in failed):
            self._watch_unlike(tracer.unlike, left_out_later(self._layers))
        return self._wrong_since(seen, judged)

    def _wrong_since(self, seen: int, judged: Callable[[OperatorCheck], OperatorCheck]) -> list[OperatorCheck]:
        return [check for check in map(judged, self._recording.checks[seen:]) if worse_than_reference(check)]

    # Watching

    def _watch_step(self, take: Callable[[Call], None], number: int) -> None:
        """Forward and backward pass of a batch, from the weights as they were read."""
        model = self._model()
        self.begin_step()
        with Watch(model, self._chip.device, take):
            loss = self._subject.loss(model, self._batch(number))
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch

    def _watch_training(self) -> bool:
        model = self._model()
        optimizer = make_optimizer(model, fused=self._chip.capabilities.fused_optimizer)
        self.begin_step()
        complete = self._watched_step(model, optimizer, 0, left_out=())
        for number in range(1, WATCHED_STEPS):
            if complete:
                self._begin_step_at_rest(model, optimizer)
                complete = self._watched_step(model, optimizer, number, left_out=left_out_later(self._layers))
        return complete

    def _begin_step_at_rest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        before = {name: tensor.cpu().clone() for name, tensor in _state(model, optimizer)}
        self.begin_step()
        self._compare_at_rest(before, model, optimizer)

    def _watched_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, number: int, left_out: Sequence[str]
    ) -> bool:
        batch = self._batch(number)
        lists = _lists_of_weights(model, optimizer, left_out)

        def take(call: Call) -> None:
            kept = lists.get(num_entries(call))
            if kept is None:
                self._take(call)
            elif kept:
                self._judge(of_entries(call, kept))  # not handed on: the first step's was

        return self._watched(model, take, lambda watch: self._training_step(watch, model, optimizer, batch), left_out)

    def _training_step(self, watch: Watch, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        with watch.direction("forward"):
            loss = self._subject.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        with watch.direction("optimizer"):
            nn.utils.clip_grad_norm_(model.parameters(), TRAINING.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self._subject.after_update(model)

    def _watch_unlike(self, batches: Sequence[Batch], left_out: Sequence[str]) -> bool:
        """Forward and backward pass of unlike batches, in the step that has begun."""
        model = self._model()

        def train(watch: Watch) -> None:
            with watch.direction("forward"):
                for batch in batches:
                    self._subject.loss(model, on_device(batch, self._chip.device)).backward()  # type: ignore[no-untyped-call]  # untyped in torch

        # Not handed on: to a bundle they are the calls of a training step once more, in other shapes.
        return self._watched(model, self._judge, train, left_out)

    def _watch_decoding(self) -> bool:
        return self._watch_inference(lambda model, watch: self._subject.decode(model, self._batch(0)), self._take)

    def _watch_serving(
        self, tracer: Tracer, routes: ChosenRoutes, wanted: Callable[[Step], bool]
    ) -> dict[str, torch.Tensor] | None:
        """What every serving gives, for the trace, with the wanted calls watched; None where the chip refuses an
        operator."""
        served: dict[str, torch.Tensor] = {}
        if not tracer.servings:
            return served

        def serve(model: nn.Module, watch: Watch) -> None:
            @contextmanager
            def seen(step: Step) -> Iterator[None]:
                with watch.paused(False), watch.within("the engine") if step.by_engine else nullcontext():
                    yield

            def around(step: Step) -> Around:
                return seen(step) if wanted(step) else nullcontext()

            with watch.paused():
                served.update(tracer.serve(model, routes, around))

        # Not handed on: their arguments, whole caches, would take the room of all others.
        return served if self._watch_inference(serve, self._judge, left_out_later(self._layers)) else None

    def _watch_inference(
        self,
        compute: Callable[[nn.Module, Watch], object],
        take: Callable[[Call], None],
        left_out: Sequence[str] = (),
    ) -> bool:
        model = self._model()
        self.begin_step()

        def infer(watch: Watch) -> None:
            with watch.direction("decode"), torch.no_grad():
                compute(model, watch)

        return self._watched(model, take, infer, left_out)

    def _watched(
        self,
        model: nn.Module,
        take: Callable[[Call], None],
        run: Callable[[Watch], object],
        left_out: Sequence[str] = (),
    ) -> bool:
        """Whether the chip has every operator of `run`. Its calls count on: each of a recording has a name of its
        own."""
        with Watch(model, self._chip.device, take, self._counts, left_out) as watch:
            try:
                run(watch)
            except REFUSALS as error:
                if not self._was_refused(watch, error):
                    raise
                return False
        return True

    def _was_refused(self, watch: Watch, error: Exception) -> bool:
        """Whether an operator is missing on the chip: a finding. A fault of the chip goes on to the caller."""
        if watch.refused is None or self._chip.classify(error) is not None:
            return False
        self._recording.checks.append(refused(watch.refused))
        return True

    def _take(self, call: Call) -> None:
        if self._also is not None:
            self._also(call)
        self._judge(call)

    def _judge(self, call: Call) -> None:
        try:
            judged = check(call)
        except NotKnown as reason:
            self._recording.not_judged[str(call.func)] = str(reason)
            return
        if judged is not None:
            self._recording.checks.append(judged)

    def _compare_at_rest(
        self, before: Mapping[str, torch.Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        for name, tensor in _state(model, optimizer):
            now = tensor.cpu()
            if not torch.equal(_bits(before[name]), _bits(now)):
                with judging(f"{name} at rest was"):
                    changed = _changed_at_rest(name, before[name], now, self._counts.total())
                self._recording.checks.append(changed)

    # Repeating

    def _repeat(self, tracer: Tracer, routes: ChosenRoutes, first: Trace) -> tuple[str, ...]:
        again = tracer.first_pass(self._chip, self._dtype, routes, begin_step=self.begin_step)
        names = dict.fromkeys(name.removesuffix(NOT_FINITE) for name in again)
        return tuple(name for name in names if not _same(again, first.sketches, name))

    def _batch_invariant(self) -> bool | None:
        """Whether the first sample of a batch gives the same bits alone; None where the model takes no sample alone,
        or its outputs are not one for each sample."""
        model, batch = self._model(), self._batch(0)
        try:
            with torch.no_grad():
                self.begin_step()
                together = self._subject.outputs(model, batch)
                alone = _first_sample(batch, together)
                if alone is None:
                    return None
                self.begin_step()
                own, together = self._subject.outputs(model, alone).cpu(), together[:1].cpu()
        except REFUSALS as error:
            if self._chip.classify(error) is not None:
                raise
            return None
        return torch.equal(_bits(together), _bits(own)) if own.shape == together.shape else None

    def _first_unrepeatable(self) -> Place | None:
        """Two runs of a step from the same state: the first call whose results differ while its arguments do not."""
        seen: list[_Hashed] = []
        self._watch_step(lambda call: seen.append(_hashed(call)), 0)
        first = iter(seen)
        differing: list[Place] = []

        def compare(call: Call) -> None:
            before, now = next(first, None), _hashed(call)
            if before is not None and before.arguments == now.arguments and before.results != now.results:
                differing.append(call.place)
                raise _Found

        with suppress(_Found):
            self._watch_step(compare, 0)
        return differing[0] if differing else None

    # Small parts

    @cached_property
    def _layers(self) -> tuple[str, ...]:
        return tuple(self._subject.layers_of(self._subject.build()))

    def _model(self) -> nn.Module:
        return self._subject.place(self._subject.build(), self._chip.device, self._dtype)

    def _batch(self, number: int) -> Batch:
        return on_device(self._subject.batch(number), self._chip.device)

    def begin_step(self) -> None:
        """Tell the chip that a step begins."""
        self._step += 1
        self._chip.begin_step(self._step)

    def _timed(self, part: str) -> _Timer:
        return _Timer(self._recording.seconds, part)


def _first_sample(batch: Batch, outputs: torch.Tensor) -> Batch | None:
    """A batch of the first sample: of tensors with a row for each output, the first row, and all others as they are.
    None where there are no such tensors."""
    if not outputs.dim():
        return None
    by_sample = {name for name, tensor in batch.items() if tensor.dim() and len(tensor) == len(outputs)}
    alone = {name: tensor[:1] if name in by_sample else tensor for name, tensor in batch.items()}
    return alone if by_sample else None


def left_out_later(layers: Sequence[str]) -> list[str]:
    """Of many layers those that are watched in the first training step and in decoding and no more: all but
    `LAYERS_LATER` from the first to the last. In later steps, and in serving, all layers make the same calls; what is
    wrong in those that are left out has its effect in the trace, and then further passes are watched."""
    if len(layers) <= LAYERS_LATER:
        return []
    watched = {round(number * (len(layers) - 1) / (LAYERS_LATER - 1)) for number in range(LAYERS_LATER)}
    return [name for number, name in enumerate(layers) if number not in watched]


class _Timer:
    def __init__(self, seconds: dict[str, float], part: str) -> None:
        self._seconds = seconds
        self._part = part

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + time.perf_counter() - self._started


def _lists_of_weights(
    model: nn.Module, optimizer: torch.optim.Optimizer, left_out: Sequence[str]
) -> dict[int, list[int]]:
    """Of the lists that clipping and the optimizer take whole (all weights, or those of a group), by their length:
    which entries are of layers that are not left out. Where two are as long, of the first: so many entries are
    looked at, of these or others."""
    names = {parameter: f"{name}." for name, parameter in model.named_parameters()}
    lists = [[*names], *(group["params"] for group in optimizer.param_groups)]
    outside = tuple(f"{one}." for one in left_out)
    kept = [[place for place, one in enumerate(them) if not names[one].startswith(outside)] for them in lists]
    pairs = [(len(them), places) for them, places in zip(lists, kept, strict=True) if len(them) > len(places)]
    return dict(reversed(pairs))


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights, moments and buffers, under names."""
    for name, buffer in kept_buffers(model):
        yield name, buffer.detach()
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
        for moment, tensor in optimizer.state[parameter].items():
            if isinstance(tensor, torch.Tensor):
                yield f"optimizer.{moment}.{name}", tensor.detach()


def _changed_at_rest(name: str, before: torch.Tensor, now: torch.Tensor, position: int) -> OperatorCheck:
    differ = (_bits(before) != _bits(now)).view(*before.shape, before.element_size()).any(-1)
    place = int(differ.flatten().to(torch.int8).argmax())
    element = tuple(int(index) for index in torch.unravel_index(torch.tensor(place), before.shape))
    count = float(differ.sum())
    return OperatorCheck(
        module=name,
        operator=AT_REST,
        direction="optimizer",
        ordinal=0,
        position=position,
        shapes=(tuple(before.shape),),
        dtype=str(before.dtype).removeprefix("torch."),
        basis="numbers that nothing wrote to keep every bit",
        error=None,
        measures=(Measure(name="changed", value=count, bound=0.5, unit="elements", reason="memory keeps every bit"),),
        worst_element=element,
        found=_finite(float(now.flatten()[place])),
        expected=_finite(float(before.flatten()[place])),
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: a NaN that stays is no change, and a zero that changes its sign is one."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], name: str) -> bool:
    """Whether two passes' sketches of a tensor are equal, also of what is not finite, of which one may have none."""
    names = (name, name + NOT_FINITE)
    return all(torch.equal(one.get(each, _NONE), other.get(each, _NONE)) for each in names)


_NONE = torch.empty(0)


class _Found(Exception):
    """Nothing more needs to be looked at."""


@dataclass(frozen=True)
class _Hashed:
    """A call's bits."""

    arguments: bytes
    results: bytes


def _hashed(call: Call) -> _Hashed:
    return _Hashed(_digest((call.args, dict(call.kwargs))), _digest(call.results))


def _digest(value: object) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors_in(value):
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
