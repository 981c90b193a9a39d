"""Runs the parts of the GPU suite, each in processes of its own: what crashes or hangs costs its point, not the rest.

The most telling comes first, and no step takes more than its share of the time. A process that dies is started again
and goes on behind the point that it died at, which is noted as failed. A version or backend whose call hung, or killed
process after process, is left out from then on, so that what is wrong with one does not keep the others from being
measured: a grid-wide barrier that never opens would otherwise take the time of every point.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from .store import RUNNING, failed, forget_failed, same_run, what_ran, write_json

SUITE = Path(__file__).resolve().parents[1] / "gpu_suite.py"
FOREVER = float("inf")
# A process that has not come to another point, or version of it, for so long hangs. Checks of CUDA kernels take
# milliseconds, a version that is timed may have to be compiled, a full SVD to compare with may take minutes, and a
# process takes its time until it begins.
STALL_SECONDS, SHORT_STALL_SECONDS, VERSION_STALL_SECONDS, LONG_STALL_SECONDS = 75.0, 30.0, 45.0, 180.0
# What a process may take beyond its budget for the point that it is at.
GRACE_SECONDS = 45.0
MOST_DEATHS = 3
# A killed process can stay as long as the driver waits for its kernel; it is not waited for any longer.
BURIAL_SECONDS = 15.0
# A hang costs a stall's time, so the first is enough; a crash costs seconds and may be of one size only.
DEATHS_OF_A_BACKEND = 2
# The CUDA kernels' launches, by the names of the backends that are checked.
LAUNCHES = {"cuda": "cooperative", "cuda dependent": "dependent"}
# Compilers and the like end with the process that started them. No session of its own: what runs this suite within a
# limit ends the processes of its session.
OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}


class Step(NamedTuple):
    """Processes of one part.

    share: of the whole budget, at most; the shares need not add up to one.
    beside_next: runs at the same time as the step behind it, if nothing is timed there.
    """

    part: str
    share: float
    options: tuple[str, ...] = ()
    workers: int = 1
    stall: float = STALL_SECONDS
    grace: float = GRACE_SECONDS
    beside_next: bool = False

    @property
    def name(self) -> str:
        return " ".join([self.part, *(option for option in self.options if not option.startswith("--"))])


TIMED = ("tune", "bench", "svd")
# It has no points, and nothing of it is missed that is cut short.
WARM = Step("warm", 0.25, stall=FOREVER, grace=0.0)


def plan(workers: int) -> list[Step]:
    """In the order of what a first run on a GPU must tell: whether our CUDA kernels are right, then how fast."""
    return [
        Step("build", 0.5, stall=FOREVER),
        Step("check", 0.2, ("--only", "cuda", "--only", "cuda dependent"), stall=SHORT_STALL_SECONDS),
        Step("bench", 0.3, ("--rows", "decode"), stall=VERSION_STALL_SECONDS),
        Step("sanitize", 0.2, stall=FOREVER, beside_next=True),
        Step("check", 0.25, ("--only", "triton", "--only", "cpp", "--only", "library"), workers),
        Step("tune", 0.2),
        Step("bench", 0.3, ("--rows", "prefill"), stall=VERSION_STALL_SECONDS),
        Step("svd", 0.15, stall=LONG_STALL_SECONDS),
    ]


class Blame:
    """What is left out because of what its calls did to a process: CUDA launches by `check`, versions by `bench`.

    A hang of a check does not keep its launch out of the benchmark: it may be one of odd sizes, and those of models are
    what the benchmark is there for.
    """

    def __init__(self) -> None:
        self.left_out: dict[str, dict[str, str]] = {"check": {}, "bench": {}}
        self._deaths: dict[str, int] = {}

    def of(self, part: str, key: str, version: str, hung: bool, reason: str) -> str | None:
        """Notes a death; the name of what is left out because of it, if it is."""
        if part == "bench" and version:
            name = version.removeprefix("taco ")
        elif part == "check" and (name := key.partition("/")[0].replace("direct", "cuda")) in LAUNCHES:
            self._deaths[name] = self._deaths.get(name, 0) + 1
            if not hung and self._deaths[name] < DEATHS_OF_A_BACKEND:
                return None
        else:
            return None
        self.left_out[part][name] = f"{key}: {reason}"
        return name

    def arguments(self, part: str) -> list[str]:
        names = self.left_out["check" if part in ("check", "sanitize") else "bench"]
        return [word for name in names for word in ("--without", name)]

    def environment(self, part: str) -> dict[str, str]:
        """The launch that still works in the benchmark, where one does not: the dispatcher would take the bad one."""
        good = [launch for backend, launch in LAUNCHES.items() if backend not in self.left_out["bench"]]
        return {"TACO_CUDA_LAUNCH": good[0]} if part == "bench" and len(good) == 1 else {}


class Worker:
    """One process of a step, which is started again where it died."""

    def __init__(
        self, step: Step, out: Path, arguments: list[str], seconds: float, scratch: Path, quiet: bool, blame: Blame
    ) -> None:
        self.step, self.out, self.arguments, self.quiet, self.blame = step, out, arguments, quiet, blame
        self.end = time.monotonic() + seconds
        self.mark = scratch / f"{time.monotonic_ns()}.running"
        self.deaths: list[str] = []
        self.code: int | None = None  # of a process that came to its end
        self._start()

    def _start(self) -> None:
        self.mark.write_text("")
        seconds = max(0.0, self.end - time.monotonic())
        command = [sys.executable, "-u", str(SUITE), "--inside", "--part", self.step.part, "--out", str(self.out)]
        command += [*self.arguments, *self.blame.arguments(self.step.part), "--budget-seconds", f"{seconds:.1f}"]
        environment = {**os.environ, **self.blame.environment(self.step.part), RUNNING: str(self.mark)}
        if self.quiet:  # one of many: no compilers beside it
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        silent = subprocess.DEVNULL if self.quiet else None
        self.process = subprocess.Popen(command, env=environment, stdout=silent, **OWN_GROUP)
        self.stopped = False

    def finished(self) -> bool:
        """Looks after the process; true once it came to an end, or died too often."""
        code = self.process.poll()
        if code is None:
            if time.monotonic() > self.end + self.step.grace:
                return self._died("killed: far beyond its time", late=True)
            stall = self.step.stall if what_ran(self.mark)[1] else max(self.step.stall, STALL_SECONDS)
            if time.time() - self.mark.stat().st_mtime > stall:
                return self._died(f"killed: no new point in {stall:.0f} s", hung=True)
            return False
        if code in (0, 1):
            self.code = code
            self.stop()  # what it has left running
            return True
        return self._died(f"died with exit code {code}")

    def _died(self, reason: str, hung: bool = False, late: bool = False) -> bool:
        """Notes what the process was at; whether it is not started again. The end of the time is nobody's fault."""
        self.stop()
        part, key, version = what_ran(self.mark)
        self.deaths.append(f"{', '.join(filter(None, (key, version))) or 'between points'}: {reason}")
        left_out = None if late else self.blame.of(part, key, version, hung, reason)
        if left_out is not None:
            self.deaths[-1] += f"; {left_out} is left out from here on"
        path = self.out / f"{part}.json"
        ends = not path.exists() or not key or len(self.deaths) > MOST_DEATHS or time.monotonic() > self.end
        again = part == "bench" and left_out is not None and not ends  # the point, without that version
        if key and path.exists() and not again:
            content = json.loads(path.read_text())
            if not failed(content["points"].get(key, {})):
                content["points"][key] = {"ok": False, "error": ": ".join(filter(None, (version, reason)))}
                write_json(path, content)
        if not ends:
            self._start()
        return ends

    def stop(self) -> None:
        """Ends the process and its children; gives up on one that the driver does not let go."""
        if self.stopped:
            return
        self.stopped = True  # its number may soon be another's
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(BURIAL_SECONDS)


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
        if not same_run(content, other):  # from before, of other sources or another machine
            content = {}
        content = {**other, **content, "points": {**content.get("points", {}), **other["points"]}}
        for backend, count in other.get("left_of", {}).items():
            left[backend] = left.get(backend, 0) + count
    if not content:
        return  # no process came so far as to write anything
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
        began: by `time.monotonic`, when the budget began to run.
    """

    def __init__(
        self, out: Path, parts: list[str], arguments: list[str], seconds: float, facts: dict[str, Any], workers: int,
        began: float,
    ) -> None:  # fmt: skip
        self.out, self.arguments, self.seconds, self.facts = out, arguments, seconds, facts
        self.started = began
        self.workers = workers
        self.steps = [step for step in plan(workers) if step.part in parts]
        self.record: list[dict[str, Any]] = []
        self.blame = Blame()
        self.warming: list[Worker] | None = None  # before it has begun; nobody once it is over

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def run(self) -> bool:
        """All steps; whether nothing was wrong."""
        with tempfile.TemporaryDirectory(prefix="taco-gpu-suite-", ignore_cleanup_errors=True) as folder:
            scratch = Path(folder)
            together: list[Step] = []
            try:
                for number, step in enumerate(self.steps):
                    together.append(step)
                    behind = self.steps[number + 1 :]
                    if step.beside_next and behind and behind[0].part not in TIMED:
                        continue
                    self._prepare(together, self.steps[number:], scratch)
                    self._steps(together, scratch)
                    together = []
            finally:
                for worker in self.warming or []:
                    worker.stop()
        return all(entry["ok"] for entry in self.record)

    def _prepare(self, steps: list[Step], rest: list[Step], scratch: Path) -> None:
        """Compiling ahead begins behind the build, and is over before anything is timed or compiled by many."""
        timed_later = any(step.part in ("tune", "bench") for step in rest)
        if steps[0].part != "build" and self.warming is None and timed_later:
            self.warming = self._started(WARM._replace(workers=self.workers), scratch)
        if any(step.part in TIMED or step.workers > 1 for step in steps):
            wait_for(self.warming or [])
            self.warming = []

    def _started(self, step: Step, scratch: Path) -> list[Worker]:
        seconds = max(0.0, min(step.share * self.seconds, self.left))
        if step.workers == 1:
            return [Worker(step, self.out, [*self.arguments, *step.options], seconds, scratch, False, self.blame)]
        found = []
        for number in range(step.workers):
            out = scratch / f"{step.name}-{number}".replace(" ", "-")
            out.mkdir(exist_ok=True)
            so_far = self.out / f"{step.part}.json"
            if so_far.exists():  # what is done is not done again
                shutil.copyfile(so_far, out / so_far.name)
            arguments = [*self.arguments, *step.options, "--shard", f"{number}/{step.workers}"]
            found.append(Worker(step, out, arguments, seconds, scratch, True, self.blame))
        return found

    def _steps(self, steps: list[Step], scratch: Path) -> None:
        """Runs steps at the same time and says what came of each; what goes wrong in here costs these steps only."""
        began = time.monotonic()
        entries: list[dict[str, Any]] = [{"step": step.name, "ok": True} for step in steps]
        self.record += entries
        try:
            started: list[list[Worker]] = []
            for step, entry in zip(steps, entries, strict=True):
                reason = self._skipped(step)
                entry |= {"skipped": reason} if reason else {}
                started.append([] if reason else self._started(step, scratch))
            wait_for([worker for workers in started for worker in workers])
            for step, entry, workers in zip(steps, entries, started, strict=True):
                if workers:
                    self._conclude(step, entry, workers)
        except Exception as error:
            for entry in entries:
                entry |= {"ok": False, "deaths": [f"the conductor itself: {type(error).__name__}: {error}"[:300]]}
        for step, entry in zip(steps, entries, strict=True):
            entry["seconds"] = round(time.monotonic() - began, 1)
            print(self._line(step, entry), flush=True)
        self.save()

    def _skipped(self, step: Step) -> str | None:
        if self.left <= 0:
            return "the budget is spent"
        if "--dry-run" in self.arguments and (step.part == "sanitize" or "cuda" in step.options):
            return "it needs a GPU"
        return None

    def _conclude(self, step: Step, entry: dict[str, Any], workers: list[Worker]) -> None:
        if len(workers) > 1:
            merged(self.out / f"{step.part}.json", [worker.out / f"{step.part}.json" for worker in workers])
        deaths = [death for worker in workers for death in worker.deaths]
        entry["ok"] = not deaths and all(worker.code == 0 for worker in workers)
        entry |= {"deaths": deaths} if deaths else {}

    def _line(self, step: Step, entry: dict[str, Any]) -> str:
        path = self.out / f"{step.part}.json"
        content = {"points": {}, **(json.loads(path.read_text()) if path.exists() else {})}
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
        for rest in self.out.glob("*.partial"):  # of a process that was killed while it wrote
            rest.unlink(missing_ok=True)
        verdicts: dict[str, bool] = {}
        for entry, step in zip(self.record, self.steps, strict=False):
            verdicts[step.part] = verdicts.get(step.part, True) and entry["ok"]
        facts = {**self.facts, "ok": verdicts, "steps": self.record, "left_out": self.blame.left_out}
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
