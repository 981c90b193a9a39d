"""`taco-svd eval` as a person meets it: what is in its JSON, what it prints, what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
import types

import pytest
import torch

from taco_svd import TacoError, cli, evaluation_run
from taco_svd.checkpoint import DEFAULT_MODEL, load_model


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The demo model with a layer removed; its source is found in the package."""
    out = tmp_path_factory.mktemp("cli_eval") / "small"
    arguments = [
        "--layers",
        "1",
        "--method",
        "removal",
        "--samples",
        "2",
        "--seq-len",
        "8",
        "--out",
        str(out),
        "--json",
    ]
    cli.app(["compress", *arguments], standalone_mode=False)
    return out


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20)
    return path


def test_json_has_values_errors_versions_and_seed(small, text, invoke):
    code, stdout, _ = invoke("eval", small, "--text", text, "--window", "32", "--json")
    values = json.loads(stdout)
    assert code == 0
    assert values["text"] == "text.txt" and len(values["text_sha256"]) == 64 and values["seed"] == 0
    assert {"taco_kernels", "torch", "transformers", "python"} <= set(values["versions"])
    found = values["divergence"]
    assert found["against"] == DEFAULT_MODEL.name
    assert found["kl"] > 0 and found["kl_standard_error"] > 0 and found["tokens"] == values["tokens"]
    assert str(text.parent) not in json.dumps({key: values[key] for key in values if key != "model"})

    code, stdout, _ = invoke("eval", small, "--text", text, "--window", "32")
    assert code == 0 and "perplexity" in stdout and f"KL({DEFAULT_MODEL.name} || this)" in stdout


def test_divergence_can_be_left_out_or_taken_from_another_model(small, text, invoke):
    common = ("--text", text, "--window", "32", "--json")
    assert "divergence" not in json.loads(invoke("eval", small, *common, "--against", "none")[1])
    dense = json.loads(invoke("eval", DEFAULT_MODEL, *common)[1])
    assert "divergence" not in dense and "--against" in dense["divergence_missing"]
    same = json.loads(invoke("eval", DEFAULT_MODEL, *common, "--against", DEFAULT_MODEL)[1])
    assert same["divergence"]["kl"] == pytest.approx(0, abs=1e-6)
    code, _, stderr = invoke("eval", small, *common, "--against", small)
    assert code == 2 and "compressed model" in stderr


def test_models_of_other_vocabularies_are_refused_before_anything_is_measured(text, invoke, tmp_path, monkeypatch):
    model, tokenizer = load_model(DEFAULT_MODEL)
    model.resize_token_embeddings(model.config.vocab_size + 7)
    model.save_pretrained(tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    monkeypatch.setattr(evaluation_run, "perplexity", lambda *_, **__: pytest.fail("too early"))
    code, _, stderr = invoke("eval", DEFAULT_MODEL, "--text", text, "--window", "32", "--against", tmp_path / "more")
    assert code == 2 and "2,055 tokens and this model 2,048" in stderr


def test_a_dense_model_in_another_dtype_is_the_same_model(text, invoke, tmp_path):
    """Stored in float32, compressed in bfloat16, and both read in float32: one rounded, the other not."""
    model, tokenizer = load_model(DEFAULT_MODEL, "float32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding += 1e-4 * torch.randn(embedding.shape, generator=generator)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    small = tmp_path / "small"
    made = invoke("compress", tmp_path / "dense", "--dtype", "bfloat16", "--method", "removal", "--layers", "2",
                  "--samples", "2", "--seq-len", "16", "--out", small)  # fmt: skip
    assert made[0] == 0, made[2]
    for dtype in ("auto", "float32"):
        found = json.loads(invoke("eval", small, "--text", text, "--window", "32", "--dtype", dtype, "--json")[1])
        assert found["divergence"]["kl"] > 0


def test_a_compressed_model_knows_its_plan_where_its_name_is_no_directory(compressed_tiny, monkeypatch):
    """As of one from the hub, which is loaded by a name."""
    _, model, plan = compressed_tiny("llama", "removal")
    asked = []

    def source_path(plan, directory):
        asked.append((plan, directory))
        raise TacoError("Not here.")

    monkeypatch.setattr(evaluation_run, "source_path", source_path)
    assert evaluation_run._dense(model, "someone/model", None)[1].startswith("Not here.")
    assert asked == [(plan, "someone/model")]


def test_a_dense_model_that_is_not_found_is_told_without_json_too(small, text, invoke, tmp_path):
    moved = shutil.copytree(small, tmp_path / "moved")
    plan = json.loads((moved / "taco_plan.json").read_text())
    plan["source"]["name"] = "elsewhere"
    (moved / "taco_plan.json").write_text(json.dumps(plan))
    code, stdout, _ = invoke("eval", moved, "--text", text, "--window", "32")
    assert code == 0 and "perplexity" in stdout and "elsewhere" in stdout and "--against" in stdout
    assert "KL" not in invoke("eval", moved, "--text", text, "--window", "32", "--against", "none")[1]


def test_a_model_that_was_trained_on_has_its_perplexity(small, text, invoke, tmp_path):
    """Other embeddings than the dense model's: not compared with it unless that is asked for."""
    model, tokenizer = load_model(small)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    trained = tmp_path / "trained"
    model.save_pretrained(trained)
    tokenizer.save_pretrained(trained)
    common = ("--text", text, "--window", "32", "--json")
    found = json.loads(invoke("eval", trained, *common)[1])
    assert found["perplexity"] > 0 and "divergence" not in found
    assert "other token embeddings" in found["divergence_missing"] and "--against" in found["divergence_missing"]
    asked = json.loads(invoke("eval", trained, *common, "--against", DEFAULT_MODEL)[1])
    assert asked["divergence"]["kl"] > 0
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model.save_pretrained(trained)
    assert json.loads(invoke("eval", trained, *common)[1])["perplexity"] > 0
    code, _, stderr = invoke("eval", trained, *common, "--against", DEFAULT_MODEL)
    assert code == 2 and "other token embeddings" in stderr


@pytest.mark.parametrize(
    "name, path, joined",
    [("wikitext2", "Salesforce/wikitext", "a\n\nb"), ("ptb", "parquet", "a b"), ("c4", "allenai/c4", "a\n\nb")],
)
def test_named_corpora_are_fetched_by_datasets(name, path, joined, monkeypatch):
    """What `datasets` is asked for, without a network: the module is a stand-in."""
    from taco_svd.texts import corpus_text

    asked = []

    class Rows(list):
        def __getitem__(self, key):
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

        def take(self, count):
            return self[:count]

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        column = "sentence" if name == "ptb" else "text"
        return Rows([{column: "a"}, {column: "b"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert corpus_text(name, test=True) == joined
    arguments, options = asked[0]
    assert arguments[0] == path
    assert "test" in str(options) or "validation" in str(options)


def test_without_the_harness_tasks_are_refused_before_work(small, invoke, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for arguments in (("--tasks", "arc_easy"), ("--pairs", tmp_path / "pairs.jsonl")):
        code, stdout, stderr = invoke("eval", small, *arguments)
        assert code == 2 and "taco-kernels[eval]" in stderr and stdout == ""
