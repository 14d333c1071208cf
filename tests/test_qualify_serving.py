"""What is served and trained beside plain batches: the same numbers as one pass gives, and faults that only this
shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONFIGS, SmallSubject, opened
from torch._ops import OpOverload
from torch.nn import functional as F

from beringia.chips.emulated import device
from beringia.model import IGNORED, KeyValueCache, attention
from beringia.model.cache import LayerCache
from beringia.model.decoder import Decoder
from beringia.qualify.effects import RoundingNoise, judge_trace
from beringia.qualify.engine_serving import _requests
from beringia.qualify.recording import Recorder
from beringia.qualify.rounding_draw import RoundingDraw
from beringia.qualify.serving import BATCHES, BLOCK_TOKENS, LEAST, LONG_QUICK, SEQUENCES, scenarios, servings, untried
from beringia.qualify.trace import ChosenRoutes, Trace, TraceExtent, Tracer
from beringia.qualify.unlike_batches import micro_batches
from beringia.records.certificate import ProbeResult

PLAN = TraceExtent(batches=2, steps=1)
CPU = torch.device("cpu")


def row(number: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 61, (count,), generator=generator).tolist()


# ---- the same numbers, however they are served


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("whole", [False, True])
def test_calls_through_the_cache_give_what_one_pass_gives(family: str, whole: bool) -> None:
    subject = SmallSubject(family)
    model = subject.place(subject.build(), CPU, torch.float64)
    for serving in servings(row, 90, False, whole=whole):
        with torch.no_grad():
            at_once, routes = subject.serve_at_once(model, serving, None)
            by_calls = subject.serve(model, serving, routes)
        assert by_calls.keys() == at_once.keys()
        for scenario, logits_CV in by_calls.items():
            torch.testing.assert_close(logits_CV, at_once[scenario], rtol=1e-9, atol=1e-9)


def test_the_engine_takes_each_layers_experts_in_whatever_order_a_bundle_has_the_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CONFIGS, "deep", replace(CONFIGS["deepseek_v3"], num_hidden_layers=12))
    subject = SmallSubject("deep")
    model = subject.place(subject.build(), CPU, torch.float64)
    serving = next(one for one in servings(row, 64, False, whole=False) if one.by_engine)
    with torch.no_grad():
        at_once, routes = subject.serve_at_once(model, serving, None)
        by_calls = subject.serve(model, serving, dict(sorted(routes.items())))
    for scenario, logits_CV in by_calls.items():
        torch.testing.assert_close(logits_CV, at_once[scenario], rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(1, 5))
def test_a_cache_is_taken_row_by_row_up_to_a_length(rows: list[int], length: int) -> None:
    cache = KeyValueCache(2)
    for layer in cache.layers:
        layer.extend(torch.randn(4, 2, 5, 3), torch.randn(4, 2, 5, 3))
    taken = cache.taken(rows, length)
    assert taken.length == length and cache.length == 5
    for layer, source in zip(taken.layers, cache.layers, strict=True):
        assert layer.first is not None and source.first is not None
        for place, one in enumerate(rows):
            assert torch.equal(layer.first[place], source.first[one, :, :length])


# ---- what is tried


def test_every_batch_every_context_and_every_way_of_a_prompt_is_tried() -> None:
    made = servings(row, 4096, False, whole=False)
    named = scenarios(made)
    steps = [step for serving in made for step in serving.steps]
    assert {len(step.rows) for step in steps if step.end - step.start == 1} >= set(BATCHES)
    assert max(step.end for step in steps) == LONG_QUICK > 512
    for words in ("whole", "in pieces", "shared beginning", "padding", "another request has finished", "many steps"):
        assert any(words in name for name in named), words
    watched = {len(step.rows) for step in steps if step.watched and step.end - step.start == 1}
    assert watched == set(BATCHES), "each batch's operators are held against float64"


def test_all_of_it_is_every_batch_at_every_context() -> None:
    made = servings(row, 300, False, whole=True)
    tried = {
        (len(step.rows), step.start)
        for serving in made
        for step in serving.steps
        if "all batches" in step.scenario and step.start in (48, 100, 297)
    }
    assert tried == {(batch, context) for batch in BATCHES for context in (48, 100, 297)}


@settings(deadline=None)
@given(st.integers(1, 5000), st.booleans(), st.booleans())
def test_no_sequence_is_longer_than_the_model_takes_and_what_was_left_out_is_said(
    context: int, large: bool, whole: bool
) -> None:
    made = servings(row, context, large, whole=whole)
    tried = max((serving.tokens_RT.shape[1] for serving in made), default=0)
    assert tried <= context and (made or context < LEAST)
    for serving in made:
        for step in serving.steps:
            places_C, positions_C = serving.compared(step)
            assert len(places_C) and int(positions_C.min()) >= step.start and int(positions_C.max()) < step.end
    told = " ".join(untried(context, large, whole=whole))
    assert ("contexts beyond" in told) == (0 < tried < context)
    assert ("at every context" in told) == (not whole and tried > 0) and told


def test_nothing_of_the_padding_is_compared() -> None:
    padded = next(serving for serving in servings(row, 400, False, whole=False) if len(set(serving.lengths)) > 1)
    (step,) = padded.steps
    places_C, positions_C = padded.compared(step)
    assert all(
        position < padded.lengths[place]
        for place, position in zip(places_C.tolist(), positions_C.tolist(), strict=True)
    )
    assert len(padded.lengths) == SEQUENCES and len(set(padded.lengths)) == SEQUENCES


def test_a_step_is_trained_on_unlike_batches_with_ignored_targets() -> None:
    batches = micro_batches(row, 4096, False, None, whole=False)
    shapes = [tuple(batch["labels"].shape) for batch in batches]
    assert len(set(shapes)) == len(shapes) and max(tokens for _, tokens in shapes) > 512
    counts = [int((batch["labels"] != IGNORED).sum()) for batch in batches]
    assert all(0 < count < batch["labels"].numel() for count, batch in zip(counts, batches, strict=True))
    own = micro_batches(row, 4096, False, 24, whole=False)
    assert max(batch["labels"].shape[1] for batch in own) == 24, "the run's own length, where it is known"


def test_the_loss_over_unlike_batches_is_the_mean_over_all_their_targets() -> None:
    """Gradients that are added up batch by batch, against one loss over all targets at once."""
    subject = SmallSubject("llama")
    tracer = Tracer(subject, PLAN)
    exact, _ = tracer.in_float64()
    model = subject.place(subject.build(), CPU, torch.float64)
    batches = subject.micro_batches(whole=False)
    targets = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        logits = model(batch["tokens"])
        loss = loss + F.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
        )
    (loss / targets).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if parameter.numel() <= 1024:
            torch.testing.assert_close(
                exact.sketches[f"accumulated/{name}"], parameter.grad.flatten(), rtol=1e-9, atol=0
            )


# ---- faults that only serving shows


SUBJECT = SmallSubject("llama")


@pytest.fixture(scope="module")
def exact() -> tuple[Trace, ChosenRoutes]:
    return Tracer(SUBJECT, PLAN).in_float64()


@pytest.fixture(scope="module")
def noise(exact: tuple[Trace, ChosenRoutes]) -> RoundingNoise:
    draws = [traced(exact, change=RoundingDraw(seed, torch.bfloat16)) for seed in range(4)]
    return RoundingNoise.of(exact[0], traced(exact), draws)


def traced(exact: tuple[Trace, ChosenRoutes], chip_name: str = "cpu", **options: Any) -> Trace:
    with opened(chip_name) as chip:
        return Tracer(SUBJECT, PLAN).on_chip(chip, torch.bfloat16, exact[1], begin_step=lambda: None, **options)


def failed(results: list[ProbeResult]) -> set[str]:
    return {result.subject for result in results if result.outcome == "failed"}


@pytest.mark.parametrize("chip", ["cpu", "emulated:h800", "emulated:ascend-910b"])
def test_sound_chips_serve_rightly(chip: str, exact: tuple[Trace, ChosenRoutes], noise: RoundingNoise) -> None:
    assert not failed(judge_trace(noise, traced(exact, chip)))


def late_slot(self: LayerCache, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The newest values of a decoding step arrive one step late."""
    if self.first is not None and self.second is not None:
        late = self.second[:, :, -1:] if second.shape[2] == 1 else second
        first, second = torch.cat((self.first, first), 2), torch.cat((self.second, late), 2)
    self.first, self.second = first, second
    return first, second


