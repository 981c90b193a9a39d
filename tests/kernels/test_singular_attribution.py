"""singular_attribution on every backend against float64, chunk and sequence borders included."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import cpu_backends, using
from torch import Tensor

import taco_kernels
from taco_kernels import native, singular_attribution

module = sys.modules["taco_kernels.singular_attribution"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# sequences (None: no sequence dimension), tokens, in, out, directions: single elements, odd sizes, a flush (64 rows)
# and its neighbours, a vector step (32 columns) and its neighbours
CASES = [
    (1, 1, 1, 1, 1),
    (None, 5, 3, 7, 2),
    (3, 7, 9, 5, 33),
    (2, 64, 32, 31, 32),
    (2, 65, 17, 12, 31),
    (5, 129, 40, 24, 70),
    (4, 3, 128, 130, 96),
    (2, 40, 1025, 2100, 34),
    (None, 300, 20, 9, 65),
    (2, 3, 5, 4, 0),
    (2, 0, 5, 4, 3),
    (0, 3, 5, 4, 3),
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def draw(case: tuple[int | None, int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> list[Tensor]:
    sequences, tokens, inputs, outputs, directions = case
    lead = (tokens,) if sequences is None else (sequences, tokens)
    shapes = ((*lead, inputs), (*lead, outputs), (outputs, directions), (directions, inputs))
    kinds = (dtypes[0], dtypes[0], dtypes[1], dtypes[1])
    return [torch.randn(shape, dtype=torch.float64).to(kind) for shape, kind in zip(shapes, kinds, strict=True)]


def exact(x: Tensor, grad: Tensor, u: Tensor, v: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """The four sums in float64, token by token; per-token magnitudes and terms [sequences, tokens, directions]."""
    x, grad, u, v = (t.double() for t in (x, grad, u, v))
    if x.dim() == 2:
        x, grad = x[:, None], grad[:, None]
    terms = (grad @ u) * (x @ v.T)
    size = (grad.abs() @ u.abs()) * (x.abs() @ v.abs().T)
    sums = [
        terms.sum((0, 1)),
        terms.abs().sum((0, 1)),
        terms.sum(1).square().sum(0),
        terms.square().sum((0, 1)),
    ]
    return sums, size, terms


def check(result: tuple[Tensor, ...], inputs: list[Tensor], rounded: bool) -> None:
    """Every field within what roundoff explains.

    A term is a product of two sums of n float32 products: off by (n_in + n_out + 2) u32 of its magnitude, and by two
    roundings more where the products are kept in bfloat16. A sum of N terms adds N u32; squares double that.
    """
    sums, size, terms = exact(*inputs)
    count = terms.shape[0] * terms.shape[1]
    width = inputs[0].shape[-1] + inputs[1].shape[-1]
    u32 = torch.finfo(torch.float32).eps / 2
    relative = (width + 4) * u32 + (2.1 * torch.finfo(torch.bfloat16).eps / 2 if rounded else 0.0)
    # products of a rounded sum: its rounding is relative to the sum, whose own error is relative to the magnitude
    per_token = relative * size * (1 + relative) ** 2
    adding = (count + 4) * u32
    error_sum = per_token.sum((0, 1)) + adding * terms.abs().sum((0, 1))
    sequence_error = per_token.sum(1) + adding * terms.abs().sum(1)
    error_squares = ((2 * terms.sum(1).abs() + sequence_error) * sequence_error).sum(0) + adding * sums[2]
    error_tokens = ((2 * terms.abs() + per_token) * per_token).sum((0, 1)) + adding * sums[3]
    names = ("signed", "absolute", "squares", "token_squares")
    for name, got, want, limit in zip(
        names, result, sums, (error_sum, error_sum, error_squares, error_tokens), strict=True
    ):
        assert got.dtype == torch.float32 and got.shape == want.shape, name
        if want.numel():
            error = (got.double() - want).abs()
            assert bool((error <= limit * 1.01 + 1e-37).all()), f"{name}: {(error / limit).max():.2f} times the bound"


def rounds(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
    """Whether a backend keeps the two products in bfloat16."""
    ours = backend.startswith("cpp:avx") and not module.rounds_products(torch.bfloat16)
    return not ours and backend != "reference" and dtypes[1] == torch.bfloat16


if not INTERPRETED:

    @pytest.mark.parametrize("dtypes", DTYPES, ids=str)
    @pytest.mark.parametrize("backend", cpu_backends())
    def test_against_float64(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        for case in CASES:
            inputs = draw(case, dtypes)
            with using(backend):
                result = singular_attribution(*inputs)
            check(result, inputs, rounds(backend, dtypes))

    @pytest.mark.parametrize("backend", cpu_backends())
    def test_autocast_rounds_nothing(backend: str) -> None:
        inputs = draw((3, 7, 9, 5, 33), DTYPES[0])
        with using(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            check(singular_attribution(*inputs), inputs, rounds(backend, DTYPES[0]))

    @pytest.mark.parametrize("rows", [1, 2, 5, 64, 100])
    @pytest.mark.parametrize("backend", [name for name in cpu_backends() if name.startswith("cpp")])
    def test_sequences_across_chunks(backend: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A sequence may begin in one chunk and end in a later one, or several may end in one."""
        monkeypatch.setattr(module, "_CPP_ELEMENTS", 1)
        monkeypatch.setattr(module, "_CPP_MIN_ROWS", rows)
        for case in [(3, 7, 9, 5, 33), (2, 130, 8, 6, 40), (None, 130, 8, 6, 40)]:
            inputs = draw(case, DTYPES[0])
            with using(backend):
                check(singular_attribution(*inputs), inputs, rounded=False)

    @pytest.mark.parametrize("backend", [name for name in cpu_backends() if name.startswith("cpp")])
    def test_reduction_has_the_same_bits_on_any_number_of_threads(backend: str) -> None:
        first, second = torch.randn(2, 700, 999)
        results = []
        with using(backend):
            for threads in (1, 2, 3, 8):
                totals = torch.zeros(5, 999, dtype=torch.float64)
                native.module.cpu_attribution(  # type: ignore[union-attr]
                    first.data_ptr(), 999, second.data_ptr(), 999, totals.data_ptr(), 700, 999, 100, 0, 0, threads
                )  # fmt: skip
                results.append(totals)
        assert all(torch.equal(results[0], other) for other in results[1:])
        torch.testing.assert_close(results[0][0], (first.double() * second.double()).sum(0), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("backend", [name for name in cpu_backends() if name.startswith("cpp:avx")])
    def test_products_have_the_same_bits_on_any_number_of_threads(backend: str, dtype: torch.dtype) -> None:
        inputs = draw((3, 90, 130, 75, 200), (dtype, dtype))
        before, results = torch.get_num_threads(), []
        try:
            with using(backend):
                for threads in (1, 2, 3, 8):
                    torch.set_num_threads(threads)
                    results.append(singular_attribution(*inputs))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    @pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
    def test_strided_inputs(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        x, grad, u, v = draw((2, 9, 6, 10, 4), dtypes)
        spread = [x.new_empty((*t.shape[:-1], t.shape[-1] * 2))[..., ::2].copy_(t) for t in (x, grad)]
        views = [spread[0], spread[1], u.T.contiguous().T, v.T.contiguous().T]
        for backend in cpu_backends():
            with using(backend):
                check(singular_attribution(*views), [x, grad, u, v], rounds(backend, dtypes))

    def test_float64_goes_to_the_reference() -> None:
        inputs = [t.double() for t in draw((2, 5, 6, 7, 3), DTYPES[0])]
        for got, want in zip(singular_attribution(*inputs), exact(*inputs)[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    def test_opcheck_and_compile() -> None:
        inputs = draw((2, 5, 6, 7, 3), DTYPES[0])
        torch.library.opcheck(torch.ops.taco_kernels.singular_attribution.default, tuple(inputs))
        compiled = torch.compile(lambda *args: singular_attribution(*args).signed * 2, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*inputs), singular_attribution(*inputs).signed * 2)

    def test_no_gradient_flows() -> None:
        inputs = [t.requires_grad_() for t in draw((2, 5, 6, 7, 3), DTYPES[0])]
        assert not any(field.requires_grad for field in singular_attribution(*inputs))

    def test_forcing_cuda_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(taco_kernels.dispatch, "_forced", "cuda")
        with pytest.raises(RuntimeError, match="no kernel in CUDA"):
            singular_attribution(*draw((2, 5, 6, 7, 3), DTYPES[0]))

    def test_triton_under_the_interpreter() -> None:
        pytest.importorskip("triton", reason="triton is not installed")
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
        done = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
        assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("arch", [80, 90])
    def test_triton_compiled_ahead(
        arch: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("triton", reason="triton is not installed")
        from taco_kernels.triton_kernels import aot
        from taco_kernels.triton_kernels.config import PORTABLE_SHARED_BYTES
        from taco_kernels.triton_kernels.singular_attribution import launch

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        x, grad, u, v = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((4096, 2048), (4096, 5632), (5632, 512), (512, 2048))
        )
        made = aot.compile_launch(launch(x, grad, u, v, torch.empty((3, 64, 512), device="meta"), 2, 2048), arch)
        assert made.shared <= PORTABLE_SHARED_BYTES
        assert re.search(r"LDGSTS\S*\.128", made.sass) and "LDG.E.U16" not in made.sass, "no 16-byte loads"
        assert made.stack <= 32, f"spills {made.stack} bytes"
        if dtype == torch.bfloat16:
            assert "HMMA" in made.sass or "HGMMA" in made.sass, "the products do not go through the matrix units"

else:

    @pytest.fixture(autouse=True)
    def _poisoned_memory():
        """Whatever ``torch.empty`` returns is full of NaN, so that an unwritten element shows."""
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_interpreted(case: tuple[int | None, int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        inputs = draw(case, dtypes)
        with using("triton"):
            check(singular_attribution(*inputs), inputs, rounded=False)
