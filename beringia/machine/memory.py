"""Settings of the C library's allocator for a process that makes and frees the same large tensors step after step.

glibc returns each large block to the kernel when it is freed and asks for it again in the next operation, so that every
page is faulted in and zeroed anew; on a virtual machine that can cost more than the arithmetic (measured: an emulated
chip's step 2.3 times slower). Keeping freed blocks costs nothing that a training step does not need anyway.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from functools import cache

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KERNELS_KEPT = 256
"""Measured: with 64 a qualification takes a tenth longer, with 256 no longer than with all."""
_LARGEST_KEPT_BYTES = 1 << 30
"""Blocks from this size on still come from the kernel: a checkpoint's staging buffers, not activations."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks for the next step. Returns whether this C library understands it."""
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    kept = library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    return bool(kept and library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def keep_few_kernels() -> None:
    """Have oneDNN, before its first product, keep the code of fewer shapes than the 1,024 of its default: of a program
    with many shapes that is 0.2 GB, and each is needed for a short while. A value in the environment wins."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KERNELS_KEPT))


def return_freed_memory() -> bool:
    """Give what is free back to the kernel, between two parts of a long process. Returns whether this C library can.

    What a part leaves behind, though small, lies between the large blocks that it freed, so the next part's blocks do
    not fit there and the process grows with every part (measured: 0.3 GB in use, 10.9 GB free, after six traces of a
    model of 135 million parameters). The garbage collector goes first: cycles hold weights and moments (torch's set-up
    of a process's first optimizer leaves one).
    """
    collect_garbage()
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).malloc_trim(0))


def collect_garbage() -> None:
    """Collect, and leave what was there the first time, modules and their functions, out of later collections: these
    take 0.2 s where much is loaded, and come when they like."""
    gc.collect()
    _leave_out_what_stays()


@cache
def _leave_out_what_stays() -> None:
    gc.freeze()
