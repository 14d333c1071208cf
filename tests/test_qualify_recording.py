"""What is watched of a model on a chip: each call under a name of its own, and further passes for faults that come and
go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import CONFIGS, SmallSubject, opened
from torch import nn
from torch._ops import OpOverload
from wrong_kernels import emulated_with

from beringia.chips.chip import Chip, ChipFault
from beringia.chips.emulated import device
from beringia.model import IGNORED
from beringia.qualify import recording
from beringia.qualify.candidate import _told_of_running
from beringia.qualify.evidence import Probed
from beringia.qualify.recording import WATCHED_STEPS, Recorder, Recording, left_out_later
from beringia.qualify.subject import Batch, ModuleSubject
from beringia.qualify.trace import TraceExtent, Tracer, make_optimizer
from beringia.records.certificate import OperatorCheck

SUBJECT = SmallSubject("llama")
WRONG = 'kind = "wrong-backward"\nlength = 4\nstrength = 0.8\nsites = [1]\nfrom_step = 3'


def as_found(check: OperatorCheck) -> OperatorCheck:
    """Beside a reference of which nothing is known."""
    return check


def test_passes_are_watched_until_one_has_a_wrong_call(tmp_path: Path) -> None:
    with opened("emulated:h800", WRONG, tmp_path) as chip:
        assert Recorder(SUBJECT, chip, torch.bfloat16).watch_again(2, as_found) == []
        recorder = Recorder(SUBJECT, chip, torch.bfloat16)
        wrong = recorder.watch_again(6, as_found)
    assert wrong[0].module == "model.layers.1.self_attn" and wrong[0].direction == "backward"
    assert "attention" in wrong[0].operator and all(check.used > 1.0 for check in wrong)


def test_a_sound_chip_is_watched_to_the_end_and_nothing_is_wrong() -> None:
    with opened("emulated:h800") as chip:
        assert Recorder(SUBJECT, chip, torch.bfloat16).watch_again(2, as_found) == []


def test_the_first_operator_that_does_not_repeat_itself_is_named_and_later_ones_are_not(tmp_path: Path) -> None:
    with opened("emulated:h800", 'kind = "nondeterministic-reduction"', tmp_path) as chip:
        place = Recorder(SUBJECT, chip, torch.float32)._first_unrepeatable()
    # In float32 another order shows in the bits of the first sum there is.
    assert place is not None
    assert (place.module, place.operator) == ("model.layers.0.input_layernorm", "aten.mean.dim")
    assert (place.direction, place.ordinal) == ("forward", 0)


def test_one_that_does_not_repeat_itself_in_the_backward_pass_is_named_too(tmp_path: Path) -> None:
    flip = 'kind = "bit-flip"\ntarget = "gradients"\nsites = [0]\nevery = 2\nbits = [26, 27]'
    with opened("emulated:h800", flip, tmp_path) as chip:
        place = Recorder(SUBJECT, chip, torch.bfloat16)._first_unrepeatable()
    assert place is not None and place.direction == "backward"


def test_on_a_sound_chip_every_operator_repeats_itself() -> None:
    with opened("emulated:h800") as chip:
        assert Recorder(SUBJECT, chip, torch.bfloat16)._first_unrepeatable() is None


def recorded(chip: Chip, subject: SmallSubject = SUBJECT) -> Recording:
    tracer = Tracer(subject, TraceExtent(batches=1, steps=1))
    return Recorder(subject, chip, torch.bfloat16).record(tracer, tracer.in_float64()[1])


def test_every_call_of_training_decoding_and_serving_has_a_name_of_its_own() -> None:
    with opened("cpu") as chip:
        checks = recorded(chip).checks
    names = {(check.module, check.operator, check.direction, check.ordinal) for check in checks}
    assert len(names) == len(checks)
    assert [check.position for check in checks] == sorted({check.position for check in checks})


def learning_what_is_ignored(func: OpOverload, kernel: device.Kernel) -> device.Kernel:
    """An interposer: the loss gives ignored targets a gradient, that of token 0."""
    if func is not torch.ops.aten.nll_loss_backward.default:
        return kernel

    def backward(grad: torch.Tensor, log: torch.Tensor, target: torch.Tensor, *others: object) -> torch.Tensor:
        learned: torch.Tensor = kernel(grad, log, target.where(target != IGNORED, 0), *others)
        return learned

    return backward


def test_a_loss_that_learns_ignored_targets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("emulated:h800") as chip:
        monkeypatch.setattr(device._state, "interposers", (*device._state.interposers, learning_what_is_ignored))
        device._state.handlers.clear()
        checks = recorded(chip).checks
    device._state.handlers.clear()
    wrong = [check for check in checks if check.used > 1.0]
    assert {(check.operator, check.direction) for check in wrong} == {("aten.nll_loss_backward.default", "backward")}


def losing_the_gradient_of_the_loss(func: OpOverload, kernel: device.Kernel) -> device.Kernel:
    """An interposer: its first number is infinite."""
    if func is not torch.ops.aten.nll_loss_backward.default:
        return kernel

    def backward(*arguments: object) -> torch.Tensor:
        lost: torch.Tensor = kernel(*arguments).clone()
        lost.flatten()[0] = torch.inf
        return lost

    return backward


@pytest.mark.parametrize("lost_first", [False, True])
def test_a_pass_that_is_finite_only_once_does_not_repeat_itself(
    lost_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = device._state.interposers

    def losing(wanted: bool) -> None:
        chosen = (*sound, losing_the_gradient_of_the_loss) if wanted else sound
        monkeypatch.setattr(device._state, "interposers", chosen)
        device._state.handlers.clear()

    tracer = Tracer(SUBJECT, TraceExtent(batches=1, steps=1))
    routes = tracer.in_float64()[1]
    with opened("emulated:h800") as chip:
        recorder = Recorder(SUBJECT, chip, torch.bfloat16)
        losing(lost_first)
        first = tracer.on_chip(chip, torch.bfloat16, routes, begin_step=recorder.begin_step)
        losing(not lost_first)
        differing = recorder._repeat(tracer, routes, first)
        losing(False)
    assert "outputs/0" not in differing
    assert "gradient/0/lm_head.weight" in differing and not any("#" in name for name in differing)


# ---- a sample alone and in a batch

OUTPUTS: dict[str, tuple[Callable[[nn.Module, Batch], torch.Tensor], bool | None]] = {
    "of each sample": (lambda model, batch: model(batch["x"]), True),
    "with a scalar beside them": (lambda model, batch: model(batch["x"]) * batch["scale"], True),
    "with a table beside them": (lambda model, batch: model(batch["x"]) + batch["table"].sum(0), True),
    "that know the batch": (lambda model, batch: model(batch["x"]) + len(batch["x"]), False),
    "without a dimension": (lambda model, batch: model(batch["x"]).mean(), None),
    "of time before samples": (lambda model, batch: model(batch["x"]).transpose(0, 1), None),
    "of some tokens": (lambda model, batch: model(batch["x"])[batch["mask"]], None),
    "of all samples whatever the batch": (lambda model, batch: model(batch["x"]).expand(8, -1, -1).clone(), None),
    "normalised over the batch": (lambda model, batch: nn.BatchNorm1d(4)(model(batch["x"])[:, 0]), None),
}


def given_batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x, mask = torch.randn(8, 6, 16, generator=generator), torch.zeros(8, 6, dtype=torch.bool)
    return {"x": x, "mask": mask.fill_diagonal_(True), "scale": torch.tensor(0.5), "table": torch.ones(3, 4)}


def module_subject(outputs: Callable[[nn.Module, Batch], torch.Tensor]) -> ModuleSubject:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(16, 4)

    return ModuleSubject("mine", make, given_batch, lambda model, batch: outputs(model, batch).square().mean(), outputs)


@pytest.mark.parametrize("case", OUTPUTS)
def test_whether_a_sample_alone_has_the_same_bits_is_told_or_that_it_could_not_be_tried(case: str) -> None:
    outputs, same = OUTPUTS[case]
    with opened("cpu") as chip:
        found = Recorder(module_subject(outputs), chip, torch.float32)._batch_invariant()
    assert found is same
    words = {
        True: "has the same bits as in a batch",
        False: "has other bits than in a batch",
        None: "could not be tried",
    }
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(batches=1, steps=1))
    told, _ = _told_of_running(Recording(batch_invariant=found, seconds={"trace": 1.0}), bundle)
    assert isinstance(told, Probed) and told.result.summary == f"a sample alone {words[same]}"


def test_a_fault_of_the_chip_meanwhile_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(model: nn.Module, batch: Batch) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    with opened("cpu") as chip:
        fault = ChipFault("X1", "device-lost", "gone")
        monkeypatch.setattr(type(chip), "classify", lambda chip, error: fault)
        with pytest.raises(RuntimeError, match="the device is gone"):
            Recorder(module_subject(lost), chip, torch.float32)._batch_invariant()


def test_of_many_layers_a_few_are_watched_later_among_them_the_first_and_the_last() -> None:
    layers = [f"model.layers.{number}" for number in range(30)]
    watched = [name for name in layers if name not in left_out_later(layers)]
    assert watched == [f"model.layers.{number}" for number in (0, 6, 12, 17, 23, 29)]
    assert left_out_later(layers[:6]) == []


@pytest.mark.slow
def test_every_layer_is_watched_in_a_training_step_and_few_in_later_ones_and_in_serving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CONFIGS, "deep", replace(CONFIGS["llama"], num_hidden_layers=9))
    with opened("cpu") as chip:
        checks = recorded(chip, SmallSubject("deep")).checks
    products: Counter[str] = Counter()
    for check in checks:
        if (
            check.module.endswith("mlp.down_proj")
            and check.operator == "aten.mm.default"
            and check.direction == "forward"
        ):
            products[check.module.split(".")[2]] += 1
    assert {layer for layer, count in products.items() if count == WATCHED_STEPS} == set("023568")
    assert {layer for layer, count in products.items() if count == 1} == set("147")
    served = {
        check.module.split(".")[2] for check in checks if check.direction == "decode" and "layers" in check.module
    }
    assert served == set("012345678"), "in a step of decoding"
    # A call for matrices and one for norms and biases, in each step.
    sizes = [len(check.shapes) for check in checks if check.operator == "aten._fused_adamw_.default"]
    of_a_layer = 5 * len([name for name, _ in SmallSubject("deep").build().model.layers[0].named_parameters()])
    assert len(sizes) == 4
    assert sum(sizes[:2]) - sum(sizes[2:]) == 3 * of_a_layer, "weights, gradients, moments and step of what is left out"


def test_lists_of_all_weights_and_of_each_group_of_the_optimizer_are_known_by_their_length() -> None:
    model = SUBJECT.build()
    optimizer = make_optimizer(model, fused=False)
    names = [name for name, _ in model.named_parameters()]
    vectors = [name for name, parameter in model.named_parameters() if parameter.ndim < 2]
    later = ["model.layers.1"]
    lists = recording._lists_of_weights(model, optimizer, later)
    assert lists.keys() == {len(names), len(names) - len(vectors), len(vectors)}
    for one in (names, vectors):
        assert [one[place] for place in lists[len(one)]] == [
            name for name in one if not name.startswith("model.layers.1.")
        ]
    assert recording._lists_of_weights(model, optimizer, []) == {}


@pytest.mark.parametrize("ndim", [1, 2])
def test_an_update_that_is_wrong_for_norms_or_for_matrices_alone_is_found(ndim: int) -> None:
    fused = torch.ops.aten._fused_adamw_.default

    def wrong(weights: list[torch.Tensor], *rest: Any, **options: Any) -> None:
        before = [weight.clone() for weight in weights]
        fused(weights, *rest, **options)
        for weight, old in zip(weights, before, strict=True):
            if weight.ndim == ndim:
                weight.add_(weight - old, alpha=0.1)

    with emulated_with({fused: wrong}) as chip:
        tracer = Tracer(SUBJECT, TraceExtent(batches=1, steps=1, scenarios=False))
        found = Recorder(SUBJECT, chip, torch.bfloat16).record(tracer, tracer.in_float64()[1])
    beyond = [check for check in found.checks if check.used > 1.0]
    assert beyond and {check.operator for check in beyond} == {str(fused)}
    assert all(len(check.shapes[0]) == ndim for check in beyond)


def test_further_passes_are_judged_beside_the_reference(tmp_path: Path) -> None:
    def never_wrong(check: OperatorCheck) -> OperatorCheck:
        return check.model_copy(update={"measures": ()})

    with opened("emulated:h800", WRONG, tmp_path) as chip:
        assert Recorder(SUBJECT, chip, torch.bfloat16).watch_again(6, never_wrong) == []
