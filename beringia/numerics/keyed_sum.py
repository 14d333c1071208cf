"""Multiply-and-add of a tensor's words with odd 64-bit multipliers: the inner loop of the state hash, on host memory.

It can copy the words while it reads them, so that a checkpoint reads memory once. Compiled from the few lines of C
below with the machine's own compiler (a fifth of a second), or done by numpy where there is none: `open_kernel()` says
which, and why, so that the caller can report it. Both give the same integers; the compiled one is compared with numpy
before it is used. Work is given as an array of jobs that hold addresses: many tensors, one call, several threads.

Writes nothing but a temporary directory, removed before this returns.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from beringia.machine.c_library import NotCompiled, compile_c

Sums = npt.NDArray[np.uint64]
Jobs = npt.NDArray[np.void]

BLOCK_WORDS = 4096
"""Words per block: the multipliers (32 KiB) and a block of float32 (16 KiB) stay in the caches next to the core."""

JOB = np.dtype(
    [
        ("words", np.uint64),
        ("copy", np.uint64),
        ("key", np.uint64),
        ("first", np.int64),
        ("count", np.int64),
        ("width", np.int64),
        ("value", np.uint64),
    ]
)
"""Consecutive words of one tensor: their address, the address of the copy or 0, the tensor's key, the first word's
number in the whole tensor, how many, bytes per word (1, 2 or 4), and the result: their share of the tensor's value."""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_NUMPY_WORDS: dict[int, Any] = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32}

