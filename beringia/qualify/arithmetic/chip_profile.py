"""A chip's profile by measurement, which the emulator can load: a chip that nobody has documented gets an emulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import tomli_w
import torch

from beringia.chips.arithmetic.formats import FORMATS
from beringia.chips.arithmetic.profile import Direction, Format, MatrixUnit, Profile
from beringia.chips.chip import Chip
from beringia.qualify.arithmetic import elementwise
from beringia.qualify.arithmetic.matrix_unit import UnknownStructure, direction, measure_unit
from beringia.qualify.arithmetic.products import CASES, LENGTH, Multiply

_GIBIBYTE = 2**30
_FLOAT8 = ("float8_e4m3", "float8_e4m3fnuz", "float8_e5m2")
_STORAGE: Mapping[Format, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    **{name: form.dtype for name, form in FORMATS.items() if form.dtype != torch.float32},
}


def measure_profile(chip: Chip) -> Profile:
    """Everything that a profile says of this chip, measured where it is not marked as assumed."""
    source = f"measured on {chip.identity.sku} ({chip.identity.truth}), identity {chip.identity.hash[:12]}"
    origin = {"mark": "measured", "source": source}
    formats = [name for name, dtype in _STORAGE.items() if dtype in chip.capabilities.dtypes]
    products_format, cut = float32_products(chip)
    names = [products_format, *(name for name in formats if name not in ("float64", "float32"))]
    units = {name: measured_or_assumed(chip, name, source) for name in names}
    if torch.float64 in chip.capabilities.dtypes:
        units["float64"] = _sequential("float64 is computed by the CPU wherever a profile is emulated")
    compute = str(chip.capabilities.compute_dtype).removeprefix("torch.")
    ulps = elementwise.measure_elementary(chip)
    narrow = next((FORMATS[name].dtype for name in ("bfloat16", "float16") if name in units), None)
    return Profile.model_validate(
        {
            "part": chip.identity.sku,
            "vendor": chip.identity.vendor if chip.identity.vendor in _vendors() else "none",
            "summary": f"{source[0].upper()}{source[1:]}",
            "memory": origin | {"gibibytes": max(1, chip.memory().total_bytes // _GIBIBYTE)},
            "storage": origin | {"formats": tuple(formats), "compute": compute},
            "units": units,
            "float32_products": origin | {"format": products_format, "input_rounding": cut},
            "casts": origin | {"rounding": elementwise.measure_cast(chip, narrow)} if narrow else _no_casts(source),
            "overflow": origin | {"mode": "saturate" if elementwise.saturates(chip) else "ieee"},
            "subnormals": origin | {"mode": "flushed" if elementwise.flushes_subnormals(chip) else "kept"},
            "elementary": origin | {"ulps": ulps, "default": max(ulps.values())},
            "reduction": origin | elementwise.measure_sum(chip),
        }
    )


def _no_casts(source: str) -> dict[str, str]:
    return {"rounding": "nearest-even", "mark": "assumed", "source": f"{source}; it has no 16-bit format to cast to"}


def measured_or_assumed(chip: Chip, format_: Format, source: str) -> MatrixUnit:
    """The unit as measured; one that fits no scheme is assumed to add one after another in float32, and says why."""
    try:
        return measure_unit(multiply_on(chip, format_), format_, source)
    except UnknownStructure as reason:
        return _sequential(f"{source}; {reason}")


def _sequential(why: str) -> MatrixUnit:
    return MatrixUnit(scheme="sequential", block=1, final="nearest-even", mark="assumed", source=why)


def multiply_on(chip: Chip, format_: Format) -> Multiply:
    """Products of that format on the chip, with float32 results. They raise UnknownStructure where it makes none."""
    kernel = _scaled if format_ in _FLOAT8 else torch.mm if format_ in ("float32", "tfloat32") else _widened

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        try:
            return kernel(a.to(chip.device), b.to(chip.device)).cpu()
        except RuntimeError as error:  # NotImplementedError is one
            if chip.classify(error) is not None:
                raise
            first = str(error).splitlines()[0][:120]
            raise UnknownStructure(f"No float32 results of {format_} operands here: {first} ...") from error

    return multiply


def _widened(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


def _scaled(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    one = torch.ones((), device=a.device)
    # Libraries want the second operand by columns.
    return torch._scaled_mm(a, b.t().contiguous().t(), scale_a=one, scale_b=one, out_dtype=torch.float32)


def float32_products(chip: Chip) -> tuple[Format, Direction]:
    """Whether products of float32 matrices keep all bits of their operands, or ten, and how the others are cut."""
    multiply = multiply_on(chip, "float32")
    half = 2.0**-11
    numbers = torch.tensor([-1 - half, -1 - 1.5 * half, 1 + 1.5 * half])
    a_MK = torch.zeros(CASES, LENGTH)
    a_MK[:3, 0] = numbers
    found = multiply(a_MK, torch.eye(LENGTH, CASES))[:3, 0]
    if torch.equal(found, numbers):
        return "float32", "nearest-even"
    return "tfloat32", direction((found.abs() != 1).tolist())


def to_toml(profile: Profile) -> str:
    """The profile as a file of the catalogue has it."""
    return tomli_w.dumps(_without_defaults(profile.model_dump(mode="json")))


def _without_defaults(table: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: what is None is the default, and left out."""
    return {
        name: _without_defaults(value) if isinstance(value, dict) else value
        for name, value in table.items()
        if value is not None
    }


def _vendors() -> tuple[str, ...]:
    return get_args(Profile.model_fields["vendor"].annotation)
