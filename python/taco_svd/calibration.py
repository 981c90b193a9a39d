"""Calibration tokens: windows drawn with a seed from a text (`texts`), written by the model itself, or ready-made."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .bench_memory import cache_bytes
from .errors import TacoError
from .loss import NOTHING, counted_labels
from .mapped import is_mapped
from .texts import (
    Text,
    check_text_name,
    documents_text,
    named_for_completions,
    named_text,
    numbered,
    recorded_name,
)
from .wide_products import in_wide_products

# How types begin whose models read noise where a text has no begin-of-text token (lm-evaluation-harness adds it, too)
NEED_BEGIN_TOKEN = "gemma"
# Beyond this something else was meant: tokens of one run.
MAX_TOKENS = 1 << 31
# One window in eight, and at least one, is kept from the fits to judge them: the last ones.
HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class Calibration:
    """Calibration windows and where they came from.

    Attributes:
        tokens: int64 [samples, seq_len], on the CPU.
        source: ``"self"``, a corpus name, the file's name, ``"texts"`` (documents in memory) or ``"tokens"`` (ready).
        seed: seed of the draw.
        labels: int64 [samples, seq_len], where only some predictions count: the tokens that are to be predicted, -100
            elsewhere; the first of a window never counts. None: all.
        digest: SHA-256 of the tokens (and labels), so that a plan can tell whether it is applied to the same
            calibration.
    """

    tokens: torch.Tensor
    source: str
    seed: int
    labels: torch.Tensor | None = None

    def __post_init__(self) -> None:
        tokens = self.tokens
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or 0 in tokens.shape or tokens.shape[1] < 2:
            raise TacoError(
                "Calibration tokens must be a non-empty int64 tensor of shape [samples, seq_len], with at least two "
                f"tokens per window (one and the next); got {tokens.dtype} {list(tokens.shape)}."
            )
        labels = self.labels
        if labels is not None and not (
            labels.shape == tokens.shape
            and labels.dtype == torch.int64
            and bool(((labels == NOTHING) | (labels == tokens)).all())
        ):
            raise TacoError(
                "Calibration labels must be an int64 tensor of the tokens' shape, with the token or -100 everywhere."
            )
        if labels is not None:
            check_counted(labels)

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        digest.update(_bytes_of(self.tokens))
        if self.labels is not None:
            digest.update(b"labels" + _bytes_of(self.labels))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        samples, seq_len = self.tokens.shape
        counted = {} if self.labels is None else {"completions_only": True, "counted": counted_labels(self.labels)}
        return {
            "source": self.source,
            "samples": samples,
            "seq_len": seq_len,
            "tokens": samples * seq_len,
            **counted,
            "seed": self.seed,
            "sha256": self.digest,
        }


def _bytes_of(windows: torch.Tensor) -> bytes:
    return windows.cpu().to(torch.int64).contiguous().numpy().tobytes()


# What calibration is drawn from, see `load_calibration`.
CalibrationSource = str | Path | torch.Tensor | Iterable[Any] | Calibration


def text_config(model: PreTrainedModel) -> Any:
    """The config of what reads text: of a model that also sees, a part of its config."""
    return model.config.get_text_config(decoder=True)


def context_length(model: PreTrainedModel) -> int:
    """The longest window the model was made for (position embeddings), or 2048 where its config does not say."""
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(text_config(model), key, None)
        if isinstance(value, int) and value > 0:
            # RoBERTa's kind counts positions from behind its padding token's, whose row and those before it are none
            positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
            unused = getattr(positions, "padding_idx", None)
            return value - unused - 1 if isinstance(unused, int) and 0 <= unused < value - 2 else value
    return 2048


def embedding_weight(model: PreTrainedModel) -> torch.Tensor:
    """The input embedding: [vocabulary, hidden]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def check_vocabulary(tokens: torch.Tensor, model: PreTrainedModel) -> None:
    """Refuses tokens of a text that the model has no embedding for: its tokenizer is another model's.

    A tokenizer may know more tokens than a model has rows, if none of them occurs (pictures, padding that was added).

    Raises:
        TacoError: naming both numbers.
    """
    largest = int(unmarked(tokens)[0].max()) if tokens.numel() else -1
    rows = embedding_weight(model).shape[0]
    if largest >= rows:
        raise TacoError(
            f"The tokenizer does not fit the model: it finds token number {largest} in this text, the model has "
            f"{rows}. Pass the tokenizer that the model was trained with."
        )


