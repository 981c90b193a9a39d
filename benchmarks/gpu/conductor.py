"""Runs the parts of the GPU suite, each in processes of its own: what crashes or hangs costs its point, not the rest.

The most telling comes first, and no step takes more than its share of the time. A process that dies is started again
and goes on behind the point that it died at, which is noted as failed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from .store import RUNNING, failed, forget_failed, write_json

SUITE = Path(__file__).resolve().parents[1] / "gpu_suite.py"
FOREVER = float("inf")
# A process that has not come to another point for so long hangs. Where a point is many kernels to compile, or a full
# SVD to compare with, it may take the longer of them.
STALL_SECONDS, LONG_STALL_SECONDS = 75.0, 180.0
# What a process may take beyond its budget for the point that it is at.
GRACE_SECONDS = 60.0
MOST_DEATHS = 3


class Step(NamedTuple):
    """Processes of one part.

    share: of the whole budget, at most; the shares need not add up to one.
    """

    part: str
    share: float
    options: tuple[str, ...] = ()
    workers: int = 1
    stall: float = STALL_SECONDS
    grace: float = GRACE_SECONDS

    @property
    def name(self) -> str:
        return " ".join([self.part, *(option for option in self.options if not option.startswith("--"))])


# It has no points, and nothing of it is missed that is cut short.
WARM = Step("warm", 0.25, stall=FOREVER, grace=0.0)


def plan(workers: int) -> list[Step]:
    """In the order of what a first run on a GPU must tell: whether our CUDA kernels are right, then how fast."""
    return [
        Step("build", 0.5, stall=FOREVER),
        Step("check", 0.2, ("--only", "cuda", "--only", "cuda dependent")),
        Step("bench", 0.3, ("--rows", "decode"), stall=LONG_STALL_SECONDS),
        Step("check", 0.25, ("--only", "triton", "--only", "cpp", "--only", "library"), workers),
        Step("sanitize", 0.2, stall=FOREVER),
        Step("tune", 0.2, stall=LONG_STALL_SECONDS),
        Step("bench", 0.3, ("--rows", "prefill"), stall=LONG_STALL_SECONDS),
        Step("svd", 0.15, stall=LONG_STALL_SECONDS),
    ]


class Worker:
    """One process of a step, which is started again where it died."""

    def __init__(self, step: Step, out: Path, arguments: list[str], seconds: float, scratch: Path, quiet: bool) -> None:
        self.step, self.out, self.arguments, self.quiet = step, out, arguments, quiet
        self.end = time.monotonic() + seconds
        self.mark = scratch / f"{time.monotonic_ns()}.running"
        self.deaths: list[str] = []
        self.code: int | None = None  # of a process that came to its end
        self._start()

    def _start(self) -> None:
        self.mark.write_text("")
        seconds = max(0.0, self.end - time.monotonic())
        command = [sys.executable, "-u", str(SUITE), "--inside", "--part", self.step.part, "--out", str(self.out)]
        command += [*self.arguments, "--budget-seconds", f"{seconds:.1f}"]
        environment = {**os.environ, RUNNING: str(self.mark)}
        if self.quiet:  # one of many: no compilers beside it
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        silent = subprocess.DEVNULL if self.quiet else None
        self.process = subprocess.Popen(command, env=environment, stdout=silent)

    def finished(self) -> bool:
        """Looks after the process; true once it came to an end, or died too often."""
        code = self.process.poll()
        if code is None:
            if time.monotonic() > self.end + self.step.grace:
                return self._died("killed: far beyond its time")
            if time.time() - self.mark.stat().st_mtime > self.step.stall:
                return self._died(f"killed: no new point in {self.step.stall:.0f} s")
            return False
        if code in (0, 1):
            self.code = code
            return True
        return self._died(f"died with exit code {code}")

    def _died(self, reason: str) -> bool:
        """Notes the point that the process was at; whether that was once too often."""
        self.stop()
        part, _, key = self.mark.read_text().partition(" ")
        self.deaths.append(f"{key or 'before the first point'}: {reason}")
        path = self.out / f"{part}.json"
        if key and path.exists():
            content = json.loads(path.read_text())
            if not failed(content["points"].get(key, {})):
                content["points"][key] = {"ok": False, "error": reason}
                write_json(path, content)
        if not path.exists() or not key or len(self.deaths) > MOST_DEATHS or time.monotonic() > self.end:
            return True
        self._start()
        return False

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def wait_for(workers: list[Worker]) -> None:
    """Looks after processes until all have come to an end, or died too often; none is left, whatever happens."""
    try:
        while not all([worker.finished() for worker in workers]):  # noqa: C419 - every one is looked after
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.stop()


def merged(target: Path, parts: list[Path]) -> None:
    """Adds the points of processes that shared a step to the part's file."""
    content = json.loads(target.read_text()) if target.exists() else {}
    left: dict[str, int] = {}
    for path in parts:
        if not path.exists():
            continue
        other = json.loads(path.read_text())
        content = {**other, **content, "points": {**content.get("points", {}), **other["points"]}}
        for backend, count in other.get("left_of", {}).items():
            left[backend] = left.get(backend, 0) + count
    content["left_of"] = {**content.get("left_of", {}), **left}
    content["left"] = sum(content["left_of"].values())
    names = [name for name in content.get("backends", []) if name != "reference"]
    content["complete"] = all(content["left_of"].get(name, 1) == 0 for name in names)
    write_json(target, content)


