"""Installs in fresh environments, in every supported way. Minutes and a package index: `make test-packaging`."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from packaging_tools import COMPILER_TOOLS, ROOT, SHELL_TOOLS, copy_tree, run, setup_py, tools

pytestmark = pytest.mark.slow

USE = """
import json, torch, taco_kernels, taco_svd
x, v, u = torch.randn(2, 50), torch.randn(8, 50), torch.randn(30, 8)
torch.testing.assert_close(taco_kernels.low_rank_linear(x, v, u), x @ v.T @ u.T, rtol=1e-4, atol=1e-4)
print(json.dumps({"where": taco_kernels.__file__, "cpp": taco_kernels.backends("cpu")["cpp"]}))
"""


class Environment:
    """A fresh virtual environment and a copy of the tree."""

    def __init__(self, folder):
        self.folder = folder
        self.tree = copy_tree(folder / "tree")
        self.python = str(folder / "venv" / "bin" / "python")
        done = run([sys.executable, "-m", "venv", str(folder / "venv")], folder)
        assert done.returncode == 0, done.stderr

    def pip(self, *arguments, **environment):
        constraints = str(ROOT / "constraints.txt")
        command = [self.python, "-m", "pip", "install", "-q", "-c", constraints, *arguments]
        return run(command, self.tree, **environment)

    def must_pip(self, *arguments, **environment):
        done = self.pip(*arguments, **environment)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    def use(self):
        done = run([self.python, "-c", USE], self.folder)
        assert done.returncode == 0, done.stderr
        report = run([self.python, "-m", "taco_kernels.env", "--json"], self.folder)
        return {**json.loads(done.stdout), "env": json.loads(report.stdout)}


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path)


def test_isolated_without_torch_there(environment, tmp_path):
    path = tools(tmp_path / "bin", (*SHELL_TOOLS, *COMPILER_TOOLS))
    environment.must_pip(".", PATH=path)
    result = environment.use()
    assert result["cpp"] == "usable"
    assert str(environment.folder / "venv") in result["where"]
    assert result["env"]["build"]["cuda_archs"] == []


def test_no_isolation_with_torch_there_and_from_an_sdist(environment):
    environment.must_pip("torch", "setuptools", "pybind11", "ninja")
    environment.must_pip("--no-build-isolation", ".", TACO_CUDA="0")
    assert environment.use()["cpp"] == "usable"
    assert setup_py(environment.tree, "-q", "sdist", "-d", str(environment.folder / "dist")).returncode == 0
    (archive,) = (environment.folder / "dist").iterdir()
    shutil.rmtree(environment.tree / "build")
    environment.must_pip("--no-build-isolation", "--no-deps", "--force-reinstall", str(archive), TACO_CUDA="0")
    assert environment.use()["cpp"] == "usable"


def test_editable(environment):
    environment.must_pip("-e", ".", TACO_CUDA="0")
    result = environment.use()
    assert result["cpp"] == "usable"
    assert result["where"].startswith(str(environment.tree))


def test_without_build_tools(environment):
    environment.must_pip("setuptools")
    done = environment.pip("--no-build-isolation", "--no-deps", ".", TACO_CUDA="0")
    assert done.returncode != 0
    assert "pybind11 is needed to build and is not installed" in done.stderr
    environment.must_pip("pybind11")
    done = environment.pip("--no-build-isolation", "--no-deps", ".", TACO_CUDA="0")
    assert done.returncode == 0 or "ninja is needed to build and is not installed" in done.stderr


def test_without_a_compiler(environment, tmp_path):
    path = tools(tmp_path / "bin", SHELL_TOOLS)
    environment.must_pip(".", PATH=path)
    assert environment.use()["cpp"].startswith("extension was not built")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH: the CUDA build cannot be tried")
@pytest.mark.skipif(not list((ROOT / "csrc" / "cuda").glob("*.cu")), reason="csrc/cuda holds no kernels")
def test_with_nvcc(environment):
    environment.must_pip(".", TACO_CUDA="1")
    result = environment.use()
    assert result["cpp"] == "usable"
    assert "sm_80" in result["env"]["build"]["cuda_archs"]
