"""Faults without a wrong operator: the module, and the quantity, that first leaves what rounding explains."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import CONFIGS, SmallSubject, opened
from torch import nn
from torch.nn import functional as F

from beringia.model.attention import GroupedQueryAttention
from beringia.model.decoder import Decoder
from beringia.model.experts import Router
from beringia.model.layers import FeedForward, RMSNorm
from beringia.qualify.departure import first_departure
from beringia.qualify.subject import Batch, ModuleSubject, Routes
from beringia.qualify.trace import TraceExtent, Tracer
from beringia.qualify.verdict import judge
from beringia.records.certificate import Departure, Measure, ProbeResult

DTYPES = (torch.bfloat16, torch.float32)


def routes_of(subject: SmallSubject) -> Routes:
    _, routes = Tracer(subject, TraceExtent(batches=1, steps=0, scenarios=False)).in_float64()
    return routes.batches[0]


def departure_on(chip_name: str, family: str, dtype: torch.dtype) -> Departure | None:
    subject = SmallSubject(family)
    with opened(chip_name) as chip:
        return first_departure(chip, subject, dtype, routes_of(subject))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chip", ["cpu", "emulated:h800"])
def test_no_module_of_a_sound_chip_departs(chip: str, family: str, dtype: torch.dtype) -> None:
    assert departure_on(chip, family, dtype) is None


def on_the_chip(x: torch.Tensor) -> bool:
    return x.device.type != "cpu"


def norm_with_another_epsilon(self: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    eps = self.eps + (0.05 if on_the_chip(x) else 0.0)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * self.weight.to(wide.dtype)).to(x.dtype)


def feed_with_relu(self: FeedForward, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj((F.relu(gate) if on_the_chip(x) else F.silu(gate)) * up)


def weights_doubled(right: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def weigh(self: Router, scores_ME: torch.Tensor, chosen_MK: torch.Tensor) -> torch.Tensor:
        return right(self, scores_ME, chosen_MK) * (1.5 if on_the_chip(scores_ME) else 1.0)

    return weigh


def angles_of_another_base(right: Callable[..., Any]) -> Callable[..., Any]:
    def rope_at(self: Decoder, start: int, length: int, device: torch.device) -> Any:
        return right(self, start + (1 if device.type != "cpu" else 0), length, device)

    return rope_at


def attention_scaled(right: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward(self: GroupedQueryAttention, x: torch.Tensor, rope: Any, cache: Any = None) -> torch.Tensor:
        scale, self.scale = self.scale, self.scale * (1.3 if on_the_chip(x) else 1.0)
        try:
            return right(self, x, rope, cache)
        finally:
            self.scale = scale

    return forward


@pytest.mark.parametrize(
    ("family", "where", "name", "wrong", "module"),
    [
        ("llama", RMSNorm, "forward", norm_with_another_epsilon, "model.layers.0.input_layernorm"),
        ("llama", FeedForward, "forward", feed_with_relu, "model.layers.0.mlp"),
        ("qwen3", GroupedQueryAttention, "forward", attention_scaled(GroupedQueryAttention.forward), ".0.self_attn"),
        ("deepseek_v3", Router, "weigh", weights_doubled(Router.weigh), "model.layers.1.mlp"),
    ],
    ids=["the norm's epsilon", "another activation", "the scale of attention", "the router's weights"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_wrong_module_is_named(
    family: str, where: Any, name: str, wrong: Any, module: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, wrong)
    found = departure_on("emulated:h800", family, dtype)
    assert found is not None and found.module.endswith(module), found
    assert found.times is not None and found.times > 1.5


def test_relative_angles_that_are_all_shifted_alike_are_no_departure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embedding is of differences: a fault that changes no result is none."""
    monkeypatch.setattr(Decoder, "rope_at", angles_of_another_base(Decoder.rope_at))
    assert departure_on("emulated:h800", "llama", torch.bfloat16) is None


def failed(subject: str, rules_out: Any) -> ProbeResult:
    measure = Measure(name="effect", value=6.0, bound=1.5, reason="")
    return ProbeResult(
        probe="lockstep", subject=subject, outcome="failed", rules_out=rules_out, summary=subject, measures=(measure,)
    )


@pytest.mark.parametrize(
    ("departure", "told"),
    [
        (Departure(module="model.norm", quantity="output", times=6.0), "the first module .* model.norm, by its output"),
        (Departure(module="", quantity="serve decoding 1 at 597", times=None), "quantity .* serve decoding 1 at 597"),
    ],
)
def test_the_reasons_begin_with_it(departure: Departure, told: str) -> None:
    reasons = judge([failed("outputs", "infer")], None, 0.9, departure).reasons
    assert len(reasons) == 2
    assert re.search(told, reasons[0])


class Shifted(nn.Module):
    """Writes to its input, and on the chip something else."""

    def __init__(self, *, wrong: bool) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(0.1 if self.wrong and on_the_chip(x) else 0.0)


@pytest.mark.parametrize("wrong", [False, True])
def test_modules_that_write_to_their_input_are_called_by_themselves_like_others(wrong: bool) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), Shifted(wrong=wrong), nn.ReLU(inplace=True), nn.Linear(16, 4))

    def batch(number: int) -> Batch:
        return {"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(number))}

    def outputs(model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(batch["x"].to(next(model.parameters()).dtype))

    subject = ModuleSubject("mine", make, batch, lambda model, batch: outputs(model, batch).square().mean(), outputs)
    with opened("emulated:exact") as chip:
        found = first_departure(chip, subject, torch.float32, {})
    assert (found and (found.module, found.quantity)) == (("1", "output") if wrong else None)
