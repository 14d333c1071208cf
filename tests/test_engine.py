"""The engine answers what the decoder and transformers answer, whatever else is in its batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import CONFIGS, SmallSubject

from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.data.tokenizer import load_tokenizer
from beringia.engine import Completion, Engine, EngineLimits, Sampling
from beringia.errors import InputError
from beringia.model import Decoder, greedy, save_model

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_end=True, logprobs=0)
DIGITS = load_tokenizer("digits")
SMALL = EngineLimits(cache_bytes=1 << 18)
SAME_LOGPROB = 1e-4
"""Asked for in float32. A logit here is a sum of some hundred terms below 10: 100 * 10 * 2^-24 = 6e-5 at the worst,
measured 2e-6; a wrong position or a missing norm is off by 0.1 and more."""


@pytest.fixture
def cpu() -> Iterator[Chip]:
    chip = open_chip("cpu")
    yield chip
    chip.close()


def decoder(name: str, seed: int = 0) -> Decoder:
    model = SmallSubject(name, seed=seed).build()
    assert isinstance(model, Decoder)
    return model.eval()


def engine(model: Decoder, chip: Chip, **limits: int) -> Engine:
    small = {"cache_bytes": 1 << 18, "block_tokens": 4, "step_tokens": 24, "sequences": 5}
    return Engine(model, chip, dtype=torch.float32, limits=EngineLimits(**(small | limits)))


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randint(0, 61, (length,), generator=generator).tolist() for length in lengths]


def test_how_small_the_chunks_are_in_which_a_prompt_comes_changes_no_answer(cpu: Chip) -> None:
    """A step may take no time at all: beside an answer every chunk is the smallest."""
    model = decoder("llama")
    generator = torch.Generator().manual_seed(3)
    asked = [torch.randint(0, 61, (length,), generator=generator).tolist() for length in (70, 90, 100)]
    answers, steps = [], []
    for step_seconds in (None, 1e-9):
        limits = EngineLimits(cache_bytes=1 << 20, step_seconds=step_seconds)
        one = Engine(model, cpu, dtype=torch.float32, limits=limits)
        first = one.add(asked[0], GREEDY)
        one.step()
        rest = one.generate(asked[1:], GREEDY)
        answers.append([tuple(first.new_tokens), *(completion.tokens for completion in rest)])
        steps.append(one.num_steps)
    assert answers[0] == answers[1] and steps[0] == 13 < steps[1]


def teacher_forced(model: Decoder, prompt: list[int], new: tuple[int, ...]) -> list[float]:
    with torch.no_grad():
        logprobs_TV = model.logits(torch.tensor([[*prompt, *new]]))[0].log_softmax(-1)
    return [float(logprobs_TV[len(prompt) - 1 + place, token]) for place, token in enumerate(new)]


def chosen(completion: Completion) -> list[float]:
    return [one.chosen for one in completion.logprobs]


@pytest.mark.parametrize("use", ["cpu", "emulated:h800"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_text_and_log_probabilities_are_the_decoder_s(name: str, use: str) -> None:
    model, chip = decoder(name), open_chip(use)
    asked = prompts(9)
    for prompt, found in zip(asked, engine(model, chip).generate(asked, GREEDY), strict=True):
        assert list(found.tokens) == greedy(model, prompt, 12, None)
        assert chosen(found) == pytest.approx(teacher_forced(model, prompt, found.tokens), abs=SAME_LOGPROB)
        assert found.finish == "length"
    chip.close()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_text_and_log_probabilities_are_transformers_own(name: str, cpu: Chip, tmp_path: Path) -> None:
    model = decoder(name)
    save_model(model, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    asked = prompts(4)
    for prompt, found in zip(asked, engine(model, cpu).generate(asked, GREEDY), strict=True):
        tokens = torch.tensor([prompt])
        # No end token: the configuration has none.
        generated = theirs.generate(tokens, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(tokens))
        assert list(found.tokens) == generated[0, len(prompt) :].tolist()
        with torch.no_grad():
            logprobs_TV = theirs(generated).logits[0].log_softmax(-1)
        rows = range(len(prompt) - 1, generated.shape[1] - 1)
        wanted = [float(logprobs_TV[row, token]) for row, token in zip(rows, found.tokens, strict=True)]
        assert chosen(found) == pytest.approx(wanted, abs=SAME_LOGPROB)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_log_probabilities_of_a_prompt_are_given_for_all_its_tokens_but_the_first(name: str, cpu: Chip) -> None:
    model = decoder(name)
    asked = Sampling(max_tokens=2, temperature=0.0, prompt_logprobs=3)
    for prompt, found in zip(prompts(5), engine(model, cpu).generate(prompts(5), asked), strict=True):
        wanted = teacher_forced(model, prompt[:1], tuple(prompt[1:]))
        assert [one.chosen for one in found.prompt_logprobs] == pytest.approx(wanted, abs=SAME_LOGPROB)
        for one, token in zip(found.prompt_logprobs, prompt[1:], strict=True):
            assert len(one.top) == 3 and one.top[0][1] == max(value for _, value in one.top)
            assert (one.top[0][0] == token) == (one.rank == 0)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(1, 40),
    st.sampled_from([1, 3, 8]),
)
def test_whatever_else_runs_and_however_little_room_there_is_the_answer_is_the_same(
    cpu: Chip, asked: list[tuple[int, int]], sequences: int, step_tokens: int, block_tokens: int
) -> None:
    """Few blocks, so that sequences are sent back and computed again; equal beginnings, so that blocks are shared."""
    model = decoder("deepseek_v3")
    generator = torch.Generator().manual_seed(3)
    beginnings = [torch.randint(0, 61, (30,), generator=generator).tolist() for _ in range(4)]
    texts = [beginnings[which][:length] for which, length in asked]
    row_bytes = (16 + 8) * 4 * 2
    few = engine(
        model,
        cpu,
        cache_bytes=-(-44 // block_tokens) * block_tokens * row_bytes,
        sequences=sequences,
        step_tokens=max(step_tokens, sequences),
        block_tokens=block_tokens,
    )
    for text, found in zip(texts, few.generate(texts, GREEDY), strict=True):
        assert list(found.tokens) == greedy(model, text, 12, None)
    assert not few.busy and few.num_free_blocks == -(-44 // block_tokens), "every block came back"


def test_sequences_with_one_beginning_share_its_blocks_from_the_first_step_on(cpu: Chip) -> None:
    server = engine(decoder("llama"), cpu, step_tokens=64)
    question = prompts(1)[0][:1] * 17
    free = server.num_free_blocks
    for _ in range(4):
        server.add(question, GREEDY)
    server.step()
    # 17 tokens: four full blocks for all, and for each the block of the last token.
    assert free - server.num_free_blocks == 4 + 4


def test_a_request_draws_the_same_tokens_alone_and_in_any_company(cpu: Chip) -> None:
    model = decoder("qwen3")
    wanted = Sampling(max_tokens=20, temperature=1.0, seed=7, ignore_end=True)
    (alone,) = engine(model, cpu).generate([[5, 6, 7]], wanted)
    others = [Sampling(max_tokens=9, temperature=0.7, seed=seed) for seed in range(6)]
    crowd = engine(model, cpu).generate([*prompts(6), [5, 6, 7]], [*others, wanted])
    assert crowd[-1].tokens == alone.tokens
    assert engine(model, cpu).generate([[5, 6, 7]], Sampling(max_tokens=20, seed=8))[0].tokens != alone.tokens


def test_end_tokens_and_stop_tokens_end_a_request(cpu: Chip) -> None:
    model = decoder("llama")
    (free,) = engine(model, cpu).generate([[1, 2, 3]], GREEDY)
    stop = free.tokens[4]
    place = free.tokens.index(stop)
    asked = Sampling(max_tokens=12, temperature=0.0, stop_tokens=(stop,))
    (found,) = engine(model, cpu).generate([[1, 2, 3]], asked)
    assert found.tokens == free.tokens[: place + 1] and found.finish == "stop"


def test_a_tokenizer_s_end_token_ends_a_request_of_a_model_that_names_none(cpu: Chip) -> None:
    model = decoder("deepseek_v3")
    assert model.config.eos_token_id is None
    certain = Sampling(max_tokens=9, temperature=0.0, logit_bias={DIGITS.end: 100.0})
    (with_it,) = Engine(model, cpu, tokenizer=DIGITS, limits=SMALL).generate([[1, 2, 3]], certain)
    assert with_it.tokens == (DIGITS.end,) and with_it.finish == "stop"
    (without,) = Engine(model, cpu, limits=SMALL).generate([[1, 2, 3]], certain)
    assert without.tokens == (DIGITS.end,) * 9 and without.finish == "length"


@pytest.fixture
def reading(cpu: Chip) -> list[Engine]:
    """Without and with drafts, each with a tokenizer."""
    model = decoder("deepseek_v3")
    return [Engine(model, cpu, speculate=drafts, tokenizer=DIGITS, limits=SMALL) for drafts in (False, True)]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.integers(0, 50), st.integers(0, 30), st.integers(1, 6), st.booleans())
def test_a_stop_string_ends_a_request_at_the_token_that_completes_it(
    reading: list[Engine], seed: int, begin: int, length: int, speculate: bool
) -> None:
    free = Sampling(max_tokens=24, seed=seed, ignore_end=True)
    server = reading[speculate]
    (whole,) = server.generate([[1, 2, 3]], free)
    stop = DIGITS.decode(whole.tokens, skip_special_tokens=True)[begin:][:length]
    if not stop:
        return
    (found,) = server.generate([[1, 2, 3]], replace(free, stops=("never said", stop)))
    texts = [DIGITS.decode(whole.tokens[: end + 1], skip_special_tokens=True) for end in range(24)]
    last = next(end for end, text in enumerate(texts) if stop in text)
    assert found.tokens == whole.tokens[: last + 1] and found.finish == "stop"


def test_a_request_that_is_given_up_frees_its_place(cpu: Chip) -> None:
    server = engine(decoder("llama"), cpu, sequences=1)
    free = server.num_free_blocks
    first, second = server.add([1, 2, 3], GREEDY), server.add([4, 5], GREEDY)
    server.step()
    server.abort(first)
    assert server.step() == [second]
    server.abort(second)
    assert not server.busy and server.num_free_blocks == free


@pytest.mark.slow
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.booleans()), min_size=1, max_size=10),
    st.integers(1, 6),
    st.integers(8, 40),
    st.sampled_from([1, 3, 8]),
)
def test_with_drafts_every_answer_is_the_one_without_drafts(
    cpu: Chip, asked: list[tuple[int, int, bool]], sequences: int, step_tokens: int, block_tokens: int
) -> None:
    """Exact in distribution, and more: each draw is the same. Few blocks; equal beginnings; greedy and not."""
    model = decoder("deepseek_v3")
    generator = torch.Generator().manual_seed(3)
    beginnings = [torch.randint(0, 61, (30,), generator=generator).tolist() for _ in range(4)]
    texts = [beginnings[which][:length] for which, length, _ in asked]
    samplings = [
        Sampling(max_tokens=12, temperature=0.0 if greedily else 0.8, seed=seed, ignore_end=True, logprobs=1)
        for seed, (_, _, greedily) in enumerate(asked)
    ]
    row_bytes = (16 + 8) * 4 * 2
    engines = [
        Engine(
            model,
            cpu,
            speculate=speculate,
            limits=EngineLimits(
                cache_bytes=-(-44 // block_tokens) * block_tokens * row_bytes * (2 + speculate) // 2,
                sequences=sequences,
                step_tokens=step_tokens,
                block_tokens=block_tokens,
            ),
        )
        for speculate in (False, True)
    ]
    plain, drafting = (one.generate(texts, samplings) for one in engines)
    assert plain == drafting
    assert engines[1].num_drafted > 0 and engines[1].num_free_blocks == -(-44 // block_tokens)


INVARIANT = [
    ("cpu", "compiled", torch.float32),
    ("cpu", "compiled", torch.bfloat16),
    ("cpu", "torch", torch.float32),
    ("cpu", "torch", torch.bfloat16),
    ("emulated:h800", None, torch.bfloat16),
    ("emulated:mi300x", None, torch.float32),
    pytest.param("emulated:h800", None, torch.float32, marks=pytest.mark.slow),
    pytest.param("emulated:mi300x", None, torch.bfloat16, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("use", "operators", "dtype"), INVARIANT)
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3"])
def test_a_batch_invariant_engine_gives_the_same_bits_in_any_company(
    use: str, operators: str | None, name: str, dtype: torch.dtype
) -> None:
    """Alone, or with a random mix of others that come and go, with chunks cut elsewhere."""
    model, chip = decoder(name), open_chip(use)
    asked = Sampling(max_tokens=20, temperature=0.9, seed=5, ignore_end=True, logprobs=3, prompt_logprobs=1)
    question = prompts(1, seed=9)[0]

    def answer(others: list[list[int]], **limits: int) -> Completion:
        server = Engine(
            model,
            chip,
            dtype=dtype,
            operators=operators,
            batch_invariant=True,
            limits=EngineLimits(**({"cache_bytes": 1 << 18, "block_tokens": 4} | limits)),
        )
        assert server.batch_invariant
        lengths = [1 + number % 7 for number in range(len(others))]
        samplings = [Sampling(max_tokens=length, seed=length) for length in lengths]
        return server.generate([*others, question], [*samplings, asked])[-1]

    alone = answer([])
    tight = {"deepseek_v3": 1 << 14, "qwen3": 1 << 15}[name]  # some are sent back and computed again
    for mix, limits in (
        (3, {}),
        (17, {"step_tokens": 29}),
        (6, {"step_tokens": 11, "block_tokens": 8, "cache_bytes": tight}),
    ):
        assert answer(prompts(mix, seed=mix), **limits) == alone
    chip.close()


@pytest.mark.parametrize("use", ["cpu", "emulated:h800"])
def test_a_draft_is_what_the_multi_token_layer_predicts(use: str) -> None:
    model, chip = decoder("deepseek_v3"), open_chip(use)
    server = Engine(
        model, chip, dtype=torch.float32, speculate=True, limits=EngineLimits(cache_bytes=1 << 18, step_tokens=7)
    )
    requests = [server.add(prompt, GREEDY) for prompt in prompts(3)]
    compared = 0
    while server.busy:
        server.step()
        for request in requests:
            if request.draft:
                assert request.draft[0] == predicted(model, request.tokens)
                compared += 1
    assert compared > 15
    chip.close()


def predicted(model: Decoder, tokens: list[int]) -> int:
    """The token after `tokens`, by the multi-token layer: from the hidden states of all but the last, and the next."""
    assert model.mtp is not None
    with torch.no_grad():
        hidden_BTD = model._hidden(torch.tensor([tokens]), None)[:, :-1]
        next_BTD = model.model.embed_tokens(torch.tensor([tokens[1:]]))
        found_BTD = model.mtp.predict(hidden_BTD, next_BTD, model.rope(torch.arange(len(tokens) - 1)))
        return int(model._head(found_BTD)[0, -1].argmax())


def test_drafts_save_steps_where_the_multi_token_layer_is_right(cpu: Chip) -> None:
    """All weights but the embeddings are zero, so that trunk and draft both say the last token again."""
    model = decoder("deepseek_v3")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and "norm" not in name and "eh_proj" not in name:
                parameter.zero_()
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        assert model.mtp is not None
        model.mtp.eh_proj.weight.copy_(torch.cat((torch.eye(32), torch.zeros(32, 32)), dim=1))
    server = Engine(model, cpu, dtype=torch.float32, speculate=True)
    (found,) = server.generate([[7]], GREEDY)
    assert found.tokens == (7,) * 12
    # The prompt's step brings one token, each later one two, but the last one, which may not draft.
    assert server.num_steps == 7 and server.num_accepted == 5


def test_new_weights_are_used_at_once_and_told_by_their_hash(cpu: Chip) -> None:
    old, new = decoder("deepseek_v3"), decoder("deepseek_v3", seed=1)
    server = engine(old, cpu)
    assert server.weights_hash == engine(old, cpu).weights_hash
    server.generate([[1, 2, 3, 4, 5, 6, 7, 8, 9]], GREEDY)
    running = server.add([1, 2, 3], Sampling(max_tokens=5, temperature=0.0, ignore_end=True))
    server.step()
    (before,) = running.new_tokens
    assert server.load_weights(new) == engine(new, cpu).weights_hash != engine(old, cpu).weights_hash
    while server.busy:
        server.step()
    assert running.new_tokens == [before, *greedy(new, [1, 2, 3, before], 4, None)], "its cache is made anew"
    (found,) = server.generate([[1, 2, 3, 4, 5, 6, 7, 8, 9]], GREEDY)
    assert list(found.tokens) == greedy(new, [1, 2, 3, 4, 5, 6, 7, 8, 9], 12, None), "no block of the old ones is used"


@pytest.mark.parametrize(("name", "numbers"), [("deepseek_v3", 16 + 8), ("llama", 2 * 2 * 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_takes_as_much_cache_as_its_latent_or_its_keys_and_values(
    cpu: Chip, name: str, numbers: int, dtype: torch.dtype
) -> None:
    server = Engine(decoder(name), cpu, dtype=dtype, limits=EngineLimits(cache_bytes=1 << 20))
    assert server.cache_bytes_per_token == numbers * dtype.itemsize * 2, "two layers"


def test_an_error_of_the_chip_ends_the_requests_of_that_step_and_the_engine_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "once.toml"
    script.write_text('summary = "fails once"\n[[faults]]\nkind = "exception"\nat_step = 2\ncode = "507014"\n')
    chip = open_chip("emulated:ascend-910b", faults=str(script))
    model = decoder("llama")
    server = engine(model, chip)
    request = server.add([1, 2, 3], GREEDY)
    server.step()
    assert server.step() == [request]
    assert request.finished == "error" and request.error is not None and "507014" in request.error
    (found,) = server.generate([[1, 2, 3]], GREEDY)
    assert list(found.tokens) == greedy(model, [1, 2, 3], 12, None)
    chip.close()


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ([], GREEDY, "no token"),
        ([1, 61], GREEDY, "token 61"),
        ([1], Sampling(logit_bias={61: 1.0}), "logit_bias has the token 61"),
        ([1], Sampling(stop_tokens=(-1,)), "stop_tokens has the token -1"),
        ([1], Sampling(stops=("\n",)), "with a tokenizer"),
        ([1] * 4096, GREEDY, "4096 tokens"),
        ([1] * 400, Sampling(max_tokens=3000), "cache_bytes"),
    ],
)
def test_a_request_that_can_never_run_is_refused_in_words(
    cpu: Chip, prompt: list[int], sampling: Sampling, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        engine(decoder("llama"), cpu).add(prompt, sampling)
