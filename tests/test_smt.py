"""The SMT objective: its contexts, futures and targets against the stream, and each loss against plain loops in float64."""
import pytest
import torch
from conftest import randomise
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import train_smt
from data import IGNORE, Data, Split, futures
from flops import smt_flops
from model import build
from train_smt import Config, Counts, count_terms, smt_loss, trunk_alone, trunk_loss, uniformity

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
WINDOW, CAUSAL, ALL = dict(encoder="window"), dict(encoder="causal"), dict(positions=8, batch_size=8)
TWO_LAYERS = dict(encoder="causal", encoder_layers=2)
DATA = pytest.mark.parametrize("some", [STORIES, TASK], ids=["stream", "synthetic"])


def config(**changes):
    return Config(**dict(d_model=8, n_heads=2, memory_tokens=2, encoder_layers=1, updater_layers=1, context_len=5, future_len=TF,
                         batch_size=16, positions=3) | changes)


def batch(some=STORIES, size=16, positions=3, length=8):
    x, y, t = data.sample_batch(some, 1, 3, size, length, positions, 0.5)
    return x, y, torch.tensor([3, 7, 0][:positions]) if positions <= 3 else t


def networks_for(settings, seed=0):
    return randomise(build(settings, V), seed)


def loss_and_gradients(networks, x, y, t, settings, term="train_loss"):
    counts = count_terms(x, y, t, settings, PAD)
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
@pytest.mark.parametrize("positions", [3, 8])
def test_terms_are_counted_as_the_losses_use_them(some, positions):
    settings = config(positions=positions)
    x, y, t = batch(some, positions=positions)

    def count(places):
        return sum(int(y[b, i] != IGNORE) for b in range(16) for i in places if i < 8)

    counts = Counts(*count_terms(x, y, t, settings, PAD).tolist())
    assert counts == Counts(futures=count([i + j for i in t.tolist() for j in range(TF)]), readouts=count(t.tolist()), targets=count(range(8)),
                            transitions=sum(int(x[b, i] != PAD) for b in range(16) for i in t.tolist()))
    assert 0 < counts.readouts < 16 * positions


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
    """One row and one position at a time, from the docstring of smt_loss."""
    encoder, decoder, updater, readout = (networks[name] for name in ("encoder", "decoder", "updater", "readout"))
    dec, dyn, read, trunk, memories, T = [], [], [], [], [], x.shape[1]
    for b in range(len(x)):
        for i in t.tolist():
            before, after = (encoder(x[b:b + 1], torch.tensor([j]))[0, 0] for j in (i - 1, i))
            memories.append(after)
            follow = [int(x[b, j]) if j < T else PAD for j in range(i + 1, i + TF)]
            logits = decoder(after[None], torch.tensor([follow]))[0]
            dec += [nll(logits[j], y[b, i + j]) for j in range(TF) if i + j < T and y[b, i + j] != IGNORE]
            if x[b, i] != PAD:
                dyn.append((updater(before[None], x[b, i:i + 1])[0] - after).square().mean())
            if y[b, i] != IGNORE:
                read.append(nll(readout(after.detach()[None])[0], y[b, i]))
        if settings.encoder == "causal":
            trunk += [nll(decoder.predict(encoder.trunk(x[b:b + 1, :i + 1])[1][0, -1]), y[b, i]) for i in range(T) if y[b, i] != IGNORE]
    memories = torch.stack(memories)                                            # (n, K, d)
    stride = -(-memories[..., 0].numel() // train_smt.UNIFORMITY_TOKENS)
    terms = dict(dec=mean(dec), dyn=mean(dyn), read=mean(read), unif=reference_uniformity(memories[::stride].flatten(0, 1)))
    terms |= dict(trunk=mean(trunk)) if trunk else {}
    weights = dict(dyn=settings.lambda_dyn, unif=settings.lambda_unif)
    total = sum(weights.get(name, 1) * value for name, value in terms.items())
    return {"train_loss": total, **{f"loss_{name}": value for name, value in terms.items()}}


@pytest.mark.parametrize("some, options", [
    (STORIES, WINDOW), (TASK, WINDOW | ALL | dict(conv_width=3)), (STORIES, CAUSAL), (TASK, CAUSAL | ALL), (TASK, TWO_LAYERS),
    (STORIES, TWO_LAYERS | ALL | dict(conv_width=3, memory_tokens=3))],
    ids=["window", "window-task-all", "causal", "causal-task-all", "causal-task-trunk", "causal-trunk-all"])
def test_each_loss_and_the_gradient_of_their_sum_equal_plain_loops(some, options):
    settings = config(**options, lambda_dyn=2.0, lambda_unif=0.5)
    networks = networks_for(settings)
    x, y, t = batch(some, settings.batch_size, settings.positions)
    assert (x[:, t] == PAD).any() and (y[:, t] == IGNORE).any()
    expected = reference_losses(networks, x, y, t, settings)
    loss, terms = smt_loss(networks, x, y, t, count_terms(x, y, t, settings, PAD), settings)
    assert terms.keys() == expected.keys() and loss is terms["train_loss"]
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-7, atol=1e-9, msg=lambda m: f"{name}: {m}")
    ours, theirs = (torch.autograd.grad(value, list(networks.parameters())) for value in (loss, expected["train_loss"]))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("t", [[3], [5, 3], [4, 0, 1, 2, 3, 5, 6, 7]], ids=["one", "two", "all"])
