"""Starting work: what the two sides say to each other, and every way in which a far end can be lost."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import gone
from work_for_tests import Errand

from beringia import errors
from beringia.errors import BeringiaError, HandshakeError, InputError, RunError, error_of
from beringia.processes import endings, launchers, patience
from beringia.processes.child import Child, lines_of, start
from beringia.processes.command import Command, check_command
from beringia.processes.endings import marked
from beringia.processes.patience import Patience
from beringia.processes.protocol import Go, Line, Stop
from beringia.records.error_document import ErrorDocument

GIVE_UP_SECONDS = 120.0


STARTED: list[Child] = []


@pytest.fixture(autouse=True)
def found_by_far_ends_and_ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    yield
    while STARTED:
        STARTED.pop().end(0.0)


def errand(tmp_path: Path, *steps: list[Any], limits: Patience = Patience(), **command: Any) -> Child:  # noqa: B008
    work = Errand(steps=list(steps))
    STARTED.append(start(Command("chips.first", "work_for_tests", **command), work, tmp_path / "log", patience=limits))
    return STARTED[-1]


def script(directory: Path, body: str) -> str:
    path = directory / "prefix"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def death(child: Child) -> str:
    """The sentence about a child that is waited for in vain."""
    for _ in child.follow(0.1):
        pass
    child.end()
    assert child.ended is None
    return child.death().sentence


def texts(child: Child) -> list[str]:
    return [str(line["text"]) for line in lines_of(child)]


def test_lines_come_in_order_and_what_a_library_prints_goes_to_the_log(tmp_path: Path) -> None:
    child = errand(tmp_path, ["say", "one"], ["print", "noise"], ["say", "two"])
    assert texts(child) == ["one", "two"]
    assert "noise" in (tmp_path / "log").read_text()
    assert child.hello is not None and child.hello.python.endswith(sys.executable)


def test_more_lines_than_a_pipe_holds_come(tmp_path: Path) -> None:
    long = "x" * 70_000
    assert texts(errand(tmp_path, *[["say", f"{long}{number}"] for number in range(20)]))[-1] == f"{long}19"


def test_work_that_waits_for_its_go_gets_it(tmp_path: Path) -> None:
    child = errand(tmp_path, ["wait-for-go"])
    while child.ready is None:
        child.poll(1.0)
    child.send(Go())
    assert texts(child) == ["go"]


def test_the_commands_variables_are_set_there(tmp_path: Path) -> None:
    assert texts(errand(tmp_path, ["variable", "COLOUR"], environment={"COLOUR": "red"})) == ["red"]


@pytest.mark.parametrize("code", sorted(errors._by_code(BeringiaError)))
def test_an_error_of_ours_crosses_with_its_type(code: str) -> None:
    kind = error_of(code)
    error = kind("what is wrong", "a/file") if kind is errors.CheckpointDamaged else kind("what is wrong")
    again = ErrorDocument.model_validate_json(ErrorDocument.of(error).model_dump_json()).error()
    assert type(again) is kind and str(again) == "what is wrong"
    assert getattr(again, "path", None) == getattr(error, "path", None)


def test_every_class_of_error_has_a_code_of_its_own() -> None:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BeringiaError)]
    assert len({kind.code for kind in classes}) == len(classes) > 10
    assert all(error_of(kind.code) is kind for kind in classes)


def test_an_error_that_work_raises_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run"):
        lines_of(errand(tmp_path, ["raise", "run", "not a run"]))


def test_a_bug_is_told_in_its_own_words_and_its_traceback_is_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(BeringiaError, match="ValueError: odd") as raised:
        lines_of(errand(tmp_path, ["break", "odd"]))
    assert not isinstance(raised.value, InputError)
    assert "Traceback" in (tmp_path / "log").read_text()


# ---- deaths


def test_a_silent_exit_is_told_with_its_last_words(tmp_path: Path) -> None:
    child = errand(tmp_path, ["complain", "driver gone"], ["exit", 0])
    assert death(child) == "the process of chips.first was lost (status 0): driver gone"


def test_a_killed_far_end_is_told_by_its_signal(tmp_path: Path) -> None:
    child = errand(tmp_path, ["say", "here"], ["sleep", 3600])
    while not any(isinstance(message, Line) for message in child.poll(1.0)):
        pass
    os.kill(child.pid, signal.SIGKILL)
    assert "was lost (signal SIGKILL)" in death(child)


def test_one_that_says_nothing_for_too_long_is_told_and_gone(tmp_path: Path) -> None:
    child = errand(tmp_path, ["sleep", 3600], limits=Patience(silence_seconds=0.5))
    assert "waited for in vain (its work, 0.5 s)" in death(child)
    assert gone(child.pid)


def test_a_stopped_one_and_one_in_a_session_of_its_own_are_gone_at_the_end(tmp_path: Path) -> None:
    child = errand(tmp_path, ["spawn"], ["sleep", 3600])
    spawned: list[int] = []
    while not spawned:
        spawned = [int(message.line["text"]) for message in child.poll(1.0) if isinstance(message, Line)]
    for process in (child.pid, *spawned):
        os.kill(process, signal.SIGSTOP)
    assert set(marked(child.mark)) == {child.pid, *spawned}
    child.end()
    assert gone(child.pid) and all(map(gone, spawned)) and not marked(child.mark)


def test_a_process_is_found_by_its_mark_though_it_shows_no_environment_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux tells a starter that its child executes the program before it shows the environment that the child has."""
    for number, content in {"123": b"", "124": b"", "125": b"A=1\0BERINGIA_STARTED_AS=other\0"}.items():
        (tmp_path / number).mkdir()
        (tmp_path / number / "environ").write_bytes(content)
        (tmp_path / number / "exe").symlink_to(sys.executable)
    (tmp_path / "124" / "exe").unlink()  # it has ended, or is the kernel's own

    def looked_away(seconds: float) -> None:
        (tmp_path / "123" / "environ").write_bytes(b"A=1\0BERINGIA_STARTED_AS=mine/below\0")

    monkeypatch.setattr(endings, "_TABLE", tmp_path)
    monkeypatch.setattr(endings.time, "sleep", looked_away)
    assert marked("mine") == [123]


