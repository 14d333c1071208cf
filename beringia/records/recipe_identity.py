"""What makes a run this run, and what may change while it stays the same one.

Every key of the recipe has exactly one rule (`RULES`; a test walks all fields, so a new one without a rule fails):

- `IDENTITY`: the numbers of every step follow from it: seed, the model by its preset, the task, batch, rates.
- `CONTENT`: names files whose content is identity; where they lie is not.
- `GROWS`: the run may become longer (`train.steps`, `train.epochs`) and get more chips (`train.prefer`), never fewer.
- `OPENED`: what a chip's label stands for; it may be mended until that chip was first opened, for then the history
  speaks of it, and another chip gets a label of its own.
- `ROUNDING`: the same gradient summed in another order or by other kernels (`ranks`, `accumulate`, `compile`). The run
  goes on and means the same, but from there on it is bitwise another one, and its event says so.
- `FREE`: no number of a step depends on it: how often something is kept, looked at or retried, and where a chip is
  found. Another `launch` or `python` may lead to a chip with another identity; that shows, and is told, when the chip
  is opened.

A run that has done no step is bound by none of `IDENTITY`, `CONTENT` and its length: it begins anew, with what the user
was told to mend. What its history tells of its chips stays true, so their rules hold.

Two runs are the same exactly when `run_identity` gives the same hash. It leaves out what has its default, so that a new
key with a default changes no hash; the default of a key under `IDENTITY` may change only with `IDENTITY_SCHEMA`.
Reads and writes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from enum import Enum, auto
from fractions import Fraction
from typing import Any

from beringia.records.events import Fallback, RecipeChanged
from beringia.records.inputs import Inputs
from beringia.records.recipe import ChipSection, Recipe
from beringia.records.record import Record, canonical_hash
from beringia.records.shares import rows_in_a_period

IDENTITY_SCHEMA = 1

STEPS, EPOCHS, PREFER, HORIZON, MIX = (
    "train.steps",
    "train.epochs",
    "train.prefer",
    "train.schedule_steps",
    "data.mix",
)
RUN, STEP_OF_RUN = "model.run", "model.step"


class Rule(Enum):
    """What becomes of a run when a key of its recipe changes."""

    IDENTITY = auto()
    CONTENT = auto()
    GROWS = auto()
    OPENED = auto()
    ROUNDING = auto()
    FREE = auto()


RULES: dict[Rule, tuple[str, ...]] = {
    Rule.IDENTITY: (
        "seed",
        "model.preset",
        "data.task",
        "data.mix.*.task",
        "data.mix.*.weight",
        "data.sequence_length",
        "data.digits",
        "data.long_fraction",
        "data.held_out_fraction",
        "train.batch",
        "train.learning_rate",
        "train.schedule",
        "train.decay_fraction",
        "train.final_learning_rate",
        "train.warmup_steps",
        HORIZON,
        "train.betas",
        "train.weight_decay",
        "train.clip",
        "train.compute",
        "train.router_bias_speed",
        "train.mtp_weight",
    ),
    Rule.CONTENT: (
        "model.path",
        RUN,
        STEP_OF_RUN,
        "data.text",
        "data.chat",
        "data.mix.*.text",
        "data.mix.*.chat",
        "data.tokenizer",
    ),
    Rule.GROWS: (STEPS, EPOCHS, PREFER),
    Rule.OPENED: ("chips.*.use", "chips.*.faults"),
    Rule.ROUNDING: ("train.accumulate", "train.compile", "chips.*.ranks"),
    Rule.FREE: (
        "name",
        "chips.*.python",
        "chips.*.launch",
        "chips.*.launcher",
        "chips.*.root",
        "train.checkpoint_every",
        "train.keep",
        "train.evaluate_every",
        "train.evaluation_sequences",
        "train.accuracy_samples",
        "guard.share",
        "qualify.unqualified",
        "qualify.on_refusal",
        "qualify.trusted_keys",
        "serve.chip",
        "serve.questions",
        "supervise.transient_retries",
        "supervise.transient_window",
        "supervise.rollbacks",
        "supervise.hang_seconds",
        "supervise.start_seconds",
        "supervise.restart_seconds",
        "supervise.grace_seconds",
    ),
}

Changes = dict[str, tuple[Any, Any]]
"""Key to (before, now), as JSON values. A chip that is not in a recipe has null as its `use`, and else defaults; a data
set of a mix that is not in one has nulls."""


class RunIdentity(Record):
    """What makes a run this run."""

    schema_version: int = IDENTITY_SCHEMA
    numbers: dict[str, Any]
    """Keys under `IDENTITY` that do not have their default, and the schedule's horizon."""
    contents: dict[str, str]
    """Keys under `CONTENT`: the hash of the files there, or the words of the recipe where this machine sees none."""

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        return canonical_hash(self)


