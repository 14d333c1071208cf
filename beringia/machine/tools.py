"""Runs a small tool of the machine (a compiler, a vendor's status command) to its end and returns what it printed.

Work is started by `beringia/processes/`, which stands above this; nothing else starts a process.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

_TOOL_SECONDS = 60.0


class ToolFailed(Exception):
    """The tool is not here, failed, or did not end; in words for the user."""


def run_tool(command: Sequence[str], *, seconds: float = _TOOL_SECONDS) -> str:
    """What the tool writes to standard output. Raises ToolFailed with the end of what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    except subprocess.CalledProcessError as error:
        raise ToolFailed(f"{command[0]} failed: {error.stderr.strip()[-200:]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolFailed(f"{command[0]} cannot be used: {error}") from None
    return done.stdout
