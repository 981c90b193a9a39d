"""One command for a bare GPU machine: build, check, sanitize, tune, benchmark; small JSON files under ``--out``.

    python benchmarks/gpu_suite.py --out DIR [--quick] [--part build|check|sanitize|tune|bench|svd] [--budget-seconds N]
                                   [--resume] [--dry-run]

Without ``--part`` all parts run, the most telling first (`gpu/conductor.py`), every one in processes of its own. Parts
stop between points when their share of the budget is spent and say what is left; ``--resume`` goes on from the files in
DIR and tries again what failed. ``--dry-run`` runs the same code on a CPU with tiny shapes.
Exit code 0: nothing found wrong; 1: something is; 2: this cannot run here (the last line says why).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import traceback
from pathlib import Path

BEGAN = time.monotonic()  # importing torch takes a part of the budget too

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python", ROOT / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402  (the search path comes first)
from gpu import conductor  # noqa: E402
from gpu.store import identity  # noqa: E402

# Exit code of a part that an error ended.
BROKEN = 4
PARTS = ("build", "check", "sanitize", "tune", "bench", "svd")


def inside(options: argparse.Namespace) -> int:
    """One part, in this process: the package is imported here, after it was built."""
    from gpu import parts, suite

    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    try:
        return 0 if parts.RUN[options.part[0]](suite.Suite(options)) else 1
    except Exception:  # of a part itself, not of a point: the conductor must not take it for a finished one
        traceback.print_exc()
        return BROKEN


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the result files (made if missing)")
    parser.add_argument(
        "--part", choices=(*PARTS, "warm"), action="append", help="only this part (may be given several times)"
    )
    parser.add_argument("--budget-seconds", type=float, default=540, help="stop between points after this long")
    parser.add_argument("--resume", action="store_true", help="keep the points that OUT has already")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes; the numbers mean nothing")
    parser.add_argument("--quick", action="store_true", help="tune and bench one hidden size, the telling points only")
    # what the processes of a run are told
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)  # check small shapes (for sanitize)
    parser.add_argument("--only", action="append", help=argparse.SUPPRESS)  # check these; compile ahead for these parts
    parser.add_argument("--without", action="append", help=argparse.SUPPRESS)  # these versions hang or crash
    parser.add_argument("--rows", choices=("decode", "prefill"), help=argparse.SUPPRESS)  # bench these, or compile them
    parser.add_argument("--shard", help=argparse.SUPPRESS)  # i/n: the i-th of n processes that share the points
    options = parser.parse_args(arguments)
    if "warm" in (options.part or ()) and not options.inside:
        parser.error("--part warm belongs to the parts that time what it compiles; name those")
    if not options.dry_run and not torch.cuda.is_available():
        print("No GPU is visible to torch: nothing was run (--dry-run tries the suite's code on the CPU).")
        return 2
    if options.inside:
        return inside(options)
    chosen = options.part or list(PARTS)
    conductor.prepare(options.out, chosen, options.resume)
    gpu = "none (dry run)" if options.dry_run else torch.cuda.get_device_name()
    facts = {**identity(gpu, options.dry_run), "python": platform.python_version()}
    handed = ["--dry-run"] * options.dry_run + ["--quick"] * options.quick
    workers = 2 if options.dry_run else max(1, min(10, (os.cpu_count() or 2) * 2 // 3))
    run = conductor.Conductor(options.out, chosen, handed, options.budget_seconds, facts, workers, BEGAN)
    return 0 if run.run() else 1


if __name__ == "__main__":
    sys.exit(main())
