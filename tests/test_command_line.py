"""The command line that a certificate says it was made by: the user's own, or none."""

from __future__ import annotations

import sys

import pytest

from beringia.records.command_line import command_line


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["/opt/bin/beringia", "qualify", "cpu", "--model", "a b"], "beringia qualify cpu --model 'a b'"),
        (["/opt/lib/beringia/__main__.py", "campaign", "r2-nano"], "beringia campaign r2-nano"),
        (["/home/me/train.py", "--model", "mine"], ""),
        (["/home/me/__main__.py"], ""),
        (["-c"], ""),
        ([""], ""),
    ],
)
def test_it_is_the_users_own_and_none_in_another_program(
    argv: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == told
