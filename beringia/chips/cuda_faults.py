"""What the errors of CUDA, NCCL, ROCm and RCCL mean.

Sources: the error values of the CUDA runtime reference (sticky errors "require the process to be terminated and
relaunched"), NVIDIA's Xid catalogue with its immediate actions (restart the application, reset the GPU), NCCL's result
types, HIP's and HSA's error names. The categories are Beringia's judgement; the reason stands beside each.

The two vendors share torch's texts (torch built for ROCm says `HIP error`), so their tables share the collective rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from beringia.chips.chip import ChipFault
from beringia.chips.classification import Category, Rule, device_errors, device_text, fault, gravest_match

_RESTART = "the process must be restarted, the device is not known to be damaged; repeats are counted."
_SAME_AGAIN = "The same program meets it again."
_MEMORY_AGAIN = "The same step asks for the same memory again."


def _cuda(number: int, name: str, text: str, category: Category, reason: str) -> Rule:
    """A CUDA error by the runtime's name, the driver's name, torch's sentence (`CUDA error: ...`) and its number."""
    runtime, driver = name.split("/")
    sentence = rf"|(?i:CUDA (?:driver )?error: {text})" if text else ""
    return Rule(f"cudaError{runtime}", rf"\bcudaError{runtime}\b|\b{driver}\b{sentence}", category, reason, number)


def _xid(number: int, category: Category, reason: str) -> Rule:
    """A line of the kernel log: `NVRM: Xid (PCI:0000:3b:00): 79, pid=...`."""
    return Rule(f"XID {number}", rf"\bXid \(PCI:[0-9a-fA-F:.]+\): {number}(?!\d)", category, reason)


def _hip(name: str, text: str, category: Category, reason: str) -> Rule:
    sentence = rf"|(?i:HIP error: {text})" if text else ""
    return Rule(f"hipError{name}", rf"\bhipError{name}\b{sentence}", category, reason)


_COLLECTIVE_RULES: tuple[Rule, ...] = (
    Rule(
        "collective-timeout",
        r"Watchdog caught collective operation timeout|timed out in blocking wait|Heartbeat monitor timed out"
        r"|ncclInProgress.*timed? ?out",
        "transient",
        "A rank was late or hung, or the network slow: all ranks may try the step again.",
    ),
    Rule(
        "ncclRemoteError",
        r"\bncclRemoteError\b|remote process exited or there was a network error|remote process has terminated",
        "transient",
        "Another rank's process is gone, this one's device is not: a restarted group may try the step again.",
    ),
    Rule(
        "ncclSystemError",
        r"\bncclSystemError\b|NCCL [^\n]*unhandled system error|socketPollConnect|Call to connect returned",
        "transient",
        "A socket or the network failed; it may come back.",
    ),
    Rule(
        "ncclUnhandledCudaError",
        r"\bncclUnhandledCudaError\b|NCCL [^\n]*unhandled cuda error",
        "transient",
        f"A device error inside a collective, whose own code decides where it is known: {_RESTART}",
    ),
    Rule("ncclInternalError", r"\bncclInternalError\b", "transient", f"The collective library failed: {_RESTART}"),
    Rule("ncclInvalidUsage", r"\bncclInvalid(Usage|Argument)\b", "persistent", _SAME_AGAIN),
    Rule(
        "communicator-aborted",
        r"NCCL communicator was aborted",
        "transient",
        "Another rank failed first; its own error says why.",
    ),
    Rule(
        "peer-gone",
        r"Connection closed by peer|(?i:connection reset by peer)|Broken pipe|Connection was likely closed",
        "transient",
        "Another rank's process is gone, this one's device is not: a restarted group may try the step again.",
    ),
    Rule(
        "store-timeout",
        r"wait timeout after \d+ ?ms|client socket has timed out|Timed out waiting",
        "transient",
        "Ranks did not meet in time; they may at the next try.",
    ),
)

