"""Routed experts: who is chosen, with which weight, how loads are evened out, how a replay follows the same routes."""

import copy
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beringia.model import Decoder, forcing_routes, load_model, preset, recording_routes, update_router_biases
from beringia.model.experts import Experts, MixtureOfExperts, sort_by_expert


def sparse(seed: int = 0) -> tuple[MixtureOfExperts, Decoder]:
    decoder = load_model("r2-nano", seed=seed)
    mlp = decoder.layers[1].mlp
    assert isinstance(mlp, MixtureOfExperts)
    return mlp, decoder


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 54, shape, generator=torch.Generator().manual_seed(seed))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def one_by_one(experts: Experts, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sum over a token's experts, written as the paper writes it."""
    rows = []
    for row, its_experts, its_weights in zip(x, chosen, weights, strict=True):
        total = torch.zeros_like(row)
        for expert, weight in zip(its_experts.tolist(), its_weights, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ row).chunk(2)
            total = total + weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@given(
    num_rows=st.integers(1, 12),
    num_chosen=st.integers(1, 4),
    unit=st.sampled_from([1, 4, 32]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_no_token_is_dropped_however_uneven_the_loads(num_rows: int, num_chosen: int, unit: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = Experts(replace(preset("r2-nano"), hidden_size=6, moe_intermediate_size=4)).double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=generator)
    experts.unit = lambda *_: unit  # type: ignore[method-assign]
    x = torch.randn(num_rows, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    # Squared uniform numbers lean to the first experts; some get nothing, one may get everything.
    preference = torch.rand(num_rows, 8, generator=generator) ** 2 - torch.arange(8) * 0.1
    chosen = preference.topk(num_chosen).indices
    weights = torch.rand(num_rows, num_chosen, dtype=torch.float64, generator=generator, requires_grad=True)
    sought = [x, weights, *experts.parameters()]

    found, wanted = experts(x, chosen, weights), one_by_one(experts, x, chosen, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    pull = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(found, sought, pull), torch.autograd.grad(wanted, sought, pull), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@given(seed=st.integers(0, 10**6), num_rows=st.integers(1, 40), unit=st.sampled_from([1, 3, 32]))
@settings(max_examples=30, deadline=None)
def test_sorting_by_expert_keeps_every_assignment(seed: int, num_rows: int, unit: int) -> None:
    chosen = torch.rand(num_rows, 5, generator=torch.Generator().manual_seed(seed)).topk(2).indices
    row, place, places = sort_by_expert(chosen, 5, unit)
    assert torch.equal(row[place], torch.arange(num_rows).unsqueeze(1).expand(-1, 2))
    expert_of_place = torch.arange(5).repeat_interleave(torch.tensor(places))
    assert torch.equal(expert_of_place[place], chosen)
    assert len(place.unique()) == 2 * num_rows
    assert all(
        number % unit == 0 and number - load in range(unit)
        for number, load in zip(places, chosen.flatten().bincount(minlength=5).tolist(), strict=True)
    )


def test_rows_are_filled_up_in_short_formats_and_only_where_they_are_many() -> None:
    experts = Experts(preset("r2-nano"))  # 8 experts
    many, few = torch.zeros(256, 2, dtype=torch.int64), torch.zeros(255, 2, dtype=torch.int64)
    assert experts.unit(many, torch.bfloat16) == 64
    assert experts.unit(few, torch.bfloat16) == experts.unit(many, torch.float32) == 1


def test_the_correction_bias_moves_the_choice_but_not_the_weights() -> None:
    mlp, _ = sparse()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    scores = mlp.gate.scores(x)
    mlp.gate.e_score_correction_bias[6:] = 10.0  # both in the second of two groups
    chosen = mlp.gate.choose(scores, mlp.gate.e_score_correction_bias)
    assert torch.equal(chosen.sort().values, torch.tensor([[6, 7]]).expand(5, 2))
    unbiased = scores.gather(1, chosen)
    wanted = 2.5 * unbiased / unbiased.sum(-1, keepdim=True)
    torch.testing.assert_close(mlp.gate.weigh(scores, chosen), wanted)


def test_bias_update_is_the_papers() -> None:
    mlp, decoder = sparse()
    mlp.gate.e_score_correction_bias.copy_(torch.tensor([0.5, 0, 0, 0, 0, 0, 0, -0.5]))
    load = torch.tensor([9, 1, 4, 4, 4, 4, 4, 2])  # mean 4
    counts = {index: torch.zeros(8) for index in decoder.expert_counts()} | {1: load}
    update_router_biases(decoder, counts, 0.25)
    wanted = torch.tensor([0.25, 0.25, 0, 0, 0, 0, 0, -0.25])
    assert torch.equal(mlp.gate.e_score_correction_bias, wanted)
    assert torch.equal(decoder.layers[2].mlp.gate.e_score_correction_bias, torch.zeros(8))


def test_counts_add_up_over_passes_and_start_anew_after_an_update() -> None:
    mlp, decoder = sparse()
    batch = tokens(3, 10)
    with recording_routes(decoder.layers[1]):
        decoder(batch, batch)
        first = torch.bincount(mlp.chosen.flatten(), minlength=8)
        decoder(batch, batch)
    assert torch.equal(mlp.expert_counts, 2 * first)
    assert int(decoder.expert_counts()[3].sum()) == 2 * 3 * 9 * 2  # the multi-token layer: a position less, top 2
    decoder.eval()
    decoder(batch)
    assert torch.equal(mlp.expert_counts, 2 * first)
    update_router_biases(decoder, decoder.expert_counts(), 1e-3)
    assert int(mlp.expert_counts.sum()) == 0
    assert torch.equal(mlp.gate.e_score_correction_bias.sign(), (first.float().mean() - first).sign())


def test_updates_even_out_the_loads() -> None:
    mlp, decoder = sparse(seed=4)
    with torch.no_grad():
        mlp.gate.weight.mul_(0.02 / decoder.config.initializer_range)  # scores that so few updates can move past
    generator = torch.Generator().manual_seed(6)
    # What all rows share makes all of them prefer the same experts.
    x = torch.randn(1, 400, 64, generator=generator) + 1.5 * torch.randn(64, generator=generator)

    def unevenness() -> float:
        mlp(x)
        load = mlp.expert_counts.double()
        return float(load.max() / load.mean())

    before = unevenness()
    for _ in range(60):
        update_router_biases(decoder, decoder.expert_counts(), 2e-3)
        after = unevenness()
    assert before > 1.3
    assert after < 1.15


def test_a_layer_replayed_in_float64_follows_the_recorded_routes() -> None:
    _, decoder = sparse()
    layer, x = decoder.layers[1], torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(3))
    rope = decoder.rope(torch.arange(12))
    with recording_routes(layer):
        y = layer(x, rope)
    routes = layer.mlp.chosen
    twin = copy.deepcopy(layer).to(torch.float64)
    # A bias this large would send every token elsewhere, were the choice not forced.
    twin.mlp.gate.e_score_correction_bias[0] += 100
    with forcing_routes(twin, routes):
        y_64 = twin(x.double(), rope)
    assert y_64.dtype == torch.float64
    assert relative(y, y_64) < 1e-6
    assert relative(y, twin(x.double(), rope)) > 1e-3


def test_forcing_counts_nothing_and_ends_with_its_block() -> None:
    mlp, decoder = sparse()
    layer, x = decoder.layers[1], torch.randn(1, 4, 64)
    with forcing_routes(layer, torch.zeros(4, 2, dtype=torch.int64)):
        layer(x, decoder.rope(torch.arange(4)))
    assert int(mlp.expert_counts.sum()) == 0
    assert mlp.forced is None
    with recording_routes(decoder.layers[0]), forcing_routes(decoder.layers[0], None):
        pass  # a dense layer has no routes


def test_bfloat16_compute_keeps_the_router_in_float32() -> None:
    mlp, decoder = sparse()
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    wanted = (x.float() @ mlp.gate.weight.t()).sigmoid()
    assert mlp.gate.scores(x).dtype == torch.float32
    torch.testing.assert_close(mlp.gate.scores(x), wanted, rtol=1e-6, atol=0)
    decoder.set_compute_dtype(torch.bfloat16)
    logits = decoder(tokens(2, 9))
    assert logits.dtype == torch.float32
    decoder.set_compute_dtype(torch.float32)
    exact = decoder(tokens(2, 9))
    # bfloat16 has unit roundoff 2^-9; some ten roundings in a row on this shallow model.
    assert 2.0**-12 < relative(logits, exact) < 10 * 2.0**-9
