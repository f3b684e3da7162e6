"""What a checkpoint is worth, in numbers.

    python evaluate.py                                  # fables, the most finished run: losses, drift, and is the hero's name kept?
    python evaluate.py --dataset=tinystories --ngrams=5 # beside n-gram models of the same text
    python evaluate.py --ckpt=runs/retrieval-smt --eval_docs=1000
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import data as datasets
import fables
import runtime
from data import IGNORE
from model import restore, roll_out_without_gradients
from runtime import UsageError
from sample import complete_stories, find_checkpoint


@dataclass(frozen=True)
class Config:
    """What evaluate.py can be told."""
    dataset: str = "fables"     # data set whose most finished run in runs/ is taken
    ckpt: str = ""              # checkpoint (file or folder of a run) to take instead
    data_dir: str = "data"      # folder of the prepared data sets
    eval_docs: int = 256        # held-out documents
    eval_len: int = 512         # tokens read of each of them at most
    ngrams: int = 0             # also n-gram models of the training text, up to this order (text only)
    num_samples: int = 100      # fables: stories to generate, to count in how many the hero keeps its name
    temperature: float = 1.0    # of these stories
    seed: int = 0               # of these stories
    device: str = "auto"        # cpu, cuda, cuda:1, mps; auto: CUDA where there is one, else the CPU

    def __post_init__(self):
        if min(self.eval_docs, self.eval_len, self.num_samples) < 1 or not 0 <= self.ngrams <= 7 or self.temperature < 0:
            raise UsageError("--eval_docs, --eval_len and --num_samples are at least 1, --ngrams is from 0 to 7, --temperature at least 0")


def masked_mean(values, mask):
    """Mean of values where mask holds; 0 where it holds nowhere."""
    return float((values * mask).sum() / mask.sum().clamp(min=1))


@torch.no_grad()
def evaluate(networks, initial_memory, x, y, meta, rows=16, most_positions=64):
    """The numbers that all stages report, on held-out documents x, y (N, L), read from m_empty.

    val_rnn_loss, val_rnn_accuracy: Updater and Readout alone, rolled out from m_empty; nats per target, share of right ones.
    Of the Transformer baseline, which has no Updater, the same under the same names.
    val_teacher_loss: Encoder, then the Decoder's first position. val_drift: the squared error of the rolled-out memory over
    the variance of the encoder's (0: the same; 1: no better than the mean memory). Both need an encoder (BPTT and the
    Transformer have none) and are measured at up to most_positions places, spread over those that have targets.
    """
    n, length = x.shape
    asked = y != IGNORE
    memories, logits = [], []
    for part in x.split(rows):
        if "updater" in networks:
            memories.append(roll_out_without_gradients(networks["updater"], initial_memory.expand(len(part), -1, -1), part))
            logits.append(networks["readout"](memories[-1].flatten(0, 1)).float().view(len(part), length, -1))
        else:
            logits.append(networks["decoder"].read(part)[0].float())
    logits = torch.cat(logits)
    targets = y.clamp(min=0)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(n, length)
    numbers = {"val_rnn_loss": masked_mean(loss, asked),
               "val_rnn_accuracy": masked_mean((logits.argmax(-1) == targets).float(), asked)}
    if "statistics" in meta:
        numbers["val_gap_to_floor"] = numbers["val_rnn_loss"] - meta["statistics"]["entropy_per_character"]
    if "encoder" not in networks or not asked.any():
        return numbers

    places = asked.any(0).nonzero().flatten()
    t = places[torch.linspace(0, len(places) - 1, min(most_positions, len(places)), device=x.device).long()]
    labels = torch.cat([networks["encoder"](part, t) for part in x.split(rows)])                     # (N, S, K, d)
    no_future = x.new_empty(n * len(t), 0)
    logits = networks["decoder"](labels.flatten(0, 1), no_future)[:, 0].float()
    loss = F.cross_entropy(logits, targets[:, t].flatten(), reduction="none").view(n, len(t))
    real = (x[:, t] != networks["encoder"].pad)[:, :, None, None]                                    # a document may have ended
    count = real.sum(0).clamp(min=1)
    variance = (labels - (labels * real).sum(0) / count).square()
    error = (torch.cat(memories)[:, t] - labels).square()
    return numbers | {"val_teacher_loss": masked_mean(loss, asked[:, t]),
                      "val_drift": float((error * real).sum() / (variance * real).sum().clamp(min=1e-12))}


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


def main():
    config = runtime.parse(Config)
    device = runtime.choose_device(config.device)
    path = find_checkpoint(config.ckpt, config.dataset)
    checkpoint = runtime.load(path, device)
    _, networks, initial_memory = restore(checkpoint, device)
    meta = checkpoint["data"]
    if config.ngrams and meta["kind"] != "text":
        raise UsageError(f"--ngrams is for text, {meta['name']} is not")
    data = datasets.load(meta["name"], config.data_dir)
    runtime.check_data(checkpoint, data)
    x, y = datasets.held_out(data, config.eval_docs, min(config.eval_len, data.longest_document), seed=0)

    print(f"{path}: {meta['name']}, {checkpoint['stage']} after {checkpoint['step']:,} steps, {int((y != IGNORE).sum()):,} held-out targets")
    for name, value in evaluate(networks, initial_memory, x.to(device), y.to(device), meta).items():
        print(f"{name:24}{value:8.4f}")
    for n, loss in enumerate(ngram_losses(data, x, y, config.ngrams), 1):
        print(f"{f'{n}-gram loss':24}{loss:8.4f}")
    if meta["name"] == "fables":
        stories = complete_stories(networks, initial_memory, config.num_samples, config.temperature, config.seed)
        kept = sum(map(fables.hero_kept, stories))
        print(f"the hero's name is kept in {kept} of {len(stories)} generated stories")


if __name__ == "__main__":
    runtime.run_main(main)
