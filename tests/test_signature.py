"""Signed records of any kind: what is signed is bound to its kind, and what was signed before still holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from certificates import certificate
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from beringia.errors import InputError, Refusal
from beringia.records.certificate import Certificate
from beringia.records.record import Record
from beringia.records.signature import Signed, kind_of, parse_signed, public_key_of, read_signed, sign, verify

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SOMEWHERE = Path("signed.json")
OLD = Path(__file__).parent / "data" / "certificate_signed_bare.json"
"""Written by the Beringia that signed nothing but certificates."""


class Part(Record):
    name: str
    share: float | None


class ParityProof(Record):
    schema_version: int = 3
    model: str
    parts: tuple[Part, ...]
    exact: bool


class Receipt(ParityProof):
    """Another kind with the same fields."""


class Licence(Certificate):
    """Another kind with a certificate's fields."""


PROOF = ParityProof(model="r2-nänö", parts=(Part(name="head", share=0.25), Part(name="tail", share=None)), exact=True)
SIGNED = sign(PROOF, KEY)


def text_of(signed: Signed[Any]) -> str:
    return json.dumps(signed.document(), ensure_ascii=False)


def renamed(signed: Signed[Any], kind: str) -> str:
    """The document with its record under another kind's name."""
    document = signed.document()
    return json.dumps({kind if name == signed.kind else name: value for name, value in document.items()})


def test_any_record_is_signed_and_read_back_under_the_name_of_its_kind() -> None:
    assert set(SIGNED.document()) == {"parity_proof", "public_key", "signature"}
    back = parse_signed(text_of(SIGNED), ParityProof, SOMEWHERE)
    assert back == SIGNED and back.record.parts[1].share is None
    verify(back, [public_key_of(KEY)])


def test_a_certificate_from_before_there_were_other_kinds_holds_and_is_signed_alike_today() -> None:
    old = read_signed(OLD, Certificate)
    verify(old, [public_key_of(KEY)])
    assert old == sign(certificate(schema_version=1), KEY)


def test_every_flipped_bit_of_a_signed_file_is_noticed() -> None:
    content = text_of(SIGNED).encode()
    for place in range(len(content)):
        for bit in range(8):
            altered = bytearray(content)
            altered[place] ^= 1 << bit
            with pytest.raises((InputError, Refusal, UnicodeDecodeError)):
                verify(parse_signed(altered.decode(), ParityProof, SOMEWHERE))


@given(st.data())
def test_any_other_byte_in_a_signed_certificate_is_noticed(data: st.DataObject) -> None:
    content = OLD.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    altered = content[:place] + bytes([data.draw(st.integers(0, 255))]) + content[place + 1 :]
    try:
        same = json.loads(altered) == json.loads(content)
    except (ValueError, UnicodeDecodeError):
        same = False
    if not same:
        with pytest.raises((InputError, Refusal, UnicodeDecodeError)):
            verify(parse_signed(altered.decode(), Certificate, SOMEWHERE))


def test_a_record_of_another_kind_with_the_same_content_does_not_verify() -> None:
    with pytest.raises(Refusal, match="altered"):
        verify(parse_signed(renamed(SIGNED, "receipt"), Receipt, SOMEWHERE))


def test_a_certificate_passes_for_no_other_kind_and_no_other_kind_for_a_certificate() -> None:
    with pytest.raises(Refusal, match="altered"):
        verify(parse_signed(renamed(sign(certificate(), KEY), "licence"), Licence, SOMEWHERE))
    licence = Licence.model_validate(dict(certificate()))
    with pytest.raises(Refusal, match="altered"):
        verify(parse_signed(renamed(sign(licence, KEY), "certificate"), Certificate, SOMEWHERE))


@pytest.mark.parametrize("other", ["parity_proof", "soul", "record"])
def test_a_file_of_another_kind_is_refused_by_its_name(other: str) -> None:
    with pytest.raises(InputError, match=rf"signed\.json is a signed {other.replace('_', ' ')}, where a signed cert"):
        parse_signed(renamed(SIGNED, other), Certificate, SOMEWHERE)


def test_a_document_with_a_second_record_in_it_is_refused() -> None:
    for second in ("certificate", "record", "note"):
        document = SIGNED.document() | {second: {}}
        with pytest.raises(InputError, match=f"not a signed parity proof \\({second}"):
            parse_signed(json.dumps(document), ParityProof, SOMEWHERE)


def test_a_document_without_its_record_is_refused() -> None:
    with pytest.raises(InputError, match="not a signed parity proof"):
        parse_signed(
            json.dumps({"public_key": SIGNED.public_key, "signature": SIGNED.signature}), ParityProof, SOMEWHERE
        )


def test_a_newer_schema_of_any_kind_is_told_as_such() -> None:
    newer = PROOF.model_copy(update={"schema_version": 4})
    with pytest.raises(InputError, match="parity proof signed.json has schema 4, this Beringia reads up to 3"):
        parse_signed(text_of(sign(newer, KEY)), ParityProof, SOMEWHERE)


def test_kinds_are_called_as_their_classes() -> None:
    assert [kind_of(kind) for kind in (Certificate, ParityProof, Receipt)] == ["certificate", "parity_proof", "receipt"]
