"""Modules of a user's own: what may be in one and is sound, what is refused in a sentence, and faults that strike only
what such modules have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import calls_of
from torch import nn
from torch.nn import functional as F
from wrong_kernels import emulated_with

from beringia.chips.cpu import Cpu
from beringia.errors import InputError
from beringia.qualify.operators.check import check, has_wrong_integers, wrong_form_words
from beringia.qualify.operators.float64 import Attention
from beringia.qualify.operators.watch import in_backward
from beringia.qualify.qualification import qualify_here
from beringia.qualify.reference import make_bundle
from beringia.qualify.rounding_draw import RoundingDraw
from beringia.qualify.subject import Batch, ModuleSubject
from beringia.qualify.subject_check import check_subject
from beringia.qualify.trace import TraceExtent, Tracer
from beringia.records.certificate import Certificate

aten = torch.ops.aten
PLAN = TraceExtent(batches=6, steps=2)
VOCABULARY, TOKENS, WIDTH = 17, 8, 16


class Small(nn.Module):
    """Embedding, a layer of two products, head; parts of it are other ones in what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.more()

    def more(self) -> None:
        """What a kind of it has beside."""

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.embedding(tokens)
        return embedded

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(F.gelu(self.up(x)))
        return result

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        logits: torch.Tensor = self.head(x + self.inner(x))
        return logits


def subject(kind: type[Small] = Small, rows: int = 4, **changes: Any) -> ModuleSubject:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return kind()

    def batch(number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, VOCABULARY, (rows, TOKENS + 1), generator=generator)
        return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}

    whole = ModuleSubject("mine", make, batch, loss_of, lambda model, batch: model(batch["tokens"]))
    return replace(whole, **changes)


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["tokens"]).float().flatten(0, 1), batch["labels"].flatten())


def certified(kind: type[Small] = Small, kernels: dict[Any, Callable[..., Any]] | None = None) -> Certificate:
    with emulated_with(kernels or {}, "h100") as chip:
        return qualify_here(chip, subject(kind), PLAN)


# ---- what is sound


class DoublesItsPlaces(Small):
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(TOKENS, device=tokens.device)
        places.add_(places)
        return super().embed((tokens + places) % VOCABULARY)


class CountsInPlace(Small):
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        ones = torch.ones_like(tokens)
        torch.cumsum(ones, -1, out=ones)
        return super().embed((tokens + ones) % VOCABULARY)


class Permuted(Small):
    def more(self) -> None:
        self.order = nn.Parameter(torch.randperm(WIDTH), requires_grad=False)
        self.kept = nn.Parameter(torch.arange(WIDTH) % 5 > 0, requires_grad=False)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().embed(tokens)[..., self.order] * self.kept


class WithWeightNorm(Small):
    def more(self) -> None:
        self.up = torch.nn.utils.parametrizations.weight_norm(self.up)  # type: ignore[assignment]  # a Linear as before


@pytest.mark.parametrize("kind", [DoublesItsPlaces, CountsInPlace, Permuted, WithWeightNorm])
def test_what_a_module_may_do_is_sound_on_the_cpu(kind: type[Small], tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        make_bundle(subject(kind), Cpu(), dtype, tmp_path / f"{dtype}.bundle", plan=replace(PLAN, batches=3))


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(x),
        lambda x: torch.mul(x, x, out=x),
        lambda x: torch._foreach_mul_([x[0], x[1]], [x[0], x[1]]),
        lambda x: x.addcmul_(x, x),
        lambda x: torch.cumsum(x, 0, out=x),
    ],
)
def test_arguments_are_those_before_the_call_wrote_over_them(write: Callable[[torch.Tensor], object]) -> None:
    x = torch.arange(1.0, 10.0).view(3, 3)
    judged = check(calls_of(lambda: write(x))[-1])
    assert judged is not None and judged.used <= 1.0


