"""Ed25519 signatures of certificates, and the key that makes them.

A signed certificate is one JSON file: the certificate, the public key in hexadecimal, and the signature over the
certificate's canonical JSON, so that its layout in the file does not matter and each of its values does. The private
key lies in `$XDG_CONFIG_HOME/beringia/signing-key.pem` (without the variable: `~/.config/beringia/`), PKCS8, readable
by its owner only, and is made when it is first needed.

Does not judge: what a certificate says is for `supervise/qualification.py`. A signature by a key that the reader did
not name shows that nothing was altered since, not who signed.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, NoReturn

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
from beringia.records.certificate import CERTIFICATE_SCHEMA, Certificate, PublicKey
from beringia.records.files import reporting_full_disk, sync_directory, write_text
from beringia.records.record import Record, canonical_json

_IS_KEY: TypeAdapter[str] = TypeAdapter(PublicKey)


class SignedCertificate(Record):
    """A certificate and who vouches for it."""

    certificate: Certificate
    public_key: PublicKey
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    """Over the certificate's canonical JSON, 64 bytes in hexadecimal."""


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


def sign(certificate: Certificate, key: Ed25519PrivateKey) -> SignedCertificate:
    """The certificate with this key's signature."""
    signature = key.sign(canonical_json(certificate))
    return SignedCertificate(certificate=certificate, public_key=public_key_of(key), signature=signature.hex())


def parse_public_key(text: str) -> str:
    """A public key as a user gives it, in small letters. Raises InputError where it is none."""
    try:
        return _IS_KEY.validate_python(text.lower())
    except ValidationError:
        raise InputError(f"{text!r} is not a public key: give its 32 bytes as 64 hexadecimal digits.") from None


def verify(signed: SignedCertificate, trusted: Collection[str] = ()) -> None:
    """Check the signature, and that it is by one of the public keys `trusted` (none given: by any).

    Raises Refusal for a signature that does not hold or is by another key.
    """
    if not _holds(signed):
        raise Refusal(
            f"The certificate for {signed.certificate.chip} does not hold: its content is not what the key "
            f"{signed.public_key} signed. It was altered; get it again from whoever made it."
        )
    if trusted and signed.public_key not in trusted:
        raise Refusal(
            f"The certificate for {signed.certificate.chip} was asked to be signed by the key {' or '.join(trusted)}, "
            f"but {signed.public_key} signed it: ask whoever made it which key is theirs."
        )


def read_signed(path: Path) -> SignedCertificate:
    """A signed certificate from its file; its signature is not checked here. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
        _check_schema(json.loads(text), path)
        return SignedCertificate.model_validate_json(text)
    except OSError as error:
        raise InputError(f"The certificate {path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise _damaged(path, f"{where}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"no JSON: {error}") from None


def write_signed(path: Path, signed: SignedCertificate) -> None:
    """Write a signed certificate; the file appears complete or not at all."""
    write_text(path, signed.model_dump_json(indent=2) + "\n")


def _holds(signed: SignedCertificate) -> bool:
    try:
        content = canonical_json(signed.certificate)
    except ValueError:  # a number like 1e999: no JSON that anyone signs has it
        return False
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed.public_key)).verify(
            bytes.fromhex(signed.signature), content
        )
    except InvalidSignature:
        return False
    return True


def _check_schema(document: Any, path: Path) -> None:
    """A newer schema is told before its unknown fields are."""
    inner = document.get("certificate") if isinstance(document, dict) else None
    version = inner.get("schema_version") if isinstance(inner, dict) else None
    if isinstance(version, int) and version > CERTIFICATE_SCHEMA:
        raise InputError(
            f"The certificate {path} has schema {version}, this Beringia reads up to {CERTIFICATE_SCHEMA}: "
            "read it with the version of Beringia that wrote it."
        )


def _damaged(path: Path, detail: str) -> InputError:
    return InputError(f"{path} is not a signed certificate ({detail}): the file is damaged, or is something else.")


def _create_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    content = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with reporting_full_disk(path):
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600 from the beginning
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # Not a rename: of two processes that make the key at once, both must go on with the same one.
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        finally:
            os.unlink(aside)
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
