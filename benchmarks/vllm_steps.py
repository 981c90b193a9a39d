"""Time of vLLM's engine steps: a compressed model against the same model with those layers removed, step by step.

    python benchmarks/vllm_steps.py                           # four of 16 layers, hidden size 1024, two bridges
    python benchmarks/vllm_steps.py --dtype float32           # on CPUs that have no arithmetic in 16 bits
    python benchmarks/vllm_steps.py --shape tinyllama-1.1b

`vllm_serving.py` compares servers, whose rounds lie seconds apart and scatter by several percent. Here all engines live
in one process and take turns at every step, so the two times of a pair lie milliseconds apart and what disturbs one
disturbs the other. A step is what a server's engine does between two tokens: scheduling, the model, sampling, turning
ids into text. HTTP is left out, which costs both alike: an overhead here is that of requests per second, or more.

A batch is `--clients` requests of `--prompt` tokens that get `--tokens` each: one step of prefill, then decode steps.
First each engine's log-probabilities are checked against transformers; no ratio is printed where they are off. With
`--control` the removal model runs a second time (again) and through this project's plugin (plugin). On a CPU the
engines share the weights that they have in common (`vllm_shared_weights`); `--own-weights` leaves each its own copies.

Writes benchmarks/results/<cpu or gpu>/vllm-steps-<shape>-<method>.json. Needs vLLM (`make test-vllm` sets it up):
.venv-vllm/bin/python benchmarks/vllm_steps.py
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from vllm_serving import ROOT, add_model_options, check, described, prompts, summary, write_models
from vllm_shared_weights import SharedWeights

from taco_svd.bench import no_collections
from taco_svd.intervals import bootstrap
from taco_svd.latency import turns

# before vLLM is imported: the engine in this process, where its steps can be called one by one
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
PHASES = ("prefill", "decode", "requests")


class Engine:
    """A vLLM engine in this process, asked for one step at a time.

    Attributes:
        directory: the checkpoint that it serves.

    Args:
        engines: how many there will be in all, to share a GPU's memory.
    """

    def __init__(self, directory: Path, dtype: str, length: int, clients: int, engines: int) -> None:
        from vllm import LLM

        self.directory = directory
        self._llm = LLM(
            model=str(directory),
            dtype=dtype,
            max_model_len=length,
            max_num_seqs=clients,
            # the same prompts come again and again: without a cache of prefixes each is computed
            enable_prefix_caching=False,
            # a step's answer is then that of the step's own work
            async_scheduling=False,
            gpu_memory_utilization=0.8 / engines,
        )
        self._sent = 0

    def ask(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        """One completion in the form of the server's answer (`vllm_serving.check`)."""
        from vllm import SamplingParams

        options = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
        answer = self._llm.generate({"prompt_token_ids": prompt}, options, use_tqdm=False)[0].outputs[0]
        ids = list(answer.token_ids)
        chosen = [found[token].logprob for found, token in zip(answer.logprobs, ids, strict=True)]
        return {"token_ids": ids, "logprobs": {"token_logprobs": chosen}}

    def begin(self, asked: list[list[int]], tokens: int) -> None:
        """Hands the engine a batch of requests; nothing is computed yet."""
        from vllm import SamplingParams

        options = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for prompt in asked:
            self._sent += 1
            self._llm.llm_engine.add_request(str(self._sent), {"prompt_token_ids": prompt}, options)

    def busy(self) -> bool:
        return bool(self._llm.llm_engine.has_unfinished_requests())

    def step(self) -> float:
        """Seconds of one engine step."""
        start = time.perf_counter()
        self._llm.llm_engine.step()
        return time.perf_counter() - start


