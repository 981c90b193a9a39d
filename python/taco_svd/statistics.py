"""Streaming second moments of the inputs and of the output gradients of linear maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

import taco_kernels

from .architectures import LinearSite
from .team import Team


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
        same = last is not None and same_inputs(last[0], x)
        self._owner[site] = last[1] if same and last is not None else site
        if self._owner[site] == site:
            self._last[site.layer] = (x, site)
        return self._owner[site]

    def finish(self) -> None:
        """Lets go of the activations by which shared inputs were recognised."""
        self._last.clear()

    def inputs(self, site: LinearSite, device: torch.device | None = None) -> torch.Tensor:
        """E[x x^T] of a site: a new tensor [in, in], float32; zero where no token came. Made on `device`, by default
        where the sums are."""
        packed = self._inputs[self._owner[site]].to(device)
        return taco_kernels.second_moment_dense(packed).div_(max(1, self.tokens(site)))

    def tokens(self, site: LinearSite) -> int:
        """How many inputs the site has seen: all tokens, or those that were sent to its expert."""
        return self._tokens[self._owner[site]]

    def gradients(self, site: LinearSite, device: torch.device | None = None) -> torch.Tensor:
        """E[g g^T] of a site: a new tensor [out, out], float32 (g: gradient of the set's mean loss, per token)."""
        return taco_kernels.second_moment_dense(self._gradients[site].to(device)).div_(max(1, self.tokens(site)))

    def sum_over(self, team: Team) -> None:
        """Adds up what the processes of a team have gathered, each from its own windows."""
        for moments in (self._inputs, self._gradients):
            for site in sorted(moments, key=lambda site: site.name):
                team.sum_(moments[site])
        self._tokens = {site: round(team.sum(count)) for site, count in sorted(self._tokens.items(), key=_by_name)}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, note) from which `of_state` makes the moments again; the note is what JSON can hold."""
        tensors = {f"inputs.{site.name}": value for site, value in self._inputs.items()}
        tensors |= {f"gradients.{site.name}": value for site, value in self._gradients.items()}
        owners = {site.name: owner.name for site, owner in self._owner.items()}
        return tensors, {"owners": owners, "tokens": {site.name: count for site, count in self._tokens.items()}}

    @classmethod
    def of_state(
        cls, sites: Iterable[LinearSite], tensors: Mapping[str, torch.Tensor], note: Mapping[str, Any]
    ) -> SecondMoments:
        """The moments of `sites`, which are among those whose state this is."""
        names = {site.name: site for site in sites}
        made = cls()
        for name, site in names.items():
            # itself, where the map that it shares inputs with is not asked for
            owner = names.get(note["owners"][name], site)
            made._owner[site] = owner
            made._gradients[site] = tensors[f"gradients.{name}"]
            made._inputs[owner] = tensors[f"inputs.{note['owners'][name]}"]
            made._tokens[owner] = note["tokens"][note["owners"][name]]
        return made


def same_inputs(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two maps, both of whose inputs are still there, read the same tensor."""
    # what has no rows (an expert that no token was sent to) has no address to be known by
    return other.numel() > 0 and one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _by_name(entry: tuple[LinearSite, int]) -> str:
    return entry[0].name


def _add(moments: dict[LinearSite, torch.Tensor], site: LinearSite, rows: torch.Tensor) -> None:
    if site not in moments:
        moments[site] = taco_kernels.second_moment_zeros(rows.shape[-1], device=rows.device)
    taco_kernels.second_moment_(moments[site], rows)