_SOURCE = """
#include <stdint.h>
#include <string.h>
#define BLOCK %(block)d
/* The copy is not read again soon: storing it past the caches saves reading what was there before. */
#ifdef __SSE2__
#include <emmintrin.h>
static void copy_bytes(char *to, const char *from, int64_t count) {
  int64_t done = -(uintptr_t)to & 15; /* up to the first address that such stores accept */
  if (done > count) done = count;
  memcpy(to, from, done);
  for (; done + 64 <= count; done += 64)
    for (int part = 0; part < 64; part += 16)
      _mm_stream_si128((__m128i *)(to + done + part), _mm_loadu_si128((const __m128i *)(from + done + part)));
  memcpy(to + done, from + done, count - done);
}
#define FINISH_COPIES _mm_sfence()
#else
#define copy_bytes memcpy
#define FINISH_COPIES
#endif

typedef struct { uint64_t words, copy, key; int64_t first, count, width; uint64_t value; } job_t;

static uint64_t multiplier(uint64_t key, uint64_t number) {
  uint64_t mixed = (number + 1) * %(golden)dULL + key;
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ULL;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBULL;
  return (mixed ^ (mixed >> 31)) | 1;
}

#define DEFINE(NAME, WORD)                                                        \\
  static uint64_t NAME(const job_t *job, const uint64_t *table) {                 \\
    uint64_t value = 0;                                                           \\
    for (int64_t done = 0; done < job->count;) {                                  \\
      int64_t place = (job->first + done) %% BLOCK, length = BLOCK - place;        \\
      if (length > job->count - done) length = job->count - done;                 \\
      const WORD *words = (const WORD *)job->words + done;                        \\
      const uint64_t *factors = table + place;                                    \\
      uint64_t sum = 0;                                                           \\
      if (job->copy)                                                              \\
        copy_bytes((char *)((WORD *)job->copy + done), (const char *)words, length * sizeof(WORD)); \\
      for (int64_t i = 0; i < length; i++) sum += (uint64_t)words[i] * factors[i]; \\
      value += sum * multiplier(job->key, (job->first + done) / BLOCK);           \\
      done += length;                                                             \\
    }                                                                             \\
    return value;                                                                 \\
  }
DEFINE(value_of_uint8, uint8_t)
DEFINE(value_of_uint16, uint16_t)
DEFINE(value_of_uint32, uint32_t)

/* Threads call this with the same `next` and take jobs until none is left. */
void run(job_t *jobs, int64_t count, const uint64_t *table, int64_t *next) {
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) {
    job_t *job = jobs + i;
    job->value = job->width == 4   ? value_of_uint32(job, table)
                 : job->width == 2 ? value_of_uint16(job, table)
                                   : value_of_uint8(job, table);
  }
  FINISH_COPIES;
}
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


@dataclass(frozen=True)
class KeyedSumKernel:
    """Runs jobs."""

    compiled: bool
    reason: str
    """Why it is not compiled; empty when it is."""
    library: ctypes.CDLL | None = None

    def run(self, jobs: Jobs, pool: Executor | None = None, threads: int = 1) -> None:
        """Fill in each job's `value`, and copy where it says so, in `threads` threads of `pool` or in this one.

        Other Python threads run meanwhile. The caller keeps the memory behind the addresses alive.
        """
        if self.library is None:
            work = partial(_run_in_numpy, jobs, itertools.count())
        else:
            following = ctypes.c_int64(0)
            work = partial(self.library.run, jobs.ctypes.data, jobs.size, table().ctypes.data, ctypes.byref(following))
        if pool is None:
            work()
            return
        for running in [pool.submit(work) for _ in range(threads)]:
            running.result()


def _run_in_numpy(jobs: Jobs, following: Iterator[int]) -> None:
    while (number := next(following)) < jobs.size:
        job = jobs[number]
        count, width, first = int(job["count"]), int(job["width"]), int(job["first"])
        kind = _NUMPY_WORDS[width] * count
        words = np.frombuffer(kind.from_address(int(job["words"])), dtype=f"u{width}")
        if job["copy"]:
            ctypes.memmove(int(job["copy"]), int(job["words"]), count * width)
        sums = _block_sums(words, first % BLOCK_WORDS)
        factors = multipliers(int(job["key"]), first // BLOCK_WORDS, sums.size)
        job["value"] = np.sum(sums * factors, dtype=np.uint64)


def _block_sums(words: npt.NDArray[Any], place: int) -> Sums:
    factors = table()
    head = min(words.size, -place % BLOCK_WORDS)
    body = (words.size - head) // BLOCK_WORDS * BLOCK_WORDS
    parts = [_row_sums(words[:head].reshape(1, -1), factors[place : place + head])] if head else []
    parts.append(_row_sums(words[head : head + body].reshape(-1, BLOCK_WORDS), factors))
    tail = words[head + body :]
    if tail.size:
        parts.append(_row_sums(tail.reshape(1, -1), factors[: tail.size]))
    return np.concatenate(parts)


def _row_sums(rows: npt.NDArray[Any], factors: Sums) -> Sums:
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
    try:
        library = _compile()
    except NotCompiled as reason:
        return KeyedSumKernel(compiled=False, reason=str(reason))
    kernel = KeyedSumKernel(compiled=True, reason="", library=library)
    if not _agrees_with_numpy(kernel):
        return KeyedSumKernel(compiled=False, reason="what the C compiler made does not add up as numpy does")
    return kernel


def _compile() -> ctypes.CDLL:
    library = compile_c(_SOURCE % {"block": BLOCK_WORDS, "golden": _GOLDEN})
    library.run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    library.run.restype = None
    return library


def _agrees_with_numpy(kernel: KeyedSumKernel) -> bool:
    random = splitmix64(np.arange(3 * BLOCK_WORDS, dtype=np.uint64))
    copies = np.zeros((3, random.nbytes + 16), np.uint8)
    jobs = np.zeros(3, JOB)
    for job, copy, width in zip(jobs, copies, (1, 2, 4), strict=True):
        job["words"], job["key"], job["first"] = random.ctypes.data, 2**63 + width, 77 * BLOCK_WORDS + 7
        job["count"], job["width"] = random.nbytes // width - 3, width
        job["copy"] = copy.ctypes.data + width
    by_numpy = jobs.copy()
    kernel.run(jobs)
    copied = copies.copy()
    copies[:] = 0
    _run_in_numpy(by_numpy, itertools.count())
    return bool(np.array_equal(jobs["value"], by_numpy["value"]) and np.array_equal(copies, copied))
