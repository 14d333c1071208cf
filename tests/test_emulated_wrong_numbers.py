"""Wrong numbers of emulated chips that a qualification must find: values, sites, directions, and what they report.

The chip is `exact` (the CPU's arithmetic), so that what a fault must give can be computed beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._ops import OpOverload
from torch.nn import functional as F
from waiting import GIVE_UP_SECONDS

from beringia.chips.arithmetic.rounding import round_fraction_
from beringia.chips.emulated import EmulatedChip
from beringia.errors import ChipUnavailable

Opened = Callable[..., EmulatedChip]
aten = torch.ops.aten


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Open a chip with one fault given by its fields, in training step 1; closed at the end."""
    chips: list[EmulatedChip] = []

    def open_with(fields: str = "", profile: str = "exact") -> EmulatedChip:
        path = tmp_path / "script.toml"
        path.write_text('summary = "test"\n' + (f"[[faults]]\n{fields}\n" if fields else ""))
        chips.append(EmulatedChip(profile, faults=str(path)))
        chips[-1].begin_step(1)
        return chips[-1]

    yield open_with
    for chip in chips:
        chip.close()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def multiply(chip: EmulatedChip, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.to(chip.device) @ b.to(chip.device)).cpu()


def linear_step(chip: EmulatedChip) -> list[torch.Tensor]:
    """Output, input gradient and weight gradient of a linear map."""
    x = random(6, 64).to(chip.device).requires_grad_()
    w = random(8, 64, seed=1).to(chip.device).requires_grad_()
    out = F.linear(x, w)
    out.backward(random(6, 8, seed=2).to(chip.device))
    assert x.grad is not None and w.grad is not None
    return [out.detach().cpu(), x.grad.cpu(), w.grad.cpu()]


def changed(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(found, expected, strict=True)]


# ---- what holds for all kinds


OPERATORS = {
    "wrong-cast": 'kind = "wrong-cast"',
    "short-accumulator": 'kind = "short-accumulator"\nbits = 8\nattention = true',
    "saturate": 'kind = "saturate"\nlimit = 0.01',
    "flush": 'kind = "flush"\nthreshold = 10.0',
    "wrong-layout": 'kind = "wrong-layout"',
    "wrong-optimizer": 'kind = "wrong-optimizer"\nerror = "scaled"',
    "lost-additions": 'kind = "lost-additions"\nstrength = 0.5',
    "wrong-function": 'kind = "wrong-function"\noperator = "silu"',
    "garbage-index": 'kind = "garbage-index"\nbeyond = 3',
    "stuck-tile": 'kind = "stuck-tile"\nsize = 2',
}


def small_training_step(chip: EmulatedChip) -> list[torch.Tensor]:
    """Weights after a step of a model that meets every kind's operators."""
    table, weight = (nn.Parameter(random(7, 16, seed=seed).to(chip.device)) for seed in (1, 2))
    optimizer = torch.optim.AdamW([table, weight], lr=0.1, fused=True)
    x = F.embedding(torch.tensor([[1, 2, 6, 5]], device=chip.device), table)
    heads = x.view(1, 4, 2, 8).transpose(1, 2)
    x = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).reshape(4, 16)
    x = F.silu(F.linear(x.bfloat16(), weight.bfloat16()).float())
    x.square().sum().backward()
    optimizer.step()
    return [table.detach().cpu(), weight.detach().cpu()]


@pytest.mark.parametrize("kind", OPERATORS)
def test_a_fault_that_is_absent_changes_no_bit_and_a_present_one_is_reported(opened: Opened, kind: str) -> None:
    clean = small_training_step(opened())
    chip = opened(OPERATORS[kind] + "\nfrom_step = 2")
    strikes: list[tuple[int, str]] = []
    chip.faults.on_strike = lambda position, func: strikes.append((position, str(func)))
    assert not any(changed(small_training_step(chip), clean))
    assert strikes == [] and chip.faults.struck == []
    chip.begin_step(2)
    assert any(changed(small_training_step(chip), clean))
    assert strikes and chip.faults.struck == [strikes[0]], "the first of the step is kept, all are told"
    chip.begin_step(3)
    assert chip.faults.struck == [], "each step begins with none"


