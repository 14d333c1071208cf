"""NaN and infinities in a model's weights are seen: in the logits wherever the decoder has them, and by who asks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch

import beringia
from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.engine import Completion, Engine, EngineLimits, Sampling
from beringia.engine.places import Places
from beringia.model import Decoder
from beringia.model.experts import MixtureOfExperts

PROMPT = [(7 * place + 3) % 54 for place in range(40)]
KINDS = pytest.mark.parametrize("operators", ["compiled", "torch"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(scope="module")
def cpu() -> Iterator[Chip]:
    chip = open_chip("cpu")
    yield chip
    chip.close()


@pytest.fixture(scope="module")
def micro() -> Decoder:
    return beringia.load("r2-micro")


def router(model: Decoder) -> torch.Tensor:
    return next(layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MixtureOfExperts)).gate.weight


def damaged(model: Decoder, damage: Callable[[Decoder], None]) -> Decoder:
    model = copy.deepcopy(model)
    with torch.no_grad():
        damage(model)
    return model


def a_nan_in_one_router_weight(model: Decoder) -> None:
    router(model)[3, 5] = math.nan


def an_infinite_row_of_the_head(model: Decoder) -> None:
    model.lm_head.weight[PROMPT[2]] = math.inf


def an_infinite_weight_of_a_query(model: Decoder) -> None:
    next(weight for name, weight in model.named_parameters() if "layers.1" in name and "q_b_proj" in name)[1, 2] = (
        math.inf
    )


def an_infinite_weight_of_the_latent(model: Decoder) -> None:
    next(weight for name, weight in model.named_parameters() if "kv_a_proj" in name)[3, 1] = -math.inf


def logits_of(engine: Engine, prompt: list[int]) -> torch.Tensor:
    """Of every token, as the forward pass gives them."""
    seen: list[torch.Tensor] = []
    forward = engine._forward

    def watched(places: Places, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_RV, hidden_MD = forward(places, wanted)
        seen.append(logits_RV)
        return logits_RV, hidden_MD

    engine._forward = watched  # type: ignore[assignment]
    engine.generate([prompt], Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    engine._forward = forward
    return torch.cat(seen)


@KINDS
@DTYPES
@pytest.mark.parametrize(
    "damage",
    [
        a_nan_in_one_router_weight,
        an_infinite_row_of_the_head,
        an_infinite_weight_of_a_query,
        an_infinite_weight_of_the_latent,
    ],
)
def test_logits_are_nan_exactly_where_the_decoder_s_are(
    micro: Decoder, cpu: Chip, operators: str, dtype: torch.dtype, damage: Callable[[Decoder], None]
) -> None:
    model = damaged(micro, damage)
    with torch.no_grad():
        plain_TV = model(torch.tensor([PROMPT]))[0]
    found_TV = logits_of(Engine(model, cpu, operators=operators, dtype=dtype), PROMPT)
    assert found_TV.shape == plain_TV.shape
    assert bool(plain_TV.isnan().any())
    assert torch.equal(found_TV.isnan(), plain_TV.isnan())


@KINDS
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=4, temperature=0.0),
        Sampling(max_tokens=4, temperature=0.7, seed=1),
        Sampling(max_tokens=4, temperature=1.0, seed=1, top_k=3, top_p=0.9, min_p=0.01),
        Sampling(max_tokens=4, temperature=0.0, logit_bias={1: 5.0}, logprobs=2),
        Sampling(max_tokens=4, temperature=0.0, prompt_logprobs=0),
    ],
    ids=["greedy", "drawn", "filtered", "biased", "scored"],
)
@pytest.mark.parametrize("damage", [a_nan_in_one_router_weight, an_infinite_row_of_the_head])
def test_no_token_is_chosen_from_logits_that_are_not_finite(
    micro: Decoder, cpu: Chip, operators: str, sampling: Sampling, damage: Callable[[Decoder], None]
) -> None:
    engine = Engine(damaged(micro, damage), cpu, operators=operators, dtype=torch.float32)
    (found,) = engine.generate([PROMPT], sampling)
    assert found.finish == "error" and found.tokens == () and found.prompt_logprobs == ()
    place = 1 if sampling.prompt_logprobs is not None else len(PROMPT)
    assert found.error is not None and found.error.startswith(f"The logits for token {place} are NaN or infinite")
    assert not engine.busy and engine.cache_use == 0


def test_plus_infinity_is_not_chosen_either(micro: Decoder, cpu: Chip) -> None:
    def one_infinite_weight(model: Decoder) -> None:
        model.lm_head.weight[5, 7] = math.inf

    engine = Engine(damaged(micro, one_infinite_weight), cpu, dtype=torch.float32)
    found = [engine.generate([PROMPT[:length]], Sampling(max_tokens=1, temperature=0.0))[0] for length in range(1, 40)]
    assert {one.finish for one in found} == {"length", "error"}, (
        "plus infinity at some places, minus infinity at others"
    )
    assert all(5 not in one.tokens for one in found)


@KINDS
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_what_a_request_left_in_the_cache_does_not_reach_the_next(
    micro: Decoder, cpu: Chip, operators: str, batch_invariant: bool
) -> None:
    """The same blocks: first full of NaN, then with sound weights, beside a request that goes on for longer."""

    def generated(engine: Engine) -> list[Completion]:
        asked = [Sampling(max_tokens=many, temperature=0.0, logprobs=0) for many in (12, 3)]
        return engine.generate([PROMPT[:5], PROMPT[:21]], asked)

    limits = EngineLimits(cache_bytes=1 << 19, block_tokens=16)
    options = {"operators": operators, "dtype": torch.float32, "limits": limits, "batch_invariant": batch_invariant}
    wanted = generated(Engine(micro, cpu, **options))
    engine = Engine(damaged(micro, a_nan_in_one_router_weight), cpu, **options)
    assert [one.finish for one in generated(engine)] == ["error", "error"]
    for layer in engine._cache.layers:
        layer.fill_(math.nan)  # all that faulty steps can leave
    engine.load_weights(micro)
    assert generated(engine) == wanted
