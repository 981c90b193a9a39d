"""Linear layers of vLLM that hold factors: every kind of layer, every rank of several, against float64."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here; `make test-vllm` sets it up and runs this", allow_module_level=True)

from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.lora.layers.utils import _get_lora_device
from vllm.model_executor.layers import linear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from taco_svd import Structure, TacoError
from taco_svd.vllm.factors import FactorsConfig, FactorsMethod

HIDDEN, HEAD, HEADS, KV_HEADS, WIDE = 48, 8, 4, 2, 40
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SIZES = {
    "q_proj": HEADS * HEAD,
    "k_proj": KV_HEADS * HEAD,
    "v_proj": KV_HEADS * HEAD,
    "gate_proj": WIDE,
    "up_proj": WIDE,
}
QKV_ROWS = [SIZES["q_proj"], SIZES["k_proj"], SIZES["v_proj"]]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    on_rank(monkeypatch, 0, 1)
    with set_current_vllm_config(VllmConfig()):
        yield


class Map:
    """A random map of the checkpoint: stored tensors by name, and what it computes in float64."""

    def __init__(self, outputs: int, inputs: int, rank: int | None, pivoted: bool = False, bias: bool = False) -> None:
        self.rank, self.pivoted = rank, pivoted
        self.stored: dict[str, torch.Tensor] = {}
        if rank is None:
            self.stored["weight"] = torch.randn(outputs, inputs)
            self.weight = self.stored["weight"].double()
        else:
            self.stored["v"] = torch.randn(rank, inputs - rank if pivoted else inputs)
            self.stored["u"] = torch.randn(outputs, rank)
            v = self.stored["v"].double()
            if pivoted:
                pivot = torch.randperm(inputs)
                self.stored["pivot"] = pivot.to(torch.int32)
                v = torch.cat([torch.eye(rank, dtype=torch.float64), v], 1)[:, pivot.argsort()]
            self.weight = self.stored["u"].double() @ v
        self.bias = torch.randn(outputs) if bias else None
        if self.bias is not None:
            self.stored["bias"] = self.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = x.double() @ self.weight.T
        return y if self.bias is None else y + self.bias.double()


def config_for(maps: dict[str, Map]) -> FactorsConfig:
    structure = Structure(
        source_layers=1,
        kept=(0,),
        low_rank={0: {path: m.rank for path, m in maps.items() if m.rank is not None}},
        pivoted={0: tuple(path for path, m in maps.items() if m.pivoted)},
    )
    config = FactorsConfig(structure, None)
    config.packed_modules_mapping = dict(PACKED)
    return config


def load(layer: Any, stored: dict[str, torch.Tensor], shard: Any = None) -> None:
    for name, tensor in stored.items():
        param = getattr(layer, name)
        if shard is None:
            param.weight_loader(param, tensor)
        else:
            param.weight_loader(param, tensor, shard)


def finished(layer: Any) -> Any:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def on_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    """Layers built from now on believe to be rank `rank` of `ranks`."""
    from vllm.model_executor import parameter

    for module in (linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(linear, "tensor_model_parallel_all_reduce", lambda tensor: tensor)  # summed by the test


def close(found: torch.Tensor, exact: torch.Tensor, inputs: int, rank: int) -> None:
    """float32 sums over `inputs` and then `rank` products of unit variance: errors grow as the root of their number."""
    scale = float((inputs * max(rank, 1)) ** 0.5)
    tolerance = (inputs + rank) * torch.finfo(torch.float32).eps * scale
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)


QKV_KINDS = {
    "all plain": ((5, False), (3, False), (7, False)),
    "all pivoted": ((5, True), (3, True), (7, True)),
    "dense between": ((5, True), (None, False), (7, False)),
    "dense at both ends": ((None, False), (4, False), (None, False)),
    "one pivoted": ((None, False), (None, False), (9, True)),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])  # with 4, each of the two key heads is on two ranks
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", list(QKV_KINDS))
def test_qkv(kind: str, bias: bool, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("q_proj", "k_proj", "v_proj")
    maps = {
        f"self_attn.{name}": Map(SIZES[name], HIDDEN, rank, pivoted, bias)
        for name, (rank, pivoted) in zip(names, QKV_KINDS[kind], strict=True)
    }
    x = torch.randn(5, HIDDEN)
    exact = [one(x) for one in maps.values()]
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        layer: Any = linear.QKVParallelLinear(
            HIDDEN,
            HEAD,
            HEADS,
            KV_HEADS,
            bias=bias,
            quant_config=config_for(maps),
            prefix="model.layers.0.self_attn.qkv_proj",
        )
        assert isinstance(layer.quant_method, FactorsMethod)
        for shard, one in zip(("q", "k", "v"), maps.values(), strict=True):
            load(layer, one.stored, shard)
        found, _ = finished(layer)(x)
        wide, narrow = SIZES["q_proj"] // ranks, max(SIZES["k_proj"] // ranks, HEAD)
        key = rank * KV_HEADS // ranks if ranks >= KV_HEADS else rank  # which block of keys this rank holds
        mine = [exact[0][:, rank * wide : (rank + 1) * wide]]
        mine += [part[:, key * narrow : (key + 1) * narrow] for part in exact[1:]]
        close(found, torch.cat(mine, 1), HIDDEN, 9)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("gate, up", [((6, False), (9, False)), ((6, True), (None, False)), ((None, False), (3, True))])
def test_gate_and_up(
    gate: tuple[int | None, bool], up: tuple[int | None, bool], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = {"mlp.gate_proj": Map(WIDE, HIDDEN, *gate), "mlp.up_proj": Map(WIDE, HIDDEN, *up)}
    x = torch.randn(3, HIDDEN)
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        layer: Any = linear.MergedColumnParallelLinear(
            HIDDEN, [WIDE, WIDE], bias=False, quant_config=config_for(maps), prefix="model.layers.0.mlp.gate_up_proj"
        )
        for shard, one in enumerate(maps.values()):
            load(layer, one.stored, shard)
        found, _ = finished(layer)(x)
        part = WIDE // ranks
        exact = torch.cat([one(x)[:, rank * part : (rank + 1) * part] for one in maps.values()], 1)
        close(found, exact, HIDDEN, 9)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("pivoted", [False, True])
def test_maps_that_the_checkpoint_has_fused(pivoted: bool, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair of factors for q, k and v together: each rank holds rows of all three."""
    rows = [SIZES["q_proj"], SIZES["k_proj"], SIZES["v_proj"]]
    maps = {"self_attn.qkv_proj": Map(sum(rows), HIDDEN, 13, pivoted)}
    x = torch.randn(4, HIDDEN)
    exact = maps["self_attn.qkv_proj"](x).split(rows, dim=1)
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        config = config_for(maps)
        config.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
        layer: Any = linear.QKVParallelLinear(
            HIDDEN, HEAD, HEADS, KV_HEADS, bias=False, quant_config=config, prefix="model.layers.0.self_attn.qkv_proj"
        )
        load(layer, maps["self_attn.qkv_proj"].stored)
        found, _ = finished(layer)(x)
        mine = [part.chunk(ranks, dim=1)[rank] for part in exact]
        close(found, torch.cat(mine, 1), HIDDEN, 13)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pivoted", [False, True])
