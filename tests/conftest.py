"""Settings for every test."""

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Before torch is loaded, which a test may do before it imports beringia: threads that spin while they wait made a test
# on a busy machine cost ten times as much. Processes of pytest-xdist share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

# Machines that run tests are noisy: how long an example takes, or is drawn, says nothing about whether it holds.
settings.register_profile("beringia", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("beringia")


@pytest.fixture(scope="module", autouse=True)
def no_emulated_chip_stays_open() -> Iterator[None]:
    """A process drives one vendor's chip: what a file of tests leaves open, the next one's could not open another
    beside."""
    yield
    emulated = sys.modules.get("beringia.chips.emulated.chip")
    if emulated is not None and emulated.EmulatedChip._open is not None:
        emulated.EmulatedChip._open.close()
