"""The two baselines: their losses against loops in float64, what they must not see, and their runs."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import QUICK, call, randomise, refused, trained
from reference import reference_stem, reference_transformer, rms_norm

import evaluate as evaluation
import runtime
import train_bptt
from experiments import train_baseline
from experiments.train_baseline import BaselineConfig, Config, baseline_loss, build, evaluate, load_baseline
from lib.checkpoints import load
from lib.cli import DataError
from model import IGNORE, NETWORKS
from model import build as build_rnn

V, PAD, T = 5, 5, 9
CONTEXTS = pytest.mark.parametrize("context_len", [1, 4, T, 50])        # shorter than a row, as long, longer
MODELS = pytest.mark.parametrize("model", ["transformer", "lstm"])
SIZES = ["--d_model=8", "--n_heads=2", "--layers=1", "--context_len=8", "--hidden=6", "--seq_len=8"]


def networks_for(model="transformer", layers=2, d_model=8, **sizes):
    config = BaselineConfig(model=model, d_model=d_model, n_heads=2, layers=layers, hidden=6, **sizes)
    return randomise(build(config, V))


def batch(B=2):
    x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    y[0, 1] = IGNORE
    x[1, 6:], y[1, 6:] = PAD, IGNORE
    return x, y, (y != IGNORE).sum()


def gradients(networks, *arguments):
    loss, _ = baseline_loss(networks, *arguments)
    return torch.autograd.grad(loss, list(networks.parameters()))


def reference_logits(module, row):
    """The logits (n, V) of one row (n,), token by token."""
    if isinstance(module, train_baseline.LSTM):
        lstm, h, c, states = module.lstm, *torch.zeros(2, module.lstm.hidden_size, dtype=torch.float64), []
        for x in module.embed.weight[row]:
            gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        h = torch.stack(states)
    else:
        sees = [range(max(0, i + 1 - module.context_len), i + 1) for i in range(len(row))]
        h = reference_stem(module.embed, row.tolist())
        h = reference_transformer(module.transformer, h, range(len(row)), sees)
    return rms_norm(h, module.norm.weight) @ module.head.weight.T


# ------------------------------------------------------------------------------------------------------------
# The loss

@pytest.mark.parametrize("model, sizes", [("lstm", {})] + [
    ("transformer", dict(context_len=n, conv_width=w)) for n, w in ((1, 1), (4, 1), (T, 4), (50, 1))])
def test_loss_and_gradients_equal_loops(model, sizes):
    networks, (x, y, count) = networks_for(model, **sizes), batch()
    terms = []
    for b in range(2):
        logits = reference_logits(networks[model], x[b])
        terms += [logits[i].exp().sum().log() - logits[i, y[b, i]] for i in range(T) if y[b, i] != IGNORE]
    loss, reported = baseline_loss(networks, x, y, count)
    expected = sum(terms) / len(terms)
    assert len(terms) == count and reported["train_loss"] is loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    slow = torch.autograd.grad(expected, list(networks.parameters()))
    for ours, theirs in zip(gradients(networks, x, y, count), slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert theirs.abs().max() > 1e-5


@MODELS
def test_losses_and_gradients_are_sums_over_micro_batches(model):
    networks, (x, y, count) = networks_for(model), batch(8)
    parts = [gradients(networks, *part, count) for part in zip(x.chunk(4), y.chunk(4))]
    for whole, *pieces in zip(gradients(networks, x, y, count), *parts, strict=True):
        torch.testing.assert_close(whole, sum(pieces))


@MODELS
def test_loss_is_finite_without_a_target(model):
    networks, (x, y, _) = networks_for(model), batch()
    loss, _ = baseline_loss(networks, x, torch.full_like(y, IGNORE), torch.tensor(0))
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in networks.parameters())


@MODELS
def test_overfitting_one_batch_drives_the_loss_near_its_floor(model):
    networks = build(BaselineConfig(model, d_model=16, n_heads=2, layers=2, context_len=T, hidden=32), V)
    x = torch.randint(V, (5, T))
    x[:, 0] = torch.arange(5)                           # after the first token all is certain
    y = torch.cat([x[:, 1:], torch.full((5, 1), IGNORE)], dim=1)
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-2)
    for step in range(120):
        loss, _ = baseline_loss(networks, x, y, (y != IGNORE).sum())
        assert step or loss > 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_an_lstm_begins_with_an_open_forget_gate():
    lstm = build(BaselineConfig(model="lstm", d_model=8, n_heads=2, hidden=6), V)["lstm"].lstm
    assert (lstm.bias_ih_l0 + lstm.bias_hh_l0)[6:12].tolist() == [1] * 6
    assert (lstm.bias_ih_l0 + lstm.bias_hh_l0)[:6].abs().max() < 1


# ------------------------------------------------------------------------------------------------------------
# What they see

def moved(module, x, i, other):
    """By how much the logits of row x (1, T) change, (T,), if token i is another one."""
    perturbed = x.clone()
    perturbed[0, i] = other
    return (module(perturbed) - module(x))[0].abs().amax(-1)


def test_an_lstm_runs_in_float32_whatever_the_autocast():
    module, x = networks_for("lstm")["lstm"].float(), batch()[0]
    states, expected = [], module.lstm(module.embed(x))[0]
    module.lstm.register_forward_hook(lambda lstm, inputs, outputs: states.append(outputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    assert torch.equal(states[0], expected)


@MODELS
def test_no_logits_see_the_token_that_they_predict_or_a_later_one(model):
    """Logits t predict y_t = x_{t+1}."""
    module, x = networks_for(model, conv_width=4)[model], torch.randint(V, (1, T))
    for i in range(T):
        for other in (PAD, (x[0, i] + 1) % V):
            change = moved(module, x, i, other)
            assert not change[:i].any() and change[i] > 1e-6


@CONTEXTS
@pytest.mark.parametrize("layers, conv_width", [(1, 1), (2, 1), (2, 4)])
def test_a_token_has_no_influence_beyond_what_layers_and_convolution_reach(context_len, layers, conv_width):
    module = networks_for(layers=layers, context_len=context_len, conv_width=conv_width)["transformer"]
    x = torch.randint(V, (1, T))
    for i in range(T):
        change, end = moved(module, x, i, (x[0, i] + 1) % V), i + conv_width + layers * (context_len - 1)
        assert change[i:end].min() > 1e-6
        assert not len(change[end:]) or change[end:].max() < 1e-12


@MODELS
def test_documents_longer_than_the_context_have_the_same_logits_whole_and_with_pad_behind(model):
    networks, x = networks_for(model, context_len=4), torch.randint(V, (3, 40))
    whole = networks[model](x)
    for row, logits in zip(x, whole):
        torch.testing.assert_close(logits, reference_logits(networks[model], row), rtol=0, atol=1e-4)
    padded = torch.cat([x[:, :25], torch.full((3, 15), PAD)], dim=1)
    torch.testing.assert_close(networks[model](padded)[:, :25], whole[:, :25], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Numbers and presets

@MODELS
def test_held_out_numbers_equal_a_reference(model):
    networks, (x, y, _) = networks_for(model, context_len=4), batch(5)
    losses, right = [], []
    for row, targets in zip(x, y):
        logits = reference_logits(networks[model], row)
        for i in range(T):
            if targets[i] != IGNORE:
                losses.append(-logits[i].log_softmax(0)[targets[i]].item())
                right.append(float(logits[i].argmax() == targets[i]))
    numbers = evaluate(networks[model], x, y, {"statistics": {"entropy_per_character": 0.25}}, rows=2)
    assert numbers == pytest.approx({"val_rnn_loss": np.mean(losses), "val_rnn_accuracy": np.mean(right),
                                     "val_gap_to_floor": np.mean(losses) - 0.25}, rel=1e-5)
    both = evaluate(networks[model], x, y, {}, errors=True)
    assert both.keys() == {f"val_rnn_{name}" for name in ("loss", "accuracy", "loss_error", "accuracy_error")}


def test_numbers_are_finite_without_a_target():
    x, y, _ = batch()
    numbers = evaluate(networks_for()["transformer"], x, torch.full_like(y, IGNORE), {})
    assert numbers == {"val_rnn_loss": 0, "val_rnn_accuracy": 0}


@pytest.mark.parametrize("preset", train_baseline.PRESETS)
@MODELS
def test_presets_are_as_large_as_the_rnn_and_read_the_same_rows(model, preset):
    size, _, dataset = preset.partition("/")
    ours, rnn = (script.Config(**script.PRESETS[size] | script.PRESETS[preset])
                 for script in (train_baseline, train_bptt))
    vocab_size = {"": 128, "tinystories": 256, "text": 256}.get(dataset, 17)
    with torch.device("meta"):
        both = (build(replace(ours, model=model), vocab_size),
                build_rnn(rnn, vocab_size, ("updater", "readout")))
    sizes = [sum(p.numel() for p in networks.parameters()) for networks in both]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    assert (ours.seq_len, ours.p_start) == (rnn.seq_len, rnn.p_start)


@pytest.mark.parametrize("flags, name", [
    (["--d_model=12", "--n_heads=4"], "d_model"), (["--layers=0"], "layers"), (["--model=gru"], "model"),
    (["--p_start=2"], "p_start")])
def test_impossible_sizes_are_refused(flags, name):
    refused(call(train_baseline, *flags), 2, name)


# ------------------------------------------------------------------------------------------------------------
# Runs and checkpoints

def train(data_dir, out, *flags, dataset="retrieval"):
    where = f"--dataset={dataset}", f"--data_dir={data_dir}", f"--out_dir={out}"
    trained(train_baseline, *QUICK, *SIZES, *where, *flags)
    return out


@MODELS
def test_a_checkpoint_is_the_module_that_was_evaluated(model, data_dir, tmp_path):
    folder = train(data_dir, tmp_path / "run", f"--model={model}", dataset="fables")
    checkpoint = load(folder)
    module = load_baseline(checkpoint)
    assert checkpoint["stage"] == model and module.config.hidden == 6
    assert {name.split(".")[0] for name in checkpoint["model"]} == {model} and model not in NETWORKS
    data = train_baseline.datasets.load("fables", data_dir)
    x, y = train_baseline.datasets.held_out(data, 4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (logged,) = (line for line in lines if line["step"] == 4 and "val_rnn_loss" in line)
    for name, value in evaluate(module, x, y, data.meta).items():
        assert logged[name] == pytest.approx(value, rel=1e-6)


@MODELS
def test_a_resumed_run_is_the_run_that_was_never_stopped(model, data_dir, tmp_path, monkeypatch):
    whole, parts, flag = tmp_path / "whole", tmp_path / "parts", f"--model={model}"
    train(data_dir, whole, flag)
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Run, "should_stop", lambda run, step: step == 2)
        where = "--dataset=retrieval", f"--data_dir={data_dir}", f"--out_dir={parts}"
        assert "stopped at step 2" in call(train_baseline, *QUICK, *SIZES, *where, flag).out
    before, ended = load(parts)["model"], load(whole)["model"]
    train(data_dir, parts, flag, "--resume")
    for name, w in load(parts)["model"].items():
        assert torch.equal(w, ended[name]) and not torch.equal(w, before[name])
    losses = [[line.get("train_loss") for line in runtime.read_log(folder / "metrics.jsonl")
               if "train_loss" in line] for folder in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_it_shares_no_weights_with_an_rnn_and_evaluate_says_so(data_dir, tmp_path):
    folder = train(data_dir, tmp_path / "run")
    where = "--dataset=retrieval", f"--data_dir={data_dir}"
    flags = f"--out_dir={tmp_path / 'b'}", f"--init_from={folder}"
    refused(call(train_bptt, *QUICK, *where, *flags), 1, "another architecture")
    refused(call(evaluation, f"--ckpt={folder}", where[1]), 1, "does not fit")


@pytest.mark.parametrize("damage", [{"layers": 10**9}, {"model": "lstm"}, {"d_model": 16}, {"tokens": 2}])
def test_a_checkpoint_that_does_not_fit_its_sizes_is_refused(damage):
    config = Config(d_model=8, n_heads=2, layers=1, hidden=6)
    sizes = {name: getattr(config, name) for name in BaselineConfig.__dataclass_fields__}
    weights = build(config, V).state_dict()
    checkpoint = {"model": weights, "model_config": sizes, "data": {"vocab_size": V}}
    module = load_baseline(checkpoint)
    assert torch.equal(module.head.weight, weights["transformer.head.weight"])
    with pytest.raises(DataError, match="does not fit"):
        load_baseline(checkpoint | {"model_config": sizes | damage})
