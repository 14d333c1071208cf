"""One end of a pipe that gives up when nothing moves, instead of waiting for ever for a machine that is gone."""

from __future__ import annotations

import io
import os
import select
from typing import IO, Any

from beringia.errors import TransferFailed


class PatientPipe(io.RawIOBase):
    """The bytes of a pipe, unbuffered: a read gives what there is, a write returns when all is written.

    Both raise TransferFailed when nothing moved for `patience_seconds`. Closing it closes the pipe.
    """

    def __init__(self, pipe: IO[bytes], patience_seconds: float) -> None:
        self._pipe = pipe
        self._patience_seconds = patience_seconds
        # A blocking write would wait in the kernel until all is written, however long that takes.
        os.set_blocking(pipe.fileno(), False)

    def readable(self) -> bool:
        return self._pipe.readable()

    def writable(self) -> bool:
        return self._pipe.writable()

    def fileno(self) -> int:
        return self._pipe.fileno()

    def readinto(self, buffer: Any) -> int:
        self._wait(select.select([self], [], [], self._patience_seconds)[0])
        return os.readv(self.fileno(), [buffer])

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        size = len(left)
        while left:
            self._wait(select.select([], [self], [], self._patience_seconds)[1])
            left = left[os.write(self.fileno(), left) :]
        return size

    def close(self) -> None:
        self._pipe.close()
        super().close()

    def _wait(self, ready: list[Any]) -> None:
        if not ready:
            raise TransferFailed(f"nothing moved for {self._patience_seconds:g} s")