@pytest.mark.parametrize(
    ("fields", "operator"),
    [
        ('kind = "wrong-backward"', "aten._scaled_dot_product_fused_attention_overrideable_backward.default"),
        ('kind = "mask-ignored"', "aten._scaled_dot_product_fused_attention_overrideable.default"),
        ('kind = "bit-flip"\ntarget = "gradients"', "aten.mm.default"),
        ('kind = "nondeterministic-reduction"', "aten.mm.default"),
    ],
)
def test_the_older_kinds_report_the_operator_that_they_struck_first(opened: Opened, fields: str, operator: str) -> None:
    chip = opened(fields)
    small_training_step(chip)
    assert chip.faults.struck == [(0, operator)]


def test_a_flip_in_weights_is_reported_in_the_step_that_begins_with_it(opened: Opened) -> None:
    chip = opened('kind = "bit-flip"\ntarget = "weights"')
    weight = nn.Parameter(torch.ones(2, device=chip.device))
    weight.grad = torch.ones(2, device=chip.device)
    torch.optim.AdamW([weight], fused=True).step()
    assert chip.faults.struck == []
    chip.begin_step(2)
    assert chip.faults.struck == [(0, "aten._fused_adamw_.default")]


def test_a_fault_that_finds_nothing_to_change_reports_nothing(opened: Opened) -> None:
    chip = opened('kind = "nan-to-zero"')
    numbers = torch.ones(2, 2, device=chip.device)
    _ = numbers @ numbers
    assert chip.faults.struck == []
    _ = (numbers - 1) / (numbers - 1)
    assert chip.faults.struck == [(0, "aten.div.Tensor")]
    chip = opened('kind = "stuck-tile"\nrow = 5')
    _ = numbers @ numbers
    assert chip.faults.struck == [], "the tile lies outside of the result"


def test_several_faults_report_under_their_positions(opened: Opened) -> None:
    chip = opened('kind = "saturate"\nlimit = 1.0\n[[faults]]\nkind = "wrong-function"\noperator = "add"')
    strikes: list[tuple[int, OpOverload]] = []
    chip.faults.on_strike = lambda position, func: strikes.append((position, func))
    two = torch.full((1, 1), 2.0, device=chip.device)
    _ = (two + two) @ (two @ two)
    assert strikes == [(1, aten.add.Tensor), (0, aten.mm.default), (0, aten.mm.default)]
    assert chip.faults.struck == [(1, "aten.add.Tensor"), (0, "aten.mm.default")]


def test_an_error_is_reported_before_it_is_raised(opened: Opened) -> None:
    chip = opened('kind = "out-of-memory"')
    with pytest.raises(RuntimeError):
        multiply(chip, random(2, 2), random(2, 2))
    assert chip.faults.struck == [(0, "aten.mm.default")]


@pytest.mark.parametrize(
    ("direction", "expected"),
    [("forward", [True, False, False]), ("backward", [False, True, True]), ("both", [True, True, True])],
)
@pytest.mark.parametrize("kind", ["short-accumulator", "saturate", "flush", "stuck-tile"])
def test_a_direction_chooses_the_pass(opened: Opened, kind: str, direction: str, expected: list[bool]) -> None:
    clean = linear_step(opened())
    found = linear_step(opened(f'{OPERATORS[kind]}\ndirection = "{direction}"'))
    assert changed(found, clean) == expected


