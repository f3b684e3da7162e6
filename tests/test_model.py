"""The networks against plain loops in float64, and what each of them must not see."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
import sample
from data import IGNORE, futures
from flops import chain_flops, forward_flops
from model import (Block, CausalEncoder, Decoder, Encoder, ModelConfig, Readout, Stem, Updater, build, decoder_loss, empty_memory,
                   parameter_counts, readout_loss, restore, roll_out, squared_error)
from runtime import DataError, UsageError

V, T = 5, 7
SMALL = dict(d_model=8, n_heads=2, memory_tokens=3, context_len=4, future_len=4, decoder_layers=2)
UPDATERS = pytest.mark.parametrize("kind", ["transformer", "mlp", "gru"])
ENCODERS = pytest.mark.parametrize("changes", [
    dict(encoder="window"), dict(encoder="window", conv_width=3), dict(encoder="causal"), dict(encoder="causal", encoder_layers=3, conv_width=3)],
    ids=["window", "window-convolution", "causal", "causal-convolution"])


def new_encoder(**changes):
    return randomise(build(config(**changes), V, ("encoder",))["encoder"])


def config(**changes):
    return ModelConfig(**SMALL | changes)


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def memories(*shape):
    return torch.randn(*shape, 3, 8, dtype=torch.float64)


def changed(before, after):
    """Per leading index: by how much two tensors (n, ...) differ at most."""
    return (before - after).flatten(1).abs().amax(1)


# ---------------------------------------------------------------------------------------------------------------------
# A reference, one query, one head and one pair of numbers at a time

def rms_norm(h, gain=1.0):
    return h / (h.square().mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).sqrt() * gain


def turned(q, position):
    """RoPE on one head's vector (d,), whose second half does not turn."""
    out = []
    for i in range(0, len(q), 2):
        angle = position / 10000 ** (i / len(q)) if i < len(q) / 2 else 0
        out += [q[i] * math.cos(angle) - q[i + 1] * math.sin(angle), q[i] * math.sin(angle) + q[i + 1] * math.cos(angle)]
    return torch.stack(out)


def reference_stem(stem, x):
    """The tokens of x (a list) embedded, each plus what the convolution makes of the last few up to it -> (n, d)."""
    h, d = stem.embed.weight[x], stem.embed.weight.shape[1]
    if stem.width == 1:
        return h
    out = []
    for i in range(len(x)):
        mixed = h[i]
        for j in range(max(0, i + 1 - stem.width), i + 1):
            begin = (j - i + stem.width - 1) * d                                   # the last part of the weights is for x_i itself
            mixed = mixed + stem.mix.weight[:, begin:begin + d] @ h[j]
        out.append(mixed)
    return torch.stack(out)


def reference_transformer(transformer, h, positions, sees):
    """h (n, d); sees[i] lists the places that place i attends to."""
    for block in transformer.blocks:
        q, k, v = (block.qkv.weight @ rms_norm(h, block.attention_norm.weight).T).T.chunk(3, dim=1)
        size, mixed = transformer.head_dim, []
        for i in range(len(h)):
            row = []
            for start in range(0, h.shape[1], size):
                part = slice(start, start + size)
                query = turned(q[i, part], positions[i])
                scores = torch.stack([query @ turned(k[j, part], positions[j]) for j in sees[i]]) / math.sqrt(size)
                row.append(sum(w * v[j, part] for w, j in zip(scores.exp() / scores.exp().sum(), sees[i])))
            mixed.append(torch.cat(row))
        h = h + torch.stack(mixed) @ block.out.weight.T
        up = rms_norm(h, block.mlp_norm.weight) @ block.up.weight.T
        h = h + up * 0.5 * (1 + torch.erf(up / math.sqrt(2))) @ block.down.weight.T
    return h


