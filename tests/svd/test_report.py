"""The HTML report: what it measures against plain loops, that it is self-contained, and that no text gets out of it."""

from __future__ import annotations

import base64
import json
import os
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

import taco_svd
from taco_svd import Plan, html_report, report_files, save_compressed
from taco_svd.drift import measure_drift
from taco_svd.replacement import LowRankBridge, LowRankLinear
from taco_svd.report_data import product_spectrum

from .tiny_models import VOCABULARY, tiny_model


def matplotlib_or_skip():
    pytest.importorskip("matplotlib", reason="the report's pictures need matplotlib, the extra taco-kernels[plot]")


EVIL = "<script>alert(1)</script>\"'&$x_1$"


def save(compressed_tiny, folder, name="llama", method="taco", **changes):
    dense, compressed, plan = compressed_tiny(name, method)
    values = plan.to_dict()
    for key, value in changes.items():
        # an Ellipsis takes a field away
        values[key] = {name: entry for name, entry in {**values[key], **value}.items() if entry is not ...}
    save_compressed(compressed, Plan.from_dict(values), folder / "small")
    dense.save_pretrained(folder / "dense")
    return folder / "small"


@torch.no_grad()
def test_drift_is_that_of_the_hidden_states(compressed_tiny):
    dense, compressed, plan = compressed_tiny("llama", "bridge")
    windows = torch.randint(3, VOCABULARY, (5, 9))
    found = measure_drift(dense, compressed, plan.structure, windows, batch=2)
    theirs = dense(windows, output_hidden_states=True).hidden_states  # [i + 1] leaves layer i; the last is normed
    ours = compressed(windows, output_hidden_states=True).hidden_states
    kept = plan.structure.kept
    assert [point.layer for point in found] == list(kept) and found[-1].until == 4
    for position, point in enumerate(found[:-1]):
        target, state = theirs[kept[position + 1]].double(), ours[position + 1].double()
        assert point.until == kept[position + 1] - 1
        assert point.relative_error == pytest.approx(float((state - target).norm() / target.norm()), rel=1e-5, abs=1e-7)
        cosine = torch.nn.functional.cosine_similarity(state, target, dim=-1).mean()
        assert point.cosine == pytest.approx(float(cosine), rel=1e-5)
    assert found[0].relative_error == 0.0 and found[1].relative_error > 0.0


@pytest.mark.parametrize("shape", [(9, 13, 4), (13, 9, 9), (1, 5, 1)])
def test_spectrum_of_a_product(shape):
    out_features, in_features, rank = shape
    linear = LowRankLinear(in_features, out_features, rank, False)
    slow = torch.linalg.svdvals(linear.u.detach().double() @ linear.v.detach().double())[:rank]
    torch.testing.assert_close(torch.tensor(product_spectrum(linear), dtype=torch.float64), slow, rtol=1e-9, atol=1e-12)
    bridge = LowRankBridge(8, 3, True, 1e-6)
    assert product_spectrum(bridge) == pytest.approx([0.0] * 3)


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.images, self.text = [], set(), [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "img":
            self.images.append(dict(attributes)["src"])

    def handle_data(self, data):
        self.text.append(data)


def check_page(page):
    """Parses, loads nothing, runs nothing; returns its elements."""
    elements = Elements()
    elements.feed(page)
    assert set(elements.tags) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "tr", "th", "td", "img"
    }  # fmt: skip
    assert elements.attributes <= {"lang", "charset", "name", "content", "http-equiv", "class", "alt", "src"}
    assert "url(" not in page and "@import" not in page
    for source in elements.images:
        assert source.startswith("data:image/svg+xml;base64,")
        root = ElementTree.fromstring(base64.b64decode(source.partition(",")[2]))
        assert root.tag.endswith("svg")
    return elements


