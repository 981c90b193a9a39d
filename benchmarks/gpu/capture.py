"""CUDA graphs, and what is left of a process in which the capture of one has failed: nothing that could go on.

When work raises inside ``torch.cuda.graph``, the end of the capture raises as well, and the context manager gets no
further: the capture's stream stays the current one, and the allocator believes for good that a capture is under way.
Whatever such a process computes or times after that says nothing about the package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_failure: Exception | None = None


def failure() -> Exception | None:
    """What broke this process's first failed capture; None while it has seen none."""
    return _failure


@contextlib.contextmanager
def captured() -> Iterator[torch.cuda.CUDAGraph]:
    """Gives a new graph, into which the work inside the block is captured.

    Raises what the work or the capture itself raised. ``failure`` has it too, and the process must end.
    """
    global _failure
    graph = torch.cuda.CUDAGraph()
    first: Exception | None = None
    try:
        with torch.cuda.graph(graph):
            try:
                yield graph
            except Exception as error:
                first = error
                raise
    except Exception as error:
        # The error of the work says what is wrong; the one of the capture's end only that something was.
        _failure = first or error
        raise _failure from None