def reference_memory(encoder, x, t):
    """The memory (K, d) after reading x (T,) up to t, as the docstrings of the two encoders word it."""
    Tc = encoder.context_len
    if isinstance(encoder, Encoder):
        K = len(encoder.registers)
        past = ([encoder.pad] * Tc + x.tolist()[:t + 1])[-Tc:]
        h = torch.cat([reference_stem(encoder.embed, past), encoder.registers])
        return rms_norm(reference_transformer(encoder.transformer, h, range(Tc + K), [range(Tc + K)] * (Tc + K))[-K:])
    past = [encoder.pad] + x.tolist()[:t + 1]                                     # x_t sits at place t + 1
    e = reference_stem(encoder.embed, past)
    h = reference_transformer(encoder.transformer, e, range(len(past)), [range(max(0, i - Tc), i + 1) for i in range(len(past))])
    gates = torch.sigmoid(rms_norm(h) @ encoder.gate.weight.T + encoder.gate.bias)            # (t + 2, K - 1)
    slots = torch.zeros(gates.shape[1], h.shape[1], dtype=h.dtype)
    for e_j, g_j in zip(e, gates):                                                # as f would: an open gate writes, a closed one holds
        slots = (1 - g_j)[:, None] * slots + g_j[:, None] * e_j
    return rms_norm(torch.cat([slots, (e[-1] + encoder.present.weight @ rms_norm(h[-1]))[None]]))


@pytest.mark.parametrize("shape", [(2, 6, 2, 3, 8), (2, 6, 3, 4)])
def test_rotation_equals_a_loop_over_pairs_compiled_or_not_and_so_do_its_gradients(shape):
    q, positions = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 5, 9, 20])
    expected = torch.stack([torch.stack([turned(v, positions[i % 6].item()) for v in row.view(-1, shape[-1])]).view(row.shape)
                            for i, row in enumerate(q.flatten(0, 1))]).view(shape)
    weight = torch.randn(shape, dtype=torch.float64)
    goal = torch.autograd.grad((expected * weight).sum(), q)[0]
    for rotate in (model.rotate, torch.compile(model.rotate, backend="eager", fullgraph=True)):
        found = rotate(q, model.rope(positions.double(), shape[-1]))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)           # the frequencies are float32
        torch.testing.assert_close(torch.autograd.grad((found * weight).sum(), q)[0], goal, rtol=1e-6, atol=1e-6)


def test_half_of_the_pairs_of_a_head_turn_with_the_position_and_the_slower_half_does_not():
    for head_dim, turning in ((2, 1), (4, 1), (6, 2), (16, 4)):
        cos, sin = model.rope(torch.tensor([0, 1, 7, 3000]), head_dim).unbind(-1)
        assert cos.shape == (4, head_dim // 2) and (cos[:, turning:] == 1).all() and (sin[:, turning:] == 0).all()
        assert (sin[1:, :turning] != 0).all() and torch.equal(cos[1, :turning], torch.cos(10000.0 ** -(torch.arange(turning) * 2 / head_dim)))


@ENCODERS
def test_encoder_equals_a_plain_reference_for_every_position_and_so_do_its_gradients(changes):
    encoder = new_encoder(**changes)
    x, t = tokens(2, T), torch.randperm(T + 1) - 1
    weight = torch.randn(2, T + 1, 3, 8, dtype=torch.float64)
    parameters = list(encoder.parameters())
    expected = torch.stack([torch.stack([reference_memory(encoder, row, i) for i in t.tolist()]) for row in x])
    out = encoder(x, t)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad((memory * weight).sum(), parameters) for memory in (out, expected))):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_slot_holds_what_it_wrote_while_its_gate_is_closed_however_long():
    """In float32, through gates that are as good as open or closed."""
    encoder = build(config(encoder="causal", encoder_layers=1, context_len=2000), V, ("encoder",))["encoder"]
    x = tokens(1, 2000)
    x[0, 1000:], x[0, 10] = x[0, 1000:] % (V - 1), V - 1                                   # token V - 1 is the last one of its kind at 10
    x[0, 11:1000] %= V - 1
    with torch.no_grad():
        e, h = encoder.trunk(x)
        is_it = torch.cat([torch.zeros(1), (x[0] == V - 1).float()])
        encoder.gate.forward = lambda h: (200 * is_it - 100)[None, :, None].expand(1, -1, 2)
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


@pytest.mark.parametrize("width", [2, 3, 9])
def test_stem_equals_a_loop_over_the_last_tokens_and_so_do_its_gradients(width):
    stem, x = randomise(Stem(V, 8, width)), tokens(2, T)
    weight = torch.randn(2, T, 8, dtype=torch.float64)
    out, expected = stem(x), torch.stack([reference_stem(stem, row.tolist()) for row in x])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad((value * weight).sum(), list(stem.parameters())) for value in (out, expected))):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert stem(x[:, :0]).shape == (2, 0, 8)


