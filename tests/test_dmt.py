"""DMT: the batched step against a step-by-step loop, what it trains, where its roll-outs begin."""
from dataclasses import replace

import pytest
import torch
from conftest import QUICK, ROLL_OUTS, randomise, trained

import data
import train_dmt
from data import IGNORE
from model import ModelConfig, build, empty_memory
from train_dmt import Config, choose_steps, count_terms, cut, dmt_loss, roll_out_and_label

V, PAD, TF = 5, 5, 3
KINDS = pytest.mark.parametrize("kind", ["window", "causal"])
UPDATERS = pytest.mark.parametrize("updater", ["transformer", "mlp", "gru"])
SETTINGS = Config(lambda_dyn=3.0)
AT_0, ALL = torch.tensor([0]), torch.arange(7)


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


def reference_losses(networks, x, y, begins, h, labelled, settings=SETTINGS):
    """One roll-out and one step at a time; the state before each step is that of the RNN, without a gradient."""
    updater, readout, encoder = (networks[name] for name in ("updater", "readout", "encoder"))
    dyn, read = [], []
    for b in range(len(x)):
        for begin in begins.tolist():
            state = encoder(x[b:b + 1, :begin], torch.tensor([begin - 1]))[:, 0]
            for i in range(h):
                token, target = x[b:b + 1, begin + i], y[b, begin + i]
                state = updater(state.detach(), token)
                if i in labelled and token != PAD:
                    dyn.append((state - encoder(x[b:b + 1], torch.tensor([begin + i]))[:, 0]).square().mean())
                if i in labelled and target != IGNORE:
                    logits = readout(state.detach())[0]
                    read.append(logits.exp().sum().log() - logits[target])
    dyn, read = sum(dyn) / len(dyn), sum(read) / len(read)
    return {"train_loss": settings.lambda_dyn * dyn + read, "loss_dyn": dyn, "loss_read": read}


def labelled_steps(x, y, begins, h, labelled):
    """The tokens and targets of the labelled steps, as train_dmt.py hands them to the loss."""
    return [cut(tokens, begins, h)[:, labelled] for tokens in (x, y)]


def dmt_step(networks, x, y, begins, h, labelled, counts=None):
    before, labels = roll_out_and_label(networks, x, begins, h, labelled)
    assert not (before.requires_grad or labels.requires_grad)
    x, y = labelled_steps(x, y, begins, h, labelled)
    return dmt_loss(networks, before, labels, x, y, count_terms(x, y, PAD) if counts is None else counts, SETTINGS)[1]


@UPDATERS
@pytest.mark.parametrize("kind, begins, h, labelled", [("window", [0], 7, range(7)), ("causal", [0], 7, [2, 5]), ("causal", [1, 4], 3, [0, 2])],
                         ids=["all", "two", "pieces"])
