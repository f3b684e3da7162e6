"""Texts: files of stories, and any text."""
import codecs
import io
import mmap
import os
import re
import shutil
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from lib.cli import DataError
from sources.files import CHUNK, bar, chunks

LONGEST_STORY = 1 << 26  # characters: beyond, the file is not one of stories
FEW = 64                 # documents: a text with fewer paragraphs is cut at its lines, or evenly

# The byte-order marks that a text may begin with; that of UTF-32 begins with that of UTF-16
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}

# What TinyStories writes beyond ASCII, also where UTF-8 was once taken for Windows-1252, and how it is read
PLAIN = {"‘": "'", "’": "'", "‚": "'", "“": '"', "”": '"', "„": '"', "–": "-", "—": "-", "…": "...",
         "\u00a0": " ", "\t": " "}
GARBLED = {c.encode().decode("cp1252", "ignore"): plain for c, plain in PLAIN.items() if c > "\u2000"}
LONGEST_FIRST = sorted(GARBLED, key=len, reverse=True)
FOLD = {"\u00e2\u20ac\x9d": '"'} | {wrong: GARBLED[wrong] for wrong in LONGEST_FIRST} | PLAIN
CONTROL = bytes(i for i in range(1, 32) if i != 10) + b"\x7f"       # but for a newline


def encoding_of(path):
    """The encoding that a file's byte-order mark names, else utf-8."""
    head = next(chunks(path, size=4), b"")
    return next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")


# ------------------------------------------------------------------------------------------------------------
# TinyStories

def stories(path):
    """The pieces of a file of stories: a 0 and a story, in ASCII, for each; at last a 0 alone.

    Stories are separated by <|endoftext|>, or by blank lines where the file does not begin with such stories.
    """
    n_stories, n_characters, dropped = 0, 0, Counter()
    for texts in split_stories(path):
        text = "\0".join(map(fold, texts))                      # story by story: most are plain ASCII
        plain = text.encode("ascii", "ignore").translate(None, CONTROL)
        n_characters += len(text)
        if len(plain) < len(text):
            dropped.update(re.sub(r"[\0\n -~]", "", text))
        whole = [story for story in map(bytes.strip, plain.split(b"\0")) if story]
        n_stories += len(whole)
        starts = np.cumsum([0] + [len(story) + 1 for story in whole])[:-1]
        yield b"".join(b"\0" + story for story in whole), starts
    yield b"\0", []
    n_dropped = sum(dropped.values())
    line = f"{path.name}: {n_stories:,} stories"
    if n_dropped:
        often = " ".join(repr(character)[1:-1] for character, _ in dropped.most_common(5))
        line += (f"; of {n_characters:,} characters {n_dropped:,} ({n_dropped / n_characters:.2%}) are not "
                 f"ASCII and are dropped, most often {often}")
    print(line)


def split_stories(path):
    """The texts between a file's separators, with plain newlines: lists, as they are read."""
    encoding = encoding_of(path)
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)("replace"), translate=True)
    rest, separator = "", None
    with bar(path.name, None if path.suffix == ".gz" else path.stat().st_size) as progress:
        for chunk in chunks(path):
            rest += decoder.decode(chunk)
            if "\0" in rest:
                raise DataError(f"{path} is not a text in {encoding}: it holds a character 0")
            if separator is None:
                separator = re.compile(r"<\|endoftext\|>" if "<|endoftext|>" in rest else r"\n[ \t]*\n")
            *whole, rest = separator.split(rest)
            if whole:
                yield whole
            if len(rest) > LONGEST_STORY:
                raise DataError(f"{path}: {len(rest):,} characters without an end of story")
            progress.update(len(chunk))
    yield [rest + decoder.decode(b"", final=True)]


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
    """Write the bins and starts of any text into `folder`: the first 90% train. Returns its path.

    Bytes stay as they are, except that a text with a byte-order mark becomes UTF-8 without one.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source} is not a file: --source of text is one text file, plain or .gz")
    train, val, n_foreign = folder / "train.bin", folder / "val.bin", 0
    total = None if path.suffix == ".gz" else path.stat().st_size
    with open(train, "wb") as out, bar(path.name, total) as progress:
        out.write(b"\n")                           # each split begins with a separator
        for chunk in text_bytes(path):
            if b"\0" in chunk:
                raise DataError(f"{source} is not text: it holds a byte 0")
            n_foreign += 0 if chunk.isascii() else int((np.frombuffer(chunk, np.uint8) > 127).sum())
            out.write(chunk)
            progress.update(len(chunk))
        size = out.tell()
    if size < 3:
        raise DataError(f"{source} is empty: there is nothing to learn from")
    with open(train, "rb") as file, open(val, "wb") as out:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            cut = text.rfind(b"\n", size // 2, size * 9 // 10) + 1 or size * 9 // 10    # after a line, if any
        out.write(b"\n")
        file.seek(cut)
        shutil.copyfileobj(file, out, CHUNK)
    os.truncate(train, cut)
    kind = ""
    for split in (train, val):
        starts, kind = documents(split, kind)
        np.save(split.with_name(f"{split.stem}_starts.npy"), starts)
        print(f"{path.name}, {split.stem}: {len(starts):,} {kind}")
    share = n_foreign / (size - 1)
    print(f"{path.name}: {n_foreign:,} of {size - 1:,} bytes ({share:.2%}) are not ASCII; they are kept")
    return path


def text_bytes(path):
    """The bytes of a text file in parts, in UTF-8 if it has a byte-order mark. DataError if that lies."""
    encoding = encoding_of(path)
    if encoding == "utf-8":
        yield from chunks(path)
        return
    print(f"{Path(path).name}: read as {encoding} by its byte-order mark, written as UTF-8")
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in chunks(path):
            yield decoder.decode(chunk).encode()
        yield decoder.decode(b"", final=True).encode()
    except UnicodeError as error:
        raise DataError(f"{path} begins like {encoding} and is not: {error}") from None


def documents(path, like=""):
    """Where the documents of a text begin, uint64, and what they are: paragraphs, lines, or even cuts.

    like: what they are in the training split; held-out ones are the same if there are at least two.
    """
    for kind, after_blank in ("paragraphs", True), ("lines (there are few blank ones)", False):
        starts = newlines(path, after_blank) if like in ("", kind) else ()
        if len(starts) >= (2 if like else FEW):
            return starts, kind
    size = path.stat().st_size
    return np.arange(0, size, max(1, size // FEW)).astype(np.uint64), "even cuts (there are few lines)"


def newlines(path, after_blank):
    """0, and every newline before a line with text, uint64; after_blank: only those after a blank line."""
    starts, before = array("Q", [0]), b"\x01\x01"                # in place of the two bytes before
    for i, chunk in enumerate(chunks(path, packed=False)):
        text = np.frombuffer(before + chunk, np.uint8)          # the last byte waits for the next chunk
        at = np.flatnonzero(text[2:-1] == 10) + 2
        following, last, last2 = text[at + 1], text[at - 1], text[at - 2]
        found = (following != 10) & (following != 13)
        if after_blank:
            found &= (last == 10) | ((last == 13) & (last2 == 10))      # the line that ends here is blank
        position = at[found] + i * CHUNK - len(before)
        starts.frombytes(position[position > 0].astype(np.uint64).tobytes())
        before = (before + chunk)[-3:]
    return np.frombuffer(starts, np.uint64)