def one_batch(engines: dict[str, Engine], asked: list[list[int]], tokens: int, number: int) -> dict[str, list[float]]:
    """Seconds of every step of a batch, the engines taking turns, in the orders from `turns` number `number` on."""
    names = list(engines)
    times: dict[str, list[float]] = {name: [] for name in names}
    for engine in engines.values():
        engine.begin(asked, tokens)
    while any(engine.busy() for engine in engines.values()):
        for name in turns(names, number):
            if engines[name].busy():
                times[name].append(engines[name].step())
        number += 1
    # one step for the prompts, and one for every token after the first: anything else is no pair of like steps
    steps = {name: len(values) for name, values in times.items()}
    if set(steps.values()) != {tokens}:
        raise SystemExit(
            f"{tokens} steps were expected of each engine and these were taken: {steps}. Their times cannot be paired; "
            "take shorter prompts or fewer clients, so that one step holds all prompts."
        )
    return times


def measure(engines: dict[str, Engine], options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Engine -> phase -> seconds: each batch's prefill, its decode steps, and the whole of it."""
    found: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in engines}
    asked = prompts(options.clients, options.prompt)
    one_batch(engines, asked, options.tokens, 0)  # compiles, warms up
    end, number = time.monotonic() + options.seconds, 0
    while number < 2 or time.monotonic() < end:
        with no_collections():
            times = one_batch(engines, asked, options.tokens, number)
        for name, (prefill, *decode) in times.items():
            found[name]["prefill"].append(prefill)
            found[name]["decode"] += decode
            found[name]["requests"].append(prefill + sum(decode))
        number += 1
        print(f"batch {number}: " + ", ".join(f"{n} {v['requests'][-1]:.3f} s" for n, v in found.items()), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of what is computed")
    parser.add_argument("--clients", type=int, default=16, help="requests at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="generated per request")
    parser.add_argument("--seconds", type=float, default=300, help="of measuring")
    parser.add_argument("--control", action="store_true", help="runs the removal model in two more ways")
    parser.add_argument("--own-weights", action="store_true", help="no engine shares another's")
    parser.add_argument("--out", type=Path, help="default: see above")
    options = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = described("vllm_steps", device, options)
    with tempfile.TemporaryDirectory() as folder:
        directories, description = write_models(options, Path(folder))
        length = max(options.prompt + options.tokens + 1, 64)
        shares = device.type == "cpu" and not options.own_weights
        weights, engines = SharedWeights(), {}
        for name, directory in directories.items():
            with weights.engine() if shares else nullcontext():
                engines[name] = Engine(directory, options.dtype, length, options.clients, len(directories))
        dtype = getattr(torch, options.dtype)
        checks = {name: check(engine, prompts(4, options.prompt), 8, dtype) for name, engine in engines.items()}
    if shares:
        print(f"{weights.shared} of the {weights.layers} dense layers of all engines took another's weights")
    for name, found in checks.items():
        print(f"{name}: log-probabilities off by {found['difference']:.2g}, bound {found['bound']:.2g}")
    red = [name for name, found in checks.items() if not found["difference"] <= found["bound"]]
    result: dict[str, Any] = {
        **about,
        **description,
        "layers_of_shared_weights": weights.shared,
        "check": checks,
        "red": red,
    }
    if red:
        print(f"red: {', '.join(red)}; nothing was measured")
    else:
        times = measure(engines, options)
        yardstick = next(name for name in times if name != "compressed")
        result["seconds"] = {
            name: {phase: summary(values) for phase, values in phases.items()} for name, phases in times.items()
        }
        for name in [name for name in times if name != yardstick]:
            ratios = {phase: _overhead(times[name][phase], times[yardstick][phase]) for phase in PHASES}
            result["overhead" if name == "compressed" else f"control {name}"] = ratios
            for phase, ratio in ratios.items():
                interval = f"{ratio['low']:+.2%} to {ratio['high']:+.2%}"
                print(
                    f"{name} against {yardstick}, {phase}: {ratio['median']:+.2%} ({interval}, {ratio['pairs']} pairs)"
                )
    out = options.out or ROOT / "results" / device.type / f"vllm-steps-{options.shape}-{options.method}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out)
    return 1 if red else 0


def _overhead(ours: list[float], base: list[float]) -> dict[str, float]:
    """Ratio of the two of each pair, minus one: median and 95% interval."""
    ratio = bootstrap([one / other - 1 for one, other in zip(ours, base, strict=True)])
    return {**asdict(ratio), "pairs": len(ours)}


if __name__ == "__main__":
    raise SystemExit(main())
