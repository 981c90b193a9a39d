"""Pivoted factors: the same product, the identity where it is promised, small entries."""

from __future__ import annotations

import pytest
import torch

from taco_svd.gauge import LARGEST_ENTRY, pivoted_factors, random_pivot


def assembled(v: torch.Tensor, pivot: torch.Tensor) -> torch.Tensor:
    rank = v.shape[0]
    full = torch.zeros(rank, len(pivot), dtype=torch.float64)
    full[:, pivot[:rank].long()] = torch.eye(rank, dtype=torch.float64)
    full[:, pivot[rank:].long()] = v.double()
    return full


@pytest.mark.parametrize(
    "out_features, in_features, rank", [(1, 1, 1), (7, 5, 5), (5, 9, 1), (30, 70, 12), (64, 64, 50), (20, 200, 20)]
)
def test_product_is_the_same(out_features: int, in_features: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    u = torch.randn(out_features, rank, generator=generator, dtype=torch.float64)
    # columns of very different size: the choice of inputs matters
    v = torch.randn(rank, in_features, generator=generator, dtype=torch.float64)
    v = v * torch.logspace(0, -6, in_features, dtype=torch.float64)
    new_u, new_v, pivot = pivoted_factors(u, v)
    assert (new_u.shape, new_v.shape) == (u.shape, (rank, in_features - rank))
    assert pivot.dtype == torch.int32 and sorted(pivot.tolist()) == list(range(in_features))
    for part in (pivot[:rank], pivot[rank:]):
        assert part.tolist() == sorted(part.tolist()), "neighbours in memory are to be gathered together"
    # both factors are rounded to float32 once
    scale = new_u.double().abs() @ assembled(new_v.abs(), pivot)
    error = (new_u.double() @ assembled(new_v, pivot) - u @ v).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * scale).all()


def test_entries_are_bounded_where_plain_pivoting_does_not_bound_them() -> None:
    """The matrix on which Gaussian elimination with partial pivoting grows fastest: entries double at every step."""
    rank = 12
    square = torch.eye(rank, dtype=torch.float64) - torch.tril(torch.ones(rank, rank, dtype=torch.float64), -1)
    v = torch.cat([square, torch.ones(3, rank, dtype=torch.float64)]).T.contiguous()
    u = torch.eye(rank, dtype=torch.float64)
    new_u, new_v, pivot = pivoted_factors(u, v)
    assert float(new_v.abs().max()) <= LARGEST_ENTRY * (1 + 1e-6)
    assert torch.allclose(new_u.double() @ assembled(new_v, pivot), v, atol=1e-4)


def test_random_pivots_are_in_the_same_order() -> None:
    pivot = random_pivot(50, 20, torch.Generator().manual_seed(1))
    assert pivot.dtype == torch.int32 and sorted(pivot.tolist()) == list(range(50))
    assert pivot[:20].tolist() == sorted(pivot[:20].tolist()) != list(range(20))
    assert pivot[20:].tolist() == sorted(pivot[20:].tolist())
