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
from model import ModelConfig, build, chain_flops, forward_flops, model_fields, parameter_counts
from runtime import RunConfig, UsageError

UNIFORMITY_ROWS = 8       # rows whose memory tokens are pushed apart together: the loss is the same for any number of processes
UNIFORMITY_TOKENS = 512   # memory tokens looked at in each such group, at most


@dataclass(frozen=True)
class Config(ModelConfig, RunConfig):
    """What train_smt.py can be told, beside what all train scripts can."""
    seq_len: int = 0                # tokens T of a training row; 0: the longest document, for text context_len
    positions: int = 1              # positions S of each row at which a pair of memories is trained
    run_length: int = 1             # the positions come in runs of this many consecutive ones, which share memories: r pairs need r + 1
    decode_every: int = 1           # the long futures are decoded at every n-th of these positions
    p_start: float = 0.5            # share of the rows that begin at a document's start; the others begin anywhere (text only)
    lambda_dec: float = 1.0         # weight of the decoder's loss
    lambda_near: float = 0.0        # extra weight of the decoder's first target, which it predicts from the memory alone
    lambda_dyn: float = 0.1         # weight of the dynamics loss
    lambda_unif: float = 0.001      # weight of the uniformity loss
    lambda_read: float = 1.0        # weight of the readout's loss
    detach: bool = False            # train the transition on detached memories: the dynamics do not shape the encoder

    def __post_init__(self):
        ModelConfig.__post_init__(self)
        RunConfig.__post_init__(self)
        if self.positions < 1 or self.seq_len < 0 or not 0 <= self.p_start <= 1:
            raise UsageError("--positions is at least 1, --seq_len at least 0, --p_start from 0 to 1")
        if not 1 <= self.decode_every <= self.positions:
            raise UsageError("--decode_every is from 1 to --positions")
        if self.run_length < 1 or self.positions % self.run_length:
            raise UsageError(f"--positions={self.positions} must be a multiple of --run_length={self.run_length}")


