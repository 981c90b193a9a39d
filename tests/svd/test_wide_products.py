"""Products of 16-bit models in float32: exactness, what is left alone, and what is timed without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from taco_kernels import dispatch
from taco_svd import compress, cost_budget, wide_products
from taco_svd.bench_runner import Runner
from taco_svd.calibration import Calibration
from taco_svd.device_costs import DeviceCosts
from taco_svd.evaluation import perplexity
from taco_svd.wide_products import (
    WideProducts,
    in_natural_products,
    in_wide_products,
    natural_products,
    needs_wide_products,
)

from .tiny_models import CONFIGS, VOCABULARY, tiny_model

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=HALF, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    return kind


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without fast products of 16 bits."""
    monkeypatch.setattr(dispatch, "library_multiplies", lambda dtype: dtype == torch.float32)


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops that were computed in float32."""
    seen: list[str] = []
    for op, product in list(wide_products._PRODUCTS.items()):

        def noted(*args: torch.Tensor, op: object = op, product: object = product, **kwargs: float) -> torch.Tensor:
            seen.append(str(op))
            return product(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setitem(wide_products._PRODUCTS, op, noted)
    return seen


def rounded_once(exact: torch.Tensor, magnitude: torch.Tensor, terms: int, dtype: torch.dtype) -> torch.Tensor:
    """Error of a float32 sum of so many terms that is rounded to the dtype at its end."""
    kind = torch.finfo(dtype)
    return terms * 2.0**-24 * 1.01 * magnitude + kind.eps / 2 * exact.abs() * 1.01 + kind.tiny * kind.eps


@pytest.mark.parametrize("piece", [1 << 24, 700, 1])
@pytest.mark.parametrize("sizes", [(33, 70, 41), (33, 41, 70), (9, 200, 3)], ids=str)
def test_products_are_rounded_once(
    sizes: tuple[int, int, int], dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide_products, "PIECE", piece)
    rows, inner, columns = sizes
    a, w, bias = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype), torch.randn(columns)
    bias = bias.to(dtype)
    with WideProducts():
        plain, offset, batched = a @ w.T, functional.linear(a, w, bias), torch.bmm(a[None], w.T[None])
        scaled = torch.addmm(bias, a, w.T, beta=0.5, alpha=2.0)
    exact, magnitude = a.double() @ w.double().T, a.double().abs() @ w.double().abs().T
    wide_bias = bias.double()
    for found, want, size in (
        (plain, exact, magnitude),
        (batched[0], exact, magnitude),
        (offset, exact + wide_bias, magnitude + wide_bias.abs()),
        (scaled, 2 * exact + 0.5 * wide_bias, 2 * magnitude + wide_bias.abs()),
    ):
        assert found.dtype == dtype
        assert bool(((found.double() - want).abs() <= rounded_once(want, size, inner + 3, dtype)).all())


def test_empty_products(dtype: torch.dtype) -> None:
    with WideProducts():
        assert (torch.ones(9, 0, dtype=dtype) @ torch.ones(0, 4, dtype=dtype)).tolist() == [[0.0] * 4] * 9
        assert (torch.ones(9, 3, dtype=dtype) @ torch.ones(3, 0, dtype=dtype)).shape == (9, 0)


def gradients(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    loss = model(inputs_embeds=inputs, labels=tokens, use_cache=False).loss
    loss.backward()
    assert inputs.grad is not None
    return loss.detach().double(), inputs.grad.double()


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_backward_are_no_less_exact(name: str, slow: None, widened: list[str]) -> None:
    """Against the same weights in float32: no further away than products of 16 bits are."""
    half, wide = tiny_model(name, torch.bfloat16), tiny_model(name)
    wide.load_state_dict(half.state_dict())
    tokens = torch.randint(3, VOCABULARY, (3, 11))
    loss, gradient = gradients(wide, tokens)
    natural = gradients(half, tokens)
    with wide_products.wide_products(half):
        found = gradients(half, tokens)
    assert widened
    errors = [float((kind[1] - gradient).norm() / gradient.norm()) for kind in (natural, found)]
    # both are sums of the same roundings of activations, differently drawn
    assert errors[1] <= 1.5 * errors[0] + 2.0**-8
    assert abs(float(found[0] - loss)) <= 1.5 * abs(float(natural[0] - loss)) + 2.0**-8 * float(loss)


def test_what_needs_it(slow: None) -> None:
    assert needs_wide_products(tiny_model("llama", torch.bfloat16))
    assert not needs_wide_products(tiny_model("llama"))
    assert not needs_wide_products(torch.nn.Linear(3, 3).to(torch.bfloat16))


def test_a_fast_library_is_left_alone(widened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "library_multiplies", lambda dtype: True)
    model = tiny_model("llama", torch.bfloat16)
    with wide_products.wide_products(model):
        assert torch._C._len_torch_dispatch_stack() == 0
        gradients(model, torch.randint(3, VOCABULARY, (1, 9)))
    assert not widened


def test_few_rows_and_float32_are_left_alone(widened: list[str]) -> None:
    with WideProducts():
        torch.ones(wide_products.LEAST_ROWS - 1, 8, dtype=torch.bfloat16) @ torch.ones(8, 8, dtype=torch.bfloat16)
        torch.ones(99, 8) @ torch.ones(8, 8)
        assert not widened
        torch.ones(wide_products.LEAST_ROWS, 8, dtype=torch.bfloat16) @ torch.ones(8, 8, dtype=torch.bfloat16)
    assert widened == ["aten.mm.default"]


def test_attention_of_few_queries_is_left_alone(dtype: torch.dtype) -> None:
    """A cache of keys and values that is read for one token is not copied for it."""
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(2, 3, 40, 16, generator=generator).to(dtype) for _ in range(2))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for count in (1, wide_products.LEAST_ROWS - 1, wide_products.LEAST_ROWS):
        queries = torch.randn(2, 3, count, 16, generator=generator).to(dtype)
        natural = attend(queries, keys, values)[0]
        wide = attend(queries.float(), keys.float(), values.float())[0].to(dtype)
        with WideProducts():
            found = attend(queries, keys, values)[0]
        assert torch.equal(found, natural if count < wide_products.LEAST_ROWS else wide)


def test_nesting_and_natural_products(slow: None) -> None:
    model = tiny_model("llama", torch.bfloat16)
    depth = torch._C._len_torch_dispatch_stack
    with wide_products.wide_products(model):
        with wide_products.wide_products(model):
            assert depth() == 1
        assert depth() == 1
        with natural_products():
            assert depth() == 0
            with natural_products():
                assert depth() == 0
        assert depth() == 1
        with pytest.raises(KeyError), natural_products():
            raise KeyError
        assert depth() == 1
    assert depth() == 0
    with natural_products():
        assert depth() == 0


def test_decorators(slow: None) -> None:
    @in_natural_products
    def timed() -> int:
        return torch._C._len_torch_dispatch_stack()

    @in_wide_products
    def run(model: PreTrainedModel, extra: int) -> tuple[int, int, int]:
        return torch._C._len_torch_dispatch_stack(), timed(), extra

    model = tiny_model("llama", torch.bfloat16)
    assert run(model, 5) == run(model=model, extra=5) == (1, 0, 5)  # type: ignore[call-arg]
    assert run(tiny_model("llama"), 5) == (0, 0, 5)
    with pytest.raises(TypeError):
        run()  # type: ignore[call-arg]


def test_compress_and_perplexity_use_it(
    slow: None,
    widened: list[str],
    calibration_tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    timed: list[int] = []

    class Watched(Runner):
        def prefill(self) -> float:
            timed.append(torch._C._len_torch_dispatch_stack())
            return super().prefill()

    real = DeviceCosts._median

    def watched(*args: object) -> float:
        timed.append(torch._C._len_torch_dispatch_stack())
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(cost_budget, "Runner", Watched)
    monkeypatch.setattr(DeviceCosts, "_median", watched)
    monkeypatch.setenv("TACO_CACHE_DIR", str(tmp_path))  # no costs of an earlier run
    model = tiny_model("llama", torch.bfloat16)
    calibration = Calibration(calibration_tokens, "tokens", 0)
    compress(model, method="bridge", layers=2, max_overhead=0.5, calibration=calibration)
    assert widened
    assert len(timed) > 5 and not any(timed)  # nothing is widened while the clock runs
    widened.clear()
    perplexity(model, torch.randint(3, VOCABULARY, (60,)), window=20)
    assert widened
