"""Which rank writes which piece of which tensor, and which pieces a rank needs back.

torch.distributed.checkpoint's default planners decide: one item for each shard, replicated tensors written by one rank
only, and on loading the overlaps of what was saved with what is wanted (2 ranks -> 1 -> 2). Local plans travel between
ranks as JSON (`ranks.py`) and every rank computes the same global plan. It depends on the state's layout
alone, so it is made once and kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from beringia.checkpoint.rank_group import RankGroup
from beringia.checkpoint.tensor_file import DTYPES
from beringia.errors import RunError
from beringia.numerics.state_hash import dtype_name
from beringia.records.manifest import CheckpointManifest

State = Mapping[str, torch.Tensor]
"""The flat state of a run: `model.layers.0...weight`, `optimizer.exp_avg.model...`; tensors or DTensors."""


def layout_of(state: State) -> tuple[Any, ...]:
    """What the plan depends on, to notice when it changes: names, shapes, dtypes, placements."""
    return tuple(
        (name, tensor.shape, tensor.dtype, tensor.placements if isinstance(tensor, DTensor) else None)
        for name, tensor in state.items()
    )


def plan_save(state: State, ranks: RankGroup) -> tuple[DefaultSavePlanner, list[SavePlan], Metadata]:
    """The planner, every rank's final plan, and the metadata of the whole. Collective."""
    for name, tensor in state.items():
        if dtype_name(tensor.dtype) not in DTYPES:
            raise RunError(
                f"Tensor {name} has dtype {dtype_name(tensor.dtype)}, which safetensors cannot hold; cast it."
            )
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(state), is_coordinator=ranks.rank == 0)
    local = planner.create_local_plan()
    plans = [_plan_from_json(items) for items in ranks.gather(_plan_to_json(local))]
    final, metadata = planner.create_global_plan(plans)
    return planner, [planner.finish_plan(plan) for plan in final], metadata


def metadata_of(manifest: CheckpointManifest) -> Metadata:
    """The planner's metadata from our manifest; its own file would be a pickle."""
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        name: TensorStorageMetadata(
            properties=TensorProperties(dtype=getattr(torch, entry.dtype)),
            size=torch.Size(entry.shape),
            chunks=[ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks],
        )
        for name, entry in manifest.tensors.items()
    }
    where = {
        MetadataIndex(name, torch.Size(chunk.offsets)): chunk
        for name, entry in manifest.tensors.items()
        for chunk in entry.chunks
    }
    return Metadata(state_dict_metadata=tensors, storage_data=where)


def described(metadata: Metadata) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each tensor's (dtype name, shape), whole."""
    found = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), "the state holds tensors only"
        found[name] = (dtype_name(entry.properties.dtype), tuple(entry.size))
    return found


def load_planner() -> DefaultLoadPlanner:
    """The planner for a flat state."""
    return DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def check_fits(state: State, manifest: CheckpointManifest) -> None:
    """Raise RunError, naming what differs, unless names, shapes and dtypes are those of the checkpoint."""
    where = f"The checkpoint of step {manifest.step}"
    missing, unknown = sorted(state.keys() - manifest.tensors.keys()), sorted(manifest.tensors.keys() - state.keys())
    if missing or unknown:
        raise RunError(
            f"{where} does not fit this model: {_some(missing)} not in the checkpoint, {_some(unknown)} only there. "
            "Use the recipe that it was trained with."
        )
    for name, tensor in state.items():
        entry = manifest.tensors[name]
        found = (dtype_name(tensor.dtype), tuple(tensor.shape))
        if found != (entry.dtype, entry.shape):
            raise RunError(
                f"{where} has {name} as {entry.dtype} {list(entry.shape)}, this model as {found[0]} {list(found[1])}. "
                "Use the recipe that it was trained with."
            )


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _plan_to_json(plan: SavePlan) -> list[dict[str, Any]]:
    items = []
    for item in plan.items:
        data = item.tensor_data
        assert data is not None and data.chunk is not None, "the state holds tensors only"
        items.append(
            {
                "name": item.index.fqn,
                "type": item.type.name,
                "offsets": list(data.chunk.offsets),
                "sizes": list(data.chunk.sizes),
                "shape": list(data.size),
                "dtype": dtype_name(data.properties.dtype),
            }
        )
    return items


def _plan_from_json(items: list[dict[str, Any]]) -> SavePlan:
    return SavePlan(
        [
            WriteItem(
                index=MetadataIndex(item["name"], torch.Size(item["offsets"])),
                type=WriteItemType[item["type"]],
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(item["offsets"]), torch.Size(item["sizes"])),
                    properties=TensorProperties(dtype=getattr(torch, item["dtype"])),
                    size=torch.Size(item["shape"]),
                ),
            )
            for item in items
        ]
    )
