"""Settings of the OpenMP runtime, made before torch loads it.

OpenMP's default is active waiting: idle threads spin. On a small machine a second busy process then makes a training
step up to 100 times slower (0.05 s became 3 s on two cores). Passive waiting costs microseconds and removes that.

The one place where these are set. A value already in the environment wins, so a user overrides any of them with
`OMP_NUM_THREADS=1 beringia ...`. Reads and writes environment variables only; does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping


def usable_cores() -> int:
    """Cores this process may run on (its affinity mask, which containers and Slurm set), at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def prepare_threads(environment: MutableMapping[str, str] = os.environ, *, processes: int = 1) -> dict[str, str]:
    """Set the OpenMP wait policy and thread count where the user has not, and return the values in force.

    `processes`: how many such processes share the machine; the cores are divided among them.
    """
    wanted = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(max(1, usable_cores() // processes)),
    }
    for name, value in wanted.items():
        environment.setdefault(name, value)
    return {name: environment[name] for name in wanted}
