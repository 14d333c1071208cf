"""What a chip is qualified for: a model with its weights, its data, one training step and one step of decoding.

`DecoderSubject` is a model of our families, by preset or Hugging Face directory. Anything else that is an `nn.Module`
is qualified through a `Subject` of the caller's own (see `ModuleSubject`).

B samples, T tokens, V vocabulary, K experts a token, M = B T rows.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beringia.data import Tokenizer, check_vocabulary, load_tokenizer, make_task
from beringia.data.alphabet import TOKENS
from beringia.model import (
    IGNORED,
    PRESETS,
    Decoder,
    KeyValueCache,
    config_of,
    forcing_routes,
    load_model,
    recording_routes,
    update_router_biases,
)
from beringia.model.experts import MixtureOfExperts
from beringia.numerics.state_hash import hash_state
from beringia.qualify import engine_serving, unlike_batches
from beringia.qualify import serving as ways_of_serving
from beringia.qualify.serving import LARGE_PARAMETERS, Around, Serving, Step
from beringia.records.certificate import ModelFingerprint
from beringia.records.model_source import configuration_hash, other_vocabulary
from beringia.records.recipe import TrainSection

Batch = Mapping[str, torch.Tensor]
"""Tensors on the CPU, by name."""
Routes = Mapping[str, torch.Tensor]
"""The experts that a pass chose, M K, by layer."""

TRAINING = TrainSection(prefer=("here",), steps=1, learning_rate=1e-3)
"""What training steps are made with: as in recipes by default, but for the learning rate, which in a run's first steps
has not risen to that."""
_DIGITS = 10


def nothing_around(step: Step) -> Around:
    """Around a call of which nothing is wanted."""
    return nullcontext()


class Subject(ABC):
    """A model and what is done with it. Everything random comes from the CPU."""

    name: str
    seed: int = 0
    samples: int = 0
    """In a batch; 0 where the subject's maker decides."""
    tokens: int = 0
    """In a sample; 0 likewise."""
    layers: int | None = None
    run_tokens: int | None = None
    """In a sample of the run that it is qualified for; None: no run is known."""

    @property
    def directory(self) -> str | None:
        """The Hugging Face directory whose weights it has; None: those of none."""
        return None

    @abstractmethod
    def build(self) -> nn.Module:
        """The model with its weights, float32, on the CPU. The same every time."""

    @abstractmethod
    def place(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The model on a device, computing in `dtype`: float64 throughout, or float32 masters."""

    @abstractmethod
    def batch(self, number: int) -> Batch:
        """Batch `number` of the training data, on the CPU."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of a training step, a scalar. The batch is on the model's device."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """What inference gives for a batch."""

    @abstractmethod
    def fingerprint(self) -> ModelFingerprint:
        """Which model this is."""

    def decode(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """What one step of decoding gives; a model that has none gives its outputs."""
        return self.outputs(model, batch)

    def servings(self, *, whole: bool) -> tuple[Serving, ...]:
        """Ways in which it is served; none where a model has no cache."""
        return ()

    def serve(
        self, model: nn.Module, serving: Serving, routes: Routes, around: Callable[[Step], Around] = nothing_around
    ) -> dict[str, torch.Tensor]:
        """The compared results of a serving, call by call, by scenario; `around` each call. Asked only of a subject
        that has servings."""
        raise NotImplementedError

    def serve_at_once(
        self, model: nn.Module, serving: Serving, routes: Routes | None
    ) -> tuple[dict[str, torch.Tensor], Routes]:
        """The same from one pass over the whole sequences; and the routes that it took."""
        raise NotImplementedError

    def micro_batches(self, *, whole: bool) -> tuple[Batch, ...]:
        """Batches of one training step, whose gradients are added up: of unlike sizes and lengths, some of their
        targets ignored. None where nobody knows how to say so."""
        return ()

    def micro_batches_in_words(self, batches: Sequence[Batch]) -> str:
        """What that step is, for who reads a certificate."""
        return f"a step over {len(batches)} batches, their gradients added up"

    def targets_in(self, batch: Batch) -> int:
        """How many targets its loss is the mean over; asked only of a subject that has such batches."""
        raise NotImplementedError

    def untried(self, *, whole: bool) -> tuple[str, ...]:
        """What people do with such a model and a qualification does not try, a clause each."""
        return ("how it is served: no way to decode is known",)

    def layers_of(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """The layers that `call_layer` can call one by one, by path; none where a model has no such form."""
        return {}

    def call_layer(self, model: nn.Module, layer: nn.Module, x_BTD: torch.Tensor) -> torch.Tensor:
        """One layer by itself; asked only of a subject that names layers in `layers_of`."""
        raise NotImplementedError

    def call_module(self, model: nn.Module, module: nn.Module, inputs: tuple[Any, ...]) -> torch.Tensor:
        """A module by itself, with the inputs that it had in another model: those that are a table of the model's own
        are that model's."""
        called: torch.Tensor = module(*inputs)
        return called

    def after_update(self, model: nn.Module) -> None:  # noqa: B027 (most models do nothing there)
        """What a training step does after its optimizer."""

    @contextmanager
    def recording_routes(self, model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        """Inside, discrete choices are noted; the dictionary is filled when the context ends."""
        yield {}

    @contextmanager
    def forcing_routes(self, model: nn.Module, routes: Routes) -> Iterator[None]:
        """Inside, these choices are made: near a tie another one is no error of arithmetic."""
        yield


@dataclass(frozen=True)
class DecoderSubject(Subject):
    """A decoder of `model/`."""

    source: str
    """A preset or a Hugging Face directory."""
    seed: int = 0
    samples: int = 4
    tokens: int = 64
    layers: int | None = None
    """Only so many of its layers; None: all."""
    run_tokens: int | None = None
    vocabulary_size: int | None = None
    """Of a preset that a run trains with another one than its own; None: its own."""

    @property
    def name(self) -> str:  # type: ignore[override]  # a property where the base has a plain attribute
        """The preset, or the directory's last part."""
        return Path(self.source).name

    @property
    def directory(self) -> str | None:
        return None if self.source in PRESETS else self.source

    def build(self) -> Decoder:
        return load_model(self.source, seed=self.seed, layers=self.layers, vocabulary_size=self.vocabulary_size)

    def place(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        assert isinstance(model, Decoder)
        if dtype == torch.float64:
            model.double()
        model.set_compute_dtype(dtype)
        return model.to(device).train()

    def batch(self, number: int) -> Batch:
        rows = [self._row(number * self.samples + sample) for sample in range(self.samples)]
        tokens = torch.tensor(rows)
        return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        losses = model(batch["tokens"], batch["labels"])
        ahead = int((batch["labels"][:, 1:] != IGNORED).sum())
        main, mtp = losses.main_sum / max(1, self.targets_in(batch)), losses.mtp_sum / max(1, ahead)
        loss: torch.Tensor = main + TRAINING.mtp_weight * mtp
        return loss

    def outputs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(batch["tokens"])
        return logits

    def decode(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Logits of the last token, after a prompt of all before it went through the cache."""
        assert isinstance(model, Decoder)
        cache = KeyValueCache(model.config.num_hidden_layers)
        tokens_BT = batch["tokens"]
        model.logits(tokens_BT[:, :-1], cache)
        return model.logits(tokens_BT[:, -1:], cache)

    def servings(self, *, whole: bool) -> tuple[Serving, ...]:
        return ways_of_serving.servings(self._tokens, *self._size, whole=whole)

    def serve(
        self, model: nn.Module, serving: Serving, routes: Routes, around: Callable[[Step], Around] = nothing_around
    ) -> dict[str, torch.Tensor]:
        assert isinstance(model, Decoder)
        if serving.by_engine:
            return engine_serving.serve(model, serving, routes, around)
        tokens_RT = serving.tokens_RT.to(_device_of(model))
        cache, held = KeyValueCache(model.config.num_hidden_layers), tuple[int, ...]()
        found: dict[str, list[torch.Tensor]] = {}
        for step in serving.steps:
            cache, held = cache.taken(serving.sources(held, step), step.start), step.rows
            tokens_BT = tokens_RT[list(step.rows), step.start : step.end]
            with self.forcing_routes(model, serving.routes_in(step, routes)), around(step):
                logits_BTV = model.logits(tokens_BT, cache)
            places_C, positions_C = serving.compared(step)
            compared_CV = logits_BTV[places_C, positions_C - step.start]
            found.setdefault(step.scenario, []).append(compared_CV)
        return {scenario: torch.cat(parts) for scenario, parts in found.items()}

    def serve_at_once(
        self, model: nn.Module, serving: Serving, routes: Routes | None
    ) -> tuple[dict[str, torch.Tensor], Routes]:
        assert isinstance(model, Decoder)
        tokens_RT = serving.tokens_RT.to(_device_of(model))
        with self.recording_routes(model) if routes is None else self.forcing_routes(model, routes) as own:
            logits_RTV = model.logits(tokens_RT)
        found: dict[str, list[torch.Tensor]] = {}
        for step in serving.steps:
            places_C, positions_C = serving.compared(step)
            found.setdefault(step.scenario, []).append(logits_RTV[torch.tensor(step.rows)[places_C], positions_C])
        return {scenario: torch.cat(parts) for scenario, parts in found.items()}, routes or own or {}

    def micro_batches(self, *, whole: bool) -> tuple[Batch, ...]:
        return unlike_batches.micro_batches(self._tokens, *self._size, self.run_tokens, whole=whole)

    def micro_batches_in_words(self, batches: Sequence[Batch]) -> str:
        sizes = [" x ".join(map(str, batch["labels"].shape)) for batch in batches]
        return f"a step over batches of {' and '.join(sizes)} tokens, some targets ignored"

    def untried(self, *, whole: bool) -> tuple[str, ...]:
        serving = ways_of_serving.untried(*self._size, whole=whole)
        return (*serving, *unlike_batches.untried(*self._size, self.run_tokens, whole=whole))

    def targets_in(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def layers_of(self, model: nn.Module) -> Mapping[str, nn.Module]:
        assert isinstance(model, Decoder)
        return {f"model.layers.{index}": layer for index, layer in enumerate(model.model.layers)}

    def call_layer(self, model: nn.Module, layer: nn.Module, x_BTD: torch.Tensor) -> torch.Tensor:
        assert isinstance(model, Decoder)
        called: torch.Tensor = layer(x_BTD, model.rope_at(0, x_BTD.shape[1], x_BTD.device))
        return called

    def call_module(self, model: nn.Module, module: nn.Module, inputs: tuple[Any, ...]) -> torch.Tensor:
        assert isinstance(model, Decoder)
        first, *others = inputs
        rope = model.rope_at(0, first.shape[1], first.device) if any(map(_is_rope, others)) else None
        called: torch.Tensor = module(first, *(rope if _is_rope(one) else one for one in others))
        return called

    def after_update(self, model: nn.Module) -> None:
        assert isinstance(model, Decoder)
        counts = model.expert_counts()
        if counts:
            update_router_biases(model, counts, TRAINING.router_bias_speed)

    def fingerprint(self) -> ModelFingerprint:
        model = self.build()
        preset = self.source if self.source in PRESETS else None
        return ModelFingerprint(
            name=self.name,
            configuration=configuration_hash(preset, None if preset else self.source, self.vocabulary_size),
            weights=hash_state(model.state_dict(), {"layers": self.layers}),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            vocabulary_size=other_vocabulary(preset, self.vocabulary_size),
        )

    @contextmanager
    def recording_routes(self, model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        routes: dict[str, torch.Tensor] = {}
        layers = _sparse_layers(model)
        with ExitStack() as stack:
            for layer in layers.values():
                stack.enter_context(recording_routes(layer))
            yield routes
            chosen = {name: layer.get_submodule("mlp").chosen for name, layer in layers.items()}
        routes |= {name: tensor.cpu() for name, tensor in chosen.items() if isinstance(tensor, torch.Tensor)}

    @contextmanager
    def forcing_routes(self, model: nn.Module, routes: Routes) -> Iterator[None]:
        device = next(model.parameters()).device
        with ExitStack() as stack:
            for name, layer in _sparse_layers(model).items():
                if name in routes:  # the multi-token layer is not served
                    stack.enter_context(forcing_routes(layer, routes[name].to(device)))
            yield

    def _tokens(self, number: int, count: int) -> list[int]:
        return replace(self, tokens=count)._row(number)[:count]

    @cached_property
    def _size(self) -> tuple[int, bool]:
        """How many tokens it takes, and whether it is no small model."""
        model = self.build()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return model.config.context_tokens, parameters > LARGE_PARAMETERS

    def _row(self, number: int) -> list[int]:
        """T + 1 tokens: solved sums for a preset, text for a model that has read some."""
        if self.source in PRESETS:
            return self._spread(_sums(self.seed, number, self.tokens + 1))
        return _text(_tokenizer(self.source, _written_at(self.source)), number, self.tokens + 1)

    def _spread(self, row: list[int]) -> list[int]:
        """The tokens of a task over all of another vocabulary: none is beyond it, and its last rows are read, too."""
        size = other_vocabulary(self.source, self.vocabulary_size)
        return row if size is None else [token * size // len(TOKENS) for token in row]


@dataclass(frozen=True)
class ModuleSubject(Subject):
    """Any module, from functions: for the Python interface."""

    name: str
    make: Callable[[], nn.Module]
    """Builds the module with its weights, float32, on the CPU; the same every time."""
    batches: Callable[[int], Batch]
    compute_loss: Callable[[nn.Module, Batch], torch.Tensor]
    compute_outputs: Callable[[nn.Module, Batch], torch.Tensor]

    def build(self) -> nn.Module:
        return self.make()

    def place(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Weights and activations in `dtype`: a module of one's own casts nothing by itself."""
        return model.to(device, dtype).train()

    def batch(self, number: int) -> Batch:
        return self.batches(number)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.compute_loss(model, batch)

    def outputs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.compute_outputs(model, batch)

    def micro_batches(self, *, whole: bool) -> tuple[Batch, ...]:
        """Two of its batches, each for half: how unlike they are, its maker decides."""
        return self.batches(0), self.batches(1)

    def targets_in(self, batch: Batch) -> int:
        return 1

    def fingerprint(self) -> ModelFingerprint:
        model = self.build()
        return ModelFingerprint(
            name=self.name,
            configuration=hashlib.sha256(repr(model).encode()).hexdigest(),
            weights=hash_state(model.state_dict(), {}),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        )


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch where the model is."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _is_rope(value: object) -> bool:
    """Rotary angles: cosines and sines."""
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(one, torch.Tensor) for one in value)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _sparse_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name.removesuffix(".mlp"): model.get_submodule(name.removesuffix(".mlp"))
        for name, module in model.named_modules()
        if isinstance(module, MixtureOfExperts)
    }


@lru_cache(maxsize=1)
def _tokenizer(source: str, written_at: int) -> Tokenizer:
    """Of a model; read once for all rows, for large ones take half a second to read."""
    tokenizer = load_tokenizer(source)
    check_vocabulary(tokenizer, config_of(source).vocab_size)
    return tokenizer


def _written_at(source: str) -> int:
    """When the newest of its files was written, in nanoseconds."""
    return max((file.lstat().st_mtime_ns for file in Path(source).glob("*")), default=0)


def _sums(seed: int, number: int, tokens: int) -> list[int]:
    """Solved digit sums, one after another."""
    task = make_task("digit-sum", digits=_DIGITS, seed=seed)
    row: list[int] = []
    for question in task.questions(number * 8, 8, "train"):
        row += [*question.tolist(), *task.gold(question, long=True)]
    while len(row) < tokens:
        row += row
    return row[:tokens]


def _text(tokenizer: Tokenizer, number: int, tokens: int) -> list[int]:
    """A stretch of text that begins at another word each time."""
    words = _TEXT.split()
    start = number * 37 % len(words)
    text = " ".join((words[start:] + words[:start]) * (1 + tokens // len(words)))
    encoded = tokenizer.encode(text)
    return encoded[:tokens]


_TEXT = """During the last ice age the sea stood more than a hundred metres lower than it does today, and what is now
the floor of a shallow strait was a wide and grassy plain. Herds of horses, bison and mammoths grazed there
in summer, and people followed them. They carried needles of bone, blades of obsidian and the knowledge of
how to make fire in the wind. Nobody among them thought of crossing from one continent to another: they
walked a day's distance, pitched their tents, hunted, mended their clothes and walked on. When the ice
melted the water came back, 12,000 years ago or so, and the two shores have been strangers since. A program
that runs on one machine and is carried to another makes the same kind of journey. It computes x = a * b +
c a billion times; if one result in a million is off by 0.1 %, will anyone notice before the end? The
engineers who build such machines answer with tables of numbers: precision, bandwidth, energy per
operation. Those who use them ask a simpler question, namely whether the answer is right."""
