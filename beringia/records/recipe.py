"""The recipe: what the user asks for, as TOML read into one strict model.

An unknown key is an error with a did-you-mean. Every field is documented below it. The hash of the recipe goes into
every artefact. What may change while a run stays the same run is in `recipe_identity.py`, a rule for each key.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from beringia.errors import RecipeError
from beringia.records.certificate import PublicKey
from beringia.records.record import Record, canonical_hash
from beringia.records.shares import rows_in_a_period
from beringia.records.toml_file import read_toml

_Beta = Annotated[float, Field(ge=0, lt=1)]
_LABEL = re.compile(r"\w[\w .+-]{0,99}")
_LONGEST_SECONDS = 1e8
"""Three years: what system calls take as a time-out."""


class ModelSection(Record):
    """Which model. Exactly one of `preset`, `path` and `run`."""

    preset: str | None = None
    """`r2-nano`, `r2-micro`, `r2-small`: seeded random weights."""
    path: str | None = None
    """A Hugging Face directory: its weights and tokenizer."""
    run: str | None = None
    """Another run's directory: the weights and the tokenizer of its newest trusted checkpoint when this run begins.
    They are copied then; moments and data do not go on."""
    step: int | None = Field(default=None, ge=1)
    """The checkpoint of `run` to take, trusted or not; default: the newest trusted one."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.preset, self.path, self.run)) != 1:
            raise ValueError("give exactly one of preset, path and run")
        if self.step is not None and self.run is None:
            raise ValueError("step names a checkpoint of run, and there is no run")
        return self


class ChipSection(Record):
    """One chip the run may use. The table's name is the user's label for it."""

    use: str
    """`cpu`, `cuda`, `npu`, `auto` or `emulated:<profile>`."""
    python: str | None = None
    """Interpreter of the environment that has this chip's torch; default: the one that runs Beringia."""
    launch: tuple[str, ...] = ()
    """Command prefix that reaches the chip's machine: `["ssh", "node7"]`, `["srun", "-N1"]`."""
    launcher: str = "prefix"
    """How `launch` is used: a file of `processes/launchers/`. `prefix`: as the beginning of a command line."""
    root: str | None = None
    """Run directory on that machine when it does not share this file system; state is then moved and checked by
    hash."""
    ranks: int = Field(default=1, ge=1)
    """Worker processes on that machine, one device each."""
    faults: str | None = None
    """Emulated chips only: a named fault script, or the path of one."""


