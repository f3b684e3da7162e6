"""The four networks of Supervised Memory Training (A. Kumar and P. Isola, arXiv:2606.06479).

Glossary: code, the paper's symbol, meaning
    x, y            x_t, y_t      input tokens and the targets predicted from x_{<=t}; B rows of T
    t                             positions of a step, shared by the rows of a batch: (S,); t = -1 is "nothing read yet"
    memory          m_t           (..., K, d): K memory tokens of width d, each with unit root mean square
    initial_memory  m_empty       (K, d): the memory before anything was read; the encoder of PAD alone
    Encoder         E_phi         what to remember: the memory after reading x up to t
    Decoder         D_psi         what the memory is good for: predicts y_t .. y_{t+Tf-1} from m_t
    Updater         f_theta       the RNN's transition: m_t = f(m_{t-1}, x_t)
    Readout         g_theta       the RNN's output: predicts y_t from m_t
    context_len     T_c           tokens of past that the encoder reads (causal: that each layer looks back on)
    future_len      T_f           targets that the decoder predicts
    registers                     the paper's encoder's K learned tokens, which read the past of t and become m_t
    trunk                         of the causal encoder (ours): a causal Transformer over [PAD, x_0 ..]; x_t is at its place t + 1
    slots, present                the causal encoder's memory tokens: K - 1 gated averages of embeddings, and the last one
    V, PAD                        tokens are 0..V-1; PAD = V, "there is no token here", is one more entry of each embedding

Shapes: B rows, T tokens a row, S positions, K memory tokens, d width, h heads.
"""
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data import IGNORE, cross_entropy, futures
from runtime import DataError, UsageError, at_least_float32, captured


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the four networks."""
    encoder: str = "window"         # window: reads the last context_len tokens anew for each memory; causal: one pass for all
    updater: str = "transformer"    # the RNN's transition: transformer, mlp or gru
    d_model: int = 64               # width d of tokens and memory tokens
    n_heads: int = 4                # attention heads
    memory_tokens: int = 4          # memory tokens K
    encoder_layers: int = 2         # layers of the encoder
    decoder_layers: int = 1         # layers of the decoder, and of the readout
    updater_layers: int = 2         # layers of the updater (transformer and mlp)
    conv_width: int = 1             # tokens that the convolution below encoder and decoder spans; 1: none
    context_len: int = 256          # tokens of past that the window encoder reads (Tc); causal: that each of its layers looks back on
    future_len: int = 16            # targets that the decoder predicts (Tf)

    def __post_init__(self):
        for name in ("d_model n_heads memory_tokens encoder_layers decoder_layers updater_layers "
                     "conv_width context_len future_len").split():
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1")
        if self.encoder == "causal" and self.memory_tokens < 2:
            raise UsageError("--encoder=causal needs --memory_tokens of at least 2: one slot and the present")
        if self.d_model % (2 * self.n_heads):
            raise UsageError(f"--d_model={self.d_model} must be a multiple of 2 x n_heads = {2 * self.n_heads}")
        for name, kinds in (("encoder", ("window", "causal")), ("updater", ("transformer", "mlp", "gru"))):
            if getattr(self, name) not in kinds:
                raise UsageError(f"--{name} is one of {', '.join(kinds)}, not {getattr(self, name)!r}")


# ---------------------------------------------------------------------------------------------------------------------
# The block they share

def rope(positions, head_dim):
    """Rotary position embedding (Su et al. 2021): cos and sin of position frequency, (n, head_dim / 2, 2), for positions (n,).

    The slower half of the pairs does not turn at all: what they hold is found from any distance.
    """
    pair = torch.arange(head_dim // 2, device=positions.device)
    frequencies = torch.where(2 * pair < head_dim // 2, 10000.0 ** -(2 * pair / head_dim), 0.0)
    angles = positions[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(q, turns):
    """Turn the neighbouring pairs of q (B, n, .., h, head_dim) by the angles of their positions, turns (n, head_dim / 2, 2)."""
    pairs = at_least_float32(q).unflatten(-1, (-1, 2))
    turns = turns.view(len(turns), *[1] * (q.dim() - 3), *turns.shape[1:])
    if torch.compiler.is_compiling():       # the compiler fuses real numbers with what is around them, and cannot do complex ones
        (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:                                   # one operation; the lines above take 4 times as long on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return turned.flatten(-2).type_as(q)


class Stem(nn.Module):
    """Token embeddings, each plus a causal convolution over the last `width` of them: what a token follows is known before the
    first attention, which then finds a name by the words in front of it. x (B, n) -> (B, n, d)"""

    def __init__(self, n_tokens, d, width):
        super().__init__()
        self.embed, self.width = nn.Embedding(n_tokens, d), width
        self.mix = nn.Linear(width * d, d, bias=False) if width > 1 else None

    def forward(self, x):
        h = self.embed(x)
        if self.mix is None:
            return h
        before = F.pad(h, (0, 0, self.width - 1, 0))                                 # each window in the order of its tokens:
        return h + self.mix(torch.cat([before[:, i:i + h.shape[1]] for i in range(self.width)], dim=-1))


class Block(nn.Module):
    """Pre-norm Transformer block: h + attention(norm(h)), then h + mlp(norm(h)). (B, n, d) -> (B, n, d)"""

    def __init__(self, d, n_heads, gain=1.0):
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)
        nn.init.normal_(self.qkv.weight, std=d ** -0.5)      # attention logits of standard deviation 1: it can choose from the start
        for linear in (self.out, self.down):
            linear.weight.data.mul_(gain)

    def forward(self, h, turns, attend, kept=slice(None)):
        """(B, n, d) -> (B, kept, d): all tokens are attended to, those in `kept` are updated."""
        B, n, _ = h.shape
        qk, v = self.qkv(self.attention_norm(h)).view(B, n, 3, self.n_heads, -1).split([2, 1], dim=2)
        q, k = rotate(qk, turns).permute(2, 0, 3, 1, 4)                             # (B, h, n, d / h) each
        h, mixed = h[:, kept], attend(q[:, :, kept], k, v.squeeze(2).transpose(1, 2))
        h = h + self.out(mixed.transpose(1, 2).reshape(h.shape))
        return h + self.down(F.gelu(self.up(self.mlp_norm(h))))


def attend_to_all(q, k, v):
    """Bidirectional attention. (B, h, n, d / h) each -> the same."""
    return F.scaled_dot_product_attention(q, k, v)


def attend_to_past(q, k, v):
    """Causal attention: each token to itself and to those before. (B, h, n, d / h) each -> as q, of all tokens or the last alone."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


