"""Budgets of bytes and of measured time: the table of costs, what it chooses, and what plans say of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import taco_kernels
from taco_svd import Plan, TacoError, bench_runner, compress, device_costs
from taco_svd import cost_budget as module
from taco_svd.allocation import ByteCosts, ParameterCosts, allocate, factor_parameters, map_options
from taco_svd.architectures import Architecture, linear_shape
from taco_svd.budget import Sizes
from taco_svd.cost_budget import LatencyCosts, bridges_within, without_layers
from taco_svd.device_costs import DeviceCosts
from taco_svd.experts import Expert, OpenExperts
from taco_svd.loss_curves import LossCurves, tail_energies
from taco_svd.model_size import weight_bytes
from taco_svd.options import parse_keep, parse_latency
from taco_svd.replacement import LowRankBridge

from .tiny_models import CONFIGS, tiny_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TACO_CACHE_DIR", str(tmp_path / "cache"))


def by_bytes(op: str, out_features: int, in_features: int, rank: int, rows: int) -> float:
    """A machine that reads 1 GB/s, needs 1 us per call, and is slow with pivots."""
    numbers = out_features * in_features if op == "linear" else rank * (out_features + in_features)
    return 1e-6 + numbers * 4e-9 * (3 if op == "pivoted" else 1)


def costs_by_bytes(**arguments: object) -> DeviceCosts:
    return DeviceCosts("cpu", torch.float32, measure=by_bytes, **arguments)  # type: ignore[arg-type]


# -- the table ---------------------------------------------------------------------------------------------------


def test_costs_between_measured_ranks_are_on_the_line() -> None:
    costs = costs_by_bytes()
    assert costs.linear(64, 48) == by_bytes("linear", 64, 48, 0, 1)
    for rank in (8, 20, 100, 500):
        assert costs.bridge(2048, rank) == pytest.approx(by_bytes("bridge", 2048, 2048, rank, 1))
    for rank in (16, 100, 300):
        assert costs.low_rank(1024, 1024, rank, False) == pytest.approx(by_bytes("low_rank", 1024, 1024, rank, 1))
        assert costs.low_rank(1024, 1024, rank, True) == pytest.approx(by_bytes("pivoted", 1024, 1024, rank, 1))
    assert costs.bridge(2048, 4) < costs.bridge(2048, 8)


def test_costs_never_fall_with_the_rank() -> None:
    noisy = {8: 3e-6, 32: 2e-6, 128: 9e-6, 512: 8e-6, 1024: 8e-6}
    costs = DeviceCosts("cpu", torch.float32, measure=lambda op, m, n, rank, rows: noisy[rank])
    values = [costs.bridge(1024, rank) for rank in range(1, 600)]
    assert values == sorted(values) and values[0] > 0


def test_bridges_above_the_usual_ranks_are_measured_not_extrapolated() -> None:
    """A 7 B model reaches rank 1032: with noise at 512 a line drawn on from there would be flat, or too steep."""
    noisy = {8: 2e-5, 32: 3e-5, 128: 10e-5, 512: 9e-5, 2048: 130e-5}
    costs = DeviceCosts("cpu", torch.float32, measure=lambda op, m, n, rank, rows: noisy[rank])
    assert costs.bridge(4096, 512) == pytest.approx(10e-5)
    assert costs.bridge(4096, 1280) == pytest.approx(70e-5) and costs.bridge(4096, 2048) == pytest.approx(130e-5)


def test_what_was_measured_is_kept_for_this_device_only(tmp_path: Path) -> None:
    first = costs_by_bytes(directory=tmp_path)
    first.linear(8, 8)
    first.close()

    def never(*arguments: object) -> float:
        raise AssertionError("this was measured already")

    again = DeviceCosts("cpu", torch.float32, tmp_path, measure=never)  # type: ignore[arg-type]
    assert again.linear(8, 8) == first.linear(8, 8)
    with pytest.raises(AssertionError):
        again.linear(8, 16)
    with pytest.raises(AssertionError):  # another dtype is another file
        DeviceCosts("cpu", torch.bfloat16, tmp_path, measure=never).linear(8, 8)  # type: ignore[arg-type]
    content = json.loads(first.path.read_text())
    assert content["key"]["dtype"] == "float32" and content["key"]["torch"] == torch.__version__
    other_torch = json.dumps({**content, "key": {**content["key"], "torch": "0.0"}})
    for damaged in (
        "",
        "{",
        "[]",
        other_torch,
        json.dumps({**content, "seconds": {"linear/8x8/0/1": -1}}),
        json.dumps({"key": 1}),
    ):
        first.path.write_text(damaged)
        with pytest.raises(AssertionError):
            DeviceCosts("cpu", torch.float32, tmp_path, measure=never).linear(8, 8)  # type: ignore[arg-type]


def test_what_a_forced_backend_took_is_not_kept_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`TACO_BACKEND=reference` once, and every later budget of this machine would be of the reference's times."""
    places = [costs_by_bytes(directory=tmp_path).path]
    with taco_kernels.use_backend("reference"):
        places.append(costs_by_bytes(directory=tmp_path).path)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    places.append(costs_by_bytes(directory=tmp_path).path)
    assert len(set(places)) == 3


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    one, two = (costs_by_bytes(directory=tmp_path) for _ in range(2))
    one.linear(8, 8)
    two.linear(8, 16)
    one.close()
    two.close()
    assert set(json.loads(one.path.read_text())["seconds"]) == {"linear/8x8/0/1", "linear/8x16/0/1"}
    assert [path.name for path in tmp_path.iterdir()] == [one.path.name]


