"""The CPU as a chip: its identity, its switches, its memory, and that its runs repeat."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beringia.chips.cpu import Cpu, compiler_missing, subnormals_kept, total_memory_bytes


def test_the_identity_names_the_processor_and_what_torch_uses_of_it() -> None:
    identity = Cpu().identity
    assert identity.vendor == "cpu" and identity.truth == "real" and identity.sku
    assert identity.runtime.startswith(torch.backends.cpu.get_cpu_capability())
    assert identity.torch == torch.__version__ and identity.plugin == "none"
    assert identity.switches["threads"] == str(torch.get_num_threads())


def test_the_identity_changes_with_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = Cpu().identity.hash
        torch.set_num_threads(2)
        assert Cpu().identity.hash != one
    finally:
        torch.set_num_threads(threads)
    assert Cpu().identity.hash == Cpu().identity.hash


def test_opening_switches_reduced_precision_and_nondeterminism_off() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(False)
    torch.set_flush_denormal(True)
    assert not subnormals_kept()
    switches = Cpu().identity.switches
    assert torch.are_deterministic_algorithms_enabled() and torch.get_float32_matmul_precision() == "highest"
    assert switches["deterministic_algorithms"] == "True" and switches["float32_matmul_precision"] == "highest"
    assert switches["subnormals"] == "kept" and subnormals_kept()


def test_opening_imports_no_compiler_and_one_that_comes_later_is_told() -> None:
    code = (
        "import sys, beringia\nfrom beringia.chips.open import open_chip\nopen_chip('cpu')\nimport torch\n"
        "print('torch._inductor' in sys.modules, torch.get_deterministic_debug_mode())\n"
        "import torch._inductor.config\nprint(torch._inductor.config.deterministic)\n"
        "torch._inductor.config.deterministic = False\nopen_chip('cpu')\nprint(torch._inductor.config.deterministic)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "2", "True", "True"]


def test_accumulating_rows_at_repeated_indices_repeats_bit_for_bit_on_two_threads() -> None:
    """Without deterministic algorithms, index_put adds in the order in which threads arrive."""
    Cpu()
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(0, 4, (200_000,), generator=generator)
    values = torch.randn(200_000, 8, generator=generator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        sums = [torch.zeros(4, 8).index_put_((index,), values, accumulate=True) for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(sums[0], other) for other in sums[1:])
    exact = torch.zeros(4, 8, dtype=torch.float64).index_add_(0, index, values.double())
    # A sum of n terms in any order: |error| <= n·u·sum|x|, u = 2^-24, n the rows of one index.
    magnitude = torch.zeros(4, 8, dtype=torch.float64).index_add_(0, index, values.double().abs())
    terms_4 = torch.bincount(index, minlength=4)[:, None]
    assert bool(((sums[0] - exact).abs() <= terms_4 * 2.0**-24 * magnitude).all())


def test_memory_grows_with_what_the_process_holds() -> None:
    chip = Cpu()
    before = chip.memory()
    # From the kernel: torch would take what other tests in this process freed, and the compiled operators keep.
    held = torch.frombuffer(mmap.mmap(-1, 64 * 2**20), dtype=torch.uint8).fill_(1)
    after = chip.memory()
    assert after.used_bytes - before.used_bytes > 48 * 2**20
    assert after.used_bytes <= after.peak_bytes and before.total_bytes == total_memory_bytes() > held.nbytes


def test_a_missing_compiler_is_said_and_declared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "my-compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    headers_here = compiler_missing() is None
    assert Cpu().capabilities.compile is headers_here
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    chip = Cpu()
    assert not chip.capabilities.compile
    assert "C++ compiler" in (chip.compiler_missing() or "") and "install g++" in (chip.compiler_missing() or "")


def test_capabilities_are_the_reference_chips() -> None:
    capabilities = Cpu().capabilities
    assert {torch.float64, torch.float32, torch.bfloat16} <= capabilities.dtypes
    assert capabilities.compute_dtype == torch.float32 and capabilities.sharding == "fsdp2"
    big = torch.tensor([2**62 + 3]) * torch.tensor([5])
    assert capabilities.exact_int64 and int(big[0]) == (5 * (2**62 + 3) + 2**63) % 2**64 - 2**63


def test_ranks_that_share_a_machine_have_the_same_identity() -> None:
    assert Cpu(1).identity.hash == Cpu(0).identity.hash
