"""Certificates: what a signature vouches for, what breaks it, where the key lies, and what the verb says."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import certificate
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given
from hypothesis import strategies as st
from small_runs import beringia

from beringia.errors import InputError, ModelError, Refusal
from beringia.model import PRESETS
from beringia.records.certificate import CERTIFICATE_SCHEMA, Certificate, Measure, OperatorCheck
from beringia.records.model_source import OWN_SIZES, configuration_hash
from beringia.records.record import canonical_hash
from beringia.records.signature import (
    default_key_path,
    load_or_create_key,
    parse_public_key,
    parse_signed,
    public_key_of,
    read_signed,
    sign,
    verify,
    write_signed,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
SIGNED = sign(certificate(), KEY)
DOCUMENT: dict[str, Any] = SIGNED.document()


def written(tmp_path: Path, document: Any = DOCUMENT) -> Path:
    path = tmp_path / "certificate.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_a_signed_certificate_survives_its_file_and_its_signature_holds(tmp_path: Path) -> None:
    path = tmp_path / "certificates" / "h800.json"
    write_signed(path, SIGNED)
    assert read_signed(path, Certificate) == SIGNED
    verify(read_signed(path, Certificate))
    verify(read_signed(path, Certificate), [public_key_of(KEY)])
    verify(read_signed(path, Certificate), [public_key_of(OTHER_KEY), parse_public_key(public_key_of(KEY).upper())])
    assert [file.name for file in path.parent.iterdir()] == ["h800.json"]


def test_the_signature_is_ed25519_over_the_canonical_json_of_the_certificate() -> None:
    canonical = json.dumps(DOCUMENT["certificate"], sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    KEY.public_key().verify(bytes.fromhex(SIGNED.signature), canonical)
    assert SIGNED.public_key == KEY.public_key().public_bytes_raw().hex()


def test_the_layout_of_the_file_does_not_matter(tmp_path: Path) -> None:
    verify(read_signed(written(tmp_path, json.dumps(DOCUMENT, indent=7, sort_keys=True)), Certificate))


def test_a_certificate_signed_by_another_key_than_asked_is_refused() -> None:
    with pytest.raises(Refusal, match=public_key_of(KEY)):
        verify(SIGNED, [public_key_of(OTHER_KEY)])


def test_another_public_key_beside_the_signature_is_refused() -> None:
    stolen = SIGNED.model_copy(update={"public_key": public_key_of(OTHER_KEY)})
    for trusted in ([], [public_key_of(OTHER_KEY)]):
        with pytest.raises(Refusal, match="altered"):
            verify(stolen, trusted)


def test_what_is_no_public_key_is_refused_as_such() -> None:
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        parse_public_key("ab12")


@pytest.mark.parametrize("digit", [0, 63, 64, 127])
def test_an_altered_signature_is_refused(tmp_path: Path, digit: int) -> None:
    signature = SIGNED.signature
    altered = signature[:digit] + ("0" if signature[digit] != "0" else "1") + signature[digit + 1 :]
    with pytest.raises(Refusal, match="altered"):
        verify(read_signed(written(tmp_path, DOCUMENT | {"signature": altered}), Certificate))


def test_a_verdict_that_was_improved_is_refused(tmp_path: Path) -> None:
    refused = sign(certificate(verdict="infer"), KEY).document()
    refused["certificate"]["verdict"] = "train"
    with pytest.raises(Refusal, match="altered"):
        verify(read_signed(written(tmp_path, refused), Certificate))


def test_a_number_that_json_cannot_hold_is_refused_and_no_bug(tmp_path: Path) -> None:
    text = json.dumps(DOCUMENT).replace('"seconds": 12.5', '"seconds": 1e999')
    assert "1e999" in text
    with pytest.raises(Refusal, match="altered"):
        verify(read_signed(written(tmp_path, text), Certificate))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a document lie."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from leaves(inner, (*path, place))
    else:
        yield path


def replaced(document: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A copy with the value at `path` replaced by `change(value)`."""
    copy = json.loads(json.dumps(document))
    inner = copy
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = change(inner[path[-1]])
    return copy


_OTHERS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["train", "infer", "unfit", "passed", "failed", "real", "forward", ""]),
    st.text(st.characters(codec="utf-8"), max_size=5),
)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other and str(one) == str(other)


def _broken(document: Any) -> bool:
    """Whether a document is refused, as no certificate or as an altered one."""
    try:
        verify(parse_signed(json.dumps(document), Certificate, Path("certificate.json")))
    except (InputError, Refusal):
        return True
    return False


