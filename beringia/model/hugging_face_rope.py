"""Between the rotary settings of a `config.json` and `RopeConfig`.

Reads both spellings: `rope_theta` with `rope_scaling` (published checkpoints) and `rope_parameters` (transformers 5);
where both stand, `rope_scaling` counts, as in transformers, unless something would be lost. Nothing is filled in that
transformers does not fill in. Writes the first spelling, which every reader knows.
"""

from __future__ import annotations

import math
from typing import Any

from beringia.errors import ModelError
from beringia.model.config import RopeConfig

KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
"""Of a `config.json`, all that is read here."""

_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
            "truncate",
        ),
    ),
}
"""Kinds of scaling: the settings that each must have, and those that it may have."""

_NULL: dict[str, Any] = {
    "factor": None,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.0,
    "mscale_all_dim": 0.0,
    "attention_factor": None,
    "truncate": False,
}
"""What null is to transformers' yarn."""

_ZERO_IS_NULL = ("beta_fast", "beta_slow")
_POSITIVE = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
_DEFAULT_THETA = 10000.0
_HARMLESS = ("finetuned",)  # published YaRN checkpoints say so of themselves


def read_rope(document: dict[str, Any], max_position_embeddings: int) -> RopeConfig:
    """The rotary settings of a parsed `config.json`. Raises ModelError naming the key that is wrong."""
    key, settings = _chosen(document)
    kind = _kind(key, settings)
    theta = _theta(document, key, settings)
    _refuse_partial(document, key, settings)
    values = {name: value for name, value in settings.items() if name not in _HARMLESS}
    for name in ("type", "rope_type", "rope_theta", "partial_rotary_factor"):
        values.pop(name, None)
    _check_names(key, kind, values)
    if kind in ("llama3", "yarn"):
        original = values.get("original_max_position_embeddings", max_position_embeddings)
        # transformers prefers what stands outside (as Phi-3 has it).
        values["original_max_position_embeddings"] = document.get("original_max_position_embeddings", original)
    values = _checked(key, kind, values)
    if kind == "yarn" and values["factor"] is None:
        values["factor"] = max_position_embeddings / values["original_max_position_embeddings"]
    return RopeConfig(theta=theta, kind=kind, **values)  # type: ignore[arg-type]


def write_rope(rope: RopeConfig) -> dict[str, Any] | None:
    """The value of `rope_scaling`."""
    if rope.kind == "default":
        return None
    names = {
        "linear": ["factor"],
        "llama3": ["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"],
        "yarn": ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow"],
    }[rope.kind]
    optional = {"mscale": 0.0, "mscale_all_dim": 0.0, "attention_factor": None, "truncate": True}
    if rope.kind == "yarn":
        names += [name for name, default in optional.items() if getattr(rope, name) != default]
    # Old readers know `type`, new ones `rope_type`.
    return {"type": rope.kind, "rope_type": rope.kind, **{name: getattr(rope, name) for name in names}}


def _chosen(document: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The key whose settings count, and they."""
    tables = {name: _table(document, name) for name in ("rope_scaling", "rope_parameters")}
    old, new = tables["rope_scaling"], tables["rope_parameters"]
    if not old:
        return "rope_parameters" if new else "rope_scaling", new
    if new:
        _refuse_loss(document, old, new)
    return "rope_scaling", old


def _table(document: dict[str, Any], name: str) -> dict[str, Any]:
    table = document.get(name)
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise ModelError(f"The config sets {name} to {table!r:.60}; a table of settings, or null, is needed.")
    return table


def _refuse_loss(document: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> None:
    """Both spellings: the new one may say nothing that is not said without it."""
    said = {"rope_theta": document.get("rope_theta", _DEFAULT_THETA), "rope_type": _kind("rope_scaling", old), **old}
    lost = [
        name for name, value in new.items() if said.get(name) != value and (name, value) != ("rope_type", "default")
    ]
    if lost:
        raise ModelError(
            f"The config has rope_scaling beside rope_parameters, and they differ in {', '.join(lost)}: put what is "
            "meant into rope_parameters, and remove rope_scaling."
        )


def _kind(key: str, settings: dict[str, Any]) -> str:
    named = [settings[name] for name in ("rope_type", "type") if name in settings]
    kind = named[0] if named else "default"
    if any(other != kind for other in named):
        raise ModelError(
            f"The config's {key} has rope_type {kind!r} and type {named[1]!r}: keep the one that is meant."
        )
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ModelError(f"The config's {key} asks for rotary scaling {kind!r}; supported are {', '.join(_KINDS)}.")
    return kind


def _theta(document: dict[str, Any], key: str, settings: dict[str, Any]) -> float:
    places = {"rope_theta": document, f"{key}.rope_theta": settings}
    said = {place: table["rope_theta"] for place, table in places.items() if "rope_theta" in table}
    for place, theta in said.items():
        if not _is_number(theta) or theta <= 1:
            raise ModelError(f"The config sets {place} to {theta!r}; a number above 1 is needed.")
    if len(set(said.values())) > 1:
        told = " and ".join(f"{place} to {theta!r}" for place, theta in said.items())
        raise ModelError(f"The config sets {told}: keep the one that is meant.")
    return float(next(iter(said.values()), _DEFAULT_THETA))


def _refuse_partial(document: dict[str, Any], key: str, settings: dict[str, Any]) -> None:
    for place, table in {"": document, f"{key}.": settings}.items():
        share = table.get("partial_rotary_factor")
        if share is not None and share != 1.0:
            raise ModelError(
                f"The config sets {place}partial_rotary_factor to {share!r}; only whole heads are rotated here."
            )


def _check_names(key: str, kind: str, values: dict[str, Any]) -> None:
    needed, allowed = _KINDS[kind]
    foreign = sorted(values.keys() - {*needed, *allowed})
    if foreign:
        raise ModelError(
            f"The config's {key} has {', '.join(foreign)}, which rotary scaling {kind!r} does not use: remove it, or "
            "name the kind of scaling that is meant (rope_type)."
        )
    missing = [name for name in needed if name not in values]
    if missing:
        raise ModelError(f"The config's {key} lacks {', '.join(missing)}, which rotary scaling {kind!r} needs.")


def _checked(key: str, kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values in the form of `RopeConfig`."""
    checked = {name: _value(key, kind, name, value) for name, value in values.items()}
    if kind == "llama3" and checked["high_freq_factor"] <= checked["low_freq_factor"]:
        raise ModelError(f"The config's {key} has a high_freq_factor that is not above its low_freq_factor.")
    return checked


def _value(key: str, kind: str, name: str, value: object) -> Any:
    if kind == "yarn" and name in _NULL and (value is None or (value == 0 and name in _ZERO_IS_NULL)):
        return _NULL[name]
    if name == "truncate":
        fits = isinstance(value, bool)
    elif name == "original_max_position_embeddings":
        fits = type(value) is int and value > 0
    else:
        fits = _is_number(value) and (value > 0 or name not in _POSITIVE)  # type: ignore[operator]
    if not fits:
        raise ModelError(f"The config sets {key}.{name} to {value!r:.60}, which cannot be.")
    return float(value) if type(value) is int and name != "original_max_position_embeddings" else value


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
