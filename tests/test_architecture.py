"""The house's laws that can be read from the source: who imports whom and in no circle, where vendor words stand, no
pickle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
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
    {"records", "recipes"},
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


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_statements(source: str, package: str) -> Iterator[tuple[str, str, bool]]:
    """Module, what is imported from it ("" for the module itself), and whether that gets the module's own name;
    wherever the import stands. `package`: what a relative import starts from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", alias.asname is not None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((module, alias.name, True) for alias in node.names)


def names_the_face(source: str, package: str) -> bool:
    """Whether a module reaches for the public face: `import beringia`, `from beringia import x` whatever x is, and
    `import beringia.x`, which binds the face's own name."""
    return any(
        module == "beringia" or (module.startswith("beringia.") and not own_name)
        for module, _, own_name in import_statements(source, package)
    )


def loads(name: str, source: str, package: str, known: Mapping[str, Path]) -> set[str]:
    """Modules of the house that importing a module loads: what it names (`from a import b` is a.b where that is a
    module, else a), and the packages around those, but not the packages around itself, which are there already."""
    found: set[str] = set()
    for module, member, _ in import_statements(source, package):
        named = f"{module}.{member}" if f"{module}.{member}" in known else module
        parts = named.split(".")
        around = {".".join(parts[:length]) for length in range(1, len(parts))}
        found |= {named} | {each for each in around if not f"{name}.".startswith(f"{each}.")}
    return (found & set(known)) - {name}


def circle_in(sources: Mapping[str, tuple[str, str]], known: Mapping[str, Path]) -> list[str]:
    """Modules that load each other in turn, the first one twice; none: no circle. Sources by name, with packages."""
    graph = {name: loads(name, source, package, known) for name, (source, package) in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def package_of(path: Path) -> str:
    name = module_name(path)
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


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


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = {module_name(path): path for path in modules()}
    sources = {name: (path.read_text(), package_of(path)) for name, path in known.items()}
    assert not circle_in(sources, known)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("import beringia.b as b", "from beringia.a import x"),
        ("def late():\n    from beringia.b import x", "from beringia import a"),
        ("from beringia.b.inner import x", "from beringia.a import x"),  # runs b/__init__
        ("from . import b", "from .. import a"),
    ],
)
def test_a_circle_is_seen_however_it_is_written(a: str, b: str) -> None:
    known = dict.fromkeys(["beringia", "beringia.a", "beringia.b", "beringia.b.inner"], PACKAGE)
    sources = {"beringia.a": (a, "beringia"), "beringia.b": (b, "beringia.b"), "beringia.b.inner": ("", "beringia.b")}
    circle = circle_in(sources, known)
    assert circle[0] == circle[-1] and set(circle) == {"beringia.a", "beringia.b"}
    assert not circle_in({**sources, "beringia.b": ("", "beringia.b")}, known)


def test_what_is_inside_a_package_may_import_its_neighbours_without_a_circle() -> None:
    known = dict.fromkeys(["beringia.b", "beringia.b.inner", "beringia.b.other"], PACKAGE)
    sources = {
        "beringia.b": ("from beringia.b.inner import x", "beringia.b"),
        "beringia.b.inner": ("from beringia.b.other import x", "beringia.b"),
        "beringia.b.other": ("", "beringia.b"),
    }
    assert not circle_in(sources, known)
    assert circle_in({**sources, "beringia.b.other": ("from beringia.b import x", "beringia.b")}, known)


def test_nothing_inside_imports_the_public_face() -> None:
    for path in modules():
        if path not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py"):
            assert not names_the_face(path.read_text(), package_of(path)), path.relative_to(ROOT)


@pytest.mark.parametrize(
    ("source", "face"),
    [
        ("import beringia", True),
        ("import beringia as b", True),
        ("import beringia.errors", True),
        ("from beringia import Engine", True),
        ("def late():\n    from beringia import errors", True),
        ("from .. import errors", True),
        ("import beringia.errors as errors", False),
        ("from beringia.errors import ModelError", False),
        ("from ..errors import ModelError", False),
        ("import beringian", False),
    ],
)
def test_an_import_of_the_face_is_seen_however_it_is_written(source: str, face: bool) -> None:
    assert names_the_face(source, "beringia.model") is face


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


def test_a_family_is_named_where_its_files_are_stated_and_nowhere_else() -> None:
    from beringia.model.families import FAMILIES

    names = {name for family in FAMILIES for name in (family.model_type, family.architecture)}
    for path in modules():
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert path.name in ("families.py", "tokenizer_classes.py") or not strings & names, path.relative_to(ROOT)


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

    found = sorted((PACKAGE / "recipes").glob("*.toml"))
    assert found
    for path in found:
        read_recipe(path)


STARTING = re.compile(
    r"\bsubprocess\b|\bPopen\b|\bos\.(kill|killpg|fork|exec\w*|spawn\w*|system|popen|posix_spawn\w*)\b"
    r"|torch\.distributed\.run\b|\bmultiprocessing\b|\bcreate_subprocess"
)


def test_processes_are_started_and_ended_in_one_place() -> None:
    for path in modules():
        own = path.relative_to(PACKAGE).as_posix()
        if own.startswith("processes/") or own == "machine/tools.py":
            continue
        found = STARTING.search(_code_without_docstrings(path))
        assert found is None, f"{path.relative_to(ROOT)} has {found and found.group()!r}"


def test_time_outs_of_processes_are_decided_in_one_place() -> None:
    """A number of seconds anywhere else in `processes/` would be a second place."""
    for path in (PACKAGE / "processes").rglob("*.py"):
        if path.name == "patience.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                waits = [name for name in names if name.endswith("_SECONDS") and name not in NO_TIME_OUTS]
                assert not waits, f"{path.relative_to(ROOT)} has {waits}"


NO_TIME_OUTS = {
    "_LOOK_SECONDS",  # between two looks at the process table
    "_RESTED_SECONDS",  # how coarse a file system's clock is
}


def test_scipy_s_statistics_are_not_imported_where_processes_are_many() -> None:
    """They take a second to import, and a qualification has a process for each of its probes; `scipy.special` has the
    functions that they are made of."""
    heavy = re.compile(r"^from scipy import .*stats|^import scipy\.stats|^from scipy\.stats", re.MULTILINE)
    assert [path for path in (PACKAGE / "qualify").rglob("*.py") if heavy.search(path.read_text())] == []
