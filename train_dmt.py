"""DAgger Memory Training: let the RNN run on its own memories and pull it back to the encoder's.

    python train_dmt.py                                         # from runs/fables-smt
    python train_dmt.py --dataset=tinystories --horizon=128     # shorter roll-outs
    torchrun --nproc_per_node=8 train_dmt.py --dataset=mnist

Starts from an SMT checkpoint (--init_from, else runs/<dataset>-smt) and writes runs/<dataset>-dmt. Encoder
and decoder are frozen, the readout begins as the decoder. Each iteration

    1. rolls f out over `horizon` tokens, without gradients: m_hat_t, the memories of the RNN (sequential)
    2. asks the encoder for the memories m_t it should have had, at every `label_stride`-th step (parallel)
    3. trains f on (m_hat_{t-1}, x_t) -> m_t, and g on m_hat_t -> y_t, all pairs at once (parallel)
"""
from dataclasses import asdict, dataclass, replace

import torch

import data as datasets
import runtime
from evaluate import evaluate
from lib.checkpoints import load, restore
from lib.cli import UsageError, parse, run_main
from lib.optim import learning_rate, make_optimizers, optimizer_step
from lib.seeds import philox
from model import IGNORE, Encoder, readout_loss, roll_out_without_gradients, squared_error
from runtime import RunConfig
from sources.prepare import GENERATED, ensure
from sources.tasks import TASKS


@dataclass(frozen=True)
class Config(RunConfig):
    """Flags of train_dmt.py, on top of the shared ones."""
    horizon: int = 0                # tokens of a roll-out; T // horizon roll-outs a row; 0: the whole row
    label_stride: int = 1           # steps from one label of the encoder to the next
    seq_len: int = 0                # tokens T of a training row of text; 0: as in SMT
    p_start: float = 0.5            # share of steps with a roll-out from token 0; also as p_start in SMT
    lambda_dyn: float = 10.0        # weight of the dynamics loss

    def __post_init__(self):
        super().__post_init__()
        if min(self.horizon, self.seq_len, self.label_stride - 1) < 0 or not 0 <= self.p_start <= 1:
            raise UsageError("--horizon and --seq_len are at least 0, --label_stride 1, --p_start a share")


TEXT = dict(p_start=0.5, label_stride=1, max_iters=800, weight_decay=0.5)
PICTURE = dict(max_iters=250)
TASK = dict(batch_size=32, label_stride=1, max_iters=800)
PRESETS = {
    "tiny": dict(optimizer="muon", batch_size=8, max_iters=400, lr=2e-3, lambda_dyn=1.0, p_start=0.9,
                 label_stride=2, eval_interval=100),
    "small": dict(optimizer="muon", batch_size=32, max_iters=2000, lr=1e-3, lambda_dyn=1.0),
    "paper": dict(batch_size=32, max_iters=1500, lr=3e-5, horizon=256, label_stride=16),
    "tiny/tinystories": TEXT, "tiny/text": TEXT, "tiny/mnist": PICTURE, "tiny/sketchy": PICTURE,
}
for task in TASKS:
    PRESETS[f"tiny/{task}"] = PRESETS[f"small/{task}"] = TASK
PRESETS["tiny/retrieval"] = PRESETS["small/retrieval"] = TASK | dict(max_iters=100, eval_interval=25)


# ------------------------------------------------------------------------------------------------------------
# The three steps

