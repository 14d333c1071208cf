"""The switch under which torch takes no algorithm that gives other bits another time."""

from __future__ import annotations

import os
import sys

import torch


def use_deterministic_algorithms() -> None:
    """Switch it on, for the whole process, the compiler included.

    `torch.use_deterministic_algorithms` imports torch's compiler to tell it, which takes a second of the start of each
    process, and few of them compile. The compiler hears of it from the environment where it is imported later.
    """
    if "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(True)
        return
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    torch.set_deterministic_debug_mode("error")
