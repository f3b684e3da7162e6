"""What a checkpoint is worth, in numbers and figures; several checkpoints of a data set side by side.

    python evaluate.py                                  # fables, the most finished run: losses, drift, and which facts are kept?
    python evaluate.py --dataset=tinystories --ngrams=5 # beside n-gram models of the same text
    python evaluate.py --ckpt=runs/retrieval-smt,runs/retrieval-dmt --eval_docs=1000
    python evaluate.py --ckpt=runs/retrieval-smt,runs/retrieval-dmt --figures=runs/figures --json=runs/retrieval.json

A number is followed by its standard error over the held-out documents (`standard_error`).
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data as datasets
import fables
import runtime
from data import IGNORE
from model import ModelConfig, restore, roll_out_without_gradients
from runtime import UsageError
from sample import complete_stories, find_checkpoint


@dataclass(frozen=True)
class Config:
    """What evaluate.py can be told."""
    dataset: str = "fables"     # data set whose most finished run in runs/ is taken
    ckpt: str = ""              # checkpoints (files or folders of runs) to take instead, all of one data set, separated by commas
    data_dir: str = "data"      # folder of the prepared data sets
    eval_docs: int = 256        # held-out documents, at most
    eval_len: int = 512         # tokens read of each of them at most (synthetic documents are read whole)
    ngrams: int = 0             # also n-gram models of the training text, up to this order (text only)
    num_samples: int = 100      # fables: stories to generate, to count in how many the facts are kept
    temperature: float = 1.0    # fables: of the generated stories
    seed: int = 0               # fables: of the generated stories
    device: str = "auto"        # cpu, cuda, cuda:1, mps; auto: CUDA where there is one, else the CPU
    figures: str = ""           # folder to draw the figures into
    json: str = ""              # file to write the numbers to, and what the figures show

    def __post_init__(self):
        if min(self.eval_docs, self.eval_len, self.num_samples) < 1 or not 0 <= self.ngrams <= 7 or self.temperature < 0:
            raise UsageError("--eval_docs, --eval_len and --num_samples are at least 1, --ngrams is from 0 to 7, --temperature at least 0")
        if self.ckpt and not all(self.ckpt.split(",")):
            raise UsageError(f"--ckpt is one checkpoint or several, separated by commas, not {self.ckpt!r}")
        if self.figures and Path(self.figures).exists() and not Path(self.figures).is_dir():
            raise UsageError(f"--figures: {self.figures} is not a folder")


@dataclass
class Trained:
    """A checkpoint: its name and folder, what it was trained on (meta) and how (settings), its networks and m_empty (K, d)."""
    name: str
    folder: Path
    stage: str
    step: int
    meta: dict
    settings: dict
    config: ModelConfig
    networks: torch.nn.ModuleDict
    initial_memory: torch.Tensor


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

def spread(places, most):
    """At most `most` of the places (n,), evenly spread, the first and the last among them."""
    return places[torch.linspace(0, len(places) - 1, min(most, len(places)), device=places.device).long()]


def loss_of(name, logits, y):
    """Amounts and weights (N, S) of the loss at targets y (N, S), given logits (N, S, V)."""
    asked = y != IGNORE
    loss = F.cross_entropy(logits.flatten(0, 1), y.clamp(min=0).flatten(), reduction="none").view(y.shape)
    return {name: (loss * asked, asked)}


def scores(name, logits, y):
    """As loss_of, and the accuracy."""
    asked = y != IGNORE
    return loss_of(f"{name}_loss", logits, y) | {f"{name}_accuracy": ((logits.argmax(-1) == y) & asked, asked)}


DISTANCES = 0, 16, 64       # tokens between a memory and the target that the decoder reads from it
PLACES = 16                 # targets of each document that are read from all distances, at most


def read_from(networks, memory, x, t, n):
    """The decoder's logits (P, V) of what follows x_t, from m_{t-n} and x_{t-n+1..t}: memory (P, K, d), x (P, L), t (P,)."""
    since = t[:, None] + torch.arange(1 - n, 1, device=t.device)
    return networks["decoder"](memory, x.gather(1, since))[:, -1].float()


def measure_held(networks, x, y, t, distances, memories=None):
    """Amounts and weights of held_<n> at places t (S,): the loss of y_t that the decoder reads from m_{t-n} and x_{t-n+1..t}; and, where
    there is a trunk, of held_full, which it reads from all of the past. The same targets: the differences are what memories lack.

    memories: a function of t, (S,) -> (N, S, K, d); the encoder's unless given.
    """
    encoder, parts = networks["encoder"], {}
    for n in distances:
        memory = memories(t - n) if memories else encoder(x, t - n)
        logits = read_from(networks, memory.flatten(0, 1), x.repeat_interleave(len(t), 0), t.repeat(len(x)), n)
        parts |= loss_of(f"held_{n}", logits.view(len(x), len(t), -1), y[:, t])
    if hasattr(encoder, "trunk"):
        parts |= loss_of("held_full", networks["decoder"].predict(encoder.trunk(x)[1][:, t + 1]).float(), y[:, t])
    return parts


