"""Calibrating, evaluating and healing on completions alone: which tokens count, and that nothing else does."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from taco_svd import CompressionOptions, Plan, TacoError, compress, make_plan
from taco_svd.architectures import Architecture, LinearSite
from taco_svd.calibration import Calibration, load_calibration, tokenize, unmarked
from taco_svd.divergence import divergence, kl_per_token
from taco_svd.evaluation import perplexity
from taco_svd.healing import Objective
from taco_svd.layerwise import LayerwisePass
from taco_svd.loss import NOTHING, counted_labels, counted_positions, next_token_loss
from taco_svd.loss_curves import CurveMeasurement, _where_most_counts, divergence_between
from taco_svd.model_size import parameter_count
from taco_svd.progress import Silent
from taco_svd.store import Store
from taco_svd.suffix import SuffixRunner
from taco_svd.taco import Analysis, calibration_pass
from taco_svd.team import Team
from taco_svd.texts import documents_text, numbered

from .test_calibration import tokenizer
from .tiny_models import VOCABULARY, tiny_model

# Words of prompts lie below, words of completions from here on: what counts can be told from the token alone.
FIRST = 50
END = 2
TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ '<1>' if turn.role == 'user' else 'w3 ' }} {{ turn.content }} <2> \n"
    "{% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
)
REWRITING = TEMPLATE.replace("{{ turn.content }}", "{{ turn.content if loop.last else 'w4' }}")


def chatting(template: str = TEMPLATE) -> Any:
    made = tokenizer(begin=1, end=END)
    made.chat_template = template
    return made


def words(generator: torch.Generator, low: int, high: int, most: int) -> str:
    count = int(torch.randint(1, most + 1, (1,), generator=generator))
    return " ".join(f"w{n}" for n in torch.randint(low, high, (count,), generator=generator).tolist())


def rows(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Any]] = []
    for _ in range(count):
        asked = [words(generator, 5, FIRST, 12) for _ in range(2)]
        said = [words(generator, FIRST, VOCABULARY, 9) for _ in range(2)]
        turns = [
            {"role": role, "content": text}
            for question, answer in zip(asked, said, strict=True)
            for role, text in (("user", question), ("assistant", answer))
        ]
        if kind == "texts":
            found.append({"prompt": asked[0] + " ", "completion": said[0]})
        elif kind == "messages":
            found.append({"messages": turns})
        else:
            # what was said before the last question is a part of the prompt: words of a prompt, for these tests
            turns[1]["content"] = asked[0]
            found.append({"prompt": turns[:3], "completion": turns[3:]})
    return found


def tokens_that_count(tokens: torch.Tensor) -> torch.Tensor:
    """By the words alone; an answer's end mark counts as well, which the tests below look at separately."""
    return tokens >= FIRST


@pytest.mark.parametrize("kind", ["texts", "messages", "lists"])
def test_what_a_model_is_to_write_counts_and_nothing_else(kind: str) -> None:
    made = chatting()
    text = documents_text(numbered(rows(kind, 40)), made, "rows", completions=True)
    tokens, labels = unmarked(tokenize(text.text, made, text.completions)[None])
    assert torch.equal(tokens[0], tokenize(text.text, made))
    inside = tokens_that_count(tokens)
    counted = labels != NOTHING
    ends = tokens == END
    assert torch.equal(counted & ~ends, inside)
    # a template's end mark is the last token of an answer, and of no question; two texts have none
    after_answer = functional.pad(inside[:, :-1], (1, 0)) & ends
    assert torch.equal(counted & ends, after_answer) and bool(after_answer.any()) == (kind != "texts")


def test_without_being_asked_for_no_completions_are_looked_for() -> None:
    text = documents_text(numbered(rows("messages", 2)), chatting(REWRITING), "rows")
    assert text.completions is None


@pytest.mark.parametrize(
    "row, template, said",
    [
        ("only a text", TEMPLATE, "row 0 is plain text"),
        ({"text": "only a text"}, TEMPLATE, "row 0 is plain text"),
        (rows("messages", 1)[0], REWRITING, "does not tell which part of the text is the assistant's"),
    ],
)
def test_documents_that_do_not_say_what_is_to_be_written(row: Any, template: str, said: str) -> None:
    with pytest.raises(TacoError, match=said):
        documents_text(numbered([row]), chatting(template), "rows", completions=True)


