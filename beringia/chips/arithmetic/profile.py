"""What a chip's arithmetic is, as data: one TOML file per part in `beringia/chips/catalogue/arithmetic`.

Every group of numbers says where it comes from (`source`) and how good that is (`mark`): `documented` by the maker or
by a published study of the part, `measured` by us, or `assumed`. Part of a chip's identity is the hash of its profile.

The schema says more than the `fast` fidelity computes (see `products.py`): block lengths and the alignment of single
products matter to the bit-exact fidelity only.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from beringia.errors import ChipUnavailable
from beringia.records.record import Record, canonical_hash
from beringia.records.toml_file import read_toml

PROFILES = Path(__file__).parent.parent / "catalogue" / "arithmetic"

R = TypeVar("R", bound=Record)
Mark = Literal["documented", "measured", "assumed"]
Direction = Literal["truncate", "floor", "nearest-even", "half-away"]
"""truncate: toward zero; floor: toward minus infinity (asymmetric in sign); half-away: nearest, ties away from zero."""
Format = Literal[
    "float64", "float32", "tfloat32", "hfloat32", "bfloat16", "float16", "float8_e4m3", "float8_e4m3fnuz", "float8_e5m2"
]


class Sourced(Record):
    """Numbers with their origin."""

    mark: Mark
    source: str = Field(min_length=1)
    """Document, study, or the reason for an assumption."""


class DeviceMemory(Sourced):
    """Memory of the part."""

    gibibytes: int = Field(gt=0)


class Storage(Sourced):
    """Formats that tensors may have."""

    formats: tuple[Format, ...]
    compute: Literal["bfloat16", "float16", "float32"]
    """Format of products in mixed precision."""


class MatrixUnit(Sourced):
    """How the matrix unit multiplies and adds operands of one format.

    A *block* is what the hardware adds at once: `block` exact products and the accumulator. In the `block` scheme all
    are aligned to the largest exponent, cut to `fraction_bits` below it, and added exactly.
    """

    scheme: Literal["block", "halves", "pairwise", "sequential"]
    """block: as above; halves: even and odd terms are two blocks, then added (MI300X, fp8); pairwise: a tree of float32
    additions, each rounded (MI250X); sequential: fused multiply-add, one term after another (no matrix unit)."""
    block: int = Field(ge=1)
    """Products added at once."""
    fraction_bits: int | None = Field(default=None, ge=1, le=52)
    """Bits kept below the largest exponent when products are aligned; None: exact."""
    alignment: Direction = "truncate"
    """How aligned products lose their other bits."""
    sum_bits: int | None = Field(default=None, ge=1, le=52)
    """Bits kept of the block's sum before the accumulator is added; None: exact."""
    sum_rounding: Direction = "truncate"
    accumulator_bits: int | None = Field(default=None, ge=1, le=52)
    """Bits kept of the accumulator when it is aligned, where they differ from the products'."""
    accumulator_rounding: Direction = "truncate"
    result_bits: int = Field(default=23, ge=1, le=23)
    """Fraction bits of what a block hands on: 23 is float32, 13 what Hopper keeps of fp8 products."""
    final: Direction
    """Rounding to `result_bits`."""
    subnormals_in: Literal["kept", "flushed"] = "kept"
    """Operands that are subnormal in their format."""
    subnormals_out: Literal["kept", "flushed"] = "kept"
    """Float32 results that are subnormal."""
    large_products: Literal["kept", "infinite"] = "kept"
    """Products of 2^128 and more, finite in exact arithmetic: kept until the sum is rounded, or infinite at once."""
    zero_exponent: int | None = Field(default=None, ge=-149, le=-126, exclude_if=lambda value: value is None)
    """Exponent with which an accumulator of zero takes part where terms are aligned to the largest one, which costs
    products far below it their last bits; None: zero has no exponent. Studies give it to products of zero, too, which
    changes nothing: an accumulator that is not zero has -126 or more. Only formats whose products reach below 2^-149
    can show it."""

    def in_words(self) -> str:
        """One line for tables."""
        if self.scheme == "sequential":
            return f"one after another, {self.final}"
        if self.scheme == "pairwise":
            return f"tree of {self.block} terms, {self.final}"
        apart = (
            f", accumulator {self.accumulator_bits} bits {self.accumulator_rounding}" if self.accumulator_bits else ""
        )
        bits = "all bits" if self.fraction_bits is None else f"F = {self.fraction_bits}"
        shape = "block" if self.scheme == "block" else "even and odd halves"
        zero = "" if self.zero_exponent is None else f", zero as 2^{self.zero_exponent}"
        result = f"result {self.result_bits} bits {self.final}"
        return f"{shape} of {self.block} terms, {bits} {self.alignment}{apart}{zero}, {result}"