@given(st.sampled_from(list(leaves(DOCUMENT))), _OTHERS)
def test_any_changed_value_anywhere_breaks_the_signature(path: tuple[Any, ...], other: Any) -> None:
    before: list[Any] = []
    changed = replaced(DOCUMENT, path, lambda value: (before.append(value), other)[1])
    # A whole number is the same float with and without its point.
    if _same(before[0], other) or (isinstance(before[0], float) and type(other) is int and before[0] == other):
        return
    assert _broken(changed)


@given(st.sampled_from([path for path in leaves(DOCUMENT) if path[-1] not in ("public_key", "signature")]), st.data())
def test_a_small_change_of_the_same_type_breaks_the_signature(path: tuple[Any, ...], data: st.DataObject) -> None:
    def nudge(value: Any) -> Any:
        if isinstance(value, str):
            place = data.draw(st.integers(0, len(value)))
            return value[:place] + "x" + value[place:]
        return value + 1 if value is not None else "x"

    assert _broken(replaced(DOCUMENT, path, nudge))


def test_the_properties_reach_every_part_of_a_certificate() -> None:
    named = {str(path[1]) for path in leaves(DOCUMENT) if path[0] == "certificate"}
    assert named == set(DOCUMENT["certificate"])


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    document = DOCUMENT | {"certificate": DOCUMENT["certificate"] | {"approved": True}}
    with pytest.raises(InputError, match=r"certificate\.approved"):
        read_signed(written(tmp_path, document), Certificate)


def test_a_newer_schema_is_told_before_its_unknown_fields(tmp_path: Path) -> None:
    newer = DOCUMENT["certificate"] | {"schema_version": CERTIFICATE_SCHEMA + 1, "soul": "pure"}
    with pytest.raises(InputError, match=f"schema {CERTIFICATE_SCHEMA + 1}, this Beringia reads up to"):
        read_signed(written(tmp_path, DOCUMENT | {"certificate": newer}), Certificate)


@pytest.mark.parametrize(
    ("name", "value"), [("layers", 2), ("weight_files", "ee" * 32), ("bundle", {"hash": "aa", "public_key": "bb" * 32})]
)
def test_a_field_that_no_signature_of_schema_1_is_over_cannot_be_added_to_such_a_certificate(
    tmp_path: Path, name: str, value: Any
) -> None:
    old = sign(certificate(schema_version=1), KEY).document()
    verify(read_signed(written(tmp_path, old), Certificate))
    old["certificate"][name] = None
    assert getattr(read_signed(written(tmp_path, old), Certificate).record, name) is None
    old["certificate"][name] = value
    with pytest.raises(InputError, match=f"schema 1 has no {name}"):
        read_signed(written(tmp_path, old), Certificate)
    assert beringia("verify", str(written(tmp_path, old))).returncode == 2


@pytest.mark.parametrize("size", [0, -1, 261])
def test_a_vocabulary_cannot_be_added_to_a_signed_certificate(size: int) -> None:
    """0 says nothing, so it would not be written, and the signature would hold."""
    model = DOCUMENT["certificate"]["model"]
    assert "vocabulary_size" not in model
    altered = DOCUMENT["certificate"] | {"model": model | {"vocabulary_size": size}}
    assert _broken(DOCUMENT | {"certificate": altered})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", json.dumps(DOCUMENT)[:-20], "[" * 100_000, '{"a": "\\ud8']
)
def test_a_damaged_file_is_an_input_error_that_names_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="certificate.json is not a signed certificate"):
        read_signed(written(tmp_path, text), Certificate)


def test_bytes_that_are_no_text_and_a_missing_file_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.json", "missing.json"):
        with pytest.raises(InputError, match=name):
            read_signed(tmp_path / name, Certificate)


# Keys


def test_the_key_is_made_once_for_its_owner_only_and_read_ever_after(tmp_path: Path) -> None:
    path = tmp_path / "new" / "signing-key.pem"
    made = load_or_create_key(path)
    assert public_key_of(load_or_create_key(path)) == public_key_of(made)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert [file.name for file in path.parent.iterdir()] == ["signing-key.pem"]


def test_the_default_place_follows_the_users_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_key_path() == tmp_path / "beringia" / "signing-key.pem"
    load_or_create_key()
    assert default_key_path().exists()
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CONFIG_HOME", ignored)
        assert default_key_path() == Path.home() / ".config" / "beringia" / "signing-key.pem"


