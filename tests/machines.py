"""Machines played on this one, really apart: each has files that no other sees, and an interpreter of its own.

A mount namespace holds a file system of its own at the machine's root, and hides the directory of the one who starts
work. A process that sleeps keeps the namespace; the launch prefix enters it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from waiting import until

ROOT_MIB = 256


class Machine:
    """One machine. `launch` is the prefix that reaches it, `root` where its file system lies there."""

    def __init__(
        self, directory: Path, *, hides: Path, mebibytes: int = ROOT_MIB, before: str = "", python: str | None = None
    ) -> None:
        directory.mkdir(parents=True)
        self.place = directory / "disk"
        self.place.mkdir()
        self.root = self.place / "run"
        hides.mkdir(parents=True, exist_ok=True)
        ready = directory / "ready"
        as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        setup = (
            f'mount -t tmpfs -o size={mebibytes}m disk "{self.place}" && mount -t tmpfs -o size=1m hidden "{hides}" '
            f'&& touch "{ready}" && exec sleep 86400'
        )
        self._holder = subprocess.Popen(["unshare", *as_root, "--mount", "--propagation", "private", "sh", "-c", setup])
        until(lambda: ready.exists() or self._holder.poll() is not None, "a mount namespace")
        assert self._holder.poll() is None, "this machine lets no mount namespace be made"
        self._enter = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt"]
        if as_root:
            self._enter += [f"--user=/proc/{self._holder.pid}/ns/user", "--preserve-credentials"]
        prefix = directory / "prefix"
        prefix.write_text(f'#!/bin/sh\n{before}\nexec {" ".join(self._enter)} -- "$@"\n')
        prefix.chmod(0o755)
        self.launch = [str(prefix)]
        self.python = python or own_interpreter(directory / "environment")

    @property
    def chip(self) -> dict[str, object]:
        """What a recipe says of a chip here, but which chip it is."""
        return {"launch": self.launch, "root": str(self.root), "python": self.python}

    def run(self, *command: str) -> str:
        """What a command prints there."""
        return subprocess.run([*self._enter, "--", *command], capture_output=True, text=True, check=True).stdout

    def sees(self, path: Path) -> bool:
        """Whether a path exists there."""
        return subprocess.run([*self._enter, "--", "test", "-e", str(path)], check=False).returncode == 0

    def close(self) -> None:
        """End it; its files go with it."""
        self._holder.kill()
        self._holder.wait()


def can_be_played() -> bool:
    """Whether this machine lets namespaces be made."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    tried = ["unshare", *as_root, "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "x", "/mnt"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


def own_interpreter(directory: Path) -> str:
    """A second environment, which finds the packages of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    packages = next(Path(directory, "lib").glob("python*")) / "site-packages"
    ours = [path for path in sys.path if path.endswith("site-packages")]
    # As site directories, so that what they say of other places (an editable install) holds there too.
    lines = [f"import site; site.addsitedir({path!r})" for path in ours]
    (packages / "ours.pth").write_text("\n".join(lines) + "\n")
    return str(directory / "bin" / "python")