SYSTEM = "{% if messages[0].role != 'system' %}w4 w4 <2> {% endif %}" + TEMPLATE.removeprefix("{{ bos_token }}")
ENDED = TEMPLATE.replace("{% if add", "{% if not add_generation_prompt %}<9>{% endif %}{% if add")
# writes a thought before the last answer only, as reasoning models' templates do
THINKING = TEMPLATE.replace(
    "{{ turn.content }}", "{{ 'w8 ' if loop.last and turn.role != 'user' else '' }}{{ turn.content }}"
)


@pytest.mark.parametrize("template", [TEMPLATE, SYSTEM, ENDED, THINKING])
def test_answers_in_templates_of_several_kinds(template: str) -> None:
    """A greeting that nobody asked for does not count, a mark that ends the whole text is not the answer's."""
    turns = [
        {"role": role, "content": content}
        for role, content in [
            ("assistant", "w60"), ("user", "w9"), ("assistant", "w61 w62"), ("user", "w10"), ("assistant", " w63 "),
        ]
    ]  # fmt: skip
    made = chatting(template)
    made.eos_token = "<9>" if template == ENDED else made.eos_token
    text = documents_text(numbered([{"messages": turns}]), made, "rows", completions=True)
    assert text.completions is not None
    found = [text.text[start:end].split() for start, end in text.completions]
    last = ["w8", "w63", "<2>"] if template == THINKING else ["w63", "<2>"]
    assert found == [["w61", "w62", "<2>"], last]


def test_templates_that_leave_the_answer_out_are_refused() -> None:
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w60"}]
    silent = TEMPLATE.replace("{{ turn.content }}", "{{ turn.content if turn.role == 'user' else '' }}")
    with pytest.raises(TacoError, match="without what the assistant says"):
        documents_text(numbered([{"messages": turns}]), chatting(silent), "rows", completions=True)


def test_documents_without_any_completion_are_refused() -> None:
    turns = [{"role": "user", "content": "w5"}, {"role": "model", "content": "w60"}]
    with pytest.raises(TacoError, match='no turn with the role "assistant"'):
        documents_text(numbered([{"messages": turns}] * 3), chatting(), "rows", completions=True)


def test_a_word_counts_with_the_space_that_the_prompt_ends_with() -> None:
    """Byte-level tokens hold the space before a word, so the first of a completion may begin in the prompt."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(["Is it? yes", "Is it? no", "It is, yes", "d\u00e9j\u00e0 vu \U0001f600"] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made)
    given = [
        {"prompt": "Is it? ", "completion": "yes"},
        {"prompt": "Is it?", "completion": " no \U0001f600"},
    ]
    for row in given:
        text = documents_text(numbered([row]), fast, "rows", completions=True)
        tokens, labels = unmarked(tokenize(text.text, fast, text.completions)[None])
        counted = labels[0] != NOTHING
        assert fast.decode(tokens[0][counted]).strip() == row["completion"].strip()
        assert not counted.all()


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(TacoError, match="a fast one"):
        tokenize("w3", Slow(), [(0, 1)])  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [30, 3000])
@pytest.mark.parametrize("kind", ["texts", "messages"])
def test_windows_keep_what_counts(kind: str, count: int) -> None:
    """Also of a text so long that it is tokenised in excerpts, and behind the begin-of-text token."""
    made, model = chatting(), tiny_model("llama")
    given = rows(kind, count)
    found = load_calibration(given, model, made, 6, 16, completions_only=True)
    plain = load_calibration(given, model, made, 6, 16)
    assert torch.equal(found.tokens, plain.tokens) and plain.labels is None and found.labels is not None
    counted = found.labels != NOTHING
    # a window's first token is not predicted
    assert torch.equal((counted & (found.tokens != END))[:, 1:], tokens_that_count(found.tokens)[:, 1:])
    assert torch.equal(found.labels[counted], found.tokens[counted])
    assert found.digest != plain.digest
    described = found.describe()
    assert described["completions_only"] is True and described["counted"] == int(counted[:, 1:].sum())
    assert "completions_only" not in plain.describe()


def test_windows_without_enough_to_judge_by_are_refused() -> None:
    given = [{"prompt": "w5 " * 4000, "completion": "w60"}]
    with pytest.raises(TacoError, match="too little of the completions"):
        load_calibration(given, tiny_model("llama"), chatting(), 4, 16, completions_only=True)


def test_labels_must_hold_something() -> None:
    tokens = torch.full((8, 6), 5)
    nothing = torch.full_like(tokens, NOTHING)
    fitted, held = nothing.clone(), nothing.clone()
    fitted[0, 3], held[-1, 3] = 5, 5
    for labels in (nothing, fitted, held):
        with pytest.raises(TacoError, match="too little of the completions"):
            Calibration(tokens, "tokens", 0, labels)


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(2, 8, dtype=torch.int64),
        torch.full((2, 7), NOTHING),
        torch.full((2, 8), float(NOTHING)),
    ],
)
def test_labels_are_the_tokens_or_nothing(labels: torch.Tensor) -> None:
    with pytest.raises(TacoError, match="labels"):
        Calibration(torch.full((2, 8), 5), "tokens", 0, labels)


# -- losses ----------------------------------------------------------------------------------------------------


def some_labels(tokens: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A third of the tokens count; of one window none does."""
    drawn = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) < 1 / 3
    drawn[1] = False
    return tokens.where(drawn, NOTHING)


