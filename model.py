"""The four networks of Supervised Memory Training (A. Kumar and P. Isola, arXiv:2606.06479).

Glossary: code, the paper's symbol, meaning
    x, y            x_t, y_t      input tokens, and the targets predicted from x_{<=t}; B rows of T
    t                             positions, shared by the rows of a batch: (S,); t = -1 is "nothing read yet"
    memory          m_t           (..., K, d): K memory tokens of width d, each with unit root mean square
    initial_memory  m_empty       (K, d): the memory before anything was read; the encoder of PAD alone
    Encoder         E_phi         what to remember: the memory after reading x up to t
    Decoder         D_psi         what the memory is good for: predicts y_t .. y_{t+Tf-1} from m_t
    Updater         f_theta       the RNN's transition: m_t = f(m_{t-1}, x_t)
    Readout         g_theta       the RNN's output: predicts y_t from m_t
    context_len     Tc            tokens that the encoder reads (causal: how far each layer looks back)
    future_len      Tf            targets that the decoder predicts
    registers                     K learned tokens of the paper's encoder: they read the past and become m_t
    V, PAD, IGNORE                tokens are 0..V-1; PAD = V in x: no token; IGNORE = -1 in y: no target

The causal encoder, the last network in this file, is ours; so are the convolution of Stem, the kind mlp of
Updater, and the other departures that README.md lists. Shapes: B rows, T tokens a row, S positions, h heads.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lib.cli import UsageError, check_fields
from lib.graphs import captured

IGNORE = -1


@dataclass(frozen=True)
class RNNConfig:
    """Sizes of the RNN: updater and readout."""
    updater: Literal["transformer", "mlp", "gru"] = "transformer"       # kind of the RNN's transition
    d_model: int = 64               # width d of tokens and memory tokens
    n_heads: int = 4                # attention heads
    memory_tokens: int = 4          # memory tokens K
    updater_layers: int = 2         # layers of the updater (transformer and mlp)
    decoder_layers: int = 1         # layers of the decoder, and of the readout

    def __post_init__(self):
        check_fields(self, "d_model n_heads memory_tokens updater_layers decoder_layers")
        if self.d_model % (2 * self.n_heads):
            raise UsageError(f"--d_model={self.d_model} must be a multiple of 2 x n_heads")


@dataclass(frozen=True)
class ModelConfig(RNNConfig):
    """Sizes of the RNN and of its teachers, encoder and decoder."""
    encoder: Literal["window", "causal"] = "window"     # window: the paper's; causal: ours, one pass
    encoder_layers: int = 2         # layers of the encoder
    conv_width: int = 1             # tokens that the convolution below encoder and decoder spans; 1: none
    context_len: int = 256          # tokens that the encoder reads (Tc); causal: how far a layer looks back
    future_len: int = 16            # targets that the decoder predicts (Tf)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, "encoder_layers conv_width context_len future_len")
        if self.encoder == "causal" and self.memory_tokens < 2:
            raise UsageError("--encoder=causal needs --memory_tokens of at least 2: one slot and the present")
        if self.encoder == "causal" and self.encoder_layers != self.decoder_layers:
            raise UsageError("--encoder=causal needs as many --encoder_layers as --decoder_layers")


# ------------------------------------------------------------------------------------------------------------
# What the networks are made of

def rope(positions, head_dim):
    """Rotary position embedding (Su et al. 2021) of positions (n,): cos, signed sin (2, n, 1, 1, head_dim).

    Component i of a head turns with component i + head_dim / 2. The slower half of these pairs does not turn,
    so that attention matches what they hold at any distance.
    """
    pair = torch.arange(head_dim // 2, device=positions.device)
    frequencies = torch.where(2 * pair < head_dim // 2, 10000.0 ** -(2 * pair / head_dim), 0.0)
    angles = positions[:, None, None, None] * frequencies                        # (n, 1, 1, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def rotate(qk, turns):
    """Turn queries and keys qk (B, n, 2, h, head_dim) by the angles of their positions, turns of `rope`."""
    cos, sin = turns
    return (qk * cos + qk.roll(qk.shape[-1] // 2, -1) * sin).type_as(qk)


def normalise(memory):
    """Each memory token to unit root mean square, in float32, without a gain."""
    return F.rms_norm(at_least_float32(memory), memory.shape[-1:])


def at_least_float32(x):
    """bf16 to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Stem(nn.Module):
    """Token embeddings, plus a causal convolution over the last `width` of them. x (B, n) -> (B, n, d)

    The first attention can then find a token by the tokens before it.
    """

    def __init__(self, n_tokens, d, width):
        super().__init__()
        self.embed, self.width = nn.Embedding(n_tokens, d), width
        self.mix = nn.Linear(width * d, d, bias=False) if width > 1 else None

    def forward(self, x):
        h = self.embed(x)
        if self.mix is None:
            return h
        padded, n = F.pad(h, (0, 0, self.width - 1, 0)), h.shape[1]
        windows = torch.cat([padded[:, i:i + n] for i in range(self.width)], dim=-1)    # oldest first
        return h + self.mix(windows)


