"""Sound chips and sound software that must not be refused: dtypes, kernels, compilers, precisions, other chips.

A variant is a model, a dtype, a chip, and a setting of torch in which it is qualified against the CPU as it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from beringia.qualify.subject import Batch, DecoderSubject, ModuleSubject, Subject

MODELS = ("latent", "grouped", "tied", "odd", "sharp", "r2-nano")
DTYPES = ("float32", "bfloat16", "float16")
EMULATED = ("h100", "a100", "mi300x", "mi250x", "ascend-910b")
NOT_SOUND = {("mi250x", "float16")}
"""Its units flush float16's subnormal numbers, as AMD documents, and trained models have such: a gradient is up to 180
times as far off as rounding explains, a way of serving 3.8 times. Its verdict is right, and no false refusal."""
_DENSE = ("grouped", "tied", "odd", "sharp")
"""Modules of others choose their experts themselves, and near a tie another choice is no error."""
_EXACT_MODELS = ("grouped", "odd", "r2-nano")
"""Bit by bit arithmetic takes long."""
_EXACT_CHIPS = tuple(chip for chip in EMULATED if chip != "ascend-910b")
"""That profile's sums lose no bits, which the exact fidelity does not hold."""

Setting = Callable[[], AbstractContextManager[Any]]
Other = Callable[[DecoderSubject], Subject]


@dataclass(frozen=True)
class Variant:
    """One sound candidate."""

    model: str
    dtype: str
    chip: str
    software: str = "as it is"
    setting: Setting = field(default=nullcontext, repr=False)
    subject: Other = field(default=lambda subject: subject, repr=False)

    @property
    def name(self) -> str:
        """Unique."""
        return f"clean {self.model} {self.dtype} {self.chip} {self.software}"


def variants() -> list[Variant]:
    """All of them, in an order that is drawn once, so that the first few are of every kind."""
    made: list[Variant] = []
    for dtype in DTYPES:
        for chip in EMULATED:
            if (chip, dtype) in NOT_SOUND:
                continue
            made += [Variant(model, dtype, f"emulated:{chip}") for model in MODELS]
        for software, setting in SETTINGS.items():
            made += [Variant(model, dtype, "cpu", software, setting) for model in MODELS]
        made += [Variant(model, dtype, "cpu", "compiled", subject=compiled) for model in MODELS]
        # With weights and moments in float16 nobody trains: a second moment that a rounding brings to zero makes a step
        # of any size, since AdamW's epsilon is below the smallest number. On the CPU that is the reference's own bits.
        others = () if dtype == "float16" else tuple(f"emulated:{name}" for name in EMULATED)
        for chip in ("cpu", *others):
            made += [Variant(model, dtype, chip, "transformers", subject=of_transformers) for model in _DENSE]
    made += [Variant(model, "float32", "cpu", "medium precision", medium_precision) for model in MODELS]
    for chip in _EXACT_CHIPS:
        made += [Variant(model, "bfloat16", f"emulated:{chip}@exact") for model in _EXACT_MODELS]
    return random.Random(0).sample(made, len(made))


@contextmanager
def two_threads() -> Iterator[None]:
    """Sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@contextmanager
def medium_precision() -> Iterator[None]:
    """Products of float32 in bfloat16, where the machine has them: whoever asks for that gets what he asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


SETTINGS: dict[str, Setting] = {
    "as it is": nullcontext,
    "without oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "attention by single operators": lambda: sdpa_kernel(SDPBackend.MATH),
    "fused attention": lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),
    "two threads": two_threads,
}


@dataclass(frozen=True)
class Compiled(DecoderSubject):
    """A decoder whose layers are compiled."""

    def place(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        placed = super().place(model, device, dtype)
        if dtype != torch.float64:
            for layer in placed.model.layers:  # type: ignore[union-attr]  # a decoder
                layer.compile(dynamic=True)
        return placed


def compiled(subject: DecoderSubject) -> Subject:
    """The same model through the compiler."""
    return Compiled(subject.source)


def of_transformers(subject: DecoderSubject) -> Subject:
    """The same weights in transformers' own module, with weights and activations in one dtype."""

    transformers.utils.logging.disable_progress_bar()

    def make() -> nn.Module:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            subject.source, dtype=torch.float32, attn_implementation="eager"
        )
        return model

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(outputs(model, batch).flatten(0, 1).float(), batch["labels"].flatten())

    def outputs(model: nn.Module, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch["tokens"], use_cache=False).logits
        return logits

    return ModuleSubject(f"transformers-{subject.name}", make, subject.batch, loss, outputs)
