"""The command behind a prefix that reaches its machine: `ssh node7`, `srun -N1`, `kubectl exec -i pod --`, or none."""

from __future__ import annotations

from beringia.processes.command import FAR_END, Command


def argv(command: Command) -> list[str]:
    """Prefix, interpreter, module."""
    return [*command.launch, command.interpreter, "-m", FAR_END, command.module]