def test_row_parallel(pivoted: bool, bias: bool, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = {"mlp.down_proj": Map(HIDDEN, WIDE, 17, pivoted, bias)}
    x = torch.randn(6, WIDE)
    parts = []
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        layer: Any = linear.RowParallelLinear(
            WIDE, HIDDEN, bias=bias, quant_config=config_for(maps), prefix="model.layers.0.mlp.down_proj"
        )
        load(layer, maps["mlp.down_proj"].stored)
        found, _ = finished(layer)(x.chunk(ranks, dim=1)[rank].contiguous())
        parts.append(found.double())
    close(torch.stack(parts).sum(0), maps["mlp.down_proj"](x), WIDE, 17)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("row", [False, True])
@pytest.mark.parametrize("pivoted", [False, True])
def test_a_rank_holds_as_many_bytes_as_the_benchmark_counts(
    pivoted: bool, row: bool, ranks: int, monkeypatch: pytest.MonkeyPatch, repo_root: Path
) -> None:
    """benchmarks/tensor_parallel_bytes.py counts from shapes what these layers hold; docs/vllm.md has its table."""
    spec = importlib.util.spec_from_file_location("counts", repo_root / "benchmarks" / "tensor_parallel_bytes.py")
    assert spec is not None and spec.loader is not None
    counts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counts)
    on_rank(monkeypatch, 0, ranks)
    one, name = Map(HIDDEN, WIDE, 17, pivoted), "mlp.down_proj"
    kind = linear.RowParallelLinear if row else linear.ColumnParallelLinear
    layer: Any = kind(WIDE, HIDDEN, bias=False, quant_config=config_for({name: one}), prefix=f"model.layers.0.{name}")
    load(layer, one.stored)
    held = sum(parameter.numel() * parameter.element_size() for parameter in finished(layer).parameters())
    itemsize = one.stored["u"].element_size()
    assert held == counts.linear_bytes(HIDDEN, WIDE, 17, pivoted, row, ranks, itemsize)


