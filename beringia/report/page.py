"""The page of a run: `report.html`, one self-contained file that opens from a disk without a network.

Reads the run directory through `history`; writes the page. The answer comes first, then the picture, then the evidence,
then everything else folded.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from beringia.records.events import Answered, Crossing, Exported, Fallback, Qualified
from beringia.records.files import write_text
from beringia.records.run_directory import RunDirectory
from beringia.report.answer import answer, labelled
from beringia.report.curves import draw_accuracy, draw_guard, draw_loss, guard_checks, lowest_power
from beringia.report.frame import Fact, Figure, both_widths, environment
from beringia.report.history import At, History, read_history, same_state
from beringia.report.summary import Summary, accuracy_words, summarise
from beringia.report.tables import data_tables
from beringia.report.timeline import decision_label, draw_timeline, lane_of, series_of
from beringia.report.words import count, duration, percent, significant


def write_report(run_directory: Path | str) -> Path:
    """Write the run's page and return its path. Raises RunError where there is no run."""
    history = read_history(run_directory)
    path = RunDirectory(history.directory).report
    write_text(path, render_report(history))
    return path


def render_report(history: History) -> str:
    """The page as text."""
    summary = summarise(history)
    return (
        environment()
        .get_template("run.html.jinja")
        .render(
            title=f"{history.name}: run report",
            history=history,
            summary=summary,
            answer=answer(history),
            lead=_lead(history),
            facts=_facts(history, summary),
            figures=_figures(history),
            qualifications=[_qualification(history, at) for at in history.qualified],
            decisions=_decisions(history),
            crossings=[_continuity(history, at) for at in history.crossings],
            refused=[at.event for at in history.canaries if not at.event.passed],
            restarts=_restarts(history),
            fallbacks=_fallbacks(history),
            identities=_identities(history),
            tables=data_tables(history),
            recipe=json.dumps(history.recipe, indent=2, ensure_ascii=False) if history.recipe else "",
            made=_made(history),
        )
    )


_MAY = {
    "train": "may train and serve",
    "infer": "may serve, must not train",
    "unfit": "must do neither",
    "inconclusive": "is not decided: too little evidence",
}


def _qualification(history: History, at: At[Qualified]) -> dict[str, Any]:
    """What a chip's certificate says, and where its page lies beside this one."""
    page = Path(at.event.certificate).with_suffix(".html")
    return {
        "chip": at.chip,
        "verdict": at.event.verdict,
        "may": _MAY[at.event.verdict],
        "because": at.event.first_wrong or next(iter(at.event.reasons), ""),
        "wrong": at.event.first_wrong is not None,
        "seconds": at.event.seconds,
        "page": page.as_posix() if (history.directory / page).exists() else "",
    }


def _lead(history: History) -> str:
    """Why the run left its first chip, or why it stopped: the reason as the supervisor gave it."""
    if history.status in ("given-up", "stopped"):
        return history.message
    crossed = [at.event.reason for at in history.decisions if at.event.action == "cross"]
    return f"Why it crossed: {crossed[0].rstrip('.')}." if crossed else ""


def _facts(history: History, summary: Summary) -> list[Fact]:
    facts = [
        Fact("Steps", f"{history.step:,}", f"of {history.planned_steps or 0:,} planned"),
        Fact("Work thrown away", f"{summary.lost_steps:,}", f"steps, of {len(history.steps):,} done in all"),
        Fact("Wall time", duration(history.seconds), _paused(history)),
    ]
    if summary.loss is not None and history.held_out is not None:
        step = history.held_out.event.step
        facts.append(Fact("Held-out loss", significant(summary.loss), f"nats per token, step {step:,}"))
    if summary.accuracy is not None:
        facts.append(
            Fact("Accuracy", percent(summary.accuracy.value), accuracy_words(summary.accuracy).split(" (")[1][:-1])
        )
    for at in history.exports[-1:]:
        facts.append(_export_fact(at.event))
    for answered in history.answers[-1:]:
        facts.append(_answers_fact(answered.event))
    return facts


def _paused(history: History) -> str:
    paused = sum(pause.length_seconds for pause in history.pauses)
    return f"and {duration(paused)} in which nothing ran" if paused else "from start to last event"


def _answers_fact(event: Answered) -> Fact:
    interval = f"{percent(event.accuracy_low)} to {percent(event.accuracy_high)}"
    words = (
        f"right on {event.sku} ({event.truth}), {interval}, {event.questions} questions; log-probabilities "
        f"{significant(event.mean_logprob_difference, 2)} nats from {event.trained_on}'s on average"
    )
    return Fact("Served answers", percent(event.accuracy), words)


def _export_fact(event: Exported) -> Fact:
    where = f"in {event.directory}/"
    if event.largest_difference is None:
        return Fact("Export", "not compared", f"with transformers; {where}")
    limit = f"bound {significant(event.bound, 2)}; " if event.bound is not None else ""
    words = f"largest logit difference to transformers; {limit}{where}"
    return Fact("Export", significant(event.largest_difference, 2), words)


