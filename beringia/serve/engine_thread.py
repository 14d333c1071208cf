"""The engine in a thread of its own, and requests that an event loop waits for.

The thread computes steps while anything runs, and hands all news of a step to the event loop at once. It alone touches
the engine: new requests and those that are given up come to it through a queue.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from beringia.engine import Engine, Sampling
from beringia.engine.sampling import TokenLogprobs
from beringia.engine.scheduler import Sequence as Request
from beringia.errors import InputError
from beringia.serve.metrics import Metrics


class Full(Exception):
    """The queue has no place."""


class Draining(Exception):
    """The server is about to end and takes nothing new."""


@dataclass(frozen=True)
class News:
    """What a step brought for one request."""

    token: int | None
    logprobs: TokenLogprobs | None
    finish: str | None
    error: str | None
    prompt_logprobs: tuple[TokenLogprobs, ...]
    at_string: bool = False
    """Whether a stop string is what finished it."""


class Mail:
    """News of all answers to one request, on their way to the task that writes them."""

    def __init__(self) -> None:
        self._news: list[tuple[int, News]] = []
        self._awaited: asyncio.Future[None] | None = None

    def put(self, number: int, news: News) -> None:
        """News of the answer with this number."""
        self._news.append((number, news))
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    async def take(self) -> list[tuple[int, News]]:
        """All that has come since the last time, at least one; each with the number of its answer."""
        if not self._news:
            self._awaited = asyncio.get_running_loop().create_future()
            await self._awaited
        news, self._news = self._news, []
        return news


@dataclass(eq=False)
class Ticket:
    """An answer on its way through the server."""

    number: int
    """Among the answers to its request."""
    prompt: list[int]
    sampling: Sampling
    mail: Mail
    request: Request | None = None
    finished: bool = False
    """Whether the engine has nothing more to say; its place is free when that is written."""
    given_up: bool = False
    num_told: int = 0
    """Of its new tokens; with drafts a step may bring two."""
    arrived: float = field(default_factory=time.perf_counter)
    last_token: float | None = None


class EngineThread:
    """Runs the engine; all methods but the thread's own are called in the event loop."""

    def __init__(self, engine: Engine, metrics: Metrics, *, most_open: int) -> None:
        """`most_open`: requests that may wait, run, or be finished and not yet written at the same time: what nobody
        reads stays in memory."""
        self.engine = engine
        self._metrics = metrics
        metrics.cache_use.set_function(lambda: engine.cache_use)
        self.most_open = most_open
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: set[Ticket] = set()
        self._running: dict[Request, Ticket] = {}
        self._draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begin. Called in the event loop that requests will come from."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether not even one more would be taken."""
        return len(self._open) >= self.most_open

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self._thread.is_alive() and not self._draining

    def submit(self, requests: list[tuple[list[int], Sampling]]) -> list[Ticket]:
        """Hand over the prompts of one request, all or none. Raises Full, Draining, and InputError for one that can
        never run."""
        if self._draining or not self._thread.is_alive():
            raise Draining
        for prompt, sampling in requests:
            self.engine.check(prompt, sampling)
        if len(self._open) + len(requests) > self.most_open:
            raise Full
        mail = Mail()
        tickets = [Ticket(number, *request, mail) for number, request in enumerate(requests)]
        self._open.update(tickets)
        self._metrics.requests_open.set(len(self._open))
        for ticket in tickets:
            self._inbox.put(partial(self._begin, ticket))
        return tickets

    def close(self, ticket: Ticket) -> None:
        """The answer is written, or the client has gone or has enough: then its place is free after the current
        step."""
        if ticket not in self._open:
            return
        self._open.discard(ticket)
        self._metrics.requests_open.set(len(self._open))
        if not ticket.finished:
            ticket.given_up = True
            self._metrics.note_end("abort", ticket.arrived)
            self._inbox.put(partial(self._abort, ticket))

    def drain(self) -> None:
        """Take nothing new; what runs may come to its end."""
        self._draining = True

    def fail_all(self, message: str) -> None:
        """Tell all that the engine has not finished that it will not."""
        self._deliver([(ticket, _error(message)) for ticket in self._open if not ticket.finished])

    async def stop(self) -> None:
        """End the thread."""
        self._draining = True
        self._inbox.put(None)
        while self._thread.is_alive():
            await asyncio.sleep(0.01)

    # In the thread

    def _work(self) -> None:
        try:
            while self._take_messages():
                if self.engine.busy:
                    self._step()
        except BaseException as problem:
            self.failure = problem
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self.fail_all, f"the engine has ended: {problem}")
            raise

    def _take_messages(self) -> bool:
        """Do what the event loop asks for; waits for it where there is nothing to compute. False: end."""
        while True:
            try:
                message = self._inbox.get(block=not self.engine.busy)
            except queue.Empty:
                return True
            if message is None:
                return False
            message()

    def _begin(self, ticket: Ticket) -> None:
        if ticket.given_up:
            return
        try:
            ticket.request = self.engine.add(ticket.prompt, ticket.sampling)
        except InputError as problem:  # the same was checked before
            self._tell([(ticket, _error(str(problem)))])
            return
        self._running[ticket.request] = ticket

    def _abort(self, ticket: Ticket) -> None:
        if ticket.request is not None:
            self.engine.abort(ticket.request)
            self._running.pop(ticket.request, None)

    def _step(self) -> None:
        told = []
        for request in self.engine.step():
            ticket = self._running[request]
            told += [(ticket, news) for news in _news_of(request, ticket.num_told)]
            ticket.num_told = len(request.new_tokens)
            if request.finished is not None:
                del self._running[request]
        if told:
            self._tell(told)

    def _tell(self, told: list[tuple[Ticket, News]]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._deliver, told)

    # In the event loop

    def _deliver(self, told: list[tuple[Ticket, News]]) -> None:
        now = time.perf_counter()
        for ticket, news in told:
            if ticket.given_up:
                continue
            if news.token is not None:
                self._metrics.note_token(ticket.arrived, ticket.last_token, now)
                ticket.last_token = now
            if news.finish is not None:
                ticket.finished = True
                self._metrics.note_end(news.finish, ticket.arrived)
            ticket.mail.put(ticket.number, news)


def _news_of(request: Request, num_told: int) -> list[News]:
    """One for each token that has not been told of."""
    if request.error is not None:
        return [_error(request.error)]
    new = request.new_tokens
    return [
        News(
            new[place],
            request.logprobs[place] if request.logprobs else None,
            request.finished if place == len(new) - 1 else None,
            None,
            tuple(request.prompt_logprobs) if place == 0 else (),
            request.at_string,
        )
        for place in range(num_told, len(new))
    ]


def _error(message: str) -> News:
    return News(None, None, "error", message, ())
