"""Scratch directories go with their process, and those of killed processes with the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from taco_svd.scratch import LOCK, PREFIX, ScratchDirectory, sweep

HOLDER = """
import sys, time
from taco_svd.scratch import ScratchDirectory
made = ScratchDirectory()
(made.path / "moments").write_text("gigabytes")
print(made.path, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_what_a_killed_process_left_is_taken_away_and_nothing_else(tmp_path: Path) -> None:
    ours = ScratchDirectory()
    unfinished = tmp_path / f"{PREFIX}begun"  # another process is about to make it
    unfinished.mkdir()
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / LOCK).touch()
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        theirs = Path(holder.stdout.readline().strip())
        sweep()
        assert (theirs / "moments").exists() and ours.path.is_dir()
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert theirs.is_dir()
    again = ScratchDirectory()
    assert not theirs.exists()
    assert ours.path.is_dir() and again.path.is_dir() and unfinished.is_dir() and (other / LOCK).exists()
    ours.delete()
    assert not ours.path.exists() and again.path.is_dir()


def test_it_goes_with_the_object_and_at_the_end(tmp_path: Path) -> None:
    made = ScratchDirectory()
    path = made.path
    child = os.fork()
    if child == 0:
        made.delete()
        os._exit(0)
    os.waitpid(child, 0)
    assert path.is_dir()  # the child's copy of the object took nothing away
    del made
    assert not path.exists()
    code = HOLDER.replace("time.sleep(600)", "")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout and not Path(done.stdout.strip()).exists() and not done.stderr
    assert not list(tmp_path.iterdir())
