"""The SMT objective: its contexts, futures and targets against the stream, and each loss against plain loops in float64."""
from dataclasses import replace

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
from train_smt import Config, count_terms, runs_of, smt_loss, teacher_loss, trunk_loss, uniformity

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
EXTRA = dict(lambda_own=0.6, lambda_hold=0.8)
TRUNK = dict(encoder="causal", encoder_layers=2, lambda_trunk=0.9)
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
@pytest.mark.parametrize("options", [{}, dict(decode_every=2), dict(positions=8), dict(positions=8, unroll=3, decode_every=3)])
def test_terms_are_counted_as_the_losses_use_them(some, options):
    settings = config(**options)
    x, y, t = batch(some, positions=settings.positions)
    order = t.tolist()
    runs = runs_of(t, 8, settings.unroll).tolist()
    updated, rows = [i for run in runs for i in run], range(16)

    def asked(positions):
        return sum(int(y[b, i] != IGNORE) for b in rows for i in positions if i < 8)

    expected = [asked([i + j for i in order[::settings.decode_every] for j in range(TF)]), sum(int(x[b, i] != PAD) for b in rows for i in updated),
                asked(updated), asked([run[-1] + j for run in runs for j in range(TF)]), asked(order), asked(range(8))]
    assert count_terms(x, y, t, settings, PAD).tolist() == expected
    assert 0 < expected[4] < 16 * len(order)


