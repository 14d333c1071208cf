"""The client over HTTP gives what the engine gives, tries again what may pass, and says what a server cannot do."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from served import Server, serving
from waiting import GIVE_UP_SECONDS

from beringia.chips.open import open_chip
from beringia.data.tokenizer import load_tokenizer
from beringia.engine import Engine, Sampling
from beringia.engine.endpoint import Endpoint, EndpointFailed
from beringia.errors import InputError

PROMPTS = [[5, 6, 7, 8], [9, 10], [11] * 20, [12]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("r2-nano", "--chip", "cpu", "--queue", "8") as running:
        yield running


@contextmanager
def before(server: Server, answer: Any) -> Iterator[str]:
    """A proxy: `answer(number, path)` is what it says instead of the server to request `number`, or None."""
    counted: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._pass_on(None)

        def do_POST(self) -> None:
            self._pass_on(self.rfile.read(int(self.headers["Content-Length"])))

        def _pass_on(self, body: bytes | None) -> None:
            counted.append(self.path)
            instead = answer(len(counted) - 1, self.path)
            if instead == "hang up":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if instead is None:
                headers = {"Content-Type": "application/json"}
                found = httpx.request(
                    self.command, server.url + self.path, content=body, headers=headers, timeout=GIVE_UP_SECONDS
                )
                instead = found.status_code, found.json(), {}
            status, document, headers = instead
            content = json.dumps(document).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}/v1"
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


def test_it_gives_what_the_engine_gives(server: Server) -> None:
    asked = [
        Sampling(max_tokens=9, temperature=0.0, logprobs=3),
        Sampling(max_tokens=9, seed=4, top_k=7, top_p=0.9, min_p=0.01, logprobs=0, ignore_end=True),
        Sampling(max_tokens=5, seed=5, prompt_logprobs=2, stop_tokens=(20,), logit_bias={20: 3.0}),
        Sampling(max_tokens=40, seed=6, stops=tuple("0123456789")),
    ]
    chip = open_chip("cpu")
    here = Engine("r2-nano", chip, tokenizer=load_tokenizer("digits")).generate(PROMPTS, asked)
    assert here[-1].finish == "stop"
    there = Endpoint(server.url).generate(PROMPTS, asked)
    for one, other in zip(here, there, strict=True):
        assert (one.tokens, one.finish) == (other.tokens, other.finish)
        for mine, theirs in ((one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)):
            assert [pair.chosen for pair in mine] == [pair.chosen for pair in theirs]
            assert [pair.top for pair in mine] == [pair.top for pair in theirs]
    chip.close()


@pytest.mark.slow
def test_more_requests_than_the_server_takes_are_all_answered_in_the_end(server: Server) -> None:
    endpoint = Endpoint(server.url, tries=12, first_wait_seconds=0.05)
    found = endpoint.generate([[5, 6]] * 40, Sampling(max_tokens=30, temperature=0.0, ignore_end=True))
    assert len(found) == 40 and len({one.tokens for one in found}) == 1


def test_what_may_pass_is_tried_again(server: Server) -> None:
    troubles = ["hang up", (503, {"error": {"message": "starting"}}, {}), (429, {}, {"Retry-After": "0"})]
    with before(server, lambda number, _: troubles[number] if number < len(troubles) else None) as url:
        endpoint = Endpoint(url, first_wait_seconds=0.01)
    assert endpoint.model == "r2-nano" and endpoint.abilities.missing == ()


def test_one_that_never_answers_is_told_with_what_it_said_last(server: Server) -> None:
    broken = before(server, lambda *_: (500, {"error": {"message": "the chip is on fire"}}, {}))
    with broken as url, pytest.raises(EndpointFailed, match="3 tries.*the chip is on fire"):
        Endpoint(url, tries=3, first_wait_seconds=0.01)


def test_a_refusal_is_not_tried_again(server: Server) -> None:
    endpoint = Endpoint(server.url, tries=50, first_wait_seconds=10.0)
    with pytest.raises(InputError, match="room for 4096 tokens"):
        endpoint.generate([[5]], Sampling(max_tokens=5000))
    with pytest.raises(InputError, match="has no model 'other'"):
        Endpoint(server.url, model="other")


def test_what_a_server_cannot_do_is_known_before_it_is_asked(server: Server) -> None:
    def without_echo(number: int, path: str) -> Any:
        return (400, {"error": {"message": "echo is not supported"}}, {}) if number == 2 else None

    with before(server, without_echo) as url:
        endpoint = Endpoint(url)
        assert endpoint.abilities.missing == ("log-probabilities of prompts",)
        assert endpoint.generate([[5]], Sampling(max_tokens=2, temperature=0.0))[0].finish == "length"
        with pytest.raises(InputError, match="does not give a prompt's log-probabilities"):
            endpoint.generate([[5]], Sampling(max_tokens=2, prompt_logprobs=1))


def test_a_server_that_answers_with_text_only_is_refused(server: Server) -> None:
    text = {"choices": [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}]}
    text_only = before(server, lambda _, path: (200, text, {}) if path.endswith("completions") else None)
    with text_only as url, pytest.raises(InputError, match="answers with text only"):
        Endpoint(url)


@pytest.mark.slow
def test_a_server_with_keys_is_asked_with_one(tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with serving("r2-nano", "--chip", "cpu", "--api-key-file", str(keys)) as running:
        assert Endpoint(running.url, key="secret").model == "r2-nano"
        with pytest.raises(InputError, match="status 401"):
            Endpoint(running.url, tries=3)
