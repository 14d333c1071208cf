"""Huawei's Ascend chips, through torch_npu. Contract-tested, never run on Ascend.

Opening one sets every switch that changes numbers to its documented safe value and records what is in force:
deterministic kernels and collectives, IEEE overflow (INF_NAN), no HF32, no just-in-time compiled operators, no internal
formats, and no silent computation on the CPU. Some are environment variables that CANN reads once: an environment that
asks for something else is refused, not overruled.

`torch_npu` is imported when a chip is opened and not before: it needs CANN, and refuses to share a process with CUDA.
Every name of it that is used here is checked against the wheels' own sources by `tests/test_ascend_contract.py`; it is
reached only as `torch_npu.…` or `self._torch_npu.…`, so that the check can see it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from beringia.chips.ascend_faults import classify_ascend
from beringia.chips.chip import Capabilities, Chip, ChipFault, Memory, Presence, ServeArguments
from beringia.errors import ChipUnavailable
from beringia.records.identity import ChipIdentity

CHIP_NAME = "npu"
"""By which recipes ask for it; `open.py` finds this file by it."""

__all__ = ["NEVER_RUN", "Ascend", "classify_ascend", "find", "open_device"]

NEVER_RUN = "contract-tested, never run on Ascend"
"""What every identity of such a chip says of this adapter."""

ENVIRONMENT: dict[str, tuple[str, str]] = {
    "TORCH_NPU_FALLBACK_CPU_DISABLE": ("1", "an operator without a kernel must fail and not run on the CPU in silence"),
    "INF_NAN_MODE_ENABLE": (
        "1",
        "overflow must give Inf and NaN; in saturation mode Inf becomes MAX and NaN becomes 0",
    ),
    "HCCL_DETERMINISTIC": ("true", "collectives must add in the same order every time"),
    "LCCL_DETERMINISTIC": ("1", "collectives inside a node must add in the same order every time"),
    "CLOSE_MATMUL_K_SHIFT": ("1", "products must not shift the order in which they add along k"),
    "ATB_MATMUL_SHUFFLE_K_ENABLE": ("0", "products must not shuffle the order in which they add along k"),
    "ATB_LLM_LCOC_ENABLE": ("0", "products fused with communication do not repeat"),
    "TORCH_HCCL_ASYNC_ERROR_HANDLING": ("1", "a collective that hangs must raise within minutes"),
}
"""Variable -> the value that Beringia needs, and why. CANN and torch_npu read them once."""

ACCEPTED_TOO: dict[str, tuple[str, ...]] = {"HCCL_DETERMINISTIC": ("strict",)}
"""Other values that serve as well: `strict` also keeps the order when the topology is symmetric over several nodes."""

OLDEST: dict[str, str] = {
    "2.10": "2.10.0.post7",
    "2.11": "2.11.0.post3",
    "2.12": "2.12.0.post3",
    "2.13": "2.13.0",
    "2.14": "2.14.0",
}
"""For each torch, the oldest torch_npu that can refuse to compute on the CPU what it has no kernel for. Older wheels
know neither TORCH_NPU_FALLBACK_CPU_DISABLE nor TORCH_HCCL_ASYNC_ERROR_HANDLING (their libraries were searched)."""

_RECORDED = (
    "ASCEND_LAUNCH_BLOCKING",
    "TASK_QUEUE_ENABLE",
    "HCCL_OP_EXPANSION_MODE",
    "HCCL_ALGO",
    "PYTORCH_NPU_ALLOC_CONF",
)
"""Variables that may change kernels or their order; left to the user, and recorded."""

_DETERMINISTIC_LEVEL = 1
"""Level 1 is deterministic kernels; 2 covers torch.mm only, 3 (batch invariance) needs CANN 9.2."""

_DEVICES = Path("/dev")
_INSTALLED = Path("/usr/local/Ascend")


class Ascend(Chip):
    """One Ascend device (on A3 a die: one package shows two)."""

    name = "npu"

    def __init__(self, index: int = 0) -> None:
        """Import torch_npu, select the device, set the switches, read who it is. Raises ChipUnavailable."""
        # torch imports torch_npu by itself unless TORCH_DEVICE_BACKEND_AUTOLOAD=0; what libraries read then is unknown.
        imported_before = "torch_npu" in sys.modules
        newly_set = prepare_environment()
        late = newly_set if imported_before else []
        self._torch_npu = _import_torch_npu()
        found = self._torch_npu.npu.device_count()
        if index >= found:
            raise ChipUnavailable(
                f"npu:{index} was asked for, but torch_npu sees {found} device{'s' * (found != 1)}: "
                "ask for a lower index, or look at npu-smi info and ASCEND_RT_VISIBLE_DEVICES."
            )
        self._device = torch.device("npu", index)
        self._torch_npu.npu.set_device(self._device)
        level = _set_switches(self._torch_npu)
        self._bfloat16 = bool(self._torch_npu.npu.is_bf16_supported())
        switches = _switches(self._torch_npu) | {
            "deterministic_level": level,
            "set_after_torch_npu_was_imported": ", ".join(late) or "none",
        }
        self._identity = _identity(self._torch_npu, index, switches)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def identity(self) -> ChipIdentity:
        return self._identity

    @property
    def capabilities(self) -> Capabilities:
        # No float64 and no 8-bit floating point on A2 and A3.
        dtypes = {
            torch.float32,
            torch.float16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
        }
        if self._bfloat16:
            dtypes.add(torch.bfloat16)
        return Capabilities(
            dtypes=frozenset(dtypes),
            compute_dtype=torch.bfloat16 if self._bfloat16 else torch.float32,
            sharding="fsdp2",
            compile=False,
            # A2 and A3 have no 64-bit integer vector operations; what torch_npu does instead is not documented.
            exact_int64=False,
            pinned_memory=True,
            streams=True,
            # The wheels list aten::_fused_adam_ among what falls back to the CPU.
            fused_optimizer=False,
        )

    @property
    def collective_backend(self) -> str:
        return "hccl"

    def compiler_missing(self) -> str | None:
        return f"torch.compile is not used on npu: torch_npu's compiler was never tried here ({NEVER_RUN})."

    def memory(self) -> Memory:
        """Total of the device; used and peak by this process's tensors."""
        _, total_bytes = self._torch_npu.npu.mem_get_info(self._device)
        return Memory(
            total_bytes,
            self._torch_npu.npu.memory_allocated(self._device),
            self._torch_npu.npu.max_memory_allocated(self._device),
        )

    def synchronize(self) -> None:
        self._torch_npu.npu.synchronize(self._device)

    def classify(self, error: BaseException) -> ChipFault | None:
        return classify_ascend(error)

    def stream(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._torch_npu.npu.stream(self._torch_npu.npu.Stream(self._device))
        return context

    def close(self) -> None:
        self._torch_npu.npu.empty_cache()


def prepare_environment() -> list[str]:
    """Set what CANN reads once, and return the names that were unset before.

    Raises ChipUnavailable for an environment that asks for something else.
    """
    unset = [name for name in ENVIRONMENT if name not in os.environ]
    for name, (needed, why) in ENVIRONMENT.items():
        found = os.environ.setdefault(name, needed)
        if found not in (needed, *ACCEPTED_TOO.get(name, ())):
            raise ChipUnavailable(f"{name}={found} is set, but Beringia needs {needed}: {why}. Unset it.")
    if os.environ.get("HCCL_OP_EXPANSION_MODE") == "AIV":
        raise ChipUnavailable(
            "HCCL_OP_EXPANSION_MODE=AIV is set, but it conflicts with HCCL_DETERMINISTIC, "
            "without which no run can be repeated: unset it."
        )
    return unset


def find() -> list[Presence]:
    """The Ascend devices of this machine, or one entry that says why there is none. Imports no torch_npu."""
    if importlib.util.find_spec("torch_npu") is None:
        return [
            _absent(f"torch_npu is not installed beside torch {torch.__version__}; install the wheel of that number")
        ]
    devices = sorted(path for path in _DEVICES.glob("davinci*") if re.fullmatch(r"davinci\d+", path.name))
    if not devices:
        return [_absent(f"torch_npu is installed but there is no {_DEVICES}/davinci0; install the Ascend driver")]
    return [
        Presence("npu", "Ascend, not opened", "real", None, here=True, state=f"not opened; {NEVER_RUN}", index=index)
        for index in range(len(devices))
    ]


def serve_arguments(quantization: str | None, *, latent: bool, experts: bool) -> ServeArguments:
    """As vllm-ascend's documentation serves DeepSeek-R1 in W8A8; never run here.

    Its own INT8 files need the flag, compressed-tensors ones do not. Decoding runs in captured graphs.
    """
    arguments = ["--compilation-config", '{"cudagraph_mode":"FULL_DECODE_ONLY"}']
    if quantization == "ascend":
        arguments += ["--quantization", "ascend"]
    if experts:
        arguments += ["--enable-expert-parallel"]
    environment = {
        "HCCL_OP_EXPANSION_MODE": "AIV",
        "HCCL_BUFFSIZE": "200",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
    }
    return ServeArguments(tuple(arguments), environment)


def open_device(index: int) -> Ascend:
    """Open it. Raises ChipUnavailable with what is missing."""
    return Ascend(index)


def _absent(state: str) -> Presence:
    return Presence("npu", "Ascend", "real", None, here=False, state=state)


def _import_torch_npu() -> ModuleType:
    try:
        torch_npu = importlib.import_module("torch_npu")
    except ModuleNotFoundError as error:
        raise ChipUnavailable(f"npu was asked for, but {error.name} is not installed: install torch_npu.") from error
    except (ImportError, OSError, RuntimeError) as error:
        # A missing libascendcl.so, or "Two accelerators cannot be used at the same time" beside a CUDA torch.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ChipUnavailable(
            f"npu was asked for, but torch_npu cannot be loaded ({reason}): install CANN and source its set_env.sh, "
            "in an environment whose torch is the CPU build."
        ) from error
    _check_versions(torch.__version__, torch_npu.__version__)
    return torch_npu


