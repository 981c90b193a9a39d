"""What the tests of the method share: cached compressions of the tiny models, few threads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from taco_svd import Plan, compress, predictions, save_compressed

from .tiny_models import VOCABULARY, tiny_model

Compressed = tuple[PreTrainedModel, PreTrainedModel, Plan]

METHODS = ("bridge", "taco", "paper")  # no factors; pivoted ones; others
# One run of two layers in the middle (so that a bridge stands for more than one) and the lowest layer kept.
REPLACED = [2, 3]
ROOT = Path(__file__).resolve().parents[2]


def needs(package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed (pip install {package})")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are tiny: on a busy machine threads that wait for each other cost a hundred times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are made for seven positions at a time."""
    monkeypatch.setattr(predictions, "LEAST_TOKENS", 7)
    monkeypatch.setattr(predictions, "PIECE", 1)


@pytest.fixture(scope="session")
def calibration_tokens() -> torch.Tensor:
    """int64 [4, 12] random tokens, without the special ones."""
    return torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="session")
def compressed_tiny(calibration_tokens: torch.Tensor) -> Callable[..., Compressed]:
    """(dense model, compressed model, plan) of an architecture and method, made once per dtype."""
    made: dict[tuple[str, str, torch.dtype], Compressed] = {}

    def get(name: str, method: str = "taco", dtype: torch.dtype = torch.float32) -> Compressed:
        key = (name, method, dtype)
        if key not in made:
            with torch.random.fork_rng():  # whether a test is the first to ask is nothing to what it draws
                model = tiny_model(name, dtype)
                made[key] = (model, *compress(model, method=method, layers=REPLACED, calibration=calibration_tokens))
        return made[key]

    return get


@pytest.fixture(scope="session")
def checkpoint(compressed_tiny: Callable[..., Compressed], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved taco compression of the tiny llama, in several shards; tests copy it before they damage it."""
    _, model, plan = compressed_tiny("llama", "taco")
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    save_compressed(model, plan, directory, max_shard_size="20KB")
    return directory


def run_two(script: str, *arguments: str) -> str:
    """Runs a script in two processes that can find each other; what both have printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return "\n".join(said)


@pytest.fixture
def ids() -> torch.Tensor:
    """int64 [2, 9]"""
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))


@pytest.fixture(params=METHODS)
def saved(
    request: pytest.FixtureRequest, compressed_tiny: Callable[..., Compressed], tmp_path: Path
) -> tuple[PreTrainedModel, Path]:
    """(compressed model, the directory it was saved to), of each of `METHODS`."""
    _, model, plan = compressed_tiny("llama", request.param)
    save_compressed(model, plan, tmp_path / "model")
    return model, tmp_path / "model"
