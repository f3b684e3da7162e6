"""The Transformer baseline: its loss against plain loops in float64, what it must not see, its cache, and its checkpoints."""
import numpy as np
import pytest
import torch
from conftest import QUICK, TRANSFORMER_SIZES, call, randomise, trained
from test_model import reference_stem, reference_transformer, rms_norm

import data
import evaluate as evaluation
import sample
import train_bptt
import train_transformer
from data import IGNORE
from evaluate import evaluate
from flops import transformer_flops
from model import ModelConfig, build, restore
from runtime import load
from train_transformer import Config, transformer_loss

V, PAD, T = 5, 5, 9
WINDOWS = pytest.mark.parametrize("context_len", [1, 4, T, 50])     # shorter than a row, as long, longer
WIDTHS = pytest.mark.parametrize("conv_width", [1, 4])


def networks_for(context_len=4, d_model=8, conv_width=1):
    settings = ModelConfig(d_model=d_model, n_heads=2, decoder_layers=2, context_len=context_len, conv_width=conv_width)
    return randomise(build(settings, V, ("decoder",)))


def batch(B=2):
    x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    y[0, 1] = IGNORE
    x[1, 6:], y[1, 6:] = PAD, IGNORE
    return x, y, (y != IGNORE).sum()


def gradients(networks, *arguments):
    loss, _ = transformer_loss(networks, *arguments)
    return torch.autograd.grad(loss, list(networks.parameters()))


def reference_logits(decoder, row):
    """The logits (n, V) of one row (n,): each place attends to itself and to the context_len - 1 places before it."""
    sees = [range(max(0, i + 1 - decoder.context_len), i + 1) for i in range(len(row))]
    h = reference_transformer(decoder.transformer, reference_stem(decoder.embed, row.tolist()), range(len(row)), sees)
    return rms_norm(h, decoder.norm.weight) @ decoder.head.weight.T


# ---------------------------------------------------------------------------------------------------------------------
# The loss

@WINDOWS
@WIDTHS
def test_loss_and_gradients_equal_a_plain_reference(context_len, conv_width):
    networks, (x, y, count) = networks_for(context_len, conv_width=conv_width), batch()
    terms = []
    for b in range(2):
        logits = reference_logits(networks["decoder"], x[b])
        terms += [logits[i].exp().sum().log() - logits[i, y[b, i]] for i in range(T) if y[b, i] != IGNORE]
    loss, reported = transformer_loss(networks, x, y, count)
    expected = sum(terms) / len(terms)
    assert len(terms) == count and reported["train_loss"] is loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    parameters = list(networks.parameters())
    for ours, theirs in zip(gradients(networks, x, y, count), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert theirs.abs().max() > 1e-5


def test_losses_and_gradients_are_sums_over_micro_batches():
    networks, (x, y, count) = networks_for(), batch(8)
    parts = [gradients(networks, part_x, part_y, count) for part_x, part_y in zip(x.chunk(4), y.chunk(4))]
    for whole, *pieces in zip(gradients(networks, x, y, count), *parts):
        torch.testing.assert_close(whole, sum(pieces))


def test_loss_is_finite_where_nothing_is_asked():
    networks, (x, y, _) = networks_for(), batch()
    loss, _ = transformer_loss(networks, x, torch.full_like(y, IGNORE), torch.tensor(0))
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in networks.parameters())


def test_overfitting_one_batch_drives_the_loss_near_its_floor():
    networks = networks_for(T, d_model=16).float()
    x = torch.randint(V, (5, T))
    x[:, 0] = torch.arange(5)                                                     # from the first token on, all is certain
    y = torch.cat([x[:, 1:], torch.full((5, 1), IGNORE)], dim=1)
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-2)
    for step in range(100):
        loss, _ = transformer_loss(networks, x, y, (y != IGNORE).sum())
        assert step or loss > 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# What it sees

