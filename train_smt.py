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
from data import IGNORE, cross_entropy, futures
from evaluate import evaluate
from flops import smt_flops
from model import ModelConfig, build, decoder_loss, model_fields, parameter_counts, readout_loss, roll_out, squared_error
from runtime import RunConfig, UsageError

UNIFORMITY_ROWS = 8       # rows whose memory tokens are pushed apart together, so that rows on other processes need not be known
UNIFORMITY_TOKENS = 512   # memory tokens looked at in each such group, at most


@dataclass(frozen=True)
class Config(ModelConfig, RunConfig):
    """What train_smt.py can be told, beside what all train scripts can."""
    seq_len: int = 0                # tokens T of a training row; 0: the longest document, for text context_len
    positions: int = 1              # positions S drawn in each row; the readout is trained at each, and as many transitions are
    decode_every: int = 1           # the decoder is trained at one in so many of --positions
    unroll: int = 1                 # steps that the transition goes on from its own memory, with gradients, after one of the encoder's
    trunk_iters: int = 0            # first iterations, which train the causal encoder's trunk alone, as a language model
    teacher_iters: int = 0          # the next, which train encoder and decoder alone; both are 2/3 of a run at most, none with --init_from
    readout_from_decoder: bool = True    # when the RNN joins them, the readout begins with the decoder's weights
    p_start: float = 0.5            # share of the rows that begin at a document's start; the others begin anywhere (text only)
    lambda_dec: float = 1.0         # weight of the decoder's loss
    lambda_own: float = 0.0         # weight of L_own: the decoder's first target, from the memories that the transition predicts
    lambda_hold: float = 0.0        # weight of L_hold: the decoder's whole future, from the memory after --unroll steps
    lambda_trunk: float = 0.0       # weight of the next-token loss of the causal encoder's trunk
    lambda_dyn: float = 0.1         # weight of the dynamics loss
    relative: bool = False          # the dynamics loss of each memory token is divided by how far the encoder's token moves
    lambda_unif: float = 0.001      # weight of the uniformity loss
    lambda_read: float = 1.0        # weight of the readout's loss
    detach: bool = False            # train the transition on detached memories: the dynamics do not shape the encoder

    def __post_init__(self):
        ModelConfig.__post_init__(self)
        RunConfig.__post_init__(self)
        if self.positions < 1 or self.seq_len < 0 or not 0 <= self.p_start <= 1:
            raise UsageError("--positions is at least 1, --seq_len at least 0, --p_start from 0 to 1")
        for name in ("decode_every", "unroll"):
            if not 1 <= getattr(self, name) <= self.positions:
                raise UsageError(f"--{name} is from 1 to --positions={self.positions}")
        if (self.lambda_trunk or self.trunk_iters) and self.encoder != "causal":
            raise UsageError("the window encoder has no trunk: --encoder=window takes --lambda_trunk=0 --trunk_iters=0")
        for name in ("trunk_iters", "teacher_iters"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name}={getattr(self, name)} must not be negative")


