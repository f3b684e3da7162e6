"""Supervised Memory Training: learn what to remember and, in parallel over time, how to update it.

    python train_smt.py                                        # fables, preset tiny, a few minutes on a laptop
    python train_smt.py --dataset=retrieval                    # a synthetic task
    python train_smt.py --dataset=tinystories --preset=tiny    # real text on a CPU
    torchrun --nproc_per_node=8 train_smt.py --dataset=mnist   # the paper's sizes on 8 GPUs

Writes runs/<dataset>-smt; train_dmt.py goes on from there.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data as datasets
import runtime
import tasks
from data import IGNORE
from evaluate import evaluate
from model import ModelConfig, build, chain_flops, forward_flops, model_fields, parameter_counts, roll_out
from runtime import RunConfig, UsageError

UNIFORMITY_ROWS = 8       # rows whose memory tokens are pushed apart together, so that rows on other processes need not be known
UNIFORMITY_TOKENS = 512   # memory tokens looked at in each such group, at most


@dataclass(frozen=True)
class Config(ModelConfig, RunConfig):
    """What train_smt.py can be told, beside what all train scripts can."""
    seq_len: int = 0                # tokens T of a training row; 0: the longest document, for text context_len
    positions: int = 1              # positions S of each row that get a memory, drawn anew each step; 0: all of them
    decode_every: int = 1           # a long future is decoded at one in so many of these positions
    unroll: int = 1                 # steps of the transition in a row between two memories of the encoder; more need --positions=0
    trunk_iters: int = 0            # first iterations that train the causal encoder's trunk alone, as a language model; half of them at most
    p_start: float = 0.5            # share of the rows that begin at a document's start; the others begin anywhere (text only)
    lambda_dec: float = 1.0         # weight of the decoder's loss
    lambda_near: float = 0.0        # extra weight of the decoder's first target, which it predicts from the memory alone
    lambda_own: float = 0.0         # weight of the decoder's first target from the memories that the transition predicts
    lambda_trunk: float = 0.0       # weight of the next-token loss of the causal encoder's trunk
    lambda_dyn: float = 0.1         # weight of the dynamics loss
    lambda_unif: float = 0.001      # weight of the uniformity loss
    lambda_read: float = 1.0        # weight of the readout's loss
    detach: bool = False            # train the transition on detached memories: the dynamics do not shape the encoder

    def __post_init__(self):
        ModelConfig.__post_init__(self)
        RunConfig.__post_init__(self)
        if min(self.positions, self.seq_len) < 0 or not 0 <= self.p_start <= 1:
            raise UsageError("--positions and --seq_len are at least 0, --p_start from 0 to 1")
        if not 1 <= self.decode_every <= (self.positions or math.inf):
            raise UsageError("--decode_every is from 1 to --positions")
        if self.unroll < 1 or self.unroll > 1 and self.positions:
            raise UsageError("--unroll is at least 1; more than 1 needs the memories of all positions, --positions=0")
        if (self.lambda_trunk or self.trunk_iters) and self.encoder != "causal":
            raise UsageError("--lambda_trunk and --trunk_iters are for --encoder=causal: the window encoder has no trunk that could predict")
        if self.trunk_iters < 0:
            raise UsageError(f"--trunk_iters={self.trunk_iters} must not be negative")


PRESETS = {
    "tiny": dict(encoder="causal", d_model=64, n_heads=4, memory_tokens=4, encoder_layers=3, decoder_layers=1, updater_layers=2,
                 readout_layers=1, conv_width=8, context_len=220, future_len=64, positions=0, decode_every=10, unroll=16, p_start=0.9,
                 trunk_iters=1000, lambda_near=1.0, lambda_own=1.0, lambda_trunk=1.0, lambda_dyn=1.0, lambda_unif=0.1,
                 batch_size=4, max_iters=2700, lr=3e-3, eval_interval=500, log_interval=50),
    "tiny/tinystories": dict(context_len=128, seq_len=256, future_len=16, p_start=0.5, trunk_iters=2000, max_iters=5000),
    "tiny/text": dict(context_len=128, seq_len=256, future_len=16, p_start=0.5),
    "small": dict(encoder="causal", d_model=128, n_heads=4, memory_tokens=8, encoder_layers=4, decoder_layers=2, updater_layers=4,
                  readout_layers=2, conv_width=8, context_len=256, future_len=64, positions=0, decode_every=16, unroll=16,
                  trunk_iters=2000, lambda_near=1.0, lambda_own=1.0, lambda_trunk=1.0, lambda_dyn=1.0, lambda_unif=0.1,
                  batch_size=32, max_iters=20_000, lr=1e-3, eval_interval=1000, log_interval=50),
    "paper": dict(d_model=256, n_heads=8, memory_tokens=16, encoder_layers=8, decoder_layers=4, updater_layers=8,
                  readout_layers=4, context_len=256, future_len=64, batch_size=128, max_iters=150_000, lr=3e-4,
                  lr_decay="constant", eval_interval=5000, eval_len=1024, log_interval=100),
}
SYNTHETIC = dict(register_layers=3, conv_width=1, memory_tokens=2, updater_layers=1, future_len=32, positions=4, decode_every=1, unroll=1,
                 trunk_iters=0, lambda_near=0.0, lambda_own=0.0, lambda_trunk=0.0, lambda_dyn=0.1, lambda_unif=0.001,
                 batch_size=64, max_iters=400, lr=2e-3, eval_interval=100)
PRESETS |= {f"tiny/{name}": SYNTHETIC for name in tasks.TASKS}


# ---------------------------------------------------------------------------------------------------------------------
# The objective

def futures(x, y, t, future_len, pad):
    """What the decoder reads and predicts after each position t (S,): x_{t+1..t+Tf-1} (B, S, Tf-1), y_{t..t+Tf-1} (B, S, Tf)."""
    ahead = t[:, None] + torch.arange(future_len, device=t.device)
    future_y = F.pad(y, (0, future_len), value=IGNORE)[:, ahead]
    future_x = F.pad(x, (0, future_len), value=pad)[:, ahead[:, 1:]]
    return future_x, future_y


def runs_of(t, T, unroll):
    """The positions (R, unroll) of the runs in which the transition is trained: each of t (S,) alone, or, if the runs are longer,
    side by side over the row of T tokens, from a random place on (t is in random order)."""
    if unroll == 1:
        return t[:, None]
    n = max(1, (T - unroll + 1) // unroll)
    steps = torch.arange(n * unroll, device=t.device).view(n, unroll)
    return steps + t[0] % (T - n * unroll + 1)


def count_terms(x, y, t, config, pad):
    """The denominators of the means, (5,): targets decoded, transitions trained, targets after them, targets at t, all targets."""
    T, (_, future_y) = x.shape[1], futures(x, y, t[::config.decode_every], config.future_len, pad)
    runs = runs_of(t, T, config.unroll)
    return torch.stack([(future_y != IGNORE).sum(), (x[:, runs] != pad).sum(),
                        *((some != IGNORE).sum() for some in (y[:, runs], y[:, t], y))])


def cross_entropy(logits, y):
    """Sum of the cross-entropies of the targets y (...) that are asked, given logits (..., V); autocast keeps it in float32."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=IGNORE, reduction="sum")


