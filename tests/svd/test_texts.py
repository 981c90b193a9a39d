"""Texts: documents from files of JSON lines and from memory, and a sentence for everything that is no document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import taco_svd
from taco_svd import Plan, TacoError
from taco_svd.calibration import Calibration, load_calibration, recognised, tokenize
from taco_svd.evaluation_run import evaluation_tokens
from taco_svd.healing import HealingOptions
from taco_svd.healing_files import healing_windows
from taco_svd.texts import ACCEPTED_KEYS, check_text_name, documents_text, named_text, numbered, read_text

from .test_calibration import tokenizer
from .tiny_models import tiny_model

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ turn.role }} {{ turn.content }} {{ eos_token }}{% endfor %}"
    "{% if tools is defined and tools %} {{ tools[0].name }}{% endif %}"
)
TURNS = [{"role": "w3", "content": "w4 w5"}, {"role": "w6", "content": "w7"}]
# as the template above has them, but for the first token
TURN_IDS = [3, 4, 5, 2, 6, 7, 2]


def chatting(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    made = tokenizer(begin=1, end=2)
    made.chat_template = template
    return made


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ids_of(path: Path) -> list[int]:
    made = chatting()
    found: list[int] = tokenize(named_text(path, made, test=False).text, made).tolist()
    return found


@pytest.mark.parametrize(
    "row, ids",
    [
        ({"text": "w3 w4"}, [3, 4]),
        ({"text": "w3", "messages": TURNS, "id": 7}, [3]),
        ({"text": "<1>w3 <2>"}, [3, 2]),
        ({"messages": TURNS}, TURN_IDS),
        ({"text": None, "messages": TURNS}, TURN_IDS),
        ({"messages": [{**TURNS[0], "tool_calls": None}, TURNS[1]], "source": float("nan")}, TURN_IDS),
        ({"prompt": "w3 ", "completion": "w4"}, [3, 4]),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TURN_IDS),
        ({"messages": TURNS, "tools": [{"name": "w9"}]}, [*TURN_IDS, 9]),
    ],
)
def test_documents(row: Any, ids: list[int], tmp_path: Path) -> None:
    """Of a template special tokens become their ids, and the begin-of-text token is left to the windows."""
    assert ids_of(lines(tmp_path / "data.jsonl", row)) == ids


def test_documents_stand_apart_as_they_do_where_the_model_saw_them() -> None:
    rows = [{"text": "a"}, "b", {"messages": TURNS}, {"messages": TURNS}, {"prompt": "c", "completion": "d"}]
    text = documents_text(numbered(rows), chatting(), "rows").text
    turns = "w3 w4 w5 <2>w6 w7 <2>"
    assert text == f"a\n\nb\n\n{turns}{turns}\n\ncd"


def test_lines_are_cut_at_newlines_alone(tmp_path: Path) -> None:
    """JSON may hold other line separators as they are; a mark, empty lines and Windows' ends are no documents."""
    path = tmp_path / "data.JSONL"
    path.write_bytes('\ufeff{"text": "w3 \u2028 w4\x85"}\r\n\r\n \n{"text": "w5 \\u0000\\u001b"}'.encode())
    assert named_text(path, chatting(), test=True).text == "w3 \u2028 w4\x85\n\nw5 \x00\x1b"


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.removeprefix("{{ bos_token }}")])
def test_windows_of_conversations_begin_once(template: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "chat.jsonl", *[{"messages": TURNS}] * 30)
    found = load_calibration(path, tiny_model("llama"), chatting(template), 6, 16)
    assert found.source == "chat.jsonl" and found.tokens.shape == (6, 16)
    assert bool((found.tokens[:, 0] == 1).all()) and not bool((found.tokens[:, 1:] == 1).any())
    assert bool((found.tokens == 2).any())