def test_what_ended_work_has_left_behind_is_gone_too(tmp_path: Path) -> None:
    child = errand(tmp_path, ["spawn"])
    (spawned,) = texts(child)
    assert gone(int(spawned))


def test_a_far_end_whose_starter_is_gone_exits(tmp_path: Path) -> None:
    child = errand(tmp_path, ["say", "here"], ["sleep", 3600])
    while not any(isinstance(message, Line) for message in child.poll(1.0)):
        pass
    child._input.close()  # as the kernel does when the starter dies
    assert child._process.wait(GIVE_UP_SECONDS) == 70
    child.end()


def test_what_nobody_reads_does_not_keep_the_starter_for_ever(tmp_path: Path) -> None:
    child = errand(tmp_path, ["sleep", 3600], limits=Patience(silence_seconds=0.5))
    while child.ready is None:
        child.poll(1.0)
    os.kill(child.pid, signal.SIGSTOP)
    for _ in range(8000):  # more than a pipe holds
        child.send(Stop())
        if child.impatient():
            break
    assert child.impatient()
    child.end()


# ---- prefixes


def test_a_banner_before_the_first_message_is_passed_over(tmp_path: Path) -> None:
    prefix = script(tmp_path, 'echo "Welcome to node7"; echo "Maintenance on Sunday:"; exec "$@"')
    assert texts(errand(tmp_path, ["say", "one"], launch=(prefix,))) == ["one"]
    assert "Welcome to node7" in (tmp_path / "log").read_text()


def test_a_prefix_that_asks_for_a_password_is_told_as_such(tmp_path: Path) -> None:
    prefix = script(tmp_path, 'printf "root@node7\'s password: "; sleep 3600')
    words = death(errand(tmp_path, ["say", "one"], launch=(prefix,)))
    assert 'asks something, and nobody answers there: "root@node7\'s password:"' in words and "chips.first" in words


@pytest.mark.slow
def test_a_prefix_that_asks_on_standard_error_is_told_as_such(tmp_path: Path) -> None:
    prefix = script(tmp_path, "printf 'Are you sure you want to continue connecting (yes/no)? ' >&2; sleep 3600")
    assert "asks something" in death(errand(tmp_path, ["say", "one"], launch=(prefix,)))


def test_a_prefix_that_ends_at_once_with_0_is_told(tmp_path: Path) -> None:
    prefix = script(tmp_path, "exit 0")
    words = death(errand(tmp_path, ["say", "one"], launch=(prefix, "node 7")))
    assert words == (
        "the process of chips.first did not start (status 0): it said nothing; the command was "
        f"{prefix} 'node 7' {shlex.quote(sys.executable)} -P -m beringia.processes.far_end work_for_tests"
    )


def test_a_prefix_that_closes_standard_input_is_told_what_it_must_do(tmp_path: Path) -> None:
    with pytest.raises(HandshakeError, match="Standard input was closed before a job came.*ssh without -n"):
        lines_of(errand(tmp_path, ["say", "one"], launch=(script(tmp_path, 'exec "$@" </dev/null'),)))


