"""Which of how many processes this is: from torchrun's environment, from Slurm's, or alone.

Reads environment variables that launchers set; sets none but the address that Slurm does not give.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from beringia.errors import InputError

_SLURM_PORT_BASE = 20_000
_SLURM_PORT_COUNT = 20_000
_NO_TASKS_OF_OURS = ("4294967290", "4294967291", "4294967292")
"""Steps that are no tasks: the interactive one, the batch script, the external one (slurm.h: SLURM_INTERACTIVE_STEP,
SLURM_BATCH_SCRIPT, SLURM_EXTERN_CONT)."""


@dataclass(frozen=True)
class Ranks:
    """One process among `count`. `local` is its number on its machine, which chooses its device."""

    rank: int = 0
    count: int = 1
    local: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    agent_hosts_store: bool = False
    """torchrun's own process keeps the store at this address already."""
    source: str = "nothing"
    """Which variables say so, for errors."""
    variables: tuple[str, ...] = ()
    """Those to unset where no launcher is at work."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == 0


def ranks_from_environment(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """What torchrun or Slurm says, or None when neither started this process as one of several.

    Raises InputError for half of what a launcher sets: it was left in the shell.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _from_torchrun(environment)
    if "SLURM_PROCID" in environment and _slurm_tasks(environment) > 1:
        return Ranks(
            rank=_number(environment, "SLURM_PROCID"),
            count=_slurm_tasks(environment),
            local=_number(environment, "SLURM_LOCALID", "0"),
            address=environment.get("MASTER_ADDR") or _first_host(environment),
            port=_number(environment, "MASTER_PORT") if environment.get("MASTER_PORT") else _slurm_port(environment),
            source="Slurm (SLURM_PROCID, SLURM_NTASKS)",
            variables=("SLURM_PROCID", "SLURM_NTASKS"),
        )
    return None


def _from_torchrun(environment: Mapping[str, str]) -> Ranks | None:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not environment.get(name)]
    if missing and (environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")) == ("0", "1"):
        return None
    values = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    wrong = [name for name, value in values.items() if name not in missing and not _is_number(value)]
    if missing or wrong or int(values["RANK"]) >= int(values["WORLD_SIZE"]):
        found = ", ".join(f"{name}={environment[name]}" for name in names if name in environment)
        unset = " ".join(f"-u {name}" for name in names if name in environment)
        raise InputError(
            f"The environment has {found}, but not all that a launcher sets "
            f"({', '.join(names)}, with RANK below WORLD_SIZE): it seems to have been left in this shell. "
            f"Give the command without it: env {unset} beringia ..."
        )
    return Ranks(
        rank=int(environment["RANK"]),
        count=int(environment["WORLD_SIZE"]),
        local=_number(environment, "LOCAL_RANK", "0"),
        address=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        agent_hosts_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        source="The environment (RANK, WORLD_SIZE)",
        variables=("RANK", "WORLD_SIZE"),
    )


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the step that this process is in: a batch script is in none that `srun` has started, and an interactive
    shell's step has one, whatever its job has."""
    step = environment.get("SLURM_STEP_ID")
    if step in _NO_TASKS_OF_OURS or (step is None and environment["SLURM_PROCID"] == "0"):
        return 1
    name = "SLURM_STEP_NUM_TASKS" if environment.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    return _number(environment, name, "1")


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    value = environment.get(name, default)
    if not _is_number(value):
        raise InputError(
            f"The environment has {name}={value!r}, which is no number that a launcher gives. Give the command without "
            f"it: env -u {name} beringia ..."
        )
    return int(value)


def _is_number(value: str) -> bool:
    return value.isascii() and value.isdigit()


def _first_host(environment: Mapping[str, str]) -> str:
    # SLURM_STEP_NODELIST is compressed ("node[07-09,12],other"); the first host is all that is needed.
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or "127.0.0.1"
    compressed = re.match(r"([^,\[]+)\[(\d+)", nodes)
    if compressed:
        return compressed.group(1) + compressed.group(2)
    return nodes.split(",")[0]


def _slurm_port(environment: Mapping[str, str]) -> int:
    # Jobs that share a node must not share a port; the job's number tells them apart.
    return _SLURM_PORT_BASE + _number(environment, "SLURM_JOB_ID", "0") % _SLURM_PORT_COUNT
