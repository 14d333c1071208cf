"""Between Hugging Face's `config.json` and `DecoderConfig`.

Refuses, by name, every setting that would change the numbers and is not computed here (another activation, a sliding
window, dropout, a quantised checkpoint, ...); ignores what does not change them. What is peculiar to a family stands in
`families.py`; a decoder that no family's file can describe is not written. Reads both spellings of the rotary settings:
`rope_theta` with `rope_scaling` (published checkpoints) and `rope_parameters` (transformers 5). Writes the first, which
every reader knows.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from beringia.errors import ModelError
from beringia.model.config import DecoderConfig, RopeConfig
from beringia.model.families import FAMILIES, Family, same

# Settings with one value that is computed here; a file that lacks the key means that value.
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "quantization_config": None,
    "mtp_hidden_states_first": False,
    "residual_dropout": 0.0,
}
COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "initializer_range",
    "max_position_embeddings",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
DRAFTS = "num_nextn_predict_layers"
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
# Fields that are read from more than their own key.
DERIVED = ("num_key_value_heads", "head_dim", "output_bias", "rope")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def config_from_document(document: dict[str, Any]) -> DecoderConfig:
    """The config that a parsed `config.json` states. Raises ModelError naming what is not computed here."""
    family = _family(document)
    _refuse_unsupported(document, {**FIXED, **family.fixed})
    document = _spelled({key: value for key, value in document.items() if value is not None}, family)
    keys = {**same(*COMMON, *TOKENS), **family.keys}
    values = {name: document[key] for key, name in keys.items() if key in document}
    _require(values, keys, family)
    values["num_key_value_heads"] = document.get("num_key_value_heads") or values["num_attention_heads"]
    values["head_dim"] = _head_dim(values)
    values["rope"] = _read_rope(document)
    # One key says both, unless the family's flags do.
    values["output_bias"] = values.get("attention_bias", False)
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = tuple(values["eos_token_id"])
    if family.drafts:
        values[DRAFTS] = document.get(DRAFTS, 0)
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
        "rope_scaling": _write_rope(config.rope),
        **family.written,
    }
    if isinstance(config.eos_token_id, tuple):
        document["eos_token_id"] = list(config.eos_token_id)
    if family.drafts:
        document[DRAFTS] = config.num_nextn_predict_layers
    return document


def _family(document: dict[str, Any]) -> Family:
    name, known = document.get("model_type"), {family.model_type: family for family in FAMILIES}
    if name is None:
        raise ModelError(f"The config has no model_type; give the config.json of a model of {', '.join(known)}.")
    if name not in known:
        raise ModelError(f"Models of type {name!r} are not supported; supported are {', '.join(known)}.")
    return known[name]


def _spelled(document: dict[str, Any], family: Family) -> dict[str, Any]:
    """The document with what it is silent about, and under one name each."""
    respelled = {name: document[other] for other, name in family.spellings.items() if other in document}
    return {**family.silent, **respelled, **document}


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
    said = {*COMMON, *TOKENS, *DERIVED, *family.keys.values()} - set(family.fixed) | (
        {DRAFTS} if family.drafts else set()
    )
    read = {each.name: each.default for each in fields(DecoderConfig) if each.name not in said}
    read |= {"output_bias": config.attention_bias, **family.flags}
    refused = [name for name in SIZES if name in family.keys.values() and getattr(config, name) < 1]
    return [name for name, value in read.items() if getattr(config, name) != value] + refused


def _refuse_unsupported(document: dict[str, Any], fixed: dict[str, Any]) -> None:
    for name, value in fixed.items():
        found = document.get(name)
        if found is None or found == value:
            continue
        if name == "quantization_config":
            raise ModelError(
                "The checkpoint is quantised (quantization_config); convert it to bfloat16 or float32 first."
            )
        raise ModelError(f"The config sets {name} to {found!r}; only {value!r} is supported.")


def _require(values: dict[str, Any], keys: dict[str, str], family: Family) -> None:
    sizes = {name: key for key, name in keys.items() if name in SIZES}
    missing = [key for name, key in sizes.items() if name not in values]
    if missing:
        raise ModelError(f"The config of this {family.model_type} model lacks {', '.join(missing)}.")
    wrong = [name for name in sizes if type(values[name]) is not int or values[name] < 1]
    if wrong:
        raise ModelError(f"The config sets {sizes[wrong[0]]} to {values[wrong[0]]!r}; a positive integer is needed.")


def _head_dim(values: dict[str, Any]) -> int:
    if "qk_rope_head_dim" in values:
        return int(values["qk_rope_head_dim"])
    return int(values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"])


def _read_rope(document: dict[str, Any]) -> RopeConfig:
    settings = dict(document.get("rope_parameters") or document.get("rope_scaling") or {})
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    if kind not in ROPE_KINDS:
        raise ModelError(f"The config asks for rotary scaling {kind!r}; supported are {', '.join(ROPE_KINDS)}.")
    if settings.pop("partial_rotary_factor", document.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("The config sets partial_rotary_factor; only whole heads are rotated here.")
    theta = settings.pop("rope_theta", document.get("rope_theta", 10000.0))
    known = {f.name for f in fields(RopeConfig)} - {"kind", "theta"}
    unknown = set(settings) - known
    if unknown:
        raise ModelError(f"The rotary settings have {', '.join(sorted(unknown))}, which is not supported.")
    values = {name: value for name, value in settings.items() if value is not None}
    if kind != "default":
        values.setdefault("original_max_position_embeddings", document.get("max_position_embeddings", 4096))
    if kind == "yarn" and "factor" not in values:
        context = document.get("max_position_embeddings", 4096)
        values["factor"] = context / values["original_max_position_embeddings"]
    return RopeConfig(theta=float(theta), kind=kind, **values)


def _write_rope(rope: RopeConfig) -> dict[str, Any] | None:
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
