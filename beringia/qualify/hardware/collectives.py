"""Do several devices of a chip move and add numbers right together: every collective, in processes of its own.

Starts `ranks` processes on this machine (see `rank_work.py`), watches them, and takes in what they say. A rank that
does not return within the time-out is killed, and that is a finding. The processes meet in a store on the loopback
address that this process keeps; so for a chip on another machine all of this is done there (`collectives_work.py`).

Does not see what happens between machines.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not declared so

from beringia.chips.open import first_present, present
from beringia.errors import InputError
from beringia.machine.aside import scratch_directory
from beringia.processes.child import start, wait_for_any
from beringia.processes.command import Command
from beringia.processes.patience import POLL_SECONDS, Patience
from beringia.processes.protocol import Line
from beringia.processes.words import last_lines
from beringia.qualify.exact_measures import none_allowed
from beringia.qualify.hardware.bandwidth import SUBJECT
from beringia.qualify.hardware.collective_cases import (
    COLLECTIVES,
    MOST_RANKS,
    SUMS,
    CaseReport,
    Collective,
    RankOrder,
)
from beringia.qualify.hardware.rank_work import ABSENT, ABSENT_SECONDS
from beringia.records.certificate import Measure, ProbeResult

DEVICES = "devices"
"""Subject of what is said where there are fewer than were asked for."""
NEEDED: Collective = "all-reduce"
"""What no training on several ranks does without."""
RANK_WORK = "beringia.qualify.hardware.rank_work"
_LONGEST_WORDS = 200


@dataclass(frozen=True)
class RankEnd:
    """What became of one rank's process."""

    rank: int
    reports: list[CaseReport]
    exit_code: int
    killed: bool
    """By us, because it did not return in time."""
    last_words: str
    """Last line of its standard error."""

    @property
    def last(self) -> CaseReport | None:
        """What it was doing, or did last."""
        return self.reports[-1] if self.reports else None

    def of(self, name: str) -> CaseReport | None:
        """What it says of a case: the outcome, if there is one."""
        return next((report for report in reversed(self.reports) if report.name == name), None)


def probe_collectives(
    chip_name: str,
    *,
    faults: str | None = None,
    seed: int = 0,
    ranks: int = 2,
    time_out_seconds: float = 60.0,
    bandwidth: bool = False,
) -> list[ProbeResult]:
    """Every collective on `ranks` devices of the chip, by dtype; and how ranks end when one does not come. How fast
    they are, if `bandwidth` is wanted.

    Raises ChipUnavailable where the chip cannot be opened.
    """
    if not 2 <= ranks <= MOST_RANKS:
        raise ValueError(f"ranks = {ranks}: collectives are tried on 2 to {MOST_RANKS}")
    name = first_present() if chip_name == "auto" else chip_name
    devices = number_of_devices(name)
    too_few = [] if devices is None or devices >= ranks else [_too_few(name, devices, ranks)]
    ranks = ranks if devices is None else min(ranks, devices)
    if ranks < 2:
        return too_few
    began = time.perf_counter()
    order = RankOrder(
        chip=name,
        faults=faults,
        seed=seed,
        rank=0,
        ranks=ranks,
        index=0,
        port=0,
        time_out_seconds=time_out_seconds,
        bandwidth=bandwidth,
    )
    ends = _run_ranks(order)
    return [*too_few, *judge(ends, time_out_seconds, time.perf_counter() - began)]


def number_of_devices(name: str) -> int | None:
    """How many devices of that name are here; None where any number of ranks can share one."""
    if name == "cpu" or name.startswith("emulated:"):
        return None
    return sum(found.name == name for found in present())


def judge(ends: list[RankEnd], time_out_seconds: float, seconds: float) -> list[ProbeResult]:
    """From what the ranks reported to findings. Pure."""
    subjects = dict.fromkeys(
        report.subject for end in ends for report in end.reports if report.subject.split(",")[0] in COLLECTIVES
    )
    results = [_of_subject(subject, ends) for subject in subjects]
    return [
        *_with_open_question(results),
        *_of_absent(ends, time_out_seconds),
        *_of_bandwidth(ends),
        _of_processes(ends, time_out_seconds, seconds),
    ]


# ---- processes


