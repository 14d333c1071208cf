"""The same things from Python."""

from __future__ import annotations

from pathlib import Path

import torch

import beringia


def test_a_model_goes_through_save_and_load_unchanged_and_computes_on_a_chip(tmp_path: Path) -> None:
    chip = beringia.chip("cpu")
    model = beringia.load("r2-nano", chip, seed=3)
    beringia.save(model, tmp_path / "saved")
    again = beringia.load(tmp_path / "saved", chip)
    tokens_BT = torch.arange(24).view(2, 12)
    assert torch.equal(model(tokens_BT), again(tokens_BT))


def test_importing_beringia_does_not_load_torch() -> None:
    import subprocess
    import sys

    code = "import sys, beringia; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
