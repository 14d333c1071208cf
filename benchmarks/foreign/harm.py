"""How much a chip harms a model: whole tensors, on batches and in scenarios that no qualification has.

A quantity is the logits of one way of serving, the gradient of one parameter, the update of one layer, or the losses of
some training steps. Its error is
the norm of its distance to float64 over float64's norm. A chip's harm is the worst ratio of its errors to the largest
that the chips of `SOUND` have in the same model, dtype and quantity; which chips these are was fixed before any fault
was drawn. Below `HARMLESS` it is what another sound chip may do; beyond `CLEAR` nobody would call it rounding.

Experts are float64's choice throughout, except where the choice itself is looked at ("own experts").
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.machine.memory import return_freed_memory
from beringia.model import Decoder
from beringia.model.experts import MixtureOfExperts
from beringia.numerics.metrics import UNIT_ROUNDOFF
from beringia.qualify.serving import Serving, Step
from beringia.qualify.subject import TRAINING, DecoderSubject, Routes, on_device
from beringia.qualify.trace import make_optimizer

SOUND = ("cpu", "emulated:exact", "emulated:h100", "emulated:a100", "emulated:mi300x", "emulated:ascend-910b")
HARMLESS, CLEAR = 2.0, 4.0
BATCHES = (1000, 1001)
STEPS = (1002, 1003, 1004, 1005, 1006, 1007)
_FIRST_ROW = 7_000
_LONG, _MIDDLE, _ENGINE = 540, 90, 270
_PASSES_OF_ONE_STEP = ((1, 300), (5, 33))
"""Samples and tokens of the batches whose gradients are added up."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Harm:
    """The worst ratios, and where."""

    inference: float
    training: float
    where: dict[str, str]


class Experts:
    """The experts that float64 chose, pass by pass."""

    def __init__(self, known: list[Routes] | None = None) -> None:
        self.chosen: list[Routes] = []
        self._known = None if known is None else iter(known)

    @contextmanager
    def of(self, subject: DecoderSubject, model: nn.Module) -> Iterator[None]:
        """Of the next pass: noted in float64, forced on a chip."""
        if self._known is not None:
            with subject.forcing_routes(model, next(self._known)):
                yield
            return
        with subject.recording_routes(model) as chosen:
            yield
        self.chosen.append(chosen)

    def of_serving(self) -> Routes | None:
        """Those of a serving, on a chip."""
        return None if self._known is None else next(self._known)


def servings(subject: DecoderSubject) -> tuple[Serving, ...]:
    """Own rows, own lengths, own pieces, own batches."""
    long = torch.tensor([subject._tokens(_FIRST_ROW, _LONG)])
    middle = torch.tensor([subject._tokens(_FIRST_ROW + 1 + number, _MIDDLE + 6) for number in range(3)])
    cuts = ((0, 111), (111, 112), (112, 290), (290, 520))
    pieces = [Step("in pieces", (0,), *cut) for cut in cuts]
    alone = [Step("alone, late", (0,), at, at + 1) for at in range(520, _LONG)]
    many = [Step("24 at once", (0, 1, 2) * 8, at, at + 1) for at in range(_MIDDLE, _MIDDLE + 3)]
    left = [Step("one that is left", (2,), at, at + 1) for at in range(_MIDDLE + 3, _MIDDLE + 6)]
    engine = torch.tensor([subject._tokens(_FIRST_ROW + 10 + number, _ENGINE + 5) for number in range(2)])
    prompts = [Step("by the engine, two prompts", (0, 1), 0, _ENGINE, by_engine=True)]
    together = [
        Step("by the engine, two at once", (0, 1), at, at + 1, by_engine=True) for at in range(_ENGINE, _ENGINE + 5)
    ]
    return (
        Serving(long, (Step("whole", (0,), 0, 520), *pieces, *alone), (_LONG,)),
        Serving(middle, (Step("three prompts", (0, 1, 2), 0, _MIDDLE), *many, *left), (_MIDDLE + 6,) * 3),
        Serving(engine, (*prompts, *together), (_ENGINE + 5,) * 2),
    )


