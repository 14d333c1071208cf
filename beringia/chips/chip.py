"""The one interface to an accelerator with its software. Everything outside `chips/` takes a `Chip`.

A chip is opened once per process (one process per vendor; torch has room for one plugin device). It says who it is
(`identity`), what it can do (`capabilities`), and what one of its errors means (`classify`). It holds no policy: what
to do about a fault is the supervisor's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from beringia.records.identity import ChipIdentity


@dataclass(frozen=True)
class Capabilities:
    """What a chip can and cannot do, declared and not guessed."""

    dtypes: frozenset[torch.dtype]
    """Storage dtypes that tensors may have."""
    compute_dtype: torch.dtype
    """What `compute = "auto"` means here: bfloat16 where products in it are native, else float32."""
    sharding: Literal["fsdp2", "ddp"]
    """How training spreads over ranks."""
    compile: bool
    """Whether torch.compile has a backend for it."""
    exact_int64: bool
    """Whether 64-bit integer products wrap around exactly on the device; else the state hash is taken on the host."""
    pinned_memory: bool
    streams: bool
    fused_optimizer: bool = False
    """Whether torch's fused AdamW runs on it."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device."""

    total_bytes: int
    used_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Presence:
    """A chip that is on this machine, or could be. What `beringia chips` shows; found without opening the device."""

    name: str
    """What a user writes to open it: `cpu`, `cuda`, `npu`, `emulated:<profile>`."""
    sku: str
    truth: Literal["real", "emulated"]
    memory_bytes: int | None
    """Of the device; None where it cannot be told without opening it, or has no meaning."""
    here: bool
    state: str
    """One sentence: the state of a chip that is here, or what was looked for, what was found and what to do."""
    index: int = 0


@dataclass(frozen=True)
class ServeArguments:
    """What vLLM needs on a chip, beside the model."""

    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Opening:
    """What a chip was opened with beside its name: another process that opens the same gets the same."""

    index: int = 0
    faults: str | None = None
    """Planted in an emulated chip."""
    seed: int = 0
    """Of those."""
    remembers: bool = False
    """Whether it has a file that says which faults have struck."""


@dataclass(frozen=True)
class ChipFault:
    """What an error of the chip means."""

    code: str
    """The vendor's code (`507014`, `EI0002`, `cudaErrorECCUncorrectable`), or `unknown`."""
    category: Literal["transient", "device-lost", "persistent"]
    """transient: the same step may be tried again; device-lost: this device is gone, its state with it;
    persistent: trying again on this chip will not help."""
    message: str


class Chip(ABC):
    """One opened device.

    >>> chip = open_chip("cpu")                     # beringia.chips.open.open_chip
    >>> model.to(chip.device)
    >>> chip.begin_step(1)                          # before each training step
    """

    name: str
    """As the user named it, `auto` resolved: `cpu`, `cuda`, `npu`, `emulated:h800`."""
    opening: Opening = Opening()

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where tensors live."""

    @property
    @abstractmethod
    def identity(self) -> ChipIdentity:
        """Who this is; read once, after the device was opened and its switches were set."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What it can do."""

    @property
    @abstractmethod
    def collective_backend(self) -> str:
        """Name for `torch.distributed.init_process_group`."""

    @abstractmethod
    def memory(self) -> Memory:
        """Total, used and peak bytes of the device."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done everything it was given; raises what went wrong meanwhile."""

    @abstractmethod
    def classify(self, error: BaseException) -> ChipFault | None:
        """What an error means, or None if it is not the chip's (a bug of ours, a user's mistake)."""

    @abstractmethod
    def stream(self) -> Any:
        """A context manager under which work is queued beside the main stream; a no-op where there are none."""

    def compiler_missing(self) -> str | None:
        """Why torch.compile cannot be used here, one sentence, or None if it can."""
        return None if self.capabilities.compile else f"torch.compile has no backend for {self.name}."

    def begin_step(self, step: int) -> None:  # noqa: B027 (doing nothing is right for most chips)
        """Called before each training step with the number it will have. Real chips do nothing."""

    def close(self) -> None:  # noqa: B027 (most chips are given back when the process ends)
        """Give the device back. The chip is unusable afterwards."""