def test_the_loss_of_what_counts() -> None:
    tokens = torch.randint(11, (3, 9))
    labels = some_labels(tokens)
    logits = torch.randn(3, 9, 11).requires_grad_()
    (3 * next_token_loss(logits, labels, 0.5)).backward()
    wide = logits.detach().double().requires_grad_()
    exact = 0.5 * functional.cross_entropy(wide[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NOTHING)
    (3 * exact).backward()
    assert logits.grad is not None and wide.grad is not None
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-5, atol=1e-7)
    assert not logits.grad[:, :-1][labels[:, 1:] == NOTHING].any()
    nothing = next_token_loss(logits, torch.full_like(labels, NOTHING))
    assert float(nothing.detach()) == 0


def collected(into: dict[str, list[torch.Tensor]]) -> Callable[[LinearSite, torch.Tensor, torch.Tensor], None]:
    return lambda site, x, gradient: into.setdefault(site.name, []).append(gradient.clone())


@pytest.mark.parametrize("pieces", [False, True])
def test_gradients_are_those_of_what_counts(
    pieces: bool, calibration_tokens: torch.Tensor, request: pytest.FixtureRequest
) -> None:
    """Batch by batch and layer by layer, with a window in which nothing counts, whole logits and pieces of them."""
    if pieces:
        request.getfixturevalue("seven")
    labels = some_labels(calibration_tokens)
    model = tiny_model("llama")
    architecture = Architecture(model)
    site = architecture.sites([1])[0]
    exact: list[torch.Tensor] = []
    wide = Architecture(copy.deepcopy(model).double())
    handle = wide.module(site).register_forward_hook(
        lambda _, __, output: output.register_hook(lambda g: exact.append(g.clone())) and None
    )
    logits = wide.model(input_ids=calibration_tokens, use_cache=False).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NOTHING)
    loss.backward()
    handle.remove()
    runs: dict[str, dict[str, list[torch.Tensor]]] = {"whole": {}, "layerwise": {}}
    value = SuffixRunner(architecture, calibration_tokens, 1, 24, labels=labels).backward(
        [site], collected(runs["whole"])
    )
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    LayerwisePass(architecture, calibration_tokens, Store(), batch_tokens=24, labels=labels).backward(
        [site], collected(runs["layerwise"])
    )
    for found in runs.values():
        got = torch.cat(found[site.name]).double()
        assert got.shape == exact[0].shape
        torch.testing.assert_close(got, exact[0], rtol=1e-3, atol=1e-5 * float(exact[0].abs().max()))


