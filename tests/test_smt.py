"""The SMT objective: its contexts, futures and targets against the stream, and each loss against plain loops in float64."""
import pytest
import torch
from conftest import randomise

import data
import train_smt
from data import IGNORE, Data, Split
from model import build
from train_smt import Config, count_terms, expand_runs, futures, smt_loss, uniformity

V, PAD, TF = 200, 200, 4
KINDS = pytest.mark.parametrize("kind", ["window", "causal"])


def make(kind, documents, targets=None, closing=b""):
    """A Data set in memory; both of its splits are the same."""
    starts = torch.tensor([0] + [len(d) for d in documents[:-1]]).cumsum(0)
    stream = torch.tensor(list(b"".join(documents) + closing), dtype=torch.uint8)
    split = Split(stream, None if targets is None else torch.tensor(list(b"".join(targets)), dtype=torch.uint8), starts)
    return Data({"name": "made", "kind": kind, "vocab_size": V, "first_token": 0, "longest_document": max(map(len, documents))},
                split, split)


STORIES = make("text", [b"\0ab", b"\0cdefg", b"\0h", b"\0ijklmnopqrst"], closing=b"\0")
TASK = make("synthetic", [b"abcd", b"efghij", b"kl"], [bytes([255, 1, 255, 2]), bytes([3, 255, 255, 4, 5, 6]), bytes([255, 7])])
DATA = pytest.mark.parametrize("some", [STORIES, TASK], ids=["stream", "synthetic"])


def config(**changes):
    return Config(**dict(d_model=8, n_heads=2, memory_tokens=2, encoder_layers=1, updater_layers=1, context_len=5, future_len=TF,
                         batch_size=16, positions=3) | changes)


def batch(some=STORIES, size=16, positions=3, length=8):
    x, y, _ = data.sample_batch(some, 1, 0, size, length, positions, 0.5)
    return x, y, torch.tensor([0, 3, 7][:positions])


def networks_for(settings, seed=0):
    return randomise(build(settings, V), seed)


def loss_and_gradients(networks, x, y, t, settings, term="train_loss"):
    counts = count_terms(x, y, t, settings.future_len, PAD)
    value = smt_loss(networks, x, y, t, counts, settings)[1][term]
    parameters = dict(networks.named_parameters())
    gradients = torch.autograd.grad(value, parameters.values(), allow_unused=True)
    return value.detach(), {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), gradients)}


def moved(gradients):
    """The networks that a gradient reaches."""
    return {name.split(".")[0] for name, gradient in gradients.items() if gradient.abs().max() > 1e-12}


# ---------------------------------------------------------------------------------------------------------------------
# Contexts, futures and targets

@DATA
@pytest.mark.parametrize("context_len", [1, 3, 12])
def test_contexts_futures_and_targets_are_those_of_the_stream_at_every_position(some, context_len):
    """Straight from the stream: the last Tc tokens up to t with PAD before the row, and what follows t within the row."""
    T, stream = 9, some.train.tokens.tolist()
    begins = some.train.starts if some.rows_are_documents else torch.arange(len(stream) - 1)
    x, y = data.document_rows(some.train, some.meta, begins, T, cut=some.rows_are_documents)
    t = torch.arange(-1, T)
    settings = config(context_len=context_len, encoder="window")
    networks, seen = build(settings, V), []
    networks["encoder"].embed.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    networks["encoder"](x, t)
    contexts = seen[0].view(len(x), len(t), context_len)
    future_x, future_y = futures(x, y, t[1:], TF, PAD)

    for row, begin in enumerate(begins.tolist()):
        end = min([s for s in some.train.starts.tolist() + [len(stream)] if s > begin]) if some.rows_are_documents else len(stream)

        def token(i):
            return stream[begin + i] if 0 <= i < T and begin + i < end else PAD

        def target(i):
            if i >= T or begin + i >= end:
                return IGNORE
            if some.train.targets is not None:
                asked = int(some.train.targets[begin + i])
                return IGNORE if asked == 255 else asked
            return stream[begin + i + 1] if begin + i + 1 < end else IGNORE

        for place, at in enumerate(t.tolist()):
            assert contexts[row, place].tolist() == [token(i) for i in range(at - context_len + 1, at + 1)]
            if at >= 0:
                assert future_y[row, at].tolist() == [target(at + i) for i in range(TF)]
                assert future_x[row, at].tolist() == [token(at + i) for i in range(1, TF)]


