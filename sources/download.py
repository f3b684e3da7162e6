"""Original files: download them, and read them into pieces of tokens. `data.py` is what you run.

A reader yields pieces (tokens, starts): bytes of one document or of several, and where in the piece they
begin. Files are read as a stream, so they may be larger than memory.
"""
import codecs
import gzip
import hashlib
import http.client
import io
import itertools
import mmap
import os
import re
import urllib.error
import urllib.request
import zlib
from array import array
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from lib.cli import DataError
from sources.pictures import PICTURES, SIDE, read_sketch, to_patches

FILES = {"tinystories": ("TinyStories-train.txt", "TinyStories-valid.txt"),
         "mnist": ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz")}
MIRRORS = {"tinystories": ["https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/",
                           "https://hf-mirror.com/datasets/roneneldan/TinyStories/resolve/main/"],
           "mnist": ["https://ossci-datasets.s3.amazonaws.com/mnist/",
                     "https://storage.googleapis.com/cvdf-datasets/mnist/",
                     "http://yann.lecun.com/exdb/mnist/"]}
SHA256 = {  # of the content, unpacked
    "TinyStories-train.txt": "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f",
    "TinyStories-valid.txt": "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4",
    "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}
CHUNK = 1 << 20          # bytes read at once
TIMEOUT = 30             # seconds without a byte
LONGEST_STORY = 1 << 26  # characters: beyond, the file is not one of stories

# What TinyStories writes beyond ASCII and how we read it, also where UTF-8 was once taken for Windows-1252 (â€™ for ’)
PLAIN = {"‘": "'", "’": "'", "‚": "'", "“": '"', "”": '"', "„": '"', "–": "-", "—": "-", "…": "...",
         "\u00a0": " ", "\t": " "}
GARBLED = {c.encode().decode("cp1252", "ignore"): plain for c, plain in PLAIN.items() if c > "\u2000"}
FOLD = {"â€\x9d": '"'} | {wrong: GARBLED[wrong] for wrong in sorted(GARBLED, key=len, reverse=True)} | PLAIN


# ------------------------------------------------------------------------------------------------------------
# From files to bins

def convert(name, folder, source, downloads, rng):
    """Write the bins of a data set into `folder`, from `source` or from what is downloaded into `downloads`.

    rng draws the pictures of sketchy that are held out. Returns the part of the meta that is known here.
    """
    if name == "text":
        file = write_text(folder, source)
        return {"kind": "text", "vocab_size": 256, "first_token": 10, "source": describe([file])}
    if name == "sketchy":
        for split, pieces in sketches(source, rng):
            write_split(folder, split, pieces)
        return {"kind": "image", "vocab_size": 16, "image": {"height": SIDE, "width": SIDE, "patch": 2}}
    files = original_files(name, source, downloads)
    for split, file in zip(("train", "val"), files):
        write_split(folder, split, stories(file) if name == "tinystories" else pixels(file))
    meta = {"vocab_size": 256, "source": describe(files)}
    if name == "tinystories":
        return meta | {"kind": "text", "first_token": 0}
    return meta | {"kind": "image", "image": {"height": 28, "width": 28, "patch": 1}}


def write_split(folder, split, pieces):
    """Write one split from pieces (tokens uint8 (n,) or bytes, starts of documents within the piece), as they
    come."""
    starts, n_tokens = array("Q"), 0
    with open(folder / f"{split}.bin", "wb") as file:
        for tokens, piece_starts in pieces:
            starts.frombytes((np.asarray(piece_starts, np.uint64) + np.uint64(n_tokens)).tobytes())
            n_tokens += file.write(memoryview(tokens))
    np.save(folder / f"{split}_starts.npy", np.array(starts, np.uint64))


# ------------------------------------------------------------------------------------------------------------
# Download

def original_files(name, source, downloads):
    """The paths of the files of a data set: in the folder `source`, else downloaded into the folder
    `downloads`."""
    if not source:
        downloads.mkdir(parents=True, exist_ok=True)
        return [fetch(file, MIRRORS[name], downloads) for file in FILES[name]]
    folder, paths, wanted = Path(source), [], " and ".join(FILES[name])
    if not folder.is_dir():
        raise DataError(f"{source} is not a folder: --source of {name} is the folder that holds {wanted}")
    for file in FILES[name]:
        plain = file.removesuffix(".gz")
        found = [folder / candidate for candidate in (plain, plain + ".gz") if (folder / candidate).is_file()]
        if not found:
            raise DataError(f"{source} has no {plain}, neither plain nor as .gz; {name} is made of {wanted}")
        paths.append(found[0])
    return paths


def fetch(file, mirrors, folder):
    """Download a file from the first mirror that gives it whole and intact; returns its path in `folder`.

    What has arrived stays in <file>.part, and the next attempt goes on from there. DataError if every mirror
    fails.
    """
    path, part = folder / file, folder / f"{file}.part"
    failures = []
    for mirror in [] if path.exists() else mirrors:
        try:
            fetch_part(mirror + file, part)
            if not intact(part, file):
                part.unlink()
                raise DataError("wrong checksum")
            os.replace(part, path)
            break
        except (OSError, http.client.HTTPException, DataError) as error:
            reason = getattr(error, "reason", error)                 # URLError wraps the OSError that says it
            failures.append(f"{urlsplit(mirror).netloc}: {getattr(reason, 'strerror', None) or reason}")
    if not path.exists():
        raise DataError(f"cannot download {file} ({'; '.join(failures)}): try again to go on from where it stopped, "
                        "or get it in another way and pass --source=FOLDER")
    return path


def fetch_part(url, part):
    """Append to the file `part` what it lacks of the content at url; start anew if the server cannot do that."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "python-urllib"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":   # nothing is lacking
            return
        part.unlink()                                                 # longer than the file: not a part of it
        return fetch_part(url, part)
    with answer:
        if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if have else "wb") as out, bar(part.stem, total, have) as progress:
            while chunk := answer.read(CHUNK):
                out.write(chunk)
                progress.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise DataError(f"the connection broke after {part.stat().st_size:,} of {total:,} bytes")


def bar(what, total, done=0):
    """A progress bar in bytes, on a terminal only."""
    return tqdm(desc=what, total=total, initial=done, unit="B", unit_scale=True, disable=None)


def intact(part, file):
    """Whether what was downloaded is what the file holds."""
    try:
        return sha256(part, unpacked=file.endswith(".gz")) == SHA256[file]
    except DataError:   # not even a gzip file
        return False


def sha256(path, unpacked=False):
    """The checksum of a file, or of what it unpacks to."""
    digest = hashlib.sha256()
    for chunk in chunks(path, packed=unpacked):
        digest.update(chunk)
    return digest.hexdigest()


def describe(paths):
    """Name, size and checksum of the files a data set was made of."""
    return [{"file": Path(p).name, "bytes": Path(p).stat().st_size, "sha256": sha256(p)} for p in paths]


def chunks(path, packed=None, size=None):
    """The content of a file in parts of `size` bytes; packed: whether it is gzipped, by default if its name
    says so."""
    packed = Path(path).suffix == ".gz" if packed is None else packed
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            while chunk := file.read(size or CHUNK):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not an intact gzip file: {error}") from None


# ------------------------------------------------------------------------------------------------------------
# TinyStories

def stories(path):
    """The pieces of a file of stories: a 0 and the story, in ASCII; at last a 0 alone.

    Stories are separated by <|endoftext|>, or by blank lines where the file does not begin with such stories.
    """
    n_stories = n_dropped = 0
    for story in split_stories(path):
        folded = fold(story)
        kept = re.sub(r"[^\n -~]", "", folded)
        n_dropped += len(folded) - len(kept)
        kept = kept.strip()
        if kept:
            n_stories += 1
            yield b"\0" + kept.encode(), [0]
    yield b"\0", []
    print(f"{path.name}: {n_stories:,} stories, {n_dropped:,} characters dropped that are not ASCII")


def split_stories(path):
    """The texts between the separators of a file, their lines ended by a plain newline."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
    rest, separator = "", None
    with bar(path.name, None if path.suffix == ".gz" else path.stat().st_size) as progress:
        for chunk in chunks(path):
            rest += decoder.decode(chunk)
            separator = separator or re.compile(r"<\|endoftext\|>" if "<|endoftext|>" in rest else r"\n[ \t]*\n")
            *whole, rest = separator.split(rest)
            yield from whole
            if len(rest) > LONGEST_STORY:
                raise DataError(f"{path}: {len(rest):,} characters without an end of story ({separator.pattern})")
            progress.update(len(chunk))
    yield rest + decoder.decode(b"", final=True)


def fold(text):
    """A text with typographic quotes, dashes and spaces as their ASCII counterparts."""
    if text.isascii() and "\t" not in text:
        return text
    for wrong, plain in FOLD.items():
        text = text.replace(wrong, plain)
    return text


# ------------------------------------------------------------------------------------------------------------
# Any text

def write_text(folder, source):
    """Write the bins and starts of any text into `folder`, bytes as they are: the first 90% train. Returns
    its path."""
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source} is not a file: --source of text is one text file, plain or .gz")
    train, val, n_foreign = folder / "train.bin", folder / "val.bin", 0
    with open(train, "wb") as out:
        out.write(b"\n")                           # each split begins with a separator
        for chunk in chunks(path):
            if b"\0" in chunk:
                raise DataError(f"{source} is not text: it holds a byte 0")
            n_foreign += int((np.frombuffer(chunk, np.uint8) > 127).sum())
            out.write(chunk)
        size = out.tell()
    if size < 3:
        raise DataError(f"{source} is empty: there is nothing to learn from")
    with open(train, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        cut = text.rfind(b"\n", size // 2, size * 9 // 10) + 1 or size * 9 // 10    # after a line, if there are lines
        with open(val, "wb") as out:
            out.write(b"\n")
            for i in range(cut, size, CHUNK):
                out.write(text[i:i + CHUNK])
    os.truncate(train, cut)
    for split in (train, val):
        np.save(split.with_name(f"{split.stem}_starts.npy"), paragraphs(np.memmap(split, np.uint8, mode="r")))
    print(f"{path.name}: {n_foreign:,} of {size - 1:,} bytes are not ASCII; they are kept as they are")
    return path


def paragraphs(text):
    """Where paragraphs begin, uint64: at the newline before a line with text that follows a blank one; and at
    0."""
    found = [np.zeros(1, np.uint64)]
    for i in range(0, len(text), CHUNK):
        part = text[max(i - 2, 0):i + CHUNK + 1]                    # two bytes of the past, one of the future
        last2, last, here, following = part[:-3], part[1:-2], part[2:-1], part[3:]
        blank = (last == 10) | ((last == 13) & (last2 == 10))      # the line that ends here is empty, or a \r
        at = np.flatnonzero(blank & (here == 10) & (following != 10) & (following != 13))
        found.append((at + max(i - 2, 0) + 2).astype(np.uint64))
    return np.unique(np.concatenate(found))


# ------------------------------------------------------------------------------------------------------------
# Pictures

def pixels(path):
    """The pieces of a file of MNIST images (idx, plain or gzipped): the 784 pixels of each in raster order."""
    stream = chunks(path, size=784 * 1000)
    rest = next(stream, b"")
    magic, n_images, height, width = np.frombuffer(rest[:16].ljust(16, b"\0"), ">u4").tolist()
    if magic == 0x801:
        raise DataError(f"{path} holds labels: the images are in {' and '.join(FILES['mnist'])}")
    if (magic, height, width) != (0x803, 28, 28):
        raise DataError(f"{path} is not an idx file of 28 x 28 images")
    rest, n_read = rest[16:], 0
    for chunk in itertools.chain(stream, [b""]):
        whole = len(rest) - len(rest) % 784
        yield rest[:whole], range(0, whole, 784)
        n_read += whole // 784
        rest = rest[whole:] + chunk
    if n_read != n_images or rest:
        raise DataError(f"{path} does not hold the {n_images:,} images that it announces: it is damaged")


def sketches(source, rng):
    """The pictures under a folder: ("train", pieces), then ("val", pieces), of a tenth of them, drawn by rng."""
    paths = sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    if len(paths) < 2:
        raise DataError(f"{source} holds {len(paths)} pictures ({' '.join(sorted(PICTURES))}): at least two are needed")
    order, n_held_out = rng.permutation(len(paths)), max(1, len(paths) // 10)

    for split, which in ("train", np.sort(order[n_held_out:])), ("val", np.sort(order[:n_held_out])):
        shown = tqdm(which, desc=f"sketchy {split}", unit=" pictures", disable=None)
        yield split, ((to_patches(read_sketch(paths[i]), 2), [0]) for i in shown)