def _attend(alter: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Attention with its mask (T S, True where seen) altered."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        new, old = q.shape[2], k.shape[2]
        mask = alter(torch.ones(new, old, dtype=torch.bool).tril(old - new))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    return attend


def _blind_past_256(mask: torch.Tensor) -> torch.Tensor:
    if mask.shape[0] == 1:
        mask[:, 256:-1] = False
    return mask


def _without_first_key(mask: torch.Tensor) -> torch.Tensor:
    if mask.shape[0] == 1:
        mask[:, 0] = False
    return mask


def _seeing_ahead_in_pieces(mask: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(mask) if 1 < mask.shape[0] < mask.shape[1] else mask


@pytest.mark.parametrize(
    ("where", "name", "wrong", "told"),
    [
        (LayerCache, "extend", late_slot, "decoding 1 at"),
        (attention, "attend", _attend(_blind_past_256), "decoding 1 at 597"),
        (attention, "attend", _attend(_without_first_key), "decoding 64 at 48"),
        (attention, "attend", _attend(_seeing_ahead_in_pieces), "in pieces"),
    ],
    ids=["a cache slot one step late", "blind past 256 keys", "without its first key", "no mask in pieces"],
)
def test_what_is_wrong_only_in_serving_rules_inference_out(
    where: Any,
    name: str,
    wrong: Any,
    told: str,
    exact: tuple[Trace, ChosenRoutes],
    noise: RoundingNoise,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(where, name, wrong)
    results = judge_trace(noise, traced(exact))
    found = failed(results)
    assert any(subject.startswith("serve") and told in subject for subject in found), found
    assert "outputs" not in found, "plain batches do not show it"
    assert all(result.rules_out == "infer" for result in results if result.subject.startswith("serve"))


def test_an_angle_that_is_wrong_past_300_tokens_rules_training_out(
    exact: tuple[Trace, ChosenRoutes], noise: RoundingNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Decoder.rope_at

    def wrong(self: Decoder, start: int, length: int, device: torch.device) -> Any:
        cos, sin = right(self, start, length, device)
        sin[max(0, 300 - start) :] *= 0.9
        return cos, sin

    monkeypatch.setattr(Decoder, "rope_at", wrong)
    found = failed(judge_trace(noise, traced(exact)))
    assert any(subject.startswith("accumulated") for subject in found) and not any(
        subject.startswith("gradient") for subject in found
    )


def wrong_for_one_row(func: OpOverload, kernel: device.Kernel) -> device.Kernel:
    """An interposer: products with a single row are a tenth too large."""
    if func is not torch.ops.aten.mm.default:
        return kernel

    def multiply(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = kernel(one, other)
        return product * 1.1 if one.shape[0] == 1 else product

    return multiply


def test_a_product_that_is_wrong_for_a_single_row_is_named_and_rules_inference_out(
    exact: tuple[Trace, ChosenRoutes], noise: RoundingNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened("emulated:h800") as chip:
        monkeypatch.setattr(device._state, "interposers", (*device._state.interposers, wrong_for_one_row))
        device._state.handlers.clear()
        recording = Recorder(SUBJECT, chip, torch.bfloat16).record(Tracer(SUBJECT, PLAN), exact[1])
    device._state.handlers.clear()
    wrong = [check for check in recording.checks if check.used > 1.0]
    assert {(check.operator, check.direction) for check in wrong} == {("aten.mm.default", "decode")}
    assert recording.trace is not None
    found = failed(judge_trace(noise, recording.trace))
    assert found and all(subject.startswith("serve decoding 1 at") for subject in found), found


def last_row_of_the_cache_is_not_written(func: OpOverload, kernel: device.Kernel) -> device.Kernel:
    """An interposer: of several rows that are copied to places by index, the last one is not."""
    if func is not torch.ops.aten.index_copy_.default:
        return kernel

    def copy(target: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        count = max(1, len(index) - 1)
        copied: torch.Tensor = kernel(target, dim, index[:count], source.narrow(dim, 0, count))
        return copied

    return copy


def test_what_is_wrong_only_in_the_engine_is_named_and_rules_inference_out(
    exact: tuple[Trace, ChosenRoutes], noise: RoundingNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened("emulated:h800") as chip:
        interposers = (*device._state.interposers, last_row_of_the_cache_is_not_written)
        monkeypatch.setattr(device._state, "interposers", interposers)
        device._state.handlers.clear()
        recording = Recorder(SUBJECT, chip, torch.bfloat16).record(Tracer(SUBJECT, PLAN), exact[1])
    device._state.handlers.clear()
    wrong = [check for check in recording.checks if check.used > 1.0]
    assert {(check.module, check.operator, check.direction) for check in wrong} == {
        ("the engine", "aten.index_copy_.default", "decode")
    }
    assert recording.trace is not None
    results = [result for result in judge_trace(noise, recording.trace) if result.outcome == "failed"]
    assert results and all(result.subject.startswith("serve in the engine, ") for result in results)
    assert {result.rules_out for result in results} == {"infer"}


def test_a_pass_of_the_engine_has_prompts_beside_requests_that_decode_and_equal_beginnings_once() -> None:
    serving = next(one for one in servings(row, 4096, False, whole=False) if one.by_engine)
    widths = [{step.end - step.start for step in steps} for steps in serving.passes]
    assert any(1 in one and len(one) > 1 for one in widths) and widths[-1] == {1}
    first, second, third = _requests(serving)
    assert set(first.table) & set(second.table) and not set(first.table) & set(third.table)
    starts = {step.rows: step.start for step in reversed(serving.steps)}
    assert starts == {(0,): 0, (1,): len(set(first.table) & set(second.table)) * BLOCK_TOKENS, (2,): 0}


def last_token_off_by_one(func: OpOverload, kernel: device.Kernel) -> device.Kernel:
    """An interposer: of sequences of more than 64 tokens the last looks a row too low."""
    if func is not torch.ops.aten.embedding.default:
        return kernel

    def embed(weight: torch.Tensor, index: torch.Tensor, *others: object) -> torch.Tensor:
        if index.shape[-1] > 64:
            index = index.clone()
            index[..., -1] = (index[..., -1] - 1).clamp(min=0)
        rows: torch.Tensor = kernel(weight, index, *others)
        return rows

    return embed


@pytest.mark.slow
def test_an_operator_that_is_wrong_only_in_long_prompts_is_named_once_they_fail(
    exact: tuple[Trace, ChosenRoutes], noise: RoundingNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracer = Tracer(SUBJECT, PLAN)
    with opened("emulated:h800") as chip:
        monkeypatch.setattr(device._state, "interposers", (*device._state.interposers, last_token_off_by_one))
        device._state.handlers.clear()
        recorder = Recorder(SUBJECT, chip, torch.bfloat16)
        recording = recorder.record(tracer, exact[1])
        assert recording.trace is not None and not any(check.used > 1.0 for check in recording.checks)
        subjects = [result.subject for result in judge_trace(noise, recording.trace) if result.outcome == "failed"]
        assert subjects[0] == "serve a prompt of 597 tokens whole"
        trained = ["accumulated model.layers.0"]
        wrong = [
            recorder.watch_where_it_failed(tracer, exact[1], failed, lambda check: check)
            for failed in (subjects, trained)
        ]
    device._state.handlers.clear()
    assert [{(check.operator, check.direction) for check in checks} for checks in wrong] == [
        {("aten.embedding.default", "decode")},
        {("aten.embedding.default", "forward")},
    ]