@pytest.mark.parametrize("method", ["taco", "bridge"])
def test_every_section_is_there(compressed_tiny, tmp_path, invoke, method):
    matplotlib_or_skip()
    small = save(
        compressed_tiny,
        tmp_path,
        method=method,
        source={"name": "dense"},
        importance={"measure": "bi", "scores": [0.9, 0.2, 0.01, 0.02, 0.3]},
        result={
            "predicted_loss": 0.02,
            "measured_loss": 0.03,
            "consistency": [
                {"layer": 1, "path": "mlp.down_proj", "before": 0.2, "after": 0.1, "adopted": True},
                {"layer": 4, "path": "mlp.down_proj", "before": 0.2, "after": 0.3, "adopted": False},
            ],
        },
    )
    rows = [
        {"model": name, "perplexity": {"perplexity": 90.0, "standard_error": 1.0, "window": 16, "windows": 5},
         "parameters": 4000, "share": share, "latency": {"decode": {"p50": 0.01 * share}}}
        for name, share in (("dense", 1.0), ("svd", 0.8))
    ]  # fmt: skip
    rows[1]["against_dense"] = {"decode": {"median": 0.8}}
    (tmp_path / "compare.json").write_text(json.dumps({"text": "self", "models": rows}))
    out = tmp_path / "report.html"
    code, stdout, stderr = invoke(
        "report", small, "--out", out, "--rounds", "2", "--compare", tmp_path / "compare.json", "--json"
    )
    assert code == 0, stderr
    record = json.loads(stdout)
    page = out.read_text()
    elements = check_page(page)
    text = " ".join(elements.text)
    assert {row["name"] for row in record["models"]} == {"dense", "this model", "layers removed"}
    by_name = {row["name"]: row for row in record["models"]}
    assert by_name["this model"]["kl"] > 0 and "kl" not in by_name["dense"]
    assert record["predicted_loss"] == 0.02 and "1.50 times it" in text and "1 of 2 closed-form" in text
    assert set(record["drift"]) == {"this model", "layers removed"}
    assert record["alternatives"][1]["decode"] == pytest.approx(0.8) and record["alternatives"][-1]["decode"] > 0
    # taco spends over all layers: none of them is redundant
    assert ("it is spent over all of them" in text) == (method == "taco")
    assert ("layers are the redundant ones" in text) == (method == "bridge")
    # importance, allocation, (spectra), prediction, corrections, drift, alternatives
    assert len(elements.images) == 7
    assert not list(tmp_path.glob(".*partial"))


def test_latencies_of_a_comparison_are_those_of_its_rounds(tmp_path):
    """Seconds drift from one setting's run to the next, and of the dense model those of the last run are kept."""
    from taco_svd.report_files import comparison_rows

    def row(name, share, seconds, **more):
        score = {"perplexity": 90.0, "standard_error": 1.0}
        return {"model": name, "perplexity": score, "parameters": 9, "share": share,
                "latency": {"decode": {"p50": seconds}}, **more}  # fmt: skip

    ratio = {"decode": {"median": 0.9, "low": 0.8, "high": 1.0}}
    models = [row("dense", 1.0, 0.02), row("svd", 0.9, 0.009, against_dense=ratio), row("svd", 0.8, 0.018)]
    (tmp_path / "compare.json").write_text(json.dumps({"text": "self", "models": models}))
    assert [found["decode"] for found in comparison_rows(tmp_path / "compare.json")] == [1.0, 0.9, None]


def test_narrowed_matrices_are_in_the_map(compressed_tiny):
    from taco_svd.architectures import Architecture
    from taco_svd.report_data import _allocation

    _, compressed, plan = compressed_tiny("llama", "modegpt")
    found = _allocation(Architecture(compressed), plan.structure)["low_rank"]
    specs = {(layer, path): spec for layer, all_ in plan.structure.narrow.items() for path, spec in all_.items()}
    assert specs
    shapes = {"mlp.up_proj": 56 * 32, "mlp.down_proj": 56 * 32, "mlp.gate_proj": 56 * 32}
    for entry in found:
        spec = specs.get((entry["layer"], entry["path"]))
        if spec is not None and entry["path"] in shapes:
            assert entry["share"] == pytest.approx(spec.rows * spec.columns / shapes[entry["path"]])
            assert entry["rank"] == min(spec.rows, spec.columns)
    assert {(entry["layer"], entry["path"]) for entry in found} >= set(specs)