def test_dynamics_loss_reaches_the_encoder_through_both_memories(t):
    """The encoder is a table here, whose entry for position t is a leaf: the gradient of each memory is seen on its own."""
    networks, settings = networks_for(config()), config(positions=len(t))

    class Table(torch.nn.Module):
        pad = PAD

        def __init__(self):
            super().__init__()
            self.rows = torch.nn.Parameter(torch.randn(16, 9, 2, 8, dtype=torch.float64))

        def forward(self, x, t):
            return self.rows[:, t + 1]

    networks["encoder"] = table = Table()
    x, y, _ = batch(TASK)
    t = torch.tensor(t)
    _, terms = smt_loss(networks, x, y, t, count_terms(x, y, t, settings, PAD), settings)
    gradient, *others = torch.autograd.grad(terms["loss_dyn"], [table.rows, *networks["updater"].parameters()])
    assert all(g.abs().max() > 0 for g in others)
    size = gradient.abs().amax((-2, -1))                                     # (16, 9), of m_{-1} .. m_7
    for row, tokens in zip(size, x):
        real = [i for i in t.tolist() if tokens[i] != PAD]                   # past the end there is nothing to learn
        assert {i - 1 for i in row.nonzero().flatten().tolist()} == {*real, *(i - 1 for i in real)}
    assert size[size > 0].min() > 1e-6 and (x[:, t] == PAD).any()


@KINDS
def test_each_loss_trains_the_networks_it_should(kind):
    settings = config(encoder=kind)
    networks = networks_for(settings)
    x, y, t = batch(STORIES)
    reached = {term: moved(loss_and_gradients(networks, x, y, t, settings, f"loss_{term}")[1]) for term in ("dec", "dyn", "unif", "read")}
    assert reached == dict(dec={"encoder", "decoder"}, dyn={"updater", "encoder"}, unif={"encoder"}, read={"readout"})
    _, gradients = loss_and_gradients(networks, x, y, t, settings)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_trunk_loss_trains_the_trunk_and_the_decoders_head_and_is_all_that_the_first_phase_trains():
    settings = config(**TWO_LAYERS, conv_width=3)
    networks = networks_for(settings)
    x, y, t = batch()
    counts = count_terms(x, y, t, settings, PAD)
    value, gradients = loss_and_gradients(networks, x, y, t, settings, "loss_trunk")
    trained = {name for name, gradient in gradients.items() if gradient.abs().max() > 0}
    assert trained == {name for name in gradients if name.startswith(("encoder.embed", "encoder.transformer", "decoder.norm", "decoder.head"))}
    alone, terms = trunk_alone(networks, x, y, t, counts, settings)
    torch.testing.assert_close(terms["loss_trunk"].detach(), value, rtol=0, atol=1e-12)
    assert alone is terms["loss_trunk"] is terms["train_loss"]
    torch.testing.assert_close(trunk_loss(networks, networks["encoder"].trunk(x), y, Counts(*counts)).detach(), value, rtol=0, atol=1e-12)
    alone.backward()
    assert {name for name, p in networks.named_parameters() if p.grad is not None} == trained


@pytest.mark.parametrize("future_len", [1, TF])
def test_every_parameter_gets_a_gradient_which_ddp_waits_for(future_len):
    settings = config(**TWO_LAYERS, future_len=future_len)
    networks = networks_for(settings)
    x, y, t = batch(STORIES, settings.batch_size, settings.positions)
    smt_loss(networks, x, y, t, count_terms(x, y, t, settings, PAD), settings)[0].backward()
    assert [name for name, p in networks.named_parameters() if p.grad is None] == []


