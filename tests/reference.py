"""The networks and the losses written out as loops, in float64, one query and one head at a time.

Slow and obvious. The tests hold model.py and the train scripts against them.
"""
import math

import torch

from model import IGNORE, Encoder, normalise

# ----------------------------------------------------------------------------------------------------------
# The networks

def rms_norm(h, gain=1.0):
    return h / (h.square().mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).sqrt() * gain


def gelu(h):
    return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))


def turned(q, position):
    """RoPE on one head (d,): component i turns with component i + d / 2, if i is in the first quarter."""
    half, out = len(q) // 2, [None] * len(q)
    for i in range(half):
        angle = position / 10000 ** (2 * i / len(q)) if 2 * i < half else 0
        out[i] = q[i] * math.cos(angle) - q[i + half] * math.sin(angle)
        out[i + half] = q[i] * math.sin(angle) + q[i + half] * math.cos(angle)
    return torch.stack(out)


def reference_stem(stem, x):
    """The tokens of x (a list) embedded, each plus the convolution of the last few up to it -> (n, d)."""
    h, d = stem.embed.weight[x], stem.embed.weight.shape[1]
    if stem.width == 1:
        return h
    out = []
    for i in range(len(x)):
        mixed = h[i]
        for j in range(max(0, i + 1 - stem.width), i + 1):
            begin = (j - i + stem.width - 1) * d            # the last part is for x_i itself
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
                scores = torch.stack([query @ turned(k[j, part], positions[j]) for j in sees[i]])
                weights = (scores / math.sqrt(size)).softmax(0)
                row.append(sum(w * v[j, part] for w, j in zip(weights, sees[i])))
            mixed.append(torch.cat(row))
        h = h + torch.stack(mixed) @ block.out.weight.T
        h = h + gelu(rms_norm(h, block.mlp_norm.weight) @ block.up.weight.T) @ block.down.weight.T
    return h


def reference_memory(encoder, x, t):
    """The memory (K, d) after reading x (T,) up to t, as the docstrings of the two encoders word it."""
    Tc = encoder.context_len
    if isinstance(encoder, Encoder):
        n = Tc + len(encoder.registers)
        past = ([encoder.pad] * Tc + x.tolist()[:t + 1])[-Tc:]
        h = torch.cat([reference_stem(encoder.embed, past), encoder.registers])
        return rms_norm(reference_transformer(encoder.transformer, h, range(n), [range(n)] * n)[Tc:])
    past = [encoder.pad] + x.tolist()[:t + 1]                       # x_t sits at place t + 1
    e, places = reference_stem(encoder.embed, past), range(len(past))
    h = reference_transformer(encoder.transformer, e, places, [range(max(0, i - Tc), i + 1) for i in places])
    gates = torch.sigmoid(rms_norm(h) @ encoder.gate.weight.T + encoder.gate.bias)          # (t + 2, K - 1)
    slots = torch.zeros(gates.shape[1], h.shape[1], dtype=h.dtype)
    for e_j, g_j in zip(e, gates):                                  # an open gate writes, a closed one holds
        slots = (1 - g_j)[:, None] * slots + g_j[:, None] * e_j
    present = e[-1] + encoder.present.weight @ rms_norm(h[-1])
    return rms_norm(torch.cat([slots, present[None]]))


def reference_decoder(decoder, memory, x):
    """Logits (Tf, V) from memory (K, d) and x (a list of Tf - 1 tokens)."""
    h = torch.cat([memory, reference_stem(decoder.embed, x)]) if x else memory
    places = range(len(h))
    h = reference_transformer(decoder.transformer, h, places, [range(i + 1) for i in places])
    return rms_norm(h[len(memory) - 1:], decoder.norm.weight) @ decoder.head.weight.T


def reference_readout(readout, memory):
    """Logits (V,) from memory (K, d)."""
    places = range(len(memory))
    h = reference_transformer(readout.transformer, memory, places, [range(i + 1) for i in places])[-1]
    return readout.head.weight @ rms_norm(h, readout.norm.weight)


def reference_updater(updater, memory, x):
    """The memory (K, d) after memory (K, d) and one token."""
    token, state, (K, d) = updater.embed.weight[x], memory.flatten(), memory.shape
    if updater.kind == "gru":
        r, z, n = (updater.input.weight @ token + updater.input.bias).chunk(3)
        hr, hz, hn = (updater.hidden.weight @ state + updater.hidden.bias).chunk(3)
        z, n = torch.sigmoid(z + hz), torch.tanh(n + torch.sigmoid(r + hr) * hn)
        return rms_norm(((1 - z) * n + z * state).view(K, d))
    if updater.kind == "transformer":
        h = torch.cat([memory, token[None]])
        h = reference_transformer(updater.transformer, h, range(K + 1), [range(K + 1)] * (K + 1))[:K]
        shares = [updater.scale] * K
    else:
        for norm, up, _, down in updater.layers:
            hidden = gelu(up.weight @ rms_norm(torch.cat([state, token]), norm.weight) + up.bias)
            state = state + down.weight @ hidden + down.bias
        h = state.view(K, d)
        shares = [torch.sigmoid(updater.gate.weight[0] @ one + updater.gate.bias[0]) for one in h]
    return rms_norm(torch.stack([(1 - g) * old + g * new for g, old, new in zip(shares, memory, h)]))


