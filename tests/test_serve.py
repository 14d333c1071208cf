"""The server, driven by OpenAI's own client: the same answers as the engine's, whole and streamed."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import math
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from served import Server, serving
from waiting import GIVE_UP_SECONDS, until

from beringia.chips.open import open_chip
from beringia.data.tokenizer import load_tokenizer
from beringia.engine import Engine, Sampling
from beringia.errors import InputError
from beringia.serve.protocol import ChatMessage
from beringia.serve.server import check_proof

QUESTION = "+3141592653"
TURNS: Any = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("r2-nano", "--chip", "cpu", "--sequences", "8", "--queue", "24") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def greedy() -> tuple[list[int], list[float], str]:
    """What the engine itself says: tokens, their log-probabilities, and their text."""
    chip = open_chip("cpu")
    tokenizer = load_tokenizer("digits")
    engine = Engine("r2-nano", chip, tokenizer=tokenizer)
    wanted = Sampling(max_tokens=12, temperature=0.0, logprobs=2)
    (found,) = engine.generate([tokenizer.encode(QUESTION)], wanted)
    return list(found.tokens), [one.chosen for one in found.logprobs], tokenizer.decode(list(found.tokens))


def test_a_chat_is_answered_as_the_engine_answers(client: openai.OpenAI, greedy: Any) -> None:
    tokens, logprobs, text = greedy
    answer = client.chat.completions.create(
        model="r2-nano", messages=TURNS, temperature=0, max_tokens=12, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert choice.message.content == text and choice.message.role == "assistant"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx(logprobs, abs=1e-6)
    assert bytes(byte for one in choice.logprobs.content for byte in one.bytes or []).decode() == text
    assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)
    assert answer.usage is not None and answer.usage.completion_tokens == len(tokens)
    assert answer.usage.prompt_tokens == len(QUESTION)


def test_the_pieces_of_a_stream_are_the_answer(client: openai.OpenAI, greedy: Any) -> None:
    _, logprobs, text = greedy
    stream = client.chat.completions.create(
        model="r2-nano",
        messages=TURNS,
        temperature=0,
        max_tokens=12,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    said = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in said) == text
    found = [one.logprob for choice in said if choice.logprobs for one in choice.logprobs.content or []]
    assert found == pytest.approx(logprobs, abs=1e-6)
    assert said[0].delta.role == "assistant" and said[-1].finish_reason == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12


def test_many_at_once_get_what_each_would_get_alone(server: Server, greedy: Any) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str | None:
        answer = await client.chat.completions.create(
            model="r2-nano", messages=TURNS, temperature=1.0, seed=seed, max_tokens=12
        )
        return answer.choices[0].message.content

    async def ask_all() -> tuple[list[str | None], list[str | None]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            together = await asyncio.gather(*[ask(client, seed) for seed in range(16)])
            return list(together), [await ask(client, seed) for seed in range(16)]

    together, alone = asyncio.run(ask_all())
    assert together == alone and len(set(alone)) > 8


def test_several_answers_to_one_request_differ_and_are_those_of_their_seeds(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="r2-nano", messages=TURNS, n=3, seed=5, max_tokens=12)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in answer.choices] == [0, 1, 2]
    second = client.chat.completions.create(model="r2-nano", messages=TURNS, seed=6, max_tokens=12)
    assert second.choices[0].message.content == texts[1]
    stream = client.chat.completions.create(model="r2-nano", messages=TURNS, n=3, seed=5, max_tokens=12, stream=True)
    streamed = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_texts_and_tokens_are_completed_alike_and_echoed_with_their_log_probabilities(client: openai.OpenAI) -> None:
    tokens = load_tokenizer("digits").encode(QUESTION)
    asked: Any = {"model": "r2-nano", "temperature": 0, "max_tokens": 3, "logprobs": 2, "echo": True}
    answer = client.completions.create(prompt=[QUESTION, "12"], **asked)
    by_tokens = client.completions.create(prompt=tokens, **asked)
    first, second = answer.choices
    assert first.text == by_tokens.choices[0].text and first.text.startswith(QUESTION)
    assert second.text.startswith("12")
    assert first.logprobs is not None and by_tokens.choices[0].logprobs is not None
    assert first.logprobs.token_logprobs == by_tokens.choices[0].logprobs.token_logprobs
    assert first.logprobs.tokens is not None and "".join(first.logprobs.tokens) == first.text
    assert first.logprobs.text_offset == list(range(len(first.text)))
    assert first.logprobs.token_logprobs is not None and first.logprobs.token_logprobs[0] is None


def test_a_prompt_is_scored_without_new_tokens_as_lm_eval_asks(client: openai.OpenAI) -> None:
    from beringia.model import load_model

    tokens = load_tokenizer("digits").encode(QUESTION)
    answer = client.completions.create(model="r2-nano", prompt=tokens, max_tokens=0, logprobs=1, echo=True)
    (choice,) = answer.choices
    with torch.no_grad():
        logprobs_TV = load_model("r2-nano").logits(torch.tensor([tokens]))[0].log_softmax(-1)
    wanted = [float(logprobs_TV[place, token]) for place, token in enumerate(tokens[1:])]
    assert choice.text == QUESTION and choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_a_stop_string_ends_an_answer_before_it(client: openai.OpenAI, greedy: Any) -> None:
    _, _, text = greedy
    stop = text[4:6]
    kept = text[: text.find(stop)]
    asked: Any = {"model": "r2-nano", "messages": TURNS, "temperature": 0, "max_tokens": 12, "stop": [stop, "never"]}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == kept and answer.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(stream=True, **asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == kept
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_with_drafts_the_answer_and_its_stream_are_the_same(greedy: Any) -> None:
    tokens, logprobs, text = greedy
    with serving("r2-nano", "--chip", "cpu", "--speculate") as running:
        body = {"model": "r2-nano", "messages": TURNS, "temperature": 0, "max_tokens": 12, "logprobs": True}
        (choice,) = running.post(body).json()["choices"]
        assert choice["message"]["content"] == text
        assert [one["logprob"] for one in choice["logprobs"]["content"]] == pytest.approx(logprobs, abs=1e-6)
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            stream = client.chat.completions.create(
                model="r2-nano", messages=TURNS, temperature=0, max_tokens=12, stream=True
            )
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text and len(tokens) == 12


def test_a_biased_token_is_always_chosen_or_never(client: openai.OpenAI) -> None:
    seven = load_tokenizer("digits").encode("7")[0]
    asked: Any = {"model": "r2-nano", "messages": TURNS, "max_tokens": 6}
    always = client.chat.completions.create(logit_bias={str(seven): 100}, **asked)
    assert always.choices[0].message.content == "777777"


def test_models_are_listed_with_what_is_known_of_them(client: openai.OpenAI, server: Server) -> None:
    (model,) = client.models.list().data
    assert model.id == "r2-nano" and client.models.retrieve("r2-nano").id == "r2-nano"
    assert server.about["truth"] == "real" and server.about["operators"] == "compiled"
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}


WRONG: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"messages": []}, 400, "messages", None),
    ({"messages": [{"role": "wizard", "content": "1"}]}, 400, "messages.0.role", None),
    ({"messages": [{"role": "user", "content": "1" * 5000}]}, 400, "room for 4096", "context_length_exceeded"),
    ({"messages": TURNS, "max_tokens": 4090}, 400, "room for 4096", "context_length_exceeded"),
    # By these words litellm and LangChain know that another model is to be tried.
    ({"messages": TURNS, "max_tokens": 4090}, 400, "prompt is too long", "context_length_exceeded"),
    ({"messages": TURNS, "max_tokens": 0}, 400, "max_tokens", None),
    ({"messages": TURNS, "temperature": -1}, 400, "temperature", None),
    ({"messages": TURNS, "top_p": 0}, 400, "top_p", None),
    ({"messages": TURNS, "logit_bias": {"99": 1}}, 400, "99", None),
    ({"messages": TURNS, "n": 1000}, 400, "n:", None),
    ({"messages": TURNS, "frequency_penalty": 0.5}, 400, "frequency_penalty", None),
    ({"messages": TURNS, "tools": [{"type": "function"}]}, 400, "tools", None),
    ({"messages": TURNS, "response_format": {"type": "json_object"}}, 400, "response_format", None),
    ({"messages": TURNS, "top_logprobs": 3}, 400, "top_logprobs", None),
    ({"messages": TURNS, "colour": "red"}, 400, "Unknown field: colour", "unknown_parameter"),
    ({"messages": TURNS, "model": "gpt-5"}, 404, "There is no model 'gpt-5'", "model_not_found"),
]


@pytest.mark.parametrize(("body", "status", "words", "code"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said_in_openai_s_error_object(
    server: Server, body: dict[str, Any], status: int, words: str, code: str | None
) -> None:
    found = server.post({"model": "r2-nano"} | body)
    error = found.json()["error"]
    assert found.status_code == status and words in error["message"], error
    assert error["code"] == code and error["type"] == "invalid_request_error"


PICTURE = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
OF_ITS_KIND: list[tuple[str, dict[str, Any], str, str | None]] = [
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": PICTURE}]},
        "should be 'text'",
        "messages.0.content.1.type",
    ),
    ("chat/completions", {"messages": [{"role": "user", "content": []}]}, "at least 1 item", "messages.0.content"),
    ("chat/completions", {"messages": [{"role": "user", "content": 7}]}, "valid string", "messages.0.content"),
    ("chat/completions", {"messages": TURNS, "stop": list("abcdefghijklmnopq")}, "at most 16 items", "stop"),
    ("chat/completions", {"messages": TURNS, "stop": ["a", ""]}, "at least 1 character", "stop.1"),
    ("chat/completions", {"messages": TURNS, "stop": ""}, "at least 1 character", "stop"),
    ("chat/completions", {"messages": TURNS, "presence_penalty": 0.5}, "is not supported", "presence_penalty"),
    ("completions", {"prompt": [1, -1]}, "greater than or equal to 0", "prompt.1"),
    ("completions", {"prompt": ["1", 2]}, "valid string", "prompt.1"),
    ("completions", {"prompt": [[1], []]}, "at least 1 item", "prompt.1"),
    ("completions", {"prompt": {"text": "1"}}, "valid string", "prompt"),
    ("completions", {"prompt": []}, "at least 1 item", "prompt"),
]


@pytest.mark.parametrize(("path", "body", "words", "field"), OF_ITS_KIND, ids=lambda value: str(value)[:40])
def test_where_a_field_may_be_of_several_kinds_the_error_is_of_the_one_that_was_given(
    server: Server, path: str, body: dict[str, Any], words: str, field: str | None
) -> None:
    found = server.post({"model": "r2-nano"} | body, path=f"/v1/{path}")
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, field)
    assert words in error["message"]


def test_a_body_that_does_not_say_that_it_is_json_is_told_which_header_to_set(server: Server) -> None:
    """As `curl -d` sends it."""
    body = json.dumps({"model": "r2-nano", "messages": TURNS})
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    found = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=GIVE_UP_SECONDS)
    assert found.status_code == 400
    assert (
        "as 'application/x-www-form-urlencoded': set Content-Type: application/json" in found.json()["error"]["message"]
    )


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (
            b'{"model": "r2-nano", "messages": [{"role": "user", "content": "1"}], "temperature": NaN}',
            400,
            "temperature",
        ),
        (b'{"model": "r2-nano", "messages": [{"role": "user", "content": "\xff\xfe"}]}', 400, "body"),
        (b"{", 400, "not JSON"),
        (b"[1]", 400, ""),
        (b'{"a": "' + b"x" * 10_000_000 + b'"}', 413, "more than"),
    ],
    ids=["nan", "utf-8", "cut", "list", "10 MB"],
)
def test_a_body_that_is_no_request_is_refused(server: Server, content: bytes, status: int, words: str) -> None:
    headers = {"Content-Type": "application/json"}
    found = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=GIVE_UP_SECONDS)
    assert found.status_code == status and words in found.json()["error"]["message"], found.text


def test_best_of_is_refused_and_unknown_paths_are_told(server: Server) -> None:
    refused = server.post({"model": "r2-nano", "prompt": "1", "best_of": 2}, path="/v1/completions")
    assert refused.status_code == 400 and "best_of" in refused.json()["error"]["message"]
    assert server.get("/v1/embeddings").json()["error"]["message"] == "Not Found."


def test_a_client_that_goes_away_frees_its_place(server: Server) -> None:
    body = {"model": "r2-nano", "messages": TURNS, "max_tokens": 4000, "ignore_eos": True}
    for stream in (True, False):
        content = json.dumps(body | {"stream": stream}).encode()
        with _connected(server) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            until(lambda: server.metric("beringia_requests_open") == 1, "the request is open")
            if stream:
                assert connection.recv(1000)
        until(lambda: server.metric("beringia_requests_open") == 0, "its place is free")
    until(lambda: server.metric("beringia_cache_use") == 0, "its memory is free")
    assert server.metric('beringia_requests_total{finish="abort"}') >= 2


def test_more_requests_than_there_are_places_get_429_and_the_others_their_answers(server: Server) -> None:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        body = {"model": "r2-nano", "messages": TURNS, "max_tokens": 150, "ignore_eos": True}
        return await client.post(f"{server.url}/v1/chat/completions", json=body, timeout=GIVE_UP_SECONDS)

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=100)) as client:
            return await asyncio.gather(*[ask(client) for _ in range(60)])

    found = asyncio.run(ask_all())
    statuses = [response.status_code for response in found]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 24
    refused = next(response for response in found if response.status_code == 429)
    assert refused.headers["Retry-After"] == "1" and refused.json()["error"]["code"] == "queue_full"


@pytest.mark.slow
def test_a_client_that_sends_its_request_byte_by_byte_does_not_keep_its_connection(tmp_path: Path) -> None:
    from beringia.serve import server as module

    assert module.HEADER_SECONDS <= 30
    patched = tmp_path / "impatient.py"
    patched.write_text(
        "import sys\nfrom beringia.serve import server\nserver.HEADER_SECONDS = 1.0\n"
        "from beringia.cli import main\nmain(sys.argv[1:])\n"
    )
    with serving("r2-nano", "--chip", "cpu", program=(str(patched),)) as running:
        with _connected(running) as connection:
            for pause_seconds in (0.0, 1.5, 1.5):  # idle for longer than a head may take
                threading.Event().wait(pause_seconds)
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                assert answer.status == 200 and answer.read()
            letters = itertools.cycle(b"GET /health HTTP/1.1\r\nHost: a\r\n")
            until(lambda: not _takes(connection, bytes([next(letters)])), "it is closed on")
        with _connected(running) as connection:
            letters = itertools.cycle(b"GET /health HTTP/1.1\r\nHost: a\r\n")
            until(lambda: not _takes(connection, bytes([next(letters)])), "it is closed on")
        assert running.get("/health").status_code == 200


def test_an_idle_connection_outlives_the_patience_of_clients_that_keep_theirs() -> None:
    from beringia.serve.server import IDLE_SECONDS

    assert IDLE_SECONDS > 15, "aiohttp's; httpx keeps one for 5 seconds"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants one of two keys."""
    keys = tmp_path_factory.mktemp("locked") / "keys"
    keys.write_text("first-key\nsecond-key\n")
    with serving("r2-nano", "--chip", "cpu", "--api-key-file", str(keys)) as running:
        yield running


