"""The `checkpoints` directory of a run, without torch: what is there, what is intact, what is trusted, what may go.

    checkpoints/step-000400/            a complete checkpoint
        rank00000-part00000.safetensors the tensors, one or more files per rank that wrote
        manifest.json                   written last; `manifest.json.sha256` (for `sha256sum -c`) just before it
        trusted.json                    appears once the guard has cleared a later step
    checkpoints/.step-000400.7.tmp/     being written under epoch 7, or left behind by a writer that died
    checkpoints/.step-000400.replaced/  an older checkpoint of the same step, about to go
    checkpoints/.step-000400.deleted/   a pruned checkpoint, about to go
    checkpoints/.step-000400.received/  being received from another machine (`archive.py`)

What has another name, or was written by another run, is never touched. Loading tensors is `store.py`'s part.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from pydantic import ValidationError

from beringia.errors import CheckpointDamaged, RunError
from beringia.records.files import publish_directory, sync_directory, write_bytes
from beringia.records.manifest import MANIFEST_SCHEMA, CheckpointManifest, FileEntry, TrustMark
from beringia.records.record import canonical_json

MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.json.sha256"
TRUST = "trusted.json"

_STEP = re.compile(r"step-(\d{6,})")
_PARTIAL = re.compile(r"\.step-\d{6,}\.(\d+)\.tmp(\.received)?")
_LEAVING = re.compile(r"\.(step-\d{6,})\.(replaced|deleted|received)")


@dataclass(frozen=True)
class Owner:
    """A run, as the manifests of its checkpoints know it."""

    run_identity: str | None
    recipe_hashes: frozenset[str]
    """What counts for manifests that name no run: older ones, and those written outside a run."""

    def wrote(self, manifest: CheckpointManifest) -> bool:
        """Whether the checkpoint is this run's."""
        if manifest.run_identity is not None and self.run_identity is not None:
            return manifest.run_identity == self.run_identity
        return manifest.recipe_hash in self.recipe_hashes


@dataclass(frozen=True)
class CheckpointDirectory:
    """The checkpoints of one run. `root` need not exist yet."""

    root: Path

    def path(self, step: int) -> Path:
        """Where the complete checkpoint of `step` lies, or would lie."""
        return self.root / f"step-{step:06d}"

    def partial(self, step: int, epoch: int) -> Path:
        """Where a writer of `epoch` puts it together."""
        return self.root / f".step-{step:06d}.{epoch}.tmp"

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, ascending."""
        found = (self._step(path.parent) for path in self.root.glob(f"step-*/{MANIFEST}"))
        return sorted(step for step in found if step is not None)

    def foreign(self, owner: Owner) -> list[Path]:
        """What has the name of a checkpoint and is none of this run's, in order. A damaged manifest may be its own."""
        named = (path for path in self.root.glob("step-*") if self._step(path) is not None)
        return sorted(path for path in named if _foreign(path, owner))

    def refuse_foreign(self, owner: Owner) -> None:
        """Raise RunError where there is any."""
        foreign = self.foreign(owner)
        if foreign:
            others = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
            raise RunError(
                f"{foreign[0]}{others} is no checkpoint of this run, and would be in its way. "
                "Move it elsewhere, or choose another directory."
            )

    def _step(self, path: Path) -> int | None:
        """The step of a name as `path` gives it; None for any other name (`step-000400-good`)."""
        match = _STEP.fullmatch(path.name)
        return int(match[1]) if match and self.path(int(match[1])).name == path.name else None

    def manifest(self, step: int) -> CheckpointManifest:
        """The manifest of a complete checkpoint, checked against its digest. Raises CheckpointDamaged or RunError."""
        return read_manifest(self.path(step))

    def verify(self, step: int) -> CheckpointManifest:
        """Check the size and SHA-256 of every file. Raises CheckpointDamaged naming the first one altered."""
        return verify_checkpoint(self.path(step))

    def trusted_steps(self) -> list[int]:
        """Steps of complete checkpoints with a mark of trust, ascending."""
        return [step for step in self.steps() if (self.path(step) / TRUST).exists()]

    def trust_mark(self, step: int) -> TrustMark | None:
        """Why `step` is trusted, or None while it is pending. Raises CheckpointDamaged for a mark that is not one."""
        path = self.path(step) / TRUST
        if not path.exists():
            return None
        try:
            return TrustMark.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise CheckpointDamaged(
                f"{path} is not a mark of trust: delete it, and the step is pending.", str(path)
            ) from error

    def mark_trusted(self, step: int, mark: TrustMark) -> None:
        """Write the mark, atomically. It must speak of this step and of the state that the manifest hashes."""
        manifest = self.manifest(step)
        if (mark.step, mark.state_hash) != (step, manifest.state_hash):
            raise RunError(
                f"A mark of trust for step {mark.step}, state {mark.state_hash[:12]}, cannot go to {self.path(step)}, "
                f"which holds step {step}, state {manifest.state_hash[:12]}."
            )
        write_bytes(self.path(step) / TRUST, canonical_json(mark))

    def kept_steps(self, keep: int, newest: int | None = None) -> set[int]:
        """What pruning keeps: the last `keep`, the last two trusted, and the oldest that may still become trusted.

        A crossing replays between the two. Where trust takes longer than `keep` saves, none would get it otherwise.
        `newest`: the step just saved. Later ones are then of a line that the run has left by rolling back: they do not
        count among the last `keep`, and of them only the last two trusted are kept.
        """
        steps, trusted = self.steps(), self.trusted_steps()
        line = [step for step in steps if newest is None or step <= newest]
        trusted_line = [step for step in trusted if step in line]
        pending = [step for step in line if step > max(trusted_line, default=-1)]
        return set(line[max(0, len(line) - keep) :]) | set(trusted_line[-2:]) | set(trusted[-2:]) | set(pending[:1])

    def prune(self, keep: int, owner: Owner, newest: int | None = None) -> list[int]:
        """Delete what need not be kept, of what the owner wrote; returns the steps deleted. The caller makes sure that
        it may write here."""
        kept = self.kept_steps(keep, newest)
        gone = [step for step in self.steps() if step not in kept and not _foreign(self.path(step), owner)]
        for step in gone:
            self.discard(step)
        return gone

    def discard(self, step: int) -> None:
        """Delete one checkpoint, for instance a pending one after a rollback. It is gone at once, never half there."""
        leaving = self.root / f".{self.path(step).name}.deleted"
        shutil.rmtree(leaving, ignore_errors=True)
        os.rename(self.path(step), leaving)
        sync_directory(self.root)
        shutil.rmtree(leaving)

    def publish(self, step: int, epoch: int, owner: Owner) -> Path:
        """Rename what `epoch` has written into place; the owner's checkpoint of the same step that was there goes.
        Raises RunError where another's is in the way."""
        final = self.path(step)
        if final.exists() and _foreign(final, owner):
            raise RunError(f"{final} is in the way: it is no checkpoint of this run. Move it elsewhere and go on.")
        replaced = self.root / f".{final.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            # Two renames, since no portable one exchanges directories: `clean` undoes the first if we die between them.
            os.rename(final, replaced)
        publish_directory(self.partial(step, epoch), final)
        shutil.rmtree(replaced, ignore_errors=True)
        return final

    def clean(self, epoch: int) -> list[Path]:
        """Remove what writers up to `epoch` left behind when they died; to be called by the one writer of `epoch`."""
        removed = []
        for path in sorted(self.root.glob(".step-*")) if self.root.exists() else []:
            partial, leaving = _PARTIAL.fullmatch(path.name), _LEAVING.fullmatch(path.name)
            if leaving and leaving[2] == "replaced" and not (self.root / leaving[1]).exists():
                os.rename(path, self.root / leaving[1])
            elif leaving or (partial and int(partial[1]) <= epoch):
                shutil.rmtree(path)
                removed.append(path)
        return removed