def attend_to_last(q, k, v, context_len):
    """Causal attention, each token to itself and to the context_len - 1 before it. k, v (B, h, m, d / h) -> as q (B, h, n, d / h).

    The queries are those of the last n of the m tokens.
    """
    n, m = q.shape[2], k.shape[2]
    if n == m <= context_len:
        return attend_to_past(q, k, v)      # a mask would rule out the fastest kernels
    age = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(age >= 0) & (age < context_len))


class Transformer(nn.Module):
    """A stack of blocks: (B, n, d) -> (B, n, d), or only its tokens `kept` (a slice). n <= length unless positions are given."""

    def __init__(self, config, n_layers, length, gain=1.0):
        super().__init__()
        self.head_dim = config.d_model // config.n_heads
        self.register_buffer("turns", rope(torch.arange(length), self.head_dim), persistent=False)
        self.blocks = nn.ModuleList(Block(config.d_model, config.n_heads, gain) for _ in range(n_layers))

    def forward(self, h, attend, kept=slice(None), positions=None):
        """positions (n,): 0..n-1 unless given. The last block computes the tokens `kept` alone, from all."""
        turns = self.turns[:h.shape[1]] if positions is None else rope(positions, self.head_dim)
        for i, block in enumerate(self.blocks, 1):
            h = block(h, turns, attend, kept if i == len(self.blocks) else slice(None))
        return h


