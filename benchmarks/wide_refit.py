"""What the re-fit of one output projection costs: the largest dense step of taco and bridge mode on wide models.

    python benchmarks/wide_refit.py        # down projections of Llama-2-7B and of Llama-3-70B; minutes, 16 GB

Prints seconds per ridge strength (`consistency.RIDGES` are tried) and the peak resident memory so far.
"""

from __future__ import annotations

import resource
import time

import torch

from taco_svd.consistency import RIDGES, FitMoments, refit

SHAPES = ((11008, 4096), (28672, 8192))


def main() -> None:
    torch.manual_seed(0)
    for inputs, outputs in SHAPES:
        fit, held_out = FitMoments(), FitMoments()
        for moments, tokens in ((fit, 224), (held_out, 32)):
            moments.add(torch.randn(tokens, inputs), torch.randn(tokens, outputs))
        start = time.perf_counter()
        refit(fit, held_out, RIDGES[:1])
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{inputs} inputs: {seconds:.1f} s per ridge strength, at most {peak:.1f} GB resident", flush=True)


if __name__ == "__main__":
    main()
