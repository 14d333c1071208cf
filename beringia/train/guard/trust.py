"""Which sites were found clean when, on this rank and, once in a while, on all: what trust in a checkpoint stands on.

R ranks, S sites.
"""

from __future__ import annotations

import torch

from beringia.processes.ranks import Ranks
from beringia.records.manifest import CleanCheck
from beringia.train.guard.schedule import BLOCK_STEPS
from beringia.train.sharding import sum_of_host_values


class Trust:
    """The last step at which each site was clean on each rank, 0 for never."""

    def __init__(self, sites: tuple[str, ...], ranks: Ranks, device: torch.device) -> None:
        self._sites = sites
        self._ranks = ranks
        self._device = device
        self._clean_RS = torch.zeros(ranks.count, len(sites), dtype=torch.int64)

    def clean(self, site: str, step: int) -> None:
        """A site was found clean on this rank."""
        self._clean_RS[self._ranks.rank, self._sites.index(site)] = step

    def since(self, step: int) -> tuple[CleanCheck, ...] | None:
        """One clean check of every site on every rank at a step after `step`, or None if one is missing."""
        if int(self._clean_RS.min()) <= step:
            return None
        return tuple(
            CleanCheck(site=site, replica=rank, step=clean)
            for rank, row in enumerate(self._clean_RS.tolist())
            for site, clean in zip(self._sites, row, strict=True)
        )

    def exchange(self, plan: list[int]) -> list[int]:
        """Rank 0's plan to all, and every rank's clean steps to all, in one collective."""
        if self._ranks.count == 1:
            return plan
        plan = plan or [0] * BLOCK_STEPS
        clean_RS = torch.zeros_like(self._clean_RS)
        clean_RS[self._ranks.rank] = self._clean_RS[self._ranks.rank]
        values = torch.cat((torch.tensor(plan, dtype=torch.int64), clean_RS.flatten()))
        values = sum_of_host_values(values, self._device)
        self._clean_RS = values[BLOCK_STEPS:].view_as(clean_RS).clone()
        return [int(mask) for mask in values[:BLOCK_STEPS]]
