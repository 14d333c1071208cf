"""The guard's checks, one file each, found by being here."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from beringia.train.guard.check import Check


def all_checks() -> list[type[Check[Any]]]:
    """Every check that has a file here, in the order of their accounts."""
    modules = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    checks = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Check) and value.__module__ == module.__name__
    ]
    return sorted(checks, key=lambda check: (check.when.order, check.name))
