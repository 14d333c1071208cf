"""What a supervisor and a worker say to each other, one JSON object a line, over the worker's standard input and
output.

The lines pass through any launch prefix (`ssh`, `srun`, `kubectl exec`) because nothing else is needed than the two
streams. When the supervisor dies its end of standard input closes, and the worker exits.

supervisor -> worker: `Order` (first line), then `Go` after the handshake, perhaps `Stop`
worker -> supervisor: `Hello`, then events, `Heartbeat`, and last `Ended`
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from beringia.records.events import EVENTS_SCHEMA
from beringia.records.manifest import MANIFEST_SCHEMA
from beringia.records.recipe import Recipe
from beringia.records.record import Record

MESSAGES_SCHEMA = 2

ORDER_VARIABLE = "BERINGIA_ORDER"
"""Environment variable that holds the order too, for ranks that share one standard input (torchrun's, srun's)."""


class StepNumbers(Record):
    """What the guard's spike test knows of an earlier step."""

    loss: float
    mtp_loss: float | None
    gradient_norm: float


class Order(Record):
    """What a worker is to do."""

    kind: Literal["order"] = "order"
    root: str
    """The run directory as the worker sees it."""
    chip: str
    """Label in the recipe."""
    recipe: Recipe
    """All of it: the worker may see another file system."""
    epoch: int
    resume_step: int | None
    """Checkpoint to go on from; null starts from the seeded initial state."""
    canary_from: int | None = None
    """Replay the steps from this checkpoint to `resume_step` first and hold them against the band; 0 is the initial
    state, null is no canary."""
    canary_compute_dtype: str | None = None
    """Dtype of products on the chip that the run comes from, for the canary's band; null without a canary."""
    ranks: int = 1
    excluded_devices: tuple[int, ...] = ()
    recent: tuple[StepNumbers, ...] = ()
    """The last steps before `resume_step`, oldest first, so that a spike is seen right after a restart too."""
    accepted_spikes: tuple[int, ...] = ()
    """Steps from which on a spike is no alarm for a while: it is known, and the training's own."""
    greeting: bool = False
    """Say hello and whether the chip is here, and end: what is wrong with a chip that is needed later shows at once."""


class Hello(Record):
    """The worker's half of the handshake, sent before it opens its chip."""

    kind: Literal["hello"] = "hello"
    beringia: str
    events_schema: int = EVENTS_SCHEMA
    manifest_schema: int = MANIFEST_SCHEMA
    messages_schema: int = MESSAGES_SCHEMA
    torch: str
    python: str
    imports_seconds: float


class Go(Record):
    """The handshake holds and the state is in place."""

    kind: Literal["go"] = "go"


class Stop(Record):
    """Write a checkpoint and end."""

    kind: Literal["stop"] = "stop"


class Heartbeat(Record):
    """The worker gets on: sent by the thread that computes, at most once a second, never by a timer."""

    kind: Literal["heartbeat"] = "heartbeat"


class Ended(Record):
    """Why a worker ends; the last line it sends."""

    kind: Literal["ended"] = "ended"
    why: Literal["done", "stopped", "alarm", "fault", "refused", "error"]
    message: str = ""
    error: str = ""
    """Class of the error in `beringia.errors`, when it was one of ours."""


class EventLine(Record):
    """An event on its way to `events.jsonl`."""

    kind: Literal["event"] = "event"
    event: dict[str, Any]


FromWorker = Annotated[Hello | Heartbeat | Ended | EventLine, Field(discriminator="kind")]
ToWorker = Annotated[Order | Go | Stop, Field(discriminator="kind")]

from_worker: TypeAdapter[FromWorker] = TypeAdapter(FromWorker)
to_worker: TypeAdapter[ToWorker] = TypeAdapter(ToWorker)