class Block(nn.Module):
    """Pre-norm Transformer block: h + attention(norm(h)), then h + mlp(norm(h)). (B, n, d) -> (B, n, d)"""

    def __init__(self, d, n_heads, gain=1.0):
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)
        nn.init.normal_(self.qkv.weight, std=d ** -0.5)     # attention logits of standard deviation 1
        for linear in (self.out, self.down):
            linear.weight.data.mul_(gain)

    def forward(self, h, turns, attend, outputs=slice(None)):
        """(B, n, d) -> the tokens in the slice `outputs`, after attention to all n."""
        qkv = self.qkv(self.attention_norm(h)).unflatten(-1, (3, self.n_heads, -1))
        (q, k), v = rotate(qkv[:, :, :2], turns).unbind(2), qkv[:, :, 2]            # (B, n, h, d / h) each
        q, k, v = (part.transpose(1, 2) for part in (q[:, outputs], k, v))
        h = h[:, outputs]
        h = h + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.mlp_norm(h))))


def attend_to_all(q, k, v):
    """Bidirectional attention. (B, h, n, d / h) each -> the same."""
    return F.scaled_dot_product_attention(q, k, v)


def attend_to_past(q, k, v):
    """Causal attention. (B, h, n, d / h) each -> as q, whose tokens are all n or the last one alone."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


def attend_to_last(q, k, v, context_len):
    """Causal attention to the last context_len tokens, itself among them. (B, h, n, d / h) each -> as q."""
    n = k.shape[2]
    if n <= context_len:
        return attend_to_past(q, k, v)      # a mask would rule out the fastest kernels
    age = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(age >= 0) & (age < context_len))


class Transformer(nn.Module):
    """A stack of blocks: (B, n, d) -> (B, n, d), or a slice of its outputs."""

    def __init__(self, config, n_layers, length, gain=1.0):
        super().__init__()
        self.head_dim = config.d_model // config.n_heads
        self.register_buffer("turns", rope(torch.arange(length), self.head_dim), persistent=False)
        self.blocks = nn.ModuleList(Block(config.d_model, config.n_heads, gain) for _ in range(n_layers))

    def forward(self, h, attend, outputs=slice(None)):
        n, turns = h.shape[1], self.turns
        if n > turns.shape[1]:
            turns = rope(torch.arange(n, device=h.device), self.head_dim)
        turns = turns[:, :n]
        for block in self.blocks[:-1]:
            h = block(h, turns, attend)
        return self.blocks[-1](h, turns, attend, outputs)       # the last layer computes only what is used


# ------------------------------------------------------------------------------------------------------------
# The four networks

class Encoder(nn.Module):
    """E_phi: a bidirectional Transformer over [the last Tc tokens of PAD.. x_0 .. x_t, K registers].

    x (B, T) int64, t (S,) int64 in -1..T-1 -> (B, S, K, d), computed anew for each t, from x_{<=t} alone. PAD
    before the first token makes all inputs equally long, without a mask. m_empty = E([PAD] * Tc).
    """

    def __init__(self, config, vocab_size):
        super().__init__()
        self.pad, self.context_len = vocab_size, config.context_len
        self.embed = Stem(vocab_size + 1, config.d_model, config.conv_width)
        self.registers = nn.Parameter(torch.randn(config.memory_tokens, config.d_model))
        length = config.context_len + config.memory_tokens
        self.transformer = Transformer(config, config.encoder_layers, length)

    def forward(self, x, t):
        (B, _), S, (K, d) = x.shape, len(t), self.registers.shape
        padded = F.pad(x, (self.context_len, 0), value=self.pad)
        contexts = padded.unfold(1, self.context_len, 1)[:, t + 1].flatten(0, 1)   # (B S, Tc), each up to x_t
        h = torch.cat([self.embed(contexts), self.registers.expand(B * S, K, d)], dim=1)
        return normalise(self.transformer(h, attend_to_all, slice(-K, None))).view(B, S, K, d)


class Decoder(nn.Module):
    """D_psi: a causal Transformer over [memory, x_{t+1}, ..]. (B, K, d), x (B, n) -> logits (B, n + 1, V).

    The output at the last memory token predicts y_t, the one at x_{t+i} predicts y_{t+i}; n < Tf.
    """

    def __init__(self, config, vocab_size):
        super().__init__()
        self.pad, self.future_len = vocab_size, config.future_len
        self.embed = Stem(vocab_size + 1, config.d_model, config.conv_width)
        length = config.memory_tokens + config.future_len - 1
        self.transformer = Transformer(config, config.decoder_layers, length)
        self.norm, self.head = nn.RMSNorm(config.d_model), nn.Linear(config.d_model, vocab_size, bias=False)

    def forward(self, memory, x):
        n, h = x.shape[1], torch.cat([memory, self.embed(x)], dim=1)
        outputs = slice(None) if n else slice(-1, None)         # the mask needs all queries or the last
        h = self.transformer(h, attend_to_past, outputs)
        return self.predict(h[:, -n - 1:])

    def predict(self, h):
        """The head alone. (.., d) -> logits (.., V)"""
        return self.head(self.norm(h))


class Updater(nn.Module):
    """f_theta, the RNN's transition: memory (B, K, d), x (B,) -> memory (B, K, d).

    transformer: bidirectional over [memory, token]; a learned scale for each channel multiplies the change
    that it proposes (LayerScale, Touvron et al. 2021). mlp: a residual MLP of 4 d hidden units on memory and
    token, flattened; a gate for each memory token multiplies the change. Both begin as the identity, because
    one step changes little of a memory. gru: a GRU cell whose state is the flattened memory.
    """

    def __init__(self, config, vocab_size):
        super().__init__()
        self.kind, self.pad = config.updater, vocab_size
        d, size = config.d_model, config.d_model * config.memory_tokens
        self.embed = nn.Embedding(vocab_size + 1, d)
        if self.kind == "transformer":
            self.transformer = Transformer(config, config.updater_layers, config.memory_tokens + 1, gain=0.0)
            self.scale = nn.Parameter(torch.full((d,), 0.1))    # a gate would close before f has learned
        elif self.kind == "mlp":
            self.layers = nn.ModuleList(
                nn.Sequential(nn.RMSNorm(size + d), nn.Linear(size + d, 4 * d), nn.GELU(),
                              nn.Linear(4 * d, size)) for _ in range(config.updater_layers))
            for layer in self.layers:
                nn.init.zeros_(layer[-1].weight)
                nn.init.zeros_(layer[-1].bias)
            self.gate = nn.Linear(d, 1)
            nn.init.constant_(self.gate.bias, -1.0)             # rather closed
        else:
            self.input, self.hidden = nn.Linear(d, 3 * size), nn.Linear(size, 3 * size)

    def forward(self, memory, x):
        token = self.embed(x)
        if self.kind == "gru":
            with torch.autocast(memory.device.type, enabled=False):     # no bf16: rounding adds up
                state = memory.flatten(1)
                (xr, xz, xn), (hr, hz, hn) = self.input(token).chunk(3, 1), self.hidden(state).chunk(3, 1)
                reset, hold = (xr + hr).sigmoid(), (xz + hz).sigmoid()
                state = hold * state + (1 - hold) * (xn + reset * hn).tanh()
                return normalise(state.view_as(memory))
        if self.kind == "transformer":
            h = torch.cat([memory, token[:, None]], dim=1)
            h, scale = self.transformer(h, attend_to_all, slice(memory.shape[1])), self.scale
        else:
            h = memory.flatten(1)
            for layer in self.layers:
                h = h + layer(torch.cat([h, token], dim=1))
            h = h.view_as(memory)
            scale = self.gate(h).sigmoid()
        return normalise(memory + scale * (h - memory))


class Readout(nn.Module):
    """g_theta, the RNN's output: a causal Transformer over the memory. (B, K, d) -> logits (B, V)."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.transformer = Transformer(config, config.decoder_layers, config.memory_tokens)
        self.norm, self.head = nn.RMSNorm(config.d_model), nn.Linear(config.d_model, vocab_size, bias=False)

    def forward(self, memory):
        return self.head(self.norm(self.transformer(memory, attend_to_past, slice(-1, None))[:, -1]))

    def start_from(self, decoder):
        """Take over the decoder's layers and head: g(m) is then the decoder's first prediction (in DMT)."""
        for name in ("transformer", "norm", "head"):
            getattr(self, name).load_state_dict(getattr(decoder, name).state_dict())


