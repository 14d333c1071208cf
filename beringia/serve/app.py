"""The HTTP interface: OpenAI's chat completions, completions and models; health, metrics, and the chat page."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from beringia.data.tokenizer import Tokenizer
from beringia.serve import answers
from beringia.serve.answering import (
    Part,
    RequestLimits,
    check_room,
    parts_of,
    room_for,
    submit,
)
from beringia.serve.answers import Choice, Scored
from beringia.serve.engine_thread import EngineThread, Ticket
from beringia.serve.failures import Failure, refused
from beringia.serve.gate import Gate, Pages
from beringia.serve.metrics import Metrics
from beringia.serve.prompts import PromptReader, ReadPrompt
from beringia.serve.protocol import UNSUPPORTED, ChatRequest, CompletionRequest
from beringia.serve.text import TextOffsets
from beringia.version import __version__


@dataclass(frozen=True)
class Served:
    """What is served, and how."""

    name: str
    """Of the model, as clients ask for it."""
    engine: EngineThread
    tokenizer: Tokenizer
    metrics: Metrics
    limits: RequestLimits
    about: dict[str, Any]
    """Chip, weights and more, for the page and `/v1/models`."""
    page: str
    keys: tuple[str, ...] = ()
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def prompts(self) -> PromptReader:
        """Reads the prompts of all requests."""
        context = self.engine.engine.config.context_tokens
        return PromptReader(self.tokenizer, context=context, most_waiting=self.engine.most_open)


def make_app(served: Served) -> FastAPI:
    """The application. Its lifespan starts and stops the engine's thread."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.engine.start()
        yield
        await served.engine.stop()

    app = FastAPI(title="Beringia", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        Gate,
        keys=served.keys,
        body_bytes=served.body_bytes,
        body_seconds=served.body_seconds,
        metrics=served.metrics,
        check_room=lambda: check_room(served.engine),
    )
    app.add_middleware(Pages)
    _add_failures(app)
    _add_state(app, served)
    _add_completions(app, served)
    return app


def _add_failures(app: FastAPI) -> None:
    """Every error is OpenAI's object."""

    async def failed(_: Request, failure: Any) -> JSONResponse:
        return failure.response()  # type: ignore[no-any-return]

    async def invalid(request: Request, problem: Any) -> JSONResponse:
        first = problem.errors()[0]
        # The first part says where the value stands; one in brackets, which of several types it was taken for.
        place = [str(part) for part in first["loc"][1:] if not str(part).endswith("]") and "-" not in str(part)]
        name = ".".join(place) or None
        if isinstance(problem.body, bytes):  # read as JSON only where that is what it is said to be
            said = request.headers.get("content-type", "")
            return Failure(
                400, f"The body is not sent as JSON but as {said!r}: set Content-Type: application/json."
            ).response()
        if first["type"] == UNSUPPORTED:
            return Failure(400, f"{first['msg']}.", field=first["ctx"]["field"]).response()
        if first["type"] == "extra_forbidden":
            return Failure(400, f"Unknown field: {name}.", field=name, code="unknown_parameter").response()
        if first["type"] == "json_invalid":
            return Failure(400, f"The body is not JSON: {first['ctx']['error']}.", code="invalid_json").response()
        sentence = str(first["msg"]).removeprefix("Value error, ")
        return Failure(400, f"{name}: {sentence}." if name else f"{sentence}.", field=name).response()

    async def http(_: Request, problem: Any) -> JSONResponse:
        return Failure(problem.status_code, f"{problem.detail}.").response()

    app.add_exception_handler(Failure, failed)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _add_state(app: FastAPI, served: Served) -> None:
    model = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "beringia",
        "max_model_len": served.engine.engine.config.context_tokens,
        **served.about,
    }

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return served.page

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the engine can compute."""
        if served.engine.failure is not None:
            raise Failure(503, f"The engine has ended: {served.engine.failure}.")
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether new requests are taken."""
        if not served.engine.ready:
            raise Failure(503, "The server takes no new requests.", retry_after=5)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> JSONResponse:
        _check_model(served, name)
        return JSONResponse(model)


