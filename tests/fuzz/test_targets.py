"""Every fuzz target on drawn bytes and on mutations of what is valid; the kept corpus on every run."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taco_svd import Structure, TacoError
from taco_svd.structure import FORMAT_VERSION
from taco_svd.untrusted import parse_json

from .run_atheris import NAMES
from .targets import TARGETS

# TACO_FUZZ_CASES=20: many more cases than the test suite has time for
LONG = int(os.environ.get("TACO_FUZZ_CASES", "1")) > 1
CORPUS = Path(__file__).parent / "corpus"
EASY = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True, derandomize=True)

STRUCTURE: dict[str, Any] = {
    "format_version": FORMAT_VERSION,
    "source_layers": 6,
    "kept": [0, 1, 2, 4],
    "low_rank": {"1": {"self_attn.q_proj": 3, "mlp.down_proj": 4}},
    "pivoted": {"1": ["mlp.down_proj"]},
    "narrow": {"2": {"mlp.up_proj": {"rows": 3, "columns": 8, "spread": "rows"}}},
    "bridges": [{"after": 2, "rank": 2, "bias": True, "eps": 1e-6}],
}
PLAN: dict[str, Any] = {
    "method": "taco",
    "structure": STRUCTURE,
    "redundant": [3, 5],
    "compression_ratio": None,
    "importance": {"measure": "bi", "scores": [0.5, 0.25, 0.5, 0.1, 0.2, 0.1], "order": [3, 5]},
    "calibration": {"source": "self", "samples": 4, "seq_len": 8, "tokens": 32, "seed": 0, "sha256": "0" * 64},
    "options": {"input_damping": 0.1, "gradient_damping": 0.01, "consistency": True},
    "source": {"name": "m", "model_type": "llama", "architecture": "LlamaForCausalLM", "layers": 6, "parameters": 9,
               "bytes": 36, "dtype": "float32", "config": {"hidden_size": 8}},
    "result": {"parameters": 5, "bytes": 20, "dtype": "float32", "share": 0.5, "predicted_loss": 0.1,
               "measured_loss": 0.2, "consistency": [{"layer": 1, "path": "a", "before": 1.0, "after": 0.5,
                                                      "adopted": True}]},
    "versions": {"torch": "2.13.0"},
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "model_type": "taco_svd",
    "base_model_type": "llama",
    "taco_svd": STRUCTURE,
    "vocab_size": "guard",
    "architectures": ["TacoLlamaForCausalLM"],
    "base_config": {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4,
                    "vocab_size": 11, "rms_norm_eps": 1e-6},
}  # fmt: skip
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
    "b.weight": {"dtype": "BF16", "shape": [16], "data_offsets": [32, 64]},
}
DOCUMENT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a\u0301"}],
}
VALID: dict[str, Any] = {
    "json": PLAN,
    "structure": STRUCTURE,
    "plan": PLAN,
    "config": CONFIG,
    "header": HEADER,
    "checksums": {"sha256": {"model.safetensors": "0" * 64}},
    "documents": DOCUMENT,
}
# One after the other stands in each place of what is valid.
WRONG: tuple[Any, ...] = (
    None, True, 0, -1, 1, 7, 1 << 31, 1 << 63, -(1 << 40), 10**400, 0.5, -0.5, float("nan"), float("inf"), 1e308, "",
    "x", "../x", "/etc/passwd", "nan", "\u0663", "\x1b[31m", "\ud800", "[/red]", "a" * 5000, [], [[]], {}, {"a": 1},
    [0, 1, 2], ["a"], [None], {"base_config": {}},
)  # fmt: skip


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [here]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*here, key))
    return found


def changed(value: Any, place: tuple[Any, ...], wrong: Any, delete: bool = False) -> Any:
    if not place:
        return wrong
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if delete:
        del inner[place[-1]]
    else:
        inner[place[-1]] = wrong
    return value


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("name", sorted(VALID))
def test_what_is_valid_is_accepted(name: str) -> None:
    assert TARGETS[name](encoded(VALID[name]))


@pytest.mark.parametrize("name", ["structure", "plan", "config", "header", "checksums", "documents"])
def test_every_field_replaced_by_every_wrong_value(name: str) -> None:
    cases = [changed(VALID[name], place, wrong) for place in places(VALID[name]) for wrong in WRONG] + [
        changed(VALID[name], place, None, delete=True) for place in places(VALID[name]) if place
    ]
    if name == "plan":  # writes files and draws tables: a third of the cases in the suite, all of them on demand
        cases = cases[:: 1 if LONG else 3]
    accepted = sum(TARGETS[name](encoded(case)) for case in cases)
    # a fuzzer whose every input is refused at the door (or let through) tests nothing behind it
    assert 0 < accepted < len(cases) / 2


@pytest.mark.parametrize("name", ["json", "structure", "plan", "config", "header", "shard", "checksums", "documents"])
def test_flipped_cut_and_inserted_bytes(name: str) -> None:
    generator = random.Random(5)
    valid = encoded(VALID.get(name, HEADER))
    if name == "shard":
        valid = struct.pack("<Q", len(valid)) + valid + bytes(64)
    for _ in range(250):
        data = bytearray(valid)
        for _ in range(generator.choice((1, 1, 2, 4))):
            at = generator.randrange(len(data))
            kind = generator.randrange(4)
            if kind == 0:
                data[at] ^= 1 << generator.randrange(8)
            elif kind == 1:
                data[at:at] = generator.choice((b"\xff", b'"', b"{", b"[" * 3, b"9" * 30, b"\\u0000", b"1e999", b"-"))
            elif kind == 2:
                del data[at : at + generator.randrange(1, 9)]
            else:
                data = data[: max(1, at)]
        TARGETS[name](bytes(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(EASY, max_examples=2000 if LONG else 150)
@given(JSON)
def test_any_json_as_a_structure(value: Any) -> None:
    TARGETS["structure"](encoded(value))
    TARGETS["structure"](encoded({**STRUCTURE, "low_rank": value}))
    TARGETS["structure"](encoded({**STRUCTURE, "bridges": value}))


@settings(EASY, max_examples=2000 if LONG else 100)
@given(st.binary(max_size=200))
def test_any_bytes_as_a_record(data: bytes) -> None:
    for name in ("json", "structure", "shard", "header", "documents"):
        TARGETS[name](data)


def test_op_arguments() -> None:
    """Drawn with a plain generator, not hypothesis: ten times as many cases in the same time."""
    generator = random.Random(7)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        accepted = 0
        for _ in range(100_000 if LONG else 6000):
            length = generator.choice((10, 40, 100))
            data = bytes(generator.choice((0, generator.randrange(256))) for _ in range(length))
            accepted += TARGETS["ops"](data)
        assert LONG or 1200 < accepted < 5400
    finally:
        torch.set_num_threads(threads)


def test_a_key_that_stands_twice_is_no_json() -> None:
    with pytest.raises(TacoError, match="twice"):
        parse_json('{"a": {"b": 1, "c": 2, "b": 1}}', "the text")


@pytest.mark.parametrize("index", ["01", "+1", " 1", "1_0", "-1", "\u0661", "", "1.0", "9" * 50])
def test_layers_are_named_in_one_way_only(index: str) -> None:
    """Else two keys could mean one layer."""
    with pytest.raises(TacoError, match="not the index of a layer"):
        Structure.from_dict({**STRUCTURE, "low_rank": {index: {"mlp.up_proj": 3}}, "pivoted": {}})


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*/*")), ids=lambda file: f"{file.parent.name}-{file.name}")
def test_kept_corpus(file: Path) -> None:
    """What once went wrong, and what reached new code: it must not go wrong again."""
    TARGETS[file.parent.name](file.read_bytes())


def test_every_target_is_fuzzed():
    assert set(NAMES) == set(TARGETS)