def test_all_commands_read_documents(tmp_path: Path) -> None:
    path = lines(tmp_path / "chat.jsonl", *[{"messages": TURNS}] * 30)
    model, made = tiny_model("llama"), chatting()
    tokens, name = evaluation_tokens(str(path), model, made)
    assert name == "chat.jsonl" and tokens.tolist() == TURN_IDS * 30
    windows, held_out = healing_windows(str(path), model, made, HealingOptions(32, batch=1, seq_len=16))
    assert set(windows.unique().tolist()) | set(held_out.unique().tolist()) == {1, *TURN_IDS}


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"txt": "a"}', "'txt'"),
        ("{}", "no keys"),
        ('{"text": 3}', "'text'"),
        ('{"text": ["a"]}', "'text'"),
        ('{"text": 3, "messages": [{"role": "a", "content": "b"}]}', "'text'"),
        ('{"messages": []}', "'messages'"),
        ('{"messages": "a"}', "'messages'"),
        ('{"messages": ["a"]}', "'messages'"),
        ('{"messages": [{"role": "user"}]}', "'messages'"),
        ('{"messages": [{"role": "user", "content": null}]}', "'messages'"),
        ('{"messages": [{"role": 3, "content": "a"}]}', "'messages'"),
        ('{"prompt": "a"}', "'prompt'"),
        ('{"prompt": "a", "completion": [{"role": "a", "content": "b"}]}', "'prompt', 'completion'"),
        ('{"prompt": null, "completion": null}', "'prompt', 'completion'"),
        ('"w3"x', "not readable as JSON"),
        ("w3 w4", "not readable as JSON"),
        ("{", "not readable as JSON"),
        ('{"text": "a", "text": "b"}', "twice"),
        ('{"text": "\\ud800"}', "line 2"),
        ("[" * 100_000, "nested too deeply"),
        ('{"x": ' * 70 + "1" + "}" * 70, "nested deeper"),
        ('{"x": ' + "9" * 5000 + "}", "line 2"),
        ("3", "type int"),
        ("null", "type NoneType"),
        ('{"\\u001b[2J": 1}', r"\x1b"),
    ],
)
def test_lines_that_are_no_documents_are_named(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "w3"}\n' + line + "\n")
    with pytest.raises(TacoError, match=re.escape(says)) as error:
        named_text(path, chatting(), test=False)
    said = str(error.value)
    assert "data.jsonl, line 2" in said and ACCEPTED_KEYS in said
    assert said.isprintable() and len(said) < 600


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("data.json", '[{"text": "a"}, {"text": "b"}]', "jq -c"),
        ("data.json", '{\n  "text": "a"\n}', "line 1.*one object"),
        ("data.jsonl", '{"text": ""}\n{"text": " "}', "is empty"),
        ("data.jsonl", "\n", "is empty"),
    ],
)
def test_files_that_hold_no_lines_of_documents(name: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TacoError, match=says):
        named_text(tmp_path / name, chatting(), test=False)


def test_lines_and_texts_have_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path / "data.jsonl", {"text": "w3 " * 40})
    monkeypatch.setattr("taco_svd.texts.MAX_JSON_BYTES", 99)
    with pytest.raises(TacoError, match="line 1 has"):
        named_text(path, chatting(), test=False)
    monkeypatch.setattr("taco_svd.texts.MAX_TEXT_BYTES", 99)
    with pytest.raises(TacoError, match="pass a part"):
        named_text(path, chatting(), test=False)
    with pytest.raises(TacoError, match="pass a part"):
        documents_text(numbered(["w3 " * 20] * 2), chatting(), "rows")


