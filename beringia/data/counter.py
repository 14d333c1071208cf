"""Randomness as a function: what is drawn at (key, counter) is the same wherever, whenever and in whatever order.

A generator with a hidden state would tie sample number n to all samples before it. Here each word is a hash of its own
index, so any rank computes any sample, and a run resumes at any sample, without a state to save. `Permutation` is the
same idea for epochs: position -> position, without a table of the length of the data.

The hash is the finalizer of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA
2014) over a Weyl sequence. It is not cryptographic. Everything is numpy `uint64`, on the CPU, wrapping modulo 2^64.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

_WEYL = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from a name: equal parts give equal keys, whatever the machine."""
    name = "/".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def mix(words: Words) -> Words:
    """SplitMix64's finalizer, a bijection on 64-bit words in which every output bit depends on every input bit."""
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))


def random_words(key: int, counters: Integers | Words) -> Words:
    """One 64-bit word for each counter (any shape)."""
    return mix(mix(counters.astype(np.uint64) * _WEYL + np.uint64(key)) + np.uint64(key))


def below(words: Words, bound: int) -> Integers:
    """Integers in [0, bound) from random words; the bias is at most bound / 2^32, which no run here can see."""
    return (((words >> _HALF) * np.uint64(bound)) >> _HALF).astype(np.int64)


def chance(words: Words, probability: float) -> Booleans:
    """True with the given probability (to within 2^-32)."""
    result: Booleans = (words >> _HALF) < np.uint64(round(probability * 2.0**32))
    return result


@dataclass(frozen=True)
class Permutation:
    """A keyed permutation of range(length), computed at the positions asked for: no table, whatever the length.

    A Feistel network over the smallest even number of bits that holds `length`; what falls outside is sent through
    again until it lands inside ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    The domain is under four times `length`, so a position is walked under four times on average.
    """

    length: int
    key: int

    _ROUNDS = 4  # Luby and Rackoff 1988: four rounds of a random function make a strong pseudorandom permutation

    def __call__(self, positions: Integers) -> Integers:
        """Where each position (int64, any shape, in [0, length)) goes."""
        half_bits = np.uint64(max(1, ((max(self.length - 1, 1)).bit_length() + 1) // 2))
        places = self._shuffle(positions.astype(np.uint64), half_bits)
        while (outside := places >= np.uint64(self.length)).any():
            places = np.where(outside, self._shuffle(places, half_bits), places)
        return places.astype(np.int64)

    def _shuffle(self, places: Words, half_bits: np.uint64) -> Words:
        mask = (np.uint64(1) << half_bits) - np.uint64(1)
        left, right = places >> half_bits, places & mask
        for round_number in range(self._ROUNDS):
            left, right = right, left ^ (random_words(derive_key(self.key, round_number), right) & mask)
        return (left << half_bits) | right