class MixSection(Record):
    """One of several data sets (`[[data.mix]]`). Exactly one of `task`, `text` and `chat`, as in `[data]`."""

    task: str | None = None
    """A task, as `data.task`. Where `data.tokenizer` is another one, each of its symbols must be one token there."""
    text: str | None = None
    """Text, as `data.text`."""
    chat: str | None = None
    """Chats, as `data.chat`."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Its share of the rows is this over the sum of all weights: up to one row, at every moment."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.task, self.text, self.chat)) != 1:
            raise ValueError("give exactly one of task, text and chat")
        return self


class DataSection(Record):
    """What it learns from. Exactly one of `task`, `text`, `chat` and `mix`."""

    task: str | None = None
    """`digit-sum`, `digit-product` or `digit-sort`: generated, with a checker."""
    text: str | None = None
    """A directory (or one file) of text, JSONL or Parquet, compressed with gzip or not; packed into token shards."""
    chat: str | None = None
    """Chats (`messages`): a JSONL or Parquet file, or a directory of them, compressed with gzip or not; the prompt is
    masked out of the loss."""
    mix: tuple[MixSection, ...] = ()
    """Several data sets, each with a weight; what else stands here holds for all of them."""
    tokenizer: str | None = None
    """A directory that AutoTokenizer loads; `bytes` for raw bytes; default: the task's or the model's own."""
    sequence_length: int = Field(default=64, ge=8)
    """Tokens a sample."""
    digits: int = Field(default=10, ge=2)
    """Digits in a task's question."""
    long_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of samples that spell out the chain of thought."""
    held_out_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of documents, chats or a task's questions that training never sees."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.task, self.text, self.chat, self.mix or None)) != 1:
            raise ValueError("give exactly one of task, text, chat and mix")
        if self.mix:
            rows_in_a_period([source.weight for source in self.mix])
        return self

    @property
    def sources(self) -> tuple[DataSection, ...]:
        """Itself, or one section for each data set of `mix`, with what they have in common."""
        each = ({"mix": (), "task": one.task, "text": one.text, "chat": one.chat} for one in self.mix)
        return tuple(self.model_copy(update=update) for update in each) or (self,)

    @property
    def words(self) -> str:
        """What it learns from, for messages."""
        return ", ".join(str(source.task or source.text or source.chat) for source in self.sources)


class TrainSection(Record):
    """How it is trained."""

    prefer: tuple[str, ...]
    """Chip labels in the order in which they are tried."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps in all; a run may be given more of them later. This or `epochs`."""
    epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Instead of `steps`: how often the data is gone through; of several data sets, as many rows as they hold together.
    The steps that this takes, rounded up, are told at the start. A run may be given more later."""
    schedule_steps: int | None = Field(default=None, ge=1)
    """The step at which the learning rate has fallen to its last value, and stays there; default: the `steps` that the
    run was begun with."""
    batch: int = Field(default=32, ge=1)
    """Samples in one optimizer step, over all ranks and accumulation steps."""
    accumulate: int = Field(default=1, ge=1)
    """Gradient accumulation steps in one optimizer step."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Of AdamW, at its peak."""
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    """How the learning rate falls after the warm-up, until `schedule_steps`. `linear`: all the way. `cosine`: along
    half a cosine. `wsd` (warm-up, stable, decay): it stays, and falls linearly at the end."""
    decay_fraction: float = Field(default=0.1, gt=0, le=1)
    """`wsd` only: share of the schedule's steps, its last ones, in which the learning rate falls."""
    final_learning_rate: float = Field(default=0.05, ge=0, le=1)
    """Share of the learning rate left at the schedule's last step."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps in which the learning rate rises linearly from 0; part of the schedule's steps."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.98)
    """Of AdamW's two averages."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW, for matrices: the share of a weight that a step at learning rate 1 would take away."""
    clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of products; master weights are float32 always. `auto`: bfloat16 where the chip computes it natively."""
    compile: bool = False
    """torch.compile; where there is no compiler the run goes on eagerly and an event says so."""
    router_bias_speed: float = Field(default=1e-3, ge=0)
    """How far a router's correction bias moves in a step (DeepSeek-V3 section 2.1.2)."""
    mtp_weight: float = Field(default=0.1, ge=0)
    """Weight of the multi-token prediction loss; 0 leaves the module untrained."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps from one checkpoint to the next."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints kept, besides the last two trusted."""
    evaluate_every: int = Field(default=200, ge=1)
    """Steps from one evaluation to the next; there is one after the last step, too."""
    evaluation_sequences: int = Field(default=256, ge=1)
    """Held-out samples whose loss an evaluation takes."""
    accuracy_samples: int = Field(default=256, ge=0)
    """Questions sampled at temperature 1 and checked, where the task has a checker; 0 samples none."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self

    @property
    def last_step(self) -> int:
        """Optimizer steps in all. Of a recipe in epochs they are not known: `recipe_identity.in_steps`."""
        assert self.steps is not None
        return self.steps

    @property
    def horizon(self) -> int:
        """The schedule's last step."""
        return self.last_step if self.schedule_steps is None else self.schedule_steps


class GuardSection(Record):
    """The checks inside training."""

    share: float = Field(default=0.01, ge=0, le=0.5)
    """Share of the step time that checks may take; 0 turns the guard off, and an event says so."""