def normalise(memory):
    """Each memory token to unit root mean square, in float32, without a gain."""
    return F.rms_norm(at_least_float32(memory), memory.shape[-1:])


# ---------------------------------------------------------------------------------------------------------------------
# The four networks

class Encoder(nn.Module):
    """E_phi, the paper's: a bidirectional Transformer over [the last Tc tokens of PAD.. x_0 .. x_t, K registers], anew for each t.

    x (B, T) int64, t (S,) int64 in -1..T-1 -> (B, S, K, d). The memory at t depends on x_{<=t} alone. No mask, one shape for a short
    past and for a sliding window. m_empty = E([PAD] * Tc).
    """

    def __init__(self, config, vocab_size):
        super().__init__()
        self.pad, self.context_len = vocab_size, config.context_len
        self.embed = Stem(vocab_size + 1, config.d_model, config.conv_width)
        self.registers = nn.Parameter(torch.randn(config.memory_tokens, config.d_model))
        self.transformer = Transformer(config, config.encoder_layers, config.context_len + config.memory_tokens)

    def forward(self, x, t):
        (B, _), S, (K, d) = x.shape, len(t), self.registers.shape
        padded = F.pad(x, (self.context_len, 0), value=self.pad)
        contexts = padded.unfold(1, self.context_len, 1)[:, t + 1].flatten(0, 1)      # (B S, Tc), the last one is x_t
        h = torch.cat([self.embed(contexts), self.registers.expand(B * S, K, d)], dim=1)
        return normalise(self.transformer(h, attend_to_all, slice(-K, None))).view(B, S, K, d)


class CausalEncoder(nn.Module):
    """E_phi, ours: all memories of a row from one pass. x (B, T) int64, t (S,) int64 in -1..T-1 -> (B, S, K, d), as Encoder.

    The trunk, a causal Transformer over [PAD, x_0 .. x_{T-1}], makes of the embedding e_j of a token its state h_j. K - 1 memory tokens
    are slots: slot k is a gated average of the embeddings, which the decoder reads as its own tokens. The last one is the present.

        g_j = sigmoid(w_k . normalise(h_j) + b_k)
        m_k(t) = normalise(s_k(t)),    s_k(t) = sum_{j <= t} g_j prod_{j < i <= t} (1 - g_i) e_j
        m_K(t) = normalise(e_t + W normalise(h_t))

    Given gate and embedding a slot is Markov, as f must be: s_k(t) = (1 - g_t) s_k(t-1) + g_t e_t. An open gate writes, a closed one holds.
    """

    def __init__(self, config, vocab_size):
        super().__init__()
        d, slots = config.d_model, config.memory_tokens - 1
        self.pad, self.context_len = vocab_size, config.context_len
        self.embed = Stem(vocab_size + 1, d, config.conv_width)
        self.transformer = Transformer(config, config.encoder_layers, config.context_len + config.memory_tokens)
        self.gate, self.present = nn.Linear(d, slots), nn.Linear(d, d, bias=False)
        self.gate.bias.data = -torch.linspace(2, 5, slots)      # the slots begin as averages over the last 7 to 150 tokens

    def trunk(self, x):
        """x (B, T) -> embeddings e and states h, (B, T+1, d) each: at place 0 of PAD, at place j+1 after x_{<=j}."""
        e = self.embed(F.pad(x, (1, 0), value=self.pad))
        positions = torch.arange(e.shape[1], device=e.device)
        return e, self.transformer(e, lambda q, k, v: attend_to_last(q, k, v, self.context_len + 1), positions=positions)

    def forward(self, x, t, trunk=None):
        """trunk: that of x, if it is known already."""
        e, h = self.trunk(x) if trunk is None else trunk
        h, end = normalise(h), (t + 1).to(h.device)                                     # x_t has the index t + 1
        with torch.autocast(h.device.type, enabled=False):      # bf16 is too coarse for gates that hold for hundreds of tokens
            e = at_least_float32(e)
            gate = self.gate(h).transpose(1, 2)                                         # (B, K-1, T+1)
            log_weight = F.logsigmoid(gate) - F.logsigmoid(-gate).cumsum(2)             # log g_j / prod_{i <= j} (1 - g_i)
            past = torch.arange(h.shape[1], device=h.device) <= end[:, None]            # (S, T+1)
            weight = log_weight[:, :, None].masked_fill(~past, -torch.inf).softmax(-1)  # s_k but for its length
            slots = (weight.flatten(1, 2) @ e).unflatten(1, weight.shape[1:3])          # (B, K-1, S, d)
        present = e[:, end] + self.present(h[:, end])
        return normalise(torch.cat([slots.transpose(1, 2), present[:, :, None]], dim=2))