@torch.no_grad()
def measure(networks, initial_memory, x, y, t, rows=16):
    """What each document and place of x, y (N, L) adds to the numbers: {name: (amounts, weights)}; a number is sum over sum.

    rnn_loss, rnn_accuracy, at the P places where anything is asked (N, P): Updater and Readout alone, rolled out from m_empty;
    of the Transformer, which has no Updater, its own. Where there is an encoder, and places t (S,) to ask it for memories,
    (N, S): teacher_loss, teacher_accuracy of the Decoder's first target; drift: the squared error of the rolled-out memory,
    the weight the squared distance of the encoder's from its mean over the documents, both per component; and held_<n> of
    measure_held, for those of DISTANCES that are below future_len and fit into the documents.
    """
    n, asked, memories, logits = len(x), (y != IGNORE).any(0), [], []
    asked[:1] |= ~asked.any()                                   # the networks take no empty batch: one place without a weight
    for part in x.split(rows):
        if "updater" in networks:
            memory = roll_out_without_gradients(networks["updater"], initial_memory.expand(len(part), -1, -1), part)
            memories.append(memory[:, t])
            logits.append(networks["readout"](memory[:, asked].flatten(0, 1)).float().unflatten(0, (len(part), -1)))
        else:
            logits.append(networks["decoder"].read(part)[0][:, asked].float())
    measured = scores("rnn", torch.cat(logits), y[:, asked])
    if "encoder" not in networks or not len(t):
        return measured

    labels = torch.cat([networks["encoder"](part, t) for part in x.split(rows)])                     # (N, S, K, d)
    logits = networks["decoder"](labels.flatten(0, 1), x.new_empty(n * len(t), 0))[:, 0].float()
    real = x[:, t] != networks["encoder"].pad                                                        # a document may have ended
    mean = (labels * real[..., None, None]).sum(0) / real.sum(0).clamp(min=1)[:, None, None]
    error, variance = ((a - labels).square().mean((-2, -1)) * real for a in (torch.cat(memories), mean))
    measured |= scores("teacher", logits.view(n, len(t), -1), y[:, t]) | {"drift": (error, variance)}

    distances = [far for far in DISTANCES if far < networks["decoder"].future_len and far <= int(t.max()) + 1]
    late = spread(t[t >= distances[-1] - 1], PLACES)
    parts = [measure_held(networks, part, targets, late, distances) for part, targets in zip(x.split(rows), y.split(rows))]
    return measured | {name: tuple(map(torch.cat, zip(*(part[name] for part in parts)))) for name in parts[0]}


def ratio(amounts, weights):
    """The number: all amounts (N, S) over all weights (N, S); 0 where nothing has a weight."""
    return float(amounts.sum()) / max(float(weights.sum()), 1e-12)


def standard_error(amounts, weights):
    """Standard error of the ratio r = sum a / sum w over N documents, the independent units, document i with sums a_i and w_i:

        sqrt(N / (N - 1) sum_i (a_i - r w_i)^2) / sum_i w_i

    (the ratio estimator: W. Cochran, Sampling Techniques, chapter 6). None for a single document. Where all w_i are the same it
    is the standard deviation of the documents' means over sqrt(N). Rows of the data set `text` overlap: there it is too small.
    """
    a, w = (tensor.float().sum(1) for tensor in (amounts, weights))
    if len(a) < 2:
        return None
    return math.sqrt(float((a - ratio(a, w) * w).square().sum()) * len(a) / (len(a) - 1)) / max(float(w.sum()), 1e-12)


def evaluate(networks, initial_memory, x, y, meta, rows=16, most_positions=64, errors=False):
    """The numbers that all stages report, on held-out documents x, y (N, L), read from m_empty.

    val_rnn_loss, val_rnn_accuracy: Updater and Readout alone, rolled out from m_empty; nats per target, share of right ones.
    Of the Transformer baseline, which has no Updater, the same under the same names.
    val_teacher_loss, val_teacher_accuracy: Encoder, then the Decoder's first position. val_drift: the squared error of the
    rolled-out memory over the variance of the encoder's (0: the same; 1: no better than the mean memory). These need an
    encoder (BPTT and the Transformer have none) and are measured at up to most_positions places, spread over those that
    have targets. val_held_<n>, val_held_full: nats per target that the decoder reads from the encoder's memory of n tokens earlier and
    the tokens since, and the trunk from the whole past: what the memory lacks is the difference. errors: also the standard error of
    each, as <name>_error.
    """
    places = (y != IGNORE).any(0).nonzero().flatten()
    measured = measure(networks, initial_memory, x, y, spread(places, most_positions), rows)
    numbers = {f"val_{name}": ratio(*pair) for name, pair in measured.items()}
    if errors:
        numbers |= {f"val_{name}_error": standard_error(*pair) for name, pair in measured.items()}
    if "statistics" in meta:
        numbers["val_gap_to_floor"] = numbers["val_rnn_loss"] - meta["statistics"]["entropy_per_character"]
    return numbers


