"""Spreading a decoder over ranks: not at all for one, FSDP2 where the chip can, DDP where it says that it cannot."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # exported, but not declared so
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from beringia.chips.chip import Chip
from beringia.model import Decoder
from beringia.processes.ranks import Ranks

Sharding = Literal["none", "ddp", "fsdp2"]


def join(ranks: Ranks, chip: Chip, epoch: int) -> None:
    """Meet the other ranks; one rank alone meets nobody and pays nothing.

    `epoch` keeps workers of an earlier start, whose keys may still lie in torchrun's store, apart from these.
    """
    if ranks.count == 1:
        return
    hosts_store = ranks.first and not ranks.agent_hosts_store
    store = TCPStore(ranks.address, ranks.port, ranks.count, is_master=hosts_store)
    dist.init_process_group(
        chip.collective_backend,
        store=PrefixStore(f"beringia-{epoch}", store),
        rank=ranks.rank,
        world_size=ranks.count,
    )


def leave() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(decoder: Decoder, chip: Chip, ranks: Ranks) -> tuple[nn.Module, Sharding]:
    """The module to call for losses, and how it is spread. The decoder's parameters keep their names."""
    if ranks.count == 1:
        return decoder, "none"
    if chip.capabilities.sharding == "ddp":
        # Experts are stacked in one tensor, so every parameter has a gradient in every step.
        return DistributedDataParallel(decoder, broadcast_buffers=False), "ddp"
    mesh = init_device_mesh(chip.device.type, (ranks.count,))
    for layer in decoder.model.layers:
        # The multi-token layer uses its norms before and after its own forward: it stays whole between the two.
        fully_shard(layer, mesh=mesh, reshard_after_forward=layer is not decoder.mtp)
    if decoder.mtp is not None:
        register_fsdp_forward_method(decoder.mtp, "predict")
    fully_shard(decoder, mesh=mesh)  # in place
    register_fsdp_forward_method(decoder, "logits")  # sampling calls it past forward
    return decoder, "fsdp2"


def without_gradient_sync(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Around one accumulation step: gradients meet the other ranks' in the last one only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of each element over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def sum_of_host_values(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`sum_over_ranks` for a tensor on the host: it travels through the device, whose backend may know no other."""
    if not dist.is_initialized():
        return values
    return sum_over_ranks(values.to(device)).cpu()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor in one piece (a collective); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_whole(source: torch.Tensor, live: torch.Tensor) -> None:
    """Copy a whole tensor on the host into a live one; of a sharded one each rank takes its part (a collective)."""
    if isinstance(live, DTensor):
        part = distribute_tensor(source.to(live.device), live.device_mesh, live.placements)
        live.to_local().copy_(part.to_local())
    else:
        live.copy_(source)