class Decoder(nn.Module):
    """D_psi: a causal Transformer over [memory, x_{t+1}, ..]. memory (B, K, d), x (B, Tf-1) -> logits (B, Tf, V).

    The output at the last memory token predicts y_t, the one at x_{t+i} predicts y_{t+i}. Without a memory it is the causal Transformer
    that train_transformer.py trains: `read`.
    """

    def __init__(self, config, vocab_size):
        super().__init__()
        self.pad, self.context_len, self.future_len = vocab_size, config.context_len, config.future_len
        self.embed = Stem(vocab_size + 1, config.d_model, config.conv_width)
        self.transformer = Transformer(config, config.decoder_layers, config.memory_tokens + config.future_len - 1)
        self.norm, self.head = nn.RMSNorm(config.d_model), nn.Linear(config.d_model, vocab_size, bias=False)

    def forward(self, memory, x):
        n = x.shape[1]
        h = self.transformer(torch.cat([memory, self.embed(x)], dim=1), attend_to_past, slice(None) if n else slice(-1, None))
        return self.predict(h[:, -n - 1:])

    def start_from(self, encoder):
        """Take over the embedding and the layers of a causal encoder's trunk: a language model, which lacks only the past."""
        self.embed.load_state_dict(encoder.embed.state_dict())
        for block, trunk_block in zip(self.transformer.blocks, encoder.transformer.blocks):
            block.load_state_dict(trunk_block.state_dict())

    def predict(self, h):
        """The head alone. (.., d) -> logits (.., V)"""
        return self.head(self.norm(h))

    def read(self, x, past=None):
        """Without a memory: x (B, n) -> logits (B, n, V), which predict y at the same places, and the `past` to go on from.

        A token attends to itself and to the context_len - 1 before it. past: how many tokens came before x, the last few of them
        and, for each layer, the keys and values (B, h, m, d / h) of the last m <= context_len. However a text is divided, its
        logits are the same.
        """
        begin, recent, cached = past or (0, x[:, :0], ())
        end, kept, recent = begin + x.shape[1], [], torch.cat([recent, x], dim=1)

        def attend(q, k, v):
            if cached:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cached[len(kept)], (k, v)))     # of this layer
            kept.append((k[:, :, -self.context_len:], v[:, :, -self.context_len:]))
            return attend_to_last(q, k, v, self.context_len)

        h = self.embed(recent)[:, -x.shape[1]:]
        h = self.transformer(h, attend, positions=torch.arange(begin, end, device=x.device))
        return self.predict(h), (end, recent[:, -self.embed.width:], kept)