@torch.no_grad()
def fact_losses(networks, initial_memory, x, distances=(0, 12, 60)):
    """What memories hold of stories x (N, L) of fables: nats of each fact, all its letters together, where the last sentence mentions it.

    {fact: {"0 back": .., "rnn": ..}}: the decoder reads from the encoder's memory of n tokens before the fact, if the fact had been told by
    then, and the tokens since; the readout reads the rolled-out RNN's own memories.
    """
    found = {}
    for row in x:
        row = row[row < fables.VOCAB_SIZE]                  # without PAD
        story = bytes(row[1:].tolist()).decode("ascii")
        facts = fables.returns(story) if fables.facts(story) else {}        # --eval_len may have cut it off
        rolled = roll_out_without_gradients(networks["updater"], initial_memory[None], row[None])[0]
        memories = networks["encoder"](row[None], torch.arange(-1, len(row), device=x.device))[0] if "encoder" in networks else ()
        for fact, (told, begin, end) in facts.items():      # character i is token i + 1: the last one before the fact is token `begin`
            logits = {"rnn": networks["readout"](rolled[begin:end])}
            for n in distances if len(memories) else ():
                if begin - n >= told and n + end - begin <= networks["decoder"].future_len:
                    given = row[begin - n + 1:end][None]
                    logits[f"{n} back"] = networks["decoder"](memories[begin - n + 1][None], given)[0, n:]
            for column, letters in logits.items():
                loss = float(F.cross_entropy(letters.float(), row[begin + 1:end + 1], reduction="sum"))
                found.setdefault(fact, {}).setdefault(column, []).append(loss)
    return {fact: {column: sum(losses) / len(losses) for column, losses in columns.items()} for fact, columns in found.items()}


NGRAM_TOKENS = 20_000_000   # of the training text that the n-gram models count, at most


