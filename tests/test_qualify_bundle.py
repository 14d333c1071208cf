"""Bundles: all that travels between two machines comes out as it went in, and nothing damaged is believed."""

from __future__ import annotations

import functools
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import SmallSubject, calls_of, opened

from beringia.chips.cpu import Cpu
from beringia.cli import main
from beringia.errors import InputError, Refusal
from beringia.qualify.bundle import BUNDLE_SCHEMA, Bundle, BundleManifest, read_bundle, read_manifest, write_bundle
from beringia.qualify.candidate import _replay
from beringia.qualify.capture import CallCapture, replay
from beringia.qualify.evidence import Probed
from beringia.qualify.operators.watch import Call, Place
from beringia.qualify.recomputed import recompute
from beringia.qualify.reference import make_bundle
from beringia.qualify.trace import ChosenRoutes, TraceExtent, Tracer
from beringia.records.record import canonical_hash, canonical_json
from beringia.records.signature import load_or_create_key, public_key_of

SUBJECT = SmallSubject("llama")
PLAN = TraceExtent(batches=2, steps=1)
LIMIT = 2 * 2**20
DERIVED = {"schema_version", "beringia", "distances", "calls", "tensors_sha256"}
"""Of a manifest's fields, those that follow from what else is written."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the CPU for a small llama, in bfloat16."""
    path = tmp_path_factory.mktemp("bundles") / "reference.bundle"
    make_bundle(SUBJECT, Cpu(), torch.bfloat16, path, plan=PLAN, limit_bytes=LIMIT)
    return path


@pytest.fixture(scope="module")
def bundle(path: Path) -> Bundle:
    return read_bundle(path)


def rewritten(
    bundle: Bundle,
    path: Path,
    *,
    calls: list[Call] | None = None,
    routes: ChosenRoutes | None = None,
    **changes: Any,
) -> Path:
    """The bundle with other calls or other fields of the manifest."""
    fields = {name: getattr(bundle.manifest, name) for name in BundleManifest.model_fields if name not in DERIVED}
    calls = list(bundle.calls) if calls is None else calls
    key = load_or_create_key()
    write_bundle(path, fields | changes, bundle.noise, routes or bundle.routes, bundle.traffic, calls, key)
    return path


