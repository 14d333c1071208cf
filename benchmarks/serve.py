"""Two servers under the same load: ours and vLLM's on the CPU, one after the other. Prints one JSON object.

    python benchmarks/serve.py --json [--clients 200 --seconds 60]

Each of the clients asks r2-micro for `NEW_TOKENS` tokens after a prompt of `PROMPT_TOKENS`, streamed, and asks again as
soon as it has them; they begin one by one over `RAMP_SECONDS`. One request in five is left after a few tokens. Reported
are the times to the first token, and between two tokens on a request's average (medians and 99th percentiles over all
requests that were answered in full), how many requests got no answer, what the server still holds when all have gone,
and how its memory grew between the tenth second and the end.

Then ours alone, asked ten times as often as it was then, whatever it answers. And the time from the command to the
first token of the first request: warm, each server's second start, for the first reads files from disk and compiles
(vLLM keeps what it compiled, ours needs 2 s of a compiler); both are reported.

Must hold: no request lost, none left in the server, memory grows by less than `FLAT`, all four times at most vLLM's;
under overload nothing but 429 and answers, and at most twice the median time between tokens; the first token within
five seconds of a warm start. vLLM takes part where `.venv-vllm` has it. The load generator shares the two cores with
the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import uvloop

import beringia
from beringia.data.tokenizer import write_tokenizer
from beringia.machine.threads import usable_cores

PROMPT_TOKENS, NEW_TOKENS = 32, 64
LEAVING = 0.2
RAMP_SECONDS = 5.0
FLAT = 0.05
OVERLOAD = 10
FIRST_TOKEN_SECONDS = 5.0
VLLM = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"


@dataclass
class Measured:
    """What the clients saw."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    answered: int = 0
    left: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    tokens: int = 0


class Server:
    """A server process with the model, answering."""

    def __init__(self, command: list[str]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        began = time.perf_counter()
        # GiB; its default takes most of the machine. Its own choice of threads is the best here: with one on every
        # core, as in `engine.py`, it gave 3,450 tokens a second for 4,810, for its front needs one.
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2"}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._said, text=True, env=environment)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if '"url"' not in line:
            self._said.seek(0)
            raise SystemExit(f"{line}{self._said.read()[-2000:].decode()}")
        self.url: str = json.loads(line)["url"]
        self.port = int(self.url.rpartition(":")[2])
        asyncio.run(_ask_once(self.port))
        self.first_token_seconds = time.perf_counter() - began

    def memory(self) -> int:
        """Resident bytes of its processes."""
        return sum(_resident(pid) for pid in _family(self._process.pid))

    def open_requests(self) -> float:
        """What it says it still has."""
        lines = urlopen(f"{self.url}/metrics").read().decode().splitlines()
        names = ("beringia_requests_open", "vllm:num_requests_running", "vllm:num_requests_waiting")
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names))

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(120)


async def _ask_once(port: int) -> None:
    measured = Measured()
    await _request(port, random.Random(1), measured, leaves_after=None)
    if measured.answered != 1:
        raise SystemExit(f"the first request was not answered: {measured.lost}")


