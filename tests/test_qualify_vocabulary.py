"""A preset is qualified with the vocabulary that a run trains: its model, its tokens, its bundle and certificate."""

from __future__ import annotations

from pathlib import Path

import pytest

from beringia.errors import InputError, ModelError
from beringia.qualify.evidence import QualifyOrder
from beringia.qualify.fitting import parameters_of
from beringia.qualify.issue import _stem
from beringia.qualify.qualification import Request, qualify, reference_for
from beringia.qualify.subject import DecoderSubject
from beringia.records.model_source import configuration_hash, vocabulary_of


def test_the_model_has_as_many_tokens_and_its_fingerprint_says_so() -> None:
    own, other = DecoderSubject("r2-nano"), DecoderSubject("r2-nano", vocabulary_size=261)
    assert (own.build().config.vocab_size, other.build().config.vocab_size) == (54, 261)
    assert (own.fingerprint().vocabulary_size, other.fingerprint().vocabulary_size) == (None, 261)
    assert own.fingerprint().configuration == configuration_hash("r2-nano", None)
    assert other.fingerprint().configuration == configuration_hash("r2-nano", None, 261)
    assert parameters_of("r2-nano", 261) == other.fingerprint().parameters > parameters_of("r2-nano")


def test_the_presets_own_size_is_no_other_vocabulary() -> None:
    assert DecoderSubject("r2-nano", vocabulary_size=54).fingerprint() == DecoderSubject("r2-nano").fingerprint()


@pytest.mark.parametrize("size", [7, 20, 54, 261, 32768])
def test_its_batches_have_tokens_over_all_of_the_vocabulary_and_none_beyond_it(size: int) -> None:
    batch = DecoderSubject("r2-nano", vocabulary_size=size).batch(0)
    greatest = max(int(batch[name].max()) for name in ("tokens", "labels"))
    own = max(int(tokens.max()) for tokens in DecoderSubject("r2-nano").batch(0).values())
    assert greatest == own * size // 54 < size
    assert min(int(tokens.min()) for tokens in batch.values()) >= 0


def test_an_order_without_another_vocabulary_is_written_as_it_always_was() -> None:
    """Its hash names the bundles that lie in run directories."""
    order = Request("cpu", "r2-nano").order("reference", Path())
    assert "vocabulary_size" not in order.model_dump(mode="json")
    other = Request("cpu", "r2-nano", vocabulary_size=261).order("reference", Path())
    assert QualifyOrder.model_validate(other.model_dump(mode="json")).vocabulary_size == 261


def test_what_a_user_asks_for_is_a_presets_and_not_its_own() -> None:
    assert vocabulary_of("r2-nano", None) is vocabulary_of("r2-nano", 54) is None
    assert vocabulary_of("r2-nano", 261) == 261
    with pytest.raises(ModelError, match="--vocabulary 261 was asked for, and models/mine is no preset"):
        vocabulary_of("models/mine", 261)


@pytest.mark.slow
def test_certificate_and_bundle_are_for_the_vocabulary_that_was_tried(tmp_path: Path) -> None:
    request = Request(
        "cpu", "r2-nano", layers=1, vocabulary_size=261, batches=2, steps=2, memory_bytes=0, collectives=False
    )
    bundle = reference_for(request, tmp_path)
    found = qualify(request, bundle)
    assert found.model == DecoderSubject("r2-nano", layers=1, vocabulary_size=261).fingerprint()
    assert "r2-nano with 261 tokens" in found.scope and "vocabulary-261" in _stem(found, False)
    # The bundle decides, unless another size was asked for.
    plain = Request("cpu", "r2-nano", memory_bytes=0, collectives=False)
    assert qualify(plain, bundle).model.vocabulary_size == 261
    asked = Request("cpu", "r2-nano", vocabulary_size=262, given=frozenset({"vocabulary_size"}))
    with pytest.raises(InputError, match="--vocabulary 262 was given, but the bundle .* with --vocabulary 261"):
        qualify(asked, bundle)