def test_processes_share_one_mean(calibration_tokens: torch.Tensor) -> None:
    """Unlike shares of what counts: the gradients of both processes are those of one."""

    class Half(Team):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank, self.size = rank, 2

    architecture = Architecture(tiny_model("llama"))
    site = architecture.sites([1])[0]
    calibration = Calibration(calibration_tokens, "tokens", 0, some_labels(calibration_tokens))
    found: list[torch.Tensor] = []
    for team in (Team(), Half(0), Half(1)):
        seen: dict[str, list[torch.Tensor]] = {}
        calibration_pass(architecture, calibration, Store(), "pass", team).backward([site], collected(seen))
        found.append(torch.cat(seen[site.name]))
    whole, *halves = found
    together = torch.stack(halves, dim=1).flatten(0, 1)  # windows are dealt in turn
    torch.testing.assert_close(together, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def test_positions_whose_predictions_count() -> None:
    labels = torch.tensor([[NOTHING, 5, NOTHING, 6], [5, NOTHING, 6, NOTHING]])
    expected = [[True, False, True, True], [False, True, False, False]]
    assert counted_positions(labels).tolist() == expected
    assert counted_labels(labels) == 3


def test_the_divergence_that_is_measured_is_of_what_counts(calibration_tokens: torch.Tensor) -> None:
    model = tiny_model("llama")
    labels = some_labels(calibration_tokens)
    other, _ = compress(model, layers=1, method="removal", calibration=calibration_tokens)
    with torch.no_grad():
        kl = kl_per_token(*(side(input_ids=calibration_tokens).logits for side in (model, other)))
    exact = float(kl.double()[counted_positions(labels)].mean())
    assert divergence_between(model, other, calibration_tokens, labels) == pytest.approx(exact, rel=1e-5)


def test_loss_curves_are_of_what_counts(calibration_tokens: torch.Tensor) -> None:
    """The removal of a layer, as the curves measure it, against the removal itself; most counted windows come first."""
    model = tiny_model("llama")
    labels = some_labels(calibration_tokens)
    calibration = Calibration(calibration_tokens, "tokens", 0, labels)
    analysis = Analysis(model, calibration)
    analysis.prepare(analysis.architecture.sites(), Silent())
    measurement = CurveMeasurement(analysis.architecture, calibration_tokens, _never, labels=labels)
    # the last window is held out from the fits, and stays last
    order = counted_positions(labels)[:-1].sum(dim=1).argsort(descending=True, stable=True)
    order = torch.cat([order, torch.tensor([len(labels) - 1])])
    assert torch.equal(measurement.tokens, calibration_tokens[order])
    stream = measurement._climb(0, measurement.depth, measurement.walk.entering)
    reference = list(measurement._logits(stream))
    moved = [hidden + 0.1 * torch.randn_like(hidden) for hidden in stream]
    found = measurement._divergence(reference, moved)
    rows = [torch.cat(list(measurement._logits(side))).double() for side in (stream, moved)]
    exact = kl_per_token(*rows)[counted_positions(labels)[order].flatten()].mean()
    assert found == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize("begin", [None, 1])
def test_curves_are_measured_where_most_counts(begin: int | None) -> None:
    """Also where nothing counts in what a window begins with: answers stand at the end of long questions."""
    tokens = torch.arange(5 * 20).view(5, 20)
    labels = torch.full_like(tokens, NOTHING)
    labels[0, 15], labels[1, 12:18], labels[2, 3:5], labels[4, 8:20] = (
        15,
        tokens[1, 12:18],
        tokens[2, 3:5],
        tokens[4, 8:],
    )
    windows, parts, counted = _where_most_counts(tokens, labels, 6, begin)
    assert windows[:, 0].tolist() == [20, 40, 0, 60, 80]  # the fifth is held out from the fits
    assert counted.sum(dim=1).tolist() == [6, 2, 1, 0, 6]
    for window, part, positions in zip(windows, parts, counted, strict=True):
        body = part[begin is not None :]
        start = int(body[0]) - int(window[0]) - (begin is not None)
        assert torch.equal(body, window[start + (begin is not None) : start + 6])
        assert begin is None or int(part[0]) == begin
        whole = counted_positions(labels[int(window[0]) // 20][None])[0]
        assert torch.equal(positions, whole[start : start + 6])


def _never(site: LinearSite) -> Any:
    raise AssertionError(f"{site} was asked for")


# -- evaluating and healing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 5])
def test_perplexity_and_divergence_of_what_counts(stride: int | None) -> None:
    model = tiny_model("llama")
    other, _ = compress(model, layers=1, method="removal", samples=4, seq_len=12)
    text = torch.randint(3, VOCABULARY, (100,))
    counted = torch.rand(100) < 0.4
    marked = text.where(counted, ~text)
    window = 12
    step = stride or window
    nll, kl = [], []
    for start in range(0, 100 - window + 1, step):
        ids = text[start : start + window][None]
        with torch.no_grad():
            dense, small = (side(input_ids=ids).logits[0].double() for side in (model, other))
        for position in range(1, window):
            fresh = start == 0 or step == window or position >= window - step
            if fresh and counted[start + position]:
                nll.append(-functional.log_softmax(small[position - 1], -1)[ids[0, position]])
                kl.append(kl_per_token(dense[position - 1], small[position - 1]))
    score = perplexity(other, marked, window, stride)
    assert score.tokens == len(nll) and score.nll == pytest.approx(float(torch.stack(nll).mean()), rel=1e-5)
    found = divergence(model, other, marked, window, stride)
    assert found.tokens == len(kl) and found.kl == pytest.approx(float(torch.stack(kl).mean()), rel=1e-4)


def test_a_text_without_completions_has_no_perplexity() -> None:
    with pytest.raises(TacoError, match="no window of the text has a completion"):
        perplexity(tiny_model("llama"), ~torch.randint(3, VOCABULARY, (100,)), 12)


def test_the_healing_objective_is_of_what_counts(compressed_tiny: Callable[..., Any]) -> None:
    dense, student, _ = compressed_tiny("llama", "bridge")
    tokens = torch.randint(3, VOCABULARY, (3, 9))
    labels = some_labels(tokens)
    marked = tokens.where(labels != NOTHING, ~tokens)
    objective = Objective(student, dense, "logits")
    with torch.no_grad():
        kl = kl_per_token(*(side(input_ids=tokens).logits for side in (dense, student))).double()
        found = float(objective(marked))
        logits = student(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    exact = float(kl[counted_positions(labels)].mean())
    assert found == pytest.approx(exact, rel=1e-4)
    held = objective.held_out(marked, 2)
    nll = functional.cross_entropy(logits.double(), labels[:, 1:].flatten(), ignore_index=NOTHING)
    assert held["kl"] == pytest.approx(exact, rel=1e-4) and held["nll"] == pytest.approx(float(nll), rel=1e-5)


# -- compress ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, options",
    [
        ("taco", {"keep": 0.8}),
        ("paper", {"layers": 1}),
        ("paper", {"layers": 1, "one_shot": True}),
        ("bridge", {"layers": 1}),
        ("removal", {"layers": 1, "importance": "greedy"}),
    ],
)
def test_what_counts_decides(method: str, options: dict[str, Any]) -> None:
    """Other labels, other factors; labels on everything, the factors of none. Of greedy removal: another loss."""
    model = tiny_model("llama")
    tokens = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(3))
    few = tokens.where(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4)) < 0.3, NOTHING)
    found = {}
    for name, labels in (("none", None), ("all", tokens.clone()), ("few", few)):
        calibration = Calibration(tokens, "tokens", 0, labels)
        compressed, plan = compress(model, method=method, calibration=calibration, **options)
        found[name] = ({key: tensor.clone() for key, tensor in compressed.state_dict().items()}, plan)
        assert parameter_count(compressed) <= parameter_count(model)
        assert ("completions_only" in plan.calibration) == (labels is not None)
    if method == "removal":
        scores = {name: [s for s in plan.importance["scores"] if s is not None] for name, (_, plan) in found.items()}
        assert scores["none"] == scores["all"] != scores["few"]
        return
    none, every, some = (found[name][0] for name in ("none", "all", "few"))
    assert none.keys() == every.keys()
    assert all(torch.equal(none[key], every[key]) for key in none)
    assert none.keys() != some.keys() or any(not torch.equal(none[key], some[key]) for key in none)


