"""How long a qualification takes, and how much memory, beside a training step of that model. Prints one JSON object.

    python benchmarks/qualify_time.py --json [--model r2-micro --chip emulated:h800@exact --limit 90]
    python benchmarks/qualify_time.py --json --model SMOLLM2 --chip emulated:h800 --limit 600

SMOLLM2 is a directory that `recipes/prepare_smollm2.py` wrote. The exact fidelity makes 1 to 2 billion multiply-adds a
second, and the trace of that model has more than 10^12: too many for its limit.

Measured is the command itself, from its start to the certificate: recording the reference included. Memory is the
largest resident size of any of its processes, and that of a process that takes two training steps of the same batches
on the CPU. Must hold: r2-micro in the exact fidelity within 90 s, SmolLM2-135M within 600 s, memory at most three times
training's.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from beringia.machine.threads import usable_cores

MEMORY_TIMES = 3.0
_TRAIN = """
import resource, sys, torch, beringia
from beringia.machine.memory import keep_freed_memory
from beringia.qualify.subject import DecoderSubject
from beringia.qualify.trace import make_optimizer
keep_freed_memory()
subject = DecoderSubject(sys.argv[1])
model = subject.place(subject.build(), torch.device("cpu"), torch.float32)
optimizer = make_optimizer(model, fused=True)
for number in range(2):
    subject.loss(model, subject.batch(number)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def measure(model: str, chip: str, limit: float) -> dict[str, Any]:
    """One qualification."""
    trained = subprocess.run([sys.executable, "-c", _TRAIN, model], capture_output=True, text=True, check=True)
    training_bytes = int(trained.stdout)
    # The largest child so far is the one that trained: what is larger afterwards belongs to the qualification.
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        command = [sys.executable, "-m", "beringia", "qualify", chip, "--model", model, "--out", directory, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    answer = json.loads(done.stdout or "{}")
    if "certificate" not in answer:
        raise SystemExit(f"status {done.returncode}: {done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    certificate = answer["certificate"]
    return {
        "model": model,
        "chip": chip,
        "identity": certificate["identity"],
        "fidelity": certificate["identity"]["switches"].get("fidelity"),
        "verdict": certificate["verdict"],
        "reasons": certificate["reasons"],
        "seconds": seconds,
        "limit_seconds": limit,
        "peak_bytes": peak_bytes,
        "training_bytes": training_bytes,
        "memory_times_training": peak_bytes / training_bytes,
        "holds": {"time": seconds <= limit, "memory": peak_bytes <= MEMORY_TIMES * training_bytes},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--model", default="r2-micro")
    parser.add_argument("--chip", default="emulated:h800@exact")
    parser.add_argument("--limit", type=float, default=90.0)
    options = parser.parse_args()
    result = {
        "benchmark": "qualify-time",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {usable_cores()} cores",
        **measure(options.model, options.chip, options.limit),
    }
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
