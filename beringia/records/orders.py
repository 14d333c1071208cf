"""What a supervisor wants of a training worker: the work of its far end (`processes/protocol.py`)."""

from __future__ import annotations

from beringia.records.recipe import Recipe
from beringia.records.record import Record


class StepNumbers(Record):
    """What the guard's spike test knows of an earlier step."""

    loss: float
    mtp_loss: float | None
    gradient_norm: float


class Order(Record):
    """What a worker is to do."""

    root: str
    """The run directory as the worker sees it."""
    chip: str
    """Label in the recipe."""
    recipe: Recipe
    """All of it, its paths as the worker sees them: that may be another file system."""
    recipe_hash: str
    """The run's, whatever the paths are there."""
    run_identity: str | None = None
    """Hash of what makes the run this run; null for a greeting."""
    epoch: int
    resume_step: int | None
    """Checkpoint to go on from; null starts from the seeded initial state."""
    state_hashes: dict[int, str] = {}
    """Of the checkpoints that this order names, as they were told of when they were written."""
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
    doubted_steps: tuple[int, ...] = ()
    """Steps of alarms that may be the training's own: before one is taken again, it is found out whether it
    diverges."""
    evaluate: bool = False
    """Evaluate the state that is loaded before anything else: an earlier worker did not get to the end of that."""
    greeting: bool = False
    """Say hello and whether the chip is here, and end: what is wrong with a chip that is needed later shows at once."""


class CandidateOrder(Record):
    """Qualify a chip of a recipe beside its run."""

    recipe: Recipe
    label: str
    directory: str
    """The run's."""


class PackOrder(Record):
    """Pack a recipe's folders of text and chats into token shards."""

    recipe: Recipe
    directory: str


class RowCounts(Record):
    """The answer to a `PackOrder`."""

    rows: tuple[int | None, ...]
    """To train on, of each data set; null for a task, which has no end."""


class TakeModelOrder(Record):
    """Write the model of a run's checkpoint as a Hugging Face directory."""

    recipe: Recipe
    """That run's, its paths whole."""
    checkpoint: str
    directory: str
    """Which must not exist."""