def roll_out(updater, memory, x):
    """Run the RNN over x (B, T) from memory (B, K, d): the memories (B, T, K, d) after each token."""
    memories = []
    for token in x.unbind(1):
        memory = updater(memory, token)
        memories.append(memory)
    return torch.stack(memories, dim=1)


GRAPH_STEPS = 64       # of a roll-out in one CUDA graph
roll_out_window = captured(roll_out)


def roll_out_without_gradients(updater, memory, x):
    """roll_out for inference. On CUDA a graph of GRAPH_STEPS steps replaces thousands of launches."""
    memories = []
    for window in x.split(GRAPH_STEPS, dim=1):
        memories.append(roll_out_window(updater, memory, window))
        memory = memories[-1][:, -1]
    return torch.cat(memories, dim=1)


# ------------------------------------------------------------------------------------------------------------
# Terms of the losses, as sums: the train scripts divide them by the counts of the global batch

def cross_entropy(logits, y):
    """Sum over the targets y (...) that are not IGNORE, of logits (..., V); in float32 despite autocast."""
    logits = at_least_float32(logits).flatten(0, -2)
    return F.cross_entropy(logits, y.flatten(), ignore_index=IGNORE, reduction="sum")


def squared_error(predicted, memories, valid):
    """Sum over the valid transitions (..) of MSE(predicted, memories), (.., K, d) each."""
    return ((predicted - memories).square().mean((-2, -1)) * valid).sum()


