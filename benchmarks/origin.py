"""Where a result comes from, told alike by all benchmarks that run in one process."""

from __future__ import annotations

from typing import Any

from taco_kernels.env import build_digest
from taco_svd.plan import versions


def origin() -> dict[str, Any]:
    """``versions`` of what computes here and the ``build`` of `taco_kernels`.

    To be asked before the run: sources may be edited while it lasts, and the result is that of the old ones.
    """
    return {"versions": versions(), "build": build_digest()}
