"""Values as JSON can hold them."""

from __future__ import annotations

import math
from typing import Any


def without_infinities(value: Any) -> Any:
    """A copy in which numbers that are not finite are None, at any depth, and tuples are lists.

    JSON has no NaN and no infinity, which Python would write and other readers refuse: what is not known (one window's
    standard error) is null.
    """
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
