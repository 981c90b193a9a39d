"""Healing: its objectives against plain formulas, what it may change, and that a killed run gives the same bits."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import SafetensorError

from taco_svd import Plan, TacoError, compress, healing, healing_files, healing_run, save_compressed
from taco_svd.cli_heal import token_count
from taco_svd.errors import DiskFullError
from taco_svd.healing import (
    HealingOptions,
    Objective,
    balance,
    find_learning_rate,
    heal,
    prepare,
    replacements,
    trainable_names,
    window_order,
)
from taco_svd.healing_files import HealingFiles
from taco_svd.healing_run import heal_checkpoint
from taco_svd.module_tree import structural_copy
from taco_svd.replacement import LowRankBridge, LowRankLinear

from .tiny_models import VOCABULARY, tiny_model

SMALL = HealingOptions(tokens=6 * 4 * 8, batch=4, seq_len=8, held_out=4, evaluations=3, lr=0.05)


def windows_for(options: HealingOptions, count: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, VOCABULARY, (count + options.held_out, options.seq_len), generator=generator)
    return tokens[options.held_out :], tokens[: options.held_out]


def own_copy(model):
    """A copy with parameters of its own: healing trains in place, the cached model must stay as it is."""
    copied = structural_copy(model)
    for module in copied.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone())
    copied.tie_weights()
    return copied


# -- objectives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, method", [("llama", "bridge"), ("gpt2", "taco"), ("gemma2", "bridge")])
def test_logits_objective_is_the_mean_kl(compressed_tiny, name, method):
    dense, compressed, _ = compressed_tiny(name, method)
    ids = torch.randint(3, VOCABULARY, (3, 9))
    with torch.no_grad():
        p, q = (model(ids).logits.double().softmax(-1) for model in (dense, compressed))
        found = Objective(compressed, dense, "logits")(ids)
    slow = (p * (p / q).log()).sum(-1).mean()
    # float32 logits: the divergence is a difference of logarithms, each with a rounding error of its size
    torch.testing.assert_close(found.double(), slow, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name, method, kind", [("gemma2", "bridge", "logits"), ("llama", "taco", "hidden")])
def test_pieces_of_the_logits_give_the_same_losses_and_gradients(compressed_tiny, request, name, method, kind):
    dense, compressed, _ = compressed_tiny(name, method)
    student = own_copy(compressed)
    trained = prepare(student, trainable_names(student))
    ids = torch.randint(3, VOCABULARY, (3, 9))

    def losses_and_gradients():
        objective = Objective(student, dense, kind)
        loss = objective(ids)
        gradients = torch.autograd.grad(loss, list(trained.values()))
        return {"loss": float(loss.detach()), **objective.held_out(ids, 3)}, gradients

    losses, gradients = losses_and_gradients()
    request.getfixturevalue("seven")
    again, cut = losses_and_gradients()
    with torch.no_grad():
        logits = student(ids).logits[:, :-1].double()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert losses["nll"] == pytest.approx(float(nll), rel=1e-5)
    assert losses["objective"] == pytest.approx(losses["loss"], rel=1e-4)
    # differences of logarithms, each of which is off by a rounding of its size
    assert again == pytest.approx(losses, rel=1e-3, abs=1e-6)
    for one, two in zip(gradients, cut, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("name, method", [("llama", "bridge"), ("gpt2", "taco"), ("llama", "removal")])
def test_hidden_objective_compares_states_behind_every_layer_from_the_first_replacement(compressed_tiny, name, method):
    dense, compressed, plan = compressed_tiny(name, method)
    ids = torch.randint(3, VOCABULARY, (3, 9))
    with torch.no_grad():
        theirs = dense(ids, output_hidden_states=True).hidden_states  # [i + 1] leaves layer i; the last is normed
        ours = compressed(ids, output_hidden_states=True).hidden_states
        found = Objective(compressed, dense, "hidden")(ids)
    kept = plan.structure.kept
    # behind kept layer p stands what layer kept[p + 1] of the dense model takes in
    if method == "bridge":
        positions = range(kept.index(1), len(kept) - 1)  # the bridge follows layer 1, the last before the removed
    elif method == "taco":
        positions = range(2, len(kept) - 1)
    else:
        positions = range(len(kept) - 1)
    errors = [
        ((ours[position + 1] - theirs[kept[position + 1]]) ** 2).sum() / (theirs[kept[position + 1]] ** 2).sum()
        for position in positions
    ]
    errors.append(last_layer_error(dense, compressed, ids))
    torch.testing.assert_close(found, torch.stack(errors).mean(), rtol=1e-4, atol=1e-7)


@torch.no_grad()
def last_layer_error(dense, compressed, ids):
    """Relative squared error of what the last layers give, before the final norm."""
    states = []
    for model in (compressed, dense):
        layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
        hook = layers[-1].register_forward_hook(
            lambda _, __, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
        model(ids)
        hook.remove()
    return ((states[0] - states[1]) ** 2).sum() / (states[1] ** 2).sum()


# -- what is trained -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "bridge"])
def test_balanced_factors_have_the_same_product(kind):
    made = LowRankLinear(13, 9, 4, True) if kind == "linear" else LowRankBridge(11, 3, True, 1e-6)
    made = made.double()
    with torch.no_grad():
        made.u.copy_(torch.randn_like(made.u) * 100)
        made.v.copy_(torch.randn_like(made.v) / 100)
    product = made.u @ made.v
    balance(made)
    scale = float(product.detach().abs().max())
    eps = torch.finfo(torch.float64).eps
    torch.testing.assert_close(made.u @ made.v, product, rtol=0, atol=100 * eps * scale)
    torch.testing.assert_close(made.u.T @ made.u, made.v @ made.v.T, rtol=0, atol=1000 * eps * scale)


@pytest.mark.parametrize("objective", ["logits", "hidden"])
@pytest.mark.parametrize("name, method", [("llama", "bridge"), ("gpt2", "taco"), ("phi3", "taco")])
def test_only_replacements_change_and_held_out_improves(compressed_tiny, name, method, objective):
    dense, cached, _ = compressed_tiny(name, method)
    student = own_copy(cached)
    before = {key: value.detach().clone() for key, value in student.named_parameters()}
    options = HealingOptions(
        tokens=40 * 8 * 8, batch=8, seq_len=8, held_out=16, evaluations=4, lr=0.03, objective=objective
    )
    train, held_out = windows_for(options, 400)
    state = heal(student, dense, train, held_out, options, torch.float32)
    names = set(state.best)
    owners = set(replacements(student))
    assert names == {key for key in before if key.rpartition(".")[0] in owners}
    for key, value in student.named_parameters():
        assert torch.equal(value, before[key]) != (key in names), key
    assert all(parameter.requires_grad == (key in names) for key, parameter in student.named_parameters())
    first, best = state.curve[0], min(point["objective"] for point in state.curve)
    assert best < 0.95 * first["objective"]
    assert [point["step"] for point in state.curve] == [0, 10, 20, 30, 40] and first["train"] is None
    assert next(p for p in state.curve if p["step"] == state.best_step)["objective"] == best


@pytest.mark.parametrize("objective", ["logits", "hidden"])
@pytest.mark.parametrize("name, method", [("llama", "bridge"), ("gpt2", "taco")])
def test_the_learning_rate_is_the_best_of_those_tried_along_the_signs(compressed_tiny, name, method, objective):
    dense, cached, _ = compressed_tiny(name, method)
    student = own_copy(cached).eval()
    trained = prepare(student, trainable_names(student))
    before = {key: parameter.detach().clone() for key, parameter in trained.items()}
    loss = Objective(student, dense, objective)
    scales = {key: 0.5 + 0.01 * place for place, key in enumerate(trained)}
    windows = torch.randint(3, VOCABULARY, (24, 8), generator=torch.Generator().manual_seed(6))
    found = find_learning_rate(trained, scales, loss, windows, 4)
    assert all(torch.equal(parameter, before[key]) and parameter.grad is None for key, parameter in trained.items())

    gradients = torch.autograd.grad(sum(loss(rows) for rows in windows[:16].split(4)), list(trained.values()))
    losses = []
    with torch.no_grad():
        for doubling in range(healing.RATES):
            for (key, parameter), gradient in zip(trained.items(), gradients, strict=True):
                parameter.copy_(before[key] - healing.LEAST_RATE * 2**doubling * scales[key] * gradient.sign())
            losses.append(float(loss(windows[16:20]) + loss(windows[20:])))
    best = next(
        place for place in range(healing.RATES) if place + 1 == len(losses) or losses[place + 1] >= losses[place]
    )
    assert found == healing.LEAST_RATE * 2**best


def test_a_model_that_is_near_the_dense_one_is_healed_without_a_word_about_rates(compressed_tiny):
    """Steps that suit a model that has lost much would throw this one out of its valley."""
    dense, cached, _ = compressed_tiny("llama", "taco")
    student = own_copy(cached)
    with torch.no_grad():
        trained = trainable_names(student)
        generator = torch.Generator().manual_seed(7)
        for key, parameter in student.named_parameters():
            if key in trained:
                parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape, generator=generator))
    options = HealingOptions(tokens=60 * 8 * 8, batch=8, seq_len=8, held_out=16, evaluations=3)
    state = heal(student, dense, *windows_for(options, 400), options, torch.float32)
    assert 0 < state.lr <= 0.128 and state.best_step > 0
    assert min(point["kl"] for point in state.curve) < state.curve[0]["kl"]


def test_norms_are_trained_when_asked(compressed_tiny):
    _, compressed, _ = compressed_tiny("llama", "bridge")
    more = set(trainable_names(compressed, norms=True)) - set(trainable_names(compressed))
    assert more == {
        f"model.layers.{index}.{norm}.weight"
        for index in range(3)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }


def test_there_is_nothing_to_heal_after_bare_removal(compressed_tiny):
    with pytest.raises(TacoError, match="nothing to heal"):
        trainable_names(compressed_tiny("llama", "removal")[1])


def test_the_best_and_not_the_last_parameters_are_kept(compressed_tiny):
    dense, cached, _ = compressed_tiny("llama", "bridge")
    student = own_copy(cached)
    start = {name: student.get_parameter(name).detach().clone() for name in trainable_names(student)}
    prepare(copy := own_copy(cached), list(start))  # balanced, as the run starts
    options = HealingOptions(tokens=10 * 32, batch=4, seq_len=8, held_out=4, evaluations=2, lr=9.0)
    state = heal(student, dense, *windows_for(options), options, torch.float32)
    assert state.curve[-1]["objective"] > state.curve[0]["objective"]  # that step size does harm
    assert state.best_step == 0
    for name, value in state.best.items():
        assert torch.equal(value, copy.get_parameter(name))


def test_sixteen_bit_models_train_float32_factors_and_keep_rounded_ones(compressed_tiny):
    dense, cached, _ = compressed_tiny("llama", "bridge", torch.bfloat16)
    student = own_copy(cached)
    state = heal(student, dense, *windows_for(SMALL), SMALL, torch.bfloat16)
    assert all(value.dtype == torch.float32 for value in state.factors.values())
    assert all(value.dtype == torch.bfloat16 for value in state.best.values())
    # the last step was followed by an evaluation of rounded parameters, and training has its own back
    assert any(not torch.equal(value, value.bfloat16().float()) for value in state.factors.values())
    assert student.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_windows_come_once_before_any_comes_again():
    options = HealingOptions(tokens=5 * 4 * 8, batch=4, seq_len=8, seed=3)
    order = window_order(7, options)
    assert len(order) == 20 and sorted(order[:7].tolist()) == list(range(7)) == sorted(order[7:14].tolist())
    assert torch.equal(order, window_order(7, options))
    assert not torch.equal(order, window_order(7, HealingOptions(tokens=5 * 4 * 8, batch=4, seq_len=8, seed=4)))


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    options = HealingOptions(tokens=1000 * 8, batch=1, seq_len=8, lr=0.5)
    rates = [options.learning_rate(step) for step in range(options.steps)]
    top = rates.index(max(rates))
    assert max(rates) == 0.5 and top in (19, 20)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 1e-5 * 0.5


# -- files and runs ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As SIGKILL: nothing in the package catches it."""


