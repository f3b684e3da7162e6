"""DMT: the batched step against a step-by-step loop, what it trains, where its roll-outs begin, streams that go on."""
from dataclasses import replace

import pytest
import torch
from conftest import QUICK, randomise, trained

import data
import train_dmt
from data import IGNORE
from model import ModelConfig, build
from train_dmt import Config, choose_window, dmt_loss, roll_out_and_label, start_memory

V, PAD = 5, 5
KINDS = pytest.mark.parametrize("kind", ["window", "causal"])
UPDATERS = pytest.mark.parametrize("updater", ["transformer", "mlp", "gru"])
SETTINGS = Config(lambda_dyn=3.0, lambda_read=0.5)


def networks_for(encoder="window", updater="transformer"):
    sizes = ModelConfig(encoder=encoder, updater=updater, d_model=8, n_heads=2, memory_tokens=2, encoder_layers=1,
                        updater_layers=1, context_len=4, future_len=3)
    return randomise(build(sizes, V))


def batch(B=4, T=7):
    """Rows of which one ends early, with some targets that are not asked."""
    x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    y[torch.rand(B, T) < 0.3] = IGNORE
    x[1, 4:], y[1, 4:] = PAD, IGNORE
    return x, y


def counts_of(x, y, steps):
    return torch.stack([(x[:, steps] != PAD).sum(), (y != IGNORE).sum()])


def reference_losses(networks, start, x, y, begin, horizon, steps, settings):
    """One row and one step at a time; the state is detached after each step, unless gradients go through time."""
    updater, readout, encoder = networks["updater"], networks["readout"], networks["encoder"]
    dyn, read = [], []
    for b in range(len(x)):
        memory = start[b:b + 1].detach()
        for i in range(horizon):
            token, target = x[b:b + 1, begin + i], y[b, begin + i]
            memory = updater(memory if settings.through_time else memory.detach(), token)
            if i in steps.tolist() and token != PAD:
                label = encoder(x[b:b + 1], torch.tensor([begin + i]))[:, 0].detach()
                dyn.append((memory - label).square().mean())
            if target != IGNORE:
                logits = readout(memory.detach())[0]
                read.append(logits.exp().sum().log() - logits[target])
    losses = dict(loss_dyn=sum(dyn) / len(dyn), loss_read=sum(read) / len(read))
    return losses | {"train_loss": settings.lambda_dyn * losses["loss_dyn"] + settings.lambda_read * losses["loss_read"]}


def dmt_step(networks, x, y, begin, horizon, steps, settings):
    start = start_memory(networks, networks["encoder"].initial_memory().detach(), x, begin)
    rolled_x, rolled_y = x[:, begin:begin + horizon], y[:, begin:begin + horizon]
    before, after, labels = roll_out_and_label(networks, start, x, begin, horizon, steps)
    assert not (before.requires_grad or after.requires_grad or labels.requires_grad)
    _, terms = dmt_loss(networks, before, after, labels, rolled_x, rolled_y, steps, counts_of(rolled_x, rolled_y, steps), settings)
    return start, terms


@KINDS
@UPDATERS
@pytest.mark.parametrize("through_time", [False, True])
@pytest.mark.parametrize("begin, horizon, steps", [(0, 7, [0, 1, 2, 3, 4, 5, 6]), (2, 5, [1, 3]), (0, 4, [3])])
def test_batched_step_equals_a_loop_over_rows_and_steps(kind, updater, through_time, begin, horizon, steps):
    networks, (x, y), steps = networks_for(kind, updater), batch(), torch.tensor(steps)
    settings = replace(SETTINGS, through_time=through_time)
    start, terms = dmt_step(networks, x, y, begin, horizon, steps, settings)
    expected = reference_losses(networks, start, x, y, begin, horizon, steps, settings)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    parameters = [*networks["updater"].parameters(), *networks["readout"].parameters()]
    for ours, theirs in zip(torch.autograd.grad(terms["train_loss"], parameters),
                            torch.autograd.grad(expected["train_loss"], parameters)):
        assert theirs.abs().max() > 0 or theirs.numel() == V + 1
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


