"""What one machine records so that another machine's chip can be compared with it: one file, to be copied.

A zip archive of `manifest.json` and `tensors.safetensors`, compressed; the manifest has the SHA-256 of the tensors, so
a damaged copy is refused, and is signed by whoever made it (`records/signature.py`): its distances decide what a chip
may be off by. No pickle. Bounded: the captured calls take what a limit leaves them.

Holds: which model and data (not the weights, which both machines read for themselves), float64's trace and routes, how
far the reference and its perturbed draws are from it, the reference's own error in every operator call, what float64
sends through each layer, and distinct calls with their arguments.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load, save

from beringia.errors import InputError
from beringia.machine.aside import file_beside
from beringia.numerics.metrics import UNIT_ROUNDOFF
from beringia.qualify.effects import Cell, RoundingNoise
from beringia.qualify.layers import Traffic
from beringia.qualify.operators.watch import Call, Place
from beringia.qualify.trace import ChosenRoutes, Trace, TraceExtent
from beringia.qualify.wrong_calls import USED_AT_MOST
from beringia.records.certificate import BundleOrigin, ModelFingerprint
from beringia.records.files import reporting_storage, sync_directory
from beringia.records.identity import ChipIdentity
from beringia.records.record import Record, canonical_hash
from beringia.records.signature import Signed, kind_of, parse_signed, sign, verify
from beringia.version import __version__

BUNDLE_SCHEMA = 5
"""Format 1 had sketches with other signs, which cannot be compared; format 2 was not signed, and had no servings and no
unlike batches; format 3 had no serving by the engine; in format 4 training steps let norms
and biases decay, which training does not."""
DEFAULT_LIMIT_BYTES = 64 * 2**20
"""For the captured calls' arguments, before compression."""
_MANIFEST, _TENSORS = "manifest.json", "tensors.safetensors"
_FASTEST = 1
"""Of zlib: random digits hardly shrink, however long one tries."""


class CallEntry(Record):
    """One captured call; tensors among the arguments are names in the tensor file."""

    operator: str
    module: str
    direction: str
    ordinal: int
    position: int
    args: list[Any]
    kwargs: dict[str, Any]


class BundleManifest(Record):
    """What is in a bundle."""

    schema_version: int = BUNDLE_SCHEMA
    beringia: str
    source: str
    """The preset, or the directory's last part."""
    seed: int
    samples: int
    tokens: int
    layers: int | None
    model: ModelFingerprint
    compute_dtype: str
    batches: int
    steps: int
    extent: Literal["quick", "whole"]
    run_tokens: int | None
    """In a sample of the run that it was made for."""
    servings: int
    unlike: int
    """How many servings and unlike batches its trace has."""
    scenarios: list[str]
    """What was done with the model, beside the batches."""
    untried: list[str]
    """What people do with such a model, and was not done."""
    reference: ChipIdentity
    distances: list[dict[str, float]]
    """Of the reference's trace from float64 and then of each draw's, by cell, `kind|name|batch`."""
    errors: dict[str, tuple[float, float]]
    """Of the reference in each call, by `module|operator|direction|ordinal`: its relative error, and how much of its
    bound it used."""
    calls: list[CallEntry]
    calls_left_out: int
    """Distinct calls that did not fit."""
    tensors_sha256: str


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory."""

    manifest: BundleManifest
    noise: RoundingNoise
    routes: ChosenRoutes
    traffic: Mapping[str, Traffic]
    calls: tuple[Call, ...]
    not_here: tuple[str, ...] = ()
    """Of captured calls that cannot be made here: an operator, or a dtype, that only the reference's software knows."""

    @property
    def plan(self) -> TraceExtent:
        """How much the traces hold."""
        return TraceExtent(self.manifest.batches, self.manifest.steps, self.manifest.extent == "whole")


