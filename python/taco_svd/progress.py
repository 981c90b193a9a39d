"""How long work tells how far it is: a step has a title and counts up to a total."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Report = Callable[[int, int], None]


class Progress(Protocol):
    """Receives the steps of a run; the command line draws them as bars with an ETA."""

    def step(self, title: str) -> AbstractContextManager[Report]:
        """Opens a step; the value is called with (done, total) as the step goes on."""
        ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def step(self, title: str) -> Iterator[Report]:
        yield lambda done, total: None