@pytest.mark.parametrize(
    "template, says",
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "does not take"),
        ("{{ messages[0].content.nothing.there }}", "does not take"),
    ],
)
def test_templates_that_make_no_text(template: str | None, says: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", {"messages": TURNS})
    with pytest.raises(TacoError, match=f"line 1.*{says}"):
        named_text(path, chatting(template), test=False)


def test_without_a_template_plain_documents_are_read(tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", {"text": "w3"}, {"prompt": "w4", "completion": ""})
    assert named_text(path, chatting(None), test=False).text == "w3\n\nw4"


class Rows:
    """What a `datasets.Dataset` is to us: a length, and dicts."""

    def __init__(self, *rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


@pytest.mark.parametrize(
    "source", [["w3 w4 w5"] * 40, ("w3 w4 w5",) * 40, [{"text": "w3 w4 w5"}] * 40, Rows(*[{"text": "w3 w4 w5"}] * 40)]
)
def test_documents_in_memory(source: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", *[{"text": "w3 w4 w5"}] * 40)
    model = tiny_model("llama")
    found, same = (load_calibration(given, model, chatting(), 6, 16) for given in (source, path))
    assert found.source == "texts" and torch.equal(found.tokens, same.tokens)


@pytest.mark.parametrize(
    "source",
    [
        np.full((4, 8), 5),
        np.full((4, 8), 5, dtype=np.uint16),
        {"input_ids": [[5] * 8] * 4},
        {"input_ids": torch.full((4, 8), 5), "attention_mask": torch.ones(4, 8)},
        {"input_ids": np.full((4, 8), 5), "attention_mask": [[1] * 8] * 4},
        Calibration(torch.full((4, 8), 5), "mine", 3),
    ],
)
def test_ready_tokens(source: Any) -> None:
    found = load_calibration(source, tiny_model("llama"), None)
    assert torch.equal(found.tokens, torch.full((4, 8), 5))
    assert found.source == ("mine" if isinstance(source, Calibration) else "tokens")


@pytest.mark.parametrize(
    "source, says",
    [
        (3, "got int"),
        (b"w3", "got bytes"),
        ([], "no rows"),
        ([3], "list of int"),
        ([["w3"]], "list of list"),
        ({"w3", "w4"}, "set of str"),
        ({"train": ["w3"], "test": ["w4"]}, "'train', 'test'"),
        (np.zeros((2, 8)), "got ndarray"),
        (Rows("column", "names"), "Rows of str"),
        ((text for text in ["w3"]), "how many rows"),
        ({"input_ids": [[1, 2], [3]]}, "got list of list|list of list"),
        ({"input_ids": 3}, "got ndarray|tokens"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 0]]}, "padded"),
        (torch.ones(2, 100, dtype=torch.int64), "context of 64"),
        (Calibration(torch.ones(2, 100, dtype=torch.int64), "mine", 0), "context of 64"),
        (["w3", 4], "row 1: expected"),
        ([{"text": "w3"}, {"label": 1}], "row 1: expected.*'label'"),
        (["w3 \ud800"], "row 0 holds half of a character"),
        ([" "], "is empty"),
        (["w3 w4"], "texts has 2 tokens"),
        ("w3 w4\nw5", "is a text itself"),
        ("w3 " * 5000, "is a text itself"),
        ("wikitex2", "self, wikitext2, ptb, c4"),
        ("w3\0", "."),
    ],
)
def test_what_is_no_calibration_is_refused_with_what_is(source: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(TacoError, match=says) as error:
        load_calibration(source, tiny_model("llama"), tokenizer(), 4, 16)
    assert len(str(error.value)) < 600
    if not hasattr(source, "__next__"):
        with pytest.raises(TacoError, match=says):
            taco_svd.compress(tiny_model("llama"), tokenizer(), layers=1, calibration=source, samples=4, seq_len=16)


def test_a_plan_of_texts_and_a_run_that_goes_on(tmp_path: Path) -> None:
    """The record of such a calibration is one that plans take; a run goes on with the same texts, and no others."""
    model, made = tiny_model("llama"), chatting()
    rows = [{"messages": TURNS, "id": object()}] * 30

    def run(given: Any, resume: bool = False) -> Plan:
        arguments: dict[str, Any] = {"layers": 1, "method": "svd", "samples": 4, "seq_len": 16}
        return taco_svd.compress(
            model, made, calibration=given, work_dir=tmp_path / "work", resume=resume, **arguments
        )[1]

    plan = run(rows)
    assert plan.calibration["source"] == "texts"
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").calibration == plan.calibration
    assert run(list(rows), resume=True).calibration == plan.calibration
    with pytest.raises(TacoError, match="calibration"):
        run(rows[1:], resume=True)


def test_a_run_that_has_its_windows_needs_no_text(tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", *[{"text": "w3 w4 w5"}] * 40)
    arguments: dict[str, Any] = {"layers": 1, "method": "svd", "samples": 4, "seq_len": 16}
    arguments |= {"calibration": path, "work_dir": tmp_path / "work"}
    plan = taco_svd.compress(tiny_model("llama"), chatting(), **arguments)[1]
    path.unlink()
    assert taco_svd.compress(tiny_model("llama"), chatting(), resume=True, **arguments)[1] == plan


def test_names_are_checked_before_a_model_is_loaded(invoke: Any, tmp_path: Path) -> None:
    for arguments in (
        ("compress", "nowhere", "--out", tmp_path / "out", "--layers", "1", "--calibration", "wikitex2"),
        ("compare", "nowhere", "--calibration", "wikitex2"),
        ("compare", "nowhere", "--text", "wikitex2"),
    ):
        code, _, said = invoke(*arguments)
        assert code == 2 and "No such text file: wikitex2" in said
    with pytest.raises(TacoError, match="directory"):
        check_text_name(tmp_path)
    (tmp_path / "wikitex2").write_text("w3")
    check_text_name(tmp_path / "wikitex2")
    assert read_text(tmp_path / "wikitex2") == "w3" and recognised("self") == "self"