# ----------------------------------------------------------------------------------------------------------
# The losses: each takes the networks as they are, a row and a position at a time

def nll(logits, target):
    """-log p(target) from logits (V,)."""
    return logits.exp().sum().log() - logits[target]


def mean(values):
    return sum(values) / max(len(values), 1)


def reference_uniformity(memory_tokens):
    """(n, d) -> log of the mean over all ordered pairs."""
    u = [m / m.square().sum().sqrt() for m in memory_tokens]
    pairs = [(a, b) for a in range(len(u)) for b in range(len(u)) if a != b]
    return mean([(-2 * (u[a] - u[b]).square().sum()).exp() for a, b in pairs]).log()


def smt_losses(networks, x, y, t, config, pad):
    """The terms of smt_loss, from its docstring; few enough memory tokens for L_unif to take all."""
    names = "encoder", "decoder", "updater", "readout"
    encoder, decoder, updater, readout = (networks[name] for name in names)
    dec, dyn, read, trunk, memories, T = [], [], [], [], [], x.shape[1]
    for b in range(len(x)):
        for i in t.tolist():
            before, after = (encoder(x[b:b + 1], torch.tensor([j]))[0, 0] for j in (i - 1, i))
            memories.append(after)
            follow = [int(x[b, j]) if j < T else pad for j in range(i + 1, i + config.future_len)]
            logits = decoder(after[None], torch.tensor([follow]).long())[0]
            predicted = [j for j in range(config.future_len) if i + j < T and y[b, i + j] != IGNORE]
            dec += [nll(logits[j], y[b, i + j]) for j in predicted]
            if x[b, i] != pad:
                dyn.append((updater(before[None], x[b, i:i + 1])[0] - after).square().mean())
            if y[b, i] != IGNORE:
                read.append(nll(readout(after.detach()[None])[0], y[b, i]))
        for i in range(T if config.encoder == "causal" else 0):
            if y[b, i] != IGNORE:
                trunk.append(nll(decoder.predict(encoder.trunk(x[b:b + 1, :i + 1])[1][0, -1]), y[b, i]))
    unif = reference_uniformity(torch.stack(memories).flatten(0, 1))
    terms = dict(loss_dec=mean(dec), loss_dyn=mean(dyn), loss_unif=unif, loss_read=mean(read))
    terms |= dict(loss_trunk=mean(trunk)) if config.encoder == "causal" else {}
    weights = dict(loss_dyn=config.lambda_dyn, loss_unif=config.lambda_unif)
    return {"train_loss": sum(weights.get(name, 1) * value for name, value in terms.items()), **terms}


def dmt_losses(networks, x, y, begins, h, labelled, lambda_dyn, pad):
    """The terms of dmt_loss; the memory before each step is that of the RNN, without a gradient."""
    updater, readout, encoder = (networks[name] for name in ("updater", "readout", "encoder"))
    dyn, read = [], []
    for b in range(len(x)):
        for begin in begins.tolist():
            state = encoder(x[b:b + 1, :begin], torch.tensor([begin - 1]))[:, 0]
            for i in range(h):
                token, target = x[b:b + 1, begin + i], y[b, begin + i]
                state = updater(state.detach(), token)
                if i in labelled and token != pad:
                    label = encoder(x[b:b + 1], torch.tensor([begin + i]))[:, 0]
                    dyn.append((state - label).square().mean())
                if i in labelled and target != IGNORE:
                    read.append(nll(readout(state.detach())[0], target))
    dyn, read = mean(dyn), mean(read)
    return {"train_loss": lambda_dyn * dyn + read, "loss_dyn": dyn, "loss_read": read}


def bptt_losses(networks, x, y, truncate=0):
    """The terms of bptt_loss; the memory is detached after every `truncate` tokens."""
    read = []
    for b in range(len(x)):
        memory = normalise(networks.initial_memory)[None]
        for i in range(x.shape[1]):
            memory = memory.detach() if truncate and i and i % truncate == 0 else memory
            memory = networks["updater"](memory, x[b:b + 1, i])
            if y[b, i] != IGNORE:
                read.append(nll(networks["readout"](memory)[0], y[b, i]))
    return {"train_loss": mean(read)}
