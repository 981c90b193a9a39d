"""Times the attribution of one decoder block against autograd through its factorised layers, interleaved.

For each of the seven linear maps of a block of real shape: the input x, the gradient g at its output, all directions of
a full SVD. Ours is one `singular_attribution` per map. Two ways by autograd, with singular values as parameters:

- `factors`: y = ((x V^T) sigma) U^T, forward and backward: the cheapest that autograd can do;
- `rebuilt`: y = x ((U sigma) V)^T, as the paper's code does it: the weight is formed at every call.

Both get x without a gradient of its own, which a block in a model would need on top; and ours gives three more sums
(absolute, squares per sequence and per token) than the gradient that they give. Ours must equal the float64 gradient to
1e-4 (Frobenius norm over all maps), or no speed-up is printed. In 16 bits autograd runs in that dtype, as it would.

Usage: python benchmarks/attribution_speed.py [--out benchmarks/results/DEVICE/attribution.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from origin import origin

from taco_kernels import dispatch, singular_attribution

EQUAL = 1e-4
# (out, in) of q, k, v, o, gate, up, down
BLOCKS = {
    "classics-16l": [(128, 128), (64, 128), (64, 128), (128, 128), (352, 128), (352, 128), (128, 352)],
    "tinyllama-1.1b": [
        (2048, 2048), (256, 2048), (256, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632),
    ],
}  # fmt: skip

Map = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # x, grad, u, sigma, v


def maps_of(block: str, windows: int, length: int, dtype: torch.dtype) -> list[Map]:
    torch.manual_seed(0)
    found = []
    for out, width in BLOCKS[block]:
        left, sigma, right = torch.linalg.svd(torch.randn(out, width) / width**0.5, full_matrices=False)
        x, grad = torch.randn(windows, length, width), torch.randn(windows, length, out)
        # left vectors lie in rows, as taco_svd holds them
        found.append((x.to(dtype), grad.to(dtype), left.T.contiguous().to(dtype).T, sigma.to(dtype), right.to(dtype)))
    return found


def ours(maps: list[Map]) -> list[torch.Tensor]:
    return [singular_attribution(x, grad, u, v).signed for x, grad, u, _, v in maps]


def factors(maps: list[Map]) -> list[torch.Tensor]:
    return _by_autograd(maps, lambda x, u, sigma, v: ((x @ v.T) * sigma) @ u.T)


def rebuilt(maps: list[Map]) -> list[torch.Tensor]:
    return _by_autograd(maps, lambda x, u, sigma, v: x @ ((u * sigma) @ v).T)


def _by_autograd(maps: list[Map], layer: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    found = []
    for x, grad, u, sigma, v in maps:
        parameter = sigma.clone().requires_grad_()
        layer(x, u, parameter, v).backward(grad)
        assert parameter.grad is not None
        found.append(parameter.grad)
    return found


def error_of(maps: list[Map]) -> float:
    """Of ours against float64, over all maps."""
    wrong = total = 0.0
    for found, (x, grad, u, _, v) in zip(ours(maps), maps, strict=True):
        exact = ((grad.double() @ u.double()) * (x.double() @ v.double().T)).sum((0, 1))
        wrong += float((found.double() - exact).square().sum())
        total += float(exact.square().sum())
    return (wrong / total) ** 0.5


def measure(block: str, dtype: torch.dtype, windows: int, length: int, rounds: int) -> dict[str, Any]:
    maps = maps_of(block, windows, length, dtype)
    ways = {"ours": ours, "factors": factors, "rebuilt": rebuilt}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first round only warms up
        for name, way in ways.items():
            began = time.perf_counter()
            way(maps)
            if turn:
                times[name].append(time.perf_counter() - began)
    error = error_of(maps)
    row: dict[str, Any] = {
        "block": block,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": windows * length,
        "relative_error": error,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
    }
    for name in ("factors", "rebuilt"):
        ratios = sorted(other / mine for other, mine in zip(times[name], times["ours"], strict=True))
        row[f"speed_up_over_{name}"] = (
            {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]} if error <= EQUAL else None
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default=",".join(BLOCKS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    made_with = origin()
    rows = []
    for block in arguments.blocks.split(","):
        for name in arguments.dtypes.split(","):
            row = measure(block, getattr(torch, name), arguments.windows, arguments.length, arguments.rounds)
            rows.append(row)
            gains = [
                f"{way} {row['seconds'][way]:.3f} s"
                + (f" (x{gain['median']:.1f}, {gain['low']:.1f} to {gain['high']:.1f})" if gain else " (red)")
                for way in ("factors", "rebuilt")
                for gain in [row[f"speed_up_over_{way}"]]
            ]
            print(
                f"{block:15} {name:9} ours {row['seconds']['ours']:.3f} s, error {row['relative_error']:.0e}; "
                + ", ".join(gains),
                flush=True,
            )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "what": "attribution of one decoder block against autograd",
            "isa": dispatch.isa,
            "threads": torch.get_num_threads(),
            **made_with,
        }
        arguments.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
