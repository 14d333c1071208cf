"""The tests that take a chip's own paths where that chip is here, and what they found.

Warnings are not errors here: the machine has other versions of libraries than the project is tested with.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.card.parts import Size

ROOT = Path(__file__).parents[2]
FILES = ("test_chip_cuda.py", "test_chip_paths.py", "test_checkpoint_devices.py", "test_chip_open.py")
OUTCOMES = ("failure", "error", "skipped")
PLUGINS = ("pytest_timeout", "_hypothesis_pytestplugin")
"""The project's own; a machine may have others, which would be loaded, and may warn or fail."""


def measure(chip: str, size: Size) -> tuple[dict[str, Any], dict[str, bool]]:
    """Which tests passed, failed and were skipped; every one that ran must pass."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "junit.xml")
        plugins = [argument for plugin in PLUGINS for argument in ("-p", plugin)]
        chosen = [str(ROOT / "tests" / file) for file in FILES] + ([] if size == "full" else ["-m", "not slow"])
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-W", "default", "-p", "no:cacheprovider", *plugins]
            + [f"--junitxml={report}", *chosen],
            cwd=ROOT,
            env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if not report.exists():
            raise SystemExit(f"pytest ended with status {done.returncode}: {done.stdout[-3000:]}")
        outcomes = read_report(report)
    found: dict[str, Any] = {"passed": [], **{outcome: {} for outcome in OUTCOMES}}
    for name, (outcome, said) in outcomes.items():
        if outcome == "passed":
            found["passed"].append(name)
        else:
            found[outcome][name] = said
    return found, {"tests": done.returncode == 0 and bool(found["passed"])}


def read_report(report: Path) -> dict[str, tuple[str, str]]:
    """Outcome of each test, and the end of what it said."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        said = next((child for child in case if child.tag in OUTCOMES), None)
        name = f"{case.get('classname')}::{case.get('name')}"
        words = "" if said is None else (said.text or said.get("message") or "")[-2000:]
        outcomes[name] = ("passed" if said is None else said.tag, words)
    return outcomes