class KillAt:
    def __init__(self, step):
        self.step_count = step

    def step(self, title):
        from contextlib import contextmanager

        @contextmanager
        def opened():
            def report(done, total):
                if title == "healing" and done == self.step_count:
                    raise Killed

            yield report

        return opened()


@pytest.fixture
def saved(compressed_tiny, tmp_path):
    """A bridged tiny llama on disk; its dense model lies beside it under the plan's name."""
    dense, compressed, plan = compressed_tiny("llama", "bridge")
    save_compressed(compressed, plan, tmp_path / "small")
    dense.save_pretrained(tmp_path / "dense")
    return tmp_path


@pytest.mark.parametrize("lr", [0.05, 0.0])
def test_a_killed_run_goes_on_to_the_same_bits(saved, monkeypatch, lr):
    options = dataclasses.replace(SMALL, lr=lr)  # 0: found again when the run goes on
    monkeypatch.setattr("taco_svd.healing_files.SECONDS_BETWEEN_STATES", 0.0)
    monkeypatch.setattr("taco_svd.healing_files.STATE_SHARE", 0)
    arguments = (saved / "small", saved / "straight", "self", options, saved / "dense")
    straight = heal_checkpoint(*arguments)
    assert not (saved / "straight.healing").exists()
    for step in (1, 4):
        with pytest.raises(Killed):
            heal_checkpoint(saved / "small", saved / "killed", "self", options, saved / "dense", progress=KillAt(step))
        assert not (saved / "killed").exists() and (saved / "killed.healing").is_dir()
        assert not list((saved / "killed.healing").glob("*.pt")) and not list(saved.glob("**/*.pkl"))
    # what was kept last is the state after step 3: the run must not begin anew
    assert json.loads((saved / "killed.healing" / "state.json").read_text())["step"] >= 3
    resumed = heal_checkpoint(saved / "small", saved / "killed", "self", options, saved / "dense")
    assert resumed == straight
    for file in ("model.safetensors", "healing.json", "taco_plan.json"):
        assert (saved / "killed" / file).read_bytes() == (saved / "straight" / file).read_bytes(), file
    assert not (saved / "killed.healing").exists()


