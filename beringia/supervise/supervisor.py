"""Carries one run from its recipe to its end: asks its roles in turn, each of which starts work, follows it, decides.

Vendor-free: imports no torch and opens no device. Everything it knows about a chip comes from that chip's worker, as
events. Reads the recipe; writes `events.jsonl`, the lock and the epoch of the run directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from beringia.processes.child import wait_for_any
from beringia.processes.command import check_command
from beringia.processes.patience import POLL_SECONDS
from beringia.records.events import LEARNER, AnyEvent, RunFinished, RunStarted
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.chip_command import chip_command
from beringia.supervise.follower import follow, lead, meeting_other_ranks, rank_in
from beringia.supervise.greeting import greet_later_chips
from beringia.supervise.learner import Learner
from beringia.supervise.role import Role
from beringia.supervise.run_files import taking_run
from beringia.supervise.stop_request import StopRequest, stopping_on_signals
from beringia.supervise.supervision import Supervision
from beringia.version import __version__

MakeRole = Callable[[Supervision], Role]


def supervise(
    recipe: Recipe,
    recipe_text: str,
    run: RunDirectory,
    *,
    on_event: Callable[[AnyEvent], None] | None = None,
    beside: Sequence[MakeRole] = (),
) -> RunFinished:
    """Run to the end, through whatever happens, and return how it ended.

    `beside` makes roles that work at the same time as the learner; a run that is done waits for them, one that is
    stopped or given up ends them. Going on with a run that was interrupted is the same call. Raises an InputError when
    the user must change something, Refusal when the run was given up.
    """
    for label in recipe.train.prefer:
        check_command(chip_command(label, recipe.chips[label]))
    if rank_in() > 0:
        with meeting_other_ranks(run):
            follow(recipe, run)
        return RunFinished(status="done", step=recipe.train.steps, message="the first rank reports")
    with taking_run(recipe, recipe_text, run, on_event) as taken, meeting_other_ranks(run):
        try:
            with stopping_on_signals() as stop:
                supervision = Supervision(taken.recipe, taken.owner, run, taken.lock, taken.log, stop)
                return _carry(supervision, beside)
        finally:
            lead(run, None)


def _carry(supervision: Supervision, beside: Sequence[MakeRole]) -> RunFinished:
    """Ask the roles in turn until the learner says that the run is over."""
    recipe, log = supervision.recipe, supervision.log
    if log.fold.finished:
        finished = log.fold.last(RunFinished)
        assert finished is not None
        return finished
    before = log.fold.last(RunStarted)
    greet_later_chips(recipe, supervision.run, () if before is None else before.prefer)
    started = RunStarted(
        name=recipe.name,
        recipe_hash=recipe.hash,
        beringia=__version__,
        steps=recipe.train.steps,
        prefer=recipe.train.prefer,
        run_identity=supervision.owner.run_identity or "",
    )
    supervision.append(started, role=LEARNER)
    others = [make(supervision) for make in beside]
    roles: list[Role] = [Learner(supervision, others), *others]
    try:
        return _until_over(roles, supervision.stop)
    finally:
        for role in roles:
            role.kill()


def _until_over(roles: Sequence[Role], stop: StopRequest) -> RunFinished:
    finished: RunFinished | None = None
    working = list(roles)
    while finished is None or (working and finished.status == "done" and stop.signal is None):
        for role in working:
            finished = role.advance() or finished
        working = [role for role in working if not (role.over or (finished is not None and role.name == LEARNER))]
        wait_for_any((role.child for role in working if role.child is not None), POLL_SECONDS)
    return finished
