"""Matrix products of 16-bit models in float32, where a CPU multiplies 16 bits slowly.

Without AVX-512 (most laptops, many servers) torch multiplies bfloat16 and float16 at a tenth of its float32 rate, and
most checkpoints are bfloat16. While `wide_products` is open, the products of forward and backward passes widen what
they read, multiply in float32 and round the result: no less exact, and several times faster. Weights stay as they are
stored; they are widened a piece at a time. Whatever measures time runs under `natural_products`: what is measured must
be what is served.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from taco_kernels import dispatch

aten = torch.ops.aten

# Elements of an operand that are widened at a time: of a head and of its gradients, the largest there are, 16 MB.
PIECE = 1 << 22
# With fewer rows a product waits for weights, and attention for keys and values: widening them would only add to that.
LEAST_ROWS = 8

# Where in the results of an op stand tensors of the inputs' dtype; the others (log-sum-exp) are float32 already.
_ATTENTION: dict[Any, tuple[int, ...]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: (0,),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (0, 1, 2),
}


def _pieces(size: int, other: int) -> list[slice]:
    """A dimension of `size` in pieces of at most `PIECE` elements, where the other dimension is `other`."""
    step = max(1, PIECE // max(1, other))
    return [slice(start, min(start + step, size)) for start in range(0, max(1, size), step)]


class _Room:
    """Float32 memory that one product after another is computed in: fresh pages for each would cost a fifth more."""

    def __init__(self) -> None:
        self._blocks: dict[str, torch.Tensor] = {}

    def get(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """Uninitialised, [rows, columns]; what was got by this name before is overwritten with it."""
        size = rows * columns
        block = self._blocks.get(name)
        if block is None or len(block) < size:
            block = self._blocks[name] = torch.empty(size, dtype=torch.float32)
        return block[:size].view(rows, columns)

    def widened(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A matrix in float32, transposed where the given one is."""
        if part.stride(0) == 1 and part.stride(1) != 1:
            return self.widened(name, part.T).T
        return self.get(name, part.shape[0], part.shape[1]).copy_(part)


def _product(
    room: _Room,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    """alpha a [m, k] b [k, n] + beta bias, rounded once, in pieces of the longer of k and n."""
    (rows, inner), columns = a.shape, b.shape[1]
    offset = None if bias is None or beta == 0 else bias.expand(rows, columns)
    result = a.new_empty((rows, columns))
    across = inner > columns
    for piece in _pieces(columns, inner) if not across else [slice(0, columns)]:
        right = b[:, piece]
        parts = _pieces(inner, max(rows, right.shape[1])) if across else [slice(0, inner)]
        total = room.get("total", rows, right.shape[1])
        for number, part in enumerate(parts):
            left, wide = room.widened("left", a[:, part]), room.widened("right", right[part])
            if number:
                total.addmm_(left, wide)
            else:
                torch.mm(left, wide, out=total)
        if alpha != 1:
            total *= alpha
        if offset is not None:
            total.add_(offset[:, piece], alpha=beta)
        result[:, piece] = total
    return result


def _addmm(room: _Room, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **scales: float) -> torch.Tensor:
    return _product(room, a, b, bias, **scales)


def _bmm(_: _Room, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a.float(), b.float()).to(a.dtype)


_PRODUCTS: dict[Any, Callable[..., torch.Tensor]] = {
    aten.mm.default: _product,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
}


def _is_slow(tensor: Any) -> bool:
    """A plain CPU tensor of 16 bits; subclasses (a DTensor) take their own way and come back with plain ones."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.bfloat16, torch.float16)
    )


class WideProducts(TorchDispatchMode):
    """Computes the matrix products and the attention of 16-bit CPU tensors in float32; all else as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._room = _Room()

    def release(self) -> None:
        """Gives the memory back that products were computed in."""
        self._room = _Room()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = _PRODUCTS.get(func)
        if product is not None:
            a, b = args[-2:]
            if _is_slow(a) and _is_slow(b) and a.dtype == b.dtype and a.shape[-2] >= LEAST_ROWS:
                return product(self._room, *args, **kwargs)
        elif func in _ATTENTION and _is_slow(args[0]) and args[0].shape[-2] >= LEAST_ROWS:
            dtype = args[0].dtype
            wide = [arg.float() if _is_slow(arg) else arg for arg in args]
            found = func(*wide, **{key: arg.float() if _is_slow(arg) else arg for key, arg in kwargs.items()})
            places = _ATTENTION[func]
            return tuple(part.to(dtype) if place in places else part for place, part in enumerate(found))
        return func(*args, **kwargs)


class _Open(threading.local):
    """The mode that is open in this thread, as modes are."""

    mode: WideProducts | None = None


_open = _Open()


def release_room() -> None:
    """Gives the memory back that this thread's products were computed in, where `wide_products` is open."""
    if _open.mode is not None:
        _open.mode.release()


def needs_wide_products(model: nn.Module) -> bool:
    """Whether this model is computed on a CPU that multiplies its dtype slowly.

    Weights that are not here yet (offloaded, on the meta device) will be mapped into this machine's memory.
    """
    embedding: Any = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    return (
        embedding is not None
        and embedding.weight.device.type in ("cpu", "meta")
        and not dispatch.library_multiplies(embedding.weight.dtype)
    )


@contextmanager
def wide_products(model: nn.Module) -> Iterator[None]:
    """While open, products of 16-bit CPU tensors are computed in float32, if `model` needs that (see the module)."""
    if _open.mode is not None or not needs_wide_products(model):
        yield
        return
    with WideProducts() as mode:
        _open.mode = mode
        try:
            yield
        finally:
            _open.mode = None


@contextmanager
def natural_products() -> Iterator[None]:
    """While open, products are computed as a model that is served computes them."""
    mode = _open.mode
    if mode is None:
        yield
        return
    mode.__exit__(None, None, None)
    _open.mode = None
    try:
        yield
    finally:
        mode.__enter__()
        _open.mode = mode


F = TypeVar("F", bound=Callable[..., Any])


def in_wide_products(function: F) -> F:
    """A function whose first argument is a model, run under `wide_products`."""

    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get(first)
        if not isinstance(model, nn.Module):  # the function has the message
            return function(*args, **kwargs)
        with wide_products(model):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def in_natural_products(function: F) -> F:
    """A function that measures time, run under `natural_products`."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with natural_products():
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]
