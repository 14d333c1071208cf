"""The run's facts in order: one model per kind of line in `events.jsonl`, a public and versioned contract.

`docs/events.md` is generated from these classes. The supervisor is the only writer; workers send their events to it
over standard output. Numbers that could be infinite or NaN are written as null (JSON has no other way), and the event's
message says which it was.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from beringia.records.identity import ChipIdentity
from beringia.records.manifest import CleanCheck
from beringia.records.record import Record

EVENTS_SCHEMA = 3
"""Lines of schema 2 are read too: they say nothing of roles, and are the learner's."""

_OLDEST_SCHEMA = 2

LEARNER = "learner"
"""The role that trains the run's model."""

SPIKE = "spike"
"""The detector whose alarms say that something is unusual, not that it is wrong: training has spikes of its own."""
DIVERGENCE = "divergence"
"""The detector whose alarms say that the training is at fault, and not the chip."""

UNREACHABLE = "unreachable"
"""Code of the fault that a worker did not start on a chip whose worker has started before."""
TRANSFER = "transfer"
"""Code of the fault that state did not get to the chip's machine, or from it."""


class Event(Record):
    """What every event has. `sequence` counts lines from 0 without gaps."""

    schema_version: int = Field(default=EVENTS_SCHEMA, ge=_OLDEST_SCHEMA, le=EVENTS_SCHEMA)
    sequence: int = -1
    time: float = 0.0
    """Seconds since 1970, UTC, on the supervisor's clock."""
    epoch: int = 0
    """Which start of a worker over this run directory; a worker of an earlier one can no longer publish."""
    chip: str | None = None
    """The recipe's label of the chip this is about."""
    rank: int | None = None
    role: str = LEARNER
    """Whose work this is about: `learner`, `candidate:<label>`, `rollout:<n>`. The `run` and `finish` events are about
    all roles, whatever they name."""


class RunStarted(Event):
    """A supervisor took this run directory."""

    kind: Literal["run"] = "run"
    name: str
    recipe_hash: str
    beringia: str
    steps: int
    prefer: tuple[str, ...]
    run_identity: str = ""
    """Hash of what makes this run this run; `recipe_hash` covers what may change, too. Empty in older lines."""


class RecipeChanged(Event):
    """The run goes on with a recipe that differs from the one before in what may change, or begins anew with one."""

    kind: Literal["recipe"] = "recipe"
    changes: dict[str, tuple[Any, Any]]
    """By key, such as `train.keep`: the value before, and the value now."""
    bitwise: bool
    """Whether the numbers that follow are bitwise those that would have followed."""
    anew: bool = False
    """Whether the run begins anew, as another one: it had done no step. `changes` lacks files whose path is the same;
    `message` names them."""
    message: str


class ChipOpened(Event):
    """A worker opened its chip and said who it is; also the result of the handshake."""

    kind: Literal["chip"] = "chip"
    asked: str
    """As named in the recipe: `auto`, `cuda`, `emulated:ascend-910b`."""
    used: str
    """What `auto` became; equal to `asked` otherwise."""
    identity: ChipIdentity
    identity_hash: str
    ranks: int
    compute_dtype: str
    sharding: Literal["none", "ddp", "fsdp2"]
    vocabulary_size: int | None = None
    """Of a preset, as the run's tokenizer has it; null where the model is a directory, which has its own."""


class StepDone(Event):
    """One optimizer step."""

    kind: Literal["step"] = "step"
    step: int
    """Steps done so far, this one included."""
    loss: float | None
    """Mean cross-entropy per target token, nats."""
    mtp_loss: float | None = None
    gradient_norm: float | None
    """Global L2 norm before clipping."""
    learning_rate: float
    tokens: int
    """Target tokens in this step, over all ranks."""
    seconds: float
    cursor: int
    """Samples consumed so far, over all ranks."""
    guard_seconds: float = 0.0