def _check_versions(torch_version: str, plugin_version: str) -> None:
    """A plugin fits the torch of the same number only, and must be able to refuse the CPU. Raises ChipUnavailable."""
    ours, theirs = (".".join(version.split(".")[:2]) for version in (torch_version, plugin_version))
    if ours != theirs:
        raise ChipUnavailable(
            f"npu was asked for, but torch_npu {plugin_version} is made for torch {theirs} "
            f"and torch is {torch_version}: install torch_npu {ours}."
        )
    oldest = OLDEST.get(theirs)
    if oldest is None or _numbers(plugin_version) < _numbers(oldest):
        raise ChipUnavailable(
            f"npu was asked for, but torch_npu {plugin_version} may compute on the CPU what the chip has no kernel "
            f"for, and cannot be told not to: install {oldest or 'one of ' + ', '.join(OLDEST.values())} or newer."
        )


def _numbers(version: str) -> tuple[int, ...]:
    """`2.12.0.post3+git1234` -> (2, 12, 0, 3)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def _set_switches(torch_npu: ModuleType) -> str:
    """Set them all; returns the deterministic level in force, in words."""
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor changes no number of a correct program and costs a pass over memory.
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    level = _set_deterministic_level(torch_npu)
    # HF32 keeps 11 of 23 fraction bits; it is off for products by default and on for convolutions.
    torch_npu.npu.matmul.allow_hf32 = False
    torch_npu.npu.conv.allow_hf32 = False
    torch_npu.npu.set_compile_mode(jit_compile=False)
    # The NZ format changes the order of sums.
    torch_npu.npu.config.allow_internal_format = False
    return level


def _set_deterministic_level(torch_npu: ModuleType) -> str:
    with warnings.catch_warnings():
        # It warns, whenever it is called, that torch.use_deterministic_algorithms must not be called after it.
        warnings.simplefilter("ignore")
        try:
            torch_npu.npu.set_deterministic_level(_DETERMINISTIC_LEVEL)
        except RuntimeError:
            # Levels came with CANN 8.5; before it, torch's own flag says all there is to say.
            return "none in this CANN"
    return str(_DETERMINISTIC_LEVEL)


def _identity(torch_npu: ModuleType, index: int, switches: dict[str, str]) -> ChipIdentity:
    return ChipIdentity(
        vendor="ascend",
        sku=f"{torch_npu.npu.get_device_name(index)} (soc {torch_npu.npu.utils.get_soc_version()})",
        truth="real",
        driver=_driver(torch_npu),
        runtime=f"CANN {torch_npu.npu.utils.get_cann_version('CANN')}",
        torch=torch.__version__,
        plugin=f"torch_npu {torch_npu.__version__}",
        switches=switches,
        note=NEVER_RUN,
    )


def _driver(torch_npu: ModuleType) -> str:
    """Driver and firmware; the firmware's version is known to its installer alone."""
    driver = torch_npu.npu.utils.get_cann_version("DRIVER") or _installed_version("driver")
    return f"driver {driver}, firmware {_installed_version('firmware')}"


def _installed_version(part: str) -> str:
    """`Version=` of the file that Ascend's installer leaves, else `unknown`."""
    path = _INSTALLED / part / "version.info"
    match = re.search(r"^Version=(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return match.group(1).strip() if match else "unknown"


def _switches(torch_npu: ModuleType) -> dict[str, str]:
    """What is in force: read back where torch_npu can say, else as set."""
    switches = {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "hf32_matmul": torch_npu.npu.matmul.allow_hf32,
        "hf32_conv": torch_npu.npu.conv.allow_hf32,
        "jit_compile": not torch_npu.npu.is_jit_compile_false(),
        "internal_format": False,
        # The first 910 only saturates, whatever the variable says.
        "overflow": "inf_nan" if torch_npu.npu.utils.is_support_inf_nan() else "saturation",
        "compatible_implementations": torch_npu.npu.are_compatible_impl_enabled(),
    }
    variables = {name: os.environ.get(name, "unset") for name in (*ENVIRONMENT, *_RECORDED)}
    return {name: str(value) for name, value in switches.items()} | variables
