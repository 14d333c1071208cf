"""Which of how many processes this is: from torchrun's environment, from Slurm's, or alone.

Reads environment variables that launchers set; sets none but the address that Slurm does not give.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_SLURM_PORT_BASE = 20_000
_SLURM_PORT_COUNT = 20_000


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

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == 0


def ranks_from_environment(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """What torchrun or Slurm says, or None when neither started this process as one of several."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Ranks(
            rank=int(environment["RANK"]),
            count=int(environment["WORLD_SIZE"]),
            local=int(environment.get("LOCAL_RANK", "0")),
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environment.get("MASTER_PORT", "29500")),
            agent_hosts_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return Ranks(
            rank=int(environment["SLURM_PROCID"]),
            count=int(environment["SLURM_NTASKS"]),
            local=int(environment.get("SLURM_LOCALID", "0")),
            address=environment.get("MASTER_ADDR") or _first_host(environment),
            port=int(environment.get("MASTER_PORT") or _slurm_port(environment)),
        )
    return None


def _first_host(environment: Mapping[str, str]) -> str:
    # SLURM_STEP_NODELIST is compressed ("node[07-09,12],other"); the first host is all that is needed.
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or "127.0.0.1"
    compressed = re.match(r"([^,\[]+)\[(\d+)", nodes)
    if compressed:
        return compressed.group(1) + compressed.group(2)
    return nodes.split(",")[0]


def _slurm_port(environment: Mapping[str, str]) -> int:
    # Jobs that share a node must not share a port; the job's number tells them apart.
    return _SLURM_PORT_BASE + int(environment.get("SLURM_JOB_ID", "0")) % _SLURM_PORT_COUNT
