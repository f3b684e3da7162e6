"""Training rows against a reference written token by token, and what load() refuses."""
import json
import os

import numpy as np
import pytest
import torch

import data
from data import Data, Split
from lib.cli import DataError
from model import IGNORE
from sources.bins import documents_end
from sources.prepare import prepare


def make(kind, documents, targets=None, name="made", first_token=0, closing=b""):
    """A Data set in memory from the documents (bytes); both of its splits are the same."""
    starts = torch.tensor([0] + [len(d) for d in documents[:-1]]).cumsum(0)
    stream = torch.tensor(list(b"".join(documents) + closing), dtype=torch.uint8)
    targets = None if targets is None else torch.tensor(list(b"".join(targets)), dtype=torch.uint8)
    split = Split(stream, targets, starts)
    return Data({"name": name, "kind": kind, "vocab_size": 200, "first_token": first_token,
                 "longest_document": max(map(len, documents))}, split, split)


STORIES = [b"\0ab", b"\0cdefg", b"\0h", b"\0ijklmnopqrst"]
TEXT = make("text", STORIES, closing=b"\0", name="fables")
PARAGRAPHS = make("text", [b"\none\n", b"\ntwo\nlines\n", b"\nx"], first_token=10, name="text")
TASK = make("synthetic", [b"abcd", b"efgh", b"ij"],
            [bytes([255, 1, 255, 2]), bytes([3, 255, 255, 4]), bytes([255, 5])])
PICTURES = make("image", [bytes(range(6)), bytes(range(10, 16)), bytes(range(20, 26))])
ALL = pytest.mark.parametrize("some", [TEXT, PARAGRAPHS, TASK, PICTURES],
                              ids=["stories", "text", "synthetic", "image"])


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
    assert x.tolist() == [[0, 97, 98, 200], [0, *b"ijk"]]
    assert y.tolist() == [[97, 98, 0, IGNORE], list(b"ijkl")]


@ALL
def test_later_documents_never_enter_a_cut_row(some):
    x, y = data.document_rows(some.train, some.meta, some.train.starts, 30, cut=True)
    starts = some.train.starts.tolist()
    ends = [*starts[1:], documents_end(len(some.train.tokens), some.meta)]
    for row, target, begin, end in zip(x, y, starts, ends):
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
@pytest.mark.parametrize("fits", [True, False])
def test_streams_move_to_cuda_if_they_take_a_quarter_of_its_free_memory_at_most(some, fits, monkeypatch):
    streams = [stream for stream in (some.train.tokens, some.train.targets) if stream is not None]
    free, moved = 4 * sum(stream.nbytes for stream in streams) - (0 if fits else 1), []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    monkeypatch.setattr(torch.Tensor, "to", lambda stream, device: moved.append(stream) or stream)
    assert some.train.to(torch.device("cuda")).device.type == "cuda"
    assert len(moved) == (len(streams) if fits else 0) and all(a is b for a, b in zip(moved, streams))


@ALL
def test_rows_go_to_the_device_of_the_split_where_its_streams_stay(some, monkeypatch):
    split, moved = Split(some.train.tokens, some.train.targets, some.train.starts, torch.device("meta")), []
    to = torch.Tensor.to

    def watched(tensor, device, **more):
        if device.type == "meta":
            moved.append(tensor.shape)
            return tensor
        return to(tensor, device, **more)
    monkeypatch.setattr(torch.Tensor, "to", watched)
    data.document_rows(split, some.meta, some.train.starts, 5, cut=True)
    assert moved == [(len(some.train.starts), 5)] * 2


@ALL
def test_rows_begin_at_starts_when_they_should(some):
    documents = some.meta["kind"] != "text"

    def seen(p_start):
        return {tuple(row.tolist()) for step in range(40) for row in batch(some, step, p_start=p_start)[0]}

    def rows_at(begins, cut):
        return {tuple(reference_row(some, begin, 8, cut)[0]) for begin in begins}

    at_starts = rows_at(some.train.starts.tolist(), documents)
    assert seen(1.0) == at_starts
    # elsewhere: every index that has a next token, and no other; of documents still the starts
    assert seen(0.0) == (at_starts if documents else rows_at(range(len(some.train.tokens) - 1), False))


def test_a_training_row_of_text_has_seq_len_tokens_and_another_those_of_the_longest_document():
    assert [data.row_length(some, 5) for some in (TEXT, PARAGRAPHS, TASK, PICTURES)] == [5, 5, 4, 6]


def test_positions_are_distinct_in_random_order_and_cover_the_row():
    for positions in (3, 8):
        drawn = [batch(TEXT, step, positions=positions)[2] for step in range(80)]
        assert all(len(set(t.tolist())) == len(t) == positions and t.dtype == torch.int64 for t in drawn)
        for place in range(positions):                          # each place of the order sees the whole row
            assert {int(t[place]) for t in drawn} == set(range(8))
    more = batch(TEXT, positions=20)[2]
    assert len(more) == 20 and more.dtype == torch.int64 and more.min() >= 0 and more.max() < 8


