"""Settings for every test."""

import os

from hypothesis import HealthCheck, settings

# pytest-xdist's processes share the cores; set before torch is loaded. Alone, a process has them all.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

# Machines that run tests are noisy: how long an example takes, or is drawn, says nothing about whether it holds.
settings.register_profile("beringia", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("beringia")