class Updater(nn.Module):
    """f_theta, the RNN's transition: memory (B, K, d), x (B,) -> memory (B, K, d).

    transformer: bidirectional over [memory, token]; mlp: a residual MLP on both, flattened; in either, a gate says how much of
    each memory token to replace. gru: a GRU cell whose state is the flattened memory.
    """

    def __init__(self, config, vocab_size):
        super().__init__()
        self.kind, self.pad = config.updater, vocab_size
        d, size = config.d_model, config.d_model * config.memory_tokens
        self.embed = nn.Embedding(vocab_size + 1, d)
        if self.kind == "transformer":
            self.transformer = Transformer(config, config.updater_layers, config.memory_tokens + 1, gain=0.0)
        elif self.kind == "mlp":
            self.layers = nn.ModuleList(nn.Sequential(nn.RMSNorm(size + d), nn.Linear(size + d, 2 * size), nn.GELU(),
                                                      nn.Linear(2 * size, size)) for _ in range(config.updater_layers))
            for layer in self.layers:
                nn.init.zeros_(layer[-1].weight)
                nn.init.zeros_(layer[-1].bias)
        else:
            self.cell = nn.GRUCell(d, size)
        if self.kind != "gru":
            self.gate = nn.Linear(d, 1)
            nn.init.constant_(self.gate.bias, -1.0)         # rather closed: what is held for long must hardly change in a step

    def forward(self, memory, x):
        token = self.embed(x)
        if self.kind == "gru":
            with torch.autocast(memory.device.type, enabled=False):     # in bf16 the state would be rounded at each step
                return normalise(self.cell(token, memory.flatten(1)).view_as(memory))
        if self.kind == "transformer":
            h = self.transformer(torch.cat([memory, token[:, None]], dim=1), attend_to_all, slice(memory.shape[1]))
        else:
            h = memory.flatten(1)
            for layer in self.layers:
                h = h + layer(torch.cat([h, token], dim=1))
            h = h.view_as(memory)
        return normalise(memory + self.gate(h).sigmoid() * (h - memory))


