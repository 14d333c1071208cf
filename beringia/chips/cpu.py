"""The CPU as a chip: the reference, the development machine, and the fallback when no accelerator is here.

Opening it sets the switches that make a run repeat bit for bit on the same number of threads (deterministic algorithms,
float32 products in float32, subnormals kept) and records them. They are torch's own global settings: the process that
opens a chip belongs to it.

Reads /proc for the model name and memory. Does not choose thread counts; `beringia.machine.threads` does, before torch
loads.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from beringia.chips.chip import Capabilities, Chip, ChipFault, Memory, Presence, ServeArguments
from beringia.chips.classification import Rule, device_text, gravest_match
from beringia.numerics.deterministic import use_deterministic_algorithms
from beringia.records.identity import ChipIdentity

CHIP_NAME = "cpu"
"""By which recipes ask for it; `open.py` finds this file by it."""

CPU_RULES: tuple[Rule, ...] = (
    Rule(
        "out-of-memory",
        r"DefaultCPUAllocator: (can't allocate|not enough) memory|\bMemoryError\b|Cannot allocate memory",
        "persistent",
        "The same step asks for the same memory again.",
    ),
    Rule(
        "gloo-peer-gone",
        r"Connection closed by peer|(?i:connection reset by peer)|Broken pipe|Connection refused"
        r"|Connection was likely closed|Remote end closed|all retries failed",
        "transient",
        "Another rank's process is gone, this one's device is not: a restarted group may try the step again.",
    ),
    Rule(
        "gloo-timeout",
        r"Timed out waiting|Application timeout caused pair closure|wait timeout after \d+ ?ms"
        r"|timed out in monitoredBarrier|client socket has timed out",
        "transient",
        "A rank was late or the network slow: all ranks may try the step again.",
    ),
)
"""Errors of a CPU, and of gloo and torch's TCP store on it. Texts: gloo `transport/tcp`, c10d `socket.cpp`."""


def serve_arguments(quantization: str | None, *, latent: bool, experts: bool) -> ServeArguments:
    """vLLM 0.32 on the CPU: its latent attention fails at run time for blocks of 16, and takes few head sizes."""
    environment = {"VLLM_MLA_DISABLE": "1"} if latent else {}
    return ServeArguments(("--block-size", "32"), environment)


class Cpu(Chip):
    """The processor that runs this process."""

    name = "cpu"

    def __init__(self, index: int = 0) -> None:
        """Set the switches and read who this is.

        `index` only counts the ranks that share the machine, which is one device however many there are.
        """
        make_repeatable()
        self._identity = _identity()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def identity(self) -> ChipIdentity:
        return self._identity

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            dtypes=frozenset(
                {
                    torch.float64,
                    torch.float32,
                    torch.float16,
                    torch.bfloat16,
                    torch.float8_e4m3fn,
                    torch.float8_e5m2,
                    torch.int64,
                    torch.int32,
                    torch.int16,
                    torch.int8,
                    torch.uint8,
                    torch.bool,
                }
            ),
            # bfloat16 products are fast with avx512_bf16 or AMX and slow elsewhere; a reference computes in float32.
            compute_dtype=torch.float32,
            sharding="fsdp2",
            compile=compiler_missing() is None,
            exact_int64=True,
            pinned_memory=False,
            streams=False,
            fused_optimizer=True,
        )

    @property
    def collective_backend(self) -> str:
        return "gloo"

    def memory(self) -> Memory:
        """Of the machine (or its control group), and what this process holds of it."""
        return host_memory()

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    def classify(self, error: BaseException) -> ChipFault | None:
        return classify_cpu(error)

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def compiler_missing(self) -> str | None:
        return compiler_missing()


def find() -> list[Presence]:
    """The CPU is always here."""
    return [Presence("cpu", model_name(), "real", total_memory_bytes(), here=True, state=f"{os.cpu_count()} cores")]


def open_device(index: int) -> Cpu:
    """Open it; every index is the same machine."""
    return Cpu(index)


def classify_cpu(error: BaseException | str) -> ChipFault | None:
    """What an error of a CPU, or of gloo on it, means; None if it is not the machine's."""
    return gravest_match(device_text(error), CPU_RULES)


