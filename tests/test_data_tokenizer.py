"""Tokenizers: our reading, without transformers, gives the tokens that AutoTokenizer gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import GIVE_UP_SECONDS

from beringia.data import Tokenizer, check_vocabulary, choose_tokenizer, load_tokenizer, write_tokenizer
from beringia.data.alphabet import SYMBOLS, TOKENS
from beringia.errors import DataError
from beringia.records.recipe import DataSection, ModelSection

KINDS = ("digits", "bytes")
BYTES = load_tokenizer("bytes")
SPECIAL = ["<begin>", "<end>", "<pad>", "<unknown>", "<|im_start|>", "<|im_end|>"]
# Surrogates cannot be written as UTF-8; special tokens and digits are made likely.
texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
        st.sampled_from([*SPECIAL, "+3141592653", ":34=9", "  ", "\r\n"]),
    ),
    max_size=5,
).map("".join)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Our reading and transformers' of each kind, written beside a config.json as an export is."""
    from transformers import AutoTokenizer

    pairs = {}
    for kind in KINDS:
        directory = tmp_path_factory.mktemp(kind)
        write_tokenizer(kind, directory)  # type: ignore[arg-type]
        (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
        pairs[kind] = (load_tokenizer(directory), AutoTokenizer.from_pretrained(directory))
    return pairs


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_auto_tokenizer_gives_the_same_tokens_and_the_same_text(
    pairs: dict[str, tuple[Tokenizer, Any]], kind: str, text: str
) -> None:
    ours, theirs = pairs[kind]
    tokens = ours.encode(text)
    assert tokens == theirs(text)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(tokens) == theirs.decode(tokens)
    assert ours.decode(tokens, skip_special_tokens=True) == theirs.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_size_agree_with_auto_tokenizer(pairs: dict[str, tuple[Tokenizer, Any]], kind: str) -> None:
    ours, theirs = pairs[kind]
    assert (ours.begin, ours.end, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (ours.begin, ours.end) == (0, 1)  # what the configurations of deepseek_v3 take for granted
    assert ours.vocabulary_size == len(theirs) == {"digits": 54, "bytes": 261}[kind]


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_bytes_give_any_text_back(text: str) -> None:
    [tokens] = BYTES.encode_documents([text])
    assert BYTES.decode(tokens) == text
    assert len(tokens) == len(text.encode())


def test_digits_number_their_symbols_as_documented() -> None:
    tokenizer = load_tokenizer("digits")
    assert [tokenizer.encode(symbol) for symbol in SYMBOLS] == [[number] for number in range(54)]
    assert tokenizer.encode("é9") == [TOKENS["<unknown>"], TOKENS["9"]]


def test_a_document_cannot_forge_an_end() -> None:
    [forged] = BYTES.encode_documents(["<end>"])
    assert BYTES.encode("<end>") == [BYTES.end]
    assert BYTES.end not in forged
    assert BYTES.decode(forged) == "<end>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_read_back_is_the_one_written(kind: str, tmp_path: Path) -> None:
    write_tokenizer(kind, tmp_path)  # type: ignore[arg-type]
    assert load_tokenizer(tmp_path).hash == load_tokenizer(kind).hash
    assert load_tokenizer("digits").hash != load_tokenizer("bytes").hash


def test_loading_data_and_a_tokenizer_does_not_import_transformers() -> None:
    program = (
        "import sys; from beringia.data import load_tokenizer; load_tokenizer('bytes').encode('x');"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=GIVE_UP_SECONDS).returncode == 0


def test_a_vocabulary_that_is_too_small_is_refused() -> None:
    check_vocabulary(load_tokenizer("digits"), 54)
    check_vocabulary(load_tokenizer("digits"), 64)  # padded vocabularies are common
    with pytest.raises(DataError, match="has 261 tokens, but the model's vocabulary has only 54"):
        check_vocabulary(load_tokenizer("bytes"), 54)


def test_a_recipe_means_its_own_tokenizer_then_the_tasks_then_the_models(tmp_path: Path) -> None:
    write_tokenizer("bytes", tmp_path)
    preset, path = ModelSection(preset="r2-nano"), ModelSection(path=str(tmp_path))
    assert choose_tokenizer(DataSection(task="digit-sum"), preset).source == "digits"
    assert choose_tokenizer(DataSection(text="x", tokenizer="bytes"), preset).source == "bytes"
    assert choose_tokenizer(DataSection(text="x"), path).source == str(tmp_path)
    with pytest.raises(DataError, match="set data.tokenizer"):
        choose_tokenizer(DataSection(text="x"), preset)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "There is no tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json is not valid JSON"),
        ({"tokenizer.json": "[]"}, "holds no JSON object"),
    ],
)
def test_a_directory_without_a_readable_tokenizer_is_refused(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token_says_so(tmp_path: Path) -> None:
    write_tokenizer("bytes", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").unlink()
    with pytest.raises(DataError, match="names no end token"):
        load_tokenizer(tmp_path).end  # noqa: B018 - the property raises
