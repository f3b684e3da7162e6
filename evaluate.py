"""What a checkpoint is worth, in numbers; several checkpoints of a data set side by side.

    python evaluate.py                                  # fables, the most finished run
    python evaluate.py --dataset=tinystories
    python evaluate.py --ckpt=runs/retrieval-smt,runs/retrieval-dmt --eval_docs=1000

A number is followed by its standard error over the documents. The train scripts log the same numbers:

    val_rnn_loss, _accuracy      updater and readout alone, rolled out from m_empty: the result; nats
    val_teacher_loss, _accuracy  the encoder, then the decoder's first target
    val_held_<n>                 the decoder, from the encoder's memory n tokens before and the tokens since
    val_held_full                the same targets by the causal encoder's trunk, from the text itself:
                                 val_held_<n> minus val_held_full is what the memory has lost
    val_drift                    squared error of the rolled-out memory against the encoder's, over the
                                 variance of the encoder's between documents; 1: as bad as the mean memory
    val_gap_to_floor             fables: val_rnn_loss minus the entropy of the grammar

rnn is measured at all targets of a document, teacher and drift at up to 64 of them, held at up to 16 late
ones: compare a number only with the same one of another checkpoint. python -m experiments.report adds
figures, n-gram models and, for fables, the facts that generated stories keep.
"""
import math
import os
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data as datasets
from lib.checkpoints import check_data, load_each, restore
from lib.cli import UsageError, check_fields, parse, run_main
from model import CHUNK_ROWS, IGNORE, roll_out_without_gradients
from runtime import choose_device


@dataclass(frozen=True)
class Config:
    """Flags of evaluate.py."""
    dataset: str = "fables"     # data set whose most finished run in runs/ is taken
    ckpt: str = ""              # checkpoints (files or folders of runs) to take instead, separated by commas
    data_dir: str = "data"      # folder of the prepared data sets
    eval_docs: int = 256        # held-out documents, at most
    eval_len: int = 512         # tokens read of each of them at most (text; other documents are read whole)
    device: str = "auto"        # cpu, cuda, cuda:1, mps; auto: CUDA where there is one, else the CPU

    def __post_init__(self):
        check_fields(self, "eval_docs eval_len")
        if self.ckpt and not all(self.ckpt.split(",")):
            raise UsageError(f"--ckpt is one checkpoint or several, separated by commas, not {self.ckpt!r}")


# ------------------------------------------------------------------------------------------------------------
# Numbers. Each is measured as amounts and weights (N, S), of N documents at S positions: sum over sum.

POSITIONS = 64              # of each document at which the encoder is asked, at most
DISTANCES = 0, 16, 64       # tokens between a memory and the target that the decoder reads from it
HELD_TARGETS = 16           # targets of each document that are read from all distances, at most
SAME = 1e-6               # variance of memories below which documents do not differ, and drift has no meaning


def spread(t, most):
    """At most `most` of the positions t (n,), evenly spread, the first and the last among them."""
    return t[torch.linspace(0, len(t) - 1, min(most, len(t)), device=t.device).long()]


def targets_of(y, most=POSITIONS):
    """At most `most` positions (S,), evenly spread over those of y (N, L) that have a target."""
    return spread((y != IGNORE).any(0).nonzero().flatten(), most)


def held_targets(t, distances, future_len):
    """For held_<n>: at most HELD_TARGETS of the positions t (S,), late enough for every n; and the n, the
    `distances` (0 first) that are below future_len and fit into the documents."""
    distances = [n for n in distances if n < future_len and n <= int(t.max()) + 1]
    return spread(t[t >= distances[-1] - 1], HELD_TARGETS), distances


def loss_of(name, logits, y):
    """The loss at targets y (N, S), given logits (N, S, V)."""
    valid = y != IGNORE
    loss = F.cross_entropy(logits.flatten(0, 1), y.clamp(min=0).flatten(), reduction="none").view(y.shape)
    return {name: (loss * valid, valid)}


def loss_and_accuracy(name, logits, y):
    """The same, and the accuracy."""
    valid = y != IGNORE
    right = (logits.argmax(-1) == y) & valid
    return loss_of(f"{name}_loss", logits, y) | {f"{name}_accuracy": (right, valid)}


def measure_held(networks, x, y, t, distances, memories=None):
    """held_<n>, CE(D(m_{t-n}, x_{t-n+1..t}), y_t), at t (S,) of x, y (N, L); with a trunk held_full.

    memories: a function of t, (S,) -> (N, S, K, d); the encoder's unless given.
    """
    encoder, measured = networks["encoder"], {}
    for n in distances:
        memory = memories(t - n) if memories else encoder(x, t - n)
        since = x[:, t[:, None] + torch.arange(1 - n, 1, device=t.device)]                      # (N, S, n)
        logits = networks["decoder"](memory.flatten(0, 1), since.flatten(0, 1))[:, -1].float()
        measured |= loss_of(f"held_{n}", logits.view(len(x), len(t), -1), y[:, t])
    if hasattr(encoder, "trunk"):
        _, h = encoder.trunk(x)
        measured |= loss_of("held_full", networks["decoder"].predict(h[:, t + 1]).float(), y[:, t])
    return measured