CUDA_RULES: tuple[Rule, ...] = (
    _cuda(2, "MemoryAllocation/CUDA_ERROR_OUT_OF_MEMORY", "out of memory", "persistent", _MEMORY_AGAIN),
    Rule(
        "out-of-memory",
        r"\bCUDA out of memory\b|\bOutOfMemoryError\b|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
        "persistent",
        _MEMORY_AGAIN,
    ),
    _cuda(
        35,
        "InsufficientDriver/CUDA_ERROR_INSUFFICIENT_DRIVER",
        "CUDA driver version is insufficient",
        "persistent",
        "The driver is older than the runtime needs; it stays so.",
    ),
    _cuda(
        46,
        "DevicesUnavailable/CUDA_ERROR_DEVICE_UNAVAILABLE",
        "(?:all )?CUDA-capable device(?:s|\\(s\\)) (?:are|is/are) busy",
        "transient",
        "Another process holds the device; it may let go.",
    ),
    _cuda(
        100,
        "NoDevice/CUDA_ERROR_NO_DEVICE",
        "no CUDA-capable device is detected",
        "device-lost",
        "The driver shows no device any more.",
    ),
    _cuda(
        209,
        "NoKernelImageForDevice/CUDA_ERROR_NO_BINARY_FOR_GPU",
        "no kernel image is available",
        "persistent",
        "This torch has no code for this device.",
    ),
    _cuda(
        214,
        "ECCUncorrectable/CUDA_ERROR_ECC_UNCORRECTABLE",
        "uncorrectable ECC error",
        "device-lost",
        "Device memory lost data: the device needs a reset, and a second time replacement.",
    ),
    _cuda(
        220,
        "NvlinkUncorrectable/CUDA_ERROR_NVLINK_UNCORRECTABLE",
        "uncorrectable NVLink error",
        "device-lost",
        "A link lost data: the device needs a reset.",
    ),
    _cuda(
        226,
        "Contained/CUDA_ERROR_CONTAINED",
        "Invalid access of peer GPU memory over nvlink or a hardware error",
        "transient",
        f"The hardware contained an error to this process: {_RESTART}",
    ),
    _cuda(
        304,
        "OperatingSystem/CUDA_ERROR_OPERATING_SYSTEM",
        "OS call failed",
        "transient",
        "A call of the operating system failed; it may not at another try.",
    ),
    _cuda(
        700,
        "IllegalAddress/CUDA_ERROR_ILLEGAL_ADDRESS",
        "an illegal memory access",
        "transient",
        f"A kernel read or wrote where it may not (a bug, a race, or memory): {_RESTART}",
    ),
    _cuda(
        702,
        "LaunchTimeout/CUDA_ERROR_LAUNCH_TIMEOUT",
        "the launch timed out",
        "transient",
        "A kernel took longer than its limit.",
    ),
    _cuda(
        709,
        "ContextIsDestroyed/CUDA_ERROR_CONTEXT_IS_DESTROYED",
        "context is destroyed",
        "transient",
        f"An earlier error took the context: {_RESTART}",
    ),
    _cuda(
        710,
        "Assert/CUDA_ERROR_ASSERT",
        "device-side assert triggered",
        "persistent",
        f"A kernel refused its input, such as an index out of range. {_SAME_AGAIN}",
    ),
    _cuda(
        714,
        "HardwareStackError/CUDA_ERROR_HARDWARE_STACK_ERROR",
        "hardware stack error",
        "transient",
        f"A kernel's stack was corrupt: {_RESTART}",
    ),
    _cuda(
        715,
        "IllegalInstruction/CUDA_ERROR_ILLEGAL_INSTRUCTION",
        "an illegal instruction",
        "transient",
        f"A kernel met an instruction that is none: {_RESTART}",
    ),
    _cuda(
        716,
        "MisalignedAddress/CUDA_ERROR_MISALIGNED_ADDRESS",
        "misaligned address",
        "persistent",
        f"A kernel used an address that its instruction cannot. {_SAME_AGAIN}",
    ),
    _cuda(
        718,
        "InvalidPc/CUDA_ERROR_INVALID_PC",
        "invalid program counter",
        "transient",
        f"A kernel left its code: {_RESTART}",
    ),
    _cuda(
        719,
        "LaunchFailure/CUDA_ERROR_LAUNCH_FAILED",
        "unspecified launch failure",
        "transient",
        f"A kernel stopped for a reason the driver does not name: {_RESTART}",
    ),
    _cuda(
        802,
        "SystemNotReady/CUDA_ERROR_SYSTEM_NOT_READY",
        "system not yet initialized",
        "persistent",
        "The fabric manager does not run; it stays so until an operator starts it.",
    ),
    _cuda(
        803,
        "SystemDriverMismatch/CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        "system has unsupported display driver",
        "persistent",
        "Driver and libraries do not match; they stay so.",
    ),
    _cuda(
        999,
        "Unknown/CUDA_ERROR_UNKNOWN",
        "unknown error",
        "transient",
        "The driver does not say what failed; repeats are counted.",
    ),
    Rule(
        "cublas",
        r"CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)",
        "transient",
        f"A product failed to run: {_RESTART}",
    ),
    Rule(
        "cudnn",
        r"CUDNN_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)",
        "transient",
        f"A kernel of cuDNN failed to run: {_RESTART}",
    ),
    _xid(13, "transient", f"A kernel raised an engine exception: {_RESTART}"),
    _xid(31, "transient", f"A kernel touched a page that is not its own: {_RESTART}"),
    _xid(43, "transient", f"The driver stopped a channel: {_RESTART}"),
    _xid(45, "transient", "The driver cleaned up after another error, which its own line names."),
    _xid(48, "device-lost", "Two bits of a memory word flipped: the device needs a reset."),
    _xid(62, "device-lost", "The device's controller halted: the device needs a reset."),
    _xid(64, "device-lost", "A bad memory row could not be remapped: the device needs replacement."),
    _xid(74, "device-lost", "An NVLink failed: the device needs a reset."),
    _xid(79, "device-lost", "The device has fallen off the bus."),
    _xid(94, "transient", f"A memory error was contained to this process: {_RESTART}"),
    _xid(95, "device-lost", "A memory error was not contained: the device needs a reset."),
    _xid(119, "device-lost", "The device's system processor does not answer: the device needs a reset."),
    _xid(120, "device-lost", "The device's system processor failed: the device needs a reset."),
    Rule(
        "gpu-lost",
        r"(?i:GPU has fallen off the bus|GPU is lost|Unable to determine the device handle)",
        "device-lost",
        "The driver cannot reach the device.",
    ),
    *_COLLECTIVE_RULES,
)
"""NVIDIA's table: CUDA runtime and driver, cuBLAS, cuDNN, NCCL and the kernel's Xid lines."""