def with_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_with_keys_only_their_holders_are_served(locked: Server) -> None:
    for key, status in (("first-key", 200), ("second-key", 200), ("third-key", 401)):
        assert locked.get("/v1/models", headers=with_key(key)).status_code == status
    missing = locked.post({"model": "r2-nano", "messages": TURNS})
    assert missing.status_code == 401 and missing.json()["error"]["code"] == "invalid_api_key"
    assert missing.headers["WWW-Authenticate"] == "Bearer"
    assert locked.get("/health").status_code == 200, "probes have no key"
    asks = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    before = httpx.options(f"{locked.url}/v1/chat/completions", headers=asks)
    assert before.status_code == 200, "a browser asks first, without the page's key"
    asks["Access-Control-Request-Headers"] = "a" * 40_000
    assert httpx.options(f"{locked.url}/v1/chat/completions", headers=asks).status_code == 431


def test_a_scheme_s_name_may_be_written_in_any_case(locked: Server) -> None:
    for scheme in ("bearer ", "BEARER ", "Bearer  "):
        assert locked.get("/v1/models", headers={"Authorization": f"{scheme}first-key"}).status_code == 200
    for wrong in ("bearer", "basic first-key", "bearer FIRST-KEY", "bearerfirst-key"):
        assert locked.get("/v1/models", headers={"Authorization": wrong}).status_code == 401


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
ENDLESS = {
    "header": HEAD + b"X-Long: ",
    "headers": HEAD,
    "path": b"GET /",
    "chunk's extension": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;name=",
    "trailer": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Long: ",
}


