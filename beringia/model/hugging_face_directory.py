"""What a directory in Hugging Face form says of its model, as far as its files bear it out.

Beside `config.json` it reads `generation_config.json` for the end tokens, as transformers' `generate` does, and the
names and dtypes of the tensors. Reads no weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from beringia.checkpoint.reader import TensorReader, open_hugging_face
from beringia.errors import ModelError
from beringia.model.config import DecoderConfig
from beringia.model.filling import is_readable
from beringia.model.hugging_face_config import config_from_document, end_tokens
from beringia.model.hugging_face_keys import DRAFTS, QUANTIZATION, unknown_keys
from beringia.model.hugging_face_names import multi_token_names, multi_token_prefix
from beringia.records.given_files import is_there, json_object, why_no_directory, why_no_model

# Tables that old checkpoints carry and every reader computes itself.
_RECOMPUTED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_SCALE = re.compile(
    r"(_scale|_scale_inv|_scale_2|\.scales|\.biases|\.qweight|\.qzeros|\.g_idx|\.absmax|_packed|_blocks)$"
)
# What only a multi-token layer has.
_MULTI_TOKEN = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "shared_head.head.weight")


@dataclass(frozen=True)
class Held:
    """A model as its directory holds it."""

    config: DecoderConfig
    left_out: frozenset[str]
    """Tensors that are there and not read."""
    notes: tuple[str, ...]
    """One sentence for each thing that its config says and the model here does not."""


def read_config(directory: Path) -> DecoderConfig:
    """The configuration that a directory states, whatever its weights are. Raises ModelError."""
    return _with_end_tokens(config_from_document(read_document(directory)), directory)


def read_document(directory: Path) -> dict[str, Any]:
    """The parsed `config.json`. Raises ModelError."""
    path = directory / "config.json"
    wrong = why_no_directory(str(directory))
    if wrong is not None:
        raise ModelError(wrong)
    if not is_there(path):
        otherwise = f"{directory} has no config.json; give a directory in Hugging Face form."
        raise ModelError(why_no_model(directory) or otherwise)
    return json_object(path, ModelError)


def open_directory(directory: Path) -> TensorReader:
    """The tensors of a directory with a config. Raises ModelError."""
    document = read_document(directory)
    document.pop(QUANTIZATION, None)  # what the files hold says whether it is true
    config_from_document(document)  # its faults are told first: weights without a config that we know are no model
    return open_hugging_face(directory)


def read_held(reader: TensorReader) -> Held:
    """What the open directory's config says, less what its files do not hold. Raises ModelError."""
    document = read_document(reader.place)
    notes = _unknown(document)
    quantised = document.pop(QUANTIZATION, None)
    if quantised:
        notes += _stale(quantised, reader)
    config = _with_end_tokens(config_from_document(document), reader.place)
    _refuse_more_than_is_there(config, reader)
    config, unread, told = _with_whole_drafts(config, reader)
    recomputed = {name for name in reader.tensors if _RECOMPUTED.search(name)}
    return Held(config, frozenset(unread | recomputed), tuple(notes + told))


def is_scale(name: str) -> bool:
    """Whether a tensor is called as those that belong to quantised ones are."""
    return _SCALE.search(name) is not None


def _unknown(document: dict[str, Any]) -> list[str]:
    unknown = unknown_keys(document)
    return [f"its config sets {', '.join(unknown)}, of which nothing is known here: not read."] if unknown else []


def _stale(quantised: object, reader: TensorReader) -> list[str]:
    """That the weights are what a converter left beside the old config. Raises ModelError where they are quantised."""
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    for name, stored in reader.tensors.items():
        if is_scale(name) or not is_readable(stored.dtype):
            raise ModelError(
                f"{reader.place} is quantised, as its config says ({QUANTIZATION}, {method!r:.40}): {name} is stored "
                f"as {stored.dtype}. Convert it to bfloat16 or float32 first."
            )
    return [
        f"its config calls it quantised ({QUANTIZATION}, {method!r:.40}), and no tensor in its files is: read as "
        "unquantised. Remove that key."
    ]


def _refuse_more_than_is_there(config: DecoderConfig, reader: TensorReader) -> None:
    """Before a model of that many parts is laid out, which for a slip of the pen takes for ever."""
    for key in ("num_hidden_layers", "n_routed_experts"):
        if getattr(config, key) > len(reader.tensors):
            raise ModelError(
                f"The config sets {key} to {getattr(config, key)}; {reader.place} holds {len(reader.tensors)} tensors."
            )


def _with_end_tokens(config: DecoderConfig, directory: Path) -> DecoderConfig:
    """Those of `generation_config.json` where it stands; it goes before `config.json`."""
    path = directory / "generation_config.json"
    if not is_there(path):
        return config
    document = json_object(path, ModelError)
    if "eos_token_id" not in document:
        return config
    return replace(config, eos_token_id=end_tokens(document["eos_token_id"], str(path)))


def _with_whole_drafts(config: DecoderConfig, reader: TensorReader) -> tuple[DecoderConfig, set[str], list[str]]:
    """Without a multi-token layer that is not whole: the config, the tensors of it that are there, and a sentence."""
    prefix = multi_token_prefix(config)
    found = {name for name in reader.tensors if name.startswith(prefix)}
    without = replace(config, num_nextn_predict_layers=0)
    if not config.num_nextn_predict_layers:
        if not any(name.removeprefix(prefix) in _MULTI_TOKEN for name in found):
            return config, set(), []
        return config, found, [f"its files hold a multi-token layer and its config says {DRAFTS} = 0: left out."]
    if not found:
        return without, set(), []  # transformers drops the layer when it saves, and announces it all the same
    missing = sorted(multi_token_names(config) - found)
    if not missing:
        return config, set(), []
    return without, found, [f"its multi-token layer lacks {missing[0]} ({len(missing)} tensors in all): left out."]
