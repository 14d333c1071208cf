"""How large the package's files and functions are, in the figures of the house style: so that drift is seen.

python benchmarks/size.py [--json]
"""

from __future__ import annotations

import ast
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def measure(package: Path, tests: Path) -> dict[str, object]:
    """Lines of files and functions, shares of long, annotated and documented functions, test lines a package line."""
    files = sorted(package.rglob("*.py"))
    lengths = [len(path.read_text().splitlines()) for path in files]
    functions = [
        node
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    sizes = sorted((node.end_lineno or node.lineno) - node.lineno + 1 for node in functions)
    test_lines = sum(len(path.read_text().splitlines()) for path in tests.rglob("*.py"))
    return {
        "files": len(files),
        "lines": sum(lengths),
        "file_median": statistics.median(lengths),
        "file_max": max(lengths),
        "function_median": statistics.median(sizes),
        "function_p90": sizes[int(0.9 * len(sizes))],
        "function_max": sizes[-1],
        "over_50": round(sum(size > 50 for size in sizes) / len(sizes), 4),
        "documented": round(sum(ast.get_docstring(node) is not None for node in functions) / len(functions), 3),
        "tests_per_line": round(test_lines / sum(lengths), 2),
    }


if __name__ == "__main__":
    print(json.dumps(measure(ROOT / "beringia", ROOT / "tests"), indent=None if "--json" in sys.argv else 2))
