"""Generate with a trained RNN: text to the terminal, pictures to a PNG file, answers to the questions of a synthetic task.

    python sample.py                                             # fables, the most finished run: dmt, else smt, bptt, transformer
    python sample.py --dataset=tinystories --prompt="Once upon a time" --num_samples=3 --temperature=0.7
    python sample.py --dataset=mnist --num_samples=64            # a grid of pictures
    python sample.py --dataset=mnist --prompt=digit.png --keep=0.5    # complete the upper half of a picture
    python sample.py --dataset=mnist --prompt=held-out           # complete held-out pictures, beside the truth
    python sample.py --dataset=retrieval                         # question, answer, truth

Only the updater and the readout run, from m_empty on: time and memory for a token do not depend on how many came before.
The Transformer baseline is used in the same way: what it carries from token to token are the keys and values of the last context_len.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data as datasets
import runtime
from data import IGNORE
from model import restore, roll_out_without_gradients
from runtime import UsageError

NUMBERS = 256   # random numbers that each row draws at once on CUDA


@dataclass(frozen=True)
class Config:
    """What sample.py can be told."""
    dataset: str = "fables"     # data set whose most finished run in runs/ is taken
    ckpt: str = ""              # checkpoint (file or folder of a run) to take instead
    data_dir: str = "data"      # folder of the prepared data sets; needed for held-out questions and pictures only
    prompt: str = ""            # text to go on from; for pictures: a picture file to complete, or held-out
    keep: float = 0.5           # share of the prompt's picture that is given, from its top
    num_samples: int = 0        # how many; 0: 1 text, 16 pictures, 10 questions
    max_new_tokens: int = 1000  # tokens to generate at most; a story also ends where the model ends it
    temperature: float = 0.8    # 1: the model's own distribution; 0: always the likeliest token
    top_k: int = 0              # draw from the k likeliest tokens only; 0: from all
    seed: int = 0               # sample i is drawn with seed + i
    device: str = "cpu"         # cpu, cuda, mps or auto; CUDA draws other tokens with the same seed
    out: str = ""               # picture file to write; empty: samples.png beside the checkpoint

    def __post_init__(self):
        if self.num_samples < 0 or self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0:
            raise UsageError("--max_new_tokens is at least 1; --num_samples, --temperature and --top_k are not negative")
        if not 0 <= self.keep <= 1:
            raise UsageError("--keep is a share from 0 to 1")


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def distribution(logits, temperature, top_k):
    """The probabilities (B, V) in float64 with which tokens are drawn, from logits (B, V), at a temperature above 0."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    logits = logits.double()
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)              # finite at any temperature


