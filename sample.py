"""Generate with a trained RNN: text to the terminal, pictures to a PNG file, answers to a task's questions.

    python sample.py                                      # fables, the most finished run
    python sample.py --dataset=tinystories --prompt="Once upon a time" --num_samples=3 --temperature=0.7
    python sample.py --dataset=mnist                      # a grid of pictures
    python sample.py --dataset=mnist --prompt=digit.png --keep=0.5      # complete the upper half
    python sample.py --dataset=mnist --prompt=held-out    # complete held-out pictures, beside the truth
    python sample.py --dataset=retrieval                  # question, answer, truth

Only updater and readout run, from m_empty on: a token costs the same however many came before.
"""
import functools
import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data as datasets
from lib.checkpoints import check_data, find_checkpoint, load, newer_source, restore
from lib.cli import UsageError, check_fields, parse, run_main
from lib.graphs import captured
from model import IGNORE, at_least_float32, roll_out_without_gradients
from runtime import choose_device, duration

READ = 4096     # tokens of a prompt read at once: their memories take up space, the last one alone is kept
DRAWN = 64      # tokens for which random numbers are drawn at once
COLDEST = 1e-30     # least temperature: the reciprocal of a lower one overflows float32


@dataclass(frozen=True)
class Config:
    """Flags of sample.py."""
    dataset: str = "fables"     # data set whose most finished run in runs/ is taken
    ckpt: str = ""              # checkpoint (file or folder of a run) to take instead
    data_dir: str = "data"      # folder of the prepared data sets; for held-out questions and pictures
    prompt: str = ""            # text to go on from; for pictures: a picture file to complete, or held-out
    keep: float = 0.5           # share of the prompt's picture that is given, from its top
    num_samples: int = 0        # how many; 0: 1 text, 16 pictures, 10 questions
    max_new_tokens: int = 1000  # tokens to generate at most; a story also ends where the model ends it
    temperature: float = 0.8    # 1: the model's own distribution; 0, and for answers: the likeliest token
    top_k: int = 0              # draw from the k likeliest tokens only; 0: from all
    seed: int = 0               # sample i is drawn with seed + i
    device: str = "cpu"         # cpu, cuda, mps or auto
    out: str = ""               # picture file to write; empty: samples.png beside the checkpoint

    def __post_init__(self):
        check_fields(self, "max_new_tokens")
        for name in ("num_samples", "temperature", "top_k"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name} must not be negative")
        if not 0 <= self.keep <= 1:
            raise UsageError("--keep is a share from 0 to 1")


# ------------------------------------------------------------------------------------------------------------
# Generation

def choose(logits, temperature, top_k, u):
    """One token for each row of logits (B, V) -> (B,), drawn from softmax(logits / temperature).

    It is the first at which the cumulative probability exceeds u (B,), uniform from 0 to 1.
    """
    if temperature == 0:
        return logits.argmax(-1)
    tokens = None
    if 0 < top_k < logits.shape[-1]:
        logits, tokens = logits.topk(top_k)
    scores = at_least_float32(logits - logits.amax(-1, keepdim=True)) / max(temperature, COLDEST)
    cumulative = scores.softmax(-1).cumsum(-1)
    drawn = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(-1)
    return drawn if tokens is None else tokens.gather(-1, drawn[:, None])[:, 0]


def uniform(generators, device):
    """Yield random numbers (B,) from 0 to 1 for one token after another, without end; row i is drawn from
    generators[i], on the CPU."""
    while True:
        drawn = torch.stack([torch.rand(DRAWN, generator=generator) for generator in generators], dim=1)
        yield from drawn.to(device, non_blocking=True)


@torch.inference_mode()
def read(networks, memory, tokens):
    """The memory (B, K, d) after reading tokens (B, n), n >= 0, one by one from memory (B, K, d)."""
    pieces = tokens.split(READ, dim=1) if tokens.shape[1] else ()
    hidden = None if len(pieces) > 1 else True              # None: shown on a terminal
    for piece in tqdm(pieces, desc="reading", unit_scale=READ, unit=" tokens", disable=hidden):
        memory = roll_out_without_gradients(networks["updater"], memory, piece)[:, -1]
    return memory


@functools.cache
def drawing_step(temperature, top_k):
    """step(networks, memory (B, K, d), u (B,)) -> the next token (B,) and the memory after it.

    On CUDA it is one graph. Cached, so that all texts of a run share the graph.
    """
    def step(networks, memory, u):
        token = choose(networks["readout"](memory), temperature, top_k, u)
        return token, networks["updater"](memory, token)
    return captured(step)


def generate(networks, memory, temperature, top_k, generators):
    """Endlessly: predict a token from the memory (B, K, d), draw it, read it, yield it (B,)."""
    step = drawing_step(temperature, top_k)
    for u in uniform(generators, memory.device):
        token, memory = step(networks, memory, u)
        yield token


def seeded(seed, count):
    """`count` random generators, the i-th seeded with seed + i."""
    return [torch.Generator().manual_seed((seed + i) % 2**63) for i in range(count)]


