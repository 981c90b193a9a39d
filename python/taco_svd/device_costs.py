"""What linear maps, factors and bridges cost on the device at hand: measured once, kept in the user's cache, and read
between measured ranks.

Every time is that of a call whose weights come from where a model of that size has them: from memory, or from a cache
that holds the whole model. A bridge is timed after a product that has swept the caches as the model's layers would, and
after the few operations that a layer ends with: those have the interpreter and torch's dispatcher at hand again.

On a GPU calls are timed in a CUDA graph, as the model is to whose time theirs is added (`cost_budget.model_seconds`):
launched one by one, a model's step takes what its launches take and a queue of calls what the GPU takes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import taco_kernels
from taco_kernels.env import build_digest

from .allocation import LEAST_SAVING, factor_parameters
from .atomic import whole_file
from .bench_runner import capture
from .devices import device_name, on_device, waits_for
from .gauge import random_pivot
from .replacement import LowRankBridge
from .wide_products import in_natural_products

FORMAT = 2
# at most, of the block that weights are cut from in turn: several times the last cache of common machines
_BLOCK_BYTES = 256 << 20
# what is swept between two calls of a bridge
SWEEP_BYTES = 96 << 20
_SAMPLES, _SECONDS = 25, 0.4
# calls in one graph at least, so that starting it does not show, and at most
_LEAST_CALLS, _MOST_CALLS = 100, 1000


def cache_directory() -> Path:
    """``TACO_CACHE_DIR``, else ``taco-kernels`` below ``XDG_CACHE_HOME`` or ``~/.cache``."""
    named = os.environ.get("TACO_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taco-kernels"


def cpu_identity() -> dict[str, str]:
    """What tells CPUs of one name apart, and what of one a container may use; empty where nothing says so."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            name, _, value = (part.strip() for part in line.partition(":"))
            if name in ("cpu family", "model", "stepping", "cache size"):
                found.setdefault(name, value)
    for name, path in (
        ("last level cache", "/sys/devices/system/cpu/cpu0/cache/index3/size"),
        ("quota", "/sys/fs/cgroup/cpu.max"),
    ):
        with contextlib.suppress(OSError):
            found[name] = Path(path).read_text(encoding="utf-8").strip()
    return found


