"""benchmarks/tensor_parallel_bytes.py: bytes that a rank holds, against tensors cut as vLLM cuts them for its ranks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from taco_svd.vllm.shards import right_factor


@pytest.fixture
def script(repo_root: Path) -> ModuleType:
    path = repo_root / "benchmarks" / "tensor_parallel_bytes.py"
    spec = importlib.util.spec_from_file_location("tensor_parallel_bytes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def size(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("row_parallel", [False, True])
@pytest.mark.parametrize("pivoted", [False, True])
def test_bytes_of_a_factorised_layer(script: ModuleType, pivoted: bool, row_parallel: bool, ranks: int) -> None:
    out_features, in_features, rank = 24, 40, 7
    u, v = torch.zeros(out_features, rank).bfloat16(), torch.zeros(rank, in_features).bfloat16()
    pivot = torch.randperm(in_features, dtype=torch.int32)
    held = [pivot] if pivoted else []
    stored = v[:, rank:] if pivoted else v
    if row_parallel and ranks > 1:
        columns = in_features // ranks
        held += [u, right_factor(stored, pivot, 0, columns) if pivoted else v[:, :columns]]
    else:
        held += [u if row_parallel else u[: out_features // ranks], stored]
    assert script.linear_bytes(out_features, in_features, rank, pivoted, row_parallel, ranks) == size(*held)


def tiny(name: str) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip


def test_one_rank_holds_the_model_and_two_hold_half_of_a_dense_one(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "shape_config", tiny)
    for name, model in script.models_of("tiny", 0.8, 0.25).items():
        whole = size(*model.parameters(), *(b for key, b in model.named_buffers() if key.endswith("pivot")))
        assert script.layer_bytes(model, 1) + script.other_bytes(model, 1) == whole
        half = script.layer_bytes(model, 2) / script.layer_bytes(model, 1)
        if name == "dense" or name.startswith("removal"):
            assert half == 0.5
        else:  # one factor, or the whole bridge, is on both ranks
            assert 0.5 < half < 1


def test_more_ranks_than_key_value_heads_hold_the_same_heads(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "shape_config", tiny)
    dense = script.models_of("tiny", 0.8, 0.25)["dense"]
    heads, width, wide, hidden = 2, 16, 128, 64
    per_layer = (2 * hidden * hidden + 3 * hidden * wide) // 4 + 2 * (heads * width // 2) * hidden
    assert script.layer_bytes(dense, 4) == 8 * per_layer * torch.bfloat16.itemsize


def test_the_table_has_a_row_for_each_model(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "shape_config", tiny)
    _, _, *lines = script.table("tiny", 0.8, 0.25, [1, 2]).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert len(rows) == 2 * 4 and {len(row) for row in rows} == {4}
    factors = next(row for row in rows if row[0] == "all weights" and row[1].startswith("factors"))
    one, two = (float(cell.partition("(")[2].rstrip(")")) for cell in factors[2:])
    assert abs(one - 0.8) < 0.02 < two - one
