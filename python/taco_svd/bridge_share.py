"""How long bridges themselves take inside a running model, as a share of everything else that it does.

The overhead of a bridged model over bare removal is the difference of two latencies: a third of a percent of a step is
lost in what a shared machine adds to either. A clock around each bridge, in the model as it runs and with whatever its
layers have left in the caches, takes their difference at once. What it does not see is how much slower the layers
behind a bridge are for it (weights that it has driven out of a cache), so it stands beside the difference, not in its
place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .intervals import Ratio, bootstrap
from .replacement import LowRankBridge

# Samples before an interval is believed, and beyond which more say nothing new.
LEAST_SAMPLES, MOST_SAMPLES = 12, 400


@contextmanager
def called_as(kind: type[LowRankBridge], bridges: list[LowRankBridge]) -> Iterator[None]:
    """While open, calls of the bridges are those of `kind`: a module's call is looked up in its class."""
    for bridge in bridges:
        bridge.__class__ = kind
    try:
        yield
    finally:
        for bridge in bridges:
            bridge.__class__ = LowRankBridge


@contextmanager
def bridges_timed(model: nn.Module) -> Iterator[list[float]]:
    """While open, the seconds of each call of a bridge of `model` are appended to the list, what calls it included.

    On a CPU: a clock does not wait for a GPU.
    """
    spent: list[float] = []

    class Timed(LowRankBridge):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = super().__call__(*args, **kwargs)
            spent.append(time.perf_counter() - start)
            return result

    with called_as(Timed, [module for module in model.modules() if type(module) is LowRankBridge]):
        yield spent


def bridge_share(
    model: nn.Module, sample: Callable[[], float], steps: int, seconds: float, samples: int | None = None
) -> tuple[Ratio, int]:
    """Time inside the bridges over the rest of a sample's time, median and 95% interval, and of how many samples.

    Args:
        sample: runs the model `steps` times and gives the seconds of one.
        seconds: limit, beyond the first `LEAST_SAMPLES`; or
        samples: exactly so many.
    """
    shares: list[float] = []
    began = time.perf_counter()
    with bridges_timed(model) as spent:
        while not enough(len(shares), samples, time.perf_counter() - began > seconds):
            spent.clear()
            whole = sample()
            inside = sum(spent) / steps
            shares.append(inside / (whole - inside))
    return bootstrap(shares), len(shares)


def enough(done: int, wanted: int | None, late: bool) -> bool:
    """Whether a measurement is done: of so many samples as are wanted, or of what it may take."""
    if wanted is not None:
        return done >= wanted
    return done >= MOST_SAMPLES or (late and done >= LEAST_SAMPLES)
