"""Choice of tile sizes: the tuned table, its neighbours, the defaults."""

import json

import pytest

from taco_kernels.triton_kernels import config as configs
from taco_kernels.triton_kernels.config import (
    Config,
    as_entry,
    config_for,
    default_config,
    load_choices,
    load_table,
    rows_bucket,
)

SHAPES = [
    (4096, 4096, 512),
    (4096, 14336, 1024),
    (8192, 8192, 64),
    (128, 344, 17),
    (1, 1, 1),
    (70, 3, 300),
]


def _tuned(block_n: int, path: str = "split") -> Config:
    return Config(path, 16, 32, 128, 4, 4, 3, block_n, 64, 4, 3)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A tuned table of a GPU called "Test GPU 9000"."""
    monkeypatch.setattr(configs, "TUNED_DIR", tmp_path)
    entries = [
        as_entry("low_rank_linear", "bfloat16", (4096, 4096, 512), 16, _tuned(64)),
        as_entry("low_rank_linear", "bfloat16", (4096, 14336, 512), 16, _tuned(128)),
        as_entry(
            "low_rank_linear",
            "bfloat16",
            (4096, 4096, 64),
            8192,
            Config("fused", 64, 64, 64, 1, 4, 3, 64, 16, 4, 3),
        ),
    ]
    path = tmp_path / "test-gpu-9000.json"
    path.write_text(json.dumps({"gpu": "Test GPU 9000", "entries": entries}))
    configs.forget_tables()
    configs.config_for.cache_clear()
    yield path
    configs.forget_tables()
    configs.config_for.cache_clear()


def _ask(
    rows,
    in_size,
    out_size,
    rank,
    gpu="Test GPU 9000",
    dtype="bfloat16",
    op="low_rank_linear",
):
    return config_for(op, dtype, rows, in_size, out_size, rank, gpu, 132)


def test_table_gives_the_entry_and_near_shapes_its_neighbour(table):
    assert _ask(16, 4096, 4096, 512).block_n == 64
    assert _ask(9, 4096, 4096, 416) == _ask(16, 4096, 4096, 512), "same bucket, near rank"
    assert _ask(16, 4096, 11008, 512).block_n == 128


def test_table_is_left_alone_where_it_says_nothing(table):
    for rows, shape, changes in [
        (4, (4096, 4096, 512), {}),
        (16, (4096, 4096, 16), {}),
        (16, (4096, 4096, 512), {"dtype": "float32"}),
        (16, (4096, 4096, 512), {"op": "low_rank_bridge"}),
        (16, (4096, 4096, 512), {"gpu": "Another GPU"}),
    ]:
        in_size, out_size, rank = shape
        size = 4 if changes.get("dtype") == "float32" else 2
        assert _ask(rows, *shape, **changes) == default_config(rows, in_size, out_size, rank, size, 132)


def test_float16_takes_what_was_tuned_for_bfloat16(table):
    """It moves the same bytes; nobody tunes it by itself. An entry of its own comes first."""
    assert _ask(16, 4096, 4096, 512, dtype="float16") == _tuned(64)
    content = json.loads(table.read_text())
    content["entries"].append(as_entry("low_rank_linear", "float16", (4096, 4096, 512), 16, _tuned(32)))
    table.write_text(json.dumps(content))
    configs.forget_tables()
    assert _ask(16, 4096, 4096, 512, dtype="float16") == _tuned(32)
    assert _ask(16, 4096, 4096, 512) == _tuned(64)


def test_ranks_that_the_cuda_kernels_read_slowly_do_not_take_their_neighbours_choice(table):
    def choices(*entries):
        known = {"gpu": "Test GPU 9000", "entries": [], "choices": [
            {"op": "low_rank_linear", "dtype": dtype, "in": 4096, "out": 4096, "rank": rank, "rows": rows,
             "backend": backend} for rank, rows, backend, dtype in entries]}  # fmt: skip
        table.write_text(json.dumps(known))
        configs.forget_tables()

    def chosen(rank, rows=1, dtype="bfloat16"):
        return configs.choice_for("low_rank_linear", dtype, rows, (4096, 4096, rank), "Test GPU 9000")

    choices((512, 1, "cuda", "bfloat16"), (512, 1, "cuda", "float32"), (512, 512, "library", "bfloat16"))
    assert chosen(408) == chosen(512) == chosen(409, dtype="float32") == "cuda"
    assert chosen(409) is None and chosen(409, 512) == "library"
    # what was measured at such a rank is for such ranks
    choices((512, 1, "cuda", "bfloat16"), (409, 1, "triton", "bfloat16"))
    assert chosen(411) == "triton" and chosen(408) == "cuda"
    choices((409, 1, "cuda", "bfloat16"))
    assert chosen(411) == "cuda" and chosen(408) is None


def test_fused_neighbour_must_hold_the_rank(table):
    assert _ask(8192, 4096, 4096, 60).path == "fused"
    assert _ask(8192, 4096, 4096, 70) == default_config(8192, 4096, 4096, 70, 2, 132)


def test_fused_entry_of_a_group_must_hold_one_members_rank(tmp_path, monkeypatch):
    fused = Config("fused", 64, 128, 64, 1, 4, 3, 64, 16, 4, 3)
    entries = [as_entry("low_rank_linear_group", "bfloat16", (4096, 6144, 384), 2048, fused)]
    (tmp_path / "test-gpu-9001.json").write_text(json.dumps({"gpu": "Test GPU 9001", "entries": entries}))
    monkeypatch.setattr(configs, "TUNED_DIR", tmp_path)
    asked = ("low_rank_linear_group", "bfloat16", 2048, 4096, 6144, 384, "Test GPU 9001", 132)
    assert config_for(*asked, 128) == fused
    assert config_for(*asked, 256).path != "fused"


INCOMPLETE = {"op": "x", "dtype": "y", "rows": 1, "in": 1, "out": 1, "rank": 1, "config": {"path": "row"}}


@pytest.mark.parametrize("text", ["", "[]", '{"entries": [{}]}', json.dumps({"entries": [INCOMPLETE]})])
def test_broken_table_is_named(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="gpu.json"):
        load_table(path)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 512, 8192, 100_000])
def test_defaults_suit_the_rows(rows, element_size):
    for in_size, out_size, rank in SHAPES:
        for processors in (4, 56, 132):
            config = default_config(rows, in_size, out_size, rank, element_size, processors)
            assert (config.path == "row") == (rows == 1)
            assert config.path != "fused" or rank <= config.block_r
            assert 1 <= config.split <= -(-in_size // config.block_k)


def test_shipped_tables_load():
    tables = list(configs.TUNED_DIR.glob("*.json"))
    if not tables:
        pytest.skip("no GPU has been tuned for yet: taco_kernels/tuned is empty")
    for path in tables:
        # A run that was cut short has measured backends and tuned nothing.
        assert load_table(path) or load_choices(path)
        assert configs.gpu_slug(json.loads(path.read_text())["gpu"]) == path.stem


def test_rows_buckets_and_bad_configurations():
    assert [rows_bucket(n) for n in (1, 2, 3, 16, 17, 8192, 10**6)] == [
        1,
        2,
        4,
        16,
        32,
        8192,
        8192,
    ]
    with pytest.raises(ValueError, match="power of two"):
        _tuned(48)
    with pytest.raises(ValueError, match="path"):
        _tuned(64, "fast")