@torch.no_grad()
def measure(networks, initial_memory, x, y, t, rows=16):
    """{name: (amounts, weights)} of held-out documents x, y (N, L), computed `rows` documents at a time.

    rnn_loss and rnn_accuracy at all positions that have a target. Where there is an encoder, at positions t
    (S,): teacher_loss, teacher_accuracy, drift, and held_<n> for those of DISTANCES that are below future_len
    and fit into the documents.
    """
    targets, memories, logits = (y != IGNORE).any(0), [], []
    targets[:1] |= ~targets.any()           # the networks take no empty batch: one position without a weight
    hidden = True if os.environ.get("RANK", "0") != "0" else None       # None: shown on a terminal
    for part in tqdm(x.split(rows), "evaluating", unit_scale=rows, unit=" rows", leave=False, disable=hidden):
        start = initial_memory.expand(len(part), -1, -1)
        memory = roll_out_without_gradients(networks["updater"], start, part)
        memories.append(memory[:, t])
        memory = memory[:, targets]
        parts = [networks["readout"](m).float() for m in memory.flatten(0, 1).split(CHUNK_ROWS)]
        logits.append(torch.cat(parts).view(*memory.shape[:2], -1))
    measured = loss_and_accuracy("rnn", torch.cat(logits), y[:, targets])
    if "encoder" not in networks or not len(t):
        return measured

    encoder, decoder = networks["encoder"], networks["decoder"]
    labels = [encoder(part, t) for part in x.split(rows)]
    logits = torch.cat([decoder(m.flatten(0, 1), x.new_empty(len(m) * len(t), 0)) for m in labels]).float()
    labels = torch.cat(labels)                                                                  # (N, S, K, d)
    real = x[:, t] != encoder.pad                                                  # a document may have ended
    mean = (labels * real[..., None, None]).sum(0) / real.sum(0).clamp(min=1)[:, None, None]
    error, variance = ((m - labels).square().mean((-2, -1)) * real for m in (torch.cat(memories), mean))
    measured |= loss_and_accuracy("teacher", logits.view(*real.shape, -1), y[:, t])
    if variance.sum() > SAME * real.sum():
        measured |= {"drift": (error, variance)}

    late, distances = held_targets(t, DISTANCES, decoder.future_len)
    parts = [measure_held(networks, *part, late, distances) for part in zip(x.split(rows), y.split(rows))]
    for name in parts[0]:
        amounts, weights = zip(*(part[name] for part in parts))
        measured[name] = torch.cat(amounts), torch.cat(weights)
    return measured


def ratio(amounts, weights):
    """The number: all amounts (N, S) over all weights (N, S); 0 where nothing has a weight."""
    return float(amounts.sum()) / max(float(weights.sum()), 1e-12)


def standard_error(amounts, weights):
    """Standard error of the ratio r = sum a / sum w over N documents, the independent units, document i with
    sums a_i and w_i:

        sqrt(N / (N - 1) sum_i (a_i - r w_i)^2) / sum_i w_i

    (the ratio estimator: W. Cochran, Sampling Techniques, chapter 6). None for a single document. Where all
    w_i are the same it is the standard deviation of the documents' means over sqrt(N). Rows of the data set
    `text` overlap: there it is too small.
    """
    a, w = (tensor.float().sum(1) for tensor in (amounts, weights))
    if len(a) < 2:
        return None
    squares = float((a - ratio(a, w) * w).square().sum())
    return math.sqrt(squares * len(a) / (len(a) - 1)) / max(float(w.sum()), 1e-12)


def numbers_of(measured, meta, errors=False):
    """{val_<name>: number} of {name: (amounts, weights)}; with `errors` also their standard errors."""
    numbers = {f"val_{name}": ratio(*pair) for name, pair in measured.items()}
    if errors:
        numbers |= {f"val_{name}_error": standard_error(*pair) for name, pair in measured.items()}
    if "statistics" in meta:
        numbers["val_gap_to_floor"] = numbers["val_rnn_loss"] - meta["statistics"]["entropy_per_character"]
        numbers |= {"val_gap_to_floor_error": numbers["val_rnn_loss_error"]} if errors else {}
    return numbers


def evaluate(networks, initial_memory, x, y, meta, rows=16, errors=False):
    """The numbers at the top of this file, as numbers_of gives them, on held-out documents x, y (N, L)."""
    return numbers_of(measure(networks, initial_memory, x, y, targets_of(y), rows), meta, errors)


# ------------------------------------------------------------------------------------------------------------

def table(columns):
    """Lines of text from {name: {row: text or number}}: a column for each checkpoint."""
    width = max(18, *(len(name) for name in columns)) + 2
    rows = dict.fromkeys(row for column in columns.values() for row in column if not row.endswith("_error"))
    lines = [f"{'':24}" + "".join(f"{name:{width}}" for name in columns)]
    for row in rows:
        cells = []
        for column in columns.values():
            value, error = column.get(row, "-"), column.get(f"{row}_error")
            cell = f"{value:8.4f}" if isinstance(value, float) else f"{value:>8}"
            cells.append(cell if error is None else f"{cell} +- {error:.4f}")
        lines.append(f"{row:24}" + "".join(f"{cell:{width}}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def main():
    config = parse(Config)
    device = choose_device(config.device)
    loaded = [(name, folder, checkpoint, restore(checkpoint, device))
              for name, folder, checkpoint in load_each(config.ckpt, config.dataset, device)]
    meta = loaded[0][2]["data"]
    data = datasets.load(meta["name"], config.data_dir)
    n = min(config.eval_docs, len(data.val.starts))       # no document twice: they are to be independent
    x, y = (part.to(device) for part in datasets.held_out(data, n, config.eval_len))
    print(f"{meta['name']}: {n:,} held-out documents, {int((y != IGNORE).sum()):,} targets")
    columns = {}
    for name, folder, checkpoint, (_, networks, initial_memory) in loaded:
        check_data(checkpoint, data, folder, warn=lambda line: print(line, file=sys.stderr))
        columns[name] = {"stage": checkpoint["stage"], "steps": f"{checkpoint['step']:,}"}
        columns[name] |= evaluate(networks, initial_memory, x, y, meta, errors=True)
    print(table(columns))


if __name__ == "__main__":
    run_main(main)
