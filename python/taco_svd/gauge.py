"""The gauge of two factors: which of the equal products ``(u R^-1)(R v)`` is stored.

``R`` is chosen such that the right factor is the identity on `rank` of the inputs (an interpolative decomposition).
The factors then cost ``rank (out + in - rank)`` numbers instead of ``rank (out + in)``.
"""

from __future__ import annotations

import torch

# Entries of the right factor are bounded by this: rounding them to bfloat16 then costs no more than rounding the
# weight would. The bound is reached by exchanging inputs (Goreinov et al., "How to find a good submatrix", 2010).
LARGEST_ENTRY = 1.5
MOST_EXCHANGES = 200


def pivoted_factors(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same product with the identity inside the right factor.

    Args:
        u: [out, rank].
        v: [rank, in], rank <= in; of full row rank (a deficient one is completed by directions that u gives no weight).

    Returns:
        (u [out, rank], v [rank, in - rank], pivot [in] int32), float32: with ``full[:, pivot[:rank]] = I`` and
        ``full[:, pivot[rank:]] = v``, ``u_out @ full`` equals ``u @ v`` to rounding. Both parts of the pivot are in
        ascending order: neighbours in memory are then gathered together.
    """
    rank = v.shape[0]
    # Orthonormal rows first: the choice of inputs and what follows then do not suffer from v's scaling.
    q, r = torch.linalg.qr(v.detach().double().T)  # v = r^T q^T
    left = u.detach().double() @ r.T
    order = _row_order(q)
    chosen, rest = order[:rank], order[rank:]
    between = torch.linalg.solve(q[chosen].T, q[rest].T)  # [rank, in - rank]
    for _ in range(MOST_EXCHANGES if rest.numel() else 0):
        flat = int(between.abs().argmax())
        row, column = divmod(flat, between.shape[1])
        value = between[row, column]
        if abs(float(value)) <= LARGEST_ENTRY:
            break
        chosen[row], rest[column] = rest[column].clone(), chosen[row].clone()
        # the exchange is a rank-one update of the interpolation
        old_row, old_column = between[row].clone(), between[:, column].clone()
        old_row[column] += 1
        old_column[row] -= 1
        between -= torch.outer(old_column, old_row / value)
    chosen, rest = chosen.sort().values, rest.sort().values
    # once more from the start: the updates have gathered rounding
    basis = q[chosen].T
    between = torch.linalg.solve(basis, q[rest].T)
    return (left @ basis).float(), between.float(), torch.cat([chosen, rest]).to(torch.int32)


def random_pivot(in_features: int, rank: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """A pivot [in] (int32) in the order that :func:`pivoted_factors` gives, for models and maps of random weights."""
    order = torch.randperm(in_features, generator=generator)
    return torch.cat([order[:rank].sort().values, order[rank:].sort().values]).to(torch.int32)


def _row_order(q: torch.Tensor) -> torch.Tensor:
    """A permutation of the rows of a tall matrix: those that an LU decomposition with row pivoting chooses first."""
    _, swaps = torch.linalg.lu_factor(q)
    order = list(range(q.shape[0]))
    for i, j in enumerate((swaps - 1).tolist()):
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order, device=q.device)
