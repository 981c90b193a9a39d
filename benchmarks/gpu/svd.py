"""The ``svd`` part: randomized_svd on the GPU, checked against float64, then against cuSOLVER and torch.svd_lowrank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from taco_kernels import backends, randomized_svd
from taco_kernels.svd.sketch import fill_reference

if TYPE_CHECKING:
    from .suite import Suite

ITERATIONS = 2
# (rows, columns, rank): attention and MLP weights of 7B models at keep 0.8, and a small one
SHAPES = [(4096, 4096, 410), (4096, 11008, 410), (4096, 11008, 1024), (1024, 1024, 102)]
QUICK = [(4096, 4096, 410), (4096, 11008, 410)]
TINY = [(96, 130, 12)]
SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "power law": lambda size: (torch.arange(size) + 1.0) ** -0.5,
    "exponential": lambda size: torch.exp(-torch.arange(size) * (30.0 / size)),
    "rank 5": lambda size: (torch.arange(size) < 5).float(),
    "zero": lambda size: torch.zeros(size),
}


def matrix(rows: int, columns: int, sigma: Tensor, device: str) -> Tensor:
    """float32 with these singular values, and random singular vectors."""
    left, right = (torch.linalg.qr(torch.randn(n, len(sigma), device=device)).Q for n in (rows, columns))
    return (left * sigma.to(left)) @ right.T


def error(a: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    return float(torch.linalg.matrix_norm(a.double() - (u.double() * s.double()) @ vh.double()))


def singular_values(a: Tensor) -> Tensor:
    """Of a, descending, in float64, off by some 1e-8 of the largest at most: through the Gram matrix, since cuSOLVER's
    SVD of 4096 columns takes many times as long."""
    wide = a.double()
    gram = wide @ wide.T if a.shape[0] <= a.shape[1] else wide.T @ wide
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def check_sketch(device: str) -> dict[str, Any]:
    """The Triton kernel's numbers against the reference, bit for bit: times the identity it must give the sketch."""
    if backends(device)["triton"] != "usable":
        return {"ok": True, "skipped": backends(device)["triton"]}
    from taco_kernels.triton_kernels.sketch import sketch_product

    wrong = []
    sizes = [(33, (0, 3)), (700, (5, 40))] if device == "cpu" else [(33, (0, 3)), (700, (5, 40)), (4096, (0, 461))]
    for size, vectors in sizes:
        for seed in (0, 0xFEDCBA9876543210):
            expected = fill_reference(vectors, (0, size), seed, torch.float32, device)
            for dtype in (torch.bfloat16, torch.float32):
                found = sketch_product(torch.eye(size, device=device), None, vectors, seed, dtype)
                if not torch.equal(found, expected):
                    wrong.append(f"{size} {vectors} {seed} {dtype}")
    return {"ok": not wrong, "wrong": wrong}


