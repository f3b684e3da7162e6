"""Backpropagation through time: its gradients against finite differences, and where truncation cuts them."""
import json

import pytest
import torch
from conftest import BPTT_SIZES, PAIRS, QUICK, SIZES, randomise, trained
from torch import nn

import train_bptt
import train_smt
from model import IGNORE, RNNConfig, build
from runtime import read_log
from train_bptt import bptt_loss, unroll

V, PAD = 4, 4
UPDATERS = pytest.mark.parametrize("updater", ["transformer", "mlp", "gru"])


def networks_for(updater="transformer"):
    sizes = RNNConfig(updater=updater, d_model=4, n_heads=1, memory_tokens=2, updater_layers=1)
    networks = build(sizes, V, ("updater", "readout"))
    networks.initial_memory = nn.Parameter(torch.randn(2, 4))
    return randomise(networks)


def batch(B=2, T=6):
    x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    y[0, 1] = IGNORE
    x[1, 4:], y[1, 4:] = PAD, IGNORE
    return x, y, (y != IGNORE).sum()


def gradients(networks, *arguments):
    loss, _ = bptt_loss(networks, *arguments)
    return torch.autograd.grad(loss, list(networks.parameters()))


@UPDATERS
def test_gradients_equal_finite_differences(updater):
    networks, (x, y, count) = networks_for(updater), batch()
    for parameter, gradient in zip(networks.parameters(), gradients(networks, x, y, count)):
        flat = parameter.data.view(-1)
        for i in torch.randperm(len(flat))[:6].tolist():
            value, losses = flat[i].item(), []
            for step in (1e-5, -1e-5):
                flat[i] = value + step
                losses.append(bptt_loss(networks, x, y, count)[0].item())
            flat[i] = value
            assert abs((losses[0] - losses[1]) / 2e-5 - gradient.view(-1)[i].item()) < 1e-7


@UPDATERS
def test_truncated_gradients_equal_full_ones_where_the_window_covers_the_sequence(updater):
    networks, (x, y, count) = networks_for(updater), batch()
    full = gradients(networks, x, y, count)
    for truncate in (6, 7, 100):
        assert all(torch.equal(a, b) for a, b in zip(full, gradients(networks, x, y, count, truncate)))
    assert not all(torch.allclose(a, b) for a, b in zip(full, gradients(networks, x, y, count, 3)))


def test_truncation_cuts_the_graph_after_every_window_and_nowhere_else():
    """The memory after step i has gradients by the tokens of its own window up to i, and by no other."""
    networks = networks_for()
    updater, x = networks["updater"], torch.arange(7)[None] % V
    table, tokens = torch.randn(7, 4, dtype=torch.float64, requires_grad=True), iter(())

    class Steps(nn.Module):
        def forward(self, _):
            return table[next(tokens)][None]

    updater.embed = Steps()
    start = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    for truncate, windows in ((0, [0] * 7), (3, [0, 0, 0, 1, 1, 1, 2]), (1, list(range(7)))):
        tokens = iter(range(7))
        memories = unroll(updater, start, x, truncate)
        for i in range(7):
            value = memories[0, i].square().mul(torch.arange(4) + 1.).sum()
            by_token, by_start = torch.autograd.grad(
                value, [table, start], retain_graph=True, allow_unused=True)
            reached = [j for j in range(7) if by_token[j].abs().max() > 0]
            assert reached == [j for j in range(i + 1) if windows[j] == windows[i]]
            assert (by_start is not None and bool(by_start.abs().max() > 0)) == (windows[i] == 0)


def test_what_is_compiled_does_not_grow_with_the_steps_and_changes_no_loss(tmp_path, monkeypatch, data_dir):
    """A graph of all unrolled steps takes too long to compile."""
    compile, graphs = torch.compile, {6: [], 12: []}

    def train(T, flag):
        def backend(graph, _):
            graphs[T].append(len(graph.graph.nodes))
            return graph.forward
        torch.compiler.reset()
        monkeypatch.setattr(torch, "compile", lambda *of, **options: compile(*of, **options, backend=backend))
        folder = tmp_path / f"{T}{flag}"
        trained(train_bptt, *QUICK, *BPTT_SIZES, "--dataset=fables", f"--data_dir={data_dir}",
                f"--out_dir={folder}", f"--seq_len={T}", flag)
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [line["train_loss"] for line in lines if "train_loss" in line]

    for T in (6, 12):
        losses = train(T, "--compile")
        assert losses == pytest.approx(train(T, "--compile=false"), rel=1e-5) and len(losses) == 4
    assert graphs[6] == graphs[12] != []


def test_an_rnn_is_fine_tuned_by_bptt_whatever_the_encoder_was(tmp_path, data_dir):
    where = ["--dataset=retrieval", f"--data_dir={data_dir}"]
    trained(train_smt, *QUICK, *SIZES, *PAIRS, *where, "--encoder=causal", f"--out_dir={tmp_path / 'smt'}")
    trained(train_bptt, *QUICK, *BPTT_SIZES, *where, f"--init_from={tmp_path / 'smt'}",
            f"--out_dir={tmp_path / 'bptt'}")
    before, after = (read_log(tmp_path / stage / "metrics.jsonl") for stage in ("smt", "bptt"))
    assert after[0]["val_rnn_loss"] == pytest.approx(before[-1]["val_rnn_loss"], rel=1e-4)
    assert after[-1]["val_rnn_loss"] != pytest.approx(after[0]["val_rnn_loss"], rel=1e-4)
