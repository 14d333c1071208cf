"""Gather what a machine without a network lacks: wheels for its Python, unpacked into one folder to carry there.

    python -m benchmarks.card.site --into SITE [--python 3.12] [--has NAME ...]

Asks pip for what Beringia and its tests need, less what that machine has (`--has`), less what only the server needs,
which no part starts. torch and numpy are never carried: they belong to the machine's driver. What nothing imports
(tests, type stubs, scripts) is removed. Prints the unpacked size, which is what has to be carried.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEVER = ("torch", "numpy")
USUAL = ("scipy", "transformers", "tokenizers", "safetensors")
"""What an image for accelerators usually has beside torch; carried, they alone are larger than the rest."""
SERVER = ("fastapi", "uvicorn", "uvloop", "httptools", "prometheus-client", "httpx")
TESTS = ("pytest", "pytest-timeout", "hypothesis")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
"""glibc versions: pip takes each for itself alone. 2.28 is what torch's own wheels ask for."""
UNUSED = ("tests", "__pycache__", "bin")
MEBIBYTE = 2**20


def requirements(has: list[str]) -> list[str]:
    """What to ask for, as the project pins it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        line for line in project["optional-dependencies"]["dev"] if name_of(line) in TESTS
    ]
    left_out = {*NEVER, *SERVER, *has}
    return [line for line in wanted if name_of(line) not in left_out]


def name_of(requirement: str) -> str:
    """`pydantic` of `pydantic>=2.11,<3`."""
    return re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0].lower()


def gather(into: Path, python: str, has: list[str]) -> None:
    """Unpack the wheels; the folder is complete or not there."""
    if into.exists():
        raise SystemExit(f"{into} is there already: name another folder, or remove it.")
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as directory:
        site = Path(directory, "site")
        machine = platform.machine()
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary=:all:"]
        command += ["--implementation", "cp", "--python-version", python, "--target", str(site)]
        command += [argument for name in PLATFORMS for argument in ("--platform", f"{name}_{machine}")]
        done = subprocess.run([*command, *requirements(has)], check=False)
        if done.returncode != 0:
            raise SystemExit(f"pip ended with status {done.returncode}: what it says is above.")
        prune(site, has)
        site.rename(into)


def prune(site: Path, has: list[str]) -> None:
    """Remove what the machine has itself, which others of the wheels asked for, and what nothing imports."""
    for name in (*NEVER, *has):
        for path in site.glob(f"{name}*"):
            if re.fullmatch(rf"{name}(\.libs|-[\d.]+[^-]*\.dist-info)?", path.name):
                shutil.rmtree(path)
    for path in sorted(site.rglob("*"), reverse=True):
        if path.is_dir() and path.name in UNUSED:
            shutil.rmtree(path)
        elif path.suffix == ".pyi":
            path.unlink()


def size_of(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    parser.add_argument("--has", nargs="*", default=list(USUAL), help="what the machine has beside torch and numpy")
    options = parser.parse_args()
    gather(options.into.resolve(), options.python, [name.lower() for name in options.has])
    print(f"{options.into}: {size_of(options.into) / MEBIBYTE:.1f} MiB")


if __name__ == "__main__":
    main()
