"""What the tests of the method share: cached compressions of the tiny models, few threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from taco_svd import Plan, compress, predictions, save_compressed

from .tiny_models import VOCABULARY, tiny_model

Compressed = tuple[PreTrainedModel, PreTrainedModel, Plan]

# One run of two layers in the middle (so that a bridge stands for more than one) and the lowest layer kept.
REPLACED = [2, 3]


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
