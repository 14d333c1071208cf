"""Operators in C (`compiled.c`), for the CPU: torch's own cost more than the arithmetic on small models, and its
products with one row reach half of the memory's bandwidth.

Activations are float32; products with bfloat16 weights round them to bfloat16, as matrix units do. A row's result does
not depend on the other rows. Compiled with the machine's own compiler when the first engine is made (a second). They
have threads of their own, as many as torch has.

Letters as in `operators.py`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from beringia.engine.operators.operators import CacheLayout, Operators
from beringia.engine.places import Places
from beringia.errors import InputError
from beringia.machine.c_library import NotCompiled, compile_c
from beringia.machine.memory import keep_freed_memory
from beringia.model.experts import Router
from beringia.model.rope import Rope

DTYPES = (torch.float32, torch.bfloat16)
"""Of weights and cache."""

LANES = 16
"""Outputs in a panel, as in C."""

WIDEST = 1024
"""Keys and values, as in C."""


@dataclass(frozen=True)
class Panels:
    """Matrices as C reads them: groups, panels of 16 outputs, K (in pairs for bfloat16), outputs (pairs beside)."""

    data: torch.Tensor
    address: int
    shape: tuple[int, ...]
    """X N K, without what fills up panels."""

    @property
    def narrow(self) -> int:
        """Whether it holds bfloat16."""
        return int(self.data.dtype == torch.bfloat16)


class Compiled(Operators):
    """Raises InputError where they cannot be compiled."""

    name = "compiled"
    batch_invariant = True

    def __init__(self) -> None:
        # Each operator makes a tensor, which would else come from the kernel, page by page (measured: products took
        # twice as long).
        keep_freed_memory()
        self._words = torch.empty(0, dtype=torch.int32)
        self._c = _library()
        self._c.start_threads(torch.get_num_threads())

    def weight(self, tensor_XNK: torch.Tensor) -> Panels:
        data = _in_panels(tensor_XNK)
        return Panels(data, data.data_ptr(), tuple(tensor_XNK.shape))

    def replace(self, weight: Panels, tensor_XNK: torch.Tensor) -> None:
        weight.data.copy_(_in_panels(tensor_XNK))

    def plain(self, weight: Panels) -> torch.Tensor:
        *lead, n, k = weight.shape
        data = weight.data if weight.narrow else weight.data.unsqueeze(-1)
        return data.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)[:, :n, :k].reshape(*lead, n, k)

    def embed(self, weight_VD: Panels, token_M: torch.Tensor) -> torch.Tensor:
        width = weight_VD.shape[-1]
        out_MD = torch.empty(len(token_M), width)
        self._c.embed(
            *(out_MD.data_ptr(), weight_VD.address, token_M.data_ptr()), *(len(token_M), width, weight_VD.narrow)
        )
        return out_MD

    def norm(
        self, x_MXD: torch.Tensor, weight_D: torch.Tensor, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = torch.empty(x_MXD.shape) if out is None else out
        rows, width = x_MXD.shape[0], x_MXD.shape[-1]
        count = math.prod(x_MXD.shape[1:-1])
        self._c.norm(
            *(out.data_ptr(), out.stride(0)),
            *(x_MXD.data_ptr(), x_MXD.stride(0)),
            *(weight_D.data_ptr(), rows, count, width, eps),
        )
        return out

    def linear(
        self,
        x_MK: torch.Tensor,
        weight_NK: Panels,
        bias_N: torch.Tensor | None = None,
        add_to: torch.Tensor | None = None,
    ) -> torch.Tensor:
        n, k = weight_NK.shape
        out = torch.empty(len(x_MK), n) if add_to is None else add_to
        bias = None if bias_N is None else bias_N.data_ptr()
        self._c.linear(
            *(out.data_ptr(), out.stride(0), 0),
            *(x_MK.data_ptr(), x_MK.stride(0), 0),
            *(weight_NK.address, bias, self._pairs(weight_NK, 1, len(x_MK))),
            *(1, len(x_MK), n, k, add_to is not None),
        )
        return out

    def by_head(self, x_MNK: torch.Tensor, weight_NXK: Panels, out: torch.Tensor | None = None) -> torch.Tensor:
        heads, n, k = weight_NXK.shape
        out = torch.empty(len(x_MNK), heads, n) if out is None else out
        self._c.linear(
            *(out.data_ptr(), out.stride(0), out.stride(1)),
            *(x_MNK.data_ptr(), x_MNK.stride(0), x_MNK.stride(1)),
            *(weight_NXK.address, None, self._pairs(weight_NXK, heads, len(x_MNK))),
            *(heads, len(x_MNK), n, k, False),
        )
        return out

    def _pairs(self, weight: Panels, groups: int, rows: int) -> int | None:
        """Where C writes activations in bfloat16, and a word about each row; the same memory each time."""
        if not weight.narrow:
            return None
        wanted = groups * rows * (-(-weight.shape[-1] // 2) + 1)
        if self._words.numel() < wanted:
            self._words = torch.empty(wanted, dtype=torch.int32)
        return self._words.data_ptr()

    def rotate(self, x_MNP: torch.Tensor, rope: Rope, position_M: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        rows, heads, width = x_MNP.shape
        self._c.rotate(
            *(out.data_ptr(), out.stride(0), out.stride(1)),
            *(x_MNP.data_ptr(), x_MNP.stride(0), x_MNP.stride(1)),
            *(rope[0].data_ptr(), rope[1].data_ptr(), position_M.data_ptr()),
            *(rows, heads, width),
        )
        return out

    def keep(self, cache: torch.Tensor, slot_M: torch.Tensor, row_MW: torch.Tensor) -> None:
        rows, width = row_MW.shape
        self._c.keep(
            *(cache.data_ptr(), row_MW.data_ptr(), row_MW.stride(0)),
            *(slot_M.data_ptr(), rows, width, cache.dtype == torch.bfloat16),
        )

    def attend(
        self, q_MNH: torch.Tensor, cache: torch.Tensor, layout: CacheLayout, places: Places, scale: float, start: int
    ) -> torch.Tensor:
        rows, heads, key_width = q_MNH.shape
        if max(key_width, layout.value_width) > WIDEST:
            raise InputError(
                f"Compiled attention reads keys and values of up to {WIDEST} numbers; this model's have {key_width} "
                f"and {layout.value_width}. Use operators='torch'."
            )
        assert q_MNH.stride(1) == key_width, "heads lie side by side"
        out_MNV = torch.empty(rows, heads, layout.value_width)
        self._c.attend(
            *(out_MNV.data_ptr(), out_MNV.stride(0), q_MNH.data_ptr(), q_MNH.stride(0)),
            *(cache.data_ptr(), places.block_tokens, cache.shape[-1], cache.dtype == torch.bfloat16),
            *(places.table_CB.data_ptr(), places.table_CB.shape[1]),
            *(places.sequence_M.data_ptr(), places.position_M.data_ptr()),
            *(rows, layout.groups, heads // layout.groups, key_width, layout.value_width),
            *(layout.group_step, layout.value_start, start, scale),
        )
        return out_MNV

    def gate(self, x_MF: torch.Tensor) -> torch.Tensor:
        rows, width = len(x_MF), x_MF.shape[1] // 2
        out_MF = torch.empty(rows, width)
        self._c.gate(out_MF.data_ptr(), x_MF.data_ptr(), rows, width)
        return out_MF

    def route(
        self, x_MD: torch.Tensor, weight_ED: Panels, bias_E: torch.Tensor | None, router: Router
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores_ME = self.linear(x_MD, weight_ED)
        if router.shares:
            self._c.softmax(scores_ME.data_ptr(), *scores_ME.shape)
        else:
            self._c.sigmoid(scores_ME.data_ptr(), scores_ME.numel())
        chosen_MA = router.choose(scores_ME, bias_E)
        weights_MA = torch.empty(chosen_MA.shape)
        self._c.weigh(
            *(weights_MA.data_ptr(), scores_ME.data_ptr(), chosen_MA.data_ptr()),
            *(*scores_ME.shape, chosen_MA.shape[1], router.normalises, router.scaling),
        )
        return chosen_MA, weights_MA

    def experts(
        self,
        x_MD: torch.Tensor,
        chosen_MA: torch.Tensor,
        weights_MA: torch.Tensor,
        gate_up_EFD: Panels,
        down_EDF: Panels,
    ) -> torch.Tensor:
        num_experts, hidden, width = down_EDF.shape
        places = chosen_MA.numel()
        out_MD = torch.empty(x_MD.shape)
        scratch = torch.empty(places * (2 * hidden + 3 * width + 2))
        order = torch.empty(places + num_experts + 1, dtype=torch.int64)
        self._c.experts(
            *(out_MD.data_ptr(), x_MD.data_ptr(), chosen_MA.data_ptr(), weights_MA.data_ptr()),
            *(gate_up_EFD.address, down_EDF.address, scratch.data_ptr(), order.data_ptr()),
            *(len(x_MD), chosen_MA.shape[1], num_experts, hidden, width, down_EDF.narrow),
        )
        return out_MD


def compile_ahead() -> threading.Thread:
    """Compile in a thread, while the chip is opened; join it before an engine is made."""

    def compile_quietly() -> None:
        with suppress(InputError):  # told where they are asked for
            _library()

    thread = threading.Thread(target=compile_quietly, name="compile operators")
    thread.start()
    return thread


def _in_panels(tensor_XNK: torch.Tensor) -> torch.Tensor:
    """Filled up with zeros to whole panels and, in bfloat16, to whole pairs."""
    n, k = tensor_XNK.shape[-2:]
    pair = 2 if tensor_XNK.dtype == torch.bfloat16 else 1
    whole = F.pad(tensor_XNK.reshape(-1, n, k), (0, -k % pair, 0, -n % LANES))
    panels = whole.view(len(whole), -1, LANES, whole.shape[-1] // pair, pair).permute(0, 1, 3, 2, 4).contiguous()
    return panels if pair == 2 else panels.squeeze(-1)


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = compile_c(Path(__file__).with_name("compiled.c").read_text(), "-pthread")
    except NotCompiled as reason:
        raise InputError(
            f"The engine's operators on the CPU are compiled C, and {reason}. Install gcc, or use operators='torch'."
        ) from None
    integer, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    placed = [pointer, integer, integer]
    signatures = {
        "embed": [pointer, pointer, pointer, integer, integer, integer],
        "norm": [pointer, integer, pointer, integer, pointer, integer, integer, integer, number],
        "linear": [*placed, *placed, pointer, pointer, pointer, *[integer] * 5],
        "rotate": [*placed, *placed, pointer, pointer, pointer, integer, integer, integer],
        "keep": [pointer, pointer, integer, pointer, integer, integer, integer],
        "attend": [
            *(pointer, integer, pointer, integer, pointer, integer, integer, integer, pointer, integer),
            *(pointer, pointer, *[integer] * 8, number),
        ],
        "gate": [pointer, pointer, integer, integer],
        "sigmoid": [pointer, integer],
        "softmax": [pointer, integer, integer],
        "weigh": [pointer, pointer, pointer, integer, integer, integer, integer, number],
        "experts": [*[pointer] * 8, *[integer] * 6],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.start_threads.argtypes, library.start_threads.restype = [integer], integer
    return library