class Float32Products(Sourced):
    """What a product of float32 matrices becomes under the software's default switches."""

    format: Literal["float32", "tfloat32", "hfloat32"]
    input_rounding: Direction = "nearest-even"
    """How operands are cut to tfloat32 or hfloat32 (ten fraction bits)."""


class Casts(Sourced):
    """Float32 to a narrower format."""

    rounding: Direction


class Overflow(Sourced):
    """What becomes of results that are not finite."""

    mode: Literal["ieee", "saturate"]
    """saturate: an infinity becomes the format's largest number, NaN becomes 0."""


class Subnormals(Sourced):
    """Subnormal results of operators other than products."""

    mode: Literal["kept", "flushed"]


class Elementary(Sourced):
    """Largest error of elementary functions, in units in the last place of float32."""

    ulps: dict[str, int]
    """By function (`exp`, `log`, `tanh`, ...); one that is not named has `default`."""
    default: int = Field(ge=0)

    def of(self, function: str) -> int:
        """Largest error of a function, in ULP."""
        return self.ulps.get(function, self.default)


class Reduction(Sourced):
    """The order in which `sum` and `mean` add."""

    scheme: Literal["native", "sequential", "tree", "lanes"]
    """native: as torch does on this CPU; sequential: one term after another; tree: halves added pairwise; lanes: pieces
    of `lanes` x `serial` terms, each lane adds its `serial` terms (stride `lanes`), then lanes and pieces as trees."""
    lanes: int = Field(default=1, ge=1)
    serial: int = Field(default=1, ge=1)


class Profile(Record):
    """One part."""

    part: str
    """As its driver names it."""
    vendor: Literal["nvidia", "amd", "ascend", "none"]
    """Whose error texts its faults carry."""
    summary: str
    """One sentence for lists."""
    arithmetic: Literal["declared", "native"] = "declared"
    """native: no arithmetic change at all; operators compute as on this CPU."""
    memory: DeviceMemory
    storage: Storage
    units: dict[Format, MatrixUnit]
    """By operand format."""
    float32_products: Float32Products
    casts: Casts
    overflow: Overflow
    subnormals: Subnormals
    elementary: Elementary
    reduction: Reduction

    @model_validator(mode="after")
    def _float32_products_have_a_unit(self) -> Profile:
        if self.arithmetic == "declared" and self.float32_products.format not in self.units:
            raise ValueError(f"float32 products are made in {self.float32_products.format}, which has no unit")
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        return canonical_hash(self)

    def assumed(self) -> list[str]:
        """Names of the groups that are assumed, e.g. `units.bfloat16`."""
        groups: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        groups |= {f"units.{name}": unit for name, unit in self.units.items()}
        return [name for name, group in groups.items() if isinstance(group, Sourced) and group.mark == "assumed"]

    def assumed_in_words(self) -> str:
        """The same for a reader who knows no profile: `the order in which sums add; ...`."""
        groups = self.assumed()
        formats = [name.removeprefix("units.") for name in groups if name.startswith("units.")]
        adds = [f"how its matrix unit adds products of {', '.join(formats)}"] if formats else []
        return "; ".join([*adds, *(_GROUP_WORDS[name] for name in groups if name in _GROUP_WORDS)])


_GROUP_WORDS = {
    "memory": "how much memory it has",
    "storage": "which formats its tensors have",
    "float32_products": "what products of float32 become",
    "casts": "how casts to 16 bits round",
    "overflow": "what becomes of results that overflow",
    "subnormals": "whether the smallest numbers are kept or become zero",
    "elementary": "how exact functions such as exp are",
    "reduction": "the order in which sums add",
}
"""What a group of a profile is about."""


def profile_names() -> list[str]:
    """Profiles of the catalogue."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def read_profile(name: str) -> Profile:
    """A profile by name, or by the path of a TOML file. Raises ChipUnavailable."""
    path = Path(name) if name.endswith(".toml") else PROFILES / f"{name}.toml"
    if not path.is_file():
        raise ChipUnavailable(unknown("arithmetic profile", name, profile_names()))
    return parse(Profile, path)


def parse(kind: type[R], path: Path) -> R:
    """A record from a TOML file; ChipUnavailable with the file and the first thing that is wrong in it."""
    try:
        return kind.model_validate_json(json.dumps(read_toml(path), default=str))
    except OSError as error:
        raise ChipUnavailable(f"{path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ChipUnavailable(f"{path}: {where or 'the file'}: {first['msg']} (found {first['input']!r}).") from None
    except ValueError as error:
        raise ChipUnavailable(f"{path} is not valid TOML: {error}.") from None


def unknown(what: str, name: str, known: list[str]) -> str:
    """The sentence for a name that is not in a list."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"There is no {what} called {name!r}.{hint} Known: {', '.join(known)}."
