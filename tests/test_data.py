"""The prepared data sets, what load() refuses, and the training rows, against a reference written token by token."""
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import download
import tasks
from data import IGNORE, Data, Split
from runtime import DataError, UsageError, run_main

ROOT = Path(data.__file__).parent


def cli(*arguments):
    """Run data.py as a user does."""
    return subprocess.run([sys.executable, str(ROOT / "data.py"), *arguments], capture_output=True, text=True)


def write_idx(path, images, magic=0x803):
    """A file of MNIST's format; images (N, H, W) uint8."""
    content = np.array([magic, *images.shape], ">u4").tobytes() + images.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_stories(folder, train, val):
    folder.mkdir(exist_ok=True)
    for name, content in zip(download.FILES["tinystories"], (train, val)):
        (folder / name).write_bytes(content.encode())
    return str(folder)


def make(kind, documents, targets=None, name="made", first_token=0, closing=b""):
    """A Data set in memory from the documents (bytes); both of its splits are the same."""
    starts = np.cumsum([0] + [len(d) for d in documents[:-1]])
    stream = torch.tensor(list(b"".join(documents) + closing), dtype=torch.uint8)
    split = Split(stream, None if targets is None else torch.tensor(list(b"".join(targets)), dtype=torch.uint8),
                  torch.from_numpy(starts))
    return Data({"name": name, "kind": kind, "vocab_size": 200, "first_token": first_token,
                 "longest_document": max(map(len, documents))}, split, split)


STORIES = [b"\0ab", b"\0cdefg", b"\0h", b"\0ijklmnopqrst"]
TEXT = make("text", STORIES, closing=b"\0", name="fables")
PARAGRAPHS = make("text", [b"\none\n", b"\ntwo\nlines\n", b"\nx"], first_token=10, name="text")
TASK = make("synthetic", [b"abcd", b"efgh", b"ij"], [bytes([255, 1, 255, 2]), bytes([3, 255, 255, 4]), bytes([255, 5])])
PICTURES = make("image", [bytes(range(6)), bytes(range(10, 16)), bytes(range(20, 26))])
ALL = pytest.mark.parametrize("some", [TEXT, PARAGRAPHS, TASK, PICTURES], ids=["stories", "text", "synthetic", "image"])


def reference_row(some, begin, length, cut):
    """x and y of one row, token by token, as the design words it."""
    stream, starts, meta = some.train.tokens.tolist(), some.train.starts.tolist(), some.meta
    end = len(stream)
    if cut:
        last = end - 1 if meta["kind"] == "text" and meta["first_token"] == 0 else end
        end = next((s for s in starts if s > begin), last)
    x, y = [], []
    for i in range(begin, begin + length):
        x.append(stream[i] if i < end else meta["vocab_size"])
        if i >= end:
            y.append(IGNORE)
        elif meta["kind"] == "synthetic":
            y.append(IGNORE if some.train.targets[i] == 255 else int(some.train.targets[i]))
        elif meta["kind"] == "image":
            y.append(stream[i + 1] if i + 1 < end else IGNORE)
        else:
            y.append(stream[i + 1] if i + 1 < len(stream) else IGNORE)
    return x, y


@ALL
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("length", [1, 4, 30])
def test_rows_agree_with_a_reference_from_every_position(some, cut, length):
    positions = torch.arange(len(some.train.tokens))
    x, y = data.document_rows(some.train, some.meta, positions, length, cut)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (len(positions), length)
    for i in positions.tolist():
        assert (x[i].tolist(), y[i].tolist()) == reference_row(some, i, length, cut), i


def test_a_storys_last_target_is_the_separator_and_nothing_follows_it():
    x, y = data.document_rows(TEXT.train, TEXT.meta, torch.tensor([0, 11]), 4, cut=True)
    assert x.tolist() == [[0, 97, 98, 200], [0, *b"ijk"]] and y.tolist() == [[97, 98, 0, IGNORE], list(b"ijkl")]