def complete(networks, initial_memory, given, length, config):
    """Rows of `length` tokens that begin with given (B, n), n >= 1."""
    memory = read(networks, initial_memory.expand(len(given), -1, -1), given)
    tokens = generate(networks, memory, config.temperature, config.top_k, seeded(config.seed, len(given)))
    steps = tqdm(range(length - given.shape[1]), desc="drawing", unit="token", disable=None)
    return torch.cat([given] + [next(tokens)[:, None] for _ in steps], dim=1)


# ------------------------------------------------------------------------------------------------------------
# The three kinds of data

def write_stories(networks, initial_memory, meta, config):
    """Stream texts to the terminal, token by token; a separator in between."""
    separator, n = meta["first_token"], config.num_samples or 1
    prompt = datasets.encode(config.prompt, meta)
    start = torch.tensor([[separator, *prompt]], device=initial_memory.device)
    memory = read(networks, initial_memory[None], start)
    for i in range(n):
        write(bytes(prompt))
        tokens = generate(networks, memory, config.temperature, config.top_k, seeded(config.seed + i, 1))
        for token in itertools.islice(tokens, config.max_new_tokens):
            if separator == 0 and token == 0:
                break
            write(bytes([token]))
        write(b"\n\n" if i + 1 < n else b"\n")


def write(text):
    """Bytes to the terminal at once: a character may be several tokens long."""
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def paint(networks, initial_memory, meta, config, path):
    """Generate or complete pictures, in one PNG grid; for completions also what was given, and the truth."""
    from sources import pictures
    n, length, device = config.num_samples or 16, meta["longest_document"], initial_memory.device
    n_given = max(1, round(config.keep * length)) if config.prompt else 1
    if config.prompt == "held-out":
        whole, _ = datasets.held_out(load_data(meta, config), n, length, config.seed)
    elif config.prompt:
        picture = pictures.read_picture(Path(config.prompt).expanduser(), meta)
        whole = torch.tensor(picture).long().expand(n, -1)
    else:
        whole = torch.full((n, length), meta["first_token"])
    tokens = complete(networks, initial_memory, whole[:, :n_given].to(device), length, config).cpu()

    images, columns = [pictures.tokens_to_image(row, meta) for row in tokens], math.ceil(math.sqrt(n))
    if config.prompt:                                # three lines: given (the rest grey), completed, truth
        truth = [pictures.tokens_to_image(row, meta) for row in whole]
        mask = np.where(np.arange(length) < n_given, meta["vocab_size"] - 1, 0)
        mask = pictures.tokens_to_image(mask, meta) > 0
        images, columns = [np.where(mask, image, 128) for image in truth] + images + truth, n
    pictures.save_grid(images, columns, path)
    print(path)


def answer(networks, initial_memory, meta, config):
    """Ask held-out questions: a line for the document, one for the answers, one for the truth."""
    n, length = config.num_samples or 10, meta["longest_document"]
    x, y = datasets.held_out(load_data(meta, config), n, length, config.seed)
    memory, answers, valid = initial_memory.expand(n, -1, -1), [], y != IGNORE
    with torch.inference_mode():
        for token in x.to(initial_memory.device).unbind(1):
            memory = read(networks, memory, token[:, None])
            answers.append(networks["readout"](memory).argmax(-1).cpu())
    answers = torch.stack(answers, dim=1)
    for i in range(len(x)):
        print("question ", datasets.decode(x[i], meta))
        print("answer   ", datasets.decode(answers[i][valid[i]], meta))
        print("truth    ", datasets.decode(y[i][valid[i]], meta), end="\n\n")
    print(f"{int(((answers == y) & valid).sum())} of {int(valid.sum())} answers are right")


def load_data(meta, config):
    """The data set that a checkpoint was trained on, with a warning where it has changed since."""
    data = datasets.load(meta["name"], config.data_dir)
    check_data({"data": meta}, data, "the checkpoint", warn=warn)
    return data


# ------------------------------------------------------------------------------------------------------------

def warn(line):
    """Print a line on stderr: stdout is for samples."""
    print(line, file=sys.stderr)


def main():
    config = parse(Config)
    path = find_checkpoint(config.ckpt, config.dataset)
    checkpoint = load(path)
    _, networks, initial_memory = restore(checkpoint, choose_device(config.device))
    age = duration(max(0.0, time.time() - checkpoint["time"]))
    warn(f"{path}: {checkpoint['stage']}, step {checkpoint['step']:,}, saved {age} ago")
    if source := newer_source(checkpoint):
        warn(f"warning: this run began with {source}, which has been trained anew since")
    meta = checkpoint["data"]
    if meta["kind"] == "text":
        write_stories(networks, initial_memory, meta, config)
    elif meta["kind"] == "image":
        folder = path if path.is_dir() else path.parent
        paint(networks, initial_memory, meta, config, Path(config.out or folder / "samples.png"))
    elif config.prompt:
        raise UsageError(f"{meta['name']} asks held-out questions: it takes no --prompt")
    else:
        answer(networks, initial_memory, meta, config)


if __name__ == "__main__":
    run_main(main)
