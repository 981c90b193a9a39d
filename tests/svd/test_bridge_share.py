"""What share of a step bridges take, by a clock around each of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch

from taco_svd import bridge_share as module
from taco_svd.bench import BenchSettings, run_bench
from taco_svd.bench_models import from_shape, shape_structure
from taco_svd.bridge_share import LEAST_SAMPLES, MOST_SAMPLES, bridge_share, bridges_timed
from taco_svd.replacement import LowRankBridge

from .tiny_models import CONFIGS


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bridge_seconds: float = 0.0) -> None:
        self.now = 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        plain = LowRankBridge.forward

        def forward(bridge: LowRankBridge, hidden: torch.Tensor) -> torch.Tensor:
            self.now += bridge_seconds
            return plain(bridge, hidden)

        monkeypatch.setattr(LowRankBridge, "forward", forward)


@pytest.fixture
def two_bridges() -> torch.nn.Module:
    return torch.nn.Sequential(*(LowRankBridge(8, 2, False, 1e-6) for _ in range(2)))


def test_only_what_happens_in_bridges_counts(two_bridges, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, bridge_seconds=0.5)
    x = torch.randn(3, 8)

    def sample() -> float:  # three steps of 9 seconds and two bridges each
        for _ in range(3):
            clock.now += 9.0
            two_bridges(x)
        return 10.0

    ratio, samples = bridge_share(two_bridges, sample, steps=3, seconds=0, samples=7)
    assert samples == 7
    assert ratio.median == ratio.low == ratio.high == pytest.approx(1 / 9)


@pytest.mark.parametrize("seconds, expected", [(0.0, LEAST_SAMPLES), (100.0, 101), (1e9, MOST_SAMPLES)])
def test_it_ends_in_time(seconds: float, expected: int, two_bridges, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def sample() -> float:
        clock.now += 1.0
        return 1.0

    assert bridge_share(two_bridges, sample, 1, seconds)[1] == expected


def test_bridges_compute_the_same_and_are_themselves_again(compressed_tiny: Callable) -> None:
    _, model, _ = compressed_tiny("llama", "bridge")
    bridges = [part for part in model.modules() if isinstance(part, LowRankBridge)]
    ids = torch.randint(0, 50, (1, 6))
    with torch.no_grad():
        expected = model(ids).logits
        with suppress(KeyboardInterrupt), bridges_timed(model) as spent:
            assert torch.equal(model(ids).logits, expected)
            assert len(spent) == len(bridges) > 0 and min(spent) > 0
            raise KeyboardInterrupt
        assert all(type(bridge) is LowRankBridge for bridge in bridges)
        assert torch.equal(model(ids).logits, expected) and len(spent) == len(bridges)


def test_bench_says_it_of_a_bridged_model_over_removal() -> None:
    for method, there in (("bridge", True), ("paper", False)):
        structure, redundant = shape_structure(CONFIGS["llama"](), method, 1, dtype=torch.float32)
        made = from_shape(CONFIGS["llama"](), structure, redundant, torch.float32)
        pairs = (("compressed", "removal"), ("compressed", "dense"))
        settings = BenchSettings(prompt=4, decode_steps=2, rounds=3, pairs=pairs, control=True, energy=False)
        result = run_bench(made, settings)
        for row in result["results"]:
            said = {pair for pair, values in row["comparisons"].items() if "bridges" in values}
            assert said == ({"compressed/removal"} if there else set())
            for pair in said:
                inside, added = (row["comparisons"][pair][clock] for clock in ("bridges", "windows"))
                assert 0 < inside["low"] <= inside["median"] <= inside["high"] and inside["samples"] == 3
                assert added["low"] <= added["median"] <= added["high"] and added["rounds"] == 3
                assert row["comparisons"][pair]["windows_control"]["rounds"] == 3