@UPDATERS
def test_gradients_through_time_differ_from_those_of_single_steps(updater):
    networks, (x, y), steps = networks_for(updater=updater), batch(), torch.arange(7)
    parameters = list(networks["updater"].parameters())
    single, through = (torch.autograd.grad(dmt_step(networks, x, y, 0, 7, steps, replace(SETTINGS, through_time=option))[1]["loss_dyn"],
                                           parameters) for option in (False, True))
    assert max((a - b).abs().max() / b.abs().max() for a, b in zip(single, through)) > 0.01


@UPDATERS
@pytest.mark.parametrize("through_time", [False, True])
def test_every_parameter_of_updater_and_readout_gets_a_gradient_under_autocast(updater, through_time):
    """Autocast caches the casts of weights within a block: the roll-out without gradients must not share the loss's."""
    networks, (x, y), steps = networks_for(updater=updater).float(), batch(), torch.arange(7)
    networks.requires_grad_(False)
    settings = replace(SETTINGS, through_time=through_time)
    module = torch.nn.ModuleDict({name: networks[name].requires_grad_() for name in ("updater", "readout")})
    with torch.autocast("cpu", torch.bfloat16):
        start = start_memory(networks, networks["encoder"].initial_memory(), x, 0)
        before, after, labels = roll_out_and_label(networks, start, x, 0, 7, steps)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = dmt_loss(module, before, after, labels, x, y, steps, counts_of(x, y, steps), settings)
    loss.backward()
    assert loss.dtype == torch.float32
    for name, parameter in networks.named_parameters():
        if name.startswith(("updater", "readout")):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@KINDS
def test_roll_out_starts_from_the_empty_memory_at_0_and_from_the_encoders_elsewhere(kind):
    networks, (x, _) = networks_for(kind), batch()
    empty = torch.randn(2, 8)
    assert torch.equal(start_memory(networks, empty, x, 0), empty.expand(4, 2, 8))
    start = start_memory(networks, empty, x, 3)
    torch.testing.assert_close(start, networks["encoder"](x[:, :3], torch.tensor([2]))[:, 0])
    before, after, labels = roll_out_and_label(networks, start, x, 3, 4, torch.tensor([0, 3]))
    assert torch.equal(before[:, 0], start) and torch.equal(before[:, 1:], after[:, :-1])
    memory = start
    for i in range(4):
        memory = networks["updater"](memory, x[:, 3 + i])
        torch.testing.assert_close(after[:, i], memory)
    for column, t in ((0, 3), (1, 6)):
        torch.testing.assert_close(labels[:, column], networks["encoder"](x, torch.tensor([t]))[:, 0])


def test_losses_and_gradients_are_sums_over_micro_batches():
    networks, (x, y), steps = networks_for(), batch(8), torch.tensor([0, 2, 6])
    parameters = [*networks["updater"].parameters(), *networks["readout"].parameters()]
    start = start_memory(networks, networks["encoder"].initial_memory(), x, 0).detach()
    whole, pieces = [0] * len(parameters), [0] * len(parameters)
    for n, sums in ((1, whole), (2, pieces)):
        for rows in torch.arange(8).chunk(n):
            before, after, labels = roll_out_and_label(networks, start[rows], x[rows], 0, 7, steps)
            loss, _ = dmt_loss(networks, before, after, labels, x[rows], y[rows], steps, counts_of(x, y, steps), SETTINGS)
            sums[:] = [a + b for a, b in zip(sums, torch.autograd.grad(loss, parameters))]
    for a, b in zip(whole, pieces):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


def test_loss_is_finite_where_nothing_is_asked():
    networks, (x, y), steps = networks_for(), batch(), torch.arange(7)
    for rows in (x, torch.full_like(x, PAD)):
        _, terms = dmt_step(networks, rows, torch.full_like(y, IGNORE), 0, 7, steps, SETTINGS)
        assert terms["loss_read"] == 0 and all(bool(value.isfinite()) for value in terms.values())
        assert rows is x or terms["loss_dyn"] == 0