RELOADED = {
    "plain": ((5, False), (3, False), (7, False)),
    "pivoted, dense, plain": ((5, True), (None, False), (7, False)),
    "fused in the checkpoint": ((13, True),),
    "row-parallel": ((17, False),),
    "row-parallel, pivoted": ((17, True),),
    "row-parallel, split at its rank": ((WIDE // 2, True),),  # as many columns are stored as a rank of two holds
}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", list(RELOADED))
def test_weights_that_come_later_take_the_place_of_the_first(
    kind: str, ranks: int, backwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM loads them again: what graphs have captured stays where it is, and is complete with the last tensor."""
    row, fused = kind.startswith("row"), kind.startswith("fused")
    layer_name = "mlp.down_proj" if row else "self_attn.qkv_proj"
    names = [layer_name] if row or fused else [f"self_attn.{name}" for name in PACKED["qkv_proj"]]
    outputs = [HIDDEN] if row else [sum(QKV_ROWS)] if fused else QKV_ROWS
    inputs = WIDE if row else HIDDEN

    def maps() -> dict[str, Map]:
        return {
            name: Map(rows, inputs, rank, pivoted, bias=True)
            for name, rows, (rank, pivoted) in zip(names, outputs, RELOADED[kind], strict=True)
        }

    def pieces(maps: dict[str, Map]) -> list[tuple[Any, str, torch.Tensor]]:
        shards = (None,) if len(names) == 1 else ("q", "k", "v")
        found = [
            (shard, *item) for shard, one in zip(shards, maps.values(), strict=True) for item in one.stored.items()
        ]
        return found[::-1] if backwards else found

    first, second = maps(), maps()
    totals: dict[int, torch.Tensor] = {}
    x = torch.randn(4, inputs)
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        config = config_for(first)
        if fused:
            config.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
        prefix = f"model.layers.0.{layer_name}"
        layer: Any
        if row:
            layer = linear.RowParallelLinear(WIDE, HIDDEN, quant_config=config, prefix=prefix)
        else:
            layer = linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, quant_config=config, prefix=prefix)
        model = torch.nn.Sequential(layer)
        record_metadata_for_reloading(model)
        for shard, name, tensor in pieces(first):
            load(layer, {name: tensor}, shard)
        finished(layer)
        places = {name: (parameter, parameter.data_ptr()) for name, parameter in layer.named_parameters()}

        initialize_layerwise_reload(model)
        coming = pieces(second)
        for shard, name, tensor in coming[:-1]:
            load(layer, {name: tensor}, shard)
        assert get_layerwise_info(layer).can_load(), "finished before the last tensor came"
        load(layer, {coming[-1][1]: coming[-1][2]}, coming[-1][0])
        assert not get_layerwise_info(layer).can_load(), "not finished with the last tensor"
        finalize_layerwise_reload(model, None)
        for name, (parameter, place) in places.items():
            assert layer.get_parameter(name) is parameter and parameter.data_ptr() == place

        totals[rank] = layer(x.chunk(ranks, dim=1)[rank].contiguous() if row else x)[0].double()
    if row:
        found = torch.stack(list(totals.values())).sum(0)
    else:
        parts = [total.split([rows // ranks for rows in QKV_ROWS], dim=1) for total in totals.values()]
        found = torch.cat([part[index] for index in range(3) for part in parts], 1)
    close(found, torch.cat([one(x) for one in second.values()], 1), inputs, WIDE // 2)


@pytest.mark.parametrize("rank", [6, 30])  # less and more than the inputs of one of two ranks
@pytest.mark.parametrize("pivoted", [False, True])
def test_files_of_each_rank_load_as_they_were_saved(pivoted: bool, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's sharded states: parameters as they are once loading is done, put back before it is done."""
    one = Map(HIDDEN, WIDE, rank, pivoted)
    x = torch.randn(4, WIDE)
    total = torch.zeros(4, HIDDEN, dtype=torch.float64)
    for place in range(2):
        on_rank(monkeypatch, place, 2)

        def built() -> Any:
            return linear.RowParallelLinear(
                WIDE, HIDDEN, bias=False, quant_config=config_for({"mlp.down_proj": one}), prefix="0.mlp.down_proj"
            )

        first = built()
        load(first, one.stored)
        saved = {name: tensor.clone() for name, tensor in finished(first).state_dict().items()}
        with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="sharded_state"))):
            again = built()
        own = again.state_dict()
        assert {name: tensor.shape for name, tensor in own.items()} == {name: saved[name].shape for name in saved}
        for name, tensor in saved.items():
            own[name].copy_(tensor)
        total += finished(again)(x.chunk(2, dim=1)[place].contiguous())[0].double()
    close(total, one(x), WIDE, rank)