def test_a_plan_says_of_healing_what_is_true_of_its_model(saved, calibration_tokens, invoke):
    heal_checkpoint(saved / "small", saved / "healed", "self", SMALL, saved / "dense")
    healed = Plan.load(saved / "healed")
    shown = invoke("info", saved / "healed")[1]
    assert "before healing" in shown and f"-> {healed.result['healing']['after']['kl']:.4f}" in shown
    assert "before healing" not in invoke("info", saved / "small")[1]
    # carried out again it gives the model before healing
    again = compress(tiny_model("llama"), plan=healed, calibration=calibration_tokens)[1]
    assert again == Plan.load(saved / "small")
    # and what cannot be measured (nothing is held out of one window) is not taken over from another run
    assert again.result["measured_loss"] > 0
    one = compress(tiny_model("llama"), plan=again, calibration=calibration_tokens[:1])[1]
    assert "measured_loss" not in one.result and one.result["consistency"] == []
    for damaged in ({"before": 1}, [], {"before": {"kl": "x"}, "after": {"kl": 10**400}}):
        (saved / "small" / "taco_plan.json").unlink()
        dataclasses.replace(again, result={**again.result, "healing": damaged}).save(saved / "small" / "taco_plan.json")
        assert invoke("info", saved / "small")[0] == 0


