"""A chip's arithmetic, measured into a profile that the emulator loads."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from small_runs import beringia

from beringia.chips.arithmetic import matmul
from beringia.chips.arithmetic.profile import PROFILES, Profile, read_profile
from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.qualify.arithmetic.chip_profile import float32_products, measure_profile, measured_or_assumed, to_toml
from beringia.qualify.arithmetic.elementwise import measure_elementary, measure_sum


@contextmanager
def opened(name: str) -> Iterator[Chip]:
    chip = open_chip(name)
    try:
        yield chip
    finally:
        chip.close()


@pytest.fixture(scope="module", params=["h800", "mi300x", "mi250x"])
def both(request: pytest.FixtureRequest) -> tuple[Profile, Profile]:
    """What was declared, and what was measured on the device that computes by it."""
    with opened(f"emulated:{request.param}@exact") as chip:
        return read_profile(request.param), measure_profile(chip)


def test_units_casts_overflow_and_subnormals_are_what_was_declared(both: tuple[Profile, Profile]) -> None:
    declared, measured = both
    for name, unit in measured.units.items():
        wanted = declared.units[name]
        assert (unit.scheme, unit.block, unit.fraction_bits, unit.final) == (
            wanted.scheme,
            wanted.block,
            wanted.fraction_bits,
            wanted.final,
        )
        assert unit.mark == ("assumed" if name == "float64" else "measured")
    assert set(measured.storage.formats) == set(declared.storage.formats) - {"tfloat32"}
    for part in ("casts", "overflow", "subnormals"):
        same = {"mark": "", "source": ""}
        assert getattr(measured, part).model_copy(update=same) == getattr(declared, part).model_copy(update=same)
    assert measured.float32_products.format == "float32"


def test_the_order_of_sums_is_what_was_declared(both: tuple[Profile, Profile]) -> None:
    declared, measured = (profile.reduction for profile in both)
    assert (measured.scheme, measured.lanes, measured.serial) == (declared.scheme, declared.lanes, declared.serial)
    assert measured.mark == "measured"


@pytest.mark.parametrize(
    "order",
    [
        {"scheme": "sequential"},
        {"scheme": "tree"},
        {"scheme": "lanes", "lanes": 8, "serial": 2},
        {"scheme": "lanes", "lanes": 512, "serial": 8},
    ],
    ids=str,
)
def test_an_order_of_sums_is_told_from_all_others(order: dict[str, Any], tmp_path: Path) -> None:
    profile = tomllib.loads((PROFILES / "h100.toml").read_text())
    profile["reduction"] = order | {"mark": "assumed", "source": "a test"}
    path = tmp_path / "order.toml"
    path.write_text(tomli_w.dumps(profile))
    with opened(f"emulated:{path}") as chip:
        assert measure_sum(chip) == order


def test_an_order_of_sums_that_is_not_known_is_not_taken_for_one_that_is() -> None:
    """The CPU's own adds lanes of its vector units in cascades."""
    assert measure_sum(open_chip("cpu")) == {"scheme": "native"}


def test_errors_of_elementary_functions_are_the_declared_ones_and_the_cpus_own(both: tuple[Profile, Profile]) -> None:
    declared, measured = both
    of_the_cpu = measure_elementary(open_chip("cpu"))
    for name, found in measured.elementary.ulps.items():
        # The emulator moves the CPU's value, which is off by up to so much itself.
        own = of_the_cpu[name] + 1
        assert declared.elementary.of(name) - own <= found <= declared.elementary.of(name) + own, name
    assert any(measured.elementary.ulps[name] > own for name, own in of_the_cpu.items())


def test_the_measured_profile_is_a_file_that_the_emulator_computes_by(
    both: tuple[Profile, Profile], tmp_path: Path
) -> None:
    declared, measured = both
    path = tmp_path / "measured.toml"
    path.write_text(to_toml(measured))
    assert read_profile(str(path)) == measured
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(40, 40, generator=generator).bfloat16() for _ in range(2))
    name = {"NVIDIA H800": "h800"}.get(declared.part, "mi300x" if "MI300X" in declared.part else "mi250x")
    assert torch.equal(matmul(a, b, unit=str(path)), matmul(a, b, unit=name))


def test_products_of_float32_in_ten_bits_are_noticed_with_their_rounding(tmp_path: Path) -> None:
    profile = tomllib.loads((PROFILES / "h100.toml").read_text())
    profile["float32_products"]["format"] = "tfloat32"
    path = tmp_path / "tf32.toml"
    path.write_text(tomli_w.dumps(profile))
    with opened(f"emulated:{path}@exact") as chip:
        assert float32_products(chip) == ("tfloat32", "truncate")


@pytest.mark.slow
def test_probe_writes_the_profile_and_says_what_each_unit_is(tmp_path: Path) -> None:
    out = tmp_path / "h100.toml"
    done = beringia("chips", "probe", "emulated:h100@exact", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "block of 16 terms, F = 25 truncate, result 23 bits truncate" in done.stdout
    assert read_profile(str(out)).assumed() == ["units.float64"]


@pytest.mark.slow
def test_a_unit_that_fits_no_scheme_is_inconclusive_and_marked_as_assumed(tmp_path: Path) -> None:
    """The fast fidelity leaves the order within 128 terms to the CPU."""
    out = tmp_path / "fast.toml"
    done = beringia("chips", "probe", "emulated:h800", "--out", str(out), "--json")
    assert done.returncode == 4, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["chip"], answer["hash"]) == ("emulated:h800", read_profile(str(out)).hash)
    assert "units.bfloat16" in answer["assumed"]
    assert "No unit that a profile can say" in read_profile(str(out)).units["bfloat16"].source


def test_a_chip_without_float32_results_of_short_operands_is_inconclusive_too() -> None:
    unit = measured_or_assumed(open_chip("cpu"), "bfloat16", "a test")
    assert unit.mark == "assumed"
    assert "No float32 results of bfloat16 operands here" in unit.source
