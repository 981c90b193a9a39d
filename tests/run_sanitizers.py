"""Builds the CPU extension with a sanitizer and runs the op tests on it: ``make test-sanitizers``.

Each build lies in ``build/sanitize/NAME`` beside a copy of ``taco_kernels``; the one in the tree stays as it is. A
finding ends the process that it is in, so that a run without one is a run of tests that pass.

    python tests/run_sanitizers.py [address,undefined] [thread] [--keep-going] [-- PYTEST_ARGUMENTS]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILDS = ("address,undefined", "thread")

TESTS = (
    "tests/kernels/test_native.py",
    "tests/kernels/test_low_rank_linear.py",
    "tests/kernels/test_low_rank_linear_group.py",
    "tests/kernels/test_low_rank_bridge.py",
    "tests/kernels/test_low_rank_mlp.py",
    "tests/kernels/test_pivoted_low_rank_linear.py",
    "tests/kernels/test_low_rank_linear_int8.py",
    "tests/kernels/test_few_rows.py",
    "tests/kernels/test_many_rows.py",
    "tests/kernels/test_direct.py",
    "tests/kernels/test_native_ops.py",
    "tests/kernels/test_singular_attribution.py",
    "tests/kernels/test_randomized_svd_steps.py",
    "tests/kernels/test_concurrency.py",
    "tests/fuzz/test_targets.py",
)
# Tests that look at the OpenMP runtime of an ordinary build, or at how much address space there is: a sanitizer's
# shadow memory takes terabytes of it.
LEFT_OUT = "openmp or out_of_memory or extension_leaves or after_a_fork"
FUZZ_ONLY = "not test_targets or op_arguments"


def library(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"the compiler has no lib{name}.so; install its sanitizer runtimes (libasan, libtsan)")
    return str(Path(path).resolve())


def build(kind: str) -> Path:
    folder = ROOT / "build" / "sanitize" / kind.replace(",", "-")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "taco_kernels", ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "taco_kernels", folder / "taco_kernels", ignore=ignored)
    environment = {**os.environ, "TACO_SANITIZE": kind, "TACO_CUDA": "0", "TACO_CPP": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp"]
    subprocess.run([*command, str(folder / "objects")], cwd=ROOT, env=environment, check=True)
    return folder


def run(kind: str, arguments: list[str]) -> int:
    folder = build(kind)
    suppressions = ROOT / "tests" / "sanitizers.txt"
    log = f"log_path={folder}/report"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "python"), str(ROOT)]),
        "PYTHONMALLOC": "malloc",  # Python's own allocator hides what is freed
        "OMP_NUM_THREADS": "2",
        # leaks: the interpreter keeps what it has until the end, so that everything would be one
        "ASAN_OPTIONS": f"{log}:detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": f"{log}:print_stacktrace=1:halt_on_error=1",
        # torch and the interpreter are not instrumented: only what our own code does is judged
        "TSAN_OPTIONS": f"{log}:ignore_noninstrumented_modules=1:halt_on_error=1:allocator_may_return_null=1"
        f":suppressions={suppressions}",
        # libstdc++ with it: the runtime looks for the real __cxa_throw when it starts
        "LD_PRELOAD": ":".join([library("tsan" if "thread" in kind else "asan"), library("stdc++")]),
    }
    tests = [str(ROOT / test) for test in TESTS]
    chosen = f"not ({LEFT_OUT}) and ({FUZZ_ONLY})"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-k", chosen]
    # the sanitizers lay memory out in a fixed way, which address randomisation may get in the way of
    fixed = [setarch, "-R"] if (setarch := shutil.which("setarch")) else []
    for old in folder.glob("report.*"):
        old.unlink()
    start = time.monotonic()
    # from the build's folder, or the tree's own package would be found first
    done = subprocess.run([*fixed, *command, *arguments, *tests], cwd=folder, env=environment, check=False)
    for report in sorted(folder.glob("report.*")):  # into files, since pytest holds back what tests print
        print(report.read_text(errors="replace")[:6000])
    print(f"=== {kind}: exit code {done.returncode} after {time.monotonic() - start:.0f} s", flush=True)
    return done.returncode


def main() -> int:
    given = sys.argv[1:]
    arguments = given[given.index("--") + 1 :] if "--" in given else []
    kinds = given[: given.index("--") if "--" in given else None] or list(BUILDS)
    return max([run(kind, arguments) for kind in kinds], key=abs)


if __name__ == "__main__":
    sys.exit(main())
