"""lm-evaluation-harness on compressed checkpoints: minimal pairs against plain sums of log-probabilities."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from taco_svd import TacoError, compress
from taco_svd.checkpoint import DEFAULT_MODEL, load_model
from taco_svd.harness import PAIRS_TASK, TASKS, read_pairs, run_tasks

from .tiny_models import tiny_model

PAIRS = [
    {"UID": "order", "sentence_good": "He went to the house.", "sentence_bad": "House the to went he."},
    {"UID": "order", "sentence_good": "She was very glad of it.", "sentence_bad": "Glad it was of very she."},
    {"UID": "agreement", "sentence_good": "The men were here.", "sentence_bad": "The men was here."},
    {"UID": "agreement", "sentence_good": "Xq zv kk.", "sentence_bad": "The day was fine."},
    {"sentence_good": "Ünïcode, 'quotes' and {{braces}}.", "sentence_bad": "{{braces}} 'quotes' Ünïcode and,."},
]


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(pair) for pair in PAIRS) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "no minimal pairs"),
        ('{"sentence_good": "a"}', "line 1"),
        ('{"sentence_good": "a", "sentence_bad": "b"}\n[1]', "line 2"),
        ('{"sentence_good": "a", "sentence_bad": 3}', "must be texts"),
        ("not json", "line 1"),
    ],
)
def test_damaged_pairs_are_refused(tmp_path, content, says):
    (tmp_path / "pairs.jsonl").write_text(content)
    with pytest.raises(TacoError, match=says):
        read_pairs(tmp_path / "pairs.jsonl")
    for nothing in (None, tmp_path / "missing.jsonl"):
        with pytest.raises(TacoError):
            read_pairs(nothing)


def test_task_files_are_package_data():
    assert (TASKS / "minimal_pairs.py").is_file() and (TASKS / f"{PAIRS_TASK}.yaml").is_file()


def needs_harness():
    pytest.importorskip(
        "lm_eval", reason="needs lm-evaluation-harness, the extra taco-kernels[eval]", exc_type=ImportError
    )


@torch.no_grad()
def log_likelihood(model, tokenizer, sentence: str) -> float:
    ids = torch.tensor([[model.config.eos_token_id, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]])
    scores = model(ids).logits[0, :-1].double().log_softmax(-1)
    return float(scores.gather(1, ids[0, 1:, None]).sum())


def test_the_harness_agrees_with_plain_log_likelihoods(pairs_file):
    needs_harness()
    model, tokenizer = load_model(DEFAULT_MODEL, "float32")
    plain = [
        log_likelihood(model, tokenizer, pair["sentence_good"]) > log_likelihood(model, tokenizer, pair["sentence_bad"])
        for pair in PAIRS
    ]
    assert True in plain and False in plain
    values = run_tasks(model, tokenizer, [], pairs_file, batch=2)
    assert values["correct"] == plain
    accuracy = values["tasks"][PAIRS_TASK]["acc"]
    assert accuracy["value"] == pytest.approx(sum(plain) / len(plain))
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert values["phenomena"]["agreement"] == {"value": sum(plain[2:4]) / 2, "count": 2}
    assert set(values["phenomena"]) == {"", "agreement", "order"}
    assert {"lm_eval", "datasets"} <= set(values["versions"]) and values["seed"] == 0


@pytest.mark.parametrize("kind, begins", [("gemma3", True), ("llama", False)])
def test_models_that_need_a_begin_token_get_one(kind, begins, pairs_file, monkeypatch):
    """Compressed ones too, whose type the harness does not know: it would add none."""
    needs_harness()
    from lm_eval.models import huggingface

    seen = {}

    class Enough(Exception):
        pass

    def made(**options):
        seen.update(options)
        raise Enough

    monkeypatch.setattr(huggingface, "HFLM", made)
    compressed, _ = compress(tiny_model(kind), method="bridge", layers=1, calibration=torch.randint(3, 90, (8, 16)))
    with pytest.raises(Enough):
        run_tasks(compressed, object(), [], pairs_file)
    assert seen.get("add_bos_token", False) is begins


def test_a_model_without_tokenizer_is_refused(pairs_file):
    needs_harness()
    with pytest.raises(TacoError, match="tokenizer"):
        run_tasks(load_model(DEFAULT_MODEL)[0], None, [], pairs_file)


@pytest.mark.slow  # the harness reads its thousands of task files first
def test_the_harness_command_line_loads_a_compressed_checkpoint(pairs_file, tmp_path):
    """One import is all that it takes: `python -m taco_svd.lm_eval`, offline."""
    needs_harness()
    from taco_svd import compress, save_compressed

    model, tokenizer = load_model(DEFAULT_MODEL)
    windows = torch.ones((1, 4), dtype=torch.int64)
    small, plan = compress(model, tokenizer, method="removal", layers=[5], calibration=windows)
    save_compressed(small, plan, tmp_path / "small", tokenizer)
    arguments = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'small'}", "--device", "cpu"]
    arguments += ["--tasks", PAIRS_TASK, "--metadata", json.dumps({"pairs": str(pairs_file)})]
    done = subprocess.run(
        [sys.executable, "-m", "taco_svd.lm_eval", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert PAIRS_TASK in done.stdout and "acc" in done.stdout


def test_pairs_are_lines_whatever_else_their_sentences_hold(tmp_path):
    sentence = "one\u2028two\u0085three"
    line = json.dumps({"sentence_good": sentence, "sentence_bad": "x"}, ensure_ascii=False)
    (tmp_path / "pairs.jsonl").write_text(f"\ufeff{line}\r\n\n{line}\n", encoding="utf-8")
    assert [pair["sentence_good"] for pair in read_pairs(tmp_path / "pairs.jsonl")] == [sentence] * 2