def test_no_text_of_a_file_gets_out_of_its_place(compressed_tiny, tmp_path, invoke):
    matplotlib_or_skip()
    small = save(
        compressed_tiny,
        tmp_path,
        source={"name": EVIL},
        calibration={"source": EVIL},
        importance={"measure": EVIL},
        options={EVIL: EVIL},
        versions={EVIL: EVIL},
        result={"consistency": [{"layer": EVIL, "path": EVIL, "before": 1.0, "after": 0.5, "adopted": EVIL}]},
    )
    rows = [{"model": EVIL, "perplexity": {"perplexity": 9.0}, "parameters": 40}]
    (tmp_path / "compare.json").write_text(json.dumps({"text": EVIL, "models": rows}))
    out = tmp_path / "report.html"
    code, _, stderr = invoke(
        "report", small, "--out", out, "--rounds", "0", "--window", "16", "--compare", tmp_path / "compare.json",
        "--dense", tmp_path / "dense",
    )  # fmt: skip
    assert code == 0, stderr
    page = out.read_text()
    elements = check_page(page)
    assert "<script" not in page and EVIL in " ".join(elements.text)


def test_without_the_dense_model_it_says_what_is_missing(compressed_tiny, tmp_path, invoke):
    matplotlib_or_skip()
    small = save(
        compressed_tiny,
        tmp_path,
        source={"name": "gone"},
        importance={"scores": ...},
        result={"predicted_loss": ..., "consistency": ...},
    )
    out = tmp_path / "report.html"
    code, _, stderr = invoke("report", small, "--out", out, "--rounds", "1", "--window", "16")
    assert code == 0, stderr
    text = " ".join(check_page(out.read_text()).text)
    for said in ("was not found", "no importance scores", "no predicted", "Not healed", "No comparison given"):
        assert said in text


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--compare", "missing.json"], "taco-svd compare --save"),
        (["--compare", "BAD"], "no list `models`"),
        (["--compare", "ROW"], "not readable"),
        (["--dense", "OTHER"], "embeddings"),
        (["--text", "missing.txt"], "No such text"),
        (["--out", "nowhere/report.html"], "an ordinary file in a directory"),
        (["--out", "PIPE"], "an ordinary file in a directory"),
        (["--seed", "9" * 30], "--seed"),
        (["--max-windows", "0"], "--max-windows"),
    ],
)
def test_bad_input_is_one_sentence(compressed_tiny, tmp_path, invoke, arguments, says):
    small = save(compressed_tiny, tmp_path, source={"name": "dense"})
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "bad.json").write_text("[]")
    (tmp_path / "row.json").write_text('{"models": [{"model": "x"}]}')
    pipe = tmp_path / "pipe"  # as /dev/null: the page would take its place
    os.mkfifo(pipe)
    places = {"BAD": tmp_path / "bad.json", "ROW": tmp_path / "row.json", "OTHER": tmp_path / "other", "PIPE": pipe}
    given = {"--out": tmp_path / "r.html", **dict(zip(arguments[::2], arguments[1::2], strict=True))}
    words = [places.get(word, word) for pair in given.items() for word in pair]
    code, stdout, stderr = invoke("report", small, *words)
    assert code == 2 and says in stderr and len(stderr.strip().splitlines()) == 1 and stdout == ""
    assert not (tmp_path / "r.html").exists() and pipe.is_fifo()


@pytest.mark.parametrize("huge", [10**400, float("inf"), True, "7"], ids=str)
def test_what_is_no_number_has_no_place(huge):
    assert report_files.number(huge) is None and html_report.number(huge, ".3f") == "-"
    assert html_report.number(7, ",") == "7" and html_report.number(0.5, ".1%") == "50.0%"


def test_without_matplotlib_nothing_is_measured(compressed_tiny, tmp_path, invoke, monkeypatch):
    monkeypatch.setitem(sys.modules, "taco_svd.figures", None)
    monkeypatch.delattr(taco_svd, "figures", raising=False)  # where it is known already
    monkeypatch.setattr("taco_svd.report_data.gather", lambda *_, **__: pytest.fail("too early"))
    small = save(compressed_tiny, tmp_path)
    code, _, stderr = invoke("report", small, "--out", tmp_path / "report.html")
    assert code == 2 and "taco-kernels[plot]" in stderr


def test_the_same_figure_gives_the_same_bytes():
    matplotlib_or_skip()
    from taco_svd.figures import as_svg, healing_curve

    curve = [{"tokens": 0, "kl": 1.0, "objective": 1.0}, {"tokens": 8, "kl": 0.5, "objective": 0.5}]
    assert as_svg(healing_curve(curve)) == as_svg(healing_curve(curve))
