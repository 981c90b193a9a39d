"""The training example on a tiny text: it learns, what it saves loads, and wrong input gets one sentence."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_demo_model.py"
TINY = ["--layers", "2", "--hidden", "32", "--feed-forward", "48", "--vocabulary", "300", "--context", "32"]
TINY += ["--window", "24", "--batch", "8", "--validation", "0.1"]


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


example = load_example()


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"},
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with structure to learn: sentences from a small grammar."""
    draw = random.Random(7)
    subjects, verbs, objects = ("the cat", "a dog", "my hen"), ("sees", "hears", "wants"), ("rain", "corn", "us")
    lines = [f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(objects)}.\n" for _ in range(800)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def test_trains_saves_and_loads(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    done = run(text, "--out", out, "--steps", 60, "--json", *TINY)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    assert model.config.num_hidden_layers == 2
    assert len(tokenizer) == model.config.vocab_size <= 300
    # a model that had learnt nothing would be at the size of the vocabulary
    assert report["validation"]["perplexity"] < model.config.vocab_size / 10
    for sample in ("the cat sees rain.\n", "bytes it never saw: é 漢 \x00 🌮"):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    # the reported number is the saved model's own
    _, held_out = example.split_tail([text.read_text(encoding="utf-8")], 0.1)
    tokens = example.encode(tokenizer.backend_tokenizer, held_out)
    again = example.perplexity(model, tokens, 32)
    assert again.perplexity == pytest.approx(report["validation"]["perplexity"], rel=1e-6)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_same_seed_same_losses() -> None:
    recipe = example.Recipe(layers=1, hidden=16, feed_forward=16, heads=2, vocabulary=300, steps=5, batch=2, window=9)
    tokens = torch.randint(300, (200,))
    runs = []
    for _ in range(2):
        torch.manual_seed(recipe.seed)
        runs.append(example.train(example.make_model(recipe, 300), tokens, recipe))
    assert runs[0] == runs[1]


def test_learning_rate_rises_to_the_peak_and_falls_to_a_tenth() -> None:
    recipe = example.Recipe(steps=1000)
    rates = [example.learning_rate(step, recipe) for step in range(recipe.steps)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(recipe.learning_rate)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(recipe.learning_rate / 10, rel=1e-3)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_split_holds_out_the_tail(share: float) -> None:
    texts = ["abc", "defgh", "i", "jklmnopqr"]
    training, validation = example.split_tail(texts, share)
    assert "".join(training) + "".join(validation) == "".join(texts)
    held_out = len("".join(validation))
    assert held_out - 1 < share * len("".join(texts)) <= held_out
    assert all(training)
    assert all(validation)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden": 30}, "multiple of 2 x --heads"),
        ({"key_value_heads": 3}, "multiple of --key-value-heads"),
        ({"vocabulary": 256}, "--vocabulary must be above 256"),
        ({"window": 513}, "--window must be between"),
        ({"validation": 1.0}, "--validation"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
    ],
)
def test_refuses_a_recipe_that_cannot_work(change: dict[str, float], words: str) -> None:
    with pytest.raises(example.TacoError, match=words):
        example.Recipe(**change).check()


def test_refuses_bad_files(tmp_path: Path) -> None:
    with pytest.raises(example.TacoError, match="No such file: .*absent.txt"):
        example.read_texts([tmp_path / "absent.txt"])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(example.TacoError, match="is empty"):
        example.read_texts([tmp_path / "empty.txt"])
    (tmp_path / "binary.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(example.TacoError, match="not UTF-8 text \\(byte 2\\)"):
        example.read_texts([tmp_path / "binary.txt"])


def test_too_short_a_text_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    done = run(tmp_path / "short.txt", "--out", tmp_path / "model", *TINY)
    assert done.returncode == 2
    assert "error: The training part of the text has" in done.stderr
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["short.txt"]


def test_an_existing_output_is_refused_before_training(text: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("kept")
    done = run(text, "--out", tmp_path / "model", *TINY)
    assert done.returncode == 2
    assert "exists" in done.stderr
    assert (tmp_path / "model" / "mine.txt").read_text() == "kept"
