"""What holds for all three stages: losses equal loops, micro-batches and processes change nothing, a run
resumes bit for bit, and what it writes is whole."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BPTT_SIZES, PAIRS, QUICK, ROLL_OUTS, SIZES, call, randomise, refused, trained
from reference import bptt_losses, dmt_losses, smt_losses
from torch import nn

import train_bptt
import train_dmt
import train_smt
from model import IGNORE, ModelConfig, build

TRAIN = {"smt": train_smt, "dmt": train_dmt, "bptt": train_bptt}
STAGES = pytest.mark.parametrize("stage", TRAIN)
ROOT = Path(train_smt.__file__).parent


# ----------------------------------------------------------------------------------------------------------
# The losses

V, T = 5, 8
SIZES_OF_CASES = dict(d_model=8, n_heads=2, memory_tokens=2, updater_layers=1)


def smt_case(n_tokens=V, t=(3, 7, 0), **options):
    """A case: a stage's networks, count(x, y), loss(x, y, counts), the losses as loops reference(x, y)."""
    sizes = SIZES_OF_CASES | dict(encoder_layers=1, context_len=5, future_len=4, batch_size=4)
    config = train_smt.Config(**sizes | dict(positions=len(t), lambda_dyn=2.0, lambda_unif=0.5) | options)
    t = torch.tensor(t)
    networks = build(config, n_tokens)
    reached = dict(dec={"encoder", "decoder"}, dyn={"encoder", "updater"}, unif={"encoder"}, read={"readout"})
    if config.encoder == "causal":
        reached["trunk"] = {"encoder", "decoder"}
    return SimpleNamespace(
        networks=networks, pad=n_tokens, reached=reached,
        count=lambda x, y: train_smt.count_terms(x, y, t, config, n_tokens),
        loss=lambda x, y, counts: train_smt.smt_loss(networks, x, y, t, counts, config),
        reference=lambda x, y: smt_losses(networks, x, y, t, config, n_tokens))


def dmt_case(n_tokens=V, begins=(0,), h=T, labelled=range(T), lambda_dyn=3.0, **options):
    sizes = SIZES_OF_CASES | dict(encoder_layers=1, context_len=4, future_len=3) | options
    networks = build(ModelConfig(**sizes), n_tokens).requires_grad_(False)
    begins, labelled = torch.tensor(begins), torch.tensor([*labelled])
    config = train_dmt.Config(lambda_dyn=lambda_dyn)
    for name in ("updater", "readout"):
        networks[name].requires_grad_()

    def steps(tokens):
        return train_dmt.cut(tokens, begins, h)[:, labelled]

    def loss(x, y, counts):
        encoder, updater = networks["encoder"], networks["updater"]
        collected = train_dmt.roll_out_and_label(encoder, updater, x, begins, h, labelled)
        assert not any(memories.requires_grad for memories in collected)
        return train_dmt.dmt_loss(networks, *collected, steps(x), steps(y), counts, config)

    return SimpleNamespace(
        networks=networks, pad=n_tokens, reached=dict(dyn={"updater"}, read={"readout"}), loss=loss,
        count=lambda x, y: train_dmt.count_terms(steps(x), steps(y), n_tokens),
        reference=lambda x, y: dmt_losses(networks, x, y, begins, h, labelled, lambda_dyn, n_tokens))


def bptt_case(n_tokens=V, truncate=0, **options):
    networks = build(ModelConfig(**SIZES_OF_CASES | options), n_tokens, ("updater", "readout"))
    networks.initial_memory = nn.Parameter(torch.randn(2, networks["updater"].embed.weight.shape[1]))
    return SimpleNamespace(
        networks=networks, pad=n_tokens, reached={}, count=lambda x, y: (y != IGNORE).sum(),
        loss=lambda x, y, counts: train_bptt.bptt_loss(networks, x, y, counts, truncate),
        reference=lambda x, y: bptt_losses(networks, x, y, truncate))


