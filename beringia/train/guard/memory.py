"""Memory at rest: pieces of weights and moments must have the same hash after one update and before the next.

Between the two a step's forward and backward pass only read them. With replicas (DDP) the hash after the update must
also be the same on all ranks. Pieces take turns; what happens to a piece in other steps is not seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from beringia.numerics.state_hash import hash_tensor
from beringia.train.guard.finding import Finding
from beringia.train.sharding import own_part

PIECE_ELEMENTS = 1 << 18
"""One MiB of float32: a visit costs two readings of it."""
_WORD = 2**32


@dataclass(frozen=True)
class Piece:
    """A stretch of one tensor, flat, of the part that this rank holds."""

    name: str
    tensor: torch.Tensor
    start: int

    def hash(self, *, on_device: bool) -> int:
        """Of the bits it has now."""
        part = own_part(self.tensor.detach()).reshape(-1)[self.start : self.start + PIECE_ELEMENTS]
        return hash_tensor(part, self.name, on_device=on_device)


def pieces_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[Piece, ...]:
    """All tensors, cut into pieces."""
    return tuple(
        Piece(name, tensor, start)
        for name, tensor in tensors
        for start in range(0, max(1, own_part(tensor).numel()), PIECE_ELEMENTS)
    )


def judge_rest(piece: Piece, before: int, after: int) -> Finding:
    """Whether a piece is what it was."""
    what = "hash changed while nothing wrote to it: 1"
    return Finding("memory", piece.name, f"elements from {piece.start}", float(before != after), 0.0, what)


def judge_replicas(piece: Piece, words_R2: torch.Tensor) -> Finding:
    """Whether all ranks have the same hash; each row is one rank's hash as `words` gives it."""
    different = int((words_R2 != words_R2[0]).any(dim=1).sum())
    what = "number of replicas whose bits are not the first one's"
    return Finding("replicas", piece.name, f"elements from {piece.start}", float(different), 0.0, what)


def words(value: int) -> tuple[int, int]:
    """A 64-bit hash as two numbers that an int64 sum over ranks cannot overflow."""
    return value // _WORD, value % _WORD
