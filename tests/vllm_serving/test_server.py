"""The OpenAI-compatible server on loopback, asked by many at once; and vLLM without the plugin."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here; `make test-vllm` sets it up and runs this", allow_module_level=True)

from .engine import Answer, agreement, prompts
from .random_checkpoints import write_checkpoint

CLIENTS = 16
TOKENS = 16
LOAD_IT = """
import sys
from vllm import LLM
if __name__ == "__main__":
    LLM(model=sys.argv[1], max_model_len=64, enforce_eager=True, skip_tokenizer_init=True)
"""


@contextlib.contextmanager
def server(directory: Path, log: Path) -> Iterator[int]:
    """`vllm serve` of a directory; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("vllm_command.py")), "serve", str(directory)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "small"]
    command += ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", str(CLIENTS), "--enforce-eager"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            time.sleep(0.5)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_many_clients_at_once_get_what_transformers_says(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    directory = compressed("taco")
    asked = prompts(2 * CLIENTS, 2048)
    answers: dict[int, Answer] = {}
    failures: list[BaseException] = []

    def client(index: int, port: int, together: threading.Barrier) -> None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
            together.wait(60)
            for number in (index, index + CLIENTS):
                body = {
                    "model": "small",
                    "prompt": asked[number],
                    "max_tokens": TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                    "logprobs": 0,
                    "return_token_ids": True,
                }
                connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                response = connection.getresponse()
                text = response.read()
                assert response.status == 200, text[:500]
                choice = json.loads(text)["choices"][0]
                answers[number] = Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"])
        except BaseException as error:
            failures.append(error)

    with server(directory, tmp_path / "log") as port:
        together = threading.Barrier(CLIENTS)
        threads = [threading.Thread(target=client, args=(index, port, together)) for index in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # and in words, for what a chat program would send
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        body = json.dumps({"model": "small", "prompt": "It was a dark night", "max_tokens": 8})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().read())["choices"][0]["text"]
    assert not failures, failures[0]
    share, worst = agreement(directory, asked, [answers[number] for number in range(len(asked))], tie=1e-4)
    assert share == 1.0 and worst < 1e-4


def loading_fails(directory: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", LOAD_IT, str(directory)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert result.returncode != 0
    return result.stdout + result.stderr


def test_without_the_plugin_vllm_refuses(compressed: Callable[[str], Path]) -> None:
    assert "model type `taco_svd`" in loading_fails(compressed("taco"), VLLM_PLUGINS="")


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    """vLLM itself would not notice: other maps of the same fused layer are there."""
    directory = write_checkpoint("llama", tmp_path / "llama")
    file = directory / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.self_attn.k_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    said = loading_fails(directory)
    assert "1 weights are missing" in said and "layers.0.self_attn.k_proj" in said
