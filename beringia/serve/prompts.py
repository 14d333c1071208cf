"""From a request to the tokens that an answer goes on from. Long texts are read in a thread, so that streams go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenizers import pre_tokenizers

from beringia.data.chat import render_chat
from beringia.data.tokenizer import Tokenizer
from beringia.errors import DataError
from beringia.serve.failures import Failure, full, refused
from beringia.serve.protocol import ChatRequest, CompletionRequest

T = TypeVar("T")

SHORT_CHARACTERS = 4096
"""Up to here a text is read in the event loop, which takes a few milliseconds; a thread would cost every short request
more than that."""


@dataclass(frozen=True)
class ReadPrompt:
    """What an answer goes on from."""

    tokens: list[int]
    chat_text: str | None = None
    """The chat as text; None for a plain completion."""


class PromptReader:
    """Reads requests' prompts. Long ones wait for each other: one thread leaves the other cores to the engine."""

    def __init__(self, tokenizer: Tokenizer, *, context: int, most_waiting: int) -> None:
        """`context`: tokens that the model has room for; `most_waiting`: long requests that may wait to be read."""
        self._tokenizer = tokenizer
        self._context = context
        self._most_waiting = most_waiting
        self._longest = longest_token(tokenizer)
        self._thread = ThreadPoolExecutor(1, "prompts")
        self._waiting = 0

    async def chat(self, request: ChatRequest) -> ReadPrompt:
        """Through the model's own template. Raises Failure where it refuses the turns, or they are too long."""
        return await self._read(request.characters, lambda: self._chat(request))

    async def completion(self, request: CompletionRequest) -> list[ReadPrompt]:
        """Tokens as they are, texts with what the tokenizer puts before a text. Raises Failure for one too long."""
        return await self._read(request.characters, lambda: [self._completion(one, request) for one in request.prompts])

    async def _read(self, characters: int, read: Callable[[], T]) -> T:
        if characters <= SHORT_CHARACTERS:
            return read()
        if self._waiting >= self._most_waiting:
            raise full()
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, read)
        finally:
            self._waiting -= 1

    def _chat(self, request: ChatRequest) -> ReadPrompt:
        turns = [message.for_template() for message in request.messages]
        try:
            text = render_chat(self._tokenizer, turns, add_generation_prompt=True)
        except DataError as problem:
            raise refused(str(problem), "messages") from None
        return ReadPrompt(self._tokens_of(text, request.most_tokens, "messages", begin=False), text)

    def _completion(self, prompt: str | list[int], request: CompletionRequest) -> ReadPrompt:
        if isinstance(prompt, str):
            return ReadPrompt(self._tokens_of(prompt, request.max_tokens, "prompt", begin=True))
        return ReadPrompt(prompt)

    def _tokens_of(self, text: str, asked: int | None, field: str, *, begin: bool) -> list[int]:
        if self._longest is not None:
            least = -(-len(text) // self._longest)
            if least + (asked or 1) > self._context:
                raise no_room(self._context, f"at least {least}", asked, field)
        # Unlike `Tokenizer.encode` this lets other threads run meanwhile.
        (encoding,) = self._tokenizer.backend.encode_batch_fast([text], add_special_tokens=begin)
        tokens: list[int] = encoding.ids
        return tokens


def no_room(context: int, num_prompt_tokens: str, asked: int | None, field: str) -> Failure:
    """A prompt that leaves no room for what is asked for. Clients that fall back on a model with more room (litellm,
    LangChain) know it by these words, and others by the code."""
    wanted = "" if asked is None else f" and {asked} new ones were asked for"
    return refused(
        f"The model has room for {context} tokens. The prompt has {num_prompt_tokens}{wanted}. The prompt is too long "
        "for this model's context length: shorten the prompt, or ask for fewer new tokens.",
        field,
        "context_length_exceeded",
    )


def longest_token(tokenizer: Tokenizer) -> int | None:
    """No token stands for more characters of a text than this, so a text of n characters has at least n divided by it.
    None where that is not certain.

    It is certain where no step leaves a character out or joins several, and a token stands for no more characters than
    its name has. An added token stands for its name. A byte-level token's name has a symbol for each byte, a character
    has at least one byte, and with all 256 in the vocabulary no byte is left out. Where each character is a word, any
    token stands for one. Normalizers (NFC joins accents), added tokens that take spaces beside them along, words not
    in the vocabulary and splits that remove something could make a prompt shorter than that.
    """
    made = json.loads(tokenizer.backend.to_str())
    if made["normalizer"] is not None or any(token["lstrip"] or token["rstrip"] for token in made["added_tokens"]):
        return None
    if not _keeps_every_character(made):
        return None
    return max(map(len, tokenizer.backend.get_vocab(with_added_tokens=True)))


def _keeps_every_character(made: dict[str, Any]) -> bool:
    outer = made["pre_tokenizer"] or {"type": None}
    steps = outer["pretokenizers"] if outer["type"] == "Sequence" else [outer]
    if any(step["type"] not in ("ByteLevel", "Split", "Digits") or step.get("behavior") == "Removed" for step in steps):
        return False
    if made["model"]["type"] == "WordLevel":
        return steps == [_EACH_CHARACTER]
    if made["model"]["type"] != "BPE" or made["model"]["continuing_subword_prefix"]:
        return False
    bytewise = any(step["type"] == "ByteLevel" for step in steps)
    return bytewise and set(pre_tokenizers.ByteLevel.alphabet()) <= made["model"]["vocab"].keys()


_EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