def test_stem_sees_the_last_tokens_and_nothing_before_or_after_them():
    stem, x = randomise(Stem(V, 8, 3)), tokens(1, T)
    for i in range(T):
        perturbed = x.clone()
        perturbed[0, i] = (x[0, i] + 1) % V
        moved = changed(stem(x)[0], stem(perturbed)[0])
        assert moved[i:i + 3].min() > 1e-3 and not moved[:i].any() and not moved[i + 3:].any()


def test_stem_of_width_1_is_a_plain_embedding():
    stem, x = Stem(V, 8, 1), tokens(2, T)
    assert [name for name, _ in stem.named_parameters()] == ["embed.weight"] and torch.equal(stem(x), stem.embed.weight[x])


def test_attention_can_choose_from_the_start():
    block = Block(64, 4)
    q, k, _ = block.qkv(rms_norm(torch.randn(500, 64))).view(500, 3, 4, 16).permute(1, 2, 0, 3)
    logits = q @ k.transpose(1, 2) / 4
    assert 0.8 < logits.std() < 1.25, logits.std()


@pytest.mark.parametrize("conv_width", [1, 3])
def test_decoder_and_readout_equal_a_plain_reference(conv_width):
    decoder, readout = randomise(Decoder(config(conv_width=conv_width), V)), randomise(Readout(config(), V), 1)
    memory, x = memories(2), tokens(2, 3)
    for row in range(2):
        h = torch.cat([memory[row], reference_stem(decoder.embed, x[row].tolist())])
        h = reference_transformer(decoder.transformer, h, range(6), [list(range(i + 1)) for i in range(6)])
        logits = rms_norm(h[2:], decoder.norm.weight) @ decoder.head.weight.T
        torch.testing.assert_close(decoder(memory, x)[row], logits, rtol=0, atol=1e-5)
        h = reference_transformer(readout.transformer, memory[row], range(3), [[0], [0, 1], [0, 1, 2]])
        logits = readout.head.weight @ rms_norm(h[-1], readout.norm.weight)
        torch.testing.assert_close(readout(memory)[row], logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("conv_width", [1, 3])
@pytest.mark.parametrize("memory_tokens", [1, 3])
def test_decoder_without_a_future_has_the_first_output_of_one_with_a_future_and_its_gradient(layers, conv_width, memory_tokens):
    settings = config(decoder_layers=layers, conv_width=conv_width, memory_tokens=memory_tokens)
    decoder, x = randomise(Decoder(settings, V)), tokens(2, 3)
    memory = torch.randn(2, memory_tokens, 8, dtype=torch.float64, requires_grad=True)
    first, alone = decoder(memory, x)[:, :1], decoder(memory, x[:, :0])
    assert alone.shape == (2, 1, V)
    torch.testing.assert_close(alone, first, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(logits.square().sum(), memory)[0] for logits in (alone, first))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("encoder_layers, decoder_layers", [(2, 2), (1, 3), (3, 1)])
def test_decoder_takes_over_embedding_and_common_layers_of_the_trunk_and_nothing_else(encoder_layers, decoder_layers):
    sizes = config(encoder="causal", conv_width=3, encoder_layers=encoder_layers, decoder_layers=decoder_layers)
    encoder, decoder = randomise(CausalEncoder(sizes, V)), randomise(Decoder(sizes, V), 1)
    before, theirs = ({name: weight.clone() for name, weight in network.state_dict().items()} for network in (decoder, encoder))
    decoder.start_from(encoder)
    taken = ("embed.", *(f"transformer.blocks.{i}." for i in range(min(encoder_layers, decoder_layers))))
    for name, weight in decoder.state_dict().items():
        assert torch.equal(weight, (theirs if name.startswith(taken) else before)[name]), name
        assert not name.startswith(taken) or not torch.equal(weight, before[name]), name
    with torch.no_grad():
        for parameter in decoder.parameters():                                    # a copy, which goes its own way
            parameter += 1
    assert all(torch.equal(weight, theirs[name]) for name, weight in encoder.state_dict().items())


def test_readout_begins_as_the_decoder():
    decoder, readout = randomise(Decoder(config(), V)), randomise(Readout(config(), V), 1)
    memory, nothing = memories(2), torch.empty(2, 0, dtype=torch.long)
    assert (readout(memory) - decoder(memory, nothing)[:, 0]).abs().max() > 0.1
    readout.start_from(decoder)
    torch.testing.assert_close(readout(memory), decoder(memory, nothing)[:, 0])


@UPDATERS
def test_updater_equals_a_plain_reference(kind):
    updater = randomise(Updater(config(updater=kind), V))
    memory, x = memories(2), tokens(2)
    for row in range(2):
        token, state = updater.embed.weight[x[row]], memory[row].flatten()
        if kind == "transformer":
            h = reference_transformer(updater.transformer, torch.cat([memory[row], token[None]]), range(4), [[0, 1, 2, 3]] * 4)[:3]
        elif kind == "mlp":
            for norm, up, _, down in updater.layers:
                both = up.weight @ rms_norm(torch.cat([state, token]), norm.weight) + up.bias
                state = state + down.weight @ (both * 0.5 * (1 + torch.erf(both / math.sqrt(2)))) + down.bias
            h = state.view(3, 8)
        else:
            cell = updater.cell
            r, z, n = (cell.weight_ih @ token + cell.bias_ih).chunk(3)
            hr, hz, hn = (cell.weight_hh @ state + cell.bias_hh).chunk(3)
            z, n = torch.sigmoid(z + hz), torch.tanh(n + torch.sigmoid(r + hr) * hn)
            h = ((1 - z) * n + z * state).view(3, 8)
        if kind != "gru":
            opened = [torch.sigmoid(updater.gate.weight[0] @ one + updater.gate.bias[0]) for one in h]
            h = torch.stack([(1 - o) * old + o * new for o, old, new in zip(opened, memory[row], h)])
        torch.testing.assert_close(updater(memory, x)[row], rms_norm(h), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What must not be seen

@ENCODERS
def test_memory_depends_on_all_of_the_past_it_reads_and_on_nothing_after_t(changes):
    encoder = new_encoder(**changes, context_len=T)
    x, t = tokens(1, T), torch.arange(-1, T)
    before = encoder(x, t)[0]
    for i in range(T):
        for other in (V, (x[0, i] + 1) % V):                                     # PAD too, as where a document ended
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
    encoder = new_encoder(encoder="causal", encoder_layers=3, conv_width=3)
    x = tokens(2, 3 * T)                                                          # a row may be longer than what a layer looks back on
    for length in range(3 * T):
        for part, whole in zip(encoder.trunk(x[:, :length]), encoder.trunk(x), strict=True):
            assert whole.shape == (2, 3 * T + 1, 8)
            torch.testing.assert_close(part, whole[:, :length + 1], rtol=0, atol=1e-12)


def test_a_layer_of_the_trunk_looks_back_on_as_many_tokens_as_the_context_has():
    encoder, x = new_encoder(encoder="causal", encoder_layers=2), tokens(1, 3 * T)
    for i in range(T):
        perturbed = x.clone()
        perturbed[0, i] = (x[0, i] + 1) % V
        moved = changed(encoder.trunk(x)[1][0], encoder.trunk(perturbed)[1][0])
        assert moved[i + 1:i + 1 + 8 + 1].min() > 1e-9 and moved[:i + 1].max() < 1e-12 and moved[i + 1 + 8 + 1:].max() < 1e-12


def test_a_trunk_of_a_row_as_long_as_the_context_needs_no_mask_which_rules_out_the_fastest_kernels(monkeypatch):
    encoder, attend, masks = new_encoder(encoder="causal", context_len=T), F.scaled_dot_product_attention, []

    def watched(*tensors, attn_mask=None, is_causal=False):
        masks.append((attn_mask is not None, is_causal))
        return attend(*tensors, attn_mask=attn_mask, is_causal=is_causal)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    encoder.trunk(torch.randint(V, (2, T)))
    assert masks == [(False, True)] * 2
    encoder.trunk(torch.randint(V, (2, T + 1)))
    assert masks[2:] == [(True, False)] * 2


@ENCODERS
def test_memory_is_the_same_whichever_other_positions_are_asked_for_and_in_whatever_order(changes):
    encoder = new_encoder(**changes)
    x, t = tokens(2, T), torch.arange(-1, T)
    together = encoder(x, t)
    for i in t.tolist():
        torch.testing.assert_close(encoder(x, torch.tensor([i]))[:, 0], together[:, i + 1], rtol=0, atol=1e-12)
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
    if isinstance(encoder, Encoder):                                              # m_empty = E([PAD] * Tc)
        torch.testing.assert_close(encoder(torch.full((1, 4), V), torch.tensor([3]))[0, 0], empty, rtol=0, atol=1e-12)


@pytest.mark.parametrize("conv_width", [1, 3])
def test_a_short_past_is_the_same_as_a_past_with_pad_before_it(conv_width):
    encoder = randomise(Encoder(config(conv_width=conv_width), V))
    x = tokens(1, T)
    padded = torch.cat([torch.full((1, 9), V), x], dim=1)
    for t in range(-1, T):
        torch.testing.assert_close(encoder(x, torch.tensor([t])), encoder(padded, torch.tensor([t + 9])), rtol=0, atol=1e-12)


@pytest.mark.parametrize("conv_width", [1, 3])
def test_decoder_never_sees_the_token_it_predicts(conv_width):
    """The output at place i predicts y_{t+i} = x_{t+i+1}, which is input i: it may see the inputs before i only."""
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
    ahead = t[:, None] + torch.arange(4)                                          # the logits (t, i) predict y_{t+i} = x_{t+i+1}

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


def test_readout_reads_every_memory_token_and_the_last_logits_of_the_decoder_read_all_of_them():
    readout, decoder = randomise(Readout(config(), V)), randomise(Decoder(config(), V))
    memory = memories(1).requires_grad_()
    for logits in (readout(memory), decoder(memory, tokens(1, 0))[:, 0]):
        gradient, = torch.autograd.grad(logits.square().sum(), memory)
        assert gradient.abs().amax(-1).min() > 1e-6


@UPDATERS
def test_rows_of_a_batch_never_mix(kind):
    networks = randomise(build(config(updater=kind), V))
    memory, x, t = memories(4), tokens(4, T), torch.arange(-1, T)
    together = [networks["encoder"](x, t), networks["decoder"](memory, x[:, :3]), networks["updater"](memory, x[:, 0]),
                networks["readout"](memory)]
    for i in range(4):
        one = slice(i, i + 1)
        alone = [networks["encoder"](x[one], t), networks["decoder"](memory[one], x[one, :3]),
                 networks["updater"](memory[one], x[one, 0]), networks["readout"](memory[one])]
        for a, b in zip(alone, together):
            torch.testing.assert_close(a[0], b[i], rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
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
                found, expected = model.roll_out_without_gradients(updater, start, x), roll_out(updater, start, x)
            torch.testing.assert_close(found[:, :5], expected[:, :5], rtol=1e-2, atol=1e-2)       # later, rounding has added up
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
    updater, memory, x = Updater(config(updater="gru"), V), model.normalise(torch.randn(2, 3, 8)), tokens(2, 1)[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        found = updater(memory, x)
    assert torch.equal(found, updater(memory, x))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", ["transformer", "mlp"])
def test_updater_begins_as_the_identity(kind, layers):
    updater = Updater(config(updater=kind, updater_layers=layers), V)
    memory = rms_norm(torch.randn(2, 3, 8))
    torch.testing.assert_close(updater(memory, tokens(2)), memory, rtol=1e-4, atol=1e-5)


def test_a_closed_gate_keeps_its_memory_token_and_an_open_one_replaces_it():
    updater = randomise(Updater(config(), V))
    memory = rms_norm(memories(2))
    with torch.no_grad():
        updater.gate.weight.zero_()
        for bias in (-50.0, 50.0):
            updater.gate.bias.fill_(bias)
            new = updater.transformer(torch.cat([memory, updater.embed(tokens(2))[:, None]], dim=1), model.attend_to_all, slice(3))
            torch.testing.assert_close(updater(memory, tokens(2)), rms_norm(new) if bias > 0 else memory, rtol=0, atol=1e-9)
    assert changed(rms_norm(new), memory).min() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# The losses of decoder and readout

@pytest.mark.parametrize("future_len", [1, 2, 6])
def test_only_what_is_asked_is_decoded_and_the_loss_and_its_gradients_are_those_of_decoding_all(future_len, monkeypatch):
    networks, calls = randomise(build(config(future_len=6), V)), []
    x, y, t, memory = tokens(4, 8), tokens(4, 8, seed=1), torch.tensor([7, 2, 0, 5]), memories(4, 4)
    y[:2, 3:], y[2:, ::3], y[3] = IGNORE, IGNORE, IGNORE
    future_y = F.pad(y, (0, 6), value=IGNORE)
    lengths = sorted(max((i + 1 for i in range(future_len) if future_y[row, at + i] != IGNORE), default=0) for row in range(4) for at in t)
    networks["decoder"].register_forward_hook(lambda _, given, __: calls.append((len(given[0]), given[1].shape[1] + 1)))

    def gradients():
        loss = decoder_loss(networks, memory, x, y, t, future_len)
        return loss, *torch.autograd.grad(loss, list(networks["decoder"].parameters()), allow_unused=future_len == 1)

    ours = gradients()
    asked = [n for n in lengths if n]
    assert 0 < len(asked) < 16 and sum(rows for rows, _ in calls) == len(asked)
    ends = [sum(rows for rows, _ in calls[:i + 1]) for i in range(len(calls))]
    assert len(calls) == (1 if future_len == 1 else model.PARTS)
    assert [length for _, length in calls] == [min(future_len, max(2, asked[end - 1])) for end in ends]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    calls.clear()
    for mine, whole in zip(ours, gradients()):
        assert mine is whole is None or torch.allclose(mine, whole, rtol=1e-9)
    assert calls == [(16, future_len)]


def test_only_memories_that_are_asked_are_read_out():
    networks, calls, y, memory = randomise(build(config(), V)), [], tokens(3, 5), memories(3, 5)
    y[0], y[2, 1] = IGNORE, IGNORE
    logits = networks["readout"](memory.flatten(0, 1))
    networks["readout"].register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    expected = sum(-logits.view(3, 5, V)[row, at].log_softmax(-1)[y[row, at]] for row in range(3) for at in range(5) if y[row, at] != IGNORE)
    torch.testing.assert_close(readout_loss(networks, memory, y), expected)
    assert calls == [9]


@pytest.mark.parametrize("asked", [[], [3], [0, 1, 2, 3]], ids=["nothing", "the last token alone", "all"])
def test_every_parameter_of_decoder_and_readout_has_a_gradient_whatever_is_asked(asked):
    """Which DistributedDataParallel waits for."""
    networks, x, y, memory = randomise(build(config(), V)), tokens(2, 4), torch.full((2, 4), IGNORE), memories(2, 4)
    y[:, asked] = 1
    (decoder_loss(networks, memory, x, y, torch.arange(4), 4) + readout_loss(networks, memory, y)).backward()
    assert all(p.grad is not None for name in ("decoder", "readout") for p in networks[name].parameters())


def test_squared_error_equals_plain_loops_over_the_real_transitions():
    predicted, memory = memories(4, 5).requires_grad_(), memories(4, 5).requires_grad_()
    real = torch.arange(20).view(4, 5) % 5 != 1
    expected = sum((predicted[b, i, k, j] - memory[b, i, k, j]) ** 2 / 24 for b in range(4) for i in range(5) if real[b, i]
                   for k in range(3) for j in range(8))
    found = squared_error(predicted, memory, real)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(*(torch.autograd.grad(e, [predicted, memory]) for e in (found, expected))):
        torch.testing.assert_close(ours, theirs)
    assert squared_error(predicted, memory, torch.zeros_like(real)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and checkpoints

@pytest.mark.parametrize("changes, message", [
    (dict(d_model=12, n_heads=4), "d_model=12 must be a multiple of 2 x n_heads = 8"),
    (dict(memory_tokens=0), "memory_tokens must be at least 1"), (dict(future_len=0), "future_len must be at least 1"),
    (dict(conv_width=0), "conv_width must be at least 1"), (dict(encoder="causal", memory_tokens=1), "needs --memory_tokens of at least 2"),
    (dict(encoder="bert"), "encoder is one of window, causal, not 'bert'"),
    (dict(updater="lstm"), "updater is one of transformer, mlp, gru, not 'lstm'")])
def test_sizes_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        config(**changes)


def checkpoint(networks, **changes):
    content = {"model_config": vars(config()), "data": {"vocab_size": V}, "model": networks.state_dict(),
               "initial_memory": torch.ones(3, 8)}
    return content | changes


@pytest.mark.parametrize("names", [("encoder", "decoder", "updater", "readout"), ("updater", "readout")])
def test_a_checkpoint_restores_the_same_functions(names):
    networks = randomise(build(config(), V, names)).float()
    got, restored, empty = restore(checkpoint(networks))
    assert got == config() and list(restored) == list(names) and torch.equal(empty, torch.ones(3, 8))
    memory = memories(2).float()
    assert torch.equal(restored["updater"](memory, tokens(2)), networks["updater"](memory, tokens(2)))


@pytest.mark.parametrize("change", [
    lambda c: c["model_config"].update(d_model=16), lambda c: c["model_config"].update(updater="gru"),
    lambda c: c["model_config"].update(updater_layers=3), lambda c: c["model_config"].update(width=3),
    lambda c: c["model_config"].update(conv_width=3),
    lambda c: c["model_config"].update(n_heads=3), lambda c: c["model"].pop("updater.embed.weight"),
    lambda c: c.update(initial_memory=torch.ones(2, 8)), lambda c: c.update(data={}),
    lambda c: c.update(model={"updater.extra": torch.ones(2)})])
def test_a_checkpoint_of_another_architecture_is_refused(change):
    content = checkpoint(build(config(), V))
    content["model_config"] = dict(content["model_config"])
    change(content)
    with pytest.raises(DataError, match="does not fit this architecture"):
        restore(content)


def test_parameters_are_counted():
    networks = build(config(), V, ("updater", "readout"))
    total = sum(p.numel() for p in networks.parameters())
    assert parameter_counts(networks).endswith(f"in all {total:,}") and "readout" in parameter_counts(networks)


@pytest.mark.parametrize("encoder, conv_width", [("window", 1), ("causal", 3)])
def test_longest_chain_goes_through_every_matrix_once_and_looks_embeddings_up(encoder, conv_width):
    for name, network in build(config(encoder=encoder, conv_width=conv_width), V).items():
        linear = [m.weight.numel() for m in network.modules() if isinstance(m, torch.nn.Linear)]
        assert len(linear) > 4 and chain_flops(network) == 2 * sum(linear), name


@pytest.mark.parametrize("changes", [dict(), dict(encoder="causal", encoder_layers=3, conv_width=8), dict(updater="mlp"), dict(updater="gru")],
                         ids=["window", "causal", "mlp", "gru"])
def test_flops_are_those_that_torch_counts(changes):
    """All products of matrices; torch counts those of causal attention in full, we count half. Of the decoder the mean over the row."""
    sizes = config(d_model=32, context_len=24, future_len=16, **changes)
    networks, B, memory, x, t = build(sizes, V), 3, torch.randn(3, 3, 32), tokens(3, 20), torch.arange(5) * 3
    rest = [x[:1, i + 1:i + 16] for i in range(20)]
    calls = {"encoder": lambda: networks["encoder"](x, t), "decoder": lambda: [networks["decoder"](memory[:1], future) for future in rest],
             "updater": lambda: networks["updater"](memory, x[:, 0]),
             "readout": lambda: networks["readout"](memory)}
    expected = forward_flops(sizes, V, 20, len(t))
    for name, run in calls.items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            run()
        halved = name == "decoder" or name == "encoder" and sizes.encoder == "causal"
        of = len(rest) if name == "decoder" else B
        assert counter.get_total_flops() / of == pytest.approx(expected[name], rel=0.05 if halved else 1e-9), name


def test_flops_of_a_causal_encoder_grow_with_the_places_that_its_layers_look_back_on():
    T = 800
    for context_len in (80, 530, 800, 840):
        places = sum(min(i + 1, context_len) for i in range(T)) / T
        sizes, nothing = (config(encoder="causal", encoder_layers=2, context_len=n) for n in (context_len, 1))
        for name in ("trunk", "encoder"):
            more = forward_flops(sizes, V, T, 5)[name] - forward_flops(nothing, V, T, 5)[name]
            assert more == pytest.approx(2 * (T + 1) * 4 * (places - 1) * 8, rel=0.02)            # for each place's queries, in two layers


def test_a_network_begins_with_the_same_weights_in_every_stage():
    torch.manual_seed(5)
    everything = build(config(), V)
    torch.manual_seed(5)
    for name, network in build(config(), V, ("updater", "readout")).items():
        for (key, ours), theirs in zip(network.state_dict().items(), everything[name].state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), (name, key)
    torch.manual_seed(6)
    other = build(config(), V).state_dict().values()
    weights = [weight for weight in everything.state_dict().values() if weight.dim() == 2 and weight.std() > 0]
    assert not any(torch.equal(ours, theirs) for ours in weights for theirs in other)             # of the next seed, whatever the network
