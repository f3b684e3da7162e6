"""Backpropagation through time, the baseline: the same updater and readout, unrolled over the tokens.

    python train_bptt.py                                          # fables, preset tiny
    python train_bptt.py --dataset=retrieval --truncate=16        # gradients through 16 steps at most
    python train_bptt.py --dataset=fables --init_from=runs/fables-dmt    # fine-tune a pretrained RNN

Writes runs/<dataset>-bptt. Every step of the RNN waits for the one before, and so does every step of the backward pass.
"""
from dataclasses import asdict, dataclass

import torch
from torch import nn

import data as datasets
import runtime
import tasks
from data import IGNORE
from evaluate import evaluate
from flops import bptt_flops
from model import ModelConfig, build, normalise, parameter_counts, readout_loss, roll_out
from runtime import RunConfig, UsageError


@dataclass(frozen=True)
class Config(RunConfig):
    """Flags of train_bptt.py, on top of the shared ones."""
    updater: str = "transformer"    # the RNN's transition: transformer, mlp or gru
    d_model: int = 64               # width d of tokens and memory tokens
    n_heads: int = 4                # attention heads
    memory_tokens: int = 4          # memory tokens K
    updater_layers: int = 2         # layers of the updater (transformer and mlp)
    decoder_layers: int = 1         # layers of the readout
    context_len: int = 256          # tokens of a row of text, unless --seq_len says
    seq_len: int = 0                # tokens T of a training row; 0: the longest document, for text context_len
    truncate: int = 0               # tokens after which the gradient through time is cut; 0: never
    p_start: float = 0.5            # share of the rows that begin at a document's start; the others begin anywhere (text only)

    def __post_init__(self):
        super().__post_init__()
        model_config(self)              # refuses sizes that make no sense
        if self.seq_len < 0 or self.truncate < 0 or not 0 <= self.p_start <= 1:
            raise UsageError("--seq_len and --truncate are at least 0, --p_start from 0 to 1")


def model_config(config):
    """The ModelConfig of the stage's config; what it says of an encoder and a decoder, which are not there, does not matter."""
    sizes = "updater d_model n_heads memory_tokens updater_layers decoder_layers context_len".split()
    return ModelConfig(**{name: getattr(config, name) for name in sizes})


PRESETS = {
    "tiny": dict(updater="mlp", d_model=64, n_heads=4, memory_tokens=8, updater_layers=1, decoder_layers=2, context_len=220,
                 p_start=0.9, batch_size=16, max_iters=400, lr=2e-3, eval_interval=100),
    **{f"tiny/{name}": dict(d_model=128, memory_tokens=4, decoder_layers=3, context_len=128, seq_len=256, p_start=0.5)
       for name in ("tinystories", "text")},
    "small": dict(updater="mlp", d_model=128, n_heads=4, memory_tokens=8, updater_layers=1, decoder_layers=3, context_len=256,
                  batch_size=64, max_iters=20_000, lr=1e-3, eval_interval=1000, log_interval=50),
    "paper": dict(d_model=256, n_heads=8, memory_tokens=16, updater_layers=8, decoder_layers=4, context_len=256,
                  batch_size=128, max_iters=150_000, lr=3e-4, lr_decay="constant", eval_interval=5000, eval_len=1024, log_interval=100),
}
SYNTHETIC = dict(memory_tokens=4, batch_size=64, max_iters=1000, lr=1e-3)
TASKS = {name: SYNTHETIC for name in tasks.TASKS} | {"keyvalue": SYNTHETIC | dict(memory_tokens=8)}
PRESETS |= {f"{size}/{name}": flags for size in ("tiny", "small") for name, flags in TASKS.items()}


def unroll(updater, memory, x, truncate=0):
    """The memories after each token of x (B, T), from memory (B, K, d) -> (B, T, K, d).

    With truncate > 0 the memory is cut from the graph after every `truncate` tokens.
    """
    memories = []
    for window in x.split(truncate or x.shape[1], dim=1):
        memories.append(roll_out(updater, memory, window))
        memory = memories[-1][:, -1].detach()
    return torch.cat(memories, dim=1)


def compiled_parts(device):
    """The networks that --compile compiles; on a CPU not the readout, which gets another number of memories at each step."""
    return ("updater", "readout") if device.type == "cuda" else ("updater",)


def bptt_loss(networks, x, y, count, truncate=0):
    """CE(g(m_t), y_t) with m_t = f(m_{t-1}, x_t) from a learned m_{-1}; the gradient goes through all steps, or `truncate`.

    x, y (B, T). These rows' share of the mean over the global batch, which has `count` targets.
    """
    start = normalise(networks.initial_memory).expand(len(x), -1, -1)
    memories = unroll(networks["updater"], start, x, truncate)
    loss = readout_loss(networks, memories, y) / count.clamp(min=1)     # of all steps at once: only the updater is sequential
    return loss, dict(train_loss=loss)


# ---------------------------------------------------------------------------------------------------------------------

def main():
    config = runtime.parse(Config, presets=PRESETS)
    run = runtime.start(config, "bptt")
    run.first(lambda: datasets.ensure(config.dataset, config.data_dir))
    data = datasets.load(config.dataset, config.data_dir).to(run.device)
    T = datasets.row_length(data, config.seq_len, config.context_len)
    val_x, val_y = datasets.held_out(data, config.eval_docs, config.eval_len, seed=0)

    networks = build(model_config(config), data.vocab_size, ("updater", "readout"))
    networks.initial_memory = nn.Parameter(torch.randn(config.memory_tokens, config.d_model))
    networks.to(run.device)
    optimizers = runtime.optimizers(networks, config)
    module = runtime.distribute(networks, lambda *batch: bptt_loss(*batch, config.truncate), run, compiled_parts(run.device))
    first_step = runtime.begin(run, config, data, networks, optimizers)
    run.print(parameter_counts(networks))
    flops, sequential_flops = bptt_flops(config, model_config(config), networks, data.vocab_size, T)

    run.start_clock()
    for step in range(first_step, config.max_iters + 1):
        last = step == config.max_iters or run.should_stop(step)
        if step % config.eval_interval == 0 or last:
            with run.evaluating():
                initial_memory = normalise(networks.initial_memory)
                numbers = evaluate(networks, initial_memory, val_x, val_y, data.meta)
                runtime.save(run, "bptt", step, numbers, config, data, networks, optimizers, model_config=asdict(model_config(config)),
                             initial_memory=initial_memory)
        if last:
            break

        x, y, _ = datasets.sample_batch(data, config.seed, step, config.batch_size, T, 1, config.p_start, run.rank, run.world_size)
        count = run.sum((y != IGNORE).sum())
        for i, (micro_x, micro_y) in enumerate(zip(x.chunk(config.grad_accum), y.chunk(config.grad_accum))):
            with runtime.micro_step(module, last=i == config.grad_accum - 1):
                with run.autocast():
                    loss, losses = module(micro_x, micro_y, count)
                (loss * run.world_size).backward()      # DDP averages over processes; our losses are to be summed
            run.count(losses)
        lr = runtime.learning_rate(step, config)
        grad_norm = runtime.optimizer_step(optimizers, lr)
        run.spend(tokens=config.batch_size * T, flops=flops, sequential_flops=sequential_flops)
        run.log_training(step + 1, grad_norm, lr)


if __name__ == "__main__":
    runtime.run_main(main)
