"""The role of a candidate: a chip that is qualified while the run trains on another."""

from __future__ import annotations

from collections.abc import Sequence

from beringia.errors import RecipeError
from beringia.processes.child import Child, start
from beringia.processes.command import Command
from beringia.processes.patience import Patience
from beringia.qualify.probing import PATIENCE_SECONDS
from beringia.records.orders import CandidateOrder
from beringia.records.recipe import Recipe
from beringia.supervise.beside import Beside
from beringia.supervise.supervision import Supervision
from beringia.supervise.supervisor import MakeRole

_WORK = "beringia.campaign.candidate_work"


def candidates(recipe: Recipe, labels: Sequence[str]) -> list[MakeRole]:
    """Make the roles for the chips of these labels. Raises RecipeError for one that the recipe does not have."""
    for label in labels:
        if label not in recipe.chips:
            known = ", ".join(map(repr, recipe.chips))
            raise RecipeError(f"{label!r} is to be qualified, but the recipe's chips are {known}.")
    return [_candidate(label) for label in dict.fromkeys(labels)]


def _candidate(label: str) -> MakeRole:

    def make(supervision: Supervision) -> Beside:
        recipe, run = supervision.recipe, supervision.run
        order = CandidateOrder(recipe=recipe, label=label, directory=str(run.root.resolve()))
        name = f"candidate:{label}"

        def begin() -> Child:
            patience = Patience(silence_seconds=PATIENCE_SECONDS)
            return start(Command(name, _WORK), order, run.logs / f"candidate-{label}.log", patience=patience)

        # The same command again, on a run that is done, asks for what it had not got.
        over = supervision.log.fold.finished and (run.certificates / f"{label}.json").exists()
        return Beside(name, label, supervision, begin, over=over)

    return make
