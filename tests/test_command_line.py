"""What the command line says of itself."""

from __future__ import annotations

from importlib.metadata import version

from small_runs import beringia


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
