"""What torch.compile made for a run: complete, or forgotten.

torch writes shared objects and precompiled headers in place, so a worker killed while it compiles leaves one cut short,
and the next worker fails on it. Therefore every run has a cache of its own on each machine, and a new worker keeps only
what was there, at its full size, when a checkpoint was taken.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from beringia.records.files import write_text

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch's compiler keeps what it makes (torch._inductor). A directory that the user has set is left alone."""


class CompileCache:
    """One run's cache on one machine. `open()` before anything is compiled, `keep()` while nothing is."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._list = directory.with_suffix(".json")
        # Not at import: this loads the compiler, which takes a second.
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        # torch itself sets the variable to its default once torch._dynamo loads, as optimizers make it.
        self._chosen_by_user = os.environ.get(VARIABLE, default_cache_dir()) != default_cache_dir()

    def open(self, *, first: bool) -> None:
        """Make torch use it; the first rank removes what `keep` did not list, before the others go on."""
        if self._chosen_by_user:
            return
        os.environ[VARIABLE] = str(self._directory)
        if first:
            self._remove_unlisted()

    def keep(self) -> None:
        """List what is there now. No rank may be compiling: torch's compiler works inside a step."""
        if not self._chosen_by_user:
            write_text(self._list, json.dumps(self._sizes(), indent=1, sort_keys=True) + "\n")

    def _remove_unlisted(self) -> None:
        listed = json.loads(self._list.read_text()) if self._list.exists() else {}
        for name, size in self._sizes().items():
            if listed.get(name) != size:
                (self._directory / name).unlink()

    def _sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path within the directory."""
        files = (path for path in sorted(self._directory.rglob("*")) if path.is_file())
        return {str(path.relative_to(self._directory)): path.stat().st_size for path in files}