CAUSAL, ALL = dict(encoder="causal"), dict(t=(4, 0, 1, 7, 2, 3, 5, 6))
CASES = {
    "smt": lambda **more: smt_case(**more),
    "smt-all": lambda **more: smt_case(**ALL, conv_width=3, **more),
    "smt-causal": lambda **more: smt_case(**CAUSAL, **more),
    "smt-causal-all": lambda **more: smt_case(
        **CAUSAL, **ALL, encoder_layers=2, decoder_layers=2, conv_width=3, memory_tokens=3, **more),
    "dmt": lambda **more: dmt_case(updater="mlp", **more),
    "dmt-causal": lambda **more: dmt_case(**CAUSAL, labelled=(2, 5), **more),
    "dmt-pieces": lambda **more: dmt_case(
        **CAUSAL, updater="gru", begins=(1, 4), h=3, labelled=(0, 2), **more),
    "bptt": lambda **more: bptt_case(**more),
    "bptt-truncated": lambda **more: bptt_case(updater="mlp", truncate=3, **more),
    "bptt-gru": lambda **more: bptt_case(updater="gru", truncate=5, **more),
}
EACH_CASE = pytest.mark.parametrize("name", CASES)


def batch(B=4):
    """Rows of which one ends early, with some places that have no target."""
    x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    y[torch.rand(B, T) < 0.3] = IGNORE
    x[1, 4:], y[1, 4:] = V, IGNORE
    return x, y


def trainable(case):
    return {name: p for name, p in case.networks.named_parameters() if p.requires_grad}


def gradients(case, value):
    parameters = trainable(case)
    found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found)}


@EACH_CASE
def test_each_loss_and_the_gradients_of_their_sum_equal_plain_loops(name):
    case, (x, y) = CASES[name](), batch()
    randomise(case.networks)
    loss, terms = case.loss(x, y, case.count(x, y))
    expected = case.reference(x, y)
    assert terms.keys() == expected.keys() and loss is terms["train_loss"]
    for term, value in expected.items():
        torch.testing.assert_close(terms[term], value, rtol=1e-7, atol=1e-9)
    theirs = gradients(case, expected["train_loss"])
    for parameter, gradient in gradients(case, loss).items():
        torch.testing.assert_close(gradient, theirs[parameter], rtol=1e-6, atol=1e-9)


@EACH_CASE
def test_each_loss_trains_the_networks_it_should_and_their_sum_every_parameter(name):
    case, (x, y) = CASES[name](), batch()
    randomise(case.networks)
    x[0] = torch.arange(T) % (V + 1)                            # each row of every embedding, that of PAD too
    loss, terms = case.loss(x, y, case.count(x, y))
    for term, networks in case.reached.items():
        moved = gradients(case, terms[f"loss_{term}"])
        assert {n.split(".")[0] for n, g in moved.items() if g.abs().max() > 1e-12} == networks, term
    assert all(gradient.abs().max() > 0 for gradient in gradients(case, loss).values())
    loss.backward()
    assert all((p.grad is None) != p.requires_grad for p in case.networks.parameters())


