"""Peak memory of `taco_svd.compress` above the loaded model, at the shape of a 1.1 B parameter model in bfloat16.

A model of random weights is built in a process of its own, whose resident set is read by the kernel's own peak counter:
reset when the model is there, read when `compress` has returned. The compressed model, which shares the untouched
layers, is part of what is counted. Targets: under 35% of the model's bytes.

`taco-build` carries out a plan that keeps 80% of every map of all layers but the first, without the loss curves that
would make a plan.

Usage: python benchmarks/compress_memory.py [--methods taco,paper] [--out benchmarks/results/cpu/compress-memory.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

TARGET = 0.35
# TinyLlama-1.1B; `--small` is for a look at the benchmark itself
SHAPES = {
    "1.1B": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "small": {
        "vocab_size": 4000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}


def status(key: str) -> int:
    """A line of /proc/self/status in bytes (VmRSS, VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def child(shape: str, depth: int, method: str, samples: int, seq_len: int, layers: list[int]) -> dict[str, Any]:
    import torch
    import transformers
    from origin import origin

    from taco_svd import compress
    from taco_svd.calibration import Calibration
    from taco_svd.memory import release
    from taco_svd.options import CompressionOptions
    from taco_svd.planning import make_plan
    from taco_svd.taco import GRADIENT_DAMPING, INPUT_DAMPING

    made_with = origin()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[shape] | {"num_hidden_layers": depth}, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokens = torch.randint(3, config.vocab_size, (samples, seq_len))
    with torch.no_grad():
        model(tokens[:1, :8])  # what torch allocates once is not ours
    plan = None
    if method == "taco-build":
        layers = list(range(1, depth))
        plan = make_plan(
            model,
            Calibration(tokens, "tokens", 0),
            CompressionOptions(method="svd", layers=layers, compression_ratio=0.8),
        )
        options = {"input_damping": INPUT_DAMPING, "gradient_damping": GRADIENT_DAMPING, "consistency": True}
        plan = dataclasses.replace(plan, method="taco", options=options)
    release()  # what was freed, and compress would give back, is not ours either
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = status("VmRSS")
    steps: list[dict[str, Any]] = []

    class Steps:
        """Remembers the highest resident set of every step, sampled."""

        def step(self, name: str) -> Any:
            from contextlib import contextmanager

            @contextmanager
            def run() -> Any:
                peak, running, start = [0], [True], time.perf_counter()

                def sample() -> None:
                    while running[0]:
                        peak[0] = max(peak[0], status("VmRSS"))
                        time.sleep(0.01)

                thread = threading.Thread(target=sample, daemon=True)
                thread.start()
                try:
                    yield lambda done, total: None
                finally:
                    running[0] = False
                    thread.join()
                    steps.append(
                        {
                            "step": name,
                            "seconds": time.perf_counter() - start,
                            "peak_share": (peak[0] - before) / size,
                            "after_share": (status("VmRSS") - before) / size,
                        }
                    )

            return run()

    start = time.perf_counter()
    name, _, how = method.partition("-")
    arguments = {"plan": plan} if plan else {"method": name, "layers": layers, "one_shot": how == "one-shot"}
    _, plan = compress(model, calibration=tokens, progress=Steps(), **arguments)
    return {
        "method": method,
        "shape": shape,
        "model_bytes": size,
        "resident_before": before,
        "peak_above": status("VmHWM") - before,
        "share": (status("VmHWM") - before) / size,
        "kept_share_of_parameters": plan.result["share"],
        "seconds": time.perf_counter() - start,
        "samples": samples,
        "seq_len": seq_len,
        "layers": layers,
        "depth": depth,
        "threads": torch.get_num_threads(),
        **made_with,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", choices=SHAPES)
    parser.add_argument("--methods", default="taco,paper-one-shot,bridge")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--depth", type=int, help="only so many layers: for a look at one method in minutes")
    parser.add_argument("--layers", default="", help="which layers, e.g. 16,17; default: four in the upper half")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    depth = arguments.depth or SHAPES[arguments.shape]["num_hidden_layers"]
    layers = [int(part) for part in arguments.layers.split(",") if part] or [depth * k // 8 for k in (4, 5, 6, 7)]
    if arguments.child:
        row = child(arguments.shape, depth, arguments.child, arguments.samples, arguments.seq_len, layers)
        print(json.dumps(row))
        return
    rows = []
    for method in arguments.methods.split(","):
        command = [sys.executable, __file__, "--child", method, "--shape", arguments.shape]
        command += ["--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len)]
        command += ["--layers", ",".join(map(str, layers)), "--depth", str(depth)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-4000:])
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        verdict = "meets" if row["share"] < TARGET else "MISSES"
        print(
            f"{row['method']:16} {row['peak_above'] / 1e6:7.0f} MB above a model of {row['model_bytes'] / 1e6:.0f} MB: "
            f"{row['share']:.1%} ({verdict} {TARGET:.0%}), {row['seconds']:.0f} s",
            flush=True,
        )
        for step in row["steps"]:
            print(
                f"    {step['peak_share']:6.1%} peak {step['after_share']:6.1%} after {step['seconds']:6.1f} s  "
                f"{step['step']}"
            )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"target": TARGET, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
