"""What the build refuses and in which words, what an sdist holds, and the rules csrc/ keeps. Seconds, no network."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
import tarfile

import pytest
from packaging_tools import COMPILER_TOOLS, ROOT, SHELL_TOOLS, copy_tree, setup_py, tools


@pytest.fixture
def tree(tmp_path):
    return copy_tree(tmp_path / "tree")


def one_sentence(done):
    """The message of a refusal: one line, no traceback."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return lines[0]


def load_setup(path):
    """setup.py as a module, for what it decides without building."""
    spec = importlib.util.spec_from_file_location("setup_of_taco", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_cuda_demanded_without_nvcc(tree, tmp_path):
    setup = tree / "setup.py"
    # this machine may have one there
    setup.write_text(setup.read_text().replace("/usr/local/cuda/bin/nvcc", "/nowhere/nvcc"))
    path = tools(tmp_path / "bin", (*SHELL_TOOLS, *COMPILER_TOOLS))
    message = one_sentence(setup_py(tree, "build_ext", TACO_CUDA="1", PATH=path))
    assert message == (
        "taco-kernels: TACO_CUDA=1 asks for the CUDA kernels, "
        "but nvcc was not found on PATH, under CUDA_HOME, as CUDACXX, or as /nowhere/nvcc."
    )


def test_where_nvcc_is_looked_for(tmp_path, monkeypatch):
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    setup = load_setup(ROOT / "setup.py")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(setup, "INSTALLED_NVCC", str(tmp_path / "local" / "nvcc"))
    assert setup.find_nvcc() is None
    # from the last resort to the first
    installed = program(tmp_path / "local" / "nvcc")
    assert setup.find_nvcc() == installed
    on_path = program(tmp_path / "bin" / "nvcc")
    assert setup.find_nvcc() == on_path
    of_home = program(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup.find_nvcc() == of_home
    named = program(tmp_path / "named")
    monkeypatch.setenv("CUDACXX", named)
    assert setup.find_nvcc() == named


@pytest.mark.parametrize(
    ("cxx", "compiler"),
    [
        ("g++", "g++"),
        ("clang++ -m64", "clang++"),
        ("ccache g++", "g++"),
        ("/usr/bin/ccache distcc /opt/gcc/bin/g++ -m64", "/opt/gcc/bin/g++"),
        ("/usr/lib/ccache/g++", "/usr/lib/ccache/g++"),
        ("ccache", "ccache"),
    ],
)
def test_nvcc_is_given_the_compiler_and_not_what_launches_it(cxx, compiler):
    assert load_setup(ROOT / "setup.py").host_compiler(cxx.split()) == compiler


def test_cuda_demanded_without_the_extension(tree, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    done = setup_py(tree, "build_ext", TACO_CUDA="1", TACO_CPP="0", CUDACXX=str(nvcc))
    assert "the C++ extension that holds them is not built" in one_sentence(done)


@pytest.mark.parametrize("name", ["TACO_CUDA", "TACO_CPP"])
def test_unknown_switch(tree, name):
    assert f"{name} must be auto, 0 or 1, but it is 'yes'." in one_sentence(
        setup_py(tree, "--version", **{name: "yes"})
    )


def test_extension_demanded_without_a_compiler(tree, tmp_path):
    path = tools(tmp_path / "bin", SHELL_TOOLS)
    assert "no C++ compiler" in one_sentence(setup_py(tree, "build_ext", TACO_CPP="1", PATH=path))
    named = one_sentence(setup_py(tree, "build_ext", TACO_CPP="1", CXX="no-such-compiler"))
    assert "CXX=no-such-compiler was not found" in named


def test_no_compiler_warns_and_goes_on(tree, tmp_path):
    path = tools(tmp_path / "bin", SHELL_TOOLS)
    done = setup_py(tree, "build_ext", PATH=path)
    assert done.returncode == 0, done.stderr
    assert "installing WITHOUT the compiled kernels" in done.stderr


def test_sdist_holds_all_that_a_build_needs(tree, tmp_path):
    done = setup_py(tree, "-q", "sdist", "-d", str(tmp_path / "dist"), TACO_CUDA="0")
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    for folder in ("csrc", "taco_kernels", "python/taco_svd"):
        for path in (tree / folder).rglob("*"):
            relative = path.relative_to(tree).as_posix()
            hidden = path.name.startswith(".") or ".egg-info" in relative
            if path.is_file() and not hidden and not relative.endswith((".pyc", ".log")):
                assert relative in names
    assert {"LICENSE", "setup.py", "pyproject.toml", "constraints.txt"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_version_and_metadata(tree):
    import taco_kernels

    done = setup_py(tree, "--version", "--name", TACO_CUDA="0", TACO_CPP="0")
    assert done.stdout.split() == [taco_kernels.__version__, "taco-kernels"] or done.stdout.split() == [
        "taco-kernels",
        taco_kernels.__version__,
    ]


def test_native_code_keeps_its_rules():
    """No torch header anywhere; pybind11 in one file; no standard containers in files with wide instructions."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".inl", ".cu", ".cuh")]
    assert len(sources) > 5
    for path in sources:
        includes = re.findall(r'#include\s+[<"]([^>"]+)', path.read_text())
        assert not [name for name in includes if name.startswith(("torch/", "ATen/", "c10/"))], path
        if path.name != "bindings.cpp":
            assert not [name for name in includes if name.startswith("pybind11")], path
        if path.name.startswith("avx"):
            # an inline function of theirs, compiled with wide instructions, could replace the baseline's copy
            assert {name for name in includes if not name.endswith(".inl")} <= {"immintrin.h", "cstdint", "isa.h"}, path
        if path.suffix == ".inl":  # included by them
            assert {name for name in includes if not name.endswith(".inl")} <= {"cstdint"}, path


def test_ci_script_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_what_git_ignores_is_not_sent_to_a_container_build():
    """Environments and builds of gigabytes, and extensions of another machine, would go along with `COPY . /src`."""
    lines = {line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")}
    ignored = [line for line in (ROOT / ".gitignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ".git" in lines and {f"**/{line.strip('/')}" for line in ignored} <= lines


def test_a_container_build_is_sent_all_that_it_reads(tree):
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    files = [path.relative_to(tree) for path in tree.rglob("*") if path.is_file()]
    parts = {part for file in files for part in file.parts}
    lost = [part for part in parts for pattern in patterns if fnmatch.fnmatch(part, pattern.removeprefix("**/"))]
    assert len(files) > 100 and not lost
