"""The oldest and newest supported torch and transformers on Python 3.10 to 3.13: ``make test-matrix``.

For every Python one wheel is built, once, and used with each torch. Tests run on the installed package, from a copy of
the tests that cannot see the source tree. At the end the package is uninstalled, and nothing of it may be left.
Downloads gigabytes; environments stay under ``build/matrix`` and are used again.

    python tests/packaging/matrix.py                            # all rows
    python tests/packaging/matrix.py 3.10,2.6.0,5.16.0          # this row
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from packaging_tools import ROOT, clean_environment, copy_tree

WORK = ROOT / "build" / "matrix"
# (Python, torch, transformers). The lower ends are pyproject.toml's; the upper ends were the newest in November 2026.
ROWS = [
    ("3.10", "2.6.0", "5.16.0"),
    ("3.12", "2.11.0", "5.17.0"),  # what the GPU machine has
    ("3.11", "2.13.0", "5.16.0"),
    ("3.12", "2.6.0", "5.23.0"),
    ("3.12", "2.15.0", "5.16.0"),
    ("3.13", "2.15.0", "5.23.0"),
]
TESTS = (
    "kernels/test_low_rank_linear.py",
    "kernels/test_low_rank_bridge.py",
    "kernels/test_pivoted_low_rank_linear.py",
    "kernels/test_registration.py",
    "kernels/test_direct.py",
    "svd/test_checkpoint.py",
    "svd/test_plan.py",
    "svd/test_mixture_of_experts.py",
    "hostile/test_checkpoints.py",
)


def run(command: list[str], cwd: Path, **changes: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=clean_environment(**changes), capture_output=True, text=True, check=False
    )


def must(command: list[str], cwd: Path, **changes: str | None) -> str:
    done = run(command, cwd, **changes)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def interpreter(version: str) -> str | None:
    """A Python of this version: on PATH, or one of pyenv's."""
    found = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python"))
    candidates = [*map(str, found), shutil.which(f"python{version}") or ""]
    check = f"import sys; sys.exit(sys.version_info[:2] != ({version.replace('.', ', ')}))"
    return next((path for path in candidates if path and run([path, "-c", check], ROOT).returncode == 0), None)


def wheel(version: str, python: str) -> Path:
    """This Python's wheel, built once from a copy of the sources."""
    folder = WORK / f"wheel-{version}"
    found = sorted(folder.glob("*.whl"))
    if not found:
        tree = WORK / f"tree-{version}"
        shutil.rmtree(tree, ignore_errors=True)
        copy_tree(tree)
        must(
            [python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), "."], tree, TACO_CUDA="0", TACO_CPP="1"
        )
        found = sorted(folder.glob("*.whl"))
    return found[0]


def files(environment: Path) -> set[str]:
    return {
        str(path.relative_to(environment)) for path in environment.rglob("*")
        if "__pycache__" not in path.parts and path.is_file()
    }  # fmt: skip


def row(version: str, torch: str, transformers: str) -> dict[str, object]:
    result: dict[str, object] = {"python": version, "torch": torch, "transformers": transformers}
    python = interpreter(version)
    if python is None:
        return {**result, "skipped": f"no Python {version} here"}
    environment = WORK / f"py{version}-torch{torch}-transformers{transformers}"
    inside = str(environment / "bin" / "python")
    start = time.monotonic()
    if not Path(inside).exists():
        must([python, "-m", "venv", str(environment)], WORK)
    tools = ["pytest>=8", "pytest-xdist", "hypothesis", "typer", "rich", "numpy", "safetensors"]
    must([inside, "-m", "pip", "install", "-q", f"torch=={torch}", f"transformers=={transformers}", *tools], WORK)
    run([inside, "-m", "pip", "uninstall", "-q", "-y", "taco-kernels"], WORK)
    before = files(environment)
    made = wheel(version, python)
    # dependencies are looked at by pip: what the wheel declares must be what stands here
    must([inside, "-m", "pip", "install", "-q", "--no-index", str(made)], WORK)
    must([inside, "-m", "pip", "check"], WORK)
    copy = WORK / "tests"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "tests", copy, ignore=shutil.ignore_patterns("__pycache__"))
    where = must([inside, "-c", "import taco_svd, taco_kernels, json; print(taco_svd.__file__)"], copy)
    assert str(environment) in where, where
    backends = must([inside, "-c", "import taco_kernels; print(taco_kernels.backends('cpu')['cpp'])"], copy).strip()
    command = [inside, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "--tb=short", *TESTS]
    # the test gives opcheck tolerances, which the oldest torch's has not
    tolerant = "import inspect, torch; print('rtol' in inspect.signature(torch.library.opcheck).parameters)"
    if must([inside, "-c", tolerant], copy).strip() != "True":
        command += ["-k", "not opcheck"]
        result["left_out"] = "test_opcheck: torch.library.opcheck takes no tolerances here"
    tested = run(command, copy, OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error")
    (WORK / f"{environment.name}.log").write_text(tested.stdout + tested.stderr)
    must([inside, "-m", "pip", "uninstall", "-q", "-y", "taco-kernels"], WORK)
    left = sorted(files(environment) - before)
    gone = run([inside, "-c", "import taco_kernels"], WORK).returncode != 0
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", tested.stdout.splitlines()[-1])
    return {
        **result,
        "wheel": made.name,
        "cpp": backends,
        "tests": {name: int(number) for number, name in counts},
        "passed": tested.returncode == 0,
        "left_after_uninstall": left[:5],
        "uninstalled": gone and not left,
        "seconds": round(time.monotonic() - start),
    }


def main() -> int:
    WORK.mkdir(parents=True, exist_ok=True)
    rows = [tuple(word.split(",")) for word in sys.argv[1:]] or ROWS
    results = []
    for wanted in rows:
        results.append(row(*wanted))
        print(json.dumps(results[-1]), flush=True)
        (WORK / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all("skipped" in found or (found["passed"] and found["uninstalled"]) for found in results) else 1


if __name__ == "__main__":
    sys.exit(main())
