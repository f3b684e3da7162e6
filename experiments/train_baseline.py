"""The two baselines that one would pick instead: a causal Transformer and an LSTM, as
language models on the same rows.

    python -m experiments.train_baseline                                    # Transformer, fables, preset tiny
    python -m experiments.train_baseline --model=lstm
    python -m experiments.train_baseline --dataset=mnist --context_len=784  # every pixel sees all before it
    torchrun --nproc_per_node=8 -m experiments.train_baseline --dataset=tinystories    # 8 GPUs, preset paper

Writes runs/<dataset>-transformer or runs/<dataset>-lstm. Either has about as many parameters as updater and
readout of the same preset have together, and is a module x (B, T) -> logits (B, T, V).
"""
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

import data as datasets
import model
import runtime
from evaluate import loss_and_accuracy, numbers_of
from lib.checkpoints import build_with, fields_of
from lib.cli import DataError, UsageError, check_fields, parse, run_main
from lib.optim import learning_rate, make_optimizers, optimizer_step
from model import IGNORE, cross_entropy
from runtime import RunConfig
from sources.prepare import GENERATED, ensure


@dataclass(frozen=True)
class BaselineConfig:
    """Sizes of a baseline."""
    model: Literal["transformer", "lstm"] = "transformer"   # which baseline
    d_model: int = 64               # width d of tokens
    n_heads: int = 4                # transformer: attention heads
    layers: int = 4                 # transformer: layers
    conv_width: int = 1             # transformer: tokens that the convolution below it spans; 1: none
    context_len: int = 256          # transformer: tokens that a token attends to, itself and those before it
    hidden: int = 256               # lstm: units

    def __post_init__(self):
        check_fields(self, "d_model n_heads layers conv_width context_len hidden")
        if self.d_model % (2 * self.n_heads):
            raise UsageError(f"--d_model={self.d_model} must be a multiple of 2 x n_heads")


@dataclass(frozen=True)
class Config(BaselineConfig, RunConfig):
    """Flags of train_baseline.py, on top of the shared ones."""
    seq_len: int = 256              # tokens T of a training row of text; other documents are rows as they are
    p_start: float = 0.5            # text: share of rows from a document's start; the others begin anywhere

    def __post_init__(self):
        RunConfig.__post_init__(self)
        BaselineConfig.__post_init__(self)
        if self.seq_len < 1 or not 0 <= self.p_start <= 1:
            raise UsageError("--seq_len is at least 1, --p_start from 0 to 1")


TASK = dict(batch_size=64, max_iters=1000, lr=1e-3)
TEXT = dict(d_model=128, layers=6, hidden=464, context_len=256, seq_len=256, p_start=0.5)
PRESETS = {
    "tiny": dict(d_model=112, layers=4, hidden=336, context_len=220, seq_len=220, p_start=0.9, batch_size=16,
                 max_iters=1500, lr=3e-3, eval_interval=300),
    "small": dict(d_model=184, layers=4, hidden=556, batch_size=64, max_iters=20_000, lr=1e-3,
                  eval_interval=1000),
    "paper": dict(d_model=256, n_heads=8, layers=12, hidden=1392, batch_size=128, max_iters=150_000, lr=3e-4,
                  eval_interval=5000),
    "tiny/tinystories": TEXT, "tiny/text": TEXT,
}
for task in ("retrieval", "copy", "stack", "modular"):
    PRESETS[f"tiny/{task}"] = TASK | dict(d_model=72, layers=4, hidden=212)
    PRESETS[f"small/{task}"] = TASK | dict(d_model=128, layers=6, hidden=480)
PRESETS |= {"tiny/keyvalue": TASK | dict(d_model=72, layers=6, hidden=272), "small/keyvalue": TASK}


# ------------------------------------------------------------------------------------------------------------
# The two models. x (B, T) int64 -> logits (B, T, V)

