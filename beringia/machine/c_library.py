"""C compiled on the machine that runs it, when it is first needed: a fifth of a second; nothing stays on the disk."""

from __future__ import annotations

import ctypes
import shutil

from beringia.machine.aside import scratch_directory
from beringia.machine.tools import ToolFailed, run_tool


class NotCompiled(Exception):
    """Why there is no library, in words for the user."""


def compile_c(source: str, *options: str) -> ctypes.CDLL:
    """A library from C source, with the machine's own compiler and all of its instructions. Raises NotCompiled."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NotCompiled("no C compiler (cc, gcc or clang) was found")
    try:
        with scratch_directory() as directory:
            written, shared = directory / "library.c", directory / "library.so"
            written.write_text(source)
            command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", *options, "-o", str(shared), str(written)]
            run_tool([*command, "-lm"])
            return ctypes.CDLL(str(shared))
    except ToolFailed as failure:
        raise NotCompiled(str(failure)) from None
    except OSError as error:
        raise NotCompiled(f"what {compiler} made cannot be used: {error}") from None
