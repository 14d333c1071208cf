"""Versions of the weights in a directory: each is written once and never changed, and holds the hash of all tensors as
whoever has it must hold them.

    weights/000012/manifest.json      written last
    weights/000012/weights.zst        all tensors, or what has changed since the version that the manifest names

Tensors are in Hugging Face coordinates and in the receiver's dtype. A receiver that holds the base applies the change;
any other asks for a version that is whole. The hash is over all tensors (`numerics/state_hash.py`, sensitive to order
and signs), so a change that was applied to other weights than it was made of is seen.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from beringia.errors import RunError
from beringia.machine.aside import directory_beside
from beringia.numerics.state_hash import hash_state
from beringia.records.files import publish_directory, write_bytes
from beringia.records.record import Record, canonical_json
from beringia.rl.weights.delta import Tensors, apply, encode_delta, encode_whole

_MANIFEST, _CONTENT = "manifest.json", "weights.zst"


class WeightVersion(Record):
    """What one version is."""

    version: int
    """Steps of the learner that are in it."""
    base: int | None
    """The version that it changes; None: it is whole."""
    hash: str
    """Of all tensors, once it is applied."""
    sha256: str
    """Of its file."""
    bytes: int
    """Of its file."""
    whole_bytes: int
    """Of all tensors, as they lie in memory."""


@dataclass
class Held:
    """Weights that somebody holds: a version of them, on the CPU."""

    version: int
    tensors: dict[str, torch.Tensor]


class WeightVersions:
    """The versions in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, version: int) -> Path:
        """Where a version lies."""
        return self._directory / f"{version:06d}"

    def there(self) -> list[int]:
        """Versions that are complete, oldest first."""
        found = (path.parent.name for path in self._directory.glob(f"[0-9]*/{_MANIFEST}"))
        return sorted(int(name) for name in found if name.isdigit())

    def manifest(self, version: int) -> WeightVersion:
        """What a version says of itself. Raises RunError."""
        path = self.path(version) / _MANIFEST
        try:
            found = WeightVersion.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read: {str(error).splitlines()[0]}.") from None
        if found.version != version or (found.base is not None and not 0 <= found.base < version):
            raise RunError(f"{path} is of version {found.version}, made of {found.base}: it is not version {version}.")
        return found

    def write(self, version: int, tensors: Tensors, before: Held | None = None) -> WeightVersion:
        """Publish a version: whole, or as what it changes of one that is held. One that is there already must be the
        same. Raises RunError, StorageFull."""
        if before is not None and not 0 <= before.version < version:
            raise ValueError(f"version {version} cannot be made of version {before.version}")
        content = encode_whole(tensors) if before is None else encode_delta(before.tensors, tensors)
        made = WeightVersion(
            version=version,
            base=None if before is None else before.version,
            hash=hash_state(tensors, {}),
            sha256=hashlib.sha256(content).hexdigest(),
            bytes=len(content),
            whole_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        )
        if version in self.there():
            there = self.manifest(version)
            self._content(there)
            if there.hash != made.hash:
                raise RunError(
                    f"{self.path(version)} holds other weights ({there.hash[:12]}) than were to be published as that "
                    f"version ({made.hash[:12]}); a version never changes."
                )
            return there
        self._directory.mkdir(parents=True, exist_ok=True)
        if self.path(version).exists():  # without a manifest: what a removal that was killed has left
            shutil.rmtree(self.path(version))
        with directory_beside(self.path(version)) as aside:
            inside = aside / "version"
            inside.mkdir()
            write_bytes(inside / _CONTENT, content)
            write_bytes(inside / _MANIFEST, canonical_json(made))
            publish_directory(inside, self.path(version))
        return made

    def load(self, version: int, held: Held) -> WeightVersion:
        """Bring held weights to a version, in place: by its change where they are its base, else from one that is whole
        and the changes since. Raises RunError where no such way leads there, or what comes out is not what the version
        says; the weights that are held are of no version then, and `held.version` is -1."""
        way = self._way(version, held.version)
        held.version = -1
        for step in way:
            apply(self._content(step), held.tensors)
        found, told = hash_state(held.tensors, {}), self.manifest(version)
        if found != told.hash:
            raise RunError(
                f"Version {version} of the weights hashes to {found[:12]} here, and {told.hash[:12]} was published."
            )
        held.version = version
        return told

    def drop_before(self, version: int) -> None:
        """Remove what nobody needs who is at `version` or later: versions before the newest whole one up to it."""
        whole = [one for one in self.there() if one <= version and self.manifest(one).base is None]
        for old in self.there():
            if whole and old < whole[-1]:
                # First what says that it is complete: killed in between, it is not there any more.
                (self.path(old) / _MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self.path(old), ignore_errors=True)

    def _content(self, told: WeightVersion) -> bytes:
        """The file of a version. Raises RunError where it is not what the manifest says."""
        path = self.path(told.version) / _CONTENT
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}.") from None
        if hashlib.sha256(content).hexdigest() != told.sha256:
            raise RunError(f"{path} is damaged: it has another hash than was told.")
        return content

    def _way(self, version: int, held: int) -> list[WeightVersion]:
        """Versions to apply one after the other, from what is held or from a whole one."""
        there, way = set(self.there()), list[WeightVersion]()
        wanted: int | None = version
        while wanted is not None and wanted != held:
            if wanted not in there or len(way) > len(there):
                raise RunError(
                    f"Version {version} of the weights cannot be made: version {wanted} is needed for it, and "
                    f"{self._directory} does not have it. Publish a whole one."
                )
            way.append(self.manifest(wanted))
            wanted = way[-1].base
        return way[::-1]