def choose_steps(config, step, T, horizon):
    """The beginnings (n,) of the roll-outs, and which of the steps 0..horizon-1 (R,) of each get a label.

    Roll-outs lie one after the other, the first at 0 with probability p_start, else anywhere. A pure function
    of (seed, step).
    """
    rng, n, stride = philox(config.seed, step, "roll-out"), T // horizon, min(config.label_stride, horizon)
    begin = 0 if rng.random() < config.p_start else int(rng.integers(T - n * horizon + 1))
    labelled = stride * torch.arange(horizon // stride)             # as many in every step
    return begin + horizon * torch.arange(n), labelled + int(rng.integers(horizon - int(labelled[-1])))


@torch.no_grad()
def roll_out_and_label(encoder, updater, x, begins, horizon, labelled):
    """Steps 1 and 2 on rows x (B, T): run f over `horizon` tokens from each of n `begins`, ask E for labels.

    A roll-out starts from the encoder's memory just before it (m_empty at 0). labelled (R,): the steps of a
    roll-out, 0..horizon-1, that get a label. Returns (B n, R, K, d) each, a row's n roll-outs side by side:
    the memory before each labelled step, m_hat_{t-1}, and the step's label m_t.
    """
    t = (begins[:, None] + labelled).flatten()
    memories = encoder(x, torch.cat([begins - 1, t]))     # the causal encoder reads the row once
    start, labels = memories.split([len(begins), len(t)], dim=1)
    start = start.flatten(0, 1)
    m_hat = roll_out_without_gradients(updater, start, cut(x, begins, horizon))
    before = torch.cat([start[:, None], m_hat], dim=1)[:, labelled]
    return before, labels.unflatten(1, (len(begins), -1)).flatten(0, 1)


def cut(x, begins, length):
    """x[:, begin:begin + length] for each of n `begins`, side by side. (B, T) -> (B n, length)"""
    return x[:, begins[:, None] + torch.arange(length, device=x.device)].flatten(0, 1)


def count_terms(x, y, pad):
    """Denominators of the losses of labelled steps x, y (N, R): how many transitions, and targets. (2,)"""
    return torch.stack([(x != pad).sum(), (y != IGNORE).sum()])


def dmt_loss(networks, before, labels, x, y, counts, config):
    """Step 3, supervised learning on the states that the RNN itself has visited:

        L_dyn  = MSE(f(stop_gradient(m_hat_{t-1}), x_t), m_t)
        L_read = CE(g(stop_gradient(m_hat_t)), y_t)             with m_hat_t = f(m_hat_{t-1}, x_t)
        L_dmt  = lambda_dyn L_dyn + L_read

    at the labelled steps: the memories before them (N, R, K, d), labels m_t (N, R, K, d), tokens and targets
    x, y (N, R). Each term is a sum over these roll-outs divided by the counts (2,) of the global batch, to be
    summed over micro-batches. Returns L_dmt, and the terms to log.
    """
    n_transitions, n_targets = counts.clamp(min=1)
    predicted = networks["updater"](before.flatten(0, 1), x.flatten()).view_as(labels)      # m_hat_t
    L_dyn = squared_error(predicted, labels, x != networks["updater"].pad) / n_transitions
    L_read = readout_loss(networks, predicted.detach(), y) / n_targets
    loss = config.lambda_dyn * L_dyn + L_read
    return loss, {"train_loss": loss, "loss_dyn": L_dyn, "loss_read": L_read}


def compile_parts(encoder, updater):
    """Compile the updater in place; return the encoder, compiled if it is the window one."""
    updater.compile(dynamic=False)
    if isinstance(encoder, Encoder):        # of the causal one torch 2.11 fails on the scan (pytorch#180221)
        encoder = torch.compile(encoder, dynamic=False)
    return encoder


def main():
    config = parse(Config, presets=PRESETS, generated=GENERATED)
    config = replace(config, init_from=config.init_from or f"runs/{config.dataset}-smt")
    run = runtime.start(config, "dmt")
    ensure(config.dataset, config.data_dir)
    data = datasets.load(config.dataset, config.data_dir).to(run.device)
    val_x, val_y = datasets.held_out(data, config.eval_docs)

    source = load(run.checkpoint_path if run.resume else config.init_from)
    model_config, networks, initial_memory = restore(source, run.device)
    if "encoder" not in networks:
        raise UsageError("DMT takes its labels from an encoder: --init_from must be of SMT or DMT")
    config = replace(config, seq_len=config.seq_len or source["config"]["seq_len"])
    run.config = config                                 # what is saved: --resume finds the length there
    T = datasets.row_length(data, config.seq_len)
    horizon = min(config.horizon or T, T)
    networks.requires_grad_(False)
    for name in ("updater", "readout"):
        networks[name].requires_grad_()
    optimizers = make_optimizers(networks, config)
    module = runtime.distribute(networks, lambda *batch: dmt_loss(*batch, config), run)
    encoder, updater = networks["encoder"], networks["updater"]
    if run.compile:
        encoder = compile_parts(encoder, updater)
    first_step = runtime.begin(run, data, networks, optimizers)
    if source["stage"] == "smt":
        networks["readout"].start_from(networks["decoder"])

    run.start_clock()
    for step in range(first_step, config.max_iters + 1):
        last = step == config.max_iters or run.should_stop(step)
        if step % config.eval_interval == 0 or last:
            with run.evaluating():
                numbers = evaluate(networks, initial_memory, val_x, val_y, data.meta)
                runtime.save(run, step, numbers, data, networks, optimizers, initial_memory=initial_memory,
                             model_config=asdict(model_config))
        if last:
            break

        x, y, _ = datasets.sample_batch(data, config.seed, step, config.batch_size, T, 1, config.p_start,
                                        run.rank, run.world_size)
        chosen = choose_steps(config, step, T, horizon)
        begins, labelled = (steps.to(run.device, non_blocking=True) for steps in chosen)
        collected = []                       # a part of the rows at a time, which bounds the encoder's memory
        for rows in x.chunk(config.grad_accum):
            with run.autocast():
                collected.append(roll_out_and_label(encoder, updater, rows, begins, horizon, labelled))

        steps_x, steps_y = (cut(tokens, begins, horizon)[:, labelled] for tokens in (x, y))
        counts = run.all_reduce(count_terms(steps_x, steps_y, data.pad))
        batches = zip(collected, steps_x.chunk(config.grad_accum), steps_y.chunk(config.grad_accum))
        for i, ((before, labels), micro_x, micro_y) in enumerate(batches):
            with runtime.micro_step(module, last=i == config.grad_accum - 1):
                with run.autocast():
                    loss, losses = module(before, labels, micro_x, micro_y, counts)
                (loss * run.world_size).backward()      # DDP averages over processes; our losses are sums
            run.accumulate(losses)
        lr = learning_rate(step, config)
        grad_norm = optimizer_step(optimizers, lr)
        run.log_training(step + 1, config.batch_size * len(begins) * horizon, grad_norm, lr)
    run.end(step)


if __name__ == "__main__":
    run_main(main)