def test_of_two_that_make_the_key_at_once_both_use_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "signing-key.pem"
    first = load_or_create_key(path)
    monkeypatch.setattr(Path, "exists", lambda self: False)  # the second looked before the first had written
    assert public_key_of(load_or_create_key(path)) == public_key_of(first)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no key", "not a private key in PEM"),
        (X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "another kind"),
        (KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")), "encrypted"),
    ],
    ids=["garbage", "other-kind", "encrypted"],
)
def test_a_file_that_is_no_signing_key_is_refused_and_left_alone(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_or_create_key(path)
    assert path.read_bytes() == content


def test_a_key_that_cannot_be_read_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--key"):
        load_or_create_key(tmp_path)


# The verb


def test_the_verb_says_who_signed_what_it_is_for_and_the_verdict(tmp_path: Path) -> None:
    done = beringia("verify", str(written(tmp_path)), "--key", public_key_of(KEY), "--json")
    assert done.returncode == 0, done.stderr
    says = json.loads(done.stdout)
    assert says["signature"] == "holds" and says["key_asked_for"] is True
    assert (says["public_key"], says["verdict"]) == (public_key_of(KEY), "train")
    assert (says["identity_hash"], says["model"]) == (SIGNED.record.identity_hash, "r2-nano")
    spoken = beringia("verify", str(written(tmp_path)))
    assert spoken.returncode == 0
    for words in ("holds", says["public_key"], says["identity_hash"], "r2-nano", "train", "whose it is was not asked"):
        assert words in spoken.stdout


def test_the_verb_ends_with_3_for_an_altered_or_unasked_signature_and_with_2_for_damage(tmp_path: Path) -> None:
    other_key = beringia("verify", str(written(tmp_path)), "--key", public_key_of(OTHER_KEY))
    assert other_key.returncode == 3 and public_key_of(KEY) in other_key.stderr
    altered = replaced(DOCUMENT, ("certificate", "verdict"), lambda _: "infer")
    refused = beringia("verify", str(written(tmp_path, altered)), "--json")
    assert refused.returncode == 3 and json.loads(refused.stdout)["error"] == "Refusal"
    assert beringia("verify", str(written(tmp_path, "{"))).returncode == 2
    assert beringia("verify", str(tmp_path / "missing.json")).returncode == 2


# Which model


def test_a_preset_is_known_by_its_name_and_a_directory_by_its_configuration(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"a": 1}' if name != "three" else '{"a": 2}')
    one, two, three = (configuration_hash(None, str(tmp_path / name)) for name in ("one", "two", "three"))
    assert one == two != three
    assert configuration_hash("r2-nano", None) != configuration_hash("r2-micro", None)
    with pytest.raises(ModelError, match=r"config\.json"):
        configuration_hash(None, str(tmp_path))


def test_a_preset_with_another_vocabulary_is_another_model_and_with_its_own_the_same_as_ever() -> None:
    assert configuration_hash("r2-nano", None, 54) == configuration_hash("r2-nano", None)
    assert configuration_hash("r2-nano", None) == canonical_hash({"preset": "r2-nano"}), "certificates are out with it"
    assert len({configuration_hash("r2-nano", None, size) for size in (54, 261, 262)}) == 3


def test_the_sizes_that_the_supervisor_knows_are_those_of_the_presets() -> None:
    sizes = {name: (config.num_hidden_layers, config.vocab_size) for name, config in PRESETS.items()}
    assert sizes == OWN_SIZES


# Numbers that JSON has no word for


@pytest.mark.parametrize(("value", "used"), [(0.0, 0.0), (-0.0, 0.0), (5e-324, float("inf")), (-1.0, float("inf"))])
def test_a_bound_of_0_allows_0_alone(value: float, used: float) -> None:
    assert Measure(name="wrong", value=value, bound=0.0, reason="exact").used == used


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_measure_that_is_no_number_is_written_as_null_breaks_every_bound_and_can_be_signed(value: float) -> None:
    measure = Measure(name="rms", value=value, bound=1e30, reason="any")
    assert measure.value is None and measure.used == float("inf")
    assert json.loads(measure.model_dump_json())["value"] is None
    check = certificate().operators[0]
    struck = OperatorCheck(**(dict(check) | {"error": value, "found": value, "factor": value, "measures": (measure,)}))
    assert (struck.error, struck.found, struck.factor) == (None, None, None)
    verify(sign(certificate(operators=(struck,)), KEY), [public_key_of(KEY)])
