"""What torch and its plugins raise for a call that they do not have, and how that is put into a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from beringia.chips.chip import Chip

REFUSALS = (RuntimeError, IndexError, TypeError, ValueError)
"""A missing kernel is a RuntimeError; the others are of arguments that one takes and another does not."""

_LONGEST_REASON = 160
_NO_MEMORY = re.compile(r"out of memory|not enough memory|(can't|cannot) allocate", re.IGNORECASE)


def first_line(error: BaseException) -> str:
    """An error for a sentence."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:_LONGEST_REASON]}"


def raised_words(chip: Chip, error: BaseException) -> str:
    """For a sentence that begins with the chip: `raised IndexError: ...`, or the fault that the driver reported."""
    fault = chip.classify(error)
    return f"raised {first_line(error)}" if fault is None else f"reported {fault.code}: {fault.message}"


def says_no_memory(error: BaseException) -> bool:
    """Whether more memory was asked for than there was."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(str(error)) is not None


class NotJudged(Exception):
    """The judging broke: our fault, and no finding."""


@contextmanager
def judging(what: str) -> Iterator[None]:
    """Inside, nothing is computed on the chip: what is raised is none of `REFUSALS`, whose it would be taken for."""
    try:
        yield
    except REFUSALS as error:
        raise NotJudged(f"{what} not judged: {first_line(error)}") from error