def test_a_prefix_that_hands_on_late_still_hands_on_why_nothing_was_done(tmp_path: Path) -> None:
    """A far end that could not begin has the mark that its prefix has too, and must not end that by it."""
    prefix = script(tmp_path, '"$@" </dev/null | { sleep 0.5; cat; }')
    with pytest.raises(HandshakeError, match="Standard input was closed before a job came"):
        lines_of(errand(tmp_path, ["say", "one"], launch=(prefix,)))


@pytest.mark.slow
def test_a_prefix_that_loses_standard_input_is_told_what_it_must_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import beringia.processes.patience as p\np.JOB_SECONDS = 0.5\n"  # as far ends wait, shortened
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert patience.JOB_SECONDS == 30.0
    with pytest.raises(HandshakeError, match="No job came over standard input within 0.5 s"):
        lines_of(errand(tmp_path, ["say", "one"], launch=(script(tmp_path, 'sleep 3600 | exec "$@"'),)))


def test_an_interpreter_without_beringia_is_told_what_to_install(tmp_path: Path) -> None:
    python = script(tmp_path, f'exec "{sys.executable}" -I -S "$@"')
    words = death(errand(tmp_path, ["say", "one"], python=python))
    assert "No module named 'beringia'" in words and "Install the same Beringia in both environments" in words


def test_what_cannot_be_started_is_refused_before_it_is_tried() -> None:
    with pytest.raises(HandshakeError, match="'no-such-launcher', which is not a command"):
        check_command(Command("chips.first", launch=("no-such-launcher", "x")))
    with pytest.raises(HandshakeError, match="no such interpreter"):
        check_command(Command("chips.first", python="/no/such/python"))
    with pytest.raises(HandshakeError, match="'prefx', which is no launcher. Did you mean 'prefix'"):
        check_command(Command("chips.first", launcher="prefx"))


def test_a_launcher_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A throwaway one, which starts the far end through `env`."""
    (tmp_path / "through_env.py").write_text(
        "from beringia.processes.command import FAR_END\n"
        "def check(command):\n    pass\n"
        "def argv(command):\n"
        "    return ['env', 'COLOUR=' + command.launch[0], command.interpreter, '-m', FAR_END, command.module]\n"
    )
    monkeypatch.setattr(launchers, "__path__", [*launchers.__path__, str(tmp_path)])
    child = errand(tmp_path, ["variable", "COLOUR"], launcher="through_env", launch=("blue",))
    assert texts(child) == ["blue"]


@pytest.mark.parametrize("launch", [{}, {"launch": ("env",)}])
def test_a_folder_named_beringia_where_work_is_started_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: dict[str, Any]
) -> None:
    """As in a home directory that holds the repository, or in the repository beside an installed wheel."""
    monkeypatch.chdir(another_package(tmp_path))
    assert texts(errand(tmp_path, ["say", "one"], **launch)) == ["one"]


@pytest.mark.slow
def test_nor_is_it_where_torchrun_starts_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(another_package(tmp_path))
    assert texts(errand(tmp_path, ["say", "one"], launcher="torchrun", launch=("1",))) == ["one"]


def test_a_package_that_is_run_from_its_folder_is_found_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    assert "-P" not in Command("chips.first").argv()
    assert "-P" in Command("chips.first", launch=("env",)).argv(), "on another machine that folder is another"


def another_package(directory: Path) -> Path:
    """A directory that holds a folder named as the package is."""
    (directory / "beringia").mkdir()
    (directory / "beringia" / "__init__.py").write_text('raise ImportError("this is not the package")\n')
    return directory


def test_torchrun_is_told_how_many() -> None:
    with pytest.raises(HandshakeError, match=r'one number, of its processes: launch = \["8"\]'):
        check_command(Command("chips.first", launcher="torchrun", launch=("eight",)))


# ---- roots


def test_a_root_is_made_where_its_parent_is(tmp_path: Path) -> None:
    lines_of(errand(tmp_path, ["write", "file", "content"], root=str(tmp_path / "there")))
    assert (tmp_path / "there" / "file").read_text() == "content"


def test_a_root_whose_parent_is_missing_is_told_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be made on .*: there is no directory .*absent there"):
        lines_of(errand(tmp_path, ["say", "one"], root=str(tmp_path / "absent" / "run")))
    assert not (tmp_path / "absent").exists()


def test_a_root_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Nothing can be written to the root /proc"):
        lines_of(errand(tmp_path, ["say", "one"], root="/proc/self"))