def uniformity(memory):
    """log mean_{a != b} exp(-2 |u_a - u_b|^2) over the L2-normalised memory tokens of (n, d); 0 if all are the same."""
    if len(memory) == 1:
        return memory.new_zeros(())
    u = F.normalize(memory, dim=-1)
    distance = 2 - 2 * u @ u.T
    others = ~torch.eye(len(u), dtype=torch.bool, device=u.device)
    return (-2 * distance).masked_fill(~others, -torch.inf).flatten().logsumexp(0) - math.log(len(u) * (len(u) - 1))


def trunk_loss(networks, trunk, y, count):
    """L_trunk = CE(head of D(trunk of E at t), y_t) at every t: the causal encoder's trunk as a language model (not in the paper).

    trunk (B, T+1, d) as of Encoder.trunk, y (B, T). These rows' share of the mean over the global batch, which has `count` targets.
    """
    return cross_entropy(networks["decoder"].predict(trunk[:, 1:]), y) / count.clamp(min=1)


def trunk_phase(config):
    """How many first iterations train the trunk alone: half of a short run at most, in whole log lines, so that none averages both."""
    most = min(config.trunk_iters, config.max_iters // 2)
    return most - most % config.log_interval


def smt_loss(networks, x, y, t, counts, config):
    """The joint objective on rows x, y (B, T) at positions t (S,), in random order, with m_t = E(x_{<=t}) and m_{-1} = m_empty:

        L_dec   = CE(D(m_t, x_{t+1..t+Tf-1}), y_{t..t+Tf-1}) at one in decode_every positions
        L_near  = CE(D(m_t), y_t)                            its first target again, at every position (not in the paper)
        L_dyn   = MSE(f(m_{t-1}, x_t), m_t)                  its gradients reach E through both memories
        L_own   = CE(D(f(m_{t-1}, x_t)), y_t)                what f must get right is what the decoder needs (not in the paper)
        L_unif  = log mean_{a != b} exp(-2 |u_a - u_b|^2)    memory tokens apart from each other
        L_read  = CE(g(stop_gradient(m_t)), y_t)             trains the readout only
        L_trunk                                              see trunk_loss

    With unroll > 1, f goes on from its own memory for so many steps: L_dyn and L_own are over all of them. Each term is these
    rows' share of the mean over the global batch of config.batch_size rows, which has counts (5,) of each kind: summed over
    micro-batches and processes they are the losses. Returns the weighted sum and its terms.
    """
    encoder, decoder, pad, (B, T), S = networks["encoder"], networks["decoder"], networks["encoder"].pad, x.shape, len(t)
    decoded, transitions, predictions, readouts, targets = counts.clamp(min=1)
    runs, no_future, losses = runs_of(t, T, config.unroll), x.new_empty(B, 0), {}           # (R, k), (B, 0)

    trunk = None
    if config.lambda_trunk:
        trunk = encoder.trunk(x)
        losses["trunk"] = trunk_loss(networks, trunk, y, targets)
    if S == T:
        memories = encoder(x, torch.arange(-1, T, device=t.device), trunk)                  # neighbours share their memories
        after, start, goal = memories[:, t + 1], memories[:, runs[:, 0]], memories[:, runs + 1]
    else:
        start, after = encoder(x, torch.cat([t - 1, t]), trunk).split(S, dim=1)             # all in one call
        goal = after[:, :, None]
    # after: m_t (B, S, K, d); start: m before each run (B, R, K, d); goal: m after each of its steps (B, R, k, K, d)

    far = slice(None, None, config.decode_every)
    future_x, future_y = futures(x, y, t[far], config.future_len, pad)
    logits = decoder(after[:, far].flatten(0, 1), future_x.flatten(0, 1))                   # (B S / decode_every, Tf, V)
    losses["dec"] = cross_entropy(logits, future_y.flatten(0, 1)) / decoded
    if config.lambda_near:
        logits = decoder(after.flatten(0, 1), no_future.repeat(S, 1))                       # (B S, 1, V)
        losses["near"] = cross_entropy(logits, y[:, t]) / readouts

    if config.detach:
        start, goal = start.detach(), goal.detach()
    predicted = roll_out(networks["updater"], start.flatten(0, 1), x[:, runs].flatten(0, 1)).view_as(goal)
    real = x[:, runs] != pad
    losses["dyn"] = ((predicted - goal).square().mean((-2, -1)) * real).sum() / transitions
    if config.lambda_own:
        logits = decoder(predicted.flatten(0, 2), no_future.repeat(runs.numel(), 1))
        losses["own"] = cross_entropy(logits, y[:, runs]) / predictions

    stride = math.ceil(UNIFORMITY_ROWS * S * after.shape[2] / UNIFORMITY_TOKENS)
    groups = after[:, ::stride].split(min(UNIFORMITY_ROWS, config.batch_size))
    losses["unif"] = sum(uniformity(group.flatten(0, 2)) * len(group) for group in groups) / config.batch_size

    losses["read"] = cross_entropy(networks["readout"](after.detach().flatten(0, 1)), y[:, t]) / readouts

    loss = sum(getattr(config, f"lambda_{name}") * term for name, term in losses.items())
    return loss, {"train_loss": loss, **{f"loss_{name}": term for name, term in losses.items()}}


def step_flops(config, networks, vocab_size, T, trunk_alone=False):
    """FLOPs of an optimiser step (backward costs twice the forward), all of them and the longest chain of dependent ones."""
    S = config.positions or T
    forward = forward_flops(config, vocab_size, T, T + 1 if S == T else 2 * S)
    chain = {name: chain_flops(network) for name, network in networks.items()}
    decoded, updated = -(-S // config.decode_every), runs_of(torch.arange(S), T, config.unroll).numel()
    firsts = (S if config.lambda_near else 0) + (updated if config.lambda_own else 0)
    if trunk_alone:
        layers = config.encoder_layers - config.register_layers
        return 3 * config.batch_size * forward["trunk"], 3 * chain["encoder"] * layers // config.encoder_layers
    return (3 * config.batch_size * (forward["encoder"] + decoded * forward["decoder"] + firsts * forward["first"]
                                     + updated * forward["updater"] + S * forward["readout"]),
            3 * (chain["encoder"] + max(chain["decoder"], chain["readout"],
                                        config.unroll * chain["updater"] + bool(config.lambda_own) * chain["decoder"])))


# ---------------------------------------------------------------------------------------------------------------------

def main():
    config = runtime.parse(Config, presets=PRESETS)
    run = runtime.start(config, "smt")
    run.first(lambda: datasets.ensure(config.dataset, config.data_dir))
    data = datasets.load(config.dataset, config.data_dir).to(run.device)
    T = config.seq_len or (data.longest_document if data.rows_are_documents else config.context_len)
    S = config.positions or T
    if config.unroll > T:
        raise UsageError(f"--unroll={config.unroll} is longer than a row, {T} tokens")
    val_x, val_y = datasets.held_out(data, config.eval_docs, min(config.eval_len, data.longest_document), seed=0)

    networks = build(config, data.vocab_size).to(run.device)
    optimizer = runtime.adamw(networks, config)
    module = runtime.distribute(networks, lambda *batch: smt_loss(*batch, config), run)
    first_step = runtime.begin(run, config, data, networks, optimizer)
    run.print(parameter_counts(networks))

    run.start_clock()
    for step in range(first_step, config.max_iters + 1):
        last = step == config.max_iters or run.should_stop(step)
        if step % config.eval_interval == 0 or last:
            with run.evaluating():
                initial_memory = networks["encoder"].initial_memory()
                numbers = evaluate(networks, initial_memory, val_x, val_y, data.meta)
            run.log_evaluation(step, numbers)
            runtime.save(run, "smt", step, config, data, networks, optimizer, model_config=model_fields(config),
                         initial_memory=initial_memory)
        if last:
            break

        trunk_alone = step < trunk_phase(config)
        x, y, t = datasets.sample_batch(data, config.seed, step, config.batch_size, T, S, config.p_start, run.rank, run.world_size)
        t = t.to(run.device)
        counts = run.sum(count_terms(x, y, t, config, data.pad))
        for i, (micro_x, micro_y) in enumerate(zip(x.chunk(config.grad_accum), y.chunk(config.grad_accum))):
            if trunk_alone:
                with run.autocast():
                    loss = trunk_loss(networks, networks["encoder"].trunk(micro_x), micro_y, counts[-1])
                loss.backward()
                losses = {"train_loss": loss, "loss_trunk": loss}
            else:
                with runtime.micro_step(module, last=i == config.grad_accum - 1):
                    with run.autocast():
                        loss, losses = module(micro_x, micro_y, t, counts)
                    (loss * run.world_size).backward()      # DDP averages over processes; our losses are to be summed
            run.count(losses)
        if trunk_alone:
            run.sum_gradients(networks)                     # DDP would wait for those of the other networks
        lr = runtime.learning_rate(step, config)
        grad_norm = runtime.optimizer_step(optimizer, lr, config.grad_clip)
        flops, sequential_flops = step_flops(config, networks, data.vocab_size, T, trunk_alone)
        run.spend(tokens=config.batch_size * T, flops=flops, sequential_flops=sequential_flops)
        run.log_training(step + 1, grad_norm, lr)


if __name__ == "__main__":
    runtime.run_main(main)
