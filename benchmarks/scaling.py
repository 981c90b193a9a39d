"""Time of `taco-svd compress` with one process and with several, one thread each, on the embedded model.

    python benchmarks/scaling.py --calibration train.txt --out benchmarks/results/cpu/scaling.json

Processes are started by torchrun, in turn with the single one; the models that come out are compared by their
divergence from the dense model on the same held-out windows. Efficiency is the time of one process over that of N times
N: it includes start-up, which is measured apart (a run of `taco-svd info`). Times with more processes than were run are
modelled (Amdahl): what does not get faster is taken from the two that were measured; communication, which between
processes of one machine hardly shows, is left out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def modelled(one: float, several: float, processes: int, start_up: float) -> dict[str, object]:
    """Seconds with more processes, from those with one and with `processes`, all without `start_up`."""
    alone, together = one - start_up, several - start_up
    # together = alone * (serial + (1 - serial) / processes)
    serial = min(1.0, max(0.0, (together / alone - 1 / processes) / (1 - 1 / processes)))
    counts = [2**power for power in range(1, 7)]
    return {
        "serial_share": serial,
        "seconds": {str(n): start_up + alone * (serial + (1 - serial) / n) for n in counts},
    }


def main(
    calibration: Annotated[str, typer.Option(help="Text to calibrate on.")] = "self",
    processes: Annotated[int, typer.Option(help="How many work together.")] = 2,
    method: Annotated[str, typer.Option(help="taco, bridge or removal.")] = "taco",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    rounds: Annotated[int, typer.Option(help="Of one and of several, in turn.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
) -> None:
    seconds: dict[int, list[float]] = {1: [], processes: []}
    plans: dict[int, dict[str, Any]] = {}
    size = ["--layers", "4"] if method != "taco" else ["--keep", "0.8"]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for count in seconds:
                target = Path(folder) / f"{count}-{number}"
                start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
                command = [*start, "-m", "taco_svd", "compress", "--method", method, *size, "--out", str(target)]
                command += ["--calibration", calibration, "--samples", str(samples), "--seq-len", "256"]
                seconds[count].append(timed(command))
                plans[count] = json.loads((target / "taco_plan.json").read_text())
                print(f"{count} process{'es' * (count > 1)}: {seconds[count][-1]:.1f} s", flush=True)
        start_up = timed([sys.executable, "-m", "taco_svd", "info", str(Path(folder) / "1-0")])
    one, several = (statistics.median(seconds[count]) for count in seconds)
    losses = {count: plan["result"]["measured_loss"] for count, plan in plans.items()} if method != "removal" else {}
    if losses and abs(losses[1] - losses[processes]) > 0.05 * losses[1]:
        raise SystemExit(f"the models differ: losses {losses}; no efficiency is printed")
    efficiency = one / (processes * several)
    without_start = (one - start_up) / (processes * (several - start_up))
    print(
        f"{method}: {one:.1f} s alone, {several:.1f} s with {processes}: efficiency {efficiency:.0%}, "
        f"{without_start:.0%} without the {start_up:.1f} s that starting takes"
    )
    beyond = modelled(one, several, processes, start_up)
    print(f"modelled: {beyond}")
    if out:
        result = {
            "method": method,
            "processes": processes,
            "seconds": {str(count): values for count, values in seconds.items()},
            "start_up": start_up,
            "efficiency": efficiency,
            "efficiency_without_start": without_start,
            "measured_loss": losses,
            "samples": samples,
            "modelled": beyond,
        }
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