def run_identity(recipe: Recipe, inputs: Inputs) -> RunIdentity:
    """The identity of a run of this recipe, on these files."""
    told = _flat(recipe.model_dump(mode="json", exclude_defaults=True))
    numbers = {key: value for key, value in told.items() if rule_of(key) is Rule.IDENTITY}
    numbers[HORIZON] = recipe.train.horizon
    named = {key: value for key, value in told.items() if rule_of(key) is Rule.CONTENT and key != STEP_OF_RUN}
    contents = {key: inputs.content(key) or value for key, value in named.items()}
    return RunIdentity(numbers=numbers, contents=contents)


def settle(recipe: Recipe, horizon: int) -> Recipe:
    """The recipe with the schedule's horizon stated, where it does not state one itself."""
    if recipe.train.schedule_steps is not None:
        return recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"schedule_steps": horizon})})


def in_steps(recipe: Recipe, rows: Sequence[int]) -> Recipe:
    """The recipe with the steps that its epochs are, `rows` being those of each data set: as many as it takes for every
    row to have had its turn that often (of a mix: for as many rows as they are together)."""
    train = recipe.train
    if train.epochs is None:
        return recipe
    steps = math.ceil(Fraction(str(train.epochs)) * sum(rows) / train.batch)
    return recipe.model_copy(update={"train": train.model_copy(update={"steps": steps, "epochs": None})})


def describe_epochs(recipe: Recipe, rows: Sequence[int]) -> Fallback:
    """What the epochs of a recipe come to, as an event."""
    train, told = recipe.train, in_steps(recipe, rows).train
    reason = f"an epoch is {sum(rows)} rows, and a step takes {train.batch}"
    if recipe.data.mix:
        shares = rows_in_a_period([source.weight for source in recipe.data.mix])
        taken = [told.last_step * train.batch * share / sum(shares) for share in shares]
        passes = (
            f"{source.words} {one / own:.3g} times"
            for source, one, own in zip(recipe.data.sources, taken, rows, strict=True)
        )
        reason += f"; by their weights that goes through {', '.join(passes)}"
    return Fallback(
        what="length", asked=f"train.epochs = {train.epochs:g}", used=f"{told.last_step} steps", reason=reason
    )


def rule_of(key: str) -> Rule:
    """The rule of a key such as `train.keep`, `data.mix.0.text` or `chips.first.ranks` (a label may hold dots)."""
    listed = next((above for above in ("chips", "data.mix") if key.startswith(f"{above}.")), None)
    general = key if listed is None else f"{listed}.*.{key.rpartition('.')[2]}"
    return next(rule for rule, keys in RULES.items() if general in keys)


def keys_of(recipe: Recipe) -> dict[str, Any]:
    """Every key of a recipe with its value as JSON has it."""
    return _flat(recipe.model_dump(mode="json"))


def changes_between(before: Recipe, now: Recipe) -> Changes:
    """What differs between two recipes, whatever its rule."""
    one, other = keys_of(before), keys_of(now)
    for label in before.chips.keys() ^ now.chips.keys():
        lacking = one if label in now.chips else other
        lacking.update({f"chips.{label}.{name}": value for name, value in _UNNAMED_CHIP.items()})
    either = [*one, *(key for key in other if key not in one)]  # a data set of a mix may be in one of them only
    return {key: (one.get(key), other.get(key)) for key in either if one.get(key) != other.get(key)}


def refusals(
    changes: Changes, before: Inputs, now: Inputs, opened: frozenset[str], *, stepped: bool = True
) -> list[str]:
    """Why these changes make it another run, a clause for each key; `opened` are the chips that the run has opened,
    `stepped` says whether it has done a step."""
    clauses = [
        _refusal(key, *pair, before, now, opened) for key, pair in changes.items() if stepped or not _shapes_steps(key)
    ]
    if stepped:
        clauses += _other_contents(changes, before, now)
    return [clause for clause in clauses if clause is not None]


