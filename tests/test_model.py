"""The networks against plain loops in float64, and what each of them must not see."""
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from reference import (
    nll,
    reference_decoder,
    reference_memory,
    reference_readout,
    reference_stem,
    reference_updater,
    rms_norm,
    turned,
)

import model
import sample
from lib.cli import UsageError
from model import (
    IGNORE,
    Block,
    CausalEncoder,
    Decoder,
    Encoder,
    ModelConfig,
    Readout,
    Stem,
    Updater,
    build,
    decoder_loss,
    empty_memory,
    futures,
    readout_loss,
    roll_out,
)

V, T = 5, 7
SMALL = dict(d_model=8, n_heads=2, memory_tokens=3, context_len=4, future_len=4, encoder_layers=2,
             decoder_layers=2)
THREE_LAYERS = dict(encoder_layers=3, decoder_layers=3)
UPDATERS = pytest.mark.parametrize("kind", ["transformer", "mlp", "gru"])
ENCODERS = pytest.mark.parametrize("changes", [
    dict(encoder="window"), dict(encoder="window", conv_width=3), dict(encoder="causal"),
    dict(encoder="causal", conv_width=3, **THREE_LAYERS)],
    ids=["window", "window-convolution", "causal", "causal-convolution"])


def config(**changes):
    return ModelConfig(**SMALL | changes)


def new_encoder(**changes):
    return randomise(build(config(**changes), V, ("encoder",))["encoder"])


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def memories(*shape):
    return torch.randn(*shape, 3, 8, dtype=torch.float64)


def changed(before, after):
    """Per leading index: by how much two tensors (n, ...) differ at most."""
    return (before - after).flatten(1).abs().amax(1)


