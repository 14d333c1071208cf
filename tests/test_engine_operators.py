"""The compiled operators against float64, with sizes that do not fit their vectors."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beringia.chips.open import open_chip
from beringia.engine.cache import CacheLayout
from beringia.engine.operators import open_operators
from beringia.engine.operators.compiled import Compiled
from beringia.engine.operators.in_torch import InTorch
from beringia.engine.places import Places
from beringia.errors import InputError
from beringia.model import preset
from beringia.model.experts import Router

UNIT = 2.0**-24
"""Relative error of one float32 rounding."""

FORMATS = st.sampled_from([torch.float32, torch.bfloat16])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def within(found: torch.Tensor, exact: torch.Tensor, size: torch.Tensor | float, steps: int) -> None:
    """A sum of `steps` terms is off by at most steps * UNIT times the sum of their sizes (Higham 2002, section 3.1)."""
    assert bool(((found.double() - exact).abs() <= 2 * steps * UNIT * size + 1e-30).all())


def exactly(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As a product reads it: rounded to its weights' format."""
    return x.to(dtype).double()


@settings(max_examples=60)
@given(st.integers(1, 21), st.integers(1, 70), st.integers(1, 90), FORMATS, st.booleans(), st.booleans())
def test_a_product_is_float64_s_to_rounding_and_each_row_has_the_bits_it_has_alone(
    rows: int, k: int, n: int, dtype: torch.dtype, biased: bool, added: bool
) -> None:
    operators = Compiled()
    x, matrix, before = drawn(rows, k), drawn(n, k, seed=1).to(dtype), drawn(rows, n, seed=2)
    weight = operators.weight(matrix)
    bias = drawn(n, seed=3) if biased else None
    assert torch.equal(operators.plain(weight), matrix)

    def of(x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return operators.linear(x, weight, bias, before.clone() if added else None)

    found = of(x, before)
    more = [term.double() for term in ((before,) if added else ()) + (() if bias is None else (bias,))]
    exact = exactly(x, dtype) @ matrix.double().T + sum(more)
    size = exactly(x, dtype).abs() @ matrix.double().abs().T + sum(term.abs() for term in more)
    within(found, exact, size, k + 2)
    for row in range(rows):
        assert torch.equal(of(x[row : row + 1], before[row : row + 1])[0], found[row])


def test_products_on_all_threads_from_two_callers_at_a_time_are_those_of_one() -> None:
    """Hundreds of jobs of many tasks: one that is lost, not waited for or done with another's operands shows."""
    torch.set_num_threads(2)  # from now on the operators of this process have as many
    operators = Compiled()
    x, weight = drawn(8, 1024), operators.weight(drawn(4096, 1024, seed=1))
    alone = torch.cat([operators.linear(x[row : row + 1, :], weight) for row in range(8)])
    wrong = 0

    def multiply(rows: int) -> None:
        nonlocal wrong
        for number in range(300):
            sign = (-1) ** number  # so that what an earlier job left in the same memory is wrong
            wrong += not torch.equal(operators.linear(sign * x[:rows], weight), sign * alone[:rows])

    callers = [threading.Thread(target=multiply, args=(rows,)) for rows in (8, 3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == 0


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), FORMATS)
def test_heads_are_multiplied_each_with_its_own_matrix(
    rows: int, heads: int, k: int, n: int, dtype: torch.dtype
) -> None:
    operators = Compiled()
    x, matrix = drawn(rows, heads, k + 3)[..., :k], drawn(heads, n, k, seed=1).to(dtype)
    out = torch.zeros(rows, heads, n + 2)
    operators.by_head(x, operators.weight(matrix), out=out[..., :n])
    exact = torch.einsum("mhk,hnk->mhn", exactly(x, dtype), matrix.double())
    size = torch.einsum("mhk,hnk->mhn", exactly(x, dtype).abs(), matrix.double().abs())
    within(out[..., :n], exact, size, k)
    assert not out[..., n:].any(), "nothing is written beside it"


@given(st.integers(1, 40), st.integers(1, 40), FORMATS)
def test_a_token_is_embedded_as_its_row(n: int, k: int, dtype: torch.dtype) -> None:
    operators = Compiled()
    matrix, tokens = drawn(n, k).to(dtype), torch.arange(n).flip(0)
    assert torch.equal(operators.embed(operators.weight(matrix), tokens), matrix.float().flip(0))


def test_other_weights_are_read_from_the_same_memory() -> None:
    operators = Compiled()
    weight = operators.weight(drawn(20, 7).to(torch.bfloat16))
    address = weight.data.data_ptr()
    operators.replace(weight, drawn(20, 7, seed=1).to(torch.bfloat16))
    assert torch.equal(operators.plain(weight), drawn(20, 7, seed=1).to(torch.bfloat16))
    assert weight.data.data_ptr() == address
    assert torch.equal(operators.embed(weight, torch.tensor([19, 0])), operators.plain(weight)[[19, 0]].float())


def test_functions_are_float64_s_within_a_few_units_of_the_last_place_over_the_whole_range() -> None:
    """e^x within 2 units, and an addition, a division and two products, each half a unit: 5 units of 2^-24 * 2."""
    operators = Compiled()
    x = torch.cat((torch.linspace(-87, 87, 100_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, -200.0, 200.0])))
    gated = operators.gate(torch.stack((x, torch.ones_like(x)), dim=1).repeat(1, 1))[:, 0]
    exact = x.double() * x.double().sigmoid()
    # Below -87 the exponential stays at its end: x e^-87 instead of x e^x, both smaller than 1e-35.
    assert bool(((gated.double() - exact).abs() <= 10 * UNIT * exact.abs() + 1e-35).all())
    assert torch.isfinite(gated).all()


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 50))
def test_norms_are_float64_s(rows: int, count: int, width: int) -> None:
    x, weight = drawn(rows, count, width), drawn(width, seed=1)
    found = Compiled().norm(x, weight, 1e-6)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    within(found, exact, exact.abs(), width + 4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 4)), min_size=1, max_size=5),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([(1, 4, 24, 10), (1, 9, 32, 16), (2, 3, 16, 16), (3, 1, 5, 5)]),
    FORMATS,
    st.integers(0, 1),
)
def test_attention_over_blocks_is_float64_s(
    sequences: list[tuple[int, int]],
    block_tokens: int,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    start: int,
) -> None:
    """Sequences of any length, the last rows of each; one group whose values are the keys' first part, or several."""
    groups, heads, key_width, value_width = sizes
    sequences = [(length + start, min(new, length)) for length, new in sequences]
    shared = groups == 1
    width = key_width if shared else 2 * groups * key_width
    layout = CacheLayout(
        groups, key_width, value_width, 0 if shared else key_width, 0 if shared else groups * key_width
    )
    lengths = [length for length, _ in sequences]
    most = -(-max(lengths) // block_tokens)
    order = torch.randperm(len(sequences) * most, generator=torch.Generator().manual_seed(5))
    table = order.view(len(sequences), most)
    cache = drawn(len(order), block_tokens, width, seed=6).to(dtype)
    rows = [(number, at) for number, (length, new) in enumerate(sequences) for at in range(length - new, length)]
    q = drawn(len(rows), groups * heads, key_width, seed=7)
    places = Places(
        tuple((length - new, length) for length, new in sequences),
        block_tokens,
        token_M=torch.zeros(len(rows), dtype=torch.int64),
        position_M=torch.tensor([at for _, at in rows]),
        slot_M=torch.zeros(len(rows), dtype=torch.int64),
        sequence_M=torch.tensor([number for number, _ in rows]),
        table_CB=table,
    )
    found = Compiled().attend(q, cache, layout, places, 0.3, start)
    for row, (number, at) in enumerate(rows):
        tokens = cache[table[number]].flatten(0, 1)[start : at + 1].double()
        for head in range(groups * heads):
            first = head // heads * layout.group_step
            k = tokens[:, first : first + key_width]
            v = tokens[:, layout.value_start + first :][:, :value_width]
            p = (k @ (q[row, head].double() * 0.3)).softmax(0)
            within(found[row, head], p @ v, (p @ v.abs()) + 1.0, key_width + len(tokens) + 16)
    plain = InTorch().attend(q, cache.float(), layout, places, 0.3, start)
    assert torch.allclose(plain, found, atol=1e-5, rtol=1e-4), "torch's own is the same function"


@settings(max_examples=25)
@given(st.integers(1, 40), FORMATS, st.integers(0, 9))
def test_tokens_go_through_their_own_experts(rows: int, dtype: torch.dtype, seed: int) -> None:
    config = preset("r2-nano")
    router, operators = Router(config), Compiled()
    hidden, width, count = 20, 12, config.n_routed_experts
    x, bias = drawn(rows, hidden, seed=seed), drawn(count, seed=1) * 0.1
    gate_up, down = drawn(count, 2 * width, hidden, seed=2).to(dtype), drawn(count, hidden, width, seed=3).to(dtype)
    router_weight = drawn(count, hidden, seed=4) * 0.2
    chosen, weights = operators.route(x, operators.weight(router_weight), bias, router)
    scores = (x.double() @ router_weight.double().T).sigmoid()
    assert torch.allclose(weights.double(), router.weigh(scores, chosen), atol=1e-6)
    assert torch.equal(chosen, router.choose(scores, bias.double()))
    found = operators.experts(x, chosen, weights, operators.weight(gate_up), operators.weight(down))
    for row in range(rows):
        exact = torch.zeros(hidden, dtype=torch.float64)
        for expert, share in zip(chosen[row].tolist(), weights[row].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ exactly(x[row], dtype)).chunk(2)
            gated = (gate * gate.sigmoid() * up * share).float()
            exact += down[expert].double() @ exactly(gated, dtype)
        # A gated number next to a rounding boundary may round the other way: one step of the format, times a weight.
        step = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(found[row].double(), exact, atol=step * 12, rtol=step)


def test_what_they_cannot_do_is_said() -> None:
    chip = open_chip("cpu")
    assert open_operators(None, chip, torch.float16).name == "torch"
    with pytest.raises(InputError, match="float32 and bfloat16"):
        open_operators("compiled", chip, torch.float16)
    with pytest.raises(InputError, match="'torch' or 'compiled'"):
        open_operators("fast", chip, torch.float32)
    chip.close()
