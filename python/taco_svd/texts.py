"""Where texts come from: a text file, documents in JSON lines or in memory, or a corpus that `datasets` fetches.

A document is a text, or a conversation that the tokenizer's chat template makes a text of: what a model is to be good
at is often there as the data that it was tuned on. Files are read as lines that anybody may have written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import TacoError, first_line
from .untrusted import MAX_JSON_BYTES, check_regular, parse_json, printable

# Corpora that `datasets` knows how to fetch; (path, name, split, text column).
NAMED_CORPORA = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "train", "sentence"),
    "c4": ("allenai/c4", "en", "train", "text"),
}
NAMED_TEST_CORPORA = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence"),
    "c4": ("allenai/c4", "en", "validation", "text"),
}
# ptb's repository holds a loading script, which `datasets` no longer runs; the hub keeps converted files beside it
PTB_FILES = "hf://datasets/{path}@refs%2Fconvert%2Fparquet/{subset}/{split}/*.parquet"
# c4 is 800 GB: read only as much as calibration can use
C4_DOCUMENTS = 4096
# Beyond this something else was meant than one text.
MAX_TEXT_BYTES = 16 << 30
# How the names of files end that hold one JSON object per line.
LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
# No name of a file is longer.
LONGEST_NAME = 4096
ACCEPTED_KEYS = '"text", "messages" (a list of {"role": ..., "content": ...}), or "prompt" and "completion"'
READ_KEYS = ("text", "messages", "tools", "prompt", "completion")
EMPTY_LINE = "\n\n"


@dataclass(frozen=True)
class Text:
    """A text, and which parts of it a model is to write.

    Attributes:
        text: all documents, one after the other.
        completions: (start, end) in characters of each part that is an answer: the turns of an assistant, completions.
            None where the text has no such parts, or nobody asked.
    """

    text: str
    completions: tuple[tuple[int, int], ...] | None = None


def check_text_name(name: str | Path, completions: bool = False) -> None:
    """Refuses what is neither a file nor the name of a text, before a model is loaded or run for it.

    Args:
        completions: it must also say which parts of it are completions (`named_for_completions`).

    Raises:
        TacoError: naming what there is.
    """
    text = str(name)
    if text == "self" or text in NAMED_CORPORA:
        pass
    elif os.path.exists(text):
        check_regular(Path(text), "text file")
    elif "\n" in text or len(text) > LONGEST_NAME:
        raise TacoError(
            f"{text[:40]!r}... is a text itself; the name of a file with it is expected (in Python, also a list of "
            "texts: [text])."
        )
    else:
        raise TacoError(f"No such text file: {text} (known texts without a file: self, {', '.join(NAMED_CORPORA)}).")
    if completions:
        named_for_completions(name)


def recorded_name(source: str | Path) -> str:
    """What records call a text: a corpus by its name, a file without its author's directories, printable."""
    return str(source) if str(source) in ("self", *NAMED_CORPORA) else printable(Path(source).name)


def named_text(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, *, test: bool, completions: bool = False
) -> Text:
    """The text of a corpus in `NAMED_CORPORA` or of a file.

    Args:
        source: a name; or a UTF-8 file, of which one whose name ends in .jsonl (.ndjson, .json) holds documents, see
            `documents_text`.
        tokenizer: for the documents that are conversations.
        test: the part of a corpus for evaluation, instead of the one for calibration.
        completions: which parts are completions is asked for.

    Raises:
        TacoError: see `corpus_text`, `read_text`, `documents_text`; or a text without completions where they are asked
            for.
    """
    check_text_name(source, completions)
    if str(source) in NAMED_CORPORA:
        return Text(corpus_text(str(source), test=test))
    text = read_text(source)
    if Path(source).suffix.lower() not in LINES_SUFFIXES:
        return Text(text)
    return documents_text(_parsed_lines(text, str(source)), tokenizer, str(source), completions)


