"""Backpropagation through time, the baseline: the same updater and readout, unrolled over the tokens.

    python train_bptt.py                                        # fables, preset tiny
    python train_bptt.py --dataset=retrieval --truncate=16      # gradients through 16 steps at most
    python train_bptt.py --init_from=runs/fables-dmt            # fine-tune a pretrained RNN

Writes runs/<dataset>-bptt. Every step of the RNN waits for the one before, and so does every step of the
backward pass.
"""
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import data as datasets
import runtime
from evaluate import evaluate
from lib.checkpoints import fields_of
from lib.cli import UsageError, parse, run_main
from lib.graphs import captured_with_gradients
from lib.optim import learning_rate, make_optimizers, optimizer_step
from model import GRAPH_STEPS, IGNORE, RNNConfig, build, normalise, readout_loss, roll_out
from runtime import RunConfig
from sources.prepare import GENERATED, ensure
from sources.tasks import TASKS


@dataclass(frozen=True)
class Config(RNNConfig, RunConfig):
    """Flags of train_bptt.py, on top of the shared ones."""
    seq_len: int = 256              # tokens T of a training row of text; in other data a row is a document
    truncate: int = 0               # tokens after which the gradient through time is cut; 0: never
    p_start: float = 0.5            # text: share of rows from a document's start; the others begin anywhere

    def __post_init__(self):
        RunConfig.__post_init__(self)
        RNNConfig.__post_init__(self)
        if self.seq_len < 1 or self.truncate < 0 or not 0 <= self.p_start <= 1:
            raise UsageError("--seq_len is at least 1, --truncate at least 0, --p_start from 0 to 1")


MLP = dict(updater="mlp", updater_layers=1, n_heads=4, memory_tokens=8)
TEXT = dict(d_model=128, memory_tokens=4, decoder_layers=3, seq_len=256, p_start=0.5)
TASK = dict(memory_tokens=4, batch_size=64, max_iters=1000, lr=1e-3)
PRESETS = {
    "tiny": MLP | dict(d_model=64, memory_tokens=16, decoder_layers=2, seq_len=220, p_start=0.9,
                       batch_size=16, max_iters=400, lr=2e-3, eval_interval=100),
    "small": MLP | dict(d_model=128, decoder_layers=3, batch_size=64, max_iters=20_000, lr=1e-3,
                        eval_interval=1000),
    "paper": dict(d_model=256, n_heads=8, memory_tokens=16, updater_layers=8, decoder_layers=4,
                  batch_size=128, grad_accum=2, max_iters=150_000, lr=3e-4, eval_interval=5000),
    "tiny/tinystories": TEXT, "tiny/text": TEXT,
    # the activations of 25,000 tokens take 60 GiB: rows of 784 and 1,024 tokens need smaller micro-batches
    "paper/mnist": dict(grad_accum=4), "paper/sketchy": dict(grad_accum=8),
}
for task in TASKS:
    PRESETS[f"tiny/{task}"] = PRESETS[f"small/{task}"] = TASK
PRESETS["tiny/keyvalue"] = PRESETS["small/keyvalue"] = TASK | dict(memory_tokens=8)


def unroll(updater, memory, x, truncate=0, graphs=()):
    """The memories after each token of x (B, T), from memory (B, K, d) -> (B, T, K, d).

    A window has `truncate` tokens, and no gradient passes from one to another; with truncate=0 it has
    GRAPH_STEPS, and gradients pass. graphs: from `capture`, a roll-out for each window.
    """
    windows, memories = x.split(truncate or GRAPH_STEPS, dim=1), []
    roll_outs = graphs or [partial(roll_out, updater)] * len(windows)
    for roll, window in zip(roll_outs, windows, strict=True):
        memories.append(roll(memory, window))
        memory = memories[-1][:, -1].detach() if truncate else memories[-1][:, -1]
    return torch.cat(memories, dim=1)


def capture(updater, config, run, T):
    """CUDA graphs of the windows of `unroll`, for micro-batches of rows of T tokens: a launch each instead of
    thousands. () on other devices, with several processes, and for many windows."""
    def roll(*inputs):
        with run.autocast(cache=False):
            return roll_out(*inputs)

    if run.world_size > 1:
        return ()
    x = torch.zeros(config.batch_size // config.grad_accum, T, dtype=torch.long, device=run.device)
    memory = torch.ones(len(x), config.memory_tokens, config.d_model, device=run.device)
    windows = x.split(config.truncate or GRAPH_STEPS, dim=1)
    inputs = [(memory.clone().requires_grad_(), window.clone()) for window in windows]
    return captured_with_gradients(roll, updater, inputs)


def bptt_loss(networks, x, y, count, truncate=0, graphs=()):
    """CE(g(m_t), y_t) with m_t = f(m_{t-1}, x_t) from a learned m_{-1}, through all steps or `truncate`.

    x, y (B, T). A sum over these rows divided by the `count` of targets of the global batch.
    """
    start = normalise(networks.initial_memory).expand(len(x), -1, -1)
    memories = unroll(networks["updater"], start, x, truncate, graphs)
    loss = readout_loss(networks, memories, y) / count.clamp(min=1)     # of all steps at once
    return loss, dict(train_loss=loss)


def compiled_parts(device):
    """The networks that --compile compiles; on a CPU not the readout, whose shapes change in each step."""
    return ("updater", "readout") if device.type == "cuda" else ("updater",)


def main():
    config = parse(Config, presets=PRESETS, generated=GENERATED)
    run = runtime.start(config, "bptt")
    ensure(config.dataset, config.data_dir)
    data = datasets.load(config.dataset, config.data_dir).to(run.device)
    T = datasets.row_length(data, config.seq_len)
    val_x, val_y = datasets.held_out(data, config.eval_docs)

    networks = build(config, data.vocab_size, ("updater", "readout"))
    networks.initial_memory = nn.Parameter(torch.randn(config.memory_tokens, config.d_model))
    networks.to(run.device)
    optimizers = make_optimizers(networks, config)
    module = runtime.distribute(networks, bptt_loss, run, compiled_parts(run.device))
    first_step = runtime.begin(run, data, networks, optimizers)
    graphs = capture(networks["updater"], config, run, T)

    run.start_clock()
    for step in range(first_step, config.max_iters + 1):
        last = step == config.max_iters or run.should_stop(step)
        if step % config.eval_interval == 0 or last:
            with run.evaluating():
                initial_memory = normalise(networks.initial_memory)
                numbers = evaluate(networks, initial_memory, val_x, val_y, data.meta)
                runtime.save(run, step, numbers, data, networks, optimizers, initial_memory=initial_memory,
                             model_config=fields_of(RNNConfig, config))
        if last:
            break

        x, y, _ = datasets.sample_batch(data, config.seed, step, config.batch_size, T, 1, config.p_start,
                                        run.rank, run.world_size)
        count = run.all_reduce((y != IGNORE).sum())
        for i, (micro_x, micro_y) in enumerate(zip(x.chunk(config.grad_accum), y.chunk(config.grad_accum))):
            with runtime.micro_step(module, last=i == config.grad_accum - 1):
                with run.autocast(cache=False):
                    loss, losses = module(micro_x, micro_y, count, config.truncate, graphs)
                (loss * run.world_size).backward()      # DDP averages over processes; our losses are sums
            run.accumulate(losses)
        lr = learning_rate(step, config)
        grad_norm = optimizer_step(optimizers, lr)
        run.log_training(step + 1, config.batch_size * T, grad_norm, lr)
    run.end(step)


if __name__ == "__main__":
    run_main(main)
