"""randomized_svd on the CPU: against torch.linalg.svd, torch.svd_lowrank and scikit-learn, by error and by time.

    python -m pytest benchmarks/test_randomized_svd_cpu.py        # writes benchmarks/results/cpu/randomized_svd.json

Matrices are float32 with the spectrum of a trained weight of the demo model, stretched to the size and between random
singular vectors, so that the optimal error is known. Competitors get the same rank, power iterations and number of test
vectors (their strongest setting: fewer make them faster and worse; that row is there too). Times are medians of
interleaved pairs, with the 20th and 80th percentile of the pairs' ratios. A result whose error is over 1.01 times the
optimal one, or above the competitor's (by 0.2%: both are random), is not timed. ``torch.linalg.svd`` takes minutes:
one call per shape, kept in the JSON together with what it ran on, and measured again when that changes. scikit-learn
is used where it is installed.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpu.timing import pairs_of, spread
from torch import Tensor

from taco_kernels import env, randomized_svd
from taco_kernels.svd import sketch

RESULTS = Path(__file__).resolve().parent / "results" / "cpu" / "randomized_svd.json"
WEIGHTS = Path(__file__).resolve().parents[1] / "python" / "taco_svd" / "data" / "classics-16l" / "model.safetensors"
ITERATIONS = 2
# (rows, columns, rank, rounds)
CASES = [(4096, 4096, 410, 7), (4096, 11008, 410, 5), (1024, 1024, 102, 30), (128, 384, 32, 200)]
# flat (the hardest for a sketch) and decaying
SPECTRA = ["model.layers.8.mlp.gate_proj.weight", "model.layers.5.self_attn.q_proj.weight"]


def conditions() -> dict[str, object]:
    report = env.report()
    return {"cpu": report["cpu"]["name"], "threads": torch.get_num_threads(), "torch": torch.__version__}


def load() -> dict[str, float]:
    """How busy the machine was: much above the number of threads means that others were computing too."""
    return {"load average": round(os.getloadavg()[0], 1)} if hasattr(os, "getloadavg") else {}


def keep(section: str, key: str, value: object) -> None:
    """Writes one result into the JSON, beside what is there."""
    content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    content.setdefault(section, {})[key] = value
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    partial.replace(RESULTS)


def weights() -> dict[str, Tensor]:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    return safetensors.load_file(WEIGHTS)


def stretched(name: str, size: int) -> Tensor:
    """The weight's singular values as a curve over [0, 1], read off at ``size`` places."""
    sigma = torch.linalg.svdvals(weights()[name].double()).log()
    return torch.nn.functional.interpolate(sigma[None, None], size, mode="linear", align_corners=True)[0, 0].exp()


_made: dict[tuple[int, int, str], Tensor] = {}


def matrix(rows: int, columns: int, name: str) -> tuple[Tensor, Tensor]:
    """The matrix and its singular values in float64."""
    sigma = stretched(name, min(rows, columns))
    key = (rows, columns, name)
    if key not in _made:
        _made.clear()
        left, right = (torch.linalg.qr(torch.randn(n, len(sigma))).Q for n in (rows, columns))
        _made[key] = (left * sigma.float()) @ right.T
    return _made[key], sigma


