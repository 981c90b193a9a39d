"""Devices: their names, and the current GPU, which streams, graphs and direct calls take, as against a model's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return device.type


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """While open, a GPU is the current one; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def waits_for(device: torch.device) -> Callable[[], None]:
    """A function that returns when all that was queued on the device is done."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else _nothing


def make_current(device: torch.device) -> None:
    """Makes a GPU the process's current one; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _nothing() -> None:
    """What there is to wait for where calls return when they are done."""
