"""Latency runs: rounds and their stopping, what is compared, what is refused, and what is written."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from taco_kernels.env import build_digest
from taco_svd import TacoError, bench_memory, bench_runner, checkpoint, compress, intervals, latency, save_compressed
from taco_svd.architectures import Architecture
from taco_svd.bench import BenchSettings, compare_pair, run_bench, weight_bytes_of, with_peak, work
from taco_svd.bench_memory import cache_bytes, check_memory
from taco_svd.bench_models import BenchModels, from_checkpoint, from_shape, redundant_layers, shape_structure
from taco_svd.bench_runner import Runner
from taco_svd.budget import Sizes, structure_parameters
from taco_svd.calibration import context_length
from taco_svd.devices import make_current, on_device, waits_for
from taco_svd.energy import energy_counter
from taco_svd.export import with_layers_removed
from taco_svd.shapes import SHAPES, random_model, shape_config, skeleton
from taco_svd.structure import Structure

from .tiny_models import CONFIGS, tiny_model

# -- rounds ------------------------------------------------------------------------------------------------------


class Machine:
    """A clock, and two functions whose times it knows: 1% apart, on a machine that slows down and is disturbed."""

    def __init__(self, drift: float = 0.0, noise: float = 0.0, overhead: float = 0.01) -> None:
        self.now, self.calls, self.order = 0.0, 0, ""
        self.drift, self.noise, self.overhead = drift, noise, overhead
        self.random = random.Random(3)

    def run(self, name: str, base: float) -> float:
        self.order += name
        seconds = base * (1 + self.drift * self.calls) * self.random.lognormvariate(0, self.noise)
        self.calls += 1
        self.now += seconds
        return seconds

    def compare(self, **settings: object):
        return compare_pair(
            lambda: self.run("A", 1 + self.overhead), lambda: self.run("B", 1.0), clock=lambda: self.now, **settings
        )


def test_a_steady_drift_cancels_within_each_round() -> None:
    # 1% slower with every call: taking A and B by turns would see that instead of the 1% between them
    machine = Machine(drift=0.01)
    ratio, stopped, ones, others = machine.compare(precision=1e-9, seconds=1e9, rounds=20)
    assert stopped == "rounds" and len(ones) == len(others) == 40
    # A B B A cancels what is linear in the call's number, to rounding
    assert ratio.median == pytest.approx(0.01, abs=1e-4)
    assert machine.order[2:10] == "ABBABAAB"


def test_it_stops_when_the_interval_is_narrow_and_not_before() -> None:
    ratio, stopped, ones, _ = Machine(noise=0.01).compare(precision=0.001, seconds=1e9)
    assert stopped == "interval" and ratio.high - ratio.low <= 0.002
    assert ratio.low <= 0.01 <= ratio.high
    few = Machine(noise=0.01).compare(precision=0.005, seconds=1e9)[2]
    assert len(few) < len(ones)


def test_an_interval_that_is_narrow_once_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = iter([0.001, 0.003, 0.001, 0.001])
    looks: list[int] = []

    def look(ratios: list[float]) -> intervals.Ratio:
        looks.append(len(ratios))
        return intervals.Ratio(0.0, 0.0, next(widths))

    monkeypatch.setattr("taco_svd.bench.bootstrap", look)
    _, stopped, ones, _ = Machine().compare(precision=0.001, seconds=1e9)
    assert stopped == "interval" and looks == [12, 16, 22, 28] and len(ones) == 56


def test_it_stops_at_the_time_limit_after_enough_rounds() -> None:
    machine = Machine(noise=0.2)
    _, stopped, ones, _ = machine.compare(precision=1e-6, seconds=200)
    assert stopped == "time" and 200 < machine.now < 215 and len(ones) > 24
    _, stopped, ones, _ = Machine(noise=0.2).compare(precision=1e-6, seconds=0.1)
    assert stopped == "time" and len(ones) == 24


def series(likeness: float, count: int, seed: int) -> list[float]:
    """Ratios around zero, each like the one before it: `likeness` is their correlation, 0 for independent ones."""
    noise, value, found = random.Random(seed), 0.0, []
    for _ in range(20 + count):
        value = likeness * value + (1 - likeness**2) ** 0.5 * noise.gauss(0, 0.01)
        found.append(value)
    return found[20:]


@pytest.mark.parametrize("likeness, least", [(0.0, 0.9), (0.8, 0.85)])
def test_intervals_hold_the_median_where_rounds_resemble_the_last(likeness: float, least: float) -> None:
    found = [intervals.bootstrap(series(likeness, 160, seed), draws=500) for seed in range(100)]
    # resampling alone gives 0.58 at a likeness of 0.8
    assert sum(ratio.low <= 0 <= ratio.high for ratio in found) / 100 >= least


def test_independent_rounds_count_one_each_and_alike_ones_together() -> None:
    mean = {
        likeness: sum(intervals.rounds_like_one(series(likeness, 400, seed)) for seed in range(20)) / 20
        for likeness in (0.0, 0.8)
    }
    assert mean[0.0] < 1.3
    # of the sides of a Gaussian series: 1 + 2 sum of (2 / pi) asin(0.8 ** lag) is 6.4
    assert 4 < mean[0.8] < 9
    assert intervals.rounds_like_one([0.1]) == intervals.rounds_like_one([0.1] * 30) == 1
    assert intervals.rounds_like_one([0.1, -0.1] * 20) == 1  # the order of a round turns around: that is no drift


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_models_that_take_turns_follow_themselves_equally_often(count: int) -> None:
    names = [f"model {index}" for index in range(count)]
    rounds = [latency.turns(names, number) for number in range(2 * count)]
    assert all(sorted(order) == names for order in rounds)
    one_after_another = [name for order in [*rounds, rounds[0]] for name in order]
    itself = [one for one, next_ in itertools.pairwise(one_after_another) if one == next_]
    assert len({itself.count(name) for name in names}) == 1
    assert len({sum(order[0] == name for order in rounds) for name in names}) == 1


# -- models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_size_they_are_called(name: str) -> None:
    billions = float(name.rsplit("-", 1)[1].removesuffix("b"))
    parameters = skeleton(shape_config(name), torch.bfloat16).num_parameters()
    # names round up to a tenth or so: Llama-3.2-1B has 1.24, Qwen3-0.6B 0.60
    assert 0.95 * billions < parameters / 1e9 < 1.25 * billions


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "phi3"])
def test_random_models_are_finite_and_have_their_own_memory(name: str) -> None:
    config = CONFIGS[name]()
    model = random_model(config, torch.float32)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(places)) == len(places)
    logits = model(torch.arange(12)[None]).logits
    assert torch.isfinite(logits).all() and logits.std() > 0


def test_random_models_need_nothing_but_a_config() -> None:
    with pytest.raises(TacoError, match="only a real checkpoint"):
        random_model(CONFIGS["gemma3"](), torch.float32)  # scales its embeddings by a buffer


def test_redundant_layers_are_deep_runs_and_the_last_layer_stays() -> None:
    assert redundant_layers(22, 5) == [16, 17, 18, 19, 20]
    assert redundant_layers(22, 5, runs=2) == [15, 16, 18, 19, 20]
    with pytest.raises(TacoError, match="do not fit"):
        redundant_layers(4, 4)


@pytest.mark.parametrize("method, arguments", [("bridge", {"layers": 2}), ("paper", {"layers": 2}), ("taco", {})])
def test_models_of_a_shape_share_all_they_can(method: str, arguments: dict) -> None:
    config = CONFIGS["llama"]()
    structure, redundant = shape_structure(config, method, dtype=torch.float32, **arguments)
    made = from_shape(config, structure, redundant, torch.float32)
    planned = from_shape(config, structure, redundant, torch.float32, "meta")
    assert ("removal" in made.models) == (method != "taco")
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for model in made.models.values()
        for tensor in [*model.parameters(), *model.buffers()]
    }
    assert made.bytes == sum(storages.values()) == planned.bytes
    ids = torch.arange(6)[None]
    for model in made.models.values():
        assert torch.isfinite(model(ids).logits).all()
    dense, compressed = made.models["dense"], made.models["compressed"]
    assert not torch.equal(dense(ids).logits, compressed(ids).logits)
    if method == "bridge":
        assert len(made.models["removal"].model.layers) == len(dense.model.layers) - 2


@pytest.mark.parametrize("method, keep", [("paper", 0.8), ("taco", 0.9), ("taco", 0.7)])
def test_structures_of_a_shape_keep_the_share_that_was_asked_for(method: str, keep: float) -> None:
    config = shape_config("qwen3-0.6b")
    structure, _ = shape_structure(config, method, keep=keep)
    made = from_shape(config, structure, [], torch.bfloat16, "meta")
    dense, compressed = (sum(p.numel() for p in made.models[name].parameters()) for name in ("dense", "compressed"))
    # ranks are rounded down, to whole numbers or to multiples of 16
    assert keep - 0.03 < compressed / dense <= keep


def test_plain_structures_count_the_same_parameters_twice() -> None:
    config = CONFIGS["llama"]()
    structure, redundant = shape_structure(config, "paper", layers=[1, 3], dtype=torch.float32)
    compressed = from_shape(config, structure, redundant, torch.float32).models["compressed"]
    expected = structure_parameters(Architecture(skeleton(config, torch.float32)), structure)
    assert compressed.num_parameters() == expected and redundant == [1, 3]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"method": "svd"}, "--method must be"),
        ({"method": "taco", "layers": 2}, "--layers goes with"),
        ({"method": "bridge", "keep": 0.8}, "--keep goes with"),
        ({"method": "taco", "keep": 0.01}, "cannot be reached"),
        ({"method": "paper", "bridge_rank": 4}, "--bridge-rank"),
        ({"method": "bridge", "layers": [1, 1]}, "different"),
        ({"method": "bridge", "share": 1.5}, "--share"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(arguments: dict, said: str) -> None:
    with pytest.raises(TacoError, match=said):
        shape_structure(CONFIGS["llama"](), **arguments)


def test_work_counts_what_a_phase_must_do() -> None:
    model = tiny_model("llama")  # 5 layers, hidden 32, 2 key/value heads of 8, tied embeddings
    assert cache_bytes(model.config, 3, 10, torch.float32) == 2 * 3 * 10 * 2 * 8 * 5 * 4
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert work(model, "decode", 3, 10) == weights + buffers + cache_bytes(model.config, 3, 10, torch.float32)
    matrices = sum(sum(m * n for m, n in Sizes.of(Architecture(model)).linear_shapes) for _ in range(5))
    assert work(model, "prefill", 3, 10) == 3 * (10 * matrices + 10 * 10 * 32 * 5 + 96 * 32)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_learned_positions_are_neither_multiplied_with_nor_read_as_a_whole(name: str) -> None:
    model = tiny_model(name)
    longer = type(model.config).from_dict({**model.config.to_dict(), "max_position_embeddings": 4096})
    long = skeleton(longer, torch.float32)
    assert long.num_parameters() > model.num_parameters()
    assert work(long, "prefill", 2, 10) == work(model, "prefill", 2, 10)
    assert work(long, "decode", 2, 10) == work(model, "decode", 2, 10)


# -- runners -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_what_is_timed_is_what_the_model_computes(mode: str, compressed_tiny: Callable) -> None:
    """Logits of the timed steps against a plain forward pass over the whole text, before and after starting over."""
    model = compressed_tiny("llama", "bridge")[1]
    seen: list[torch.Tensor] = []
    forward = type(model).forward

    class Watching(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object):
            output = forward(self, *args, **kwargs)
            seen.append(output.logits)
            return output

    original = type(model)
    model.__class__ = Watching
    try:
        runner = Runner(model, mode, batch=2, prompt=6, decode_steps=3)
        if mode == "compiled":  # a list cannot be appended to inside the compiled graph: watch it from outside
            # and without generated code, which takes longer to build than all other tests of this file
            compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
            runner._prefill = _watched(compiled, model, runner, seen)
            step = compiled
            runner._step = lambda: seen.append(
                step(model, input_ids=runner.token, past_key_values=runner._cache, use_cache=True).logits
            )
        seen.clear()
        runner.prefill()
        for _ in range(2):  # twice: the second time over a cache that was taken back
            assert runner.decode(2) > 0
            assert runner.decode(1) > 0
    finally:
        model.__class__ = original
    assert runner.used == 3
    cache_type = DynamicCache if mode == "eager" else StaticCache
    assert isinstance(runner._cache, cache_type)
    with torch.inference_mode():
        expected_prefill = model(runner.ids).logits[:, -1:]
        prompt = runner.ids[:1].expand(2, -1)  # decoding starts from the first prompt, in every row
        text = torch.cat([prompt, runner.token.expand(2, 3)], 1)
        expected = model(text).logits[:, 6:]
    # float32 products summed in another order, through five layers of width 32
    torch.testing.assert_close(seen[0], expected_prefill, rtol=1e-4, atol=1e-4)
    assert len(seen) == 7
    torch.testing.assert_close(torch.cat(seen[1:4], 1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(seen[4:7], 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "qwen2", "gpt2"])
def test_decoding_goes_on_after_a_prompt_that_is_longer_than_a_sliding_window(name: str, mode: str) -> None:
    """The cache that steps are timed on: what it holds, and where it says that the prompt ended."""
    model = tiny_model(name).eval()
    runner = Runner(model, "eager", batch=2, prompt=24, decode_steps=4)
    runner.mode = mode  # the static cache, filled without compiling anything
    runner._cache = None
    with torch.inference_mode():
        runner._rewind()
        text = torch.cat([runner.ids[:1].expand(2, -1), runner.token, runner.token], 1)
        expected = model(text, use_cache=False).logits[:, -2:]
        steps = [model(input_ids=runner.token, past_key_values=runner._cache, use_cache=True).logits for _ in range(2)]
    # float32 products summed in another order, through five layers of width 32
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_cache_takes_no_more_than_its_windows(compressed_tiny: Callable) -> None:
    for name in ("llama", "mistral", "gemma2", "gemma3", "qwen2", "gpt2"):
        model = tiny_model(name).eval()
        cache = bench_runner._static_cache(model, 2, 28)
        made = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert cache_bytes(model.config, 2, 28, model.dtype, windows=False) == made, name
        eager = DynamicCache(config=model.config)
        model(torch.ones(2, 28, dtype=torch.int64), past_key_values=eager, use_cache=True)
        # of a window transformers keeps one token less than is seen, since the next one is there by itself
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in eager.layers)
        assert kept <= cache_bytes(model.config, 2, 28, model.dtype) <= made, name
    # in three of five layers (24 - 8)^2 pairs of tokens are too far apart, for each of two products over half of them
    model = tiny_model("gemma3")
    windowed = work(model, "prefill", 2, 24)
    model.config.layer_types = ["full_attention"] * 5
    assert work(model, "prefill", 2, 24) - windowed == 2 * 3 * 32 * (24 - 8) ** 2
    # and no compressed model's: the windows of its own layers count
    compressed = compressed_tiny("gemma3", "bridge")[1]
    assert compressed.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert cache_bytes(compressed.config, 1, 24, torch.float32) == 2 * (8 + 8 + 24) * 2 * 8 * 4


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_compiled_decoding_is_one_graph_while_a_window_fills_and_slides(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More steps than torch compiles the same code for, over the end of the window of 8."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        bench_runner, "_compiled",
        lambda forward, _: torch.compile(forward, fullgraph=True, dynamic=False, backend=backend),
    )  # fmt: skip
    torch._dynamo.reset()
    runner = Runner(tiny_model(name).eval(), "compiled", batch=2, prompt=3, decode_steps=12, phases=("decode",))
    for _ in range(13):
        assert runner.decode() > 0
    assert len(graphs) == 1


def _watched(forward: Callable, model: object, runner: Runner, seen: list[torch.Tensor]) -> Callable:
    def run(cache: object) -> None:
        output = forward(model, input_ids=runner.ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        seen.append(output.logits)

    return run


def test_graphs_need_a_gpu(compressed_tiny: Callable) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TacoError, match="needs a GPU"):
        Runner(compressed_tiny("llama", "bridge")[1], "graph")


# -- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_runner_goes_with_its_caches_when_it_is_let_go(
    mode: str, compressed_tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the collector, which is off while two are timed: caches of pairs gone by would stay beside theirs."""
    # without generated code, which takes long to build and has nothing to do with this
    monkeypatch.setattr(bench_runner, "_compiled", lambda forward, device: forward)
    model = compressed_tiny("llama", "bridge")[1]
    gc.collect()
    gc.disable()
    try:
        runner = Runner(model, mode, batch=2, prompt=6, decode_steps=3)
        runner.prefill()
        runner.decode(2)
        runner.decode(2)
        left = [weakref.ref(runner), weakref.ref(runner._cache), weakref.ref(runner._cache.layers[0].keys)]
        sample = runner.decode
        del runner
        assert all(reference() is not None for reference in left)
        del sample
        assert all(reference() is None for reference in left)
    finally:
        gc.enable()


