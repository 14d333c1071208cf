"""Answers that nobody reads, or that are read slowly: others do not wait for them, and they have an end."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from served import Server, serving
from waiting import GIVE_UP_SECONDS, until

from beringia.data.tokenizer import load_tokenizer
from beringia.engine import Sampling
from beringia.engine.sampling import TokenLogprobs
from beringia.serve.answering import parts_of
from beringia.serve.engine_thread import Mail, News, Ticket

ANSWERS, TOKENS = 4, 1500
"""With 20 log-probabilities a token that is some 12 MB: more than the sockets between two processes hold."""


@contextmanager
def asking(server: Server, *, window_bytes: int = 4096) -> Iterator[socket.socket]:
    """A connection on which those answers are on their way."""
    body = {
        "model": "r2-nano",
        "messages": [{"role": "user", "content": "1+1"}],
        "max_tokens": TOKENS,
        "n": ANSWERS,
        "ignore_eos": True,
        "stream": True,
        "logprobs": True,
        "top_logprobs": 20,
    }
    content = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window_bytes)
        connection.settimeout(GIVE_UP_SECONDS)
        connection.connect((host, int(port)))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        yield connection


def read_to_the_end(connection: socket.socket, *, pause_seconds: float = 0.0) -> int:
    """How many pieces came."""
    read = b""
    while b"data: [DONE]" not in read[-200:]:
        some = connection.recv(1 << 17)
        assert some, "it was cut off"
        read += some
        time.sleep(pause_seconds)
    return read.count(b"data: {")


def finished(server: Server) -> float:
    """Answers that the engine has finished; there is no such number before the first."""
    name = 'beringia_requests_total{finish="length"} '
    return sum(float(line.removeprefix(name)) for line in server.get("/metrics").text.splitlines() if name in line)


@pytest.mark.slow
def test_an_answer_has_its_place_until_it_is_written_and_its_client_gone_it_is_free_at_once() -> None:
    with serving("r2-nano", "--chip", "cpu") as running:
        with asking(running) as connection:
            until(lambda: finished(running) == ANSWERS, "the engine is done")
            assert running.metric("beringia_requests_open") == ANSWERS
            assert running.metric("beringia_cache_use") == 0
            assert read_to_the_end(connection) >= ANSWERS * TOKENS
            assert running.metric("beringia_requests_open") == 0
        with asking(running):
            until(lambda: finished(running) == 2 * ANSWERS, "the engine is done")
        until(lambda: running.metric("beringia_requests_open") == 0, "its places are free")


@pytest.mark.slow
def test_who_reads_nothing_is_cut_off_and_who_reads_slowly_gets_the_whole_answer(tmp_path: Path) -> None:
    patched = tmp_path / "impatient.py"
    patched.write_text(
        "import sys\nfrom beringia.serve import server\nserver.UNREAD_SECONDS = 1.0\n"
        "from beringia.cli import main\nmain(sys.argv[1:])\n"
    )
    with serving("r2-nano", "--chip", "cpu", program=(str(patched),)) as running:
        with asking(running) as idle, asking(running, window_bytes=1 << 16) as slow:
            assert read_to_the_end(slow, pause_seconds=0.05) >= ANSWERS * TOKENS
            until(lambda: running.metric("beringia_requests_open") == 0, "the other has no place any more")
            with pytest.raises(AssertionError, match="cut off"):
                read_to_the_end(idle)
        assert running.stop()[0] == 0


@pytest.mark.slow
def test_a_server_that_ends_tells_what_is_not_done_and_cuts_off_who_reads_nothing() -> None:
    with serving("r2-nano", "--chip", "cpu", "--drain", "1") as running:
        body = {"model": "r2-nano", "prompt": "1", "max_tokens": 4000, "ignore_eos": True}
        with (
            asking(running),
            ThreadPoolExecutor() as pool,
            httpx.stream("POST", f"{running.url}/v1/completions", json=body | {"stream": True}, timeout=60) as stream,
        ):
            whole = pool.submit(running.post, body, path="/v1/completions")
            lines = stream.iter_lines()
            assert next(lines).startswith("data: {")
            until(lambda: running.metric("beringia_requests_open") == ANSWERS + 2, "all are on their way")
            code, said = running.stop()
            assert code == 0 and "Traceback" not in said and "Error" not in said, said
            last = [line for line in lines if line][-1]
            assert "had to shut down before its end" in last and "[DONE]" not in last
            assert whole.result().status_code == 500 and "had to shut down" in whole.result().text


def test_however_much_waits_to_be_read_others_have_their_turns() -> None:
    mail, count = Mail(), 6400
    top = tuple((token, -float(token)) for token in range(20))
    for place in range(count):
        last = place == count - 1
        mail.put(0, News(1, TokenLogprobs(-1.0, top), "length" if last else None, None, ()))
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def read() -> int:
        beside = asyncio.create_task(other())
        ticket = Ticket(0, [1], Sampling(max_tokens=count), mail)
        parts = [part async for some in parts_of([ticket], load_tokenizer("digits"), (), (None,)) for part in some]
        beside.cancel()
        return len(parts)

    assert asyncio.run(read()) == count and turns >= count // 64 - 1