def test_runs_are_consecutive_within_the_row_as_many_as_fit_into_the_positions_and_cover_it_over_many_steps():
    for T in range(1, 14):
        for unroll in range(1, T + 1):
            seen = set()
            for first in range(T):                                               # t is in random order, and any position may be first
                t = torch.tensor([first, *(i for i in range(T) if i != first)])
                runs = runs_of(t, T, unroll)
                assert runs.shape == (T // unroll, unroll) and (runs.diff(dim=1) == 1).all()
                assert runs.min() >= 0 and runs.max() < T
                assert all(run[0] == begin or run[-1] == T - 1 for run, begin in zip(runs, t))
                seen |= set(runs.flatten().tolist())
            assert seen == set(range(T)), (T, unroll)
    assert runs_of(torch.tensor([5, 0, 5, 2]), 8, 1).tolist() == [[5], [0], [5], [2]]


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
    """One row, one position and one step of f at a time, from the docstring of smt_loss."""
    encoder, decoder, updater, readout = (networks[name] for name in ("encoder", "decoder", "updater", "readout"))
    dec, steps, own, hold, read, trunk, memories = [], [], [], [], [], [], []
    T = x.shape[1]
    for b in range(len(x)):
        known = {}

        def memory(i):
            if i not in known:
                known[i] = encoder(x[b:b + 1], torch.tensor([i]))[0, 0]
            return known[i]

        def first(memory, i):
            return nll(decoder(memory[None], x[b:b + 1, :0])[0, 0], y[b, i])

        def future(memory, i):
            follow = [int(x[b, j]) if j < T else PAD for j in range(i + 1, i + settings.future_len)]
            logits = decoder(memory[None], torch.tensor([follow], dtype=torch.long))[0]
            return [nll(logits[j], y[b, i + j]) for j in range(settings.future_len) if i + j < T and y[b, i + j] != IGNORE]

        for place, i in enumerate(t.tolist()):
            memories.append(memory(i))
            if place % settings.decode_every == 0:
                dec += future(memory(i), i)
            if y[b, i] != IGNORE:
                read.append(nll(readout(memory(i).detach()[None])[0], y[b, i]))
        for run in runs_of(t, T, settings.unroll).tolist():
            state = before = memory(run[0] - 1).detach() if settings.detach else memory(run[0] - 1)
            for i in run:
                state = updater(state[None], x[b, i:i + 1])[0]
                steps.append((state, memory(i).detach() if settings.detach else memory(i), before, x[b, i] != PAD))
                if y[b, i] != IGNORE:
                    own.append(first(state, i))
            hold += future(state, run[-1])
        if settings.lambda_trunk:
            trunk += [nll(decoder.predict(encoder.trunk(x[b:b + 1, :i + 1])[0, -1]), y[b, i]) for i in range(T) if y[b, i] != IGNORE]
    scale = [mean([(goal[k] - before[k]).detach().square().mean() for _, goal, before, real in steps if real]) if settings.relative else 1
             for k in range(settings.memory_tokens)]
    dyn = [mean([(a - b).square().mean() / size for a, b, size in zip(state, goal, scale)]) for state, goal, _, real in steps if real]
    groups = torch.stack(memories).view(len(x), len(t), settings.memory_tokens, -1).split(train_smt.UNIFORMITY_ROWS)
    terms = dict(trunk=mean(trunk), dec=mean(dec), dyn=mean(dyn), own=mean(own), hold=mean(hold), read=mean(read),
                 unif=mean([reference_uniformity(group.flatten(0, 2)) for group in groups]))
    terms = {name: value for name, value in terms.items() if name in ("dec", "dyn", "read", "unif") or getattr(settings, f"lambda_{name}")}
    total = sum(getattr(settings, f"lambda_{name}") * value for name, value in terms.items())
    return {"train_loss": total, **{f"loss_{name}": value for name, value in terms.items()}}


@pytest.mark.parametrize("some, options", [
    (STORIES, WINDOW), (STORIES, WINDOW | dict(detach=True)), (STORIES, WINDOW | EXTRA | dict(decode_every=2)),
    (TASK, WINDOW | dict(conv_width=3, relative=True)), (STORIES, WINDOW | ALL | EXTRA | dict(unroll=3, decode_every=3)),
    (STORIES, CAUSAL | EXTRA), (TASK, CAUSAL | ALL), (TASK, CAUSAL | ALL | EXTRA | dict(unroll=2, detach=True, relative=True)),
    (STORIES, CAUSAL | ALL | dict(unroll=8, lambda_own=0.6)), (TASK, TRUNK),
    (STORIES, TRUNK | ALL | EXTRA | dict(unroll=3, conv_width=3, register_layers=2, relative=True))],
    ids=["window", "window-detached", "window-extra", "window-task-relative", "window-all-3", "causal-extra", "causal-all",
         "causal-all-2-detached-relative", "causal-all-8", "causal-trunk", "causal-all-3-trunk-relative"])
def test_each_loss_and_the_gradient_of_their_sum_equal_plain_loops(some, options):
    settings = config(**options, lambda_dec=0.7, lambda_dyn=2.0, lambda_unif=0.5, lambda_read=1.3)
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


@pytest.mark.parametrize("options, t, starts, goals", [
    ({}, [3], [2], [3]), ({}, [5, 3], [4, 2], [5, 3]), (dict(positions=8), [4, 0, 1, 2, 3, 5, 6, 7], range(-1, 7), range(8)),
    (dict(positions=8, unroll=3), [1, 7, 2, 3, 4, 5, 6, 0], [0, 4], [*range(1, 4), *range(5, 8)])], ids=["one", "two", "all", "all-3"])
def test_dynamics_loss_reaches_the_encoder_through_both_memories_and_through_none_when_detached(options, t, starts, goals):
    """The encoder is a table here, whose entry for position t is a leaf: the gradient of each memory is seen on its own."""
    networks = networks_for(config())

    class Table(torch.nn.Module):
        pad = PAD

        def __init__(self):
            super().__init__()
            self.rows = torch.nn.Parameter(torch.randn(16, 9, 2, 8, dtype=torch.float64))

        def forward(self, x, t, trunk=None):
            return self.rows[:, t + 1]

    networks["encoder"] = table = Table()
    x, y, _ = batch(TASK)
    t = torch.tensor(t)
    for detach in (False, True):
        settings = config(detach=detach, **options)
        _, terms = smt_loss(networks, x, y, t, count_terms(x, y, t, settings, PAD), settings)
        gradient, *others = torch.autograd.grad(terms["loss_dyn"], [table.rows, *networks["updater"].parameters()], allow_unused=True)
        assert all(g is not None and g.abs().max() > 0 for g in others)
        if detach:
            assert gradient is None
            continue
        size = gradient.abs().amax((-2, -1))                                     # (16, 9), of m_{-1} .. m_7
        for row, tokens in zip(size, x):
            real = [i for i in goals if tokens[i] != PAD]                        # past the end there is nothing to learn
            before = [i for i in starts if tokens[i + 1] != PAD]
            assert {i - 1 for i in row.nonzero().flatten().tolist()} == {*real, *before}
        assert size[size > 0].min() > 1e-6 and (x[:, t] == PAD).any()


@KINDS
@pytest.mark.parametrize("options", [{}, dict(positions=8, unroll=3)], ids=["sparse", "dense-3"])
def test_each_loss_trains_the_networks_it_should(kind, options):
    for detach in (False, True):
        settings = config(encoder=kind, detach=detach, **EXTRA, **options)
        networks = networks_for(settings)
        x, y, t = batch(STORIES, positions=settings.positions)
        reached = {term: moved(loss_and_gradients(networks, x, y, t, settings, term)[1])
                   for term in ("loss_dec", "loss_own", "loss_hold", "loss_dyn", "loss_unif", "loss_read")}
        both, all_three = {"encoder", "decoder"}, {"updater", "decoder"} | (set() if detach else {"encoder"})
        assert reached == {"loss_dec": both, "loss_own": all_three, "loss_hold": all_three,
                           "loss_dyn": {"updater"} if detach else {"updater", "encoder"},
                           "loss_unif": {"encoder"}, "loss_read": {"readout"}}
    _, gradients = loss_and_gradients(networks, x, y, t, settings)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("register_layers", [1, 2])
def test_trunk_loss_trains_the_trunk_and_the_decoders_head(register_layers):
    settings = config(**TRUNK, conv_width=3, register_layers=register_layers)
    networks = networks_for(settings)
    x, y, t = batch()
    value, gradients = loss_and_gradients(networks, x, y, t, settings, "loss_trunk")
    trained = {name for name, gradient in gradients.items() if gradient.abs().max() > 0}
    below = {name for name in gradients if name.startswith(("encoder.embed", "decoder.norm", "decoder.head"))}
    assert trained == below | {name for name in gradients if name.startswith("encoder.transformer.blocks.0.") and register_layers == 1}
    alone = trunk_loss(networks, networks["encoder"].trunk(x), y, (y != IGNORE).sum())
    torch.testing.assert_close(alone.detach(), value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [TRUNK | EXTRA, TRUNK | EXTRA | dict(future_len=1)])
def test_every_parameter_gets_a_gradient_which_ddp_waits_for(options):
    settings = config(**options)
    networks = networks_for(settings)
    x, y, t = batch(STORIES, settings.batch_size, settings.positions)
    smt_loss(networks, x, y, t, count_terms(x, y, t, settings, PAD), settings)[0].backward()
    assert [name for name, p in networks.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("some, options, trunk_alone, names", [
    (STORIES, WINDOW, False, ["dec"]), (TASK, CAUSAL | dict(positions=8, decode_every=3), False, ["dec"]), (STORIES, TRUNK, True, ["trunk"]),
    (TASK, TRUNK | dict(lambda_trunk=0.0), True, ["trunk"]), (TASK, TRUNK | dict(decode_every=2, conv_width=3), False, ["trunk", "dec"])],
    ids=["window", "causal", "trunk-alone", "trunk-alone-without-weight", "trunk-and-decoder"])
def test_before_the_rnn_joins_the_loss_is_the_plain_sum_of_trunk_and_decoder_and_leaves_updater_and_readout_alone(
        some, options, trunk_alone, names):
    settings = config(**options, lambda_dec=0.7)
    networks = networks_for(settings)
    x, y, t = batch(some, positions=settings.positions)
    loss, terms = teacher_loss(networks, x, y, t, count_terms(x, y, t, settings, PAD), settings, trunk_alone)
    expected = reference_losses(networks, x, y, t, replace(settings, lambda_trunk=float("trunk" in names)))
    expected = {f"loss_{name}": expected[f"loss_{name}"] for name in names}
    expected["train_loss"] = sum(expected.values())
    assert terms.keys() == expected.keys() and loss is terms["train_loss"]
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-7, atol=1e-9, msg=lambda m: f"{name}: {m}")
    ours, theirs = (torch.autograd.grad(value, list(networks.parameters()), allow_unused=True) for value in (loss, expected["train_loss"]))
    for (name, _), a, b in zip(networks.named_parameters(), ours, theirs):
        assert (a is None) == (b is None) and (a is None or not name.startswith(("updater", "readout"))), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_uniformity_is_that_of_the_paper_and_least_for_memories_far_apart():
    memory = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(uniformity(memory), reference_uniformity(memory))
    torch.testing.assert_close(uniformity(memory * torch.rand(7, 1) * 9), uniformity(memory))
    assert abs(uniformity(torch.ones(4, 3))) < 1e-6
    assert uniformity(torch.tensor([[1., 0], [-1, 0]])) == -8
    one_place = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(uniformity(one_place), one_place)[0].isfinite().all()
    close = 1 + 0.1 * torch.randn(7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(uniformity(close), u := uniformity(close)) and u.dtype == torch.float32
    torch.testing.assert_close(u, reference_uniformity(close.double()).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 8, 12, 16, 20])
@pytest.mark.parametrize("memory_tokens", [1, 2])
def test_uniformity_is_a_mean_over_groups_of_rows_whatever_the_batch(rows, memory_tokens):
    settings = config(batch_size=rows, positions=1, memory_tokens=memory_tokens)
    networks = networks_for(settings)
    x, y, t = batch(size=rows, positions=1)
    memory = networks["encoder"](x, t)
    expected = sum(reference_uniformity(group.flatten(0, 2)) * len(group) for group in memory.split(train_smt.UNIFORMITY_ROWS)
                   if group[..., 0].numel() > 1) / rows
    _, terms = smt_loss(networks, x, y, t, count_terms(x, y, t, settings, PAD), settings)
    torch.testing.assert_close(torch.as_tensor(terms["loss_unif"], dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64))


def test_uniformity_looks_at_a_bounded_number_of_tokens(monkeypatch):
    sizes = []
    monkeypatch.setattr(train_smt, "uniformity", lambda memory: sizes.append(len(memory)) or memory.sum() * 0)
    for positions in (1, 8, 30, 64):
        settings = config(positions=positions, memory_tokens=4)
        x, y, _ = batch(length=64)
        t = torch.arange(positions)
        smt_loss(build(settings, V), x, y, t, count_terms(x, y, t, settings, PAD), settings)
    assert max(sizes) <= train_smt.UNIFORMITY_TOKENS and sizes[:4] == [32, 32, 256, 256]
    assert len(sizes) == 8 and min(sizes[4:]) > train_smt.UNIFORMITY_TOKENS / 2 - 32


# ---------------------------------------------------------------------------------------------------------------------
# Batches

@pytest.mark.parametrize("some, options", [
    (STORIES, {}), (TASK, dict(encoder="causal")), (TASK, dict(positions=8, unroll=3, **EXTRA)),
    (STORIES, dict(**TRUNK, **EXTRA, positions=8, unroll=2, decode_every=3))], ids=["window", "causal", "dense-3", "dense-2-trunk"])
def test_losses_and_gradients_are_sums_over_micro_batches(some, options):
    settings = config(batch_size=32, lambda_unif=1.0, **options)
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


@pytest.mark.parametrize("options", [{}, dict(**CAUSAL, **EXTRA, positions=8, unroll=3)], ids=["sparse", "dense-3"])
def test_relative_dynamics_are_relative_to_the_changes_in_the_micro_batch(options):
    settings = config(**options, relative=True)
    networks = networks_for(settings)
    x, y, t = batch(TASK, 16, settings.positions)
    counts = count_terms(x, y, t, settings, PAD)
    for rows in torch.arange(16).chunk(2):
        part_x, part_y = x[rows], y[rows]
        share = count_terms(part_x, part_y, t, settings, PAD)[1] / counts[1]
        _, terms = smt_loss(networks, part_x, part_y, t, counts, settings)
        torch.testing.assert_close(terms["loss_dyn"], share * reference_losses(networks, part_x, part_y, t, settings)["loss_dyn"])


@pytest.mark.parametrize("options", [dict(relative=True), dict(encoder="causal", lambda_own=0.6),
                                     dict(**TRUNK, **EXTRA, positions=8, unroll=3, relative=True)], ids=["window", "causal", "dense-3-trunk"])
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


@pytest.mark.parametrize("phase", [1, 2])
def test_flops_count_the_head_of_the_trunk_wherever_it_is_trained(phase):
    settings = config(**TRUNK)
    networks = build(settings, V)
    with_head, without = (smt_flops(replace(settings, lambda_trunk=weight), networks, V, 6, phase)[0] for weight in (1.0, 0.0))
    assert with_head - without == 3 * settings.batch_size * 6 * 2 * settings.d_model * V


@pytest.mark.parametrize("options", [WINDOW | ALL, CAUSAL | ALL | dict(unroll=2), TRUNK | EXTRA | ALL | dict(decode_every=3, unroll=3)],
                         ids=["window", "causal-2", "causal-3-trunk-extra"])
def test_flops_are_those_that_torch_counts(options):
    """In the products of matrices, three times for forward and backward; torch counts those of causal attention in full, we count half."""
    settings = config(**options, d_model=32, context_len=8, detach=True)
    networks, x, t = build(settings, V), torch.randint(V, (8, 9)), torch.randperm(8)
    x, y = x[:, :8], x[:, 1:]
    counts = count_terms(x, y, t, settings, PAD)
    batched = networks, x, y, t, counts, settings
    losses = [lambda: teacher_loss(*batched, trunk_alone=True), lambda: teacher_loss(*batched, trunk_alone=False), lambda: smt_loss(*batched)]
    for phase in range(0 if settings.encoder == "causal" else 1, 3):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            losses[phase]()
            uniform = 0
        if phase == 2:                                                            # all pairs of memory tokens, which we do not count
            tokens = settings.batch_size * settings.positions * settings.memory_tokens
            uniform = 2 * settings.d_model * min(tokens, train_smt.UNIFORMITY_TOKENS) ** 2
        flops, chain = smt_flops(settings, networks, V, 8, phase)
        assert flops == pytest.approx(3 * (counter.get_total_flops() - uniform), rel=0.06), phase
        assert chain > 0


@pytest.mark.parametrize("register_layers", [1, 2])
def test_longest_chain_while_the_trunk_is_trained_alone_goes_through_the_trunk_and_the_decoders_head(register_layers):
    networks = build(settings := config(**TRUNK, conv_width=3, register_layers=register_layers), V)
    block, d = networks["encoder"].transformer.blocks[0], settings.d_model
    matrices = 3 * d * d + (2 - register_layers) * sum(p.numel() for p in block.parameters() if p.dim() == 2) + d * V
    assert smt_flops(settings, networks, V, 6, phase=0)[1] == 3 * 2 * matrices


@pytest.mark.parametrize("options", [WINDOW, TRUNK | EXTRA | dict(positions=8, unroll=2)], ids=["window", "causal-all-2-trunk"])
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
