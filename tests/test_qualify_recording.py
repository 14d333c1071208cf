"""Passes that are watched again, for faults that come and go."""

from __future__ import annotations

from pathlib import Path

import torch
from small_models import SmallSubject, opened

from beringia.qualify.recording import Recorder

SUBJECT = SmallSubject("llama")
WRONG = 'kind = "wrong-backward"\nlength = 4\nstrength = 0.8\nsites = [1]\nfrom_step = 3'


def test_passes_are_watched_until_one_has_a_wrong_call(tmp_path: Path) -> None:
    with opened("emulated:h800", WRONG, tmp_path) as chip:
        assert Recorder(SUBJECT, chip, torch.bfloat16).watch_again(2) == []
        recorder = Recorder(SUBJECT, chip, torch.bfloat16)
        wrong = recorder.watch_again(6)
    assert wrong[0].module == "model.layers.1.self_attn" and wrong[0].direction == "backward"
    assert "attention" in wrong[0].operator and all(check.used > 1.0 for check in wrong)


def test_a_sound_chip_is_watched_to_the_end_and_nothing_is_wrong() -> None:
    with opened("emulated:h800") as chip:
        assert Recorder(SUBJECT, chip, torch.bfloat16).watch_again(2) == []
