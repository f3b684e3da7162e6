"""DMT: the batched step against a step-by-step loop, what it trains, where its roll-outs begin, streams that go on."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import QUICK, ROLL_OUTS, randomise, trained

import data
import runtime
import train_dmt
from data import IGNORE
from flops import dmt_flops, forward_flops
from model import ModelConfig, build
from train_dmt import Config, choose_pairs, count_terms, cut, dmt_loss, horizon_at, roll_out_and_label

V, PAD, TF = 5, 5, 3
KINDS = pytest.mark.parametrize("kind", ["window", "causal"])
UPDATERS = pytest.mark.parametrize("updater", ["transformer", "mlp", "gru"])
SETTINGS = Config(lambda_dyn=3.0, lambda_read=0.5, lambda_own=0.7, lambda_hold=0.9)
SINGLE, TRIPLES = torch.tensor([[2], [0], [6], [1], [3], [5], [4]]), torch.tensor([[4, 5, 6], [1, 2, 3]])
AT_0, READS = torch.tensor([0]), torch.tensor([5, 0, 2, 6])


def networks_for(encoder="window", updater="transformer"):
    sizes = ModelConfig(encoder=encoder, updater=updater, d_model=8, n_heads=2, memory_tokens=2, encoder_layers=1,
                        updater_layers=1, context_len=4, future_len=TF)
    networks = randomise(build(sizes, V)).requires_grad_(False)
    for name in ("updater", "readout"):
        networks[name].requires_grad_()
    return networks


def trainable(networks):
    return [p for p in networks.parameters() if p.requires_grad]


def batch(B=4, T=7):
    """Rows of which one ends early, with some targets that are not asked."""
    x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    y[torch.rand(B, T) < 0.3] = IGNORE
    x[1, 4:], y[1, 4:] = PAD, IGNORE
    return x, y


def pieces(x, y, begins, h):
    """The tokens of each roll-out and the Tf - 1 that follow in its row, as train_dmt.py hands them to the loss."""
    return cut(F.pad(x, (0, TF - 1), value=PAD), begins, h + TF - 1), cut(F.pad(y, (0, TF - 1), value=IGNORE), begins, h + TF - 1)


def counts_of(x, y, begins, h, runs, reads):
    return count_terms(*pieces(x, y, begins, h), runs, reads, TF, PAD)


def reference_losses(networks, x, y, begins, h, runs, reads, settings):
    """One roll-out and one step at a time; between runs the state is that of the RNN without a gradient."""
    updater, readout, encoder, decoder = (networks[name] for name in ("updater", "readout", "encoder", "decoder"))
    steps, own, hold, read, T, K = [], [], [], [], x.shape[1], 2

    def nll(logits, target):
        return logits.exp().sum().log() - logits[target]

    for b in range(len(x)):
        for begin in begins.tolist():
            state = encoder(x[b:b + 1, :begin], torch.tensor([begin - 1]))[:, 0]
            states = [state.detach()]
            for i in range(h):
                states.append(updater(states[-1], x[b:b + 1, begin + i]).detach())
            for run in runs.tolist():
                state = states[run[0]]
                for i in run:
                    token, target = x[b:b + 1, begin + i], y[b, begin + i]
                    state = updater(state, token)
                    steps.append((state[0], encoder(x[b:b + 1], torch.tensor([begin + i]))[0, 0], states[run[0]][0], token != PAD))
                    if target != IGNORE:
                        own.append(nll(decoder(state, x[b:b + 1, :0])[0, 0], target))
                last = begin + run[-1]                                            # in the row: what follows may lie beyond the roll-out
                follow = [int(x[b, i]) if i < T else PAD for i in range(last + 1, last + TF)]
                logits = decoder(state, torch.tensor([follow]))[0]
                hold += [nll(logits[i], y[b, last + i]) for i in range(TF) if last + i < T and y[b, last + i] != IGNORE]
            read += [nll(readout(states[i + 1])[0], y[b, begin + i]) for i in reads.tolist() if y[b, begin + i] != IGNORE]
    changes = [(label - before).square().mean(1) for _, label, before, real in steps if real]
    scale = [sum(change[k] for change in changes) / len(changes) if settings.relative else 1 for k in range(K)]
    dyn = [sum((state[k] - label[k]).square().mean() / scale[k] for k in range(K)) / K for state, label, _, real in steps if real]
    losses = dict(dyn=sum(dyn) / len(dyn), own=sum(own) / len(own), hold=sum(hold) / len(hold), read=sum(read) / len(read))
    losses = {name: value for name, value in losses.items() if name in ("dyn", "read") or getattr(settings, f"lambda_{name}")}
    total = sum(getattr(settings, f"lambda_{name}") * value for name, value in losses.items())
    return {"train_loss": total, **{f"loss_{name}": value for name, value in losses.items()}}


def dmt_step(networks, x, y, begins, h, runs, reads, settings=SETTINGS, counts=None):
    before, after, labels = roll_out_and_label(networks, x, begins, h, runs)
    assert not (before.requires_grad or after.requires_grad or labels.requires_grad)
    counts = counts_of(x, y, begins, h, runs, reads) if counts is None else counts
    return dmt_loss(networks, before, after, labels, *pieces(x, y, begins, h), runs, reads, counts, settings, TF)[1]


@UPDATERS
@pytest.mark.parametrize("kind, begins, h, runs, changes", [
    ("window", [0], 7, SINGLE.tolist(), dict(lambda_own=0.0, lambda_hold=0.0)), ("causal", [0], 7, [[5], [2]], dict(lambda_hold=0.0)),
    ("causal", [1, 4], 3, [[0]], {}), ("causal", [0, 3], 3, [[1, 2]], dict(relative=True)),
    ("window", [0], 7, TRIPLES.tolist(), dict(lambda_own=0.0, relative=True))], ids=["1", "1-of-3", "pieces", "pieces-2-relative", "3-relative"])
def test_batched_step_equals_a_loop_over_rows_and_steps(kind, updater, begins, h, runs, changes):
    networks, (x, y) = networks_for(kind, updater), batch()
    settings, case = replace(SETTINGS, **changes), (torch.tensor(begins), h, torch.tensor(runs), torch.tensor([h - 1, 0]))
    terms = dmt_step(networks, x, y, *case, settings)
    expected = reference_losses(networks, x, y, *case, settings)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    for ours, theirs in zip(torch.autograd.grad(terms["train_loss"], trainable(networks)),
                            torch.autograd.grad(expected["train_loss"], trainable(networks))):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("begins, h, runs", [([0], 7, SINGLE.tolist()), ([0], 7, TRIPLES.tolist()), ([1, 4], 3, [[0], [2]]), ([0, 3], 3, [[1, 2]])])
def test_terms_are_counted_as_the_losses_use_them(begins, h, runs):
    x, y = batch()
    runs, reads = torch.tensor(runs), torch.tensor([h - 1, 0])
    places = [(b, begin) for b in range(4) for begin in begins]

    def asked(steps):
        return sum(int(y[b, begin + i] != IGNORE) for b, begin in places for i in steps if begin + i < 7)

    steps = runs.flatten().tolist()
    expected = [sum(int(x[b, begin + i] != PAD) for b, begin in places for i in steps), asked(steps),
                asked([i + j for i in runs[:, -1].tolist() for j in range(TF)]), asked(reads.tolist())]
    assert counts_of(x, y, torch.tensor(begins), h, runs, reads).tolist() == expected and min(expected) > 0


@UPDATERS
def test_gradients_through_a_run_differ_from_those_of_its_single_steps_though_the_losses_are_the_same(updater):
    networks, (x, y) = networks_for(updater=updater), batch()
    run, steps = (dmt_step(networks, x, y, AT_0, 7, runs, READS) for runs in (TRIPLES, TRIPLES.view(-1, 1)))
    parameters = list(networks["updater"].parameters())
    for name in ("loss_dyn", "loss_own"):
        torch.testing.assert_close(run[name], steps[name])
        gradients = zip(*(torch.autograd.grad(terms[name], parameters, retain_graph=True) for terms in (run, steps)))
        assert max((a - b).abs().max() / b.abs().max() for a, b in gradients) > 0.01


@UPDATERS
@pytest.mark.parametrize("runs", [SINGLE, TRIPLES], ids=["1", "3"])
def test_every_parameter_of_updater_and_readout_gets_a_gradient_under_autocast(updater, runs):
    """Autocast caches the casts of weights within a block: the roll-out without gradients must not share the loss's."""
    networks, (x, y) = networks_for(updater=updater).float(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        before, after, labels = roll_out_and_label(networks, x, AT_0, 7, runs)
    with torch.autocast("cpu", torch.bfloat16):
        counts = counts_of(x, y, AT_0, 7, runs, READS)
        loss, _ = dmt_loss(networks, before, after, labels, *pieces(x, y, AT_0, 7), runs, READS, counts, SETTINGS, TF)
    loss.backward()
    assert loss.dtype == torch.float32
    for name, parameter in networks.named_parameters():
        if name.startswith(("updater", "readout")):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_each_loss_trains_the_network_it_should():
    networks, (x, y) = networks_for(), batch()
    terms = dmt_step(networks, x, y, AT_0, 7, TRIPLES, READS)
    for name, network in (("loss_dyn", "updater"), ("loss_own", "updater"), ("loss_hold", "updater"), ("loss_read", "readout")):
        gradients = torch.autograd.grad(terms[name], trainable(networks), allow_unused=True, retain_graph=True)
        names = [n for n, p in networks.named_parameters() if p.requires_grad]
        assert {n.split(".")[0] for n, gradient in zip(names, gradients) if gradient is not None} == {network}


@KINDS
def test_roll_outs_begin_at_the_empty_memory_at_0_and_at_the_encoders_elsewhere_side_by_side(kind):
    networks, (x, _) = networks_for(kind), batch()
    begins, runs = torch.tensor([0, 3]), torch.tensor([[2, 3], [0, 1]])
    before, after, labels = roll_out_and_label(networks, x, begins, 4, runs)
    assert (before.shape, after.shape, labels.shape) == ((8, 2, 2, 8), (8, 4, 2, 8), (8, 2, 2, 2, 8))
    for row in range(4):
        for piece, begin in enumerate(begins.tolist()):
            n, here = 2 * row + piece, x[row:row + 1]
            states = [networks["encoder"](here[:, :3], torch.tensor([2]))[:, 0] if begin else networks["encoder"].initial_memory()[None]]
            for i in range(4):
                states.append(networks["updater"](states[-1], here[:, begin + i]))
                torch.testing.assert_close(after[n, i], states[-1][0])
            for place, run in enumerate(runs.tolist()):
                torch.testing.assert_close(before[n, place], states[run[0]][0])
                for k, i in enumerate(run):
                    label = networks["encoder"](here, torch.tensor([begin + i]))[0, 0]
                    torch.testing.assert_close(labels[n, place, k], label)


def test_a_roll_out_goes_on_from_the_memory_that_is_given():
    networks, (x, _) = networks_for(), batch()
    whole = roll_out_and_label(networks, x, torch.tensor([1]), 6, SINGLE[:1])[1]
    before, after, labels = roll_out_and_label(networks, x, torch.tensor([4]), 3, torch.tensor([[0], [2]]), whole[:, 2])
    torch.testing.assert_close(after, whole[:, 3:])
    torch.testing.assert_close(before, whole[:, [2, 4]])
    torch.testing.assert_close(labels[:, :, 0], networks["encoder"](x, torch.tensor([4, 6])))


def test_pieces_of_a_row_lie_side_by_side():
    x = torch.arange(20).view(2, 10)
    assert cut(x, torch.tensor([1, 4, 7]), 3).tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [11, 12, 13], [14, 15, 16], [17, 18, 19]]


