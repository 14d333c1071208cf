"""Collectives as training calls them, on whatever backend the chip has."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from beringia.chips.chip import Chip
from beringia.qualify.hardware.collective_cases import Case


def communicate(case: Case, contributed: torch.Tensor, chip: Chip, ranks: int) -> torch.Tensor:
    """The collective on the device; its result on the CPU."""
    mine = contributed.to(chip.device)
    pieces = {"all-gather": ranks * case.size, "reduce-scatter": case.size, "all-to-all": ranks * case.size}
    # Zeros, so that what is not written is seen.
    result = torch.zeros(pieces.get(case.collective, case.size), dtype=case.dtype, device=chip.device)
    if case.collective == "all-reduce":
        result.copy_(mine)
        dist.all_reduce(result)
    elif case.collective == "broadcast":
        source = ranks - 1
        if dist.get_rank() == source:
            result.copy_(mine)
        dist.broadcast(result, source)
    elif case.collective == "all-to-all":
        dist.all_to_all_single(result, mine)
    else:
        single(case.collective)(result, mine)
    chip.synchronize()
    return result.cpu()


def single(collective: str) -> Callable[[torch.Tensor, torch.Tensor], object]:
    """What FSDP2 calls: (result, contribution), a tensor each. Torch 2.13 has other names for them, and warns of the
    old ones."""
    new, old = {
        "all-gather": ("all_gather_single", "all_gather_into_tensor"),
        "reduce-scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
    }[collective]
    found: Callable[[torch.Tensor, torch.Tensor], object] = getattr(dist, new, None) or getattr(dist, old)
    return found