def test_a_pivot_that_a_later_update_leaves_out_is_missed() -> None:
    layer, one = down_proj(pivoted=True)
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    load(layer, one.stored)
    finished(layer)
    initialize_layerwise_reload(model)
    load(layer, {name: one.stored[name] for name in ("u", "v")})
    # vLLM leaves there what lay in memory
    layer.pivot = torch.nn.Parameter(torch.full((WIDE,), 2**30, dtype=torch.int32), requires_grad=False)
    with pytest.raises(TacoError, match="without the pivot"):
        finalize_layerwise_reload(model, None)


def test_a_factor_that_is_written_out_takes_no_other_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by vLLM's reloading, which gives the loader memory of the checkpoint's shape, but past it."""
    on_rank(monkeypatch, 1, 2)
    layer, one = down_proj(pivoted=True)
    load(layer, one.stored)
    finished(layer)
    with pytest.raises(TacoError, match="reload_weights"):
        load(layer, {"v": one.stored["v"]})
    before = layer.v.data.clone()
    assert torch.equal(finished(layer).v, before)  # nothing is written out twice


@pytest.mark.parametrize("pivoted", [False, True])
def test_parameters_that_move_are_read_where_they_are(pivoted: bool) -> None:
    """Offloading points parameters to other memory, or has copies stand in for them."""
    layer, one = down_proj(pivoted)
    load(layer, one.stored)
    x = torch.randn(2, WIDE)
    expected, _ = finished(layer)(x)
    for parameter in layer.parameters():
        first, parameter.data = parameter.data, parameter.data.clone()
        first.zero_()
    assert torch.equal(layer(x)[0], expected)
    copies = {name: parameter.data.clone() for name, parameter in layer.named_parameters()}
    held = [weakref.ref(copy) for copy in copies.values()]
    layer.u.data.zero_()
    assert torch.equal(torch.func.functional_call(layer, copies, (x,))[0], expected)
    del copies
    gc.collect()
    assert not any(copy() is not None for copy in held)
    assert torch.equal(layer(x)[0], torch.zeros_like(expected))


def test_lora_finds_where_a_layer_lies() -> None:
    layer, one = down_proj()
    load(layer, one.stored)
    assert _get_lora_device(finished(layer)) == layer.u.device
    assert [name for name, _ in layer.named_parameters()] == ["v", "u"]


def test_what_vllm_remembers_of_a_layer_does_not_keep_it_alive() -> None:
    layer, _ = down_proj(pivoted=True)
    record_metadata_for_reloading(layer)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_layers_without_factors_stay_vllms_own() -> None:
    config = config_for({"mlp.down_proj": Map(HIDDEN, WIDE, 3)})
    layer: Any = linear.RowParallelLinear(WIDE, HIDDEN, quant_config=config, prefix="model.layers.0.self_attn.o_proj")
    assert isinstance(layer.quant_method, linear.UnquantizedLinearMethod)
    assert config.claimed == set()


def test_the_given_quantisation_gets_the_dense_layers() -> None:
    class Inner(FactorsConfig):
        online_quantization_config = None

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            asked.append(prefix)
            return linear.UnquantizedLinearMethod()

    asked: list[str] = []
    config = config_for({"mlp.down_proj": Map(HIDDEN, WIDE, 3)})
    config.inner = Inner(config.structure, None)
    for name in ("mlp.down_proj", "self_attn.o_proj"):
        linear.RowParallelLinear(WIDE, HIDDEN, quant_config=config, prefix=f"model.layers.0.{name}")
    assert asked == ["model.layers.0.self_attn.o_proj"]
    assert config.online_quantization_config is None
    online: Any = object()
    config.inner.online_quantization_config = online  # type: ignore[misc]
    assert config.online_quantization_config is online


def down_proj(pivoted: bool = False) -> tuple[Any, Map]:
    one = Map(HIDDEN, WIDE, 6, pivoted)
    config = config_for({"mlp.down_proj": one})
    layer: Any = linear.RowParallelLinear(
        WIDE, HIDDEN, bias=False, quant_config=config, prefix="model.layers.0.mlp.down_proj"
    )
    return layer, one


@pytest.mark.parametrize("name", ["v", "u"])
def test_factors_of_the_wrong_shape_are_refused(name: str) -> None:
    layer, one = down_proj()
    with pytest.raises(TacoError, match="damaged"):
        load(layer, {name: one.stored[name][:, 1:]})


def test_a_pivot_that_is_no_permutation_is_refused() -> None:
    layer, one = down_proj(pivoted=True)
    pivot = one.stored["pivot"].clone()
    pivot[0] = pivot[1]
    with pytest.raises(TacoError, match="no permutation"):
        load(layer, {"pivot": pivot})


def test_a_rank_larger_than_the_map_is_refused() -> None:
    one = Map(HIDDEN, WIDE, WIDE + 1)
    with pytest.raises(TacoError, match="rank 41"):
        linear.RowParallelLinear(
            WIDE, HIDDEN, quant_config=config_for({"mlp.down_proj": one}), prefix="model.layers.0.mlp.down_proj"
        )


def test_a_layer_without_weights_can_run() -> None:
    """`--load-format dummy` leaves the pivot as it was made: it must be an index all the same."""
    layer, _ = down_proj(pivoted=True)
    for name in ("v", "u"):
        getattr(layer, name).data.zero_()
    found, _ = finished(layer)(torch.randn(2, WIDE))
    assert torch.equal(found, torch.zeros(2, HIDDEN))


@pytest.mark.parametrize("ranks, warned", [(1, False), (2, False), (4, True)])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_ranks_that_save_nothing_are_told_of(
    kind: str, ranks: int, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 x 64 at rank 16: one rank saves half, four hold 16 x 64 + 16 x 16 of the dense shard's 16 x 64."""
    on_rank(monkeypatch, 0, ranks)
    said: list[str] = []
    monkeypatch.setattr("taco_svd.vllm.factors.logger.warning_once", said.append)
    made = {"column": linear.ColumnParallelLinear, "row": linear.RowParallelLinear}[kind]
    path = {"column": "self_attn.o_proj", "row": "mlp.down_proj"}[kind]
    config = config_for({path: Map(64, 64, 16)})
    made(64, 64, bias=False, quant_config=config, prefix=f"model.layers.0.{path}")
    assert bool(said) == warned and len(said) <= 1
