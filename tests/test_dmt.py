"""DMT: where its roll-outs begin, what they are compared with, which steps it trains on."""
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BPTT_SIZES, QUICK, ROLL_OUTS, SIZES, call, randomise, refused, trained

import data
import train_bptt
import train_dmt
import train_smt
from lib.checkpoints import load, source_of
from model import ModelConfig, build, empty_memory
from train_dmt import Config, choose_steps, count_terms, cut, dmt_loss, roll_out_and_label

V, PAD = 5, 5
KINDS = pytest.mark.parametrize("kind", ["window", "causal"])
UPDATERS = pytest.mark.parametrize("updater", ["transformer", "mlp", "gru"])


def networks_for(encoder="window", updater="transformer"):
    sizes = ModelConfig(encoder=encoder, updater=updater, d_model=8, n_heads=2, memory_tokens=2,
                        encoder_layers=1, updater_layers=1, context_len=4, future_len=3)
    return randomise(build(sizes, V))


@UPDATERS
def test_every_parameter_of_updater_and_readout_gets_a_gradient_under_autocast(updater):
    """Autocast caches the casts of weights in a block: the roll-out must not share the block of the loss."""
    networks, x, y = networks_for(updater=updater).float(), torch.randint(V, (4, 7)), torch.randint(V, (4, 7))
    x[1, 4:] = PAD
    for name in ("encoder", "decoder"):
        networks[name].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        encoder, updater = networks["encoder"], networks["updater"]
        before, labels = roll_out_and_label(encoder, updater, x, torch.tensor([0]), 7, torch.arange(7))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = dmt_loss(networks, before, labels, x, y, count_terms(x, y, PAD), Config())
    loss.backward()
    assert loss.dtype == torch.float32
    for name, parameter in networks.named_parameters():
        if name.startswith(("updater", "readout")):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@KINDS
def test_roll_outs_begin_at_the_empty_memory_at_0_and_at_the_encoders_elsewhere_side_by_side(kind):
    networks, x = networks_for(kind), torch.randint(V, (4, 7))
    begins, labelled = torch.tensor([0, 3]), torch.tensor([0, 2, 3])
    encoder, updater = networks["encoder"], networks["updater"]
    before, labels = roll_out_and_label(encoder, updater, x, begins, 4, labelled)
    assert before.shape == labels.shape == (8, 3, 2, 8)
    for row in range(4):
        for piece, begin in enumerate(begins.tolist()):
            n, here = 2 * row + piece, x[row:row + 1]
            start = encoder(here[:, :3], torch.tensor([2]))[:, 0] if begin else empty_memory(encoder)[None]
            states = [start]
            for i in range(4):
                states.append(updater(states[-1], here[:, begin + i]))
            for place, i in enumerate(labelled.tolist()):
                torch.testing.assert_close(before[n, place], states[i][0])
                torch.testing.assert_close(labels[n, place], encoder(here, torch.tensor([begin + i]))[0, 0])


def test_pieces_of_a_row_lie_side_by_side():
    x = torch.arange(20).view(2, 10)
    assert cut(x, torch.tensor([1, 4, 7]), 3).tolist() == [
        [1, 2, 3], [4, 5, 6], [7, 8, 9], [11, 12, 13], [14, 15, 16], [17, 18, 19]]


@pytest.mark.parametrize("T, h, label_stride", [
    (20, 8, 3), (20, 8, 1), (20, 20, 16), (16, 16, 4), (19, 9, 2), (12, 2, 4)])