FAR_MORE_BYTES = 64 << 20
"""Than a head may have, and than the kernel's buffers of both ends hold while a busy server has yet to close."""


@pytest.mark.parametrize("kind", ENDLESS)
def test_who_has_no_key_cannot_fill_the_server_s_memory_with_a_head(locked: Server, kind: str) -> None:
    piece = b"".join(b"X-%d: 1\r\n" % number for number in range(100)) if kind == "headers" else b"a" * 1000
    with _connected(locked) as connection:
        connection.sendall(ENDLESS[kind])
        sent = 0
        while sent < FAR_MORE_BYTES and _takes(connection, piece):
            sent += len(piece)
        assert sent < FAR_MORE_BYTES, "it is closed"
    assert locked.get("/health").status_code == 200


def test_a_head_that_is_too_large_is_told(locked: Server) -> None:
    for headers in ({"X-Long": "a" * 40_000}, {f"X-{number}": "a" * 100 for number in range(400)}):
        refused = locked.get("/v1/models", headers=headers)
        assert refused.status_code == 431 and refused.json()["error"]["code"] == "head_too_large"
    fits = locked.get("/v1/models", headers=with_key("first-key") | {"X-Long": "a" * 30_000})
    assert fits.status_code == 200


def test_what_is_open_to_all_keeps_no_body(locked: Server) -> None:
    before = _memory(locked)
    pieces = [b"a" * (1 << 20)] * 4
    with ExitStack() as stack:
        for _ in range(30):
            connection = stack.enter_context(_connected(locked))
            head = b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 4194305\r\n\r\n"
            connection.sendall(head)
            assert b"405" in connection.recv(100), "it is answered before its body comes"
            for piece in pieces:
                connection.sendall(piece)
        assert _memory(locked) - before < 60 << 20, "half of what was sent"


