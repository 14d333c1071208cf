"""What Ascend's error codes and texts mean.

Sources: the return codes of CANN's aclError reference and torch_npu's `NPUErrorCodes.h` (507xxx, 207xxx, 107020), the
HCCL error-code reference (EIxxxx), and the text classes that torch_npu raises itself ("UCE ERROR", "FORCE STOP").
The categories are Beringia's judgement; the reason stands beside each. Contract-tested, never run on Ascend.

Needs no torch_npu: a supervisor's log or an emulated chip is classified by the same table.
"""

from __future__ import annotations

from beringia.chips.chip import ChipFault
from beringia.chips.classification import Category, Rule, device_text, gravest_match, numbered, word


def _acl(code: int, name: str, category: Category, reason: str) -> Rule:
    return Rule(str(code), rf"{numbered(code)}|\bACL_ERROR_RT_{name}\b", category, reason, number=code)


def _hccl(code: str, category: Category, reason: str) -> Rule:
    return Rule(code, word(code), category, reason)


_RESTART = "the process must be restarted, the device is not known to be damaged; repeats are counted."
_LATE = "A rank was late or the network slow: all ranks may try the step again."
_SAME_AGAIN = "The same program meets it again."

ASCEND_RULES: tuple[Rule, ...] = (
    _acl(107020, "TASK_TIMEOUT", "transient", "A task took longer than its limit; the next attempt may not."),
    _acl(207008, "NO_STREAM_RESOURCE", "persistent", "The same graph asks for as many streams again."),
    _acl(207018, "DEVIDE_OOM", "persistent", "Device memory is exhausted: the same step asks for the same memory."),
    _acl(507010, "LOST_HEARTBEAT", "device-lost", "The device's task scheduler no longer answers."),
    _acl(507011, "MODEL_EXECUTE", "transient", f"A graph failed while it ran: {_RESTART}"),
    _acl(507013, "SYS_DMA", "device-lost", "The system DMA unit failed: what it copied cannot be trusted."),
    _acl(507014, "AICORE_TIMEOUT", "transient", "A kernel on the AI core took longer than its limit."),
    _acl(507015, "AICORE_EXCEPTION", "transient", f"A kernel on the AI core stopped: {_RESTART}"),
    _acl(507016, "AICORE_TRAP_EXCEPTION", "transient", f"A kernel on the AI core trapped: {_RESTART}"),
    _acl(507017, "AICPU_TIMEOUT", "transient", "A kernel on the AI CPU took longer than its limit."),
    _acl(507018, "AICPU_EXCEPTION", "transient", f"A kernel on the AI CPU stopped: {_RESTART}"),
    _acl(507033, "DEV_SETUP_ERROR", "device-lost", "The device did not start."),
    _acl(507034, "VECTOR_CORE_TIMEOUT", "transient", "A kernel on the vector core took longer than its limit."),
    _acl(507035, "VECTOR_CORE_EXCEPTION", "transient", f"A kernel on the vector core stopped: {_RESTART}"),
    _acl(507036, "VECTOR_CORE_TRAP_EXCEPTION", "transient", f"A kernel on the vector core trapped: {_RESTART}"),
    _acl(507042, "AICORE_TRAP_READ_OVERFLOW", "persistent", f"A kernel read out of bounds. {_SAME_AGAIN}"),
    _acl(507043, "AICORE_TRAP_WRITE_OVERFLOW", "persistent", f"A kernel wrote out of bounds. {_SAME_AGAIN}"),
    _acl(507044, "VECTOR_CORE_TRAP_READ_OVERFLOW", "persistent", f"A kernel read out of bounds. {_SAME_AGAIN}"),
    _acl(507045, "VECTOR_CORE_TRAP_WRITE_OVERFLOW", "persistent", f"A kernel wrote out of bounds. {_SAME_AGAIN}"),
    _acl(507046, "STREAM_SYNC_TIMEOUT", "transient", "A stream did not finish in time, often for a late rank."),
    _acl(507047, "EVENT_SYNC_TIMEOUT", "transient", "An event did not come in time, often for a late rank."),
    _acl(507048, "FFTS_PLUS_TIMEOUT", "transient", "An internal task took longer than its limit."),
    _acl(507049, "FFTS_PLUS_EXCEPTION", "transient", f"An internal task stopped: {_RESTART}"),
    _acl(507053, "DEVICE_MEM_ERROR", "transient", "Uncorrectable memory error: the page is isolated at a restart."),
    _acl(
        507054, "HBM_MULTI_BIT_ECC_ERROR", "device-lost", "Several bits of a memory word flipped: replace the device."
    ),
    _acl(507055, "SUSPECT_DEVICE_MEM_ERROR", "transient", "The memory error is at the other end; its rank reports it."),
    _acl(507056, "LINK_ERROR", "transient", "A link between two devices broke; the vendor advises to try again."),
    _acl(507057, "SUSPECT_REMOTE_ERROR", "transient", "The fault is at the other end; its own rank reports it."),
    _acl(507899, "DRV_INTERNAL_ERROR", "device-lost", "The driver failed: this process cannot reach the device again."),
    _acl(507900, "AICPU_INTERNAL_ERROR", "transient", f"The AI CPU's software failed: {_RESTART}"),
    _acl(507901, "SOCKET_CLOSE", "device-lost", "The session between host and device is closed."),
    _hccl("EI0001", "persistent", "The environment's configuration is wrong; it stays so."),
    _hccl("EI0002", "transient", f"A collective waited for a notification in vain (HCCL_EXEC_TIMEOUT). {_LATE}"),
    _hccl("EI0003", "persistent", f"A collective was called with a bad argument. {_SAME_AGAIN}"),
    _hccl("EI0004", "persistent", "The rank table is wrong; it stays so."),
    _hccl("EI0005", "persistent", f"Ranks called a collective with different arguments. {_SAME_AGAIN}"),
    _hccl("EI0006", "transient", f"Ranks did not connect in time (HCCL_CONNECT_TIMEOUT). {_LATE}"),
    _hccl("EI0007", "persistent", "A resource of the collective library is exhausted; the same step needs it again."),
    _hccl("EI0008", "persistent", "Ranks run different CANN versions; they stay so."),
    _hccl("EI0009", "transient", "The transport between two ranks failed to start; it may start at another try."),
    _hccl("EI0010", "persistent", "Peer-to-peer access between two devices cannot be enabled here."),
    _hccl("EI0011", "persistent", "The collective library found no device memory: the same step needs it again."),
    _hccl("EI0012", "device-lost", "A DMA copy of a collective failed: what it copied cannot be trusted."),
    _hccl("EI0013", "transient", "The network reported a failed transfer (RoCE completion queue)."),
    _hccl("EI0014", "persistent", "Ranks hold different rank tables; they stay so."),
    _hccl("EI0015", "transient", f"Not every rank came while the rank table was being made. {_LATE}"),
    _hccl("EI0016", "persistent", "The configuration is wrong; it stays so."),
    _hccl("EI0017", "persistent", "The rank table is wrong; it stays so."),
    _hccl("EI0018", "transient", "The fabric reported a failed transfer (UB completion queue)."),
    _hccl("EI0019", "persistent", "The address to listen on cannot be bound here."),
    _hccl("EI0020", "persistent", "The port to listen on cannot be bound here."),
    Rule("UCE ERROR", r"\bUCE ERROR\b", "transient", "Uncorrectable memory error: the page is isolated at a restart."),
    Rule(
        "HBM MULTI BIT ECC ERROR",
        r"\bHBM MULTI BIT ECC ERROR\b",
        "device-lost",
        "Several bits of a memory word flipped: replace the device.",
    ),
    Rule("SUSPECT MEM ERROR", r"\bSUSPECT MEM ERROR\b", "transient", "The memory error may be at the other end."),
    Rule("SUSPECT REMOTE ERROR", r"\bSUSPECT REMOTE ERROR\b", "transient", "The fault is at the other end."),
    Rule("HCCL OP RETRY FAILED", r"\bHCCL OP RETRY FAILED\b", "transient", "A link stayed down for a few retries."),
    Rule("FORCE STOP", r"\bFORCE STOP\b", "transient", "Work was stopped from outside to recover; begin it again."),
    Rule(
        "out-of-memory",
        r"\bNPU out of memory\b",
        "persistent",
        "The same step asks for the same memory again.",
    ),
    Rule(
        "cpu-fallback-refused",
        r"CPU fallback is disabled by TORCH_NPU_FALLBACK_CPU_DISABLE",
        "persistent",
        "The chip has no kernel for an operator, and computing it on the CPU in silence is not allowed.",
    ),
    Rule(
        "hccl-timeout",
        r"timed out in blocking wait \(TORCH_HCCL_BLOCKING_WAIT|Watchdog caught collective operation timeout"
        r"|Heartbeat monitor timed out",
        "transient",
        _LATE,
    ),
    Rule("ERR02200", word("ERR02200"), "transient", "HCCL failed without a code known here; repeats are counted."),
    Rule(
        "ERR00100", word("ERR00100"), "transient", "The runtime failed without a code known here; repeats are counted."
    ),
    Rule(
        "EZ9999",
        r"(?<![\w./-])E[A-Z]9999: Inner Error",
        "transient",
        "CANN failed inside without a code known here; repeats are counted.",
    ),
)
"""Ascend's table. Where several rows match, the gravest decides: a lost device also makes collectives time out."""


def classify_ascend(error: BaseException | str) -> ChipFault | None:
    """What an error, or a line of a device's log, means; None if it is not the chip's."""
    return gravest_match(device_text(error), ASCEND_RULES)
