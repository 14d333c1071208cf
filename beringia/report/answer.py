"""The answer first: what became of a run, in one sentence that a tired person understands.

Plain text; escaping is the template's business. A chip is never named without its truth (real or emulated).
"""

from __future__ import annotations

from beringia.report.history import History, same_state
from beringia.report.toll import toll_of


def chip_name(history: History, label: str | None) -> str:
    """`Ascend 910B (emulated)`: never a chip's name without its truth; the label alone if it never opened."""
    chip = history.chip(label) if label else None
    if chip is None:
        return label or "no chip"
    return f"{chip.identity.sku} ({chip.identity.truth})"


def labelled(history: History, label: str | None) -> str:
    """`preferred (emulated)`: the recipe's label with its truth."""
    chip = history.chip(label) if label else None
    return f"{chip.label} ({chip.identity.truth})" if chip else (label or "no chip")


def answer(history: History) -> str:
    """What a tired person wants to know, in one sentence."""
    if history.status == "empty":
        return f"{history.name} has not started: its record is empty."
    lost = toll_of(history).words(done=history.status == "done")
    return f"{history.name} {_standing(history)}{_travelled(history)}; {lost}."


def _standing(history: History) -> str:
    planned = history.planned_steps or 0
    if history.status == "done":
        return f"is done, all {planned:,} steps"
    place = f"at step {history.step:,} of {planned:,}"
    return {"given-up": f"was given up {place}", "stopped": f"was stopped {place}"}.get(
        history.status, f"is not finished: it is {place}"
    )


def _travelled(history: History) -> str:
    if not history.crossings:
        used = [chip_name(history, segment.chip) for segment in history.segments]
        return f", on {used[-1]}" if used else ", before any chip opened"
    parts = []
    for at in history.crossings:
        event = at.event
        same = {True: "exactly the same state", False: "A DIFFERENT STATE", None: "the initial state"}[
            same_state(event)
        ]
        parts.append(
            f"crossed from {chip_name(history, event.from_chip)} to {chip_name(history, event.to_chip)} "
            f"at step {event.step:,} with {same}"
        )
    return ": it " + ", then ".join(parts)
