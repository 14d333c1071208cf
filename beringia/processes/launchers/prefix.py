"""The command behind a prefix that reaches its machine: `ssh node7`, `srun -N1`, `kubectl exec -i pod --`, or none."""

from __future__ import annotations

import shutil

from beringia.errors import HandshakeError
from beringia.processes.command import FAR_END, Command


def check(command: Command) -> None:
    """An interpreter or a prefix that is not there."""
    if command.launch and shutil.which(command.launch[0]) is None:
        raise HandshakeError(
            f"{command.name}.launch begins with {command.launch[0]!r}, which is not a command on this machine. "
            "Install it or correct the prefix."
        )
    if not command.launch and command.python and shutil.which(command.python) is None:
        raise HandshakeError(
            f"{command.name}.python is {command.python!r}, but there is no such interpreter. "
            "Give the path of the Python of the environment that has this chip's torch."
        )


def argv(command: Command) -> list[str]:
    """Prefix, interpreter, module."""
    return [*command.launch, *command.run_python, FAR_END, command.module]
