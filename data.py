"""Data: prepare every data set, load it, draw training rows.

    python data.py                                      # fables: generated
    python data.py --dataset=retrieval --length=8-64    # or copy, stack, keyvalue, modular: generated
    python data.py --dataset=tinystories                # downloaded; files you have: --source=FOLDER
    python data.py --dataset=mnist                      # the same
    python data.py --dataset=sketchy --source=FOLDER    # a folder of pictures
    python data.py --dataset=text --source=FILE         # any text of yours

A data set is a folder <data_dir>/<name>/ with meta.json and, per split (train, val), one flat stream of uint8
tokens:

    <split>.bin            the tokens, 0..V-1
    <split>_starts.npy     uint64, where each document begins; the first begins at 0
    <split>_targets.bin    uint8, only where the target is not the next token; 255: no target here

Three kinds. `text`: one stream, 0 story 0 story 0; a document is a 0 (in the data set `text`: a newline) with
the characters that follow, and its last target is the separator after it. `image`: a picture is a document,
without a target after its last pixel. `synthetic`: documents with their own targets. Downloads are kept in
<data_dir>/downloads/.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lib.cli import DataError, UsageError, check_fields, parse, run_main
from lib.seeds import philox
from model import IGNORE
from sources import tasks, texts
from sources.bins import check_meta, documents_end, load_split
from sources.prepare import NEEDS_SOURCE, TRAIN_TOKENS, VAL_TOKENS, prepare


@dataclass(frozen=True)
class Config:
    """Flags of data.py."""
    dataset: str = "fables"     # retrieval, copy, stack, keyvalue, modular, tinystories, mnist, sketchy, text
    data_dir: str = "data"          # folder that holds the prepared data sets
    source: str = ""              # file or folder with the original files, plain or .gz; empty: download them
    seed: int = 0                   # of generated data, and of the split of sketchy
    train_tokens: int = TRAIN_TOKENS # tokens to generate for training
    val_tokens: int = VAL_TOKENS    # tokens to generate for validation
    length: str = ""        # retrieval: tokens; copy: symbols; stack: operations; modular: pairs. 32, or 8-64
    symbols: int | None = None      # retrieval, copy, stack, keyvalue: how many symbols
    noise: float | None = None      # retrieval: probability that the target is replaced by a random symbol
    depth: int | None = None        # stack: the greatest depth
    keys: int | None = None         # keyvalue: how many pairs
    key_length: int | None = None   # keyvalue: symbols in a key
    value_length: int | None = None  # keyvalue: symbols in a value
    modulus: int | None = None      # modular: p

    def __post_init__(self):
        check_fields(self)


# ------------------------------------------------------------------------------------------------------------
# Training rows

@dataclass
class Split:
    """tokens and targets (N,) uint8, targets may be None; starts (D,) int64, on the CPU; device of rows."""
    tokens: torch.Tensor
    targets: torch.Tensor | None
    starts: torch.Tensor
    device: torch.device = torch.device("cpu")

    def to(self, device):
        """Rows on a device; the tokens go there, too, if they take at most a quarter of what is free."""
        streams = self.tokens, self.targets
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        if sum(stream.nbytes for stream in streams if stream is not None) <= free / 4:
            streams = (None if stream is None else stream.to(device) for stream in streams)
        return Split(*streams, self.starts, device)

    def rows(self, *tensors):
        """Tensors on the device of the rows; to CUDA from pinned memory, without waiting."""
        pin = self.device.type == "cuda" and tensors[0].device.type == "cpu"
        return tuple((x.pin_memory() if pin else x).to(self.device, non_blocking=pin) for x in tensors)


@dataclass
class Data:
    """A data set: its meta.json, and its two splits."""
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


def document_rows(split, meta, begin, length, cut):
    """Rows of `length` tokens that begin at the indices `begin` (B,) of a split.

    Returns x (B, T) and y (B, T), int64, on split.device. Past the end of the document (if `cut`) or of the
    stream x is PAD and y is IGNORE.
    """
    n_tokens, device, begin = len(split.tokens), split.tokens.device, begin.cpu()
    end = torch.full_like(begin, n_tokens)
    if cut:
        ends = torch.cat([split.starts[1:], torch.tensor([documents_end(n_tokens, meta)])])
        end = ends[torch.searchsorted(split.starts, begin, right=True) - 1]
    begin, end = torch.stack([begin, end])[..., None].to(device, non_blocking=True)      # (B, 1) each

    position = begin + torch.arange(length + 1, device=device)                           # (B, T + 1)
    index = position.clamp(max=n_tokens - 1)
    inside = position < end
    tokens = split.tokens[index].long()
    x = torch.where(inside[:, :-1], tokens[:, :-1], meta["vocab_size"])
    if split.targets is not None:
        y = split.targets[index[:, :-1]].long()
        return split.rows(x, torch.where(inside[:, :-1] & (y != tasks.NO_TARGET), y, IGNORE))
    if meta["kind"] == "text":                       # the separator after a document is its last target
        inside = position < (end + 1).clamp(max=n_tokens)
    return split.rows(x, torch.where(inside[:, 1:], tokens[:, 1:], IGNORE))


def row_length(data, seq_len):
    """Tokens T of a training row: of text seq_len, else those of the longest document."""
    return seq_len if data.meta["kind"] == "text" else data.meta["longest_document"]


def sample_batch(data, seed, step, batch_size, seq_len, n_positions, p_start, rank=0, world_size=1):
    """The training batch of a step, a pure function of (seed, step); each rank takes its slice of it.

    A row of text begins at a document's start with probability p_start, else anywhere in the stream; other
    rows are whole documents. Returns x, y (batch_size / world_size, seq_len) int64 on the device of the rows,
    and the positions t (n_positions,) int64 of the step, in random order, distinct if they can be.
    """
    starts, n_tokens, documents = data.train.starts, len(data.train.tokens), data.meta["kind"] != "text"
    rng = philox(seed, step, "batch")
    if n_positions <= seq_len:
        t = rng.choice(seq_len, n_positions, replace=False)
    else:
        t = rng.integers(seq_len, size=n_positions)
    at_start = documents | (rng.random(batch_size) < p_start)
    document_start = starts[rng.integers(len(starts), size=batch_size)]
    anywhere = torch.from_numpy(rng.integers(n_tokens - 1, size=batch_size))  # the last token has no next one
    begin = torch.where(torch.from_numpy(at_start), document_start, anywhere).chunk(world_size)[rank]
    x, y = document_rows(data.train, data.meta, begin, seq_len, cut=documents)
    return x, y, *data.train.rows(torch.from_numpy(t))


def held_out(data, n_documents, length=512, seed=0):
    """Validation rows x, y (n_documents, length), the same for every caller with the same seed.

    Documents from their start, cut at their end. Rows of text are no longer than the longest document;
    pictures and synthetic documents, whose targets come last, are whole. The data set `text` has paragraphs
    too short to remember anything in: its rows go on. No document comes twice before each has come once.
    """
    cut, longest = data.meta["name"] != "text", data.meta["longest_document"]
    length = longest if data.meta["kind"] != "text" else min(length, longest) if cut else length
    order = np.resize(philox(seed, 0, "held out").permutation(len(data.val.starts)), n_documents)
    return document_rows(data.val, data.meta, data.val.starts[order], length, cut)


# ------------------------------------------------------------------------------------------------------------
# Text and tokens

def encode(text, meta):
    """The tokens of a text, a list, without a separator. UsageError if the data set lacks a character."""
    if meta["kind"] != "text":
        raise UsageError(f"{meta['name']} is not made of text: there are no tokens for {text!r}")
    alphabet = set(meta["alphabet"]) - {0}
    text = texts.fold(text) if meta["name"] == "tinystories" else text
    missing = sorted({c for c in text if not alphabet.issuperset(c.encode("utf-8", "surrogatepass"))})
    if missing:
        raise UsageError(f"{meta['name']} does not have the characters {' '.join(map(repr, missing))}")
    return list(text.encode("utf-8", "surrogatepass"))


def decode(tokens, meta):
    """The text of tokens (n,); PAD is left out, the separator of stories stays as a character of code 0."""
    tokens = [token for token in torch.as_tensor(tokens).tolist() if 0 <= token < meta["vocab_size"]]
    if meta["kind"] == "synthetic":
        return tasks.to_text(meta["name"], tokens, meta)
    return bytes(tokens).decode("utf-8", "replace")


# ------------------------------------------------------------------------------------------------------------
# Loading

def load(name, data_dir):
    """The data set data_dir/name, its bins mapped into memory. DataError if it is missing or damaged."""
    folder = Path(data_dir) / name
    again = f"prepare it: python data.py --dataset={name} --data_dir={data_dir}"
    again += " --source=PATH" if name in NEEDS_SOURCE else ""
    if not (folder / "meta.json").is_file():
        raise DataError(f"there is no data set in {folder}; {again}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        check_meta(meta)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{folder / 'meta.json'} is damaged ({reason}); {again}") from None
    try:
        return Data(meta, *(Split(*load_split(folder, meta, split)) for split in ("train", "val")))
    except ValueError as error:
        raise DataError(f"{folder}: {error}; {again}") from None


# ------------------------------------------------------------------------------------------------------------

def main():
    config = vars(parse(Config))
    prepare(config.pop("dataset"), config.pop("data_dir"), config.pop("source"), **config)


if __name__ == "__main__":
    run_main(main)
