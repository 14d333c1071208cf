"""Answers in OpenAI's shapes: whole, and in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

from beringia.data.tokenizer import Tokenizer
from beringia.engine.sampling import TokenLogprobs
from beringia.serve.text import Piece

DONE = b"data: [DONE]\n\n"


def event(document: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(document) + b"\n\n"  # a fifth of the time that json takes, once a token


def whole(head: Mapping[str, Any], choices: Sequence[bytes]) -> bytes:
    """An answer of choices that are JSON already."""
    return to_json(head)[:-1] + b',"choices":[' + b",".join(choices) + b"]}"


@dataclass(frozen=True)
class Scored:
    """A token with its log-probabilities, where these were asked for."""

    token: int
    logprobs: TokenLogprobs | None


@dataclass
class Choice:
    """One answer, as far as it is known."""

    content: str = ""
    reasoning: str = ""
    tokens: list[Scored] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece, tokens: Sequence[Scored], finish: str | None) -> None:
        """Some more of it."""
        self.content += piece.content
        self.reasoning += piece.reasoning
        self.tokens += tokens
        self.finish = finish


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """How many tokens there were."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


# Chats


def chat_message(choice: Choice) -> dict[str, Any]:
    """The assistant's turn. Reasoning stands under both names that clients read."""
    reasoning = choice.reasoning or None
    return {
        "role": "assistant",
        "content": choice.content,
        "refusal": None,
        "reasoning": reasoning,
        "reasoning_content": reasoning,
    }


def chat_delta(piece: Piece) -> dict[str, Any]:
    """What a piece adds."""
    delta: dict[str, Any] = {}
    if piece.reasoning:
        delta |= {"reasoning": piece.reasoning, "reasoning_content": piece.reasoning}
    if piece.content:
        delta["content"] = piece.content
    return delta


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Scored], *, numbers: bool) -> dict[str, Any]:
    """`logprobs` of a choice in a chat; `numbers`: with tokens as numbers."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        name = _name(tokenizer, token, numbers)
        return {"token": name, "logprob": logprob, "bytes": list(tokenizer.bytes_of(token))}

    content = [
        entry(one.token, one.logprobs.chosen) | {"top_logprobs": [entry(*pair) for pair in one.logprobs.top]}
        for one in tokens
        if one.logprobs is not None
    ]
    return {"content": content, "refusal": None}


# Completions


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[Scored], offsets: Sequence[int], *, numbers: bool
) -> dict[str, Any]:
    """`logprobs` of a choice in a completion; `offsets`: where in the text its tokens begin; `numbers`: with tokens as
    numbers."""
    return {
        "tokens": [_name(tokenizer, one.token, numbers) for one in tokens],
        "token_logprobs": [None if one.logprobs is None else one.logprobs.chosen for one in tokens],
        "top_logprobs": [None if one.logprobs is None else _top(tokenizer, one, numbers) for one in tokens],
        "text_offset": list(offsets),
    }


def _top(tokenizer: Tokenizer, one: Scored, numbers: bool) -> dict[str, float]:
    """By text, the most likely first. Two tokens may have the same text: the more likely one stands for both. The
    chosen token is always among them, as OpenAI has it."""
    assert one.logprobs is not None
    found: dict[str, float] = {}
    for token, logprob in (*one.logprobs.top, (one.token, one.logprobs.chosen)):
        found.setdefault(_name(tokenizer, token, numbers), logprob)
    return found


def _name(tokenizer: Tokenizer, token: int, numbers: bool) -> str:
    if numbers:
        return f"token_id:{token}"
    return tokenizer.bytes_of(token).decode(errors="replace")
