"""Backpropagation through time: its gradients against finite differences, and where truncation cuts them."""
import dataclasses
import json

import pytest
import torch
from conftest import BPTT_SIZES, QUICK, randomise, trained
from torch import nn

import model
import train_bptt
from data import IGNORE
from model import ModelConfig, build, normalise
from train_bptt import bptt_loss, unroll

V, PAD = 4, 4
UPDATERS = pytest.mark.parametrize("updater", ["transformer", "mlp", "gru"])


def networks_for(updater="transformer", d_model=4, n_heads=1, as_built=False):
    networks = build(ModelConfig(updater=updater, d_model=d_model, n_heads=n_heads, memory_tokens=2, updater_layers=1), V,
                     ("updater", "readout"))
    networks.initial_memory = nn.Parameter(torch.randn(2, d_model))
    return networks if as_built else randomise(networks)


def batch(B=2, T=6):
    x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    y[0, 1] = IGNORE
    x[1, 4:], y[1, 4:] = PAD, IGNORE
    return x, y, (y != IGNORE).sum()


def gradients(networks, *arguments):
    loss, _ = bptt_loss(networks, *arguments)
    return torch.autograd.grad(loss, list(networks.parameters()))


@UPDATERS
def test_loss_equals_a_loop_over_rows_and_steps(updater):
    networks, (x, y, count) = networks_for(updater), batch()
    terms = []
    for b in range(2):
        memory = normalise(networks.initial_memory)[None]
        for i in range(6):
            memory = networks["updater"](memory, x[b:b + 1, i])
            if y[b, i] != IGNORE:
                logits = networks["readout"](memory)[0]
                terms.append(logits.exp().sum().log() - logits[y[b, i]])
    assert len(terms) == count
    for truncate in (0, 2, 5):
        loss, reported = bptt_loss(networks, x, y, count, truncate)              # truncation changes no value
        torch.testing.assert_close(loss, sum(terms) / len(terms))
        assert reported["train_loss"] is loss


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


def test_every_parameter_is_trained():
    networks, (x, y, count) = networks_for(), batch()
    assert all(gradient.abs().max() > 0 for gradient in gradients(networks, x, y, count))


@UPDATERS
def test_truncated_gradients_equal_full_ones_where_the_window_covers_the_sequence(updater):
    networks, (x, y, count) = networks_for(updater), batch()
    full = gradients(networks, x, y, count)
    for truncate in (6, 7, 100):
        assert all(torch.equal(a, b) for a, b in zip(full, gradients(networks, x, y, count, truncate)))
    assert not all(torch.allclose(a, b) for a, b in zip(full, gradients(networks, x, y, count, 3)))


def test_truncation_cuts_the_graph_after_every_window_and_nowhere_else():
    """The memory after step i depends, by gradient, on the embeddings of the tokens of its own window up to i, and on no other."""
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
            by_token, by_start = torch.autograd.grad(memories[0, i].square().mul(torch.arange(4) + 1.).sum(), [table, start],
                                                     retain_graph=True, allow_unused=True)
            assert [bool(g.abs().max() > 0) for g in by_token] == [j <= i and windows[j] == windows[i] for j in range(7)]
            assert (by_start is not None and bool(by_start.abs().max() > 0)) == (windows[i] == 0)


@UPDATERS
def test_truncated_gradients_equal_a_loop_that_detaches(updater):
    networks, (x, y, count) = networks_for(updater), batch()
    memory, total = normalise(networks.initial_memory).expand(2, -1, -1), 0
    for i in range(6):
        if i and i % 4 == 0:
            memory = memory.detach()
        memory = networks["updater"](memory, x[:, i])
        total = total + nn.functional.cross_entropy(networks["readout"](memory), y[:, i], ignore_index=IGNORE, reduction="sum")
    for a, b in zip(torch.autograd.grad(total / count, list(networks.parameters())), gradients(networks, x, y, count, 4)):
        torch.testing.assert_close(a, b)


def test_the_flags_of_the_rnn_are_those_of_its_model():
    flags = dict(updater="mlp", d_model=32, n_heads=2, memory_tokens=3, updater_layers=5, decoder_layers=7, context_len=9)
    found = dataclasses.asdict(train_bptt.model_config(train_bptt.Config(**flags)))
    assert flags == {name: found[name] for name in flags}
    assert flags.keys() == {f.name for f in dataclasses.fields(ModelConfig)} & {f.name for f in dataclasses.fields(train_bptt.Config)}


def test_memories_read_out_in_parts_give_the_same_loss(monkeypatch):
    networks, (x, y, count), calls = networks_for(), batch(), []
    whole = gradients(networks, x, y, count)
    monkeypatch.setattr(model, "READOUTS", 5)
    networks["readout"].register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    torch.testing.assert_close(gradients(networks, x, y, count), whole)
    assert calls == [5, 4]                                                          # nothing is asked at three of the 12


def test_losses_and_gradients_are_sums_over_micro_batches():
    networks, (x, y, count) = networks_for(), batch(8)
    parts = [gradients(networks, part_x, part_y, count) for part_x, part_y in zip(x.chunk(4), y.chunk(4))]
    for whole, *pieces in zip(gradients(networks, x, y, count), *parts):
        torch.testing.assert_close(whole, sum(pieces))


def test_loss_is_finite_where_nothing_is_asked():
    networks, (x, y, _) = networks_for(), batch()
    loss, _ = bptt_loss(networks, x, torch.full_like(y, IGNORE), torch.tensor(0))
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in networks.parameters())


@pytest.mark.parametrize("truncate", [0, 2])
def test_overfitting_one_batch_drives_the_loss_near_its_floor(truncate):
    torch.manual_seed(0)
    networks = networks_for(d_model=16, as_built=True)
    x = torch.randint(V, (4, 8))
    x[:, 0] = torch.arange(4)                                                     # from the first token on, all is certain
    if truncate:                                                                  # from the last one on: a cut gradient teaches no more
        x = (x[:, :1] + torch.arange(8)) % V
    y = torch.cat([x[:, 1:], torch.full((4, 1), IGNORE)], dim=1)
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-2)
    for step in range(200):
        loss, _ = bptt_loss(networks, x, y, (y != IGNORE).sum(), truncate)
        assert step or loss > 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_what_is_compiled_does_not_grow_with_the_steps_and_changes_no_loss(tmp_path, monkeypatch, data_dir):
    """A graph of all unrolled steps takes too long to compile."""
    compile, graphs, losses = torch.compile, [], {}

    def backend(graph, _):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: compile(*arguments, **options, backend=backend))
    for T in (6, 12):
        for flag in ("--compile", "--compile=false"):
            torch.compiler.reset()
            trained(train_bptt, *QUICK, *BPTT_SIZES, "--dataset=fables", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", f"--seq_len={T}", flag)
            lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
            losses[T, flag] = [line["train_loss"] for line in lines if "train_loss" in line]
        assert losses[T, "--compile"] == pytest.approx(losses[T, "--compile=false"], rel=1e-5) and len(losses[T, "--compile"]) == 4
        if T == 6:
            short = graphs.copy()
            graphs.clear()
    assert graphs == short != []