def _add_completions(app: FastAPI, served: Served) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await Chat(served, body).respond(request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await Completion(served, body).respond(request)


def _check_model(served: Served, name: str) -> None:
    if name != served.name:
        raise Failure(
            404,
            f"There is no model {name!r} here; this server has {served.name!r}.",
            code="model_not_found",
            field="model",
        )


class _Answering(ABC):
    """One request: its answers, as a whole or as a stream."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, served: Served, body: ChatRequest | CompletionRequest) -> None:
        _check_model(served, body.model)
        self._served = served
        self._body = body
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
        self._prompts: list[ReadPrompt] = []
        self._tickets: list[Ticket] = []

    async def respond(self, request: Request) -> Response:
        """The answer. A client that goes away takes its requests with it."""
        self._check_number()
        self._tickets = await self._submit()
        self._served.metrics.prompt_tokens.inc(sum(len(prompt.tokens) for prompt in self._prompts))
        if self._body.stream:
            return StreamingResponse(
                self._stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        try:
            document = await _unless_gone(request, self._whole)
        finally:
            self._close()
        # Nobody reads what is sent to a client that has gone.
        gone = document is None
        return Response(status_code=499) if gone else Response(document, media_type="application/json")

    def _check_number(self) -> None:
        """Raise Failure for more answers than there will ever be places for."""
        most, number = self._served.engine.most_open, self._body.num_prompts * self._body.choices
        if number > most:
            raise refused(
                f"The request asks for {number} answers, and this server has places for {most} at a time: "
                "send the prompts in several requests.",
                "n" if self._body.num_prompts == 1 else "prompt",
                "too_many_answers",
            )

    async def _whole(self) -> bytes:
        choices = [Choice() for _ in self._tickets]
        prompt_logprobs: list[tuple[Any, ...]] = [()] * len(choices)
        async for parts in self._parts():
            for number, part in parts:
                choices[number].add(part.piece, part.tokens, part.finish)
                prompt_logprobs[number] = prompt_logprobs[number] or part.prompt_logprobs
        written = []
        for number, choice in enumerate(choices):  # each a turn of the event loop: they may be megabytes
            await asyncio.sleep(0)
            written.append(to_json(self._choice(number, choice, prompt_logprobs[number])))
        head = {
            **self._head,
            "object": self.kind,
            "usage": self._usage(sum(len(choice.tokens) for choice in choices)),
            "system_fingerprint": self._served.about["weights"],
        }
        return answers.whole(head, written)

    async def _stream(self) -> AsyncIterator[bytes]:
        new_tokens = 0
        try:
            async for parts in self._parts():
                new_tokens += sum(len(part.tokens) for _, part in parts)
                chunks = [chunk for number, part in parts for chunk in self._chunks(number, part)]
                if chunks:
                    used = {"usage": self._usage(new_tokens)} if self._body.continuous_usage else {}
                    yield b"".join([answers.event(self._chunk([chunk]) | used) for chunk in chunks])
            self._close()
            if self._body.include_usage:
                yield answers.event(self._chunk([]) | {"usage": self._usage(new_tokens)})
            yield answers.DONE
        except Failure as failure:
            yield answers.event(failure.document)
        finally:
            self._close()

    def _parts(self) -> AsyncIterator[list[tuple[int, Part]]]:
        texts = [prompt.chat_text for prompt in self._prompts for _ in range(self._body.choices)]
        return parts_of(self._tickets, self._served.tokenizer, self._body.stops, texts)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _usage(self, new_tokens: int) -> dict[str, int]:
        asked_for_none = self._body.max_tokens == 0  # then the one that the engine brings with the prompt is not told
        num_prompt_tokens = sum(len(prompt.tokens) for prompt in self._prompts)
        return answers.usage(num_prompt_tokens, 0 if asked_for_none else new_tokens)

    def _close(self) -> None:
        for ticket in self._tickets:
            self._served.engine.close(ticket)

    def _token_ids(self, tokens: tuple[Scored, ...] | list[Scored]) -> dict[str, Any]:
        return {"token_ids": [one.token for one in tokens]} if self._body.return_token_ids else {}

    # What the two kinds of request do in their own ways

    @abstractmethod
    async def _submit(self) -> list[Ticket]:
        """Hand the request over to the engine."""

    @abstractmethod
    def _choice(self, number: int, choice: Choice, prompt_logprobs: tuple[Any, ...]) -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def _chunks(self, number: int, part: Part) -> list[dict[str, Any]]:
        """What a part adds to a stream."""


class Chat(_Answering):
    """`/v1/chat/completions`."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    _body: ChatRequest

    async def _submit(self) -> list[Ticket]:
        body, served = self._body, self._served
        prompt = await served.prompts.chat(body)
        self._prompts = [prompt]
        self._begun: set[int] = set()
        most = room_for(served.engine, prompt, body.most_tokens, served.limits)
        samplings = [
            body.sampling(choice, max_tokens=most, logprobs=body.wanted_logprobs) for choice in range(body.choices)
        ]
        return submit(served.engine, [(prompt.tokens, sampling) for sampling in samplings])

    def _choice(self, number: int, choice: Choice, prompt_logprobs: tuple[Any, ...]) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs:
            logprobs = self._logprobs(choice.tokens)
        return {
            "index": number,
            "message": answers.chat_message(choice),
            "logprobs": logprobs,
            "finish_reason": choice.finish,
            **self._token_ids(choice.tokens),
        }

    def _chunks(self, number: int, part: Part) -> list[dict[str, Any]]:
        chunks = []
        if number not in self._begun:
            self._begun.add(number)
            chunks.append(self._delta(number, {"role": "assistant", "content": ""}))
        delta = answers.chat_delta(part.piece)
        # What has no text yet waits; log-probabilities and token numbers do not.
        if delta or part.finish is not None or self._body.logprobs or self._body.return_token_ids:
            chunk = self._delta(number, delta, part.finish) | self._token_ids(part.tokens)
            if self._body.logprobs:
                chunk["logprobs"] = self._logprobs(part.tokens)
            chunks.append(chunk)
        return chunks

    def _logprobs(self, tokens: Sequence[Scored]) -> dict[str, Any]:
        numbers = self._body.return_tokens_as_token_ids
        return answers.chat_logprobs(self._served.tokenizer, tokens, numbers=numbers)

    def _delta(self, number: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish}


class Completion(_Answering):
    """`/v1/completions`."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"
    _body: CompletionRequest

    async def _submit(self) -> list[Ticket]:
        body, served = self._body, self._served
        self._prompts = await served.prompts.completion(body)
        self._begun: dict[int, TextOffsets] = {}
        requests = []
        for prompt in self._prompts:
            # With max_tokens of 0 only the prompt's log-probabilities count; the engine brings one token with them.
            most = room_for(served.engine, prompt, body.max_tokens or 1, served.limits)
            echoed = body.logprobs if body.echo else None
            requests += [
                (prompt.tokens, body.sampling(choice, max_tokens=most, logprobs=body.logprobs, prompt_logprobs=echoed))
                for choice in range(body.choices)
            ]
        return submit(served.engine, requests)

    def _choice(self, number: int, choice: Choice, prompt_logprobs: tuple[Any, ...]) -> dict[str, Any]:
        return self._text(number, choice.content, choice.tokens, choice.finish, prompt_logprobs)

    def _chunks(self, number: int, part: Part) -> list[dict[str, Any]]:
        chunk = self._text(number, part.piece.content, part.tokens, part.finish, part.prompt_logprobs)
        asked = self._body.logprobs is not None or self._body.return_token_ids
        return [chunk] if chunk["text"] or part.finish is not None or asked else []

    def _text(
        self,
        number: int,
        text: str,
        tokens: list[Scored] | tuple[Scored, ...],
        finish: str | None,
        prompt_logprobs: tuple[Any, ...],
    ) -> dict[str, Any]:
        body, tokenizer = self._body, self._served.tokenizer
        if body.max_tokens == 0:
            text, tokens, finish = "", (), "length"
        echoed: list[Scored] = []
        offsets: list[int] = []
        if number not in self._begun:
            written = TextOffsets(tokenizer, with_specials=True)
            if body.echo:
                prompt = self._prompts[number // body.choices].tokens
                text = tokenizer.decode(prompt) + text
                echoed = [Scored(prompt[0], None), *map(Scored, prompt[1:], prompt_logprobs or [None] * len(prompt))]
                offsets = [written.push(token) for token in prompt]
            self._begun[number] = TextOffsets(tokenizer, written.end(), with_specials=False)
        logprobs = None
        if body.logprobs is not None:
            offsets += [self._begun[number].push(one.token) for one in tokens]
            numbers = body.return_tokens_as_token_ids
            logprobs = answers.completion_logprobs(tokenizer, [*echoed, *tokens], offsets, numbers=numbers)
        return {
            "index": number,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish,
            **self._token_ids([*echoed, *tokens]),
        }


async def _unless_gone(request: Request, answer: Callable[[], Awaitable[bytes]]) -> bytes | None:
    """The answer, or None as soon as the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering = asyncio.ensure_future(answer())
    watching = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            return None
        return answering.result()
    finally:
        for task in (answering, watching):
            task.cancel()


def page_text(name: str, about: dict[str, Any]) -> str:
    """The chat page, with what it shows of the server in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return templates.get_template("chat.html.jinja").render(name=name, about=about)
