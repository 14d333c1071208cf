"""How long a starter waits, for everything that is started: the one place where time-outs are decided."""

from __future__ import annotations

from dataclasses import dataclass

POLL_SECONDS = 0.1
"""Between two looks at what has no descriptor to wait for: other ranks' files, transfers, a signal."""

HEARTBEAT_SECONDS = 1.0
"""A far end that computes says so at most this often."""

JOB_SECONDS = 30.0
"""A far end waits so long for its job after its hello: the starter sends it at once, so a prefix lost it."""

QUESTION_SECONDS = 2.0
"""A launch prefix whose last words look like a question, and which has said nothing for so long, waits for an answer
that nobody gives. A banner that ends in a colon is followed by more within this time."""

OWNER_SECONDS = 0.5
"""The few bytes that say whose a root is are written within so long of their file's being there."""

PEERS_SECONDS = 30.0
"""Ranks that one launcher starts come within so long of each other, before anything is loaded."""

END_SECONDS = 10.0
"""After its last word a far end only has to close its device; a driver that hangs in that is killed."""

STOP_SECONDS = 2.0
"""Between asking what is left of a child's processes to end (SIGTERM) and killing it."""

KILLED_SECONDS = 10.0
"""A killed process is gone when the kernel has freed its memory; with hundreds of gigabytes that takes seconds."""

TOGETHER_SECONDS = 1.0
"""Whoever stops a job asks all of its processes, one after another; this one hears of it within so long of a child that
was asked."""

EXEC_SECONDS = 0.2
"""A process that has just been told to execute a program shows its environment within so long (milliseconds, on a
machine that is not busy)."""

STACKS_SHARE = 0.7
"""Of the time after which silence is called a hang: the stacks must be written before the starter kills."""
LOCKED_STACKS_SHARE = 0.85
"""Likewise where nobody could take the interpreter's lock since."""


@dataclass(frozen=True)
class Patience:
    """With one child."""

    start_seconds: float = 300.0
    """From its start until it says that its work begins: the prefix, the interpreter, its imports."""
    silence_seconds: float = 120.0
    """Between two messages while it works."""
    end_seconds: float = END_SECONDS
    """From its last word to its exit."""