class WithLayerNorm(Small):
    def more(self) -> None:
        self.norm = nn.LayerNorm(WIDTH)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(super().embed(tokens))
        return normed


@pytest.mark.parametrize("rows", [8, pytest.param(128, marks=pytest.mark.slow)])
def test_layer_norms_are_qualified_however_many_rows_they_have_and_the_certificate_says_beside_what(rows: int) -> None:
    with emulated_with({}, "h100") as chip:
        certificate = qualify_here(chip, subject(WithLayerNorm, rows), PLAN)
    assert certificate.verdict == "train" and certificate.first_wrong is None
    assert ("float64's results rounded" in certificate.reference.sku) == (rows > 8)


def test_an_emulated_layer_norm_adds_its_rows_up_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(2048, WIDTH, generator=generator).bfloat16() for _ in range(2))

    def gradients(x: torch.Tensor) -> list[torch.Tensor]:
        weight, bias = (torch.full((WIDTH,), one, dtype=x.dtype, device=x.device) for one in (1.0, 0.0))
        normed, mean, deviation = aten.native_layer_norm(x, [WIDTH], weight, bias, 1e-5)
        there = gradient.to(x.device, x.dtype)
        return list(aten.native_layer_norm_backward(there, x, [WIDTH], mean, deviation, weight, bias, [True] * 3))

    with emulated_with({}, "h100") as chip:
        found = [one.cpu().double() for one in gradients(x.to(chip.device))]
    for one, exact in zip(found, gradients(x.double()), strict=True):
        # One rounding of the result: 2^-9 at most, relative; of the input's gradient also that of mean and deviation.
        assert (one - exact).norm() < 2.0**-8 * exact.norm()


def test_a_gradient_that_was_not_asked_for_is_no_result() -> None:
    backward = aten.native_layer_norm_backward.default
    with emulated_with({backward: lambda *given: backward(*given[:-1], [True] * 3)}, "h100") as chip:
        call = calls_of(lambda: _normed(chip.device), device=chip.device.type)[-1]
    judged = check(call)
    assert call.func is backward and judged is not None and judged.used <= 1.0


def _normed(device: torch.device) -> None:
    weight, bias = (torch.ones(4, device=device, requires_grad=True) for _ in range(2))
    F.layer_norm(torch.arange(8.0, device=device).view(2, 4), (4,), weight, bias).sum().backward()


@pytest.mark.parametrize("frozen", ["q", "k", "v", "qk", "kv", ""])
def test_attention_is_judged_by_the_gradients_that_it_is_asked_for(frozen: str) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(1, 2, 5, 4, generator=generator) for name in "qkv"}
    with emulated_with({}, "h100") as chip:
        q, k, v = (drawn[name].to(chip.device).requires_grad_(name not in frozen) for name in "qkv")
        calls = calls_of(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum().backward(),
            device=chip.device.type,
        )
    (backward,) = [call for call in calls if "attention" in str(call.func) and "backward" in str(call.func)]
    judged = check(backward)
    assert len(backward.results) == 3 - len(frozen)
    assert judged is not None and judged.used <= 1.0 and not wrong_form_words(judged)


def test_a_module_with_a_batch_norm_is_sound_on_a_sound_chip() -> None:
    class WithBatchNorm(Small):
        def more(self) -> None:
            self.norm = nn.BatchNorm1d(WIDTH)

        def embed(self, tokens: torch.Tensor) -> torch.Tensor:
            embedded = super().embed(tokens)
            normed: torch.Tensor = self.norm(embedded.flatten(0, 1)).view(embedded.shape)
            return normed

    certificate = certified(WithBatchNorm)
    assert certificate.verdict == "train"
    assert {"buffer norm.running_mean", "buffer norm.num_batches_tracked"} <= {
        one.subject for one in certificate.probes
    }


