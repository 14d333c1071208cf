"""A worker killed while it compiles leaves nothing that the next worker fails on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from small_runs import beringia, of_kind, small_recipe, start, worker_of, write_recipe
from waiting import until

from beringia.chips.cpu import compiler_missing
from beringia.train.compile_cache import VARIABLE, CompileCache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompileCache:
    monkeypatch.setenv(VARIABLE, "")  # so that what `open` sets is taken back
    monkeypatch.delenv(VARIABLE)
    (tmp_path / "compiled" / "ab").mkdir(parents=True)
    return CompileCache(tmp_path / "compiled")


def test_only_what_was_complete_at_a_checkpoint_is_kept(cache: CompileCache, tmp_path: Path) -> None:
    whole, cut = tmp_path / "compiled" / "ab" / "whole.so", tmp_path / "compiled" / "ab" / "cut.so"
    whole.write_bytes(bytes(100))
    cache.open(first=False)
    assert os.environ[VARIABLE] == str(tmp_path / "compiled") and whole.exists()
    cache.keep()
    cut.write_bytes(bytes(50))
    cache.open(first=True)
    assert whole.exists() and not cut.exists()


def test_a_file_of_another_size_than_at_the_checkpoint_is_forgotten(cache: CompileCache, tmp_path: Path) -> None:
    file = tmp_path / "compiled" / "kernel.so"
    file.write_bytes(bytes(100))
    cache.keep()
    file.write_bytes(bytes(50))
    cache.open(first=True)
    assert not file.exists()


def test_a_cache_that_the_user_has_chosen_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "theirs"))
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / "cut.so").write_bytes(bytes(50))
    cache = CompileCache(tmp_path / "compiled")
    cache.open(first=True)
    cache.keep()
    assert os.environ[VARIABLE] == str(tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["compiled"] and (tmp_path / "compiled" / "cut.so").exists()


@pytest.mark.slow
@pytest.mark.skipif(compiler_missing() is not None, reason="no compiler here")
def test_a_run_killed_while_it_compiles_goes_on_and_compiles_again(tmp_path: Path) -> None:
    document = small_recipe(train={"steps": 6, "checkpoint_every": 3, "compile": True})
    recipe, run = write_recipe(tmp_path, document), tmp_path / "run"
    with start("train", str(recipe), "--out", str(run)) as supervisor:
        until(lambda: len(list((run / "compiled").rglob("*.main.so"))) >= 2, "two compiled kernels")
        worker = worker_of(supervisor.pid)
        assert worker is not None
        supervisor.kill()
        os.killpg(worker, signal.SIGKILL)  # with the compiler that it started
    kernels = list((run / "compiled").rglob("*.main.so"))
    assert len(kernels) >= 2 and not of_kind(run, "step")
    for path in kernels:  # what a linker leaves that is killed half-way
        os.truncate(path, path.stat().st_size // 2)
    again = beringia("train", str(recipe), "--out", str(run))
    assert again.returncode == 0, again.stderr
    assert [event.step for event in of_kind(run, "step")] == [1, 2, 3, 4, 5, 6] and not of_kind(run, "fault")
