"""Coverage-guided fuzzing of the targets with atheris: ``make fuzz``, or longer runs by hand.

    python tests/fuzz/run_atheris.py --target plan --seconds 3600

atheris is installed into an environment of its own (``build/fuzz``, which sees the packages of the one that runs
this). What reaches new code is collected under ``build/fuzz/corpus``; a finding is written as a file and ends the run.
``--keep 20`` copies the smallest new inputs of each target to ``tests/fuzz/corpus``, which the test suite tries.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "fuzz"
# small inputs are enough to reach every branch, and fast
MAX_LENGTH = 4096
NAMES = ("json", "structure", "plan", "config", "shard", "header", "checksums", "documents", "ops")


def environment() -> Path:
    """A Python with atheris and everything that this one has."""
    python = WORK / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(WORK / "venv")], check=True)
        packages = subprocess.run(
            [sys.executable, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        site = next((WORK / "venv" / "lib").glob("python3.*")) / "site-packages"
        (site / "parent.pth").write_text(packages + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "-q", "atheris>=2.3"], check=True)
    return python


def fuzz_here(name: str, arguments: list[str]) -> None:
    """Runs in the environment that has atheris."""
    import atheris

    # what judges untrusted bytes is watched; torch and transformers are not, for speed
    with atheris.instrument_imports(include=["taco_svd", "taco_kernels"]):
        sys.path.insert(0, str(ROOT / "tests"))
        import torch

        from fuzz.targets import TARGETS

    torch.set_num_threads(1)
    target = TARGETS[name]

    def once(data: bytes) -> None:
        target(data)

    atheris.Setup([sys.argv[0], *arguments], once)
    atheris.Fuzz()


def seeds(name: str, folder: Path) -> None:
    """The kept corpus, and what is valid, to start from."""
    sys.path.insert(0, str(ROOT / "tests"))
    from fuzz.test_targets import VALID, encoded

    folder.mkdir(parents=True, exist_ok=True)
    if name in VALID:
        (folder / "valid").write_bytes(encoded(VALID[name]))
    for file in (HERE / "corpus" / name).glob("*"):
        shutil.copy(file, folder / file.name)


def keep(name: str, count: int) -> None:
    folder = HERE / "corpus" / name
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted((WORK / "corpus" / name).glob("*"), key=lambda file: (file.stat().st_size, file.name))
    # some of every size: the smallest alone would all be refused at the first check
    for file in found[:: max(1, len(found) // count)][:count]:
        shutil.copy(file, folder / file.name[:16])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=NAMES, action="append")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--keep", type=int, default=0, metavar="N", help="copy N inputs of each target to the corpus")
    options = parser.parse_args()
    python = environment()
    failed = []
    for name in options.target or NAMES:
        folder = WORK / "corpus" / name
        seeds(name, folder)
        start = time.monotonic()
        paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), str(ROOT / "tests")])
        command = [str(python), __file__, "--run", name, f"-max_total_time={options.seconds}", "-timeout=60"]
        command += ["-rss_limit_mb=8192", f"-max_len={MAX_LENGTH}", "-print_final_stats=1", "-verbosity=0"]
        command += [f"-artifact_prefix={WORK}/{name}-", str(folder)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        runs = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        told = (
            f"{runs[0] if runs else '?'} cases, {time.monotonic() - start:.0f} s, corpus {len(list(folder.iterdir()))}"
        )
        print(f"{name}: {told}, exit code {done.returncode}", flush=True)
        if done.returncode:
            print((done.stdout + done.stderr)[-3000:])
            failed.append(name)
        if options.keep:
            keep(name, options.keep)
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        fuzz_here(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