def choose(logits, temperature, top_k, generators):
    """One token for each row of logits (B, V) -> (B,), row i with generators[i]."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = distribution(logits.cpu(), temperature, top_k)
    drawn = [torch.multinomial(p, 1, generator=generator) for p, generator in zip(probabilities, generators)]
    return torch.cat(drawn).to(logits.device)


def pick(logits, temperature, top_k, numbers):
    """choose() by given random numbers (B,) from [0, 1), one a row: without a generator, so that a CUDA graph can hold it."""
    if temperature == 0:
        return logits.argmax(-1)
    up_to = distribution(logits, temperature, top_k).cumsum(-1)
    return (up_to <= numbers[:, None] * up_to[:, -1:]).sum(-1)


def draw(generators, device):
    """Endlessly a number from [0, 1) of each generator, (B,), on the device: many are copied there at once."""
    while True:
        yield from torch.stack([torch.rand(NUMBERS, generator=generator, dtype=torch.float64) for generator in generators], dim=1).to(device)


def begin(networks, initial_memory, count):
    """What `count` rows carry along before anything was read: m_empty (count, K, d); a Transformer: its last logits and its past."""
    return initial_memory.expand(count, -1, -1) if "updater" in networks else (None, None)


@torch.inference_mode()
def read(networks, memory, tokens):
    """Read tokens (B, n) one by one from memory (B, K, d), or from what a Transformer carries along; returns the memory after them."""
    if "updater" in networks:
        return roll_out_without_gradients(networks["updater"], memory, tokens)[:, -1]
    for token in tokens.unbind(1):
        memory = networks["decoder"].read(token[:, None], past=memory[1])
    return memory


@torch.inference_mode()
def predict(networks, memory):
    """The logits (B, V) of what comes next, from the memory after all that was read."""
    return networks["readout"](memory) if "updater" in networks else memory[0][:, -1]


@torch.inference_mode()
def generate(networks, memory, temperature, top_k, generators):
    """Endlessly: predict a token from the memory, draw it, yield it (B,), read it."""
    if "updater" in networks and memory.device.type == "cuda":
        yield from generate_from_graph(networks, memory, temperature, top_k, generators)
    while True:
        token = choose(predict(networks, memory), temperature, top_k, generators)
        yield token
        memory = read(networks, memory, token[:, None])


@torch.inference_mode()
def generate_from_graph(networks, memory, temperature, top_k, generators):
    """generate() on CUDA, of an RNN: a token of all rows is one CUDA graph, and nothing waits for the CPU. It draws other tokens."""
    def step(networks, memory, numbers):
        token = pick(networks["readout"](memory), temperature, top_k, numbers)
        return token, networks["updater"](memory, token)

    step = runtime.captured(step)
    for numbers in draw(generators, memory.device):
        token, memory = step(networks, memory, numbers)
        yield token


def seeded(seed, count):
    """`count` random generators, the i-th seeded with seed + i."""
    return [torch.Generator().manual_seed((seed + i) % 2**63) for i in range(count)]


def complete(networks, initial_memory, given, length, config):
    """Rows of `length` tokens that begin with given (B, n), n >= 1."""
    memory = read(networks, begin(networks, initial_memory, len(given)), given)
    tokens = generate(networks, memory, config.temperature, config.top_k, seeded(config.seed, len(given)))
    return torch.cat([given] + [next(tokens)[:, None] for _ in range(length - given.shape[1])], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The three kinds of data

def tell(networks, initial_memory, meta, config):
    """Stream texts to the terminal, token by token."""
    separator = meta["first_token"]
    device = initial_memory.device
    prompt = datasets.encode(config.prompt, meta)
    for i in range(config.num_samples or 1):
        memory = read(networks, begin(networks, initial_memory, 1), torch.tensor([[separator, *prompt]], device=device))
        write(bytes(prompt))
        for count, token in enumerate(generate(networks, memory, config.temperature, config.top_k, seeded(config.seed + i, 1)), 1):
            if separator == 0 and token == 0:
                break
            write(bytes([token]))
            if count == config.max_new_tokens:
                break
        write(b"\n\n" if i + 1 < (config.num_samples or 1) else b"\n")


def complete_stories(networks, initial_memory, count, temperature, seed, longest=1000):
    """Stories from the data sets whose separator is 0, `count` at once, without their separators: a list of str."""
    start = torch.zeros(count, 1, dtype=torch.long, device=initial_memory.device)
    memory = read(networks, begin(networks, initial_memory, count), start)
    rows, ended = [], torch.zeros(count, dtype=torch.bool)
    for token in generate(networks, memory, temperature, 0, seeded(seed, count)):
        rows.append(token.cpu())
        ended |= rows[-1] == 0
        if ended.all() or len(rows) == longest:
            break
    return [bytes(row.tolist()).split(b"\0")[0].decode("ascii", "replace") for row in torch.stack(rows, dim=1)]


def write(text):
    """Bytes to the terminal at once: a character may be several tokens long."""
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def paint(networks, initial_memory, meta, config, path):
    """Generate or complete pictures and write them as one PNG grid; for completions also what was given, and the truth."""
    n, length, device = config.num_samples or 16, meta["longest_document"], initial_memory.device
    kept = max(1, round(config.keep * length)) if config.prompt else 1
    if config.prompt == "held-out":
        data = datasets.load(meta["name"], config.data_dir)
        runtime.check_data({"data": meta}, data)
        whole, _ = datasets.held_out(data, n, length, config.seed)
    elif config.prompt:
        whole = torch.tensor(datasets.read_picture(config.prompt, meta)).long().expand(n, -1)
    else:
        whole = torch.full((n, length), meta["first_token"])
    tokens = complete(networks, initial_memory, whole[:, :kept].to(device), length, config).cpu()

    pictures = [datasets.tokens_to_image(row, meta) for row in tokens]
    columns = math.ceil(math.sqrt(n))
    if config.prompt:                                # three lines: given (the rest grey), completed, truth
        truth = [datasets.tokens_to_image(row, meta) for row in whole]
        known = datasets.tokens_to_image(np.where(np.arange(length) < kept, meta["vocab_size"] - 1, 0), meta) > 0
        pictures = [np.where(known, picture, 128) for picture in truth] + pictures + truth
        columns = n
    save_grid(pictures, columns, path)
    print(path)


def save_grid(pictures, columns, path):
    """Write pictures (H, W) 0..255 as a PNG, `columns` in a line, with a border of two grey pixels."""
    from matplotlib.image import imsave
    height, width = pictures[0].shape
    lines = -(-len(pictures) // columns)
    grid = np.full((2 + lines * (height + 2), 2 + columns * (width + 2)), 96, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        grid[top:top + height, left:left + width] = picture
    grid = grid[..., None].repeat(3, axis=2)      # a colour map would change some greys by one
    runtime.write_atomically(path, lambda temporary: imsave(temporary, grid, format="png"))


def answer(networks, initial_memory, meta, config):
    """Ask held-out questions: a line for the document, one for the answers where something is asked, one for the truth."""
    data = datasets.load(meta["name"], config.data_dir)
    runtime.check_data({"data": meta}, data)
    x, y = datasets.held_out(data, config.num_samples or 10, meta["longest_document"], config.seed)
    memory, answers = begin(networks, initial_memory, len(x)), []
    generators = seeded(config.seed, len(x))
    for token in x.to(initial_memory.device).unbind(1):
        memory = read(networks, memory, token[:, None])
        answers.append(choose(predict(networks, memory), config.temperature, config.top_k, generators).cpu())
    answers = torch.stack(answers, dim=1)
    asked, right = y != IGNORE, (answers == y) & (y != IGNORE)
    for i in range(len(x)):
        print("question ", datasets.decode(x[i], meta))
        print("answer   ", datasets.decode(answers[i][asked[i]], meta))
        print("truth    ", datasets.decode(y[i][asked[i]], meta), end="\n\n")
    print(f"{int(right.sum())} of {int(asked.sum())} answers are right")


# ---------------------------------------------------------------------------------------------------------------------

def find_checkpoint(ckpt, dataset):
    """The given checkpoint, or the one of the data set's most finished run."""
    runs = [Path(f"runs/{dataset}-{stage}") for stage in ("dmt", "smt", "bptt", "transformer")]
    return Path(ckpt or next((run for run in runs if (run / "ckpt.pt").exists()), runs[0]))


def main():
    config = runtime.parse(Config)
    path = find_checkpoint(config.ckpt, config.dataset)
    checkpoint = runtime.load(path)
    _, networks, initial_memory = restore(checkpoint, runtime.choose_device(config.device))
    meta = checkpoint["data"]
    if meta["kind"] == "text":
        tell(networks, initial_memory, meta, config)
    elif meta["kind"] == "image":
        folder = path if path.is_dir() else path.parent
        paint(networks, initial_memory, meta, config, Path(config.out or folder / "samples.png"))
    elif config.prompt:
        raise UsageError(f"{meta['name']} asks held-out questions: it takes no --prompt")
    else:
        answer(networks, initial_memory, meta, config)


if __name__ == "__main__":
    runtime.run_main(main)