def test_published_methods_count_everything() -> None:
    tokens = torch.randint(3, VOCABULARY, (4, 12))
    labelled = Calibration(tokens, "tokens", 0, tokens.clone())
    with pytest.raises(TacoError, match="svd-llm counts all tokens"):
        compress(tiny_model("llama"), method="svd-llm", keep=0.8, calibration=labelled)


@pytest.mark.parametrize("method", ["removal", "svd-llm"])
def test_plans_are_not_made_by_what_would_not_count(method: str) -> None:
    tokens = torch.randint(3, VOCABULARY, (4, 12))
    labelled = Calibration(tokens, "tokens", 0, tokens.clone())
    how = {"layers": 1} if method == "removal" else {"keep": 0.8}
    with pytest.raises(TacoError, match="--completions-only"):
        make_plan(tiny_model("llama"), labelled, CompressionOptions(method=method, **how))


@pytest.mark.parametrize("given", ["self", "text.txt", torch.full((4, 12), 5)])
def test_calibration_that_does_not_say_what_is_to_be_written(given: Any, tmp_path: Path) -> None:
    if given == "text.txt" if isinstance(given, str) else False:
        given = tmp_path / given
        given.write_text("w5 " * 200)
    with pytest.raises(TacoError, match="completions.only"):
        compress(tiny_model("llama"), tokenizer(), layers=1, calibration=given, completions_only=True)


