"""Preparing data sets: what becomes of files, generators and folders, and what is refused."""
import codecs
import gzip
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import call, refused

import data
from lib.cli import DataError, UsageError
from model import IGNORE
from sources import download, files, pictures, tasks, texts
from sources import prepare as preparing
from sources.prepare import ensure, prepare


def write_idx(path, images, magic=0x803):
    """A file of MNIST's format; images (N, H, W) uint8."""
    content = np.array([magic, *images.shape], ">u4").tobytes() + images.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_stories(folder, train, val):
    folder.mkdir(exist_ok=True)
    for name, content in zip(download.FILES["tinystories"], (train, val)):
        (folder / name).write_bytes(content.encode())
    return str(folder)


def story_tokens(tmp_path, train, val="val", split="train"):
    """The bytes that become of files of stories."""
    prepare("tinystories", tmp_path, write_stories(tmp_path / "source", train, val))
    return bytes(getattr(data.load("tinystories", tmp_path), split).tokens.tolist())


def visible(folder):
    return sorted(path.name for path in folder.glob("[!.]*"))


# ----------------------------------------------------------------------------------------------------------
# Generated data

def test_generated_splits_are_reproducible_and_come_from_different_streams(tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        prepare("retrieval", tmp_path / folder, seed=seed, train_tokens=3200, val_tokens=3200)
    a, b, c = ({path.name: path.read_bytes() for path in (tmp_path / folder / "retrieval").iterdir()}
               for folder in "abc")
    assert a == b and a["train.bin"] not in (a["val.bin"], c["train.bin"])


def test_data_sets_have_one_fingerprint_if_their_bins_are_the_same(tmp_path):
    def fingerprint(folder, **options):
        prepare("copy", tmp_path / folder, train_tokens=500, val_tokens=100, **options)
        return data.load("copy", tmp_path / folder).meta["fingerprint"]

    assert fingerprint("a") == fingerprint("b") != fingerprint("c", seed=1)
    assert fingerprint("d", length="5") != fingerprint("e", length="6") == fingerprint("a")     # the default


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_every_task_loads_with_its_own_targets(tmp_path, name):
    prepare(name, tmp_path, train_tokens=2000, val_tokens=200)
    some = data.load(name, tmp_path)
    assert some.meta["counts"]["train"]["tokens"] == len(some.train.tokens) >= 2000
    assert some.meta["first_token"] is None and set(some.meta["options"]) == set(tasks.OPTIONS[name])
    x, y, _ = data.sample_batch(some, 1, 3, 16, some.meta["longest_document"], 3, 0.5)
    assert (y != IGNORE).any(1).all() and x.max() <= some.pad and y.max() < some.vocab_size
    assert isinstance(data.decode(x[0], some.meta), str)


def test_task_options_reach_the_task(tmp_path):
    prepare("retrieval", tmp_path, train_tokens=2000, val_tokens=200, length="8-64", symbols=16, noise=None)
    some = data.load("retrieval", tmp_path)
    lengths = np.diff(some.train.starts)
    assert lengths.min() >= 8 and 32 < lengths.max() <= 64 and some.meta["options"]["symbols"] == 16


def test_fables_come_with_the_loss_that_no_model_beats(tmp_path, capsys):
    prepare("fables", tmp_path, train_tokens=5000, val_tokens=500)
    some = data.load("fables", tmp_path)
    assert f"{some.meta['statistics']['entropy_per_character']:.4f} nats" in capsys.readouterr().out
    x, _ = data.held_out(some, 1, some.meta["longest_document"], 0)
    story = data.decode(x[0], some.meta)
    assert story[0] == "\0" and data.encode(story[1:], some.meta) == x[0][1:len(story)].tolist()
    for unknown in "é", "\0", "\udce9":  # the last: how Python passes on a byte that is not UTF-8
        with pytest.raises(UsageError):
            data.encode(f"caf{unknown}", some.meta)


# ----------------------------------------------------------------------------------------------------------
# Stories and text

@pytest.mark.parametrize("separator", ["\n<|endoftext|>\n", "\r\n\r\n", "<|endoftext|>"])
def test_stories_are_separated_by_their_marker_or_by_blank_lines(tmp_path, separator):
    stories = ["One day.\nTom sat.", "“Hi”—said Äda…", "It’s she\u200b.", "  End. "]
    train, val = separator.join(stories) + separator, "A\r\nB" + separator + separator + "C"
    assert story_tokens(tmp_path, train, val) == b"\0One day.\nTom sat.\0\"Hi\"-said da...\0It's she.\0End.\0"
    some = data.load("tinystories", tmp_path)
    assert bytes(some.val.tokens.tolist()) == b"\0A\nB\0C\0"
    assert some.train.starts.tolist() == [0, 18, 34, 44] and some.meta["longest_document"] == 18


def test_garbled_quotes_are_read_as_quotes_and_dropped_characters_are_counted(tmp_path, capsys):
    train = "â€œYesâ€\x9d, itâ€™s é\u00a0ñ.<|endoftext|>"
    assert story_tokens(tmp_path, train, "ok<|endoftext|>") == b"\0\"Yes\", it's  .\0"
    assert "characters 2 (" in capsys.readouterr().out


def test_blank_lines_within_a_story_do_not_end_it_where_there_are_markers(tmp_path):
    assert story_tokens(tmp_path, "A\n\nB<|endoftext|>C", "D") == b"\0A\n\nB\0C\0"


def test_files_larger_than_a_chunk_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files.chunks, "__defaults__", (None, 1000))
    rng = np.random.default_rng(0)
    sizes = [9, *rng.integers(1, 2500, size=40)]
    stories = ["".join(rng.choice(list("abc \n…"), size=n)).strip() or "x" for n in sizes]
    tokens = story_tokens(tmp_path, "<|endoftext|>".join(stories))
    assert tokens == b"\0" + b"\0".join(s.replace("…", "...").strip().encode() for s in stories) + b"\0"