def _figures(history: History) -> list[Figure]:
    if not history.chips:
        return []
    figures = [Figure("Timeline", both_widths(lambda width: draw_timeline(history, width)), _timeline_caption(history))]
    if history.steps:
        figures.append(Figure("Loss", both_widths(lambda width: draw_loss(history, width)), _loss_caption(history)))
    if history.accuracy is not None:
        figures.append(
            Figure("Accuracy", both_widths(lambda width: draw_accuracy(history, width)), _accuracy_caption(history))
        )
    if history.checks or history.alarms:
        figures.append(Figure("Guard", both_widths(lambda width: draw_guard(history, width)), _guard_caption(history)))
    return figures


def _timeline_caption(history: History) -> str:
    trusted = sum(checkpoint.state == "trusted" for checkpoint in history.checkpoints)
    words = "What to see: an unbroken bar; no work was thrown away."
    if history.lost_steps:
        words = (
            "What to see: where the bar is hatched, work was thrown away; the arrow above it leads back to the "
            "checkpoint that the run went on from."
        )
    words += f" {trusted:,} of {count(len(history.checkpoints), 'checkpoint')} became trusted."
    if len(history.checkpoints) > 40:
        words += " Where marks would touch, one stands for its neighbours."
    if history.pauses:
        words += " A dotted upright line marks a time in which nothing ran; the axis leaves it out."
    return words


def _loss_caption(history: History) -> str:
    shown = (
        " A long run is drawn as the lowest and highest step of each pixel, and rings that do not touch."
        if len(history.steps) > 2000
        else ""
    )
    if history.crossings:
        return (
            "What to see: after the bold line the loss goes on where the old chip's trusted checkpoint left it. "
            f"Dashed: steps thrown away. Rings: held-out loss.{shown}"
        )
    return (
        f"What to see: whether the loss falls and stays finite. Dashed: steps thrown away. Rings: held-out loss.{shown}"
    )


def _accuracy_caption(history: History) -> str:
    found = history.accuracy
    if found is None or found.event.accuracy_low is None or found.event.chance is None:
        return "Sampled answers, checked; the bars are 95 % intervals."
    above = found.event.accuracy_low > found.event.chance
    verdict = "lies above chance" if above else "does not lie above chance"
    answers = f"{found.event.samples:,} answers"
    return f"What to see: the last interval {verdict}. Bars are 95 % intervals (Wilson) over {answers}."


def _guard_caption(history: History) -> str:
    checks = guard_checks(history)
    spent = sum(step.event.guard_seconds for step in history.steps)
    total = sum(step.event.seconds for step in history.steps)
    beyond, alarms = sum(check.share > 1 for check in checks), len(history.alarms)
    raised = "" if beyond == alarms else f"; {count(alarms, 'alarm')} came of it"
    words = (
        f"What to see: how far below the dashed line the checks stay. Triangles went beyond their bound: "
        f"{beyond} of {count(len(checks), 'check')}{raised}. "
        f"The guard took {percent(spent / total if total else 0.0, 2)} of the step time."
    )
    floor = lowest_power(history)
    return words + (f" Checks below {floor} of their bound are drawn on the lowest line." if floor else "")


def _decisions(history: History) -> list[dict[str, Any]]:
    return [
        {
            "number": number,
            "seconds": at.seconds,
            "action": at.event.action,
            "label": decision_label(at.event),
            "chip": labelled(history, lane_of(history, at)),
            "lost": at.event.lost_steps,
            "reason": "the run had been interrupted" if at.event.only_goes_on else at.event.reason,
        }
        for number, at in enumerate(history.decisions, start=1)
    ]


def _continuity(history: History, at: At[Crossing]) -> dict[str, Any]:
    event = at.event
    return {
        "event": event,
        "chips": [
            (chip, series_of(history, label))
            for label in (event.from_chip, event.to_chip)
            if (chip := history.chip(label))
        ],
        "due": next((step.event.cursor for step in history.steps if step.kept and step.event.step == event.step), None),
        "equal": same_state(event),
        "canary": history.canary_of(at),
        "resume": history.resume_of(at),
        "inside": event.difference is not None and event.band is not None and event.difference <= event.band,
        "share": min(1.0, (event.difference or 0.0) / event.band) if event.band else 0.0,
    }


def _restarts(history: History) -> dict[str, int]:
    equal = sum(at.event.state_hash == at.event.state_hash_expected for at in history.resumes)
    return {"all": len(history.resumes), "equal": equal}


def _fallbacks(history: History) -> list[tuple[At[Fallback], int]]:
    """Each once, and how often it was told: a chip that is opened again says the same again."""
    same = [(at.chip, at.event.what, at.event.asked, at.event.used, at.event.reason) for at in history.fallbacks]
    first = {key: at for key, at in reversed(list(zip(same, history.fallbacks, strict=True)))}
    return [(at, same.count(key)) for key, at in reversed(first.items())]


def _identities(history: History) -> list[dict[str, Any]]:
    return [
        {"chip": chip, "series": series_of(history, chip.label), "identity": identity, "hash": identity.hash}
        for chip in history.chips
        for identity in chip.identities
    ]


def _made(history: History) -> str:
    if history.started is None:
        return ""
    return f"{datetime.fromtimestamp(history.started, UTC):%Y-%m-%d %H:%M:%S} UTC"
