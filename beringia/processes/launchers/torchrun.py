"""Several processes on this machine, one a device: torchrun starts them, watches them and ends all when one fails."""

from __future__ import annotations

from beringia.errors import HandshakeError
from beringia.processes.command import FAR_END, Command

LOGS_VARIABLE = "PET_LOG_DIR"
"""Where torchrun puts its logs; without it each start makes a directory among the temporary files, and leaves it."""


def check(command: Command) -> None:
    """`launch` is the number of processes."""
    if len(command.launch) != 1 or not command.launch[0].isdigit():
        raise HandshakeError(
            f"{command.name}.launch is {list(command.launch)}, and the launcher torchrun is told one number, of its "
            'processes: launch = ["8"].'
        )


def argv(command: Command) -> list[str]:
    """torchrun, then the module in each of its processes."""
    (count,) = command.launch
    runner = [*command.run_python, "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return [*runner, "-m", FAR_END, command.module]
