"""Which experts a chip's routers choose, by themselves: near ties are allowed for, other experts are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_models import SmallSubject, opened

from beringia.model.experts import Router
from beringia.qualify.choices import ROUTER, departed_choice, probe_choices
from beringia.qualify.layers import Traffic
from beringia.qualify.trace import TraceExtent, Tracer
from beringia.records.certificate import ProbeResult

SUBJECT = SmallSubject("deepseek_v3", samples=4, tokens=48)


def choices_on(chip_name: str, dtype: torch.dtype = torch.bfloat16, family: str = "deepseek_v3") -> list[ProbeResult]:
    subject = SUBJECT if family == "deepseek_v3" else SmallSubject(family)
    tracer = Tracer(subject, TraceExtent(batches=1, steps=0, scenarios=False))
    _, routes = tracer.in_float64()
    traffic = {name: Traffic(x.to(dtype), gradient.to(dtype)) for name, (x, gradient) in tracer.traffic(routes).items()}
    with opened(chip_name) as chip:
        return [*probe_choices(chip, subject, dtype, traffic, routes.batches[0])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("chip", ["cpu", "emulated:h800", "emulated:ascend-910b"])
def test_a_sound_chip_chooses_as_float64_but_for_near_ties(chip: str, dtype: torch.dtype) -> None:
    results = choices_on(chip, dtype)
    assert [result.subject for result in results] == ["model.layers.1", "model.layers.2"]
    assert {result.outcome for result in results} == {"passed"}


def test_a_model_without_experts_has_nothing_to_choose() -> None:
    assert choices_on("cpu", family="llama") == []


def second_best(right: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def choose(self: Router, scores_ME: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        chosen_MK = right(self, scores_ME, bias_E)
        if scores_ME.device.type == "cpu":
            return chosen_MK
        others = scores_ME.scatter(1, chosen_MK[:, :1], -1.0)
        return right(self, others, bias_E)

    return choose


def test_other_experts_rule_inference_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Router, "choose", second_best(Router.choose))
    results = choices_on("emulated:h800")
    assert {(result.outcome, result.rules_out) for result in results} == {("failed", "infer")}
    assert all(
        "to other experts than float64 does, more than rounding explains" in result.summary for result in results
    )


def test_the_router_is_named_where_nothing_else_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Router, "choose", second_best(Router.choose))
    departure = departed_choice(choices_on("emulated:h800")[0])
    assert departure.quantity == "experts that are chosen" and departure.times is not None and departure.times > 1.0
    assert departure.module.endswith(ROUTER)
    assert isinstance(SmallSubject("deepseek_v3").build().get_submodule(departure.module), Router)
