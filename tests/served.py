"""A real server in a process of its own, on a free port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from waiting import GIVE_UP_SECONDS


class Server:
    """A running `beringia serve`."""

    def __init__(self, process: subprocess.Popen[str], about: dict[str, Any]) -> None:
        self.process, self.about = process, about
        self.url: str = about["url"]

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.partition(" ")[0] == name)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=GIVE_UP_SECONDS, **more)

    def post(self, body: object, *, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=GIVE_UP_SECONDS, **more)

    def stop(self) -> tuple[int, str]:
        """SIGTERM; exit code and what it said."""
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=GIVE_UP_SECONDS)
        return self.process.returncode, said


@contextmanager
def serving(model: str | Path, *arguments: str, program: tuple[str, ...] = ("-m", "beringia")) -> Iterator[Server]:
    command = [sys.executable, *program, "serve", str(model), "--port", "0", "--json", *arguments]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise AssertionError(process.communicate(timeout=GIVE_UP_SECONDS)[1])
        about = json.loads(line)
        if "error" in about:
            raise AssertionError(about["message"])
        yield Server(process, about)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(GIVE_UP_SECONDS)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
