"""All that is known of a few checkpoints of one data set: numbers, facts that stories keep, figures.

    python -m experiments.report                                   # fables, the most finished run
    python -m experiments.report --dataset=tinystories --ngrams=5  # beside n-gram models of the same text
    python -m experiments.report --ckpt=runs/fables-smt,runs/fables-dmt,runs/fables-transformer \\
        --figures=runs/figures --json=runs/fables.json

First what evaluate.py prints. The baselines of train_baseline.py have a column with numbers of their own:

    val_last_<n>, val_last_all   nats per target if the text before the last n tokens is cut off, and if not;
                                 n and the targets are those of val_held_<n> of the checkpoints beside it
                                 (of several: of that with the longest future_len)

Then, for fables, a table of facts for each checkpoint: how many generated stories come back to the fact that
they told; and the nats of the fact, all its letters together, where held-out stories come back to it: "n
back" by the decoder from the encoder's memory of n tokens before, "rnn" by the RNN itself or by the baseline.
Last the figures: see figures.py.
"""
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data as datasets
import evaluate
from experiments import figures, train_baseline
from lib.checkpoints import check_data, load_each, restore, write_atomically
from lib.cli import UsageError, parse, run_main
from model import IGNORE, ModelConfig, roll_out_without_gradients
from runtime import choose_device
from sample import choose, generate, read, seeded, uniform
from sources import fables


@dataclass(frozen=True)
class Config(evaluate.Config):
    """Flags of experiments/report.py, on top of those of evaluate.py."""
    figures: str = ""           # folder to draw the figures into
    json: str = ""              # file to write the numbers to, and what the figures show
    ngrams: int = 0             # text: also n-gram models of the training text, up to this order
    num_samples: int = 100      # fables: stories to generate, to count in how many the facts are kept
    temperature: float = 1.0    # fables: of the generated stories
    seed: int = 0               # of the generated stories and of whatever the figures draw at random

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples < 1 or not 0 <= self.ngrams <= 7 or self.temperature < 0:
            raise UsageError("--num_samples is at least 1, --ngrams from 0 to 7, --temperature at least 0")
        if self.figures and Path(self.figures).exists() and not Path(self.figures).is_dir():
            raise UsageError(f"--figures: {self.figures} is not a folder")
        if self.json and not Path(self.json).parent.is_dir():
            raise UsageError(f"--json: there is no folder {Path(self.json).parent}")


@dataclass
class Trained:
    """A checkpoint: its name in tables and figures, its folder and content, and what can be run.

    Of an RNN: its networks and m_empty (K, d). Of a baseline: its module; it has no networks.
    """
    name: str
    folder: Path
    checkpoint: dict
    config: ModelConfig | train_baseline.BaselineConfig
    networks: torch.nn.ModuleDict
    initial_memory: torch.Tensor
    baseline: torch.nn.Module | None = None

    def measure(self, x, y, t, rows=16):
        """evaluate.measure of documents x, y (N, L); of a baseline what it has of it."""
        if self.baseline is not None:
            return train_baseline.measure(self.baseline, x, y, rows)
        return evaluate.measure(self.networks, self.initial_memory, x, y, t, rows)

    def evaluate(self, x, y, meta, future_len=math.inf):
        """The column of evaluate.py's table, with standard errors; of a baseline also val_last_<n>.

        future_len: the largest of the checkpoints beside a baseline, which says what n there are.
        """
        column = {"stage": self.checkpoint["stage"], "steps": f"{self.checkpoint['step']:,}"}
        if self.baseline is None:
            return column | evaluate.evaluate(self.networks, self.initial_memory, x, y, meta, errors=True)
        measured = train_baseline.measure(self.baseline, x, y)
        if len(t := evaluate.targets_of(y)):
            t, (_, *distances) = evaluate.held_targets(t, evaluate.DISTANCES, future_len)   # n > 0
            measured |= figures.measure_last(self.baseline, x, y, t, distances)
        return column | evaluate.numbers_of(measured, meta, errors=True)


def load_trained(ckpt, dataset, device):
    """A list of Trained, of what load_each finds."""
    trained = []
    for name, folder, checkpoint in load_each(ckpt, dataset, device):
        if checkpoint["stage"] in train_baseline.BASELINES:
            module = train_baseline.load_baseline(checkpoint, device)
            content = module.config, torch.nn.ModuleDict(), torch.empty(0, device=device), module
        else:
            content = restore(checkpoint, device)
        trained.append(Trained(name, folder, checkpoint, *content))
    return trained


# ------------------------------------------------------------------------------------------------------------
# Text: n-gram models

