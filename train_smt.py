"""Supervised Memory Training: learn what to remember and, in parallel over time, how to update it.

    python train_smt.py                             # fables, preset tiny, a few minutes on a laptop
    python train_smt.py --dataset=retrieval         # a synthetic task
    python train_smt.py --dataset=tinystories       # real text; the preset is tiny on a CPU, paper on a GPU
    torchrun --nproc_per_node=8 train_smt.py --dataset=mnist

Writes runs/<dataset>-smt; train_dmt.py goes on from there.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data as datasets
import model
import runtime
from evaluate import evaluate
from lib.checkpoints import fields_of
from lib.cli import UsageError, parse, run_main
from lib.optim import learning_rate, make_optimizers, optimizer_step
from model import IGNORE, ModelConfig, cross_entropy, decoder_loss, futures, readout_loss, squared_error
from runtime import RunConfig
from sources.prepare import GENERATED, ensure
from sources.tasks import TASKS

UNIFORMITY_TOKENS = 512   # memory tokens in L_unif, about


@dataclass(frozen=True)
class Config(ModelConfig, RunConfig):
    """Flags of train_smt.py, on top of the shared ones."""
    seq_len: int = 256              # tokens T of a training row of text; in other data a row is a document
    positions: int = 1              # positions S drawn in a step, the same in each row
    p_start: float = 0.5            # text: share of rows from a document's start; the others begin anywhere
    trunk_iters: int = 0            # causal: first steps, on L_trunk alone; none with --init_from
    lambda_dyn: float = 0.1         # weight of the dynamics loss
    lambda_unif: float = 0.001      # weight of the uniformity loss

    def __post_init__(self):
        RunConfig.__post_init__(self)
        ModelConfig.__post_init__(self)
        if min(self.positions, self.seq_len) < 1 or self.trunk_iters < 0 or not 0 <= self.p_start <= 1:
            raise UsageError("--positions and --seq_len are at least 1, --trunk_iters 0, --p_start a share")
        if self.trunk_iters and self.encoder != "causal":
            raise UsageError("the window encoder has no trunk: --encoder=window takes --trunk_iters=0")
        if self.trunk_iters >= self.max_iters and not self.init_from:
            raise UsageError(f"--trunk_iters={self.trunk_iters} must be below --max_iters={self.max_iters}")


CAUSAL = dict(encoder="causal", updater="mlp", updater_layers=1, optimizer="muon", n_heads=4, positions=8,
              conv_width=8, future_len=200, eval_interval=800, decay=0.2)
TEXT = dict(d_model=128, memory_tokens=4, encoder_layers=3, decoder_layers=3, conv_width=4, context_len=128,
            seq_len=256, future_len=64, p_start=0.5, trunk_iters=1200, max_iters=2400, decay=1.0,
            weight_decay=0.5)
PICTURE = dict(future_len=112, trunk_iters=700, max_iters=2200)      # 4 lines of MNIST ahead
TASK = dict(memory_tokens=4, conv_width=4, future_len=32, positions=16, trunk_iters=500, batch_size=16,
            max_iters=1300, lr=2e-3, eval_interval=200)
PRESETS = {
    "tiny": CAUSAL | dict(d_model=64, memory_tokens=16, encoder_layers=2, decoder_layers=2, context_len=220,
                          seq_len=220, trunk_iters=900, batch_size=4, max_iters=3900, lr=3e-3, p_start=0.9),
    "small": CAUSAL | dict(d_model=128, memory_tokens=8, encoder_layers=3, decoder_layers=3, context_len=256,
                           trunk_iters=2000, batch_size=32, max_iters=20_000, lr=1e-3),
    "paper": dict(d_model=256, n_heads=8, memory_tokens=16, encoder_layers=8, decoder_layers=4,
                  updater_layers=8, context_len=256, future_len=64, batch_size=128, max_iters=150_000,
                  lr=3e-4, eval_interval=5000, decay=0.2),
    "tiny/tinystories": TEXT, "tiny/text": TEXT, "tiny/mnist": PICTURE, "tiny/sketchy": PICTURE,
}
for task in TASKS:              # "<preset>/<dataset>" adds to a preset
    PRESETS[f"tiny/{task}"] = PRESETS[f"small/{task}"] = TASK
PRESETS["tiny/keyvalue"] = PRESETS["small/keyvalue"] = TASK | dict(memory_tokens=8, max_iters=1600)


# ------------------------------------------------------------------------------------------------------------
# The objective

def count_terms(x, y, t, config, pad):
    """Denominators of the losses of rows x, y (B, T) at t (S,): the numbers of the decoder's targets, of f's
    transitions, of the readout's targets and of the trunk's targets. (4,)"""
    future_y = futures(x, y, t, config.future_len, pad)[1]
    valid = future_y != IGNORE, x[:, t] != pad, y[:, t] != IGNORE, y != IGNORE
    return torch.stack([v.sum() for v in valid])


def smt_loss(networks, x, y, t, counts, config):
    """The paper's objective on rows x, y (B, T) at positions t (S,), with m_t = E(x_{<=t}), m_{-1} = m_empty:

        L_dec  = CE(D(m_t, x_{t+1..t+Tf-1}), y_{t..t+Tf-1})
        L_dyn  = MSE(f(m_{t-1}, x_t), m_t)                      its gradients reach E through both memories
        L_unif = log mean_{a != b} exp(-2 |u_a - u_b|^2)        keeps memory tokens apart from each other
        L_read = CE(g(stop_gradient(m_t)), y_t)                 trains the readout only
        L_smt  = L_dec + lambda_dyn L_dyn + lambda_unif L_unif + L_read

    The causal encoder adds L_trunk, ours. A term is a sum over these rows divided by the counts (4,) of the
    global batch; L_unif is a mean times these rows' share of it, in which memories after a document's end
    count, too. So micro-batches add up. Returns the loss, and the terms to log.
    """
    encoder, updater = networks["encoder"], networks["updater"]
    n_futures, n_transitions, n_readouts, n_targets = counts.clamp(min=1)
    causal, both = config.encoder == "causal", torch.cat([t - 1, t])
    trunk = encoder.trunk(x) if causal else None
    memories = encoder(x, both, trunk) if causal else encoder(x, both)          # (B, 2 S, K, d)
    before, after = memories.split(len(t), dim=1)                               # m_{t-1}, m_t
    predicted = updater(before.flatten(0, 1), x[:, t].flatten()).view_as(after)

    L_dec = decoder_loss(networks, after, x, y, t, config.future_len) / n_futures
    L_dyn = squared_error(predicted, after, x[:, t] != encoder.pad) / n_transitions
    L_unif = uniformity(after.flatten(0, 1)) * len(x) / config.batch_size
    L_read = readout_loss(networks, after.detach(), y[:, t]) / n_readouts
    loss = L_dec + config.lambda_dyn * L_dyn + config.lambda_unif * L_unif + L_read
    losses = {"loss_dec": L_dec, "loss_dyn": L_dyn, "loss_unif": L_unif, "loss_read": L_read}

    if causal:
        L_trunk = losses["loss_trunk"] = trunk_loss(networks, trunk, y, n_targets)
        loss = loss + L_trunk
    return loss, {"train_loss": loss, **losses}


def uniformity(memories):
    """log mean_{a != b} exp(-2 |u_a - u_b|^2), u a sample of L2-normalised memory tokens (n, K, d)."""
    stride = math.ceil(len(memories) * memories.shape[1] / UNIFORMITY_TOKENS)
    u = F.normalize(memories[::stride].flatten(0, 1), dim=-1)
    if len(u) == 1:
        return u.new_zeros(())
    n, same = len(u), torch.eye(len(u), dtype=torch.bool, device=u.device)
    with torch.autocast(u.device.type, enabled=False):      # bf16 would be too coarse where tokens are close
        exponent = (-2 * (2 - 2 * u @ u.T)).masked_fill(same, -torch.inf)    # |u_a - u_b|^2 = 2 - 2 u_a . u_b
        return exponent.flatten().logsumexp(0) - math.log(n * (n - 1))


def trunk_loss(networks, trunk, y, n_targets):
    """L_trunk = CE(D.predict(h_t), y_t) at every t (ours): the causal encoder's trunk as a language model.

    Recall is learned sooner from a text than from a memory. trunk: (e, h) of CausalEncoder.trunk, y (B, T).
    """
    return cross_entropy(networks["decoder"].predict(trunk[1][:, 1:]), y) / n_targets


def trunk_alone(networks, x, y, t, counts, config):
    """The objective of the first trunk_iters steps (ours): L_trunk. Arguments and returns as in smt_loss."""
    loss = trunk_loss(networks, networks["encoder"].trunk(x), y, counts[-1].clamp(min=1))
    return loss, {"train_loss": loss, "loss_trunk": loss}


def main():
    config = parse(Config, presets=PRESETS, generated=GENERATED)
    run = runtime.start(config, "smt")
    ensure(config.dataset, config.data_dir)
    data = datasets.load(config.dataset, config.data_dir).to(run.device)
    T = datasets.row_length(data, config.seq_len)
    val_x, val_y = datasets.held_out(data, config.eval_docs)

    networks = model.build(config, data.vocab_size).to(run.device)
    optimizers = make_optimizers(networks, config)
    module = runtime.distribute(networks, lambda *batch: smt_loss(*batch, config), run, graphs=True)
    first_step = runtime.begin(run, data, networks, optimizers, fixed=["trunk_iters"])
    trunk_end = 0 if config.init_from else config.trunk_iters

    run.start_clock()
    for step in range(first_step, config.max_iters + 1):
        last = step == config.max_iters or run.should_stop(step)
        if step % config.eval_interval == 0 or last:
            with run.evaluating():
                initial_memory = model.empty_memory(networks["encoder"])
                numbers = evaluate(networks, initial_memory, val_x, val_y, data.meta)
                runtime.save(run, step, numbers, data, networks, optimizers, initial_memory=initial_memory,
                             model_config=fields_of(ModelConfig, config))
        if last:
            break

        if step == trunk_end > 0:
            networks["encoder"].start_decoder(networks["decoder"])
        x, y, t = datasets.sample_batch(data, config.seed, step, config.batch_size, T, config.positions,
                                        config.p_start, run.rank, run.world_size)
        counts = run.all_reduce(count_terms(x, y, t, config, data.pad))
        for i, rows in enumerate(zip(x.chunk(config.grad_accum), y.chunk(config.grad_accum))):
            if step < trunk_end:                # without DDP, which waits for the gradients of all networks
                with run.autocast():
                    loss, losses = trunk_alone(networks, *rows, t, counts, config)
                loss.backward()
            else:
                with runtime.micro_step(module, last=i == config.grad_accum - 1):
                    with run.autocast():
                        loss, losses = module(*rows, t, counts)
                    (loss * run.world_size).backward()      # DDP averages over processes; our losses are sums
            run.accumulate(losses)
        if step < trunk_end:
            run.all_reduce_gradients(networks)
        lr = learning_rate(step, config, begin=trunk_end)
        grad_norm = optimizer_step(optimizers, lr)
        run.log_training(step + 1, config.batch_size * T, grad_norm, lr, trunk_end)
    run.end(step)


if __name__ == "__main__":
    run_main(main)
