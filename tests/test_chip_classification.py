"""What errors mean: the vendors' tables, and that a number in other text is no fault."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beringia.chips.ascend_faults import ASCEND_RULES, classify_ascend
from beringia.chips.chip import ChipFault
from beringia.chips.cpu import CPU_RULES, Cpu, classify_cpu
from beringia.chips.cuda_faults import CUDA_RULES, ROCM_RULES, classify_cuda, classify_rocm

NUMBERS = [rule.number for rule in ASCEND_RULES if rule.number is not None]


def meaning(found: ChipFault | None) -> tuple[str, str] | None:
    return None if found is None else (found.code, found.category)


ASCEND_TEXTS = [
    ("NPU function error: aclrtSynchronizeStream, error code is 507014", "507014", "transient"),
    ("NPU error,NPU error code is:507015, error msg: aicore exception", "507015", "transient"),
    ("ACL stream synchronize failed, error code:507018", "507018", "transient"),
    ("rtStreamSynchronizeWithTimeout execute failed, runtime result = 507034", "507034", "transient"),
    ("[ERROR] RUNTIME task exception, retCode=507035, [vector core exception].", "507035", "transient"),
    ("The inner error is reported, error code: 507046", "507046", "transient"),
    ("ACL_ERROR_RT_SUSPECT_REMOTE_ERROR(507057)", "507057", "transient"),
    ("aclrtMalloc failed with ret=207018", "207018", "persistent"),
    ("EI0002: [PID: 4711] The wait execution of the Notify register times out.", "EI0002", "transient"),
    ("EI0005: The arguments for collective communication are inconsistent between ranks", "EI0005", "persistent"),
    ("[EI0006] Getting socket times out.", "EI0006", "transient"),
    ("UCE ERROR.\n[ERROR] (PID:1, Device:0, RankID:0) ERR00100 PTA call acl api failed", "UCE ERROR", "transient"),
    ("HBM MULTI BIT ECC ERROR.\nERR00100 PTA call acl api failed", "HBM MULTI BIT ECC ERROR", "device-lost"),
    ("NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 60.97 GiB total capacity)", "out-of-memory", "persistent"),
    ("FORCE STOP.", "FORCE STOP", "transient"),
    ("HcclAllReduce, error code is 7 ERR02200 DIST call hccl api failed.", "ERR02200", "transient"),
    ("aten::x is not supported, but CPU fallback is disabled by TORCH_NPU_FALLBACK_CPU_DISABLE=1.",
     "cpu-fallback-refused", "persistent"),
    ("error code is 507901", "507901", "device-lost"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code", "category"), ASCEND_TEXTS)
def test_ascend_errors_have_their_code_and_category(text: str, code: str, category: str) -> None:
    assert meaning(classify_ascend(RuntimeError(text))) == (code, category)
    assert meaning(classify_ascend(text)) == (code, category)


CUDA_TEXTS = [
    ("CUDA error: uncorrectable ECC error encountered", "cudaErrorECCUncorrectable", "device-lost"),
    ("CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in ...", "cudaErrorAssert", "persistent"),
    ("CUDA error: an illegal memory access was encountered", "cudaErrorIllegalAddress", "transient"),
    ("CUDA error: the launch timed out and was terminated", "cudaErrorLaunchTimeout", "transient"),
    ("CUDA error: unspecified launch failure", "cudaErrorLaunchFailure", "transient"),
    ("CUDA error: uncorrectable NVLink error detected during the execution", "cudaErrorNvlinkUncorrectable",
     "device-lost"),
    ("CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error", "cudaErrorContained",
     "transient"),
    ("CUDA driver error: CUDA_ERROR_SYSTEM_NOT_READY", "cudaErrorSystemNotReady", "persistent"),
    ("Error 802: system not yet initialized: cudaErrorSystemNotReady", "cudaErrorSystemNotReady", "persistent"),
    ("CUDA error: no CUDA-capable device is detected", "cudaErrorNoDevice", "device-lost"),
    ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "cudaErrorDevicesUnavailable", "transient"),
    ("CUDA out of memory. Tried to allocate 2.00 GiB.", "out-of-memory", "persistent"),
    ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`", "cublas", "transient"),
    ("NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.", "XID 79", "device-lost"),
    ("NVRM: Xid (PCI:0000:3b:00): 94, pid=1, Contained: LTC (0x0,0x0).", "XID 94", "transient"),
    ("NVRM: Xid (PCI:0000:3b:00): 48, pid=1, DBE", "XID 48", "device-lost"),
    ("[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)",
     "collective-timeout", "transient"),
    ("NCCL error in: ProcessGroupNCCL.cpp:123, remote process exited or there was a network error, NCCL version 2.27",
     "ncclRemoteError", "transient"),
    ("NCCL error in: x.cpp:1, unhandled system error (run with NCCL_DEBUG=INFO)", "ncclSystemError", "transient"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code", "category"), CUDA_TEXTS)
def test_cuda_errors_have_their_code_and_category(text: str, code: str, category: str) -> None:
    assert meaning(classify_cuda(RuntimeError(text))) == (code, category)


ROCM_TEXTS = [
    ("HIP error: an illegal memory access was encountered", "hipErrorIllegalAddress", "transient"),
    ("HIP out of memory. Tried to allocate 2.00 GiB.", "out-of-memory", "persistent"),
    ("Memory access fault by GPU node-1 (Agent handle: 0x55) on address 0x7. Reason: Page not present.",
     "memory-access-fault", "transient"),
    ("HIP error: invalid device function", "hipErrorInvalidDeviceFunction", "persistent"),
    ("amdgpu 0000:83:00.0: amdgpu: GPU reset begin!", "gpu-reset", "device-lost"),
    ("NCCL error in: x.cpp, unhandled cuda error", "ncclUnhandledCudaError", "transient"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code", "category"), ROCM_TEXTS)
def test_rocm_errors_have_their_code_and_category(text: str, code: str, category: str) -> None:
    assert meaning(classify_rocm(RuntimeError(text))) == (code, category)


@given(
    number=st.sampled_from(NUMBERS),
    frame=st.sampled_from(
        [
            "shape '[{}, 3]' is invalid for input of size 12",
            "size mismatch: got [{}], expected [7]",
            "Tried to allocate {} bytes",
            "step {}: loss 2.5",
            "error: {} is out of range",
            "index {} is out of bounds for dimension 0",
            "error code is {}5",
            "error code is 1{}",
            "error code is {}.5",
            "PID {} exited",
            "ret_{}",
            "http://host/{}",
        ]
    ),
)
def test_a_number_that_is_not_called_an_error_code_is_no_fault(number: int, frame: str) -> None:
    text = frame.format(number)
    assert classify_ascend(RuntimeError(text)) is None
    assert classify_cuda(RuntimeError(text)) is None and classify_rocm(RuntimeError(text)) is None
    assert classify_cpu(RuntimeError(text)) is None


@given(before=st.text(max_size=40), after=st.text(max_size=40), number=st.sampled_from(NUMBERS))
def test_a_number_among_any_words_is_a_fault_only_after_a_word_that_says_so(
    before: str, after: str, number: int
) -> None:
    said = re.search(r"(?i)code|ret|runtime result|ACL_ERROR", before)
    if not said:
        assert meaning(classify_ascend(f"{before}{number}{after}")) in (None, ("FORCE STOP", "transient"))
    found = classify_ascend(f"{before} error code is {number}, {after}")
    assert found is not None
    assert found.code == str(number) or found.category != "transient"


@pytest.mark.parametrize(
    "text", ["layers/EI0002.safetensors is missing", "/data/EI0006", "MEI0005", "model.EI0002.weight"]
)
def test_a_code_inside_a_path_or_a_name_is_no_fault(text: str) -> None:
    assert classify_ascend(RuntimeError(text)) is None and classify_ascend(text) is None


def test_the_gravest_code_decides_when_a_log_holds_several() -> None:
    log = "EI0002: notify timed out\nerror code is 507014\nHBM MULTI BIT ECC ERROR"
    assert meaning(classify_ascend(log)) == ("HBM MULTI BIT ECC ERROR", "device-lost")
    log = "Watchdog caught collective operation timeout\nNVRM: Xid (PCI:0000:3b:00): 79, pid=1"
    assert meaning(classify_cuda(log)) == ("XID 79", "device-lost")


def test_the_cause_of_a_wrapped_error_is_found() -> None:
    try:
        try:
            raise RuntimeError("NPU function error: x, error code is 507018")
        except RuntimeError as error:
            raise KeyError("step failed") from error
    except KeyError as wrapped:
        assert meaning(classify_ascend(wrapped)) == ("507018", "transient")


def test_a_mistake_of_the_program_is_never_the_chips() -> None:
    for error in (ValueError("error code is 507014"), KeyError("EI0002"), TypeError("CUDA error: unknown error")):
        assert classify_ascend(error) is None and classify_cuda(error) is None
    assert classify_cuda(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_torch_s_own_error_types_are_read() -> None:
    assert meaning(classify_cuda(torch.OutOfMemoryError("Allocation failed"))) == ("out-of-memory", "persistent")
    error = torch.AcceleratorError("a message in other words")
    error.error_code = 214  # type: ignore[attr-defined]  # set by torch's C++ when it raises
    assert meaning(classify_cuda(error)) == ("cudaErrorECCUncorrectable", "device-lost")
    assert meaning(classify_cuda(torch.AcceleratorError("no number here"))) is None
    backend_error = torch.distributed.DistBackendError("NCCL error: ncclRemoteError: ...")
    assert meaning(classify_cuda(backend_error)) == ("ncclRemoteError", "transient")
    network_error = torch.distributed.DistNetworkError("The client socket has timed out after 60000ms")
    assert meaning(classify_cuda(network_error)) == ("store-timeout", "transient")
    assert meaning(Cpu().classify(network_error)) == ("gloo-timeout", "transient")


def test_the_cpu_s_and_gloo_s_errors_are_read() -> None:
    chip = Cpu()
    assert meaning(chip.classify(MemoryError())) == ("out-of-memory", "persistent")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert meaning(chip.classify(caught.value)) == ("out-of-memory", "persistent")
    gone = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    assert meaning(chip.classify(gone)) == ("gloo-peer-gone", "transient")
    late = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation")
    assert meaning(chip.classify(late)) == ("gloo-timeout", "transient")
    assert chip.classify(RuntimeError("the loss is not finite")) is None
    assert meaning(chip.classify(OSError(12, "Cannot allocate memory"))) == ("out-of-memory", "persistent")
    assert chip.classify(FileNotFoundError(2, "No such file or directory")) is None
    assert chip.classify(BrokenPipeError(32, "Broken pipe")) is None


def test_a_long_message_is_cut() -> None:
    found = classify_ascend("error code is 507014 " + "x" * 10_000)
    assert found is not None and len(found.message) == 2000


@pytest.mark.parametrize("rules", [ASCEND_RULES, CUDA_RULES, ROCM_RULES, CPU_RULES])
def test_every_row_has_one_code_and_a_reason(rules: tuple) -> None:  # type: ignore[type-arg]  # rows of one class
    codes = [rule.code for rule in rules]
    assert len(codes) == len(set(codes))
    assert all(rule.reason.endswith(".") and len(rule.reason) > 10 for rule in rules)
    assert not any(re.search(rule.pattern, "") for rule in rules)