def describe_beginning(changes: Changes, before: Inputs, now: Inputs) -> RecipeChanged | None:
    """The event of a run without a step that begins anew; None where nothing has changed that shapes its steps."""
    shaping = {key: pair for key, pair in changes.items() if _shapes_steps(key)}
    clauses = [
        f"{key} was {_word(was)} and is {_word(is_now)}"
        if key in (STEPS, EPOCHS)
        else _refusal(key, was, is_now, before, now, frozenset())
        for key, (was, is_now) in shaping.items()
    ]
    clauses += _other_contents(changes, before, now)
    told = "; ".join(clause for clause in clauses if clause is not None)
    if not told:
        return None
    also = [_changed(key, *changes[key]) for key in changes if key not in shaping]
    message = f"{'; '.join([told, *also])}; no step had been done, and the run begins anew"
    return RecipeChanged(changes=changes, bitwise=False, anew=True, message=message)


def describe_change(changes: Changes, recipe: Recipe, known: frozenset[str]) -> RecipeChanged | None:
    """The event of changes that are allowed, or None without any. `known` are the chips of the recipe before."""
    if not changes:
        return None
    rounding = [key for key in changes if rule_of(key) is Rule.ROUNDING and _label(key) in known | {""}]
    told = [", ".join(_changed(key, *pair) for key, pair in changes.items())]
    train = recipe.train
    if STEPS in changes and train.last_step > train.horizon:
        rate = train.final_learning_rate * train.learning_rate
        told.append(f"the learning rate falls until step {train.horizon} as planned and then stays at {rate:g}")
    if rounding:
        told.append(f"from here on it is bitwise another run: {' and '.join(rounding)} round in another order")
    return RecipeChanged(changes=changes, bitwise=not rounding, message="; ".join(told))


_UNNAMED_CHIP = {**ChipSection(use="").model_dump(mode="json"), "use": None}


def _refusal(key: str, was: Any, now: Any, before: Inputs, after: Inputs, opened: frozenset[str]) -> str | None:
    clause = f"{key} was {_word(was)} and is {_word(now)}"
    match rule_of(key):
        case Rule.IDENTITY:
            return clause
        case Rule.CONTENT:
            named = RUN if key == STEP_OF_RUN else key
            one, other = before.content(named), after.content(named)
            return None if one is not None and one == other else _what_differs(clause, named, before, after)
        case Rule.GROWS if key in (STEPS, EPOCHS):
            return None if now > was else f"{clause} (it may only grow)"
        case Rule.GROWS:
            lost = [label for label in was if label not in now]
            return f"{key} no longer names {', '.join(lost)} (chips may be added, none taken out)" if lost else None
        case Rule.OPENED if _label(key) in opened:
            return f"{clause}, but that chip has worked for this run (give another chip a label of its own)"
    return None


def _changed(key: str, was: Any, now: Any) -> str:
    return f"{key} {_word(was)} -> {_word(now)}"


def _shapes_steps(key: str) -> bool:
    return key in (STEPS, EPOCHS) or rule_of(key) in (Rule.IDENTITY, Rule.CONTENT)


def _other_contents(changes: Changes, before: Inputs, now: Inputs) -> list[str | None]:
    return [_other_content(key, before, now) for key in before.inputs if key not in changes]


def _other_content(key: str, before: Inputs, now: Inputs) -> str | None:
    one, other = before.content(key), now.content(key)
    if one is None or other is None or one == other:
        return None
    return _what_differs(f"what lies at {key}, {now.inputs[key].path}, is not what it was", key, before, now)


def _what_differs(clause: str, key: str, before: Inputs, now: Inputs) -> str:
    names = now.differences(before, key)
    return f"{clause} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else clause


def _label(key: str) -> str:
    """The chip that a key is about; empty for a key that is about none."""
    return key.removeprefix("chips.").rpartition(".")[0] if key.startswith("chips.") else ""


def _word(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)


def _flat(document: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in document.items():
        key = f"{above}{name}"
        if key == MIX:
            value = {str(number): one for number, one in enumerate(value)}
        flat.update(_flat(value, f"{key}.") if isinstance(value, dict) else {key: value})
    return flat