def same_gradients(ours, theirs, parameters, tolerance):
    """Assert that two values are equal, and so are their gradients by the parameters."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    weight = torch.randn(ours.shape, dtype=torch.float64)
    gradients = (torch.autograd.grad((value * weight).sum(), parameters, retain_graph=True)
                 for value in (ours, theirs))
    for mine, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=10 * tolerance, atol=10 * tolerance)


# ----------------------------------------------------------------------------------------------------------
# Against the references

@pytest.mark.parametrize("head_dim", [2, 4, 8])
def test_rotation_and_its_gradients_equal_a_loop_over_pairs_compiled_or_not(head_dim):
    positions = [0, 1, 2, 5, 9, 20]
    q = torch.randn(2, 6, 2, 3, head_dim, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([torch.stack([torch.stack([turned(head, position) for head in heads])
                                         for heads, position in zip(row, positions)])
                            for row in q.flatten(2, 3)]).view_as(q)
    turns = model.rope(torch.tensor(positions).double(), head_dim)
    for rotate in (model.rotate, torch.compile(model.rotate, backend="eager", fullgraph=True)):
        same_gradients(rotate(q, turns), expected, [q], 1e-6)       # float32 frequencies


@ENCODERS
def test_encoder_and_its_gradients_equal_a_reference_at_every_position(changes):
    encoder = new_encoder(**changes)
    x, t = tokens(2, T), torch.randperm(T + 1) - 1
    expected = torch.stack([reference_memory(encoder, row, i) for row in x for i in t.tolist()])
    same_gradients(encoder(x, t).flatten(0, 1), expected, list(encoder.parameters()), 1e-5)


def test_a_slot_holds_what_it_wrote_while_its_gate_is_closed_however_long():
    """In float32, through gates as good as open or closed: open at index 10 alone, where token V - 1 is."""
    encoder = build(config(encoder="causal", context_len=2000), V)["encoder"]
    x = tokens(1, 2000) % (V - 1)
    x[0, 10] = V - 1
    with torch.no_grad():
        e, h = encoder.trunk(x)
        here = torch.cat([torch.zeros(1), (x[0] == V - 1).float()])
        encoder.gate.forward = lambda h: (200 * here - 100)[None, :, None].expand(1, -1, 2)
        memory = encoder(x, torch.tensor([9, 10, 11, 1999]))[0]
    for place in (1, 2, 3):
        torch.testing.assert_close(memory[place, :2], rms_norm(e[0, 11]).expand(2, 8), rtol=1e-4, atol=1e-4)
    assert changed(memory[0], memory[1]).max() > 0.1


def test_slots_are_not_rounded_under_autocast():
    encoder = build(config(encoder="causal"), V, ("encoder",))["encoder"]
    x, t = tokens(2, T), torch.tensor([-1, 2, 6])
    trunk = encoder.trunk(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(x, t, trunk)
    assert torch.equal(found[:, :, :-1], encoder(x, t, trunk)[:, :, :-1]) and found.dtype == torch.float32


@pytest.mark.parametrize("width", [1, 2, 3, 9])
def test_stem_and_its_gradients_equal_a_loop_over_the_last_tokens(width):
    stem, x = randomise(Stem(V, 8, width)), tokens(2, T)
    expected = torch.stack([reference_stem(stem, row.tolist()) for row in x])
    same_gradients(stem(x), expected, list(stem.parameters()), 1e-12)
    assert stem(x[:, :0]).shape == (2, 0, 8)


def test_stem_sees_the_last_tokens_and_nothing_before_or_after_them():
    stem, x = randomise(Stem(V, 8, 3)), tokens(1, T)
    for i in range(T):
        perturbed = x.clone()
        perturbed[0, i] = (x[0, i] + 1) % V
        moved = changed(stem(x)[0], stem(perturbed)[0])
        assert moved[i:i + 3].min() > 1e-3 and not moved[:i].any() and not moved[i + 3:].any()


def test_attention_can_choose_from_the_start():
    block = Block(64, 4)
    q, k, _ = block.qkv(rms_norm(torch.randn(500, 64))).view(500, 3, 4, 16).permute(1, 2, 0, 3)
    logits = q @ k.transpose(1, 2) / 4
    assert 0.8 < logits.std() < 1.25, logits.std()


@pytest.mark.parametrize("conv_width", [1, 3])
def test_decoder_and_readout_and_their_gradients_equal_a_reference(conv_width):
    decoder = randomise(Decoder(config(conv_width=conv_width), V))
    readout = randomise(Readout(config(), V), 1)
    memory, x = memories(2), tokens(2, 3)
    expected = torch.stack([reference_decoder(decoder, m, row.tolist()) for m, row in zip(memory, x)])
    same_gradients(decoder(memory, x), expected, list(decoder.parameters()), 1e-5)
    expected = torch.stack([reference_readout(readout, m) for m in memory])
    same_gradients(readout(memory), expected, list(readout.parameters()), 1e-5)


@UPDATERS
def test_updater_and_its_gradients_equal_a_reference(kind):
    updater = randomise(Updater(config(updater=kind), V))
    memory, x = memories(2), tokens(2)
    expected = torch.stack([reference_updater(updater, m, token) for m, token in zip(memory, x)])
    same_gradients(updater(memory, x), expected, list(updater.parameters()), 1e-5)


@pytest.mark.parametrize("layers, conv_width, memory_tokens", [(1, 1, 1), (2, 3, 3), (3, 1, 3)])
def test_decoder_without_a_future_has_the_first_output_with_a_future(layers, conv_width, memory_tokens):
    settings = config(decoder_layers=layers, conv_width=conv_width, memory_tokens=memory_tokens)
    decoder, x = randomise(Decoder(settings, V)), tokens(2, 3)
    memory = torch.randn(2, memory_tokens, 8, dtype=torch.float64, requires_grad=True)
    same_gradients(decoder(memory, x[:, :0]), decoder(memory, x)[:, :1], [memory], 1e-11)


def test_decoder_takes_over_embedding_and_layers_of_the_trunk_and_nothing_else():
    sizes = config(encoder="causal", conv_width=3)
    encoder, decoder = randomise(CausalEncoder(sizes, V)), randomise(Decoder(sizes, V), 1)
    before, theirs = ({name: weight.clone() for name, weight in network.state_dict().items()}
                      for network in (decoder, encoder))
    encoder.start_decoder(decoder)
    for name, weight in decoder.state_dict().items():
        taken = name.startswith(("embed.", "transformer."))
        assert torch.equal(weight, (theirs if taken else before)[name]), name
        assert not taken or not torch.equal(weight, before[name]), name
    with torch.no_grad():
        for parameter in decoder.parameters():                      # a copy, which goes its own way
            parameter += 1
    assert all(torch.equal(weight, theirs[name]) for name, weight in encoder.state_dict().items())


def test_readout_begins_as_the_decoder():
    decoder, readout = randomise(Decoder(config(), V)), randomise(Readout(config(), V), 1)
    memory, nothing = memories(2), torch.empty(2, 0, dtype=torch.long)
    assert (readout(memory) - decoder(memory, nothing)[:, 0]).abs().max() > 0.1
    readout.start_from(decoder)
    torch.testing.assert_close(readout(memory), decoder(memory, nothing)[:, 0])


# ----------------------------------------------------------------------------------------------------------
# What must not be seen

@ENCODERS
def test_memory_depends_on_all_of_the_past_it_reads_and_on_nothing_after_t(changes):
    encoder = new_encoder(**changes, context_len=T)
    x, t = tokens(1, T), torch.arange(-1, T)
    before = encoder(x, t)[0]
    for i in range(T):
        for other in (V, (x[0, i] + 1) % V):                         # PAD too, as where a document ended
            perturbed = x.clone()
            perturbed[0, i] = other
            moved = changed(before, encoder(perturbed, t)[0])
            assert moved[t < i].max() < 1e-12, "the memory sees a later token"
            assert moved[t >= i].min() > 1e-4, "the memory misses a token of its past"


@pytest.mark.parametrize("layers, conv_width", [(1, 1), (2, 3)])
def test_tokens_before_the_window_are_not_read(layers, conv_width):
    x, t = tokens(1, 2 * T), torch.arange(-1, 2 * T)
    encoder = new_encoder(encoder_layers=layers, conv_width=conv_width)
    for i in range(2 * T):
        perturbed = x.clone()
        perturbed[0, i] = (x[0, i] + 1) % V
        moved = changed(encoder(x, t)[0], encoder(perturbed, t)[0])
        assert moved[(t >= i) & (t < i + 4)].min() > 1e-4
        assert i + 4 > t.max() or moved[t >= i + 4].max() < 1e-12


def test_trunk_is_causal_and_begins_with_nothing_read():
    encoder = new_encoder(encoder="causal", conv_width=3, **THREE_LAYERS)
    x = tokens(2, 3 * T)                                            # longer than what a layer looks back on
    for length in range(3 * T):
        for part, whole in zip(encoder.trunk(x[:, :length]), encoder.trunk(x), strict=True):
            assert whole.shape == (2, 3 * T + 1, 8)
            torch.testing.assert_close(part, whole[:, :length + 1], rtol=0, atol=1e-12)


def test_a_layer_of_the_trunk_looks_back_on_as_many_tokens_as_the_context_has():
    encoder, x = new_encoder(encoder="causal"), tokens(1, 3 * T)
    reach = 2 * 4 + 1                                               # of two layers, and the token itself
    for i in range(T):
        perturbed = x.clone()
        perturbed[0, i] = (x[0, i] + 1) % V
        moved = changed(encoder.trunk(x)[1][0], encoder.trunk(perturbed)[1][0])
        assert moved[i + 1:i + 1 + reach].min() > 1e-9
        assert moved[:i + 1].max() < 1e-12 and moved[i + 1 + reach:].max() < 1e-12


def test_the_trunk_of_a_row_as_long_as_the_context_needs_no_mask(monkeypatch):
    """A mask rules out the fastest kernels."""
    encoder, attend, masks = new_encoder(encoder="causal", context_len=T), F.scaled_dot_product_attention, []

    def watched(*tensors, attn_mask=None, is_causal=False):
        masks.append((attn_mask is not None, is_causal))
        return attend(*tensors, attn_mask=attn_mask, is_causal=is_causal)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    encoder.trunk(tokens(2, T))
    assert masks == [(False, True)] * 2
    encoder.trunk(tokens(2, T + 1))
    assert masks[2:] == [(True, False)] * 2


@ENCODERS
def test_memory_does_not_depend_on_the_other_positions_nor_their_order(changes):
    encoder = new_encoder(**changes)
    x, t = tokens(2, T), torch.arange(-1, T)
    together = encoder(x, t)
    for i in t.tolist():
        alone = encoder(x, torch.tensor([i]))[:, 0]
        torch.testing.assert_close(alone, together[:, i + 1], rtol=0, atol=1e-12)
    few = torch.tensor([6, -1, 3, 3, 0])
    for some in (few, few.repeat(4), t.flip(0)):
        torch.testing.assert_close(encoder(x, some), together[:, some + 1], rtol=0, atol=1e-12)
    if hasattr(encoder, "trunk"):
        assert torch.equal(encoder(x, few, encoder.trunk(x)), encoder(x, few))


@ENCODERS
def test_empty_memory_is_the_memory_before_the_first_token_of_any_row(changes):
    encoder = new_encoder(**changes)
    empty = empty_memory(encoder)
    assert empty.shape == (3, 8)
    for length in (1, 3, T):
        for t in ([-1], [length - 1, -1, 0]):
            memory = encoder(tokens(2, length), torch.tensor(t))[:, t.index(-1)]
            torch.testing.assert_close(memory, empty.expand(2, 3, 8), rtol=0, atol=1e-12)
    if isinstance(encoder, Encoder):                                # m_empty = E([PAD] * Tc)
        memory = encoder(torch.full((1, 4), V), torch.tensor([3]))[0, 0]
        torch.testing.assert_close(memory, empty, rtol=0, atol=1e-12)


@pytest.mark.parametrize("conv_width", [1, 3])
def test_a_short_past_is_the_same_as_a_past_with_pad_before_it(conv_width):
    encoder = randomise(Encoder(config(conv_width=conv_width), V))
    x = tokens(1, T)
    padded = torch.cat([torch.full((1, 9), V), x], dim=1)
    for t in range(-1, T):
        short, long = encoder(x, torch.tensor([t])), encoder(padded, torch.tensor([t + 9]))
        torch.testing.assert_close(short, long, rtol=0, atol=1e-12)


@pytest.mark.parametrize("conv_width", [1, 3])
def test_decoder_never_sees_the_token_it_predicts(conv_width):
    """The output at place i predicts y_{t+i} = x_{t+i+1}, which is input i: it may see inputs before i."""
    decoder = randomise(Decoder(config(future_len=6, conv_width=conv_width), V))
    memory, x = memories(1), tokens(1, 5)
    before = decoder(memory, x)[0]
    assert before.shape == (6, V)
    for i in range(5):
        for other in (V, (x[0, i] + 1) % V):
            perturbed = x.clone()
            perturbed[0, i] = other
            moved = changed(before, decoder(memory, perturbed)[0])
            assert moved[:i + 1].max() < 1e-12 and moved[i + 1:].min() > 1e-6


@ENCODERS
def test_no_prediction_sees_its_target_from_the_row_to_the_logits(changes):
    networks = randomise(build(config(**changes, context_len=T), V))
    t = torch.arange(T)
    ahead = t[:, None] + torch.arange(4)                # the logits (t, i) predict y_{t+i} = x_{t+i+1}

    def logits(x):
        future_x, _ = futures(x, x, t, 4, V)
        return networks["decoder"](networks["encoder"](x, t).flatten(0, 1), future_x.flatten(0, 1))

    x = tokens(1, T)
    before = logits(x)
    for s in range(T):
        perturbed = x.clone()
        perturbed[0, s] = (x[0, s] + 1) % V
        moved = (before - logits(perturbed)).abs().amax(-1)
        assert moved[ahead < s].numel() == 0 or moved[ahead < s].max() < 1e-12
        assert moved[ahead >= s].min() > 1e-7


# ----------------------------------------------------------------------------------------------------------
# The recurrence

@UPDATERS
def test_rolling_out_at_once_equals_reading_token_by_token(kind):
    networks = randomise(build(config(updater=kind), V))
    start, x = memories(3), tokens(3, 6)
    with torch.no_grad():
        whole = roll_out(networks["updater"], start, x)
        step = start
        for i in range(6):
            step = sample.read(networks, step, x[:, i:i + 1])
            torch.testing.assert_close(whole[:, i], step, rtol=0, atol=1e-12)
            torch.testing.assert_close(sample.read(networks, start, x[:, :i + 1]), step, rtol=0, atol=0)
    assert whole.shape == (3, 6, 3, 8) and changed(whole[:, 0], whole[:, 5]).min() > 1e-3


@UPDATERS
def test_roll_out_without_gradients_equals_the_plain_one_however_long(kind, monkeypatch):
    monkeypatch.setattr(model, "GRAPH_STEPS", 3)
    updater, start = randomise(Updater(config(updater=kind), V)), memories(2)
    for length in (1, 3, 7):
        found = model.roll_out_without_gradients(updater, start, tokens(2, length))
        torch.testing.assert_close(found, roll_out(updater, start, tokens(2, length)), rtol=0, atol=0)
        assert not found.requires_grad and not found.is_inference()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_roll_out_from_cuda_graphs_equals_the_plain_one_also_after_an_update_in_place(autocast):
    updater = randomise(Updater(config(), V)).float().cuda()
    for _ in range(2):
        for rows, length in ((2, 5), (3, 2 * model.GRAPH_STEPS + 1)):
            start, x = model.normalise(torch.randn(rows, 3, 8, device="cuda")), tokens(rows, length).cuda()
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                found = model.roll_out_without_gradients(updater, start, x)[:, :5]
                expected = roll_out(updater, start, x)[:, :5]
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)       # later rounding adds up
        with torch.no_grad():
            for parameter in updater.parameters():
                parameter += 0.1 * torch.randn_like(parameter)


@UPDATERS
def test_memories_have_unit_root_mean_square_and_are_float32_under_autocast(kind):
    networks = build(config(updater=kind), V)
    with torch.autocast("cpu", torch.bfloat16):
        memory = networks["encoder"](tokens(2, T), torch.tensor([-1, 3]))
        after = roll_out(networks["updater"], memory[:, 0], tokens(2, 4))
    for m in (memory, after):
        assert m.dtype == torch.float32
        torch.testing.assert_close(m.square().mean(-1), torch.ones(m.shape[:-1]), rtol=1e-3, atol=0)


def test_the_state_of_a_gru_is_not_rounded_under_autocast():
    updater, memory, x = Updater(config(updater="gru"), V), model.normalise(torch.randn(2, 3, 8)), tokens(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = updater(memory, x)
    assert torch.equal(found, updater(memory, x))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", ["transformer", "mlp"])
def test_updater_begins_as_the_identity(kind, layers):
    updater = Updater(config(updater=kind, updater_layers=layers), V)
    memory = rms_norm(torch.randn(2, 3, 8))
    torch.testing.assert_close(updater(memory, tokens(2)), memory, rtol=1e-4, atol=1e-5)


def test_a_transformer_that_changes_nothing_can_still_learn_to():
    """As it could not behind a gate that is closed."""
    updater = randomise(Updater(config(updater="transformer"), V))
    memory = rms_norm(memories(2))
    updater.scale.data.zero_()
    after = updater(memory, tokens(2))
    torch.testing.assert_close(after, memory, rtol=0, atol=1e-9)
    (after * torch.randn_like(after)).sum().backward()
    assert (updater.scale.grad != 0).all()


# ----------------------------------------------------------------------------------------------------------
# The losses of decoder and readout

@pytest.mark.parametrize("future_len", [1, 2, 6])
def test_decoding_no_more_than_the_targets_changes_neither_loss_nor_gradients(future_len, monkeypatch):
    networks, calls = randomise(build(config(future_len=6), V)), []
    x, y, t, memory = tokens(4, 8), tokens(4, 8, seed=1), torch.tensor([7, 2, 0, 5]), memories(4, 4)
    y[:2, 3:], y[2:, ::3], y[3] = IGNORE, IGNORE, IGNORE
    ahead = F.pad(y, (0, 6), value=IGNORE)[:, t[:, None] + torch.arange(future_len)].flatten(0, 1)
    lengths = sorted(max((i + 1 for i, target in enumerate(row) if target != IGNORE), default=0)
                     for row in ahead.tolist())
    networks["decoder"].register_forward_hook(
        lambda _, given, __: calls.append((len(given[0]), given[1].shape[1] + 1)))

    def gradients():
        loss = decoder_loss(networks, memory, x, y, t, future_len)
        parameters = list(networks["decoder"].parameters())
        return loss, *torch.autograd.grad(loss, parameters, allow_unused=future_len == 1)

    ours = gradients()
    lengths = [n for n in lengths if n]                             # without the rows that have no target
    assert 0 < len(lengths) < 16 and sum(rows for rows, _ in calls) == len(lengths)
    ends = [sum(rows for rows, _ in calls[:i + 1]) for i in range(len(calls))]
    assert len(calls) == (1 if future_len == 1 else model.CHUNKS)
    assert [length for _, length in calls] == [lengths[end - 1] for end in ends]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    calls.clear()
    for mine, whole in zip(ours, gradients()):
        assert mine is whole is None or torch.allclose(mine, whole, rtol=1e-9)
    assert calls == [(16, future_len)]
    monkeypatch.setattr(model, "CHUNK_ROWS", 6)                     # CUDA's kernels take no larger batch
    calls.clear()
    for mine, whole in zip(ours, gradients()):
        assert mine is whole is None or torch.allclose(mine, whole, rtol=1e-9)
    assert [rows for rows, _ in calls] == [6, 6, 4]


def test_only_memories_that_have_a_target_are_read_out():
    networks, calls, y, memory = randomise(build(config(), V)), [], tokens(3, 5), memories(3, 5)
    y[0], y[2, 1] = IGNORE, IGNORE
    logits = networks["readout"](memory.flatten(0, 1)).view(3, 5, V)
    networks["readout"].register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    valid = (y != IGNORE).nonzero().tolist()
    expected = sum(nll(logits[row, i], y[row, i]) for row, i in valid)
    torch.testing.assert_close(readout_loss(networks, memory, y), expected)
    assert calls == [9]


@pytest.mark.parametrize("with_target", [[], [3], [0, 1, 2, 3]], ids=["none", "the last token", "all"])
def test_every_parameter_of_decoder_and_readout_has_a_gradient_wherever_targets_are(with_target):
    """DistributedDataParallel waits for it."""
    networks, x, memory = randomise(build(config(), V)), tokens(2, 4), memories(2, 4)
    y = torch.full((2, 4), IGNORE)
    y[:, with_target] = 1
    (decoder_loss(networks, memory, x, y, torch.arange(4), 4) + readout_loss(networks, memory, y)).backward()
    assert all(p.grad is not None for name in ("decoder", "readout") for p in networks[name].parameters())


def test_the_cross_entropy_of_bf16_logits_is_taken_in_float32():
    logits, y = torch.randn(50, 7).bfloat16(), torch.randint(7, (50,))
    found = model.cross_entropy(logits, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model.cross_entropy(logits.double(), y).float(), rtol=1e-6, atol=0)


# ----------------------------------------------------------------------------------------------------------
# Sizes

@pytest.mark.parametrize("changes, name", [
    (dict(d_model=12, n_heads=4), "d_model"), (dict(memory_tokens=0), "memory_tokens"),
    (dict(future_len=0), "future_len"), (dict(conv_width=0), "conv_width"), (dict(encoder="bert"), "encoder"),
    (dict(encoder="causal", memory_tokens=1), "memory_tokens"), (dict(updater="lstm"), "updater"),
    (dict(encoder="causal", encoder_layers=3), "encoder_layers"), (dict(d_model="8"), "d_model"),
    (dict(d_model=8.0), "d_model"), (dict(n_heads=True), "n_heads")])
def test_sizes_that_make_no_sense_are_refused(changes, name):
    with pytest.raises(UsageError, match=f"--{name}"):
        config(**changes)


def test_a_network_begins_with_the_same_weights_in_every_stage():
    torch.manual_seed(5)
    everything = build(config(), V)
    torch.manual_seed(5)
    for name, network in build(config(), V, ("updater", "readout")).items():
        weights = network.state_dict(), everything[name].state_dict()
        for (key, ours), theirs in zip(weights[0].items(), weights[1].values(), strict=True):
            assert torch.equal(ours, theirs), (name, key)
    torch.manual_seed(6)                            # another seed: no network has the weights of another
    other = build(config(), V).state_dict().values()
    drawn = [weight for weight in everything.state_dict().values() if weight.dim() == 2 and weight.std() > 0]
    assert not any(torch.equal(ours, theirs) for ours in drawn for theirs in other)