def test_losses_and_gradients_are_sums_over_micro_batches():
    networks, (x, y), begins, runs, reads = networks_for(), batch(8), torch.tensor([0, 3]), torch.tensor([[1, 2]]), torch.tensor([2, 0])
    counts = counts_of(x, y, begins, 3, runs, reads)
    whole, parts = [0] * len(trainable(networks)), [0] * len(trainable(networks))
    for n, sums in ((1, whole), (2, parts)):
        for rows in torch.arange(8).chunk(n):
            loss = dmt_step(networks, x[rows], y[rows], begins, 3, runs, reads, counts=counts)["train_loss"]
            sums[:] = [a + b for a, b in zip(sums, torch.autograd.grad(loss, trainable(networks)))]
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


def test_loss_is_finite_where_nothing_is_asked():
    networks, (x, y) = networks_for(), batch()
    for rows, relative in ((x, False), (torch.full_like(x, PAD), False), (torch.full_like(x, PAD), True)):
        terms = dmt_step(networks, rows, torch.full_like(y, IGNORE), AT_0, 7, TRIPLES, READS, replace(SETTINGS, relative=relative))
        assert terms["loss_read"] == terms["loss_own"] == terms["loss_hold"] == 0 and all(bool(value.isfinite()) for value in terms.values())
        assert rows is x or terms["loss_dyn"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# What a step is trained on

@pytest.mark.parametrize("H, label_stride, expected", [
    (220, 16, [16, 32, 64, 128, 220]), (256, 16, [16, 32, 64, 128, 256]), (8, 1, [1, 2, 4, 8]), (17, 16, [16, 17]), (16, 16, [16]),
    (7, 16, [7]), (1, 1, [1])])
@pytest.mark.parametrize("grow, iters", [(0.7, 600), (0.9, 97), (0.1, 100)])
def test_horizon_doubles_from_the_label_stride_to_the_whole_for_as_many_iterations_each(H, label_stride, expected, grow, iters):
    settings = Config(label_stride=label_stride, grow=grow, max_iters=iters)
    horizons = [horizon_at(step, settings, H) for step in range(iters)]
    assert horizons == sorted(horizons) and list(dict.fromkeys(horizons)) == expected
    grown = sum(h < H for h in horizons)
    assert grown == 0 if expected == [H] else abs(grown - grow * iters) < 1
    times = [horizons.count(h) for h in expected[:-1]]
    assert not times or max(times) - min(times) <= 1
    assert {horizon_at(step, replace(settings, grow=0.0), H) for step in range(iters)} == {H}


@pytest.mark.parametrize("T, h, unroll, label_stride, updates", [
    (20, 8, 1, 3, 1), (20, 8, 1, 1, 3), (20, 20, 1, 16, 1), (16, 16, 4, 4, 2), (19, 9, 2, 3, 2), (19, 13, 2, 2, 4), (7, 7, 3, 5, 9),
    (12, 2, 4, 4, 2)])
def test_roll_outs_and_runs_are_a_function_of_seed_and_step_disjoint_and_cover_the_row_and_every_step(T, h, unroll, label_stride, updates):
    settings = Config(label_stride=label_stride, unroll=unroll, updates=updates, p_start=0.25)

    def draw(step, **changes):
        begins, pairs = choose_pairs(replace(settings, **changes), step, T, h)
        return begins.tolist(), [(runs.tolist(), reads.tolist()) for runs, reads in pairs]

    drawn = [draw(step) for step in range(200)]
    assert drawn[:9] == [draw(step) for step in range(9)] != [draw(step, seed=5) for step in range(9)]
    first = {begins[0] for begins, _ in drawn}
    assert first == set(range(T % h + 1))
    for begins, pairs in drawn:
        assert begins == list(range(begins[0], begins[0] + T // h * h, h)) and begins[-1] + h <= T
        runs = [run for some, _ in pairs for run in some]
        assert len(pairs) == min(updates, len(runs)) and all(some and reads for some, reads in pairs)
        assert all(run == list(range(run[0], run[0] + min(unroll, h))) for run in runs)
        starts = sorted(run[0] for run in runs)
        assert all(b - a == label_stride for a, b in zip(starts, starts[1:])) and starts[0] >= 0 and max(map(max, runs)) < h
        reads = [i for _, some in pairs for i in some]
        assert len(set(reads)) == len(reads) == sum(map(len, runs)) and set(reads) <= set(range(h))     # as many as have labels
    for which in range(2):
        assert {i for _, pairs in drawn for pair in pairs for i in np.ravel(pair[which])} == set(range(h))
    assert all(draw(step, p_start=1.0)[0][0] == 0 for step in range(20))
    if len(drawn[0][1]) > 1:                                                     # the shares are drawn at random, too
        assert len({min(min(run) for run in pairs[0][0]) for _, pairs in drawn}) > 1


def test_every_label_stride_th_step_has_a_label():
    for h, label_stride, labelled in ((8, 1, {8}), (8, 3, {2}), (220, 16, {13}), (256, 16, {16}), (5, 16, {1})):
        settings = Config(label_stride=label_stride)
        assert {sum(len(runs) for runs, _ in choose_pairs(settings, step, h, h)[1]) for step in range(30)} == labelled


def test_overfitting_one_batch_drives_the_losses_near_their_floor():
    """Rows without a common prefix: the labels are a function of the state, the floor of all is 0."""
    networks = networks_for(updater="gru").float()
    x = torch.stack([torch.randperm(V) for _ in range(4)])
    y = torch.cat([x[:, 1:], torch.full((4, 1), IGNORE)], dim=1)
    optimizer = torch.optim.Adam(trainable(networks), lr=1e-2)
    first, settings = None, replace(SETTINGS, lambda_own=0.0, lambda_hold=0.0)     # the decoder is a random one
    for _ in range(250):
        terms = dmt_step(networks, x, y, AT_0, 5, torch.arange(5)[:, None], torch.arange(5), settings)
        first = first or {name: value.item() for name, value in terms.items()}
        optimizer.zero_grad()
        terms["train_loss"].backward()
        optimizer.step()
    assert terms["loss_dyn"] < 0.05 * first["loss_dyn"], (first, terms)
    assert terms["loss_read"] < 0.5, terms      # one of four rows may share its first token with another


# ---------------------------------------------------------------------------------------------------------------------
# The script

def run(folder, data_dir, source, *flags):
    trained(train_dmt, *QUICK, *ROLL_OUTS, f"--data_dir={data_dir}", f"--init_from={source}", f"--out_dir={folder}", *flags)
    return torch.load(folder / "ckpt.pt", weights_only=True)


@pytest.mark.parametrize("flags", [
    ["--label_stride=2"], "--label_stride=2 --unroll=2 --updates=2 --lambda_own=1 --lambda_hold=1 --relative --grow=0.5".split()],
    ids=["plain", "all"])
def test_a_run_moves_updater_and_readout_and_nothing_else(tmp_path, data_dir, smt_run, flags):
    source = smt_run("retrieval")
    before = torch.load(source / "ckpt.pt", weights_only=True)
    after = run(tmp_path, data_dir, source, "--dataset=retrieval", *flags)
    assert after["model"].keys() == before["model"].keys() and after["stage"] == "dmt"
    assert after["model_config"] == before["model_config"] and torch.equal(after["initial_memory"], before["initial_memory"])
    for name, weight in after["model"].items():
        frozen = name.startswith(("encoder", "decoder"))
        unused = "embed" in name                                                 # tokens that no row of the batches has
        assert torch.equal(weight, before["model"][name]) == frozen or unused, name


def test_an_iteration_makes_as_many_steps_as_asked_for_each_with_its_share_of_one_roll_out(tmp_path, monkeypatch, data_dir, smt_run):
    rolled, losses, steps = [], [], []
    roll, loss, step = train_dmt.roll_out_and_label, train_dmt.dmt_loss, runtime.optimizer_step
    monkeypatch.setattr(train_dmt, "roll_out_and_label", lambda *arguments: rolled.append(roll(*arguments)) or rolled[-1])
    monkeypatch.setattr(train_dmt, "dmt_loss", lambda *arguments: losses.append(arguments[1:8]) or loss(*arguments))
    monkeypatch.setattr(runtime, "optimizer_step", lambda optimizer, lr, clip: steps.append(lr) or step(optimizer, lr, clip))
    run(tmp_path, data_dir, smt_run("retrieval"), "--dataset=retrieval", "--updates=3", "--label_stride=2", "--unroll=2", "--lambda_own=1")
    assert len(rolled) == 4 and len(losses) == len(steps) == 12
    for i, (before, after, labels) in enumerate(rolled):
        shares = losses[3 * i:3 * i + 3]
        runs = torch.cat([share[5] for share in shares])
        assert sorted(runs.flatten().tolist()) == list(range(8)) == sorted(torch.cat([share[6] for share in shares]).tolist())
        assert torch.equal(torch.cat([share[0] for share in shares], dim=1), before)
        assert torch.equal(torch.cat([share[2] for share in shares], dim=1), labels)
        assert all(torch.equal(share[1], after) for share in shares)
        for place, first in enumerate(runs[:, 0].tolist()):
            assert not first or torch.equal(before[:, place], after[:, first - 1])


def test_a_growing_horizon_cuts_the_rows_into_pieces(tmp_path, monkeypatch, data_dir, smt_run):
    shapes, roll = [], train_dmt.roll_out_and_label

    def spy(networks, x, begins, h, runs, start):
        result = roll(networks, x, begins, h, runs, start)
        shapes.append((begins.tolist(), h, tuple(result[1].shape[:2])))
        return result

    monkeypatch.setattr(train_dmt, "roll_out_and_label", spy)
    run(tmp_path, data_dir, smt_run("retrieval"), "--dataset=retrieval", "--grow=0.75", "--label_stride=2", "--p_start=1")
    assert shapes == [([0, 2, 4, 6], 2, (64, 2)), ([0, 2, 4, 6], 2, (64, 2)), ([0, 4], 4, (32, 4)), ([0], 8, (16, 8))]


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_another_preset_than_the_encoders_is_noted(tmp_path, data_dir, smt_run, preset):
    result = trained(train_dmt, *QUICK, *ROLL_OUTS, "--dataset=retrieval", f"--data_dir={data_dir}", f"--init_from={smt_run('retrieval')}",
                     f"--out_dir={tmp_path}", f"--preset={preset}")
    assert ("note: the encoder was trained with --preset=tiny, this run has small" in result.out) == (preset == "small")


@pytest.mark.parametrize("preset, T", [("tiny", 219), ("small", 784), ("paper", 784), ("small", 1024)])
def test_no_run_has_more_shapes_than_are_compiled(preset, T):
    config, shapes = Config(**train_dmt.PRESETS[preset]), set()
    for step in range(0, config.max_iters, 3):
        h = horizon_at(step, config, min(config.horizon or T, T))
        begins, pairs = choose_pairs(config, step, T, h)
        shapes |= {(len(begins), h, runs.shape, reads.shape) for runs, reads in pairs}
    assert 1 <= len(shapes) <= runtime.COMPILED_SHAPES


@pytest.mark.parametrize("dataset, flags", [("retrieval", ["--grow=0.75", "--label_stride=2"]),
                                            ("fables", ["--seq_len=20", "--horizon=7", "--p_start=0"]),
                                            ("fables", ["--seq_len=20", "--horizon=7", "--persistent"])], ids=["growing", "anywhere", "persistent"])
def test_what_follows_a_roll_out_is_that_of_its_row_and_nothing_beyond_the_row(tmp_path, monkeypatch, data_dir, smt_run, dataset, flags):
    drawn, rolled, given = [], [], []
    name = "stream_rows" if "--persistent" in flags else "sample_batch"
    draw, roll, loss = getattr(data, name), train_dmt.roll_out_and_label, train_dmt.dmt_loss
    monkeypatch.setattr(data, name, lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    monkeypatch.setattr(train_dmt, "roll_out_and_label", lambda *arguments: rolled.append(arguments) or roll(*arguments))
    monkeypatch.setattr(train_dmt, "dmt_loss", lambda *arguments: given.append((*arguments[4:6], arguments[-1])) or loss(*arguments))
    run(tmp_path, data_dir, smt_run(dataset), f"--dataset={dataset}", "--lambda_hold=1", *flags)
    beyond, pad = 0, data.load(dataset, data_dir).pad
    for (x, y, _), (_, _, begins, h, *_), (given_x, given_y, future_len) in zip(drawn[-4:], rolled, given, strict=True):
        place, T = 0, x.shape[1]
        assert given_x.shape == given_y.shape == (len(x) * len(begins), h + 2) and future_len == 3
        for row in range(len(x)):
            for begin in begins.tolist():
                for i in range(h + 2):
                    inside = begin + i < T
                    assert given_x[place, i] == (x[row, begin + i] if inside else pad)
                    assert given_y[place, i] == (y[row, begin + i] if inside else IGNORE)
                    beyond += inside and i >= h
                place += 1
    assert bool(beyond) == ("--persistent" not in flags)                          # whose roll-outs end with their row


def test_persistent_streams_go_on_where_they_ended_and_their_memory_with_them(tmp_path, monkeypatch, data_dir, smt_run):
    calls, roll = [], train_dmt.roll_out_and_label

    def spy(networks, x, begins, h, runs, start):
        result = roll(networks, x, begins, h, runs, start)
        calls.append((start, x, begins.tolist(), h, result[1]))
        return result

    monkeypatch.setattr(train_dmt, "roll_out_and_label", spy)
    last = run(tmp_path, data_dir, smt_run("fables"), "--dataset=fables", "--persistent", "--seq_len=100", "--horizon=60")
    fables = data.load("fables", data_dir)
    part = (len(fables.train.tokens) - 1) // 16
    assert len(calls) == 4 and all(begins == [40] and h == 60 for _, _, begins, h, _ in calls)
    for step, (start, x, *_) in enumerate(calls):
        for row in range(16):                                                    # each stream in its own part of the text
            begin = row * part + step * 60
            assert torch.equal(x[row], fables.train.tokens[begin:begin + 100].long())
        assert torch.equal(start, calls[step - 1][4][:, -1]) if step else start is None
    assert torch.equal(last["memory"], calls[-1][4][:, -1])
    assert last["memory"].untyped_storage().nbytes() == last["memory"].nbytes         # without the memories before it


def test_persistent_streams_begin_anew_from_the_encoder_when_their_part_ends(tmp_path, monkeypatch, data_dir, smt_run):
    calls, roll = [], train_dmt.roll_out_and_label
    monkeypatch.setattr(train_dmt, "roll_out_and_label",
                        lambda networks, x, *more: (calls.append((more[-1], x)), roll(networks, x, *more))[1])
    run(tmp_path, data_dir, smt_run("fables"), "--dataset=fables", "--persistent", "--seq_len=200", "--horizon=150")
    part = (len(data.load("fables", data_dir).train.tokens) - 1) // 16
    steps = (part - 200) // 150 + 1
    assert 1 <= steps < 4
    assert torch.equal(calls[0][1], calls[steps][1]) and calls[0][0] is calls[steps][0] is None


def test_flops_count_no_start_for_streams_which_go_on_from_their_own_memories():
    networks, sizes = networks_for("causal"), ModelConfig(encoder="causal", d_model=8, n_heads=2, memory_tokens=2, encoder_layers=1,
                                                          updater_layers=1, context_len=4, future_len=TF)
    pairs = [(SINGLE, READS)]
    found = [dmt_flops(replace(SETTINGS, persistent=persistent), sizes, networks, V, 12, torch.tensor([5]), 7, pairs)[0]
             for persistent in (False, True)]
    encoder = [forward_flops(sizes, V, 12, n)["encoder"] for n in (8, 7)]
    assert found[0] - found[1] == SETTINGS.batch_size * (encoder[0] - encoder[1]) > 0
