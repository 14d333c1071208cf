"""Memory at rest: every bit of every tensor is in some piece, and a bit that changes is seen in it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beringia.train.guard.checks.memory import PIECE_ELEMENTS, judge_replicas, judge_rest, pieces_of, words


def tensors() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ("small", torch.randn(7, 5, generator=generator)),
        ("large", torch.randn(PIECE_ELEMENTS + 1000, generator=generator)),
        ("one", torch.randn(1, generator=generator)),
    ]


def test_pieces_hold_every_element_once_and_none_is_larger_than_a_visit_allows() -> None:
    pieces = pieces_of(tensors())
    held = {(s.name, s.start): min(PIECE_ELEMENTS, s.tensor.numel() - s.start) for p in pieces for s in p.stretches}
    assert sum(held.values()) == sum(tensor.numel() for _, tensor in tensors())
    assert all(sum(held[s.name, s.start] for s in p.stretches) <= PIECE_ELEMENTS for p in pieces)
    assert len(pieces) == 3


@settings(deadline=None)  # the first call compiles the hash
@given(st.integers(0, 7 * 5 - 1), st.integers(0, 31))
def test_a_flipped_bit_is_seen_in_its_tensor(place: int, bit: int) -> None:
    named = tensors()
    piece = pieces_of(named)[0]
    before = piece.hashes()
    assert not [finding for finding in judge_rest(piece, before, piece.hashes()) if finding.alarming]
    mask = 1 << bit if bit < 31 else -(1 << 31)
    named[0][1].view(torch.int32).view(-1)[place] ^= mask
    assert [f.site for f in judge_rest(piece, before, piece.hashes()) if f.alarming] == ["small"]


def test_a_replica_with_other_bits_is_counted() -> None:
    named = tensors()
    piece = pieces_of(named)[0]
    rows = [words(piece.hashes()) for _ in range(3)]
    assert not any(finding.alarming for finding in judge_replicas(piece, torch.stack(rows)))
    named[0][1][2, 2] += 1.0
    rows[2] = words(piece.hashes())
    alarming = [finding for finding in judge_replicas(piece, torch.stack(rows)) if finding.alarming]
    assert [(finding.site, finding.value) for finding in alarming] == [("small", 1.0)]
