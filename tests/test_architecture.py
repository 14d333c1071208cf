"""The house's laws that can be read from the source: who imports whom, where vendor words stand, no pickle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "beringia"

LAYERS = [
    {"__main__"},
    {"cli"},
    {"campaign", "watch"},
    {"rl", "handover", "plan", "serve"},
    {"supervise", "qualify"},
    {"train", "engine"},
    {"data", "model"},
    {"checkpoint"},
    {"chips"},
    {"report", "numerics", "processes"},
    {"history"},
    {"progress"},
    {"records"},
    {"errors", "version", "machine"},
]
"""Imports point down this list; rows on one line never import each other."""

WITHOUT_TORCH = (
    "supervise",
    "report",
    "history",
    "processes",
    "records",
    "errors.py",
    "version.py",
    "machine",
    "cli.py",
    "progress.py",
)

VENDOR_WORDS = re.compile(
    r"torch\.cuda|torch_npu|torch\.npu|\bnccl\b|\bhccl\b|\brccl\b|\bnpu\b|\bcuda\b|\bhip\b|\bCANN\b|\bcudnn\b",
    re.IGNORECASE,
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(part: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if part in names)


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """Every module imported anywhere in a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def named_parts(path: Path) -> set[str]:
    parts = {name.split(".")[1] for name in imports_of(path) if name.startswith("beringia.")}
    return {part for part in parts if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_the_house(path: Path) -> None:
    own = part_of(path)
    if own == "__init__":
        return
    for part in named_parts(path) - {own}:
        assert layer_of(own) < layer_of(part), f"{path.relative_to(ROOT)} imports beringia.{part}"


def test_every_part_has_a_place_in_the_house() -> None:
    for path in modules():
        if part_of(path) != "__init__":
            layer_of(part_of(path))


@pytest.mark.parametrize("part", ["train", "supervise", "qualify"])
def test_detectors_cannot_know_what_was_planted(part: str) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        assert not [name for name in imports_of(path) if name.startswith("beringia.chips.emulated")], path


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_what_must_start_at_once_or_without_a_device_does_not_import_torch(part: str) -> None:
    place = PACKAGE / part
    for path in [place] if place.is_file() else place.rglob("*.py"):
        heavy = {name.split(".")[0] for name in imports_of(path)} & {"torch", "transformers", "numpy", "scipy"}
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_starting_the_supervisor_and_the_command_line_loads_no_torch() -> None:
    code = (
        "import sys, beringia.cli, beringia.supervise.supervisor, beringia.report.page; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_worker_does_not_import_transformers() -> None:
    for part in ("train", "checkpoint", "data", "model", "chips", "numerics", "records"):
        for path in (PACKAGE / part).rglob("*.py"):
            assert "transformers" not in {name.split(".")[0] for name in imports_of(path)}, path


def _code_without_docstrings(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


def test_vendor_words_stand_under_chips_only() -> None:
    for path in modules():
        if part_of(path) == "chips":
            continue
        found = VENDOR_WORDS.search(_code_without_docstrings(path))
        assert found is None, f"{path.relative_to(ROOT)} says {found and found.group()!r}"


def test_nothing_is_pickled() -> None:
    pickles = re.compile(
        r"\bpickle\b|torch\.(load|save)\(|weights_only\s*=\s*False|trust_remote_code\s*=\s*True|(gather|scatter|broadcast)_object"
    )
    for path in modules():
        found = pickles.search(_code_without_docstrings(path))
        assert found is None, f"{path.relative_to(ROOT)} has {found and found.group()!r}"


def test_no_error_is_swallowed() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                bare = node.type is None
                broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
                silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
                reraises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                assert not bare and not silent, f"{path.relative_to(ROOT)}:{node.lineno}"
                assert not broad or reraises, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_the_torch_range_admits_what_torch_npu_pins_and_the_constraint_lies_in_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch>=2.10,<2.15" in project["dependencies"]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().split()


def test_every_field_of_the_recipe_is_read_somewhere() -> None:
    from beringia.records import recipe as recipes

    sources = "\n".join(path.read_text() for path in modules() if path.name != "recipe.py")
    for name in dir(recipes):
        section = getattr(recipes, name)
        if isinstance(section, type) and name.endswith("Section"):
            for field in section.model_fields:
                assert re.search(rf"\.{field}\b", sources), f"{name}.{field} is read nowhere"


def test_every_recipe_loads() -> None:
    from beringia.records.recipe import read_recipe

    found = sorted((ROOT / "recipes").glob("*.toml"))
    assert found
    for path in found:
        read_recipe(path)
