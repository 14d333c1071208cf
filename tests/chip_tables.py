"""The generated tables of docs/chips.md (Ascend's environment, the datasheets) and docs/fault-codes.md.

`python tests/chip_tables.py` renews them between their markers; a test holds the documents against the code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from beringia.chips.ascend import ENVIRONMENT
from beringia.chips.ascend_faults import ASCEND_RULES
from beringia.chips.classification import Rule
from beringia.chips.cpu import CPU_RULES
from beringia.chips.cuda_faults import CUDA_RULES, ROCM_RULES
from beringia.chips.datasheets import Datasheet, Quantity, all_datasheets

DOCS = Path(__file__).parent.parent / "docs"
_LETTERS = {"documented": "", "measured": " ᵐ", "assumed": " ᵃ"}


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _faults(rules: Sequence[Rule]) -> str:
    return _rows(("code", "category", "why"), [(f"`{rule.code}`", rule.category, rule.reason) for rule in rules])


def _number(quantity: Quantity | None) -> str:
    return "" if quantity is None else f"{quantity.value:.4g} {quantity.unit}{_LETTERS[quantity.mark]}"


def _datasheet(sheet: Datasheet) -> list[str]:
    peaks = [_number(sheet.peak.get(dtype)).replace(" Tops/s", "") for dtype in ("bf16", "fp16", "fp8", "int8")]
    both = " ×2" if sheet.links.scale_up_is_both_directions else ""
    links = _number(sheet.links.scale_up) + (both if sheet.links.scale_up else "")
    fp8 = sheet.supports.get("fp8")
    return [
        f"`{sheet.name}`",
        sheet.title,
        *peaks,
        _number(sheet.memory.capacity),
        _number(sheet.memory.bandwidth),
        links,
        "" if fp8 is None else "yes" if fp8.value else "no",
    ]


def _datasheets() -> str:
    header = ("name", "part", "bf16", "fp16", "fp8", "int8", "memory", "bandwidth", "scale-up", "fp8 native")
    return _rows(header, [_datasheet(sheet) for sheet in all_datasheets()])


def _environment() -> str:
    rows = [(f"`{name}`", f"`{value}`", f"{why}") for name, (value, why) in ENVIRONMENT.items()]
    return _rows(("variable", "value", "why"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "ascend-environment": _environment,
    "ascend-faults": lambda: _faults(ASCEND_RULES),
    "cuda-faults": lambda: _faults(CUDA_RULES),
    "rocm-faults": lambda: _faults(ROCM_RULES),
    "cpu-faults": lambda: _faults(CPU_RULES),
    "datasheets": _datasheets,
}


def document_of(name: str) -> Path:
    """Where a table stands."""
    return DOCS / ("fault-codes.md" if name.endswith("-faults") else "chips.md")


def table(name: str) -> str:
    """The table as it must stand in the document."""
    return TABLES[name]()


def between(document: str, name: str) -> str:
    """What stands between the markers of a table."""
    return document.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


def renew() -> None:
    """Write every table into its document."""
    for name in TABLES:
        document = document_of(name).read_text()
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = document.split(begin)
        document = f"{before}{begin}\n{table(name)}\n{end}{rest.split(end)[1]}"
        document_of(name).write_text(document)


if __name__ == "__main__":
    renew()
