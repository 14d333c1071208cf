"""The command line that a record says it was made by."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command_line() -> str:
    """What the user gave, quoted for a shell; empty where this process is another program that uses the library."""
    program = Path(sys.argv[0])
    is_ours = program.stem == "beringia" or program.parts[-2:] == ("beringia", "__main__.py")
    return shlex.join(["beringia", *sys.argv[1:]]) if is_ours else ""
