"""The parts of the GPU suite, each a process of its own (`conductor`): every one returns whether nothing was wrong."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import bench, checks, forced, shapes, svd, timing, tuning
from .conductor import BURIAL_SECONDS, OWN_GROUP, SUITE
from .store import ROOT, RUNNING, Store, all_checked, failed
from .suite import Suite

SANITIZERS = ("memcheck", "racecheck", "synccheck")


def build(suite: Suite) -> bool:
    """Builds the extension in place and keeps the compiler's report and what the package says of itself."""
    store = suite.store("build")
    started = time.monotonic()
    if suite.dry:
        store.add("setup.py", {"ok": True, "skipped": "dry run: what is built here is used"})
    else:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        # This GPU's code alone: a third of the compiler's time.
        major, minor = torch.cuda.get_device_capability()
        arch = {(9, 0): "90a", (10, 0): "100a"}.get((major, minor), "80")
        settings = {**os.environ, "TACO_CUDA": "1", "TACO_CUDA_ARCHS": os.environ.get("TACO_CUDA_ARCHS", arch)}
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
        seconds = round(time.monotonic() - started, 1)
        text = "".join(log.read_text() for log in ROOT.glob("build/**/build.log"))
        spills = [line.strip() for line in text.splitlines() if "spill" in line and " 0 bytes spill stores" not in line]
        registers = [int(word) for word in re.findall(r"Used (\d+) registers", text)]
        tail = (done.stdout + done.stderr)[-2000:]
        store.add(
            "setup.py",
            {
                "ok": done.returncode == 0, "seconds": seconds, "tail": tail,
                "kernels": len(registers), "most_registers": max(registers, default=None), "spills": spills[:5],
            },
        )  # fmt: skip
        if done.returncode:
            print(tail)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    report = subprocess.run(
        [sys.executable, "-m", "taco_kernels.env", "--json"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    ok = report.returncode == 0
    store.add("env", {"ok": ok, "report": json.loads(report.stdout) if ok else report.stderr[-2000:]})
    store.save(complete=True)
    return all(point["ok"] for point in store.points.values())


def _with_cuda(suite: Suite) -> dict[str, Any]:
    """Whether the CUDA kernels can be used; without them the other backends' results would look complete."""
    from taco_kernels import backends

    state = backends(suite.device)["cuda"]
    return {"ok": state == "usable", **({} if state == "usable" else {"error": f"cuda: {state}"})}


def _check_work(suite: Suite, backend: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(key, what checks it) of one backend, those that every process of the step shares out alike."""
    full = suite.dry or suite.small
    if backend == "tuned":
        for point, config in _tuned_configs(suite):
            key = f"tuned/{point.key}/{tuning.name_of(config)}"
            yield key, functools.partial(forced.check, forced.neighbour(point), config, suite.device)
        return
    if backend == "triton":  # statistics of the compression, which have no CUDA kernel
        for dtype in ("bfloat16", "float16"):
            for sizes in checks.TINY_MOMENTS if suite.dry else checks.MOMENTS:
                key = f"triton/second_moment/{dtype}/{'x'.join(map(str, sizes))}"
                yield key, functools.partial(checks.check_moment, *sizes, dtype, suite.device)
        for dtype in ("bfloat16", "float32"):
            for sizes in checks.TINY_ATTRIBUTIONS if suite.dry else checks.ATTRIBUTIONS:
                key = f"triton/singular_attribution/{dtype}/{'x'.join(map(str, sizes))}"
                yield key, functools.partial(checks.check_attribution, *sizes, dtype, suite.device)
        for dtype in ("bfloat16", "float16", "float32"):
            for sizes in checks.TINY_INTEGERS if suite.dry else checks.INTEGERS:
                for pivoted in (False, True):
                    key = f"triton/int8/{dtype}/{'x'.join(map(str, sizes))}{'/pivoted' if pivoted else ''}"
                    yield key, functools.partial(checks.check_int8, *sizes, pivoted, dtype, suite.device)
    if backend == "triton":
        for case, config in forced.cases(suite.dry):
            key = f"triton/forced/{config.path}/{case.key}/p{config.persistent or config.out_split}"
            yield key, functools.partial(forced.check, case, config, suite.device)
    twin = "cuda" if backend == "cuda dependent" and not suite.small and "cuda" not in suite.without else None
    for case in checks.cases(suite.small, suite.dry):
        # Triton compiles for every dtype, path and alignment: a part of the grid reaches every kernel.
        if backend == "triton" and not full:
            odd = case.dtype == "bfloat16" or case.in_size == 264
            if case.rows not in (0, 1, 7, 16, 64, 2048) or case.rank > 1024 or not odd:
                continue
        # Separate steps overflow float16 where the fused ones do not; that is not theirs to answer for.
        if backend == "library" and (suite.small or case.scale != 1.0):
            continue
        yield f"{backend}/{case.key}", functools.partial(checks.check, case, backend, suite.device, twin)
    if full or backend.partition(" ")[0] not in ("cuda", "triton"):
        return
    # Behind all that needs no graph: a capture that fails ends the process, and ends all checks where every one fails.
    if backend == "cuda":
        for op in shapes.OPS:
            if op not in ("low_rank_mlp", "low_rank_linear_concat"):  # which have no direct calls
                yield f"direct/{op}", functools.partial(checks.check_direct, op)
    calls = checks.CALLS if backend == "triton" else {**checks.CALLS, **checks.LARGE_CALLS}
    for name, cases in calls.items():
        yield f"{backend}/streams/{name}", functools.partial(checks.check_streams, backend, cases)
    if backend != "triton":  # last: should it hang, nothing else is left out
        for name, cases in calls.items():
            yield f"{backend}/together/{name}", functools.partial(checks.check_together, backend, cases)


def _kernels_of(key: str) -> str:
    """What keys have in common whose kernels are compiled alike: one process should meet them."""
    return "/".join(part for part in key.split("/") if not re.fullmatch(r"m\d+|p\d+|[br-]+", part))


def _load_libraries(device: str) -> None:
    """torch's first products: a bare machine reads cuBLAS, hundreds of megabytes, from a cold disk for them."""
    for dtype in (torch.float64, *checks.DTYPES.values()):
        one = torch.ones(64, 64, dtype=dtype, device=device)
        (one @ one).sum().item()


def check(suite: Suite) -> bool:
    """Every op on every backend that is usable here, against float64."""
    if not (suite.dry or suite.small):
        _load_libraries(suite.device)  # before any point has begun, or a slow disk would count as a call that hangs
    store = suite.store("check-small" if suite.small else "check")
    usable = suite.usable()
    order = ("cuda", "cuda dependent", "triton", "cpp", "library")
    names = [name for name in order if name.partition(" ")[0] in usable]
    names += ["tuned"] if "tuned" in suite.only and "triton" in usable else []
    if not (suite.dry or suite.small) and suite.shard == 0:
        store.add("cuda is usable", _with_cuda(suite))
    # of processes that share the points each says what it left itself
    left: dict[str, int] = {} if suite.shards > 1 else store.content.get("left_of", {})
    for backend in names:
        if suite.only and backend not in suite.only:
            continue
        if backend in suite.without:
            left[backend] = sum(not store.done(key) for key, _ in _check_work(suite, backend))
            continue
        left[backend] = 0
        groups: dict[str, int] = {}
        for key, work in _check_work(suite, backend):
            if not suite.mine(groups.setdefault(_kernels_of(key), len(groups))) or store.done(key):
                continue
            if suite.budget.spent:
                left[backend] += 1
                continue
            suite.run(store, key, work)
    store.save(complete=all_checked(left, names), left=sum(left.values()), left_of=left, backends=sorted(usable))
    return not any(failed(point) for point in store.points.values())


def _sanitized(tool: str, kind: str, seconds: float, without: list[str]) -> dict[str, Any]:
    """What one of compute-sanitizer's tools says of the CUDA kernels on small shapes, in so many seconds.

    It looks at our kernels alone: those of torch cost most of the time, and what it says of them is not ours to mend.
    For the same reason calls of CUDA that fail while torch asks what there is do not count.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [
            tool, "--tool", kind, "--error-exitcode", "9", "--print-limit", "5", "--show-backtrace", "device",
            "--kernel-name", "kns=taco", "--target-processes", "application-only", "--log-file", str(log),
            *(["--report-api-errors", "no"] if kind == "memcheck" else []),
            sys.executable, "-u", str(SUITE), "--inside", "--part", "check", "--small",
            "--only", "cuda", "--only", "cuda dependent", *(word for name in without for word in ("--without", name)),
            "--out", folder, "--budget-seconds", str(int(seconds) - 30),
        ]  # fmt: skip
        # Blocks of their own from cudaMalloc: an access beyond a tensor is then beyond an allocation.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", RUNNING: ""}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            **OWN_GROUP,
        )  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(BURIAL_SECONDS)
            return {"ok": True, "skipped": f"not done after {seconds:.0f} s"}
        said = log.read_text() if log.exists() else ""
        found = Path(folder) / "check-small.json"
        content = json.loads(found.read_text()) if found.exists() else {}
    facts = {"code": process.returncode, "points": len(content.get("points", {})), "left": content.get("left")}
    if process.returncode == 9:
        return {"ok": False, **facts, "log": said[:4000]}
    if not content or "Device not supported" in said + printed:
        return {"ok": True, "skipped": f"compute-sanitizer does not work here: {(said + printed)[-600:]}", **facts}
    return {"ok": process.returncode == 0, **facts, "log": (said + printed)[-1500:]}


def sanitize(suite: Suite) -> bool:
    """compute-sanitizer over small shapes: bad accesses, races in shared memory, barriers that are not reached."""
    store = suite.store("sanitize")
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if suite.dry or tool is None:
        reason = "dry run" if suite.dry else "compute-sanitizer was not found"
        store.save(complete=False, skipped=reason)
        print(f"sanitize: skipped ({reason})")
        return True
    kinds = [kind for kind in SANITIZERS if not store.done(kind) and suite.budget.left >= 40]
    seconds = min(suite.budget.left, 120)
    # All at once: nothing is timed, and the last of them would get what the first leaves.
    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        found = {kind: pool.submit(_sanitized, tool, kind, seconds, suite.without) for kind in kinds}
        for kind, result in found.items():
            point = suite.run(store, kind, result.result)
            print(f"sanitize: {kind}: {point.get('skipped') or ('nothing found' if point['ok'] else 'FINDINGS')}")
    store.save(complete=len(store.points) == len(SANITIZERS))
    return not any(failed(point) for point in store.points.values())


def _table_files(suite: Suite) -> tuple[Path, Path]:
    """The GPU's table under ``--out``, and in the package."""
    from taco_kernels.triton_kernels import config

    name = f"{config.gpu_slug(suite.gpu)}.json"
    return suite.out / name, config.TUNED_DIR / name


def _adopt_table(suite: Suite) -> None:
    """On a machine that starts bare what a former run found counts only once it is in the package."""
    target, installed = _table_files(suite)
    if target.exists() and not suite.dry:
        shutil.copyfile(target, installed)


def _install(
    suite: Suite, tuned: dict[str, Any] | None, measured: dict[str, Any] | None = None, forget: bool = True
) -> tuple[str, int]:
    """Writes the GPU's table under ``--out`` and into the package (see ``tuning.write_table``).

    Returns its name and the number of tuned entries. With ``forget`` this process looks up anew what it knows of it.
    """
    from taco_kernels import _cuda, dispatch
    from taco_kernels.triton_kernels import config

    target, installed = _table_files(suite)
    if not suite.dry and installed.exists() and not target.exists():
        shutil.copyfile(installed, target)
    entries = tuning.write_table(target, suite.gpu, tuned, measured)
    if not suite.dry:
        shutil.copyfile(target, installed)
    if forget and not suite.dry:
        config.forget_tables()
        dispatch.tuned_choice.cache_clear()
        _cuda.set_launch(None)
    return target.name, entries


def _tune_points(suite: Suite) -> list[shapes.Point]:
    points = shapes.tiny_points() if suite.dry else (shapes.quick_tune_points if suite.quick else shapes.tune_points)()
    # a pivoted map takes the entries of a plain one of as many bytes
    return [point for point in points if point.op not in shapes.BEHIND_PIVOT]


def _tuned_configs(suite: Suite) -> list[tuple[shapes.Point, Any]]:
    """The points that have been tuned, and their configurations."""
    from taco_kernels.triton_kernels.config import Config

    known = suite.store("tune").points
    found = [(point, known.get(point.key, {}).get("config")) for point in _tune_points(suite)]
    return [(point, Config(**config)) for point, config in found if config]


def tune(suite: Suite) -> bool:
    """Triton configurations, into the repository's table and a copy under ``--out``."""
    if "triton" not in suite.usable():
        print("tune: skipped (the Triton backend is not usable here)")
        return True
    store = suite.store("tune")
    left, (name, entries) = 0, _install_tuned(suite, store)
    for point in _tune_points(suite):
        if store.done(point.key):
            continue
        if suite.budget.spent:
            left += 1
            continue
        suite.run(store, point.key, functools.partial(_tuned, suite, store, point))
        name, entries = _install_tuned(suite, store)  # what ends this process takes none of it along
    store.save(complete=left == 0, left=left)
    tuned = [point for point in store.points.values() if point.get("config")]
    gains = [p["default_us"] / p["us"] for p in tuned if p.get("default_us") and p.get("us")]
    print(
        f"tune: {entries} entries in {name}; x{bench.geomean(gains)} over the defaults (geomean); "
        f"{len(store.points) - len(tuned)} without a working configuration"
    )
    return not any(failed(point) for point in store.points.values())


def _install_tuned(suite: Suite, store: Store) -> tuple[str, int]:
    tuned = {key: point for key, point in store.points.items() if point.get("config")}
    return _install(suite, tuned or None)


def _tuned(suite: Suite, store: Store, point: shapes.Point) -> dict[str, Any]:
    facts = {"op": point.op, "dtype": point.dtype, "table_shape": point.table_shape, "rows": point.rows}
    at = functools.partial(suite.within, store, point.key)
    result = tuning.tune_point(
        point, suite.device, suite.processors, suite.cache, suite.dry, at, store.blamed(point.key),
        lambda: suite.budget.spent,
    )  # fmt: skip
    return {**facts, "ok": result["config"] is not None, **result}


def _uninstall_wrong(suite: Suite) -> None:
    """Takes what ``check`` found wrong beside the point that it was tuned at out of the table."""
    points, checked = suite.store("tune").points, suite.store("check").points
    configs = _tuned_configs(suite)
    keys = {point.key: f"tuned/{point.key}/{tuning.name_of(config)}" for point, config in configs}
    good = {key: points[key] for key, check in keys.items() if not failed(checked.get(check, {}))}
    if len(good) < len(keys):
        _install(suite, good)


def _bench_points(suite: Suite) -> list[shapes.Point]:
    return list(shapes.tiny_points() if suite.dry else (shapes.quick_points if suite.quick else shapes.bench_points)())


def _compiles(suite: Suite, point: shapes.Point) -> bool:
    return not suite.dry and (not suite.quick or point.rank == 512)


def _wanted(suite: Suite, point: shapes.Point) -> bool:
    return suite.rows in (None, "decode" if point.rows <= 16 else "prefill")


def _choose_anew() -> None:
    """Keeps torch.compile from using choices of kernels that it has made beside other work: they are no baseline."""
    import torch._inductor.config

    torch._inductor.config.autotune_local_cache = False


def warm(suite: Suite) -> bool:
    """Compiles what ``tune`` or ``bench`` has yet to time, into the caches on the disk.

    Many processes do it at once, so that no GPU waits for it. ``--only`` names the part, ``--rows`` the points of it.

    Nothing is kept of the results, and whatever fails here fails again, and is noted, where it is measured.
    """
    if suite.dry:
        return True
    _choose_anew()
    usable = suite.usable()
    work: list[Callable[[], Any]] = []

    def inputs_of(point: shapes.Point) -> checks.Inputs:
        return checks.draw(point.op, point.in_size, point.out_size, point.rank, point.rows, point.dtype, suite.device)

    def call(version: Callable[[checks.Inputs], Any], point: shapes.Point) -> Any:
        if version is bench.compiled:
            bench.fresh_compiler()
        return version(inputs_of(point))

    def configurations(point: shapes.Point) -> None:
        inputs = inputs_of(point)
        for config in tuning.candidates(point, suite.processors):
            if suite.budget.spent:
                break
            with contextlib.suppress(Exception):
                tuning.run(config, inputs)

    if "tune" in suite.only and "triton" in usable:
        done = suite.store("tune").done
        work += [functools.partial(configurations, point) for point in _tune_points(suite) if not done(point.key)]
    if "bench" in suite.only:
        done = suite.store("bench").done
        for point in _bench_points(suite):
            if done(point.key) or not _wanted(suite, point):
                continue
            versions = bench.versions_for(point, suite.device, usable, _compiles(suite, point), suite.without)
            compiled = [versions[name] for name in ("taco triton", "compiled") if name in versions]
            work += [functools.partial(call, version, point) for version in compiled]
    for number, one in enumerate(work):
        if suite.mine(number) and not suite.budget.spent:
            with contextlib.suppress(Exception):
                one()
    return True


def _eager_overheads(usable: list[str], without: list[str]) -> dict[str, Any]:
    """Host time of an eager call, as the dispatcher makes it and by each backend; what one raises costs it alone."""
    small = checks.draw("low_rank_linear", 1024, 1024, 64, 1, "bfloat16", "cuda")
    bad = {*without, *(["auto"] if {"cuda", "cuda dependent"} <= set(without) else [])}
    found: dict[str, Any] = {}
    for name in ("auto", *usable):
        if name in bad:
            continue
        try:
            with contextlib.nullcontext() if name == "auto" else checks.using(name):
                found[name] = timing.eager_overhead(checks.call, small)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


def _timed(store: Store) -> dict[str, dict[str, Any]]:
    return {key: point for key, point in store.points.items() if "us" in point}


def run_bench(suite: Suite) -> bool:
    """Times and speed-ups; the ceilings are measured first, in the same process."""
    store = suite.store("bench")
    _adopt_table(suite)
    _uninstall_wrong(suite)
    _choose_anew()
    machine = {} if suite.dry or suite.budget.spent else timing.ceilings()
    usable = suite.usable()
    left_of = {"decode": 0, "prefill": 0}
    for point in _bench_points(suite):
        if store.done(point.key):
            continue
        if suite.budget.spent or not _wanted(suite, point):
            left_of["decode" if point.rows <= 16 else "prefill"] += 1
            continue

        def measured(point: shapes.Point = point) -> dict[str, Any]:
            result = bench.bench_point(
                point, suite.device, usable, machine, suite.cache, suite.dry, _compiles(suite, point), suite.without,
                functools.partial(suite.within, store, point.key),
            )  # fmt: skip
            return {**result, "red": {**result["red"], **store.blamed(point.key)}, "machine": machine}

        suite.run(store, point.key, measured)
        if timed := _timed(store):  # what ends this process takes none of it along; "taco" stays what it is in here
            _install(suite, None, timed, forget=False)
    timed = _timed(store)
    for key, version in bench.chosen(timed).items():
        timed[key]["chosen"] = version
    if timed:
        _install(suite, None, timed)
    if not suite.dry and not suite.budget.spent:
        store.save(eager_us=_eager_overheads(usable, suite.without))
    launches, report = bench.launches(timed), bench.summary(timed)
    if machine:
        store.save(machine=machine)
    ranks = bench.fastest_rank(timed)
    left = sum(left_of.values())
    store.save(complete=left == 0, left=left, left_of=left_of)
    store.save(summary=report, launches=launches, faster_than_dense_up_to_rank=ranks)
    if suite.dry:
        print("bench: dry run, so these numbers mean nothing")
    print(f"bench: ceilings {machine or 'not measured'}; backends {', '.join(usable)}")
    print(f"  cooperative over dependent launch: {launches}")
    heads = ("points", "red", "x pair", "least", "x comp", "x dense", "read")
    print(f"  {'':30} " + " ".join(f"{head:>7}" for head in heads))
    for name, row in report.items():
        shown = ["-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row.values()]
        print(f"  {name:30} " + " ".join(f"{cell:>7}" for cell in shown))
    if "eager_us" in store.content:
        print(f"  eager host time per call (us): {store.content['eager_us']}")
    return not any(failed(point) for point in store.points.values())


RUN: dict[str, Callable[[Suite], bool]] = {
    "build": build,
    "warm": warm,
    "check": check,
    "sanitize": sanitize,
    "tune": tune,
    "bench": run_bench,
    "svd": svd.run,
}