def named_for_completions(source: str | Path) -> None:
    """Refuses names of texts that do not say which parts of them a model is to write.

    Raises:
        TacoError: naming what does.
    """
    if Path(source).suffix.lower() not in LINES_SUFFIXES:
        raise TacoError(
            f"--completions-only: {source} is plain text, which does not say what a model is to write; give a .jsonl "
            'file with "messages", or "prompt" and "completion" (or --no-completions-only, where a plan asks for it).'
        )


def read_text(path: str | Path) -> str:
    """A UTF-8 text file.

    Raises:
        TacoError: no such file, no regular file, too large for memory, not UTF-8, or empty.
    """
    path = Path(path)
    check_regular(path, "text file")
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise TacoError(
                f"{path} has {size / 1e9:.0f} GB; pass a part of it (at most {MAX_TEXT_BYTES / 1e9:.0f} GB)."
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TacoError(f"{path} is not UTF-8 text (byte {error.start}); convert it with iconv first.") from error
    except OSError as error:
        raise TacoError(f"{path} cannot be read: {error.strerror}.") from error
    if not text.strip():
        raise TacoError(f"{path} is empty.")
    return text


def corpus_text(name: str, *, test: bool) -> str:
    """The text of a named corpus, fetched by `datasets` (the extra ``taco-kernels[eval]``).

    Raises:
        TacoError: when `datasets` is not installed or the corpus cannot be reached.
    """
    path, subset, split, column = (NAMED_TEST_CORPORA if test else NAMED_CORPORA)[name]
    try:
        import datasets
    except ImportError as error:
        raise TacoError(
            f"{name} is fetched with the `datasets` package, which is not installed: "
            "pip install 'taco-kernels[eval]', or pass a text file."
        ) from error
    try:
        if name == "c4":
            stream = datasets.load_dataset(path, subset, split=split, streaming=True)
            rows = [row[column] for row in stream.take(C4_DOCUMENTS)]
        elif name == "ptb":
            files = PTB_FILES.format(path=path, subset=subset, split=split)
            rows = list(datasets.load_dataset("parquet", data_files=files, split="train")[column])
        else:
            rows = list(datasets.load_dataset(path, subset, split=split)[column])
    except Exception as error:  # datasets raises a wide family of network and format errors
        raise TacoError(f"{name} could not be fetched ({type(error).__name__}: {error}); pass a text file.") from error
    # papers join ptb's sentences by spaces, documents of the others by empty lines
    return (" " if name == "ptb" else EMPTY_LINE).join(rows)


# -- documents ---------------------------------------------------------------------------------------------------


def _parsed_lines(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """(what to call it, its value) of each line that is not empty."""
    # by newlines alone: JSON may hold the other separators that `splitlines` cuts at
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        if len(line) > MAX_JSON_BYTES:
            raise TacoError(f"{place} has {len(line) / 1e6:.0f} MB; write one document per line.")
        try:
            # what is only tokenised may hold any character, and exported tables hold NaN where there is nothing
            value = parse_json(line, place, constants=True, controls=True)
        except TacoError as error:
            raise TacoError(f"{str(error).rstrip('.')}; each line must be one object with {ACCEPTED_KEYS}.") from error
        if isinstance(value, list):
            raise TacoError(f"{place} is a list; write one object per line: jq -c '.[]' LIST.json > FILE.jsonl.")
        yield place, value


def numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """(what to call it, row) of the rows of a data set, or texts, in memory."""
    return ((f"calibration, row {number}", row) for number, row in enumerate(rows))


def rows_digest(rows: Iterable[Any]) -> str:
    """SHA-256 of what is read of rows in memory, to tell one calibration from another."""
    digest = hashlib.sha256()
    for row in rows:
        read = {key: row.get(key) for key in READ_KEYS} if isinstance(row, Mapping) else row
        digest.update(json.dumps(read, skipkeys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def documents_text(
    rows: Iterable[tuple[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str, completions: bool = False
) -> Text:
    """One text of all documents.

    Plain ones stand apart by an empty line, as those of corpora do. Conversations follow each other as the template
    ends them: its marks are all that a model has seen between two turns.

    Args:
        rows: (what to call it in messages, document). A document is a str, or a dict with one of
            ``text``: a str;
            ``messages``: a list of dicts with ``role`` and ``content``, for the tokenizer's chat template (with
            ``tools`` beside it, where there are any);
            ``prompt`` and ``completion``: both a str, or both such lists.
        name: of all of them.
        completions: which parts are completions is asked for: what an assistant says, or ``completion``.

    Raises:
        TacoError: a document is none of these, the tokenizer has no chat template or it refuses the messages, there
            is nothing but white space, or too much; where completions are asked for, a plain text, a template that does
            not tell which they are, or none in all documents.
    """
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    size, after_chat = 0, False
    begin = tokenizer.bos_token if isinstance(tokenizer.bos_token, str) else ""
    for place, row in rows:
        text, chat, inside = _document(row, tokenizer, place, completions)
        # templates, and texts that one was applied to, begin with what the windows will begin with anyway
        without = text.removeprefix(begin)
        if pieces and not (chat and after_chat):
            pieces.append(EMPTY_LINE)
            size += len(EMPTY_LINE)
        cut = len(text) - len(without)
        spans += [(size + max(0, start - cut), size + end - cut) for start, end in inside if end > cut]
        pieces.append(without)
        size, after_chat = size + len(without), chat
        if size > MAX_TEXT_BYTES:
            raise TacoError(f"{name} has more than {MAX_TEXT_BYTES / 1e9:.0f} GB of text; pass a part of it.")
    whole = "".join(pieces)
    if not whole.strip():
        raise TacoError(f"{name} is empty.")
    if completions and not spans:
        raise TacoError(
            f'{name}: --completions-only, and nothing in it is a completion: no turn with the role "assistant" follows '
            "another one."
        )
    return Text(whole, tuple(spans) if completions else None)


def _document(
    row: Any, tokenizer: PreTrainedTokenizerBase, place: str, completions: bool
) -> tuple[str, bool, list[tuple[int, int]]]:
    """(text, whether a chat template made it, its completions where they are asked for) of one document."""
    found = {key: value for key, value in row.items() if value is not None} if isinstance(row, Mapping) else {}
    text, prompt, completion = (found.get(key) for key in ("text", "prompt", "completion"))
    plain = row if isinstance(row, str) else text if isinstance(text, str) else None
    if plain is not None:
        if completions:
            raise TacoError(
                f'{place} is plain text: --completions-only takes "messages", or "prompt" and "completion", in every '
                "document."
            )
        return _sound(plain, place), False, []
    turns: Any = None
    first = 0
    if "text" not in found and _are_messages(found.get("messages")):
        turns = found["messages"]
    elif not {"text", "messages"} & set(found):
        if isinstance(prompt, str) and isinstance(completion, str):
            whole = _sound(prompt + completion, place)
            return whole, False, [(len(prompt), len(whole))] if completion else []
        if _are_messages(prompt) and _are_messages(completion):
            turns, first = [*found["prompt"], *found["completion"]], len(found["prompt"])
    if turns is not None:
        made = _templated(turns, found.get("tools"), tokenizer, place)
        spans = _answers(turns, first, made, found.get("tools"), tokenizer, place) if completions else []
        return made, True, spans
    what = f"a value of type {type(row).__name__}"
    if isinstance(row, Mapping):
        what = f"an object with {', '.join(map(repr, list(row)[:8])) or 'no keys'}"
    raise TacoError(f"{place}: expected {ACCEPTED_KEYS}, with texts in them, found {what[:200]}.")


# Beyond this a conversation is none: each answer is looked for by applying the template to all turns before it.
MOST_TURNS = 512


def _answers(
    turns: list[Any], first: int, text: str, tools: Any, tokenizer: PreTrainedTokenizerBase, place: str
) -> list[tuple[int, int]]:
    """(start, end) in `text` of what the assistant says in the turns from `first` on, with the mark that ends it.

    Found as a server and its model would take turns: an answer begins where the turns before it, and the template's
    request for an answer, end. What nobody has asked for, because no turn is before it, is no answer. White space
    behind the mark belongs to the template.
    """

    def by_template(some: list[Any], asking: bool = False) -> str:
        return _templated(some, tools, tokenizer, place, asking)

    if len(turns) > MOST_TURNS:
        raise TacoError(f"{place} has {len(turns)} turns; --completions-only takes at most {MOST_TURNS} in a document.")
    spans = []
    for number in range(max(first, 1), len(turns)):
        turn = turns[number]
        if turn["role"] != "assistant":
            continue
        asked = by_template(turns[:number], asking=True)
        content = (turn.get("content") or "").strip()
        end = _end_of_answer(by_template, turns[: number + 1], text, len(asked), content, tokenizer.eos_token)
        if end is None or not text.startswith(asked) or content not in text[len(asked) : end]:
            raise TacoError(
                f"{place}: the tokenizer's chat template does not tell which part of the text is the assistant's: the "
                f"first {number + 1} turns alone read otherwise than the whole begins, or without what the assistant "
                'says. Give the documents as "prompt" and "completion", two texts, for --completions-only.'
            )
        spans.append((len(asked), end))
    return spans


def _end_of_answer(
    by_template: Callable[[list[Any]], str], turns: list[Any], text: str, start: int, content: str, mark: Any
) -> int | None:
    """Where the answer that is the last of `turns` ends in `text`, of these turns and perhaps more; None: not found.

    Args:
        by_template: what the template makes of some turns.
        start, content: where the answer begins in `text`, and what it says.
        mark: the tokenizer's end-of-text token, where it has one.
    """
    said = by_template(turns)
    shorter = said.rstrip().removesuffix(mark) if isinstance(mark, str) and mark else said
    if shorter != said and shorter.strip():
        # a mark that ends the whole text, not the answer: it is gone where another turn follows
        with suppress(TacoError):
            more = by_template([*turns, {"role": "user", "content": "?"}])
            if not more.startswith(said.rstrip()) and more.startswith(shorter.rstrip()):
                said = shorter
    if text.startswith(said.rstrip()):
        return max(start, len(said.rstrip()))
    # A template that writes the last answer otherwise than earlier ones: the words, and the mark behind them.
    at, last = text.find(content, start), said.rfind(content)
    ending = said[last + len(content) :].rstrip()
    if content and at >= 0 and last >= 0 and text.startswith(ending, at + len(content)):
        return at + len(content) + len(ending)
    return None


def _are_messages(value: Any) -> bool:
    """Turns of a conversation; only one that calls tools may have nothing to say."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(
            isinstance(turn, Mapping)
            and isinstance(turn.get("role"), str)
            and (isinstance(turn.get("content"), str) or (turn.get("content") is None and turn.get("tool_calls")))
            for turn in value
        )
    )


def _templated(messages: Any, tools: Any, tokenizer: PreTrainedTokenizerBase, place: str, asking: bool = False) -> str:
    """A conversation as the model was tuned on it; `asking` for an answer, up to where that begins."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise TacoError(
            f"{place} holds messages, and the tokenizer has no chat template to make a text of them; set its "
            'chat_template, use the tokenizer of a model tuned for conversations, or give the documents as "text".'
        )
    # data sets fill up what single turns lack, and templates ask whether it is there
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
    tools = list(tools) if isinstance(tools, (list, tuple)) and tools else None
    try:
        text = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=asking)
    except Exception as error:  # a template is a program of its own
        first = first_line(error)[:200]
        raise TacoError(
            f"{place}: the tokenizer's chat template does not take these messages ({type(error).__name__}: {first!r})."
        ) from error
    if not isinstance(text, str):
        raise TacoError(f"{place}: the tokenizer's chat template made no text of these messages.")
    return _sound(text, place)


def _sound(text: str, place: str) -> str:
    """Raises TacoError for half characters, which tokenizers do not take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TacoError(f"{place} holds half of a character (an unpaired surrogate); write it as UTF-8.") from error
    return text