def _run_ranks(order: RankOrder) -> list[RankEnd]:
    store = TCPStore("127.0.0.1", 0, order.ranks, is_master=True, wait_for_workers=False)
    with scratch_directory() as directory:
        ranks: list[_Rank] = []
        try:
            for number in range(order.ranks):
                own = order.model_copy(update={"rank": number, "index": number, "port": store.port})
                ranks.append(_Rank(own, directory / f"rank-{number}.log"))
            _hear_all(ranks, order.time_out_seconds)
        finally:
            for rank in ranks:
                rank.end()
        return [rank.told() for rank in ranks]


class _Rank:
    """One rank's process."""

    def __init__(self, order: RankOrder, log: Path) -> None:
        self._number = order.rank
        command = Command(f"rank {order.rank}", RANK_WORK)
        patience = Patience(start_seconds=order.time_out_seconds, silence_seconds=order.time_out_seconds)
        self.child = start(command, order, log, patience=patience)
        self.reports: list[CaseReport] = []
        self._status, self._killed = 0, False

    def hear(self) -> None:
        """What it has said."""
        for message in self.child.poll(0.0):
            if isinstance(message, Line):
                self.reports.append(CaseReport.model_validate(message.line))

    def end(self) -> None:
        """End it, however it stands."""
        self._killed = not self.child.over
        # One that is killed is late already: it gets no time to end by itself.
        self._status = self.child.end(0.0 if self._killed else None)

    def told(self) -> RankEnd:
        """What became of it. Raises ChipUnavailable where it could not open its chip."""
        ended, status, killed = self.child.ended, self._status, self._killed
        if ended is not None and ended.error is not None and isinstance(problem := ended.error.error(), InputError):
            raise problem
        failed = ended is None or ended.why != "done"
        words = ended.message if ended is not None and ended.message else last_lines(self.child.log, 1)
        return RankEnd(self._number, self.reports, status or int(failed), killed, words[:_LONGEST_WORDS])