class QualifySection(Record):
    """What a chip must have proved before it trains. Evidence are the signed certificates in the run directory's
    `certificates/` that are for the chip's identity, as it was opened, and for this model."""

    unqualified: Literal["refuse", "allow"] = "refuse"
    """What becomes of a chip without a certificate whose verdict is `train`. `refuse`: it trains nothing, and the run
    goes to the next chip of `train.prefer`, or stops. `allow`: it trains, and an event says so."""
    on_refusal: Literal["skip", "try"] = "skip"
    """Where `unqualified` is `refuse`: what becomes of a chip whose certificate has another verdict than `train`.
    `skip`: it is passed over. `try`: it trains all the same, and an event says so."""
    trusted_keys: tuple[PublicKey, ...] = ()
    """Public keys whose signatures count; none named: any. `beringia verify` prints who signed a certificate."""


class ServeSection(Record):
    """The campaign's last stage: the exported model answers held-out questions on the inference chip."""

    chip: str | None = None
    """Label of the chip; none: nothing is answered."""
    questions: int = Field(default=256, ge=1)
    """Held-out questions that it answers."""


class SuperviseSection(Record):
    """When to retry, roll back, cross or give up."""

    transient_retries: int = Field(default=3, ge=0)
    """Transient faults retried on one chip within `transient_window` steps before it counts as persistent."""
    transient_window: int = Field(default=200, ge=1)
    """Steps within which transient faults are counted together."""
    rollbacks: int = Field(default=1, ge=0)
    """Rollbacks for alarms at one site on one chip before the run crosses."""
    hang_seconds: float = Field(default=120.0, gt=0, le=_LONGEST_SECONDS)
    """No progress for this long is a hang: the stacks of every rank are written and the worker is ended."""
    start_seconds: float = Field(default=300.0, gt=0, le=_LONGEST_SECONDS)
    """Time a worker has to open its chip and load its state."""
    restart_seconds: float = Field(default=5.0, ge=0, le=_LONGEST_SECONDS)
    """Pause before a machine that was in use and no longer answers is tried again; twice as long each time."""
    grace_seconds: float = Field(default=30.0, gt=0, le=_LONGEST_SECONDS)
    """After SIGTERM, SIGINT or SIGHUP, time to write a last checkpoint."""


class Recipe(Record):
    """The whole recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Of the run; its directory is `runs/<name>` unless `--out` says another. Letters, digits, `.`, `_`, `-`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the initial weights, the data and its order; with it a run is bitwise the same on the same chip."""
    model: ModelSection
    chips: dict[str, ChipSection]
    data: DataSection
    train: TrainSection
    guard: GuardSection = GuardSection()
    qualify: QualifySection = QualifySection()
    serve: ServeSection = ServeSection()
    supervise: SuperviseSection = SuperviseSection()

    @model_validator(mode="after")
    def _labels_exist(self) -> Self:
        for label in self.chips:
            if not _LABEL.fullmatch(label):
                raise ValueError(
                    f"the chip's label {label!r} names files: use letters, digits, '.', '_', '-' and spaces"
                )
        for label in self.train.prefer:
            if label not in self.chips:
                raise ValueError(f"train.prefer names {label!r}, but the chips are {', '.join(map(repr, self.chips))}")
        if self.serve.chip is not None and self.serve.chip not in self.chips:
            raise ValueError(f"serve.chip is {self.serve.chip!r}, but the chips are {', '.join(map(repr, self.chips))}")
        if self.serve.chip is not None and self.data.task is None:
            raise ValueError("serve.chip answers the questions of a task, and data.task names none: leave serve out")
        if not self.train.prefer:
            raise ValueError("train.prefer is empty: name at least one chip")
        endless = next((source.task for source in self.data.sources if source.task is not None), None)
        if self.train.epochs is not None and endless is not None:
            raise ValueError(
                f"train.epochs counts passes over data, and {endless} goes on without end: give train.steps"
            )
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of all fields."""
        return canonical_hash(self)


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe file; `overrides` maps dotted keys (`train.steps`) to values, or to None where the key is to be as
    if it did not stand there. Raises RecipeError."""
    try:
        document = read_toml(path)
    except FileNotFoundError:
        raise RecipeError(
            f"There is no recipe at {path}. Give the path of a TOML file, or a name that `beringia recipes` lists."
        ) from None
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read as a recipe: {error.strerror}. Give the path of a TOML file."
        ) from None
    except ValueError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}.") from None
    changes = overrides or {}
    for key in (key for key, value in changes.items() if value is None):
        _unset(document, key)  # first: what stands in the way of another key's new value
    for key, value in changes.items():
        if value is not None:
            _set(document, key, value)
    return parse_recipe(document, str(path))


