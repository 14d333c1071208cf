"""Opening chips by name: which file is imported, and what a user reads when a chip is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beringia import chips
from beringia.chips import open as opening
from beringia.chips.chip import Presence
from beringia.chips.open import first_present, open_chip, present, survey
from beringia.errors import ChipUnavailable

NO_CUDA = not torch.cuda.is_available()


def test_opening_the_cpu_imports_no_other_vendor_file() -> None:
    program = (
        "import sys; from beringia.chips.open import open_chip; chip = open_chip('cpu');"
        "print(sorted(m for m in sys.modules if m.startswith('beringia.chips.') or m.startswith('torch_npu')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(
        ["beringia.chips.chip", "beringia.chips.classification", "beringia.chips.cpu", "beringia.chips.open"]
    )


def test_an_unknown_name_gets_a_suggestion_or_the_list() -> None:
    with pytest.raises(ChipUnavailable, match=r"no chip called 'cdua'\. Did you mean 'cuda'\?"):
        open_chip("cdua")
    with pytest.raises(ChipUnavailable, match=r"Known: auto, cpu, cuda, npu"):
        open_chip("xyzzy")
    with pytest.raises(ChipUnavailable, match="'emulated' needs a profile"):
        open_chip("emulated")


def test_planted_faults_are_refused_on_a_real_chip() -> None:
    with pytest.raises(ChipUnavailable, match="only emulated chips have planted faults"):
        open_chip("cpu", faults="r2-2025")
    with pytest.raises(ChipUnavailable, match="only emulated chips have planted faults"):
        open_chip("auto", faults="r2-2025")


@pytest.mark.skipif(not NO_CUDA, reason="a CUDA device is here")
def test_auto_is_the_cpu_where_nothing_else_is_and_the_name_is_resolved() -> None:
    assert first_present() == "cpu"
    assert open_chip("auto").name == "cpu"


def test_auto_prefers_cuda_to_npu_to_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"cuda", "npu", "cpu"}

    def look_for(name: str) -> list[Presence]:
        return [Presence(name, "a device", "real", None, here=name in here, state="")]

    monkeypatch.setattr(opening, "_look_for", look_for)
    assert first_present() == "cuda"
    here.remove("cuda")
    assert first_present() == "npu"
    here.remove("npu")
    assert first_present() == "cpu"


@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="torch is a CUDA build")
def test_a_missing_cuda_says_what_was_found_and_what_to_do() -> None:
    with pytest.raises(ChipUnavailable, match=r"'cuda' was asked for.*built without CUDA; install a CUDA build"):
        open_chip("cuda")


def test_a_missing_npu_says_what_was_found_and_what_to_do() -> None:
    with pytest.raises(ChipUnavailable, match=r"'npu' was asked for.*(install the wheel|install the Ascend driver)"):
        open_chip("npu")


def test_what_is_present_is_here_and_the_rest_says_why_not() -> None:
    names = {found.name for found in present()}
    assert "cpu" in names and all(found.here for found in present())
    absent = [found for found in survey() if not found.here]
    assert all(found.state for found in absent)
    assert {found.name for found in survey()} >= {"cpu", "cuda", "npu"}


def test_each_profile_on_disk_is_an_emulated_chip() -> None:
    emulated = {found.name: found for found in present() if found.truth == "emulated"}
    assert set(emulated) == {f"emulated:{profile}" for profile in opening.emulated_profiles()}


def test_a_chip_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A throwaway one: the CPU under another name."""
    (tmp_path / "throwaway.py").write_text(
        "from beringia.chips.chip import Presence\n"
        "from beringia.chips.cpu import open_device\n"
        'CHIP_NAME = "throwaway"\n'
        'def find():\n    return [Presence("throwaway", "a part", "real", 0, here=True, state="here")]\n'
    )
    monkeypatch.setattr(chips, "__path__", [*chips.__path__, str(tmp_path)])
    assert "throwaway" in {found.name for found in survey()}
    chip = open_chip("throwaway")
    assert float(torch.ones(3, device=chip.device).sum()) == 3.0
    with pytest.raises(ChipUnavailable, match="Did you mean 'throwaway'"):
        open_chip("throwawy")