def test_a_run_goes_on_only_as_it_began(saved, monkeypatch):
    monkeypatch.setattr("taco_svd.healing_files.SECONDS_BETWEEN_STATES", 0.0)
    monkeypatch.setattr("taco_svd.healing_files.STATE_SHARE", 0)
    with pytest.raises(Killed):
        heal_checkpoint(saved / "small", saved / "out", "self", SMALL, saved / "dense", progress=KillAt(3))
    other = HealingOptions(**{**SMALL.to_dict(), "lr": 0.01})
    with pytest.raises(TacoError, match="another options"):
        heal_checkpoint(saved / "small", saved / "out", "self", other, saved / "dense")
    (saved / "text.txt").write_text("some words")
    with pytest.raises(TacoError, match="another text"):
        heal_checkpoint(saved / "small", saved / "out", str(saved / "text.txt"), SMALL, saved / "dense")
    state = next((saved / "out.healing").glob("state-*.safetensors"))
    state.write_bytes(state.read_bytes()[:50])
    with pytest.raises(TacoError, match="not readable"):
        heal_checkpoint(saved / "small", saved / "out", "self", SMALL, saved / "dense")
    assert not (saved / "out").exists()
    with pytest.raises(TacoError, match="not the work directory"):
        heal_checkpoint(saved / "small", saved / "out", "self", SMALL, saved / "dense", work=saved / "dense")


