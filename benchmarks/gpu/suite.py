"""What the parts of the GPU suite know of the run that they are part of."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import capture
from .store import Budget, Store, error_of, identity, say_running

# Exit code of a process that can use its GPU no more, after an illegal access or a failed capture: another goes on.
LOST = 3


class Suite:
    """Options, device and result files of one part's process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.dry: bool = options.dry_run
        self.small: bool = options.small
        self.quick: bool = options.quick
        self.only: list[str] = options.only or []
        # versions of which a call has hung or killed its process before: the rest is measured without them
        self.without: list[str] = options.without or []
        self.rows: str | None = options.rows
        number, _, of = (options.shard or "0/1").partition("/")
        self.shard, self.shards = int(number), int(of)
        self.budget = Budget(options.budget_seconds)
        self.device = "cpu" if self.dry else "cuda"
        self._version = ""  # whose turn it is within the point
        self.gpu = "none (dry run)"
        self.processors, self.cache = 4, 1 << 20
        if not self.dry:
            properties = torch.cuda.get_device_properties(0)
            self.gpu, self.processors, self.cache = (
                properties.name, properties.multi_processor_count, properties.L2_cache_size
            )  # fmt: skip

    def store(self, part: str) -> Store:
        return Store(self.out, part, identity(self.gpu, self.dry))

    def usable(self) -> list[str]:
        from taco_kernels import backends

        return [name for name, state in backends(self.device).items() if state == "usable" and name != "reference"]

    def mine(self, number: int) -> bool:
        """Whether work of this number is this process's, of those that share it."""
        return number % self.shards == self.shard

    def run(self, store: Store, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """One point; ends the process where the GPU is lost to it."""
        self._version = ""
        point = store.run(key, work)
        error = self.lost()
        if error is not None:
            if point.get("ok", True):
                store.add(key, error_of(error))
            store.save()
            sys.exit(LOST)
        say_running(store.part, "")  # what happens from here on is not this point's fault
        return point

    def lost(self) -> Exception | None:
        """Why the GPU is lost to this process, if it is.

        After an illegal access every call fails; what follows a failed capture is not to be trusted (see ``capture``).
        """
        if capture.failure() is not None:
            return capture.failure()
        try:
            if not self.dry:
                torch.cuda.synchronize()
        except Exception as error:
            return error
        return None

    def within(self, store: Store, key: str, version: str) -> None:
        """Says which version of a point comes next.

        Ends the process where the version before lost it the GPU, and notes that version: another process measures what
        else the point holds without it.
        """
        error = self.lost()
        if error is not None:
            if self._version:
                store.blame(key, self._version, f"{type(error).__name__}: {error}"[:300])
            store.save()
            sys.exit(LOST)
        self._version = version
        say_running(store.part, key, version)
