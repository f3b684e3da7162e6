"""Data: prepare every data set, load it, sample training rows.

    python data.py                                                # fables: generated, nothing to download
    python data.py --dataset=retrieval --length=8-64 --symbols=16 # or copy, stack, keyvalue, modular: generated
    python data.py --dataset=tinystories                          # downloaded; with --source=FOLDER, files you have
    python data.py --dataset=mnist                                # the same
    python data.py --dataset=sketchy --source=FOLDER              # a folder of pictures
    python data.py --dataset=text --source=FILE                   # any text of yours

A data set is a folder <data_dir>/<name>/ with meta.json and, per split (train, val), one flat stream of uint8 tokens:

    <split>.bin            the tokens, 0..V-1
    <split>_starts.npy     uint64, where each document begins; the first begins at 0
    <split>_targets.bin    uint8, only where the target is not the next token; 255: nothing is asked here

Three kinds: a `text` is one stream, 0 story 0 story 0, and a document is a 0 (for the data set `text`: a newline) with
the characters that follow it; its last target is the separator after it. An `image` is one document, and predicts
nothing after its last pixel. A `synthetic` document has its own targets. Downloads are kept in <data_dir>/downloads/.
"""
import difflib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import download
import fables
import tasks
from runtime import DataError, UsageError, at_least_float32, parse, run_main, write_atomically

IGNORE = -1          # in y: nothing is asked here
NOTHING_ASKED = tasks.NOTHING   # the same in <split>_targets.bin
GENERATED = ["fables", *tasks.TASKS]
DATASETS = [*GENERATED, "tinystories", "mnist", "sketchy", "text"]
NEEDS_SOURCE = {"sketchy": "the folder of pictures", "text": "the text file"}
KINDS = {"text": ["alphabet"], "image": ["image"], "synthetic": []}   # and what only their meta.json has
SCAN = 1 << 24       # tokens looked at together when a whole bin is scanned


@dataclass(frozen=True)
class Config:
    """What data.py can be told."""
    dataset: str = "fables"  # fables, retrieval, copy, stack, keyvalue, modular, tinystories, mnist, sketchy or text
    data_dir: str = "data"          # folder that holds the prepared data sets
    source: str = ""                # file or folder with the original files, plain or .gz; empty: download them
    seed: int = 0                   # of generated data, and of the split of sketchy
    train_tokens: int = 8_000_000   # tokens to generate for training
    val_tokens: int = 500_000       # tokens to generate for validation
    length: str = ""                # retrieval: tokens; copy: symbols; stack: operations; modular: pairs. 32, or 8-64
    symbols: int | None = None      # retrieval, copy, stack, keyvalue: how many symbols
    noise: float | None = None      # retrieval: probability that the target is replaced by a random symbol
    depth: int | None = None        # stack: the greatest depth
    keys: int | None = None         # keyvalue: how many pairs
    key_length: int | None = None   # keyvalue: symbols in a key
    value_length: int | None = None  # keyvalue: symbols in a value
    modulus: int | None = None      # modular: p


# ---------------------------------------------------------------------------------------------------------------------
# Training rows

def free_bytes(device):
    """How much memory a device has left for a data set; the CPU's is mapped from the file."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


@dataclass
class Split:
    """tokens (N,) uint8 and targets (N,) uint8 or None, on any device; starts (D,) int64, on the CPU; the device that rows are for."""
    tokens: torch.Tensor
    targets: torch.Tensor | None
    starts: torch.Tensor
    device: torch.device = torch.device("cpu")

    def to(self, device):
        """The split with rows on a device, and its tokens and targets, too, if they take a quarter of what is free there at most."""
        streams = self.tokens, self.targets
        if sum(stream.nbytes for stream in streams if stream is not None) <= free_bytes(device) / 4:
            streams = (None if stream is None else stream.to(device) for stream in streams)
        return Split(*streams, self.starts, device)

    def rows(self, x, y):
        """Rows on the device that they are for; to CUDA from pinned memory, which nobody waits for."""
        if x.device.type == "cpu" and self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True), y.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device), y.to(self.device)


@dataclass
class Data:
    """A data set: what its meta.json says, and its two splits."""
    meta: dict
    train: Split
    val: Split

    def to(self, device):
        return Data(self.meta, self.train.to(device), self.val.to(device))

    @property
    def vocab_size(self):
        return self.meta["vocab_size"]

    @property
    def pad(self):
        """The token of x where there is no token: one more entry of every embedding."""
        return self.meta["vocab_size"]

    @property
    def kind(self):
        """text, image or synthetic."""
        return self.meta["kind"]

    @property
    def rows_are_documents(self):
        """Rows always begin at a document's start and end with it: pictures and synthetic tasks."""
        return self.kind != "text"

    @property
    def longest_document(self):
        return self.meta["longest_document"]