def _hear_all(ranks: Sequence[_Rank], seconds: float) -> None:
    """Until all have ended or the time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(rank.child.over for rank in ranks):
        wait_for_any((rank.child for rank in ranks), POLL_SECONDS)
        for rank in ranks:
            rank.hear()


# ---- findings


def _of_subject(subject: str, ends: list[RankEnd]) -> ProbeResult:
    """One collective with one dtype."""
    names = dict.fromkeys(report.name for end in ends for report in end.reports if report.subject == subject)
    rows = {name: [report for end in ends if (report := end.of(name)) is not None] for name in names}
    reports = [report for row in rows.values() for report in row]
    if all(report.state == "refused" for report in reports):
        return _result(subject, "told", f"The backend does not do it: {reports[0].reason}.", "neither")
    unfinished = [report for report in reports if report.state != "ran"]
    if unfinished:
        return _result(subject, "failed", _sentence_of_unfinished(unfinished))
    measures = _measures(subject, rows, reports)
    broken = [measure for measure in measures if measure.used > 1]
    if broken:
        return _result(subject, "failed", _sentence_of_wrong(rows, broken), measures=measures)
    kind = "within the bound of their roundings" if subject.split(",")[0] in SUMS else "bit for bit"
    return _result(
        subject,
        "passed",
        f"{len(rows)} cases on {len(ends)} ranks, each made twice, were right {kind} and repeated.",
        measures=measures,
    )


def _with_open_question(results: list[ProbeResult]) -> list[ProbeResult]:
    """One collective refused in one dtype is told. Where no all-reduce can be made in any, gradients were added up
    nowhere, and whether it can be trained on several devices is open."""
    sums = [result for result in results if result.subject.startswith(f"{NEEDED},")]
    if not sums or any(result.outcome != "told" for result in sums):
        return results
    return [_opened(result) if result in sums else result for result in results]


def _opened(result: ProbeResult) -> ProbeResult:
    words = f"{result.summary} No {NEEDED} was carried out, so whether training adds up right over ranks is open."
    return result.model_copy(update={"outcome": "inconclusive", "rules_out": "train", "summary": words})


def _measures(subject: str, rows: dict[str, list[CaseReport]], reports: list[CaseReport]) -> tuple[Measure, ...]:
    unlike = sum(len({report.digest for report in row}) > 1 for row in rows.values())
    counts = (
        none_allowed("wrong elements", sum(report.wrong for report in reports), "compared with float64 on the CPU"),
        none_allowed("cases in which ranks differ", unlike, "every rank is given the same bits"),
        none_allowed("cases that do not repeat", sum(not report.repeats for report in reports), "inputs were the same"),
    )
    if subject.split(",")[0] not in SUMS:
        return counts
    error = Measure(
        name="largest error of a sum",
        value=max(report.error for report in reports),
        bound=reports[0].bound,
        unit="of the sum of magnitudes",
        reason="ranks - 1 additions and one rounding to storage, 2u each: (1 + 2u)^ranks - 1",
    )
    return (*counts, error)


def _sentence_of_unfinished(unfinished: list[CaseReport]) -> str:
    """Of the first case that did not end well, what each rank says."""
    says = {
        "begun": "it did not come back",
        "fault": "the chip reported an error",
        "refused": "it was refused, though not on all ranks",
    }
    name = unfinished[0].name
    parts = [
        f"rank {report.rank}: {says[report.state]}{f' ({report.reason})' if report.reason else ''}"
        for report in unfinished
        if report.name == name
    ]
    return f"In {name}: {'; '.join(parts)}."


def _sentence_of_wrong(rows: dict[str, list[CaseReport]], broken: list[Measure]) -> str:
    first = next(
        name
        for name, row in rows.items()
        if any(report.wrong or not report.repeats for report in row) or len({report.digest for report in row}) > 1
    )
    found = ", ".join(f"{measure.name} {measure.value:.7g}" for measure in broken)
    return f"Not what was sent: {found}; first in {first}."


def _of_absent(ends: list[RankEnd], time_out_seconds: float) -> list[ProbeResult]:
    """What the ranks did whose peer stayed away."""
    found = [(end, report) for end in ends if (report := end.of(ABSENT)) is not None]
    if not found:
        return []
    end, report = found[0]
    asked = f"Asked to give up after {ABSENT_SECONDS:g} s, a rank whose peer stays away"
    if report.state == "ran" and report.reason:
        text = f"{asked} raised an error after {report.seconds:.1f} s: {report.reason}."
    elif report.state == "ran":
        text = f"{asked} went on after {report.seconds:.1f} s as if it had come."
    elif end.killed:
        text = f"{asked} still waited when it was killed, {time_out_seconds:g} s after it was started."
    else:
        text = f"{asked} was ended (exit code {end.exit_code}): {end.last_words}."
    return [_result(ABSENT, "told", text, "neither")]


def _of_bandwidth(ends: list[RankEnd]) -> list[ProbeResult]:
    """How fast the first rank found the links; the others waited for the same calls."""
    return [
        ProbeResult(
            probe="speed", subject=report.name, outcome="told", summary=f"{report.reason}.", seconds=report.seconds
        )
        for report in ends[0].reports
        if report.subject == SUBJECT
    ]


def _of_processes(ends: list[RankEnd], time_out_seconds: float, seconds: float) -> ProbeResult:
    """Whether every rank came to its end."""
    late = [end for end in ends if end.killed and not _in_absent(end)]
    died = [end for end in ends if end.exit_code != 0 and not end.killed and not _in_absent(end)]
    if late:
        doing = "; ".join(f"rank {end.rank} in {end.last.name if end.last else 'starting'}" for end in late)
        text = f"Killed after {time_out_seconds:g} s without returning: {doing}."
    elif died:
        text = "; ".join(f"Rank {end.rank} ended with exit code {end.exit_code}: {_why(end)}" for end in died) + "."
    else:
        text = f"All {len(ends)} ranks came to their end."
    return _result("processes", "failed" if late or died else "passed", text, seconds=seconds)


def _in_absent(end: RankEnd) -> bool:
    """Whether it ended where a peer stays away on purpose: all cases were made before."""
    return end.last is not None and end.last.subject == ABSENT


def _why(end: RankEnd) -> str:
    return (end.last.reason if end.last is not None and end.last.state == "fault" else "") or end.last_words


def _too_few(name: str, devices: int, ranks: int) -> ProbeResult:
    tried = "not tried" if devices < 2 else f"tried on {devices}"
    words = f"Collectives on {ranks} ranks need {ranks} devices and {name} has {devices} here: {tried}."
    return _result(DEVICES, "told", words, "neither")


def _result(
    subject: str,
    outcome: str,
    summary: str,
    rules_out: str = "train",
    *,
    measures: tuple[Measure, ...] = (),
    seconds: float = 0.0,
) -> ProbeResult:
    return ProbeResult.model_validate(
        {
            "probe": "collectives",
            "subject": subject,
            "outcome": outcome,
            "rules_out": rules_out,
            "summary": summary,
            "measures": measures,
            "seconds": seconds,
        }
    )
