"""A tokenizer's files in Hugging Face form, read as transformers 5 reads them, without importing it.

`tokenizer.json` is the tokenizer; added and special tokens come from `tokenizer_config.json` and, where that has no
`added_tokens_decoder`, from `special_tokens_map.json` and `added_tokens.json`. Some classes that
`tokenizer_config.json` names take vocabulary and merges alone from `tokenizer.json` (`tokenizer_classes.py`). That
AutoTokenizer gives the same tokens for every layout is tested. Vocabularies in other files (SentencePiece, tiktoken)
are not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from beringia.data.tokenizer_classes import TokenizerClass, class_of
from beringia.errors import DataError
from beringia.records.given_files import is_there, json_object, why_no_directory, why_no_model, why_unreadable

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OTHER_FORMS = ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")

Document = dict[str, Any]
Token = str | AddedToken


@dataclass(frozen=True)
class TokenizerFiles:
    """What a directory says of its tokenizer."""

    backend: Backend
    specials: dict[str, str]
    """Special tokens by role; roles without a token are absent."""
    templates: dict[str, str]
    """Chat templates by name."""


def read_files(directory: Path) -> TokenizerFiles:
    """The tokenizer of a directory. Raises DataError."""
    wrong = why_no_directory(str(directory))
    if wrong is not None:
        raise DataError(wrong)
    path = directory / "tokenizer.json"
    if not is_there(path):
        raise DataError(_without_tokenizer(directory))
    document = json_object(path, DataError)
    configuration = _optional(directory / "tokenizer_config.json")
    kind = class_of(document, configuration, _optional(directory / "config.json"))
    tokens = _Tokens.read(directory, document, configuration, kind)
    backend = kind.rebuild(_open(path), document, configuration)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(configuration.get("split_special_tokens", False))
    tokens.add_to(backend)
    return TokenizerFiles(backend, tokens.by_role, _templates(directory, configuration))


def _without_tokenizer(directory: Path) -> str:
    other = next((name for name in _OTHER_FORMS if is_there(directory / name)), None)
    if other is None:
        otherwise = f"There is no tokenizer.json in {directory}: give a Hugging Face directory that has one."
        return why_no_model(directory) or otherwise
    return (
        f"There is no tokenizer.json in {directory}, and {other} is not read: make one of it with transformers, "
        "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)."
    )


def _optional(path: Path) -> dict[str, Any]:
    return json_object(path, DataError) if is_there(path) else {}


def _open(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises no other class for whatever it does not know
        raise DataError(
            f"{path} is no tokenizer that tokenizers {tokenizers.__version__} can read ({error}): was it written by a "
            "newer version? Install that, or save the tokenizer with this one."
        ) from None


@dataclass(frozen=True)
class _Tokens:
    """Special and added tokens."""

    roles: dict[str, Token]
    """Special tokens by role, a model's own roles after the common ones."""
    others: list[Token]
    """Special tokens without a role."""
    added: list[AddedToken]
    """In the order of the numbers that the files give them."""
    plain: bool
    """What is said of special tokens beside their content (lstrip, ...) is dropped."""

    @classmethod
    def read(cls, directory: Path, document: Document, configuration: Document, kind: TokenizerClass) -> _Tokens:
        said: dict[str, Any] = {**kind.specials, **configuration}
        if said.get("additional_special_tokens") is not None and not said.get("extra_special_tokens"):
            said["extra_special_tokens"] = said.pop("additional_special_tokens")
        own = _own_roles(said)
        decoder = configuration.get("added_tokens_decoder")
        if decoder is None:
            said |= _special_tokens_map(directory, said)
            own |= _own_roles(said)
            added = _legacy_added(directory, document, said)
        else:
            place = f"{directory / 'tokenizer_config.json'}: added_tokens_decoder"
            added = {_number(place, number): _token(place, entry) for number, entry in _table(place, decoder).items()}
        by_name = {token.content: token for token in added.values()}
        roles = {role: by_name.get(_content(token), token) for role, token in _roles(said, own).items()}
        others = _listed(said.get("extra_special_tokens", said.get("additional_special_tokens")))
        return cls(roles, others, [token for _, token in sorted(added.items())], kind.plain_specials)

    @property
    def by_role(self) -> dict[str, str]:
        return {role: _content(token) for role, token in self.roles.items() if role in ROLES}

    def add_to(self, backend: Backend) -> None:
        """As transformers does: numbers that the files give are an order, and what stands later goes before."""
        known = {token.content for token in (*backend.get_added_tokens_decoder().values(), *self.added)}
        named = set(map(_content, self.roles.values()))
        for token in self.added:
            token.special = token.special or token.content in named
        new: list[Token] = []
        for each in (*self.roles.values(), *self.others):
            if _content(each) not in known and each not in new:
                new.append(each)
        if self.plain:
            new += dict.fromkeys(_content(each) for each in (*self.roles.values(), *self.others))
        backend.add_tokens([*self.added, *(_as_special(each) if isinstance(each, str) else each for each in new)])