@functools.cache  # a budget asks for hundreds of ranks of every map
def measured_ranks(out_features: int, in_features: int, pivoted: bool) -> tuple[int, ...]:
    """Ranks to measure, ascending: where `factor_parameters` chooses this gauge and factors are smaller than the
    matrix.
    """
    most = (1 - LEAST_SAVING) * out_features * in_features
    usable = []
    for rank in range(1, min(out_features, in_features) + 1):
        parameters, is_pivoted = factor_parameters(out_features, in_features, rank)
        if is_pivoted == pivoted and parameters <= most:
            usable.append(rank)
    if not usable:
        return (1,)
    first, last = usable[0], usable[-1]
    # multiples of 16 where there are any: other ranks can fall onto slow paths, and are not chosen either
    found = {first + (last - first) * part // 4 for part in range(5)}
    return tuple(sorted({max(first, rank - rank % 16) if rank >= 16 else rank for rank in found}))


class DeviceCosts:
    """Seconds of single calls on one device, in one dtype, with torch's current number of threads.

    Measures what it is asked for and has not seen; `save` keeps that for other processes. Results of other versions of
    torch or of this package, of another thread count or device, or of other settings of what computes do not count.

    Args:
        working_set: bytes of the model's weights, if they are few enough for a cache to hold them; default: they are
            not.
        directory: of the cache file; default `cache_directory()`.
        measure: times one point, ``(op, out, in, rank, rows) -> seconds``; for tests.
    """

    def __init__(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        directory: Path | None = None,
        working_set: int | None = None,
        measure: Callable[[str, int, int, int, int], float] | None = None,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        # powers of two: models of about the same size share a table
        rounded = 1 << max(20, (working_set - 1).bit_length()) if working_set else _BLOCK_BYTES
        self.block_bytes = min(_BLOCK_BYTES, rounded)
        self.key = {
            "format": FORMAT,
            "device": device_name(self.device),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
            "taco_kernels": taco_kernels.__version__,
            "torch": str(torch.__version__),
            "block_bytes": self.block_bytes,
            "native": taco_kernels.dispatch.isa,  # CPUs of one name may differ in it
            "build": build_digest(),
            "direct": taco_kernels.direct.usable,
            "backend": taco_kernels.get_backend(),  # where one is forced, other kernels are timed
            # what the user can hold the library to: its instructions (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA), the
            # precision of its float32 products, and memory in huge pages, which is read up to 15% faster
            "library": torch.backends.cpu.get_cpu_capability(),
            "library_multiplies": taco_kernels.dispatch.library_multiplies(dtype),
            "float32_products": torch.get_float32_matmul_precision(),
            "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        }
        if self.device.type == "cuda":
            self.key["timed"] = "graph"
            self.key["kernels"] = {name: taco_kernels.dispatch.why_not(name, "cuda") for name in ("cuda", "triton")}
            self.key["launch"] = os.environ.get("TACO_CUDA_LAUNCH", "")
        else:
            self.key["cpu"] = cpu_identity()
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (directory or cache_directory()) / f"costs-{digest}.json"
        self.seconds: dict[str, float] = self._load()
        self._measure = measure or self._time
        self._block: torch.Tensor | None = None
        self._new = False

    # -- asking ------------------------------------------------------------------------------------------------

    def linear(self, out_features: int, in_features: int, rows: int = 1) -> float:
        """A dense map of `rows` vectors."""
        return self._point("linear", out_features, in_features, 0, rows)

    def low_rank(self, out_features: int, in_features: int, rank: int, pivoted: bool, rows: int = 1) -> float:
        """A factorised map; between measured ranks a straight line, never falling with the rank."""
        op = "pivoted" if pivoted else "low_rank"
        ranks = measured_ranks(out_features, in_features, pivoted)
        return self._between(op, out_features, in_features, rank, rows, ranks)

    def bridge(self, hidden: int, rank: int, rows: int = 1) -> float:
        """A bridge, its module and the norm included."""
        # where larger ones are asked for, one beyond them: a slope that is drawn on would carry its noise with it
        points = (8, 32, 128, 512) if rank <= 512 else (8, 32, 128, 512, 2048)
        ranks = sorted({min(point, hidden) for point in points})
        return self._between("bridge", hidden, hidden, rank, rows, ranks)

    def _between(
        self, op: str, out_features: int, in_features: int, rank: int, rows: int, ranks: Sequence[int]
    ) -> float:
        known = [self._point(op, out_features, in_features, point, rows) for point in ranks]
        for index in range(1, len(known)):  # a larger rank moves more bytes: what says otherwise is noise
            known[index] = max(known[index], known[index - 1])
        if len(ranks) == 1:
            return known[0]
        right = next((index for index in range(1, len(ranks)) if ranks[index] >= rank), len(ranks) - 1)
        (r0, r1), (t0, t1) = ranks[right - 1 : right + 1], known[right - 1 : right + 1]
        return max(known[0] if rank >= ranks[0] else 0.0, t0 + (t1 - t0) * (rank - r0) / (r1 - r0))

    def _point(self, op: str, out_features: int, in_features: int, rank: int, rows: int) -> float:
        name = f"{op}/{out_features}x{in_features}/{rank}/{rows}"
        if name not in self.seconds:
            # what is drawn here is nobody's business: a program must not depend on whether this was measured before
            with torch.random.fork_rng([]), on_device(self.device):
                self.seconds[name] = self._measure(op, out_features, in_features, rank, rows)
            self._new = True
        return self.seconds[name]

    # -- keeping -----------------------------------------------------------------------------------------------

    def _load(self) -> dict[str, float]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["key"] != self.key:
                return {}
            found = {str(name): float(value) for name, value in data["seconds"].items()}
            return found if all(0 < value < 3600 for value in found.values()) else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # absent or damaged: it is measured again

    def save(self) -> None:
        """Writes what was measured beside what another process has written meanwhile; harmless where it cannot."""
        if not self._new:
            return
        content = {"key": self.key, "seconds": dict(sorted({**self._load(), **self.seconds}.items()))}
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as partial:
                partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
            self._new = False

    def close(self) -> None:
        """Saves, and gives the block of weights back."""
        self.save()
        self._block = None

    # -- measuring ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    @in_natural_products
    def _time(self, op: str, out_features: int, in_features: int, rank: int, rows: int) -> float:
        x = torch.randn(rows, in_features, device=self.device).to(self.dtype)
        if op == "linear":
            total = out_features * in_features
            weights = self._pieces(total)
            return self._median(
                lambda: functional.linear(x, next(weights).view(out_features, in_features)), None, self._count(total)
            )
        if op == "bridge":
            return self._time_bridge(in_features, rank, rows)
        columns = in_features - rank if op == "pivoted" else in_features
        split, total = rank * columns, rank * (columns + out_features)
        weights = self._pieces(total)
        pivot = random_pivot(in_features, rank).to(self.device)

        def call() -> torch.Tensor:
            piece = next(weights)
            v, u = piece[:split].view(rank, columns), piece[split:].view(out_features, rank)
            if op == "pivoted":
                return taco_kernels.pivoted_low_rank_linear(x, v, u, pivot)
            return taco_kernels.low_rank_linear(x, v, u)

        return self._median(call, None, self._count(total))

    @in_natural_products
    def _time_bridge(self, hidden: int, rank: int, rows: int) -> float:
        h = torch.randn(1, rows, hidden, device=self.device).to(self.dtype)
        bridges = []
        for _ in range(4):
            bridge = LowRankBridge(hidden, rank, True, 1e-6, device=self.device, dtype=self.dtype)
            bridges.append(bridge.requires_grad_(False).eval())
        size = max(1, min(SWEEP_BYTES, self.block_bytes) // self.dtype.itemsize // hidden)
        sweep, vector = next(self._pieces(size * hidden)).view(size, hidden), h[0, :1]
        count = iter(range(1 << 30))
        end = nn.Sequential(nn.Linear(hidden, 16), nn.SiLU(), nn.Linear(16, hidden)).to(self.device, self.dtype)

        def before() -> None:
            functional.linear(vector, sweep)
            end(vector).add_(vector)

        return self._median(lambda: bridges[next(count) % 4](h), before if self.device.type == "cpu" else None)

    def _pieces(self, numbers: int) -> Iterator[torch.Tensor]:
        """Pieces of `numbers` weights, another one each time, no end."""
        block, count, index = self._filled_block(numbers), self._count(numbers), 0
        while True:
            yield block[index * numbers : (index + 1) * numbers]
            index = (index + 1) % count

    def _count(self, numbers: int) -> int:
        """How many pieces of `numbers` weights there are."""
        return self._filled_block(numbers).numel() // numbers

    def _filled_block(self, numbers: int) -> torch.Tensor:
        """The block that weights are cut from, large enough for two pieces of `numbers`."""
        least = max(self.block_bytes // self.dtype.itemsize, 2 * numbers)
        if self._block is None or self._block.numel() < least:
            self._block = None
            part = torch.randn(1 << 20, device=self.device).mul_(0.02).to(self.dtype)
            self._block = part.repeat(-(-least // part.numel()))
        return self._block

    def _median(self, call: Callable[[], Any], before: Callable[[], Any] | None = None, pieces: int = 1) -> float:
        """Median seconds of a call, which works on so many pieces of weights in turn; `before` runs before each one."""
        if self.device.type == "cuda":
            return self._median_in_graph(call, pieces)
        for _ in range(2):
            call()
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 5 or (len(times) < _SAMPLES and time.perf_counter() - began < _SECONDS):
            if before is not None:
                before()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _median_in_graph(self, call: Callable[[], Any], pieces: int) -> float:
        # through all pieces: a replay must not find its weights in the cache because the one before has read them
        calls, wait = max(_LEAST_CALLS, min(pieces, _MOST_CALLS)), waits_for(self.device)

        def run() -> None:
            for _ in range(calls):
                call()

        graph = capture(run, lambda: None)
        graph.replay()
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 5 or (len(times) < _SAMPLES and time.perf_counter() - began < _SECONDS):
            wait()
            start = time.perf_counter()
            graph.replay()
            wait()
            times.append((time.perf_counter() - start) / calls)
        return statistics.median(times)