def test_an_attention_of_a_maker_s_own_is_not_read_as_torch_s() -> None:
    library = torch.library.Library("maker", "DEF")
    library.define("fusion_attention(Tensor query, Tensor key, Tensor value, int heads, str layout) -> Tensor")
    library.impl("fusion_attention", lambda query, key, value, heads, layout: query + value, "CPU")
    x = torch.ones(1, 2, 3, 4)
    (call,) = calls_of(lambda: torch.ops.maker.fusion_attention(x, x, x, 2, "BSND"))
    assert Attention.of(call) is None
    judged = check(call)
    assert judged is not None and judged.used <= 1.0


# ---- what such a module alone shows


def test_additions_to_gradients_that_are_lost_are_found() -> None:
    add = aten.add_.Tensor

    def lost(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return x if in_backward() else add(x, *rest, **options)

    certificate = certified(kernels={add: lost})
    assert certificate.verdict == "infer"
    assert any("over unlike batches" in reason for reason in certificate.reasons)
    assert any("2 batches, their gradients added up" in one for one in certificate.scenarios)


class Averaging(Small):
    average: torch.Tensor

    def more(self) -> None:
        self.register_buffer("average", torch.zeros(WIDTH))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        result = super().inner(x)
        with torch.no_grad():
            self.average.lerp_(result.mean((0, 1)).to(self.average.dtype), 0.1)
        return result


def test_a_buffer_that_is_not_updated_is_found_and_a_sound_one_is_not() -> None:
    certificate = certified(Averaging, {aten.lerp_.Scalar: lambda x, *rest: x})
    assert certificate.verdict == "infer"
    assert certificate.first_wrong is not None and certificate.first_wrong.check.operator == "aten.lerp_.Scalar"
    assert any("the value after training steps of average" in reason for reason in certificate.reasons)
    assert certified(Averaging).verdict == "train"


def test_a_buffer_of_whole_numbers_is_exact() -> None:
    class Counting(Small):
        seen: torch.Tensor

        def more(self) -> None:
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def inner(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return super().inner(x)

    certificate = certified(Counting, {aten.add_.Tensor: lambda x, y, **_: x if not x.dim() else x.copy_(x + y)})
    assert certificate.verdict == "unfit"
    failed = [probe for probe in certificate.probes if probe.outcome == "failed"]
    assert [probe.subject for probe in failed if probe.rules_out == "train"] == ["buffer seen"]


@pytest.mark.parametrize("operator", ["sort", "topk"])
def test_an_element_that_is_named_twice_is_a_wrong_integer_also_among_equal_ones(operator: str) -> None:
    x = torch.tensor([[1.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    call = calls_of(lambda: x.sort() if operator == "sort" else x.topk(3))[-1]
    values, places = call.results
    sound = check(call)
    assert sound is not None and not has_wrong_integers(sound)
    again = places.clone()
    again[1, 1] = again[1, 0]
    found = check(replace(call, results=(values, again)))
    assert found is not None and has_wrong_integers(found)


NOTHING = [lambda: torch.empty(0).sort(), lambda: torch.empty(3, 0).sort(), lambda: torch.ones(3).topk(0)]


@pytest.mark.parametrize("find", NOTHING)
def test_where_nothing_is_named_nothing_is_named_twice(find: Callable[[], object]) -> None:
    judged = check(calls_of(find)[-1])
    assert judged is None or judged.used <= 1.0


def test_whole_numbers_among_the_parameters_are_not_RoundingDraw() -> None:
    change = RoundingDraw(0, torch.bfloat16)
    for whole in (torch.arange(5), torch.tensor([True, False])):
        assert change("weight", whole) is whole
    turned = torch.ones(64, dtype=torch.complex64) * (1 + 2j)
    assert 0.0 < (change("weight", turned) - turned).abs().max() <= 2.0**-7 * turned.abs().max()
    assert (change("weight", turned).imag != turned.imag).any()


# ---- what is refused, in a sentence


def of_other(value: Any) -> Callable[..., Any]:
    return lambda *_: value


SHARED = Small()
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no module": ({"make": lambda: 3}, "make gives a int"),
    "make raises": ({"make": lambda: nn.Linear(-1, 2)}, "make raised RuntimeError"),
    "one module for all": ({"make": lambda: SHARED}, "the same weights again and not a copy"),
    "drawn anew": ({"make": Small}, "make gives other weights the second time"),
    "frozen": ({"make": lambda: Small().requires_grad_(False)}, "no parameter of its module requires a gradient"),
    "outputs a tuple": ({"compute_outputs": lambda model, batch: (model(batch["tokens"]),)}, "outputs gives a tuple"),
    "no outputs": ({"compute_outputs": of_other(None)}, "compute_outputs gives None"),
    "empty outputs": ({"compute_outputs": of_other(torch.zeros(0))}, "a tensor without elements"),
    "loss a float": ({"compute_loss": of_other(1.0)}, "compute_loss gives a float"),
    "loss of none": ({"compute_loss": of_other(None)}, "compute_loss gives None"),
    "loss of many": ({"compute_loss": of_other(torch.zeros(3))}, r"compute_loss gives a tensor of shape \[3\]"),
    "loss detached": ({"compute_loss": lambda *given: loss_of(*given).detach()}, "that no parameter has a gradient of"),
    "loss raises": ({"compute_loss": lambda model, batch: batch["absent"]}, "compute_loss raised KeyError"),
    "None in a batch": ({"batches": of_other({"mask": None})}, r"batches\(0\) has None as 'mask'"),
    "no dictionary": ({"batches": of_other([1, 2])}, r"batches\(0\) gives a list"),
    "few batches": (
        {"batches": lambda number: [{"tokens": torch.zeros(1)}][number]},
        r"batches\(1\) raised IndexError",
    ),
    "random batches": ({"batches": lambda number: {"tokens": torch.rand(3)}}, "other numbers the second time"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_subject_that_cannot_be_qualified_with_is_refused_in_a_sentence(what: str) -> None:
    changes, found = REFUSED[what]
    with pytest.raises(InputError, match=f"mine cannot be qualified with: .*{found}"):
        check_subject(subject(**changes), 2)


class Dropping(Small):
    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().inner(x), 0.1, self.training)


class Sparse(Small):
    def more(self) -> None:
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, sparse=True)


@pytest.mark.parametrize(
    ("kind", "found"), [(Dropping, "it draws random numbers, as dropout does"), (Sparse, "embedding.weight is sparse")]
)
def test_a_module_whose_passes_cannot_be_compared_is_refused(kind: type[Small], found: str) -> None:
    with emulated_with({}, "h100") as chip, pytest.raises(InputError, match=found):
        qualify_here(chip, subject(kind), PLAN)


def test_a_sparse_buffer_and_a_loss_of_one_dimension_are_no_obstacle() -> None:
    class Linked(Small):
        links: torch.Tensor

        def more(self) -> None:
            self.register_buffer("links", torch.eye(WIDTH).to_sparse())

    check_subject(subject(Linked, compute_loss=lambda *given: loss_of(*given).reshape(1)), 2)


def test_what_is_the_same_every_time_passes() -> None:
    for kind in (Small, Permuted, Averaging, WithLayerNorm, WithWeightNorm):
        check_subject(subject(kind), 6)


def test_buffers_are_in_a_trace_and_at_float64_s_distance() -> None:
    tracer = Tracer(subject(Averaging), TraceExtent(batches=2, steps=2))
    exact, routes = tracer.in_float64()
    assert "buffer/average" in exact.sketches
    assert exact.sketches["buffer/average"].abs().max() > 0
    found = tracer.on_chip(Cpu(), torch.float32, routes, begin_step=lambda: None)
    assert torch.allclose(found.sketches["buffer/average"], exact.sketches["buffer/average"], atol=1e-6)