PRESETS = {
    "tiny": dict(encoder="causal", d_model=64, n_heads=4, memory_tokens=4, encoder_layers=3, decoder_layers=1, updater_layers=2,
                 readout_layers=1, context_len=220, future_len=64, positions=32, decode_every=4, lambda_near=1.0, p_start=0.9,
                 batch_size=4, max_iters=3700, lr=3e-3, eval_interval=740, log_interval=50),
    "tiny/tinystories": dict(context_len=128, seq_len=256, future_len=16, decode_every=2, p_start=0.5, batch_size=8),
    "tiny/text": dict(context_len=128, seq_len=256, future_len=16, decode_every=2, p_start=0.5, batch_size=8),
    "small": dict(encoder="causal", d_model=128, n_heads=4, memory_tokens=8, encoder_layers=4, decoder_layers=2, updater_layers=4,
                  readout_layers=2, context_len=256, future_len=64, positions=64, decode_every=4, lambda_near=1.0,
                  batch_size=64, max_iters=20_000, lr=1e-3, eval_interval=1000, log_interval=50),
    "paper": dict(d_model=256, n_heads=8, memory_tokens=16, encoder_layers=8, decoder_layers=4, updater_layers=8,
                  readout_layers=4, context_len=256, future_len=64, batch_size=128, max_iters=150_000, lr=3e-4,
                  lr_decay="constant", eval_interval=5000, eval_len=1024, log_interval=100),
}
SYNTHETIC = dict(memory_tokens=2, updater_layers=1, future_len=32, positions=4, decode_every=1, lambda_near=0.0,
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


def expand_runs(centres, run_length, T):
    """Runs of consecutive positions around the given ones (R,), within 0..T-1 -> (R run_length,)."""
    first = (centres - run_length // 2).clamp(0, T - run_length)
    return (first[:, None] + torch.arange(run_length)).flatten()


def count_terms(x, y, t, future_len, pad, decode_every=1):
    """How many targets are decoded, transitions trained and targets read out: the denominators of the means, (3,)."""
    _, future_y = futures(x, y, t[::decode_every], future_len, pad)
    return torch.stack([(future_y != IGNORE).sum(), (x[:, t] != pad).sum(), (y[:, t] != IGNORE).sum()])


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


def smt_loss(networks, x, y, t, counts, config):
    """The joint objective on rows x, y (B, T) at positions t (S,), with m_t = E(x_{<=t}) and m_{-1} = m_empty:

        L_dec  = CE(D(m_t, x_{t+1..t+Tf-1}), y_{t..t+Tf-1}) at every decode_every-th position
        L_near = CE(D(m_t), y_t)                            its first target again, at every position (not in the paper)
        L_dyn  = MSE(f(m_{t-1}, x_t), m_t)                  its gradients reach E through both memories
        L_unif = log mean_{a != b} exp(-2 |u_a - u_b|^2)    memory tokens apart from each other
        L_read = CE(g(stop_gradient(m_t)), y_t)             trains the readout only

    Each is these rows' share of the mean over the global batch of config.batch_size rows, which has counts (3,) of each kind:
    summed over micro-batches and processes they are the losses. Returns the weighted sum and its terms.
    """
    encoder, pad = networks["encoder"], networks["encoder"].pad
    decoded, transitions, readouts = counts.clamp(min=1)

    runs = t.view(-1, config.run_length)
    memories = encoder(x, torch.cat([runs[:, :1] - 1, runs], dim=1).flatten())     # all in one call
    memories = memories.unflatten(1, (len(runs), -1))                              # (B, runs, run_length + 1, K, d)
    before, after = memories[:, :, :-1].flatten(1, 2), memories[:, :, 1:].flatten(1, 2)    # m_{t-1}, m_t: (B, S, K, d)

    far = slice(None, None, config.decode_every)
    future_x, future_y = futures(x, y, t[far], config.future_len, pad)
    logits = networks["decoder"](after[:, far].flatten(0, 1), future_x.flatten(0, 1))      # (B S / decode_every, Tf, V)
    loss_dec = cross_entropy(logits, future_y.flatten(0, 1)) / decoded
    loss_near = torch.zeros_like(loss_dec)
    if config.lambda_near:
        logits = networks["decoder"](after.flatten(0, 1), x.new_empty(after[:, :, 0, 0].numel(), 0))       # (B S, 1, V)
        loss_near = cross_entropy(logits, y[:, t].flatten()) / readouts

    x_t = x[:, t]
    start, goal = (before.detach(), after.detach()) if config.detach else (before, after)
    error = networks["updater"](start.flatten(0, 1), x_t.flatten()).view_as(goal) - goal
    loss_dyn = (error.square().mean((-2, -1)) * (x_t != pad)).sum() / transitions

    stride = math.ceil(UNIFORMITY_ROWS * after.shape[1] * after.shape[2] / UNIFORMITY_TOKENS)
    groups = after[:, ::stride].split(min(UNIFORMITY_ROWS, config.batch_size))
    loss_unif = sum(uniformity(group.flatten(0, 2)) * len(group) for group in groups) / config.batch_size

    loss_read = cross_entropy(networks["readout"](after.detach().flatten(0, 1)), y[:, t].flatten()) / readouts

    loss = (config.lambda_dec * loss_dec + config.lambda_near * loss_near + config.lambda_dyn * loss_dyn
            + config.lambda_unif * loss_unif + config.lambda_read * loss_read)
    return loss, dict(train_loss=loss, loss_dec=loss_dec, loss_near=loss_near, loss_dyn=loss_dyn, loss_unif=loss_unif, loss_read=loss_read)


def step_flops(config, networks, vocab_size, T):
    """FLOPs of an optimiser step (backward costs twice the forward), all of them and the longest chain of dependent ones."""
    S = config.positions
    forward = forward_flops(config, vocab_size, T, S + S // config.run_length)
    chain = {name: chain_flops(network) for name, network in networks.items()}
    decoded = -(-S // config.decode_every)
    return (3 * config.batch_size * (forward["encoder"] + decoded * forward["decoder"] + S * (forward["updater"] + forward["readout"])),
            3 * (chain["encoder"] + max(chain["decoder"], chain["updater"], chain["readout"])))


# ---------------------------------------------------------------------------------------------------------------------

def main():
    config = runtime.parse(Config, presets=PRESETS)
    run = runtime.start(config, "smt")
    run.first(lambda: datasets.ensure(config.dataset, config.data_dir))
    data = datasets.load(config.dataset, config.data_dir).to(run.device)
    T = config.seq_len or (data.longest_document if data.rows_are_documents else config.context_len)
    if config.run_length > T:
        raise UsageError(f"--run_length={config.run_length} is longer than a row, {T} tokens")
    val_x, val_y = datasets.held_out(data, config.eval_docs, min(config.eval_len, data.longest_document), seed=0)

    networks = build(config, data.vocab_size).to(run.device)
    optimizer = runtime.adamw(networks, config)
    module = runtime.distribute(networks, lambda *batch: smt_loss(*batch, config), run)
    first_step = runtime.begin(run, config, data, networks, optimizer)
    run.print(parameter_counts(networks))
    flops, sequential_flops = step_flops(config, networks, data.vocab_size, T)

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

        x, y, t = datasets.sample_batch(data, config.seed, step, config.batch_size, T, config.positions // config.run_length,
                                        config.p_start, run.rank, run.world_size)
        t = expand_runs(t, config.run_length, T).to(run.device)
        counts = run.sum(count_terms(x, y, t, config.future_len, data.pad, config.decode_every))
        for i, (micro_x, micro_y) in enumerate(zip(x.chunk(config.grad_accum), y.chunk(config.grad_accum))):
            with runtime.micro_step(module, last=i == config.grad_accum - 1):
                with run.autocast():
                    loss, losses = module(micro_x, micro_y, t, counts)
                (loss * run.world_size).backward()      # DDP averages over processes; our losses are to be summed
            run.count(losses)
        lr = runtime.learning_rate(step, config)
        grad_norm = runtime.optimizer_step(optimizer, lr, config.grad_clip)
        run.spend(tokens=config.batch_size * T, flops=flops, sequential_flops=sequential_flops)
        run.log_training(step + 1, grad_norm, lr)


if __name__ == "__main__":
    runtime.run_main(main)
