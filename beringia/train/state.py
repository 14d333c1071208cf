"""What a run's state consists of, by name: the live tensors, and the progress beside them.

Weights and the routers' correction biases under their names in the model, moments as in `optimizer.py`. What is not a
tensor is the progress: step, data cursor, and the seed from which, with (step, sample), all randomness is derived.
"""

from __future__ import annotations

from typing import Any

import torch

from beringia.data import Stream
from beringia.errors import CheckpointDamaged, DataError
from beringia.model import Decoder
from beringia.train.optimizer import moments, set_step


def live_tensors(decoder: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor that training changes, as it is on the device now; not copies. A tied weight appears once."""
    tensors: dict[str, torch.Tensor] = dict(decoder.named_parameters())
    persistent = decoder.state_dict(keep_vars=True)
    tensors |= {name: buffer for name, buffer in decoder.named_buffers() if name in persistent}
    tensors |= dict(moments(decoder.named_parameters(), optimizer))
    return tensors


def progress_of(*, step: int, cursor: int, seed: int, stream: Stream, batch: int) -> dict[str, Any]:
    """What a checkpoint records beside the tensors. `next_samples` lets whoever resumes see that the next batch is
    due. Of several data sets each has its cursor."""
    cursors = stream.cursors(cursor)
    return {
        **({} if cursors is None else {"cursors": cursors}),
        "step": step,
        "cursor": cursor,
        "seed": seed,
        "data": stream.identity,
        "next_samples": stream.fingerprint(cursor, batch),
    }


def check_progress(progress: dict[str, Any], *, seed: int, stream: Stream, batch: int, place: str) -> None:
    """The data that comes next is the data that was due. Raises DataError where the data is another, CheckpointDamaged
    where the cursor is."""
    due = {"seed": seed, "data": stream.identity}
    for what, value in due.items():
        if progress[what] != value:
            raise DataError(
                f"After step {progress['step']} the run was due to go on with {what} {progress[what]}, and here it is "
                f"{value}: its data is not what it was, or is read in another way. Put it back (or go on with the "
                "version of Beringia that read it so), and the run goes on from where it is."
            )
    cursor, following = progress["cursor"], progress["next_samples"]
    told, follows = progress.get("cursors"), stream.cursors(cursor)
    if told != follows:
        raise CheckpointDamaged(
            f"{place}: the cursors of the data sets are {told}; {follows} follows from the run's, {cursor}.", place
        )
    if (found := stream.fingerprint(cursor, batch)) != following:
        raise CheckpointDamaged(
            f"{place}: the checkpoint was due to go on with next_samples {following}, here it is {found} (cursor "
            f"{cursor}). The cursor is not the one that was saved.",
            place,
        )


def adopt_progress(progress: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Tell the optimizer how many updates it has done."""
    set_step(optimizer, progress["step"])
