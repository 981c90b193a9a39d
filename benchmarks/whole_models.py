"""The table of whole models: what bridges cost over bare removal, and what factors cost against the dense model.

Each row is one `taco-svd bench --shape ...` in a process of its own (memory of the last model is gone), in the order of
what it tells; rows that this machine has measured already are left out. Nothing else may run meanwhile.

    python benchmarks/whole_models.py --budget-seconds 1500      # ends between rows
    python benchmarks/whole_models.py --report                   # prints the tables again
    python benchmarks/whole_models.py --docs --out benchmarks/results/cpu-zen4   # ... writes them into the docs
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from taco_kernels.env import build_digest
from taco_svd.bench import LEAST_ROUNDS
from taco_svd.bench_report import interval_text, stand_in_note
from taco_svd.device_costs import cpu_identity
from taco_svd.devices import device_name
from taco_svd.plan import versions

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).resolve().parent.parent / "docs" / "deployment.md"
BEGIN, END = "<!-- whole-models:begin -->", "<!-- whole-models:end -->"
TARGET_OVERHEAD, TARGET_OVER_IDEAL = 0.003, 0.05


def rows(seconds: float) -> dict[str, list[str]]:
    """Row name -> arguments of `taco-svd bench`; `seconds` limits one comparison of the smallest shape."""
    table: dict[str, list[str]] = {}
    small, middle, large = (str(round(factor * seconds)) for factor in (1, 2.5, 5))
    bridge = ["--method", "bridge", "--share", "0.25", "--against", "removal", "--prompt", "512", "--decode", "32"]
    factors = ["--keep", "0.8", "--against", "dense", "--precision", "0.0015", "--prompt", "128", "--decode", "16"]
    for shape, limit in (("tinyllama-1.1b", small), ("llama-3.2-3b", middle), ("llama-2-7b", large)):
        # both phases in one process: building 7 B weights and measuring what bridges cost takes minutes
        table[f"{shape}-bridge"] = ["--shape", shape, *bridge, "--phase", "decode,prefill", "--seconds", limit]
        if shape == "tinyllama-1.1b":
            batches = ["--phase", "decode", "--batch", "8,64", "--seconds", limit]
            table[f"{shape}-bridge-batches"] = ["--shape", shape, *bridge, *batches]
            for method in ("taco", "paper"):
                arguments = ["--shape", shape, "--method", method, *factors, "--seconds", str(round(seconds / 3))]
                table[f"{shape}-{method}-decode"] = [*arguments, "--phase", "decode", "--batch", "1,8,64"]
                table[f"{shape}-{method}-prefill"] = [*arguments, "--phase", "prefill", "--batch", "1,8"]
                if method == "taco":
                    int8 = [*arguments, "--int8", "--phase", "decode,prefill", "--batch", "1,8"]
                    table[f"{shape}-{method}-8-bit"] = int8
    for method in ("taco", "paper"):
        table[f"llama-3.2-3b-{method}-decode"] = [
            *("--shape", "llama-3.2-3b", "--method", method, *factors, "--phase", "decode", "--batch", "1,8"),
            *("--seconds", str(round(seconds / 2))),
        ]
    # one thread is steadier on a shared machine: the row, with its control, that resolves a third of a percent
    table["tinyllama-1.1b-one-thread"] = [
        *("--shape", "tinyllama-1.1b", *bridge, "--phase", "decode", "--seconds", large, "--control", "--threads", "1")
    ]
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="limit of a comparison of the smallest shape")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="starts no row after so long")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--restart", action="store_true", help="measures again what is there")
    parser.add_argument("--report", action="store_true", help="prints what is there, measures nothing")
    parser.add_argument("--docs", action="store_true", help="--report, and writes the tables into docs/deployment.md")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder; default results/cpu or results/gpu")
    arguments = parser.parse_args()
    folder: Path = arguments.out or RESULTS / ("cpu" if arguments.device == "cpu" else "gpu")
    folder.mkdir(parents=True, exist_ok=True)
    began, failed = time.monotonic(), 0
    wanted = {} if arguments.report or arguments.docs else rows(arguments.seconds)
    for name, command in wanted.items():
        path = folder / f"whole-model-{name}.json"
        if arguments.only not in name or (not arguments.restart and is_current(path, command, arguments.device)):
            continue
        if time.monotonic() - began > arguments.budget_seconds:
            print(f"{name}: left for another call")
            continue
        print(f"{name}: taco-svd bench {' '.join(command)}", flush=True)
        start = time.monotonic()
        partial = path.with_suffix(".partial")  # the last whole result stays until there is another
        saved = ["--device", arguments.device, "--save", str(partial), *mode_of(arguments.device)]
        made = made_by(command, arguments.device)  # before the run: sources may be edited while it lasts
        done = subprocess.run([sys.executable, "-m", "taco_svd", "bench", *command, *saved], stdout=subprocess.DEVNULL)
        problem = f"exit code {done.returncode}" if done.returncode else ""
        if not problem and made_by(command, arguments.device) != made:
            problem = "not kept: what it was made by has changed while it ran; leave the sources alone and run it again"
        if not problem:
            stamp(partial, made)
            partial.replace(path)
        failed += bool(problem)
        print(f"  {time.monotonic() - start:.0f} s" + f", {problem}" * bool(problem))
    print(report(folder))
    if arguments.docs:
        write_docs(report(folder), DOCS)
    return 1 if failed else 0


def mode_of(device: str) -> list[str]:
    """On a GPU eager decoding waits for Python, a hundred launches a layer, and would compare that."""
    return [] if device == "cpu" else ["--mode", "graph"]


def threads_of(command: list[str]) -> int:
    """How many a row's command runs with."""
    return int(command[command.index("--threads") + 1]) if "--threads" in command else torch.get_num_threads()


