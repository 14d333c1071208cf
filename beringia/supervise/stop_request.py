"""Whether the user asked to stop, and by which signal."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """SIGTERM or SIGINT, once it came."""

    signal: int | None = None


@contextmanager
def stopping_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request while the context lasts."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
