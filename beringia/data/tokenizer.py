"""Tokenizers as Hugging Face directories (`tokenizer.json`, `tokenizer_config.json`), read with `tokenizers` alone.

Reading does not import transformers, which would cost a training worker seconds at every start; that AutoTokenizer
gives the same tokens is tested. Two kinds are written here: `digits` (54 symbols, for the checkable tasks) and `bytes`
(any text, one token a byte). Training a vocabulary is not done here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from beringia.data.alphabet import BEGIN, END, PAD, SPECIALS, TOKENS, UNKNOWN
from beringia.errors import DataError
from beringia.records.files import write_text
from beringia.records.recipe import DataSection, ModelSection
from beringia.records.record import canonical_hash

Kind = Literal["digits", "bytes"]
KINDS: tuple[Kind, ...] = ("digits", "bytes")

DIGITS_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""A question is followed by its answer and nothing else: the vocabulary has no symbols for roles."""

BYTES_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML."""

_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Tokenizer:
    """Text to tokens and back."""

    source: str
    """Directory or kind, for messages."""
    backend: Backend
    specials: dict[str, str]
    """Special tokens by role: `bos_token`, `eos_token`, `pad_token`, ...; roles without a token are absent."""
    chat_template: str | None
    """Jinja source, or None."""
    tool_template: str | None = None
    """The template for chats with tools, where it is another one."""

    @property
    def vocabulary_size(self) -> int:
        """One more than the greatest token."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def begin(self) -> int | None:
        """Token that opens a text, where there is one."""
        return self._token("bos_token")

    @property
    def end(self) -> int:
        """Token that ends a text. Raises DataError where the tokenizer names none."""
        token = self._token("eos_token")
        if token is None:
            raise DataError(f"The tokenizer of {self.source} names no end token: set eos_token in its configuration.")
        return token

    @property
    def pad(self) -> int:
        """Token that fills rows; the end token where the tokenizer names none (it never carries loss)."""
        token = self._token("pad_token")
        return self.end if token is None else token

    @cached_property
    def hash(self) -> str:
        """SHA-256 over what determines tokens: the serialized tokenizer, special tokens, template."""
        # Not the tool template: packed data of runs that never had a tool would become other data.
        return canonical_hash([json.loads(self.backend.to_str()), self.specials, self.chat_template])

    @cached_property
    def _literal(self) -> Backend:
        backend = Backend.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Tokens of a text; names of special tokens inside it become those tokens, as AutoTokenizer does."""
        tokens: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return tokens

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts in which special tokens are text like any other: a document cannot forge an end."""
        encodings = self._literal.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and for each token the characters (start, end) that it covers."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, tokens: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of tokens."""
        text: str = self.backend.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for: often a part of a character. Of a special token its name."""
        return self._bytes(token)

    @cached_property
    def _bytes(self) -> Callable[[int], bytes]:
        specials = {number for number, added in self.backend.get_added_tokens_decoder().items() if added.special}
        by_bytes = isinstance(self.backend.decoder, decoders.ByteLevel)
        bytes_by_symbol = {_byte_symbol(byte): byte for byte in range(256)}

        @functools.cache
        def of(token: int) -> bytes:
            name: str = self.backend.id_to_token(token) or ""
            if token in specials:
                return name.encode()
            if by_bytes and all(symbol in bytes_by_symbol for symbol in name):
                return bytes(bytes_by_symbol[symbol] for symbol in name)
            if re.fullmatch("<0x[0-9A-F]{2}>", name):  # SentencePiece's single bytes
                return bytes([int(name[3:5], 16)])
            return name.replace("\u2581", " ").encode()  # SentencePiece's space

        return of

    def _token(self, role: str) -> int | None:
        name = self.specials.get(role)
        if name is None:
            return None
        token: int | None = self.backend.token_to_id(name)
        if token is None:
            raise DataError(f"The tokenizer of {self.source} names {name!r} as its {role} but has no such token.")
        return token


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, or a built-in kind (`digits`, `bytes`). Raises DataError."""
    if source in KINDS:
        return _built_in(source)
    return _read(Path(source))


def write_tokenizer(kind: Kind, directory: Path) -> None:
    """Write a built-in tokenizer in the form that AutoTokenizer loads."""
    tokenizer = _built_in(kind)
    write_text(directory / "tokenizer.json", tokenizer.backend.to_str(pretty=True))
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1 << 20,
        "clean_up_tokenization_spaces": False,
        **tokenizer.specials,
        "chat_template": tokenizer.chat_template,
    }
    write_text(directory / "tokenizer_config.json", json.dumps(configuration, indent=2) + "\n")
    write_text(directory / "special_tokens_map.json", json.dumps(tokenizer.specials, indent=2) + "\n")


def choose_tokenizer(data: DataSection, model: ModelSection) -> Tokenizer:
    """The tokenizer a recipe means: the one it names, else the task's, else the model's own. Raises DataError."""
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    if data.task is not None:
        return load_tokenizer("digits")
    if model.path is not None:
        return load_tokenizer(model.path)
    raise DataError(f"Model {model.preset} has no tokenizer for text: set data.tokenizer to 'bytes' or to a directory.")


def check_vocabulary(tokenizer: Tokenizer, vocabulary_size: int) -> None:
    """Raise DataError if the tokenizer has tokens that a model with this vocabulary cannot read."""
    if tokenizer.vocabulary_size > vocabulary_size:
        raise DataError(
            f"The tokenizer of {tokenizer.source} has {tokenizer.vocabulary_size} tokens, but the model's vocabulary "
            f"has only {vocabulary_size}: take the tokenizer that belongs to the model, or a larger vocabulary."
        )


def _built_in(kind: Kind) -> Tokenizer:
    specials = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
    if kind == "digits":
        return Tokenizer("digits", _digits_backend(), specials | {"unk_token": UNKNOWN}, DIGITS_TEMPLATE)
    return Tokenizer("bytes", _bytes_backend(), specials, BYTES_TEMPLATE)


def _digits_backend() -> Backend:
    backend = Backend(models.WordLevel(vocab=dict(TOKENS), unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return backend


def _bytes_backend() -> Backend:
    specials = (BEGIN, END, PAD, "<|im_start|>", "<|im_end|>")
    vocabulary = {name: number for number, name in enumerate((*specials, *map(_byte_symbol, range(256))))}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return backend


def _byte_symbol(byte: int) -> str:
    """The printable character that GPT-2's byte-level vocabularies use for a byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printable].index(byte))


def _read(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"There is no tokenizer.json in {directory}: give a Hugging Face directory that has one, or a kind "
            f"({', '.join(KINDS)})."
        )
    _json_object(path)  # the library itself raises plain Exception, which nobody should have to catch
    backend = Backend.from_str(path.read_text(encoding="utf-8"))
    backend.no_truncation()
    backend.no_padding()
    configuration_path = directory / "tokenizer_config.json"
    configuration = _json_object(configuration_path) if configuration_path.is_file() else {}
    specials = {role: name for role in _SPECIAL_ROLES if (name := _name(configuration.get(role))) is not None}
    templates = _templates(directory, configuration)
    return Tokenizer(str(directory), backend, specials, templates.get("default"), templates.get("tool_use"))


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object.")
    return content


def _name(entry: object) -> str | None:
    """A special token is written as a string, or as an object with its content."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _templates(directory: Path, configuration: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        others = (directory / "additional_chat_templates").glob("*.jinja")
        return {"default": path.read_text(encoding="utf-8")} | {
            other.stem: other.read_text(encoding="utf-8") for other in others
        }
    template = configuration.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return {"default": template} if isinstance(template, str) else {}