def test_roll_outs_and_labels_are_a_function_of_seed_and_step_and_cover_the_row(T, h, label_stride):
    settings = Config(label_stride=label_stride, p_start=0.25)

    def draw(step, **changes):
        begins, labelled = choose_steps(replace(settings, **changes), step, T, h)
        return begins.tolist(), labelled.tolist()

    drawn = [draw(step) for step in range(300)]
    assert drawn[:9] == [draw(step) for step in range(9)]
    assert (T % h == 0 and label_stride == 1) or drawn[:9] != [draw(step, seed=5) for step in range(9)]
    assert {begins[0] for begins, _ in drawn} == set(range(T % h + 1))
    for begins, labelled in drawn:
        assert begins == list(range(begins[0], begins[0] + T // h * h, h)) and begins[-1] + h <= T
        assert len(labelled) == max(1, h // label_stride)
        assert all(b - a == label_stride for a, b in zip(labelled, labelled[1:]))
        assert 0 <= labelled[0] <= labelled[-1] < h
    assert {i for _, labelled in drawn for i in labelled} == set(range(h))
    assert all(draw(step, p_start=1.0)[0][0] == 0 for step in range(20))


# ----------------------------------------------------------------------------------------------------------
# The script

def run(folder, data_dir, source, *flags):
    trained(train_dmt, *QUICK, *ROLL_OUTS, f"--data_dir={data_dir}", f"--init_from={source}",
            f"--out_dir={folder}", *flags)
    return torch.load(folder / "ckpt.pt", weights_only=True)


def test_a_run_moves_updater_and_readout_and_nothing_else(tmp_path, data_dir, smt_run):
    source = smt_run("retrieval")
    before = torch.load(source / "ckpt.pt", weights_only=True)
    after = run(tmp_path, data_dir, source, "--dataset=retrieval", "--label_stride=2")
    assert after["model"].keys() == before["model"].keys() and after["stage"] == "dmt"
    assert after["model_config"] == before["model_config"]
    assert torch.equal(after["initial_memory"], before["initial_memory"])
    for name, weight in after["model"].items():
        frozen, unused = name.startswith(("encoder", "decoder")), "embed" in name   # of tokens in no batch
        assert torch.equal(weight, before["model"][name]) == frozen or unused, name


def test_the_readout_begins_as_the_decoder_after_smt_and_as_itself_after_dmt(tmp_path, data_dir, smt_run):
    def part(model, network):
        return {name.removeprefix(network): w for name, w in model.items() if name.startswith(network)}

    def same(a, b):
        return all(torch.equal(weight, b[name]) for name, weight in a.items())

    before = torch.load(smt_run("retrieval") / "ckpt.pt", weights_only=True)["model"]
    still = ["--dataset=retrieval", "--lr=1e-30"]
    first = part(run(tmp_path / "first", data_dir, smt_run("retrieval"), *still)["model"], "readout")
    assert same(first, part(before, "decoder")) and not same(first, part(before, "readout"))
    more = run(tmp_path / "more", data_dir, tmp_path / "first", "--dataset=retrieval")["model"]
    more = part(more, "readout")
    again = part(run(tmp_path / "again", data_dir, tmp_path / "more", *still)["model"], "readout")
    assert same(again, more) and not same(again, first)


@KINDS
def test_labels_come_from_a_compiled_window_encoder_that_the_checkpoint_knows_nothing_of(
        kind, tmp_path, data_dir, monkeypatch):
    compiler, roll, used = torch.compile, train_dmt.roll_out_and_label, []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, **options, backend="eager"))
    monkeypatch.setattr(train_dmt, "roll_out_and_label", lambda *some: used.append(some[0]) or roll(*some))
    trained(train_smt, *QUICK, *SIZES, "--dataset=retrieval", f"--data_dir={data_dir}", f"--encoder={kind}",
            "--trunk_iters=0", f"--out_dir={tmp_path / 'smt'}")
    first = run(tmp_path / "first", data_dir, tmp_path / "smt", "--dataset=retrieval")
    after = run(tmp_path / "after", data_dir, tmp_path / "smt", "--dataset=retrieval", "--compile")
    compiled = [isinstance(encoder, torch._dynamo.OptimizedModule) for encoder in used]
    assert compiled == sorted(compiled)
    assert compiled.count(True) == (len(compiled) / 2 if kind == "window" else 0) and compiled
    assert after["model"].keys() == first["model"].keys()
    for name, weight in after["model"].items():
        torch.testing.assert_close(weight, first["model"][name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dataset, flags, h", [
    ("retrieval", ["--label_stride=2"], 8), ("fables", ["--seq_len=20", "--horizon=7", "--p_start=0"], 7),
    ("fables", [], 8)], ids=["strides", "pieces", "as in SMT"])
def test_the_loss_gets_the_tokens_and_targets_of_the_labelled_steps_of_each_roll_out(
        tmp_path, monkeypatch, data_dir, smt_run, dataset, flags, h):
    smt_run(dataset)
    drawn, rolled, given = [], [], []
    draw, roll, loss = data.sample_batch, train_dmt.roll_out_and_label, train_dmt.dmt_loss
    monkeypatch.setattr(data, "sample_batch", lambda *some: drawn.append(draw(*some)) or drawn[-1])
    monkeypatch.setattr(train_dmt, "roll_out_and_label", lambda *some: rolled.append(some) or roll(*some))
    monkeypatch.setattr(train_dmt, "dmt_loss", lambda *some: given.append(some[3:5]) or loss(*some))
    run(tmp_path, data_dir, smt_run(dataset), f"--dataset={dataset}", *flags)
    for (x, y, _), case, (given_x, given_y) in zip(drawn, rolled, given, strict=True):
        begins, length, labelled = case[3:]
        places = [(row, begin) for row in range(len(x)) for begin in begins.tolist()]
        assert given_x.tolist() == [[int(x[row, begin + i]) for i in labelled] for row, begin in places]
        assert given_y.tolist() == [[int(y[row, begin + i]) for i in labelled] for row, begin in places]
        assert length == h and len(labelled) == (4 if "--label_stride=2" in flags else h)


def test_a_run_is_resumed_with_the_same_source_only(tmp_path, data_dir, smt_run):
    """The checkpoint names it, and sample.py warns where it has been trained anew."""
    run(tmp_path / "run", data_dir, smt_run("fables"), "--dataset=fables")
    again = [*QUICK, *ROLL_OUTS, "--dataset=fables", f"--data_dir={data_dir}",
             f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=6"]
    refused(call(train_dmt, *again), 2, "--init_from", smt_run("fables"))
    trained(train_dmt, *again, f"--init_from={smt_run('fables')}")


def test_a_run_on_text_with_rows_as_long_as_in_smt_is_resumed(tmp_path, data_dir, smt_run):
    """The length of its rows is in the checkpoint of SMT alone at first."""
    for steps in (2, 4):
        after = run(tmp_path / "run", data_dir, smt_run("fables"), "--dataset=fables", "--resume=auto",
                    f"--max_iters={steps}")
        assert after["step"] == steps and after["config"]["seq_len"] == 8
    more = run(tmp_path / "more", data_dir, tmp_path / "run", "--dataset=fables")
    assert more["spent"]["tokens"] == after["spent"]["tokens"] == 4 * 16 * 8


def test_unless_told_otherwise_it_starts_from_the_smt_run_and_says_so_in_its_config(
        tmp_path, data_dir, smt_run, monkeypatch):
    shutil.copytree(smt_run("retrieval"), tmp_path / "runs" / "retrieval-smt")
    monkeypatch.chdir(tmp_path)
    where = [*QUICK, *ROLL_OUTS, "--dataset=retrieval", f"--data_dir={data_dir}"]
    trained(train_dmt, *where)
    assert source_of(load("runs/retrieval-dmt")) == Path("runs/retrieval-smt")
    trained(train_dmt, *where, "--resume", "--max_iters=5")
    refused(call(train_dmt, *where, "--out_dir=runs/retrieval-smt"), 2, "--out_dir")


def test_labels_need_an_encoder(tmp_path, data_dir):
    where = [*QUICK, "--dataset=retrieval", f"--data_dir={data_dir}"]
    trained(train_bptt, *where, *BPTT_SIZES, f"--out_dir={tmp_path / 'bptt'}")
    result = call(train_dmt, *where, f"--init_from={tmp_path / 'bptt'}", f"--out_dir={tmp_path / 'dmt'}")
    refused(result, 2, "--init_from")
