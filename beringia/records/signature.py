"""Ed25519 signatures of records, and the key that makes them.

A signed record is one JSON file: the record under the name of its kind (`certificate`), the public key in hexadecimal,
and the signature over canonical JSON, so that the layout of the file does not matter and each of its values does. A
file of another kind than asked for is refused by name. The private key lies in
`$XDG_CONFIG_HOME/beringia/signing-key.pem` (without the variable: `~/.config/beringia/`), PKCS8, readable by its owner
only, and is made when it is first needed.

Does not judge: what a certificate says is for `supervise/admission.py`. A signature by a key that the reader did
not name shows that nothing was altered since, not who signed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Generic, NoReturn, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import Field, TypeAdapter, ValidationError

from beringia.errors import InputError, Refusal
from beringia.machine.aside import file_beside
from beringia.records.certificate import PublicKey
from beringia.records.files import reporting_storage, sync_directory, write_text
from beringia.records.record import Record, canonical_json

T = TypeVar("T", bound=Record)

_IS_KEY: TypeAdapter[str] = TypeAdapter(PublicKey)
_SIGNED_BARE = "certificate"
"""The kind whose signature is over the record alone, as it was before there were others."""


class Signed(Record, Generic[T]):
    """A record and who vouches for it. On the disk the record lies under the name of its kind."""

    record: T
    public_key: PublicKey
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    """Over what `signed_bytes` says, 64 bytes in hexadecimal."""

    @property
    def kind(self) -> str:
        """What was signed."""
        return kind_of(type(self.record))

    def document(self) -> dict[str, Any]:
        """As it is written."""
        content = self.record.model_dump(mode="json")
        return {self.kind: content, "public_key": self.public_key, "signature": self.signature}


def kind_of(record: type[Record]) -> str:
    """The name of a kind of record: its class's, in small letters: `certificate`, `parity_proof`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", record.__name__).lower()


def signed_bytes(record: Record) -> bytes:
    """What the signature of a record is over: its canonical JSON, under the name of its kind.

    A certificate is signed as it stands, as all that are out are. No other kind is, so none passes for one.
    """
    kind = kind_of(type(record))
    return canonical_json(record if kind == _SIGNED_BARE else {kind: record.model_dump(mode="json")})


def default_key_path() -> Path:
    """Where the private key lies unless the user names another file."""
    configuration = os.environ.get("XDG_CONFIG_HOME", "")
    # The specification of XDG has a relative path ignored.
    root = Path(configuration) if os.path.isabs(configuration) else Path.home() / ".config"
    return root / "beringia" / "signing-key.pem"


def load_or_create_key(path: Path | None = None) -> Ed25519PrivateKey:
    """The private key at `path` (None: the default place), made there if there is none yet. Raises InputError."""
    path = path or default_key_path()
    try:
        if not path.exists():
            _create_key(path)
        return _parse_key(path.read_bytes(), path)
    except OSError as error:
        raise InputError(
            f"The signing key {path} cannot be read or made: {error.strerror}. Name another file for it with --key."
        ) from None


def public_key_of(key: Ed25519PrivateKey) -> str:
    """The public key in hexadecimal: what `beringia verify --key` takes."""
    return key.public_key().public_bytes_raw().hex()


def sign(record: T, key: Ed25519PrivateKey) -> Signed[T]:
    """The record with this key's signature."""
    signature = key.sign(signed_bytes(record))
    made: Any = Signed[type(record)]  # type: ignore[misc]  # which record it is, is known when it runs
    signed: Signed[T] = made(record=record, public_key=public_key_of(key), signature=signature.hex())
    return signed


def parse_public_key(text: str) -> str:
    """A public key as a user gives it, in small letters. Raises InputError where it is none."""
    try:
        return _IS_KEY.validate_python(text.lower())
    except ValidationError:
        raise InputError(f"{text!r} is not a public key: give its 32 bytes as 64 hexadecimal digits.") from None