def test_a_stopped_run_goes_on_with_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    tokens = torch.randint(3, VOCABULARY, (8, 12))
    calibration = Calibration(tokens, "tokens", 0, some_labels(tokens))
    whole, plan = compress(model, keep=0.8, calibration=calibration)

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("taco_svd.pipeline.build_upwards", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(model, keep=0.8, calibration=calibration, work_dir=tmp_path / "work")
    again, other = compress(model, keep=0.8, calibration=calibration, work_dir=tmp_path / "work", resume=True)
    assert plan.calibration == other.calibration
    states = whole.state_dict(), again.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_from_the_command_line_to_a_plan_and_back(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    dense = tmp_path / "dense"
    tiny_model("llama").save_pretrained(dense)
    chatting().save_pretrained(dense)
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows("messages", 60)))
    draw = ["--calibration", data, "--samples", "8", "--seq-len", "16"]

    def run(*arguments: Any) -> str:
        code, out, err = invoke(*arguments)
        assert code == 0, err
        found: str = out
        return found

    run("compress", dense, "--out", tmp_path / "small", "--keep", "0.8", *draw, "--completions-only")
    run("compress", dense, "--out", tmp_path / "all", "--keep", "0.8", *draw)
    run("compress", dense, "--out", tmp_path / "again", "--plan", tmp_path / "small", "--calibration", data)
    plan, again = Plan.load(tmp_path / "small"), Plan.load(tmp_path / "again")
    assert plan.calibration == again.calibration and plan.calibration["completions_only"] is True
    files = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("small", "all", "again")}
    assert files["small"] == files["again"] != files["all"]
    shown = run("info", tmp_path / "small")
    assert f"{plan.calibration['counted']} tokens of completions count" in " ".join(shown.split())
    assert "completions alone count" in (tmp_path / "small" / "README.md").read_text()
    plain = tmp_path / "text.txt"
    plain.write_text("w5 w6 " * 200)
    again_on = ["compress", dense, "--out", tmp_path / "off", "--plan", tmp_path / "small", "--calibration", plain]
    code, _, stderr = invoke(*again_on)
    assert code == 2 and "--no-completions-only" in " ".join(stderr.split())
    run(*again_on, "--no-completions-only")
    values = json.loads(
        run("eval", tmp_path / "small", "--text", data, "--window", "16", "--completions-only", "--json")
    )
    every = json.loads(run("eval", tmp_path / "small", "--text", data, "--window", "16", "--json"))
    assert values["completions_only"] is True and 0 < values["tokens"] < every["tokens"]
    assert values["divergence"]["tokens"] == values["tokens"] and "completions_only" not in every
    heal = ["heal", tmp_path / "small", "--out", tmp_path / "healed", "--text", data, "--tokens", "512"]
    healed = json.loads(run(*heal, "--batch", "2", "--completions-only", "--json"))
    assert healed["completions_only"] is True and healed["after"]["kl"] <= healed["before"]["kl"]


@pytest.mark.parametrize(
    "command",
    [
        ["compress", "MODEL", "--out", "OUT", "--keep", "0.8", "--completions-only"],
        ["compress", "MODEL", "--out", "OUT", "--keep", "0.8", "--completions-only", "--calibration", "TEXT"],
        ["eval", "MODEL", "--text", "TEXT", "--completions-only"],
        ["eval", "MODEL", "--completions-only"],
    ],
)
def test_plain_text_is_refused_before_work(command: list[str], tmp_path: Path, invoke: Callable[..., Any]) -> None:
    (tmp_path / "text.txt").write_text("w5 w6 " * 100)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    chatting().save_pretrained(tmp_path / "model")
    places = {"MODEL": tmp_path / "model", "OUT": tmp_path / "out", "TEXT": tmp_path / "text.txt"}
    code, _, stderr = invoke(*[places.get(word, word) for word in command])
    assert code == 2 and "--completions-only: " in stderr and "plain text" in stderr
    assert not (tmp_path / "out").exists()
