"""The wheel alone, installed where the repository is not: what a newcomer has after `pip install`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Installed:
    """A wheel, and an environment that has it."""

    wheel: Path
    environment: Path
    elsewhere: Path
    """A directory to work in, which holds a folder named `beringia`."""

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command of the environment, where it finds nothing of the repository."""
        program = [str(self.environment / "bin" / command[0]), *command[1:]]
        return subprocess.run(
            program, cwd=self.elsewhere, env=_own_environment(), capture_output=True, text=True, check=False
        )


def _own_environment() -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    shutil.copytree(ROOT / "beringia", source / "beringia", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place), str(source))
    (wheel,) = place.glob("*.whl")
    environment = place / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    _pip("--python", str(environment / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    # Torch and the others are this environment's. As a plain path: what its own .pth files say (the repository, as an
    # editable install) does not hold there.
    packages = next((environment / "lib").glob("python*")) / "site-packages"
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    decoy = place / "elsewhere" / "beringia"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text('raise ImportError("this is not the package")\n')
    return Installed(wheel, environment, decoy.parent)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *arguments]
    subprocess.run(command, cwd=ROOT.parent, env=dict(_own_environment()), check=True)


def test_the_wheel_holds_every_file_of_the_package(installed: Installed) -> None:
    there = {name for name in zipfile.ZipFile(installed.wheel).namelist() if name.startswith("beringia/")}
    files = (path for path in (ROOT / "beringia").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert there == {path.relative_to(ROOT).as_posix() for path in files}


def test_what_is_imported_there_is_the_wheel(installed: Installed) -> None:
    said = installed.run("python", "-P", "-c", "import beringia, torch; print(beringia.__file__, beringia.__path__[0])")
    assert said.returncode == 0, said.stderr
    assert all(path.startswith(str(installed.environment)) for path in said.stdout.split())
    listed = json.loads(installed.run("beringia", "recipes", "--json").stdout)
    assert listed["directory"].startswith(str(installed.environment)) and "r2-nano" in listed["recipes"]


def test_a_campaign_by_its_name_runs_to_its_page_beside_a_folder_named_beringia(installed: Installed) -> None:
    """All its stages, each in a process of its own; only so short that no planted fault comes."""
    short = [f"train.{key}={value}" for key, value in {"steps": 4, "batch": 4, "checkpoint_every": 2}.items()]
    short += ["train.evaluate_every=4", "train.evaluation_sequences=4", "train.accuracy_samples=4", "serve.questions=4"]
    changes = [part for change in short for part in ("--set", change)]
    done = installed.run("beringia", "campaign", "r2-nano", *changes, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    assert (summary["status"], summary["steps"]) == ("done", 4)
    assert [chip["label"] for chip in summary["chips"]] == ["first-lot", "second-lot"]
    for stage in ("first-lot: qualification", "training", "exporting", "first-lot: answering 4 held-out questions"):
        assert re.search(rf"^\[\d+:\d\d\] {stage}", done.stderr, re.MULTILINE), stage
    page = installed.elsewhere / summary["report"]
    assert "r2-nano" in page.read_text()
    assert (installed.elsewhere / "runs/r2-nano/export/model.safetensors").is_file()