def test_a_file_in_which_no_story_ends_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "LONGEST_STORY", 1000)
    with pytest.raises(DataError, match="TinyStories-train.txt"):
        story_tokens(tmp_path, "abc " * 1000)


def text_of(tmp_path, content, name="a.txt"):
    """The Data that becomes of a text file; its two streams, without the newline that each begins with."""
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    prepare("text", tmp_path, str(tmp_path / name))
    some = data.load("text", tmp_path)
    train, val = (bytes(split.tokens.tolist()) for split in (some.train, some.val))
    assert train[:1] == val[:1] == b"\n"
    return some, train, val


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_text_keeps_every_byte_and_begins_documents_at_paragraphs(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(texts, "CHUNK", chunk)
    monkeypatch.setattr(files.chunks, "__defaults__", (None, chunk))
    monkeypatch.setattr(texts, "FEW", 3)
    paragraphs = [f"Paragraph {i}, naïve café.\nIts second line." + "\n" * (i % 3) for i in range(80)]
    text = "\n\n".join(paragraphs).encode()
    some, train, val = text_of(tmp_path, text, name)
    assert train[1:] + val[1:] == text and train.endswith(b"\n") and 0.8 < len(train) / len(text) <= 0.91
    for tokens, split in (train, some.train), (val, some.val):
        starts = [i for i in range(2, len(tokens) - 1)
                  if tokens[i - 1:i + 1] == b"\n\n" and tokens[i + 1:i + 2] != b"\n"]
        assert split.starts.tolist() == [0, *starts] and len(starts) > 3
    assert data.decode(data.encode("naïve", some.meta), some.meta) == "naïve"
    assert some.meta["first_token"] == 10 and set(some.meta["alphabet"]) == set(text)


def test_text_with_windows_lines_has_paragraphs_too(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "FEW", 2)
    some, train, _ = text_of(tmp_path, b"one\r\nmore\r\n\r\ntwo\r\n\r\n\r\nthree, which is held out")
    assert train[some.train.starts[1]:][:4] == b"\ntwo" and len(some.train.starts) == 3


def test_held_out_documents_of_a_text_are_of_the_kind_that_is_trained_on(tmp_path):
    some, train, val = text_of(tmp_path, b"".join(b"Paragraph %d\nand a line.\n\n" % i for i in range(300)))
    assert 1 < len(some.val.starts) < texts.FEW <= len(some.train.starts)
    for tokens, split in (train, some.train), (val, some.val):
        assert {tokens[i:i + 4] for i in split.starts.tolist()} == {b"\nPar"}


def test_text_without_paragraphs_begins_documents_at_lines_and_one_without_lines_at_even_cuts(tmp_path):
    some, train, _ = text_of(tmp_path, b"a line of text\n" * 1000)
    assert [train[i:i + 2] for i in some.train.starts] == [b"\na"] * len(some.train.starts)
    assert len(some.train.starts) == train.count(b"\na")
    some, train, val = text_of(tmp_path, b"x" * 1000)
    assert len(train) == 900 and len(val) == 102 and set(np.diff(some.train.starts)) == {900 // texts.FEW}


@pytest.mark.parametrize("mark, encoding", [
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be")])
def test_a_text_with_a_byte_order_mark_becomes_utf_8_without_it(tmp_path, monkeypatch, mark, encoding):
    monkeypatch.setattr(files.chunks, "__defaults__", (None, 7))            # which cuts characters
    text = "naïve ☃ 😀 café\n" * 20
    _, train, val = text_of(tmp_path, mark + text.encode(encoding))
    assert (train[1:] + val[1:]).decode() == text
    with pytest.raises(DataError, match="a.txt"):
        text_of(tmp_path, codecs.BOM_UTF16_LE + b"\x00\xd8a")


# ----------------------------------------------------------------------------------------------------------
# Pictures

@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_files_become_pixels_in_raster_order(tmp_path, suffix):
    rng = np.random.default_rng(0)
    train, val = (rng.integers(256, size=(n, 28, 28), dtype=np.uint8) for n in (2011, 3))
    train[:1500, 0, 0] = 7
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", train)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", val)
    prepare("mnist", tmp_path, tmp_path)
    some = data.load("mnist", tmp_path)
    assert np.array_equal(some.train.tokens.reshape(-1, 28, 28), train)
    assert some.train.starts.tolist() == list(range(0, 2011 * 784, 784)) and len(some.val.starts) == 3
    assert some.meta["first_token"] == 7 and some.meta["longest_document"] == 784
    picture = pictures.tokens_to_image(some.val.tokens[:784], some.meta)
    assert np.array_equal(picture, val[0])
    assert np.array_equal(pictures.image_to_tokens(picture, some.meta), val[0].ravel())


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
    sizes = [(64, 64), (101, 33), (7, 200), (640, 481), (129, 129)]
    image = save_pictures(tmp_path / "sketches" / "cats", sizes * 4)
    clear = image.new("RGBA", (90, 50), (0, 0, 0, 0))           # transparent black: a white page
    clear.save(tmp_path / "sketches" / "clear.png")
    prepare("sketchy", tmp_path, tmp_path / "sketches")
    some = data.load("sketchy", tmp_path)
    assert [some.meta["counts"][split]["documents"] for split in ("train", "val")] == [19, 2]
    assert (some.vocab_size, some.meta["longest_document"], some.meta["first_token"]) == (16, 1024, 15)
    for split in (some.train, some.val):
        for tokens in split.tokens.reshape(-1, 1024):
            picture = pictures.tokens_to_image(tokens, some.meta)
            assert picture.shape == (64, 64) and set(np.unique(picture)) <= {0, 255}
            assert (picture[[0, -1]] == 255).all() and (picture[:, [0, -1]] == 255).all()
            assert (picture[28:36, 28:36] == 0).any() or (picture == 255).all()


def test_patches_and_pictures_are_exact_inverses():
    meta = {"image": {"height": 64, "width": 64, "patch": 2}}
    rng = np.random.default_rng(0)
    tokens = rng.integers(16, size=1024).astype(np.uint8)
    assert np.array_equal(pictures.image_to_tokens(pictures.tokens_to_image(tokens, meta), meta), tokens)
    picture = rng.choice(np.array([0, 255], np.uint8), size=(64, 64))
    assert np.array_equal(pictures.tokens_to_image(pictures.image_to_tokens(picture, meta), meta), picture)
    tokens[33] = 0                                              # row 1, column 1 of the patches
    assert not pictures.tokens_to_image(tokens, meta)[2:4, 2:4].any()


def test_the_split_of_sketches_is_by_picture_and_never_empty(tmp_path):
    save_pictures(tmp_path / "few", [(64, 64), (30, 64)])
    prepare("sketchy", tmp_path, tmp_path / "few")
    assert [c["documents"] for c in data.load("sketchy", tmp_path).meta["counts"].values()] == [1, 1]


def test_a_picture_that_cannot_be_read_is_left_out_and_named(tmp_path, capsys):
    save_pictures(tmp_path / "some", [(20, 20)] * 12)
    (tmp_path / "some" / "bad.png").write_bytes((tmp_path / "some" / "00.png").read_bytes()[:60])
    prepare("sketchy", tmp_path, tmp_path / "some")
    counts = data.load("sketchy", tmp_path).meta["counts"]
    assert counts["train"]["documents"] + counts["val"]["documents"] == 12
    assert "bad.png" in capsys.readouterr().out


@pytest.mark.parametrize("limit", ["MOST_SIDE", "MOST_PIXELS"])
def test_a_picture_too_large_to_decode_is_refused(tmp_path, monkeypatch, limit):
    save_pictures(tmp_path / "some", [(40, 40)])
    pictures.open_picture(tmp_path / "some" / "00.png")
    monkeypatch.setattr(pictures, limit, 39)
    with pytest.raises(DataError, match="00.png"):
        pictures.open_picture(tmp_path / "some" / "00.png")


# ----------------------------------------------------------------------------------------------------------
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


def broken_pictures(folder):
    save_pictures(folder, [(20, 20)] * 4)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:30])


def binary(path):
    path.write_bytes(b"text\0more")


@pytest.mark.parametrize("name, create, file", [
    ("tinystories", bad_stories, "tinystories"), ("tinystories", no_validation, "TinyStories-valid.txt"),
    ("tinystories", binary, "source"), ("mnist", labels, "train-images-idx3-ubyte.gz"),
    ("mnist", cut_gzip, "train-images-idx3-ubyte.gz"), ("mnist", cut_idx, "train-images-idx3-ubyte"),
    ("mnist", other_size, "train-images-idx3-ubyte.gz"), ("mnist", Path.mkdir, "train-images-idx3-ubyte"),
    ("sketchy", broken_pictures, "sketchy"), ("sketchy", Path.mkdir, "source"), ("text", binary, "source"),
    ("text", Path.touch, "source"), ("text", Path.mkdir, "source"), ("text", lambda path: None, "source")])
def test_bad_sources_are_named_in_one_line_and_leave_nothing(tmp_path, name, create, file):
    create(tmp_path / "source")
    with pytest.raises(DataError, match=file) as error:
        prepare(name, tmp_path / "data", str(tmp_path / "source"))
    assert "\n" not in str(error.value)
    assert not visible(tmp_path / "data") and not list((tmp_path / "data").glob(".*.new"))


@pytest.mark.parametrize("arguments, status, flag", [
    ("--dataset=tinystory", 2, "tinystory"), ("--dataset=copy --depth=3", 2, "--depth"),
    ("--dataset=fables --symbols=3", 2, "--symbols"), ("--dataset=copy --length=long", 2, "--length"),
    ("--dataset=copy --symbols=1", 2, "symbols"), ("--dataset=copy --source=x", 2, "--source"),
    ("--dataset=mnist --val_tokens=9", 2, "--val_tokens"), ("--train_tokens=0", 2, "--train_tokens"),
    ("--dataset=sketchy", 2, "--source"), ("--dataset=text", 2, "--source"),
    ("--dataset=text --source=missing.txt", 1, "missing.txt")])
def test_the_command_line_refuses_in_one_line(tmp_path, arguments, status, flag):
    refused(call(data, *arguments.split(), f"--data_dir={tmp_path / 'data'}"), status, flag)
    assert not visible(tmp_path / "data")


def test_the_command_line_prints_the_counts(tmp_path):
    made = call(data, "--dataset=copy", "--length=3-5", "--train_tokens=1000", "--val_tokens=100",
                f"--data_dir={tmp_path}")
    counts = data.load("copy", tmp_path).meta["counts"]["train"]
    assert made.status == 0 and not made.err
    assert f"{counts['tokens']:,}" in made.out and f"{counts['documents']:,}" in made.out


def test_a_failure_leaves_the_data_set_that_was_there(tmp_path, monkeypatch):
    prepare("copy", tmp_path, train_tokens=500, val_tokens=100)
    before = (tmp_path / "copy" / "train.bin").read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare("copy", tmp_path, train_tokens=900, val_tokens=100)
    assert {path.name for path in tmp_path.iterdir()} <= {"copy", ".copy.lock"}
    assert (tmp_path / "copy" / "train.bin").read_bytes() == before and data.load("copy", tmp_path)
    prepare("copy", tmp_path, train_tokens=900, val_tokens=100)
    assert len(data.load("copy", tmp_path).train.tokens) >= 900 and visible(tmp_path) == ["copy"]


def test_what_a_killed_process_had_moved_away_is_put_back(tmp_path):
    prepare("copy", tmp_path, train_tokens=500, val_tokens=100)
    before = (tmp_path / "copy" / "train.bin").read_bytes()
    (tmp_path / "copy").rename(tmp_path / ".copy.old")
    (tmp_path / ".copy.new").mkdir()
    ensure("copy", tmp_path)
    assert (tmp_path / "copy" / "train.bin").read_bytes() == before
    assert not (tmp_path / ".copy.old").exists()


def test_a_killed_process_that_was_deleting_the_old_data_set_does_not_block_the_next_one(tmp_path):
    for tokens in (500, 900):
        prepare("copy", tmp_path, train_tokens=tokens, val_tokens=100)
        (tmp_path / ".copy.old").mkdir(exist_ok=True)
        (tmp_path / ".copy.old" / "train.bin").write_bytes(b"half")
    prepare("copy", tmp_path, train_tokens=500, val_tokens=100)
    assert {path.name for path in tmp_path.iterdir()} == {"copy", ".copy.lock"}


def test_two_that_miss_a_data_set_at_once_prepare_it_once(tmp_path, monkeypatch):
    write, made = preparing.write_generated, []

    def slowly(*some):
        made.append(some)
        time.sleep(0.3)
        return write(*some)
    monkeypatch.setattr(preparing, "write_generated", slowly)
    small = dict(train_tokens=500, val_tokens=100, anew=False)
    threads = [threading.Thread(target=prepare, args=("copy", tmp_path), kwargs=small) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and data.load("copy", tmp_path)


def test_ensure_prepares_a_data_set_once(tmp_path, monkeypatch):
    write, made = preparing.write_generated, []
    monkeypatch.setattr(preparing, "write_generated", lambda *some: made.append(some) or write(*some))
    small = dict(train_tokens=500, val_tokens=100)
    prepare("copy", tmp_path, **small)
    ensure("copy", tmp_path)
    prepare("copy", tmp_path, anew=False, **small)
    assert len(made) == 1


def test_a_folder_that_is_no_data_set_is_never_replaced(tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="copy"):
        prepare("copy", tmp_path, train_tokens=500, val_tokens=100)
    assert (tmp_path / "copy" / "thesis.txt").read_text() == "precious"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        prepare("copy", tmp_path / "file", train_tokens=500, val_tokens=100)