def test_windows_are_a_function_of_seed_and_step_and_cover_the_row_and_every_step():
    settings = Config(label_stride=3, p_start=0.25)
    drawn = [choose_window(settings, step, 20, 8) for step in range(400)]
    assert all(begin == choose_window(settings, step, 20, 8)[0] for step, (begin, _) in enumerate(drawn))
    assert {begin for begin, _ in drawn} == set(range(13))
    assert 0.2 < sum(begin == 0 for begin, _ in drawn) / 400 < 0.45
    assert {tuple(steps.tolist()) for _, steps in drawn} == {(0, 3, 6), (1, 4, 7), (2, 5)}
    other = [choose_window(replace(settings, seed=5), step, 20, 8)[0] for step in range(400)]
    assert other != [begin for begin, _ in drawn]
    assert all(choose_window(replace(settings, p_start=1.0), step, 20, 8)[0] == 0 for step in range(50))
    assert all(choose_window(replace(settings, persistent=True), step, 20, 8)[0] == 12 for step in range(50))
    assert all(len(choose_window(replace(settings, label_stride=50), step, 20, 8)[1]) == 1 for step in range(50))
    assert choose_window(replace(settings, label_stride=1), 3, 20, 20)[1].tolist() == list(range(20))


def test_overfitting_one_batch_drives_both_losses_near_their_floor():
    """Rows without a common prefix from a learned start: the labels are a function of the state, the floor of both is 0."""
    torch.manual_seed(0)
    networks = networks_for(updater="gru").float()
    x = torch.stack([torch.randperm(V) for _ in range(4)])
    y = torch.cat([x[:, 1:], torch.full((4, 1), IGNORE)], dim=1)
    steps = torch.arange(5)
    optimizer = torch.optim.Adam([*networks["updater"].parameters(), *networks["readout"].parameters()], lr=1e-2)
    first = None
    for _ in range(250):
        _, terms = dmt_step(networks, x, y, 0, 5, steps, SETTINGS)
        first = first or {name: value.item() for name, value in terms.items()}
        optimizer.zero_grad()
        terms["train_loss"].backward()
        optimizer.step()
    assert terms["loss_dyn"] < 0.05 * first["loss_dyn"], (first, terms)
    assert terms["loss_read"] < 0.5, terms      # one of four rows may share its first token with another


# ---------------------------------------------------------------------------------------------------------------------
# The script

def run(folder, data_dir, source, *flags):
    trained(train_dmt, *QUICK, f"--data_dir={data_dir}", f"--init_from={source}", f"--out_dir={folder}", *flags)
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


def test_persistent_streams_go_on_where_they_ended_and_their_memory_with_them(tmp_path, monkeypatch, data_dir, smt_run):
    calls, roll = [], train_dmt.roll_out_and_label

    def spy(networks, start, x, begin, horizon, steps):
        result = roll(networks, start, x, begin, horizon, steps)
        calls.append((start, x, begin, horizon, result[1]))
        return result

    monkeypatch.setattr(train_dmt, "roll_out_and_label", spy)
    last = run(tmp_path, data_dir, smt_run("fables"), "--dataset=fables", "--persistent", "--seq_len=100", "--horizon=60")
    fables = data.load("fables", data_dir)
    part = (len(fables.train.tokens) - 1) // 16
    assert len(calls) == 4 and {(begin, horizon) for _, _, begin, horizon, _ in calls} == {(40, 60)}
    for step, (start, x, _, _, _) in enumerate(calls):
        for row in range(16):                                                    # each stream in its own part of the text
            begin = row * part + step * 60
            assert torch.equal(x[row], fables.train.tokens[begin:begin + 100].long())
        if step:
            assert torch.equal(start, calls[step - 1][4][:, -1])
    assert torch.equal(last["memory"], calls[-1][4][:, -1])


def test_persistent_streams_begin_anew_from_the_encoder_when_their_part_ends(tmp_path, monkeypatch, data_dir, smt_run):
    starts, roll = [], train_dmt.roll_out_and_label
    monkeypatch.setattr(train_dmt, "roll_out_and_label",
                        lambda networks, start, x, *rest: (starts.append((start, x)), roll(networks, start, x, *rest))[1])
    run(tmp_path, data_dir, smt_run("fables"), "--dataset=fables", "--persistent", "--seq_len=200", "--horizon=150")
    part = (len(data.load("fables", data_dir).train.tokens) - 1) // 16
    steps = (part - 200) // 150 + 1
    assert 1 <= steps < 4
    assert torch.equal(starts[0][1], starts[steps][1]) and torch.equal(starts[0][0], starts[steps][0])
