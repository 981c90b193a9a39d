"""Published methods to compare with, on the same statistics, modules and checkpoints as Taco-SVD."""

from __future__ import annotations

from .asvd import ASVD
from .base import Baseline, Decision, uniform
from .budget import Budget, make_budget, uniform_budget
from .fwsvd import FWSVD
from .kfac import KFAC
from .modegpt import MODEGPT
from .replaceme import REPLACEME, choose_run
from .svd_llm import SVD_LLM
from .workspace import Workspace
from .zs_svd import ZS_SVD

# Plain SVD; its factors are made by `factorise.py`, as every method without a `carry_out`.
SVD = Baseline("svd", "Eckart and Young 1936: the best approximation of each weight by itself", uniform)
SLEB = Baseline(
    "sleb",
    "SLEB: streamlining LLMs through redundancy verification and elimination of transformer blocks, arXiv 2402.09025",
)

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline for baseline in (SLEB, SVD, FWSVD, ASVD, SVD_LLM, ZS_SVD, KFAC, MODEGPT, REPLACEME)
}


def everywhere(method: str, keep: float | None) -> bool:
    """Whether a method, given a share of parameters to keep, compresses all layers alike."""
    return keep is not None and method in BASELINES and BASELINES[method].allocate is not None


__all__ = [
    "BASELINES",
    "Baseline",
    "Budget",
    "Decision",
    "Workspace",
    "choose_run",
    "everywhere",
    "make_budget",
    "uniform_budget",
]
