"""What a baseline may spend: which layers are compressed, and how many parameters their linear maps may keep.

With ``--keep`` every layer is compressed, all of them alike: that is how the papers of the low-rank methods do it.
With ``--layers`` and ``--compression-ratio`` only the redundant layers are, at the ranks of paper mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..architectures import Architecture, linear_shape
from ..budget import DEFAULT_COMPRESSION_RATIO, Sizes, paper_rank
from ..errors import TacoError


@dataclass(frozen=True)
class Budget:
    """A number of parameters for the linear maps of some layers.

    Attributes:
        layers: source indices of the layers that are compressed, ascending.
        parameters: what all their linear maps together may keep (weights; biases and norms are not touched).
        shapes: path -> (out, in) of the linear maps of one layer.
        ratio: the paper's c where the ranks follow from it, else None.
        index_size: how many parameters an entry of an index counts as; more than one where the budget is of bytes.
    """

    layers: tuple[int, ...]
    parameters: int
    shapes: dict[str, tuple[int, int]]
    ratio: float | None = None
    index_size: float = 1.0

    @property
    def dense(self) -> int:
        """Parameters of the same linear maps in the dense model."""
        return len(self.layers) * sum(m * n for m, n in self.shapes.values())

    @property
    def share(self) -> float:
        return self.parameters / self.dense

    def ranks(self) -> dict[str, int]:
        """The same rank for a path in every layer: each matrix keeps the budget's share of its parameters.

        Ranks are whole numbers; what rounding down leaves goes to the paths whose rank was cut the most.
        """
        if self.ratio is not None:
            return {path: paper_rank(m, n, self.ratio) for path, (m, n) in self.shapes.items()}
        exact = {path: self.share * m * n / (m + n) for path, (m, n) in self.shapes.items()}
        ranks = {path: max(1, math.floor(value)) for path, value in exact.items()}
        count = len(self.layers)
        left = self.parameters - count * sum(rank * sum(self.shapes[path]) for path, rank in ranks.items())
        while left < 0 and max(ranks.values()) > 1:  # rank 1 is more than some small matrix's share
            widest = max(ranks, key=lambda path: ranks[path] / exact[path] * (ranks[path] > 1))
            ranks[widest] -= 1
            left += count * sum(self.shapes[widest])
        for path in sorted(exact, key=lambda path: ranks[path] - exact[path]):
            cost = count * sum(self.shapes[path])
            if cost <= left and ranks[path] < exact[path]:
                ranks[path] += 1
                left -= cost
        return ranks


def uniform_budget(architecture: Architecture, keep: float, method: str) -> Budget:
    """All layers, such that the whole model keeps the share `keep` of its parameters.

    Raises:
        TacoError: out of range, or less than what is not compressed (embeddings, head, norms) and rank 1 leave.
    """
    if not 0 < keep < 1:
        raise TacoError(f"--keep must be above 0 and below 1, got {keep}.")
    shapes = _shapes(architecture)
    sizes = Sizes.of(architecture)
    dense = sizes.depth * sum(m * n for m, n in shapes.values())
    budget = Budget(tuple(range(sizes.depth)), math.floor(dense - (1 - keep) * sizes.total + 1e-6), shapes)
    least = sizes.depth * sum(m + n for m, n in shapes.values())
    if budget.parameters < least:
        raise TacoError(
            f"--keep {keep:.4g} cannot be reached by --method {method}: with rank 1 everywhere "
            f"{(sizes.total - dense + least) / sizes.total:.1%} of the parameters remain "
            "(embeddings and the head are not compressed)."
        )
    return budget


def redundant_budget(architecture: Architecture, redundant: list[int], ratio: float | None) -> Budget:
    """The redundant layers only, with the parameters that the paper's ranks for ratio c leave them."""
    ratio = DEFAULT_COMPRESSION_RATIO if ratio is None else ratio
    shapes = _shapes(architecture)
    spent = sum(paper_rank(m, n, ratio) * (m + n) for m, n in shapes.values())
    return Budget(tuple(sorted(redundant)), len(redundant) * spent, shapes, ratio)


def make_budget(
    architecture: Architecture,
    method: str,
    keep: float | None,
    redundant: list[int],
    ratio: float | None,
    index_size: float = 1.0,
) -> Budget:
    """The budget of a method that compresses all layers for `keep`, or else the redundant ones at ratio c."""
    if keep is not None:
        return replace(uniform_budget(architecture, keep, method), index_size=index_size)
    return redundant_budget(architecture, redundant, ratio)


def _shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    return {path: linear_shape(architecture.module(architecture.site(0, path))) for path in architecture.paths}
