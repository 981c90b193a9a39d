"""Builds the extension taco_kernels._C: C++ for the CPU, CUDA where nvcc is found. Needs no torch.

Metadata is in pyproject.toml. What the environment decides:

TACO_CUDA   auto (default): CUDA kernels are built when nvcc is on PATH, or under CUDA_HOME, or named by CUDACXX, or
            where the toolkit puts it (/usr/local/cuda/bin)
            0: never;  1: always, and it is an error if there is no nvcc
TACO_CUDA_ARCHS  which of 80, 90a, 100a to build for, separated by commas (default: all that nvcc knows)
TACO_CPP    auto (default): without a C++ compiler or Python.h the package is installed without its extension
            0: never built;  1: always, and it is an error if it cannot be
TACO_SANITIZE  empty (default), or what to instrument the C++ code with (address, undefined, thread; with commas), for
            `make test-sanitizers`
TACO_JOBS   parallel compile jobs (default: all cores)
CXX         the C++ compiler
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# Each level: macro that tells the driver the level is in the binary, its flags, its file. A level whose flags the
# compiler does not know, or another processor family, is left out; the baseline always remains.
CPU_LEVELS = {
    "avx2": ("TACO_HAVE_AVX2", ["-mavx2", "-mfma", "-mf16c"], "avx2.cpp"),
    "avx512": (
        "TACO_HAVE_AVX512",
        ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
        "avx512.cpp",
    ),
    "avx512bf16": (
        "TACO_HAVE_AVX512BF16",
        ["-mavx512bf16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
        "avx512bf16.cpp",
    ),
}
# sm_80 serves all of Ampere and Ada, and its PTX whatever comes later; sm_90a and sm_100a have code of their own.
CUDA_ARCHS = ("80", "90a", "100a")
# Where the toolkit's installer puts nvcc; it adds nothing to PATH.
INSTALLED_NVCC = "/usr/local/cuda/bin/nvcc"
COMPILER_LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")


class Refusal(Exception):
    """A reason to stop that the user can act on: printed as one sentence, without a traceback."""


def switch(name: str) -> str:
    value = os.environ.get(name, "auto").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise Refusal(f"{name} must be auto, 0 or 1, but it is {value!r}.")
    return value


def warn(text: str) -> None:
    line = "!" * 100
    print(f"{line}\n!!! taco-kernels: {text}\n{line}", file=sys.stderr, flush=True)


def output_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def find_cxx() -> list[str] | None:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["g++", "c++", "clang++"]:
        words = shlex.split(candidate)
        if words and shutil.which(words[0]):
            return words
    return None


def host_compiler(cxx: list[str]) -> str:
    """The compiler itself: nvcc's -ccbin takes a program, and the first word of CXX="ccache g++" compiles nothing."""
    return next((word for word in cxx if Path(word).name not in COMPILER_LAUNCHERS), cxx[0])


def find_nvcc() -> str | None:
    for variable in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        value = os.environ.get(variable)
        if value:
            path = value if variable == "CUDACXX" else os.path.join(value, "bin", "nvcc")
            found = shutil.which(path)
            if found:
                return found
    return shutil.which("nvcc") or shutil.which(INSTALLED_NVCC)


