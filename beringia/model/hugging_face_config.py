"""Between Hugging Face's `config.json` and `DecoderConfig`.

Refuses, by name, every setting that would change the numbers and is not computed here (another activation, a sliding
window, dropout, attention that is not causal, ...); what becomes of each key stands in `hugging_face_keys.py`, rotary
settings in `hugging_face_rope.py`, what is peculiar to a family in `families.py`. A value that is missing is what
transformers takes it for, or refused. A decoder that no family's file can describe is not written.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from beringia.errors import ModelError
from beringia.model.config import DecoderConfig
from beringia.model.families import FAMILIES, Family, same
from beringia.model.hugging_face_keys import COMMON, DRAFTS, QUANTIZATION, TOKENS, family_of, refuse_other_values
from beringia.model.hugging_face_rope import read_rope, write_rope

# Fields whose keys, where a family has them, must be there and positive.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
)
# Further ones that must be positive where they are there.
_POSITIVE = ("num_key_value_heads", "head_dim", "max_position_embeddings", "q_lora_rank", "n_group", "topk_group")
_LARGEST = 2**31 - 1
# Fields for which null says as little as no key.
_NULLABLE = (*SIZES, "num_key_value_heads", "head_dim")
# Fields that are read from more than their own key.
_DERIVED = ("num_key_value_heads", "head_dim", "output_bias", "rope")
_ANNOTATIONS = {field.name: str(field.type) for field in fields(DecoderConfig)}


def config_from_document(document: object) -> DecoderConfig:
    """The config that a parsed `config.json` states. Raises ModelError naming what is not computed here."""
    if not isinstance(document, dict):
        raise ModelError(f"The config is no JSON object but {document!r:.40}.")
    family = family_of(document)
    if document.get(QUANTIZATION):
        raise ModelError(f"The config says that the checkpoint is quantised ({QUANTIZATION}); convert it first.")
    refuse_other_values(document, family)
    keys = {**same(*COMMON, *TOKENS, "num_key_value_heads"), **family.keys} | (same(DRAFTS) if family.drafts else {})
    document = {**family.silent, **_one_name_each(document, family)}
    document = {key: value for key, value in document.items() if value is not None or keys.get(key) not in _NULLABLE}
    _require(document, keys, family)
    values = {name: _value(document, key, name, family) for key, name in keys.items() if key in document}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    values["head_dim"] = _head_dim(document, values)
    values["rope"] = read_rope(document, values.get("max_position_embeddings", DecoderConfig.max_position_embeddings))
    # One key says both, unless the family's flags do.
    values["output_bias"] = values.get("attention_bias", False)
    return DecoderConfig(**{**values, **family.flags})


def document_of(config: DecoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` that transformers and vLLM read; `dtype` is the one the weights are stored in.

    Raises ModelError where no family has such a decoder.
    """
    family = _family_of(config)
    keys = {**same(*COMMON, *TOKENS, "num_key_value_heads"), **family.keys}
    document: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        **{key: getattr(config, name) for key, name in keys.items()},
        "rope_theta": config.rope.theta,
        "rope_scaling": write_rope(config.rope),
        **family.written,
    }
    if isinstance(config.eos_token_id, tuple):
        document["eos_token_id"] = list(config.eos_token_id)
    if family.drafts:
        document[DRAFTS] = config.num_nextn_predict_layers
    return document


def end_tokens(value: object, place: str) -> int | tuple[int, ...] | None:
    """The value of an `eos_token_id`. Raises ModelError."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        return tuple(value)
    raise ModelError(f"{place} sets eos_token_id to {value!r:.60}; a token's number, or a list of them, is needed.")


def _one_name_each(document: dict[str, Any], family: Family) -> dict[str, Any]:
    """The document with each setting under one name."""
    document = dict(document)
    for other, name in family.spellings.items():
        if other not in document:
            continue
        value = document.pop(other)
        if document.setdefault(name, value) != value:
            raise ModelError(
                f"The config sets {name} to {document[name]!r} and {other} to {value!r}: keep one of them."
            )
    return document


def _family_of(config: DecoderConfig) -> Family:
    """The one whose file says everything that the config does."""
    closest = min(FAMILIES, key=lambda family: len(_unsaid(config, family)))
    unsaid = _unsaid(config, closest)
    if unsaid:
        raise ModelError(
            f"No family has this decoder: the config.json of {closest.model_type}, the closest, cannot say "
            f"{', '.join(f'{name} = {getattr(config, name)!r}' for name in unsaid)}."
        )
    return closest


def _unsaid(config: DecoderConfig, family: Family) -> list[str]:
    """Fields with another value than would be read from this family's file."""
    said = {*COMMON, *TOKENS, *_DERIVED, *family.keys.values()} - set(family.fixed) | (
        {DRAFTS} if family.drafts else set()
    )
    read = {each.name: each.default for each in fields(DecoderConfig) if each.name not in said}
    read |= {"output_bias": config.attention_bias, **family.flags}
    refused = [name for name in SIZES if name in family.keys.values() and getattr(config, name) < 1]
    return [name for name, value in read.items() if getattr(config, name) != value] + refused


def _value(document: dict[str, Any], key: str, name: str, family: Family) -> Any:
    """What a key says, in the form of the field. Raises ModelError."""
    value = document[key]
    if name == "eos_token_id":
        return end_tokens(value, "The config")
    if value is None and key in family.null:
        return family.null[key]
    kind = _ANNOTATIONS[name]
    if not _fits(value, kind):
        raise ModelError(f"The config sets {key} to {value!r:.60}; {_NEEDED[kind.split(' ')[0]]} is needed.")
    if type(value) is int and name in (*SIZES, *_POSITIVE) and not 1 <= value <= _LARGEST:
        raise ModelError(f"The config sets {key} to {value!r:.60}; a positive integer is needed.")
    return value


_NEEDED = {"int": "an integer", "float": "a number", "bool": "true or false"}


def _fits(value: object, kind: str) -> bool:
    if value is None:
        return "None" in kind
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "float":
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    return type(value) is int


def _require(document: dict[str, Any], keys: dict[str, str], family: Family) -> None:
    missing = [key for key, name in keys.items() if name in SIZES and key not in document]
    if missing:
        raise ModelError(f"The config of this {family.model_type} model lacks {', '.join(missing)}.")


def _head_dim(document: dict[str, Any], values: dict[str, Any]) -> int:
    if "qk_rope_head_dim" not in values:
        return int(values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"])
    # What transformers writes beside, and rotates by.
    rotated = int(values["qk_rope_head_dim"])
    widths = {"head_dim": rotated, "qk_head_dim": rotated + int(values["qk_nope_head_dim"])}
    for key, width in widths.items():
        if document.get(key, width) != width:
            raise ModelError(f"The config sets {key} to {document[key]!r:.60}; its other widths make it {width}.")
    return rotated