@DATA
def test_terms_are_counted_as_the_losses_use_them(some):
    x, y, t = batch(some)
    decoded = sum(int(y[b, i + j] != IGNORE) for b in range(16) for i in t.tolist() for j in range(TF) if i + j < 8)
    transitions = sum(int(x[b, i] != PAD) for b in range(16) for i in t.tolist())
    readouts = sum(int(y[b, i] != IGNORE) for b in range(16) for i in t.tolist())
    assert count_terms(x, y, t, TF, PAD).tolist() == [decoded, transitions, readouts]
    assert 0 < readouts < 48 or some is STORIES


# ---------------------------------------------------------------------------------------------------------------------
# The losses, term by term

def nll(logits, target):
    return logits.exp().sum().log() - logits[target]


def mean(values):
    return sum(values) / max(len(values), 1)


def reference_uniformity(memory):
    """(n, d) -> log of the mean over all ordered pairs."""
    u = [m / m.square().sum().sqrt() for m in memory]
    pairs = [(-2 * (u[a] - u[b]).square().sum()).exp() for a in range(len(u)) for b in range(len(u)) if a != b]
    return mean(pairs).log()


def reference_losses(networks, x, y, t, settings):
    """One pair of memories at a time, from design section 3."""
    encoder, decoder, updater, readout = (networks[name] for name in ("encoder", "decoder", "updater", "readout"))
    dec, near, dyn, read, memories = [], [], [], [], []
    for b in range(len(x)):
        for place, i in enumerate(t.tolist()):
            before, after = (encoder(x[b:b + 1], torch.tensor([at]))[0, 0] for at in (i - 1, i))
            memories.append(after)
            follow = [int(x[b, j]) if j < x.shape[1] else PAD for j in range(i + 1, i + settings.future_len)]
            logits = decoder(after[None], torch.tensor([follow], dtype=torch.long))[0]
            if place % settings.decode_every == 0:
                dec += [nll(logits[j], y[b, i + j]) for j in range(settings.future_len)
                        if i + j < x.shape[1] and y[b, i + j] != IGNORE]
            if settings.lambda_near and y[b, i] != IGNORE:
                near.append(nll(logits[0], y[b, i]))
            if x[b, i] != PAD:
                start, goal = (before.detach(), after.detach()) if settings.detach else (before, after)
                dyn.append((updater(start[None], x[b, i:i + 1])[0] - goal).square().mean())
            if y[b, i] != IGNORE:
                read.append(nll(readout(after.detach()[None])[0], y[b, i]))
    groups = torch.stack(memories).view(len(x), len(t), settings.memory_tokens, -1).split(train_smt.UNIFORMITY_ROWS)
    unif = mean([reference_uniformity(group.flatten(0, 2)) for group in groups])
    losses = dict(loss_dec=mean(dec), loss_near=torch.as_tensor(mean(near), dtype=torch.float64), loss_dyn=mean(dyn),
                  loss_unif=unif, loss_read=mean(read))
    weights = dict(loss_dec=settings.lambda_dec, loss_near=settings.lambda_near, loss_dyn=settings.lambda_dyn,
                   loss_unif=settings.lambda_unif, loss_read=settings.lambda_read)
    return losses | {"train_loss": sum(weights[name] * value for name, value in losses.items())}


@KINDS
@pytest.mark.parametrize("some, options", [
    (STORIES, {}), (STORIES, dict(detach=True)), (STORIES, dict(lambda_near=0.4, decode_every=2)), (TASK, {})],
    ids=["stream", "detached", "near", "synthetic"])
def test_each_loss_and_the_gradient_of_their_sum_equal_plain_loops(kind, some, options):
    settings = config(encoder=kind, **options, lambda_dec=0.7, lambda_dyn=2.0, lambda_unif=0.5, lambda_read=1.3)
    networks = networks_for(settings)
    x, y, t = batch(some)
    assert (x[:, t] == PAD).any() and (y[:, t] == IGNORE).any()
    expected = reference_losses(networks, x, y, t, settings)
    loss, terms = smt_loss(networks, x, y, t, count_terms(x, y, t, TF, PAD, settings.decode_every), settings)
    assert terms.keys() == expected.keys() and loss is terms["train_loss"]
    assert (terms["loss_near"] > 0) == (settings.lambda_near > 0)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-7, atol=1e-9, msg=lambda m: f"{name}: {m}")
    ours, theirs = (torch.autograd.grad(value, list(networks.parameters())) for value in (loss, expected["train_loss"]))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@KINDS
