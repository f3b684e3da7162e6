"""DAgger Memory Training: let the RNN run on its own memories and pull it back to the encoder's.

    python train_dmt.py                                        # from runs/fables-smt
    python train_dmt.py --dataset=tinystories --horizon=128 --persistent    # streams that go on from step to step
    torchrun --nproc_per_node=8 train_dmt.py --dataset=mnist   # the paper's settings on 8 GPUs

Starts from an SMT checkpoint (--init_from, else runs/<dataset>-smt) and writes runs/<dataset>-dmt. Encoder and decoder are
frozen; each iteration

    1. rolls f out over `horizon` tokens, without gradients: the memories m_hat_t of the current RNN    (sequential)
    2. asks the encoder for the memories m_t it should have had, at every `label_stride`-th step       (parallel)
    3. trains f on (m_hat_{t-1}, x_t) -> m_t, and g on m_hat_t -> y_t, all pairs at once               (parallel)

g is read out at as many steps as have labels, drawn at random: at every step it would cost more than the rest where labels are few.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

import data as datasets
import runtime
import tasks
from data import IGNORE, futures
from evaluate import evaluate
from flops import dmt_flops
from model import decoder_loss, parameter_counts, readout_loss, restore, roll_out, roll_out_without_gradients, squared_error
from runtime import RunConfig, UsageError


@dataclass(frozen=True)
class Config(RunConfig):
    """What train_dmt.py can be told, beside what all train scripts can."""
    horizon: int = 0                # tokens of a roll-out; 0: the whole row. Rows are cut into as many of them as fit, side by side
    grow: float = 0.0               # share of the iterations over which the horizon doubles, from --label_stride up to --horizon
    label_stride: int = 1           # steps from one label of the encoder to the next; with --unroll, from one labelled run to the next
    unroll: int = 1                 # steps of a run: f goes on from its own memory, with gradients through them; 1 is DAgger
    updates: int = 1                # optimiser steps made with the pairs of an iteration, each with its share of them
    seq_len: int = 0                # tokens T of a training row; 0: the longest document, for text the encoder's context_len
    p_start: float = 0.5            # text: share of rows from a document's start; all data: of iterations that roll out from a row's start
    persistent: bool = False        # each row is a long stream: its roll-out goes on from the last memory of the one before (text only)
    lambda_dyn: float = 10.0        # weight of the dynamics loss
    relative: bool = False          # the dynamics loss of each memory token is divided by how far it is from its label at the start
    lambda_own: float = 0.0         # weight of L_own: the decoder's first target, from the memories that the transition predicts
    lambda_hold: float = 0.0        # weight of L_hold: the decoder's whole future, from the memory after --unroll steps
    lambda_read: float = 1.0        # weight of the readout's loss

    def __post_init__(self):
        super().__post_init__()
        if min(self.horizon, self.seq_len) < 0 or min(self.unroll, self.updates) < 1 or not 0 <= self.p_start <= 1 or not 0 <= self.grow < 1:
            raise UsageError("--horizon and --seq_len are at least 0, --unroll and --updates at least 1, --p_start from 0 to 1, --grow below 1")
        if self.label_stride < self.unroll:
            raise UsageError(f"--label_stride={self.label_stride} must be at least --unroll={self.unroll}")
        if self.persistent and self.grow:
            raise UsageError("--persistent streams have one horizon: they take --grow=0")


PRESETS = {
    "tiny": dict(batch_size=8, max_iters=240, lr=2e-3, grow=0.5, label_stride=16, unroll=16, updates=2, lambda_dyn=1.0,
                 relative=True, lambda_own=1.0, lambda_hold=1.0, p_start=0.9, eval_interval=60),
    **{f"tiny/{name}": dict(seq_len=256, p_start=0.5, max_iters=320, eval_interval=80) for name in ("tinystories", "text")},
    "small": dict(batch_size=32, max_iters=2000, lr=1e-3, grow=0.5, label_stride=16, unroll=16, updates=2, lambda_dyn=1.0,
                  relative=True, lambda_own=1.0, lambda_hold=1.0, eval_interval=100),
    "paper": dict(batch_size=32, max_iters=1500, lr=3e-5, horizon=256, label_stride=16, eval_interval=100, eval_len=1024),
}
SYNTHETIC = dict(batch_size=32, max_iters=1000, label_stride=4, unroll=4, eval_interval=100)
TASKS = {name: SYNTHETIC for name in tasks.TASKS} | {
    "retrieval": SYNTHETIC | dict(max_iters=100, eval_interval=25),                         # little is left to learn
    "keyvalue": SYNTHETIC | dict(batch_size=64, max_iters=600, updates=1)}
PRESETS |= {f"{size}/{name}": flags for size in ("tiny", "small") for name, flags in TASKS.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The three steps

def horizon_at(step, config, H):
    """The tokens of a roll-out: label_stride, twice as many, .., H, the same number of iterations each until `grow` of them are over."""
    doublings = max(1, math.ceil(math.log2(H / min(config.label_stride, H))))
    begun = int(doublings * step / (config.grow * config.max_iters)) if config.grow else doublings
    return H if begun >= doublings else min(H, config.label_stride * 2 ** begun)


def choose_pairs(config, step, T, h):
    """Where in the rows of a step the roll-outs of h tokens begin, and which of their steps are trained on; pure in (seed, step).

    Returns begins (n,), one after the other from 0 (with probability p_start) or anywhere; and for each of config.updates
    optimiser steps (fewer if there are fewer runs) the runs (R, unroll) that get labels, and as many steps (r,) that are read out.
    """
    rng, n = datasets.philox(config.seed, step, "roll-out"), T // h
    begin = 0 if rng.random() < config.p_start else int(rng.integers(T - n * h + 1))
    unroll = min(config.unroll, h)
    R = max(1, h // config.label_stride)
    first = int(rng.integers(h - unroll - (R - 1) * config.label_stride + 1))
    runs = first + config.label_stride * torch.from_numpy(rng.permutation(R))[:, None] + torch.arange(unroll)
    reads, updates = torch.from_numpy(rng.permutation(h)[:runs.numel()]), min(config.updates, R)
    return begin + h * torch.arange(n), list(zip(runs.tensor_split(updates), reads.tensor_split(updates)))


@torch.no_grad()
def roll_out_and_label(networks, x, begins, h, runs, start=None):
    """Steps 1 and 2 on rows x (B, T): run f over x[begin:begin+h] for each of n rising `begins`, ask E for labels.

    Each starts from the encoder's memory at that place (m_empty at 0), or from `start` (B n, K, d). runs (R, k): steps of a
    roll-out, 0..h-1, that get a label. Returns, with the n roll-outs of a row side by side, the memory before each run,
    m_hat (B n, R, K, d), the memory after each step, m_hat_t (B n, h, K, d), and the labels m_t (B n, R, k, K, d).
    """
    encoder, n, labelled = networks["encoder"], len(begins), (begins[:, None].to(x.device) + runs.flatten()).flatten()
    if start is None:
        starts = int((begins > 0).sum())    # m_empty is the same in all rows: it is encoded once
        memories = encoder(x, torch.cat([begins[n - starts:].to(x.device) - 1, labelled]))  # one call reads the row once
        first, memories = memories.split([starts, len(labelled)], dim=1)
        start = torch.cat([encoder.initial_memory().expand(len(x), n - starts, -1, -1), first], dim=1).flatten(0, 1)
    else:
        memories = encoder(x, labelled)
    labels = memories.unflatten(1, (n, *runs.shape)).flatten(0, 1)
    after = roll_out_without_gradients(networks["updater"], start, cut(x, begins, h))
    return torch.cat([start[:, None], after], dim=1)[:, runs[:, 0]], after, labels


def cut(x, begins, h):
    """The pieces of h tokens of rows (B, T) that begin at n places -> (B n, h)."""
    return x[:, (begins[:, None] + torch.arange(h)).to(x.device)].flatten(0, 1)


def pieces(x, y, begins, length, pad):
    """The pieces of rows x, y (B, T) from n places on -> (B n, length) each; past the end of a row there is PAD, and nothing asked."""
    return cut(F.pad(x, (0, length), value=pad), begins, length), cut(F.pad(y, (0, length), value=IGNORE), begins, length)


def count_terms(x, y, runs, reads, future_len, pad):
    """The denominators of the means, (4,): transitions trained, targets after them, targets decoded at the end of each run, targets
    read out."""
    held = futures(x, y, runs[:, -1], future_len, pad)[1]
    return torch.stack([(x[:, runs] != pad).sum(), *((some != IGNORE).sum() for some in (y[:, runs], held, y[:, reads]))])


def dmt_loss(networks, before, after, labels, x, y, runs, reads, counts, config, future_len):
    """Step 3, plain supervised learning on the states that the RNN itself has visited:

        L_dyn  = MSE(f(stop_gradient(m_hat_{t-1}), x_t), m_t)       at the labelled steps
        L_own  = CE(D(f(stop_gradient(m_hat_{t-1}), x_t)), y_t)     there, too: what f must get right is what D needs (not in the paper)
        L_hold = CE(D(f(stop_gradient(m_hat_{t-1}), x_t), x_{t+1..t+Tf-1}), y_{t..t+Tf-1})      and what it will need later (nor is this)
        L_read = CE(g(stop_gradient(m_hat_t)), y_t)                 at the steps `reads`

    x, y (N, h + Tf - 1) are the tokens of N roll-outs and those that follow, runs (R, k), reads (r,) steps of them, and
    before (N, R, K, d), after (N, h, K, d), labels (N, R, k, K, d) what roll_out_and_label returned for them. With k > 1, f goes
    on from its own memory for k steps, and L_hold is at the last. Each term is these roll-outs' share of the global mean: counts
    (4,) as of count_terms, of the global batch. Returns the weighted sum and its terms.
    """
    transitions, predictions, held, readouts = counts.clamp(min=1)
    losses = {}
    predicted = roll_out(networks["updater"], before.flatten(0, 1), x[:, runs].flatten(0, 1)).view_as(labels)
    real = x[:, runs] != networks["updater"].pad
    losses["dyn"] = squared_error(predicted, labels, real, before[:, :, None] if config.relative else None) / transitions
    if config.lambda_own:
        losses["own"] = decoder_loss(networks, predicted.flatten(1, 2), x, y, runs.flatten(), predictions, future_len=1)
    if config.lambda_hold:
        losses["hold"] = decoder_loss(networks, predicted[:, :, -1], x, y, runs[:, -1], held, future_len)
    losses["read"] = readout_loss(networks, after[:, reads], y[:, reads], readouts)
    loss = sum(getattr(config, f"lambda_{name}") * term for name, term in losses.items())
    return loss, {"train_loss": loss, **{f"loss_{name}": term for name, term in losses.items()}}


# ---------------------------------------------------------------------------------------------------------------------

def main():
    config = runtime.parse(Config, presets=PRESETS)
    run = runtime.start(config, "dmt")
    run.first(lambda: datasets.ensure(config.dataset, config.data_dir))
    data = datasets.load(config.dataset, config.data_dir).to(run.device)
    val_x, val_y = datasets.held_out(data, config.eval_docs, config.eval_len, seed=0)

    source = runtime.load(run.checkpoint_path if config.resume else config.init_from or f"runs/{config.dataset}-smt", run.device)
    runtime.check_data(source, data)
    model_config, networks, initial_memory = restore(source, run.device)
    if "encoder" not in networks:
        raise UsageError("DMT takes its labels from an encoder: --init_from must be a checkpoint of train_smt.py or train_dmt.py")
    if not config.resume and source["config"].get("preset") != config.preset:
        run.print(f"note: the encoder was trained with --preset={source['config'].get('preset')}, this run has {config.preset}")
    T = datasets.row_length(data, config.seq_len, model_config.context_len)
    H, Tf = min(config.horizon or T, T), model_config.future_len
    if config.persistent:
        datasets.stream_rows(data, 0, config.batch_size, T, H)      # refuses what cannot go on, before anything is written
    networks.requires_grad_(False)
    for name in ("updater", "readout"):
        networks[name].requires_grad_()
    optimizer = runtime.adamw(networks, config)
    module = runtime.distribute(networks, lambda *batch: dmt_loss(*batch, config, model_config.future_len), run)
    if run.compile:
        networks["updater"].compile(dynamic=False)      # for the roll-outs
    first_step = runtime.begin(run, config, data, networks, optimizer)
    run.print(parameter_counts(networks))

    memory = None
    if config.resume and config.persistent and "memory" in source:
        if len(source["memory"]) != config.batch_size:
            raise UsageError(f"the run has {len(source['memory'])} streams: --resume it with that --batch_size, not {config.batch_size}")
        memory = source["memory"].chunk(run.world_size)[run.rank]

    run.start_clock()
    for step in range(first_step, config.max_iters + 1):
        last = step == config.max_iters or run.should_stop(step)
        if step % config.eval_interval == 0 or last:
            with run.evaluating():
                numbers = evaluate(networks, initial_memory, val_x, val_y, data.meta)
                extra = {"memory": run.gather(memory)} if memory is not None else {}
                runtime.save(run, "dmt", step, numbers, config, data, networks, optimizer, model_config=asdict(model_config),
                             initial_memory=initial_memory, **extra)
        if last:
            break

        h = horizon_at(step, config, H)
        begins, pairs = choose_pairs(config, step, T, h)
        if config.persistent:
            begins = torch.tensor([T - h])
            x, y, new_streams = datasets.stream_rows(data, step, config.batch_size, T, h, run.rank, run.world_size)
            memory = None if new_streams else memory
        else:
            x, y, _ = datasets.sample_batch(data, config.seed, step, config.batch_size, T, 1, config.p_start, run.rank, run.world_size)
        pairs = [(runs.to(run.device), reads.to(run.device)) for runs, reads in pairs]
        rolled_x, rolled_y = pieces(x, y, begins, h + Tf - 1, data.pad)

        collected = []                                  # a part of the rows at a time, which bounds the encoder's memory
        for i, rows in enumerate(x.chunk(config.grad_accum)):
            start = None if memory is None else memory.chunk(config.grad_accum)[i]
            with run.autocast():
                collected.append(roll_out_and_label(networks, rows, begins, h, torch.cat([runs for runs, _ in pairs]), start))
        before, after, labels = (torch.cat(parts) for parts in zip(*collected))
        memory = after[:, -1].clone() if config.persistent else None     # a view would keep, and save, all steps

        lr = runtime.learning_rate(step, config)
        place = 0
        for runs, reads in pairs:
            here = slice(place, place := place + len(runs))
            counts = run.sum(count_terms(rolled_x, rolled_y, runs, reads, Tf, data.pad))
            batch = before[:, here], after, labels[:, here], rolled_x, rolled_y
            for i, part in enumerate(zip(*(tensor.chunk(config.grad_accum) for tensor in batch))):
                with runtime.micro_step(module, last=i == config.grad_accum - 1):
                    with run.autocast():
                        loss, losses = module(*part, runs, reads, counts)
                    (loss * run.world_size).backward()  # DDP averages over processes; our losses are to be summed
                run.count({name: value / len(pairs) for name, value in losses.items()})
            grad_norm = runtime.optimizer_step(optimizer, lr, config.grad_clip)
        flops, sequential_flops = dmt_flops(config, model_config, networks, data.vocab_size, T, begins, h, pairs)
        run.spend(tokens=config.batch_size * len(begins) * h, flops=flops, sequential_flops=sequential_flops)
        run.log_training(step + 1, grad_norm, lr)


if __name__ == "__main__":
    runtime.run_main(main)