class Transformer(nn.Module):
    """A causal Transformer: in each layer a token attends to itself and the context_len - 1 before it."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.context_len = config.context_len
        self.embed = model.Stem(vocab_size + 1, config.d_model, config.conv_width)      # with PAD
        self.transformer = model.Transformer(config, config.layers, config.context_len)
        self.norm, self.head = nn.RMSNorm(config.d_model), nn.Linear(config.d_model, vocab_size, bias=False)

    def forward(self, x):
        h = self.transformer(self.embed(x), lambda q, k, v: model.attend_to_last(q, k, v, self.context_len))
        return self.head(self.norm(h))


class LSTM(nn.Module):
    """torch's fused LSTM of one layer, from a state of zeros. It is trained by BPTT over the whole row.

    It runs in float32: autocast would take cuDNN's LSTM to float16, in which small gradients vanish.
    """

    def __init__(self, config, vocab_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size + 1, config.d_model)
        self.lstm = nn.LSTM(config.d_model, config.hidden, batch_first=True)
        self.norm, self.head = nn.RMSNorm(config.hidden), nn.Linear(config.hidden, vocab_size, bias=False)
        for bias, forget in (self.lstm.bias_ih_l0, 1.0), (self.lstm.bias_hh_l0, 0.0):
            nn.init.constant_(bias[config.hidden:2 * config.hidden], forget)        # open

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            h = self.lstm(self.embed(x))[0]
        return self.head(self.norm(h))


BASELINES = {"transformer": Transformer, "lstm": LSTM}


def build(config, vocab_size):
    """The baseline of a BaselineConfig as an nn.ModuleDict of one module, named after it."""
    return nn.ModuleDict({config.model: BASELINES[config.model](config, vocab_size)})


def load_baseline(checkpoint, device="cpu"):
    """A checkpoint's module, with its BaselineConfig as module.config. DataError if it does not fit."""
    weights = checkpoint["model"]
    try:
        config, vocab_size = BaselineConfig(**checkpoint["model_config"]), checkpoint["data"]["vocab_size"]
        if config.layers > len(weights) or config.context_len > 2**20:
            raise ValueError("its sizes make no sense")
        networks = build_with(weights, lambda: build(config, vocab_size))
    except (RuntimeError, TypeError, ValueError, UsageError) as error:
        raise DataError(f"the checkpoint does not fit a baseline: {error}") from None
    networks[config.model].config = config
    return networks[config.model].to(device)


# ------------------------------------------------------------------------------------------------------------
# Loss and numbers

def baseline_loss(networks, x, y, count):
    """CE(logits_t, y_t) at every t of rows x, y (B, T).

    These rows' share of the mean over the global batch, which has `count` targets, and what to log.
    """
    (module,) = networks.values()
    loss = cross_entropy(module(x), y) / count.clamp(min=1)
    return loss, dict(train_loss=loss)


@torch.no_grad()
def measure(module, x, y, rows=16):
    """{name: (amounts, weights)} of rnn_loss and rnn_accuracy, (N, P) each, at the P positions of documents
    x, y (N, L) that have a target. The names are the RNN's: a table then has them in one row.
    """
    targets = (y != IGNORE).any(0)
    logits = torch.cat([module(part)[:, targets].float() for part in x.split(rows)])
    return loss_and_accuracy("rnn", logits, y[:, targets])


def evaluate(module, x, y, meta, rows=16, errors=False):
    """evaluate.evaluate for a baseline, on documents x, y (N, L)."""
    return numbers_of(measure(module, x, y, rows), meta, errors)


# ------------------------------------------------------------------------------------------------------------

def main():
    config = parse(Config, presets=PRESETS, generated=GENERATED)
    if config.model == "lstm" and config.compile is None:
        config = replace(config, compile=False)         # the LSTM's kernel is fused already
    run = runtime.start(config, config.model)
    ensure(config.dataset, config.data_dir)
    data = datasets.load(config.dataset, config.data_dir).to(run.device)
    T = datasets.row_length(data, config.seq_len)
    val_x, val_y = datasets.held_out(data, config.eval_docs)

    networks = build(config, data.vocab_size).to(run.device)
    optimizers = make_optimizers(networks, config)
    module = runtime.distribute(networks, baseline_loss, run)
    first_step = runtime.begin(run, data, networks, optimizers)

    run.start_clock()
    for step in range(first_step, config.max_iters + 1):
        last = step == config.max_iters or run.should_stop(step)
        if step % config.eval_interval == 0 or last:
            with run.evaluating():
                numbers = evaluate(networks[config.model], val_x, val_y, data.meta)
                runtime.save(run, step, numbers, data, networks, optimizers, initial_memory=torch.empty(0),
                             model_config=fields_of(BaselineConfig, config))
        if last:
            break

        x, y, _ = datasets.sample_batch(data, config.seed, step, config.batch_size, T, 1, config.p_start,
                                        run.rank, run.world_size)
        count = run.all_reduce((y != IGNORE).sum())
        for i, (micro_x, micro_y) in enumerate(zip(x.chunk(config.grad_accum), y.chunk(config.grad_accum))):
            with runtime.micro_step(module, last=i == config.grad_accum - 1):
                with run.autocast():
                    loss, losses = module(micro_x, micro_y, count)
                (loss * run.world_size).backward()      # DDP averages; our losses are sums
            run.accumulate(losses)
        lr = learning_rate(step, config)
        grad_norm = optimizer_step(optimizers, lr)
        run.log_training(step + 1, config.batch_size * T, grad_norm, lr)
    run.end(step)


if __name__ == "__main__":
    run_main(main)