@ALL
def test_held_out_documents_are_fixed_distinct_and_from_their_start(some):
    n, cut, longest = len(some.val.starts), some.meta["name"] != "text", some.meta["longest_document"]
    x, y = data.held_out(some, n, 8, seed=0)
    assert same((x, y), data.held_out(some, n, 8, seed=0))
    for length in (2, 8, 1000):                                 # longer rows would hold nothing but PAD
        whole = min(length, longest) if cut else length
        whole = longest if some.meta["kind"] != "text" else whole
        assert data.held_out(some, n, length, seed=0)[0].shape == (n, whole)
    expected = [reference_row(some, s, x.shape[1], cut) for s in some.val.starts.tolist()]
    assert sorted(zip(x.tolist(), y.tolist())) == sorted((a, b) for a, b in expected)
    more, _ = data.held_out(some, 2 * n + 1, 8, seed=0)
    assert len(more) == 2 * n + 1 and torch.equal(more[:n], more[n:2 * n])


# ----------------------------------------------------------------------------------------------------------
# What is refused

@pytest.fixture
def folder(tmp_path):
    """A small data set, to be damaged."""
    prepare("copy", tmp_path, train_tokens=500, val_tokens=100)
    return tmp_path / "copy"


def refused(folder, *names):
    with pytest.raises(DataError) as error:
        data.load(folder.name, folder.parent)
    message = str(error.value)
    assert all(str(name) in message for name in (folder, *names)) and "\n" not in message
    assert f"python data.py --dataset={folder.name} --data_dir={folder.parent}" in message      # the remedy


def overwrite(path, i, value):
    content = bytearray(path.read_bytes())
    content[i] = value
    path.write_bytes(content)


def change_starts(folder, change):
    path = folder / "val_starts.npy"
    np.save(path, change(np.load(path)))


@pytest.mark.parametrize("damage, file", [
    (lambda f: (f / "meta.json").unlink(), ""), (lambda f: os.truncate(f / "train.bin", 400), "train.bin"),
    (lambda f: os.truncate(f / "val_targets.bin", 9), "val_targets.bin"),
    (lambda f: (f / "val_starts.npy").write_bytes(b"nonsense"), ""),
    (lambda f: (f / "val_starts.npy").write_bytes(b""), ""),
    (lambda f: np.save(f / "val_starts.npy", np.zeros(0, np.uint64)), "val_starts.npy"),
    (lambda f: np.save(f / "val_starts.npy", np.array([{}])), ""),
    (lambda f: change_starts(f, lambda starts: starts + np.uint64(1)), "val_starts.npy"),
    (lambda f: change_starts(f, lambda starts: starts[::-1]), "val_starts.npy"),
    (lambda f: change_starts(f, lambda starts: np.append(starts[:-1], np.uint64(2**63 + 1))), "_starts.npy"),
    (lambda f: change_starts(f, lambda starts: starts.astype(float)), "val_starts.npy"),
    (lambda f: overwrite(f / "train.bin", 77, 250), "train"),
    (lambda f: overwrite(f / "train_targets.bin", 77, 250), "train")])
def test_a_damaged_data_set_is_refused_and_the_remedy_is_named(folder, damage, file):
    damage(folder)
    refused(folder, file)


def test_a_missing_bin_is_refused(folder):
    (folder / "val.bin").unlink()
    with pytest.raises((DataError, OSError), match="val.bin"):
        data.load("copy", folder.parent)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "[" * 100_000, '{"a": 1}', "\xff"])
def test_a_meta_json_that_is_none_is_refused(folder, text):
    (folder / "meta.json").write_text(text, encoding="latin-1")
    refused(folder, "meta.json")


@pytest.mark.parametrize("key", ["name", "kind", "vocab_size", "first_token", "longest_document", "counts",
                                 "fingerprint"])
@pytest.mark.parametrize("value", ["missing", None, "x", -1, 0, 10**30, 1.5, True, [], {}], ids=str)
def test_values_of_a_meta_json_that_make_no_sense_are_refused(folder, key, value):
    if (key, value) in (("first_token", None), ("first_token", 0), ("fingerprint", "x")):
        value = float("nan")                                    # these make sense
    meta = json.loads((folder / "meta.json").read_text()) | {key: value}
    if value == "missing":
        del meta[key]
    (folder / "meta.json").write_text(json.dumps(meta))
    refused(folder, "meta.json")


@pytest.mark.parametrize("name, change", [
    ("fables", {"alphabet": None}), ("fables", {"alphabet": ["a"]}), ("fables", {"alphabet": [300]}),
    ("fables", {"first_token": None}), ("fables", {"first_token": 128}), ("fables", {"statistics": {}}),
    ("fables", {"statistics": {"entropy_per_character": "low"}}), ("mnist", {"image": None}),
    ("mnist", {"image": {"height": 28, "width": 28}}),
    ("mnist", {"image": {"height": 28, "width": 27, "patch": 1}}),
    ("mnist", {"image": {"height": 28, "width": 28, "patch": 0}}), ("retrieval", {"name": "mnist"}),
    ("retrieval", {"kind": "text"}), ("mnist", {"kind": "synthetic"})])
def test_values_that_a_kind_of_data_needs_are_checked(tmp_path, data_dir, name, change):
    copy = tmp_path / name
    copy.mkdir()
    for path in (data_dir / name).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "meta.json").write_text(json.dumps(data.load(name, data_dir).meta | change))
    refused(copy, "meta.json")
