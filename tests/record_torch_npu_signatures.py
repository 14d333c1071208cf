"""Record which names a torch_npu wheel has, and with which signatures, from the wheel's own Python sources.

    python tests/record_torch_npu_signatures.py torch_npu-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl ...

writes `tests/data/torch_npu_<version>_signatures.json` for each. torch_npu cannot be imported without CANN, so its
sources are read as syntax trees: `torch_npu/npu/__init__.py` with what it imports from its neighbours, and
`torch_npu/npu/utils.py`. Defaults are recorded as `...`: whether an argument may be left out matters, its value not.
Names that only the C extension has are not recorded, so an adapter that used one would fail its test. Also recorded:
which environment variables the wheel's sources and libraries mention (others are read by CANN itself), and the
collective backends it registers.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beringia.chips.ascend import ENVIRONMENT

Entry = dict[str, Any]

DATA = Path(__file__).parent / "data"


class Wheel:
    """The Python sources of one wheel."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive = zipfile.ZipFile(path)
        self._names = set(self._archive.namelist())

    def contents(self, *endings: str) -> Iterator[bytes]:
        return (self._archive.read(name) for name in sorted(self._names) if name.endswith(endings))

    def tree(self, module: str) -> ast.Module | None:
        stem = module.replace(".", "/")
        for name in (f"{stem}.py", f"{stem}/__init__.py"):
            if name in self._names:
                return ast.parse(self._archive.read(name))
        return None

    @property
    def version(self) -> str:
        return self.path.name.split("-")[1]


def record(path: Path) -> dict[str, Any]:
    """The wheel's name, version and SHA-256, and the names of the modules that an adapter may use."""
    wheel = Wheel(path)
    npu = _entries(wheel, "torch_npu.npu")
    return {
        "wheel": path.name,
        "version": wheel.version,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "collective_backends": _collective_backends(wheel),
        "environment_variables": _mentioned(wheel, set(ENVIRONMENT)),
        "modules": {
            "torch_npu": {"__version__": {"value": True}, "npu": {"module": "torch_npu.npu"}},
            "torch_npu.npu": npu | {"utils": {"module": "torch_npu.npu.utils"}},
            "torch_npu.npu.utils": _entries(wheel, "torch_npu.npu.utils"),
        },
    }


def _mentioned(wheel: Wheel, variables: set[str]) -> list[str]:
    found: set[str] = set()
    for content in wheel.contents(".py", ".so"):
        found |= {name for name in variables - found if name.encode() in content}
    return sorted(found)


def _collective_backends(wheel: Wheel) -> list[str]:
    """First arguments of `register_backend(...)` anywhere in the wheel's sources."""
    return sorted(
        {
            node.args[0].value
            for content in wheel.contents(".py")
            if b"register_backend(" in content
            for node in ast.walk(ast.parse(content))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "register_backend"
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        }
    )


def _entries(wheel: Wheel, module: str) -> dict[str, Entry]:
    """Public names of a module: those it defines, and those it imports from the wheel's own modules."""
    tree = wheel.tree(module)
    assert tree is not None, f"{wheel.path.name} has no {module}"
    found: dict[str, Entry] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = _definition(node)
        elif isinstance(node, ast.ImportFrom):
            found.update(_imported(wheel, module, node))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            entry = _instance(wheel, module, node.value)
            if entry is not None:
                found[node.targets[0].id] = entry
    return dict(sorted((name, entry) for name, entry in found.items() if not name.startswith("_")))


def _imported(wheel: Wheel, module: str, node: ast.ImportFrom) -> dict[str, Entry]:
    source = f"{module}.{node.module}" if node.level == 1 else node.module or ""
    if not source.startswith("torch_npu.npu") or wheel.tree(source) is None:
        return {}
    available = _entries(wheel, source)
    if node.names[0].name == "*":
        public = _all_of(wheel, source)
        return available if public is None else {name: available[name] for name in public if name in available}
    return {alias.asname or alias.name: available[alias.name] for alias in node.names if alias.name in available}


def _all_of(wheel: Wheel, module: str) -> list[str] | None:
    tree = wheel.tree(module)
    assert tree is not None
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def _definition(node: ast.FunctionDef | ast.ClassDef) -> Entry:
    if isinstance(node, ast.FunctionDef):
        return {"function": _arguments(node.args, skip_first=False)}
    makers = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name in ("__init__", "__new__")]
    return {"class": _arguments(makers[0].args, skip_first=True) if makers else ""}


def _arguments(arguments: ast.arguments, *, skip_first: bool) -> str:
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    for argument in every:
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(...) for _ in arguments.defaults]
    arguments.kw_defaults = [None if default is None else ast.Constant(...) for default in arguments.kw_defaults]
    if skip_first:
        (arguments.posonlyargs or arguments.args).pop(0)
    return ast.unparse(arguments)


def _instance(wheel: Wheel, module: str, value: ast.expr) -> Entry | None:
    """`matmul = npu_config._allowHF32Matmul()`: which attributes its class lets one set and read."""
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute)):
        return None
    owner = value.func.value
    if not isinstance(owner, ast.Name) or (tree := wheel.tree(f"{module}.{owner.id}")) is None:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == value.func.attr:
            return {"settable": _names_compared(node, "__setattr__"), "readable": _names_compared(node, "__getattr__")}
    return None


def _names_compared(node: ast.ClassDef, method: str) -> list[str]:
    """The strings that a `__setattr__` or `__getattr__` compares its `name` with."""
    return sorted(
        part.comparators[0].value
        for function in node.body
        if isinstance(function, ast.FunctionDef) and function.name == method
        for part in ast.walk(function)
        if isinstance(part, ast.Compare)
        and isinstance(part.left, ast.Name)
        and part.left.id == "name"
        and isinstance(part.comparators[0], ast.Constant)
        and isinstance(part.comparators[0].value, str)
    )


def main(wheels: list[str]) -> None:
    for wheel in wheels:
        made = record(Path(wheel))
        path = DATA / f"torch_npu_{made['version']}_signatures.json"
        path.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
        print(path.name, {name: len(entries) for name, entries in made["modules"].items()})


if __name__ == "__main__":
    main(sys.argv[1:])
