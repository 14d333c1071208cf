"""`certify` with an opened chip certifies that chip, with its faults, or refuses; never another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import SmallSubject, opened

import beringia
from beringia.chips.cpu import Cpu
from beringia.chips.open import open_chip
from beringia.data import write_tokenizer
from beringia.errors import InputError
from beringia.model import load_model, save_model
from beringia.qualify import qualification
from beringia.qualify.subject import DecoderSubject
from beringia.qualify.trace import TraceExtent
from beringia.records.inputs import weights_of

FAULTY = {"faults": "wrong-attention-backward", "seed": 3}


def test_the_process_opens_what_was_opened() -> None:
    with opened("emulated:h800") as sound:
        order = qualification.request_for(sound, "r2-nano", 0).order("candidate", Path())
        assert (order.chip, order.faults) == ("emulated:h800", None)
    faulty = open_chip("emulated:h800", **FAULTY)
    order = qualification.request_for(faulty, "r2-nano", 3).order("candidate", Path())
    faulty.close()
    again = open_chip(order.chip, faults=order.faults, seed=order.seed)
    assert again.identity.hash == faulty.identity.hash
    again.close()


@pytest.mark.parametrize(
    ("options", "seed", "found"),
    [
        ({"index": 1}, 0, "device 1, and they open device 0"),
        (FAULTY, 0, "seed 3, and they open it with 0"),
        ({"faults": "hang", "memory": Path("struck.json")}, 0, "a memory of the faults that have struck"),
    ],
)
def test_what_another_process_cannot_open_is_refused(options: dict[str, Any], seed: int, found: str) -> None:
    chip = open_chip("emulated:h800", **options)
    with pytest.raises(InputError, match=found):
        beringia.certify(chip, "r2-nano", seed=seed)
    chip.close()


def test_another_chip_s_identity_is_refused_with_what_differs() -> None:
    with opened("emulated:h800") as chip:
        other = chip.identity.model_copy(update={"switches": chip.identity.switches | {"lot": "another"}})
        qualification._check_same(chip.name, chip.identity, chip.identity)
        with pytest.raises(InputError, match="lot another here, sound there"):
            qualification._check_same(chip.name, chip.identity, other)


@pytest.mark.parametrize("given", [{"against": "some.bundle"}, {"seed": 3}, {"trusted_keys": ("a" * 64,)}])
def test_what_a_subject_has_no_use_for_is_refused(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(InputError, match=f"leave {name} out"):
        beringia.certify("cpu", SmallSubject("llama"), **given)


def test_a_subject_s_certificate_names_the_weights_of_its_directory_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, beside = tmp_path / "models" / "mine", tmp_path / "mine"
    for seed, place in enumerate((directory, beside)):
        save_model(load_model("r2-nano", seed=seed), place)
        write_tokenizer("digits", place)
    monkeypatch.chdir(tmp_path)
    plan = TraceExtent(batches=1, steps=1, scenarios=False)
    certificate = qualification.qualify_here(Cpu(), DecoderSubject(str(directory)), plan)
    assert certificate.weight_files == weights_of(str(directory)) != weights_of(str(beside))
    assert qualification.qualify_here(Cpu(), SmallSubject("llama"), plan).weight_files is None


@pytest.mark.slow
def test_an_opened_chip_s_certificate_is_its_own() -> None:
    chip = open_chip("emulated:h800", faults="wrong-attention-backward")
    certificate = beringia.certify(chip, "r2-nano")
    chip.close()
    assert certificate.identity_hash == chip.identity.hash
    assert certificate.verdict != "train"
