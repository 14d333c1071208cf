"""A side of a comparison in a process of its own, which computes only when it is asked, so that sides take turns.

`Side` is what the comparing process holds; `answer_turns` is the loop in the side's process. Both speak one JSON object
a line. Standard output belongs to these lines: what libraries print there goes to standard error, and the end of that
is told when a side ends early.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_LAST_WORDS = 9000


class SideEnded(Exception):
    """A side ended without an answer; its last words."""


class Side:
    """A side's process. Its first answer comes unasked, when it is ready: `hear` it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=None if environment is None else dict(environment),
        )

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The side's answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._raise_last_words()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """What the side says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._raise_last_words()
        document: dict[str, Any] = json.loads(line)
        return document

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended before it read what it was asked
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _raise_last_words(self) -> None:
        self._process.wait(60)
        self._said.seek(0)
        words = self._said.read()[-_LAST_WORDS:].decode(errors="replace")
        raise SideEnded(f"a side ended without an answer; its last words:\n{words}")


def answer_turns(prepare: Callable[[], tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]]) -> None:
    """Prepare, say the first answer, then answer each question that comes on standard input."""
    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    first, answer = prepare()

    def tell(document: dict[str, Any]) -> None:
        answers_to.write(json.dumps(document) + "\n")
        answers_to.flush()

    tell(first)
    for line in sys.stdin:
        tell(answer(json.loads(line)))
