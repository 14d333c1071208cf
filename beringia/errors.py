"""Every error that Beringia raises on purpose, as one tree. Each carries the exit code of the command line.

BeringiaError                     1  our fault, or something nobody foresaw
├── InputError                    2  what was asked cannot be done as asked; says what was found and what to do
│   ├── RecipeError                  a recipe that cannot be read, or has an unknown key or value
│   ├── ChipUnavailable              a chip that is not here, is unknown, or lacks what was asked of it
│   ├── ModelError                   a model directory or preset that cannot be used
│   ├── DataError                    data or tokenizer that cannot be used
│   ├── NotWritable                  a place that cannot be written to (read-only, of another user, a file)
│   ├── RunError                     a run directory that cannot be used (locked, of another recipe, not a run)
│   └── HandshakeError               two sides whose versions or schemas do not match, or a worker that did not start
├── Refusal                       3  a negative verdict, or a run given up
├── Inconclusive                  4  too little evidence for a verdict
├── CheckpointDamaged             2  a checkpoint file is missing, truncated or altered; names the file
├── StorageFull                   2  the disk filled up; the run stops at its last complete checkpoint
├── TransferFailed                1  state did not get to a chip's machine, or from it; the supervisor tries again
└── StaleEpoch                    1  another supervisor has taken over this run; this process must not publish

`code` names a class where an error crosses from one process to another (`records/error_document.py`): class names may
change, codes may not.
"""

from __future__ import annotations


class BeringiaError(Exception):
    """Root of the tree. `str(error)` is one sentence for the user."""

    code = "beringia"
    exit_code = 1


class InputError(BeringiaError):
    """What was asked cannot be done as asked."""

    code = "input"
    exit_code = 2


class RecipeError(InputError):
    """A recipe that cannot be read, or has an unknown key or value."""

    code = "recipe"


class ChipUnavailable(InputError):
    """A chip that is not here, is unknown, or lacks what was asked of it."""

    code = "chip-unavailable"


class ModelError(InputError):
    """A model directory or preset that cannot be used."""

    code = "model"


class DataError(InputError):
    """Data or a tokenizer that cannot be used."""

    code = "data"


class NotWritable(InputError):
    """A place that cannot be written to."""

    code = "not-writable"


class RunError(InputError):
    """A run directory that cannot be used."""

    code = "run"


class HandshakeError(InputError):
    """Two sides whose versions do not match, or a worker that could not be started."""

    code = "handshake"


class Refusal(BeringiaError):
    """A negative verdict, or a run given up."""

    code = "refusal"
    exit_code = 3


class Inconclusive(BeringiaError):
    """Too little evidence for a verdict."""

    code = "inconclusive"
    exit_code = 4


class CheckpointDamaged(BeringiaError):
    """A checkpoint file is missing, truncated or altered. `path` names it."""

    code = "checkpoint-damaged"
    exit_code = 2

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


class StorageFull(BeringiaError):
    """The disk filled up while a file was being written."""

    code = "storage-full"
    exit_code = 2


class TransferFailed(BeringiaError):
    """State did not get to a chip's machine, or from it."""

    code = "transfer-failed"


class StaleEpoch(BeringiaError):
    """Another supervisor has taken over this run."""

    code = "stale-epoch"


def error_of(code: str) -> type[BeringiaError]:
    """The class with this code; the root for one that this version does not know."""
    return _by_code(BeringiaError).get(code, BeringiaError)


def _by_code(kind: type[BeringiaError]) -> dict[str, type[BeringiaError]]:
    below = (_by_code(child) for child in kind.__subclasses__())
    return {code: found for one in below for code, found in one.items()} | {kind.code: kind}
