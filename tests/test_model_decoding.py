"""Decoding with a cache: the same logits as without, the greedy tokens of transformers, the stated distribution."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from beringia.model import Decoder, DecoderConfig, KeyValueCache, greedy, initialise, preset, sample, save_model

LATENT = replace(preset("r2-nano"), initializer_range=0.15)
PLAIN: dict[str, Any] = {
    "vocab_size": 54,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
CONFIGS = {
    "deepseek_v3": LATENT,
    "llama": DecoderConfig(**PLAIN),
    "qwen2": DecoderConfig(attention_bias=True, **PLAIN),
    "qwen3": DecoderConfig(qk_norm=True, tie_word_embeddings=True, **PLAIN),
}


def model(family: str) -> Decoder:
    decoder = Decoder(CONFIGS[family])
    initialise(decoder, 8)
    return decoder.eval()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 7], [4, 1, 6, 1]])
def test_cached_logits_are_those_of_the_whole_sequence(family: str, pieces: list[int]) -> None:
    decoder = model(family).double()
    decoder.set_compute_dtype(torch.float64)
    tokens = torch.randint(0, 54, (2, 12), generator=torch.Generator().manual_seed(9))
    cache = KeyValueCache(decoder.config.num_hidden_layers)
    with torch.no_grad():
        stepwise = torch.cat([decoder(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(stepwise, decoder(tokens), rtol=1e-11, atol=1e-12)
    assert cache.length == 12


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_decoding_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    decoder = model(family)
    save_model(decoder, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = [3, 1, 4, 1, 5]
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 5), **settings)[0, 5:].tolist()
    assert greedy(decoder, prompt, 24, None) == wanted
    assert len(set(wanted)) > 2  # not one token over and over
    end = wanted[6]
    assert greedy(decoder, prompt, 24, end) == wanted[: wanted.index(end) + 1]


def test_a_finished_row_is_filled_with_the_end_token() -> None:
    decoder = model("llama")
    prompts = torch.randint(0, 54, (20, 3), generator=torch.Generator().manual_seed(10))
    new = sample(decoder, prompts, 30, 7, 1.0, torch.Generator().manual_seed(11))
    for row in new.tolist():
        if 7 in row:
            assert set(row[row.index(7) :]) == {7}
    assert any(7 in row for row in new.tolist())


def test_samples_follow_the_softmax_at_the_temperature() -> None:
    decoder = model("llama")
    prompts = torch.tensor([[2, 9]]).expand(4000, 2)
    drawn = sample(decoder, prompts, 1, None, 1.5, torch.Generator().manual_seed(12))[:, 0]
    with torch.no_grad():
        wanted = (decoder(prompts[:1])[0, -1].double() / 1.5).softmax(-1)
    share = torch.bincount(drawn, minlength=54) / 4000
    # Five standard errors of a share of 4000 draws, for each of 54 tokens.
    assert bool(((share - wanted).abs() <= 5 * (wanted * (1 - wanted) / 4000).sqrt() + 1e-9).all())


def test_the_same_generator_draws_the_same_tokens_and_training_mode_is_left_as_it_was() -> None:
    decoder = model("deepseek_v3").train()
    prompts = torch.randint(0, 54, (4, 5), generator=torch.Generator().manual_seed(13))
    first = sample(decoder, prompts, 8, None, 1.0, torch.Generator().manual_seed(14))
    assert torch.equal(first, sample(decoder, prompts, 8, None, 1.0, torch.Generator().manual_seed(14)))
    assert not torch.equal(first, sample(decoder, prompts, 8, None, 1.0, torch.Generator().manual_seed(15)))
    assert decoder.training
    assert all(int(counts.sum()) == 0 for counts in decoder.expert_counts().values())
