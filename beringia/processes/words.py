"""A death in words: the one place that turns how a process ended into a sentence for the user."""

from __future__ import annotations

import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

from beringia.errors import BeringiaError, HandshakeError

HELLO, IMPORTS, WORK = "its hello", "its imports", "its work"
"""What a child is waited for, in order."""
ORPHANED_STATUS = 70
"""Exit status of a far end whose starter is gone, or whose prefix closed its standard input (sysexits: EX_SOFTWARE)."""
_LONGEST_LINE = 400
_NO_BERINGIA = "No module named 'beringia"
"""What Python says where Beringia, or the part of it that is started, is not installed."""


@dataclass(frozen=True)
class Death:
    """How a child ended that did not say why."""

    name: str
    """Whose it was, as the user calls it: `chips.preferred`."""
    status: int | None
    """Exit status, negative for a signal; None where it was ended because patience ran out."""
    waited_for: str
    """What it was in the middle of."""
    seconds: float
    """Patience, where that ran out."""
    last_words: str
    question: bool = False
    """Its prefix asked something."""
    command: tuple[str, ...] = ()
    """The command line that started it."""

    @property
    def by_stop_signal(self) -> bool:
        """Whether it was asked to end (SIGTERM, SIGINT), itself or through its prefix."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        return self.status in {*(-number for number in numbers), *(128 + number for number in numbers)}

    @property
    def from_outside(self) -> bool:
        """Whether somebody ended it: no setting of the user's is to blame."""
        return self.by_stop_signal or self.status == -signal.SIGKILL

    @property
    def sentence(self) -> str:
        """Without a full stop: others add what they will do."""
        if self.question:
            return (
                f"the launch prefix of {self.name} asks something, and nobody answers there: {self.last_words!r}. "
                "Set it up so that it needs no answer (for ssh: a key and a known host)"
            )
        words = self.last_words or self._silence
        if self.status is None:
            return f"{self.name} was waited for in vain ({self.waited_for}, {self.seconds:g} s): {words}"
        if _NO_BERINGIA in words:
            words += ". Install the same Beringia in both environments"
        what = "was lost" if self.waited_for == WORK else "did not start"
        return f"the process of {self.name} {what} ({how_ended(self.status)}): {words}"

    @property
    def _silence(self) -> str:
        if self.status == ORPHANED_STATUS:
            return "its standard input was closed"
        # For who wants to try it by hand: what the prefix or the interpreter says there is nowhere else to be seen.
        return f"it said nothing; the command was {shlex.join(self.command)}" if self.command else "it said nothing"

    def error(self) -> BeringiaError:
        """As it is raised where nobody decides what to do about it."""
        sentence = f"{self.sentence[0].upper()}{self.sentence[1:]}."
        return BeringiaError(sentence) if self.waited_for == WORK else HandshakeError(sentence)


def how_ended(status: int) -> str:
    """A process's exit status in words."""
    if 128 < status <= 128 + max(signal.Signals):
        return f"status {status}, as after {how_ended(128 - status)}"
    if status >= 0:
        return f"status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has no name
        return f"signal {-status}"


def last_lines(log: Path, count: int) -> str:
    """The end of a log, in one line."""
    if not log.exists():
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - count * _LONGEST_LINE - _LONGEST_LINE))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return " / ".join(line[-_LONGEST_LINE:] for line in [line for line in lines if line][-count:])
