"""The files of a data set: checked before anything is made of what they say."""
import numpy as np
import torch

from sources import tasks

SCAN = 1 << 24       # tokens looked at together when a whole bin is scanned
META = dict(name=str, kind=str, vocab_size=int, first_token=(int, type(None)), longest_document=int,
            counts=dict, fingerprint=str)


def check_meta(meta):
    """ValueError, TypeError, KeyError or AttributeError unless a meta.json has what loading, sampling and
    evaluating need."""
    wrong = [key for key, kind in META.items() if not isinstance(meta[key], kind) or meta[key] is True]
    kind, V, first, longest = (meta[key] for key in ("kind", "vocab_size", "first_token", "longest_document"))
    counts = [meta["counts"][split][what] for split in ("train", "val") for what in ("tokens", "documents")]
    valid = {"vocab_size": 2 <= V <= 256,
             "first_token": kind == "synthetic" if first is None else 0 <= first < V,
             "kind": kind in ("text", "image", "synthetic"),
             "counts": all(type(n) is int and 0 < n < 2**48 for n in counts),
             "longest_document": 0 < longest <= max(counts[0], counts[2])}
    if kind == "synthetic":
        valid["name"] = meta["name"] in tasks.TASKS
    elif kind == "text":
        valid["alphabet"] = all(type(i) is int and 0 <= i < 256 for i in meta["alphabet"])
    else:
        height, width, patch = (meta["image"][key] for key in ("height", "width", "patch"))
        fits = height * width == longest * patch**2 and height % patch == width % patch == 0
        valid["image"] = patch in (1, 2) and fits
    if "statistics" in meta:
        valid["statistics"] = type(meta["statistics"]["entropy_per_character"]) is float
    wrong += [key for key, is_valid in valid.items() if not is_valid]
    if wrong:
        raise ValueError(f"{wrong[0]} makes no sense")


def load_split(folder, meta, split):
    """tokens (N,) uint8, targets (N,) uint8 or None, starts (D,) int64 of a split. ValueError if damaged."""
    n_tokens, n_documents = (meta["counts"][split][what] for what in ("tokens", "documents"))
    V = meta["vocab_size"]
    tokens = map_bin(folder / f"{split}.bin", n_tokens)
    targets = map_bin(folder / f"{split}_targets.bin", n_tokens) if meta["kind"] == "synthetic" else None
    starts = load_starts(folder / f"{split}_starts.npy")
    if starts.shape != (n_documents,):
        raise ValueError(f"{split}_starts.npy has {starts.size} documents, meta.json says {n_documents}")
    if starts[0] != 0 or starts.min() < 0 or starts.max() >= n_tokens or (np.diff(starts) <= 0).any():
        raise ValueError(f"{split}_starts.npy does not hold rising indices from 0 to below {n_tokens}")
    for array, allowed in (tokens, ()), (targets, (tasks.NO_TARGET,)):
        if array is not None and V < 256:
            wrong = [i for i in np.flatnonzero(histogram(array)) if i >= V and i not in allowed]
            if wrong:
                raise ValueError(f"{split} holds the token {wrong[0]}, outside the vocabulary of {V}")
    arrays = tokens, targets, starts
    return tuple(None if array is None else torch.from_numpy(array) for array in arrays)


def load_starts(path):
    """Where the documents of a split begin, (D,) int64. ValueError if the file is damaged."""
    try:
        starts = np.load(path, mmap_mode="r", allow_pickle=False)   # mapped: a header may ask for any size
    except OSError:
        raise
    except Exception as error:      # numpy evaluates the header by Python's parser, which may raise anything
        raise ValueError(f"{path.name} is not an array ({type(error).__name__})") from None
    if starts.dtype != np.uint64:
        raise ValueError(f"{path.name} holds {starts.dtype} instead of uint64")
    return starts.astype(np.int64)


def map_bin(path, n_tokens):
    """A bin of n_tokens bytes as an array: only the pages that are read take up memory."""
    size = path.stat().st_size
    if size != n_tokens or size < 2:
        raise ValueError(f"{path.name} has {size} tokens, meta.json says {n_tokens}")
    return np.memmap(path, np.uint8, mode="c")      # copy on write: torch takes no read-only array


def documents_end(n_tokens, meta):
    """Where the last document ends: a stream of stories closes with one more separator, which belongs to
    none."""
    return n_tokens - 1 if meta["kind"] == "text" and meta["first_token"] == 0 else n_tokens


def histogram(tokens):
    """How often each byte value occurs (256,), a part at a time."""
    return sum(np.bincount(tokens[i:i + SCAN], minlength=256) for i in range(0, len(tokens), SCAN))
