"""Memory that a long process has freed goes back to the kernel between its parts."""

import platform
import subprocess
import sys

import pytest

# Each large block is followed by a small one that stays, as a trace's sketches do.
PARTS = """
import resource, torch
from beringia.machine.memory import keep_freed_memory, return_freed_memory
def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
keep_freed_memory()
before = resident_bytes()
large, small = [], []
for _ in range(64):
    large.append(torch.ones(2**20))
    small.append(torch.ones(512))
del large
kept = resident_bytes() - before
returned = return_freed_memory()
print(kept, resident_bytes() - before, returned)
"""
LARGE_BYTES = 64 * 4 * 2**20


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim: elsewhere the call says that it did nothing"
)
def test_freed_blocks_between_small_ones_that_stay_go_back_to_the_kernel():
    done = subprocess.run([sys.executable, "-c", PARTS], capture_output=True, text=True, check=True)
    kept, left, returned = done.stdout.split()
    assert returned == "True"
    assert int(kept) > 0.9 * LARGE_BYTES, "freed blocks are kept for the next step"
    # Small blocks and what is not a whole page stay; a tenth is far more than those.
    assert int(left) < 0.1 * LARGE_BYTES