@WINDOWS
@WIDTHS
def test_no_output_sees_the_token_it_predicts_or_a_later_one_and_each_sees_its_context(context_len, conv_width):
    """The output at i predicts y_i = x_{i+1}; through convolution and two layers it sees as many tokens back as these reach."""
    decoder, x = networks_for(context_len, conv_width=conv_width)["decoder"], torch.randint(V, (1, T))
    before, _ = decoder.read(x)
    for i in range(T):
        for other in (PAD, (x[0, i] + 1) % V):
            perturbed = x.clone()
            perturbed[0, i] = other
            moved = (decoder.read(perturbed)[0] - before)[0].abs().amax(-1)
            reach = i + conv_width + 2 * (context_len - 1)
            assert moved[i:reach].min() > 1e-6 and not moved[:i].any()
            assert not len(moved[reach:]) or moved[reach:].max() < 1e-12


@WIDTHS
def test_pad_after_the_end_and_other_rows_change_nothing(conv_width):
    networks, (x, y, count) = networks_for(conv_width=conv_width), batch()
    decoder = networks["decoder"]
    whole, _ = decoder.read(x)
    torch.testing.assert_close(decoder.read(x[1:, :6])[0][0], whole[1, :6], rtol=0, atol=1e-12)
    torch.testing.assert_close(decoder.read(x[:1])[0][0], whole[0], rtol=0, atol=1e-12)
    loss, _ = transformer_loss(networks, x, y, count)
    x[1, 6:] = torch.randint(V, (3,))
    torch.testing.assert_close(transformer_loss(networks, x, y, count)[0], loss, rtol=0, atol=1e-12)


@WINDOWS
@WIDTHS
@pytest.mark.parametrize("pieces", [[1] * T, [T - 1, 1], [2, 5, 2], [1, 8]])
def test_a_text_read_in_pieces_has_the_logits_of_the_whole(context_len, conv_width, pieces):
    decoder, x = networks_for(context_len, conv_width=conv_width)["decoder"], torch.randint(V, (3, T))
    whole, _ = decoder.read(x)
    logits, past = [], None
    for piece in x.split(pieces, dim=1):
        part, past = decoder.read(piece, past)
        logits.append(part)
        begin, recent, cached = past                                                                  # no more than is needed is kept
        assert len(cached) == 2 and all(k.shape == v.shape == (3, 2, min(begin, context_len), 4) for k, v in cached)
        assert torch.equal(recent, x[:, max(0, begin - conv_width):begin])
    assert begin == T
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-12)


@WIDTHS
def test_sampling_predicts_what_the_whole_text_predicts(conv_width):
    networks, empty, x = networks_for(conv_width=conv_width), torch.empty(0, 8), torch.randint(V, (3, T))
    whole, _ = networks["decoder"].read(x)
    memory = sample.begin(networks, empty, 3)
    for i in range(T):
        memory = sample.read(networks, memory, x[:, i:i + 1])
        torch.testing.assert_close(sample.predict(networks, memory), whole[:, i], rtol=0, atol=1e-12)
    rows = sample.complete(networks, empty, x[:, :2], T, sample.Config(temperature=0))
    assert torch.equal(rows[:, 2:], networks["decoder"].read(rows)[0].argmax(-1)[:, 1:-1])


# ---------------------------------------------------------------------------------------------------------------------
# What it is worth

def test_held_out_numbers_equal_a_reference_on_documents_longer_than_the_context():
    networks, (x, y, _) = networks_for(), batch(5)
    losses, right = [], []
    for row, targets in zip(x, y):
        logits = reference_logits(networks["decoder"], row)
        losses += [-logits[i].log_softmax(0)[targets[i]].item() for i in range(T) if targets[i] != IGNORE]
        right += [float(logits[i].argmax() == targets[i]) for i in range(T) if targets[i] != IGNORE]
    numbers = evaluate(networks, torch.empty(0, 8), x, y, {"statistics": {"entropy_per_character": 0.25}}, rows=2)
    assert numbers == pytest.approx({"val_rnn_loss": np.mean(losses), "val_rnn_accuracy": np.mean(right),
                                     "val_gap_to_floor": np.mean(losses) - 0.25}, rel=1e-5)


@pytest.mark.parametrize("preset", ["tiny", "small", "paper", "tiny/retrieval", "tiny/keyvalue", "tiny/tinystories", "small/retrieval",
                                    "small/keyvalue"])