def test_sigterm_lets_what_runs_come_to_its_end(locked: Server) -> None:
    """The last test of that server."""
    body = {"model": "r2-nano", "messages": TURNS, "max_tokens": 600, "ignore_eos": True, "stream": True}
    lines: list[str] = []
    begun = threading.Event()

    def ask() -> None:
        url, key = f"{locked.url}/v1/chat/completions", with_key("second-key")
        with httpx.stream("POST", url, json=body, headers=key, timeout=GIVE_UP_SECONDS) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                if len(lines) > 6:
                    begun.set()

    thread = threading.Thread(target=ask)
    thread.start()
    until(begun.is_set, "the answer has begun")
    code, said = locked.stop()
    thread.join()
    assert lines[-2:] == ["data: [DONE]", ""] and code == 0, said


def test_an_address_that_others_reach_needs_keys_and_a_taken_port_is_told(server: Server) -> None:
    with pytest.raises(AssertionError, match="--api-key-file"), serving("r2-nano", "--host", "0.0.0.0"):
        pass
    port = server.url.rpartition(":")[2]
    with pytest.raises(AssertionError, match="Cannot listen"), serving("r2-nano", "--port", port):
        pass


@pytest.mark.slow
def test_without_the_proof_that_was_asked_for_nothing_is_served(tmp_path: Path) -> None:
    path = str(tmp_path / "proof.json")
    with pytest.raises(AssertionError, match="proof"), serving("r2-nano", "--chip", "cpu", "--proof", path):
        pass


