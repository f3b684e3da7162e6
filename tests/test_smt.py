"""The SMT objective: contexts, futures and targets against the stream, uniformity, the trunk's phase."""
import itertools
import signal
from pathlib import Path

import pytest
import torch
from conftest import PAIRS, QUICK, SIZES, call, randomise, refused, trained
from reference import reference_uniformity

import data
import runtime
import train_bptt
import train_smt
from data import Data, Split
from lib.cli import parse
from model import IGNORE, build, futures
from runtime import read_log
from train_smt import Config, count_terms, smt_loss, trunk_alone, trunk_loss, uniformity

V, PAD, TF = 200, 200, 4


def make(kind, documents, targets=None, closing=b""):
    """A Data set in memory; both of its splits are the same."""
    starts = torch.tensor([0] + [len(d) for d in documents[:-1]]).cumsum(0)
    stream = torch.tensor(list(b"".join(documents) + closing), dtype=torch.uint8)
    targets = None if targets is None else torch.tensor(list(b"".join(targets)), dtype=torch.uint8)
    split, longest = Split(stream, targets, starts), max(map(len, documents))
    meta = {"name": "made", "kind": kind, "vocab_size": V, "first_token": 0, "longest_document": longest}
    return Data(meta, split, split)


STORIES = make("text", [b"\0ab", b"\0cdefg", b"\0h", b"\0ijklmnopqrst"], closing=b"\0")
TASK = make("synthetic", [b"abcd", b"efghij", b"kl"],
            [bytes([255, 1, 255, 2]), bytes([3, 255, 255, 4, 5, 6]), bytes([255, 7])])
TWO_LAYERS = dict(encoder="causal", encoder_layers=2, decoder_layers=2)
DATA = pytest.mark.parametrize("some", [STORIES, TASK], ids=["stream", "synthetic"])


def config(**changes):
    sizes = dict(d_model=8, n_heads=2, memory_tokens=2, encoder_layers=1, updater_layers=1, context_len=5)
    return Config(**sizes | dict(future_len=TF, batch_size=16, positions=3) | changes)


def batch(some=STORIES, positions=3):
    x, y, t = data.sample_batch(some, 1, 3, 16, 8, positions, 0.5)
    return x, y, torch.tensor([3, 7, 0]) if positions == 3 else t


# ----------------------------------------------------------------------------------------------------------
# Contexts, futures and targets

def expected_row(some, begin, T):
    """token(i) and target(i) of the row of T tokens that begins there, straight from the stream."""
    stream, targets, documents = some.train.tokens.tolist(), some.train.targets, some.meta["kind"] != "text"
    ends = [s for s in some.train.starts.tolist() if s > begin] if documents else []
    end = min([*ends, len(stream)])

    def token(i):
        return stream[begin + i] if 0 <= i < T and begin + i < end else PAD

    def target(i):
        if i >= T or begin + i >= end:
            return IGNORE
        if targets is not None:
            return IGNORE if targets[begin + i] == 255 else int(targets[begin + i])
        return stream[begin + i + 1] if begin + i + 1 < end else IGNORE
    return token, target


@DATA
@pytest.mark.parametrize("context_len", [1, 3, 12])
def test_contexts_futures_and_targets_are_those_of_the_stream_at_every_position(some, context_len):
    """The last Tc tokens up to t with PAD before the row, and what follows t within the row."""
    T, documents = 9, some.meta["kind"] != "text"
    begins = some.train.starts if documents else torch.arange(len(some.train.tokens) - 1)
    x, y = data.document_rows(some.train, some.meta, begins, T, cut=documents)
    t, networks, seen = torch.arange(-1, T), build(config(context_len=context_len), V), []
    networks["encoder"].embed.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    networks["encoder"](x, t)
    contexts = seen[0].view(len(x), len(t), context_len)
    future_x, future_y = futures(x, y, t[1:], TF, PAD)
    for row, begin in enumerate(begins.tolist()):
        token, target = expected_row(some, begin, T)
        for i in range(-1, T):
            assert contexts[row, i + 1].tolist() == [token(j) for j in range(i - context_len + 1, i + 1)]
            if i >= 0:
                assert future_y[row, i].tolist() == [target(i + j) for j in range(TF)]
                assert future_x[row, i].tolist() == [token(i + j) for j in range(1, TF)]


@DATA
@pytest.mark.parametrize("positions", [3, 8])
def test_terms_are_counted_as_the_losses_use_them(some, positions):
    x, y, t = batch(some, positions)

    def count(places):
        return sum(int(y[b, i] != IGNORE) for b in range(16) for i in places if i < 8)

    n_futures, n_transitions, n_readouts, n_targets = count_terms(x, y, t, config(positions=positions), PAD)
    assert n_futures == count([i + j for i in t.tolist() for j in range(TF)])
    assert n_transitions == sum(int(x[b, i] != PAD) for b in range(16) for i in t.tolist())
    assert n_readouts == count(t.tolist()) and n_targets == count(range(8))
    assert 0 < n_readouts < 16 * positions


# ----------------------------------------------------------------------------------------------------------
# The losses