def parse_recipe(document: dict[str, Any], source: str) -> Recipe:
    """A recipe from a parsed document; `source` names it in errors. Raises RecipeError with one clear sentence."""
    for key, value in _numbers_that_are_none(document):
        raise RecipeError(f"{source}: '{key}' is {value}: give a finite number.")
    try:
        return Recipe.model_validate_json(_as_json(document))
    except ValidationError as error:
        raise RecipeError(f"{source}: {_explain(error)}") from None


def _numbers_that_are_none(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Infinities and NaN, which TOML knows and no setting means anything by, with their dotted keys."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from _numbers_that_are_none(part, f"{key}.{name}" if key else str(name))


def _as_json(document: dict[str, Any]) -> str:
    # Strict JSON mode lets arrays become tuples while still refusing "3" for 3.
    import json

    return json.dumps(document, default=str)


def _set(document: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    place: Any = document
    for parent in parents:
        place = _below(place, parent, dotted)
    if isinstance(place, list):
        _below(place, last, dotted)  # to be there
        place[int(last)] = value
    else:
        place[last] = value


def _below(place: Any, name: str, dotted: str) -> Any:
    """The table of that name, made where it is not there, or the table of that number in a list."""
    if isinstance(place, list):
        if not name.isdecimal() or int(name) >= len(place):
            raise RecipeError(f"--set {dotted}: there are {len(place)} of these, numbered from 0; {name} is none.")
        return place[int(name)]
    below = place.setdefault(name, {})
    if not isinstance(below, dict | list):
        raise RecipeError(f"--set {dotted}: {name} is a value, not a table.")
    return below


def _unset(document: dict[str, Any], dotted: str) -> None:
    """Take a key away, if it is there."""
    *parents, last = dotted.split(".")
    _check_may_be_unset(parents, last, dotted)
    place: Any = document
    for parent in parents:
        if isinstance(place, dict) and parent not in place:
            return
        place = _below(place, parent, dotted)
    if isinstance(place, dict):
        place.pop(last, None)


def _check_may_be_unset(parents: list[str], name: str, dotted: str) -> None:
    """Raise RecipeError for a key that a recipe must have, or that no recipe has."""
    if parents in (["chips"], ["data", "mix"]):  # a whole chip goes; a list has no holes
        if parents == ["chips"]:
            return
        raise RecipeError(f"--set {dotted}=: of a list no single entry can be unset, only all of it: --set data.mix=.")
    section = _section(parents)
    if name not in section.model_fields:
        raise RecipeError(f"--set {dotted}=: unknown key {dotted!r}. {_hint(name, list(section.model_fields))}")
    if section.model_fields[name].is_required():
        raise RecipeError(f"--set {dotted}=: {dotted} cannot be unset, for a recipe must have it: give it a value.")


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(_section(first["loc"][:-1]).model_fields)
        return f"unknown key {where!r}. {_hint(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"{where!r} is missing."
    message = first["msg"].removeprefix("Value error, ")
    return f"{where or 'the recipe'}: {message}." if not where else f"{where!r}: {message} (found {first['input']!r})."


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known here: {', '.join(sorted(known))}."


def _section(location: Sequence[int | str]) -> type[BaseModel]:
    """The model of the table at a place in a recipe."""
    model: type[BaseModel] = Recipe
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:  # a user's label under [chips], a number in a list
            continue
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if _is_model(kind)]
        if inner:
            model = inner[0]
    return model


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
