"""Streaming second moments of the inputs and of the output gradients of linear maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import taco_kernels

from .architectures import Architecture, LinearSite, linear_shape

# Moments that are held at once may take this share of the model's bytes, or this much where that is less: what does
# not fit is gathered in further passes.
MOMENT_SHARE = 0.08
LEAST_MOMENT_BYTES = 64 << 20


class SecondMoments:
    """Collects ``E[x x^T]`` and ``E[g g^T]`` per linear map while a `SuffixRunner` runs backward.

    Maps that read the same tensor (q, k and v; gate and up) share one input moment: it is accumulated once.
    Sums are float32 on the device of the activations, half of each symmetric matrix (`taco_kernels.second_moment_`);
    their rounding (16 K tokens: near 1e-6 relative) stays far below the damping.
    """

    def __init__(self) -> None:
        self._inputs: dict[LinearSite, torch.Tensor] = {}
        self._owner: dict[LinearSite, LinearSite] = {}
        self._gradients: dict[LinearSite, torch.Tensor] = {}
        self._tokens: dict[LinearSite, int] = {}
        self._last: dict[int, tuple[torch.Tensor, LinearSite]] = {}

    def __call__(self, site: LinearSite, x: torch.Tensor, gradient: torch.Tensor) -> None:
        owner = self._share(site, x)
        if owner == site:
            _add(self._inputs, site, x)
            self._tokens[site] = self._tokens.get(site, 0) + x.shape[:-1].numel()
        _add(self._gradients, site, gradient)

    def _share(self, site: LinearSite, x: torch.Tensor) -> LinearSite:
        """The site that accumulates this input: decided on the first batch, then kept."""
        if site in self._owner:
            return self._owner[site]
        last = self._last.get(site.layer)
        same = last is not None and last[0].data_ptr() == x.data_ptr() and last[0].shape == x.shape
        self._owner[site] = last[1] if same and last is not None else site
        if self._owner[site] == site:
            self._last[site.layer] = (x, site)
        return self._owner[site]

    def finish(self) -> None:
        """Lets go of the activations by which shared inputs were recognised."""
        self._last.clear()

    def inputs(self, site: LinearSite) -> torch.Tensor:
        """E[x x^T] of a site: a new tensor [in, in], float32."""
        owner = self._owner[site]
        return taco_kernels.second_moment_dense(self._inputs[owner]).div_(self._tokens[owner])

    def gradients(self, site: LinearSite) -> torch.Tensor:
        """E[g g^T] of a site: a new tensor [out, out], float32 (g: gradient of the set's mean loss, per token)."""
        return taco_kernels.second_moment_dense(self._gradients[site]).div_(self._tokens[self._owner[site]])


def _add(moments: dict[LinearSite, torch.Tensor], site: LinearSite, rows: torch.Tensor) -> None:
    if site not in moments:
        moments[site] = taco_kernels.second_moment_zeros(rows.shape[-1], device=rows.device)
    taco_kernels.second_moment_(moments[site], rows)


def groups_within_memory(architecture: Architecture, sites: Sequence[LinearSite]) -> list[list[LinearSite]]:
    """Splits sites, in order, so that the moments of each group fit in memory at once (see `MOMENT_SHARE`).

    A site that is too large alone is a group of its own.
    """
    model = sum(parameter.numel() * parameter.element_size() for parameter in architecture.model.parameters())
    budget = max(LEAST_MOMENT_BYTES, MOMENT_SHARE * model)
    groups: list[list[LinearSite]] = []
    used = 0.0
    for site in sites:
        # a little over half of each symmetric matrix in float32; that inputs may be shared is not counted on
        size = 2.3 * sum(side * side for side in linear_shape(architecture.module(site)))
        if not groups or used + size > budget:
            groups.append([])
            used = 0.0
        groups[-1].append(site)
        used += size
    return groups