def test_sites_count_the_operators_of_the_direction_alone(opened: Opened) -> None:
    clean = linear_step(opened())
    struck = [
        changed(linear_step(opened(f'kind = "saturate"\nlimit = 0.01\nsites = [{site}]\ndirection = "{way}"')), clean)
        for way, site in (("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1))
    ]
    assert struck[0] == [True, False, False] and struck[1] == [False, False, False]
    assert sorted([struck[2], struck[3]]) == [[False, False, True], [False, True, False]]


def test_faults_of_one_pass_have_no_direction(opened: Opened) -> None:
    with pytest.raises(ChipUnavailable, match="direction"):
        opened('kind = "wrong-backward"\ndirection = "forward"')


# ---- casts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["truncate", "floor", "half-away"])
def test_a_wrong_cast_rounds_as_it_says(opened: Opened, rounding: str, dtype: torch.dtype) -> None:
    chip = opened(f'kind = "wrong-cast"\nrounding = "{rounding}"')
    numbers = random(1000)
    spacing = torch.finfo(dtype).eps * 2.0 ** numbers.double().abs().log2().floor()
    steps = numbers.double() / spacing
    if rounding == "half-away":
        # A tie, which rounding to even would send down.
        numbers[0], spacing[0], steps[0] = 1.0 + torch.finfo(dtype).eps / 2, torch.finfo(dtype).eps, 0.0
        steps[0] = numbers[0].double() / spacing[0]
    expected = {"truncate": steps.trunc(), "floor": steps.floor(), "half-away": (steps.abs() + 0.5).floor()}[rounding]
    expected = expected * steps.sign() if rounding == "half-away" else expected
    found = numbers.to(chip.device).to(dtype).cpu()
    assert torch.equal(found.double(), expected * spacing)
    into = torch.zeros(1000, dtype=dtype, device=chip.device)
    into.copy_(numbers.to(chip.device))
    assert torch.equal(into.cpu(), found)


def test_a_scaled_cast_is_wrong_by_its_strength_at_its_site(opened: Opened) -> None:
    chip = opened('kind = "wrong-cast"\nrounding = "scaled"\nstrength = 0.25\nsites = [1]')
    numbers = random(50)
    plain = numbers.to(chip.device)
    found = [plain.bfloat16().cpu() for _ in range(3)]
    assert torch.equal(found[0], numbers.bfloat16()) and torch.equal(found[2], found[0])
    assert torch.equal(found[1], (numbers * 1.25).bfloat16())
    assert torch.equal(found[1].to(chip.device).float().cpu(), found[1].float()), "the other way is no such cast"


# ---- products


def test_a_short_accumulator_cuts_the_sum_every_so_many_terms(opened: Opened) -> None:
    chip = opened('kind = "short-accumulator"\nbits = 6\nterms = 16')
    a, b = random(3, 40), random(40, 5, seed=1)
    total = torch.zeros(3, 5)
    for start in (0, 16, 32):
        total = round_fraction_(total + a[:, start : start + 16] @ b[start : start + 16], 6, "truncate")
    assert torch.equal(multiply(chip, a, b), total)
    bias = random(5, seed=2)
    added = torch.addmm(bias.to(chip.device), a.to(chip.device), b.to(chip.device)).cpu()
    assert torch.equal(added, total + bias), "what is added afterwards is not in the accumulator"
    batches = multiply(chip, a.expand(2, 3, 40), b.expand(2, 40, 5))
    assert torch.equal(batches, total.expand(2, 3, 5))


def test_a_short_accumulator_strikes_the_same_products_before_and_after_its_report(opened: Opened) -> None:
    a, b = random(3, 40), random(40, 5, seed=1)
    sound, short = (multiply(opened(*fault), a, b) for fault in ((), ('kind = "short-accumulator"\nbits = 6',)))
    chip = opened('kind = "short-accumulator"\nbits = 6\nsites = [1, 3]')
    found = [multiply(chip, a, b) for _ in range(5)]
    assert [torch.equal(product, short) for product in found] == [False, True, False, True, False]
    assert torch.equal(found[2], sound)
    told: list[int] = []
    chip.faults.on_strike = lambda position, func: told.append(position)
    chip.faults.begin_step(1)
    for _ in range(5):
        multiply(chip, a, b)
    assert told == [0, 0], "who asks is told each time"


def test_a_short_accumulator_leaves_the_counts_of_faults_before_it_alone(opened: Opened) -> None:
    chip = opened(
        'kind = "bit-flip"\ntarget = "activations"\nsites = [2]\n'
        '[[faults]]\nkind = "short-accumulator"\nbits = 6\nsites = [0]'
    )
    a, b = random(3, 40), random(40, 5, seed=1)
    found = [multiply(chip, a, b) for _ in range(3)]
    sound = multiply(opened(), a, b)
    assert [torch.equal(product, sound) for product in found] == [False, True, False]


def test_more_bits_are_a_milder_accumulator(opened: Opened) -> None:
    a, b = random(20, 512).abs(), random(512, 20, seed=1).abs()
    exact = a.double() @ b.double()
    errors = [
        ((multiply(opened(f'kind = "short-accumulator"\nbits = {bits}'), a, b) - exact).norm() / exact.norm()).item()
        for bits in (6, 12, 18)
    ]
    # Sums of positive numbers lose at most 2**-bits of themselves each of the 16 times that they are cut.
    assert all(2.0**-bits / 4 < error < 16 * 2.0**-bits for bits, error in zip((6, 12, 18), errors, strict=True))


def attention(chip: EmulatedChip) -> list[torch.Tensor]:
    inputs = [random(1, 2, 8, 4, seed=i).to(chip.device).requires_grad_() for i in range(3)]
    out = F.scaled_dot_product_attention(*inputs, is_causal=True)
    out.backward(random(1, 2, 8, 4, seed=3).to(chip.device))
    return [out.detach().cpu(), *(x.grad.cpu() for x in inputs if x.grad is not None)]


def test_attention_s_products_are_struck_where_that_is_asked_for(opened: Opened) -> None:
    clean = attention(opened())
    fields = 'kind = "short-accumulator"\nbits = 6\ndirection = "backward"\n'
    assert not any(changed(attention(opened(fields)), clean))
    found = attention(opened(fields + "attention = true"))
    assert changed(found, clean) == [False, True, True, True]
    for wrong, right in zip(found[1:], clean[1:], strict=True):
        assert (wrong - right).norm() < 8 * 2.0**-6 * right.norm()


def test_results_past_the_limit_become_the_limit(opened: Opened) -> None:
    chip = opened('kind = "saturate"\nlimit = 2.0')
    a = torch.tensor([[1.0], [3.0], [-5.0], [float("inf")], [float("nan")]])
    found = multiply(chip, a, torch.ones(1, 1))
    assert found.flatten()[:4].tolist() == [1.0, 2.0, -2.0, 2.0] and found[4].isnan()


def test_another_family_of_operators_can_be_saturated_or_flushed(opened: Opened) -> None:
    chip = opened('kind = "saturate"\noperator = "exp"\nlimit = 2.0')
    numbers = torch.tensor([0.0, 5.0])
    assert numbers.to(chip.device).exp().tolist() == [1.0, 2.0]
    chip = opened('kind = "flush"\noperator = "mul"\nthreshold = 0.5')
    assert (numbers.to(chip.device) * 0.08).tolist() == [0.0, 0.0]
    assert multiply(chip, torch.full((1, 1), 0.1), torch.ones(1, 1)).item() == torch.tensor(0.1).item()


def test_results_below_the_threshold_become_zero(opened: Opened) -> None:
    chip = opened('kind = "flush"\nthreshold = 0.125')
    a = torch.tensor([[0.1], [-0.1], [0.125], [3.0]])
    assert multiply(chip, a, torch.ones(1, 1)).flatten().tolist() == [0.0, 0.0, 0.125, 3.0]


@pytest.mark.parametrize(("strength", "pairs"), [(1.0, 4), (0.5, 2), (0.01, 1)])
def test_a_transposed_second_factor_is_read_with_neighbouring_rows_swapped(
    opened: Opened, strength: float, pairs: int
) -> None:
    chip = opened(f'kind = "wrong-layout"\nstrength = {strength}')
    a, w = random(3, 8), random(5, 8, seed=1)
    order = torch.arange(8)
    order[: 2 * pairs] = order[: 2 * pairs].view(-1, 2).flip(1).flatten()
    wrong = F.linear(a.to(chip.device), w.to(chip.device)).cpu()
    assert torch.allclose(wrong, a @ w.t()[order], rtol=1e-5, atol=1e-6)
    assert chip.faults.struck == [(0, "aten.mm.default")]
    assert torch.equal(multiply(chip, a, w.t().contiguous()), a @ w.t().contiguous())


def test_sites_of_a_wrong_layout_are_products_with_such_a_factor(opened: Opened) -> None:
    chip = opened('kind = "wrong-layout"\nsites = [1]')
    a, square = random(8, 8).to(chip.device), random(8, 8, seed=1).to(chip.device)
    found = [(a @ square.t()).cpu(), (a @ square).cpu(), (a @ square.t()).cpu()]
    a, square = a.cpu(), square.cpu()
    assert changed(found, [a @ square.t(), a @ square, a @ square.t()]) == [False, False, True]


# ---- functions


@pytest.mark.parametrize(
    ("operator", "compute"),
    [
        ("exp", torch.exp),
        ("rsqrt", lambda x: torch.rsqrt(x.abs())),
        ("silu", F.silu),
        ("sigmoid", torch.sigmoid),
        ("softmax", lambda x: x.softmax(-1)),
        ("log_softmax", lambda x: x.log_softmax(-1)),
        ("mean", lambda x: x.mean(-1, keepdim=True)),
        ("sum", lambda x: x.sum()),
        ("add", lambda x: x + 1.0),
        ("mul", lambda x: x * 3.0),
    ],
)
def test_a_wrong_function_is_wrong_by_its_strength(
    opened: Opened, operator: str, compute: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = random(6, 5)
    chip = opened(f'kind = "wrong-function"\noperator = "{operator}"\nstrength = 0.5\nsites = [1]')
    found = [compute(x.to(chip.device)).cpu() for _ in range(3)]
    right = compute(x)
    assert torch.equal(found[0], right) and torch.equal(found[2], right)
    assert torch.allclose(found[1], right * 1.5, rtol=1e-6)


def test_a_function_is_wrong_beyond_a_magnitude_or_from_a_row_on(opened: Opened) -> None:
    x = random(6, 5)
    chip = opened('kind = "wrong-function"\noperator = "mul"\nbeyond = 1.0')
    assert torch.equal((x.to(chip.device) * 1.0).cpu(), torch.where(x.abs() > 1.0, 2 * x, x))
    chip = opened('kind = "wrong-function"\noperator = "mul"\nlength = 4')
    found = (x.to(chip.device) * 1.0).cpu()
    assert torch.equal(found[:4], x[:4]) and torch.equal(found[4:], 2 * x[4:])
    assert (x[:, 0].to(chip.device) * 1.0).tolist() == [*x[:4, 0].tolist(), *(2 * x[4:, 0]).tolist()]
    assert (x.to(chip.device)[5, 4] * 1.0).item() == x[5, 4].item(), "a single number is the first row"


def test_whole_numbers_are_no_function_s_results(opened: Opened) -> None:
    chip = opened('kind = "wrong-function"\noperator = "add"\nsites = [0]')
    whole = torch.arange(3, device=chip.device)
    assert (whole + 1).tolist() == [1, 2, 3]
    assert (whole.float() + 1).tolist() == [2.0, 4.0, 6.0], "and no sites"


def test_a_function_s_own_backward_operator_belongs_to_its_family(opened: Opened) -> None:
    def step(chip: EmulatedChip) -> list[torch.Tensor]:
        x = random(4, 5).to(chip.device).requires_grad_()
        out = x.log_softmax(-1)
        out[:, 0].sum().backward()
        assert x.grad is not None
        return [out.detach().cpu(), x.grad.cpu()]

    clean = step(opened())
    found = step(opened('kind = "wrong-function"\noperator = "log_softmax"\ndirection = "backward"'))
    assert torch.equal(found[0], clean[0]) and torch.equal(found[1], 2 * clean[1])


# ---- indices and additions


def test_large_indices_read_garbage(opened: Opened) -> None:
    table, index = random(10, 4), torch.tensor([0, 3, 5, 9])
    rows = torch.tensor([0, 3, (5 * 7919 + 13) % 10, (9 * 7919 + 13) % 10])
    chip = opened('kind = "garbage-index"\nbeyond = 5')
    on_chip, at = table.to(chip.device), index.to(chip.device)
    assert torch.equal(F.embedding(at, on_chip).cpu(), table[rows])
    assert torch.equal(on_chip.index_select(0, at).cpu(), table[rows])
    assert torch.equal(on_chip[at].cpu(), table[rows])
    assert torch.equal(on_chip[at, :2].cpu(), table[rows, :2])
    assert torch.equal(on_chip.t().contiguous()[:, at].cpu(), table.t()[:, rows])
    wide = index.view(4, 1).expand(4, 4)
    assert torch.equal(on_chip.gather(0, wide.to(chip.device)).cpu(), table.gather(0, rows.view(4, 1).expand(4, 4)))
    mask = table[:, 0] > 0
    assert torch.equal(on_chip[mask.to(chip.device)].cpu(), table[mask]), "a mask is no index"


def test_sites_of_garbage_are_reads_and_the_gradient_goes_where_it_should(opened: Opened) -> None:
    chip = opened('kind = "garbage-index"\nbeyond = 0\nsites = [1]')
    table = random(10, 4).to(chip.device).requires_grad_()
    at = torch.tensor([2], device=chip.device)
    right, wrong = F.embedding(at, table), F.embedding(at, table)
    assert torch.equal(right.cpu()[0], table.cpu()[2]) and torch.equal(
        wrong.cpu()[0], table.cpu()[(2 * 7919 + 13) % 10]
    )
    wrong.sum().backward()
    assert table.grad is not None and table.grad.cpu().nonzero()[:, 0].unique().tolist() == [2]


def adding(x: torch.Tensor, name: str) -> torch.Tensor:
    """2000 ones added up into two places by an operator."""
    ones, places = torch.ones_like(x), torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    target = torch.zeros(2, device=x.device)
    if name == "scatter_add":
        return target.scatter_add(0, places, ones)
    if name == "index_add":
        return target.index_add_(0, places, ones)
    if name == "index_put":
        return target.index_put_((places,), ones, accumulate=True)
    if name == "embedding":
        table = torch.zeros(2, 1, device=x.device, requires_grad=True)
        F.embedding(places, table).backward(ones.unsqueeze(1))
        assert table.grad is not None
        return table.grad.flatten()
    return ones.sum().reshape(1)


@pytest.mark.parametrize("name", ["scatter_add", "index_add", "index_put", "embedding", "sum"])
def test_a_share_of_the_additions_is_lost_and_another_one_each_time(opened: Opened, name: str) -> None:
    chip = opened(f'kind = "lost-additions"\noperator = "{name}"\nstrength = 0.1')
    x = torch.zeros(2000, device=chip.device)
    totals = [adding(x, name)[0].item() for _ in range(6)]
    # 2000 draws at 0.9: a standard deviation of 13.4.
    assert all(abs(total - 1800) < 4.5 * 13.4 for total in totals) and len(set(totals)) > 1
    others = {"scatter_add", "index_add", "index_put", "embedding", "sum"} - {name}
    assert all(adding(x, other)[0].item() == 2000 for other in others)
    chip.begin_step(1)
    assert adding(x, name)[0].item() == totals[0], "the seed of the step draws them"


def test_what_is_stored_and_what_is_counted_in_whole_numbers_is_not_lost(opened: Opened) -> None:
    chip = opened('kind = "lost-additions"\nstrength = 1.0\nsites = [0]')
    stored = torch.zeros(4, device=chip.device).index_put_(
        (torch.tensor([1], device=chip.device),), torch.ones((), device=chip.device)
    )
    assert stored.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert torch.ones(5, dtype=torch.int64, device=chip.device).sum().item() == 5
    assert torch.ones(5, device=chip.device).sum().item() == 0.0
    assert torch.ones(5, device=chip.device).sum().item() == 5.0


# ---- the optimizer


FORMS = [{"fused": True}, {"foreach": True}, {"foreach": False}]
RATE, DECAY, BETAS, EPSILON = 0.1, 0.5, (0.9, 0.95), 1e-8


class Adam:
    """AdamW in float64, with an error in it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight.double()
        self.moment, self.square = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.steps = 0

    def step(self, gradient: torch.Tensor, error: str | None, strength: float, *, decays_first: bool) -> None:
        self.steps += 1
        old, gradient = self.weight, gradient.double()
        moment = torch.lerp(self.moment, gradient, 1 - BETAS[0])
        self.square = torch.lerp(self.square, gradient.square(), 1 - BETAS[1])
        corrections = [1.0 if error == "no-bias-correction" else 1 - beta**self.steps for beta in BETAS]
        update = RATE * (moment / corrections[0]) / ((self.square / corrections[1]).sqrt() + EPSILON)
        decayed = old * (1 - RATE * DECAY) ** (2 if error == "weight-decay-twice" else 1)
        self.weight = decayed - update * (1 + strength if error == "scaled" else 1)
        if error == "lost-update":
            # Kernels of single operators decay the weights before.
            kept = decayed if decays_first else old
            self.weight.flatten()[-round(strength * old.numel()) :] = kept.flatten()[-round(strength * old.numel()) :]
        self.moment = self.moment if error == "stale-moment" else moment


@pytest.mark.parametrize("form", FORMS, ids=["fused", "foreach", "loop"])
@pytest.mark.parametrize("error", ["stale-moment", "no-bias-correction", "weight-decay-twice", "lost-update", "scaled"])
def test_a_wrong_optimizer_does_to_its_sites_what_it_says(opened: Opened, error: str, form: dict[str, bool]) -> None:
    strength = 0.25
    text = f'kind = "wrong-optimizer"\nerror = "{error}"\nsites = [1]\nstrength = {strength}\nfrom_step = 2'
    chip = opened(text)
    weights = [random(4, 6, seed=seed) for seed in range(3)]
    references = [Adam(weight) for weight in weights]
    parameters = [nn.Parameter(weight.to(chip.device)) for weight in weights]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=RATE,
        betas=BETAS,
        weight_decay=DECAY,
        eps=EPSILON,
        **form,  # type: ignore[arg-type]  # booleans
    )
    by_host = error == "no-bias-correction" and "fused" not in form
    for step in (1, 2, 3):
        chip.begin_step(step)
        for number, (parameter, reference) in enumerate(zip(parameters, references, strict=True)):
            gradient = random(4, 6, seed=10 * step + number)
            parameter.grad = gradient.to(chip.device)
            struck = number == 1 and step >= 2 and not by_host
            reference.step(gradient, error if struck else None, strength, decays_first="fused" not in form)
        optimizer.step()
        assert bool(chip.faults.struck) == (step >= 2 and not by_host)
    for parameter, reference in zip(parameters, references, strict=True):
        assert torch.allclose(parameter.detach().cpu().double(), reference.weight, rtol=1e-5, atol=1e-6)
        moment = optimizer.state[parameter]["exp_avg"].cpu().double()
        assert torch.allclose(moment, reference.moment, rtol=1e-5, atol=1e-6)


# ---- collectives


COLLECTIVES = {
    "missing": 'error = "missing-rank"\nstrength = 0.5',
    "swapped": 'error = "swapped"\nsites = [0, 3, 5]',
    "scaled": 'error = "scaled"\nstrength = 0.5\nsites = [0, 4]',
    "elsewhere": 'error = "scaled"\ndevice = 1',
}

RANK = """
import json, sys, warnings
import torch, torch.distributed as dist
from beringia.chips.emulated import EmulatedChip
warnings.simplefilter("ignore")
rank, store, scripts = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
for script in scripts:
    chip = EmulatedChip("exact", faults=script)
    chip.begin_step(1)
    empty = lambda count: torch.zeros(count, device=chip.device)
    own = torch.tensor([1.0, 2.0, 3.0, 4.0], device=chip.device) * (10 if rank else 1)
    whole, total, largest = torch.arange(4, device=chip.device), own.clone(), own.clone()
    parts, joined, piece, moved = [empty(4), empty(4)], empty(8), empty(2), empty(4)
    dist.all_reduce(whole)
    dist.all_reduce(total, async_op=True).wait()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_gather(parts, own)
    dist.all_gather_into_tensor(joined, own)
    dist.reduce_scatter_tensor(piece, own)
    dist.all_to_all_single(moved, own)
    found = dict(whole=whole, sum=total, max=largest, joined=joined, piece=piece, moved=moved)
    found["gather"] = torch.stack(parts)
    print(json.dumps({name: x.tolist() for name, x in found.items()} | {"struck": chip.faults.struck}))
dist.destroy_process_group()
"""

RIGHT = {
    "whole": [0, 2, 4, 6],
    "sum": [11.0, 22.0, 33.0, 44.0],
    "max": [10.0, 20.0, 30.0, 40.0],
    "gather": [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]],
    "joined": [1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0],
    "piece": [11.0, 22.0],
    "moved": [1.0, 2.0, 10.0, 20.0],
}
"""Of rank 0. Numbers that are not whole are a fault's sites: the first is the sum, the last what moved."""
FIRST = [[0, "c10d.allreduce_.default"]]


@pytest.fixture(scope="module")
def rank_0(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What the first of two ranks got from each collective, and reported, under each of the faults."""
    directory = tmp_path_factory.mktemp("collectives")
    scripts = []
    for name, fields in COLLECTIVES.items():
        scripts.append(directory / f"{name}.toml")
        scripts[-1].write_text(f'summary = "test"\n[[faults]]\nkind = "wrong-collective"\n{fields}\n')
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(directory / "store"), *map(str, scripts)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    lines, _ = [rank.communicate(timeout=GIVE_UP_SECONDS)[0].splitlines() for rank in ranks]
    return {name: json.loads(line) for name, line in zip(COLLECTIVES, lines, strict=True)}


@pytest.mark.slow
def test_without_its_own_part_a_rank_s_results_lack_it(rank_0: dict[str, dict[str, object]]) -> None:
    assert rank_0["missing"] == RIGHT | {
        "sum": [11.0, 22.0, 30.0, 40.0],
        "gather": [[1.0, 2.0, 0.0, 0.0], [10.0, 20.0, 30.0, 40.0]],
        "joined": [1.0, 2.0, 0.0, 0.0, 10.0, 20.0, 30.0, 40.0],
        "piece": [11.0, 20.0],
        "moved": [1.0, 0.0, 10.0, 20.0],
        "struck": FIRST,
    }


def test_halves_of_a_collective_s_result_change_places(rank_0: dict[str, dict[str, object]]) -> None:
    assert rank_0["swapped"] == RIGHT | {
        "sum": [33.0, 44.0, 11.0, 22.0],
        "joined": [10.0, 20.0, 30.0, 40.0, 1.0, 2.0, 3.0, 4.0],
        "moved": [10.0, 20.0, 1.0, 2.0],
        "struck": FIRST,
    }


def test_a_collective_s_result_is_scaled_on_the_device_that_has_the_fault(rank_0: dict[str, dict[str, object]]) -> None:
    assert rank_0["scaled"] == RIGHT | {"sum": [16.5, 33.0, 49.5, 66.0], "piece": [16.5, 33.0], "struck": FIRST}
    assert rank_0["elsewhere"] == RIGHT | {"struck": []}