@ALL
def test_later_documents_never_enter_a_cut_row(some):
    x, y = data.document_rows(some.train, some.meta, some.train.starts, 30, cut=True)
    ends = some.train.starts[1:].tolist() + [data.documents_end(len(some.train.tokens), some.meta)]
    for row, target, begin, end in zip(x, y, some.train.starts.tolist(), ends):
        assert (row[end - begin:] == some.pad).all() and (target[end - begin:] == IGNORE).all()
        assert (row[:end - begin] != some.pad).all()


def batch(some, step=3, seed=1, size=16, length=8, positions=3, p_start=0.5, **ranks):
    return data.sample_batch(some, seed, step, size, length, positions, p_start, **ranks)


def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a, b))


@ALL
def test_a_batch_is_a_function_of_seed_and_step_alone(some):
    first = batch(some)
    torch.manual_seed(5), np.random.seed(5)
    assert same(first, batch(some))
    assert not same(first, batch(some, step=4)) and not same(first, batch(some, seed=2))


@ALL
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_slices_of_the_ranks_make_up_the_batch_of_one_process(some, world_size):
    x, y, t = batch(some)
    parts = [batch(some, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert same((x, y), (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])))
    assert all(torch.equal(t, part[2]) for part in parts)


@ALL
def test_streams_that_do_not_fit_on_the_device_stay_and_rows_are_copied_there(some, monkeypatch):
    device, size = torch.device("meta"), sum(stream.nbytes for stream in (some.train.tokens, some.train.targets) if stream is not None)
    for free, place in ((4 * size, "meta"), (4 * size - 1, "cpu")):
        monkeypatch.setattr(data, "free_bytes", lambda device: free)
        moved = some.train.to(device)
        assert moved.tokens.device.type == place and (moved.targets is None or moved.targets.device.type == place)
        x, y = data.document_rows(moved, some.meta, some.train.starts, 5, cut=True)
        assert x.device == y.device == device and x.shape == y.shape == (len(some.train.starts), 5)
    x, y, _ = batch(some)
    assert x.device == y.device == torch.device("cpu")


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(UsageError, match="--batch_size=16 must be a multiple"):
        batch(TEXT, rank=0, world_size=3)


@ALL
def test_rows_begin_at_starts_when_they_should(some):
    at_starts = {tuple(reference_row(some, s, 8, some.rows_are_documents)[0]) for s in some.train.starts.tolist()}
    rows = [tuple(row.tolist()) for step in range(20) for row in batch(some, step, p_start=1.0)[0]]
    assert set(rows) == at_starts
    rows = [tuple(row.tolist()) for step in range(40) for row in batch(some, step, p_start=0.0)[0]]
    if some.rows_are_documents:
        assert set(rows) == at_starts
    else:  # every position that has a next token, and no other
        anywhere = {tuple(reference_row(some, i, 8, False)[0]) for i in range(len(some.train.tokens) - 1)}
        assert set(rows) == anywhere


def test_a_training_row_is_as_long_as_said_or_as_the_longest_document():
    assert [data.row_length(some, 0, 5) for some in (TEXT, PARAGRAPHS, TASK, PICTURES)] == [5, 5, 4, 6]
    assert [data.row_length(some, 4, 5) for some in (TEXT, PARAGRAPHS, TASK, PICTURES)] == [4] * 4 and data.row_length(TASK, 9, 5) == 9
    with pytest.raises(UsageError, match="--seq_len=3 would cut off what made asks: its documents have 4 tokens"):
        data.row_length(TASK, 3, 5)


def test_positions_are_distinct_in_random_order_and_cover_the_row():
    for positions in (3, 8):
        drawn = [batch(TEXT, step, positions=positions)[2] for step in range(80)]
        assert all(len(set(t.tolist())) == len(t) == positions and t.dtype == torch.int64 for t in drawn)
        for place in range(positions):                                           # each place of the order sees the whole row
            assert {int(t[place]) for t in drawn} == set(range(8))
    more = batch(TEXT, positions=20)[2]
    assert len(more) == 20 and more.dtype == torch.int64 and more.min() >= 0 and more.max() < 8


