"""Downloads, and what makes bins of original files. `data.py` is what you run.

A reader yields pieces (tokens, starts): bytes of one document or of several, and where in the piece they
begin. Files are read as a stream: they may be larger than memory.
"""
import http.client
import itertools
import os
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from lib.cli import DataError
from sources.files import CHUNK, bar, chunks, describe, sha256, write_split
from sources.pictures import SIDE, sketches
from sources.texts import stories, write_text

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
TIMEOUT = 30             # seconds without a byte


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
        candidates = [folder / n for n in (plain, plain + ".gz") if (folder / n).is_file()]
        if not candidates:
            raise DataError(f"{source} has no {plain}, neither plain nor as .gz; {name} is made of {wanted}")
        paths.append(candidates[0])
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
        raise DataError(f"cannot download {file} ({'; '.join(failures)}): try again, it goes on from there, "
                        "or get it in another way and pass --source=FOLDER")
    return path


def fetch_part(url, part):
    """Append to the file `part` what it lacks of the content at url, or start anew if the server cannot."""
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


def intact(part, file):
    """Whether what was downloaded is what the file holds."""
    try:
        return sha256(part, unpacked=file.endswith(".gz")) == SHA256[file]
    except DataError:   # not even a gzip file
        return False


# ------------------------------------------------------------------------------------------------------------
# Pictures

def pixels(path):
    """The pieces of a file of MNIST images (idx, plain or gzipped): the 784 pixels of each, line by line."""
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
