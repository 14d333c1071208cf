"""What is run and where: a module of ours, an interpreter, the launcher that reaches its machine, a root there.

Nothing is run here. `argv` is what a launcher makes of it; no argument holds more than a module's name, since `ssh`
joins arguments into one line for a shell: what work needs goes over standard input.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from beringia.errors import HandshakeError
from beringia.processes import launchers

FAR_END = "beringia.processes.far_end"
_PACKAGE = Path(__file__).resolve().parents[1]


class Launcher(Protocol):
    """What a file of `launchers/` holds."""

    def check(self, command: Command) -> None:
        """Raise HandshakeError for what cannot start, as far as that can be told on this machine."""

    def argv(self, command: Command) -> list[str]:
        """The command line that runs `FAR_END` with the command's module where that is to run. What it starts must hand
        on standard input and output; it may start several processes, each with `RANK` and `WORLD_SIZE` or Slurm's
        variables."""


@dataclass(frozen=True)
class Command:
    """Where work of ours is done, and with what."""

    name: str
    """As the user calls it in errors: `chips.preferred`."""
    module: str = ""
    """The module whose `work` is done there."""
    python: str | None = None
    """Interpreter on that machine; None: the one that runs this."""
    launch: tuple[str, ...] = ()
    """What the launcher is told: a command prefix, for the default one."""
    launcher: str = "prefix"
    """A file of `launchers/`."""
    root: str | None = None
    """Where its files lie on that machine; None: it sees ours."""
    owner: str | None = None
    """Whose that root is: a word of the owner's own. A root belongs to whom it was first used for."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the process there."""

    @property
    def elsewhere(self) -> bool:
        """Whether it leads to another machine or another environment than this process's."""
        return bool(self.launch) or self.python is not None or self.root is not None

    @property
    def interpreter(self) -> str:
        """The Python to run."""
        return self.python or sys.executable

    @property
    def safe_path(self) -> bool:
        """Whether the process must not look for modules where it is started: a folder named `beringia` there (a
        repository in a home directory) would be taken for the package. Only a package run from there itself needs it.
        """
        return bool(self.launch) or Path("beringia").resolve() != _PACKAGE

    @property
    def run_python(self) -> list[str]:
        """The interpreter, up to the module that it is to run."""
        return [self.interpreter, *(["-P"] if self.safe_path else []), "-m"]

    def argv(self) -> list[str]:
        """The command line."""
        return _launcher(self).argv(self)


def check_command(command: Command) -> None:
    """Refuse at once what cannot start: an unknown launcher, or what that finds wrong. Raises HandshakeError."""
    words = {"launch": " ".join(command.launch), "python": command.python or "", "root": command.root or ""}
    for key, word in words.items():
        if "\0" in word:
            raise HandshakeError(f"{command.name}.{key} holds a NUL character, which no command line can.")
    if command.root is not None and not command.root.startswith("/"):
        raise HandshakeError(
            f"{command.name}.root is {command.root!r}: give its whole path on that machine, beginning with '/'."
        )
    _launcher(command).check(command)


def _launcher(command: Command) -> Launcher:
    known = [found.name for found in pkgutil.iter_modules(launchers.__path__)]
    if command.launcher not in known:
        close = difflib.get_close_matches(command.launcher, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(map(repr, known))}."
        raise HandshakeError(f"{command.name}.launcher is {command.launcher!r}, which is no launcher. {hint}")
    module: Launcher = importlib.import_module(f"{launchers.__name__}.{command.launcher}")
    return module
