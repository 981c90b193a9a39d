"""SHA-256 of a checkpoint's weight files: a flipped bit in a weight looks like any other weight."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .atomic import whole_file
from .errors import TacoError
from .untrusted import check_contained, read_json

CHECKSUMS_FILE = "taco_checksums.json"
# TACO_VERIFY=0 leaves the comparison out: it reads every byte once more (about a second per gigabyte and core).
VERIFY_VARIABLE = "TACO_VERIFY"
_CHUNK = 1 << 22


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _digests(paths: list[Path]) -> dict[str, str]:
    # hashlib lets go of the interpreter's lock: one thread per core is as many times faster
    with ThreadPoolExecutor(max(1, min(len(paths), os.cpu_count() or 1))) as pool:
        return dict(zip((path.name for path in paths), pool.map(file_digest, paths), strict=True))


def write_checksums(directory: Path) -> None:
    """Writes the checksums of all weight files of a directory, in place of what stood there."""
    digests = _digests(sorted(directory.glob("*.safetensors")))
    with whole_file(directory / CHECKSUMS_FILE) as partial:
        partial.write_text(json.dumps({"sha256": digests}, indent=2) + "\n", encoding="utf-8")


def read_checksums(directory: Path) -> dict[str, str]:
    """{file: SHA-256} as the directory's list says; empty where it has none, as in checkpoints of earlier releases.

    Raises:
        TacoError: the list is not readable, or names files outside the directory.
    """
    path = check_contained(directory, CHECKSUMS_FILE)
    try:
        values = read_json(path)
    except FileNotFoundError:
        return {}
    expected = values.get("sha256") if isinstance(values, dict) else None
    if not isinstance(expected, dict) or not all(isinstance(digest, str) for digest in expected.values()):
        raise TacoError(f"{path} is not a list of checksums; copy the checkpoint again.")
    for name in expected:
        check_contained(directory, name)
    return expected


def check_checksums(directory: Path) -> None:
    """Compares a directory's weight files with its checksums, unless ``TACO_VERIFY=0`` is set.

    Raises:
        TacoError: a file is not the one that was written, or the list is not readable.
    """
    if os.environ.get(VERIFY_VARIABLE, "1") == "0":
        return
    expected = read_checksums(directory)
    files = [directory / name for name in expected]
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise TacoError(f"{directory} lacks {lost[0]}; the checkpoint is incomplete. Copy it again.")
    for name, digest in _digests(files).items():
        if digest != expected[name]:
            raise TacoError(
                f"{directory}: {name} is not the file that was written (its SHA-256 differs); copy it again. If it was "
                f"changed on purpose, delete {CHECKSUMS_FILE}."
            )
