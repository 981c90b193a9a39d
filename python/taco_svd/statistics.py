"""Streaming second moments of the inputs and of the output gradients of linear maps."""

from __future__ import annotations

import torch

from .architectures import LinearSite


class SecondMoments:
    """Collects ``E[x x^T]`` and ``E[g g^T]`` per linear map while a `SuffixRunner` runs backward.

    Maps that read the same tensor (q, k and v; gate and up) share one input moment: it is accumulated once.
    Sums are kept in float32 on the device of the activations; products of one batch are summed by the library
    in float32, batches are added in float32 (16 K tokens give a relative error near 1e-6, below the damping).
    """

    def __init__(self) -> None:
        self._inputs: dict[LinearSite, torch.Tensor] = {}
        self._owner: dict[LinearSite, LinearSite] = {}
        self._gradients: dict[LinearSite, torch.Tensor] = {}
        self._tokens: dict[LinearSite, int] = {}
        self._last: dict[int, tuple[torch.Tensor, LinearSite]] = {}

    def __call__(self, site: LinearSite, x: torch.Tensor, gradient: torch.Tensor) -> None:
        rows = x.flatten(0, -2).float()
        owner = self._share(site, x)
        if owner == site:
            moment = rows.T @ rows
            self._inputs[site] = self._inputs[site].add_(moment) if site in self._inputs else moment
            self._tokens[site] = self._tokens.get(site, 0) + rows.shape[0]
        rows = gradient.flatten(0, -2).float()
        moment = rows.T @ rows
        self._gradients[site] = self._gradients[site].add_(moment) if site in self._gradients else moment

    def _share(self, site: LinearSite, x: torch.Tensor) -> LinearSite:
        """The site that accumulates this input: decided on the first batch, then kept."""
        if site not in self._owner:
            last = self._last.get(site.layer)
            same = last is not None and last[0].data_ptr() == x.data_ptr() and last[0].shape == x.shape
            self._owner[site] = last[1] if same and last is not None else site
        if self._owner[site] == site:
            self._last[site.layer] = (x, site)
        return self._owner[site]

    def inputs(self, site: LinearSite) -> torch.Tensor:
        """E[x x^T] of a site: [in, in], float32."""
        owner = self._owner[site]
        return self._inputs[owner] / self._tokens[owner]

    def gradients(self, site: LinearSite) -> torch.Tensor:
        """E[g g^T] of a site: [out, out], float32 (g is the gradient of the set's mean loss, per token)."""
        return self._gradients[site] / self._tokens[self._owner[site]]
