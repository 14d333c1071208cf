"""Prompts as they are read: long ones stop nobody, none that fits is refused, and their tokens stand where said."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import Server, serving
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from waiting import GIVE_UP_SECONDS

from beringia.data.tokenizer import Tokenizer, load_tokenizer, write_tokenizer
from beringia.model import Decoder, DecoderConfig, initialise, save_model
from beringia.serve.failures import Failure
from beringia.serve.prompts import PromptReader, longest_token
from beringia.serve.protocol import CompletionRequest
from beringia.serve.text import TextOffsets

BYTES, DIGITS = load_tokenizer("bytes"), load_tokenizer("digits")
ROOM = 2048


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Random bytes from a model whose tokenizer, for its normalizer, says nothing about the length of a prompt."""
    directory = tmp_path_factory.mktemp("served") / "small"
    config = DecoderConfig(
        vocab_size=BYTES.vocabulary_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        max_position_embeddings=ROOM,
    )
    model = Decoder(config)
    initialise(model, seed=1)
    save_model(model, directory)
    write_tokenizer("bytes", directory)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    with serving(directory, "--chip", "cpu", "--name", "small") as running:
        yield running


WHILE_IT_IS_SENT = 200
"""Pieces of a stream: some 50 come while a prompt of 3.8 MB is sent, and 800 while it is read."""


def test_a_long_prompt_is_refused_and_meanwhile_other_streams_go_on(server: Server) -> None:
    heard: list[str] = []
    begun, enough = threading.Event(), threading.Event()

    def listen() -> None:
        body = {"model": "small", "prompt": "1", "max_tokens": ROOM - 10, "ignore_eos": True, "stream": True}
        while not enough.is_set():
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=GIVE_UP_SECONDS) as answer:
                for line in answer.iter_lines():
                    if line:
                        heard.append(line)
                        begun.set()
                    if enough.is_set():
                        break

    thread = threading.Thread(target=listen)
    thread.start()
    assert begun.wait(GIVE_UP_SECONDS)
    content = "The quick brown fox, " * 180_000
    before = len(heard)
    refused = server.post({"model": "small", "messages": [{"role": "user", "content": content}]})
    meanwhile = len(heard) - before
    enough.set()
    thread.join()
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    assert f"{len(content)}"[:3] in refused.json()["error"]["message"], "every token was counted"
    assert meanwhile > WHILE_IT_IS_SENT, "the stream's pieces came while the prompt was read"


def test_what_is_certainly_too_long_is_refused_before_it_is_read() -> None:
    reader = PromptReader(DIGITS, context=100, most_waiting=1)
    longest = "<unknown>"  # the one token with so many characters

    def read(prompt: str, new: int) -> list[int]:
        request = CompletionRequest(model="a", prompt=prompt, max_tokens=new)
        return asyncio.run(reader.completion(request))[0].tokens

    assert len(read(longest * 90, 10)) == 90, "what fits is never refused"
    for prompt, new in ((longest * 90 + "1", 10), (longest * 91, 10), (longest * 100, 1)):
        with pytest.raises(Failure, match="room for 100 tokens. The prompt has at least (91|100)"):
            read(prompt, new)


SPECIAL = [AddedToken(name, special=True, normalized=False) for name in ("<a>", "<a long one>")]