@pytest.mark.parametrize("content", [None, "{", '{"kind": "handover"}'])
def test_what_is_no_proof_is_none(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "proof.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match="proof"):
        check_proof(path, "0123456789abcdef")


@pytest.mark.slow
def test_an_error_of_the_chip_fails_its_requests_in_words_and_the_server_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "once.toml"
    script.write_text('summary = "fails once"\n[[faults]]\nkind = "exception"\nat_step = 3\ncode = "507014"\n')
    with serving("r2-nano", "--chip", "emulated:ascend-910b", "--faults", str(script)) as running:
        body = {"model": "r2-nano", "messages": TURNS, "temperature": 0, "max_tokens": 8}
        failed = running.post(body)
        assert failed.status_code == 500 and "507014" in failed.json()["error"]["message"]
        assert running.post(body).status_code == 200
        assert running.about["truth"] == "emulated"


def _connected(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def _takes(connection: socket.socket, content: bytes) -> bool:
    """Whether the other side of a connection still takes something."""
    try:
        connection.sendall(content)
    except OSError:
        return False
    return True


def test_log_probabilities_of_nothing_likely_are_finite(client: openai.OpenAI) -> None:
    """JSON has no infinity."""
    answer = client.completions.create(
        model="r2-nano", prompt="1", max_tokens=2, logprobs=20, logit_bias={"5": -100}, temperature=0
    )
    assert answer.choices[0].logprobs is not None
    assert all(math.isfinite(value) for value in answer.choices[0].logprobs.token_logprobs or [])


def test_an_answer_s_message_may_come_back_as_history_whole_and_streamed(server: Server, client: openai.OpenAI) -> None:
    body = {"model": "r2-nano", "messages": TURNS, "temperature": 0, "max_tokens": 12}
    said = server.post(body).json()["choices"][0]["message"]
    assert server.post(body | {"messages": [*TURNS, said, *TURNS]}).status_code == 200
    whole = client.chat.completions.create(**body).choices[0].message  # type: ignore[call-overload]
    with client.chat.completions.stream(**body) as stream:
        stream.until_done()
        streamed = stream.current_completion_snapshot.choices[0].message
    for message in (whole, streamed, whole.model_dump(), whole.model_dump(exclude_unset=True)):
        answer = client.chat.completions.create(
            model="r2-nano", messages=[*TURNS, message, *TURNS], temperature=0, max_tokens=1
        )
        length = len(QUESTION) * 2 + len(said["content"]) + 1
        assert answer.usage is not None and answer.usage.prompt_tokens == length, "the answer and its end mark are in"


def test_earlier_reasoning_reaches_the_template_under_the_name_that_templates_read() -> None:
    for names in (("reasoning",), ("reasoning_content",), ("reasoning", "reasoning_content")):
        message = ChatMessage(role="assistant", content="four", **dict.fromkeys(names, "two and two"))
        assert message.for_template() == {"role": "assistant", "content": "four", "reasoning_content": "two and two"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"role": "user", "reasoning": "hm"}, "reasoning is for messages of the assistant"),
        ({"reasoning": "hm", "reasoning_content": "ah"}, "differ"),
        ({"refusal": "no"}, "refusal"),
        ({"tool_calls": []}, "tool_calls"),
        ({"colour": "red"}, "Unknown field: messages.0.colour"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_message_has_and_the_server_would_ignore_is_refused(
    server: Server, more: dict[str, Any], words: str
) -> None:
    refused = server.post({"model": "r2-nano", "messages": [{"role": "assistant", "content": "1"} | more]})
    assert refused.status_code == 400 and words in refused.json()["error"]["message"], refused.text


HALF = r"\ud83d"
HALVES: list[tuple[str, str]] = [
    ("chat/completions", f'"messages": [{{"role": "user", "content": "cut {HALF}"}}]'),
    ("chat/completions", f'"messages": [{{"role": "user", "content": "1", "name": "{HALF}"}}]'),
    ("chat/completions", f'"messages": [{{"role": "{HALF}", "content": "1"}}]'),
    ("chat/completions", f'"messages": [{{"role": "user", "content": "1"}}], "{HALF}": 1'),
    ("chat/completions", f'"messages": [{{"role": "user", "content": "1"}}], "stop": ["{HALF}"]'),
    ("completions", f'"prompt": "cut {HALF}"'),
    ("completions", f'"prompt": ["1", "{HALF}"]'),
    ("completions", f'"prompt": "1", "logit_bias": {{"{HALF}": 1}}'),
    ("completions", f'"prompt": "1", "user": "{HALF}"'),
    ("completions", f'"prompt": "1", "model": "{HALF}"'),
    ("completions", '"prompt": "1", "user": "\ud83d"'),
]


def test_half_a_surrogate_pair_is_refused_wherever_it_stands_and_the_connection_goes_on(server: Server) -> None:
    with _kept(server) as connection:
        for path, fields in HALVES:
            body = f'{{"model": "r2-nano", {fields}}}'.encode(errors="surrogatepass")
            status, error = _asked(connection, f"/v1/{path}", body)
            assert status == 400 and "surrogate" in error["error"]["message"], (fields, error)
        whole = rb'{"model": "r2-nano", "prompt": "1", "max_tokens": 1, "user": "\ud83d\ude00"}'
        assert _asked(connection, "/v1/completions", whole)[0] == 200, "a whole pair is a character"


def test_a_body_is_refused_however_deep_it_is_nested(server: Server) -> None:
    with _kept(server) as connection:
        for depth in (200, *range(880, 1000, 2), 100_000):
            body = '{"model": "r2-nano", "prompt": "1", "user": ' + "[" * depth + "]" * depth + "}"
            assert _asked(connection, "/v1/completions", body.encode())[0] == 400, depth


@pytest.mark.slow
def test_an_error_that_nobody_foresaw_is_told_and_counted_and_the_connection_goes_on(tmp_path: Path) -> None:
    patched = tmp_path / "broken.py"
    patched.write_text(
        "import sys\nfrom beringia.serve import app\ndel app.room_for\n"
        "from beringia.cli import main\nmain(sys.argv[1:])\n"
    )
    with serving("r2-nano", "--chip", "cpu", program=(str(patched),)) as running, _kept(running) as connection:
        for asked in (1, 2):
            status, error = _asked(connection, "/v1/completions", b'{"model": "r2-nano", "prompt": "1"}')
            assert status == 500 and "NameError" in error["error"]["message"]
            assert running.metric('beringia_requests_refused_total{status="500"}') == asked


def test_more_answers_than_there_are_places_are_refused_for_good_not_for_now(server: Server) -> None:
    for prompts, n in ((25, 1), (13, 2), (2, 16)):
        body = {"model": "r2-nano", "prompt": ["1"] * prompts, "n": n, "max_tokens": 1}
        refused = server.post(body, path="/v1/completions")
        assert refused.status_code == 400 and "Retry-After" not in refused.headers
        assert f"{prompts * n} answers" in refused.json()["error"]["message"] and "24" in refused.text
    fits = server.post({"model": "r2-nano", "prompt": ["1"] * 24, "max_tokens": 1}, path="/v1/completions")
    assert len(fits.json()["choices"]) == 24


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("completions", {"prompt": "1", "max_tokens": 0, "echo": True, "logprobs": 0}),
        ("completions", {"prompt": ["1", "23"], "max_tokens": 5, "echo": True, "n": 2}),
        ("completions", {"prompt": "1", "max_tokens": 40, "stop": ["4", "5"]}),
        ("chat/completions", {"messages": TURNS, "max_tokens": 40, "stop": "7"}),
        ("chat/completions", {"messages": TURNS, "max_tokens": 9, "n": 3, "logprobs": True}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_stream_s_usage_is_the_whole_answer_s(server: Server, path: str, asked: dict[str, Any]) -> None:
    body = {"model": "r2-nano", "seed": 3} | asked
    whole = server.post(body, path=f"/v1/{path}").json()["usage"]
    streamed = server.post(body | {"stream": True, "stream_options": {"include_usage": True}}, path=f"/v1/{path}")
    *_, last, done = [line for line in streamed.text.splitlines() if line]
    assert done == "data: [DONE]" and json.loads(last.removeprefix("data: "))["usage"] == whole


def test_a_stream_whose_usage_is_continuous_counts_up_to_the_whole_answer_s(server: Server) -> None:
    """As load generators ask for it, with every request."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    # Many tokens: of a few, all may come in one piece where the machine is busy.
    body = {"model": "r2-nano", "messages": TURNS, "max_tokens": 400, "seed": 3, "ignore_eos": True}
    streamed = server.post(body | {"stream": True, "stream_options": options})
    pieces = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    counts = [piece["usage"]["completion_tokens"] for piece in pieces]
    assert counts == sorted(counts) and counts[-2:] == [400, 400]
    assert len(set(counts)) > 3
    refused = server.post(body | {"stream": True, "stream_options": {"continuous_usage_stats": True}})
    assert refused.status_code == 400 and "include_usage: true" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("origin", "lets"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("https://example.org", False),
        ("http://localhost.example.org", False),
        ("http://localhost:3000.example.org", False),
        ("null", False),
    ],
)
def test_a_browser_lets_pages_of_this_machine_ask_and_no_others(server: Server, origin: str, lets: bool) -> None:
    with httpx.Client(base_url=server.url) as browser:
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        before = browser.options("/v1/chat/completions", headers=asks | {"Origin": origin})
        answer = browser.get("/v1/models", headers={"Origin": origin})
    assert answer.status_code == 200
    for response in (before, answer):
        assert response.headers.get("access-control-allow-origin") == (origin if lets else None)
    if lets:
        assert before.status_code == 200 and "authorization" in before.headers["access-control-allow-headers"]


@contextmanager
def _kept(server: Server) -> Iterator[http.client.HTTPConnection]:
    """A connection that is not opened again where the server closes it."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=GIVE_UP_SECONDS)
    connection.connect()
    connection.auto_open = 0
    try:
        yield connection
    finally:
        connection.close()


def _asked(connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, Any]:
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def _memory(server: Server) -> int:
    """Bytes that the server's process holds."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))
