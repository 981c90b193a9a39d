"""Looks for Triton configurations on this GPU and writes them to ``taco_kernels/tuned/<gpu>.json``."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from . import bench, shapes
from .checks import Inputs, draw, worst_error
from .store import write_json
from .timing import Version, never, nothing, sets_needed, time_on_cpu, time_on_gpu


def candidates(point: shapes.Point, processors: int) -> Iterator[Any]:
    """The default first, then neighbours of it in the directions that matter for this number of rows."""
    from taco_kernels.triton_kernels.config import Config, default_config

    size = 4 if point.dtype == "float32" else 2
    in_size, out_size, rank = point.table_shape
    gated = point.op == "low_rank_mlp"
    base = default_config(point.rows, in_size, out_size, rank, size, processors, gated)
    seen = set()

    def fresh(config: Config) -> bool:
        new = config not in seen
        seen.add(config)
        return new

    def vary(config: Config, **changes: Any) -> Iterator[Config]:
        for name, values in changes.items():
            for value in values:
                changed = dataclasses.replace(config, **{name: value})
                if fresh(changed):
                    yield changed

    if fresh(base):
        yield base
    splits = sorted({max(1, base.split // 2), base.split * 2, base.split * 4} - {base.split})
    if base.path == "row":
        yield from vary(base, split=splits, block_r=(8, 32), block_k=(256, 1024), block_n=(8, 32), stages=(3, 4))
        yield from vary(base, warps=(2, 8), warps2=(2, 8), stages2=(3, 4))
    elif point.rows <= 16:
        yield from vary(base, split=splits, block_r=(32,), block_k=(128, 512), block_n=(16, 64), stages=(2, 4))
        yield from vary(base, block_k2=(32, 128), path=("split", "gemm") if base.split <= 8 else ("gemm",))
    else:
        yield from vary(base, split=splits, block_k=(128,), stages=(2, 4), stages2=(2, 4), warps=(4, 8), warps2=(4, 8))
        yield from vary(base, block_m=(64, 128), block_n=(64, 128) if gated else (64, 128, 256))
        if base.path != "fused":
            yield from vary(base, persistent=(1, 2))
        if size == 2 and point.rank <= 256 and not gated:
            block_r = max(16, 1 << (point.rank - 1).bit_length())
            for block_m, warps, block_n in ((64, 4, 64), (64, 4, 128), (128, 8, 64), (128, 8, 128)):
                blocks = -(-point.rows // block_m)
                for out_split in sorted({1, max(1, processors // blocks), max(1, 2 * processors // blocks)}):
                    fused = Config("fused", block_m, block_r, 64, 1, warps, 3, block_n, 16, warps, 3, out_split)
                    if fresh(fused):
                        yield fused


def run(config: Any, inputs: Inputs) -> torch.Tensor | list[torch.Tensor]:
    """The Triton kernels of these inputs' op with this configuration (low_rank_mlp: that of gate and up)."""
    from taco_kernels.triton_kernels.launch import low_rank

    residual = inputs.x if inputs.eps is not None else inputs.residual
    members = [member[:3] for member in inputs.members]  # none of these ops has pivots
    if inputs.op == "low_rank_mlp":
        from taco_kernels.triton_kernels.low_rank_mlp import low_rank_mlp

        return low_rank_mlp(inputs.x, *members, inputs.act, config=config)
    return low_rank(inputs.op, inputs.x, members, residual, inputs.eps, config)


def name_of(config: Any) -> str:
    """The values of a configuration, in the order of its fields."""
    return "/".join(map(str, dataclasses.astuple(config)))


def tune_point(
    point: shapes.Point,
    device: str,
    processors: int,
    cache: int,
    few: bool,
    at: Callable[[str], None] = nothing,
    without: Collection[str] = (),
    enough: Callable[[], bool] = never,
) -> dict[str, Any]:
    """Times the candidates; the fastest whose result is right, alone and in the timed graph, wins.

    ``at`` is told the name of the candidate that comes next. Those named in ``without`` are not run. Once ``enough`` is
    true no further one is; ``untried`` in the result counts these.
    """
    first = draw(point.op, point.in_size, point.out_size, point.rank, point.rows, point.dtype, device)
    count = 2 if few else min(60, sets_needed(first.bytes, cache, 8 << 30))
    sets = [first] + [
        draw(point.op, point.in_size, point.out_size, point.rank, point.rows, point.dtype, device)
        for _ in range(count - 1)
    ]
    every = list(candidates(point, processors))[: 2 if few else None]
    default = name_of(every[0])
    configs = {name_of(config): config for config in every if name_of(config) not in without}
    timer = time_on_gpu if device == "cuda" else time_on_cpu
    versions: dict[str, Version] = {name: (functools.partial(run, config), sets) for name, config in configs.items()}
    times, last = timer(versions, replays=3 if few else 10, at=at, enough=enough)
    failed = {name: t["error"] for name, t in times.items() if "error" in t}
    ranked = sorted((t["p50"], name) for name, t in times.items() if "p50" in t)
    facts = {"tried": len(times), "untried": len(configs) - len(times), "left_out": sorted(without)}
    wrong: list[dict[str, Any]] = []
    for microseconds, name in ranked:
        at(name)
        alone = worst_error(run(configs[name], first), first, "triton")
        if alone <= 1.0 and worst_error(last[name], sets[-1], "triton") <= 1.0:
            return {
                "config": dataclasses.asdict(configs[name]),
                "us": microseconds,
                "default_us": times.get(default, {}).get("p50"),
                **facts,
                "failed": len(failed),
                "wrong": wrong,
            }
        wrong.append(dataclasses.asdict(configs[name]))
    return {"config": None, **facts, "wrong": wrong, "errors": list(failed.values())[:3]}


def write_table(
    path: Path, gpu: str, points: dict[str, dict[str, Any]] | None, measured: dict[str, dict[str, Any]] | None = None
) -> int:
    """The table of all tuned points, each for the buckets it speaks for; returns the number of entries.

    Without ``points`` (None) the table keeps the entries that it has.

    ``measured`` are the benchmark's points: from them come the backends that the dispatcher is to choose, and the
    CUDA kernels' launch. Without them the table keeps what it has of those.
    """
    from taco_kernels.triton_kernels.config import Config, as_entry, load_table

    old = json.loads(path.read_text()) if path.exists() else {}
    entries = old.get("entries", []) if points is None else []
    for point in (points or {}).values():
        if point.get("config") is None:
            continue
        for rows in shapes.TUNED_ROWS.get(point["rows"], (point["rows"],)):
            config = Config(**point["config"])
            if (config.path == "row") != (rows == 1):
                continue
            entries.append(as_entry(point["op"], point["dtype"], tuple(point["table_shape"]), rows, config))
    table = {"gpu": gpu, "entries": entries, **{key: old[key] for key in ("cuda_launch", "choices") if key in old}}
    if measured:
        faster = bench.launches(measured)["faster"]
        table["choices"] = bench.choices(measured)
        if faster is not None:
            table["cuda_launch"] = faster
    write_json(path, table)
    load_table(path)
    return len(entries)