def check_seed(seed: int) -> None:
    """Refuses seeds that do not fit in 64 bits.

    Raises:
        TacoError: a seed that random generators do not take.
    """
    if not -(1 << 63) <= seed < 1 << 63:
        raise TacoError(f"--seed must fit in 64 bits, got {str(seed)[:40]}.")


@torch.no_grad()
@in_wide_products
def check_activations(model: PreTrainedModel, calibration: Calibration) -> None:
    """Refuses a model that overflows on its calibration text, which would make every statistic NaN: one window forward.

    Models whose weights stay in their files are not run for this.

    Raises:
        TacoError: its logits are not finite.
    """
    if is_mapped(model):
        return
    device = embedding_weight(model).device
    logits = model(input_ids=calibration.tokens[:1].to(device), use_cache=False).logits
    if not bool(torch.isfinite(logits.sum(dtype=torch.float64))):
        raise TacoError(
            f"The model itself gives NaN or infinite logits on the calibration text in {model.dtype}: its activations "
            "leave the range of the dtype. Load it in bfloat16 or float32 (--dtype)."
        )


def needed_begin_token(model: PreTrainedModel) -> int | None:
    """The begin-of-text token of a model that reads nothing well without it (`NEED_BEGIN_TOKEN`), else None."""
    token = getattr(text_config(model), "bos_token_id", None)
    kind: str = getattr(model.config, "base_class", model.config).model_type  # a compressed model's: of its source
    return token if kind.startswith(NEED_BEGIN_TOKEN) and isinstance(token, int) else None


def begin_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int | None:
    """The token that each text begins with when the model is used, or None.

    It is the begin-of-text token that the tokenizer adds by itself, or the one that the model needs.
    """
    begun, bare = (tokenizer("a", add_special_tokens=added)["input_ids"][:1] for added in (True, False))
    return begun[0] if begun == [tokenizer.bos_token_id] != bare else needed_begin_token(model)


def begun_with(token: int | None, windows: torch.Tensor) -> torch.Tensor:
    """[count, length] -> [count, 1 + length], each behind the token; as they are without one."""
    return windows if token is None else functional.pad(windows, (1, 0), value=token)


def tokenize(
    text: str, tokenizer: PreTrainedTokenizerBase, completions: Sequence[tuple[int, int]] | None = None
) -> torch.Tensor:
    """All tokens of a text, without special tokens: int64 [tokens].

    Where `completions` (`texts.Text`) are given, a token that does not end inside one comes as its complement
    ``~token``, which is negative, so that it stays told apart however the tokens are cut; see `unmarked`. (One that
    begins before and ends inside is a word with the space that the prompt ended with: the model is to write it.)

    Raises:
        TacoError: completions are given, and the tokenizer cannot tell where its tokens begin.
    """
    if completions is None:
        # verbose=False: the warning that the text is longer than the context is no news here
        ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)
    if not tokenizer.is_fast:
        raise TacoError(
            f"--completions-only needs a tokenizer that tells where in the text its tokens begin (a fast one, with a "
            f"tokenizer.json); {type(tokenizer).__name__} does not."
        )
    found = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    tokens = torch.tensor(found["input_ids"], dtype=torch.int64)
    if not len(tokens) or not completions:
        return ~tokens
    last = torch.tensor([end - 1 for _, end in found["offset_mapping"]], dtype=torch.int64)
    starts, ends = torch.tensor(completions, dtype=torch.int64).T.contiguous()
    at = torch.searchsorted(starts, last, right=True) - 1
    inside = (at >= 0) & (last < ends[at.clamp(min=0)])
    return tokens.where(inside, ~tokens)


