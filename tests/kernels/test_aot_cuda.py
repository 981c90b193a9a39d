"""CUDA kernels compiled by nvcc without a GPU: no spills, and the instructions that were meant."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found on PATH: CUDA sources cannot be compiled")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(object file, ptxas' report) of the decode kernels, compiled once."""
    return compiled("low_rank_decode", tmp_path_factory.mktemp("nvcc"))


def compiled(name, folder):
    target, source = folder / f"{name}.o", ROOT / "csrc" / "cuda" / f"{name}.cu"
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    command = [
        str(NVCC),
        "-O3",
        "-std=c++17",
        "-fmad=false",
        "-Xptxas=-v",
        f"-I{ROOT / 'csrc'}",
        *codes,
        "-c",
        str(source),
        "-o",
    ]
    done = subprocess.run([*command, str(target)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return target, done.stdout + done.stderr


@pytest.fixture(scope="module")
def listings(built):
    """Disassembly of each kernel: {(architecture, mangled name): SASS}."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip(
            "triton.backends.nvidia", reason="no cuobjdump: not on PATH, and triton is missing"
        )
        tool = str(Path(triton.__path__[0]) / "bin" / "cuobjdump")
    text = subprocess.run([tool, "-sass", str(built[0])], capture_output=True, text=True, check=True).stdout
    found = {}
    arch = ""
    for part in re.split(r"\n(?=\s*(?:arch = |Function : ))", text):
        if match := re.match(r"\s*arch = (\w+)", part):
            arch = match.group(1)
        if match := re.match(r"\s*Function : (\w+)", part):
            found[arch, match.group(1)] = part
    return found


def test_nothing_spills(built):
    report = built[1]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) == 2 * 48, "16 kernels in three parts, for each of two architectures"
    assert all(frame == ("0", "0", "0") for frame in frames), report[-4000:]
    # 256 threads, one block per multiprocessor: the register file has 255 for each of them.
    assert max(map(int, re.findall(r"Used (\d+) registers", report))) <= 255


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_instructions(listings, arch):
    kernels = {name: sass for (of, name), sass in listings.items() if of == arch}
    fast = {name: sass for name, sass in kernels.items() if "decode_mma" in name}
    assert len(fast) == 12 and len(kernels) == 48
    for name, sass in fast.items():
        # Part::kBoth is 0 in the mangled name, kFirst 1, kSecond 2.
        part = int(re.search(r"PartE(\d)", name).group(1))
        assert "HMMA.16816.F32" in sass, f"{name} does not use the matrix unit"
        # v's and u's rows in 16-byte loads, several of them before the first is needed.
        wide = len(re.findall(r"LDG\.E\S*\.128", sass))
        assert wide >= 8, f"{name} has only {wide} 16-byte loads"
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name} uses local memory"
        copies = "UBLKCP" if arch == "sm_90a" else r"LDGSTS\S*\.128"
        has_copies = re.search(copies, sass) is not None
        assert has_copies == (part != 1), f"{name}: u is to be copied into shared memory beside the computation"
        if arch == "sm_90a":
            # griddepcontrol: launch_dependents in the first kernel, wait in the second, neither in the cooperative one
            depends = ("PREEXIT" in sass, "ACQBULK" in sass)
            assert depends == (part == 1, part == 2), f"{name}: {depends}"
    assert any(
        re.search(r"LDG\.E\S*\.128", sass) for name, sass in kernels.items() if "decode_plain_kernelIfLi4" in name
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_partial_sums_are_read_behind_the_wait(listings, arch):
    """In the code as it is issued, and from L2: the emulation runs the source, and its memory knows no order."""
    for name, sass in ((name, sass) for (of, name), sass in listings.items() if of == arch):
        part = int(re.search(r"PartE(\d)", name).group(1))
        reads = [match.start() for match in re.finditer(r"\bLDG\.E\S*\.STRONG\.GPU", sass)]
        assert bool(reads) == (part != 1), f"{name}: the first kernel reads nothing that others write"
        if part == 0:
            fence, arrival = re.search(r"MEMBAR\S*\.GPU", sass), re.search(r"\bATOM\S*\.GPU", sass)
            assert fence.start() < arrival.start() < reads[0], f"{name}: the barrier is not in between"
        if part == 2 and arch == "sm_90a":
            assert sass.index("ACQBULK") < reads[0], f"{name} reads before it waits"


def test_the_gather_of_many_rows(tmp_path):
    _, report = compiled("gather_rows", tmp_path)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert frames == [("0", "0", "0")] * 8, "two sizes of elements and two of indices, for each of two architectures"