def futures(x, y, t, future_len, pad):
    """The decoder's inputs x_{t+1..t+Tf-1} (B, S, Tf-1) and targets y_{t..t+Tf-1} (B, S, Tf) at t (S,)."""
    ahead = t[:, None] + torch.arange(future_len, device=t.device)
    future_y = F.pad(y, (0, future_len), value=IGNORE)[:, ahead]
    future_x = F.pad(x, (0, future_len), value=pad)[:, ahead[:, 1:]]
    return future_x, future_y


def decoder_loss(networks, memories, x, y, t, future_len):
    """Sum of CE(D(m_t, x_{t+1..t+Tf-1}), y_{t..t+Tf-1}) at t (S,) of x, y (B, T), from m_t (B, S, K, d)."""
    both = futures(x, y, t, future_len, networks["decoder"].pad)
    memories, future_x, future_y = (part.flatten(0, 1) for part in (memories, *both))
    loss = 0
    for rows, length in chunks_by_length(future_y):
        logits = networks["decoder"](memories[rows], future_x[rows, :length - 1])          # (rows, length, V)
        loss = loss + cross_entropy(logits, future_y[rows, :length])
    return loss


def readout_loss(networks, memories, y):
    """Sum of CE(g(m_t), y_t) from m_t (.., K, d) at the targets y (..)."""
    memories, y, loss = memories.flatten(0, -3), y.reshape(-1, 1), 0
    for rows, _ in chunks_by_length(y):
        loss = loss + cross_entropy(networks["readout"](memories[rows]), y[rows, 0])
    return loss


CHUNKS = 3             # on a CPU: chunks of a batch of futures
CHUNK_ROWS = 32_768    # elsewhere: rows of a chunk, because CUDA's attention kernels refuse 65,536


def chunks_by_length(y):
    """Split targets y (n, m) into chunks [(rows, length)].

    On a CPU the rows are sorted by length, up to the last target, and each chunk is trimmed to its longest.
    Rows without a target are left out; if none has one, a single row stays, so that every weight has a
    gradient. Elsewhere, and under torch.compile, rows stay whole: a new shape costs more than it saves.
    """
    n, m = y.shape
    if y.device.type != "cpu" or torch.compiler.is_compiling():
        return [(slice(i, i + CHUNK_ROWS), m) for i in range(0, n, CHUNK_ROWS)]
    lengths = ((y != IGNORE) * torch.arange(1, m + 1)).amax(1)
    order = lengths.argsort()[min(int((lengths == 0).sum()), n - 1):]
    return [(rows, max(1, int(lengths[rows[-1]]))) for rows in order.chunk(CHUNKS if m > 1 else 1)]


# ------------------------------------------------------------------------------------------------------------
# Our encoder

