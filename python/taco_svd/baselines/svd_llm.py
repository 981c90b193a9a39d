"""SVD-LLM: truncation-aware whitening, then the left factors fitted again on what the compressed model feeds them.

X. Wang et al., "SVD-LLM: truncation-aware singular value decomposition for large language model compression",
arXiv 2403.07378: (1) whitening, section 3.1: SVD of W L with the Cholesky factor L of E[x x^T], so that the loss
of a truncation is the sum of the squared singular values it drops; (2) the layer-wise closed-form update of the first
version, section 3.2: layer by layer from the bottom, with xh the inputs that the compressed layers below produce,
U' = argmin E|W xh - U' V xh|^2 = W C V^T (V C V^T)^-1, C = E[xh xh^T]. Ranks are the same in every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch

from ..architectures import Architecture, dense_weight
from ..plan import Plan
from ..progress import Progress
from ..surgery import put_factors
from ..walk import Walk, watching
from .base import Baseline, uniform
from .whitening import whitened
from .workspace import Workspace

# Ridge of the update towards the whitened factors, as a share of V C V^T's mean diagonal.
RIDGE = 1e-6


def refit_left_factor(
    weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor, moment: torch.Tensor, ridge: float = RIDGE
) -> torch.Tensor:
    """argmin over U of E|W x - U v x|^2 + ridge |U - u|^2: float32 [out, rank].

    Args:
        weight: W, [out, in].
        u, v: the factors so far, [out, rank] and [rank, in].
        moment: E[x x^T] of the inputs to be fitted on, [in, in].
    """
    weight, u, v, moment = (value.double() for value in (weight, u, v, moment))
    gram = v @ moment @ v.T
    size = gram.diagonal().mean()
    # where no input ever came, or the factors are zero, any ridge leaves them as they are
    weight_of_ridge = ridge * size if size > 0 else torch.ones_like(size)
    gram.diagonal().add_(weight_of_ridge)
    right = weight @ moment @ v.T + weight_of_ridge * u
    return torch.linalg.solve(gram, right.T).T.float()


def input_moments(
    architecture: Architecture, walk: Walk, index: int, paths: list[str], hidden: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Sum of x x^T over all tokens for linear maps of one layer, run on the given hidden states: float32 [in, in]."""
    layer = architecture.layers[index]
    moments: dict[str, torch.Tensor] = {}

    def gather(path: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
        def add(x: torch.Tensor, _: torch.Tensor) -> None:
            rows = x.flatten(0, -2).float()
            moment = rows.T @ rows
            moments[path] = moments[path].add_(moment) if path in moments else moment

        return add

    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(watching(layer.get_submodule(path), gather(path)))
        for batch, states in enumerate(hidden):
            walk.run(layer, index, batch, states)
    return moments


def _carry_out(workspace: Workspace, architecture: Architecture, plan: Plan, progress: Progress) -> None:
    planned = plan.structure.low_rank
    workspace.moments(progress, ["second"])
    walk = Walk(workspace.architecture, workspace.runner().batches)
    hidden = walk.entering
    depth = max(planned) + 1
    with progress.step("whitening and sequential update") as report:
        for index in range(depth):
            ranks = planned.get(index, {})
            moments = input_moments(architecture, walk, index, list(ranks), hidden) if ranks else {}
            for path, rank in ranks.items():
                site = architecture.site(index, path)
                weight = dense_weight(architecture.module(site)).detach()
                u, v = whitened(workspace, site, progress).factors(torch.arange(rank, device=weight.device))
                put_factors(architecture, site, refit_left_factor(weight, u, v, moments.pop(path)), v)
            if index + 1 < depth:
                layer = architecture.layers[index]
                hidden = [walk.run(layer, index, batch, states) for batch, states in enumerate(hidden)]
            report(index + 1, depth)


SVD_LLM = Baseline(
    "svd-llm",
    "SVD-LLM: truncation-aware singular value decomposition, arXiv 2403.07378",
    uniform,
    _carry_out,
)
