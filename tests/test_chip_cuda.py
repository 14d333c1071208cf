"""NVIDIA's and AMD's chips: what follows from injected facts here, and from a device where one is."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from beringia.chips import amd, nvidia
from beringia.chips.open import open_chip
from beringia.chips.torch_cuda import Facts, identity_from, make_repeatable, read_switches
from beringia.errors import ChipUnavailable

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no device that torch calls cuda is here")

H100 = Facts("NVIDIA H100 80GB HBM3", "9.0", "570.86.15", "CUDA 12.8", "91002", "2.13.0", {"tf32_matmul": "False"})


def test_the_single_device_is_told_and_is_no_part_of_the_identity() -> None:
    kind, card = identity_from(H100, "nvidia", "cuDNN"), identity_from(H100, "nvidia", "cuDNN", "GPU-5f2e")
    assert card.device == "GPU-5f2e" and card.hash == kind.hash and card.differences(kind) == {}
    assert "device" not in kind.model_dump() and card.model_dump()["device"] == "GPU-5f2e"


def test_the_identity_is_made_of_the_facts_and_each_of_them_changes_its_hash() -> None:
    identity = identity_from(H100, "nvidia", "cuDNN")
    assert identity.sku == "NVIDIA H100 80GB HBM3 (9.0)" and identity.runtime == "CUDA 12.8, cuDNN 91002"
    assert identity.driver == "570.86.15" and identity.truth == "real"
    for field in dataclasses.fields(Facts):
        other = {"tf32_matmul": "True"} if field.name == "switches" else "another"
        changed = dataclasses.replace(H100, **{field.name: other})
        assert identity_from(changed, "nvidia", "cuDNN").hash != identity.hash, field.name


@pytest.mark.parametrize(
    ("capability", "compute", "float8"),
    [((7, 0), torch.float32, False), ((8, 0), torch.bfloat16, False), ((8, 9), torch.bfloat16, True),
     ((9, 0), torch.bfloat16, True), ((10, 0), torch.bfloat16, True)],
)  # fmt: skip
def test_nvidia_computes_in_bfloat16_from_ampere_and_has_float8_from_ada(
    capability: tuple[int, int], compute: torch.dtype, float8: bool
) -> None:
    capabilities = nvidia.capabilities_of(capability, compiles=True)
    assert capabilities.compute_dtype == compute
    assert (torch.float8_e4m3fn in capabilities.dtypes) is float8
    assert capabilities.exact_int64 and capabilities.sharding == "fsdp2" and capabilities.compile


def test_amd_s_float8_is_the_other_one_on_mi300() -> None:
    mi300 = amd.capabilities_of("gfx942:sramecc+:xnack-", compiles=True)
    assert torch.float8_e4m3fnuz in mi300.dtypes and torch.float8_e4m3fn not in mi300.dtypes
    assert mi300.compute_dtype == torch.bfloat16
    assert torch.float8_e4m3fn in amd.capabilities_of("gfx950", compiles=True).dtypes
    assert amd.capabilities_of("gfx906", compiles=False).compute_dtype == torch.float32


def test_nvidia_smi_s_list_is_read() -> None:
    printed = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA GH200 480GB, [N/A]\n"
    assert nvidia.parse_listing(printed) == [
        ("NVIDIA H100 80GB HBM3", 81559 * 2**20),
        ("NVIDIA GH200 480GB", None),
    ]
    assert nvidia.parse_listing(None) == []


def test_the_switches_are_set_and_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")
    make_repeatable()
    switches = read_switches("NVIDIA_TF32_OVERRIDE")
    assert switches["tf32_matmul"] == switches["tf32_cudnn"] == "False"
    assert switches["cudnn_benchmark"] == "False" and switches["cudnn_deterministic"] == "True"
    assert switches["bf16_reduced_precision_reduction"] == switches["fp16_accumulation"] == "False"
    assert switches["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and switches["NVIDIA_TF32_OVERRIDE"] == "unset"


def test_a_workspace_that_does_not_repeat_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ChipUnavailable, match="CUBLAS_WORKSPACE_CONFIG=:0:0 is set"):
        make_repeatable()


@needs_device
def test_a_device_repeats_products_and_sums_bit_for_bit() -> None:
    chip = open_chip("cuda")
    generator = torch.Generator().manual_seed(5)
    a_MK = torch.randn(512, 700, generator=generator).to(chip.device)
    index = torch.randint(0, 8, (4096,), generator=generator).to(chip.device)
    rows = torch.randn(4096, 64, generator=generator).to(chip.device)
    results = [(a_MK @ a_MK.T, torch.zeros(8, 64, device=chip.device).index_add_(0, index, rows)) for _ in range(3)]
    assert all(torch.equal(first, second) for first, second in zip(results[0], results[1], strict=True))
    assert all(torch.equal(first, second) for first, second in zip(results[0], results[2], strict=True))


@needs_device
def test_a_device_multiplies_float32_in_float32() -> None:
    chip = open_chip("cuda")
    a_MK = torch.randn(256, 256, generator=torch.Generator().manual_seed(5)).to(chip.device)
    exact = a_MK.double() @ a_MK.double().T
    bound = 256 * 2.0**-24 * (a_MK.double().abs() @ a_MK.double().abs().T)
    # TF32 has a unit roundoff of 2^-11, about 30 times this bound.
    assert bool(((a_MK @ a_MK.T).double() - exact).abs().le(bound).all())


@needs_device
def test_a_device_answers_for_memory_and_streams() -> None:
    chip = open_chip("cuda")
    before = chip.memory()
    held = torch.ones(2**20, device=chip.device)
    assert chip.memory().used_bytes >= before.used_bytes + held.nbytes
    with chip.stream():
        doubled = held * 2
    chip.synchronize()
    assert float(doubled.sum()) == 2.0**21
    assert chip.identity.switches["tf32_matmul"] == "False" and chip.identity.hash == open_chip("cuda").identity.hash
