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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from beringia.data.alphabet import BEGIN, END, PAD, SPECIALS, TOKENS, UNKNOWN
from beringia.data.tokenizer_directory import read_files
from beringia.errors import DataError
from beringia.records.files import write_text
from beringia.records.given_files import json_object
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
    files = read_files(Path(source))
    templates = files.templates
    return Tokenizer(str(source), files.backend, files.specials, templates.get("default"), templates.get("tool_use"))


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
    """The tokenizer a recipe means: the one it names, else the task's, else the model's own. Raises DataError.

    It has no token that the model's directory has no room for, so that nothing that is learned can hold one.
    """
    tokenizer = _named(data, model)
    size = None if model.path is None else _vocabulary_size(Path(model.path))
    return tokenizer if size is None else _without_unused(tokenizer, size)


def check_vocabulary(tokenizer: Tokenizer, vocabulary_size: int) -> None:
    """Raise DataError if texts have tokens that a model with this vocabulary cannot read.

    A special token beyond it that no text needs (a `[PAD]` that was added and never trained) does no harm.
    """
    _unused(tokenizer, vocabulary_size)


def _named(data: DataSection, model: ModelSection) -> Tokenizer:
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    if data.task is not None:
        return load_tokenizer("digits")
    if model.path is not None:
        return load_tokenizer(model.path)
    raise DataError(f"Model {model.preset} has no tokenizer for text: set data.tokenizer to 'bytes' or to a directory.")


def _vocabulary_size(directory: Path) -> int | None:
    """What the model's config says; None where it says nothing, which is told when the model is read."""
    path = directory / "config.json"
    size = json_object(path, DataError).get("vocab_size") if path.is_file() else None
    return size if type(size) is int else None


def _without_unused(tokenizer: Tokenizer, vocabulary_size: int) -> Tokenizer:
    """The tokenizer without special tokens beyond the vocabulary: their names are text like any other."""
    unused = _unused(tokenizer, vocabulary_size)
    if not unused:
        return tokenizer
    document = json.loads(tokenizer.backend.to_str())
    document["added_tokens"] = [each for each in document["added_tokens"] if each["content"] not in unused]
    specials = {role: name for role, name in tokenizer.specials.items() if name not in unused}
    return replace(tokenizer, backend=Backend.from_str(json.dumps(document)), specials=specials)


def _unused(tokenizer: Tokenizer, vocabulary_size: int) -> set[str]:
    """Special tokens beyond a vocabulary that no text needs. Raises DataError for any other token beyond it."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    beyond = {name for name, number in vocabulary.items() if number >= vocabulary_size}
    if not beyond:
        return beyond
    special = {added.content for added in tokenizer.backend.get_added_tokens_decoder().values() if added.special}
    around = json.dumps(json.loads(tokenizer.backend.to_str())["post_processor"], ensure_ascii=False)
    shown = f"{tokenizer.chat_template}{tokenizer.tool_template}{around}"
    roles = {tokenizer.specials.get(role) for role in ("bos_token", "eos_token", "unk_token")}
    needed = sorted(name for name in beyond if name not in special or name in roles or name in shown)
    if needed:
        raise DataError(
            f"The tokenizer of {tokenizer.source} has {tokenizer.vocabulary_size} tokens, but the model's vocabulary "
            f"has only {vocabulary_size}, without {needed[0]!r} for instance: take the tokenizer that belongs to the "
            "model, or a larger vocabulary."
        )
    return beyond


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