@pytest.mark.parametrize("run_length", [2, 3])
def test_runs_of_positions_share_memories_and_change_no_loss(kind, run_length):
    settings = config(encoder=kind, positions=6, run_length=run_length, lambda_unif=0.5)
    networks = networks_for(settings)
    x, y, _ = batch(TASK)
    t = expand_runs(torch.tensor([0, 4, 7][:6 // run_length]), run_length, 8)
    expected = reference_losses(networks, x, y, t, settings)
    _, terms = smt_loss(networks, x, y, t, count_terms(x, y, t, TF, PAD), settings)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-7, atol=1e-9)


def test_runs_of_positions_are_consecutive_and_within_the_row():
    for run_length in (1, 2, 3, 8):
        runs = expand_runs(torch.arange(8), run_length, 8).view(8, run_length)
        assert runs.min() >= 0 and runs.max() <= 7 and (runs.diff(dim=1) == 1).all()
        assert all(i in run for i, run in enumerate(runs.tolist()))


def test_dynamics_loss_reaches_the_encoder_through_both_memories_and_through_none_when_detached():
    """The encoder is a table here, whose entry for position t is a leaf: the gradient of each memory is seen on its own."""
    settings = config()
    networks = networks_for(settings)

    class Table(torch.nn.Module):
        pad = PAD

        def __init__(self):
            super().__init__()
            self.rows = torch.nn.Parameter(torch.randn(16, 9, 2, 8, dtype=torch.float64))

        def forward(self, x, t):
            return self.rows[:, t + 1]

    networks["encoder"] = table = Table()
    x, y, _ = batch(TASK)
    t = torch.tensor([3])
    for detach in (False, True):
        _, terms = smt_loss(networks, x, y, t, count_terms(x, y, t, TF, PAD), config(detach=detach))
        gradient, *others = torch.autograd.grad(terms["loss_dyn"], [table.rows, *networks["updater"].parameters()], allow_unused=True)
        assert all(g is not None and g.abs().max() > 0 for g in others)
        if detach:
            assert gradient is None
            continue
        real = x[:, 3] != PAD
        size = gradient.abs().amax((-2, -1))
        assert size[real][:, [3, 4]].min() > 1e-6 and real.any() and not real.all()      # m_{t-1} and m_t
        assert size[:, [0, 1, 2, 5, 6, 7, 8]].max() == 0 and size[~real].max() == 0      # no other, none past the end


@KINDS
def test_each_loss_trains_the_networks_it_should(kind):
    x, y, t = batch(TASK)
    for detach in (False, True):
        settings = config(encoder=kind, detach=detach, lambda_near=0.4)
        networks = networks_for(settings)
        reached = {term: moved(loss_and_gradients(networks, x, y, t, settings, term)[1])
                   for term in ("loss_dec", "loss_near", "loss_dyn", "loss_unif", "loss_read")}
        assert reached == {"loss_dec": {"encoder", "decoder"}, "loss_near": {"encoder", "decoder"},
                           "loss_dyn": {"updater"} if detach else {"updater", "encoder"},
                           "loss_unif": {"encoder"}, "loss_read": {"readout"}}
    _, gradients = loss_and_gradients(networks, x, y, t, settings)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_uniformity_is_that_of_the_paper_and_least_for_memories_far_apart():
    memory = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(uniformity(memory), reference_uniformity(memory))
    torch.testing.assert_close(uniformity(memory * torch.rand(7, 1) * 9), uniformity(memory))
    assert abs(uniformity(torch.ones(4, 3))) < 1e-6
    assert uniformity(torch.tensor([[1., 0], [-1, 0]])) == -8
    one_place = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(uniformity(one_place), one_place)[0].isfinite().all()


@pytest.mark.parametrize("rows", [1, 3, 8, 12, 16, 20])
@pytest.mark.parametrize("memory_tokens", [1, 2])
def test_uniformity_is_a_mean_over_groups_of_rows_whatever_the_batch(rows, memory_tokens):
    settings = config(batch_size=rows, positions=1, memory_tokens=memory_tokens)
    networks = networks_for(settings)
    x, y, t = batch(size=rows, positions=1)
    memory = networks["encoder"](x, t)
    expected = sum(reference_uniformity(group.flatten(0, 2)) * len(group) for group in memory.split(train_smt.UNIFORMITY_ROWS)
                   if group[..., 0].numel() > 1) / rows
    _, terms = smt_loss(networks, x, y, t, count_terms(x, y, t, TF, PAD), settings)
    torch.testing.assert_close(torch.as_tensor(terms["loss_unif"], dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64))


def test_uniformity_looks_at_a_bounded_number_of_tokens(monkeypatch):
    sizes = []
    monkeypatch.setattr(train_smt, "uniformity", lambda memory: sizes.append(len(memory)) or memory.sum() * 0)
    for positions in (1, 8, 30, 64):
        settings = config(positions=positions, memory_tokens=4)
        x, y, _ = batch(length=64)
        t = torch.arange(positions)
        smt_loss(build(settings, V), x, y, t, count_terms(x, y, t, TF, PAD), settings)
    assert max(sizes) <= train_smt.UNIFORMITY_TOKENS and sizes[:4] == [32, 32, 256, 256]
    assert len(sizes) == 8 and min(sizes[4:]) > train_smt.UNIFORMITY_TOKENS / 2 - 32


# ---------------------------------------------------------------------------------------------------------------------
# Batches

@KINDS
@pytest.mark.parametrize("some", [STORIES, TASK], ids=["stream", "synthetic"])
def test_losses_and_gradients_are_sums_over_micro_batches(kind, some):
    settings = config(encoder=kind, batch_size=32, lambda_unif=1.0, lambda_near=0.4)
    networks = networks_for(settings)
    x, y, t = batch(some, 32)
    counts = count_terms(x, y, t, TF, PAD)
    whole, gradients = loss_and_gradients(networks, x, y, t, settings)
    for pieces in (2, 4):
        networks.zero_grad()
        total = 0
        for part_x, part_y in zip(x.chunk(pieces), y.chunk(pieces)):
            loss, _ = smt_loss(networks, part_x, part_y, t, counts, settings)
            loss.backward()
            total = total + loss.detach()
        torch.testing.assert_close(total, whole)
        for name, parameter in networks.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-10)


@KINDS
def test_loss_is_finite_where_nothing_is_asked(kind):
    settings = config(encoder=kind, lambda_near=0.4)
    networks = networks_for(settings)
    x, y, t = batch()
    for rows in (x, torch.full_like(x, PAD)):
        counts = count_terms(rows, torch.full_like(y, IGNORE), t, TF, PAD)
        loss, terms = smt_loss(networks, rows, torch.full_like(y, IGNORE), t, counts, settings)
        loss.backward()
        assert terms["loss_dec"] == terms["loss_near"] == terms["loss_read"] == 0
        assert all(bool(value.isfinite()) for value in terms.values())
        assert all(p.grad.isfinite().all() for p in networks.parameters() if p.grad is not None)


@KINDS
def test_overfitting_one_batch_drives_every_term_to_its_floor(kind):
    """The first token tells the whole row: the floor of each cross-entropy is 0, and so is that of the dynamics."""
    settings = config(encoder=kind, d_model=16, n_heads=1, batch_size=8, future_len=2, context_len=8, lambda_dyn=1.0)
    networks = build(settings, 8)
    x = torch.stack([torch.randperm(8) for _ in range(8)])
    x[:, 0] = torch.arange(8)
    y = torch.cat([x[:, 1:], torch.full((8, 1), IGNORE)], dim=1)
    t = torch.arange(8)
    counts = count_terms(x, y, t, 2, 8)
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-2)
    for step in range(150):
        loss, terms = smt_loss(networks, x, y, t, counts, settings)
        if step == 0:
            assert terms["loss_dec"] > 1.5 and terms["loss_read"] > 1.5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        drift = terms["loss_dyn"] / networks["encoder"](x, t).var(0).mean()
    assert terms["loss_dec"] < 0.05 and terms["loss_read"] < 0.1 and drift < 0.1, (terms, drift)
