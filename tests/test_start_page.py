"""The pages of docs/: everything that docs/start.md has to be copied is run, in order, in one empty directory; what a
page points to is there."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import own_interpreter
from waiting import until

from beringia.history.log import read_events
from beringia.records.events import Crossing

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "start.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORTER = {
    "train r2-micro-text": "train r2-micro-text --set train.batch=4 --set train.steps=8",
    "train.steps=440": "train.steps=12",
}
"""So that the test takes minutes: the same commands, of fewer steps."""


def blocks() -> list[tuple[str, str]]:
    """Language and text of everything in a fence, in order."""
    return BLOCK.findall(PAGE)


def commands(text: str) -> Iterator[tuple[str, set[int]]]:
    """Each command of a console, with the exit codes that it may have: the one that its comment names, else 0."""
    for line in text.replace("\\\n", "").splitlines():
        assert line.startswith("$ "), line
        code = re.search(r"# exit code (\d+)$", line)
        # What is stopped after a time may be done before.
        yield line[2:], {0} if code is None else {int(code[1]), 0} if "timeout" in line else {int(code[1])}


class Reader:
    """Who copies the page, block by block."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "texts").mkdir()
        for path in (ROOT / "docs").glob("*.md"):
            shutil.copy(path, directory / "texts")
        programs = directory / "programs"
        programs.mkdir()
        self._program(programs / "beringia", f'exec "{sys.executable}" -m beringia "$@"')
        # As ssh does it: the arguments are one line for a shell that starts in another directory.
        self._program(programs / "ssh", f'shift; cd "{programs}" && exec sh -c "$*"')
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.far = own_interpreter(directory / "far")
        self.environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.servers: list[subprocess.Popen[str]] = []

    @staticmethod
    def _program(path: Path, body: str) -> None:
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def as_here(self, text: str) -> str:
        """What must be another on this machine: places, a port that is free, the length of runs."""
        places = {"/opt/beringia/bin/python": self.far, "/data/": f"{self.directory}/data-", ":8000": f":{self.port}"}
        for old, new in (places | {"--port 8000": f"--port {self.port}"} | SHORTER).items():
            text = text.replace(old, new)
        return text

    def follow(self, language: str, text: str) -> None:
        """Do what a block says."""
        if language == "toml":
            name = text.split("\n", 1)[0].removeprefix("# ")
            (self.directory / name).write_text(self.as_here(text))
        elif language == "python":
            self._run([sys.executable, "-c", self.as_here(text)], {0}, text)
        else:
            for command, codes in commands(text):
                self._command(self.as_here(command), codes)

    def _command(self, command: str, codes: set[int]) -> None:
        if command.startswith("beringia serve"):
            self.servers.append(
                subprocess.Popen(
                    command.split(), cwd=self.directory, env=self.environment, text=True, stdout=subprocess.PIPE
                )
            )
            answers = ["curl", "-sf", f"http://127.0.0.1:{self.port}/ready"]
            until(lambda: subprocess.run(answers, capture_output=True).returncode == 0, "the server")
            return
        said = self._run(["bash", "-c", command], codes, command)
        if command.startswith("curl"):
            assert '"error"' not in said and '"model"' in said, said

    def _run(self, argv: list[str], codes: set[int], words: str) -> str:
        done = subprocess.run(argv, cwd=self.directory, env=self.environment, capture_output=True, text=True)
        assert done.returncode in codes, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    for server in reader.servers:
        server.terminate()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_that_stands_there_to_be_copied_runs(reader: Reader) -> None:
    for language, text in blocks():
        reader.follow(language, text)
    run = reader.directory / "runs" / "two-machines"
    (crossing,) = (event for event in read_events(run / "events.jsonl") if isinstance(event, Crossing))
    assert crossing.to_chip == "there" and crossing.state_hash_before == crossing.state_hash_after != ""


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_to_is_there(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        pointed = (page.parent / target) if target else page
        assert pointed.exists(), f"{page.name} points to {target}"
        assert not anchor or anchor in anchors(pointed), f"{page.name} points to {target}#{anchor}"


def test_every_page_is_in_the_list_of_what_to_read() -> None:
    listed = set(re.findall(r"\]\(([a-z-]+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_readmes_closing_table_is_that_of_the_campaigns_page() -> None:
    table = (ROOT / "README.md").read_text().split("<!-- closing-table -->")[1].split("<!-- /closing-table -->")[0]
    assert "identity" in table and table.strip() in (ROOT / "docs" / "campaign.md").read_text()