ROCM_RULES: tuple[Rule, ...] = (
    Rule("out-of-memory", r"\bHIP out of memory\b|\bOutOfMemoryError\b", "persistent", _MEMORY_AGAIN),
    _hip("OutOfMemory", "out of memory", "persistent", _MEMORY_AGAIN),
    _hip("NoDevice", "no ROCm-capable device", "device-lost", "The driver shows no device any more."),
    _hip("NoBinaryForGpu", "no kernel image is available", "persistent", "This torch has no code for this device."),
    _hip("InvalidDeviceFunction", "invalid device function", "persistent", "This torch has no code for this device."),
    _hip("ECCNotCorrectable", "uncorrectable ECC error", "device-lost", "Device memory lost data: it needs a reset."),
    _hip("IllegalAddress", "an illegal memory access", "transient", f"A kernel went where it may not: {_RESTART}"),
    _hip("LaunchTimeOut", "the launch timed out", "transient", "A kernel took longer than its limit."),
    _hip("LaunchFailure", "unspecified launch failure", "transient", f"A kernel stopped: {_RESTART}"),
    _hip("Assert", "device-side assert", "persistent", f"A kernel refused its input. {_SAME_AGAIN}"),
    _hip("Unknown", "unknown error", "transient", "The driver does not say what failed; repeats are counted."),
    Rule(
        "memory-access-fault",
        r"Memory access fault by GPU node-\d+|HSA_STATUS_ERROR_MEMORY_(APERTURE_VIOLATION|FAULT)",
        "transient",
        f"A kernel touched a page that is not its own: {_RESTART}",
    ),
    Rule(
        "HSA_STATUS_ERROR_EXCEPTION",
        r"\bHSA_STATUS_ERROR_EXCEPTION\b",
        "transient",
        f"A kernel raised a hardware exception: {_RESTART}",
    ),
    Rule(
        "HSA_STATUS_ERROR_OUT_OF_RESOURCES",
        r"\bHSA_STATUS_ERROR_OUT_OF_RESOURCES\b",
        "persistent",
        _MEMORY_AGAIN,
    ),
    Rule(
        "gpu-reset",
        r"amdgpu[^\n]*(GPU reset begin|GPU reset\(|device lost from bus|uncorrectable hardware error)",
        "device-lost",
        "The driver resets the device, or cannot reach it: its state is lost.",
    ),
    *_COLLECTIVE_RULES,
)
"""AMD's table: HIP, HSA, RCCL (which reports under NCCL's names) and the kernel's amdgpu lines."""


def classify_cuda(error: BaseException | str) -> ChipFault | None:
    """What an error on an NVIDIA device, or a line of its kernel log, means; None if it is not the chip's."""
    return _by_number(error, CUDA_RULES) or gravest_match(device_text(error), CUDA_RULES)


def classify_rocm(error: BaseException | str) -> ChipFault | None:
    """What an error on an AMD device, or a line of its kernel log, means; None if it is not the chip's."""
    return gravest_match(device_text(error), ROCM_RULES)


def _by_number(error: BaseException | str, rules: Sequence[Rule]) -> ChipFault | None:
    """torch's AcceleratorError carries the runtime's number: that is surer than its words."""
    if isinstance(error, str):
        return None
    for link in device_errors(error):
        number = getattr(link, "error_code", None) if isinstance(link, torch.AcceleratorError) else None
        for rule in rules:
            if number is not None and rule.number == number:
                return fault(rule, device_text(error))
    return None