PURPOSES = ["batch", "generate", "held out", "split", "roll-out"]


def philox(seed, stream, purpose):
    """A random generator for each (seed, stream, purpose): no two of them share a number."""
    key = np.array([seed % 2**64, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, PURPOSES.index(purpose)]))


def documents_end(n_tokens, meta):
    """Where the last document ends: a stream of stories closes with one more separator, which belongs to none."""
    return n_tokens - 1 if meta["kind"] == "text" and meta["first_token"] == 0 else n_tokens


def document_rows(split, meta, begin, length, cut):
    """Rows of `length` tokens that begin at the positions `begin` (B,) of a split.

    Returns x (B, T) and y (B, T), int64, on split.device: x is PAD and y is IGNORE past the end, which is
    that of the document if `cut`, else that of the stream.
    """
    n_tokens, device = len(split.tokens), split.tokens.device
    begin = begin.cpu()
    if cut:
        following = torch.searchsorted(split.starts, begin, right=True)
        end = torch.where(following < len(split.starts), split.starts[following.clamp(max=len(split.starts) - 1)],
                          documents_end(n_tokens, meta))
    else:
        end = torch.full_like(begin, n_tokens)
    begin, end = torch.stack([begin, end])[..., None].to(device, non_blocking=True)      # (B, 1) each

    position = begin + torch.arange(length + 1, device=device)                           # (B, T + 1)
    index = position.clamp(max=n_tokens - 1)
    inside = position < end
    tokens = split.tokens[index].long()
    x = torch.where(inside[:, :-1], tokens[:, :-1], meta["vocab_size"])
    if split.targets is not None:
        y = split.targets[index[:, :-1]].long()
        return split.rows(x, torch.where(inside[:, :-1] & (y != NOTHING_ASKED), y, IGNORE))
    if meta["kind"] == "text":                       # the separator after a document is its last target
        inside = position < (end + 1).clamp(max=n_tokens)
    return split.rows(x, torch.where(inside[:, 1:], tokens[:, 1:], IGNORE))


def row_length(data, seq_len, context_len):
    """Tokens T of a training row: seq_len, or if that is 0 the longest document, of running text context_len.

    UsageError for rows shorter than a synthetic document: what it asks comes last, and would be cut off.
    """
    if data.kind == "synthetic" and 0 < seq_len < data.longest_document:
        raise UsageError(f"--seq_len={seq_len} would cut off what {data.meta['name']} asks: its documents have {data.longest_document} tokens")
    return seq_len or (data.longest_document if data.rows_are_documents else context_len)


def sample_batch(data, seed, step, batch_size, seq_len, n_positions, p_start, rank=0, world_size=1):
    """The training batch of a step, a pure function of (seed, step); each rank takes its slice of it.

    A row begins at a document's start with probability p_start, else anywhere in the stream; rows of pictures and of
    synthetic tasks are always whole documents. Returns x, y (batch_size / world_size, seq_len) int64 on the device
    they are for, and the positions t (n_positions,) int64 of the step: on the CPU, in random order, distinct if they can be.
    """
    if batch_size % world_size:
        raise UsageError(f"--batch_size={batch_size} must be a multiple of the number of processes, {world_size}")
    starts, n_tokens = data.train.starts, len(data.train.tokens)
    rng = philox(seed, step, "batch")
    if n_positions <= seq_len:
        t = rng.choice(seq_len, n_positions, replace=False)
    else:
        t = rng.integers(seq_len, size=n_positions)
    at_start = data.rows_are_documents | (rng.random(batch_size) < p_start)
    some_start = starts[rng.integers(len(starts), size=batch_size)]
    anywhere = torch.from_numpy(rng.integers(n_tokens - 1, size=batch_size))    # the last token has no next one
    begin = torch.where(torch.from_numpy(at_start), some_start, anywhere)
    mine = begin.chunk(world_size)[rank]
    x, y = document_rows(data.train, data.meta, mine, seq_len, cut=data.rows_are_documents)
    return x, y, torch.from_numpy(t)


def cross_entropy(logits, y):
    """Sum of the cross-entropies of the targets y (...) that are asked, given logits (..., V); of bf16 in float32, which autocast does
    not see to."""
    return F.cross_entropy(at_least_float32(logits).flatten(0, -2), y.flatten(), ignore_index=IGNORE, reduction="sum")