@ALL
def test_held_out_documents_are_fixed_distinct_and_from_their_start(some):
    n, cut = len(some.val.starts), some.meta["name"] != "text"
    x, y = data.held_out(some, n, 8, seed=0)
    assert same((x, y), data.held_out(some, n, 8, seed=0))
    for length in (2, 8, 1000):                                                   # longer rows would hold nothing but PAD
        whole = length if not cut else some.longest_document if some.kind == "synthetic" else min(length, some.longest_document)
        assert data.held_out(some, n, length, seed=0)[0].shape == (n, whole)
    expected = [reference_row(some, s, x.shape[1], cut) for s in some.val.starts.tolist()]
    assert sorted(zip(x.tolist(), y.tolist())) == sorted((a, b) for a, b in expected)
    more, _ = data.held_out(some, 2 * n + 1, 8, seed=0)
    assert len(more) == 2 * n + 1 and torch.equal(more[:n], more[n:2 * n])


# ---------------------------------------------------------------------------------------------------------------------
# Preparing

def test_generated_splits_are_reproducible_and_come_from_different_streams(tmp_path, capsys):
    for folder in "ab":
        data.prepare("retrieval", tmp_path / folder, seed=3, train_tokens=3200, val_tokens=3200)
    data.prepare("retrieval", tmp_path / "c", seed=4, train_tokens=3200, val_tokens=3200)
    assert "vocabulary" in capsys.readouterr().out
    files = {f: {p.name: p.read_bytes() for p in (tmp_path / f / "retrieval").iterdir()} for f in "abc"}
    assert files["a"] == files["b"] and files["a"]["train.bin"] != files["c"]["train.bin"]
    assert files["a"]["train.bin"] != files["a"]["val.bin"]


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_every_task_loads_with_its_own_targets(tmp_path, name):
    data.prepare(name, tmp_path, train_tokens=2000, val_tokens=200)
    some = data.load(name, tmp_path)
    assert some.kind == "synthetic" and some.meta["counts"]["train"]["tokens"] == len(some.train.tokens) >= 2000
    assert some.meta["first_token"] is None and set(some.meta["options"]) == set(tasks.OPTIONS[name])
    x, y, _ = batch(some, length=some.longest_document)
    assert (y != IGNORE).any(1).all() and x.max() <= some.pad and y.max() < some.vocab_size
    assert isinstance(data.decode(x[0], some.meta), str)


def test_task_options_reach_the_task(tmp_path):
    data.prepare("retrieval", tmp_path, train_tokens=2000, val_tokens=200, length="8-64", symbols=16, noise=None)
    some = data.load("retrieval", tmp_path)
    lengths = np.diff(some.train.starts)
    assert lengths.min() >= 8 and 32 < lengths.max() <= 64 and some.meta["options"]["symbols"] == 16


def test_fables_tell_the_loss_that_no_model_beats(tmp_path, capsys):
    data.prepare("fables", tmp_path, train_tokens=5000, val_tokens=500)
    some = data.load("fables", tmp_path)
    assert f"{some.meta['statistics']['entropy_per_character']:.4f} nats" in capsys.readouterr().out
    x, _ = data.held_out(some, 1, some.longest_document, 0)
    story = data.decode(x[0], some.meta)
    assert story[0] == "\0" and data.encode(story[1:], some.meta) == x[0][1:len(story)].tolist()
    for unknown in "é", "\0", "\udce9":  # the last: how Python passes on a byte that is not UTF-8
        with pytest.raises(UsageError, match="does not have the characters '"):
            data.encode(f"caf{unknown}", some.meta)


@pytest.mark.parametrize("separator", ["\n<|endoftext|>\n", "\r\n\r\n", "<|endoftext|>"])
def test_stories_are_separated_by_their_marker_or_by_blank_lines(tmp_path, separator):
    stories = ["One day.\nTom sat.", "“Hi”—said Äda…", "It’s she\u200b.", "  End. "]
    train, val = separator.join(stories) + separator, "A\r\nB" + separator + separator + "C"
    source = write_stories(tmp_path / "source", train, val)
    data.prepare("tinystories", tmp_path, source)
    some = data.load("tinystories", tmp_path)
    assert bytes(some.train.tokens.tolist()) == b"\0One day.\nTom sat.\0\"Hi\"-said da...\0It's she.\0End.\0"
    assert bytes(some.val.tokens.tolist()) == b"\0A\nB\0C\0"
    assert some.train.starts.tolist() == [0, 18, 34, 44] and some.longest_document == 18