def write_bundle(
    path: Path,
    manifest: dict[str, Any],
    noise: RoundingNoise,
    routes: ChosenRoutes,
    traffic: Mapping[str, Traffic],
    calls: list[Call],
    key: Ed25519PrivateKey,
) -> None:
    """Write a bundle, signed with `key`; `manifest` has the fields that are not derived from the other arguments."""
    tensors = _noise_tensors(noise) | _route_tensors(routes) | _traffic_tensors(traffic)
    entries = [_entry(call, tensors) for call in calls]
    content = save(_apart(tensors))
    whole = BundleManifest(
        **manifest,
        beringia=__version__,
        distances=[{"|".join(cell): far for cell, far in one.items()} for one in (noise.own, *noise.drawn)],
        calls=entries,
        tensors_sha256=hashlib.sha256(content).hexdigest(),
    )
    signed = json.dumps(sign(whole, key).document(), allow_nan=False)
    _write_zip(path, {_MANIFEST: signed.encode(), _TENSORS: content})


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each contiguous, in memory of its own: copied where it is not."""
    apart: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        if not own or tensor.data_ptr() in taken:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        taken.add(tensor.data_ptr())
        apart[name] = tensor
    return apart


def read_bundle(path: Path, expected_hash: str | None = None) -> Bundle:
    """Read a bundle, which must be the one with this hash, if one is named; its signer is for `read_trusted` to judge.

    Raises InputError naming what is wrong with it, Refusal where its signature does not hold.
    """
    manifest = read_manifest(path)
    if expected_hash not in (None, canonical_hash(manifest)):
        raise InputError(
            f"The bundle {path} is not the one that was examined: another has taken its place. Begin anew."
        )
    content = _part(path, _TENSORS)
    if hashlib.sha256(content).hexdigest() != manifest.tensors_sha256:
        raise InputError(f"The bundle {path} is damaged: its tensors have another hash than it says. Copy it again.")
    tensors = load(content)
    draws = [{_cell(name): far for name, far in one.items()} for one in manifest.distances]
    sketches = {name.removeprefix("sketch."): tensor for name, tensor in tensors.items() if name.startswith("sketch.")}
    exact = Trace(sketches, tensors["losses_K"], tensors["losses_N"])
    numbers = dict(zip(draws[0], tensors["numbers"].tolist(), strict=True))
    noise = RoundingNoise(
        exact,
        draws[0],
        tuple(draws[1:]),
        tensors["losses_PK"],
        tensors["losses_PN"],
        numbers,
        _rounds_once(manifest),
        {cell: far for cell, far in zip(draws[0], tensors["tipped"].tolist(), strict=True) if far},
        *tensors["tipped_losses"].tolist(),
    )
    calls = [_call(entry, tensors) for entry in manifest.calls]
    return Bundle(
        manifest,
        noise,
        _routes(tensors, manifest),
        _traffic(tensors),
        tuple(call for call in calls if isinstance(call, Call)),
        tuple(call for call in calls if isinstance(call, str)),
    )


def read_trusted(path: Path, trusted: Collection[str]) -> Signed[BundleManifest]:
    """The manifest, signed by one of these public keys. Raises what `read_manifest` does, InputError for another's."""
    signed = _read_signed(path)
    if signed.public_key not in trusted:
        raise InputError(
            f"The bundle {path} is signed by the key {signed.public_key}, which is not trusted here: ask whoever made "
            f"it whether that is their key, and if it is, give --trusted-key {signed.public_key}."
        )
    return signed


def read_manifest(path: Path) -> BundleManifest:
    """The manifest alone. Raises InputError, and Refusal where its signature does not hold."""
    return _read_signed(path).record


def origin_of(signed: Signed[BundleManifest]) -> BundleOrigin:
    """What a certificate says of a bundle."""
    return BundleOrigin(hash=canonical_hash(signed.record), public_key=signed.public_key)


