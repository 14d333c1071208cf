"""Attention, router and sparsity do not know of each other: combinations that no family here has compute what others'
code computes, learn, and answer in the engine as in training."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from test_model_parity import assert_agreement, batch, distance, drawn

from beringia.chips.open import open_chip
from beringia.engine import Engine, EngineLimits, Sampling
from beringia.errors import ModelError
from beringia.model import (
    Decoder,
    DecoderConfig,
    forcing_routes,
    greedy,
    initialise,
    recording_routes,
    update_router_biases,
)
from beringia.model.families import FAMILIES
from beringia.model.hugging_face_config import config_from_document, document_of

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
LATENT: dict[str, Any] = {
    "latent": True,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
ROUTED: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "first_k_dense_replace": 1}

DECODERS = {
    "latent, dense": DecoderConfig(**SIZES, **LATENT),
    "latent, softmax router": DecoderConfig(**SIZES, **LATENT, **ROUTED, router="softmax", n_shared_experts=0),
    "grouped, sigmoid router": DecoderConfig(**SIZES, **GROUPED, **ROUTED, **GROUPS),
    "grouped, sigmoid router, norms, biases": DecoderConfig(
        **SIZES, **GROUPED, **ROUTED, **GROUPS, qk_norm=True, attention_bias=True, mlp_bias=True, n_shared_experts=2
    ),
    "grouped, softmax router, shared": DecoderConfig(
        **SIZES, **GROUPED, **ROUTED, router="softmax", output_bias=True, norm_topk_prob=False
    ),
    "grouped, sigmoid router, no shared": DecoderConfig(**SIZES, **GROUPED, **ROUTED, n_shared_experts=0),
}
DRAFTING = {name: replace(config, num_nextn_predict_layers=1) for name, config in DECODERS.items()}


def built(config: DecoderConfig, seed: int = 0) -> Decoder:
    """With weights that exercise every term: norms not one, biases not zero."""
    decoder = Decoder(config)
    initialise(decoder, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.copy_(name.endswith("norm.weight") + 0.1 * torch.randn(tensor.shape, generator=generator))
    return decoder


def loss_of(decoder: Decoder) -> torch.Tensor:
    tokens, labels = batch()
    losses = decoder(tokens, labels)
    main: torch.Tensor = losses.main_sum / losses.target_count
    return main + losses.mtp_sum / losses.mtp_count


def routes_of(decoder: Decoder) -> list[torch.Tensor | None]:
    """Which experts each layer chooses for the batch."""
    with ExitStack() as recording:
        for layer in decoder.model.layers:
            recording.enter_context(recording_routes(layer))
        loss_of(decoder)
    return [getattr(layer.mlp, "chosen", None) for layer in decoder.model.layers]


FLOAT32_AGREEMENT = 100 * 2.0**-24
"""Relative error of a gradient in float32: unit roundoff times 100, which stands for some thirty dependent sums of
about as many terms, whose roundings partly cancel; what is forgotten in a backward pass is off by 0.1 and more."""


@pytest.mark.parametrize("name", DRAFTING)
def test_a_training_step_s_gradients_are_those_of_float64_and_lower_the_loss(name: str) -> None:
    decoder = built(DRAFTING[name])
    exact = copy.deepcopy(decoder).double()
    exact.set_compute_dtype(torch.float64)
    with ExitStack() as forcing:
        for layer, routes in zip(exact.model.layers, routes_of(decoder), strict=True):
            forcing.enter_context(forcing_routes(layer, routes))
        loss_of(exact).backward()
    before = loss_of(decoder)
    before.backward()
    for (place, found), wanted in zip(decoder.named_parameters(), exact.parameters(), strict=True):
        assert wanted.grad is not None and found.grad is not None, place
        assert distance(found.grad.double(), wanted.grad) <= FLOAT32_AGREEMENT, place

    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.step()
        update_router_biases(decoder, decoder.expert_counts(), 1e-3)
        optimizer.zero_grad()
        after = loss_of(decoder)
        after.backward()
    assert float(after.detach()) < 0.9 * float(before.detach())


def test_grouped_queries_with_sigmoid_routers_compute_what_dots1_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family of transformers that has no statement here: its flags are enough."""
    theirs = drawn(
        "dots1",
        {
            **SIZES,
            **GROUPED,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "n_shared_experts": 2,
            **GROUPS,
            "norm_topk_prob": True,
            "attention_bias": True,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        seed=1,
    )
    config = DecoderConfig(
        **SIZES, **GROUPED, **ROUTED, **GROUPS, n_shared_experts=2, qk_norm=True, attention_bias=True, output_bias=True
    )
    ours = Decoder(config)
    ours.load_state_dict(theirs.state_dict())
    assert_agreement(ours, theirs, "dots1", monkeypatch)


@pytest.mark.parametrize(("use", "operators"), [("cpu", "compiled"), ("cpu", "torch"), ("emulated:h800", "torch")])
@pytest.mark.parametrize("name", DRAFTING)
def test_the_engine_answers_with_the_decoder_s_tokens_and_log_probabilities(
    name: str, use: str, operators: str
) -> None:
    """In float32 a logit's error is below 6e-5 (as in `test_engine.py`); a wrong route is off by 0.1 and more."""
    decoder, chip = built(DRAFTING[name], seed=2).eval(), open_chip(use)
    limits = EngineLimits(cache_bytes=1 << 18, block_tokens=4, step_tokens=24, sequences=5)
    engine = Engine(decoder, chip, dtype=torch.float32, operators=operators, limits=limits, speculate=True)
    asked = [[3, 1, 4, 1, 5], [9, 2], list(range(30))]
    for prompt, found in zip(
        asked,
        engine.generate(asked, Sampling(max_tokens=12, temperature=0.0, ignore_end=True, logprobs=0)),
        strict=True,
    ):
        tokens = greedy(decoder, prompt, 12, None)
        assert list(found.tokens) == tokens
        with torch.no_grad():
            logprobs_TV = decoder.logits(torch.tensor([[*prompt, *tokens]]))[0].log_softmax(-1)
        wanted = [float(logprobs_TV[len(prompt) - 1 + place, token]) for place, token in enumerate(tokens)]
        assert [one.chosen for one in found.logprobs] == pytest.approx(wanted, abs=1e-4)
    chip.close()


@pytest.mark.parametrize("operators", ["compiled", "torch"])
@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_a_request_s_bits_do_not_depend_on_the_others_with_either_router(router: str, operators: str) -> None:
    config = replace(DECODERS["grouped, softmax router, shared"], router=router)
    decoder, chip = built(config).eval(), open_chip("cpu")
    sampling = Sampling(max_tokens=6, temperature=0.0, ignore_end=True, logprobs=0)

    def answers(asked: list[list[int]]) -> list[tuple[tuple[int, ...], list[float]]]:
        limits = EngineLimits(cache_bytes=1 << 18, block_tokens=4, step_tokens=24, sequences=5)
        engine = Engine(decoder, chip, dtype=torch.float32, operators=operators, limits=limits, batch_invariant=True)
        found = engine.generate(asked, sampling)
        return [(one.tokens, [each.chosen for each in one.logprobs]) for one in found]

    asked = [[3, 1, 4, 1, 5], [9, 2], list(range(30)), [7]]
    assert answers(asked) == [answers([prompt])[0] for prompt in asked]
    chip.close()


def test_softmax_routers_choose_by_shares_and_have_no_bias() -> None:
    decoder = built(DECODERS["latent, softmax router"])
    gate = decoder.layers[0].mlp.gate
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    shares = (x.double() @ gate.weight.double().T).softmax(-1)
    chosen = gate.choose(gate.scores(x), None)
    assert torch.equal(chosen, shares.topk(2).indices)
    picked = shares.gather(1, chosen)
    torch.testing.assert_close(
        gate.weigh(gate.scores(x), chosen).double(), picked / picked.sum(1, True), rtol=1e-5, atol=0
    )
    assert not [name for name in decoder.state_dict() if "bias" in name or "shared" in name]


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_that_no_family_has_is_not_written_as_another(name: str) -> None:
    with pytest.raises(ModelError, match="No family has this decoder"):
        document_of(DECODERS[name])


def test_what_a_config_json_cannot_say_is_named() -> None:
    with pytest.raises(ModelError, match="llama, the closest, cannot say qk_norm = True"):
        document_of(DecoderConfig(**SIZES, **GROUPED, qk_norm=True, mlp_bias=True))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_family_states_fields_that_decoders_have_and_is_read_back_from_what_is_written(family: Any) -> None:
    known = {field.name for field in fields(DecoderConfig)}
    assert {*family.flags, *family.keys.values()} <= known
    sizes = LATENT if family.flags.get("latent") else GROUPED
    routing = ROUTED if "n_routed_experts" in family.keys.values() else {}
    config = DecoderConfig(**SIZES, **{**sizes, **routing, **family.flags})
    document = document_of(config)
    assert document["model_type"] == family.model_type
    assert document["architectures"] == [family.architecture]
    assert config_from_document(document) == config


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({**GROUPED, "num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({**LATENT, "num_key_value_heads": 2}, "as many key as query heads"),
        ({**LATENT, "head_dim": 6}, "rotates qk_rope_head_dim"),
        ({**LATENT, "qk_norm": True}, "qk_norm"),
        ({**GROUPED, **ROUTED, "n_group": 3}, "3 equal groups"),
        ({**GROUPED, **ROUTED, "num_experts_per_tok": 9}, "do not fit"),
        ({**GROUPED, "num_nextn_predict_layers": 2}, "2 multi-token"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        DecoderConfig(**{**SIZES, **settings})