def compiles(cxx: list[str], flags: list[str], code: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(code)
        command = [*cxx, *flags, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def plan_cpp() -> bool:
    """Whether the extension is built; a Refusal if it must be but cannot."""
    wanted = switch("TACO_CPP")
    if wanted == "0":
        return False
    missing = ""
    if find_cxx() is None:
        named = os.environ.get("CXX")
        missing = (
            f"the C++ compiler CXX={named} was not found" if named else "no C++ compiler (g++, c++, clang++) was found"
        )
    elif not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        missing = "Python.h was not found (install python3-dev)"
    if missing and wanted == "1":
        raise Refusal(f"TACO_CPP=1 asks for the C++ extension, but {missing}.")
    if missing:
        warn(
            f"{missing}: installing WITHOUT the compiled kernels. Everything works, but slower. "
            "Install a compiler and reinstall to change that; TACO_CPP=1 makes it an error."
        )
    return not missing


def plan_cuda(cpp: bool) -> str | None:
    """The nvcc to use, or None; a Refusal if CUDA is demanded but there is no way to build it."""
    wanted = switch("TACO_CUDA")
    if wanted == "0":
        return None
    nvcc = find_nvcc()
    if wanted == "1" and nvcc is None:
        raise Refusal(
            "TACO_CUDA=1 asks for the CUDA kernels, but nvcc was not found on PATH, under CUDA_HOME, as CUDACXX, or as "
            f"{INSTALLED_NVCC}."
        )
    if wanted == "1" and not cpp:
        raise Refusal("TACO_CUDA=1 asks for the CUDA kernels, but the C++ extension that holds them is not built.")
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    if wanted == "1" and not sources:
        raise Refusal("TACO_CUDA=1 asks for the CUDA kernels, but csrc/cuda holds none.")
    return nvcc if cpp and sources else None


def cuda_archs() -> list[str]:
    """The architectures to build for; a Refusal if one is named that there is no code for."""
    named = [arch.strip() for arch in os.environ.get("TACO_CUDA_ARCHS", "").split(",") if arch.strip()]
    unknown = sorted(set(named) - set(CUDA_ARCHS))
    if unknown:
        raise Refusal(f"TACO_CUDA_ARCHS names {', '.join(unknown)}; choose from {', '.join(CUDA_ARCHS)}.")
    return named or list(CUDA_ARCHS)


def sanitizers() -> list[str]:
    """What the C++ code is instrumented with; a Refusal for what the compilers have not."""
    named = [name.strip() for name in os.environ.get("TACO_SANITIZE", "").split(",") if name.strip()]
    unknown = sorted(set(named) - {"address", "undefined", "thread"})
    if unknown or {"address", "thread"} <= set(named):
        raise Refusal(
            f"TACO_SANITIZE={','.join(named)}: choose from address, undefined, thread; address and thread exclude each "
            "other."
        )
    return named


class Build(build_ext):
    """Compiles csrc/ with ninja, each file with flags of its own, which distutils' compilers cannot do."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Refusal as refusal:
            raise SystemExit(f"taco-kernels: {refusal}") from None

    def _build(self, ext: Extension) -> None:
        try:
            import pybind11
        except ModuleNotFoundError:
            raise Refusal(
                "pybind11 is needed to build and is not installed; without --no-build-isolation pip brings it."
            ) from None
        cxx = find_cxx()
        if cxx is None:
            raise Refusal("no C++ compiler (g++, c++, clang++) was found.")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        nvcc = ext.taco_nvcc  # type: ignore[attr-defined]
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        mac = sys.platform == "darwin"
        probe = "int main() { return 0; }\n"
        levels = [name for name, (_, flags, _) in CPU_LEVELS.items() if x86 and compiles(cxx, flags, probe)]
        openmp = not mac and compiles(
            cxx, ["-fopenmp"], "#include <omp.h>\nint main() { return omp_get_max_threads(); }\n"
        )
        if not openmp:
            warn("the C++ compiler has no OpenMP: the CPU kernels will run on one thread.")

        includes = [str(CSRC), str(work), sysconfig.get_paths()["include"], pybind11.get_include()]
        common = [
            "-O3",
            "-std=c++17",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-DNDEBUG",
            "-fno-math-errno",
            # Products and sums fuse where the source says so and nowhere else: a compiler that fuses them in a loop's
            # body and not in its tail gives an output other bits when the threads' shares begin elsewhere.
            "-ffp-contract=off",
        ]
        common += ["-fopenmp"] if openmp else []
        checked = sanitizers()
        if checked:
            # after -O3, so that it counts; a finding ends the process, or a test could pass over it
            common += [f"-fsanitize={','.join(checked)}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
            common += ["-O1"]
        common += [f"-D{CPU_LEVELS[name][0]}" for name in levels]
        common += ["-DTACO_WITH_CUDA"] if nvcc else []
        common += [f"-I{folder}" for folder in includes]

        objects: list[tuple[str, Path, Path, list[str]]] = []  # rule, source, object, flags
        sources = ["bindings.cpp", "cpu/low_rank.cpp", "cpu/attribution.cpp", "cpu/baseline.cpp"]
        sources += ["cpu/many_rows.cpp", "cpu/sketch.cpp", "cpu/gather.cpp", "cpu/int8.cpp"]
        sources += [f"direct/{name}.cpp" for name in ("tensors", "direct", "gpu", "torch_c", "registered")]
        sources += [f"cpu/{CPU_LEVELS[name][2]}" for name in levels]
        # gcc's own AVX-512 header trips its uninitialised warnings (undefined upper halves are meant).
        quiet = ["-Wno-uninitialized"]
        quiet += ["-Wno-maybe-uninitialized"] if compiles(cxx, ["-Werror", "-Wmaybe-uninitialized"], probe) else []
        if "thread" in checked:
            sources.append("cpu/checked_team.cpp")
        extra = {f"cpu/{CPU_LEVELS[name][2]}": CPU_LEVELS[name][1] + quiet for name in levels}
        for source in sources:
            objects.append(("cxx", CSRC / source, work / (source.replace("/", "_") + ".o"), extra.get(source, [])))

        archs: list[str] = []
        nvcc_version = ""
        if nvcc:
            nvcc_version = next((line for line in output_of([nvcc, "--version"]).splitlines() if "release" in line), "")
            release = re.search(r"release (\d+)", nvcc_version)
            known = set(output_of([nvcc, "--list-gpu-code"]).split())
            archs = [arch for arch in cuda_archs() if not known or f"sm_{arch.rstrip('a')}" in known]
            if release and int(release[1]) < 12:  # 11.8 lists sm_90, and knows no sm_90a
                archs = [arch for arch in archs if not arch.endswith("a")]
            codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            codes += ["-gencode=arch=compute_80,code=compute_80"] if "80" in archs else []
            # -fmad=false: kernels of one op that are compiled apart must round alike (fused products are written out)
            cuda_flags = [
                "-O3",
                "-std=c++17",
                "-fmad=false",
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                "-Xptxas=-v",
                "-lineinfo",
            ]
            # one architecture per core: they take most of the build, and one file holds nearly all kernels
            cuda_flags += [*codes, f"-I{CSRC}", "-ccbin", host_compiler(cxx)]
            cuda_flags += [f"--threads={os.environ.get('TACO_JOBS') or 0}"]
            for cu in sorted((CSRC / "cuda").glob("*.cu")):
                objects.append(("nvcc", cu, work / f"cuda_{cu.name}.o", cuda_flags))

        info = {
            "cxx": (output_of([*cxx, "--version"]).splitlines() or [" ".join(cxx)])[0],
            "openmp": openmp,
            "cpu_isas": [*reversed(levels), "baseline"],
            "nvcc": nvcc_version.strip(),
            "cuda_archs": [f"sm_{arch}" for arch in archs] + (["compute_80"] if "80" in archs else []),
            "pybind11": pybind11.__version__,
            "python": platform.python_version(),
        }
        header = f'#pragma once\n#define TACO_BUILD_INFO R"taco({json.dumps(info)})taco"\n'
        header_path = work / "taco_build_info.h"
        if not header_path.is_file() or header_path.read_text() != header:
            header_path.write_text(header)

        # OpenMP's symbols stay undefined (compiled with -fopenmp, linked without): at load they bind to the runtime
        # that torch brought, so that there is one thread pool (see taco_kernels/native.py). -z now turns a missing
        # runtime into an ImportError with a reason instead of a crash in the first call.
        if mac:
            link = ["-shared", "-undefined", "dynamic_lookup"]
        else:
            link = ["-shared", "-Wl,-z,now", "-Wl,--exclude-libs,ALL", "-Wl,--as-needed"]
            link += [f"-fsanitize={','.join(checked)}"] if checked else []
        if nvcc:
            link = ["-shared", "-cudart=static", "-ccbin", host_compiler(cxx)]
            link += ["-Xlinker=-z,now", "-Xlinker=--exclude-libs,ALL"]
        self._ninja(work, target, cxx, nvcc, common, objects, link)
        self._write_log(work)

    def _ninja(
        self,
        work: Path,
        target: Path,
        cxx: list[str],
        nvcc: str | None,
        common: list[str],
        objects: list[tuple[str, Path, Path, list[str]]],
        link: list[str],
    ) -> None:
        def escape(path: object) -> str:
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        def quoted(words: list[str]) -> str:
            return " ".join(shlex.quote(word) for word in words).replace("$", "$$")

        linker = [nvcc] if nvcc else cxx
        lines = [
            "ninja_required_version = 1.5",
            f"rule cxx\n  command = {quoted([*cxx, *common])} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = C++ $in",
            # ptxas' resource usage (registers, spills) goes to a file beside the object; build.log collects them.
            f"rule nvcc\n  command = {quoted([nvcc or 'nvcc'])} $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1"
            " || (cat $out.log; exit 1)",
            "  depfile = $out.d\n  deps = gcc\n  description = CUDA $in",
            f"rule link\n  command = {quoted(linker)} $in {quoted(link)} -o $out\n  description = link $out",
        ]
        for rule, source, output, flags in objects:
            lines.append(f"build {escape(output)}: {rule} {escape(source)}\n  flags = {quoted(flags)}")
        lines.append(f"build {escape(target)}: link {' '.join(escape(output) for _, _, output, _ in objects)}")
        lines.append(f"default {escape(target)}\n")
        (work / "build.ninja").write_text("\n".join(lines))

        jobs = os.environ.get("TACO_JOBS", "")
        environment = dict(os.environ)
        try:
            import ninja

            program = [os.path.join(ninja.BIN_DIR, "ninja")]
        except ModuleNotFoundError:
            found = shutil.which("ninja") or shutil.which("ninja-build")
            if found is None:
                raise Refusal(
                    "ninja is needed to build and is not installed; without --no-build-isolation pip brings it."
                ) from None
            program = [found]
        command = [*program, "-C", str(work), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command, env=environment, check=False).returncode != 0:
            hint = " TACO_CUDA=0 builds without the CUDA kernels." if nvcc else ""
            raise Refusal(f"compiling the extension failed; the compiler's messages are above (see pip -v).{hint}")

    @staticmethod
    def _write_log(work: Path) -> None:
        logs = sorted(work.glob("*.o.log"))
        if logs:
            (work / "build.log").write_text("".join(f"== {log.name}\n{log.read_text()}" for log in logs))


class CleanBuildPy(build_py):
    """Empties the packages' folders in build/lib first: what was deleted from the tree must not be in a wheel."""

    def run(self) -> None:
        if not getattr(self, "editable_mode", False):
            for package in ("taco_kernels", "taco_svd"):
                shutil.rmtree(Path(self.build_lib) / package, ignore_errors=True)
        super().run()


def version() -> str:
    namespace: dict[str, str] = {}
    exec((ROOT / "taco_kernels" / "_version.py").read_text(encoding="utf-8"), namespace)
    return namespace["__version__"]


def extensions() -> list[Extension]:
    cpp = plan_cpp()
    nvcc = plan_cuda(cpp)
    if not cpp:
        return []
    extension = Extension("taco_kernels._C", sources=[])
    extension.taco_nvcc = nvcc  # type: ignore[attr-defined]
    return [extension]


def main() -> None:
    try:
        modules = extensions()
    except Refusal as refusal:
        raise SystemExit(f"taco-kernels: {refusal}") from None
    readme = ROOT / "README.md"
    setup(
        version=version(),
        long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
        long_description_content_type="text/markdown",
        packages=find_packages(".", include=["taco_kernels", "taco_kernels.*"]) + find_packages("python"),
        package_dir={"": "python", "taco_kernels": "taco_kernels"},
        package_data={
            "taco_kernels": ["py.typed", "_C.pyi", "tuned/*.json"],
            "taco_svd": ["py.typed", "data/**/*", "lm_eval_tasks/*"],
        },
        include_package_data=False,
        ext_modules=modules,
        cmdclass={"build_ext": Build, "build_py": CleanBuildPy},
    )


if __name__ == "__main__":
    main()