PRESETS = {
    "tiny": dict(encoder="causal", updater="mlp", d_model=64, n_heads=4, memory_tokens=8, encoder_layers=3, decoder_layers=2,
                 updater_layers=1, readout_layers=2, conv_width=8, context_len=220, future_len=64, positions=64, decode_every=4,
                 unroll=16, p_start=0.9, trunk_iters=900, teacher_iters=700, lambda_own=1.0, lambda_hold=1.0, lambda_trunk=1.0,
                 lambda_dyn=0.5, relative=True, detach=True, lambda_unif=0.01, batch_size=4, max_iters=2400, lr=3e-3,
                 eval_interval=500, log_interval=50),
    **{f"tiny/{name}": dict(context_len=128, seq_len=256, future_len=16, p_start=0.5, trunk_iters=1500, teacher_iters=1000,
                            max_iters=4800) for name in ("tinystories", "text")},
    "small": dict(encoder="causal", updater="mlp", d_model=128, n_heads=4, memory_tokens=8, encoder_layers=4, decoder_layers=3,
                  updater_layers=1, readout_layers=3, conv_width=8, context_len=256, future_len=64, positions=64, decode_every=4, unroll=16,
                  trunk_iters=2000, teacher_iters=2000, lambda_own=1.0, lambda_hold=1.0, lambda_trunk=1.0, lambda_dyn=0.5,
                  relative=True, detach=True, lambda_unif=0.01, batch_size=32, max_iters=20_000, lr=1e-3, eval_interval=1000, log_interval=50),
    "paper": dict(d_model=256, n_heads=8, memory_tokens=16, encoder_layers=8, decoder_layers=4, updater_layers=8,
                  readout_layers=4, context_len=256, future_len=64, batch_size=128, max_iters=150_000, lr=3e-4,
                  lr_decay="constant", eval_interval=5000, eval_len=1024, log_interval=100),
}
SYNTHETIC = dict(memory_tokens=4, conv_width=4, future_len=32, positions=16, unroll=4, trunk_iters=150, teacher_iters=550, batch_size=16,
                 max_iters=1100, lr=2e-3, eval_interval=200)
