"""Linear layers of vLLM that hold factors: every kind of layer, every rank of several, against float64."""

from __future__ import annotations

import gc
import importlib.util
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here; `make test-vllm` sets it up and runs this", allow_module_level=True)

from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.lora.layers.utils import _get_lora_device
from vllm.model_executor.layers import linear
from vllm.model_executor.model_loader.checkpoint_weight_patch import _load_nan_masked_weights
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from taco_kernels.low_rank_linear_int8 import quantise_rows
from taco_svd import Structure, TacoError
from taco_svd.vllm import factors
from taco_svd.vllm.factors import FactorsConfig, FactorsMethod
from taco_svd.vllm.shards import Layout

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

    def __init__(
        self,
        outputs: int,
        inputs: int,
        rank: int | None,
        pivoted: bool = False,
        bias: bool = False,
        int8: bool = False,
    ) -> None:
        self.rank, self.pivoted, self.int8 = rank, pivoted, int8
        self.stored: dict[str, torch.Tensor] = {}
        if rank is None:
            self.stored["weight"] = torch.randn(outputs, inputs)
            self.weight = self.stored["weight"].double()
        else:
            self.stored["v"] = torch.randn(rank, inputs - rank if pivoted else inputs)
            self.stored["u"] = torch.randn(outputs, rank)
            v, u = self.stored["v"].double(), self.stored["u"].double()
            if int8:
                for name, rows in (("v", v), ("u", u.T)):
                    integers, self.stored[f"{name}_step"] = quantise_rows(rows)
                    self.stored[name] = (integers if name == "v" else integers.T).contiguous()
                v = self.stored["v"].double() * self.stored["v_step"].double()[:, None]
                u = self.stored["u"].double() * self.stored["u_step"].double()
            if pivoted:
                pivot = torch.randperm(inputs)
                self.stored["pivot"] = pivot.to(torch.int32)
                v = torch.cat([torch.eye(rank, dtype=torch.float64), v], 1)[:, pivot.argsort()]
            self.weight = u @ v
        self.bias = torch.randn(outputs) if bias else None
        if self.bias is not None:
            self.stored["bias"] = self.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = x.double() @ self.weight.T
        return y if self.bias is None else y + self.bias.double()


def config_for(maps: dict[str, Map], choice: str = "auto") -> FactorsConfig:
    structure = Structure(
        source_layers=1,
        kept=(0,),
        low_rank={0: {path: m.rank for path, m in maps.items() if m.rank is not None}},
        pivoted={0: tuple(path for path, m in maps.items() if m.pivoted)},
        int8={0: tuple(path for path, m in maps.items() if m.int8)},
    )
    config = FactorsConfig(structure, None, choice)
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
    for module in (linear, parameter, factors):
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(linear, "tensor_model_parallel_all_reduce", lambda tensor: tensor)  # summed by the test