def error(a: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    """Frobenius norm of the difference, summed in float64."""
    squares = 0.0
    for rows, part in zip(a.split(512), (u * s).split(512), strict=True):
        squares += float(torch.linalg.vector_norm(rows - part @ vh, dtype=torch.float64)) ** 2
    return squares**0.5


def sklearn_svd(a: Tensor, rank: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    from sklearn.utils.extmath import randomized_svd as theirs

    # LU is its own choice for this number of iterations, and faster than QR
    found = theirs(a.numpy(), rank, n_oversamples=width - rank, n_iter=ITERATIONS, power_iteration_normalizer="LU",
                   random_state=0)  # fmt: skip
    u, s, vh = (torch.from_numpy(x) for x in found)
    return u, s, vh


def lowrank_svd(a: Tensor, rank: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(a, q=width, niter=ITERATIONS)
    return u[:, :rank], s[:rank], v[:, :rank].T


def width_of(rank: int) -> int:
    return rank + max(32, rank // 8)


OTHERS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]] = {
    "svd_lowrank": lambda a, rank: lowrank_svd(a, rank, width_of(rank)),
    "svd_lowrank, no oversampling": lambda a, rank: lowrank_svd(a, rank, rank),
    "scikit-learn": lambda a, rank: sklearn_svd(a, rank, width_of(rank)),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("rows, columns, rank, rounds", CASES)
def test_against_randomized(capsys, rows, columns, rank, rounds, other, name):
    if other == "scikit-learn":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    a, sigma = matrix(rows, columns, name)
    best = float(sigma[rank:].norm())
    with torch.inference_mode():
        ours = error(a, *randomized_svd(a, rank)) / best
        theirs = error(a, *OTHERS[other](a, rank)) / best
        row: dict[str, object] = {
            "error / optimal": round(ours, 5),
            "theirs": round(theirs, 5),
            **conditions(),
            **load(),
        }
        assert ours <= 1.01, f"error {ours:.4f} times the optimal one: not timed"
        assert ours <= theirs * 1.002, f"error {ours:.5f} against {theirs:.5f}: not timed"
        times = pairs_of(lambda _: randomized_svd(a, rank), lambda _: OTHERS[other](a, rank), rounds, 15.0, 1)
    ratios = spread([y / x for x, y in zip(*times, strict=True)])
    row |= {"ms": round(statistics.median(times[0]) / 1e3, 2), "their ms": round(statistics.median(times[1]) / 1e3, 2)}
    row |= {"faster": {key: round(value, 2) for key, value in ratios.items()}, "rounds": len(times[0])}
    keep(f"against {other}", f"{rows}x{columns} rank {rank} {name}", row)
    with capsys.disabled():
        print(f"\n{rows}x{columns} r{rank} {name[13:]}: {row}")


@pytest.mark.parametrize("rows, columns, rank, rounds", CASES)
def test_against_full_svd(capsys, rows, columns, rank, rounds):
    """One call of torch.linalg.svd, kept between runs; ours is timed now, several times."""
    name = SPECTRA[0]
    a, sigma = matrix(rows, columns, name)
    key = f"{rows}x{columns} rank {rank}"
    old = json.loads(RESULTS.read_text()).get("against torch.linalg.svd", {}).get(key) if RESULTS.is_file() else None
    same = old is not None and all(old.get(k) == v for k, v in conditions().items())
    ratio = error(a, *randomized_svd(a, rank)) / float(sigma[rank:].norm())
    assert ratio <= 1.01, f"error {ratio:.4f} times the optimal one: not timed"
    if same:
        full = old["their ms"]
    else:
        start = time.perf_counter()
        torch.linalg.svd(a, full_matrices=False)
        full = round((time.perf_counter() - start) * 1e3, 1)
        if full < 1000:  # small ones deserve more than one call
            full = round(
                statistics.median(pairs_of(lambda _: None, lambda _: torch.linalg.svd(a, full_matrices=False), 9)[1])
                / 1e3,
                3,
            )
    mine = []
    for _ in range(max(rounds, 5)):
        start = time.perf_counter()
        randomized_svd(a, rank)
        mine.append((time.perf_counter() - start) * 1e3)
    cuts = spread(mine)
    row = {"their ms": full, "ms": {k: round(v, 2) for k, v in cuts.items()}, "faster": round(full / cuts["p50"], 1)}
    row |= {"error / optimal": round(ratio, 5), **conditions(), **load()}
    keep("against torch.linalg.svd", key, row)
    with capsys.disabled():
        print(f"\n{key}: {row}")


def test_kinds_of_test_vectors(capsys, monkeypatch):
    """Why odd integers: the error of other test vectors on trained weights, and what making them costs."""

    def gaussian(vectors, entries, seed, dtype, device):
        generator = torch.Generator().manual_seed(seed % 2**63)
        return torch.randn(vectors[1] - vectors[0], entries[1] - entries[0], generator=generator).to(dtype)

    def signs(vectors, entries, seed, dtype, device):
        return gaussian(vectors, entries, seed, torch.float32, device).sign().to(dtype)

    tensors = [t for key, t in sorted(weights().items()) if t.dim() == 2 and ".layers." in key][::7]
    report: dict[str, object] = {}
    for kind, fill in {"odd integers": sketch.fill, "gaussian": gaussian, "signs": signs}.items():
        monkeypatch.setattr(sketch, "fill", fill)
        ratios = []
        for t in tensors:
            rank = min(t.shape) // 4
            best = float(torch.linalg.svdvals(t.double())[rank:].norm())
            for seed in range(3):
                found = randomized_svd(t, rank, generator=torch.Generator().manual_seed(seed))
                ratios.append(error(t.float(), *found) / best)
        start = time.perf_counter()
        for _ in range(5):
            fill((0, 461), (0, 4096), 1, torch.bfloat16, "cpu")
        cost = (time.perf_counter() - start) / 5 * 1e3
        report[kind] = {
            "mean": round(statistics.mean(ratios), 6),
            "largest": round(max(ratios), 6),
            "ms": round(cost, 2),
        }
    keep("test vectors (error / optimal; ms for 461 of length 4096)", "classics-16l", report)
    with capsys.disabled():
        print(f"\n{report}")
