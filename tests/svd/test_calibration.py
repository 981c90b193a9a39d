"""Calibration: reproducible windows, and a sentence for every text that cannot give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import taco_svd.calibration
from taco_svd import TacoError
from taco_svd.bench_memory import cache_bytes
from taco_svd.calibration import (
    context_length,
    load_calibration,
    needed_begin_token,
    random_windows,
    sample_from_model,
)
from taco_svd.sequential import held_out_windows

from .tiny_models import VOCABULARY, tiny_model


def tokenizer(size: int = VOCABULARY, begin: int | None = None, end: int | None = None) -> PreTrainedTokenizerFast:
    """One token per word: "w0", "w1" ...; `begin` and `end` are special tokens that are put around every text."""
    special = {number: f"<{number}>" for number in (begin, end) if number is not None}
    words = models.WordLevel({special.get(index, f"w{index}"): index for index in range(size)}, unk_token="w0")
    made = Tokenizer(words)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        template = [special.get(begin, ""), "$A", special.get(end, "")]
        made.post_processor = processors.TemplateProcessing(
            single=" ".join(template).strip(), special_tokens=[(word, number) for number, word in special.items()]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=special.get(begin), eos_token=special.get(end))


def test_self_sampling_is_reproducible_and_full() -> None:
    model = tiny_model("llama")
    first, again, other = (sample_from_model(model, 5, 20, seed, batch_size=2) for seed in (3, 3, 4))
    assert first.shape == (5, 20) and first.dtype == torch.int64
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert bool((first[:, 0] == model.config.bos_token_id).all())
    assert int(first.min()) >= 0 and int(first.max()) < VOCABULARY
    assert len({tuple(row) for row in first.tolist()}) == 5


def test_few_windows_are_written_at_once_where_their_keys_and_values_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    one = cache_bytes(model.config, 1, 20, model.dtype)
    rows = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for room, expected in ((2 * one + one // 2, {2, 1}), (one // 2, {1}), (100 * one, {5})):
        monkeypatch.setattr(taco_svd.calibration, "WRITING_BYTES", room)
        rows.clear()
        assert sample_from_model(model, 5, 20, 3).shape == (5, 20)
        assert set(rows) == expected
    handle.remove()


def test_windows_come_from_the_text_without_overlap(tmp_path: Path) -> None:
    numbers = [3 + index % 90 for index in range(200)]
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in numbers))
    one, again, other = (
        load_calibration(tmp_path / "text.txt", tiny_model("llama"), tokenizer(), 6, 16, seed) for seed in (1, 1, 2)
    )
    assert one.tokens.shape == (6, 16) and one.source == "text.txt"
    assert one.digest == again.digest != other.digest
    for row in one.tokens.tolist():
        assert any(numbers[start : start + 16] == row for start in range(185))
    places = random_windows(torch.arange(200), 12, 16, 5, "counting")
    assert len(places.unique()) == 12 * 16


@pytest.mark.parametrize(
    ("kind", "made", "begin"),
    [
        ("llama", tokenizer(), None),
        ("llama", tokenizer(begin=1), 1),
        ("llama", tokenizer(begin=1, end=2), 1),
        ("llama", tokenizer(end=2), None),
        ("gemma2", tokenizer(), 1),  # its models read nothing well without
        ("gemma3", tokenizer(begin=1), 1),
    ],
)
@pytest.mark.parametrize("words", [200, 20_000])  # whole, and long enough that excerpts are drawn
def test_windows_begin_as_texts_do_when_the_model_is_used(
    kind: str, made: PreTrainedTokenizerFast, begin: int | None, words: int, tmp_path: Path
) -> None:
    numbers = [3 + index % 90 for index in range(words)]
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in numbers))
    tokens = load_calibration(tmp_path / "text.txt", tiny_model(kind), made, 6, 16).tokens
    assert tokens.shape == (6, 16)
    of_text = tokens if begin is None else tokens[:, 1:]
    assert begin is None or bool((tokens[:, 0] == begin).all())
    for row in of_text.tolist():
        assert row == [3 + (row[0] - 3 + index) % 90 for index in range(len(row))]


@pytest.mark.parametrize("length", [32, 47, 200, 1023])
@pytest.mark.parametrize("seed", range(5))
def test_held_out_windows_of_a_short_text_share_no_token_with_the_others(length: int, seed: int) -> None:
    windows = random_windows(torch.arange(length), 64, 16, seed, "counting")
    assert windows.shape == (64, 16) and torch.equal(windows, windows[:, :1] + torch.arange(16))
    held = held_out_windows(windows)
    assert len(held) == 8 and not set(held.flatten().tolist()) & set(windows[:-8].flatten().tolist())


def test_a_text_of_one_window_is_used_as_it_is() -> None:
    assert torch.equal(random_windows(torch.arange(16), 8, 16, 0, "counting"), torch.arange(16).repeat(8, 1))


@pytest.mark.parametrize(
    "content, says",
    [(None, "No such"), (b"", "empty"), (b" \n", "empty"), (b"w1 \xff\xfe", "UTF-8"), (b"w1 w2 w3", "token")],
)
def test_unusable_files_are_named(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TacoError, match=says):
        load_calibration(path, tiny_model("llama"), tokenizer(), 4, 16)
    with pytest.raises(TacoError, match="directory"):
        load_calibration(tmp_path, tiny_model("llama"), tokenizer(), 4, 16)


def test_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(f"w{VOCABULARY} " * 100)
    with pytest.raises(TacoError, match=f"finds token number {VOCABULARY} in this text, the model has {VOCABULARY}"):
        load_calibration(tmp_path / "other.txt", tiny_model("llama"), tokenizer(VOCABULARY + 1), 4, 16)
    # tokens that no text has (pictures, padding) may be more than a model has rows
    (tmp_path / "text.txt").write_text("w1 " * 100)
    load_calibration(tmp_path / "text.txt", tiny_model("llama"), tokenizer(VOCABULARY + 1), 4, 16)
    with pytest.raises(TacoError, match="needs the model's tokenizer"):
        load_calibration(tmp_path / "text.txt", tiny_model("llama"), None, 4, 16)


@pytest.mark.parametrize(
    "arguments, says",
    [({"samples": 0}, "--samples"), ({"seq_len": 1}, "at least 2"), ({"seq_len": 65}, "context of 64")],
)
def test_wrong_sizes_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(TacoError, match=says):
        load_calibration("self", tiny_model("llama"), None, **arguments)


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(2, 5),
        torch.zeros(0, 5, dtype=torch.int64),
        torch.full((2, 5), VOCABULARY),
        torch.full((2, 5), -1),
    ],
)
def test_wrong_tokens_are_refused(tokens: torch.Tensor) -> None:
    with pytest.raises(TacoError, match="Calibration tokens"):
        load_calibration(tokens, tiny_model("llama"), None)


def test_a_model_beyond_its_dtypes_range_cannot_write() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("inf")
    with pytest.raises(TacoError, match="as it writes its calibration text"):
        sample_from_model(model, 2, 8, 0)


def test_a_context_is_what_positions_there_are() -> None:
    """RoBERTa's begin behind the padding token's."""
    config = transformers.RobertaConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20, pad_token_id=1, is_decoder=True,
    )  # fmt: skip
    model = transformers.RobertaForCausalLM(config).eval()
    assert context_length(model) == 18
    model(torch.full((1, 18), 7))
    assert context_length(tiny_model("gpt2")) == tiny_model("gpt2").config.n_positions
    mpt = transformers.MptConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=96, max_seq_len=24)
    assert context_length(transformers.MptForCausalLM(mpt)) == 24


def test_a_model_that_also_sees_reads_as_its_text_config_says() -> None:
    common = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    text = {
        **common, "vocab_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": 48, "bos_token_id": 2,
    }  # fmt: skip
    vision = {**common, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    assert needed_begin_token(model) == 2 and context_length(model) == 48
    assert sample_from_model(model, 2, 6, 0).shape == (2, 6)
