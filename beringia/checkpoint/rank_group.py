"""What the ranks of one job tell each other about a checkpoint: JSON and 64-bit sums, over a gloo group of its own.

A group of its own, because the writing thread talks while training's collectives run. JSON in byte tensors, because
torch's object collectives pickle. With one rank nothing is sent and torch.distributed is not touched.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the slowest other to write its files."""


class RankGroup:
    """The ranks of `process_group`, or this process alone. Making one is collective: every rank of the job must."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if process_group is not None and dist.get_world_size(process_group) > 1:
            members = dist.get_process_group_ranks(process_group)
            self.group = dist.new_group(members, backend="gloo", timeout=_TIMEOUT)
            self.rank, self.size = dist.get_rank(process_group), len(members)

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value (JSON), in the order of ranks, on every rank."""
        if self.group is None:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([content.numel()]), group=self.group)
        longest = int(max(length.item() for length in lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: content.numel()] = content
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyone, padded, group=self.group)
        return [
            json.loads(bytes(one[: int(length.item())].numpy())) for one, length in zip(everyone, lengths, strict=True)
        ]

    def add(self, values: list[int]) -> list[int]:
        """The sums mod 2^64 over all ranks of as many values on each."""
        if self.group is None:
            return [value % 2**64 for value in values]
        signed = torch.tensor([value - 2**64 if value >= 2**63 else value for value in values], dtype=torch.int64)
        dist.all_reduce(signed, group=self.group)
        return [value % 2**64 for value in signed.tolist()]

    def close(self) -> None:
        """Give the group back."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None