class CausalEncoder(nn.Module):
    """E_phi, ours: all memories of a row from one pass. x (B, T), t (S,) -> (B, S, K, d), as Encoder.

    The trunk, a causal Transformer over [PAD, x_0 .. x_{T-1}], turns the embedding e_j of a token into its
    state h_j. K - 1 memory tokens are slots: slot k is a gated average of the embeddings so far, which the
    decoder reads like its own tokens. The last memory token is the present.

        g_{k,j} = sigmoid(w_k . normalise(h_j) + b_k)
        m_k(t)  = normalise(s_k(t)),   s_k(t) = sum_{j <= t} g_{k,j} prod_{j < i <= t} (1 - g_{k,i}) e_j
        m_K(t)  = normalise(e_t + W normalise(h_t))

    with e_{-1}, h_{-1} of PAD. An open gate writes, a closed one holds: s_k(t) = (1 - g_{k,t}) s_k(t-1) +
    g_{k,t} e_t. So f can follow a slot: it moves m_k towards e_t. f has to infer the gate, and what the
    convolution adds to the embedding of x_t, from m_{t-1} and x_t.
    """

    def __init__(self, config, vocab_size):
        super().__init__()
        d, slots = config.d_model, config.memory_tokens - 1
        self.pad, self.context_len = vocab_size, config.context_len
        self.embed = Stem(vocab_size + 1, d, config.conv_width)
        self.transformer = Transformer(config, config.encoder_layers, config.context_len + 1)
        self.gate, self.present = nn.Linear(d, slots), nn.Linear(d, d, bias=False)
        self.gate.bias.data = -torch.linspace(2, 5, slots)      # at first the averages span 8 to 150 tokens

    def trunk(self, x):
        """x (B, T) -> embeddings e and states h, (B, T+1, d) each: index 0 is PAD, index j + 1 is x_j."""
        e = self.embed(F.pad(x, (1, 0), value=self.pad))
        return e, self.transformer(e, lambda q, k, v: attend_to_last(q, k, v, self.context_len + 1))

    def forward(self, x, t, trunk=None):
        """trunk: self.trunk(x), where the caller has it already."""
        e, h = self.trunk(x) if trunk is None else trunk
        h, end = normalise(h), (t + 1).to(h.device)                                  # x_t has the index t + 1
        with torch.autocast(h.device.type, enabled=False):      # bf16 rounds small gates
            e = at_least_float32(e)
            gate = self.gate(h).transpose(1, 2)                                         # logits (B, K-1, T+1)
            # the weights without prod_{i <= t} (1 - g_i), which all j share: normalise cancels it
            log_weight = F.logsigmoid(gate) - F.logsigmoid(-gate).cumsum(2)    # g_j / prod_{i <= j} (1 - g_i)
            past = torch.arange(h.shape[1], device=h.device) <= end[:, None]            # (S, T+1)
            weight = log_weight[:, :, None].masked_fill(~past, -torch.inf).softmax(-1)      # (B, K-1, S, T+1)
            slots = (weight.flatten(1, 2) @ e).unflatten(1, weight.shape[1:3])  # s_k, scaled (B, K-1, S, d)
        present = e[:, end] + self.present(h[:, end])
        return normalise(torch.cat([slots.transpose(1, 2), present[:, :, None]], dim=2))

    def start_decoder(self, decoder):
        """Give the decoder the trunk's embedding and layers: a language model, which lacks only the past."""
        decoder.embed.load_state_dict(self.embed.state_dict())
        decoder.transformer.load_state_dict(self.transformer.state_dict())


# ------------------------------------------------------------------------------------------------------------

ENCODERS = {"window": Encoder, "causal": CausalEncoder}
NETWORKS = {"encoder": lambda config, V: ENCODERS[config.encoder](config, V), "decoder": Decoder,
            "updater": Updater, "readout": Readout}


def build(config, vocab_size, names=tuple(NETWORKS)):
    """The named networks of an RNNConfig (updater, readout) or ModelConfig (all) as one nn.ModuleDict.

    After a torch.manual_seed the weights of a network do not depend on which others are built: SMT and BPTT
    start from the same RNN.
    """
    networks, seed = nn.ModuleDict(), torch.initial_seed()
    for i, (name, network) in enumerate(NETWORKS.items()):
        if name in names:
            torch.manual_seed((len(NETWORKS) * seed + i) % 2**63)       # seeds do not overlap
            networks[name] = network(config, vocab_size)
    return networks


def empty_memory(encoder):
    """m_empty (K, d): the memory before anything was read."""
    device = next(encoder.parameters()).device
    nothing = torch.empty(1, 0, dtype=torch.long, device=device)
    return encoder(nothing, torch.tensor([-1], device=device))[0, 0]