def _body(drawn: random.Random) -> bytes:
    prompt = [drawn.randrange(4, 54) for _ in range(PROMPT_TOKENS)]
    body = {"model": "r2-micro", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    # With their numbers, so that tokens without text (an untrained model says many) have an event, too.
    streamed = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    return json.dumps(body | streamed).encode()


async def _request(port: int, drawn: random.Random, measured: Measured, leaves_after: int | None) -> None:
    """One request over a connection of its own, read as raw bytes: the generator must not cost more than the server."""
    body = _body(drawn)
    began = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as problem:
        measured.lost.append(str(problem))
        return
    try:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        status = (await reader.readline()).split()
        if len(status) < 2 or status[1] != b"200":
            if len(status) > 1 and status[1] == b"429":
                measured.refused += 1
            else:
                measured.lost.append(b" ".join(status).decode())
            return
        await _read_stream(reader, measured, began, leaves_after)
    except (OSError, asyncio.IncompleteReadError) as problem:
        measured.lost.append(f"{type(problem).__name__}: {problem}")
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _read_stream(
    reader: asyncio.StreamReader, measured: Measured, began: float, leaves_after: int | None
) -> None:
    first: float | None = None
    last, count, text = began, 0, b""
    while part := await reader.read(1 << 16):
        now = time.perf_counter()
        text = text[-1000:] + part
        new = part.count(b'"text":')
        for _ in range(new):
            if first is None:
                first = now - began
            last = now
        count += new
        if leaves_after is not None and count >= leaves_after:
            measured.left += 1
            measured.tokens += count
            return
        if b"[DONE]" in text:
            break
    # An event may have several tokens: how many there were is in the usage.
    if first is None or b"[DONE]" not in text or not re.search(rb'"completion_tokens": ?%d\b' % NEW_TOKENS, text):
        measured.lost.append(f"cut off after {count} events")
        return
    measured.answered += 1
    measured.tokens += NEW_TOKENS
    measured.first.append(first)
    measured.between.append((last - began - first) / (NEW_TOKENS - 1))


async def _client(number: int, port: int, start: float, end: float, measured: Measured) -> None:
    drawn = random.Random(number)
    await asyncio.sleep(max(0.0, start - time.perf_counter()))
    while time.perf_counter() < end:
        refused = measured.refused
        await _request(port, drawn, measured, _leaves_after(drawn))
        if measured.refused > refused:
            await asyncio.sleep(1.0)  # as Retry-After says


def _leaves_after(drawn: random.Random) -> int | None:
    return drawn.randrange(1, NEW_TOKENS) if drawn.random() < LEAVING else None


async def _clients(number: int, port: int, seconds: float, measured: Measured) -> None:
    begin = time.perf_counter()
    starts = [begin + RAMP_SECONDS * client / number for client in range(number)]
    await asyncio.gather(
        *[_client(client, port, start, begin + seconds, measured) for client, start in enumerate(starts)]
    )


async def _arrivals(a_second: float, port: int, seconds: float, measured: Measured) -> None:
    drawn, begin = random.Random(0), time.perf_counter()
    asking: set[asyncio.Task[None]] = set()
    for number in range(int(a_second * seconds)):
        await asyncio.sleep(max(0.0, begin + number / a_second - time.perf_counter()))
        one = asyncio.create_task(_request(port, drawn, measured, _leaves_after(drawn)))
        asking.add(one)
        one.add_done_callback(asking.discard)
    await asyncio.gather(*asking)


async def _load(server: Server, seconds: float, asking: Callable[[Measured], Awaitable[None]]) -> dict[str, Any]:
    measured, begin = Measured(), time.perf_counter()
    memory: list[int] = []

    async def watch() -> None:
        await asyncio.sleep(min(10.0, seconds / 2))
        memory.append(server.memory())

    watching = asyncio.create_task(watch())
    await asking(measured)
    await watching
    taken = time.perf_counter() - begin
    await asyncio.sleep(1.0)
    grown = server.memory() / memory[0] - 1.0
    asked = measured.answered + measured.left + measured.refused + len(measured.lost)
    return {
        "requests_a_second": asked / taken,
        "answered": measured.answered,
        "left": measured.left,
        "refused_with_429": measured.refused,
        "lost": len(measured.lost),
        "lost_how": sorted(set(measured.lost))[:5],
        "tokens_a_second": measured.tokens / taken,
        "first_token_seconds": _percentiles(measured.first),
        "between_tokens_seconds": _percentiles(measured.between),
        "open_at_the_end": server.open_requests(),
        "memory_bytes": memory[0],
        "memory_grown": grown,
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p99": cuts[98]}


def _family(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*"):
            with suppress(OSError):
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _resident(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "r2-micro")
        beringia.save(beringia.load("r2-micro"), model)
        write_tokenizer("digits", model)
        found = _measure(model, options.clients, options.seconds)
    document = {
        "benchmark": "serve",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {usable_cores()} cores",
        "model": "r2-micro",
        "clients": options.clients,
        "seconds": options.seconds,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "leaving": LEAVING,
        **found,
        "holds": _judge(found),
    }
    print(json.dumps(document, indent=None if options.json else 2))


def _measure(model: Path, clients: int, seconds: float) -> dict[str, Any]:
    serve = [sys.executable, "-m", "beringia", "serve", str(model), "--chip", "cpu", "--port", "0", "--json"]
    # A client that leaves asks again before the server has seen it go.
    ours = [*serve, "--sequences", str(clients), "--queue", str(clients + clients // 10)]
    found: dict[str, Any] = {
        "first_token_after_first_start_seconds": {},
        "first_token_after_start_seconds": {},
        "load": {},
    }
    commands = {"ours": ours}
    if VLLM.exists():
        vllm = ["--engine", "vllm", "--python", str(VLLM), "--dtype", "float32", "--sequences", str(clients)]
        # Of a node's memory, of which others use some; far more than this load needs.
        commands["vllm"] = [*serve, *vllm, "--vllm-option=--gpu-memory-utilization=0.3"]
    for name, command in commands.items():
        server = Server(command)
        found["first_token_after_first_start_seconds"][name] = server.first_token_seconds
        server.stop()
        server = Server(command)
        found["first_token_after_start_seconds"][name] = server.first_token_seconds
        load = uvloop.run(_load(server, seconds, partial(_clients, clients, server.port, seconds)))
        found["load"][name] = load
        if name == "ours":
            often = OVERLOAD * load["requests_a_second"]
            found["overload"] = uvloop.run(_load(server, seconds, partial(_arrivals, often, server.port, seconds)))
        server.stop()
    return found


def _judge(found: dict[str, Any]) -> dict[str, bool]:
    ours, over = found["load"]["ours"], found["overload"]
    holds = {
        "none lost": ours["lost"] == 0,
        "none left in the server": ours["open_at_the_end"] == 0 and over["open_at_the_end"] == 0,
        "memory flat": ours["memory_grown"] < FLAT,
        "overload: only 429": over["lost"] == 0 and over["refused_with_429"] > 0,
        "overload: time between tokens": over["between_tokens_seconds"]["p50"]
        <= 2 * ours["between_tokens_seconds"]["p50"],
        "first token after start": found["first_token_after_start_seconds"]["ours"] <= FIRST_TOKEN_SECONDS,
    }
    theirs = found["load"].get("vllm")
    for kind in ("first_token_seconds", "between_tokens_seconds") if theirs else ():
        for cut in ("p50", "p99"):
            holds[f"{kind} {cut} at most vLLM's"] = ours[kind][cut] <= theirs[kind][cut]
    return holds


if __name__ == "__main__":
    main()
