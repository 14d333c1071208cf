"""Multiply-and-add of a tensor's words with a table of odd 64-bit multipliers, one sum per block of 4,096 words.

The inner loop of the state hash (`state_hash.py`), on host memory. It can copy the words while it reads them, so that
a checkpoint reads memory once. Compiled from the few lines of C below with the machine's own compiler (a fifth of a
second), or done by numpy where there is none: `open_kernel()` says which, and why, so that the caller can report it.
Both give the same integers; the compiled one is compared with numpy before it is used.

Writes nothing but a temporary directory, removed before this returns.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32] | npt.NDArray[np.uint16] | npt.NDArray[np.uint8]
Sums = npt.NDArray[np.uint64]

BLOCK_WORDS = 4096
"""Words per block: the multipliers (32 KiB) and a block of float32 (16 KiB) stay in the caches next to the core."""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1

_SOURCE = """
#include <stdint.h>
#include <string.h>
#define BLOCK %(block)d
#define DEFINE(NAME, WORD)                                                                                   \\
  void NAME(WORD *copy, const WORD *words, const uint64_t *table, int64_t count, int64_t place, uint64_t *sums) {  \\
    for (int64_t done = 0, block = 0; done < count; block++, place = 0) {                                    \\
      int64_t length = BLOCK - place < count - done ? BLOCK - place : count - done;                           \\
      const WORD *from = words + done;                                                                       \\
      const uint64_t *factor = table + place;                                                                \\
      uint64_t sum = 0;                                                                                      \\
      if (copy) memcpy(copy + done, from, length * sizeof(WORD));                                            \\
      for (int64_t i = 0; i < length; i++) sum += (uint64_t)from[i] * factor[i];                              \\
      sums[block] = sum;                                                                                     \\
      done += length;                                                                                        \\
    }                                                                                                        \\
  }
DEFINE(sums_of_uint8, uint8_t)
DEFINE(sums_of_uint16, uint16_t)
DEFINE(sums_of_uint32, uint32_t)
"""


def splitmix64(counter: Sums) -> Sums:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers that looks random."""
    mixed = counter.copy()
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def multipliers(key: int, first: int, count: int) -> Sums:
    """Odd 64-bit multipliers number `first` .. `first + count - 1` of the sequence with this key."""
    counter = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    counter *= np.uint64(_GOLDEN)
    counter += np.uint64(key & _MASK)
    return splitmix64(counter) | np.uint64(1)


@functools.cache
def table() -> Sums:
    """The 4,096 multipliers inside a block, uint64. The low 13 bits count the odd numbers, the others are random.

    Differences of two entries therefore are divisible by at most 2^12: two 32-bit words that change places change the
    sum for certain (2^31 * 2^12 < 2^64). A test shows the like for sign flips: no sum of two is divisible by 2^33.
    """
    high = multipliers(0, 0, BLOCK_WORDS) << np.uint64(13)
    entries: Sums = high | (np.arange(BLOCK_WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1))
    entries.flags.writeable = False
    return entries


def blocks_touched(place: int, count: int) -> int:
    """How many blocks `count` words touch when the first stands at `place` in its block."""
    return -(-(place + count) // BLOCK_WORDS) if count else 0


@dataclass(frozen=True)
class KeyedSumKernel:
    """Block sums of words in host memory."""

    compiled: bool
    reason: str
    """Why it is not compiled; empty when it is."""
    library: ctypes.CDLL | None = None

    def block_sums(self, words: Words, place: int, copy_to: Words | None = None) -> Sums:
        """Sum of word x multiplier mod 2^64 for each block touched; the first word stands at `place` in its block.

        `words`: contiguous, one-dimensional; `copy_to`: like `words`, receives a copy. Other threads run meanwhile.
        """
        if self.library is None:
            return _numpy_block_sums(words, place, copy_to)
        sums = np.empty(blocks_touched(place, words.size), np.uint64)
        function = getattr(self.library, f"sums_of_{words.dtype.name}")
        destination = None if copy_to is None else copy_to.ctypes.data
        function(destination, words.ctypes.data, table().ctypes.data, words.size, place, sums.ctypes.data)
        return sums


def _numpy_block_sums(words: Words, place: int, copy_to: Words | None) -> Sums:
    if copy_to is not None:
        np.copyto(copy_to, words)
    factors = table()
    head = min(words.size, -place % BLOCK_WORDS)
    body = (words.size - head) // BLOCK_WORDS * BLOCK_WORDS
    parts = [_row_sums(words[:head].reshape(1, -1), factors[place : place + head])] if head else []
    parts.append(_row_sums(words[head : head + body].reshape(-1, BLOCK_WORDS), factors))
    tail = words[head + body :]
    if tail.size:
        parts.append(_row_sums(tail.reshape(1, -1), factors[: tail.size]))
    return np.concatenate(parts)


def _row_sums(rows: Words, factors: Sums) -> Sums:
    """Sums of rows x factors, 64 rows at a time so that the products stay in the cache (2 MiB)."""
    sums = np.zeros(rows.shape[0], np.uint64)
    products = np.empty((min(64, rows.shape[0]), rows.shape[1]), np.uint64)
    for first in range(0, rows.shape[0], 64):
        some = rows[first : first + 64]
        np.multiply(some, factors, out=products[: some.shape[0]])
        np.sum(products[: some.shape[0]], axis=1, out=sums[first : first + 64])
    return sums


@functools.cache
def open_kernel() -> KeyedSumKernel:
    """The compiled kernel where this machine has a C compiler that works, else numpy's, with the reason."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return KeyedSumKernel(compiled=False, reason="no C compiler (cc, gcc or clang) was found")
    try:
        library = _compile(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        return KeyedSumKernel(compiled=False, reason=f"{compiler} failed: {detail.strip().splitlines()[-1:]}")
    kernel = KeyedSumKernel(compiled=True, reason="", library=library)
    if not _agrees_with_numpy(kernel):
        return KeyedSumKernel(compiled=False, reason=f"what {compiler} compiled does not add up as numpy does")
    return kernel


def _compile(compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="beringia-") as directory:
        source, shared = Path(directory, "keyed_sum.c"), Path(directory, "keyed_sum.so")
        source.write_text(_SOURCE % {"block": BLOCK_WORDS})
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(shared), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        library = ctypes.CDLL(str(shared))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in ("sums_of_uint8", "sums_of_uint16", "sums_of_uint32"):
        getattr(library, name).argtypes = [pointer, pointer, pointer, number, number, pointer]
        getattr(library, name).restype = None
    return library


def _agrees_with_numpy(kernel: KeyedSumKernel) -> bool:
    random = splitmix64(np.arange(3 * BLOCK_WORDS, dtype=np.uint64))
    for words in (random.astype(np.uint8), random.astype(np.uint16), random.astype(np.uint32)):
        if not np.array_equal(kernel.block_sums(words, 77), _numpy_block_sums(words, 77, None)):
            return False
    return True