def with_parts(path: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """The archive with its entries changed; None leaves one out."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def with_manifest(path: Path, target: Path, *, sign_again: bool = True, **fields: Any) -> Path:
    """The bundle with other fields in its manifest, as whoever has the key could sign it."""

    def change(name: str, content: bytes) -> bytes:
        if name != "manifest.json":
            return content
        document = json.loads(content)
        manifest = document["bundle_manifest"] | fields
        signature = document["signature"]
        if sign_again:
            signature = load_or_create_key().sign(canonical_json({"bundle_manifest": manifest})).hex()
        return json.dumps(document | {"bundle_manifest": manifest, "signature": signature}).encode()

    return with_parts(path, target, change)


def same(one: Any, other: Any) -> bool:
    """Equal in every bit, dtype and stride, whatever the nesting."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
        return alike and torch.equal(*flat)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return bool(one == other) or (one != one and other != other)


def through(bundle: Bundle, directory: Path, *calls: Call) -> tuple[Call, ...]:
    return read_bundle(rewritten(bundle, directory / "other.bundle", calls=list(calls))).calls


def call(*args: Any, func: Any = torch.ops.aten.mm.default, **kwargs: Any) -> Call:
    return Call(Place("model.layers.0", str(func), "backward", 3, 41), func, args, kwargs, ())


# ---- what goes in comes out


def test_float64_and_the_noise_come_out_as_they_went_in(bundle: Bundle) -> None:
    trace, _ = Tracer(SUBJECT, PLAN).in_float64()
    assert trace.sketches.keys() == bundle.noise.exact.sketches.keys()
    assert all(torch.equal(sketch, bundle.noise.exact.sketches[name]) for name, sketch in trace.sketches.items())
    assert torch.equal(trace.losses_K, bundle.noise.exact.losses_K) and bundle.plan == PLAN
    assert bundle.noise.losses_PK.shape == (4, PLAN.batches) and len(bundle.noise.drawn) == 4
    assert all(one.keys() == bundle.noise.own.keys() for one in bundle.noise.drawn)
    assert ("gradient", "lm_head.weight", "1") in bundle.noise.own and ("decode", "", "") in bundle.noise.own


def test_writing_what_was_read_changes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    again = read_bundle(rewritten(bundle, tmp_path / "again.bundle"))
    assert again.manifest.model_dump(exclude={"calls"}) == bundle.manifest.model_dump(exclude={"calls"})
    assert again.noise.own == bundle.noise.own and again.noise.drawn == bundle.noise.drawn
    assert again.traffic.keys() == bundle.traffic.keys() and len(again.traffic) == 2
    assert len(again.calls) == len(bundle.calls) > 50
    for one, other in zip(again.calls, bundle.calls, strict=True):
        assert one.place == other.place and one.func is other.func
        assert same(one.args, other.args) and same(dict(one.kwargs), dict(other.kwargs))


def test_the_manifest_says_what_the_bundle_is_of(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert (manifest.source, manifest.compute_dtype, manifest.seed) == ("llama", "bfloat16", 0)
    assert manifest.model == SUBJECT.fingerprint() and manifest.reference == Cpu().identity
    assert (manifest.samples, manifest.tokens) == (SUBJECT.samples, SUBJECT.tokens)
    assert all(error >= 0 for error, _ in manifest.errors.values()) and len(manifest.errors) > 500


def test_routes_come_out_as_they_went_in(bundle: Bundle, tmp_path: Path) -> None:
    chosen = [{f"model.layers.{n}": torch.randint(0, 8, (32, 2)) for n in (1, 10)} for _ in range(3)]
    routes = ChosenRoutes((chosen[0], chosen[1]), (chosen[2],))
    found = read_bundle(rewritten(bundle, tmp_path / "routes.bundle", routes=routes)).routes
    assert same([dict(one) for one in found.batches], list(routes.batches))
    assert same([dict(one) for one in found.steps], list(routes.steps))


DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@given(st.data())
def test_a_tensor_keeps_bits_dtype_shape_and_the_order_of_its_strides(data: st.DataObject) -> None:
    from beringia.qualify.bundle import _packed, _unpacked

    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = data.draw(st.sampled_from(DTYPES))
    order = data.draw(st.permutations(range(len(shape))))
    high = 2 if dtype == torch.bool else 256
    numbers = torch.randint(0, high, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = numbers.view(dtype)[..., 0].contiguous().permute(order)
    store: dict[str, torch.Tensor] = {}
    found = _unpacked(json.loads(json.dumps(_packed(tensor, store))), store)
    assert same(found, tensor)
    if tensor.numel() and min(tensor.shape, default=2) > 1:
        dense = tensor.clone(memory_format=torch.preserve_format)
        assert found.stride() == dense.stride()


def test_arguments_that_are_no_tensors_come_out_as_they_went_in(bundle: Bundle, tmp_path: Path) -> None:
    kwargs = {
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "alpha": 0.1,
        "beta": float("inf"),
        "value": -float("inf"),
        "other": float("nan"),
        "flag": True,
        "none": None,
        "word": "sum",
        "list": [1, -2, 2**40],
    }
    x = torch.randn(2, 3)
    (found,) = through(bundle, tmp_path, call([x, None, x], 3, **kwargs))
    assert found.place == Place("model.layers.0", "aten.mm.default", "backward", 3, 41)
    assert same(list(found.args), [[x, None, x], 3]) and same(dict(found.kwargs), kwargs)


def test_a_tensor_that_many_calls_have_is_stored_once(bundle: Bundle, tmp_path: Path) -> None:
    x = torch.randn(64, 64)
    rewritten(bundle, tmp_path / "one.bundle", calls=[call(x, x)])
    rewritten(bundle, tmp_path / "many.bundle", calls=[call(x, x.T.contiguous().T) for _ in range(50)])
    sizes = [len(zipfile.ZipFile(tmp_path / f"{name}.bundle").read("tensors.safetensors")) for name in ("one", "many")]
    assert sizes[0] == sizes[1]


def test_a_captured_call_is_made_again_elsewhere_and_judged(bundle: Bundle) -> None:
    with opened("emulated:h800") as chip:
        found = {str(one.func): replay(one, chip) for one in bundle.calls if one.place.operator == "aten.mm.default"}
    (judged,) = found.values()
    assert judged is not None and judged.used <= 1.0 and len(judged.measures) >= 3


# ---- what is captured


def captured(*calls: Call, limit: int = 2**20) -> CallCapture:
    capture = CallCapture(limit)
    for one in calls:
        capture.take(one)
    return capture


def test_of_equal_calls_the_first_is_kept_and_others_are_told_apart_by_shape_dtype_stride_and_options() -> None:
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    assert captured(call(x, y), call(y, x)).calls[0].args[0].equal(x)
    assert len(captured(call(x, y), call(y, x)).calls) == 1
    others = [call(x[:2], y), call(x.double(), y), call(x.T, y), call(x, y, alpha=2), call(x, 2)]
    assert len(captured(call(x, y), *others).calls) == 6


def test_a_captured_call_keeps_its_arguments_when_the_model_changes_them() -> None:
    weight, x = torch.ones(3, 3), torch.full((3, 3), 2.0)
    (one,) = calls_of(lambda: weight @ x)
    capture = captured(one)
    weight.zero_()
    x.zero_()
    kept = capture.calls[0]
    assert kept.args[0].eq(1).all() and kept.args[1].eq(2).all()


def test_the_limit_leaves_distinct_calls_out_and_counts_them() -> None:
    calls = [call(torch.zeros(size, 256)) for size in range(1, 11)]
    capture = captured(*calls, *calls, limit=4 * 256 * 10)
    assert [one.args[0].shape[0] for one in capture.calls] == [1, 2, 3, 4] and capture.left_out == 6


def test_the_bundle_says_how_many_calls_did_not_fit(bundle: Bundle, tmp_path: Path) -> None:
    assert bundle.manifest.calls_left_out == 0
    small = tmp_path / "small.bundle"
    make_bundle(SUBJECT, Cpu(), torch.bfloat16, small, plan=TraceExtent(1, 1), limit_bytes=20_000)
    manifest = read_manifest(small)
    assert len(manifest.calls) + manifest.calls_left_out == len(bundle.calls) and manifest.calls_left_out > 20


def test_generators_do_not_travel() -> None:
    assert not captured(call(torch.zeros(2), generator=torch.Generator())).calls


# ---- the file


def test_a_bundle_is_a_zip_of_json_and_safetensors_and_nothing_else(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == ["manifest.json", "tensors.safetensors"]
        json.loads(archive.read("manifest.json"))
        header = archive.read("tensors.safetensors")
    length = int.from_bytes(header[:8], "little")
    assert "losses_K" in json.loads(header[8 : 8 + length])


def test_nothing_is_left_beside_a_bundle(path: Path) -> None:
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_truncated_bundle_is_refused_wherever_it_ends(path: Path, tmp_path: Path) -> None:
    content, damaged = path.read_bytes(), tmp_path / "damaged.bundle"
    for share in (0.0, 0.1, 0.5, 0.9, 0.999):
        damaged.write_bytes(content[: int(share * len(content))])
        with pytest.raises(InputError, match="damaged.*again"):
            read_bundle(damaged)


def test_one_byte_that_changed_is_refused_wherever_it_is(path: Path, tmp_path: Path) -> None:
    """In the archive as it lies on disk: headers, the manifest, the tensors."""
    content, damaged = path.read_bytes(), tmp_path / "damaged.bundle"
    good = read_bundle(path)
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(0, len(content), (40,), generator=generator).tolist():
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = read_bundle(damaged)
        except InputError as error:
            assert "damaged" in str(error) or "format" in str(error) or "not a bundle" in str(error)
        else:  # in a part of the archive that says nothing (a date)
            assert found.manifest == good.manifest


def test_a_changed_number_is_refused_although_the_archive_is_whole(path: Path, tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:] if name == "tensors.safetensors" else content

    with pytest.raises(InputError, match="damaged: its tensors have another hash"):
        read_bundle(with_parts(path, tmp_path / "changed.bundle", change))


@pytest.mark.parametrize("missing", ["manifest.json", "tensors.safetensors"])
def test_a_bundle_without_one_of_its_parts_is_refused(path: Path, tmp_path: Path, missing: str) -> None:
    partial = with_parts(path, tmp_path / "part.bundle", lambda name, content: None if name == missing else content)
    with pytest.raises(InputError, match="damaged"):
        read_bundle(partial)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04"])
def test_what_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match="not a bundle"):
        read_bundle(tmp_path / "x")


def test_a_bundle_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="beringia reference"):
        read_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize("number", [BUNDLE_SCHEMA + 1, BUNDLE_SCHEMA - 1])
def test_another_format_is_refused_with_both_numbers(path: Path, tmp_path: Path, number: int) -> None:
    other = with_manifest(path, tmp_path / "other.bundle", schema_version=number, something="new")
    with pytest.raises(InputError, match=f"format {number}.*reads {BUNDLE_SCHEMA}"):
        read_bundle(other)


@pytest.mark.parametrize("fields", [{"batches": "six"}, {"model": None}, {"schema_version": "1"}])
def test_a_manifest_with_a_field_of_another_type_is_refused(path: Path, tmp_path: Path, fields: Any) -> None:
    with pytest.raises(InputError):
        read_bundle(with_manifest(path, tmp_path / "odd.bundle", **fields))


# ---- another model


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of the command line, in this process."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0), capsys.readouterr().err


def test_a_bundle_of_another_model_is_refused_with_2(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, words = said(capsys, "qualify", "emulated:h800", "--model", "r2-nano", "--against", str(path))
    assert code == 2 and "is of llama" in words and "another configuration" in words and "r2-nano" in words


def test_a_bundle_of_other_weights_is_refused_with_2(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from beringia.qualify.subject import DecoderSubject

    nano = DecoderSubject("r2-nano").fingerprint()
    other = rewritten(bundle, tmp_path / "x.bundle", model=nano.model_copy(update={"weights": "0" * 64}))
    code, words = said(capsys, "qualify", "emulated:h800", "--model", "r2-nano", "--against", str(other))
    assert code == 2 and "another weights" in words and "make a bundle of this one" in words


def test_a_damaged_bundle_is_refused_with_2_and_as_json_if_asked(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.bundle"
    damaged.write_bytes(path.read_bytes()[:1000])
    arguments = ["qualify", "emulated:h800", "--model", "r2-nano", "--against", str(damaged)]
    code, words = said(capsys, *arguments)
    assert code == 2 and "damaged" in words and "Traceback" not in words
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out)["error"] == "InputError"


def test_the_calls_of_a_bundle_are_sound_on_the_machine_that_made_it(bundle: Bundle) -> None:
    with opened("cpu") as chip:
        judged = [replay(one, chip) for one in bundle.calls]
    assert all(found is None or found.used <= 1.0 for found in judged)
    assert sum(found is not None for found in judged) > 40


# ---- from another vendor's machine


def with_foreign_calls(bundle: Bundle, path: Path, target: Path) -> Path:
    """Two calls of a vendor's operator, and one in a dtype that torch here does not have, among the others."""
    entries = [entry.model_dump(mode="json") for entry in bundle.manifest.calls]
    foreign = [
        entries[0] | {"operator": "npu.npu_rms_norm.default"},
        entries[1] | {"operator": "npu.npu_rms_norm.default"},
        entries[2] | {"operator": "aten._to_copy.default", "kwargs": {"dtype": {"dtype": "hifloat8"}}},
        entries[3] | {"operator": "aten.mm.another_overload"},
    ]
    return with_manifest(path, target, calls=[*foreign[:2], *entries, *foreign[2:]])


def test_a_captured_call_that_cannot_be_judged_is_told_and_not_counted(bundle: Bundle) -> None:
    drawing = replace(
        bundle.calls[0],
        place=replace(bundle.calls[0].place, operator="aten.bernoulli.default"),
        func=torch.ops.aten.bernoulli.default,
        args=(torch.full((4,), 0.5),),
        kwargs={},
    )
    found = replace(bundle, calls=(drawing, *bundle.calls))
    (judged, told) = (fact.result for fact in _replay(Cpu(), found) if isinstance(fact, Probed))
    assert judged.outcome == "passed" and f"of {len(bundle.calls)} captured calls" in judged.summary
    assert (told.outcome, told.subject) == ("told", "not judged") and "aten.bernoulli.default" in told.summary


def test_calls_of_a_vendor_s_operators_are_left_out_where_these_are_not_here_and_named(
    bundle: Bundle, path: Path, tmp_path: Path
) -> None:
    found = read_bundle(with_foreign_calls(bundle, path, tmp_path / "foreign.bundle"))
    assert [one.place for one in found.calls] == [one.place for one in bundle.calls]
    assert found.not_here == (
        *["npu.npu_rms_norm.default"] * 2,
        "aten._to_copy.default in hifloat8",
        "aten.mm.another_overload",
    )
    (judged, told) = (fact.result for fact in _replay(Cpu(), found) if isinstance(fact, Probed))
    assert judged.outcome == "passed" and f"of {len(bundle.calls)} captured calls" in judged.summary
    assert (told.outcome, told.subject) == ("told", "operators not here")
    assert told.summary.startswith("4 captured calls were not made") and "npu.npu_rms_norm.default" in told.summary


# ---- who made it


@pytest.fixture
def stranger(path: Path, bundle: Bundle, tmp_path: Path) -> Path:
    """The bundle as another machine signed it."""
    target = tmp_path / "stranger.bundle"
    fields = {name: getattr(bundle.manifest, name) for name in BundleManifest.model_fields if name not in DERIVED}
    key = load_or_create_key(tmp_path / "stranger.pem")
    write_bundle(target, fields, bundle.noise, bundle.routes, bundle.traffic, [], key)
    return target


def test_another_s_bundle_is_refused_with_its_key_until_that_is_trusted(
    stranger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = public_key_of(load_or_create_key(tmp_path / "stranger.pem"))
    asked = ("qualify", "emulated:h800", "--model", "r2-nano", "--against", str(stranger))
    code, words = said(capsys, *asked)
    assert code == 2 and f"give --trusted-key {key}" in words and words.count("\n") == 1
    code, words = said(capsys, *asked, "--trusted-key", "ab" * 32)
    assert code == 2 and f"signed by the key {key}" in words
    code, words = said(capsys, *asked, "--trusted-key", "ab" * 32, "--trusted-key", key.upper())
    assert code == 2 and "is of llama" in words, "whose it is was no longer the question"


def test_a_key_without_a_bundle_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, words = said(capsys, "qualify", "emulated:h800", "--model", "r2-nano", "--trusted-key", "ab" * 32)
    assert code == 2 and "--against" in words


@pytest.mark.parametrize("field", ["distances", "errors", "reference", "tensors_sha256", "seed"])
def test_what_was_changed_after_it_was_signed_is_refused_with_3(
    path: Path, tmp_path: Path, bundle: Bundle, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {
        "distances": [{cell: 30.0 * far for cell, far in one.items()} for one in bundle.manifest.distances],
        "errors": {},
        "reference": bundle.manifest.reference.model_dump() | {"sku": "another"},
        "tensors_sha256": "0" * 64,
        "seed": 1,
    }
    edited = with_manifest(path, tmp_path / "edited.bundle", sign_again=False, **{field: changes[field]})
    code, words = said(capsys, "qualify", "emulated:h800", "--model", "r2-nano", "--against", str(edited))
    assert code == 3 and "altered" in words and words.count("\n") == 1


@pytest.mark.parametrize(("part", "words"), [("signature", "not signed"), ("public_key", "public_key")])
def test_a_bundle_without_a_signature_is_refused(path: Path, tmp_path: Path, part: str, words: str) -> None:
    def change(name: str, content: bytes) -> bytes:
        document = json.loads(content) if name == "manifest.json" else {}
        return json.dumps({key: one for key, one in document.items() if key != part}).encode() if document else content

    with pytest.raises(InputError, match=words):
        read_bundle(with_parts(path, tmp_path / "unsigned.bundle", change))


_PLACES = st.one_of(st.floats(0, 1), st.floats(0.999, 1), st.floats(0, 1e-4))
"""Of a byte in a file, as a share: anywhere, in the central directory, in the first local header."""


@pytest.fixture(scope="module")
def bare(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without captured calls, to be read often."""
    return rewritten(bundle, tmp_path_factory.mktemp("bare") / "bare.bundle", calls=[])


@given(_PLACES, st.integers(1, 255))
def test_a_byte_that_is_not_as_it_was_is_refused_or_changes_nothing(bare: Path, place: float, flipped: int) -> None:
    assert _flipped(bare, int(place * (bare.stat().st_size - 1)), flipped) in ("refused", "as before")


@pytest.mark.slow
def test_no_byte_of_the_archive_s_own_headers_makes_it_crash(bare: Path) -> None:
    content = bare.read_bytes()
    second = content.find(b"PK\x03\x04", 4)
    headers = (range(43), range(second, second + 48), range(content.find(b"PK\x01\x02"), len(content)))
    found = {_flipped(bare, at, (0x01, 0x0E, 0xFF)[at % 3]) for places in headers for at in places}
    assert found == {"refused", "as before"}


def _flipped(path: Path, at: int, flipped: int) -> str:
    """What becomes of a bundle with these bits of one byte turned over."""
    content = bytearray(path.read_bytes())
    content[at] ^= flipped
    altered = path.with_name("altered.bundle")
    altered.write_bytes(content)
    try:
        read = read_bundle(altered)
    except (InputError, Refusal):
        return "refused"
    # Its tensors are those that the manifest has the hash of.
    return "as before" if canonical_hash(read.manifest) == _hash_of(path) else "other"


@functools.cache
def _hash_of(path: Path) -> str:
    return canonical_hash(read_manifest(path))


@pytest.mark.parametrize(
    "change", [lambda text: text.decode().encode("utf-16"), lambda text: b"[" * 200_000, lambda text: b"\xff" + text]
)
def test_a_manifest_that_cannot_be_read_is_told_as_damage(
    path: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    other = with_parts(
        path, tmp_path / "x.bundle", lambda name, content: change(content) if name[0] == "m" else content
    )
    with pytest.raises(InputError, match="is not a bundle, or it is damaged"):
        read_bundle(other)


@pytest.mark.parametrize("method", [1, 9, 12, 14, 93])
def test_a_method_of_compression_that_is_not_ours_is_told_as_damage(path: Path, tmp_path: Path, method: int) -> None:
    content = bytearray(path.read_bytes())
    content[content.rfind(b"PK\x01\x02") + 10] = method
    (tmp_path / "x.bundle").write_bytes(content)
    with pytest.raises(InputError, match=f"compressed by method {method}"):
        read_bundle(tmp_path / "x.bundle")


def test_another_s_public_key_beside_the_signature_is_refused(path: Path, tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        return json.dumps(json.loads(content) | {"public_key": "ab" * 32}).encode() if name[0] == "m" else content

    with pytest.raises(Refusal, match="altered"):
        read_bundle(with_parts(path, tmp_path / "stolen.bundle", change))


def test_a_reference_that_says_it_used_more_than_a_sound_one_does_is_refused(path: Path, tmp_path: Path) -> None:
    worse = with_manifest(path, tmp_path / "worse.bundle", errors={"model.norm|aten.mm.default|forward|0": [0.1, 7.0]})
    with pytest.raises(InputError, match="used 7 of what its call model.norm"):
        read_bundle(worse)


def test_another_bundle_in_the_place_of_the_one_that_was_examined_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match="another has taken its place"):
        read_bundle(path, "0" * 64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layers", "1"), "--layers 1 was given.*--layers all"),
        (("--dtype", "float32"), "--dtype float32 was given.*--dtype bfloat16"),
        (("--seed", "3", "--batches", "5"), "--seed 3, --batches 5 was given.*--seed 0, --batches 2"),
    ],
)
def test_an_option_that_the_bundle_fixes_otherwise_is_refused_with_what_it_fixes(
    path: Path, options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = said(capsys, "qualify", "emulated:h800", "--model", "r2-nano", "--against", str(path), *options)
    assert code == 2 and re.search(words, told)


# ---- computed again


def test_what_can_be_computed_again_is_and_the_rest_is_named(bundle: Bundle) -> None:
    found = recompute(SUBJECT, bundle)
    assert (found.outcome, len(found.measures)) == ("passed", 2)
    assert "the other 1 batches, 1 training steps and 3 draws are as the bundle has them" in found.summary


def test_wider_distances_and_another_float64_are_refused_whoever_signed_them(bundle: Bundle) -> None:
    wider = tuple({cell: 30.0 * far for cell, far in one.items()} for one in bundle.noise.drawn)
    with pytest.raises(InputError, match="first draw"):
        recompute(SUBJECT, replace(bundle, noise=replace(bundle.noise, drawn=wider)))
    exact = bundle.noise.exact
    moved = {name: sketch * 1.01 for name, sketch in exact.sketches.items()}
    with pytest.raises(InputError, match="float64 here"):
        recompute(SUBJECT, replace(bundle, noise=replace(bundle.noise, exact=replace(exact, sketches=moved))))