def _foreign(checkpoint: Path, owner: Owner) -> bool:
    if not (checkpoint / MANIFEST).is_file():
        return True
    try:
        return not owner.wrote(read_manifest(checkpoint))
    except (CheckpointDamaged, RunError):
        return False


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest in a checkpoint's directory. Raises RunError where there is no checkpoint, CheckpointDamaged."""
    path, digest_path = checkpoint / MANIFEST, checkpoint / MANIFEST_DIGEST
    if not checkpoint.is_dir():
        raise RunError(f"There is no checkpoint at {checkpoint}: choose one of the steps that the run has.")
    content = _read(path)
    if _read(digest_path) != digest_line(content):
        raise damaged(path, f"its SHA-256 is not the one in {MANIFEST_DIGEST}")
    try:
        manifest = CheckpointManifest.model_validate_json(content)
    except ValidationError as error:
        raise damaged(path, f"it is not a manifest of schema {MANIFEST_SCHEMA}") from error
    if manifest.schema_version != MANIFEST_SCHEMA:
        raise RunError(
            f"{path} has schema {manifest.schema_version}, this Beringia reads {MANIFEST_SCHEMA}: "
            f"use Beringia {manifest.beringia}, which wrote it."
        )
    return manifest


def write_manifest(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest, last, and its digest just before it."""
    content = canonical_json(manifest)
    write_bytes(checkpoint / MANIFEST_DIGEST, digest_line(content))
    write_bytes(checkpoint / MANIFEST, content)


def digest_line(content: bytes) -> bytes:
    """What `sha256sum manifest.json` prints."""
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()


def verify_checkpoint(checkpoint: Path, files: Iterable[str] | None = None) -> CheckpointManifest:
    """Check the manifest and every file that it lists (or only `files`) byte by byte. Raises CheckpointDamaged."""
    manifest = read_manifest(checkpoint)
    wanted = None if files is None else set(files)
    for entry in manifest.files:
        if wanted is not None and entry.name not in wanted:
            continue
        path = checkpoint / entry.name
        with open_checked(path) as file:
            check_content(file, path, entry)
    return manifest


def check_content(file: FileIO, path: Path, entry: FileEntry) -> None:
    """Check size and SHA-256 of a file just opened, streaming. Raises CheckpointDamaged."""
    if (found := os.fstat(file.fileno()).st_size) != entry.bytes:
        raise damaged(path, f"it has {found} bytes instead of {entry.bytes}")
    if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
        raise damaged(path, "its SHA-256 is not the one in the manifest")


def contents_of(manifest: CheckpointManifest) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """What each file holds, by the manifest: (dtype name, sizes) of each key."""
    contents: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = defaultdict(dict)
    for entry in manifest.tensors.values():
        for chunk in entry.chunks:
            contents[chunk.file][chunk.key] = (entry.dtype, chunk.sizes)
    return contents


def damaged(path: Path, what: str) -> CheckpointDamaged:
    """The error for a file that is not as it was written."""
    return CheckpointDamaged(f"Checkpoint file {path} is damaged: {what}. Use an earlier checkpoint.", str(path))


def open_checked(path: Path) -> FileIO:
    """Open a checkpoint file for reading, unbuffered. Raises CheckpointDamaged where it is missing."""
    try:
        return FileIO(path)
    except (FileNotFoundError, IsADirectoryError):
        raise damaged(path, "it is missing") from None


def _read(path: Path) -> bytes:
    with open_checked(path) as file:
        return file.readall()
