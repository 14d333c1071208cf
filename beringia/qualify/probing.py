"""Runs the process that has the chip and reads its evidence; a chip that hangs or dies is a finding, not an error."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import beringia.errors as errors
from beringia.errors import BeringiaError, HandshakeError
from beringia.qualify.evidence import (
    Begun,
    Checked,
    Ended,
    Failed,
    Job,
    Line,
    Opened,
    Probed,
    Unrepeatable,
    line_adapter,
)
from beringia.records.certificate import OperatorCheck, ProbeResult
from beringia.records.jsonl import read_lines

PATIENCE_SECONDS = 900.0
"""Without a new fact: the watched steps of a model with 10^9 parameters take minutes."""
_POLL_SECONDS = 0.05


@dataclass
class Evidence:
    """What came out of one process."""

    opened: Opened | None = None
    probes: list[ProbeResult] = field(default_factory=list)
    checks: list[OperatorCheck] = field(default_factory=list)
    unrepeatable: Unrepeatable | None = None
    complete: bool = False

    def take(self, line: Line) -> None:
        """Add one fact."""
        match line:
            case Opened():
                self.opened = line
            case Probed():
                self.probes.append(line.result)
            case Checked():
                self.checks.append(line.check)
            case Unrepeatable():
                self.unrepeatable = line
            case Ended():
                self.complete = True
            case Begun() | Failed():
                pass


@dataclass(frozen=True)
class Interpreter:
    """How a process is started where the chip is."""

    python: str = sys.executable
    launch: Sequence[str] = ()
    environment: dict[str, str] | None = None


def run_job(
    job: Job,
    interpreter: Interpreter,
    *,
    patience_seconds: float = PATIENCE_SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> Evidence:
    """Do a job in a process of its own.

    Raises what the job says is the user's to mend, HandshakeError where the process did not open its chip.
    """
    path = Path(job.evidence)
    path.unlink(missing_ok=True)
    log = path.with_suffix(".log")
    with open(log, "wb") as errors_file:
        process = subprocess.Popen(
            [*interpreter.launch, interpreter.python, "-m", "beringia.qualify.worker"],
            stdin=subprocess.PIPE,
            stdout=errors_file,
            stderr=errors_file,
            env=None if interpreter.environment is None else os.environ | interpreter.environment,
            start_new_session=True,
        )
        try:
            return _Follower(job, process, path, log, patience_seconds, say).follow()
        finally:
            _end(process)


class _Follower:
    def __init__(
        self,
        job: Job,
        process: subprocess.Popen[bytes],
        path: Path,
        log: Path,
        patience_seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self._process = process
        self._path = path
        self._log = log
        self._patience = patience_seconds
        self._say = say
        self._offset = 0
        self._begun = "opening"
        self._evidence = Evidence()
        assert process.stdin is not None
        # It may have ended before it listened: its status and log say why.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(job.model_dump_json().encode())
            process.stdin.close()

    def follow(self) -> Evidence:
        heard_at = time.monotonic()
        while True:
            ended = self._process.poll() is not None
            if self._read():
                heard_at = time.monotonic()
            if ended:
                return self._close(self._process.returncode)
            if time.monotonic() - heard_at > self._patience:
                if self._evidence.opened is None:
                    raise HandshakeError(
                        f"The chip was not opened within {self._patience:g} s: {_last_line(self._log)}"
                    )
                self._fail(f"the chip's process did not get on for {self._patience:g} s and was ended")
                return self._evidence
            time.sleep(_POLL_SECONDS)

    def _read(self) -> bool:
        """Take in new lines; whether there were any."""
        before = self._offset
        for offset, document in read_lines(self._path, self._offset):
            self._offset = offset
            self._take(line_adapter.validate_python(document, strict=False))
        return self._offset > before

    def _take(self, line: Line) -> None:
        self._evidence.take(line)
        if isinstance(line, Begun):
            self._begun = line.probe
            self._say(line.probe)
        elif isinstance(line, Failed):
            raise _error_called(line.error, line.message)

    def _close(self, status: int) -> Evidence:
        if self._evidence.opened is None:
            raise HandshakeError(f"The process of the chip did not start ({_how(status)}): {_last_line(self._log)}")
        if status != 0 and status > 0:
            raise BeringiaError(f"Probing failed ({_how(status)}): {_last_line(self._log)}")
        if status < 0:
            self._fail(f"the chip's process died ({_how(status)}): {_last_line(self._log)}")
        return self._evidence

    def _fail(self, what: str) -> None:
        self._evidence.probes.append(
            ProbeResult(
                probe=self._begun,
                subject="the chip",
                outcome="failed",
                rules_out="infer",
                summary=f"while probing {self._begun}: {what}",
            )
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """What is left of it and of what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _how(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].strip() if lines else "it said nothing"


def _error_called(name: str, message: str) -> BeringiaError:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, BeringiaError) and kind is not errors.CheckpointDamaged:
        return kind(message)
    return BeringiaError(message)