def compiler_missing() -> str | None:
    """Why torch.compile cannot compile for the CPU here, or None if it can.

    Looks for what torch's inductor calls: `$CXX`, else g++, and the headers of this Python.
    """
    compiler = os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and {compiler!r} is not on the path: install g++ or set CXX."
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return f"torch.compile needs Python's headers, and {header} is not there: install Python's development package."
    return None


def model_name() -> str:
    """The processor's name as the kernel gives it."""
    if _has_proc():
        match = re.search(
            r"^(?:model name|Hardware|cpu model)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def host_memory() -> Memory:
    """Memory of the machine (or its control group), and what this process holds of it."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1]) if _has_proc() else 0
    # getrusage counts kibibytes on Linux.
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    used_bytes = resident_pages * resource.getpagesize()
    return Memory(total_memory_bytes(), used_bytes, max(used_bytes, peak_bytes))


def total_memory_bytes() -> int:
    """Memory of the machine, or of the control group when that allows less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def taken_memory_bytes() -> int:
    """What all processes hold of the memory of the machine, or of the control group, and cannot be had again."""
    taken = 0
    if (information := Path("/proc/meminfo")).exists():
        fields = _numbers(information)
        taken = (fields["MemTotal:"] - fields["MemAvailable:"]) * 1024
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (group / "memory.max").read_text().strip().isdigit():
        # Cached files count as the group's, and go when memory is wanted.
        cached = _numbers(group / "memory.stat").get("inactive_file", 0)
        taken = max(taken, int((group / "memory.current").read_text()) - cached)
    return taken


def _numbers(table: Path) -> dict[str, int]:
    """The first number of each line, by its first word."""
    lines = (line.split() for line in table.read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1}


def subnormals_kept() -> bool:
    """Whether float32 subnormals survive an operation; torch can set this but not read it, so it is measured."""
    return bool((torch.tensor([1e-40]) * 1.0)[0] != 0)


def _has_proc() -> bool:
    return Path("/proc/self").exists()


def make_repeatable() -> None:
    """Make torch's CPU kernels give the same bits every time, for the whole process."""
    # index_put with accumulation adds in the order in which threads arrive unless deterministic algorithms are on.
    use_deterministic_algorithms()
    # Filling every new tensor changes no number of a correct program and costs a pass over memory.
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    torch._C._set_mkldnn_deterministic(True)
    # "medium" would let oneDNN multiply float32 matrices in bfloat16.
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(False)


def _identity() -> ChipIdentity:
    return ChipIdentity(
        vendor="cpu",
        sku=model_name(),
        truth="real",
        driver="none",
        runtime=_runtime(),
        torch=torch.__version__,
        plugin="none",
        switches=_switches(),
    )


def _runtime() -> str:
    """The instruction set that torch uses, and the libraries its products come from."""
    built_with = torch.__config__.show()
    libraries = [
        f"{name} {match.group(1)}"
        for name, pattern in (
            ("MKL", r"Math Kernel Library Version (\S+?)-"),
            ("oneDNN", r"MKL-DNN v(\S+)"),
            ("OpenMP", r"OpenMP (\d{6})"),
        )
        if (match := re.search(pattern, built_with))
    ]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *_matrix_instructions(), *libraries])


def _matrix_instructions() -> list[str]:
    """Instructions that oneDNN multiplies bfloat16 with where the processor has them: they change the numbers."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if _has_proc() else set()
    return sorted(flags & {"avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16", "bf16"})


def _switches() -> dict[str, str]:
    return {
        "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "mkldnn": str(torch.backends.mkldnn.enabled),
        "mkldnn_deterministic": str(torch.backends.mkldnn.deterministic),
        "subnormals": "kept" if subnormals_kept() else "flushed",
        # Reductions split over threads, so their number is part of the arithmetic.
        "threads": str(torch.get_num_threads()),
        # Read by MKL and oneDNN when they load: both choose other kernels by it.
        "MKL_CBWR": os.environ.get("MKL_CBWR", "unset"),
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "unset"),
    }
