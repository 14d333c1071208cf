"""A program that is not ours and speaks no protocol of ours (an inference server): started, watched, ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress

from beringia.errors import HandshakeError
from beringia.processes.endings import end_in_stages, new_mark
from beringia.processes.protocol import MARK_VARIABLE
from beringia.processes.words import how_ended

_LAST_BYTES = 4000
_ERROR = re.compile(rb"(^|[])] +)[\w.]*(Error|Exception): \S")
"""How Python writes one, at the beginning of a line or of what a logger says."""


class Program:
    """One running program; its two streams go to a log that goes with it. `end` it in any case."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self._mark = new_mark()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the program
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=dict(environment) | {MARK_VARIABLE: self._mark},
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise HandshakeError(f"Could not start {argv[0]}: {error.strerror}.") from None

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def how_ended(self) -> str:
        """In words, once it has."""
        return how_ended(self._process.returncode)

    def signal(self, number: int) -> None:
        """To the program itself."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.Signals(number))

    def last_words(self) -> str:
        """The end of its log, and above it the first error that the log names: what follows is often its echo."""
        size = self._log.seek(0, os.SEEK_END)
        before = max(0, size - _LAST_BYTES)
        self._log.seek(0)
        first = next((line for line in self._log if _ERROR.search(line)), None)
        found_at = self._log.tell()
        self._log.seek(before)
        end = self._log.read().decode(errors="replace")
        return end if first is None or found_at > before else f"{first.decode(errors='replace')}...\n{end}"

    def end(self, grace_seconds: float = 0.0) -> None:
        """Give it so long to end by itself, ask it, kill what is left of it and of what it started."""
        end_in_stages(self._process, self._mark, grace_seconds=grace_seconds, ask=True)
        self._log.close()
