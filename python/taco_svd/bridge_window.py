"""What bridges cost a running model in all, by turning them on and off and timing no more than they can touch.

Two whole latencies differ by noise where a bridge is a tenth of a percent of either. But nearly all of a step is the
same work on the same weights whether its bridges are there or not: what a bridge can change is its own time and that of
the layers right behind it, whose weights it may have driven out of a cache, until as much has been read as a cache
holds. So the clock runs in that window only, in one model on one cache of keys and values. Its bridges are on in every
other sample; in the rest they hand on their input, which is bare removal.

`bridge_share` times a bridge alone, which leaves the layers behind it out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from .architectures import Architecture
from .bridge_share import called_as, enough
from .device_costs import SWEEP_BYTES
from .intervals import Ratio, bootstrap
from .replacement import LowRankBridge


class BridgeWindows:
    """Clocks around the bridges of a model, and the switch that turns them off.

    A window opens where a bridge begins, and closes at the end of the first layer by which `swept` bytes of weights
    have been read behind it, or at the last layer's. Windows that run into the next bridge are one.

    Attributes:
        on: whether bridges do their work; off, they hand on what they are given.
        spent: seconds in windows since it was last set to 0.
    """

    def __init__(self, model: PreTrainedModel, swept: int = SWEEP_BYTES) -> None:
        self.on, self.spent = True, 0.0
        self._layers = Architecture(model).layers
        self._since: float | None = None
        self._end = -1
        sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in self._layers]
        self._bridges: list[tuple[LowRankBridge, int]] = []
        for index, layer in enumerate(self._layers):
            for part in layer.modules():
                if type(part) is LowRankBridge:
                    self._bridges.append((part, _window_end(sizes, index, swept)))

    @contextmanager
    def running(self) -> Iterator[None]:
        """While open, the model's bridges are timed and listen to `on`; on a CPU, since a clock waits for no GPU."""
        windows, ends = self, {id(bridge): end for bridge, end in self._bridges}

        class Switched(LowRankBridge):
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                windows._open(ends[id(self)])
                return super().__call__(*args, **kwargs) if windows.on else args[0]

        handles = [
            self._layers[end].register_forward_hook(lambda *_, end=end: self._close(end)) for end in set(ends.values())
        ]
        try:
            with called_as(Switched, [bridge for bridge, _ in self._bridges]):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _open(self, end: int) -> None:
        if self._since is None:
            self._since = time.perf_counter()
        self._end = end

    def _close(self, end: int) -> None:
        if self._since is not None and end == self._end:
            self.spent += time.perf_counter() - self._since
            self._since = None


def _window_end(sizes: list[int], after: int, swept: int) -> int:
    """Index of the layer that ends the window of a bridge behind layer `after`."""
    read = 0
    for index in range(after + 1, len(sizes)):
        read += sizes[index]
        if read >= swept:
            return index
    return len(sizes) - 1


def overhead_in_windows(
    model: PreTrainedModel,
    sample: Callable[[], float],
    steps: int,
    seconds: float,
    rounds: int | None = None,
    control: bool = False,
) -> tuple[Ratio, int]:
    """What the bridges add to a sample of the model without them, as a fraction: median, 95% interval, rounds.

    Args:
        sample: runs the model `steps` times and gives the seconds of one.
        seconds: limit, beyond the first `bridge_share.LEAST_SAMPLES` rounds; or
        rounds: exactly so many. Each is two samples with and two without the bridges: A B B A, then B A A B.
        control: the bridges stay off in both: an interval around zero shows what the measurement can resolve.
    """
    windows = BridgeWindows(model)
    found: list[float] = []
    began = time.perf_counter()

    def late() -> bool:
        # after an even number: within a round one of the two follows itself, and a cache may still hold its weights
        return time.perf_counter() - began > seconds and len(found) % 2 == 0

    with windows.running():
        for on in (True, False):  # warms up
            windows.on = on
            sample()
        while not enough(len(found), rounds, late()):
            first = len(found) % 2 == 0
            inside, whole = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
            for on in (first, not first, not first, first):
                windows.on, windows.spent = on and not control, 0.0
                whole[on] += steps * sample()
                inside[on] += windows.spent
            found.append((inside[True] - inside[False]) / whole[False])
    return bootstrap(found), len(found)