def test_batched_step_equals_a_loop_over_rows_and_steps(kind, updater, begins, h, labelled):
    networks, (x, y) = networks_for(kind, updater), batch()
    case = torch.tensor(begins), h, torch.tensor([*labelled])
    terms = dmt_step(networks, x, y, *case)
    expected = reference_losses(networks, x, y, *case)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    for ours, theirs in zip(torch.autograd.grad(terms["train_loss"], trainable(networks)),
                            torch.autograd.grad(expected["train_loss"], trainable(networks)), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


@UPDATERS
def test_every_parameter_of_updater_and_readout_gets_a_gradient_under_autocast(updater):
    """Autocast caches the casts of weights within a block: the roll-out without gradients must not share the loss's."""
    networks, (x, y) = networks_for(updater=updater).float(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        before, labels = roll_out_and_label(networks, x, AT_0, 7, ALL)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = dmt_loss(networks, before, labels, x, y, count_terms(x, y, PAD), SETTINGS)
    loss.backward()
    assert loss.dtype == torch.float32
    for name, parameter in networks.named_parameters():
        if name.startswith(("updater", "readout")):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_each_loss_trains_the_network_it_should():
    networks, (x, y) = networks_for(), batch()
    terms = dmt_step(networks, x, y, AT_0, 7, ALL)
    for name, network in (("loss_dyn", "updater"), ("loss_read", "readout")):
        gradients = torch.autograd.grad(terms[name], trainable(networks), allow_unused=True, retain_graph=True)
        names = [n for n, p in networks.named_parameters() if p.requires_grad]
        assert {n.split(".")[0] for n, gradient in zip(names, gradients) if gradient is not None} == {network}


@KINDS
def test_roll_outs_begin_at_the_empty_memory_at_0_and_at_the_encoders_elsewhere_side_by_side(kind):
    networks, (x, _) = networks_for(kind), batch()
    begins, labelled = torch.tensor([0, 3]), torch.tensor([0, 2, 3])
    before, labels = roll_out_and_label(networks, x, begins, 4, labelled)
    assert before.shape == labels.shape == (8, 3, 2, 8)
    for row in range(4):
        for piece, begin in enumerate(begins.tolist()):
            n, here = 2 * row + piece, x[row:row + 1]
            states = [networks["encoder"](here[:, :3], torch.tensor([2]))[:, 0] if begin else empty_memory(networks["encoder"])[None]]
            for i in range(4):
                states.append(networks["updater"](states[-1], here[:, begin + i]))
            for place, i in enumerate(labelled.tolist()):
                torch.testing.assert_close(before[n, place], states[i][0])
                torch.testing.assert_close(labels[n, place], networks["encoder"](here, torch.tensor([begin + i]))[0, 0])


def test_pieces_of_a_row_lie_side_by_side():
    x = torch.arange(20).view(2, 10)
    assert cut(x, torch.tensor([1, 4, 7]), 3).tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [11, 12, 13], [14, 15, 16], [17, 18, 19]]


def test_losses_and_gradients_are_sums_over_micro_batches():
    networks, (x, y), case = networks_for(), batch(8), (torch.tensor([0, 3]), 3, torch.tensor([0, 2]))
    counts = count_terms(*labelled_steps(x, y, *case), PAD)
    whole, parts = [0] * len(trainable(networks)), [0] * len(trainable(networks))
    for n, sums in ((1, whole), (2, parts)):
        for rows in torch.arange(8).chunk(n):
            loss = dmt_step(networks, x[rows], y[rows], *case, counts)["train_loss"]
            sums[:] = [a + b for a, b in zip(sums, torch.autograd.grad(loss, trainable(networks)))]
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


def test_loss_is_finite_where_nothing_is_asked():
    networks, (x, y) = networks_for(), batch()
    for rows in (x, torch.full_like(x, PAD)):
        terms = dmt_step(networks, rows, torch.full_like(y, IGNORE), AT_0, 7, ALL)
        assert terms["loss_read"] == 0 and all(bool(value.isfinite()) for value in terms.values())
        assert rows is x or terms["loss_dyn"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# What a step is trained on

@pytest.mark.parametrize("T, h, label_stride", [(20, 8, 3), (20, 8, 1), (20, 20, 16), (16, 16, 4), (19, 9, 2), (12, 2, 4)])
def test_roll_outs_and_labels_are_a_function_of_seed_and_step_and_cover_the_row_and_every_step(T, h, label_stride):
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
        assert all(b - a == label_stride for a, b in zip(labelled, labelled[1:])) and 0 <= labelled[0] <= labelled[-1] < h
    uncovered = h % label_stride if h > label_stride else 0                       # the last few, where the stride does not divide h
    assert {i for _, labelled in drawn for i in labelled} >= set(range(h - uncovered))
    assert all(draw(step, p_start=1.0)[0][0] == 0 for step in range(20))


def test_overfitting_one_batch_drives_the_losses_near_their_floor():
    """Rows without a common prefix: the labels are a function of the state, the floor of all is 0."""
    networks = networks_for(updater="gru").float()
    x = torch.stack([torch.randperm(V) for _ in range(4)])
    y = torch.cat([x[:, 1:], torch.full((4, 1), IGNORE)], dim=1)
    optimizer = torch.optim.Adam(trainable(networks), lr=1e-2)
    first = None
    for _ in range(250):
        terms = dmt_step(networks, x, y, AT_0, 5, torch.arange(5))
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


def test_a_run_moves_updater_and_readout_and_nothing_else(tmp_path, data_dir, smt_run):
    source = smt_run("retrieval")
    before = torch.load(source / "ckpt.pt", weights_only=True)
    after = run(tmp_path, data_dir, source, "--dataset=retrieval", "--label_stride=2")
    assert after["model"].keys() == before["model"].keys() and after["stage"] == "dmt"
    assert after["model_config"] == before["model_config"] and torch.equal(after["initial_memory"], before["initial_memory"])
    for name, weight in after["model"].items():
        frozen = name.startswith(("encoder", "decoder"))
        unused = "embed" in name                                                 # tokens that no row of the batches has
        assert torch.equal(weight, before["model"][name]) == frozen or unused, name


def test_the_readout_begins_as_the_decoder_after_smt_and_as_itself_after_dmt(tmp_path, data_dir, smt_run):
    def readouts(source, folder):
        after = run(folder, data_dir, source, "--dataset=retrieval", "--lr=1e-30")
        return {name[len("readout."):]: weight for name, weight in after["model"].items() if name.startswith("readout.")}

    before = torch.load(smt_run("retrieval") / "ckpt.pt", weights_only=True)["model"]
    first = readouts(smt_run("retrieval"), tmp_path / "first")
    assert all(torch.equal(weight, before["decoder." + name]) for name, weight in first.items())
    assert any(not torch.equal(weight, before["readout." + name]) for name, weight in first.items())
    trained_on = run(tmp_path / "more", data_dir, tmp_path / "first", "--dataset=retrieval")["model"]
    again = readouts(tmp_path / "more", tmp_path / "again")
    assert all(torch.equal(weight, trained_on["readout." + name]) for name, weight in again.items())
    assert any(not torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_another_preset_than_the_encoders_is_noted(tmp_path, data_dir, smt_run, preset):
    result = trained(train_dmt, *QUICK, *ROLL_OUTS, "--dataset=retrieval", f"--data_dir={data_dir}", f"--init_from={smt_run('retrieval')}",
                     f"--out_dir={tmp_path}", f"--preset={preset}")
    assert ("note: the encoder was trained with --preset=tiny, this run has small" in result.out) == (preset == "small")


@pytest.mark.parametrize("dataset, flags", [("retrieval", ["--label_stride=2"]), ("fables", ["--seq_len=20", "--horizon=7", "--p_start=0"])])
def test_the_loss_gets_the_tokens_and_targets_of_the_labelled_steps_of_each_roll_out(tmp_path, monkeypatch, data_dir, smt_run, dataset, flags):
    drawn, rolled, given = [], [], []
    draw, roll, loss = data.sample_batch, train_dmt.roll_out_and_label, train_dmt.dmt_loss
    monkeypatch.setattr(data, "sample_batch", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    monkeypatch.setattr(train_dmt, "roll_out_and_label", lambda *arguments: rolled.append(arguments) or roll(*arguments))
    monkeypatch.setattr(train_dmt, "dmt_loss", lambda *arguments: given.append(arguments[3:5]) or loss(*arguments))
    run(tmp_path, data_dir, smt_run(dataset), f"--dataset={dataset}", *flags)
    for (x, y, _), (_, _, begins, h, labelled), (given_x, given_y) in zip(drawn[-4:], rolled, given, strict=True):    # not of SMT
        places = [(row, begin) for row in range(len(x)) for begin in begins.tolist()]
        assert given_x.tolist() == [[int(x[row, begin + i]) for i in labelled.tolist()] for row, begin in places]
        assert given_y.tolist() == [[int(y[row, begin + i]) for i in labelled.tolist()] for row, begin in places]
        assert h == (7 if dataset == "fables" else 8) and len(labelled) == (7 if dataset == "fables" else 4)
