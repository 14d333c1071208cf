"""The catalogue of datasheets: what is published of each part, every number with its mark and its source.

One TOML file for each part under `catalogue/datasheets/`. A number without a source is not in the catalogue, so a part
may lack any of them. Marks: `documented` (the vendor's document or code, or a page that quotes the vendor's figures),
`measured` (read off a device), `assumed` (secondary tables that agree, or a derivation; the source says which).

Peaks are dense products with the format's usual accumulator. Does not describe arithmetic (`catalogue/arithmetic/`).
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from beringia.errors import ChipUnavailable
from beringia.records.record import Record, canonical_json

CATALOGUE = Path(__file__).parent / "catalogue" / "datasheets"

Mark = Literal["documented", "measured", "assumed"]
Unit = Literal["Tops/s", "GB", "GiB", "MiB", "GB/s", "TB/s", "TiB/s"]

_FACTORS: dict[str, float] = {
    "Tops/s": 1e12,
    "GB": 1e9,
    "GiB": 2.0**30,
    "MiB": 2.0**20,
    "GB/s": 1e9,
    "TB/s": 1e12,
    "TiB/s": 2.0**40,
}


_PARTS = {
    "Tesla V100-SXM2-32GB": "v100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H800": "h800",
    "NVIDIA H20": "h20",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
    "AMD Instinct MI300X": "mi300x",
    "Ascend910B1": "910b1",
    "Ascend910B2": "910b2",
    "Ascend910B3": "910b3",
    "Ascend910B4": "910b4",
}
"""A device's name as its driver gives it -> datasheet. Parts of two dies (MI250X, 910C) are left out: torch shows each
die as a device, and the datasheet is of the package."""


class Quantity(Record):
    """One published number."""

    value: float = Field(gt=0)
    unit: Unit
    """`Tops/s`: 10^12 operations a second, a multiplication and an addition being two."""
    mark: Mark
    source: str = Field(min_length=8)
    """Document, code or page, with its date or revision where it has one."""

    @property
    def base(self) -> float:
        """In operations a second, bytes, or bytes a second."""
        return self.value * _FACTORS[self.unit]


class Support(Record):
    """Whether products in a format are native."""

    value: bool
    mark: Mark
    source: str = Field(min_length=8)


class Memory(Record):
    """Device memory."""

    capacity: Quantity | None = None
    bandwidth: Quantity | None = None


class Links(Record):
    """What connects devices, one direction unless the source of the number says otherwise."""

    scale_up: Quantity | None = None
    """Inside the node or supernode: NVLink, Infinity Fabric, HCCS, UB."""
    scale_up_is_both_directions: bool = False
    """NVIDIA and AMD publish the sum of both directions."""
    scale_out: Quantity | None = None
    """Network port of one device."""
    die_to_die: Quantity | None = None


class Datasheet(Record):
    """One part."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    """As files and commands name it."""
    title: str
    vendor: Literal["nvidia", "amd", "ascend"]
    peak: dict[Literal["fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "fp4", "int8"], Quantity] = {}
    """Format -> dense peak of the matrix unit."""
    memory: Memory = Memory()
    links: Links = Links()
    supports: dict[Literal["bf16", "fp8"], Support] = {}
    note: str = ""
    """What a reader must know: variants, names that are not confirmed."""

    def quantities(self) -> dict[str, Quantity]:
        """Every number, by its dotted place: `peak.bf16`, `memory.capacity`."""
        parts: list[tuple[str, Quantity | None]] = [
            *((f"peak.{dtype}", quantity) for dtype, quantity in self.peak.items()),
            ("memory.capacity", self.memory.capacity),
            ("memory.bandwidth", self.memory.bandwidth),
            ("links.scale_up", self.links.scale_up),
            ("links.scale_out", self.links.scale_out),
            ("links.die_to_die", self.links.die_to_die),
        ]
        return {place: quantity for place, quantity in parts if quantity is not None}


def datasheet(name: str) -> Datasheet:
    """The part of that name. Raises ChipUnavailable with a did-you-mean."""
    path = CATALOGUE / f"{name}.toml"
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
        raise ChipUnavailable(f"There is no datasheet of {name!r} in the catalogue. {hint}")
    return read_datasheet(path)


def datasheet_of_device(sku: str) -> Datasheet | None:
    """The part that an identity's `sku` names, to the variant; None where no datasheet is known to be its own."""
    name = _PARTS.get(sku.partition(" (")[0])
    return None if name is None else datasheet(name)


def all_datasheets() -> list[Datasheet]:
    """Every part, by name."""
    return [datasheet(name) for name in names()]


def names() -> list[str]:
    """The parts in the catalogue."""
    return sorted(path.stem for path in CATALOGUE.glob("*.toml"))


def read_datasheet(path: Path) -> Datasheet:
    """Read one file, strictly. Raises ChipUnavailable that names the file and the wrong key."""
    try:
        # Strict JSON mode: an integer serves as a float there, a string never does.
        return Datasheet.model_validate_json(canonical_json(tomllib.loads(path.read_text())))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise ChipUnavailable(f"The datasheet {path} cannot be used: {error}.") from None
