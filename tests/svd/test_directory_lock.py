"""Two runs that share a work directory: the second is told at once, and the first goes on unharmed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from taco_svd import TacoError, directory_lock
from taco_svd.directory_lock import check_free, hold
from taco_svd.store import Store
from taco_svd.work_directory import finished_steps_kept

HOLDS = """
import sys
from taco_svd.directory_lock import hold
lock = hold(sys.argv[1])
print("holding", flush=True)
sys.stdin.read()
"""
IN_USE = "Another run is working in"


@contextmanager
def held_by_a_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], text=True, **pipes) as process:
        assert process.stdout.readline() == "holding\n"
        try:
            yield process
        finally:
            process.kill()


def from_another_thread(call: Callable, *arguments: object) -> object:
    with ThreadPoolExecutor(1) as another:
        return another.submit(call, *arguments).result()


def test_a_directory_is_one_process_s_and_free_when_that_is_killed(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with held_by_a_process(work):
        for refused in (hold, check_free, Store):
            with pytest.raises(TacoError, match=IN_USE):
                refused(work)
        assert not any(work.iterdir())
    check_free(work)
    Store(work).put("step", {})


def test_a_thread_may_hold_it_twice_and_another_not_at_all(tmp_path: Path) -> None:
    first, second = hold(tmp_path), hold(tmp_path)
    assert first is second
    del first
    with pytest.raises(TacoError, match=IN_USE):
        from_another_thread(hold, tmp_path)
    del second
    assert from_another_thread(hold, tmp_path) is not None


def test_nothing_is_made_where_there_is_nothing(tmp_path: Path) -> None:
    check_free(tmp_path / "none")
    assert not any(tmp_path.iterdir())


def test_a_directory_that_is_made_again_is_another_one(tmp_path: Path) -> None:
    work = tmp_path / "work"
    old = hold(work)
    work.rmdir()
    new = from_another_thread(hold, work)
    assert new is not None and new is not old
    with pytest.raises(TacoError, match=IN_USE):
        hold(work)


def test_what_the_last_run_took_away_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, real, taken = tmp_path / "work", directory_lock.fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        if not taken:
            taken.append(work.rmdir())

    monkeypatch.setattr(directory_lock.fcntl, "flock", flock)
    lock = hold(work)
    assert taken and work.is_dir()
    with pytest.raises(TacoError, match=IN_USE):
        from_another_thread(hold, work)
    del lock


@pytest.mark.parametrize("system", ["windows", "network"])
def test_where_there_are_no_locks_runs_go_on_without(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    if system == "windows":
        monkeypatch.setattr(directory_lock, "fcntl", None)
    else:
        monkeypatch.setattr(directory_lock.fcntl, "flock", refuses)
    assert hold(tmp_path / "work") is None
    Store(tmp_path / "work").put("step", {})


def test_a_second_command_takes_nothing_away(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with held_by_a_process(work):
        (work / "step").write_text("of the first run")
        with pytest.raises(TacoError, match=IN_USE), finished_steps_kept(work):
            pytest.fail("it must not begin")
        assert (work / "step").exists()
    with finished_steps_kept(work):
        assert (work / "step").exists()
        Store(work)  # its own run's
        with pytest.raises(TacoError, match=IN_USE):
            from_another_thread(Store, work)
    assert not work.exists()


def test_stopped_before_its_first_step_a_command_leaves_no_directory(tmp_path: Path) -> None:
    work = tmp_path / "work"

    def stopped() -> None:
        with finished_steps_kept(work):
            assert work.is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stop:
        stopped()
    assert not work.exists() and "--resume" not in str(stop.value)
