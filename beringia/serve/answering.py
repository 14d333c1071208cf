"""From tokens to the engine, and from the engine's news to an answer's pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from beringia.data.tokenizer import Tokenizer
from beringia.engine import Sampling
from beringia.engine.sampling import TokenLogprobs
from beringia.errors import InputError
from beringia.serve.answers import Scored
from beringia.serve.engine_thread import Draining, EngineThread, Full, News, Ticket
from beringia.serve.failures import Failure, full, refused
from beringia.serve.prompts import ReadPrompt, no_room
from beringia.serve.text import AnswerText, Piece


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for."""

    new_tokens: int
    """At most, and what a chat gets that does not say."""


@dataclass(frozen=True)
class Part:
    """What one or several tokens added to one answer."""

    piece: Piece
    tokens: tuple[Scored, ...]
    finish: str | None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


def room_for(engine: EngineThread, prompt: ReadPrompt, asked: int | None, limits: RequestLimits) -> int:
    """New tokens at most. Raises Failure where the model has no room for them."""
    context = engine.engine.config.context_tokens
    if not prompt.tokens:
        raise refused("The prompt has no token.", "prompt")
    left = context - len(prompt.tokens)
    if left < 1 or (asked is not None and asked > left):
        field = "messages" if prompt.chat_text is not None else "prompt"
        raise no_room(context, str(len(prompt.tokens)), asked, field)
    if asked is not None and asked > limits.new_tokens:
        raise refused(f"{asked} new tokens were asked for; this server gives up to {limits.new_tokens}.", "max_tokens")
    return min(left, limits.new_tokens) if asked is None else asked


def submit(engine: EngineThread, requests: list[tuple[list[int], Sampling]]) -> list[Ticket]:
    """Hand over to the engine. Raises Failure: 400 for what can never run, 429 without a place, 503 at the end."""
    try:
        return engine.submit(requests)
    except InputError as problem:
        raise refused(str(problem)) from None
    except Full:
        raise full() from None
    except Draining:
        raise _draining() from None


def check_room(engine: EngineThread) -> None:
    """Raise the Failure that any request would meet now."""
    if not engine.ready:
        raise _draining()
    if engine.full:
        raise full()


def _draining() -> Failure:
    return Failure(503, "The server is shutting down.", code="shutting_down", retry_after=5)


_NEWS_AT_ONCE = 64
"""That are made into parts before others have their turn of the event loop: some 10 ms where each token has 20
log-probabilities. A client that reads slowly, or not at all, leaves thousands."""


async def parts_of(
    tickets: Sequence[Ticket], tokenizer: Tokenizer, stops: Sequence[str], chat_texts: Sequence[str | None]
) -> AsyncIterator[list[tuple[int, Part]]]:
    """What the engine's steps add to the answers to one request, until all are finished; each part with the number of
    its answer. Raises Failure where the engine could not go on."""
    texts = [AnswerText(tokenizer, stops, chat_text) for chat_text in chat_texts]
    unfinished = len(tickets)
    while unfinished:
        parts: list[tuple[int, Part]] = []
        for number, news in await tickets[0].mail.take():
            if len(parts) == _NEWS_AT_ONCE:
                yield parts
                parts = []
                await asyncio.sleep(0)
            if news.error is not None:
                if parts:
                    yield parts
                raise Failure(500, f"The request failed: {news.error}", code="engine_error")
            unfinished -= news.finish is not None
            parts.append((number, _part(texts[number], news)))
        yield parts


def _part(text: AnswerText, news: News) -> Part:
    assert news.token is not None
    # An end token has no text; a stop token's is left out, like a stop string.
    ends = news.finish == "stop" and not news.at_string
    piece = Piece() if ends else text.push(news.token)
    if news.finish is not None:
        rest = text.rest()
        piece = Piece(piece.content + rest.content, piece.reasoning + rest.reasoning)
    finish = "stop" if text.stopped else news.finish
    return Part(piece, (Scored(news.token, news.logprobs),), finish, news.prompt_logprobs)