def _read_signed(path: Path) -> Signed[BundleManifest]:
    content = _part(path, _MANIFEST)
    try:
        text = content.decode()
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a bundle, or it is damaged ({error}). Copy it again.") from None
    _check_format(path, document)
    signed = parse_signed(text, BundleManifest, path)
    verify(signed)
    _check_errors(path, signed.record)
    return signed


def _check_format(path: Path, document: Any) -> None:
    whole = document if isinstance(document, dict) else {}
    inner = whole.get(kind_of(BundleManifest), whole)
    found = inner.get("schema_version") if isinstance(inner, dict) else None
    if found != BUNDLE_SCHEMA:
        raise InputError(
            f"The bundle {path} has format {found}; this Beringia ({__version__}) reads {BUNDLE_SCHEMA}: "
            "make the bundle with this one, or install the one that made it here."
        )
    if "signature" not in whole:
        raise InputError(
            f"The bundle {path} is not signed, so it may be anyone's: make it again with `beringia reference`, which "
            "signs it."
        )


def _check_errors(path: Path, manifest: BundleManifest) -> None:
    """No bundle says more of its reference than a sound one may have used."""
    call, used = max(
        ((key, used) for key, (_, used) in manifest.errors.items()), key=lambda one: one[1], default=("", 0)
    )
    if not used <= USED_AT_MOST:
        raise InputError(
            f"The bundle {path} is of a reference that used {used:.3g} of what its call {call} may be off by, and a "
            f"sound one uses {USED_AT_MOST:g} at most: make a bundle with `beringia reference`, which refuses others."
        )


def _rounds_once(manifest: BundleManifest) -> bool:
    return UNIT_ROUNDOFF[getattr(torch, manifest.compute_dtype)] > UNIT_ROUNDOFF[torch.float32]


# ---- the archive


def _write_zip(path: Path, parts: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with reporting_storage(path), file_beside(path) as (aside, file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_FASTEST) as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
        file.flush()
        os.fsync(file.fileno())
        os.replace(aside, path)
    sync_directory(path.parent)


_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    KeyError,
    ValueError,
    OverflowError,
    RuntimeError,
    EOFError,
    OSError,
)
"""What reading a damaged archive raises, depending on where it is hit."""
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""Of compression: ours, and none. Others' decoders, which a damaged archive asks for, raise errors of their own."""


