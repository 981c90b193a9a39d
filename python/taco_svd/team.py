"""Several processes that compress one model together, started by torchrun: torch.distributed, nothing of our own.

Calibration windows are split over the processes and statistics summed; matrices are dealt out, decomposed by one
process each, and handed to the others. Every process ends with the same compressed model. A team of one does none of
this, so the code that uses it has no second path.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from .errors import LostProcessError, TacoError, first_line

# A process that waits longer than this for another one takes it for lost; TACO_TIMEOUT (seconds) sets it.
TIMEOUT_SECONDS = 1800.0

T = TypeVar("T")


class Team:
    """A rank among so many processes; collectives do nothing where there is one.

    All processes must call the same methods in the same order. Tensors may be on a GPU where the process group has a
    backend for it, numbers and objects are exchanged on the CPU: a group needs a backend for that in any case
    (``"cpu:gloo,cuda:nccl"``, or none named).
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def from_environment(cls, device: str = "cpu") -> Team:
        """The team that torchrun describes by WORLD_SIZE, RANK and so on; of one without it.

        On a GPU (see `local_device`) that becomes the process's current one.

        Raises:
            TacoError: the process group cannot be made, or the GPU not used.
        """
        if _processes() < 2:
            return cls()
        own = local_device(device)
        on_gpu = own.startswith("cuda")
        if on_gpu:
            try:
                torch.cuda.set_device(own)  # NCCL works on the current device
            except (RuntimeError, AssertionError, ValueError) as error:
                raise TacoError(f"Device {own!r} cannot be used: {first_line(error)}") from error
        if not distributed.is_initialized():
            seconds = float(os.environ.get("TACO_TIMEOUT", TIMEOUT_SECONDS))
            # NCCL has no collectives for what is on the CPU: sums of numbers, objects, weights that were left there
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            try:
                distributed.init_process_group(backend, timeout=timedelta(seconds=seconds))
            except (RuntimeError, ValueError) as error:
                first = first_line(error)
                raise TacoError(f"The processes of torchrun do not find each other: {first}") from error
        return cls(distributed.get_rank(), distributed.get_world_size())

    def windows(self, tokens: torch.Tensor) -> torch.Tensor:
        """This process's share of calibration windows [samples, seq_len]."""
        return tokens[self.rank :: self.size]

    def deals(self, number: int) -> bool:
        """Whether the piece of work of that number is this process's."""
        return number % self.size == self.rank

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all processes, in place."""
        if self.size > 1:
            self._call(lambda: distributed.all_reduce(tensor))
        return tensor

    def sum(self, value: float) -> float:
        if self.size == 1:
            return value
        return float(self.sum_(torch.tensor(value, dtype=torch.float64)))

    def all(self, value: bool) -> bool:
        """Whether it holds in every process."""
        return self.sum(float(value)) == self.size

    def gather(self, value: T) -> list[T]:
        """What every process has, by rank; for small things, their tensors on the CPU."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self._call(lambda: distributed.all_gather_object(found, value))
        return found

    def broadcast(self, value: T, source: int = 0) -> T:
        """What `source` has; for small things, their tensors on the CPU: others would come back on `source`'s GPU."""
        if self.size == 1:
            return value
        held: list[Any] = [value]
        self._call(lambda: distributed.broadcast_object_list(held, src=source))
        result: T = held[0]
        return result

    def broadcast_(self, tensor: torch.Tensor, source: int) -> None:
        """Fills a tensor with what `source` has in it."""
        if self.size > 1:
            self._call(lambda: distributed.broadcast(tensor, src=source))

    def _call(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            first = first_line(error)
            if "No backend type associated with device type" in first:
                raise TacoError(
                    f"The process group has no backend for a device ({first}); make it with "
                    'init_process_group("cpu:gloo,cuda:nccl").'
                ) from error
            raise LostProcessError(
                f"Process {self.rank} of {self.size} lost another one ({first}). Finished steps are kept: run the same "
                "command with --resume."
            ) from error


def local_device(device: str) -> str:
    """`device` as this process is to use it: of those that torchrun starts, each has the GPU of its LOCAL_RANK.

    Raises:
        TacoError: there are fewer GPUs than processes, or all would use the same one.
    """
    if not device.startswith("cuda") or _processes() < 2:
        return device
    if device != "cuda":
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise TacoError(f"Several processes cannot share {device}; with --device cuda each takes a GPU of its own.")
        return device
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", rank + 1))
    if here > count:  # every process says so, not only the one that has none: the others would wait for it
        raise TacoError(
            f"Each process needs a GPU of its own: {here} run on this machine and torch can use {count} there; start "
            "no more than that (torchrun --nproc-per-node)."
        )
    return f"cuda:{rank}"


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