def verify(signed: Signed[Any], trusted: Collection[str] = ()) -> None:
    """Check the signature, and that it is by one of the public keys `trusted` (none given: by any).

    Raises Refusal for a signature that does not hold or is by another key.
    """
    if not _holds(signed):
        raise Refusal(
            f"The signature of the {_words(signed.kind)} does not hold: its content is not what the key "
            f"{signed.public_key} signed. It was altered; get it again from whoever made it."
        )
    if trusted and signed.public_key not in trusted:
        raise Refusal(
            f"The {_words(signed.kind)} was asked to be signed by the key {' or '.join(trusted)}, "
            f"but {signed.public_key} signed it: ask whoever made it which key is theirs."
        )


def read_signed(path: Path, record: type[T]) -> Signed[T]:
    """A signed record of this kind from its file; its signature is not checked here. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"The {_words(kind_of(record))} {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise _damaged(path, record, f"no text: {error}") from None
    return parse_signed(text, record, path)


def parse_signed(text: str, record: type[T], path: Path) -> Signed[T]:
    """A signed record of this kind from a file's text; `path` names it in errors. Raises InputError."""
    try:
        content = json.dumps(_content(json.loads(text), record, path))
        signed: Signed[T] = Signed[record].model_validate_json(content)  # type: ignore[valid-type]
        return signed
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([kind_of(record) if part == "record" else str(part) for part in first["loc"]])
        raise _damaged(path, record, f"{where}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, record, f"no JSON: {error}") from None


def write_signed(path: Path, signed: Signed[Any]) -> None:
    """Write a signed record; the file appears complete or not at all."""
    write_text(path, json.dumps(signed.document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _holds(signed: Signed[Any]) -> bool:
    try:
        content = signed_bytes(signed.record)
    except ValueError:  # a number like 1e999: no JSON that anyone signs has it
        return False
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed.public_key)).verify(
            bytes.fromhex(signed.signature), content
        )
    except InvalidSignature:
        return False
    return True


def _content(document: Any, record: type[Record], path: Path) -> dict[str, Any]:
    """The fields of `Signed`, from a document that has these and no others."""
    kind = kind_of(record)
    if not isinstance(document, dict):
        raise _damaged(path, record, "no JSON object")
    others = sorted(document.keys() - {kind, "public_key", "signature"})
    if len(others) == 1 and kind not in document:
        raise InputError(f"{path} is a signed {_words(others[0])}, where a signed {_words(kind)} was asked for.")
    if others:
        raise _damaged(path, record, f"{others[0]}: not a part of one")
    _check_schema(document.get(kind), record, path)
    return {"record" if name == kind else name: value for name, value in document.items()}


def _check_schema(inner: Any, record: type[Record], path: Path) -> None:
    """A newer schema is told before its unknown fields are."""
    field = record.model_fields.get("schema_version")
    version = inner.get("schema_version") if isinstance(inner, dict) else None
    if field is not None and isinstance(version, int) and version > field.default:
        raise InputError(
            f"The {_words(kind_of(record))} {path} has schema {version}, this Beringia reads up to {field.default}: "
            "read it with the version of Beringia that wrote it."
        )


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _damaged(path: Path, record: type[Record], detail: str) -> InputError:
    words = _words(kind_of(record))
    return InputError(f"{path} is not a signed {words} ({detail}): the file is damaged, or is something else.")


def _create_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    content = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with reporting_storage(path), file_beside(path, mode=0o600) as (aside, file):  # from the beginning
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        # Not a rename: of two processes that make the key at once, both must go on with the same one.
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    sync_directory(path.parent)


def _parse_key(content: bytes, path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(content, password=None)
    except TypeError:
        _no_key(path, "it is encrypted")
    except (ValueError, UnsupportedAlgorithm):
        _no_key(path, "it is not a private key in PEM")
    if not isinstance(key, Ed25519PrivateKey):
        _no_key(path, "it is a key of another kind")
    return key


def _no_key(path: Path, why: str) -> NoReturn:
    raise InputError(
        f"The signing key {path} cannot be used: {why}. Beringia signs with an unencrypted Ed25519 key "
        "(PEM, PKCS8); name another file with --key, or move this one away and a new key is made."
    ) from None
