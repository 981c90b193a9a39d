"""A saved compression to damage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from svd.tiny_models import VOCABULARY, tiny_model

from taco_svd import compress, save_compressed

# TACO_FUZZ_CASES=20 tries twenty times as many cases (long runs on demand)
FACTOR = int(os.environ.get("TACO_FUZZ_CASES", "1"))


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="session")
def taco_checkpoint(tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with plain and pivoted factors, in several shards."""
    directory = tmp_path_factory.mktemp("taco") / "model"
    model, plan = compress(tiny_model("llama"), method="taco", keep=0.8, calibration=tokens)
    save_compressed(model, plan, directory, max_shard_size="20KB")
    return directory


@pytest.fixture(scope="session")
def bridge_checkpoint(tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with removed layers and a bridge, in one file."""
    directory = tmp_path_factory.mktemp("bridge") / "model"
    model, plan = compress(tiny_model("llama"), method="bridge", layers=[2, 3], calibration=tokens)
    save_compressed(model, plan, directory)
    return directory


@pytest.fixture(scope="session")
def narrow_checkpoint(tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with narrower maps (modegpt), in one file."""
    directory = tmp_path_factory.mktemp("narrow") / "model"
    model, plan = compress(tiny_model("llama"), method="modegpt", keep=0.8, calibration=tokens)
    save_compressed(model, plan, directory)
    return directory


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense") / "model"
    tiny_model("llama").save_pretrained(directory)
    return directory


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Makes a copy of a directory that a test may damage; the last copy is taken away first."""

    def copy(directory: Path) -> Path:
        target = tmp_path / "damaged"
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(directory, target))

    return copy
