"""What linear maps decompose into and what each direction is worth, gathered within a bound on memory.

The singular vectors of four layers of a 1 B parameter model take half of its size in float32. While gradients come in,
they are held in the model's dtype, of as many maps as `HELD_SHARE` allows; the others wait for a pass of their own.
After a pass only singular values and importance stay, and of small models the vectors. Other maps are decomposed once
more when their directions have been chosen: that costs far less than another pass, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .architectures import Architecture, LinearSite, dense_weight
from .attribution import SigmaGradients, candidate_directions, candidates_of, expected_missing
from .decomposition import Decomposition, plain_svd
from .memory import release
from .model_size import weight_bytes

# Singular vectors in use by one pass, as a share of the model's bytes; small models may hold more than they are large.
HELD_SHARE, HELD_BYTES = 0.12, 64 << 20
# Singular vectors in float32 that are kept after a pass
KEPT_BYTES = 32 << 20


class Attributed:
    """Attributions of a model's linear maps, as they are gathered.

    Args:
        architecture: the model; its maps must still be dense when they are decomposed.
        ranks: layer -> path -> how many directions will be kept.

    Attributes:
        importance: |sigma dL/dsigma| of each map's directions, float64 [k].
        sigma: their singular values, float32 [k], descending.
    """

    def __init__(self, architecture: Architecture, ranks: dict[int, dict[str, int]]) -> None:
        self.architecture = architecture
        self.ranks = ranks
        self.importance: dict[LinearSite, torch.Tensor] = {}
        self.sigma: dict[LinearSite, torch.Tensor] = {}
        self._whole: dict[LinearSite, bool] = {}
        self._kept: dict[LinearSite, Decomposition] = {}
        self._room = max(HELD_BYTES, int(HELD_SHARE * weight_bytes(architecture.model)))

    def narrowed(self, ranks: dict[int, dict[str, int]]) -> Attributed:
        """For a plan of these ranks; what is not in it is let go. Maps that are in both must have one rank."""
        self.ranks = ranks
        for site in list(self.importance):
            if site.path not in ranks.get(site.layer, {}):
                self._kept.pop(site, None)
                del self.importance[site], self.sigma[site]
        return self

    def groups(self, sites: Sequence[LinearSite], whole: bool = False) -> list[list[LinearSite]]:
        """The sites, in their order, in groups whose singular vectors may be held at once."""
        found: list[list[LinearSite]] = []
        room = 0
        for site in sites:
            weight = dense_weight(self.architecture.module(site))
            rank = min(weight.shape) if whole else candidates_of(weight.shape, self._rank(site))
            needed = rank * sum(weight.shape) * weight.element_size()
            if not found or needed > room:
                found.append([])
                room = self._room
            found[-1].append(site)
            room -= needed
        return found

    def gather(self, sites: Sequence[LinearSite], run: Callable[[SigmaGradients], object], whole: bool = False) -> None:
        """Decomposes the maps (`whole`: into all directions), attributes them while `run` brings gradients in.

        `run` is given the callback for `SuffixRunner.backward`.
        """
        release()
        held = {}
        for site in sites:
            self._whole[site] = whole
            held[site] = self._held(site)
            release()  # the decomposition's work space, between vectors that stay
        gradients = SigmaGradients(held)
        run(gradients)
        for site in held:
            self.importance[site] = gradients.importance(site)
        del held, gradients  # what is released below
        release()

    def decomposition(self, site: LinearSite) -> Decomposition:
        """In float32, the directions in the order of `importance`; its memory is the caller's from then on."""
        parts = self._kept.pop(site, None)
        return self._decomposed(site) if parts is None else parts

    def lacking(self, site: LinearSite) -> float:
        """How many of the directions to keep are expected beyond those that were looked at, as a share."""
        total = min(dense_weight(self.architecture.module(site)).shape)
        return expected_missing(self.importance[site], self.sigma[site], self._rank(site), total)

    def _rank(self, site: LinearSite) -> int:
        return self.ranks[site.layer][site.path]

    def _decomposed(self, site: LinearSite) -> Decomposition:
        weight = dense_weight(self.architecture.module(site)).detach()
        return plain_svd(weight) if self._whole[site] else candidate_directions(weight, self._rank(site))

    def _held(self, site: LinearSite) -> Decomposition:
        """In the dtype of the weights, for a pass; keeps the float32 vectors as well where there is room for them."""
        dtype = dense_weight(self.architecture.module(site)).dtype
        self._kept.pop(site, None)
        parts = self._decomposed(site)
        self.sigma[site] = parts.sigma
        if sum(map(_bytes, self._kept.values())) + _bytes(parts) <= KEPT_BYTES:
            self._kept[site] = parts
        if dtype == torch.float32:
            return parts
        left = parts.left.T.to(dtype, memory_format=torch.contiguous_format)  # directions in rows, as kernels read them
        return Decomposition(left.T, parts.sigma, parts.right.to(dtype))


def _bytes(parts: Decomposition) -> int:
    return parts.left.nbytes + parts.right.nbytes
