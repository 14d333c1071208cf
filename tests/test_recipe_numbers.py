"""Every number of a recipe is one that what reads it can use: others are refused by key, never met in the middle."""

from __future__ import annotations

import math
from typing import Any

import pytest
from small_runs import small_recipe

from beringia.errors import RecipeError
from beringia.records.recipe import parse_recipe


def float_keys() -> list[str]:
    """Dotted keys of the small recipe's sections whose default is a number with a fraction."""
    recipe = parse_recipe(small_recipe(), "a recipe")
    document: dict[str, Any] = recipe.model_dump()
    return [
        f"{section}.{name}"
        for section, values in document.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if isinstance(value, float)
    ]


def with_value(key: str, value: Any) -> dict[str, Any]:
    section, _, name = key.partition(".")
    return small_recipe(**{section: {name: value}})


def test_there_are_such_keys() -> None:
    assert {"train.learning_rate", "train.clip", "guard.share", "supervise.hang_seconds"} <= set(float_keys())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", float_keys())
def test_what_is_no_finite_number_is_refused_by_its_key(key: str, value: float) -> None:
    with pytest.raises(RecipeError, match=key.replace(".", r"\.")):
        parse_recipe(with_value(key, value), "a recipe")


@pytest.mark.parametrize("betas", [[0.9, 1.0], [1.5, 0.9], [-0.1, 0.9], [0.9, math.nan]])
def test_betas_that_adamw_does_not_take_are_refused(betas: list[float]) -> None:
    with pytest.raises(RecipeError, match="train.betas"):
        parse_recipe(small_recipe(train={"betas": betas}), "a recipe")


def test_a_seed_is_one_that_generators_take() -> None:
    assert parse_recipe(small_recipe(seed=2**63 - 1), "a recipe").seed == 2**63 - 1
    with pytest.raises(RecipeError, match="seed"):
        parse_recipe(small_recipe(seed=2**63), "a recipe")
