"""What `import taco_svd` adds to importing torch and transformers, and what a first call costs after loading.

Fresh processes, by turns; medians. Writes results/cpu/import.json. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OUT = Path(__file__).parent / "results" / "cpu" / "import.json"

IMPORT = """
import time, torch, transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
start = time.perf_counter()
import taco_svd
print(time.perf_counter() - start)
"""

FIRST_CALL = """
import sys, time, torch, taco_svd
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(16)[None]
times = []
with torch.inference_mode():
    for _ in range(4):
        start = time.perf_counter()
        model(ids)
        times.append(time.perf_counter() - start)
print(times[0] - min(times[1:]))
"""


def seconds(code: str, *arguments: str) -> float:
    """What a fresh process prints last."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=5)
    count = parser.parse_args().processes
    import torch
    from origin import origin

    from taco_svd.checkpoint import DEFAULT_MODEL
    from taco_svd.devices import device_name

    made_with = origin()
    with tempfile.TemporaryDirectory() as folder:
        small = str(Path(folder) / "small")
        command = ["compress", "--out", small, "--layers", "4", "--samples", "4", "--seq-len", "64"]
        subprocess.run([sys.executable, "-m", "taco_svd", *command], check=True, capture_output=True)
        times: dict[str, list[float]] = {"import": [], "first_call_dense": [], "first_call_compressed": []}
        for _ in range(count):
            times["import"].append(seconds(IMPORT))
            times["first_call_dense"].append(seconds(FIRST_CALL, str(DEFAULT_MODEL)))
            times["first_call_compressed"].append(seconds(FIRST_CALL, small))
    medians = {name: statistics.median(values) for name, values in times.items()}
    added = medians["first_call_compressed"] - medians["first_call_dense"]
    result = {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        **made_with,
        "processes": count,
        "seconds": {name: {"median": medians[name], "all": values} for name, values in times.items()},
        "first_call_added": added,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"import taco_svd after torch and transformers: {medians['import']:.3f} s (target 0.3 s)")
    print(f"first call after loading, over a dense model's first call: {added:+.3f} s (target 1 s)")


if __name__ == "__main__":
    main()
