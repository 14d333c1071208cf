"""Memory at rest: pieces of weights and moments must have the same hash after one update and before the next.

Between the two a step's forward and backward pass only read them. With replicas (DDP) the hash after the update must
also be the same on all ranks. Pieces take turns; what happens to a piece in other steps is not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from beringia.numerics.state_hash import hash_tensor
from beringia.train.guard.check import Check, Moment, Step, Training, Turns, When
from beringia.train.guard.finding import Finding
from beringia.train.optimizer import moments
from beringia.train.sharding import local, sum_of_host_values

PIECE_ELEMENTS = 1 << 18
"""One MiB of float32: a visit costs two readings of it."""
_WORD = 2**32


@dataclass(frozen=True)
class Stretch:
    """Some elements of one tensor, of the part that this rank holds, counted as if it were flat."""

    name: str
    tensor: torch.Tensor
    start: int

    def hash(self) -> int:
        """Of the bits that they have now. On the host: one MiB crosses any bus faster than a device runs the hash's
        many small operators."""
        part = local(self.tensor.detach()).reshape(-1)[self.start : self.start + PIECE_ELEMENTS]
        return hash_tensor(part, self.name)


@dataclass(frozen=True)
class Piece:
    """What one visit looks at: stretches of about `PIECE_ELEMENTS` elements together."""

    stretches: tuple[Stretch, ...]

    def hashes(self) -> list[int]:
        """One for each stretch."""
        return [stretch.hash() for stretch in self.stretches]


@dataclass(frozen=True)
class Resting:
    """A piece and the hashes that it had after an update."""

    piece: Piece
    hashes: list[int]


class Memory(Check[Resting]):
    """A piece in turn."""

    name = "memory"
    when = When(look=Moment.AFTER_UPDATE, judge=(Moment.AFTER_UPDATE, Moment.BEFORE_UPDATE), weight=0.15, order=30)

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        named = list(training.decoder.named_parameters())
        self._turns = Turns(pieces_of((*named, *moments(named, training.optimizer))))

    def look(self, step: Step) -> Sequence[Resting]:
        piece = self._turns.next()
        return [Resting(piece, piece.hashes())]

    def judge(self, look: Resting, step: Step) -> Sequence[Finding]:
        if step.moment is Moment.BEFORE_UPDATE:
            return judge_rest(look.piece, look.hashes, look.piece.hashes())
        return self._judge_replicas(look) if self.training.sharding == "ddp" else []

    def _judge_replicas(self, look: Resting) -> list[Finding]:
        ranks = self.training.ranks
        words_RS2 = torch.zeros(ranks.count, len(look.hashes), 2, dtype=torch.int64)
        words_RS2[ranks.rank] = words(look.hashes)
        return judge_replicas(look.piece, sum_of_host_values(words_RS2, self.training.chip.device))


def pieces_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[Piece, ...]:
    """All tensors, in order: large ones cut up, small ones together."""
    pieces: list[list[Stretch]] = []
    room = 0
    for name, tensor in tensors:
        length = local(tensor).numel()
        for start in range(0, length, PIECE_ELEMENTS):
            taken = min(PIECE_ELEMENTS, length - start)
            if taken > room:
                pieces.append([])
                room = PIECE_ELEMENTS
            pieces[-1].append(Stretch(name, tensor, start))
            room -= taken
    return tuple(map(Piece, map(tuple, pieces)))


def judge_rest(piece: Piece, before: list[int], after: list[int]) -> list[Finding]:
    """Whether the stretches of a piece are what they were."""
    what = "hash changed while nothing wrote to it: 1"
    return [
        Finding("memory", stretch.name, f"elements from {stretch.start}", float(first != second), 0.0, what)
        for stretch, first, second in zip(piece.stretches, before, after, strict=True)
    ]


def judge_replicas(piece: Piece, words_RS2: torch.Tensor) -> list[Finding]:
    """Whether all ranks have the same hashes; row r holds rank r's, as `words` gives them."""
    different_S = (words_RS2 != words_RS2[0]).any(dim=2).sum(dim=0).tolist()
    what = "number of replicas whose bits are not the first one's"
    return [
        Finding("replicas", stretch.name, f"elements from {stretch.start}", float(different), 0.0, what)
        for stretch, different in zip(piece.stretches, different_S, strict=True)
    ]


def words(hashes: list[int]) -> torch.Tensor:
    """64-bit hashes as pairs of numbers, S 2, that an int64 sum over ranks cannot overflow."""
    return torch.tensor([(value // _WORD, value % _WORD) for value in hashes], dtype=torch.int64)