@dataclass
class Measurement:
    """The quantities of one model on one chip, or in float64 (no chip)."""

    subject: DecoderSubject
    chip: Chip | None
    dtype: torch.dtype
    experts: Experts
    found: Tensors = field(default_factory=dict)

    def take(self) -> Tensors:
        """All of them, float64 on the CPU."""
        self._serve()
        self._gradients()
        self._updates()
        return_freed_memory()
        return self.found

    def _model(self) -> nn.Module:
        device = torch.device("cpu") if self.chip is None else self.chip.device
        return self.subject.place(self.subject.build(), device, self.dtype)

    def _serve(self) -> None:
        model = self._model()
        assert isinstance(model, Decoder)
        with torch.no_grad():
            for serving in servings(self.subject):
                routes = self.experts.of_serving()
                if routes is None:
                    found, routes = self.subject.serve_at_once(model, serving, None)
                    self.experts.chosen.append(routes)
                else:
                    found = self.subject.serve(model, serving, routes)
                for scenario, logits in found.items():
                    self.found[f"serve/{scenario}"] = _kept(logits)
            for number in BATCHES:
                tokens = self.subject.batch(number)["tokens"].to(_device(model))
                with self.experts.of(self.subject, model):
                    self.found[f"serve/batch {number}"] = _kept(model.logits(tokens))
                if any(isinstance(module, MixtureOfExperts) for module in model.modules()):
                    self.found[f"serve/own experts {number}"] = _kept(model.logits(tokens))

    def _gradients(self) -> None:
        model = self._model()
        for number in BATCHES:
            self._backward(model, self.subject.batch(number), 1.0)
            self._keep_gradients(model, f"gradient {number}")
        batches = [_with_prompts(self.subject, *size) for size in _PASSES_OF_ONE_STEP]
        targets = [self.subject.targets_in(batch) for batch in batches]
        for batch, count in zip(batches, targets, strict=True):
            self._backward(model, batch, count / sum(targets))
        self._keep_gradients(model, "accumulated")

    def _updates(self) -> None:
        model = self._model()
        before = {name: _kept(parameter) for name, parameter in model.named_parameters()}
        optimizer = make_optimizer(model, fused=self.chip is not None and self.chip.capabilities.fused_optimizer)
        losses = []
        for number in STEPS:
            losses.append(self._backward(model, self.subject.batch(number), 1.0))
            nn.utils.clip_grad_norm_(model.parameters(), TRAINING.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.found["losses"] = torch.tensor(losses, dtype=torch.float64)
        layers: dict[str, list[torch.Tensor]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            layer = re.match(r"(.*?\.\d+)\.", name)
            layers[layer[1] if layer else name].append((_kept(parameter) - before[name]).flatten())
        self.found |= {f"update/{layer}": torch.cat(parts) for layer, parts in layers.items()}

    def _backward(self, model: nn.Module, batch: Any, share: float) -> float:
        with self.experts.of(self.subject, model):
            loss = self.subject.loss(model, on_device(batch, _device(model)))
        (loss * share).backward()  # type: ignore[no-untyped-call]  # untyped in torch
        return float(loss.detach())

    def _keep_gradients(self, model: nn.Module, what: str) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.found[f"{what}/{name}"] = _kept(parameter.grad)
        model.zero_grad(set_to_none=True)


def _with_prompts(subject: DecoderSubject, samples: int, tokens: int) -> dict[str, torch.Tensor]:
    """A batch whose samples begin with prompts of unlike lengths, which are no targets."""
    rows = torch.tensor([subject._tokens(_FIRST_ROW + 50 + number, tokens + 1) for number in range(samples)])
    labels = rows[:, 1:].clone()
    for number in range(samples):
        labels[number, : tokens * (number + 1) // (samples + 2)] = -100
    return {"tokens": rows[:, :-1].contiguous(), "labels": labels}


class Yardstick:
    """One model in one dtype: float64, and the largest errors of the sound chips."""

    def __init__(self, subject: DecoderSubject, dtype: torch.dtype, kept: Path) -> None:
        self._subject, self._dtype = subject, dtype
        experts = Experts()
        self._exact = Measurement(subject, None, torch.float64, experts).take()
        self._routes = experts.chosen
        if not kept.exists():
            kept.write_text(json.dumps({name: self._of_sound(name) for name in SOUND}))
        self.sound: dict[str, dict[str, float]] = json.loads(kept.read_text())

    def errors(self, chip: Chip) -> dict[str, float]:
        """Of every quantity."""
        found = Measurement(self._subject, chip, self._dtype, Experts(self._routes)).take()
        return {name: _error(found.get(name), exact) for name, exact in self._exact.items()}

    def harm(self, errors: dict[str, float]) -> Harm:
        """The worst of a chip's errors, as multiples of what sound chips have."""
        least = UNIT_ROUNDOFF[torch.float32] / 16  # no quantity is as good as this on any chip, none is divided by zero
        ratios = {
            name: error / max(least, *(sound[name] for sound in self.sound.values())) for name, error in errors.items()
        }
        served = {name: ratio for name, ratio in ratios.items() if name.startswith("serve/")}
        trained = {name: ratio for name, ratio in ratios.items() if name not in served}
        worst = {"inference": max(served, key=served.__getitem__), "training": max(trained, key=trained.__getitem__)}
        return Harm(served[worst["inference"]], trained[worst["training"]], worst)

    def _of_sound(self, name: str) -> dict[str, float]:
        chip = open_chip(name)
        errors = self.errors(chip)
        chip.close()
        return errors


def _error(found: torch.Tensor | None, exact: torch.Tensor) -> float:
    if found is None or found.shape != exact.shape:
        return 1e30
    distance, size = float((found - exact).norm()), float(exact.norm())
    relative = distance / size if size else float(distance > 0)
    return min(relative, 1e30) if math.isfinite(relative) else 1e30


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double().clone()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
