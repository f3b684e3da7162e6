"""Files in and bins out: read a file in parts, write a split as it comes."""
import gzip
import hashlib
import zlib
from array import array
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.cli import DataError

CHUNK = 1 << 20          # bytes read at once


def chunks(path, packed=None, size=CHUNK):
    """The content of a file in parts of `size` bytes; packed: whether gzipped, unset: as its name says."""
    packed = Path(path).suffix == ".gz" if packed is None else packed
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            while chunk := file.read(size):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not an intact gzip file: {error}") from None


def bar(what, total, done=0):
    """A progress bar in bytes, on a terminal only."""
    return tqdm(desc=what, total=total, initial=done, unit="B", unit_scale=True, disable=None)


def sha256(path, unpacked=False):
    """The checksum of a file, or of what it unpacks to."""
    digest = hashlib.sha256()
    for chunk in chunks(path, packed=unpacked):
        digest.update(chunk)
    return digest.hexdigest()


def describe(paths):
    """Name, size and checksum of the files a data set was made of."""
    return [{"file": Path(p).name, "bytes": Path(p).stat().st_size, "sha256": sha256(p)} for p in paths]


def write_split(folder, split, pieces):
    """Write a split from pieces as they come: (tokens uint8 (n,) or bytes, where in them documents begin)."""
    starts, n_tokens = array("Q"), 0
    with open(folder / f"{split}.bin", "wb") as file:
        for tokens, piece_starts in pieces:
            starts.frombytes((np.asarray(piece_starts, np.uint64) + np.uint64(n_tokens)).tobytes())
            n_tokens += file.write(memoryview(tokens))
    np.save(folder / f"{split}_starts.npy", np.frombuffer(starts, np.uint64))