def test_a_run_goes_on_only_in_the_dtype_it_began_in(compressed_tiny, tmp_path):
    dense, student, _ = compressed_tiny("llama", "bridge", torch.bfloat16)
    HealingFiles(tmp_path / "work", SMALL, student, dense, "self").begin(*windows_for(SMALL))
    HealingFiles(tmp_path / "work", SMALL, student, dense, "self")
    with pytest.raises(TacoError, match="another dtype"):
        HealingFiles(tmp_path / "work", SMALL, own_copy(student).float(), dense, "self")


def test_a_run_goes_on_only_with_the_dense_model_it_began_with(compressed_tiny, tmp_path):
    dense, student, _ = compressed_tiny("llama", "bridge")
    HealingFiles(tmp_path / "work", SMALL, student, dense, "self").begin(*windows_for(SMALL))
    other = own_copy(dense)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(TacoError, match="another dense model"):
        HealingFiles(tmp_path / "work", SMALL, student, other, "self")


def test_two_runs_do_not_share_a_work_directory(compressed_tiny, tmp_path):
    dense, student, _ = compressed_tiny("llama", "bridge")
    work = tmp_path / "work"
    files = HealingFiles(work, SMALL, student, dense, "self")
    files.begin(*windows_for(SMALL))
    with ThreadPoolExecutor(1) as another, pytest.raises(TacoError, match="Another run is working in"):
        another.submit(HealingFiles, work, SMALL, student, dense, "self").result()
    del files
    with ThreadPoolExecutor(1) as another:
        assert another.submit(lambda: HealingFiles(work, SMALL, student, dense, "self").windows()).result()


def test_a_state_is_whole_or_not_there(compressed_tiny, tmp_path, monkeypatch):
    """A crash between writing the tensors and naming them leaves the state before."""
    dense, cached, _ = compressed_tiny("llama", "bridge")
    student = own_copy(cached)
    files = HealingFiles(tmp_path / "work", SMALL, student, dense, "self")
    files.begin(*windows_for(SMALL))
    states = []

    def keep(state):
        if state.step == 4:
            monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("crash")))
        states.append(state.step)
        files.write(state)

    with pytest.raises(OSError, match="crash"):
        heal(student, dense, *windows_for(SMALL), SMALL, torch.float32, keep=keep)
    monkeypatch.undo()
    assert states == [1, 2, 3, 4] and files.state().step == 3


