"""Sampling draws from the distribution that was asked for, and says how likely what it drew was."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from beringia.engine.sampling import GumbelNoise, Sampling, choose, logprobs_of
from beringia.errors import InputError

VOCAB = 8
DRAWS = 4000
FALSE_ALARM = 1e-6
"""Of the chi-square test, with fixed seeds: it either passes always or never."""


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def plain(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probabilities asked for, token by token, in float64."""
    scaled = [float(logit) / sampling.temperature for logit in logits_V]
    order = sorted(range(VOCAB), key=lambda token: -scaled[token])
    kept = order[: sampling.top_k or VOCAB]
    weights = {token: math.exp(scaled[token] - scaled[order[0]]) for token in kept}
    total = sum(weights.values())
    probabilities = torch.zeros(VOCAB, dtype=torch.float64)
    before = 0.0
    for token in kept:
        share = weights[token] / total
        if before < sampling.top_p and share >= sampling.min_p * weights[order[0]] / total:
            probabilities[token] = share
        before += share
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=3.0, top_k=3),
        Sampling(top_p=0.8),
        Sampling(min_p=0.1),
        Sampling(temperature=1.5, top_k=6, top_p=0.9, min_p=0.02),
    ],
    ids=str,
)
def test_draws_have_the_frequencies_of_the_softmax_that_was_asked_for(sampling: Sampling) -> None:
    row_V = logits(1)[0]
    noise = GumbelNoise(11, VOCAB)
    drawn = []
    for _ in range(DRAWS):
        drawn += choose(row_V.unsqueeze(0), [sampling], [noise], [0])
        noise.advance()
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB).double()
    expected = plain(row_V, sampling) * DRAWS
    allowed = expected > 0
    assert counts[~allowed].sum() == 0, "what is left out is never drawn"
    assert stats.chisquare(counts[allowed], expected[allowed]).pvalue > FALSE_ALARM


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5), st.floats(0.05, 1.0), st.floats(0.0, 1.0))
def test_filters_keep_the_same_tokens_whatever_the_other_rows_ask(
    seed: int, top_k: int, top_p: float, min_p: float
) -> None:
    rows_RV = logits(3, seed)
    asked = [Sampling(), Sampling(top_k=top_k, top_p=top_p, min_p=min_p, temperature=0.9), Sampling(temperature=0.0)]

    def draw(rows: list[int]) -> list[int]:
        noises = [GumbelNoise(row, VOCAB) for row in rows]
        return choose(rows_RV[rows], [asked[row] for row in rows], noises, [0] * len(rows))

    together = draw([0, 1, 2])
    assert together == [draw([row])[0] for row in range(3)]
    assert together[2] == int(rows_RV[2].argmax())
    assert plain(rows_RV[1], asked[1])[together[1]] > 0


def test_a_bias_moves_a_logit_and_leaves_the_log_probability_the_model_s_own() -> None:
    row_RV = logits(1)
    worst = int(row_RV.argmin())
    biased = Sampling(temperature=0.0, logit_bias={worst: 100.0})
    assert choose(row_RV, [biased], [GumbelNoise(0, VOCAB)], [0]) == [worst]
    (told,) = logprobs_of(row_RV, [worst], [2])
    wanted_V = row_RV[0].double().log_softmax(-1)
    assert told.chosen == pytest.approx(float(wanted_V[worst]), abs=1e-6) and told.rank == VOCAB - 1
    best = wanted_V.topk(2)
    assert [token for token, _ in told.top] == best.indices.tolist()
    assert [value for _, value in told.top] == pytest.approx(best.values.tolist(), abs=1e-6)


@settings(max_examples=20)
@given(st.integers(1, 20_000), st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_noise_is_the_same_for_a_seed_however_far_ahead_it_is_looked_at(vocab: int, looks: list[int]) -> None:
    noise, plain_noise, other = GumbelNoise(3, vocab), GumbelNoise(3, vocab), GumbelNoise(4, vocab)
    rows = []
    for _ in range(len(looks) + 2):
        rows.append(plain_noise.row().clone())
        plain_noise.advance()
    for place, ahead in enumerate(looks):
        assert torch.equal(noise.row(ahead), rows[place + ahead])
        assert not torch.equal(rows[place], rows[place + 1]) and not torch.equal(noise.row(), other.row())
        noise.advance()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", 2.0),
        ("max_tokens", 0),
        ("logprobs", -1),
        ("logit_bias", {3: math.nan}),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        Sampling(**{field: value})
