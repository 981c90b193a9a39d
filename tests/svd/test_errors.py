"""What errors of others say, in a sentence of ours: also those that say nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed, nn

from taco_svd import TacoError, untrusted
from taco_svd import mapped as mapped_module
from taco_svd.checkpoint import load_model
from taco_svd.cli_bench import _device
from taco_svd.decomposition import numerical_errors_named
from taco_svd.errors import LostProcessError, first_line
from taco_svd.team import Team

from .tiny_models import tiny_model


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n \n  one \ntwo"), "one"),
        (ValueError(), "ValueError"),
        (RuntimeError(""), "RuntimeError"),
        (KeyboardInterrupt(" \n"), "KeyboardInterrupt"),
    ],
)
def test_first_line(error: BaseException, said: str) -> None:
    assert first_line(error) == said


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_a_device_that_fails_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(nn.Module, "to", raising(AssertionError()))
    with pytest.raises(TacoError, match="cannot be used: AssertionError"):
        load_model(tmp_path)
    monkeypatch.setattr(torch, "empty", raising(RuntimeError()))
    with pytest.raises(TacoError, match="not usable: RuntimeError"):
        _device("cuda")


def test_processes_that_fail_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(distributed, "init_process_group", raising(RuntimeError()))
    with pytest.raises(TacoError, match="do not find each other: RuntimeError"):
        Team.from_environment()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", raising(AssertionError()))
    with pytest.raises(TacoError, match="cannot be used: AssertionError"):
        Team.from_environment("cuda")
    with pytest.raises(LostProcessError, match=r"lost another one \(RuntimeError\)"):
        Team(0, 2)._call(raising(RuntimeError()))


@pytest.mark.parametrize("module", [mapped_module, untrusted])
def test_files_that_fail_without_a_word(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(module, "safe_open", raising(OSError()))
    read = mapped_module.load_mapped if module is mapped_module else untrusted.check_weights
    with pytest.raises(TacoError, match=r"\(OSError\)"):
        read(tmp_path)


def test_decompositions_that_fail_without_a_word() -> None:
    with pytest.raises(TacoError, match=r"\(_?LinAlgError\)"), numerical_errors_named():
        raise torch.linalg.LinAlgError
