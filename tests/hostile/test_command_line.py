"""The command line on wrong numbers, files and texts: one sentence, exit code 2, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from taco_svd.checkpoint import DEFAULT_MODEL
from taco_svd.cli_shared import PROGRESS_PREFIX
from taco_svd.untrusted import printable

Invoke = Callable[..., tuple[int, str, str]]


def refused(result: tuple[int, str, str]) -> str:
    code, _, errors = result
    assert code == 2, result
    assert "Traceback" not in errors
    # typer draws a frame around what it refuses itself; ours is one line
    assert (errors.startswith("taco-svd: ") and errors.count("\n") == 1) or "Usage:" in errors, errors
    return errors


COMPRESS: list[tuple[str, ...]] = [
    ("--keep", "nan"), ("--keep", "inf"), ("--keep", "0"), ("--keep", "-1"), ("--keep", "1e400"), ("--keep", "x"),
    ("--layers", "0"), ("--layers", "-3"), ("--layers", "99999999999999999999"), ("--layers", "2.5"),
    ("--layers", "2", "--keep", "0.5"), ("--layers", "2", "--compression-ratio", "nan"),
    ("--layers", "2", "--compression-ratio", "1"), ("--layers", "2", "--samples", "0"),
    ("--layers", "2", "--samples", "99999999999999"), ("--layers", "2", "--seq-len", "1"),
    ("--layers", "2", "--seq-len", "100000000"), ("--layers", "2", "--seed", "99999999999999999999999"),
    ("--layers", "2", "--method", "no-such"), ("--layers", "2", "--method", "\u0663"),
    ("--layers", "2", "--importance", ""), ("--layers", "2", "--method", "bridge", "--bridge-rank", "0"),
    ("--layers", "2", "--method", "bridge", "--bridge-rank", "1000000000000"), ("--layers", "2", "--device", "nowhere"),
    ("--layers", "2", "--dtype", "float8"), ("--layers", "2", "--plan", "/nowhere/plan.json"),
    ("--layers", "2", "--plan", "/dev/zero"), ("--layers", "2", "--calibration", "/dev/zero"),
    ("--layers", "2", "--calibration", "/nowhere"), ("--layers", "2", "--calibration", "x" * 5000),
    ("--layers", "2", "--calibration", "/"), ("--layers", "2", "--calibration", ""),
]  # fmt: skip


@pytest.mark.parametrize("words", COMPRESS, ids=lambda words: " ".join(words)[:40])
def test_arguments_of_compress(words: tuple[str, ...], dense_checkpoint: Path, tmp_path: Path, invoke: Invoke) -> None:
    refused(invoke("compress", dense_checkpoint, "--out", tmp_path / "out", *words))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b" \n\t", b"\xff\xfe\x00", b"abc\x80", "\ud7ff".encode()[:-1], b"a b c", b"\x00" * 50]
)
def test_calibration_texts(content: bytes, tmp_path: Path, invoke: Invoke) -> None:
    """On the demo model, which has a tokenizer: empty, not UTF-8, or far too short."""
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    refused(invoke("compress", "--out", tmp_path / "out", "--layers", "2", "--calibration", text))


def test_unicode_texts_are_tokenised(tmp_path: Path) -> None:
    """What is UTF-8 is text: byte order marks, emoji, right-to-left, combining marks, zeros, unassigned characters."""
    from transformers import AutoTokenizer

    from taco_svd.calibration import text_windows
    from taco_svd.checkpoint import DEFAULT_MODEL
    from taco_svd.texts import read_text

    tokenizer: Any = AutoTokenizer.from_pretrained(DEFAULT_MODEL)
    pieces = [
        "\ufeffa",
        "\U0001f9d1\u200d\U0001f680",
        "\u0645\u0631\u062d\u0628\u0627",
        "e\u0301" * 9,
        "\x00b",
        "\U0010ffff",
    ]
    for piece in [*pieces, " ".join(pieces)]:
        path = tmp_path / "text.txt"
        path.write_text((piece + " ") * 200, encoding="utf-8")
        windows = text_windows(read_text(path), tokenizer, 3, 8, 0, "text")
        assert windows.shape == (3, 8) and int(windows.max()) < len(tokenizer)


@pytest.mark.parametrize("command", ["info", "eval", "bench", "export", "report"])
@pytest.mark.parametrize("damage", ["no plan", "bad plan", "cut weights", "bad config", "nothing", "a file"])
def test_every_command_on_a_damaged_checkpoint(
    command: str, damage: str, bridge_checkpoint: Path, copy_of: Callable[[Path], Path], invoke: Invoke
) -> None:
    directory = copy_of(bridge_checkpoint)
    if damage == "no plan":
        (directory / "taco_plan.json").unlink()
    elif damage == "bad plan":
        (directory / "taco_plan.json").write_text('{"method": "taco", "structure": {}, "redundant": [1e400]}')
    elif damage == "cut weights":
        (directory / "model.safetensors").write_bytes(b"\x08\x00")
    elif damage == "bad config":
        (directory / "config.json").write_text('{"model_type": "taco_svd", "base_model_type": "llama"}')
    elif damage == "nothing":
        shutil.rmtree(directory)
    else:
        shutil.rmtree(directory)
        directory.write_text("x")
    extra = {"export": ("--dense", directory.parent / "plain"), "eval": ("--text", "self", "--against", "none")}
    extra["report"] = ("--out", directory.parent / "page.html", "--rounds", "0")
    result = invoke(command, directory, *extra.get(command, ()))
    # info reads the plan alone, and eval needs none
    if (command == "info" and damage in ("cut weights", "bad config")) or (command == "eval" and "plan" in damage):
        assert result[0] == 0, result
    else:
        refused(result)
    if directory.is_file():
        directory.unlink()


def test_what_a_plan_says_does_not_steer_the_terminal(
    bridge_checkpoint: Path, copy_of: Callable[[Path], Path], invoke: Invoke
) -> None:
    directory = copy_of(bridge_checkpoint)
    path = directory / "taco_plan.json"
    plan = json.loads(path.read_text())
    plan["source"]["name"] = "[/red][bold]:smile: \u202e<script>"
    path.write_text(json.dumps(plan))
    code, told, _ = invoke("info", directory)
    assert code == 0 and "[/red][bold]:smile:" in told
    plan["source"]["name"] = "\x1b]0;title\x07"
    path.write_text(json.dumps(plan))
    assert "control characters" in refused(invoke("info", directory))


def test_names_that_no_file_can_have(tmp_path: Path, invoke: Invoke) -> None:
    for name in ("x" * 300, os.fsdecode(b"\xff\xfe"), "a/b/c/d"):
        refused(invoke("info", tmp_path / name))
        refused(invoke("compress", "/" + name, "--out", tmp_path / "out", "--layers", "1"))


def test_names_of_tensors_steer_no_terminal(tmp_path: Path) -> None:
    """What a weight file's header says is shown, and stands as text."""
    directory = shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    name = "\x1b]0;title\x07\x9b2J"
    save_file({name: torch.zeros(1)}, directory / "model-00002-of-00002.safetensors")
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    index = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    index["other"] = "model-00002-of-00002.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    done = subprocess.run(
        [sys.executable, "-m", "taco_svd", "eval", directory, "--text", "self"],
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stderr.strip().splitlines() if not line.startswith(PROGRESS_PREFIX)]
    assert done.returncode == 2 and len(said) == 1
    assert not any(character in done.stderr for character in "\x1b\x07\x9b")
    assert printable(f"a\nb\t{name}\udc80") == "a\nb\t\\x1b]0;title\\x07\\x9b2J\\udc80"