def byte_level(*merges: tuple[str, str]) -> Backend:
    """GPT-2's kind, with special tokens."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *["".join(merge) for merge in merges]]
    backend = Backend(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return backend


def as_tokenizer(backend: Backend) -> Tokenizer:
    return Tokenizer("made here", backend, {}, None)


MERGED = as_tokenizer(byte_level(("a", "b"), ("ab", "ab"), ("Ġ", "Ġ"), ("Ã", "©")))


@given(
    st.sampled_from([DIGITS, BYTES, MERGED]),
    st.one_of(st.text(), st.lists(st.sampled_from(["ab", "  ", "é", "😀", "<a>", "<a long one>", "<end>", "7"]))),
)
def test_a_prompt_has_at_least_the_tokens_that_its_length_tells(tokenizer: Tokenizer, given: str | list[str]) -> None:
    text, longest = "".join(given), longest_token(tokenizer)
    assert longest is not None and len(tokenizer.encode(text)) * longest >= len(text)


def test_where_characters_may_vanish_the_length_tells_nothing() -> None:
    normalized, greedy, words, removing, holes = (byte_level() for _ in range(5))
    normalized.normalizer = normalizers.NFC()
    greedy.add_special_tokens([AddedToken("<eats spaces>", special=True, rstrip=True)])
    words = Backend(models.WordLevel(vocab={"<unknown>": 0}, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    removing.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s"), behavior="removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    holes.model = models.BPE(vocab={"a": 0}, merges=[])
    for backend in (normalized, greedy, words, removing, holes):
        assert longest_token(as_tokenizer(backend)) is None
    assert len(words.encode("x" * 1000).ids) == 1 and len(greedy.encode("<eats spaces>" + " " * 1000).ids) == 1


@given(st.text(max_size=20))
def test_a_token_begins_at_the_character_that_it_has_a_part_of(text: str) -> None:
    offsets = TextOffsets(BYTES, with_specials=True)
    wanted = [place for place, character in enumerate(text) for _ in character.encode()]
    assert [offsets.push(token) for token in BYTES.encode_documents([text])[0]] == wanted
    assert offsets.end() == len(text)


@given(st.lists(st.integers(0, BYTES.vocabulary_size - 1), max_size=30), st.booleans())
def test_where_tokens_are_no_text_their_offsets_still_count_what_is_shown(tokens: list[int], specials: bool) -> None:
    offsets = TextOffsets(BYTES, with_specials=specials)
    found = [offsets.push(token) for token in tokens]
    assert found == sorted(found) and offsets.end() == len(BYTES.decode(tokens, skip_special_tokens=not specials))


def test_the_space_that_a_decoder_leaves_out_is_not_counted() -> None:
    backend = Backend(models.BPE(vocab={"▁ab": 0, "▁": 1, "c": 2}, merges=[]))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = as_tokenizer(backend)
    for tokens, text, wanted in (([0, 0, 2], "ab abc", [0, 2, 5]), ([1, 2, 0], "c ab", [0, 0, 1])):
        offsets = TextOffsets(tokenizer, with_specials=False)
        assert tokenizer.decode(tokens) == text
        assert [offsets.push(token) for token in tokens] == wanted and offsets.end() == len(text)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", ["plain", "é😀 x", [5 + 0xC3]])
def test_offsets_are_those_of_the_text_whole_and_streamed(server: Server, prompt: Any, echo: bool) -> None:
    asked: Any = {"model": "small", "prompt": prompt, "max_tokens": 24, "seed": 3, "logprobs": 0, "echo": echo}
    more = {"ignore_eos": True, "return_token_ids": True}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        (choice,) = client.completions.create(extra_body=more, **asked).choices
        streamed = [chunk.choices[0] for chunk in client.completions.create(stream=True, extra_body=more, **asked)]
    assert choice.logprobs is not None and choice.logprobs.text_offset is not None
    offsets, tokens = choice.logprobs.text_offset, choice.token_ids  # type: ignore[attr-defined]
    num_before = len(tokens) - 24
    shown = BYTES.decode(tokens[:num_before])
    assert (shown + BYTES.decode(tokens[num_before:], skip_special_tokens=True)) == choice.text
    for number, offset in enumerate(offsets[num_before:]):
        before = BYTES.decode(tokens[num_before : num_before + number], skip_special_tokens=True)
        assert offset in (len(shown + before), len(shown + before) - before.endswith("�"))
    if echo and prompt == "é😀 x":
        assert offsets[:8] == [0, 0, 1, 1, 1, 1, 2, 3]
    assert "".join(one.text for one in streamed) == choice.text
    assert [place for one in streamed if one.logprobs for place in one.logprobs.text_offset or []] == offsets
