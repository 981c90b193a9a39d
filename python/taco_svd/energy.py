"""Energy that a device says it has used: NVML for NVIDIA GPUs, RAPL for CPUs; or the reason why it says nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


def energy_counter(device: torch.device, rapl: Path = RAPL) -> tuple[Callable[[], float] | None, str]:
    """(a function that gives joules since some fixed time, what it reads), or (None, why there is none).

    A CPU's counters wrap around after minutes to hours; a difference that is negative is to be thrown away.
    """
    if device.type == "cuda":
        return _nvml(device)
    packages = [
        domain / "energy_uj"
        for domain in sorted(rapl.glob("intel-rapl:*"))
        if domain.name.count(":") == 1 and (domain / "energy_uj").is_file()
    ]
    if not packages:
        return None, f"not reported: no RAPL counters in {rapl}"
    try:
        for path in packages:
            int(path.read_text())
    except (OSError, ValueError) as error:
        return None, f"not reported: RAPL counters cannot be read ({type(error).__name__})"
    return lambda: sum(int(path.read_text()) for path in packages) / 1e6, "RAPL, all packages of the machine"


def _nvml(device: torch.device) -> tuple[Callable[[], float] | None, str]:
    try:
        import pynvml
    except ImportError:
        return None, "not reported: pynvml is not installed"
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # NVML has one exception class per error code
        return None, f"not reported: NVML says {type(error).__name__}"
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, "NVML, this GPU"
