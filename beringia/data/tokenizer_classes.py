"""Tokenizer classes of transformers 5 that take vocabulary and merges from `tokenizer.json` and make up the rest.

Whatever else `tokenizer.json` says, they cut text and normalise it in their own way; the classes here are those that
directories of our families name. `tokenizer_directory.py` reads the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_OF_TEXT = "<|endoftext|>"
_SPACE = "\u2581"

Document = dict[str, Any]
Rebuild = Callable[[Backend, Document, Document], Backend]
"""Makes a backend of the one that `tokenizer.json` describes, given that file and `tokenizer_config.json`, parsed."""


def _keep(backend: Backend, document: Document, configuration: Document) -> Backend:
    """All is as `tokenizer.json` says."""
    return backend


def _as_qwen2(backend: Backend, document: Document, configuration: Document) -> Backend:
    made = _anew(backend, _model(document, continuing_subword_prefix="", end_of_word_suffix=""))
    made.decoder = decoders.ByteLevel()
    made.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated", invert=False)
    space = bool(configuration.get("add_prefix_space"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)]
    )
    return made


def _as_gpt2(backend: Backend, document: Document, configuration: Document) -> Backend:
    made = _anew(backend, _model(document, continuing_subword_prefix="", end_of_word_suffix=""))
    made.decoder = decoders.ByteLevel()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(configuration.get("add_prefix_space")))
    return made


def _as_llama(backend: Backend, document: Document, configuration: Document) -> Backend:
    space = configuration.get("add_prefix_space")
    prefixed = True if space is None else bool(space)
    scheme = "never" if not prefixed else "always" if configuration.get("legacy", False) else "first"
    made = _anew(backend, _model(document, fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefixed else []
    made.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def _anew(backend: Backend, model: models.BPE) -> Backend:
    """Without added tokens, which get their numbers anew."""
    made = Backend(model)
    made.post_processor = backend.post_processor
    return made


def _model(document: dict[str, Any], **settings: Any) -> models.BPE:
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in document["model"]["merges"]]
    pairs = [(first, second) for first, second in merges]
    return models.BPE(vocab=document["model"]["vocab"], merges=pairs, **settings)


@dataclass(frozen=True)
class TokenizerClass:
    """How a class of transformers makes its tokenizer."""

    rebuild: Rebuild = _keep
    specials: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by role where the files name none."""
    plain_specials: bool = False
    """What the files say of special tokens beside their content is dropped."""


_AS_WRITTEN = TokenizerClass()
_CLASSES = {
    "Qwen2Tokenizer": TokenizerClass(
        _as_qwen2, dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END_OF_TEXT), plain_specials=True
    ),
    "GPT2Tokenizer": TokenizerClass(_as_gpt2, dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END_OF_TEXT)),
    "LlamaTokenizer": TokenizerClass(_as_llama, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}),
}
_OF_MODEL_TYPE = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer"}
"""What transformers takes where the files name no class."""

_WHATEVER_IS_NAMED = ("qwen2",)
"""Model types whose files are known to name wrong ones."""


def class_of(document: dict[str, Any], configuration: dict[str, Any], model: dict[str, Any]) -> TokenizerClass:
    """The class that transformers' AutoTokenizer takes, by the three files of a directory, parsed."""
    kind = document.get("model")
    if not isinstance(kind, dict) or kind.get("type") != "BPE" or not {"vocab", "merges"} <= kind.keys():
        return _AS_WRITTEN
    named = configuration.get("tokenizer_class") or model.get("tokenizer_class")
    named = named.removesuffix("Fast") if isinstance(named, str) else None
    model_type = model.get("model_type")
    own = _OF_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    if named == "LlamaTokenizer" and model_type not in _WHATEVER_IS_NAMED and _mentions_bytes(document):
        return _AS_WRITTEN
    if own is not None and (named is None or model_type in _WHATEVER_IS_NAMED):
        named = own
    return _CLASSES.get(named or "", _AS_WRITTEN)


def _mentions_bytes(document: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps(document, ensure_ascii=False)