class Evaluated(Event):
    """Held-out loss, and sampled accuracy where the task has a checker."""

    kind: Literal["evaluation"] = "evaluation"
    step: int
    loss: float | None
    sequences: int
    accuracy: float | None = None
    accuracy_low: float | None = None
    """Wilson 95 % interval."""
    accuracy_high: float | None = None
    samples: int = 0
    chance: float | None = None
    seconds: float


class CheckpointWritten(Event):
    """A checkpoint is complete on disk: pending until trusted."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    directory: str
    """Relative to the run directory."""
    bytes: int
    state_hash: str
    pause_seconds: float
    """How long training stood still for it."""
    write_seconds: float
    found: bool = False
    """It lay there: the worker that published it did not live to tell, or the events were lost."""


class CheckpointTrusted(Event):
    """Every layer on every replica was found clean at a step after this checkpoint's."""

    kind: Literal["trusted"] = "trusted"
    step: int
    state_hash: str
    checks: tuple[CleanCheck, ...]


class CheckpointRejected(Event):
    """A checkpoint that could not be used: damaged, or written while a chip was suspect."""

    kind: Literal["rejected"] = "rejected"
    step: int
    file: str | None
    message: str


class CheckDone(Event):
    """One check of the guard, whatever it found: how much of its bound was used."""

    kind: Literal["check"] = "check"
    step: int
    detector: str
    site: str
    tensor: str
    value: float | None
    bound: float
    seconds: float
    explained: bool = False
    """Whether a value beyond its bound is no alarm because the step's data explain it: the CPU finds the same."""


class Alarm(Event):
    """A check of the guard beyond its bound."""

    kind: Literal["alarm"] = "alarm"
    step: int
    detector: str
    site: str
    """Module path, e.g. `layers.0`."""
    tensor: str
    """Which tensor of that module: `output`, `input.gradient`, `self_attn.o_proj.weight.gradient`, ..."""
    value: float | None
    """Measured; null when it was not finite."""
    bound: float
    message: str
    doubtful: bool = False
    """Whether a number of the step is not finite, or a loss many times what guessing costs: then the training may be
    at fault as well."""

    @property
    def unexplained(self) -> bool:
        """Whether it may be the training's own: doubtful, or of a value that was not finite."""
        return self.doubtful or self.value is None


class Fault(Event):
    """An error as the chip reported it, classified."""

    kind: Literal["fault"] = "fault"
    step: int | None
    code: str
    """The vendor's code or `unknown`; of the supervisor: `hang`, `exit` (a worker died), `unreachable` (a machine no
    longer starts one), `transfer` (state did not get there, or back)."""
    category: Literal["transient", "device-lost", "persistent", "ours"]
    message: str


def going_on(step: int | None) -> str:
    """The reason of a decision that an interruption alone made necessary."""
    return "begins again at step 0" if step is None else f"goes on from step {step}"


class Decision(Event):
    """What the supervisor decided, and why, in one line."""

    kind: Literal["decision"] = "decision"
    action: Literal["start", "retry", "rollback", "exclude", "skip", "cross", "stop"]
    """skip: to the next chip, from one that never held the run's state."""
    reason: str
    to_chip: str | None = None
    to_step: int | None = None
    """The checkpoint to go on from; null starts from step 0."""
    lost_steps: int = 0
    """Steps done and thrown away by this decision."""
    excluded_device: int | None = None
    accepted_spike: int | None = None
    """Step whose spike came again when the steps were taken again: from now on it is the training's own."""

    @property
    def only_goes_on(self) -> bool:
        """Whether nothing was wrong: the run had been interrupted."""
        return self.action == "retry" and self.reason == going_on(self.to_step)


class Canary(Event):
    """Steps between the last two trusted checkpoints, replayed on the new chip, held against a band."""

    kind: Literal["canary"] = "canary"
    from_step: int
    to_step: int
    difference: float | None
    """Relative difference of the replayed weights' update from the recorded one."""
    band: float
    parts: dict[str, float]
    """What the band was made of, and the further differences measured."""
    passed: bool
    seconds: float
    message: str = ""