class Readout(nn.Module):
    """g_theta, the RNN's output: a causal Transformer over the memory, like the decoder. (B, K, d) -> logits (B, V), at the last token."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.transformer = Transformer(config, config.decoder_layers, config.memory_tokens)
        self.norm, self.head = nn.RMSNorm(config.d_model), nn.Linear(config.d_model, vocab_size, bias=False)

    def forward(self, memory):
        return self.head(self.norm(self.transformer(memory, attend_to_past, slice(-1, None))[:, -1]))

    def start_from(self, decoder):
        """Take over the decoder's layers and head: it then predicts what the decoder does from the memory alone."""
        for block, theirs in zip(self.transformer.blocks, decoder.transformer.blocks):
            block.load_state_dict(theirs.state_dict())
        self.norm.load_state_dict(decoder.norm.state_dict())
        self.head.load_state_dict(decoder.head.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# What is asked of a memory

PARTS = 3              # of a batch of futures, by their length
READOUTS = 32768       # memories in a call of the readout: CUDA's attention kernels refuse a batch of 65536


def parts_of(y):
    """Targets y (n, m) in parts, [(rows, length)]: together the rows in which anything is asked, the shortest first, each part as
    far as the last target asked in it. At least one row, and two of m > 1 targets, so that each parameter has its gradient.

    All in one, and in full, on CUDA and where it is compiled: there a new shape costs more than is saved.
    """
    n, m = y.shape
    if y.device.type != "cpu" or torch.compiler.is_compiling():
        return [(slice(None), m)]
    lengths = ((y != IGNORE) * torch.arange(1, m + 1)).amax(1)
    order = lengths.argsort()[min(int((lengths == 0).sum()), n - 1):]
    return [(rows, min(m, max(2, int(lengths[rows[-1]])))) for rows in order.chunk(PARTS if m > 1 else 1)]


def decoder_loss(networks, memories, x, y, t, future_len):
    """Sum of CE(D(m_t, x_{t+1..t+Tf-1}), y_{t..t+Tf-1}) over rows x, y (B, T) and positions t (S,), from m_t (B, S, K, d)."""
    future_x, future_y = (part.flatten(0, 1) for part in futures(x, y, t, future_len, networks["decoder"].pad))
    memories, loss = memories.flatten(0, 1), 0
    for rows, length in parts_of(future_y):
        logits = networks["decoder"](memories[rows], future_x[rows, :length - 1])           # (rows, length, V)
        loss = loss + cross_entropy(logits, future_y[rows, :length])
    return loss


def readout_loss(networks, memories, y):
    """Sum of CE(g(m_t), y_t) from m_t (B, S, K, d) at the targets y (B, S)."""
    memories, y, loss = memories.flatten(0, 1), y.reshape(-1, 1), 0
    for rows, _ in parts_of(y):
        for part, targets in zip(memories[rows].split(READOUTS), y[rows].split(READOUTS)):
            loss = loss + cross_entropy(networks["readout"](part), targets)
    return loss


def squared_error(predicted, memories, real):
    """Sum over the real transitions (..) of the mean squared error of predicted memories against the encoder's, (.., K, d) each."""
    return ((predicted - memories).square().mean((-2, -1)) * real).sum()


# ---------------------------------------------------------------------------------------------------------------------
# The recurrence, and what a checkpoint holds

def roll_out(updater, memory, x):
    """Run the RNN over x (B, T) from memory (B, K, d): the memories after each token, (B, T, K, d). One step after the other."""
    memories = []
    for token in x.unbind(1):
        memory = updater(memory, token)
        memories.append(memory)
    return torch.stack(memories, dim=1)


GRAPH_STEPS = 64       # of a roll-out in one CUDA graph; a longer one replays it
roll_out_window = captured(roll_out)


def roll_out_without_gradients(updater, memory, x):
    """roll_out for inference; on CUDA a graph is replayed instead of thousands of launches."""
    memories = []
    for window in x.split(GRAPH_STEPS, dim=1):
        memories.append(roll_out_window(updater, memory, window))
        memory = memories[-1][:, -1]
    return torch.cat(memories, dim=1)


NETWORKS = {"encoder": lambda config, V: (CausalEncoder if config.encoder == "causal" else Encoder)(config, V),
            "decoder": Decoder, "updater": Updater, "readout": Readout}


def empty_memory(encoder):
    """m_empty (K, d): the memory before anything was read."""
    device = next(encoder.parameters()).device
    return encoder(torch.empty(1, 0, dtype=torch.long, device=device), torch.tensor([-1], device=device))[0, 0]


def build(config, vocab_size, names=tuple(NETWORKS)):
    """The named networks of a ModelConfig (or of a stage's config that extends it) as one nn.ModuleDict.

    Right after a torch.manual_seed a network gets weights of its own, whichever others are asked for: so the stages compare.
    """
    networks, seed = nn.ModuleDict(), torch.initial_seed()
    for i, (name, network) in enumerate(NETWORKS.items()):
        if name in names:
            torch.manual_seed((len(NETWORKS) * seed + i) % 2**63)       # no two seeds share one
            networks[name] = network(config, vocab_size)
    return networks


def restore(checkpoint, device="cpu"):
    """What a checkpoint holds: its ModelConfig, its networks with their weights, and m_empty (K, d), (0, d) for a Transformer.

    DataError if it does not fit.
    """
    try:
        config = ModelConfig(**checkpoint["model_config"])
        names = [name for name in NETWORKS if any(key.startswith(name + ".") for key in checkpoint["model"])]
        networks = build(config, checkpoint["data"]["vocab_size"], names)
        networks.load_state_dict({key: w for key, w in checkpoint["model"].items() if key.split(".")[0] in names})
        K = config.memory_tokens if "updater" in names else 0     # a Transformer alone has no memory
        initial_memory = checkpoint["initial_memory"].view(K, config.d_model)
    except (RuntimeError, TypeError, KeyError, AttributeError, UsageError) as error:
        raise DataError(f"the checkpoint does not fit this architecture: {error}") from None
    return config, networks.to(device), initial_memory.to(device)


def model_fields(config):
    """The fields of ModelConfig in a stage's config that extends it, as a dict."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig)}


def parameter_counts(networks):
    """One line: the parameters of each network and of all."""
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return "parameters: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()) + f", in all {sum(counts.values()):,}"
