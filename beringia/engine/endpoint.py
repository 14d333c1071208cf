"""The engine's interface over an OpenAI-compatible server: vLLM on any chip, SGLang, llama.cpp, our own.

    endpoint = Endpoint("http://127.0.0.1:8000")
    for completion in endpoint.generate([[1, 2, 3], [4, 5]], Sampling(max_tokens=64)):
        completion.tokens, completion.finish, completion.logprobs

Tokens go there and come back as numbers, never as text that would have to be cut into tokens again. What a server
cannot do is found by asking it once (`abilities`); asking for it afterwards is an error, not another answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from beringia.engine.engine import Completion
from beringia.engine.sampling import Sampling, TokenLogprobs
from beringia.errors import BeringiaError, InputError

_TRY_AGAIN = frozenset({408, 409, 429, 500, 502, 503, 504})
_TOKEN = "token_id:"


class EndpointFailed(BeringiaError):
    """A server that did not answer, however often it was asked."""


@dataclass(frozen=True)
class Abilities:
    """What a server can do of what the engine can."""

    logprobs: bool
    """Of the tokens it chose."""
    prompt_logprobs: bool

    @property
    def missing(self) -> tuple[str, ...]:
        """What it cannot do, in words."""
        return tuple(
            words
            for has, words in (
                (self.logprobs, "log-probabilities"),
                (self.prompt_logprobs, "log-probabilities of prompts"),
            )
            if not has
        )


class Endpoint:
    """A model behind HTTP."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key: str | None = None,
        answer_seconds: float = 600.0,
        tries: int = 6,
        first_wait_seconds: float = 0.5,
        most_open: int = 64,
    ) -> None:
        """`url`: with or without `/v1`. `model`: None where the server has one only. A request is tried `tries` times,
        with waits that double, or last as long as the server says. Raises InputError, EndpointFailed."""
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._timeout = httpx.Timeout(answer_seconds, connect=10.0)
        self._tries = tries
        self._first_wait_seconds = first_wait_seconds
        self._most_open = most_open
        self.model, self.abilities = asyncio.run(self._meet(model))

    def generate(self, prompts: Iterable[Sequence[int]], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """Complete all prompts, in their order. Raises InputError for what the server cannot do or refuses, and
        EndpointFailed."""
        prompts = list(prompts)
        asked = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        for own in asked:
            self._check(own)
        return asyncio.run(self._generate(list(zip(prompts, asked, strict=True))))

    async def _generate(self, requests: Sequence[tuple[Sequence[int], Sampling]]) -> list[Completion]:
        places = asyncio.Semaphore(self._most_open)

        async def one(client: httpx.AsyncClient, prompt: Sequence[int], sampling: Sampling) -> Completion:
            async with places:
                return _completion(await self._post(client, _body(self.model, prompt, sampling)), prompt, sampling)

        async with self._client() as client:
            return list(await asyncio.gather(*[one(client, *request) for request in requests]))

    def _check(self, sampling: Sampling) -> None:
        wants = (
            (sampling.logprobs is not None and not self.abilities.logprobs, "log-probabilities"),
            (
                sampling.prompt_logprobs is not None and not self.abilities.prompt_logprobs,
                "a prompt's log-probabilities",
            ),
        )
        for lacks, words in wants:
            if lacks:
                raise InputError(f"{self._url} does not give {words}: ask for none, or use another server.")

    async def _meet(self, model: str | None) -> tuple[str, Abilities]:
        """Which model, and what the server can do with it."""
        async with self._client() as client:
            listed = await self._send(client, "GET", "/models")
            names = [entry["id"] for entry in listed.get("data", [])]
            if model is None and len(names) != 1:
                raise InputError(f"{self._url} has {len(names)} models ({', '.join(names)}): say which.")
            name = names[0] if model is None else model
            if name not in names:
                raise InputError(f"{self._url} has no model {name!r}; it has {', '.join(names)}.")
            once = Sampling(max_tokens=1, temperature=0.0)
            try:
                plain = await self._post(client, _body(name, [0], once))
            except InputError as problem:
                raise InputError(f"{self._url} does not complete tokens as numbers: {problem}") from None
            if _tokens_of(plain["choices"][0]) is None:
                raise InputError(f"{self._url} answers with text only; tokens are needed (return_tokens_as_token_ids).")
            return name, Abilities(logprobs=True, prompt_logprobs=await self._echoes(client, name))

    async def _echoes(self, client: httpx.AsyncClient, name: str) -> bool:
        asked = Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        try:
            document = await self._post(client, _body(name, [0, 0], asked))
        except InputError:
            return False
        tokens = _tokens_of(document["choices"][0])
        return tokens is not None and len(tokens) == 3

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        return await self._send(client, "POST", "/completions", body)

    async def _send(
        self, client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One answer; what may pass is tried again."""
        wait, found = self._first_wait_seconds, ""
        for number in range(self._tries):
            if number:
                await asyncio.sleep(wait)
                wait *= 2
            try:
                answer = await client.request(method, self._url + path, json=body)
            except httpx.TransportError as problem:
                found = f"{type(problem).__name__}: {problem}"
                continue
            if answer.status_code == 200:
                document: dict[str, Any] = answer.json()
                return document
            found = f"status {answer.status_code}: {_sentence(answer)}"
            if answer.status_code not in _TRY_AGAIN:
                raise InputError(f"{self._url}{path} refused the request: {found}")
            wait = max(wait, _retry_after(answer))
        raise EndpointFailed(f"{self._url}{path} did not answer in {self._tries} tries; the last one: {found}")

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self._most_open)
        return httpx.AsyncClient(headers=self._headers, timeout=self._timeout, limits=limits)


def _body(model: str, prompt: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    """vLLM's names where OpenAI has none. Tokens come back in the log-probabilities, so some are always asked for."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "logprobs": max(sampling.logprobs or 0, sampling.prompt_logprobs or 0),
        "return_tokens_as_token_ids": True,
    }
    more: dict[str, tuple[Any, Any]] = {
        "top_k": (sampling.top_k, 0),
        "top_p": (sampling.top_p, 1.0),
        "min_p": (sampling.min_p, 0.0),
        "seed": (sampling.seed, None),
        "stop_token_ids": (list(sampling.stop_tokens), []),
        "stop": (list(sampling.stops), []),
        "ignore_eos": (sampling.ignore_end, False),
        "logit_bias": ({str(token): bias for token, bias in sampling.logit_bias.items()}, {}),
        "echo": (sampling.prompt_logprobs is not None, False),
    }
    return body | {name: value for name, (value, neutral) in more.items() if value != neutral}


def _completion(document: dict[str, Any], prompt: Sequence[int], sampling: Sampling) -> Completion:
    choice = document["choices"][0]
    tokens = _tokens_of(choice)
    assert tokens is not None, "seen when the server was met"
    scores = choice["logprobs"]
    told = [
        None if logprob is None else _logprobs(token, logprob, top)
        for token, logprob, top in zip(tokens, scores["token_logprobs"], scores["top_logprobs"], strict=True)
    ]
    first = len(prompt) if sampling.prompt_logprobs is not None else 0
    return Completion(
        tokens=tuple(tokens[first:]),
        finish=choice["finish_reason"],
        logprobs=_first(told[first:], sampling.logprobs),
        prompt_logprobs=_first(told[1:first], sampling.prompt_logprobs),
    )


def _first(told: Sequence[TokenLogprobs | None], wanted: int | None) -> tuple[TokenLogprobs, ...]:
    if wanted is None:
        return ()
    return tuple(TokenLogprobs(one.chosen, one.top[:wanted], one.rank) for one in told if one is not None)


def _logprobs(token: int, logprob: float, top: dict[str, float] | None) -> TokenLogprobs:
    """Servers put the chosen token among the most likely ones even where it is not; its rank is known only within."""
    ranked = sorted(((_number(name), value) for name, value in (top or {}).items()), key=lambda pair: -pair[1])
    rank = next((place for place, (other, _) in enumerate(ranked) if other == token), len(ranked))
    return TokenLogprobs(logprob, tuple(ranked), rank)


def _tokens_of(choice: dict[str, Any]) -> list[int] | None:
    names = (choice.get("logprobs") or {}).get("tokens")
    if not names or not all(name.startswith(_TOKEN) for name in names):
        return None
    return [_number(name) for name in names]


def _number(name: str) -> int:
    return int(name.removeprefix(_TOKEN))


def _sentence(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


def _retry_after(answer: httpx.Response) -> float:
    given = answer.headers.get("Retry-After", "")
    return float(given) if given.replace(".", "", 1).isdigit() else 0.0
