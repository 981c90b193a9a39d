"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from taco_svd.atomic import disk_full_told, partial_path, whole_file
from taco_svd.errors import DiskFullError


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [OSError("full"), KeyboardInterrupt(), SystemExit()])
@pytest.mark.parametrize("begun", ["", "ne"])
def test_what_stops_the_writing_leaves_what_was_there(stop: BaseException, begun: str, tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_text("old")

    def write() -> None:
        with whole_file(path) as partial:
            if begun:
                partial.write_text(begun)
            raise stop

    with pytest.raises(type(stop)):
        write()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_renamed_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / "result" / "inside").mkdir(parents=True)
    with pytest.raises(OSError), whole_file(tmp_path / "result") as partial:  # noqa: PT011 - the system's words
        partial.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("name", [".", "/", "a/.."])
def test_names_of_directories_have_a_partial_name(name: str) -> None:
    assert partial_path(Path(name)).name.endswith(".partial")


def test_a_full_disk_is_told_whoever_notices() -> None:
    for error in (OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"), ValueError("... (os error 28)")):
        with pytest.raises(DiskFullError, match="free some"), disk_full_told("/here", "free some."):
            raise error
    with pytest.raises(KeyError), disk_full_told("/here", "free some."):
        raise KeyError("other")
