"""The same things from Python."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path

import pytest
import torch

import beringia
from beringia.chips.emulated.device import register
from beringia.model import greedy

# torch's autograd makes its queues at the first backward pass of a process and learns of no device later.
register()


EXPORTED = ["Endpoint", "Engine", "Sampling", "__version__", "certify", "chip", "load", "save"]


def test_these_names_are_exported_and_nothing_else() -> None:
    assert beringia.__all__ == dir(beringia) == EXPORTED
    given: dict[str, object] = {}
    exec("from beringia import *", given)
    assert sorted(given.keys() - {"__builtins__"}) == EXPORTED
    with pytest.raises(AttributeError, match="'beringia' has no attribute 'Decoder'"):
        beringia.Decoder  # noqa: B018  # the access is the test


def test_what_the_face_defines_it_exports_and_explains() -> None:
    source = Path(beringia.__file__ or "").read_text()
    defined = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert {name for name in defined if not name.startswith("_")} <= set(EXPORTED)
    for name in EXPORTED:
        assert name == "__version__" or getattr(beringia, name).__doc__, name
    assert beringia.__version__ == importlib.metadata.version("beringia")


def test_a_model_goes_through_save_and_load_unchanged_and_computes_on_a_chip(tmp_path: Path) -> None:
    chip = beringia.chip("cpu")
    model = beringia.load("r2-nano", chip, seed=3)
    beringia.save(model, tmp_path / "saved")
    again = beringia.load(tmp_path / "saved", chip)
    tokens_BT = torch.arange(24).view(2, 12)
    assert torch.equal(model(tokens_BT), again(tokens_BT))


def test_a_model_is_read_onto_an_emulated_chip_as_it_would_be_moved_there(tmp_path: Path) -> None:
    beringia.save(beringia.load("r2-nano", seed=3), tmp_path / "saved")
    chip = beringia.chip("emulated:ascend-910b")
    try:
        for source in ("r2-nano", tmp_path / "saved"):
            read = beringia.load(source, chip, seed=3, dtype=torch.bfloat16)
            moved = beringia.load(source, seed=3, dtype=torch.bfloat16).to(chip.device)
            assert all(tensor.device == chip.device for tensor in read.state_dict().values())
            for name, tensor in moved.state_dict().items():
                assert torch.equal(read.state_dict()[name].cpu(), tensor.cpu()), name
    finally:
        chip.close()


def test_an_engine_answers_with_the_model_of_a_directory(tmp_path: Path) -> None:
    chip = beringia.chip("cpu")
    model = beringia.load("r2-nano", seed=3)
    beringia.save(model, tmp_path / "saved")
    engine = beringia.Engine(tmp_path / "saved", chip)
    (found,) = engine.generate([[1, 2, 3]], beringia.Sampling(max_tokens=4, temperature=0.0, ignore_end=True))
    assert list(found.tokens) == greedy(model, [1, 2, 3], 4, None)


def test_importing_beringia_does_not_load_torch() -> None:
    import subprocess
    import sys

    code = "import sys, beringia; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_a_module_of_ones_own_is_certified_on_a_chip_opened_here() -> None:
    """And one whose operator the chip lacks is not."""
    from torch import nn

    from beringia.qualify.subject import Batch, ModuleSubject
    from beringia.records.certificate import Certificate

    def batch(number: int) -> Batch:
        tokens = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(number))
        return {"x": tokens[:, :-1], "y": tokens[:, 1:]}

    def network(*, convolves: bool) -> nn.Module:
        torch.manual_seed(0)
        middle = nn.Conv1d(16, 16, 3, padding=1) if convolves else nn.ReLU()
        return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), middle, nn.Linear(16, 50))

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())

    def certified(*, convolves: bool) -> Certificate:
        subject = ModuleSubject(
            "mine",
            lambda: network(convolves=convolves),
            batch,
            loss,
            lambda model, batch: model(batch["x"]),
        )
        return beringia.certify("emulated:h800", subject)

    assert certified(convolves=False).verdict == "train"
    refused = certified(convolves=True)
    assert refused.verdict == "unfit"
    assert refused.first_wrong is not None and "convolution" in refused.first_wrong.check.operator
    assert "not emulated" in refused.first_wrong.check.refused
