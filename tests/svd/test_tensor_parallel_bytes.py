"""benchmarks/tensor_parallel_bytes.py: bytes that a rank holds, against tensors cut as vLLM cuts them for its ranks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from taco_svd.vllm.shards import Share, right_factor


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
@pytest.mark.parametrize("choice", ["split", "replicate"])
@pytest.mark.parametrize("row_parallel", [False, True])
@pytest.mark.parametrize("pivoted", [False, True])
def test_bytes_of_a_factorised_layer(
    script: ModuleType, pivoted: bool, row_parallel: bool, choice: str, ranks: int
) -> None:
    out_features, in_features, rank = 24, 40, 7
    u, v = torch.zeros(out_features, rank).bfloat16(), torch.zeros(rank, in_features).bfloat16()
    pivot = torch.randperm(in_features, dtype=torch.int32)
    held = [pivot] if pivoted else []
    stored = v[:, rank:] if pivoted else v
    columns, rows = in_features // ranks, out_features // ranks
    if choice == "split" and ranks > 1:
        width = 8  # of seven directions' shares, padded
        narrow = torch.zeros(out_features, width).bfloat16()
        if row_parallel and not pivoted:
            held = [narrow, torch.zeros(ranks * width, columns).bfloat16()]
        else:
            held = [narrow if row_parallel else u[:rows], torch.zeros(width, stored.shape[1]).bfloat16()]
            held += [Share(rank, ranks, 0).inputs(pivot)] if pivoted else []
    elif row_parallel and ranks > 1:
        held += [u, right_factor(stored, pivot, 0, columns) if pivoted else v[:, :columns]]
    else:
        held += [u if row_parallel else u[:rows], stored]
    one = script.Map(out_features, in_features, rank, pivoted, ranks)
    assert script.linear_bytes([one], row_parallel, ranks, choice=choice) == size(*held)


def test_bytes_of_a_fused_layer(script: ModuleType) -> None:
    """Dense and factorised maps; with more ranks than key heads, two ranks hold the same ones."""
    inputs, ranks, rank = 64, 4, 32
    maps = [script.Map(64, inputs, rank, False, ranks), script.Map(32, inputs, None, False, 2)]
    dense, (width, rows) = 32 // 2 * inputs, (rank // ranks, 64 // ranks)
    assert script.linear_bytes(maps, False, ranks) == 2 * (dense + width * inputs + rows * rank)
    assert script.linear_bytes(maps, False, ranks, choice="replicate") == 2 * (dense + rank * inputs + rows * rank)


def tiny(name: str) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip


def wide(name: str) -> transformers.PreTrainedConfig:
    """Wide enough for pivots and padding not to count."""
    return transformers.LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
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
        elif name.startswith("factors"):  # both are split; pivots are not, and slices are padded
            assert 0.5 < half < script.layer_bytes(model, 2, "replicate") / script.layer_bytes(model, 1) < 1
        else:  # the whole bridge is on both ranks
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
    assert abs(one - 0.8) < 0.02 < two - one  # padding


def test_factors_save_each_rank_what_they_save_one(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "shape_config", wide)
    shares = {}
    for choice in ("auto", "replicate"):
        table = script.table("wide", 0.8, 0.5, [1, 2, 4], choice)
        row = next(line.split("|") for line in table.splitlines() if line.startswith("| linear layers | factors"))
        shares[choice] = [float(cell.partition("(")[2].strip(" )")) for cell in row[3:6]]
    one, *more = shares["auto"]
    assert all(abs(share - one) < 0.05 for share in more)
    assert shares["replicate"][0] == one and shares["replicate"][1] > one + 0.1 < shares["replicate"][2] - 0.1