def whole_result(path: Path) -> dict[str, Any] | None:
    """What a file holds, or None where it is not there, damaged, or of a run that was stopped."""
    try:
        result = json.loads(path.read_text())
        return result if result["complete"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def made_by(command: list[str], device: str) -> dict[str, Any]:
    """What a result depends on, as it is now: it counts while this is what it was made by."""
    installed = versions()
    return {
        "arguments": command,
        "device": device_name(torch.device(device)),
        "cpu": cpu_identity(),
        "threads": threads_of(command),
        "build": build_now(),
        "torch": installed["torch"],
        "transformers": installed["transformers"],
    }


def build_now() -> str:
    """The build that a process started now would run: `build_digest` remembers that of its first call."""
    return build_digest.__wrapped__()


def stamp(path: Path, made: dict[str, Any]) -> None:
    """Writes into a result what it was made by."""
    path.write_text(json.dumps({**json.loads(path.read_text()), "made_by": made}, indent=2) + "\n")


def is_current(path: Path, command: list[str], device: str) -> bool:
    """Whether a result is there, of these arguments, this machine and what is installed on it."""
    result = whole_result(path)
    return result is not None and result.get("made_by") == made_by(command, device)


def report(folder: Path) -> str:
    """Both tables in markdown, of what is in the folder."""
    overhead = [
        "| shape | phase | batch | threads | bridges | removal | whole latencies (95%) | rounds "
        "| bridges on against off (95%) | rounds | inside the bridges (95%) | predicted | <= 0.3% |"
    ]
    overhead += ["|" + "---|" * 13]
    factors = [
        "| shape | method | phase | batch | threads | dense | against dense (95%) | bytes or operations | within 5% |"
    ]
    factors += ["|" + "---|" * 9]
    found = {path.name: whole_result(path) for path in sorted(folder.glob("whole-model-*.json"))}
    read = [result for result in found.values() if result is not None]
    unusable = [name for name, result in found.items() if result is None]
    for result in read:
        for row in result["results"]:
            for pair, compared in row["comparisons"].items():
                line = _overhead_row if pair.endswith("/removal") else _factor_row
                (overhead if pair.endswith("/removal") else factors).append(line(result, row, pair, compared))
    machine = sorted({f"{r['device']}, torch {r['versions']['torch']}, {r['dtype']}" for r in read})
    left_out = f" Left out, since damaged or incomplete: {', '.join(unusable)}." if unusable else ""
    notes = f"Measured on {'; '.join(machine)}.{stand_in_note(*read)}{left_out}"
    return "\n".join([*overhead, "", *factors, "", notes])


def write_docs(tables: str, path: Path, begin: str = BEGIN, end: str = END) -> None:
    """Puts the tables between the markers of a document."""
    before, rest = path.read_text().split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n{tables}\n{end}{after}")


def _overhead_row(result: dict[str, Any], row: dict[str, Any], pair: str, compared: dict[str, Any]) -> str:
    bridges = result["structure"]["bridges"]
    what = "removal again" if pair.startswith("control") else f"{len(bridges)} of rank {bridges[0]['rank']}"
    predicted = result.get("cost_budget", {}).get("predicted_overhead", {}).get(row["phase"])
    shown = "-" if predicted is None or pair.startswith("control") or row["batch"] != 1 else f"{predicted:.2%}"
    # the same difference, and the clock that runs where it arises tells it best
    windows = compared.get("windows")
    ratio, rounds = (windows, windows["rounds"]) if windows else (compared["overhead"], compared["rounds"])
    # an interval of a few rounds is narrow by chance
    judged = not pair.startswith("control") and rounds >= LEAST_ROUNDS
    met = "-" if not judged else "yes" if ratio["high"] <= TARGET_OVERHEAD else "no"
    added = f"{interval_text(windows)} | {rounds}" if windows else "- | -"
    if "windows_control" in compared:
        added = f"{interval_text(windows)}; off against off {interval_text(compared['windows_control'])} | {rounds}"
    inside = interval_text(compared["bridges"]) if "bridges" in compared else "-"
    milliseconds = row["models"]["removal"]["seconds"]["p50"] * 1e3
    return (
        f"| {result['shape']} | {row['phase']} {row['prompt']} | {row['batch']} | {result['threads']} | {what} "
        f"| {milliseconds:.1f} ms "
        f"| {interval_text(compared['overhead'])} | {compared['rounds']} ({compared['stopped']}) | {added} | {inside} "
        f"| {shown} | {met} |"
    )


def _factor_row(result: dict[str, Any], row: dict[str, Any], pair: str, compared: dict[str, Any]) -> str:
    share = compared.get("bytes") or compared["flops"]
    ratio = compared["overhead"]
    met = "yes" if ratio["high"] < 0 and 1 + ratio["median"] <= (1 + TARGET_OVER_IDEAL) * share else "no"
    milliseconds = row["models"]["dense"]["seconds"]["p50"] * 1e3
    method = result["method"] + (", 8-bit" if result["structure"].get("int8") else "")
    return (
        f"| {result['shape']} | {method} | {row['phase']} | {row['batch']} | {result['threads']} "
        f"| {milliseconds:.1f} ms "
        f"| {interval_text(ratio)} | {share - 1:+.1%} | {met} |"
    )


if __name__ == "__main__":
    sys.exit(main())
