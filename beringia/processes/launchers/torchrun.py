"""Several processes on this machine, one a device: torchrun starts them, watches them and ends all when one fails."""

from __future__ import annotations

from beringia.processes.command import FAR_END, Command


def argv(command: Command) -> list[str]:
    """`launch` is the number of processes."""
    (count,) = command.launch
    runner = [command.interpreter, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return [*runner, "-m", FAR_END, command.module]
