"""No test asserts how long something took: that says how busy the machine was.

What a clock gave is followed through the names of a file: assignments, parts of values, functions that return it. A
waiting loop with a deadline is `waiting.until`, which asserts nothing about time; a clock that a test moves itself is
`waiting.Clock`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

CLOCKS = {
    f"{name}{unit}"
    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time")
    for unit in ("", "_ns")
} | {"now", "utcnow", "getrusage"}
"""Functions of `time`, `datetime` and `resource` that read a clock."""
MODULES = {"time", "datetime", "resource"}


def reads_clock(call: ast.Call) -> bool:
    """`time.monotonic()`, `datetime.now()`, `monotonic()`: not `clock.now()` of a clock that the test moves."""
    if isinstance(call.func, ast.Attribute):
        owner = call.func.value
        module = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
        return call.func.attr in CLOCKS and module in MODULES
    return isinstance(call.func, ast.Name) and call.func.id in CLOCKS - {"time", "now"}


def is_measured(expression: ast.AST, measured: set[str]) -> bool:
    """Whether a clock is read in it, or a name that holds what one gave."""
    return any(
        (isinstance(node, ast.Call) and reads_clock(node)) or (isinstance(node, ast.Name) and node.id in measured)
        for node in ast.walk(expression)
    )


def bindings(tree: ast.AST) -> Iterator[tuple[ast.AST, list[str]]]:
    """Values and the names that are given them; a function is given what it returns."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield node.value, [name for target in targets for name in names_bound(target)]
        elif isinstance(node, ast.For | ast.comprehension):
            yield node.iter, names_bound(node.target)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return | ast.Yield) and inner.value is not None:
                    yield inner.value, [node.name]


def names_bound(target: ast.AST) -> list[str]:
    """`seconds, [last]`, `box.seconds` and `times[3]` bind seconds, last, box and times."""
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]


def measured_names(tree: ast.AST) -> set[str]:
    """Names of a scope that hold, in the end, something that a clock gave."""
    measured: set[str] = set()
    while found := {n for value, names in bindings(tree) if is_measured(value, measured) for n in names} - measured:
        measured |= found
    return measured


def scopes(tree: ast.Module) -> Iterator[tuple[ast.AST, set[str]]]:
    """Every top-level function or statement with the names that are measured in it; names of one test are not those of
    another, but what the file's functions return is."""
    returned = {
        part.name
        for part in tree.body
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and part.name in measured_names(part)
    }
    for part in tree.body:
        inside = ast.Module([part], [])
        yield part, measured_names(inside) | returned


def assertions_of_time(source: str) -> list[int]:
    """Lines of assertions about what a clock gave."""
    return [
        node.lineno
        for part, measured in scopes(ast.parse(source))
        for node in ast.walk(part)
        if isinstance(node, ast.Assert) and is_measured(node.test, measured)
    ]


def asserted_seconds(source: str) -> list[int]:
    """Lines of assertions that a `…seconds` of ours is above or below a number, or a multiple: of what it measured."""
    return [
        node.lineno
        for statement in ast.walk(ast.parse(source))
        if isinstance(statement, ast.Assert)
        for node in ast.walk(statement.test)
        if isinstance(node, ast.Compare) and bounds_seconds(node)
    ]


def bounds_seconds(node: ast.Compare) -> bool:
    orders = any(isinstance(operator, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for operator in node.ops)
    parts = [node.left, *node.comparators]
    seconds = any(isinstance(part, ast.Attribute) and part.attr.endswith("seconds") for part in parts)
    return orders and seconds and any(map(is_number_or_multiple, parts))


def is_number_or_multiple(part: ast.expr) -> bool:
    """Nothing takes less than no time, whatever the machine: 0 is no bound."""
    if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mult | ast.Div):
        return is_number_or_multiple(part.left) or is_number_or_multiple(part.right)
    return isinstance(part, ast.Constant) and bool(part.value)


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.py")), ids=lambda path: path.name)
def test_no_assertion_is_about_time_that_was_measured(path: Path) -> None:
    source = path.read_text()
    assert assertions_of_time(source) == asserted_seconds(source) == []


@pytest.mark.parametrize(
    "body",
    [
        "assert time.monotonic() - 3 < 2",
        "began = time.time()\n    assert run() and time.time() - began < 2",
        "began = perf_counter()\n    took = run() - began\n    assert 2 > took",
        "took = {}\n    took['a'] = time.perf_counter_ns()\n    fast, slow = took['a'], 3\n    assert slow > fast",
        "def read():\n        return time.monotonic()\n    least = min(read() for _ in range(3))\n    assert least < 4",
        "times = [time.monotonic()]\n    for one in times:\n        assert one < 3",
        "assert measured() < 3",
        "while True:\n        assert datetime.datetime.now() < deadline",
    ],
)
def test_an_assertion_about_measured_time_is_found(body: str) -> None:
    assert assertions_of_time(f"def measured():\n    return time.monotonic()\n\ndef test():\n    {body}\n")


@pytest.mark.parametrize(
    "body",
    [
        "began = time.monotonic()\n    assert run()",
        "until(holds, 'it')\n    assert clock.now() == 3",
        "assert found.seconds == 18.0",
        "assert found.seconds > 0",
        "assert first.seconds + second.seconds <= whole.seconds",
    ],
)
def test_other_assertions_are_not(body: str) -> None:
    source = f"def other():\n    run = time.monotonic()\n    assert True\n\ndef test():\n    {body}\n"
    assert not assertions_of_time(source) and not asserted_seconds(source)


@pytest.mark.parametrize(
    "body",
    ["assert 15 <= found.seconds < 25", "assert save.pause_seconds > 0.1", "assert slow.seconds > 4 * fast.seconds"],
)
def test_a_bound_on_measured_seconds_is_found(body: str) -> None:
    assert asserted_seconds(body)