def test_uniformity_is_that_of_the_paper_and_least_for_memories_far_apart():
    memory = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(uniformity(memory[:, None]), reference_uniformity(memory))
    torch.testing.assert_close(uniformity(memory[:, None] * torch.rand(7, 1, 1) * 9), uniformity(memory[:, None]))
    assert abs(uniformity(torch.ones(4, 1, 3))) < 1e-6
    assert uniformity(torch.tensor([[[1., 0], [-1, 0]]])) == -8
    one_place = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(uniformity(one_place[:, None]), one_place)[0].isfinite().all()
    close = 1 + 0.1 * torch.randn(7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(uniformity(close[:, None]), u := uniformity(close[:, None])) and u.dtype == torch.float32
    torch.testing.assert_close(u, reference_uniformity(close.double()).float(), rtol=1e-3, atol=0)


def test_uniformity_looks_at_a_bounded_number_of_memories_and_at_all_tokens_of_each():
    for n, stride in ((128, 1), (129, 2), (300, 3)):
        memories = torch.randn(n, 4, 3, dtype=torch.float64, requires_grad=True)
        gradient, = torch.autograd.grad(uniformity(memories), memories)
        seen = gradient.abs().amax(-1) > 0
        assert seen[::stride].all() and int(seen.sum()) == 4 * len(memories[::stride]) <= train_smt.UNIFORMITY_TOKENS


# ---------------------------------------------------------------------------------------------------------------------
# Batches

@pytest.mark.parametrize("some, options", [(STORIES, WINDOW), (TASK, CAUSAL), (STORIES, TWO_LAYERS | ALL)], ids=["window", "causal", "causal-trunk-all"])
def test_losses_and_gradients_are_sums_over_micro_batches(some, options):
    settings = config(**options | dict(batch_size=32, lambda_unif=0.0))      # uniformity is a mean over micro-batches
    networks = networks_for(settings)
    x, y, t = batch(some, 32, settings.positions)
    counts = count_terms(x, y, t, settings, PAD)
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


@pytest.mark.parametrize("options", [WINDOW, CAUSAL, TWO_LAYERS | ALL], ids=["window", "causal", "causal-trunk-all"])
def test_loss_is_finite_where_nothing_is_asked(options):
    settings = config(**options)
    networks = networks_for(settings)
    x, y, t = batch(positions=settings.positions)
    for rows in (x, torch.full_like(x, PAD)):
        counts = count_terms(rows, torch.full_like(y, IGNORE), t, settings, PAD)
        loss, terms = smt_loss(networks, rows, torch.full_like(y, IGNORE), t, counts, settings)
        loss.backward()
        assert all(value == 0 for name, value in terms.items() if name not in ("train_loss", "loss_dyn", "loss_unif"))
        assert rows is x or terms["loss_dyn"] == 0
        assert all(bool(value.isfinite()) for value in terms.values())
        assert all(p.grad.isfinite().all() for p in networks.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [WINDOW | ALL, CAUSAL | ALL, TWO_LAYERS | ALL], ids=["window", "causal", "causal-trunk"])
def test_flops_are_those_that_torch_counts(options):
    """In the products of matrices, three times for forward and backward; torch counts those of causal attention in full, we count half."""
    settings = config(**options, d_model=32, context_len=8)
    networks, x, t = build(settings, V), torch.randint(V, (8, 9)), torch.randperm(8)
    x, y = x[:, :8], x[:, 1:]
    batched = networks, x, y, t, count_terms(x, y, t, settings, PAD), settings
    tokens = settings.batch_size * settings.positions * settings.memory_tokens
    pairs = 2 * settings.d_model * min(tokens, train_smt.UNIFORMITY_TOKENS) ** 2     # of memory tokens, which we do not count
    for alone in (False, True) if settings.encoder == "causal" else (False,):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            (trunk_alone if alone else smt_loss)(*batched)
        flops, chain = smt_flops(settings, networks, V, 8, alone)
        assert flops == pytest.approx(3 * (counter.get_total_flops() - (0 if alone else pairs)), rel=0.06), alone
        assert 0 < chain < flops


@pytest.mark.parametrize("options", [WINDOW, TWO_LAYERS | dict(positions=8)], ids=["window", "causal-trunk-all"])
def test_overfitting_one_batch_drives_every_term_to_its_floor(options):
    """The first token tells the whole row: the floor of each cross-entropy is 0, and so is that of the dynamics."""
    settings = config(**options, d_model=32, batch_size=8, future_len=2, context_len=8, lambda_dyn=1.0)
    networks = build(settings, 8)
    x = torch.stack([torch.randperm(8) for _ in range(8)])
    x[:, 0] = torch.arange(8)
    y = torch.cat([x[:, 1:], torch.full((8, 1), IGNORE)], dim=1)
    t = torch.randperm(8)
    counts = count_terms(x, y, t, settings, 8)
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-2)
    for step in range(240):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 240)       # at a constant rate the rounding decides where it ends
        loss, terms = smt_loss(networks, x, y, t, counts, settings)
        entropies = {name: value.item() for name, value in terms.items() if name not in ("train_loss", "loss_dyn", "loss_unif")}
        assert step or min(entropies.values()) > 1.5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        drift = terms["loss_dyn"] / networks["encoder"](x, t).var(0).mean()
    assert max(entropies.values()) < 0.1 and drift < 0.1, (entropies, drift)
