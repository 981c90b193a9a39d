"""What the parts of the GPU suite know of the run that they are part of."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .store import Budget, Store, error_of, say_running, sources

# Exit code of a process that can use its GPU no more, after an illegal access for example: another one goes on.
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
        self.gpu = "none (dry run)"
        self.processors, self.cache = 4, 1 << 20
        if not self.dry:
            properties = torch.cuda.get_device_properties(0)
            self.gpu, self.processors, self.cache = (
                properties.name, properties.multi_processor_count, properties.L2_cache_size
            )  # fmt: skip

    def store(self, part: str) -> Store:
        try:
            import triton

            triton_version = triton.__version__
        except ModuleNotFoundError:
            triton_version = "none"
        same = {
            "gpu": self.gpu, "torch": torch.__version__, "triton": triton_version,
            "sources": sources("csrc", "taco_kernels"),
            "dry_run": self.dry,
        }  # fmt: skip
        return Store(self.out, part, same)

    def usable(self) -> list[str]:
        from taco_kernels import backends

        return [name for name, state in backends(self.device).items() if state == "usable" and name != "reference"]

    def mine(self, number: int) -> bool:
        """Whether work of this number is this process's, of those that share it."""
        return number % self.shards == self.shard

    def run(self, store: Store, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """One point; ends the process where the GPU is lost to it."""
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
        """Why the GPU is lost to this process, if it is: after an illegal access every call fails."""
        try:
            if not self.dry:
                torch.cuda.synchronize()
        except Exception as error:
            return error
        return None

    def within(self, store: Store, key: str, version: str) -> None:
        """Says which version of a point comes next. Ends the process where the one before lost it the GPU: what else
        the point holds is then measured without that version, and not counted as wrong with it."""
        if self.lost() is not None:
            store.save()
            sys.exit(LOST)
        say_running(store.part, key, version)