TASKS = {name: SYNTHETIC for name in tasks.TASKS} | {"keyvalue": SYNTHETIC | dict(memory_tokens=8, teacher_iters=750, max_iters=1400)}
PRESETS |= {f"{size}/{name}": flags for size in ("tiny", "small") for name, flags in TASKS.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The objective

def runs_of(t, T, unroll):
    """The steps (R, unroll) of the runs in which the transition is trained, with R unroll <= S: they begin at the first of the
    positions t (S,), which are in random order, or as late as a row of T tokens allows."""
    begins = t[:len(t) // unroll].clamp(max=T - unroll)
    return begins[:, None] + torch.arange(unroll, device=t.device)


def count_terms(x, y, t, config, pad):
    """The denominators of the means, (6,): targets decoded, transitions trained, targets after them, targets decoded at the end
    of each run, targets at t, all targets."""
    runs = runs_of(t, x.shape[1], config.unroll)
    decoded, held = (futures(x, y, some, config.future_len, pad)[1] for some in (t[::config.decode_every], runs[:, -1]))
    return torch.stack([(decoded != IGNORE).sum(), (x[:, runs] != pad).sum(),
                        *((some != IGNORE).sum() for some in (y[:, runs], held, y[:, t], y))])


def uniformity(memory):
    """log mean_{a != b} exp(-2 |u_a - u_b|^2) over the L2-normalised memory tokens of (n, d); 0 if all are the same."""
    if len(memory) == 1:
        return memory.new_zeros(())
    u = F.normalize(memory, dim=-1)
    with torch.autocast(u.device.type, enabled=False):      # a product in bf16 would be too coarse where tokens are close
        distance = 2 - 2 * u @ u.T
        others = ~torch.eye(len(u), dtype=torch.bool, device=u.device)
        return (-2 * distance).masked_fill(~others, -torch.inf).flatten().logsumexp(0) - math.log(len(u) * (len(u) - 1))


def trunk_loss(networks, trunk, y, count):
    """L_trunk = CE(head of D(trunk of E at t), y_t) at every t: the causal encoder's trunk as a language model (not in the paper).

    trunk (B, T+1, d) as of Encoder.trunk, y (B, T). These rows' share of the mean over the global batch, which has `count` targets.
    """
    return cross_entropy(networks["decoder"].predict(trunk[:, 1:]), y) / count.clamp(min=1)


def phases(config):
    """The steps at which the trunk has been trained alone, and then encoder and decoder.

    Both take two thirds of a short run at most. One that goes on from trained networks (--init_from) has no such phases.
    """
    first, both = (0, 0) if config.init_from else (config.trunk_iters, config.trunk_iters + config.teacher_iters)
    most = min(both, 2 * config.max_iters // 3)
    return [end * most // max(1, both) for end in (first, both)]


def teacher_loss(networks, x, y, t, counts, config, trunk_alone):
    """The objective before the RNN joins, while nothing asks yet that a memory be easy to update: L_trunk, then also L_dec, unweighted.

    Arguments and returns are those of smt_loss.
    """
    encoder, losses, trunk = networks["encoder"], {}, None
    if trunk_alone or config.lambda_trunk:
        trunk = encoder.trunk(x)
        losses["trunk"] = trunk_loss(networks, trunk, y, counts[-1])
    if not trunk_alone:
        t = t[::config.decode_every]
        losses["dec"] = decoder_loss(networks, encoder(x, t, trunk), x, y, t, counts[0], config.future_len)
    loss = sum(losses.values())
    return loss, {"train_loss": loss, **{f"loss_{name}": term for name, term in losses.items()}}


def smt_loss(networks, x, y, t, counts, config):
    """The joint objective on rows x, y (B, T) at positions t (S,), in random order, with m_t = E(x_{<=t}) and m_{-1} = m_empty:

        L_dec   = CE(D(m_t, x_{t+1..t+Tf-1}), y_{t..t+Tf-1}) at one in decode_every positions
        L_dyn   = MSE(f(m_{t-1}, x_t), m_t)                  its gradients reach E through both memories, unless config.detach
        L_own   = CE(D(f(m_{t-1}, x_t)), y_t)                what f must get right is what the decoder needs (not in the paper)
        L_hold  = L_dec from f(m_{t-1}, x_t) instead of m_t  and what it will need later (not in the paper)
        L_unif  = log mean_{a != b} exp(-2 |u_a - u_b|^2)    memory tokens apart from each other
        L_read  = CE(g(stop_gradient(m_t)), y_t)             trains the readout only
        L_trunk                                              see trunk_loss

    f takes k = unroll steps from each of R = S / k memories of the encoder: L_dyn and L_own are over all of them, L_hold is after
    the last. Each term is these rows' share of the mean over the global batch of config.batch_size rows, which has counts (6,) of
    each kind: summed over micro-batches and processes they are the losses. L_unif includes the memories past a document's end,
    and --relative takes its scale from these rows. Returns the weighted sum and its terms.
    """
    encoder, S, losses = networks["encoder"], len(t), {}
    decoded, transitions, predictions, held, readouts, targets = counts.clamp(min=1)
    runs = runs_of(t, x.shape[1], config.unroll)                                            # (R, k)

    trunk = None
    if config.lambda_trunk:
        trunk = encoder.trunk(x)
        losses["trunk"] = trunk_loss(networks, trunk, y, targets)
    if config.unroll == 1:
        start, after = encoder(x, torch.cat([t - 1, t]), trunk)[:, :, None].split(S, dim=1)  # one call reads the row once
        after, goal = after.squeeze(2), after
    else:
        along = torch.cat([runs[:, :1] - 1, runs], dim=1)                                   # (R, 1 + k)
        after, memories = encoder(x, torch.cat([t, along.flatten()]), trunk).split([S, along.numel()], dim=1)
        start, goal = memories.unflatten(1, along.shape).split([1, config.unroll], dim=2)
    # after: m_t (B, S, K, d); start: m before each run (B, R, 1, K, d); goal: m after each of its steps (B, R, k, K, d)

    some = slice(None, None, config.decode_every)
    losses["dec"] = decoder_loss(networks, after[:, some], x, y, t[some], decoded, config.future_len)

    if config.detach:
        start, goal = start.detach(), goal.detach()
    predicted = roll_out(networks["updater"], start.flatten(0, 2), x[:, runs].flatten(0, 1)).view_as(goal)
    real = x[:, runs] != encoder.pad
    losses["dyn"] = squared_error(predicted, goal, real, start if config.relative else None) / transitions
    if config.lambda_own:
        losses["own"] = decoder_loss(networks, predicted.flatten(1, 2), x, y, runs.flatten(), predictions, future_len=1)
    if config.lambda_hold:
        losses["hold"] = decoder_loss(networks, predicted[:, :, -1], x, y, runs[:, -1], held, config.future_len)

    stride = math.ceil(UNIFORMITY_ROWS * S * after.shape[2] / UNIFORMITY_TOKENS)
    groups = after[:, ::stride].split(min(UNIFORMITY_ROWS, config.batch_size))
    losses["unif"] = sum(uniformity(group.flatten(0, 2)) * len(group) for group in groups) / config.batch_size

    losses["read"] = readout_loss(networks, after.detach(), y[:, t], readouts)

    loss = sum(getattr(config, f"lambda_{name}") * term for name, term in losses.items())
    return loss, {"train_loss": loss, **{f"loss_{name}": term for name, term in losses.items()}}


# ---------------------------------------------------------------------------------------------------------------------

def main():
    config = runtime.parse(Config, presets=PRESETS)
    run = runtime.start(config, "smt")
    run.first(lambda: datasets.ensure(config.dataset, config.data_dir))
    data = datasets.load(config.dataset, config.data_dir).to(run.device)
    T = datasets.row_length(data, config.seq_len, config.context_len)
    if config.unroll > T:
        raise UsageError(f"--unroll={config.unroll} is longer than a row, {T} tokens")
    val_x, val_y = datasets.held_out(data, config.eval_docs, config.eval_len, seed=0)

    networks = build(config, data.vocab_size).to(run.device)
    optimizer = runtime.adamw(networks, config)
    module = runtime.distribute(networks, lambda *batch: smt_loss(*batch, config), run)
    first_step = runtime.begin(run, config, data, networks, optimizer, phases)
    run.print(parameter_counts(networks))

    trunk_end, teacher_end = phases(config)
    run.start_clock()
    for step in range(first_step, config.max_iters + 1):
        last = step == config.max_iters or run.should_stop(step)
        if step % config.eval_interval == 0 or last:
            with run.evaluating():
                initial_memory = networks["encoder"].initial_memory()
                numbers = evaluate(networks, initial_memory, val_x, val_y, data.meta)
                runtime.save(run, "smt", step, numbers, config, data, networks, optimizer, model_config=model_fields(config),
                             initial_memory=initial_memory)
        if last:
            break

        if step == trunk_end > 0:
            networks["decoder"].start_from(networks["encoder"])
        if step == teacher_end > 0 and config.readout_from_decoder:
            networks["readout"].start_from(networks["decoder"])
        x, y, t = datasets.sample_batch(data, config.seed, step, config.batch_size, T, config.positions, config.p_start,
                                        run.rank, run.world_size)
        t = t.to(run.device, non_blocking=True)
        counts = run.sum(count_terms(x, y, t, config, data.pad))
        for i, rows in enumerate(zip(x.chunk(config.grad_accum), y.chunk(config.grad_accum))):
            if step < teacher_end:                          # without DDP, which would wait for the gradients of all networks
                with run.autocast():
                    loss, losses = teacher_loss(networks, *rows, t, counts, config, step < trunk_end)
                loss.backward()
            else:
                with runtime.micro_step(module, last=i == config.grad_accum - 1):
                    with run.autocast():
                        loss, losses = module(*rows, t, counts)
                    (loss * run.world_size).backward()      # DDP averages over processes; our losses are to be summed
            run.count(losses)
        if step < teacher_end:
            run.sum_gradients(networks)
        lr = runtime.learning_rate(step, config, decay_from=teacher_end)
        grad_norm = runtime.optimizer_step(optimizer, lr, config.grad_clip)
        flops, sequential_flops = smt_flops(config, networks, data.vocab_size, T, (step >= trunk_end) + (step >= teacher_end))
        run.spend(tokens=config.batch_size * T, flops=flops, sequential_flops=sequential_flops)
        run.log_training(step + 1, grad_norm, lr, phase_ends=(trunk_end, teacher_end))


if __name__ == "__main__":
    runtime.run_main(main)
