"""A server process: load, listen, answer, and end with what was begun."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import json
import signal
import socket
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from beringia.engine import Engine, EngineLimits
from beringia.engine.operators.compiled import compile_ahead
from beringia.errors import InputError
from beringia.machine.memory import collect_garbage
from beringia.model.presets import PRESETS
from beringia.serve.answering import RequestLimits
from beringia.serve.app import Served, make_app, page_text
from beringia.serve.engine_thread import EngineThread
from beringia.serve.gate import HEAD_BYTES, head_too_large
from beringia.serve.metrics import Metrics

HEADER_SECONDS = 20.0
"""For a request's head to arrive. A client that sends it byte by byte would else keep its connection for ever."""

IDLE_SECONDS = 75
"""A connection without a request stays open this long: longer than clients keep one for their next request (httpx, and
so OpenAI's client, 5 seconds; aiohttp 15), or a request would meet a connection that is just being closed."""


_LAST_WORDS_SECONDS = 1.0
"""For writing, when the server ends, that an answer has no end."""

UNREAD_SECONDS = 60
"""In which a client takes something of what waits for it, as nginx's send_timeout has it: what is not read stays in
memory."""

STEP_SECONDS = 0.25
"""For which those who read a stream may wait, about, while another's prompt is computed beside it."""


@dataclass(frozen=True)
class Settings:
    """What a server is started with."""

    model: str
    chip: str = "cpu"
    faults: str | None = None
    dtype: str | None = None
    operators: str | None = None
    speculate: bool = False
    name: str | None = None
    """None: the directory's, or the preset's."""
    tokenizer: str | None = None
    """None: the model's own; for a preset `digits`."""
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    engine: EngineLimits = field(default_factory=lambda: EngineLimits(step_seconds=STEP_SECONDS))
    open_requests: int = 512
    """That wait or run at the same time, answers to one request counted one by one."""
    new_tokens: int = 4096
    drain_seconds: float = 30.0
    proof: Path | None = None
    seed: int = 0


def serve(settings: Settings, on_ready: Any = None) -> None:
    """Serve until SIGTERM or SIGINT; what runs then may end within `drain_seconds`.

    `on_ready(url, about)` is called when requests are taken. Raises InputError.
    """
    listening = _listen(settings)
    compiling = compile_ahead() if settings.chip in ("cpu", "auto") and settings.operators != "torch" else None
    chip = open_chip(settings.chip, faults=settings.faults, seed=settings.seed)
    try:
        if compiling is not None:
            compiling.join()
        served = load(settings, chip)
        collect_garbage()  # now, so that no request waits for it
        uvloop.run(_run(settings, served, listening, on_ready))
    finally:
        listening.close()
        chip.close()


def load(settings: Settings, chip: Chip) -> Served:
    """The model in an engine, and what goes with it."""
    tokenizer = _tokenizer(settings)
    engine = Engine(
        settings.model,
        chip,
        dtype=_dtype(settings.dtype),
        operators=settings.operators,
        speculate=settings.speculate,
        tokenizer=tokenizer,
        limits=settings.engine,
        seed=settings.seed,
    )
    check_vocabulary(tokenizer, engine.config.vocab_size)
    weights = engine.weights_hash
    if settings.proof is not None:
        check_proof(settings.proof, weights)
    identity = chip.identity
    name = settings.name or (settings.model if settings.model in PRESETS else Path(settings.model).resolve().name)
    about = {
        "chip": chip.name,
        "sku": identity.sku,
        "truth": identity.truth,
        "identity": identity.hash,
        "weights": weights,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "operators": engine.operators,
        "proof": None if settings.proof is None else settings.proof.name,
    }
    metrics = Metrics()
    return Served(
        name=name,
        engine=EngineThread(engine, metrics, most_open=settings.open_requests),
        tokenizer=tokenizer,
        metrics=metrics,
        limits=RequestLimits(new_tokens=settings.new_tokens),
        about=about,
        page=page_text(name, about),
        keys=settings.keys,
    )