NGRAM_TOKENS = 20_000_000   # of the training text that the n-gram models count, at most


def ngram_losses(data, x, y, order):
    """Nats per target of interpolated n-gram models (Witten and Bell 1991), orders 1..order, on x, y (N, L):

        p_n(w | c) = (count(c w) + types(c) p_{n-1}(w | c')) / (count(c) + types(c))

    with c the last n-1 tokens, c' the last n-2, types(c) the number of different tokens seen after c, and p_0
    uniform. A context that was never seen adds nothing.
    """
    V, train = data.vocab_size + 1, data.train.tokens[:NGRAM_TOKENS].cpu().numpy().astype(np.int64)
    x, y = x.cpu().numpy(), y.cpu().numpy()
    valid = y != IGNORE
    probability, losses = np.full(y.shape, 1 / data.vocab_size), []
    context, row_context = np.zeros_like(train), np.zeros_like(x)       # the last n-1 tokens, as one number
    for n in range(1, order + 1):
        if n > 1:       # w_{i-n+1} .. w_{i-1}, before a row begins PAD, which the text never has
            place = V ** (n - 2)
            context[n - 1:] += train[:len(train) - n + 1] * place
            before = np.pad(x, ((0, 0), (n - 2, 0)), constant_values=data.pad)
            row_context += before[:, :x.shape[1]] * place
        pairs, pair_counts = np.unique(context[n - 1:] * V + train[n - 1:], return_counts=True)
        contexts, first, types = np.unique(pairs // V, return_index=True, return_counts=True)
        totals = np.add.reduceat(pair_counts, first)

        at = np.searchsorted(contexts, row_context).clip(max=len(contexts) - 1)
        seen = contexts[at] == row_context
        pair = row_context * V + np.where(valid, y, 0)
        where = np.searchsorted(pairs, pair).clip(max=len(pairs) - 1)
        count = np.where(pairs[where] == pair, pair_counts[where], 0)
        interpolated = (count + types[at] * probability) / (totals[at] + types[at])
        probability = np.where(seen, interpolated, probability)
        losses.append(float(-np.log(probability[valid]).mean()))
    return losses


# ------------------------------------------------------------------------------------------------------------
# Fables: facts that come back

FACT_STORIES = 120      # held-out stories in which facts are looked for, at most
STORY_LENGTH = 400      # tokens of a generated story, at most


def rnn_stories(networks, initial_memory, count, temperature, seed):
    """`count` stories, a list of str, without separators."""
    start = torch.full((count, 1), fables.SEPARATOR, device=initial_memory.device)
    memory = read(networks, initial_memory.expand(count, -1, -1), start)
    tokens = generate(networks, memory, temperature, 0, seeded(seed, count))
    rows, ended = [], torch.zeros(count, dtype=torch.bool)
    for token in itertools.islice(tokens, STORY_LENGTH):
        rows.append(token.cpu())
        ended |= rows[-1] == fables.SEPARATOR
        if ended.all():
            break
    rows = torch.stack(rows, dim=1).tolist()
    return [bytes(row).split(b"\0")[0].decode("ascii", "replace") for row in rows]


@torch.inference_mode()
def baseline_stories(module, count, temperature, seed):
    """The same by a baseline, which reads the whole story anew for each token of it."""
    rows = torch.zeros(count, 1, dtype=torch.long, device=module.head.weight.device)
    alive = torch.arange(count, device=rows.device)
    numbers = uniform(seeded(seed, count), rows.device)
    while len(alive) and rows.shape[1] <= STORY_LENGTH:
        token = torch.full_like(rows[:, :1], fables.SEPARATOR)
        token[alive, 0] = choose(module(rows[alive])[:, -1], temperature, 0, next(numbers)[alive])
        rows = torch.cat([rows, token], dim=1)
        alive = alive[token[alive, 0] != fables.SEPARATOR]
    return [bytes(row[1:].tolist()).split(b"\0")[0].decode("ascii", "replace") for row in rows]


@torch.no_grad()
def fact_losses(run, x, distances=(0, 12, 60)):
    """Nats of each fact where the last sentence of stories x (N, L) mentions it, {fact: {column: nats}}.

    Column "<n> back": the decoder, given the encoder's memory of n tokens before the fact and those since, of
    the stories that had told the fact by then. Column "rnn": the rolled-out RNN, or the baseline.
    """
    found, networks = {}, run.networks
    for row in x:
        row = row[row < fables.VOCAB_SIZE]              # without PAD
        story = bytes(row[1:].tolist()).decode("ascii")
        facts = fables.returns(story) if fables.facts(story) else {}    # --eval_len may have cut it off
        if run.baseline is None:
            rolled = roll_out_without_gradients(networks["updater"], run.initial_memory[None], row[None])[0]
            own = networks["readout"](rolled)
        else:
            own = run.baseline(row[None])[0]
        labels = ()
        if "encoder" in networks:
            labels = networks["encoder"](row[None], torch.arange(-1, len(row), device=x.device))[0]
        for fact, (told, begin, end) in facts.items():  # character i is token i + 1
            logits = {}
            for n in distances if len(labels) else ():
                if begin - n >= told and n + end - begin <= networks["decoder"].future_len:
                    since = row[begin - n + 1:end][None]
                    logits[f"{n} back"] = networks["decoder"](labels[begin - n + 1][None], since)[0, n:]
            logits["rnn"] = own[begin:end]
            for name, letters in logits.items():
                loss = float(F.cross_entropy(letters.float(), row[begin + 1:end + 1], reduction="sum"))
                found.setdefault(fact, {}).setdefault(name, []).append(loss)
    return {fact: {name: sum(losses) / len(losses) for name, losses in columns.items()}
            for fact, columns in found.items()}


def count_facts(run, x, config):
    """{fact: {"mentioned": generated stories, "kept": those where it is what was told, and fact_losses}}."""
    flags = config.num_samples, config.temperature, config.seed
    if run.baseline is None:
        stories = rnn_stories(run.networks, run.initial_memory, *flags)
    else:
        stories = baseline_stories(run.baseline, *flags)
    kept, losses = [fables.kept(story) for story in stories], fact_losses(run, x[:FACT_STORIES])
    return {fact: dict(kept=sum(k.get(fact, False) for k in kept), mentioned=sum(fact in k for k in kept),
                       **losses.get(fact, {})) for fact in fables.RETURNING}


def facts_table(facts):
    """Lines of text: a row for each fact, how often generated stories keep it, and its nats."""
    names = dict.fromkeys(name for numbers in facts.values() for name in numbers)
    names = [name for name in names if name not in ("kept", "mentioned")]
    lines = [f"{'':10}{'kept':14}" + "".join(f"{name:>10}" for name in names)]
    for fact, numbers in facts.items():
        cells = [f"{numbers[name]:10.3f}" if name in numbers else f"{'-':>10}" for name in names]
        lines.append(f"{fact:10}{numbers['kept']:3d} of {numbers['mentioned']:3d}    " + "".join(cells))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------

def main():
    config = parse(Config)
    device = choose_device(config.device)
    trained = load_trained(config.ckpt, config.dataset, device)
    meta = trained[0].checkpoint["data"]
    if config.ngrams and meta["kind"] != "text":
        raise UsageError(f"--ngrams is for text, {meta['name']} is not")
    data = datasets.load(meta["name"], config.data_dir)
    for run in trained:
        check_data(run.checkpoint, data, run.folder, warn=lambda line: print(line, file=sys.stderr))
    n = min(config.eval_docs, len(data.val.starts))     # no document twice: they are to be independent
    x, y = (part.to(device) for part in datasets.held_out(data, n, config.eval_len))

    print(f"{meta['name']}: {n:,} held-out documents, {int((y != IGNORE).sum()):,} targets")
    lengths = [run.config.future_len for run in trained if "encoder" in run.networks]
    future_len = max(lengths, default=math.inf)
    columns = {run.name: run.evaluate(x, y, meta, future_len) for run in trained}
    print(evaluate.table(columns))
    ngrams = ngram_losses(data, x, y, config.ngrams) if config.ngrams else []
    for order, loss in enumerate(ngrams, 1):
        print(f"{f'{order}-gram loss':24}{loss:8.4f}")
    for run in trained if meta["name"] == "fables" else ():
        facts = columns[run.name]["facts"] = count_facts(run, x, config)
        print(f"\n{run.name}: facts that the last sentence comes back to, in {config.num_samples} generated "
              f"stories, and nats of each\n{facts_table(facts)}")

    series = figures.measure_all(trained, data, x, y, config.seed) if config.figures or config.json else {}
    if config.figures:
        figures.draw_all(series, [run.name for run in trained], meta, Path(config.figures))
    if config.json:
        for run in trained:
            columns[run.name]["steps"] = run.checkpoint["step"]
        content = dict(dataset=meta["name"], documents=n, ngram_losses=ngrams, checkpoints=columns,
                       figures=series)
        write_atomically(config.json, lambda path: path.write_text(json.dumps(content) + "\n"))


if __name__ == "__main__":
    run_main(main)
