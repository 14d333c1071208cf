"""Writes docs/campaign.md, its picture and README's closing table from the run directory of a real campaign.

    beringia campaign r2-nano && python benchmarks/campaign_document.py runs/r2-nano

Every line of the log and of the table is counted from that run's events; the sentences between say what to see, and are
refused where the run went otherwise. The picture is the top of the run's page in a headless Chromium, in the light
theme; without one the old picture stays.
"""

from __future__ import annotations

import argparse
import io
import platform
import shutil
import subprocess
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

from beringia.history.log import read_events
from beringia.machine.threads import usable_cores
from beringia.progress import describe
from beringia.records.events import Answered, AnyEvent, Exported, Qualified
from beringia.records.run_directory import RunDirectory
from beringia.report.history import History, read_history
from beringia.report.summary import print_table, summarise
from beringia.report.words import clock, duration

ROOT = Path(__file__).parents[1]
DOCUMENT, PICTURE, README = ROOT / "docs" / "campaign.md", ROOT / "docs" / "campaign.png", ROOT / "README.md"
COLUMNS = 116
WIDTH, HEIGHT = 1160, 1310
"""Of the picture, in pixels: the page's column, down to the end of its timeline."""

STORY = ["start", "skip", "retry", "rollback", "rollback", "cross"]
"""What the supervisor decides in r2-nano: the sentences below tell of these."""

QUALIFICATION = """Each chip is held against the CPU with this model: its operators against float64, whole steps against
a noise floor, attention at four times the run's length. The first lot's attention is wrong in its backward pass only,
so it may serve and must not train; its certificate ([how one is made](qualify.md)) names the operator."""

TRAINING = """The first lot is passed over. The second trains, and its fault script strikes three times: a device
exception that passes (`retry` from the last checkpoint), a corruption that the guard notices (`rollback` to a *trusted*
checkpoint), and attention's backward pass wrong from then on, which a replay of one layer in float64 finds. When that
comes again after a rollback the chip is left and the run crosses to the CPU: the state's hash is the same on both
sides, and the steps before the crossing, replayed on the new chip (`canary`), differ by no more than the two chips'
arithmetic explains."""

HANDING_ON = """The model is written as a Hugging Face directory, compared with transformers' logits, and answers
held-out questions on the first lot, which was refused for training and kept for inference."""

CAPTION = "The top of the run's page: the answer, the chips, and a timeline with a lane for each."


def document(run: Path) -> str:
    """The whole of docs/campaign.md."""
    history = read_history(run)
    decisions = [at.event.action for at in history.decisions]
    if decisions != STORY or history.status != "done":
        raise SystemExit(f"{run} is another story: {decisions}, {history.status}; the page tells of {STORY}.")
    told = list(read_events(RunDirectory(run).events))
    return "\n\n".join(
        [
            "# A campaign, line by line",
            "<!-- Written by `python benchmarks/campaign_document.py RUN` from a real run; not by hand. -->",
            _introduction(history, told),
            f"![{CAPTION}]({PICTURE.name})",
            f"## Qualification\n\n{QUALIFICATION}",
            _log(history, [event for event in told if isinstance(event, Qualified)]),
            f"## Training\n\n{TRAINING}",
            _log(history, [event for event in told if not isinstance(event, Qualified | Exported | Answered)]),
            f"## Handing on\n\n{HANDING_ON}",
            _log(history, [event for event in told if isinstance(event, Exported | Answered)]),
            f"## The closing table\n\n{_table(history)}",
            "*Redone* are steps that were done and thrown away; *identity* is the hash of the chip with its software, "
            "as in its certificate.\n",
        ]
    )


def _introduction(history: History, told: Sequence[AnyEvent]) -> str:
    finished = datetime.fromtimestamp(told[-1].time, UTC)
    machine = f"{usable_cores()} cores of {_processor()}, torch {torch.__version__}, other work beside it"
    sentences = (
        f"What `beringia campaign r2-nano` said on {finished:%Y-%m-%d} on {machine},",
        f"in {duration(told[-1].time - (history.started or 0.0))}.",
        f"{history.planned_steps} steps of a small model of DeepSeek-V3's architecture, on two lots of *emulated*",
        "Ascend 910Bs with planted faults and on the CPU. In front of each line: minutes and seconds since the start.",
        "Everything stands in `events.jsonl` ([events](events.md)); page and table are made from it.",
    )
    return "\n".join(textwrap.wrap(" ".join(sentences), COLUMNS))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _log(history: History, told: Sequence[AnyEvent]) -> str:
    lines: list[str] = []
    for event in told:
        line = describe(event)
        if line is not None:
            stamp = f"{clock(event.time - (history.started or 0.0)):>5}  "
            lines += textwrap.wrap(line, COLUMNS, initial_indent=stamp, subsequent_indent=" " * len(stamp))
    return "\n".join(["```text", *lines, "```"])


def _table(history: History) -> str:
    text = io.StringIO()
    print_table(summarise(history), Console(file=text, width=100, force_terminal=False))
    return "\n".join(["```text", *(line.rstrip() for line in text.getvalue().strip().splitlines()), "```"])


def with_table(readme: str, table: str) -> str:
    """README with the closing table between its marks."""
    begin, end = "<!-- closing-table -->", "<!-- /closing-table -->"
    before, rest = readme.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def _photograph(page: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return
    size = [f"--window-size={WIDTH},{HEIGHT}", "--hide-scrollbars", "--force-device-scale-factor=1"]
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *size,
        f"--screenshot={PICTURE}",
        page.resolve().as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    """The three files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    DOCUMENT.write_text(document(run))
    README.write_text(with_table(README.read_text(), _table(read_history(run))))
    _photograph(RunDirectory(run).report)


if __name__ == "__main__":
    main()