class Resumed(Event):
    """A worker loaded a checkpoint and compared the live tensors' hash with the manifest's."""

    kind: Literal["resume"] = "resume"
    step: int
    cursor: int
    state_hash_expected: str
    state_hash: str
    load_seconds: float
    first_sample: str = ""
    """Hash of the next sample due, so that both sides can compare what comes next."""


class Crossing(Event):
    """The run goes on on another chip."""

    kind: Literal["crossing"] = "crossing"
    from_chip: str
    to_chip: str
    step: int
    state_hash_before: str
    """From the live tensors on the old chip."""
    state_hash_after: str
    """From the live tensors on the new chip."""
    band: float | None
    difference: float | None
    seconds: float
    """From the decision to the first new step, without the canary."""
    imports_seconds: float
    load_seconds: float
    canary_seconds: float


class Exported(Event):
    """A Hugging Face checkpoint was written and compared with transformers."""

    kind: Literal["export"] = "export"
    step: int
    directory: str
    largest_difference: float | None
    """Largest absolute difference of float32 logits to transformers; null when it was not compared."""
    bound: float | None


class Answered(Event):
    """The exported model answered held-out questions on the inference chip, in the engine."""

    kind: Literal["answers"] = "answers"
    step: int
    used: str
    """The chip's name with `auto` resolved."""
    identity_hash: str
    sku: str
    truth: Literal["real", "emulated"]
    trained_on: str
    """Label of the chip whose log-probabilities it is compared with: the one that trained last."""
    weights_hash: str
    """Of the weights as the inference chip multiplies with them."""
    compute_dtype: str
    operators: str
    questions: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    chance: float
    new_tokens: int
    tokens_a_second: float
    mean_logprob_difference: float
    """Mean absolute difference of the answers' tokens' log-probabilities, in nats."""
    largest_logprob_difference: float


class Fallback(Event):
    """Something else than asked for was used, and why."""

    kind: Literal["fallback"] = "fallback"
    what: str
    asked: str
    used: str
    reason: str


class Qualified(Event):
    """A chip was qualified for the run's model; `certificate` has the evidence."""

    kind: Literal["qualified"] = "qualified"
    used: str
    """As the chip is named, `auto` resolved."""
    identity_hash: str
    verdict: Literal["train", "infer", "unfit", "inconclusive"]
    reasons: tuple[str, ...]
    first_wrong: str | None
    """The first operator that is wrong."""
    certificate: str
    """Relative to the run directory."""
    seconds: float
    asked: str | None = None
    """Hash of what the recipe asked of the chip; null where that was not noted."""


class Unqualified(Event):
    """A chip was opened that may not train: no certificate says that it can train this model. It is sent no state."""

    kind: Literal["unqualified"] = "unqualified"
    used: str
    """The chip, as in the `chip` event."""
    identity_hash: str
    found: str
    """`none`, or what its certificate says: `verdict infer`."""
    reason: str


class RunFinished(Event):
    """The run reached its end, or was given up."""

    kind: Literal["finish"] = "finish"
    status: Literal["done", "given-up", "stopped"]
    step: int
    message: str
    signal: int | None = None
    """Number of the signal that stopped it; null where none did."""
    told: bool = False
    """Whether the user was told to mend what went wrong: then it is not decided about again."""


AnyEvent = Annotated[
    RunStarted
    | RecipeChanged
    | ChipOpened
    | StepDone
    | Evaluated
    | CheckpointWritten
    | CheckpointTrusted
    | CheckpointRejected
    | CheckDone
    | Alarm
    | Fault
    | Decision
    | Canary
    | Resumed
    | Crossing
    | Exported
    | Answered
    | Fallback
    | Qualified
    | Unqualified
    | RunFinished,
    Field(discriminator="kind"),
]

_ADAPTER: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)


def parse_event(line: dict[str, Any]) -> AnyEvent:
    """One event from one line of `events.jsonl`; raises pydantic's ValidationError if it is not one."""
    return _ADAPTER.validate_python(line, strict=False)


def parse_event_line(line: bytes) -> AnyEvent:
    """One event from the bytes of a line, in one pass; raises pydantic's ValidationError if it is not one."""
    return _ADAPTER.validate_json(line)