class Team:
    """Calls the ranks' layers, a thread each, with collectives among them.

    Only one of the threads computes at a time: ranks are processes, and vLLM's products on a CPU share their workspace
    within a process.

    Attributes:
        collectives: names of those that one rank has taken part in, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layers: list[Any]) -> None:
        self.layers, self.collectives = layers, list[str]()
        self._meeting = threading.Barrier(len(layers), timeout=300)
        self._turn = threading.Lock()
        self._place = threading.local()
        self._given: list[torch.Tensor] = [torch.empty(0)] * len(layers)
        monkeypatch.setattr(factors, "tensor_model_parallel_all_gather", self._all_gather)
        monkeypatch.setattr(factors, "tensor_model_parallel_all_reduce", self._all_reduce)

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with ThreadPoolExecutor(len(self.layers)) as pool:
            return list(pool.map(self._run, range(len(self.layers)), inputs))

    def _run(self, rank: int, x: torch.Tensor) -> torch.Tensor:
        self._place.rank = rank
        with self._turn, torch.inference_mode():
            return self.layers[rank](x)[0].double()

    def _all(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        assert tensor.is_contiguous()  # vLLM's communicator for CPUs reads memory as if it were
        if self._place.rank == 0:
            self.collectives.append(name)
        self._given[self._place.rank] = tensor
        self._turn.release()
        try:
            self._meeting.wait()
            found = list(self._given)
            self._meeting.wait()
        finally:
            self._turn.acquire()
        return found

    def _all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self._all("gather", tensor), dim)

    def _all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all("sum", tensor)).sum(0)


def whole_of(parts: list[torch.Tensor], sizes: list[int], copies: list[int] | None = None) -> torch.Tensor:
    """The whole layer's outputs, of what column-parallel ranks computed: `sizes` of the whole layer's fused maps.

    `copies`: how many ranks hold each part of a map; these must agree.
    """
    ranks, found = len(parts), []
    copies = copies or [1] * len(sizes)
    split = [part.split([size * many // ranks for size, many in zip(sizes, copies, strict=True)], 1) for part in parts]
    for index, many in enumerate(copies):
        own = [one[index] for one in split]
        for rank, part in enumerate(own):
            torch.testing.assert_close(part, own[rank - rank % many], rtol=0, atol=1e-4)
        found += own[::many]
    return torch.cat(found, 1)


def close(found: torch.Tensor, exact: torch.Tensor, inputs: int, rank: int) -> None:
    """float32 sums over `inputs` and then `rank` products of unit variance: errors grow as the root of their number."""
    scale = float((inputs * max(rank, 1)) ** 0.5)
    tolerance = (inputs + rank) * torch.finfo(torch.float32).eps * scale
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)


# ranks that 2 to 4 do not divide, below and above what is padded to
QKV_KINDS = {
    "all plain": ((5, False), (3, False), (7, False)),
    "all pivoted": ((21, True), (3, True), (13, True)),
    "dense between": ((29, True), (None, False), (7, False)),
    "dense at both ends": ((None, False), (11, False), (None, False)),
    "one pivoted": ((None, False), (None, False), (9, True)),
}
CHOSEN = ["split", "replicate"]


def chosen(layer: Any, choice: str, ranks: int) -> None:
    """The layer is laid out as it was asked to be. What nothing is loaded to is what memory may hold at worst."""
    assert isinstance(layer.quant_method, FactorsMethod)
    for name, worst in (("v", float("nan")), ("u", float("nan")), ("pivot", 2**30)):
        if hasattr(layer, name):
            getattr(layer, name).data.fill_(worst)
    assert (layer.quant_method.layout is Layout.REPLICATED) == (choice == "replicate" or ranks == 1)


def qkv_layer(config: FactorsConfig, bias: bool) -> Any:
    prefix = "model.layers.0.self_attn.qkv_proj"
    return linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, bias=bias, quant_config=config, prefix=prefix)


@pytest.mark.parametrize("ranks", [1, 2, 4])  # with 4, each of the two key heads is on two ranks
@pytest.mark.parametrize("choice", CHOSEN)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", list(QKV_KINDS))
def test_qkv(kind: str, bias: bool, choice: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("q_proj", "k_proj", "v_proj")
    maps = {
        f"self_attn.{name}": Map(SIZES[name], HIDDEN, min(rank, SIZES[name]) if rank else None, pivoted, bias)
        for name, (rank, pivoted) in zip(names, QKV_KINDS[kind], strict=True)
    }
    x = torch.randn(5, HIDDEN)
    layers = []
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        layer = qkv_layer(config_for(maps, choice), bias)
        chosen(layer, choice, ranks)
        for shard, one in zip(("q", "k", "v"), maps.values(), strict=True):
            load(layer, one.stored, shard)
        layers.append(finished(layer))
    team = Team(monkeypatch, layers)
    found = whole_of(team([x] * ranks), QKV_ROWS, [1] + [max(ranks // KV_HEADS, 1)] * 2)
    close(found, torch.cat([one(x) for one in maps.values()], 1), HIDDEN, 29)
    assert team.collectives == (["gather"] if choice == "split" and ranks > 1 else [])  # one for all maps


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("rows", [5, 200])  # by a kernel for 8-bit factors, and by factors that are written out
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", list(QKV_KINDS))
def test_8_bit_factors(kind: str, bias: bool, rows: int, backwards: bool) -> None:
    names = ("q_proj", "k_proj", "v_proj")

    def made() -> dict[str, Map]:
        return {
            f"self_attn.{name}": Map(SIZES[name], HIDDEN, rank, pivoted, bias, int8=rank is not None)
            for name, (rank, pivoted) in zip(names, QKV_KINDS[kind], strict=True)
        }

    first, second = made(), made()
    layer = qkv_layer(config_for(first), bias)
    assert layer.v.dtype is layer.u.dtype is torch.int8 and layer.v_step.dtype is layer.u_step.dtype is torch.float32
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    for shard, one in zip(("q", "k", "v"), first.values(), strict=True):
        load(layer, one.stored, shard)
    x = torch.randn(rows, HIDDEN)
    # the integers' scales bring factors back to unit variance
    close(finished(layer)(x)[0], torch.cat([one(x) for one in first.values()], 1), HIDDEN, 29)

    initialize_layerwise_reload(model)
    coming = [
        (shard, *item)
        for shard, one in zip(("q", "k", "v"), second.values(), strict=True)
        for item in one.stored.items()
    ][:: -1 if backwards else 1]
    for shard, name, tensor in coming:
        assert get_layerwise_info(layer).can_load(), "finished before the last tensor came"
        load(layer, {name: tensor}, shard)
    finalize_layerwise_reload(model, None)
    close(layer(x)[0], torch.cat([one(x) for one in second.values()], 1), HIDDEN, 29)


def test_8_bit_factors_in_part_or_on_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = {"mlp.gate_proj": Map(WIDE, HIDDEN, 6, int8=True), "mlp.up_proj": Map(WIDE, HIDDEN, 6)}

    def built(maps: dict[str, Map]) -> Any:
        return linear.MergedColumnParallelLinear(
            HIDDEN, [WIDE, WIDE], bias=False, quant_config=config_for(maps), prefix="0.mlp.gate_up_proj"
        )

    with pytest.raises(TacoError, match="quantise all"):
        built(maps)
    on_rank(monkeypatch, 0, 2)
    maps["mlp.up_proj"] = Map(WIDE, HIDDEN, None)
    with pytest.raises(TacoError, match="tensor parallelism"):
        built(maps)
    on_rank(monkeypatch, 0, 1)
    layer = built(maps)
    for name, wrong in (("v", maps["mlp.gate_proj"].stored["v"].float()), ("v_step", torch.ones(6).to(torch.int8))):
        with pytest.raises(TacoError, match="damaged"):
            load(layer, {name: wrong}, 0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("choice", CHOSEN)
@pytest.mark.parametrize("gate, up", [((6, False), (9, False)), ((6, True), (None, False)), ((None, False), (3, True))])
def test_gate_and_up(
    gate: tuple[int | None, bool], up: tuple[int | None, bool], choice: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = {"mlp.gate_proj": Map(WIDE, HIDDEN, *gate), "mlp.up_proj": Map(WIDE, HIDDEN, *up)}
    x = torch.randn(3, HIDDEN)
    layers = []
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        layer: Any = linear.MergedColumnParallelLinear(
            HIDDEN,
            [WIDE, WIDE],
            bias=False,
            quant_config=config_for(maps, choice),
            prefix="model.layers.0.mlp.gate_up_proj",
        )
        chosen(layer, choice, ranks)
        for shard, one in enumerate(maps.values()):
            load(layer, one.stored, shard)
        layers.append(finished(layer))
    found = whole_of(Team(monkeypatch, layers)([x] * ranks), [WIDE, WIDE])
    close(found, torch.cat([one(x) for one in maps.values()], 1), HIDDEN, 9)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("choice", CHOSEN)
@pytest.mark.parametrize("pivoted", [False, True])
def test_maps_that_the_checkpoint_has_fused(
    pivoted: bool, choice: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pair of factors for q, k and v together: each rank holds rows of all three."""
    maps = {"self_attn.qkv_proj": Map(sum(QKV_ROWS), HIDDEN, 13, pivoted)}
    x = torch.randn(2, 2, HIDDEN)  # as vLLM's Transformers backend calls layers
    layers = []
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        config = config_for(maps, choice)
        config.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
        layer = qkv_layer(config, bias=False)
        chosen(layer, choice, ranks)
        load(layer, maps["self_attn.qkv_proj"].stored)
        layers.append(finished(layer))
    found = Team(monkeypatch, layers)([x] * ranks)
    assert [part.shape for part in found] == [(2, 2, sum(QKV_ROWS) // ranks)] * ranks
    close(
        whole_of([part.flatten(0, 1) for part in found], QKV_ROWS),
        maps["self_attn.qkv_proj"](x).flatten(0, 1),
        HIDDEN,
        13,
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("choice", CHOSEN)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("of_map", [3, 17, WIDE])
@pytest.mark.parametrize("pivoted", [False, True])
def test_row_parallel(
    pivoted: bool, of_map: int, bias: bool, choice: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = {"mlp.down_proj": Map(HIDDEN, WIDE, of_map, pivoted, bias)}
    x = torch.randn(6, WIDE)
    layers = []
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        layer: Any = linear.RowParallelLinear(
            WIDE, HIDDEN, bias=bias, quant_config=config_for(maps, choice), prefix="model.layers.0.mlp.down_proj"
        )
        chosen(layer, choice, ranks)
        load(layer, maps["mlp.down_proj"].stored)
        layers.append(finished(layer))
    team = Team(monkeypatch, layers)
    parts = team([part if pivoted else part.contiguous() for part in x.chunk(ranks, dim=1)])
    close(torch.stack(parts).sum(0), maps["mlp.down_proj"](x), WIDE, of_map)
    split = choice == "split" and ranks > 1
    assert team.collectives == ([["sum"], ["gather"]][pivoted] if split else [])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("choice", ["auto", *CHOSEN])
@pytest.mark.parametrize("of_map", [17, 32])
@pytest.mark.parametrize("row", [False, True])
@pytest.mark.parametrize("pivoted", [False, True])
def test_a_rank_holds_as_many_bytes_as_the_benchmark_counts(
    pivoted: bool, row: bool, of_map: int, choice: str, ranks: int, monkeypatch: pytest.MonkeyPatch, repo_root: Path
) -> None:
    """benchmarks/tensor_parallel_bytes.py counts from shapes what these layers hold; docs/vllm.md has its table."""
    spec = importlib.util.spec_from_file_location("counts", repo_root / "benchmarks" / "tensor_parallel_bytes.py")
    assert spec is not None and spec.loader is not None
    counts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counts)
    on_rank(monkeypatch, 0, ranks)
    one, name = Map(HIDDEN, WIDE, of_map, pivoted), "mlp.down_proj"
    kind = linear.RowParallelLinear if row else linear.ColumnParallelLinear
    config = config_for({name: one}, choice)
    layer: Any = kind(WIDE, HIDDEN, bias=False, quant_config=config, prefix=f"model.layers.0.{name}")
    load(layer, one.stored)
    found = sum(parameter.numel() * parameter.element_size() for parameter in finished(layer).parameters())
    itemsize = one.stored["u"].element_size()
    maps = [counts.Map(HIDDEN, WIDE, of_map, pivoted, ranks)]
    assert found == counts.linear_bytes(maps, row, ranks, itemsize, choice)
    if choice == "split" and of_map == 32:  # nothing is padded: a share of all weights, and the pivot
        weights = of_map * (HIDDEN + WIDE - of_map * pivoted) * itemsize
        assert found == weights // ranks + (layer.pivot.numel() * 4 if pivoted else 0)


@pytest.mark.parametrize("kind", ["qkv", "down"])
def test_a_layer_whose_second_factor_is_small_has_it_on_every_rank(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without being asked; of a fused layer's maps, all or none."""
    for wide, expected in ((1, Layout.REPLICATED), (32, Layout.INPUTS if kind == "down" else Layout.OUTPUTS)):
        on_rank(monkeypatch, 0, 2)
        layer: Any
        if kind == "down":
            config = config_for({"mlp.down_proj": Map(HIDDEN, WIDE, wide)})
            layer = linear.RowParallelLinear(WIDE, HIDDEN, quant_config=config, prefix="0.mlp.down_proj")
        else:
            maps = {"self_attn.q_proj": Map(32, HIDDEN, wide), "self_attn.k_proj": Map(16, HIDDEN, 1)}
            layer = linear.QKVParallelLinear(
                HIDDEN, HEAD, HEADS, KV_HEADS, quant_config=config_for(maps), prefix="0.self_attn.qkv_proj"
            )
        assert layer.quant_method.layout is expected


def test_layers_that_are_not_split_over_all_ranks_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives are among all ranks; and vLLM may run shared experts where there must be none."""
    on_rank(monkeypatch, 1, 2)
    name = "mlp.down_proj"
    one = Map(HIDDEN, WIDE, 30)
    for kind, options in (
        (linear.ReplicatedLinear, {}),
        (linear.RowParallelLinear, {"disable_tp": True}),
        (linear.ColumnParallelLinear, {"tp_rank": 0, "tp_size": 1}),
    ):
        layer: Any = kind(
            WIDE, HIDDEN, bias=False, quant_config=config_for({name: one}, "split"), prefix=f"0.{name}", **options
        )
        load(layer, one.stored)
        assert layer.quant_method.layout is Layout.REPLICATED
        x = torch.randn(3, WIDE)
        close(finished(layer)(x)[0], one(x), WIDE, 30)
    expert = "mlp.shared_expert.down_proj"
    layer = linear.RowParallelLinear(
        WIDE, HIDDEN, bias=False, quant_config=config_for({expert: one}, "split"), prefix=f"0.{expert}"
    )
    assert layer.quant_method.layout is Layout.REPLICATED


RELOADED = {
    "plain": ((13, False), (9, False), (11, False)),
    "few directions": ((5, False), (3, True), (7, False)),  # the second of two ranks holds none of v
    "pivoted, dense, plain": ((21, True), (None, False), (15, False)),
    "fused in the checkpoint": ((13, True),),
    "row-parallel": ((17, False),),
    "row-parallel, pivoted": ((17, True),),
    "row-parallel, split at its rank": ((WIDE // 2, True),),  # as many columns are stored as a rank of two holds
}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("ranks, choice", [(1, "auto"), (2, "split"), (2, "replicate")])
@pytest.mark.parametrize("kind", list(RELOADED))
def test_weights_that_come_later_take_the_place_of_the_first(
    kind: str, ranks: int, choice: str, backwards: bool, monkeypatch: pytest.MonkeyPatch
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
    layers = []
    x = torch.randn(4, inputs)
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        config = config_for(first, choice)
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
        if kind != "few directions":  # there the last tensor may have nothing for this rank
            assert get_layerwise_info(layer).can_load(), "finished before the last tensor came"
        load(layer, {coming[-1][1]: coming[-1][2]}, coming[-1][0])
        assert not get_layerwise_info(layer).can_load(), "not finished with the last tensor"
        finalize_layerwise_reload(model, None)
        for name, (parameter, place) in places.items():
            assert layer.get_parameter(name) is parameter and parameter.data_ptr() == place

        assert (layer.quant_method.layout is Layout.REPLICATED) == (choice != "split")
        layers.append(layer)
    parts = Team(monkeypatch, layers)(list(x.chunk(ranks, dim=1)) if row else [x] * ranks)
    found = torch.stack(parts).sum(0) if row else whole_of(parts, QKV_ROWS)
    close(found, torch.cat([one(x) for one in second.values()], 1), inputs, WIDE // 2)


@pytest.mark.parametrize("rank", [6, 30])  # less and more than the inputs of one of two ranks
@pytest.mark.parametrize("choice", CHOSEN)
@pytest.mark.parametrize("pivoted", [False, True])
def test_files_of_each_rank_load_as_they_were_saved(
    pivoted: bool, choice: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's sharded states: parameters as they are once loading is done, put back before it is done."""
    one = Map(HIDDEN, WIDE, rank, pivoted)
    x = torch.randn(4, WIDE)
    layers = []
    for place in range(2):
        on_rank(monkeypatch, place, 2)

        def built() -> Any:
            config = config_for({"mlp.down_proj": one}, choice)
            return linear.RowParallelLinear(WIDE, HIDDEN, bias=False, quant_config=config, prefix="0.mlp.down_proj")

        first = built()
        load(first, one.stored)
        saved = {name: tensor.clone() for name, tensor in finished(first).state_dict().items()}
        with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="sharded_state"))):
            again = built()
        own = again.state_dict()
        assert {name: tensor.shape for name, tensor in own.items()} == {name: saved[name].shape for name in saved}
        for name, tensor in saved.items():
            own[name].copy_(tensor)
        layers.append(finished(again))
    close(torch.stack(Team(monkeypatch, layers)(list(x.chunk(2, dim=1)))).sum(0), one(x), WIDE, rank)


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("pivoted", [False, True])
def test_files_of_each_rank_of_another_layout_are_refused(
    pivoted: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM copies a smaller tensor to the beginning of a larger one."""
    on_rank(monkeypatch, 0, 2)
    one = Map(HIDDEN, WIDE, 30, pivoted)
    made = {"column": linear.ColumnParallelLinear, "row": linear.RowParallelLinear}[kind]

    def built(choice: str) -> Any:
        config = config_for({"mlp.down_proj": one}, choice)
        return made(WIDE, HIDDEN, bias=False, quant_config=config, prefix="0.mlp.down_proj")

    first = built("split")
    load(first, one.stored)
    saved = finished(first).state_dict()
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="sharded_state"))):
        for choice, refused in (("split", False), ("replicate", True)):
            again = built(choice)
            for name, tensor in again.state_dict().items():
                size = min(len(tensor), len(saved[name]))
                tensor[:size].copy_(saved[name][:size])
            if refused:
                with pytest.raises(TacoError, match="another layout"):
                    finished(again)
            else:
                finished(again)


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("choice", CHOSEN)
def test_single_elements_that_come_later_are_written_where_they_belong(
    choice: str, pivoted: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's sparse updates: NaN stands for what stays, and copying passes over it."""
    if pivoted and kind == "row" and choice == "replicate":
        choice = "auto"  # which is split: a factor that is written out takes no later parts
    one, other = Map(HIDDEN, WIDE, 21, pivoted), Map(HIDDEN, WIDE, 21, pivoted)
    patches = {name: torch.full_like(one.stored[name], float("nan")) for name in ("v", "u")}
    for name, patch in patches.items():
        places = torch.rand(patch.shape) < 0.5
        patch[places] = other.stored[name][places]
        one_now = torch.where(places, patch, one.stored[name])
        other.stored[name] = one_now
    made = {"column": linear.ColumnParallelLinear, "row": linear.RowParallelLinear}[kind]
    layers = []
    for rank in range(2):
        on_rank(monkeypatch, rank, 2)
        config = config_for({"mlp.down_proj": one}, choice)
        layer: Any = made(WIDE, HIDDEN, bias=False, quant_config=config, prefix="0.mlp.down_proj")
        load(layer, one.stored)
        finished(layer)
        model = torch.nn.Module()
        model.load_weights = lambda weights, layer=layer: load(layer, dict(weights))  # type: ignore[assignment]
        _load_nan_masked_weights(model, list(patches.items()))
        layers.append(layer)
    x = torch.randn(4, WIDE)
    found = Team(monkeypatch, layers)(list(x.chunk(2, dim=1)) if kind == "row" else [x, x])
    v = other.stored["v"].double()
    if pivoted:
        v = torch.cat([torch.eye(21, dtype=torch.float64), v], 1)[:, one.stored["pivot"].long().argsort()]
    exact = x.double() @ v.T @ other.stored["u"].double().T
    close(torch.stack(found).sum(0) if kind == "row" else torch.cat(found, 1), exact, WIDE, 21)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_pivot_that_a_later_update_leaves_out_is_missed(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on_rank(monkeypatch, 0, ranks)
    layer, one = down_proj(pivoted=True, choice="split")
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    load(layer, one.stored)
    finished(layer)
    initialize_layerwise_reload(model)
    load(layer, {name: one.stored[name] for name in ("u", "v")})
    # vLLM leaves there what lay in memory
    layer.pivot = torch.nn.Parameter(torch.full_like(layer.pivot, 2**30, device="cpu"), requires_grad=False)
    with pytest.raises(TacoError, match="without the pivot"):
        finalize_layerwise_reload(model, None)


def test_a_factor_that_is_written_out_takes_no_other_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by vLLM's reloading, which gives the loader memory of the checkpoint's shape, but past it."""
    on_rank(monkeypatch, 1, 2)
    layer, one = down_proj(pivoted=True, choice="replicate")
    load(layer, one.stored)
    finished(layer)
    with pytest.raises(TacoError, match="reload_weights"):
        load(layer, {"v": one.stored["v"]})
    before = layer.v.data.clone()
    assert torch.equal(finished(layer).v, before)  # nothing is written out twice


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("pivoted", [False, True])
def test_parameters_that_move_are_read_where_they_are(pivoted: bool, int8: bool) -> None:
    """Offloading points parameters to other memory, or has copies stand in for them."""
    layer, one = down_proj(pivoted, int8=int8)
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


def down_proj(pivoted: bool = False, choice: str = "auto", int8: bool = False) -> tuple[Any, Map]:
    one = Map(HIDDEN, WIDE, 6, pivoted, int8=int8)
    config = config_for({"mlp.down_proj": one}, choice)
    layer: Any = linear.RowParallelLinear(
        WIDE, HIDDEN, bias=False, quant_config=config, prefix="model.layers.0.mlp.down_proj"
    )
    return layer, one


@pytest.mark.parametrize("name", ["v", "u"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_factors_of_the_wrong_shape_are_refused(name: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on_rank(monkeypatch, 0, ranks)
    layer, one = down_proj(choice="split")
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_without_weights_can_run(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--load-format dummy` leaves the pivot as it was made: it must be an index all the same."""
    layers = []
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        layer, _ = down_proj(pivoted=True, choice="split")
        for name in ("v", "u"):
            getattr(layer, name).data.zero_()
        layers.append(finished(layer))
    parts = Team(monkeypatch, layers)(list(torch.randn(2, WIDE).chunk(ranks, dim=1)))
    assert all(torch.equal(part, torch.zeros(2, HIDDEN, dtype=torch.float64)) for part in parts)


@pytest.mark.parametrize("choice", ["auto", "replicate"])
@pytest.mark.parametrize("ranks, larger", [(1, False), (2, False), (4, True)])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_ranks_that_save_nothing_are_told_of(
    kind: str, ranks: int, larger: bool, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 x 128 at rank 32: one rank saves half. With one factor whole, four hold 32 x 128 + 32 x 32 of 32 x 128."""
    on_rank(monkeypatch, 0, ranks)
    said: list[str] = []
    monkeypatch.setattr("taco_svd.vllm.factors.logger.warning_once", said.append)
    made = {"column": linear.ColumnParallelLinear, "row": linear.RowParallelLinear}[kind]
    path = {"column": "self_attn.o_proj", "row": "mlp.down_proj"}[kind]
    config = config_for({path: Map(128, 128, 32)}, choice)
    made(128, 128, bias=False, quant_config=config, prefix=f"model.layers.0.{path}")
    assert bool(said) == (larger and choice == "replicate") and len(said) <= 1