class Conductor:
    """A run of the suite.

    Args:
        out: folder of the result files, which exists.
        parts: those that are to run.
        arguments: options that every process is handed.
        facts: of the machine, for `suite.json`.
        workers: processes that share what is not timed.
    """

    def __init__(
        self, out: Path, parts: list[str], arguments: list[str], seconds: float, facts: dict[str, Any], workers: int
    ) -> None:
        self.out, self.arguments, self.seconds, self.facts = out, arguments, seconds, facts
        self.started = time.monotonic()
        self.workers = workers
        self.steps = [step for step in plan(workers) if step.part in parts]
        self.record: list[dict[str, Any]] = []
        self.warming: list[Worker] | None = None  # before it has begun; nobody once it is over

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def run(self) -> bool:
        """All steps; whether nothing was wrong."""
        with tempfile.TemporaryDirectory(prefix="taco-gpu-suite-") as folder:
            scratch = Path(folder)
            try:
                for number, step in enumerate(self.steps):
                    later = self.steps[number:]
                    timed_later = any(s.part in ("tune", "bench") for s in later)
                    if step.part != "build" and self.warming is None and timed_later:
                        self.warming = self._started(WARM._replace(workers=self.workers), scratch)
                    if step.part in ("tune", "bench", "svd") or step.workers > 1:
                        wait_for(self.warming or [])  # nothing is timed beside them
                        self.warming = []
                    self._step(step, scratch)
            finally:
                for worker in self.warming or []:
                    worker.stop()
        return all(entry["ok"] for entry in self.record)

    def _started(self, step: Step, scratch: Path) -> list[Worker]:
        seconds = max(0.0, min(step.share * self.seconds, self.left))
        if step.workers == 1:
            return [Worker(step, self.out, [*self.arguments, *step.options], seconds, scratch, False)]
        found = []
        for number in range(step.workers):
            out = scratch / f"{step.name}-{number}".replace(" ", "-")
            out.mkdir(exist_ok=True)
            so_far = self.out / f"{step.part}.json"
            if so_far.exists():  # what is done is not done again
                shutil.copyfile(so_far, out / so_far.name)
            arguments = [*self.arguments, *step.options, "--shard", f"{number}/{step.workers}"]
            found.append(Worker(step, out, arguments, seconds, scratch, True))
        return found

    def _step(self, step: Step, scratch: Path) -> None:
        began = time.monotonic()
        entry: dict[str, Any] = {"step": step.name, "ok": True}
        self.record.append(entry)
        if self.left <= 0:
            entry["skipped"] = "the budget is spent"
        elif "--dry-run" in self.arguments and (step.part == "sanitize" or "cuda" in step.options):
            entry["skipped"] = "it needs a GPU"
        else:
            workers = self._started(step, scratch)
            wait_for(workers)
            if len(workers) > 1:
                merged(self.out / f"{step.part}.json", [worker.out / f"{step.part}.json" for worker in workers])
            deaths = [death for worker in workers for death in worker.deaths]
            entry["ok"] = not deaths and all(worker.code == 0 for worker in workers)
            entry |= {"deaths": deaths} if deaths else {}
        entry["seconds"] = round(time.monotonic() - began, 1)
        print(self._line(step, entry), flush=True)
        self.save()

    def _line(self, step: Step, entry: dict[str, Any]) -> str:
        path = self.out / f"{step.part}.json"
        content = json.loads(path.read_text()) if path.exists() else {"points": {}}
        wrong = {key: point for key, point in content["points"].items() if failed(point)}
        said = f"{len(content['points'])} points, {len(wrong)} wrong, {content.get('left', 0)} left"
        if "skipped" in entry:
            said = f"not run, {entry['skipped']}"
        lines = [f"{entry['step']}: {said} ({entry['seconds']:.0f} s; {max(0.0, self.left):.0f} s left)"]
        lines += [f"  DIED {death}" for death in entry.get("deaths", [])]
        shown = ("error", "worst", "same_bits", "red", "wrong", "log")
        for key, point in list(wrong.items())[:10]:
            facts = {name: point[name] for name in shown if point.get(name) is not None}
            lines.append(f"  WRONG {key}: {facts}"[:500])
        return "\n".join(lines)

    def save(self) -> None:
        verdicts: dict[str, bool] = {}
        for entry, step in zip(self.record, self.steps, strict=False):
            verdicts[step.part] = verdicts.get(step.part, True) and entry["ok"]
        facts = {**self.facts, "ok": verdicts, "steps": self.record}
        write_json(self.out / "suite.json", {**facts, "seconds": round(time.monotonic() - self.started, 1)})


def prepare(out: Path, parts: list[str], resume: bool) -> None:
    """Makes the folder of results: of parts that are to run nothing stays, or with ``resume`` all but what failed."""
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        path = out / f"{part}.json"
        if path.exists() and resume:
            forget_failed(path)
        elif path.exists():
            path.unlink()
