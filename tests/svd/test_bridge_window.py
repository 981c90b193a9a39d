"""What bridges add to a step, by a clock that runs only behind them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from transformers import LlamaForCausalLM

from taco_svd import bridge_window as module
from taco_svd.architectures import Architecture
from taco_svd.bridge_share import LEAST_SAMPLES, MOST_SAMPLES
from taco_svd.bridge_window import BridgeWindows, overhead_in_windows
from taco_svd.export import with_layers_removed
from taco_svd.replacement import LowRankBridge, attach_bridge

from .tiny_models import CONFIGS


class Clocked:
    """A model of seven layers with bridges behind `after`, on a clock that only its parts move.

    Each layer takes 1 second, each bridge 0.5, and a layer right behind a bridge that is on 0.25 more.
    """

    def __init__(self, after: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        config = CONFIGS["llama"]()
        config.num_hidden_layers = 7
        self.model = LlamaForCausalLM(config).eval()
        layers = Architecture(self.model).layers
        for index in after:
            attach_bridge(layers[index], LowRankBridge(config.hidden_size, 4, False, 1e-6))
        self.now, self.disturbed = 0.0, False
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: self._layer())
        plain = LowRankBridge.forward

        def forward(bridge: LowRankBridge, hidden: torch.Tensor) -> torch.Tensor:
            self.now += 0.5
            self.disturbed = True
            return plain(bridge, hidden)

        monkeypatch.setattr(LowRankBridge, "forward", forward)

    def _layer(self) -> None:
        self.now += 1.25 if self.disturbed else 1.0
        self.disturbed = False

    def sample(self) -> float:
        """Two steps, and what a sampler takes between them; seconds of one."""
        start = self.now
        with torch.no_grad():
            for _ in range(2):
                self.model(torch.tensor([[1, 2, 3]]))
                self.now += 1.0
                self.disturbed = False
        return (self.now - start) / 2


@pytest.mark.parametrize("swept", [1, 30_000, 1 << 30], ids=["one layer", "some layers", "to the end"])
@pytest.mark.parametrize("after", [(2,), (0, 4), (2, 3), (5,)], ids=str)
def test_bridges_and_what_they_do_to_the_layers_behind_count_once(
    after: tuple[int, ...], swept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.BridgeWindows.__init__, "__defaults__", (swept,))
    clocked = Clocked(after, monkeypatch)
    ratio, rounds = overhead_in_windows(clocked.model, clocked.sample, steps=2, seconds=0, rounds=3)
    assert rounds == 3
    assert ratio.median == ratio.low == ratio.high == pytest.approx(0.75 * len(after) / 8)


def test_a_control_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked((0, 4), monkeypatch)
    ratio, _ = overhead_in_windows(clocked.model, clocked.sample, steps=2, seconds=0, rounds=3, control=True)
    assert ratio.median == ratio.low == ratio.high == 0


def test_behind_the_last_layer_the_bridge_alone_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked((6,), monkeypatch)
    ratio, _ = overhead_in_windows(clocked.model, clocked.sample, steps=2, seconds=0, rounds=2)
    assert ratio.median == pytest.approx(0.5 / 8)


def test_a_window_is_no_longer_than_it_need_be(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked((0, 4), monkeypatch)
    windows = BridgeWindows(clocked.model, swept=1)
    with windows.running():
        clocked.sample()
    assert windows.spent == pytest.approx(2 * 2 * (0.5 + 1.25))


@pytest.mark.parametrize(
    "swept, after, expected", [(1, 0, 1), (10, 0, 1), (11, 0, 2), (1, 2, 3), (25, 1, 3), (1, 3, 3), (1000, 0, 3)]
)
def test_a_window_ends_when_a_cache_has_been_swept(swept: int, after: int, expected: int) -> None:
    assert module._window_end([10, 10, 10, 10], after, swept) == expected


def test_off_is_removal_and_the_model_is_itself_again(compressed_tiny: Callable) -> None:
    _, model, plan = compressed_tiny("llama", "bridge")
    ids = torch.randint(0, 50, (1, 6))
    with torch.no_grad():
        bridged, removed = model(ids).logits, with_layers_removed(model, list(plan.redundant))(ids).logits
        assert not torch.equal(bridged, removed)
        windows = BridgeWindows(model)
        with suppress(KeyboardInterrupt), windows.running():
            assert torch.equal(model(ids).logits, bridged)
            windows.on = False
            assert torch.equal(model(ids).logits, removed)
            raise KeyboardInterrupt
        assert torch.equal(model(ids).logits, bridged)
    bridges = [part for part in model.modules() if isinstance(part, LowRankBridge)]
    assert bridges and all(type(bridge) is LowRankBridge for bridge in bridges)
    assert not any(layer._forward_hooks for layer in Architecture(model).layers)


@pytest.mark.parametrize("seconds, expected", [(0.0, LEAST_SAMPLES), (16 * 4 * 32.5, 34), (1e9, MOST_SAMPLES)])
def test_it_ends_in_time_on_an_even_round(seconds: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked((2,), monkeypatch)
    monkeypatch.setattr(clocked.model, "forward", lambda *_: None)

    def sample() -> float:
        clocked.now += 16.0
        return 16.0

    assert overhead_in_windows(clocked.model, sample, 1, seconds)[1] == expected
