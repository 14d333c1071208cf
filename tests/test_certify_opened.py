"""`certify` with an opened chip certifies that chip, with its faults, or refuses; never another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import SmallSubject, opened

import beringia
from beringia.chips.open import open_chip
from beringia.errors import InputError
from beringia.qualify import qualification

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


def test_a_bundle_for_a_subject_is_refused() -> None:
    with pytest.raises(InputError, match="leave against out"):
        beringia.certify("cpu", SmallSubject("llama"), against="some.bundle")


@pytest.mark.slow
def test_an_opened_chip_s_certificate_is_its_own() -> None:
    chip = open_chip("emulated:h800", faults="wrong-attention-backward")
    certificate = beringia.certify(chip, "r2-nano")
    chip.close()
    assert certificate.identity_hash == chip.identity.hash
    assert certificate.verdict != "train"