def test_garbled_quotes_are_read_as_quotes_and_dropped_characters_are_counted(tmp_path, capsys):
    source = write_stories(tmp_path / "source", "â€œYesâ€\x9d, itâ€™s é\u00a0ñ.<|endoftext|>", "ok<|endoftext|>")
    data.prepare("tinystories", tmp_path, source)
    assert bytes(data.load("tinystories", tmp_path).train.tokens.tolist()) == b"\0\"Yes\", it's  .\0"
    assert "TinyStories-train.txt: 1 stories, 2 characters dropped" in capsys.readouterr().out


def test_blank_lines_within_a_story_do_not_end_it_where_there_are_markers(tmp_path):
    source = write_stories(tmp_path / "source", "A\n\nB<|endoftext|>C", "D")
    data.prepare("tinystories", tmp_path, source)
    assert bytes(data.load("tinystories", tmp_path).train.tokens.tolist()) == b"\0A\n\nB\0C\0"


def test_files_larger_than_a_chunk_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CHUNK", 1000)
    rng = np.random.default_rng(0)
    sizes = [9, *rng.integers(1, 2500, size=40)]
    stories = ["".join(rng.choice(list("abc \n…"), size=n)).strip() or "x" for n in sizes]
    source = write_stories(tmp_path / "source", "<|endoftext|>".join(stories), "val")
    data.prepare("tinystories", tmp_path, source)
    tokens = bytes(data.load("tinystories", tmp_path).train.tokens.tolist())
    assert tokens == b"\0" + b"\0".join(s.replace("…", "...").strip().encode() for s in stories) + b"\0"


