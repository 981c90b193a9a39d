"""The data of the harness task `taco_minimal_pairs`: the harness imports this file by its path."""

from __future__ import annotations

from typing import Any


def load(pairs: str | None = None, **_: Any) -> dict[str, Any]:
    """The pairs of a local file as the split that the task reads.

    Args:
        pairs: a JSON-lines file, from the harness's ``--metadata``.

    Raises:
        TacoError: no file given, unreadable, or a line without both sentences.
    """
    import datasets

    from taco_svd.harness import read_pairs

    return {"test": datasets.Dataset.from_list(read_pairs(pairs))}