@EACH_CASE
@pytest.mark.parametrize("pieces", [2, 4])
def test_losses_and_gradients_are_sums_over_micro_batches(name, pieces):
    without_unif = dict(lambda_unif=0.0) if "smt" in name else {}       # L_unif is a mean over micro-batches
    case, (x, y) = CASES[name](**without_unif), batch()
    randomise(case.networks)
    counts = case.count(x, y)
    whole, _ = case.loss(x, y, counts)
    parts = [case.loss(*rows, counts)[0] for rows in zip(x.chunk(pieces), y.chunk(pieces))]
    torch.testing.assert_close(sum(parts), whole)
    theirs = gradients(case, sum(parts))
    for parameter, gradient in gradients(case, whole).items():
        torch.testing.assert_close(gradient, theirs[parameter], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_uniformity_of_a_micro_batch_counts_by_its_share_of_the_batch(rows):
    case, (x, y) = CASES["smt"](), batch(4)
    randomise(case.networks)
    part = x[:rows], y[:rows]
    found = case.loss(*part, case.count(x, y))[1]["loss_unif"]
    torch.testing.assert_close(found, case.reference(*part)["loss_unif"] * rows / 4)


@EACH_CASE
def test_rows_without_targets_have_losses_of_zero_and_finite_gradients(name):
    case, (x, y) = CASES[name](), batch()
    y = torch.full_like(y, IGNORE)
    for rows in (x, torch.full_like(x, V)):
        loss, terms = case.loss(rows, y, case.count(rows, y))
        loss.backward()
        assert loss.isfinite() and all(value.isfinite() for value in terms.values())
        assert all(terms[term] == 0 for term in terms.keys() - {"train_loss", "loss_dyn", "loss_unif"})
        assert rows is x or terms.get("loss_dyn", 0) == 0
        assert all(p.grad.isfinite().all() for p in case.networks.parameters() if p.grad is not None)


EASY = dict(d_model=32, future_len=2, context_len=8, batch_size=8, lambda_dyn=1.0)


@pytest.mark.parametrize("make, entropies", [
    (lambda: smt_case(8, **ALL, **EASY), 0.1), (lambda: smt_case(8, **ALL, **CAUSAL, **EASY), 0.1),
    (lambda: dmt_case(8, h=5, labelled=range(5), updater="gru", lambda_dyn=1.0), 0.5),
    (lambda: bptt_case(8, d_model=16), 0.1)], ids=["smt", "smt-causal", "dmt", "bptt"])
def test_overfitting_one_batch_drives_the_losses_to_their_floor(make, entropies):
    """The first token tells the whole row: the floor of each cross-entropy and of the dynamics is 0."""
    case = make()
    x = torch.stack([torch.randperm(8) for _ in range(8)])
    x[:, 0] = torch.arange(8)
    y = torch.cat([x[:, 1:], torch.full((8, 1), IGNORE)], dim=1)
    counts, steps, first = case.count(x, y), 240, None
    optimizer = torch.optim.Adam(trainable(case).values(), lr=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)     # at a constant rate rounding decides
        loss, terms = case.loss(x, y, counts)
        last = {name: value.item() for name, value in terms.items()}
        first = first or last
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name in terms.keys() - {"loss_unif", "loss_dyn", *(["train_loss"] if len(terms) > 1 else [])}:
        assert first[name] > 1.5 and last[name] < entropies, (name, first, last)
    if "loss_dyn" in terms:
        scale = first["loss_dyn"]
        if "loss_dec" in terms:                             # where the encoder learns, too: its variance
            scale = case.networks["encoder"](x, torch.arange(8)).var(0).mean().item()
        assert last["loss_dyn"] < 0.1 * scale, (first, last, scale)


# ----------------------------------------------------------------------------------------------------------
# The runs

TIMED = ("seconds", "tokens_per_second")
TWO_LAYERS = "--encoder=causal --encoder_layers=2 --decoder_layers=2 --conv_width=3 --positions=8"


def flags(stage, data_dir, smt_run, out, dataset="retrieval"):
    more = {"smt": [*SIZES, *PAIRS], "bptt": [*BPTT_SIZES, "--seq_len=8"],
            "dmt": [*ROLL_OUTS, f"--init_from={smt_run(dataset)}", "--seq_len=8"]}
    return [*QUICK, f"--dataset={dataset}", f"--data_dir={data_dir}", f"--out_dir={out}", *more[stage]]


def metrics(folder):
    """The lines of a run's log, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def checkpoint(folder):
    """A run's checkpoint as a flat dict, without what depends on the clock or says where it was written."""
    flat, others = {}, {".spent.seconds", ".time"}
    others |= {f".config.{flag}" for flag in ("out_dir", "resume", "max_iters", "init_from")}

    def flatten(value, path):
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if not isinstance(value, dict):
            flat[path] = value
            return
        for name, inner in value.items():
            flatten(inner, f"{path}.{name}")
    flatten(torch.load(folder / "ckpt.pt", weights_only=True), "")
    return {path: value for path, value in flat.items() if path not in others}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        assert same, name


def stop_after(monkeypatch, script, steps, number):
    """Send this process a signal in the middle of the given step."""
    chosen = script.learning_rate

    def rate(step, config, **more):
        if step == steps:
            signal.raise_signal(number)
        return chosen(step, config, **more)
    monkeypatch.setattr(script, "learning_rate", rate)


@pytest.mark.parametrize("stage, dataset, more", [
    ("smt", "retrieval", ""), ("smt", "fables", "--encoder=causal --grad_accum=2"),
    *(("smt", "fables", f"{TWO_LAYERS} --trunk_iters={n} --optimizer=muon") for n in (1, 3, 5)),
    ("bptt", "fables", ""), ("bptt", "fables", "--optimizer=muon"), ("dmt", "retrieval", ""),
    ("dmt", "fables", "--optimizer=muon --horizon=3 --label_stride=2 --p_start=0")])
def test_a_run_that_is_stopped_and_resumed_equals_one_that_was_not_bit_for_bit(
        tmp_path, monkeypatch, data_dir, smt_run, stage, dataset, more):
    script, more = TRAIN[stage], [*more.split(), "--max_iters=6", "--eval_interval=2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    trained(script, *flags(stage, data_dir, smt_run, whole, dataset), *more)
    with monkeypatch.context() as patch:
        stop_after(patch, script, 2, signal.SIGTERM)
        stopped = call(script, *flags(stage, data_dir, smt_run, halves, dataset), *more)
    assert stopped.status == 143 and not stopped.err
    assert stopped.out.splitlines()[-1] == "stopped at step 3 of 6; --resume goes on"
    assert torch.load(halves / "ckpt.pt", weights_only=True)["step"] == 3 and metrics(halves)[-1]["step"] == 3
    trained(script, *flags(stage, data_dir, smt_run, halves, dataset), *more, "--resume")
    a, b = checkpoint(whole), checkpoint(halves)
    assert_same_bits(a, b)
    assert a[".step"] == 6 and any(name.startswith(".optimizers.0.state") for name in a)
    assert any(name.startswith(".optimizers.1.state") for name in a) == ("--optimizer=muon" in more)
    assert metrics(whole) == metrics(halves)


@STAGES
def test_a_run_writes_its_config_a_log_and_a_checkpoint_and_nothing_else(tmp_path, data_dir, smt_run, stage):
    trained(TRAIN[stage], *flags(stage, data_dir, smt_run, tmp_path / "run"), "--eval_interval=2")
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == ["ckpt.pt", "config.json", "metrics.jsonl"]
    config = json.loads((folder / "config.json").read_text())
    assert config["out_dir"] == str(folder) and TRAIN[stage].Config(**config)
    lines = metrics(folder)
    training, held_out = ([line for line in lines if key in line] for key in ("train_loss", "val_rnn_loss"))
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    assert [line["step"] for line in held_out] == [0, 2, 4]
    assert all({"tokens", "grad_norm", "lr"} <= line.keys() for line in training)
    assert [line["tokens"] for line in training] == [128 * i for i in range(1, 5)]
    content = torch.load(folder / "ckpt.pt", weights_only=True)
    assert content["stage"] == stage and content["step"] == 4 and content["data"]["name"] == "retrieval"
    assert content["initial_memory"].shape == (2, 8)
    assert not any(name.startswith(("module", "_orig")) for name in content["model"])


@pytest.mark.parametrize("first, second", [("smt", "smt"), ("smt", "bptt"), ("dmt", "dmt"), ("dmt", "bptt"),
                                           ("bptt", "smt"), ("bptt", "bptt")])
def test_weights_go_from_stage_to_stage(tmp_path, data_dir, smt_run, first, second):
    trained(TRAIN[first], *flags(first, data_dir, smt_run, tmp_path / "a"))
    trained(TRAIN[second], *flags(second, data_dir, smt_run, tmp_path / "b"), f"--init_from={tmp_path / 'a'}",
            "--max_iters=1", "--lr=1e-9")
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in "ab")
    shared = [name for name in a["model"] if name in b["model"] and name != "initial_memory"]
    assert {name.split(".")[0] for name in shared} >= {"updater", "readout"}
    for name in shared:
        torch.testing.assert_close(a["model"][name], b["model"][name], rtol=0, atol=1e-6)
    if second == "bptt":
        torch.testing.assert_close(a["initial_memory"], b["initial_memory"], rtol=0, atol=1e-4)


@STAGES
@pytest.mark.parametrize("where, eval_interval", [("gradient", 2), ("weight", 2), ("weight", 1000)])
def test_a_loss_that_became_nan_ends_the_run_in_one_line_and_the_last_checkpoint_stays(
        tmp_path, monkeypatch, data_dir, smt_run, stage, where, eval_interval):
    arguments = [*flags(stage, data_dir, smt_run, tmp_path), "--max_iters=50",
                 f"--eval_interval={eval_interval}"]
    steps, step = [], TRAIN[stage].optimizer_step

    def poisoned(optimizers, lr):
        steps.append(lr)
        for parameter in optimizers[0].param_groups[0]["params"] if len(steps) == 4 else ():
            (parameter.grad if where == "gradient" else parameter.data).fill_(float("nan"))
        return step(optimizers, lr)

    with monkeypatch.context() as patch:
        patch.setattr(TRAIN[stage], "optimizer_step", poisoned)
        refused(call(TRAIN[stage], *arguments), 1)
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert content["step"] == (2 if eval_interval == 2 else 0)
    assert all(weight.isfinite().all() for weight in content["model"].values())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    trained(TRAIN[stage], *arguments, "--max_iters=4", "--resume")


# ----------------------------------------------------------------------------------------------------------
# Several processes

DRIVER = """
import sys
import train_bptt, train_dmt, train_smt
from lib.cli import run_main
def main():
    for line in open(sys.argv[1]):
        name, *arguments = line.split()
        sys.argv[1:] = arguments
        {"smt": train_smt, "dmt": train_dmt, "bptt": train_bptt}[name].main()
run_main(main)
"""


def test_two_processes_or_micro_batches_train_like_one_process(tmp_path, data_dir, smt_run):
    """Runs of the same global batch; the two processes talk through gloo. L_unif is that within a
    micro-batch: with it one process, whose batch is whole, trains otherwise."""
    more = {"smt": "--lambda_unif=0", "smt-trunk": f"{TWO_LAYERS} --trunk_iters=2 --lambda_unif=0",
            "smt-unif": "--lambda_unif=0.1", "dmt": "--horizon=6 --label_stride=2", "bptt": ""}
    cases = {name: (name.split("-")[0], [*flags(name.split("-")[0], data_dir, smt_run, "", "fables"),
                                         "--seq_len=16", "--eval_interval=2", *some.split()])
             for name, some in more.items()}
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "runs").write_text("\n".join(
        " ".join([stage, *case, f"--out_dir={tmp_path / name}-2"]) for name, (stage, case) in cases.items()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               tmp_path / "driver.py", tmp_path / "runs"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    for name, (stage, case) in cases.items():
        for kind, accumulated in (("1", "1"), ("accumulated", "2")):
            trained(TRAIN[stage], *case, f"--out_dir={tmp_path / name}-{kind}", f"--grad_accum={accumulated}")
    errors = process.communicate(timeout=900)[1]
    assert process.returncode == 0, errors
    for name in cases:
        for first in ("accumulated", "1") if name != "smt-unif" else ("accumulated",):
            one, two = (Path(f"{tmp_path / name}-{kind}") for kind in (first, "2"))
            for a, b in zip(metrics(one), metrics(two), strict=True):
                assert a.keys() == b.keys()
                for term in a.keys() - ({"loss_unif"} if first == "1" else set()):
                    assert a[term] == pytest.approx(b[term], rel=1e-5, abs=1e-6), (name, first, term)
            one, two = checkpoint(one), checkpoint(two)
            assert one.keys() == two.keys()
            for key, value in one.items():
                if key.startswith((".model.", ".initial_memory")) and value.is_floating_point():
                    assert (two[key] - value).abs().max() < 1e-5, (name, first, key)