def ngram_losses(data, x, y, order):
    """Nats per target of interpolated n-gram models (Witten and Bell 1991) of orders 1..order on rows x, y (N, L).

    p_n(w | c) = (count(c w) + types(c) p_{n-1}(w | c')) / (count(c) + types(c)), with c the last n-1 tokens, c' the last
    n-2, types(c) the number of different tokens seen after c, and p_0 uniform. A context that was never seen adds nothing.
    """
    V, train = data.vocab_size + 1, data.train.tokens[:NGRAM_TOKENS].cpu().numpy().astype(np.int64)
    x, y = x.cpu().numpy(), y.cpu().numpy()
    asked = y != IGNORE
    probability, losses = np.full(y.shape, 1 / data.vocab_size), []
    context, row_context = np.zeros_like(train), np.zeros_like(x)          # the last n-1 tokens, as one number
    for n in range(1, order + 1):
        if n > 1:   # context of w_i is (w_{i-n+1} .. w_{i-1}); before a row's start there is PAD, which the text never has
            place = V ** (n - 2)
            context[n - 1:] += train[:len(train) - n + 1] * place
            row_context += np.pad(x, ((0, 0), (n - 2, 0)), constant_values=data.pad)[:, :x.shape[1]] * place
        pairs, pair_counts = np.unique(context[n - 1:] * V + train[n - 1:], return_counts=True)
        contexts, first, types = np.unique(pairs // V, return_index=True, return_counts=True)
        totals = np.add.reduceat(pair_counts, first)

        at = np.searchsorted(contexts, row_context).clip(max=len(contexts) - 1)
        seen = contexts[at] == row_context
        pair = row_context * V + np.where(asked, y, 0)
        where = np.searchsorted(pairs, pair).clip(max=len(pairs) - 1)
        count = np.where(pairs[where] == pair, pair_counts[where], 0)
        probability = np.where(seen, (count + types[at] * probability) / (totals[at] + types[at]), probability)
        losses.append(float(-np.log(probability[asked]).mean()))
    return losses


# ---------------------------------------------------------------------------------------------------------------------

def load_trained(ckpt, dataset, device):
    """The checkpoints of --ckpt, or that of the data set's most finished run. UsageError if they are not of one data set."""
    paths = [find_checkpoint(path, dataset) for path in dict.fromkeys(ckpt.split(","))]
    folders = [path if path.is_dir() else path.parent for path in paths]
    names = [folder.resolve().name for folder in folders]
    trained = []
    for path, folder, name in zip(paths, folders, names):
        checkpoint = runtime.load(path, device)
        config, networks, initial_memory = restore(checkpoint, device)
        meta, settings = checkpoint["data"], checkpoint.get("config", {})
        trained.append(Trained(name if names.count(name) == 1 else str(path), folder, checkpoint["stage"], checkpoint["step"], meta,
                               settings, config, networks, initial_memory))
        if meta["name"] != trained[0].meta["name"]:
            raise UsageError(f"--ckpt names checkpoints of two data sets, {trained[0].meta['name']} and {meta['name']}")
    return trained


def table(trained, numbers):
    """Lines of text: a row for each number, a column for each checkpoint; - where a checkpoint has no such number."""
    width = max(18, *(len(run.name) for run in trained)) + 2
    names = dict.fromkeys(name for column in numbers for name in column if not name.endswith("_error"))
    cells = {"": [run.name for run in trained], "stage": [run.stage for run in trained], "steps": [f"{run.step:,}" for run in trained]}
    for name in names:
        cells[name] = [f"{column[name]:8.4f}" if name in column else f"{'-':>8}" for column in numbers]
        errors = [column.get(f"{name}_error") for column in numbers]
        cells[name] = [cell if error is None else f"{cell} +- {error:.4f}" for cell, error in zip(cells[name], errors)]
    return "\n".join((f"{name:24}" + "".join(f"{cell:{width}}" for cell in row)).rstrip() for name, row in cells.items())


FACT_STORIES = 120      # held-out stories in which facts are looked for, at most


def facts_table(facts):
    """Lines of text: a row for each fact, how often generated stories keep it, and what memories hold of it."""
    columns = list(dict.fromkeys(name for numbers in facts.values() for name in numbers if name not in ("kept", "mentioned")))
    lines = [f"{'':10}{'kept':14}" + "".join(f"{name:>10}" for name in columns)]
    for fact, numbers in facts.items():
        cells = [f"{numbers[name]:10.3f}" if name in numbers else f"{'-':>10}" for name in columns]
        lines.append(f"{fact:10}{numbers['kept']:3d} of {numbers['mentioned']:3d}    " + "".join(cells))
    return "\n".join(lines)


def main():
    config = runtime.parse(Config)
    if config.json and not Path(config.json).parent.is_dir():
        raise UsageError(f"--json: there is no folder {Path(config.json).parent}")
    device = runtime.choose_device(config.device)
    trained = load_trained(config.ckpt, config.dataset, device)
    meta = trained[0].meta
    if config.ngrams and meta["kind"] != "text":
        raise UsageError(f"--ngrams is for text, {meta['name']} is not")
    data = datasets.load(meta["name"], config.data_dir)
    for run in trained:
        runtime.check_data({"data": run.meta}, data)
    n = min(config.eval_docs, len(data.val.starts))       # none twice: they are to be independent
    x, y = (part.to(device) for part in datasets.held_out(data, n, config.eval_len, seed=0))

    print(f"{meta['name']}: {n:,} held-out documents, {int((y != IGNORE).sum()):,} targets")
    numbers = [evaluate(run.networks, run.initial_memory, x, y, meta, errors=True) for run in trained]
    print(table(trained, numbers))
    ngrams = ngram_losses(data, x, y, config.ngrams)
    for order, loss in enumerate(ngrams, 1):
        print(f"{f'{order}-gram loss':24}{loss:8.4f}")
    for run, column in zip(trained, numbers) if meta["name"] == "fables" else ():
        stories = complete_stories(run.networks, run.initial_memory, config.num_samples, config.temperature, config.seed)
        kept = [fables.kept(story) for story in stories]
        column["facts"] = {fact: dict(kept=sum(k[fact] for k in kept if fact in k), mentioned=sum(fact in k for k in kept))
                           for fact in fables.RETURNING}
        if "updater" in run.networks:
            for fact, losses in fact_losses(run.networks, run.initial_memory, x[:FACT_STORIES]).items():
                column["facts"][fact] |= losses
        print(f"\n{run.name}: facts that the last sentence comes back to, of {len(stories)} generated stories, and nats of each")
        print(facts_table(column["facts"]))
    if not config.figures and not config.json:
        return

    import figures      # which imports this file; no train script needs it
    series = figures.measure_all(trained, data, x, y, config.seed)
    if config.figures:
        figures.draw_all(series, [run.name for run in trained], meta, Path(config.figures))
    if config.json:
        content = dict(dataset=meta["name"], documents=n, ngram_losses=ngrams, figures=series,
                       checkpoints={run.name: dict(stage=run.stage, step=run.step, **column) for run, column in zip(trained, numbers)})
        runtime.write_atomically(config.json, lambda path: path.write_text(json.dumps(content) + "\n"))


if __name__ == "__main__":
    runtime.run_main(main)
