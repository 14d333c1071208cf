"""Between Hugging Face's `config.json` and `DecoderConfig`.

Refuses, by name, every setting that would change the numbers and is not computed here (another activation, a sliding
window, dropout, a quantised checkpoint, ...); ignores what does not change them. Reads both spellings of the rotary
settings: `rope_theta` with `rope_scaling` (published checkpoints) and `rope_parameters` (transformers 5). Writes the
first, which every reader knows.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from beringia.errors import ModelError
from beringia.model.config import DecoderConfig, RopeConfig

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Settings with one value that is computed here; a file that lacks the key means that value.
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
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
DEEPSEEK = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_interleave",
    "first_k_dense_replace",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)
# What transformers assumes where a file is silent and our default is another (published files are never silent).
SILENT: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    "deepseek_v3": {"routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3},
}
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def config_from_document(document: dict[str, Any]) -> DecoderConfig:
    """The config that a parsed `config.json` states. Raises ModelError naming what is not computed here."""
    family = _family(document)
    _refuse_unsupported(document)
    document = {**SILENT[family], **{key: value for key, value in document.items() if value is not None}}
    wanted = COMMON + TOKENS + (DEEPSEEK if family == "deepseek_v3" else ())
    values = {name: document[name] for name in wanted if name in document}
    values["family"] = family
    _require(values, document, family)
    values["num_key_value_heads"] = document.get("num_key_value_heads") or values["num_attention_heads"]
    values["head_dim"] = _head_dim(document, family)
    values["rope"] = _read_rope(document)
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = tuple(values["eos_token_id"])
    if family == "deepseek_v3":
        values["num_nextn_predict_layers"] = _mtp_layers(document)
    _check_shapes(values)
    return DecoderConfig(**values)


def document_of(config: DecoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` that transformers and vLLM read; `dtype` is the one the weights are stored in."""
    names = COMMON + TOKENS + ("num_key_value_heads",) + (DEEPSEEK if config.latent else ("head_dim",))
    document: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        **{name: getattr(config, name) for name in names},
        "rope_theta": config.rope.theta,
        "rope_scaling": _write_rope(config.rope),
    }
    if isinstance(config.eos_token_id, tuple):
        document["eos_token_id"] = list(config.eos_token_id)
    if config.latent:
        # vLLM refuses to route without the first two; the others are what the published file says.
        document |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1}
        document["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    return document


def _family(document: dict[str, Any]) -> Any:
    family = document.get("model_type")
    if family is None:
        raise ModelError(
            "The config has no model_type; give the config.json of a deepseek_v3, llama, qwen2 or qwen3 model."
        )
    if family not in ARCHITECTURES:
        raise ModelError(f"Models of type {family!r} are not supported; supported are {', '.join(ARCHITECTURES)}.")
    return family


def _refuse_unsupported(document: dict[str, Any]) -> None:
    for name, value in FIXED.items():
        found = document.get(name)
        if found is None or found == value:
            continue
        if name == "quantization_config":
            raise ModelError(
                "The checkpoint is quantised (quantization_config); convert it to bfloat16 or float32 first."
            )
        raise ModelError(f"The config sets {name} to {found!r}; only {value!r} is supported.")


def _require(values: dict[str, Any], document: dict[str, Any], family: str) -> None:
    sizes = [
        f.name for f in fields(DecoderConfig) if f.name in COMMON and f.name.endswith(("_size", "layers", "heads"))
    ]
    if family == "deepseek_v3":
        sizes += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size"]
        sizes += ["n_routed_experts", "num_experts_per_tok"]
    missing = [name for name in sizes if name not in values]
    if missing:
        raise ModelError(f"The config of this {family} model lacks {', '.join(missing)}.")
    wrong = [name for name in sizes if type(values[name]) is not int or values[name] < 1]
    if wrong:
        raise ModelError(f"The config sets {wrong[0]} to {values[wrong[0]]!r}; a positive integer is needed.")


def _head_dim(document: dict[str, Any], family: str) -> int:
    if family == "deepseek_v3":
        return int(document["qk_rope_head_dim"])
    return int(document.get("head_dim") or document["hidden_size"] // document["num_attention_heads"])


def _mtp_layers(document: dict[str, Any]) -> int:
    layers = document.get("num_nextn_predict_layers", document.get("num_mtp_layers", 0))
    if layers not in (0, 1):
        raise ModelError(f"The config asks for {layers} multi-token prediction layers; 0 and 1 are supported.")
    return int(layers)


def _check_shapes(values: dict[str, Any]) -> None:
    heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
    if values["family"] == "deepseek_v3":
        if heads != groups:
            raise ModelError(f"Latent attention has as many key as query heads; the config has {groups} and {heads}.")
        _check_routing(values)
    elif heads % groups:
        raise ModelError(f"{heads} attention heads cannot share {groups} key-value heads evenly.")


def _check_routing(values: dict[str, Any]) -> None:
    experts, groups, kept = values["n_routed_experts"], values["n_group"], values["topk_group"]
    if values.get("n_shared_experts", 1) < 1:
        raise ModelError("The config sets n_shared_experts to 0; at least 1 is supported.")
    # A group is scored by its two best experts (DeepSeek-V3 section 2.1.2), so it needs two.
    if experts % groups or experts // groups < 2:
        raise ModelError(f"{experts} experts cannot form {groups} equal groups of at least two.")
    if not 1 <= kept <= groups or values["num_experts_per_tok"] > kept * (experts // groups):
        raise ModelError(f"{values['num_experts_per_tok']} experts a token do not fit into {kept} of {groups} groups.")


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
