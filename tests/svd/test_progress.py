"""Progress where no bar can be drawn: plain lines on stderr, few enough for a log and often enough to see it move."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from taco_svd import cli, cli_shared
from taco_svd.cli_shared import Bars

from .test_team import command, finish, start
from .tiny_models import tiny_model

LINE = re.compile(
    r"\[taco-svd\] [^\[\]]+: (started|\d+/\d+ \(\d+%\)(, about [\d.]+ (s|min|h) left)?|done in \d+\.\d s)"
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the seconds that the progress's clock shows."""
    now = [0.0]
    monkeypatch.setattr(cli_shared, "clock", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_lines_of_a_step(clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    with Bars(False).step("calibration text") as report:
        for seconds, done in ((10, 1), (29.9, 2), (30, 3), (31, 4), (59, 5), (60.5, 6), (3600, 32), (7000, 64)):
            clock(seconds)
            report(done, 64)
        clock(7200.25)
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.splitlines() == [
        "[taco-svd] calibration text: started",
        "[taco-svd] calibration text: 3/64 (5%), about 10 min left",  # 61 of 64 windows at 10 s each
        "[taco-svd] calibration text: 6/64 (9%), about 10 min left",
        "[taco-svd] calibration text: 32/64 (50%), about 60 min left",
        "[taco-svd] calibration text: 64/64 (100%), about 0 s left",
        "[taco-svd] calibration text: done in 7200.2 s",
    ]


@pytest.mark.parametrize("done, total", [(0, 0), (0, 8), (9, 8)])
def test_what_nothing_can_be_reckoned_from(
    done: int, total: int, clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with Bars(False).step("healing") as report:
        clock(40)
        report(done, total)
    assert "left" not in capsys.readouterr().err


def test_titles_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """There are names of files in them."""
    with Bars(False).step("perplexity: \x1b]0;title\x07\nname\r.txt"):
        pass
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 2 and "\\x1b]0;title\\x07 name\\r.txt" in said
    assert not any(character in said for character in "\x1b\x07\r")


def test_a_step_that_fails_is_not_called_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), Bars(False).step("healing"):
        raise KeyError
    assert capsys.readouterr().err == "[taco-svd] healing: started\n"


def test_who_gets_lines_and_who_gets_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TERM", raising=False)
    assert Bars(False).lines
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in GitHub's workflows, whose logs are no terminals
    assert Bars(False).lines
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert not Bars(False).lines and Bars(True).lines
    monkeypatch.setenv("TERM", "dumb")
    assert Bars(False).lines
    with Bars(False, silent=True).step("healing") as report:
        report(1, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_compress_says_how_far_it_is_and_keeps_stdout_clean(
    more: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(cli_shared, "SECONDS_BETWEEN_LINES", 0.0)
    arguments = command(tmp_path / "dense", tmp_path / "small", "--layers", "1", *more)
    monkeypatch.setattr(sys, "argv", ["taco-svd", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    stdout, stderr = capsys.readouterr()
    assert not stop.value.code
    if more:
        assert json.loads(stdout)["method"] == "taco"
    lines = stderr.splitlines()
    assert all(LINE.fullmatch(line) for line in lines), stderr
    for said in (
        "loading the model: done in",
        "calibration text: started",
        "calibration text: done in",
        "saving the model: done in",
        "%)",
    ):
        assert any(said in line for line in lines), said


def test_only_the_first_of_several_processes_speaks(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    processes = start(command(tmp_path / "dense", tmp_path / "small", "--keep", "0.8"))
    said = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert "[taco-svd] calibration text: done in" in said[0] and "[taco-svd]" not in said[1]