def futures(x, y, t, future_len, pad):
    """What the decoder reads and predicts after each position t (S,): x_{t+1..t+Tf-1} (B, S, Tf-1), y_{t..t+Tf-1} (B, S, Tf)."""
    ahead = t[:, None] + torch.arange(future_len, device=t.device)
    future_y = F.pad(y, (0, future_len), value=IGNORE)[:, ahead]
    future_x = F.pad(x, (0, future_len), value=pad)[:, ahead[:, 1:]]
    return future_x, future_y


def held_out(data, n_documents, length, seed):
    """Validation rows x, y (n_documents, length), the same for every caller with the same seed.

    Documents from their start, cut at their end, and rows no longer than the longest of them (not in the data set `text`, whose
    paragraphs are too short to remember anything in); of synthetic tasks as long as it, since what they ask comes last. No document
    comes twice before each has come once.
    """
    n, cut = len(data.val.starts), data.meta["name"] != "text"
    if data.kind == "synthetic":
        length = data.longest_document
    order = np.resize(philox(seed, 0, "held out").permutation(n), n_documents)
    return document_rows(data.val, data.meta, data.val.starts[order], min(length, data.longest_document) if cut else length, cut)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and what they stand for

def tokens_to_image(tokens, meta):
    """The picture (H, W) uint8, 0..255, of one document's tokens (n,)."""
    height, width, patch = (meta["image"][key] for key in ("height", "width", "patch"))
    tokens = np.asarray(tokens)
    if patch == 1:
        return tokens.astype(np.uint8).reshape(height, width)
    return download.from_patches(tokens, height, width, patch)


def image_to_tokens(image, meta):
    """The tokens (n,) uint8 of a picture (H, W): the inverse of tokens_to_image."""
    patch = meta["image"]["patch"]
    return np.asarray(image, np.uint8).reshape(-1) if patch == 1 else download.to_patches(image, patch)


def read_picture(path, meta):
    """The tokens (n,) uint8 of a picture file, as in the data set: a sketch is resized, a digit must have its size already."""
    if not Path(path).is_file():
        raise UsageError(f"there is no picture {path}")
    height, width = meta["image"]["height"], meta["image"]["width"]
    image = download.read_sketch(path) if meta["name"] == "sketchy" else download.read_grey(path)
    if image.shape != (height, width):
        raise UsageError(f"{path} has {image.shape[0]} x {image.shape[1]} pixels, a picture of {meta['name']} {height} x {width}")
    return image_to_tokens(image, meta)


def encode(text, meta):
    """The tokens of a text, a list, without a separator before it. UsageError if the data set lacks a character."""
    if meta["kind"] != "text":
        raise UsageError(f"{meta['name']} is not made of text: there are no tokens for {text!r}")
    known = set(meta["alphabet"]) - {0}
    text = download.fold(text) if meta["name"] == "tinystories" else text
    missing = sorted({c for c in text if not known.issuperset(c.encode("utf-8", "surrogatepass"))})
    if missing:
        raise UsageError(f"{meta['name']} does not have the characters {' '.join(map(repr, missing))}")
    return list(text.encode("utf-8", "surrogatepass"))


def decode(tokens, meta):
    """The text of tokens (n,); PAD is left out, the separator of stories stays as a character of code 0."""
    if meta["kind"] == "image":
        raise UsageError(f"{meta['name']} is made of pictures: it has no text")
    tokens = [token for token in torch.as_tensor(tokens).tolist() if 0 <= token < meta["vocab_size"]]
    if meta["kind"] == "synthetic":
        return tasks.to_text(meta["name"], tokens, meta)
    return bytes(tokens).decode("utf-8", "replace")


# ---------------------------------------------------------------------------------------------------------------------
# Loading

def load(name, data_dir):
    """The data set data_dir/name, its bins mapped into memory. DataError if it is missing or not what its meta says."""
    folder = Path(data_dir) / name
    again = f"prepare it: python data.py --dataset={name} --data_dir={data_dir}"
    again += " --source=PATH" if name in NEEDS_SOURCE else ""
    if not (folder / "meta.json").is_file():
        raise DataError(f"there is no data set in {folder}; {again}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        missing = {"name", "first_token", "longest_document", *KINDS[meta["kind"]]} - set(meta)
        if missing or not 2 <= meta["vocab_size"] <= 256:
            raise ValueError(f"vocabulary of {meta['vocab_size']}, missing: {' '.join(missing) or 'nothing'}")
        counts = [(split, int(meta["counts"][split]["tokens"]), int(meta["counts"][split]["documents"]))
                  for split in ("train", "val")]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder / 'meta.json'} is damaged ({type(error).__name__}: {error}); {again}") from None
    try:
        return Data(meta, *(load_split(folder, meta["kind"], meta["vocab_size"], *count) for count in counts))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{folder}: {error}; {again}") from None


