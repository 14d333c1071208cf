"""Layers one by one, with float64's inputs and output gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import SmallSubject, opened

from beringia.qualify.layers import Traffic, probe_layers
from beringia.qualify.trace import TraceExtent, Tracer
from beringia.records.certificate import ProbeResult

BF16 = torch.bfloat16
SUBJECT = SmallSubject("llama")
LAYERS = [f"model.layers.{index}" for index in range(len(SUBJECT.layers_of(SUBJECT.build())))]


def probed(chip_name: str, fault: str = "", directory: Path | None = None) -> dict[str, ProbeResult]:
    tracer = Tracer(SUBJECT, TraceExtent(batches=1, steps=1))
    _, routes = tracer.in_float64()
    traffic = {name: Traffic(x.to(BF16), g.to(BF16)) for name, (x, g) in tracer.traffic(routes).items()}
    with opened(chip_name, fault, directory) as chip:
        results = list(probe_layers(chip, SUBJECT, BF16, traffic, routes.batches[0]))
    return {result.subject: result for result in results}


@pytest.mark.parametrize("chip", ["cpu", "emulated:h800", "emulated:mi300x@exact"])
def test_every_layer_of_a_sound_chip_passes_with_its_output_and_its_worst_gradient(chip: str) -> None:
    results = probed(chip)
    assert list(results) == LAYERS and len(LAYERS) > 1
    for result in results.values():
        assert (result.outcome, result.rules_out) == ("passed", "neither"), result
        output, gradient = result.measures
        assert output.name == "relative error of the output" and gradient.name.startswith("relative error of the grad")
        assert 0.0 < output.value < output.bound  # type: ignore[operator]  # a number: the chip is sound


def test_a_wrong_backward_of_one_layer_shows_in_that_layer_alone(tmp_path: Path) -> None:
    """Attention's second call is the second layer's, also when layers run one by one."""
    results = probed("emulated:h800", 'kind = "wrong-backward"\nlength = 4\nstrength = 0.8\nsites = [1]', tmp_path)
    outcomes = {name: result.outcome for name, result in results.items()}
    assert outcomes == {name: "failed" if name == LAYERS[1] else "passed" for name in LAYERS}
    output, gradient = results[LAYERS[1]].measures
    assert output.used < 1.0 < gradient.used


def test_a_wrong_forward_shows_in_the_output_of_every_layer_that_it_strikes(tmp_path: Path) -> None:
    results = probed("emulated:h800", 'kind = "mask-ignored"\nlength = 8', tmp_path)
    assert {result.outcome for result in results.values()} == {"failed"}
    assert all(result.measures[0].used > 1.0 for result in results.values())