def test_only_one_pair_of_runners_is_alive(compressed_tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as `check_caches` counts on."""
    alive: list[weakref.ref] = []
    most: list[int] = []

    class Counted(Runner):
        def __init__(self, *args: object) -> None:
            alive.append(weakref.ref(self))
            most.append(sum(reference() is not None for reference in alive))
            super().__init__(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("taco_svd.bench.Runner", Counted)
    _, model, _ = compressed_tiny("llama", "bridge")
    made = from_shape(CONFIGS["llama"](), model.structure, [2, 3], torch.float32)
    gc.collect()
    gc.disable()
    try:
        run_bench(made, BenchSettings(batches=(1, 2), prompt=4, decode_steps=2, rounds=1, control=True, energy=False))
    finally:
        gc.enable()
    assert len(most) == 2 * 2 * 3 * 2 and max(most) == 2


def test_both_of_a_pair_decode_as_many_steps_at_the_same_lengths(
    compressed_tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one takes a little less than 5 ms / n and the other a little more, too."""
    calls: dict[int, list[tuple[int, int]]] = {}

    class Timed(Runner):
        def decode(self, steps: int = 1) -> float:
            super().decode(steps)
            calls.setdefault(len(self._prompt_states), []).append((steps, self.used))
            return 0.0024 if len(self._prompt_states) > 3 else 0.0026

    monkeypatch.setattr("taco_svd.bench.Runner", Timed)
    _, model, _ = compressed_tiny("llama", "bridge")
    made = from_shape(CONFIGS["llama"](), model.structure, [2, 3], torch.float32)
    pairs = (("compressed", "dense"),)
    run_bench(made, BenchSettings(prompt=4, decode_steps=8, phases=("decode",), pairs=pairs, rounds=4, energy=False))
    ours, dense = calls.values()
    assert ours == dense and ours[-1][0] == 3


def test_peak_memory_is_what_a_model_and_its_runner_need(monkeypatch: pytest.MonkeyPatch) -> None:
    device, model = torch.device("cuda:1"), tiny_model("llama")
    held = {"now": 5000, "most": 90000}  # other models, and what something needed before
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda where: held["now"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda where: held.update(most=held["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda where: held["most"])

    def prepare() -> Callable[[], float]:
        held.update(now=5300, most=5700)
        return lambda: 0.5

    sample, peak = with_peak(prepare, model, device)
    assert sample() == 0.5 and peak == 700 + weight_bytes_of(model)
    assert with_peak(prepare, model, torch.device("cpu"))[1] is None


# -- the second of several GPUs, as far as it can be told without one ----------------------------------------------


def test_a_gpu_is_waited_for_and_made_current_by_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, object]] = []
    for name in ("synchronize", "set_device", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: told.append((name, device)) or nullcontext())
    second = torch.device("cuda:1")
    waits_for(second)()
    make_current(second)
    with on_device(second):
        pass
    assert told == [("synchronize", second), ("set_device", second), ("device", second)]
    told.clear()
    waits_for(torch.device("cpu"))()
    make_current(torch.device("cpu"))
    with on_device(torch.device("cpu")):
        assert told == []


def test_what_is_timed_runs_with_the_models_device_as_the_current_one(
    compressed_tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed_tiny("llama", "bridge")[1]
    current: list[torch.device] = []
    seen: list[list[torch.device]] = []

    @contextmanager
    def here(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    for module in (bench_runner, latency):
        monkeypatch.setattr(module, "on_device", here)
        monkeypatch.setattr(module, "waits_for", lambda device: lambda: seen.append(list(current)))
    hook = model.register_forward_pre_hook(lambda *_: seen.append(list(current)))
    try:
        runner = Runner(model, batch=1, prompt=4, decode_steps=2)
        runner.prefill()
        runner.decode(2)
        runner.decode(1)
        latency.compare_latency({"one": model}, (), prompt=4, decode_steps=2, rounds=1)
    finally:
        hook.remove()
    assert len(seen) > 20 and all(devices == [model.device] for devices in seen)


def test_loading_makes_a_models_gpu_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[torch.device] = []
    monkeypatch.setattr(checkpoint, "make_current", told.append)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    model, _ = checkpoint.load_model(tmp_path / "model")
    assert told == [model.device]


def test_a_graph_is_captured_on_a_stream_of_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own stream for captures stays on the device of the first one."""
    made: list[object] = []
    main = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(
        torch.cuda, "Stream", lambda: made.append(SimpleNamespace(wait_stream=lambda o: None)) or made[-1]
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    captured: list[object] = []
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: captured.append(stream) or nullcontext())
    done: list[str] = []
    bench_runner.capture(lambda: done.append("run"), lambda: done.append("reset"))
    assert captured == made and len(made) == 1 and done == ["run", "reset"] * 4


def test_what_cannot_be_captured_is_said_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def capturing(graph: object, stream: object) -> Iterator[None]:
        try:
            yield
        finally:  # as torch ends a capture that has failed
            raise RuntimeError("operation failed due to a previous error during capture")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    calls: list[int] = []

    def run() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with pytest.raises(TacoError, match="CUDA graph: operation not permitted when stream is capturing$"):
        bench_runner.capture(run, lambda: None)


# -- whole runs --------------------------------------------------------------------------------------------------


def test_a_run_from_a_checkpoint(compressed_tiny: Callable, tmp_path: Path) -> None:
    _, model, plan = compressed_tiny("llama", "bridge")
    save_compressed(model, plan, tmp_path / "small")
    made = from_checkpoint(tmp_path / "small", model)
    settings = BenchSettings(batches=(1, 2), prompt=4, decode_steps=4, modes=("eager",), rounds=2, control=True)
    told: list[tuple[bool, int]] = []
    result = run_bench(made, settings, on_row=lambda part: told.append((part["complete"], len(part["results"]))))
    assert told == [(False, count) for count in (1, 2, 3, 4)] and result["complete"]
    result = json.loads(json.dumps(result))
    assert [(row["batch"], row["phase"]) for row in result["results"]] == [
        (1, "prefill"), (1, "decode"), (2, "prefill"), (2, "decode"),
    ]  # fmt: skip
    for row in result["results"]:
        assert set(row["models"]) == {"dense", "removal", "compressed", "control"}
        assert set(row["comparisons"]) == {"compressed/removal", "compressed/dense", "control/removal"}
        for comparison in row["comparisons"].values():
            ratio = comparison["overhead"]
            assert ratio["low"] <= ratio["median"] <= ratio["high"]
            assert comparison["rounds"] == 2 and comparison["stopped"] == "rounds"
            # the rounds themselves, in their order: another interval can be computed from them
            assert asdict(intervals.bootstrap(comparison["ratios"])) == pytest.approx(ratio, abs=1e-6)
        share = row["comparisons"]["compressed/dense"]["bytes" if row["phase"] == "decode" else "flops"]
        assert 0 < share < 1
        tokens = row["batch"] * (4 if row["phase"] == "prefill" else 1)
        for values in row["models"].values():
            # the median of an even number of samples lies between two of them in both figures alike
            assert values["tokens_per_second"] * values["seconds"]["p50"] == pytest.approx(tokens, rel=1e-9)
    assert result["redundant"] == [2, 3] and result["method"] == "bridge"
    assert Structure.from_dict(result["structure"]) == plan.structure


def test_a_control_needs_no_comparison_with_removal(compressed_tiny: Callable) -> None:
    structure, redundant = shape_structure(CONFIGS["llama"](), "bridge", 1, dtype=torch.float32)
    made = from_shape(CONFIGS["llama"](), structure, redundant, torch.float32)
    pairs = (("compressed", "dense"),)
    settings = BenchSettings(
        prompt=4, decode_steps=2, phases=("decode",), rounds=1, pairs=pairs, control=True, energy=False
    )
    row = run_bench(made, settings)["results"][0]
    assert set(row["comparisons"]) == {"compressed/dense", "control/removal"}
    assert set(made.models) == {"dense", "removal", "compressed"}


SHORT = ("--prompt", "4", "--decode", "2", "--rounds", "1", "--phase", "decode")


def test_what_there_is_not_is_not_compared_unless_it_was_asked_for(
    calibration_tokens: torch.Tensor, tmp_path: Path, invoke: Callable
) -> None:
    """As after --max-latency, and all methods that compress every layer alike: nothing is left without those layers."""
    directory = tmp_path / "small"
    model, plan = compress(tiny_model("llama"), method="svd", keep=0.9, calibration=calibration_tokens)
    assert len(plan.redundant) == 5
    save_compressed(model, plan, directory)
    code, stdout, stderr = invoke("bench", directory, *SHORT, "--json")
    assert code == 0, stderr
    assert set(json.loads(stdout)["results"][0]["comparisons"]) == {"compressed/dense"}
    code, _, stderr = invoke("bench", directory, *SHORT, "--against", "dense,removal")
    assert code == 2 and "there is no removal to compare with; --against dense" in stderr


def test_a_plan_without_the_dense_models_config_is_one_sentence(
    compressed_tiny: Callable, tmp_path: Path, invoke: Callable
) -> None:
    _, model, plan = compressed_tiny("llama", "bridge")
    save_compressed(model, replace(plan, source={}), tmp_path / "small")
    code, _, stderr = invoke("bench", tmp_path / "small", *SHORT)
    assert code == 2 and "does not say what the dense model is like" in stderr and "--against removal" in stderr
    code, stdout, _ = invoke("bench", tmp_path / "small", *SHORT, "--against", "removal")
    assert code == 0 and "compressed over removal" in stdout


def test_many_models_and_batches_can_be_compiled_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def quick(forward: Callable, device: torch.device) -> Callable:
        compiled.append(forward)
        return torch.compile(forward, fullgraph=True, dynamic=False, backend="eager")

    monkeypatch.setattr(bench_runner, "_compiled", quick)
    structure, redundant = shape_structure(CONFIGS["llama"](), "bridge", 3, bridge_rank=2, dtype=torch.float32)
    made = from_shape(CONFIGS["llama"](), structure, redundant, torch.float32)
    settings = BenchSettings(
        batches=(1, 2, 3, 4, 5),
        prompt=4,
        decode_steps=2,
        modes=("compiled",),
        phases=("decode",),
        pairs=(("compressed", "removal"),),  # two layers each: quicker to trace than the dense model
        rounds=1,
        energy=False,
    )
    result = run_bench(made, settings)
    assert len(result["results"]) == 5
    assert len(compiled) == 10 > torch._dynamo.config.recompile_limit


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"modes": ("jit",)}, "--mode takes"),
        ({"phases": ("train",)}, "--phase takes"),
        ({"batches": (0,)}, "at least 1"),
        ({"rounds": 0}, "--rounds"),
        ({"precision": 0.0}, "--precision"),
        ({"prompt": 60, "decode_steps": 10}, "exceed the context of 64"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, said: str) -> None:
    structure, redundant = shape_structure(CONFIGS["llama"](), "bridge", 1, dtype=torch.float32)
    made = from_shape(CONFIGS["llama"](), structure, redundant, torch.float32)
    with pytest.raises(TacoError, match=said):
        run_bench(made, BenchSettings(**settings))


def test_what_does_not_fit_is_refused_with_figures(monkeypatch: pytest.MonkeyPatch, invoke: Callable) -> None:
    assert (bench_memory.available_bytes(torch.device("cpu")) or 1 << 30) > 1 << 20
    monkeypatch.setattr(bench_memory, "available_bytes", lambda device: 10**9)
    check_memory(int(0.9e9), torch.device("cpu"), "it")
    with pytest.raises(TacoError, match=r"it needs 0.9 GB, and 1.0 GB are free"):
        check_memory(int(0.94e9), torch.device("cpu"), "it")
    code, stdout, stderr = invoke("bench", "--shape", "llama-2-7b")
    assert code == 2 and stdout == "" and "needs 13.5 GB, and 1.0 GB are free" in stderr
    structure, redundant = shape_structure(CONFIGS["llama"](), "bridge", 1, dtype=torch.float32)
    made = from_shape(CONFIGS["llama"](), structure, redundant, torch.float32)
    monkeypatch.setattr(bench_memory, "available_bytes", lambda device: 10**5)
    with pytest.raises(TacoError, match="Caches of batch 8"):
        run_bench(made, BenchSettings(batches=(1, 8), prompt=32, decode_steps=8))


def test_energy_counters(tmp_path: Path) -> None:
    counter, why = energy_counter(torch.device("cpu"), tmp_path)
    assert counter is None and "not reported" in why
    for name, value in (("intel-rapl:0", 3_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
    counter, why = energy_counter(torch.device("cpu"), tmp_path)
    assert counter is not None and counter() == 3.5 and "RAPL" in why  # a package's parts are in it already


def test_energy_lands_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    import taco_svd.bench as module

    ticks = iter(range(10**6))
    monkeypatch.setattr(module, "energy_counter", lambda device: (lambda: float(next(ticks)), "a test"))
    monkeypatch.setattr(module._joules, "__defaults__", (0.01,))
    structure, redundant = shape_structure(CONFIGS["llama"](), "bridge", 1, dtype=torch.float32)
    made = from_shape(CONFIGS["llama"](), structure, redundant, torch.float32)
    row = run_bench(made, BenchSettings(prompt=4, decode_steps=4, rounds=1, phases=("decode",)))["results"][0]
    assert row["energy"] == "a test"
    assert all(values["joules_per_token"] > 0 for values in row["models"].values())


def test_energy_is_of_a_usual_call_not_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import taco_svd.bench as module

    now, times = [0.0], iter([0.1] * 9 + [0.6])

    def sample() -> float:
        seconds = next(times)
        now[0] += seconds
        return seconds

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    joules = module._joules(sample, lambda: 100 * now[0], seconds=1.0)  # a machine of 100 watts
    assert joules == pytest.approx(100 * 0.1)


# -- command line ------------------------------------------------------------------------------------------------


def test_bench_of_a_shape_writes_json_and_a_picture(
    monkeypatch: pytest.MonkeyPatch, invoke: Callable, tmp_path: Path
) -> None:
    import taco_svd.shapes as shapes

    monkeypatch.setattr(shapes, "shape_config", lambda name: CONFIGS["llama"]())
    arguments = ["bench", "--shape", "tiny", "--layers", "2", "--prompt", "4", "--decode", "2", "--rounds", "2"]
    code, stdout, stderr = invoke(
        *arguments, "--bridge-rank", "4", "--save", tmp_path / "a.json", "--plot", tmp_path / "a.png", "--json"
    )
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result == json.loads((tmp_path / "a.json").read_text())
    assert result["shape"] == "tiny" and result["redundant"] == [2, 3] and result["dtype"] == "bfloat16"
    assert result["settings"]["decode_steps"] == 2 and result["build"] == build_digest()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    code, stdout, _ = invoke(*arguments, "--method", "taco", "--keep", "0.9", "--dtype", "float32")
    assert code == 2  # taco takes no --layers
    code, stdout, _ = invoke(*arguments[:3], *arguments[5:], "--method", "taco", "--phase", "decode")
    assert code == 0 and "compressed over dense" in stdout and "removal" not in stdout
    assert "taco is a stand-in" in " ".join(stdout.split())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--shape", "llama-9"], "--shape must be one of"),
        ([], "--shape"),
        (["DIR", "--shape", "llama-2-7b"], "not both"),
        (["DIR", "--batch", "one"], "--batch takes numbers"),
        (["DIR", "--against", "magic"], "--against"),
        (["DIR", "--save", "no/such/place.json"], "cannot be written"),
        (["DIR", "--plot", "picture.nonsense"], "must end in one of"),
        (["--shape", "qwen3-0.6b", "--layers", "x"], "--layers takes"),
        (["--shape", "qwen3-0.6b", "--device", "nonsense"], "Device"),
        (["DIR", "--threads", "0"], "--threads"),
        (["DIR", "--keep", "0.8", "--method", "taco"], "--method, --keep only with --shape"),
        (["DIR", "--max-overhead", "0.003"], "--max-overhead only with --shape"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments: list[str], said: str, invoke: Callable) -> None:
    code, stdout, stderr = invoke("bench", *arguments)
    assert code == 2 and stdout == "" and said in stderr and len(stderr.strip().splitlines()) == 1


def test_the_list_of_shapes_is_no_mistake(invoke: Callable) -> None:
    code, stdout, stderr = invoke("bench", "--shape", "list")
    assert (code, stderr) == (0, "") and stdout.split() == list(SHAPES)
    code, stdout, _ = invoke("bench", "--shape", "list", "--json")
    assert code == 0 and json.loads(stdout) == {"shapes": list(SHAPES)}


def test_results_take_the_place_of_no_pipe_and_no_device(tmp_path: Path, invoke: Callable) -> None:
    """They are renamed to their place when they are whole: as root, --save /dev/null would take it away."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code, _, stderr = invoke("bench", "DIR", "--save", pipe)
    assert code == 2 and "an ordinary file" in stderr and pipe.is_fifo()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--method", "taco", "--max-overhead", "0.01"), "--max-overhead has no meaning with --method taco"),
        (("--bridge-rank", "2", "--max-overhead", "0.01"), "--max-overhead has no meaning with --bridge-rank"),
        (("--method", "taco", "--runs", "2"), "--runs has no meaning with --method taco"),
        (("--layers", "2", "--share", "0.5"), "--share has no meaning with --layers"),
        (("--layers", "1,2", "--runs", "2"), "--runs has no meaning with a list of --layers"),
        (("--method", "paper", "--keep", "0.8", "--share", "0.5"), "--share has no meaning with --keep"),
        (("--method", "taco", "--control"), "--control compares removal with itself"),
    ],
)
def test_options_that_others_have_made_meaningless_are_refused(
    given: tuple[str, ...], words: str, invoke: Callable
) -> None:
    code, _, stderr = invoke("bench", "--shape", "tinyllama-1.1b", *given)
    assert code == 2 and words in stderr.replace("\n", " ")


def test_a_prefill_may_be_as_long_as_the_context(compressed_tiny: Callable) -> None:
    """No token is decoded behind it."""
    model = compressed_tiny("llama", "bridge")[1]
    made = BenchModels({"removal": with_layers_removed(model, [2, 3]), "compressed": model})
    limit = context_length(model)
    settings = BenchSettings(prompt=limit, decode_steps=8, phases=("prefill",), rounds=1)
    assert run_bench(made, settings)["complete"]
    with pytest.raises(TacoError, match="decoded ones exceed the context"):
        run_bench(made, replace(settings, phases=("decode",)))