def check_proof(path: Path, weights: str) -> None:
    """Raise InputError unless the file proves that weights with this hash are the model that was trained.

    What a proof holds comes with the handover; until then none can be checked, so none is accepted.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError(f"A proof was asked for, and {path} cannot be read: {problem.strerror}.") from None
    except ValueError as problem:
        raise InputError(f"A proof was asked for, and {path} is not valid JSON: {problem}.") from None
    found = document.get("kind") if isinstance(document, dict) else None
    raise InputError(
        f"A proof for the weights {weights[:12]} was asked for, and {path} (kind: {found}) is none that this version "
        "can check. Start without --proof, knowing that nothing shows that this is the model that was trained."
    )


def _tokenizer(settings: Settings) -> Tokenizer:
    if settings.tokenizer is not None:
        return load_tokenizer(settings.tokenizer)
    return load_tokenizer("digits" if settings.model in PRESETS else settings.model)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InputError(f"dtype must be one of {', '.join(known)}, but is {name!r}.")
    return known[name]


def _listen(settings: Settings) -> socket.socket:
    """Before the model is loaded: a taken port is told at once."""
    try:
        local = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        local = settings.host == "localhost"
    if not local and not settings.keys:
        raise InputError(
            f"{settings.host} can be reached from other machines, and no key is set: give --api-key-file, or stay on "
            "127.0.0.1."
        )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as problem:
        listening.close()
        raise InputError(f"Cannot listen on {settings.host} port {settings.port}: {problem.strerror}.") from None
    listening.set_inheritable(True)
    return listening


class _Patience(HttpToolsProtocol):
    """A connection that is closed where the head of its request does not arrive in time, or has no end, and where
    nobody reads its answer."""

    _unread: asyncio.TimerHandle | None = None
    _deadline: asyncio.TimerHandle | None = None
    _beside_bodies = 0
    """Bytes since the last that belonged to a body or ended a head: the parser keeps them all, whoever sends them."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        self._beside_bodies += len(data)
        super().data_received(data)
        if self._beside_bodies > HEAD_BYTES and not self.transport.is_closing():
            self._refuse_head()
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._disarm()
        elif self._deadline is None:
            self._arm()

    def on_headers_complete(self) -> None:
        self._beside_bodies = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._beside_bodies = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._disarm()  # the next request's head is waited for from its first byte on

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._read_again()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader(self._unread_bytes())

    def resume_writing(self) -> None:
        self._read_again()
        super().resume_writing()

    def _wait_for_reader(self, unread: int) -> None:
        self._unread = asyncio.get_running_loop().call_later(UNREAD_SECONDS, self._look_for_reader, unread)

    def _look_for_reader(self, before: int) -> None:
        unread = self._unread_bytes()
        if unread < before:
            self._wait_for_reader(unread)
        else:
            self.transport.abort()  # a close would wait for the reader

    def _unread_bytes(self) -> int:
        """Here and in the kernel: there megabytes go before any of what waits here."""
        queued = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, b"\0" * 4)
        return int(self.transport.get_write_buffer_size()) + int.from_bytes(queued, sys.byteorder)

    def _read_again(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _arm(self) -> None:
        self._disarm()
        self._deadline = asyncio.get_running_loop().call_later(HEADER_SECONDS, self._too_slow)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse_head(self) -> None:
        """Told only where no answer is on its way that this would fall into."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()
            return
        failure = head_too_large()
        body = failure.response().body
        head = f"HTTP/1.1 {failure.status} \r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + bytes(body))
        self.transport.close()

    def _too_slow(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Ends normally after a signal, when all is done. uvicorn's own raises the signal again then, and cancels what is
    not done in time, with a traceback for each: here it is told, and connections that nobody reads are cut off."""

    def __init__(self, config: uvicorn.Config, engine: EngineThread, drain_seconds: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.drain()
        loop = asyncio.get_running_loop()
        ending = [
            loop.call_later(self._drain_seconds, self._engine.fail_all, "the server had to shut down before its end"),
            loop.call_later(self._drain_seconds + _LAST_WORDS_SECONDS, self._cut_off),
        ]
        try:
            await super().shutdown(sockets)
        finally:
            for one in ending:
                one.cancel()

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


async def _run(settings: Settings, served: Served, listening: socket.socket, on_ready: Any) -> None:
    config = uvicorn.Config(
        make_app(served),
        http=_Patience,
        ws="none",
        loop="uvloop",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
    )
    server = _Server(config, served.engine, settings.drain_seconds)
    running = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    if server.started and on_ready is not None:
        host, port = listening.getsockname()[:2]
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}", served.about | {"model": served.name})
    await running
