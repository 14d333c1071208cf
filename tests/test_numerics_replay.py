"""Taps see what autograd computes and change nothing; a replay leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from beringia.numerics.replay import Taps, place, run


class Twice(nn.Module):
    """One input for two readers, so that its whole gradient is the sum of two shares."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).tanh() + self.second(x)


def module() -> Twice:
    torch.manual_seed(0)
    return Twice().double()


def test_taps_see_each_readers_share_of_a_gradient() -> None:
    layer = module()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    with Taps({"": layer, "first": layer.first, "second": layer.second}, lambda tensor: tensor) as taps:
        output = layer(x)
        output.backward(torch.ones_like(output))
    shares = [taps.calls[name][0].input_gradient for name in ("first", "second")]
    assert torch.equal(taps.calls["second"][0].output_gradient, torch.ones_like(output))
    assert torch.allclose(shares[1], torch.ones(3, 6, dtype=torch.float64) @ layer.second.weight)
    assert torch.allclose(shares[0] + shares[1], x.grad)
    assert torch.equal(taps.calls[""][0].input_gradient, x.grad)


def test_taps_change_no_bit_and_leave_no_hook() -> None:
    plain, watched = module(), module()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = run(plain, x, torch.ones_like(x), plain.parameters())
    with Taps({"": watched, "first": watched.first}, lambda tensor: tensor):
        found = run(watched, x, torch.ones_like(x), watched.parameters())
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(one, other) for one, other in zip(found[1], expected[1], strict=True))
    assert not watched._forward_hooks and not watched.first._forward_pre_hooks


class Named(nn.Module):
    """Modules that are called in ways of others: by keyword, without anything, with a tuple, for a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.by_name, self.both, self.tuple, self.nothing = (nn.Linear(6, 6) for _ in range(5))
        self.by_name.forward = lambda *, x: x * self.by_name.bias
        self.both.forward = lambda x, *, scale=None, other=None: x * self.both.bias * (1.0 if scale is None else scale)
        self.tuple.forward = lambda pair: (pair[0] * self.tuple.bias, pair[1])
        self.nothing.forward = lambda: self.nothing.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled, _ = self.tuple((self.both(x, scale=x), x))
        return self.plain(x) + self.by_name(x=x) + scaled + self.nothing() + self.both(x, scale=None)


def test_calls_that_cannot_be_made_again_by_position_are_passed_over_and_change_nothing() -> None:
    torch.manual_seed(0)
    model, x = Named().double(), torch.randn(3, 6, dtype=torch.float64)
    expected = run(model, x, torch.ones_like(x))
    with Taps(dict(model.named_children()), lambda tensor: tensor) as taps:
        found = run(model, x, torch.ones_like(x))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1][0], expected[1][0])
    assert {name: len(calls) for name, calls in taps.calls.items()} == {
        "plain": 1,
        "by_name": 0,
        "both": 1,
        "tuple": 0,
        "nothing": 0,
    }


def in_place() -> nn.Sequential:
    """Its second and third module write to what the one before gave."""
    torch.manual_seed(0)

    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2.0)

    return nn.Sequential(nn.Linear(6, 6), Doubled(), nn.ReLU(inplace=True), nn.Linear(6, 6)).double()


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6)], ids=str)  # of the latter a product's result is a view
def test_taps_keep_what_a_module_got_and_not_what_it_made_of_it(shape: tuple[int, ...]) -> None:
    model, x = in_place(), torch.randn(shape, dtype=torch.float64)
    with Taps(dict(model.named_children()), torch.clone) as taps:
        output = model(x)
        output.backward(torch.ones_like(output))
    given = {name: calls[0] for name, calls in taps.calls.items()}
    linear = model[0](x)
    assert torch.equal(given["0"].output, linear) and torch.equal(given["1"].inputs[0], linear)
    assert torch.equal(given["2"].inputs[0], 2.0 * linear) and torch.equal(given["3"].inputs[0], F.relu(2.0 * linear))
    of_last = torch.ones_like(output) @ model[3].weight
    assert torch.allclose(given["2"].output_gradient, of_last)
    assert torch.allclose(given["1"].output_gradient, of_last * (linear > 0))
    assert torch.allclose(given["0"].output_gradient, 2.0 * of_last * (linear > 0))
    assert given["1"].input_gradient is None and torch.allclose(given["3"].input_gradient, of_last)


def test_a_module_that_gives_its_input_on_has_its_own_share_of_the_gradient() -> None:
    identity, x = nn.Identity(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    with Taps({"": identity}, lambda tensor: tensor) as taps:
        hidden = 2.0 * x
        (identity(hidden) * 3.0 + hidden).sum().backward()
    (call,) = taps.calls[""]
    assert torch.equal(call.output_gradient, torch.full_like(x, 3.0))
    assert torch.equal(call.input_gradient, torch.full_like(x, 3.0)) and torch.equal(x.grad, torch.full_like(x, 8.0))


def test_a_replay_of_a_module_that_writes_to_its_input_leaves_that_as_it_was() -> None:
    model, x = in_place(), torch.randn(3, 6, dtype=torch.float64)
    before = x.clone()
    output, (gradient,) = run(lambda x: model[2](model[1](x)), x, torch.ones_like(x))
    assert torch.equal(x, before) and not x.requires_grad
    assert torch.equal(output, F.relu(2.0 * x)) and torch.equal(gradient, 2.0 * (x > 0))


def test_a_replay_changes_no_gradient_of_the_module() -> None:
    layer = module()
    x = torch.randn(3, 6, dtype=torch.float64)
    run(layer, x, torch.ones_like(x), layer.parameters())
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_module_without_weights_computes_with_those_it_is_given() -> None:
    source = module()
    with torch.device("meta"):
        empty = Twice()
    place(empty, dict(source.named_parameters()))
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(empty(x), source(x))
    assert empty.first.weight.data_ptr() == source.first.weight.data_ptr()
