"""What the re-fit of one output projection costs: the largest dense step of taco and bridge mode on wide models.

    python benchmarks/wide_refit.py        # down projections of Llama-2-7B and of Llama-3-70B; minutes, 12 GB

Prints the seconds of a whole re-fit (all of `consistency.RIDGES`), and the peak resident memory so far.
"""

from __future__ import annotations

import resource
import time

import torch

from taco_svd.consistency import FitMoments, refit

SHAPES = ((11008, 4096), (28672, 8192))


def main() -> None:
    torch.manual_seed(0)
    for inputs, outputs in SHAPES:
        fit, held_out = FitMoments(), FitMoments()
        # inputs of few dimensions, so that a fit to few tokens holds for others: a refused one would end sooner
        spanned, wanted = torch.randn(32, inputs), torch.randn(32, outputs)
        for moments, tokens in ((fit, 224), (held_out, 32)):
            at = torch.randn(tokens, 32)
            moments.add(at @ spanned + 0.1 * torch.randn(tokens, inputs), at @ wanted)
        start = time.perf_counter()
        assert refit(fit, held_out).change is not None
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{inputs} inputs: {seconds:.1f} s, at most {peak:.1f} GB resident", flush=True)


if __name__ == "__main__":
    main()
