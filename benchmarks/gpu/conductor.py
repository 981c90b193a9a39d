"""Runs the parts of the GPU suite, each in processes of its own: what crashes or hangs costs its point, not the rest.

The most telling comes first, and no step takes more than its share of the time. A process that dies is started again
and goes on behind the point that it died at, which is noted as failed. A version or backend whose call hung, or killed
process after process, is left out from then on, so that what is wrong with one does not keep the others from being
measured: a grid-wide barrier that never opens would otherwise take the time of every point. A configuration that ends
its process while it is tuned is left out of that point.
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

from .store import RUNNING, all_checked, blame, failed, forget_failed, same_run, what_ran, write_json

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
# Parts whose results are in `suite.json`, so that a machine that gives few files back has room for others.
FOLDED = ("build", "sanitize", "svd")


def warm(part: str, share: float, workers: int, *options: str) -> Step:
    """Compiles ahead what ``part`` times. It has no points, and nothing of it is missed that is cut short."""
    return Step("warm", share, ("--only", part, *options), workers, stall=FOREVER, grace=0.0, beside_next=True)


def plan(workers: int, quick: bool = True) -> list[Step]:
    """In the order of what a first run on a GPU must tell: whether our CUDA kernels are right, then how fast.

    ``quick`` tunes what prefill runs alone, so decode is timed before; else the backends for decode are chosen with
    what was tuned.
    """
    some = max(1, workers // 2)  # beside checks, which compile as well
    decode = Step("bench", 0.3, ("--rows", "decode"), stall=VERSION_STALL_SECONDS)
    checks = [
        Step("sanitize", 0.2, stall=FOREVER, beside_next=True),
        Step("check", 0.3, ("--only", "triton", "--only", "cpp", "--only", "library"), workers),
    ]
    tune = [Step("tune", 0.2, stall=VERSION_STALL_SECONDS), Step("check", 0.1, ("--only", "tuned"), workers)]
    warm_tune = warm("tune", 0.25, some if quick else workers)
    return [
        Step("build", 0.5, stall=FOREVER),
        *([] if quick else [warm_tune]),
        warm("bench", 0.25, workers, "--rows", "decode"),
        Step("check", 0.2, ("--only", "cuda", "--only", "cuda dependent"), stall=SHORT_STALL_SECONDS),
        *([] if quick else tune),
        decode,
        *([warm_tune] if quick else []),
        warm("bench", 0.25, some, "--rows", "prefill"),
        *checks,
        *(tune if quick else []),
        Step("bench", 0.3, ("--rows", "prefill"), stall=VERSION_STALL_SECONDS),
        Step("svd", 0.15, stall=LONG_STALL_SECONDS),
    ]


def belongs(step: Step, parts: list[str]) -> bool:
    """Whether a step is to run where these parts are."""
    if step.part == "warm":
        return step.options[1] in parts
    return step.part in parts and (step.options != ("--only", "tuned") or "tune" in parts)


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
        # the point, without that version
        again = not ends and not late and bool(version) and part in ("bench", "tune")
        if again and left_out is None:
            self.deaths[-1] += "; it is left out of this point"
        if key and path.exists():
            content = json.loads(path.read_text())
            if again:
                blame(content, key, version, reason)
            elif not failed(content["points"].get(key, {})):
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


def merged(target: Path, parts: list[Path], codes: list[int | None]) -> None:
    """Adds the points of processes that shared a step to the part's file.

    ``codes`` are those that they ended with; of one that did not come to its end (None) nobody knows what it has left.
    """
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
    left_of = {**content.get("left_of", {}), **left}
    ended = None not in codes
    # Not counted as done is then whatever these processes shared.
    content["left_of"] = {name: count for name, count in left_of.items() if ended or name not in left}
    content["left"] = sum(content["left_of"].values())
    content["complete"] = ended and all_checked(content["left_of"], content.get("backends", []))
    write_json(target, content)


class Conductor:
    """A run of the suite.

    Args:
        out: folder of the result files, which exists.
        parts: those that are to run.
        arguments: options that every process is handed.
        facts: of the machine and what runs on it (see ``store.identity``), for `suite.json`.
        workers: processes that share what is not timed.
        began: by `time.monotonic`, when the budget began to run.
    """

    def __init__(
        self, out: Path, parts: list[str], arguments: list[str], seconds: float, facts: dict[str, Any], workers: int,
        began: float,
    ) -> None:  # fmt: skip
        self.out, self.arguments, self.seconds, self.facts = out, arguments, seconds, facts
        self.started = began
        self.steps = [step for step in plan(workers, "--quick" in arguments) if belongs(step, parts)]
        self.record: list[dict[str, Any]] = []
        self.blame = Blame()
        self.folded: dict[str, Any] = {}  # results of parts that are over, by part

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def run(self) -> bool:
        """All steps; whether nothing was wrong."""
        with tempfile.TemporaryDirectory(prefix="taco-gpu-suite-", ignore_cleanup_errors=True) as folder:
            scratch = Path(folder)
            together: list[Step] = []
            for number, step in enumerate(self.steps):
                together.append(step)
                behind = self.steps[number + 1 :]
                if step.beside_next and behind and behind[0].part not in TIMED:
                    continue
                self._steps(together, scratch)
                together = []
        return all(entry["ok"] for entry in self.record)

    def _started(self, step: Step, scratch: Path) -> list[Worker]:
        seconds = max(0.0, min(step.share * self.seconds, self.left))
        if step.workers == 1:
            return [Worker(step, self.out, [*self.arguments, *step.options], seconds, scratch, False, self.blame)]
        found = []
        for number in range(step.workers):
            out = self.out  # where ``warm`` reads what is done; it writes nothing
            if step.part != "warm":
                out = scratch / f"{step.name}-{number}".replace(" ", "-")
                out.mkdir(exist_ok=True)
                for part in (step.part, "tune"):  # what is done already, and what is to be checked once it is tuned
                    so_far = self.out / f"{part}.json"
                    if so_far.exists():
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
        if "--dry-run" in self.arguments and (step.part in ("sanitize", "warm") or "cuda" in step.options):
            return "it needs a GPU"
        return "all of it is done" if self._done(step) else None

    def _done(self, step: Step) -> bool:
        """Whether a former run has left nothing of a step (``prepare`` has taken out what is to be tried again)."""
        ran = {one.part for one, entry in zip(self.steps, self.record, strict=False) if "skipped" not in entry}
        if step.part == "build" or ("tuned" in step.options and "tune" in ran):
            return False  # a bare machine has no extension, and no check has seen what was tuned just now
        names = [option for option in step.options if not option.startswith("--")]
        path = self.out / f"{names.pop(0) if step.part == 'warm' else step.part}.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        if not content or not same_run(content, self.facts):
            return False
        if not names:
            return bool(content.get("complete"))
        usable, left_of = content.get("backends"), content.get("left_of", {})
        asked = [name for name in names if usable is None or name.partition(" ")[0] in (*usable, "tuned")]
        return bool(asked) and all(left_of.get(name, 1) == 0 for name in asked)

    def _conclude(self, step: Step, entry: dict[str, Any], workers: list[Worker]) -> None:
        codes = [worker.code for worker in workers]
        if step.part == "warm":  # whatever fails there fails again, and is noted, where it is measured
            entry |= {"cut_short": True} if None in codes else {}
            return
        if len(workers) > 1:
            merged(self.out / f"{step.part}.json", [worker.out / f"{step.part}.json" for worker in workers], codes)
        deaths = [death for worker in workers for death in worker.deaths]
        entry["ok"] = not deaths and all(code == 0 for code in codes)
        entry |= {"deaths": deaths} if deaths else {}

    def _line(self, step: Step, entry: dict[str, Any]) -> str:
        path = self.out / f"{step.part}.json"
        content = {"points": {}, **(json.loads(path.read_text()) if path.exists() else {})}
        wrong = {key: point for key, point in content["points"].items() if failed(point)}
        said = f"{len(content['points'])} points, {len(wrong)} wrong, {content.get('left', 0)} left"
        if step.part == "warm":
            said = "cut short" if "cut_short" in entry else "compiled ahead"
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
        """Writes `suite.json`, and moves the results of ``FOLDED`` parts that are over into it."""
        for rest in self.out.glob("*.partial"):  # of a process that was killed while it wrote
            rest.unlink(missing_ok=True)
        verdicts: dict[str, bool] = {}
        for entry, step in zip(self.record, self.steps, strict=False):
            if step.part != "warm":
                verdicts[step.part] = verdicts.get(step.part, True) and entry["ok"]
        ahead = {step.part for step in self.steps[len(self.record) :]}
        over = [path for part in FOLDED if part not in ahead and (path := self.out / f"{part}.json").exists()]
        self.folded |= {path.stem: json.loads(path.read_text()) for path in over}
        facts = {**self.facts, "ok": verdicts, "steps": self.record, "left_out": self.blame.left_out}
        facts |= {"seconds": round(time.monotonic() - self.started, 1), "parts": self.folded}
        write_json(self.out / "suite.json", facts)
        for path in over:
            path.unlink()


def prepare(out: Path, parts: list[str], resume: bool) -> None:
    """Makes the folder of results: of parts that are to run nothing stays, or with ``resume`` all but what failed."""
    out.mkdir(parents=True, exist_ok=True)
    suite = out / "suite.json"
    former = json.loads(suite.read_text()).get("parts", {}) if suite.exists() else {}
    for part in FOLDED:  # each has a file of its own while it runs
        if part in former and not (out / f"{part}.json").exists():
            write_json(out / f"{part}.json", former[part])
    for part in parts:
        path = out / f"{part}.json"
        if path.exists() and resume:
            forget_failed(path)
        elif path.exists():
            path.unlink()