def _part(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            if (method := archive.getinfo(name).compress_type) not in _METHODS:
                raise zipfile.BadZipFile(f"{name} is compressed by method {method}")
            return archive.read(name)
    except FileNotFoundError:
        raise InputError(f"There is no bundle at {path}. Make one with `beringia reference`.") from None
    except _DAMAGED as error:
        raise InputError(f"{path} is not a bundle, or it is damaged ({error}). Copy it again.") from None


# ---- tensors


def _noise_tensors(noise: RoundingNoise) -> dict[str, torch.Tensor]:
    sketches = {f"sketch.{name}": tensor for name, tensor in noise.exact.sketches.items()}
    return sketches | {
        "losses_K": noise.exact.losses_K,
        "losses_N": noise.exact.losses_N,
        "losses_PK": noise.losses_PK,
        "losses_PN": noise.losses_PN,
        "tipped_losses": torch.tensor([noise.tipped_loss, noise.tipped_training], dtype=torch.float64),
        "tipped": torch.tensor([noise.tipped.get(cell, 0.0) for cell in noise.own], dtype=torch.float64),
        "numbers": torch.tensor([noise.numbers.get(cell, math.inf) for cell in noise.own], dtype=torch.float64),
    }


def _route_tensors(routes: ChosenRoutes) -> dict[str, torch.Tensor]:
    parts = {"batch": routes.batches, "step": routes.steps, "serving": routes.servings, "unlike": routes.unlike}
    return {
        f"route.{part}.{number}.{layer}": chosen.to(torch.int32)
        for part, passes in parts.items()
        for number, one in enumerate(passes)
        for layer, chosen in one.items()
    }


def _routes(tensors: Mapping[str, torch.Tensor], manifest: BundleManifest) -> ChosenRoutes:
    """Of a dense model there is none, and each pass has an empty table."""
    found: dict[tuple[str, int], dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if name.startswith("route."):
            _, part, number, layer = name.split(".", 3)
            found[part, int(number)][layer] = tensor.to(torch.int64)
    return ChosenRoutes(
        tuple(found["batch", number] for number in range(manifest.batches)),
        tuple(found["step", number] for number in range(manifest.steps)),
        tuple(found["serving", number] for number in range(manifest.servings)),
        tuple(found["unlike", number] for number in range(manifest.unlike)),
    )


def _traffic_tensors(traffic: Mapping[str, Traffic]) -> dict[str, torch.Tensor]:
    inputs = {f"layer.input.{name}": one.input_BTD for name, one in traffic.items()}
    return inputs | {f"layer.gradient.{name}": one.gradient_BTD for name, one in traffic.items()}


def _traffic(tensors: Mapping[str, torch.Tensor]) -> dict[str, Traffic]:
    names = [name.removeprefix("layer.input.") for name in tensors if name.startswith("layer.input.")]
    ordered = sorted(names, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")])
    return {name: Traffic(tensors[f"layer.input.{name}"], tensors[f"layer.gradient.{name}"]) for name in ordered}


def _cell(text: str) -> Cell:
    kind, name, batch = text.split("|")
    return kind, name, batch


# ---- calls


def _entry(call: Call, tensors: dict[str, torch.Tensor]) -> CallEntry:
    place = call.place
    return CallEntry(
        operator=place.operator,
        module=place.module,
        direction=place.direction,
        ordinal=place.ordinal,
        position=place.position,
        args=[_packed(value, tensors) for value in call.args],
        kwargs={name: _packed(value, tensors) for name, value in call.kwargs.items()},
    )


def _packed(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """An argument as JSON: a tensor by the hash of its numbers (and its strides, which products see), stored once."""
    if isinstance(value, torch.Tensor):
        plain = value.contiguous()
        digest = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        name = f"call.{digest.hexdigest()[:32]}"
        tensors[name] = plain
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        return {"tensor": name, "order": order}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": ""}
    if isinstance(value, list | tuple):
        return [_packed(item, tensors) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _unpacked(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return _ordered(tensors[value["tensor"]], value["order"])
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    if "float" in value:
        return float(value["float"])
    return torch.device("cpu")


def _dtypes_in(value: Any) -> Iterator[str]:
    """Names of the dtypes among arguments as JSON."""
    if isinstance(value, dict) and isinstance(value.get("dtype"), str):
        yield value["dtype"]
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dtypes_in(item)


def _ordered(tensor: torch.Tensor, order: list[int]) -> torch.Tensor:
    """The tensor with its dimensions in that order in memory, outermost first."""
    if order == sorted(order):
        return tensor
    back = [order.index(dim) for dim in range(len(order))]
    return tensor.permute(order).contiguous().permute(back)


def _call(entry: CallEntry, tensors: Mapping[str, torch.Tensor]) -> Call | str:
    """The call, or the name of what is not here."""
    namespace, name, overload = entry.operator.split(".")
    func = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if func is None:
        return entry.operator
    unknown = next((dtype for dtype in _dtypes_in([entry.args, entry.kwargs]) if not hasattr(torch, dtype)), None)
    if unknown is not None:
        return f"{entry.operator} in {unknown}"
    place = Place(entry.module, entry.operator, entry.direction, entry.ordinal, entry.position)  # type: ignore[arg-type]  # a literal, checked when written
    kwargs = {key: _unpacked(value, tensors) for key, value in entry.kwargs.items()}
    return Call(place, func, tuple(_unpacked(value, tensors) for value in entry.args), kwargs, ())
