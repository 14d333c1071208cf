"""What becomes of each key of a `config.json`: read, of one value, or without effect.

Together with the families' own statements this is every key that transformers 5 has for them (a test goes through its
classes). A key of one value is refused with any other; a harmless one changes nothing that is computed here, and
nothing in transformers' logits either. What stands in none of the tables is not known here, and is told.
"""

from __future__ import annotations

import json
from typing import Any

from beringia.errors import ModelError
from beringia.model import hugging_face_rope as rotary
from beringia.model.families import FAMILIES, Family

# Settings with one value that is computed here; a file that lacks the key means that value.
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "use_sliding_window": False,
    "attention_chunk_size": None,
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "use_bidirectional_attention": False,
    "mtp_hidden_states_first": False,
    "per_layer_config": None,
    "kv_sharing_modes": None,
    "logits_mup_width_multiplier": None,
    "unpadded_vocab_size": None,
    "fusion_config": None,
    "transformers_weights": None,
    "pruned_heads": None,
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
QUANTIZATION = "quantization_config"
ATTENTION_KINDS = "layer_types"
FULL_ATTENTION = "full_attention"

# Read, but not as they stand: from more than one key, or compared with others.
_DERIVED = (
    "model_type",
    "num_key_value_heads",
    "head_dim",
    "qk_head_dim",
    "sliding_window",
    ATTENTION_KINDS,
    QUANTIZATION,
    *rotary.KEYS,
)
# How transformers' generate draws and searches. It does not read them here either.
_GENERATION = (
    "max_length",
    "min_length",
    "do_sample",
    "use_cache",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "num_return_sequences",
    "output_scores",
    "return_dict_in_generate",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "epsilon_cutoff",
    "eta_cutoff",
    "encoder_repetition_penalty",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "cache_implementation",
)
# What else a program wants to know that holds, labels or trains a model.
_BESIDE = (
    "architectures",
    "auto_map",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "name_or_path",
    "_name_or_path",
    "_commit_hash",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "output_attentions",
    "_output_attentions",
    "output_hidden_states",
    "tie_last_hidden_states",
    "output_router_logits",
    "router_aux_loss_coef",
    "return_dict",
    "chunk_size_feed_forward",
    "gradient_checkpointing",
    "distributed_config",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "classifier_dropout",
    "token_classification_bias",
    "tokenizer_class",
    "processor_class",
    "sep_token_id",
    "decoder_start_token_id",
    "keys_to_ignore_at_inference",
    "task_specific_params",
    "finetuning_task",
    "prefix",
    "torchscript",
    "use_bfloat16",
    "is_decoder",
    "pretraining_tp",
    "max_window_layers",
    "ep_size",
    "aux_loss_alpha",
    "seq_aux",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
    "_post_init_done",
)
HARMLESS = frozenset((*_GENERATION, *_BESIDE))


def family_of(document: dict[str, Any]) -> Family:
    """The family that a parsed `config.json` names. Raises ModelError."""
    name, known = document.get("model_type"), {family.model_type: family for family in FAMILIES}
    if name is None:
        raise ModelError(f"The config has no model_type; give the config.json of a model of {', '.join(known)}.")
    if not isinstance(name, str) or name not in known:
        raise ModelError(f"Models of type {name!r} (model_type) are not supported; supported are {', '.join(known)}.")
    return known[name]


def read_keys(family: Family) -> frozenset[str]:
    """Keys that say something about what is computed."""
    drafts = {DRAFTS} if family.drafts else set()
    return frozenset({*COMMON, *TOKENS, *_DERIVED, *family.keys, *family.spellings} | drafts)


def fixed_keys(family: Family) -> dict[str, Any]:
    """Keys with one value that is computed here."""
    return {**FIXED, **family.fixed}


def unknown_keys(document: dict[str, Any]) -> list[str]:
    """Keys of which nothing is known here, and which therefore are not read."""
    family = family_of(document)
    return sorted(document.keys() - read_keys(family) - fixed_keys(family).keys() - HARMLESS)


def refuse_other_values(document: dict[str, Any], family: Family) -> None:
    """Raise ModelError naming a key of one value that has another."""
    for name, value in fixed_keys(family).items():
        found = document.get(name, value)
        both_mean_no = not found and not value
        if found == value or both_mean_no or (name, found) == ("hidden_act", "swish"):  # another name of silu
            continue
        raise ModelError(f"The config sets {name} to {json.dumps(found):.60}; only {json.dumps(value)} is supported.")
    _refuse_windows(document, family)


def _refuse_windows(document: dict[str, Any], family: Family) -> None:
    """All layers see all earlier positions; families without the switch `use_sliding_window` read the width alone."""
    window, kinds = document.get("sliding_window"), document.get(ATTENTION_KINDS)
    if window is not None and not family.window_switch:
        raise ModelError(f"The config sets sliding_window to {window!r:.60}; only null is supported.")
    whole = [FULL_ATTENTION] * _count(document.get("num_hidden_layers"))
    if kinds is not None and kinds != whole:
        raise ModelError(
            f"The config sets {ATTENTION_KINDS} to {kinds!r:.60}; only {FULL_ATTENTION!r} for each of its "
            f"{len(whole)} layers is supported."
        )


def _count(layers: object) -> int:
    return layers if type(layers) is int and 0 < layers < 1 << 20 else 0