def load_split(folder, kind, vocab_size, split, n_tokens, n_documents):
    """One Split. ValueError says what is wrong with it."""
    tokens = map_bin(folder / f"{split}.bin", n_tokens)
    targets = map_bin(folder / f"{split}_targets.bin", n_tokens) if kind == "synthetic" else None
    starts = np.load(folder / f"{split}_starts.npy", allow_pickle=False).astype(np.int64)
    if starts.shape != (n_documents,) or not n_documents:
        raise ValueError(f"{split}_starts.npy has {starts.size} documents, meta.json says {n_documents}")
    if starts[0] != 0 or starts[-1] >= n_tokens or (np.diff(starts) <= 0).any():
        raise ValueError(f"{split}_starts.npy does not hold rising positions from 0 to below {n_tokens}")
    for array, allowed in (tokens, ()), (targets, (NOTHING_ASKED,)):
        if array is not None and vocab_size < 256:
            wrong = [i for i in np.flatnonzero(histogram(array)) if i >= vocab_size and i not in allowed]
            if wrong:
                raise ValueError(f"{split} holds the token {wrong[0]}, outside the vocabulary of {vocab_size}")
    return Split(torch.from_numpy(tokens), None if targets is None else torch.from_numpy(targets),
                 torch.from_numpy(starts))


def map_bin(path, n_tokens):
    """A bin of n_tokens bytes as an array in which only the pages that are read take up memory."""
    size = path.stat().st_size
    if size != n_tokens or size < 2:
        raise ValueError(f"{path.name} has {size} tokens, meta.json says {n_tokens}")
    return np.memmap(path, np.uint8, mode="c")  # copy on write: nothing here writes, and torch takes no read-only array


def histogram(tokens):
    """How often each byte value occurs (256,), a part at a time."""
    return sum(np.bincount(tokens[i:i + SCAN], minlength=256) for i in range(0, len(tokens), SCAN))


# ---------------------------------------------------------------------------------------------------------------------
# Preparing

def prepare(name, data_dir, source=None, seed=0, train_tokens=Config.train_tokens, val_tokens=Config.val_tokens,
            **options):
    """Make the data set data_dir/name, whole or not at all, and print what is in it.

    source: file or folder with the original files; unset: they are downloaded. options: of the generated task.
    An existing data set of that name is replaced once the new one is complete.
    """
    options = check_request(name, source, seed, train_tokens, val_tokens, options)
    folder = Path(data_dir) / name
    if folder.exists() and not (folder / "meta.json").is_file():
        raise DataError(f"{folder} exists and is not a data set: move it away, or choose another --data_dir")
    made = folder.with_name(f".{name}-{os.getpid()}.tmp")
    try:
        shutil.rmtree(made, ignore_errors=True)   # of a process that was killed
        made.mkdir(parents=True)
        meta = {"name": name, "seed": seed, "options": options}
        if name in GENERATED:
            meta |= write_generated(made, name, seed, (train_tokens, val_tokens), options)
        else:
            meta |= download.convert(name, made, source, Path(data_dir) / "downloads", philox(seed, 0, "split"))
        meta = finish(made, meta)
        replace_folder(made, folder)
    except OSError as error:
        raise DataError(f"cannot make {folder}: {error.filename or ''} {error.strerror or error}") from None
    except MemoryError:
        raise DataError(f"cannot make {folder}: generated data must fit into memory, take fewer tokens") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    print(summary(meta, folder))


def ensure(name, data_dir):
    """Prepare a data set that is not there yet."""
    if not (Path(data_dir) / name / "meta.json").exists():
        prepare(name, data_dir)


