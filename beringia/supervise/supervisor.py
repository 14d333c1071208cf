"""Carries one run from its recipe to its end: asks its roles in turn, each of which starts work, follows it, decides.

Vendor-free: imports no torch and opens no device. Everything it knows about a chip comes from that chip's worker, as
events. Reads the recipe; writes `events.jsonl`, the lock and the epoch of the run directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from beringia.errors import BeringiaError
from beringia.processes.child import wait_for_any
from beringia.processes.command import check_command
from beringia.processes.patience import POLL_SECONDS
from beringia.records.events import LEARNER, AnyEvent, RunFinished, RunStarted
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.chip_command import chip_command
from beringia.supervise.follower import follow, lead, rank_in
from beringia.supervise.greeting import greet_later_chips
from beringia.supervise.learner import Learner, stopped
from beringia.supervise.meeting import job_name, meeting_other_ranks
from beringia.supervise.role import Role
from beringia.supervise.run_files import taking_run
from beringia.supervise.stop_request import StopRequest, stopping_on_signals, stopping_with_torchrun
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
        with meeting_other_ranks(run), stopping_on_signals() as stop, stopping_with_torchrun(stop):
            follow(recipe, run, stop)
        status = "done" if stop.signal is None else "stopped"
        told = {"status": status, "step": 0, "message": "the first rank reports", "signal": stop.signal}
        return RunFinished.model_validate(told)
    with taking_run(recipe, recipe_text, run, on_event) as taken, meeting_other_ranks(run):
        try:
            with stopping_on_signals() as stop, stopping_with_torchrun(stop):
                supervision = Supervision(
                    taken.recipe,
                    taken.recipe_hash,
                    taken.owner,
                    run,
                    taken.lock,
                    taken.log,
                    stop,
                    launched=job_name() is not None,
                )
                return _carry(supervision, beside)
        finally:
            lead(run, None)


def _carry(supervision: Supervision, beside: Sequence[MakeRole]) -> RunFinished:
    """Ask the roles in turn until the learner says that the run is over."""
    recipe, log = supervision.recipe, supervision.log
    others = [make(supervision) for make in beside]
    if log.fold.finished:
        finished = log.fold.last(RunFinished)
        assert finished is not None
        return _until_over(others, supervision.stop, finished)
    before = log.fold.last(RunStarted)
    try:
        greet_later_chips(recipe, supervision.run, () if before is None else before.prefer, supervision.stop)
    except BeringiaError:
        if supervision.stop.comes():  # the worker that greeted was asked to end, and so is this process
            return stopped(supervision)
        raise
    started = RunStarted(
        name=recipe.name,
        recipe_hash=supervision.recipe_hash,
        beringia=__version__,
        steps=recipe.train.last_step,
        prefer=recipe.train.prefer,
        run_identity=supervision.owner.run_identity or "",
    )
    supervision.append(started, role=LEARNER)
    roles: list[Role] = [Learner(supervision, others), *others]
    return _until_over(roles, supervision.stop)


def _until_over(roles: Sequence[Role], stop: StopRequest, finished: RunFinished | None = None) -> RunFinished:
    """Ask them in turn. `finished`: how the run ended, where its learner has nothing more to do."""
    working = list(roles)
    try:
        while finished is None or (working and finished.status == "done" and stop.signal is None):
            for role in working:
                finished = role.advance() or finished
            working = [role for role in working if not (role.over or (finished is not None and role.name == LEARNER))]
            wait_for_any((role.child for role in working if role.child is not None), POLL_SECONDS)
    finally:
        for role in roles:
            role.kill()
    if working and stop.signal is not None and finished.status == "done":  # the learner is done, and others are not
        told = f"the run is done; {stop.why} before {working[0].name} was"
        return finished.model_copy(update={"status": "stopped", "signal": stop.signal, "message": told})
    return finished