def unmarked(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels as in `Calibration`) of windows of what `tokenize` gives where it is told the completions."""
    return windows.where(windows >= 0, ~windows), windows.where(windows >= 0, NOTHING)


def held_out_count(samples: int) -> int:
    """How many of so many windows are kept from the fits; a single window cannot be split."""
    return max(1, samples // HELD_OUT_SHARE) if samples > 1 else 0


def random_windows(tokens: torch.Tensor, samples: int, seq_len: int, seed: int, source: str) -> torch.Tensor:
    """`samples` windows at random places, without overlap as long as the text has room: int64 [samples, seq_len].

    Of a shorter text the windows that are held out from the fits have the end to themselves: windows that share tokens
    with those that were fitted on could not judge anything.

    Raises:
        TacoError: when the text is shorter than one window.
    """
    if len(tokens) < seq_len:
        raise TacoError(
            f"{source} has {len(tokens)} tokens, less than one window of {seq_len}; pass a longer text or a smaller "
            "--seq-len."
        )
    generator = torch.Generator(device="cpu").manual_seed(seed)
    slots = len(tokens) // seq_len
    if slots >= samples:
        # slots shifted by one common random offset: no window overlaps another, every token can be drawn
        offset = int(torch.randint(len(tokens) - slots * seq_len + 1, (1,), generator=generator))
        starts = torch.randperm(slots, generator=generator, device="cpu")[:samples] * seq_len + offset
    else:
        held = held_out_count(samples) if slots > 1 else 0
        ours = len(tokens) - (max(1, slots // HELD_OUT_SHARE) * seq_len if held else 0)
        starts = torch.randint(ours - seq_len + 1, (samples - held,), generator=generator)
        if held:
            last = torch.randint(ours, len(tokens) - seq_len + 1, (held,), generator=generator)
            starts = torch.cat([starts, last])
    return torch.stack([tokens[start : start + seq_len] for start in starts.tolist()])


# Windows that a model writes side by side, and what their keys and values may take: those of 64 windows of 2048 tokens
# are 69 GB for Llama-2-7B. Not a share of what is free, for what is drawn depends on how many are written at once.
WRITTEN_AT_ONCE, WRITING_BYTES = 64, 4 << 30


@torch.no_grad()
@in_wide_products
def sample_from_model(
    model: PreTrainedModel,
    samples: int,
    seq_len: int,
    seed: int,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Text that the model itself writes, at temperature 1 from its begin-of-text token: int64 [samples, seq_len].

    Ends of text inside a window are kept and writing goes on, so every window is full. `batch_size` windows are written
    at once: by default as many as have keys and values of `WRITING_BYTES`, at most `WRITTEN_AT_ONCE`. What is drawn
    depends on it.

    Raises:
        TacoError: see `check_seed`; or the model's logits are not finite.
    """
    check_seed(seed)
    config = text_config(model)
    start = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    if isinstance(start, list):
        start = start[0]
    if start is None:
        start = 0
    if batch_size is None:
        batch_size = max(1, min(WRITTEN_AT_ONCE, WRITING_BYTES // cache_bytes(config, 1, seq_len, model.dtype)))
    device = next(model.parameters()).device
    generator = torch.Generator(device="cpu").manual_seed(seed)
    windows = []
    done = 0
    for first in range(0, samples, batch_size):
        rows = min(batch_size, samples - first)
        ids = torch.full((rows, 1), start, dtype=torch.int64, device=device)
        written = [ids]
        cache = None
        for position in range(seq_len - 1):
            output = model(input_ids=written[-1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            # drawn on the CPU so that a seed gives the same text on every device, up to rounding of the logits
            probabilities = torch.softmax(output.logits[:, -1].float().cpu(), dim=-1)
            if not bool(probabilities.isfinite().all()):
                raise TacoError(
                    "The model's logits are not finite as it writes its calibration text; its weights or activations "
                    "are beyond the range of its dtype. Load it in bfloat16 or float32 (--dtype)."
                )
            written.append(torch.multinomial(probabilities, 1, generator=generator).to(device))
            if progress is not None and position % 16 == 0:
                progress(done + rows * position // seq_len, samples)
        windows.append(torch.cat(written, dim=1).cpu())
        done += rows
        if progress is not None:
            progress(done, samples)
    return torch.cat(windows)


# Characters that surely hold one token; a text this much longer than what is drawn is not tokenised whole.
CHARACTERS_PER_TOKEN = 16
LONG_TEXT_FACTOR = 4


def text_windows(
    text: str | Text,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seed: int,
    source: str,
    begin: int | None = None,
) -> torch.Tensor:
    """`samples` random windows of a text: int64 [samples, seq_len], each behind the token `begin` where there is one.

    A long text is cut into as many excerpts as windows, at random places, and only those are tokenised: calibration
    on a 12 MB file takes a fraction of a second instead of many. Of a text with completions the windows are marked as
    `tokenize` does it.

    Raises:
        TacoError: when the text is shorter than one window.
    """
    text, completions = (text, None) if isinstance(text, str) else (text.text, text.completions)
    length = seq_len * CHARACTERS_PER_TOKEN
    wanted = seq_len - (begin is not None)
    slots = len(text) // length
    if slots >= LONG_TEXT_FACTOR * samples:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        windows = []
        for slot in torch.randperm(slots, generator=generator, device="cpu").tolist():
            # from the first word that begins inside the slot: a word cut in two is no text
            excerpt = text[slot * length : (slot + 1) * length].partition(" ")[2]
            ids = tokenize(excerpt, tokenizer, _inside(completions, (slot + 1) * length - len(excerpt), len(excerpt)))
            if len(ids) >= wanted:  # less only where the text is made of very long tokens
                windows.append(ids[:wanted])
            if len(windows) == samples:
                return begun_with(begin, torch.stack(windows))
    return begun_with(begin, random_windows(tokenize(text, tokenizer, completions), samples, wanted, seed, source))


def _inside(completions: Sequence[tuple[int, int]] | None, first: int, length: int) -> list[tuple[int, int]] | None:
    """The completions, ascending, of `length` characters of a text from `first` on, counted from there."""
    if completions is None:
        return None
    found = []
    for start, end in completions[bisect_right(completions, first, key=itemgetter(1)) :]:
        if start >= first + length:
            break
        found.append((max(0, start - first), min(length, end - first)))
    return found


ACCEPTED = (
    "calibration takes 'self', wikitext2, ptb, c4, the name of a text file, a list of texts or of rows (a "
    "datasets.Dataset is one) with text, messages, or prompt and completion, or whole numbers [samples, seq_len] (a "
    "tensor, an array, or a dict with input_ids)"
)


def recognised(source: Any) -> Any:
    """What calibration is to be drawn from, as one of: a `Calibration`, ready tokens, a name, rows.

    Args:
        source: these, or what stands for ready tokens: an array, or a dict with ``input_ids``, as tokenizers give it.

    Returns:
        `source`; an int64 tensor for ready tokens; rows have a length and can be read more than once.

    Raises:
        TacoError: anything else, no such file, or padded tokens.
    """
    if isinstance(source, (Calibration, torch.Tensor)):
        return source
    if isinstance(source, (str, Path)):
        check_text_name(source)
        return source
    if isinstance(source, Mapping) and "input_ids" in source:
        mask = source.get("attention_mask")
        if mask is not None and not bool((torch.as_tensor(mask) != 0).all()):
            raise TacoError("The calibration tokens are padded (attention_mask); pass windows that are full.")
        source = source["input_ids"]
        if isinstance(source, torch.Tensor):
            return source
        with suppress(ValueError):  # rows of unlike lengths
            source = np.asarray(source)
    if isinstance(source, np.ndarray) and source.dtype.kind in "iu":
        return torch.from_numpy(source.astype(np.int64))
    if isinstance(source, (bytes, Mapping, np.ndarray)) or not isinstance(source, Iterable):
        raise TacoError(f"{ACCEPTED}; got {_named(source)}.")
    if not isinstance(source, Sized):
        raise TacoError(
            f"{ACCEPTED}; {_named(source)} does not say how many rows it has: make a list of as many as are wanted."
        )
    first = next(iter(source), None)
    # what is no sequence but gives texts is a table or a set: its columns, or texts in no order
    if not isinstance(first, Mapping) and not (isinstance(first, str) and isinstance(source, Sequence)):
        raise TacoError(f"{ACCEPTED}; got {_named(source)} {'of ' + _named(first) if len(source) else 'of no rows'}.")
    return source


def _named(value: Any) -> str:
    keys = f" with {', '.join(map(repr, list(value)[:8]))[:200]}" if isinstance(value, Mapping) else ""
    return type(value).__name__ + keys


def check_tokens(tokens: torch.Tensor, model: PreTrainedModel) -> None:
    """Refuses ready tokens that are not the model's, or more than it reads at once.

    Raises:
        TacoError: wrong type or shape, outside the vocabulary, or longer than the context.
    """
    Calibration(tokens, "tokens", 0)
    rows, limit = embedding_weight(model).shape[0], context_length(model)
    if int(tokens.min()) < 0 or int(tokens.max()) >= rows:
        raise TacoError(f"Calibration tokens must lie in 0..{rows - 1}.")
    if tokens.shape[1] > limit:
        raise TacoError(
            f"Calibration tokens: windows of {tokens.shape[1]} are longer than the model's context of {limit} tokens."
        )


def load_calibration(
    source: CalibrationSource,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int = 64,
    seq_len: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    completions_only: bool = False,
) -> Calibration:
    """Calibration windows from ``"self"``, ``"wikitext2"``, ``"ptb"``, ``"c4"``, a file, documents, or ready tokens.

    Each window begins as texts do when the model is used: see `begin_token`.

    Args:
        source: what to draw from: a name as above; a text file or one of JSON lines (`texts.named_text`); a list of
            texts, or rows of a data set (`texts.documents_text`). An int64 tensor [samples, seq_len] is taken as it is,
            and so is what stands for one (`recognised`).
        samples, seq_len: number and length of windows; seq_len defaults to the model's context, at most 2048.
        completions_only: of conversations, and of prompts with completions, only what the model is to write counts:
            see `Calibration.labels`.

    Raises:
        TacoError: for each way in which that cannot be done.
    """
    given = recognised(source)
    check_completions_only(given, completions_only)
    if isinstance(given, torch.Tensor):
        given = Calibration(given.cpu(), "tokens", seed)
    if isinstance(given, Calibration):
        check_tokens(given.tokens, model)
        return given
    limit = context_length(model)
    check_seed(seed)
    if samples < 1:
        raise TacoError(f"--samples must be at least 1, got {samples}.")
    if seq_len is None:
        seq_len = min(limit, 2048)
    if seq_len < 2:
        raise TacoError(f"--seq-len must be at least 2 (a token and the one it predicts), got {seq_len}.")
    if seq_len > limit:
        raise TacoError(f"--seq-len {seq_len} is longer than the model's context of {limit} tokens.")
    if samples * seq_len > MAX_TOKENS:
        raise TacoError(
            f"--samples {samples} of {seq_len} tokens are {samples * seq_len:,} tokens; calibration takes at most "
            f"{MAX_TOKENS:,}."
        )
    named = isinstance(given, (str, Path))
    if named and str(given) == "self":
        return Calibration(sample_from_model(model, samples, seq_len, seed, progress=progress), "self", seed)
    if tokenizer is None:
        raise TacoError("Calibrating on text needs the model's tokenizer; pass it, or calibrate on 'self'.")
    if named:
        text, name = named_text(given, tokenizer, test=False, completions=completions_only), recorded_name(given)
    else:
        text, name = documents_text(numbered(given), tokenizer, "calibration", completions_only), "texts"
    begin = begin_token(tokenizer, model)
    windows, labels = text_windows(text, tokenizer, samples, seq_len, seed, name, begin), None
    if completions_only:
        windows, labels = unmarked(windows)
    check_vocabulary(windows, model)
    return Calibration(windows, name, seed, labels)


def check_completions_only(given: Any, completions_only: bool) -> None:
    """Refuses sources that do not say what a model is to write, before anything is loaded or run for them.

    Args:
        given: as `recognised` gives it.

    Raises:
        TacoError: naming what to give.
    """
    if not completions_only:
        return
    if isinstance(given, Calibration) and given.labels is not None:
        return
    if isinstance(given, (torch.Tensor, Calibration)):
        raise TacoError(
            "completions_only: ready tokens do not say which of them a model is to write; pass "
            "Calibration(tokens, source, seed, labels), with -100 where a token is not to be predicted."
        )
    if isinstance(given, (str, Path)):
        named_for_completions(given)


def check_counted(labels: torch.Tensor) -> None:
    """Refuses windows in which too little counts to judge by.

    Raises:
        TacoError: none of the windows that are held out from the fits, or none of the others, has a completion.
    """
    held = held_out_count(len(labels))
    parts = [part for part in (labels[: len(labels) - held], labels[len(labels) - held :]) if len(part)]
    if not all(counted_labels(part) for part in parts):
        raise TacoError(
            f"--completions-only: the {len(labels)} calibration windows of {labels.shape[1]} tokens hold too little of "
            "the completions; pass a longer text, more --samples or longer windows (--seq-len)."
        )
