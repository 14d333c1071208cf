"""What a starter and its far end say to each other: one JSON object a line, over the far end's standard streams.

The lines pass through any launch prefix (`ssh`, `srun`, `kubectl exec`), since nothing but the two streams is needed.
When the starter dies its end of standard input closes, and the far end exits.

far end -> starter: `Hello` at once, before anything heavy is imported; `Ready` when its module is; then `Line`s of the
work and `Heartbeat`s; at last `Ended`
starter -> far end: `Job` once the versions agree; perhaps `Go`, perhaps `Stop`
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from beringia.errors import HandshakeError
from beringia.records.error_document import ErrorDocument
from beringia.records.events import EVENTS_SCHEMA
from beringia.records.manifest import MANIFEST_SCHEMA
from beringia.records.record import Record
from beringia.version import __version__

PROTOCOL = 3

JOB_VARIABLE = "BERINGIA_JOB"
"""Environment variable that holds the job too, for ranks that share one standard input (torchrun's, srun's)."""
MARK_VARIABLE = "BERINGIA_STARTED_AS"
"""Environment variable that every process a child starts inherits: by it they are found again."""


def schemas() -> dict[str, int]:
    """Versions of everything that crosses: both sides must have the same."""
    return {"protocol": PROTOCOL, "events": EVENTS_SCHEMA, "manifest": MANIFEST_SCHEMA}


class Hello(Record):
    """The far end's half of the handshake."""

    kind: Literal["hello"] = "hello"
    beringia: str
    schemas: dict[str, int]
    torch: str | None
    """As installed there, not imported yet."""
    python: str
    """Version and path."""


class Ready(Record):
    """The module of the work is imported."""

    kind: Literal["ready"] = "ready"
    imports_seconds: float


class Heartbeat(Record):
    """The far end gets on: sent by the thread that computes, at most once a second, never by a timer."""

    kind: Literal["heartbeat"] = "heartbeat"


class Line(Record):
    """A fact of the work; what it means the work's own records say."""

    kind: Literal["line"] = "line"
    line: dict[str, Any]


class Ended(Record):
    """Why a far end ends; the last line it sends."""

    kind: Literal["ended"] = "ended"
    why: Literal["done", "stopped", "alarm", "fault", "refused", "error"]
    message: str = ""
    error: ErrorDocument | None = None
    """What the user must know of, where `why` is `error`."""


class Job(Record):
    """What a far end is to do."""

    kind: Literal["job"] = "job"
    work: dict[str, Any]
    """The work's own record, as JSON."""
    root: str | None = None
    """Where files of this work lie on the far end's machine; made there, where its parent is."""
    owner: str | None = None
    """Whose the root is; another's is refused."""
    ranks: int = 1
    """Processes to start there, one a device; a launch prefix may have started several already."""
    environment: dict[str, str] = {}
    """Set before the work's module is imported."""
    mark: str = ""
    """Value of `MARK_VARIABLE` there: a launch prefix may not hand the environment on."""
    stacks: str | None = None
    """File for the stacks of all threads when it hangs, relative to the root; `{rank}` becomes the rank's number."""
    patience_seconds: float = 120.0
    """When silence is called a hang."""


class Go(Record):
    """The handshake holds and what the work needs is in place."""

    kind: Literal["go"] = "go"


class Stop(Record):
    """Save what there is to save, and end."""

    kind: Literal["stop"] = "stop"


FromFarEnd = Annotated[Hello | Ready | Heartbeat | Line | Ended, Field(discriminator="kind")]
ToFarEnd = Annotated[Job | Go | Stop, Field(discriminator="kind")]

from_far_end: TypeAdapter[FromFarEnd] = TypeAdapter(FromFarEnd)
to_far_end: TypeAdapter[ToFarEnd] = TypeAdapter(ToFarEnd)


def check_hello(name: str, hello: Hello) -> None:
    """Compare the far end's versions with ours. Raises HandshakeError naming the first that differs."""
    pairs = {"Beringia": (__version__, hello.beringia)}
    pairs |= {f"{what} schema": (str(here), str(hello.schemas.get(what, "none"))) for what, here in schemas().items()}
    for what, (here, there) in pairs.items():
        if here != there:
            raise HandshakeError(
                f"{name} ({hello.python}) has {what} {there}, this side has {here}. "
                "Install the same Beringia in both environments."
            )