def check_request(name, source, seed, train_tokens, val_tokens, options):
    """The task options that are set; UsageError if the request makes no sense."""
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
        raise UsageError(f"there is no data set {name!r}; the nearest is {near}, all are {', '.join(DATASETS)}")
    options = {key: value for key, value in options.items() if value not in (None, "")}
    known = list(tasks.OPTIONS.get(name, {}))
    for key in options.keys() - known:
        has = f"has {', '.join('--' + k for k in known)}" if known else "has no options of its own"
        raise UsageError(f"{name} has no option --{key}; it {has}")
    if name in GENERATED and source:
        raise UsageError(f"{name} is generated: it takes no --source")
    if name not in GENERATED and (train_tokens, val_tokens) != (Config.train_tokens, Config.val_tokens):
        raise UsageError(f"{name} is not generated: it takes no --train_tokens and no --val_tokens")
    if name in NEEDS_SOURCE and not source:
        raise UsageError(f"{name} needs {NEEDS_SOURCE[name]}: python data.py --dataset={name} --source=PATH")
    if seed < 0 or min(train_tokens, val_tokens) < 2:
        raise UsageError("--seed must not be negative, --train_tokens and --val_tokens must be at least 2")
    if isinstance(options.get("length"), str):
        try:
            low, _, high = options["length"].partition("-")
            options["length"] = int(low), int(high or low)
        except ValueError:
            raise UsageError(f"--length is one number or two, like 32 or 8-64, not {options['length']!r}") from None
    return options


def write_generated(folder, name, seed, n_tokens, options):
    """Generate the two splits, each from its own random stream; returns their part of the meta."""
    for stream, split in enumerate(("train", "val")):
        rng = philox(seed, stream, "generate")
        if name == "fables":
            tokens, starts = fables.generate(rng, n_tokens[stream])
            targets, vocab_size = None, fables.VOCAB_SIZE
        else:
            tokens, targets, starts, vocab_size = tasks.TASKS[name](rng, n_tokens[stream], **options)
        download.write_split(folder, split, [(tokens, starts)])
        if targets is not None:
            targets.tofile(folder / f"{split}_targets.bin")
    meta = {"vocab_size": vocab_size, "options": tasks.OPTIONS.get(name, {}) | options}
    if name == "fables":
        return meta | {"kind": "text", "first_token": fables.SEPARATOR, "statistics": fables.statistics()}
    return meta | {"kind": "synthetic", "first_token": None}


def finish(folder, meta):
    """Count what was written and write meta.json; returns the whole meta. DataError if a split is empty."""
    meta = {"source": [], **meta, "longest_document": 0, "counts": {}}
    seen = np.zeros(256, np.int64)
    for split in ("train", "val"):
        starts = np.load(folder / f"{split}_starts.npy").astype(np.int64)
        if not len(starts):
            raise DataError(f"there is nothing in the {split} split of {meta['name']}: its source holds no document")
        tokens = np.memmap(folder / f"{split}.bin", np.uint8, mode="r")
        seen += histogram(tokens)
        lengths = np.diff(starts, append=documents_end(len(tokens), meta))
        meta["longest_document"] = max(meta["longest_document"], int(lengths.max()))
        size = sum(path.stat().st_size for path in folder.glob(f"{split}*"))
        meta["counts"][split] = {"tokens": len(tokens), "documents": len(starts), "bytes": size}
        if split == "train" and meta["kind"] == "image":
            meta["first_token"] = int(np.bincount(tokens[starts]).argmax())   # the likeliest first pixel
    if meta["kind"] == "text":
        meta["alphabet"] = [int(i) for i in np.flatnonzero(seen)]
    write_atomically(folder / "meta.json", lambda path: Path(path).write_text(json.dumps(meta, indent=1) + "\n"))
    return meta


def replace_folder(new, folder):
    """Put the folder `new` in the place of `folder`, which is deleted if it exists."""
    old = new.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def summary(meta, folder):
    """A table of what a data set holds."""
    in_use = f" ({len(meta['alphabet'])} in use)" if "alphabet" in meta else ""
    lines = [f"{folder}: vocabulary {meta['vocab_size']}{in_use}, longest document {meta['longest_document']:,} tokens",
             f"{'split':<6}{'tokens':>16}{'documents':>14}{'bytes':>16}"]
    for split, count in meta["counts"].items():
        lines.append(f"{split:<6}{count['tokens']:>16,}{count['documents']:>14,}{count['bytes']:>16,}")
    if "statistics" in meta:
        known = meta["statistics"]
        lines += [f"entropy {known['entropy_per_character']:.4f} nats per character: the loss that no model can beat",
                  f"{known['fact_share']:.1%} of it are facts that come back later; to forget them costs "
                  f"{known['forgetting_cost']:.4f} nats per character more"]
    return "\n".join(lines)


def main():
    config = vars(parse(Config))
    prepare(config.pop("dataset"), config.pop("data_dir"), config.pop("source"), **config)


if __name__ == "__main__":
    run_main(main)
