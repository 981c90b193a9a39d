"""What all tests share: seeds, the slow switch, and the evaluation texts beside the repository.

Drawn inputs start from `TACO_TEST_SEED` (0 if it is not set: a red run is red again). Those of hypothesis are fresh in
every run, and told when one fails; `TACO_FIXED_CASES=1` draws the same ones always, for a gate that should fail by what
has changed only.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

SEED = int(os.environ.get("TACO_TEST_SEED", "0"))
# no deadline: one load may wait for a busy disk
settings.register_profile(
    "taco",
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    derandomize=os.environ.get("TACO_FIXED_CASES") == "1",
)
settings.load_profile("taco")
ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (minutes each)")


def pytest_report_header() -> str:
    return f"TACO_TEST_SEED={SEED}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow, or make test-packaging")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 (libraries under test may draw from the global generator)
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the evaluation texts, ``../shared/data``; skips, with the path, where they are absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the evaluation texts in {folder}, which are not part of the project")
    return folder


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: (exit code, stdout, stderr). An exception is a failure of the test.

    What it says of its progress is left out of stderr (see svd/test_progress.py): everything else there is for people.
    """

    def run(*arguments: object) -> tuple[int, str, str]:
        from taco_svd import cli
        from taco_svd.cli_shared import PROGRESS_PREFIX

        monkeypatch.setattr(sys, "argv", ["taco-svd", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        stdout, stderr = capsys.readouterr()
        said = [line for line in stderr.splitlines(keepends=True) if not line.startswith(PROGRESS_PREFIX)]
        return code, stdout, "".join(said)

    return run
