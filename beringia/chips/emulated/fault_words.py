"""How the vendors' software words its errors, for faults that an emulated chip reports.

The forms are those of torch_npu's, CANN's, HCCL's, CUDA's, HIP's and NCCL's own messages as they appear in public issue
threads. The classifiers (`ascend_faults.py`, `cuda_faults.py`) read real ones with the same rules.
"""

from __future__ import annotations

import os

import torch

from beringia.errors import ChipUnavailable

_ASCEND = {
    "507011": "The model execution failed.",
    "507014": "The aicore execution times out.",
    "507015": "The aicore execution is abnormal.",
    "507018": "The aicpu execution is abnormal.",
    "507034": "The vector core execution times out.",
    "507035": "The vector core execution is abnormal.",
    "507046": "The stream synchronization times out.",
    "507048": "The execution of the internal task times out.",
    "507057": "A suspected remote error occurs.",
    "207018": "Insufficient device memory.",
}
_ASCEND_REASON = {
    "507014": "aicore timeout",
    "507015": "aicore exception",
    "507018": "aicpu exception",
    "507034": "vector core timeout",
    "507035": "vector core exception",
}
_HCCL = {
    "EI0002": "The wait execution of the Notify register times out. Reason: The Notify register has not received the "
    "Notify record from remote rank: [unknown].",
    "EI0005": "The arguments for collective communication are inconsistent between ranks.",
    "EI0006": "Getting socket times out. Reason: Remote Rank did not send the data in time.",
}
_MEMORY_ERRORS = ("UCE ERROR", "HBM MULTI BIT ECC ERROR", "SUSPECT MEM ERROR", "SUSPECT REMOTE ERROR", "FORCE STOP")
_GPU = {
    "ECCUncorrectable": "uncorrectable ECC error encountered",
    "NvlinkUncorrectable": "uncorrectable NVLink error detected during the execution",
    "IllegalAddress": "an illegal memory access was encountered",
    "LaunchTimeout": "the launch timed out and was terminated",
    "LaunchTimeOut": "the launch timed out and was terminated",
    "LaunchFailure": "unspecified launch failure",
    "Assert": "device-side assert triggered",
    "MemoryAllocation": "out of memory",
    "IllegalInstruction": "an illegal instruction was encountered",
    "HardwareStackError": "hardware stack error",
    "Unknown": "unknown error",
    "ECCNotCorrectable": "uncorrectable ECC error encountered",
    "NoDevice": "no CUDA-capable device is detected",
}
_GPU_ADVICE = (
    "kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect."
)


def device_error(vendor: str, code: str) -> RuntimeError:
    """The error that this vendor's torch raises for a code. Raises ChipUnavailable for a code the vendor does not
    have."""
    if vendor == "ascend":
        return RuntimeError(_ascend(code))
    prefix = {"nvidia": "cudaError", "amd": "hipError"}.get(vendor)
    name = code.removeprefix(prefix) if prefix else ""
    if prefix is None or name not in _GPU:
        raise ChipUnavailable(f"A fault script asks for the exception {code!r}, which {vendor!r} chips do not report.")
    platform = "CUDA" if vendor == "nvidia" else "HIP"
    return torch.AcceleratorError(f"{platform} error: {_GPU[name]}\n{platform} {_GPU_ADVICE}")


def collective_timeout(vendor: str) -> RuntimeError:
    """A collective that gave up waiting."""
    if vendor == "ascend":
        return RuntimeError(_ascend("EI0002"))
    library = "RCCL" if vendor == "amd" else "NCCL"
    return RuntimeError(
        f"[Rank 0] Watchdog caught collective operation timeout: Work{library}(SeqNum=1, OpType=ALLREDUCE, "
        "Timeout(ms)=600000) ran for 600011 milliseconds before timing out."
    )


def out_of_memory(vendor: str) -> RuntimeError:
    """An allocation that failed."""
    if vendor == "ascend":
        return RuntimeError(
            "NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 60.97 GiB total capacity; 58.31 GiB already "
            "allocated; 58.31 GiB current active; 1.07 GiB free; 59.02 GiB reserved in total by PyTorch)"
        )
    platform = "HIP" if vendor == "amd" else "CUDA"
    return torch.OutOfMemoryError(
        f"{platform} out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
        "1.07 GiB is free."
    )


def _ascend(code: str) -> str:
    process = os.getpid()
    if code in _MEMORY_ERRORS:
        return f"{code}.\n[ERROR] (PID:{process}, Device:0, RankID:0) ERR00100 PTA call acl api failed"
    if code in _HCCL:
        return (
            "allreduce: HCCL function error: HcclAllReduce, error code is 9\n"
            f"[ERROR] (PID:{process}, Device:0, RankID:0) ERR02200 DIST call hccl api failed.\n"
            f"{code}: [PID: {process}] {_HCCL[code]}"
        )
    if code not in _ASCEND:
        known = ", ".join([*_ASCEND, *_HCCL, *_MEMORY_ERRORS])
        raise ChipUnavailable(f"A fault script asks for the exception {code!r}; Ascend's known here are {known}.")
    reason = _ASCEND_REASON.get(code, _ASCEND[code].rstrip("."))
    return (
        "synchronize: NPU function error: c10_npu::acl::AclrtSynchronizeStreamWithTimeout(stream()), "
        f"error code is {code}\n"
        f"[ERROR] (PID:{process}, Device:0, RankID:0) ERR00100 PTA call acl api failed\n"
        f"[Error]: {_ASCEND[code]}\n"
        "        Rectify the fault based on the error information in the ascend log.\n"
        f"EZ9999: Inner Error!\nEZ9999: [PID: {process}] Kernel task happen error, retCode={code}, [{reason}]."
    )