def test_trunk_loss_trains_the_trunk_and_the_decoders_head_and_is_all_that_the_first_phase_trains():
    settings = config(**TWO_LAYERS, conv_width=3)
    networks = randomise(build(settings, V))
    x, y, t = batch()
    counts = count_terms(x, y, t, settings, PAD)
    value = smt_loss(networks, x, y, t, counts, settings)[1]["loss_trunk"]
    alone, terms = trunk_alone(networks, x, y, t, counts, settings)
    assert alone is terms["loss_trunk"] is terms["train_loss"]
    for other in (alone, trunk_loss(networks, networks["encoder"].trunk(x), y, counts[-1])):
        torch.testing.assert_close(other, value, rtol=0, atol=1e-12)
    alone.backward()
    trunk = "encoder.embed", "encoder.transformer", "decoder.norm", "decoder.head"
    for name, p in networks.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 0) == name.startswith(trunk), name


def test_every_parameter_gets_a_gradient_where_the_future_is_one_target():
    """DistributedDataParallel waits for it."""
    settings = config(**TWO_LAYERS, future_len=1)
    networks = randomise(build(settings, V))
    x, y, t = batch()
    smt_loss(networks, x, y, t, count_terms(x, y, t, settings, PAD), settings)[0].backward()
    assert [name for name, p in networks.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("t", [[3], [5, 3], [4, 0, 1, 2, 3, 5, 6, 7]], ids=["one", "two", "all"])
def test_dynamics_loss_reaches_the_encoder_through_both_memories(t):
    """The encoder is a table here, whose entry for t is a leaf: the gradient of each memory is seen alone."""
    settings = config(positions=len(t))
    networks = randomise(build(settings, V))

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
    parameters = [table.rows, *networks["updater"].parameters()]
    gradient, *others = torch.autograd.grad(terms["loss_dyn"], parameters)
    assert all(g.abs().max() > 0 for g in others)
    size = gradient.abs().amax((-2, -1))                     # (16, 9), of m_{-1} .. m_7
    for row, tokens in zip(size, x):
        real = [i for i in t.tolist() if tokens[i] != PAD]       # past the end there is nothing to learn
        assert {i - 1 for i in row.nonzero().flatten().tolist()} == {*real, *(i - 1 for i in real)}
    assert size[size > 0].min() > 1e-6 and (x[:, t] == PAD).any()


def test_uniformity_is_that_of_the_paper_and_least_for_memories_far_apart():
    memory = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(uniformity(memory[:, None]), reference_uniformity(memory))
    longer = memory[:, None] * torch.rand(7, 1, 1) * 9
    torch.testing.assert_close(uniformity(longer), uniformity(memory[:, None]))
    assert abs(uniformity(torch.ones(4, 1, 3))) < 1e-6
    assert uniformity(torch.tensor([[[1., 0], [-1, 0]]])) == -8
    one_place = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(uniformity(one_place[:, None]), one_place)[0].isfinite().all()
    close = 1 + 0.1 * torch.randn(7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        u = uniformity(close[:, None])
    assert u.dtype == torch.float32
    torch.testing.assert_close(u, reference_uniformity(close.double()).float(), rtol=1e-3, atol=0)


def test_uniformity_looks_at_a_bounded_number_of_memories_and_at_all_tokens_of_each():
    for n, stride in ((128, 1), (129, 2), (300, 3)):
        memories = torch.randn(n, 4, 3, dtype=torch.float64, requires_grad=True)
        gradient, = torch.autograd.grad(uniformity(memories), memories)
        seen = gradient.abs().amax(-1) > 0
        expected = 4 * len(memories[::stride])
        assert seen[::stride].all() and int(seen.sum()) == expected <= train_smt.UNIFORMITY_TOKENS


# ----------------------------------------------------------------------------------------------------------
# The phase in which the trunk is trained alone

@pytest.fixture
def train(tmp_path, data_dir):
    """train(*flags, to=..): a run of the causal encoder in the folder `to`; to=None: its arguments alone."""
    def go(*flags, to="run", calls=trained):
        return calls(train_smt, *QUICK, *SIZES, *PAIRS, "--dataset=retrieval", f"--data_dir={data_dir}",
                     "--encoder=causal", "--encoder_layers=2", "--decoder_layers=2", "--conv_width=3",
                     "--positions=8", f"--out_dir={tmp_path / to}", *flags)
    return go


def saved(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def terms(folder):
    """[(step, names of its losses)] of the training lines of a log."""
    return [(line["step"], {name.removeprefix("loss_") for name in line if name.startswith("loss_")})
            for line in read_log(folder / "metrics.jsonl") if "train_loss" in line]


EVERY = {"trunk", "dec", "dyn", "unif", "read"}


def test_the_trunk_is_trained_first_then_all(tmp_path, train, monkeypatch):
    flags = ["--trunk_iters=4", "--max_iters=8"]
    chosen, stopped = train_smt.learning_rate, []
    for stop in (2, 4, 6):
        def rate(step, config, stop=stop, **more):
            if step == stop - 1:
                signal.raise_signal(signal.SIGTERM)
            return chosen(step, config, **more)
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "LOG_LINES", 4)
            patch.setattr(train_smt, "learning_rate", rate)
            result = train(*flags, "--resume=auto", calls=call)
        assert result.status == 143
        stopped.append(saved(tmp_path / "run"))
    assert [checkpoint["step"] for checkpoint in stopped] == [2, 4, 6]
    trunk = "encoder.embed", "encoder.transformer", "decoder.norm", "decoder.head"
    every = "encoder", "decoder", "updater", "readout"
    for before, after, moved in ((0, 1, trunk), (1, 2, every)):
        for name, weight in stopped[before]["model"].items():
            assert torch.equal(weight, stopped[after]["model"][name]) != name.startswith(moved), name
    monkeypatch.setattr(runtime, "LOG_LINES", 4)
    train(*flags, "--resume")
    assert terms(tmp_path / "run") == [(2, {"trunk"}), (4, {"trunk"}), (6, EVERY), (8, EVERY)]


def test_a_log_line_averages_the_steps_of_one_phase(tmp_path, train, monkeypatch):
    monkeypatch.setattr(runtime, "LOG_LINES", 2)
    train("--trunk_iters=3", "--max_iters=8")
    assert terms(tmp_path / "run") == [(3, {"trunk"}), (4, EVERY), (8, EVERY)]
    first = read_log(tmp_path / "run" / "metrics.jsonl")[1]
    assert first["train_loss"] == pytest.approx(first["loss_trunk"])


@pytest.mark.parametrize("trunk_iters", [1, 0])
def test_the_decoder_goes_on_from_the_trunk_after_its_phase(tmp_path, train, trunk_iters):
    train(f"--trunk_iters={trunk_iters}", "--max_iters=2", "--lr=1e-9")
    weights = saved(tmp_path / "run")["model"]
    for name in ("embed.embed.weight", "embed.mix.weight", "transformer.blocks.0.qkv.weight"):
        same = torch.allclose(weights[f"encoder.{name}"], weights[f"decoder.{name}"], rtol=0, atol=1e-6)
        assert same == (trunk_iters > 0), name


def test_a_run_that_begins_with_given_weights_has_no_first_phase_and_keeps_to_them(tmp_path, train):
    train("--trunk_iters=3")
    begun = ["--trunk_iters=3", f"--init_from={tmp_path / 'run'}"]
    train(*begun, "--max_iters=2", to="second")
    before = saved(tmp_path / "second")["model"]
    for other in ("", tmp_path / "second"):                 # its steps would change their objective
        result = train(*begun, f"--init_from={other}", "--max_iters=6", "--resume", to="second", calls=call)
        refused(result, 2, "--init_from")
    for name, weight in saved(tmp_path / "second")["model"].items():
        assert torch.equal(weight, before[name])
    train(*begun, "--resume", to="second")
    assert all(names == EVERY for _, names in terms(tmp_path / "second"))


def test_a_run_whose_first_phase_would_end_elsewhere_is_not_resumed(tmp_path, train):
    """Its next steps would train the trunk again, and then replace the decoder."""
    train("--trunk_iters=2", "--max_iters=3")
    before = {path.name: path.read_bytes() for path in Path(tmp_path / "run").iterdir()}
    for n in (0, 1, 3, 5):
        refused(train(f"--trunk_iters={n}", "--max_iters=6", "--resume", calls=call), 2, "--trunk_iters")
    assert before == {path.name: path.read_bytes() for path in Path(tmp_path / "run").iterdir()}
    train("--trunk_iters=2", "--max_iters=6", "--resume")


@pytest.mark.parametrize("decay, constant", [(0.2, 20), (1, 4), (0, 24)])
def test_the_learning_rate_falls_in_the_last_share_of_the_steps_after_the_trunk_s(
        tmp_path, train, monkeypatch, decay, constant):
    monkeypatch.setattr(runtime, "LOG_LINES", 24)
    train("--trunk_iters=4", "--max_iters=24", f"--decay={decay}")
    rates = [line["lr"] for line in read_log(tmp_path / "run" / "metrics.jsonl") if "lr" in line]
    assert len(rates) == 24 and len(set(rates[:constant + 1])) == 1
    assert all(before > after > 0 for before, after in itertools.pairwise(rates[constant:]))


@pytest.mark.parametrize("arguments", [
    "", "--preset=small", "--dataset=copy", "--dataset=keyvalue", "--dataset=keyvalue --preset=small",
    "--dataset=tinystories --preset=tiny"])
def test_presets_leave_steps_after_the_first_phase_and_bptt_trains_the_same_rnn_on_the_same_rows(arguments):
    arguments = ["--device=cpu", *arguments.split()]
    smt, bptt = (parse(script.Config, arguments, script.PRESETS) for script in (train_smt, train_bptt))
    assert 0 < smt.trunk_iters <= smt.max_iters / 2
    for name in ("updater", "d_model", "n_heads", "memory_tokens", "updater_layers", "decoder_layers",
                 "seq_len", "p_start"):
        assert getattr(smt, name) == getattr(bptt, name), name