@pytest.mark.parametrize("file", ["windows", "state"])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on(file, saved, monkeypatch):
    real = healing_files.save_file

    def full(tensors, path):
        if file in path.name:
            path.write_bytes(b"cut")
            raise SafetensorError("Error while serializing: IoError(No space left on device (os error 28))")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(healing_files, "save_file", full)
        with pytest.raises(DiskFullError, match="same command"):
            heal_checkpoint(saved / "small", saved / "out", "self", SMALL, saved / "dense")
    assert not (saved / "out").exists()
    heal_checkpoint(saved / "small", saved / "out", "self", SMALL, saved / "dense")
    assert (saved / "out").is_dir() and not (saved / "out.healing").exists()


def test_ctrl_c_says_how_to_go_on(saved, invoke, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(healing_run, "heal", interrupted)
    common = ("--text", "self", "--tokens", "256", "--batch", "4", "--seq-len", "8", "--dense", saved / "dense")
    code, stdout, stderr = invoke("heal", saved / "small", "--out", saved / "healed", *common)
    assert code == 130 and stdout == "" and "same command" in stderr and "healed.healing" in stderr
    monkeypatch.setattr(healing_run, "load_model", interrupted)
    code, _, stderr = invoke("heal", saved / "small", "--out", saved / "healed", *common)
    assert code == 130 and "nothing was written" in stderr


def test_command_line(saved, invoke):
    common = ("--text", "self", "--tokens", "256", "--batch", "4", "--seq-len", "8", "--dense", saved / "dense")
    code, stdout, stderr = invoke("heal", saved / "small", "--out", saved / "healed", *common, "--json")
    assert code == 0, stderr
    made = json.loads(stdout)
    assert made["after"]["kl"] <= made["before"]["kl"] and made["tokens"] == 256
    record = json.loads((saved / "healed" / "taco_plan.json").read_text())["result"]["healing"]
    assert record["after"] == made["after"] and "curve" not in record
    assert json.loads((saved / "healed" / "healing.json").read_text())["curve"][0]["step"] == 0
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib, the extra taco-kernels[plot]")
    assert (saved / "healed" / "healing.png").read_bytes().startswith(b"\x89PNG")
    assert made["lr"] > 0
    code, stdout, _ = invoke("eval", saved / "healed", "--text", "self", "--window", "8", "--against", saved / "dense")
    assert code == 0 and "KL(dense || this)" in stdout


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--tokens", "many"], "--tokens"),
        (["--tokens", "0"], "--tokens"),
        (["--objective", "magic"], "--objective"),
        (["--lr", "-1"], "--lr"),
        (["--seq-len", "1"], "--seq-len"),
        (["--seq-len", "65"], "context"),
        (["--batch", "0"], "at least 1"),
        (["--text", "missing.txt"], "No such text"),
        (["--dtype", "int8"], "--dtype"),
        (["--dense", "SMALL"], "compressed model"),
        (["--out", "SMALL"], "exists"),
        (["--work", "OUT"], "--out"),
        (["--work", "FILE"], "is a file"),
        (["--work", "IN A FILE"], "cannot be made"),
        (["--seed", "9" * 30], "--seed"),
        ([], "was not found"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(saved, invoke, arguments, says):
    given = {"--text": "self", "--out": saved / "out", "--seq-len": "8"}
    given.update(zip(arguments[::2], arguments[1::2], strict=True))
    config = saved / "dense" / "config.json"
    places = {"SMALL": saved / "small", "OUT": saved / "out" / "work", "FILE": config, "IN A FILE": config / "work"}
    words = [str(places.get(word, word)) for pair in given.items() for word in pair]
    code, stdout, stderr = invoke("heal", saved / "small", *words)
    assert code == 2 and says in stderr and len(stderr.strip().splitlines()) == 1 and stdout == ""
    assert sorted(path.name for path in saved.iterdir()) == ["dense", "small"]


@pytest.mark.parametrize("text, count", [("1M", 1_000_000), ("500k", 500_000), ("0.5m", 500_000), ("2048", 2048)])
def test_token_counts(text, count):
    assert token_count(text) == count


def test_a_short_text_shares_no_token_between_training_and_held_out(tmp_path):
    from taco_svd.checkpoint import DEFAULT_MODEL, load_model
    from taco_svd.healing_files import healing_windows

    model, tokenizer = load_model(DEFAULT_MODEL)
    words = [f"word{index} and {index * 7} more" for index in range(400)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    options = HealingOptions(tokens=100_000, batch=2, seq_len=32, held_out=1000)
    train, held_out = healing_windows(str(tmp_path / "text.txt"), model, tokenizer, options)
    assert len(held_out) == (len(train) + len(held_out)) // 10
    rows = [tuple(row.tolist()) for row in torch.cat([train, held_out])]
    assert len(set(rows)) == len(rows)  # numbers make every window different, so equal rows would be overlaps
    (tmp_path / "tiny.txt").write_text("three words only")
    with pytest.raises(TacoError, match="two windows"):
        healing_windows(str(tmp_path / "tiny.txt"), model, tokenizer, options)
    with pytest.raises(TacoError, match="tokenizer"):
        healing_windows(str(tmp_path / "text.txt"), tiny_model("llama"), None, options)


@pytest.mark.parametrize("count", [400, 40_000])  # a text that is tokenised whole, and one of which excerpts are
def test_held_out_windows_are_not_those_that_the_model_was_calibrated_on(tmp_path, count):
    from taco_svd.calibration import load_calibration
    from taco_svd.checkpoint import DEFAULT_MODEL, load_model
    from taco_svd.healing_files import healing_windows

    model, tokenizer = load_model(DEFAULT_MODEL)
    (tmp_path / "text.txt").write_text(" ".join(f"word{index} and {index * 7} more" for index in range(count)))
    calibration = load_calibration(tmp_path / "text.txt", model, tokenizer, samples=32, seq_len=32)
    options = HealingOptions(tokens=4000, seq_len=32)
    train, held_out = healing_windows(str(tmp_path / "text.txt"), model, tokenizer, options)
    calibrated = {tuple(row) for row in calibration.tokens.tolist()}
    assert not calibrated & {tuple(row) for row in held_out.tolist()}
    assert calibrated & {tuple(row) for row in train.tolist()}  # the same draw, or the test shows nothing


def test_the_command_line_hands_every_option_on(invoke, monkeypatch, tmp_path):
    asked = {}

    def fake(directory, out, text, options, dense, work, dtype, device, force, progress):
        asked.update(options=options, paths=(directory, out, text, dense, work), rest=(dtype, device, force))
        raise TacoError("far enough")

    monkeypatch.setattr(healing_run, "heal_checkpoint", fake)
    code, _, stderr = invoke(
        "heal", tmp_path / "a", "--out", tmp_path / "b", "--text", "self", "--tokens", "3k", "--objective", "hidden",
        "--dense", "dense", "--lr", "0.5", "--batch", "5", "--seq-len", "17", "--norms", "--held-out", "11",
        "--evaluations", "7", "--work", tmp_path / "c", "--dtype", "bfloat16", "--seed", "13", "--force",
    )  # fmt: skip
    assert code == 2 and "far enough" in stderr
    assert asked["options"] == HealingOptions(3000, "hidden", 0.5, 5, 17, 13, 11, 7, True)
    assert asked["paths"] == (tmp_path / "a", tmp_path / "b", "self", "dense", tmp_path / "c")
    assert asked["rest"] == ("bfloat16", "cpu", True)