def test_a_file_in_which_no_story_ends_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LONGEST_STORY", 1000)
    with pytest.raises(DataError, match="without an end of story"):
        data.prepare("tinystories", tmp_path, write_stories(tmp_path / "source", "abc " * 1000, "val"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_text_keeps_every_byte_and_begins_documents_at_paragraphs(tmp_path, monkeypatch, capsys, packed, chunk):
    monkeypatch.setattr(download, "CHUNK", chunk)
    text = "\n\n".join(f"Paragraph {i}, naïve café.\nIts second line." + "\n" * (i % 3) for i in range(40)).encode()
    path = tmp_path / ("book.txt.gz" if packed else "book.txt")
    path.write_bytes(gzip.compress(text) if packed else text)
    data.prepare("text", tmp_path, str(path))
    some = data.load("text", tmp_path)
    train, val = (bytes(split.tokens.tolist()) for split in (some.train, some.val))
    assert train[:1] == val[:1] == b"\n" and train[1:] + val[1:] == text
    assert train.endswith(b"\n") and 0.8 < len(train) / len(text) <= 0.91
    for tokens, split in (train, some.train), (val, some.val):
        expected = [i for i in range(2, len(tokens) - 1)
                    if tokens[i - 1:i + 1] == b"\n\n" and tokens[i + 1:i + 2] != b"\n"]
        assert split.starts.tolist() == [0] + expected
    assert f"160 of {len(text):,} bytes are not ASCII" in capsys.readouterr().out
    assert data.decode(data.encode("naïve", some.meta), some.meta) == "naïve" and some.meta["first_token"] == 10
    assert set(some.meta["alphabet"]) == set(text)


def test_text_with_windows_lines_has_paragraphs_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\nmore\r\n\r\ntwo\r\n\r\n\r\nthree, which is in the validation text")
    data.prepare("text", tmp_path, tmp_path / "a.txt")
    some = data.load("text", tmp_path)
    assert bytes(some.train.tokens[some.train.starts[1]:][:4].tolist()) == b"\ntwo"
    assert len(some.train.starts) == 3


def test_text_without_line_ends_is_cut_anyway(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    data.prepare("text", tmp_path, tmp_path / "a.txt")
    some = data.load("text", tmp_path)
    assert len(some.train.tokens) == 900 and len(some.val.tokens) == 102


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_files_become_pixels_in_raster_order(tmp_path, suffix):
    rng = np.random.default_rng(0)
    train, val = (rng.integers(256, size=(n, 28, 28), dtype=np.uint8) for n in (2011, 3))
    train[:1500, 0, 0] = 7
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", train)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", val)
    data.prepare("mnist", tmp_path, tmp_path)
    some = data.load("mnist", tmp_path)
    assert np.array_equal(some.train.tokens.reshape(-1, 28, 28), train)
    assert some.train.starts.tolist() == list(range(0, 2011 * 784, 784)) and len(some.val.starts) == 3
    assert some.meta["first_token"] == 7 and some.longest_document == 784
    picture = data.tokens_to_image(some.val.tokens[:784], some.meta)
    assert np.array_equal(picture, val[0]) and np.array_equal(data.image_to_tokens(picture, some.meta), val[0].ravel())


def save_pictures(folder, sizes):
    """Pictures of these sizes (width, height): white, with a black dot in the middle; returns Pillow."""
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True)
    for i, (width, height) in enumerate(sizes):
        picture = np.full((height, width), 255, np.uint8)
        picture[height * 2 // 5:height * 3 // 5 + 1, width * 2 // 5:width * 3 // 5 + 1] = 0
        image.fromarray(picture).save(folder / f"{i:02}.{('png', 'jpg', 'bmp', 'gif')[i % 4]}")
    return image


def test_sketches_of_any_size_become_square_pictures_with_white_around_them(tmp_path):
    image = save_pictures(tmp_path / "sketches" / "cats", [(64, 64), (101, 33), (7, 200), (640, 481), (129, 129)] * 4)
    clear = image.new("RGBA", (90, 50), (0, 0, 0, 0))  # transparent black: a white page
    clear.save(tmp_path / "sketches" / "clear.png")
    data.prepare("sketchy", tmp_path, tmp_path / "sketches")
    some = data.load("sketchy", tmp_path)
    counts = some.meta["counts"]
    assert (counts["train"]["documents"], counts["val"]["documents"]) == (19, 2)
    assert some.vocab_size == 16 and some.longest_document == 1024 and some.meta["first_token"] == 15
    for split in (some.train, some.val):
        for tokens in split.tokens.reshape(-1, 1024):
            picture = data.tokens_to_image(tokens, some.meta)
            assert picture.shape == (64, 64) and set(np.unique(picture)) <= {0, 255}
            assert (picture[[0, -1]] == 255).all() and (picture[:, [0, -1]] == 255).all()
            assert (picture[28:36, 28:36] == 0).any() or (picture == 255).all()


def test_patches_and_pictures_are_exact_inverses():
    meta = {"image": {"height": 64, "width": 64, "patch": 2}}
    rng = np.random.default_rng(0)
    tokens = rng.integers(16, size=1024).astype(np.uint8)
    assert np.array_equal(data.image_to_tokens(data.tokens_to_image(tokens, meta), meta), tokens)
    picture = rng.choice(np.array([0, 255], np.uint8), size=(64, 64))
    assert np.array_equal(data.tokens_to_image(data.image_to_tokens(picture, meta), meta), picture)
    tokens[33] = 0  # row 1, column 1 of the patches
    assert not data.tokens_to_image(tokens, meta)[2:4, 2:4].any()


def test_the_split_of_sketches_is_by_picture_seeded_and_never_empty(tmp_path):
    save_pictures(tmp_path / "few", [(64, 64), (30, 64)])
    data.prepare("sketchy", tmp_path, tmp_path / "few")
    assert [c["documents"] for c in data.load("sketchy", tmp_path).meta["counts"].values()] == [1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

def bad_stories(folder):
    write_stories(folder, "story", " \n ")


def no_validation(folder):
    write_stories(folder, "a", "b")
    (folder / "TinyStories-valid.txt").unlink()


def labels(folder):
    folder.mkdir()
    for name in download.FILES["mnist"]:
        write_idx(folder / name, np.zeros(10, np.uint8), magic=0x801)


def cut_gzip(folder):
    folder.mkdir()
    for name in download.FILES["mnist"]:
        write_idx(folder / name, np.random.default_rng(0).integers(256, size=(9, 28, 28), dtype=np.uint8))
        (folder / name).write_bytes((folder / name).read_bytes()[:-500])


def cut_idx(folder):
    folder.mkdir()
    for name in download.FILES["mnist"]:
        path = folder / name.removesuffix(".gz")
        write_idx(path, np.zeros((9, 28, 28), np.uint8))
        path.write_bytes(path.read_bytes()[:-5])


def other_size(folder):
    folder.mkdir()
    for name in download.FILES["mnist"]:
        write_idx(folder / name, np.zeros((9, 27, 28), np.uint8))


def broken_picture(folder):
    save_pictures(folder, [(20, 20)] * 9)
    (folder / "bad.png").write_bytes((folder / "00.png").read_bytes()[:60])


def binary(folder):
    folder.write_bytes(b"text\0more")


@pytest.mark.parametrize("name, create, message", [
    ("tinystories", bad_stories, "there is nothing in the val split of tinystories"),
    ("tinystories", no_validation, "has no TinyStories-valid.txt"),
    ("tinystories", binary, "is not a folder"),
    ("mnist", labels, "holds labels: the images are in train-images-idx3-ubyte.gz"),
    ("mnist", cut_gzip, "is not an intact gzip file"),
    ("mnist", cut_idx, "does not hold the 9 images"),
    ("mnist", other_size, "is not an idx file of 28 x 28 images"),
    ("mnist", Path.mkdir, "has no train-images-idx3-ubyte"),
    ("sketchy", broken_picture, "bad.png cannot be read as a picture"),
    ("sketchy", Path.mkdir, "holds 0 pictures"),
    ("text", binary, "is not text: it holds a byte 0"),
    ("text", Path.touch, "is empty"),
    ("text", Path.mkdir, "is not a file"),
    ("text", lambda path: None, "is not a file"),
])
def test_bad_sources_are_named_in_one_line_and_leave_nothing(tmp_path, name, create, message):
    create(tmp_path / "source")
    with pytest.raises(DataError, match=message) as error:
        data.prepare(name, tmp_path / "data", str(tmp_path / "source"))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "data").glob("*"))


@pytest.mark.parametrize("arguments, status, message", [
    (["--dataset=tinystory"], 2, "no data set 'tinystory'; the nearest is tinystories"),
    (["--dataset=copy", "--depth=3"], 2, "copy has no option --depth; it has --length, --symbols"),
    (["--dataset=fables", "--symbols=3"], 2, "fables has no option --symbols; it has no options of its own"),
    (["--dataset=copy", "--length=long"], 2, "--length is one number or two, like 32 or 8-64, not 'long'"),
    (["--dataset=copy", "--symbols=1"], 2, "symbols"),
    (["--dataset=copy", "--source=x"], 2, "copy is generated: it takes no --source"),
    (["--dataset=mnist", "--val_tokens=9"], 2, "mnist is not generated"),
    (["--dataset=fables", "--train_tokens=0"], 2, "must be at least 2"),
    (["--dataset=sketchy"], 2, "sketchy needs the folder of pictures: python data.py --dataset=sketchy --source=PATH"),
    (["--dataset=text"], 2, "text needs the text file: python data.py --dataset=text --source=PATH"),
    (["--dataset=text", "--source=missing.txt"], 1, "missing.txt is not a file"),
    (["--data_dri=x"], 2, "--data_dir"),
])
def test_the_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.setattr(sys, "argv", ["data.py", *arguments, f"--data_dir={tmp_path / 'data'}"])
    with pytest.raises(SystemExit) as stop:
        run_main(data.main)
    stderr = capsys.readouterr().err
    assert stop.value.code == status and len(stderr.splitlines()) == 1, stderr
    assert message in stderr and not list(tmp_path.glob("data/*"))


def test_a_user_meets_one_line_and_a_status_but_no_traceback(tmp_path):
    missing = cli("--dataset=text", f"--source={tmp_path / 'missing.txt'}", f"--data_dir={tmp_path / 'data'}")
    assert missing.returncode == 1 and missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1
    made = cli("--dataset=copy", "--length=3-5", "--train_tokens=1000", "--val_tokens=100", f"--data_dir={tmp_path}")
    assert made.returncode == 0 and not made.stderr, made.stderr
    counts = data.load("copy", tmp_path).meta["counts"]["train"]
    assert f"{counts['tokens']:,}" in made.stdout and f"{counts['documents']:,}" in made.stdout


def test_a_failure_leaves_the_data_set_that_was_there(tmp_path, monkeypatch):
    data.prepare("copy", tmp_path, train_tokens=500, val_tokens=100)
    before = (tmp_path / "copy" / "train.bin").read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.prepare("copy", tmp_path, train_tokens=900, val_tokens=100)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    assert (tmp_path / "copy" / "train.bin").read_bytes() == before and data.load("copy", tmp_path)
    monkeypatch.undo()
    data.prepare("copy", tmp_path, train_tokens=900, val_tokens=100)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"] and len(data.load("copy", tmp_path).train.tokens) >= 900


def test_a_folder_that_is_no_data_set_is_never_replaced(tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="is not a data set: move it away"):
        data.prepare("copy", tmp_path, train_tokens=500, val_tokens=100)
    assert (tmp_path / "copy" / "thesis.txt").read_text() == "precious"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot make .*file"):
        data.prepare("copy", tmp_path / "file", train_tokens=500, val_tokens=100)


def edit_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def overwrite(folder, name, position, value):
    content = bytearray((folder / name).read_bytes())
    content[position] = value
    (folder / name).write_bytes(content)


def shift_starts(folder, by):
    np.save(folder / "val_starts.npy", np.load(folder / "val_starts.npy") + np.uint64(by))


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "meta.json").unlink(), "there is no data set"),
    (lambda f: (f / "meta.json").write_text("{"), "meta.json is damaged"),
    (lambda f: (f / "meta.json").write_text("[]"), "meta.json is damaged"),
    (lambda f: edit_meta(f, lambda m: m.pop("counts")), "meta.json is damaged .*counts"),
    (lambda f: edit_meta(f, lambda m: m.update(kind="poem")), "meta.json is damaged .*poem"),
    (lambda f: edit_meta(f, lambda m: m.update(vocab_size=1000)), "vocabulary of 1000"),
    (lambda f: os.truncate(f / "train.bin", 400), "train.bin has 400 tokens, meta.json says"),
    (lambda f: os.truncate(f / "val_targets.bin", 9), "val_targets.bin has 9 tokens"),
    (lambda f: (f / "val.bin").unlink(), "val.bin"),
    (lambda f: (f / "val_starts.npy").write_bytes(b"nonsense"), "copy: "),
    (lambda f: (f / "val_starts.npy").write_bytes(b""), "copy: "),
    (lambda f: np.save(f / "val_starts.npy", np.zeros(0, np.uint64)), "val_starts.npy has 0 documents"),
    (lambda f: np.save(f / "val_starts.npy", np.array([{}])), "copy: "),
    (lambda f: shift_starts(f, 1), "val_starts.npy does not hold rising positions"),
    (lambda f: overwrite(f, "train.bin", 77, 250), "train holds the token 250, outside the vocabulary"),
    (lambda f: overwrite(f, "train_targets.bin", 77, 250), "train holds the token 250, outside the vocabulary"),
])
def test_a_damaged_data_set_is_refused_and_the_remedy_is_named(tmp_path, damage, message):
    data.prepare("copy", tmp_path, train_tokens=500, val_tokens=100)
    damage(tmp_path / "copy")
    with pytest.raises(DataError, match=message) as error:
        data.load("copy", tmp_path)
    assert f"python data.py --dataset=copy --data_dir={tmp_path}" in str(error.value) and "\n" not in str(error.value)


def test_the_cross_entropy_of_bf16_logits_is_taken_in_float32():
    logits, y = torch.randn(50, 7).bfloat16(), torch.randint(7, (50,))
    found = data.cross_entropy(logits, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, data.cross_entropy(logits.double(), y).float(), rtol=1e-6, atol=0)
