"""The stacks of a process that hangs are written, and one that is only slow comes to no harm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from beringia.processes.words import ORPHANED_STATUS

BUSY = """
import io, sys, tokenize
from pathlib import Path
from beringia.processes.channel import Watchdog

watchdog = Watchdog(Path(sys.argv[1]), 0.06)
source = open(tokenize.__file__).read()[:20000]
for _ in range(30):
    for _ in range(12):  # longer than its patience
        list(tokenize.generate_tokens(io.StringIO(source).readline))
    watchdog.feed()
watchdog.close()
"""
LOCKED = """
import ctypes, sys
from pathlib import Path
from beringia.processes.channel import Watchdog

def hang_in_a_driver():
    ctypes.PyDLL(None).usleep(2_200_000)  # keeps the interpreter's lock

watchdog = Watchdog(Path(sys.argv[1]), 2.0)
hang_in_a_driver()
"""
ORPHANED = """
import sys, threading
from pathlib import Path
from beringia.processes.channel import Channel, Watchdog

channel = Channel()
channel.watchdog = Watchdog(Path(sys.argv[1]), 600.0)
channel.listen()
threading.Event().wait()
"""


def stacks(program: str, file: Path) -> str:
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return file.read_text()


def test_a_process_that_is_only_slow_is_not_ended_by_being_looked_at(tmp_path: Path) -> None:
    assert stacks(BUSY, tmp_path / "stacks.txt").count("most recent call first") >= 2


def test_a_hang_that_keeps_the_interpreters_lock_leaves_its_stack(tmp_path: Path) -> None:
    assert "hang_in_a_driver" in stacks(LOCKED, tmp_path / "stacks.txt")


def test_a_process_whose_starter_is_gone_leaves_no_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "stacks.txt"
    ended = subprocess.run([sys.executable, "-c", ORPHANED, str(file)], stdin=subprocess.DEVNULL)
    assert ended.returncode == ORPHANED_STATUS and not file.exists()