def check_case(rows: int, columns: int, rank: int, name: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Error against the optimal one, orthonormality and singular values, of one result."""
    sigma = SPECTRA[name](min(rows, columns))
    a = matrix(rows, columns, sigma, device).to(dtype)
    exact = singular_values(a)
    found = randomized_svd(a, rank, power_iters=ITERATIONS)
    best, largest = float(exact[rank:].norm()), float(exact[0])
    eye = torch.eye(rank, device=device, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    rounding = 8 * (rows + columns) ** 0.5 * eps * largest
    u, s, vh = (t.double() for t in found)
    orthonormal = max(float((u.T @ u - eye).abs().max()), float((vh @ vh.T - eye).abs().max()))
    off = error(a, *found)
    again = randomized_svd(a, rank, power_iters=ITERATIONS, generator=torch.Generator().manual_seed(1))
    same = randomized_svd(a, rank, power_iters=ITERATIONS, generator=torch.Generator().manual_seed(1))
    ok = (
        off <= 1.02 * best + rank**0.5 * rounding
        and orthonormal <= 8 * (rank + 64) ** 0.5 * eps
        and bool((s <= exact[:rank] + rounding).all())
        and all(torch.equal(x, y) for x, y in zip(again, same, strict=True))
    )
    return {"ok": ok, "error": off, "optimal": best, "orthonormal": orthonormal}


def _milliseconds(work: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def bench_case(rows: int, columns: int, rank: int, dtype: torch.dtype, device: str, full: bool) -> dict[str, Any]:
    """Milliseconds, versions by turns; no speed-up where our error is above 1.01 times the optimal or the other's.

    (The other's within 0.2%: both are random.)
    """
    sigma = SPECTRA["power law"](min(rows, columns))
    a = matrix(rows, columns, sigma, device).to(dtype)
    wide = a.float()  # the others do not take half precision
    width = min(rank + max(32, rank // 8), rows, columns)
    best = float((sigma if dtype == torch.float32 else singular_values(a))[rank:].norm())

    def lowrank() -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = torch.svd_lowrank(wide, q=width, niter=ITERATIONS)
        return u[:, :rank], s[:rank], v[:, :rank].T

    versions: dict[str, Callable[[], Any]] = {
        "taco": lambda: randomized_svd(a, rank, power_iters=ITERATIONS),
        "taco, full precision": lambda: randomized_svd(a, rank, power_iters=ITERATIONS, power_dtype=torch.float32),
        "svd_lowrank": lowrank,
    }
    ratios = {name: error(a, *version()) / best for name, version in versions.items()}
    samples: dict[str, list[float]] = {name: [] for name in versions}
    for _ in range(2 if device == "cpu" else 11):
        for name, version in versions.items():
            samples[name].append(_milliseconds(version, device))
    times = {name: statistics.median(values[1:]) for name, values in samples.items()}
    if full:
        times["linalg.svd"] = _milliseconds(lambda: torch.linalg.svd(wide, full_matrices=False), device)
    red = {}
    if not ratios["taco"] <= 1.01:
        red["taco"] = f"error {ratios['taco']:.4f} times the optimal one"
    elif not ratios["taco"] <= 1.002 * ratios["svd_lowrank"]:
        red["taco"] = f"error {ratios['taco']:.5f}, svd_lowrank's {ratios['svd_lowrank']:.5f} times the optimal one"
    faster = {} if red else {name: round(times[name] / times["taco"], 2) for name in times if name != "taco"}
    return {
        "ms": {name: round(value, 3) for name, value in times.items()},
        "error": {name: round(value, 5) for name, value in ratios.items()},
        "speedup": faster, "red": red, "ok": not red,
    }  # fmt: skip


def run(suite: Suite) -> bool:
    """Checks first; then times, the full SVD only while more than half of the budget is left."""
    store = suite.store("svd")
    half = suite.budget.left / 2
    left = 0
    work: dict[str, Callable[[], dict[str, Any]]] = {"sketch": lambda: check_sketch(suite.device)}
    checked = [(60, 90, 9)] if suite.dry else [(300, 500, 40), (1024, 700, 128), (2048, 2048, 205)]
    for rows, columns, rank in checked[:2] if suite.quick else checked:
        for name in SPECTRA:
            for dtype in (torch.float32, torch.bfloat16):
                key = f"check/{rows}x{columns}/r{rank}/{name}/{str(dtype)[6:]}"
                work[key] = lambda r=rows, c=columns, k=rank, n=name, d=dtype: check_case(r, c, k, n, d, suite.device)
    for rows, columns, rank in TINY if suite.dry else QUICK if suite.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            key = f"bench/{rows}x{columns}/r{rank}/{str(dtype)[6:]}"
            work[key] = lambda r=rows, c=columns, k=rank, d=dtype: bench_case(
                r, c, k, d, suite.device, d == torch.float32 and suite.budget.left > half
            )
    for key, step in work.items():
        if store.done(key):
            continue
        if suite.budget.spent:
            left += 1
            continue
        suite.run(store, key, step)
    store.save(complete=left == 0, left=left)
    if suite.dry:
        print("svd: dry run, so these times mean nothing")
    for key, point in store.points.items():
        if key.startswith("bench/") and point["ok"]:
            print(f"  {key[6:]:32} {point['ms']['taco']:>9.3f} ms   faster than {point['speedup']}")
    return all(point["ok"] for point in store.points.values())