def test_presets_are_as_large_as_the_rnn_and_see_the_same_rows(preset):
    ours, rnn = (script.Config(**script.PRESETS[preset.split("/")[0]] | script.PRESETS[preset])
                 for script in (train_transformer, train_bptt))
    transformer, updater, readout = (sum(p.numel() for p in network.parameters()) for network in
                                     [*build(train_transformer.model_config(ours), 128, ("decoder",)).values(),
                                      *build(rnn, 128, ("updater", "readout")).values()])
    assert transformer == pytest.approx(updater + readout, rel=0.05)
    assert (ours.context_len, ours.seq_len, ours.p_start) == (rnn.context_len, rnn.seq_len, rnn.p_start)


def test_flops_count_the_keys_that_are_in_the_window():
    """A matrix costs 2 d d' per token, in the scores and in the mixing 2 d per key each, backward twice as much again."""
    for context_len, keys in ((8, 4), (16, 4), (2, 1.75)):                        # of 8 tokens, half a key for oneself
        config = Config(d_model=8, n_heads=2, decoder_layers=2, context_len=context_len, batch_size=3)
        networks = build(train_transformer.model_config(config), V, ("decoder",))
        matrices = sum(p.numel() for name, p in networks.named_parameters() if p.dim() == 2 and "embed" not in name)
        flops, sequential = transformer_flops(config, networks, V, 8)
        assert sequential == 3 * 2 * matrices
        assert flops == pytest.approx(3 * 3 * 8 * (2 * matrices + 2 * 2 * 2 * 8 * keys), rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Its checkpoint

@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """run(dataset): the folder of a short run on it."""
    def folder(dataset):
        out = tmp_path_factory.mktemp(f"{dataset}-transformer")
        trained(train_transformer, *QUICK, *TRANSFORMER_SIZES, f"--dataset={dataset}", f"--data_dir={data_dir}", f"--out_dir={out}",
                "--batch_size=4", "--max_iters=2")
        return out
    return folder


def test_a_checkpoint_is_evaluated_and_tells_stories(run, data_dir):
    folder = run("fables")
    checkpoint = load(folder)
    config, networks, empty = restore(checkpoint)
    assert (config.d_model, config.decoder_layers, config.context_len) == (8, 1, 8)
    assert list(networks) == ["decoder"] and empty.shape == (0, 8)
    fables = data.load("fables", data_dir)
    x, y = data.held_out(fables, 4, 30, seed=0)
    result = trained(evaluation, f"--ckpt={folder}", f"--data_dir={data_dir}", "--eval_docs=4", "--eval_len=30", "--num_samples=2",
                     "--device=cpu")
    for name, value in evaluate(networks, empty, x, y, checkpoint["data"]).items():
        assert f"{name:24}{value:8.4f}" in result.out
    assert "of 2 generated stories" in result.out and "drift" not in result.out and "teacher" not in result.out

    text, tokens = trained(sample, f"--ckpt={folder}", "--prompt=One ", "--temperature=0", "--max_new_tokens=12").out, [0, *b"One "]
    for _ in range(12):
        tokens.append(int(networks["decoder"].read(torch.tensor([tokens]))[0][0, -1].argmax()))
        if tokens[-1] == 0:
            break
    assert text == bytes(tokens).strip(b"\0").decode() + "\n"


def test_pictures_and_answers_come_from_it_too(run, data_dir, tmp_path):
    pytest.importorskip("matplotlib")
    trained(sample, f"--ckpt={run('mnist')}", "--num_samples=1", f"--out={tmp_path / 'a.png'}")
    assert (tmp_path / "a.png").exists()
    assert "of 3 answers are right" in trained(sample, f"--ckpt={run('retrieval')}", f"--data_dir={data_dir}", "--num_samples=3").out


def test_it_shares_no_weights_with_an_rnn(run, data_dir, tmp_path):
    arguments = ["--dataset=fables", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", f"--init_from={run('fables')}"]
    result = call(train_bptt, *QUICK, *arguments)
    assert result.status == 1 and len(result.err.splitlines()) == 1 and "another architecture" in result.err
