"""What the command line says of itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from small_runs import beringia

from beringia.cli import _stages


def test_the_version_is_the_installed_packages() -> None:
    said = beringia("--version")
    assert (said.returncode, said.stdout) == (0, f"beringia {version('beringia')}\n")


def test_without_a_verb_the_help_is_shown_and_no_empty_error() -> None:
    said = beringia()
    assert said.returncode == 2
    assert "campaign" in said.stdout + said.stderr
    assert "beringia: " not in said.stderr


def test_a_misspelt_verb_is_corrected() -> None:
    said = beringia("campagin")
    assert (said.returncode, said.stderr) == (2, "beringia: No such command 'campagin'. Did you mean 'campaign'?\n")


def test_the_recipes_that_ship_are_listed_and_printed() -> None:
    listed = json.loads(beringia("recipes", "--json").stdout)
    assert sorted(listed["recipes"]) == ["r2-micro-text", "r2-nano", "smollm2-chat"]
    printed = beringia("recipes", "r2-nano").stdout
    assert printed == (Path(listed["directory"]) / "r2-nano.toml").read_text()


def test_train_takes_a_recipe_by_its_name(tmp_path: Path) -> None:
    said = beringia("train", "r2-nano", "--set", "train.stepz=1", "--out", str(tmp_path / "run"))
    assert said.returncode == 2 and "r2-nano.toml: unknown key 'train.stepz'. Did you mean 'steps'?" in said.stderr


def test_a_stage_is_told_as_it_begins_with_the_time_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    say = _stages()
    say("probing the chip")
    assert re.fullmatch(r"\[0:\d\d\] probing the chip\n", capsys.readouterr().err)


COMPLETION = {
    "bash": {"COMP_WORDS": "beringia camp", "COMP_CWORD": "1"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "beringia camp"},
    "fish": {"_TYPER_COMPLETE_ARGS": "beringia camp", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}
"""What each shell sets when the user asks it to complete `beringia camp`."""


@pytest.mark.parametrize("shell", COMPLETION)
def test_a_shell_completes_a_verb(shell: str) -> None:
    completed = beringia(_BERINGIA_COMPLETE=f"complete_{shell}", **COMPLETION[shell])
    assert "campaign" in completed.stdout and "qualify" not in completed.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_that_is_shown_for_a_shell_completes_there(tmp_path: Path) -> None:
    command = tmp_path / "beringia"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m beringia "$@"\n')
    command.chmod(0o755)
    typed = (
        'eval "$(beringia --show-completion)"; COMP_WORDS=(beringia chips pr); COMP_CWORD=2; '
        '_beringia_completion beringia; echo "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", typed], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("probe\n", 0), done.stderr