def test_small_models_are_measured_in_the_caches_that_hold_them(tmp_path: Path) -> None:
    sizes = {size: DeviceCosts("cpu", torch.float32, tmp_path, working_set=size) for size in (1, 3 << 20, 7 << 30)}
    assert [costs.block_bytes for costs in sizes.values()] == [1 << 20, 4 << 20, 256 << 20]
    assert len({costs.path for costs in sizes.values()}) == 3
    assert sizes[7 << 30].path == DeviceCosts("cpu", torch.float32, tmp_path).path
    pieces = sizes[3 << 20]._pieces(1000)
    places = [next(pieces).data_ptr() for _ in range(3000)]
    assert max(places) - min(places) < 4 << 20  # ... in turn, from no more than the model has
    assert len(set(places)) == (4 << 20) // 4000


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    costs = costs_by_bytes(directory=tmp_path / "file" / "below")
    assert costs.linear(8, 8) > 0
    costs.close()


class Clock:
    """A clock that only calls move, by 1 us and 1 ns for each weight that they read, and layers by what `layers_take`.

    What is called really runs.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.patch = 0.0, monkeypatch
        for place in (device_costs, bench_runner):
            monkeypatch.setattr(place, "time", SimpleNamespace(perf_counter=lambda: self.now))
        linear = self.reading(torch.nn.functional.linear)
        monkeypatch.setattr(device_costs, "functional", SimpleNamespace(linear=linear))
        for name in ("low_rank_linear", "pivoted_low_rank_linear"):
            monkeypatch.setattr(taco_kernels, name, self.reading(getattr(taco_kernels, name)))
        bridge = LowRankBridge.forward

        def forward(module: LowRankBridge, hidden: torch.Tensor) -> torch.Tensor:
            self.read([parameter for parameter in module.parameters() if parameter.ndim == 2])
            return bridge(module, hidden)

        monkeypatch.setattr(LowRankBridge, "forward", forward)

    def read(self, weights: Iterable[torch.Tensor]) -> None:
        self.now += 1e-6 + 1e-9 * sum(weight.numel() for weight in weights)

    def reading(self, call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def timed(x: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
            self.read(weight for weight in weights if weight is not None and weight.is_floating_point())
            return call(x, *weights)

        return timed

    def layers_take(self, seconds: float) -> None:
        forward = LlamaDecoderLayer.forward

        def timed(layer: LlamaDecoderLayer, *args: object, **kwargs: object) -> object:
            self.now += seconds
            return forward(layer, *args, **kwargs)

        self.patch.setattr(LlamaDecoderLayer, "forward", timed)


def test_calls_are_timed_with_all_their_weights_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not what is swept before a bridge."""
    monkeypatch.setattr(device_costs, "_BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(device_costs, "SWEEP_BYTES", 1 << 20)
    Clock(monkeypatch)
    costs = DeviceCosts("cpu", torch.float32, tmp_path)
    assert costs.linear(64, 48) == pytest.approx(1e-6 + 1e-9 * 64 * 48)
    for op, rank, weights in (
        ("low_rank", 20, 20 * (64 + 48)), ("pivoted", 20, 20 * (64 + 48 - 20)), ("bridge", 8, 2 * 8 * 48)
    ):  # fmt: skip
        for rows in (1, 3):
            seconds = costs._point(op, 48 if op == "bridge" else 64, 48, rank, rows)
            assert seconds == pytest.approx(1e-6 + 1e-9 * weights)


def test_ranks_to_measure_are_found_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget prices hundreds of ranks of every map; all ranks of the shape are looked through for the first."""
    asked: list[int] = []

    def counted(out_features: int, in_features: int, rank: int) -> tuple[int, bool]:
        asked.append(rank)
        return factor_parameters(out_features, in_features, rank)

    monkeypatch.setattr(device_costs, "factor_parameters", counted)
    device_costs.measured_ranks.cache_clear()
    costs = costs_by_bytes()
    for rank in range(1, 61):
        for pivoted in (False, True):
            assert costs.low_rank(60, 80, rank, pivoted) > 0
    assert sorted(asked) == sorted([*range(1, 61), *range(1, 61)])


# -- on a GPU, as far as it can be told without one ----------------------------------------------------------------


class Gpu:
    """A GPU whose graphs take 3 us per call that they hold, its clock, and what it was asked to do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls, self.graphs, self.current = 0.0, 0, [], []
        monkeypatch.setattr(device_costs, "device_name", lambda device: "a GPU")
        monkeypatch.setattr(device_costs, "capture", self.capture)
        monkeypatch.setattr(device_costs, "waits_for", lambda device: lambda: None)
        monkeypatch.setattr(device_costs, "on_device", lambda device: self.current.append(device) or nullcontext())
        monkeypatch.setattr(device_costs, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def call(self) -> None:
        self.calls += 1
        self.now += 50e-6  # to launch it, which is not what is asked for

    def capture(self, run: Callable[[], object], reset: Callable[[], None]) -> SimpleNamespace:
        before = self.calls
        run()
        self.graphs.append(self.calls - before)
        return SimpleNamespace(replay=lambda held=self.graphs[-1]: self.replay(held))

    def replay(self, held: int) -> None:
        self.now += 3e-6 * held


def test_calls_on_a_gpu_are_timed_in_a_graph_that_reads_all_the_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = Gpu(monkeypatch)
    costs = DeviceCosts("cuda:1", torch.bfloat16, tmp_path)
    for pieces, held in ((8, 100), (300, 300), (20000, 1000)):
        assert costs._median(gpu.call, None, pieces) == pytest.approx(3e-6)
        assert gpu.graphs.pop() == held and not gpu.graphs
    # launched one by one they were timed by another version: those times are not taken for these
    assert costs.key["timed"] == "graph" and "timed" not in costs_by_bytes(directory=tmp_path).key
    asked = DeviceCosts("cuda:1", torch.bfloat16, tmp_path, measure=by_bytes)
    asked.linear(8, 8)
    assert gpu.current == [torch.device("cuda:1")]


def test_weights_are_cut_into_as_many_pieces_as_are_counted(tmp_path: Path) -> None:
    costs = DeviceCosts("cpu", torch.float32, tmp_path, working_set=1 << 20)
    for numbers in (1000, 1 << 20):
        count, pieces = costs._count(numbers), costs._pieces(numbers)
        places = [next(pieces).data_ptr() for _ in range(count + 1)]
        assert len(set(places)) == count >= 2 and places[count] == places[0]


@pytest.mark.parametrize("device, mode", [("cpu", "eager"), ("cuda:1", "graph")])
def test_models_are_timed_as_their_parts_are(device: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def runner(model: object, mode: str, *more: object) -> SimpleNamespace:
        made.append(mode)
        return SimpleNamespace(prefill=lambda: 0.5, decode=lambda: 0.25)

    monkeypatch.setattr(module, "Runner", runner)
    model = SimpleNamespace(device=torch.device(device), modules=lambda: iter(()))
    assert module.model_seconds(model, "prefill", 8) == 0.5 and module.model_seconds(model, "decode", 8) == 0.25  # type: ignore[arg-type]
    assert made == [mode] * 2
    model.modules = lambda: iter([OpenExperts([Expert(torch.nn.Identity(), torch.nn.Identity(), None)])])
    if mode == "graph":
        with pytest.raises(TacoError, match="--experts whole"):
            module.model_seconds(model, "decode", 8)  # type: ignore[arg-type]
    else:
        assert module.model_seconds(model, "decode", 8) == 0.25  # type: ignore[arg-type]


# -- what is asked for -------------------------------------------------------------------------------------------


def test_keep_and_latency_are_read() -> None:
    assert parse_keep("0.8") == (0.8, None) and parse_keep(0.8) == (0.8, None)
    assert parse_keep("4.2GB") == (None, 4_200_000_000) and parse_keep(" 900 MiB ") == (None, 900 << 20)
    assert parse_latency("0.8") == (0.8, None) and parse_latency("12.5ms") == (None, 0.0125)
    assert parse_latency(0.5) == (0.5, None)
    for text in ("4.2 apples", "GB", "-1", ""):
        with pytest.raises(TacoError, match="--keep"):
            parse_keep(text)
    for text in ("fast", "0", "-3ms", "1.5", "12s"):
        with pytest.raises(TacoError, match="--max-latency"):
            parse_latency(text)


def test_without_layers_is_the_model_without_layers() -> None:
    model = tiny_model("llama")
    bare = without_layers(model, [1, 3])
    ids = torch.arange(8)[None]
    manual = tiny_model("llama")
    manual.model.layers = torch.nn.ModuleList(manual.model.layers[index] for index in (0, 2, 4))
    manual.config.num_hidden_layers = 3
    torch.testing.assert_close(bare(ids).logits, manual(ids, use_cache=False).logits, rtol=0, atol=0)
    assert model.config.num_hidden_layers == 5 and len(model.model.layers) == 5
    assert {id(p) for p in bare.parameters()} < {id(p) for p in model.parameters()}


# -- overhead of bridges -----------------------------------------------------------------------------------------


def seconds_by_layers(model, phase: str, prompt: int) -> float:
    return (0.05 if phase == "prefill" else 0.02) * len(Architecture(model).layers)


def test_the_largest_rank_within_the_overhead_is_taken() -> None:
    from taco_svd.shapes import random_model, shape_config

    model = random_model(shape_config("qwen3-0.6b"), torch.float32, "meta")  # 28 layers, hidden 1024
    redundant = [10, 11, 20]
    for allowed in (0.0003, 0.001, 0.003):
        found = bridges_within(model, redundant, allowed, costs_by_bytes(), seconds_by_layers)
        limit = module.SAFETY * allowed * 0.02 * 25
        step = 8 if found.rank >= 8 else 1
        cost = [2 * by_bytes("bridge", 1024, 1024, rank, 1) for rank in (found.rank, found.rank + step)]
        assert cost[0] <= limit < cost[1] and found.rank % step == 0
        assert [bridge.rank for bridge in found.structure.bridges] == [found.rank] * 2
        assert found.predicted["decode"] == pytest.approx(cost[0] / (0.02 * 25))
        assert found.record["predicted_overhead"] == found.predicted
    # a bridge is never larger than without the option, however much is allowed
    from taco_svd.budget import bridge_structure

    widest = bridge_structure(Architecture(model), redundant, None).bridges[0].rank
    assert bridges_within(model, redundant, 0.5, costs_by_bytes(), seconds_by_layers).rank == widest


def test_an_overhead_out_of_reach_is_refused_with_what_can_be_had() -> None:
    model = tiny_model("llama")
    with pytest.raises(TacoError, match=r"out of reach: 1 bridge of rank 1 cost .*% in decode .* --method removal"):
        bridges_within(model, [2, 3], 1e-6, costs_by_bytes(), seconds_by_layers)
    for allowed in (0.0, 1.0, -1.0):
        with pytest.raises(TacoError, match="above 0 and below 1"):
            bridges_within(model, [2, 3], allowed, costs_by_bytes(), seconds_by_layers)


def test_compress_within_an_overhead_records_the_cost_model(
    monkeypatch: pytest.MonkeyPatch, calibration_tokens: torch.Tensor
) -> None:
    model = tiny_model("llama")
    clock = Clock(monkeypatch)
    clock.layers_take(1e-3)
    found = bridges_within(model, [2, 3], 0.9)
    cost = 1e-6 + 1e-9 * 2 * 32 * found.rank
    assert found.rank >= 1 and found.predicted == {phase: pytest.approx(cost / 3e-3) for phase in ("prefill", "decode")}
    monkeypatch.setattr(module, "model_seconds", None)  # not used below
    monkeypatch.setattr(module.bridges_within, "__defaults__", (costs_by_bytes(), seconds_by_layers, None))
    compressed, plan = compress(model, method="bridge", layers=[2, 3], max_overhead=0.5, calibration=calibration_tokens)
    record = plan.result["cost_budget"]
    assert record["max_overhead"] == 0.5 and record["cost_model"]["torch"] == torch.__version__
    assert set(record["predicted_overhead"]) == {"prefill", "decode"}
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert compressed.structure.bridges[0].rank == plan.structure.bridges[0].rank


# -- bytes and latency -------------------------------------------------------------------------------------------


def toy_curves(architecture: Architecture) -> LossCurves:
    generator = torch.Generator().manual_seed(5)
    maps = {}
    for site in architecture.sites():
        sigma = torch.rand(min(linear_shape(architecture.module(site))), generator=generator)
        maps[site] = tail_energies(sigma.sort(descending=True).values)
    return LossCurves(maps, {})


def test_parameters_are_the_costs_that_were_always_counted() -> None:
    architecture = Architecture(tiny_model("llama"))
    curves, sizes = toy_curves(architecture), Sizes.of(architecture)
    for share in (0.7, 0.85, 0.95):
        plain = allocate(architecture, curves, int(share * sizes.total))
        assert plain == allocate(architecture, curves, int(share * sizes.total), costs=ParameterCosts(sizes))
        assert plain.cost == plain.parameters


def test_a_budget_of_bytes_counts_what_is_stored(calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("llama", torch.bfloat16)
    sizes = Sizes.of(Architecture(model))
    most = int(0.8 * sizes.total * 2)
    compressed, plan = compress(model, keep=f"{most}B", calibration=calibration_tokens)
    stored = plan.result["bytes"]
    assert most - 300 < stored <= most and plan.result["budget_unit"] == "bytes"
    tensors = {id(t): t for t in [*compressed.parameters(), *compressed.buffers()] if t.dtype != torch.float32}
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == stored
    costs = ByteCosts(sizes, 2)
    assert costs.of_map(40, 30, 10, True) == 2 * 10 * (40 + 30 - 10) + 4 * 30
    assert costs.of_map(40, 30, 10, False) == 2 * 10 * 70 and costs.of_map(40, 30, None, False) == 2400


@pytest.mark.parametrize("keep", [0.6, 0.8, 0.9])
def test_indices_of_narrow_maps_count_in_a_budget_of_bytes(keep: float, calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("llama", torch.bfloat16)
    most = int(keep * weight_bytes(model))
    _, plan = compress(model, method="modegpt", keep=f"{most}B", calibration=calibration_tokens)
    # a hidden unit of one layer may be left over, and the head dimensions of the last layer
    assert most - 2 * 32 * 16 < plan.result["bytes"] <= most


@pytest.mark.parametrize("method", ["taco", "svd"])
def test_a_budget_of_bytes_counts_what_stays_in_float32(method: str, calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("llama", torch.bfloat16)
    # as models keep what routing depends on
    model.get_submodule("model.norm").register_parameter("correction", torch.nn.Parameter(torch.zeros(500)))
    most = int(0.8 * weight_bytes(model))
    _, plan = compress(model, method=method, keep=f"{most}B", calibration=calibration_tokens)
    assert 0.99 * most < plan.result["bytes"] <= most


def test_factors_that_are_not_faster_are_never_chosen() -> None:
    """Pivoted factors are slow on this machine: under a latency budget only plain ones may appear."""
    model = tiny_model("llama")
    architecture = Architecture(model)
    curves = toy_curves(architecture)
    costs = LatencyCosts(model, costs_by_bytes(), lambda model, phase, prompt: 2e-4 * len(Architecture(model).layers))
    assert costs.total == pytest.approx(1e-3) and costs.layer == pytest.approx(2e-4)
    for site, curve in curves.maps.items():
        shape = linear_shape(architecture.module(site))
        dense = costs.of_map(*shape, None, False)
        options = map_options(*shape, curve, costs)
        assert options[0].rank is None and len(options) > 1
        assert all(option.cost < dense for option in options[1:])
    everything = {option.pivoted for option in map_options(*shape, curve)}
    assert everything == {False, True}  # ... while by parameters pivoted ones are there
    for fraction in (0.97, 0.9):
        found = allocate(architecture, curves, costs.budget(str(fraction)), costs=costs)
        assert found.cost <= fraction * costs.total and found.structure.low_rank
        saved = sum(
            costs.of_map(*linear_shape(architecture.module(site)), None, False)
            - costs.of_map(*linear_shape(architecture.module(site)), rank, found.structure.is_pivoted(layer, site.path))
            for layer, ranks in found.structure.low_rank.items()
            for site in architecture.sites([layer])
            if (rank := ranks.get(site.path)) is not None
        )
        assert costs.total - saved == pytest.approx(found.cost)
        assert found.cost > (fraction - 0.02) * costs.total  # the budget is spent
    with pytest.raises(TacoError, match="ms per token"):
        allocate(architecture, curves, 1e-9, costs=costs)
    with pytest.raises(TacoError, match="is met by the dense model"):
        costs.budget("2ms")


def test_latency_needs_a_measurement_that_makes_sense() -> None:
    with pytest.raises(TacoError, match="quieter"):
        LatencyCosts(tiny_model("llama"), costs_by_bytes(), lambda model, phase, prompt: 1.0)


def test_compress_within_a_latency(monkeypatch: pytest.MonkeyPatch, calibration_tokens: torch.Tensor) -> None:
    monkeypatch.setattr(
        module.LatencyCosts.__init__, "__defaults__",
        (costs_by_bytes(), lambda model, phase, prompt: 2e-4 * len(Architecture(model).layers), None),
    )  # fmt: skip
    _, plan = compress(tiny_model("llama"), max_latency="0.95ms", calibration=calibration_tokens)
    record = plan.result["cost_budget"]
    assert record["dense_latency"] == pytest.approx(1e-3) and record["max_latency"] == 0.95e-3
    # a whole layer may be the better bargain, and then nothing is left to buy
    assert 0.75e-3 < record["predicted_latency"] <= 0.95e-3 and plan.result["budget_unit"] == "seconds"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"method": "taco", "keep": 0.8, "max_overhead": 0.003}, "--max-overhead goes with"),
        ({"method": "bridge", "layers": 2, "max_overhead": 0.003, "bridge_rank": 4}, "not both"),
        ({"method": "bridge", "layers": 2, "max_overhead": 3.0}, "above 0 and below 1"),
        ({"method": "bridge", "layers": 2, "max_latency": 0.8}, "--max-latency goes with"),
        ({"method": "taco", "keep": 0.8, "max_latency": 0.8}, "budget of its own"),
        ({"method": "taco", "max_latency": 0.8, "compression_ratio": 0.5}, "--compression-ratio goes with --layers"),
        ({"method": "taco", "max_latency": "soon"}, "--max-latency takes"),
        ({"method": "taco", "keep": "1KB"}, "cannot be reached"),
        ({"method": "taco", "keep": "1TB"}, r"--keep 1TB must be .* below the model's [\d,]+ bytes"),
        ({"method": "svd", "keep": "0MB"}, "--keep 0MB"),
    ],
)
def test_contradictions_are_refused_before_long_work(
    arguments: dict, said: str, calibration_tokens: torch.Tensor
) -> None:
    with pytest.raises(TacoError, match=said):
        compress(tiny_model("llama"), calibration=calibration_tokens, **arguments)


def test_bench_of_a_shape_chooses_its_rank_by_cost(monkeypatch: pytest.MonkeyPatch, invoke: Callable) -> None:
    import taco_svd.shapes as shapes

    monkeypatch.setattr(shapes, "shape_config", lambda name: CONFIGS["llama"]())
    Clock(monkeypatch).layers_take(1e-5)  # three of them: a bridge of rank 1 costs 3.5%
    arguments = ["bench", "--shape", "tiny", "--layers", "2", "--prompt", "4", "--decode", "2", "--rounds", "1"]
    code, stdout, stderr = invoke(*arguments, "--max-overhead", "0.95", "--json")
    assert code == 0, stderr
    result = json.loads(stdout)
    assert set(result["cost_budget"]["predicted_overhead"]) == {"prefill", "decode"}
    code, stdout, _ = invoke(*arguments, "--max-overhead", "0.95")
    assert code == 0 and "Predicted overhead: prefill" in stdout.replace("\n", " ")
    code, _, stderr = invoke(*arguments)
    assert code == 2 and "out of reach" in stderr


def test_what_is_drawn_for_a_measurement_is_nobody_elses(tmp_path: Path) -> None:
    """A program draws the same whether the table was there already or not."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    DeviceCosts("cpu", torch.float32, tmp_path, working_set=1 << 20).linear(8, 8)
    assert list(tmp_path.iterdir()) == [] and torch.equal(torch.rand(3), expected)


def test_a_table_is_of_one_machine_and_one_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts of one name differ, and so do builds of one version."""
    import taco_svd.device_costs as module

    paths = {DeviceCosts("cpu", torch.float32, tmp_path).path}
    monkeypatch.setattr(module, "cpu_identity", lambda: {"model": "another"})
    paths.add(DeviceCosts("cpu", torch.float32, tmp_path).path)
    monkeypatch.setattr(module, "build_digest", lambda: "another")
    paths.add(DeviceCosts("cpu", torch.float32, tmp_path).path)
    assert len(paths) == 3