def _as_special(name: str) -> AddedToken:
    return AddedToken(name, special=True)


def _own_roles(said: dict[str, Any]) -> dict[str, Any]:
    """Roles of a model's own, taken out; `extra_special_tokens` may be a table of them."""
    extra = said.get("extra_special_tokens")
    return said.pop("extra_special_tokens") if isinstance(extra, dict) else {}


def _roles(said: Mapping[str, Any], tabled: Mapping[str, Any]) -> dict[str, Token]:
    """The tokens of the common roles, and of a model's own."""
    common = {role: said[role] for role in ROLES if said.get(role) not in (None, "")}
    own = {key: value for key, value in said.items() if key.endswith("_token") and key not in ROLES}
    own = {key: value for key, value in own.items() if isinstance(value, str | AddedToken)}
    return {role: _special(role, value) for role, value in {**common, **own, **tabled}.items()}


def _special_tokens_map(directory: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """What the old file says; it goes before `tokenizer_config.json`."""
    path = directory / "special_tokens_map.json"
    found = {
        key: _token(str(path), {**value, "special": True})
        if isinstance(value, dict) and key != "extra_special_tokens"
        else value
        for key, value in _optional(path).items()
    }
    extra = found.get("extra_special_tokens")
    if isinstance(extra, list):
        found["extra_special_tokens"] = [*(said.get("extra_special_tokens") or []), *extra]
    return found


def _legacy_added(directory: Path, document: Document, said: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Of `added_tokens.json`, and of `tokenizer.json` itself, which goes before."""
    values = [*(said.get(role) for role in ROLES), *_listed(said.get("extra_special_tokens"))]
    special = {_content(value) for value in values if isinstance(value, str | AddedToken)}
    path = directory / "added_tokens.json"
    added = {
        _number(str(path), number): AddedToken(name, normalized=name not in special, special=name in special)
        for name, number in _optional(path).items()
    }
    place = str(directory / "tokenizer.json")
    for entry in _entries(place, document.get("added_tokens")):
        added[_number(place, entry.get("id"))] = _token(place, entry)
    return added


def _listed(values: object) -> list[Token]:
    if values is not None and not isinstance(values, list):
        raise DataError(f"The tokenizer's extra_special_tokens are {values!r:.60}; a list of them is needed.")
    return [_special("extra_special_tokens", value) for value in values or []]


def _special(role: str, value: object) -> Token:
    """A special token is written as a string, or as a table with its content."""
    if isinstance(value, str | AddedToken):
        return value
    if isinstance(value, dict):
        return _token(f"The tokenizer's {role}", value)
    raise DataError(f"The tokenizer's {role} is {value!r:.60}; a string, or a table with its content, is needed.")


def _token(place: str, entry: object) -> AddedToken:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        return AddedToken(**{name: value for name, value in _table(place, entry).items() if name in names})
    except TypeError:
        raise DataError(f"{place}: {entry!r:.80} is no added token.") from None


def _content(token: Token) -> str:
    return token if isinstance(token, str) else str(token.content)


def _number(place: str, number: object) -> int:
    try:
        return int(number)  # type: ignore[call-overload, no-any-return]
    except (TypeError, ValueError):
        raise DataError(f"{place}: {number!r:.60} is not the number of a token.") from None


def _table(place: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: {value!r:.60} stands where a table of added tokens is needed.")
    return value


def _entries(place: str, value: object) -> Iterable[dict[str, Any]]:
    if value is not None and not isinstance(value, list):
        raise DataError(f"{place}: added_tokens is {value!r:.60}; a list is needed.")
    return [_table(place, entry) for entry in value or []]


def _templates(directory: Path, configuration: Document) -> dict[str, str]:
    """Chat templates by name; files of their own go before `tokenizer_config.json`."""
    default = directory / "chat_template.jinja"
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if is_there(default):
        files["default"] = default
    if files:
        return {name: _text(path) for name, path in files.items()}
    template = configuration.get("chat_template")
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    if template is None:
        return {}
    if not isinstance(template, dict) or not all(isinstance(one, str) for pair in template.items() for one in pair):
        raise DataError(
            f"{directory / 'tokenizer_config.json'}: chat_template is {template!r:.60}; a template, or a list of "
            "tables with name and template, is needed."
        )
    return template


def _text(path: Path) -> str:
    wrong = why_unreadable(path)
    if wrong is not None:
        raise DataError(wrong)
    try:
        return path.read_text(encoding="utf-8")
    except ValueError:
        raise DataError(f"{path} is no text in UTF-8.") from None
