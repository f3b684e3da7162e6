"""Files and command lines of strangers: a correct load, or one line and a status, never a traceback, within
bounded memory and time."""
import contextlib
import copy
import io
import json
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import evaluate
import sample
import train_bptt
import train_dmt
import train_smt
from experiments import reproduce
from lib.checkpoints import load, restore
from lib.cli import DataError, UsageError, parse
from runtime import read_log
from sources.prepare import prepare

ODD = st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=5),
                st.just([]), st.just({}), st.lists(st.integers(-1, 300), max_size=3), st.just({"train": 1}))
SCRIPTS = {script: getattr(script, "PRESETS", None)
           for script in (train_smt, train_dmt, train_bptt, sample, evaluate, data)}


def places(tree, path=()):
    """The paths of all values in nested dicts."""
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def changed(tree, path, value):
    """A copy of nested dicts with another value at a path."""
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


@pytest.fixture(scope="module")
def broken(tmp_path_factory, data_dir):
    """A folder with a copy of the data set retrieval, to be broken."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(data_dir / "retrieval", folder / "retrieval")
    return folder


def check_meta(broken, choice, value):
    path = broken / "retrieval" / "meta.json"
    meta = json.loads((broken / "whole.json").read_text())
    keys = sorted(places(meta), key=str)
    path.write_text(json.dumps(changed(meta, keys[choice % len(keys)], value)))
    try:
        split = data.load("retrieval", broken).train
        x, y = data.document_rows(split, data.load("retrieval", broken).meta, split.starts[:2], 8, True)
        assert x.shape == y.shape == (2, 8)
    except DataError:
        pass


def check_checkpoint(run, choice, value):
    checkpoint = torch.load(run / "whole.pt", weights_only=True)
    keys = sorted((key for key in places(checkpoint) if key[0] != "optimizers"), key=str)
    torch.save(changed(checkpoint, keys[choice % len(keys)], value), run / "ckpt.pt")
    try:
        _, networks, initial_memory = restore(load(run))
        networks["readout"](initial_memory[None])
    except DataError:
        pass


def check_flag(choice, value):
    """A Config whose every field has its type, or exit status 2."""
    script = list(SCRIPTS)[choice % len(SCRIPTS)]
    names = list(script.Config.__dataclass_fields__)
    try:
        parse(script.Config, [f"--{names[choice // 7 % len(names)]}={value}"], SCRIPTS[script])
    except SystemExit as stop:
        assert stop.code == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory, smt_run):
    """A folder with a copy of a run, whose checkpoint is to be broken."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("whole.pt", "ckpt.pt"):
        shutil.copy(smt_run("retrieval") / "ckpt.pt", folder / name)
    return folder


# ------------------------------------------------------------------------------------------------------------
# Whole files, damaged

KINDS = ("replace",) * 6 + ("insert", "remove", "end")      # only the first keeps a file's size
EDITS = st.lists(st.tuples(st.integers(0, 2**30), st.sampled_from(KINDS), st.binary(min_size=1, max_size=8)),
                 min_size=1, max_size=4)


def edited(content, edits):
    """A file's content after edits: at a place, bytes are replaced, inserted or removed, or the rest is cut
    off."""
    for place, what, new in edits:
        i = place % (len(content) + 1)
        content = content[:i] + {"replace": new + content[i + len(new):], "insert": new + content[i:],
                                 "remove": content[i + len(new):], "end": b""}[what]
    return content


def draw_rows(name, place):
    """Load a data set, and draw rows of it."""
    found = data.load(name, place)
    data.sample_batch(found, 0, 0, 2, data.row_length(found, 8), 1, 0.5)
    data.held_out(found, 2, 8, 0)


def prepare_and_draw(name, source):
    """Prepare a data set, load it, and draw rows of it."""
    place = source.parent.with_name("made") if source.is_file() else source.with_name("made")
    prepare(name, place, source)
    draw_rows(name, place)


def use_of(folder, name):
    """What a file is used for: a function without arguments."""
    if name == "ckpt.pt":
        return lambda: restore(load(folder))
    if name == "metrics.jsonl":
        return lambda: [line["step"] + 1 for line in read_log(folder / name)]
    if name == "config.json":
        return lambda: reproduce.read_json(folder / name).get("init_from")
    if name.startswith("picture"):
        return lambda: prepare_and_draw("sketchy", folder)
    if name.endswith("ubyte"):
        return lambda: prepare_and_draw("mnist", folder)
    if name.startswith("TinyStories"):
        return lambda: prepare_and_draw("tinystories", folder)
    if name == "text.txt":
        return lambda: prepare_and_draw("text", folder / name)
    return lambda: draw_rows(folder.name, folder.parent)


def check_file(path, whole, edits, use):
    """A file with edits is used, or refused in one line."""
    path.write_bytes(edited(whole, edits))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            use()
    except (DataError, UsageError) as error:
        assert "\n" not in str(error) and not isinstance(error.__context__, MemoryError)
    finally:
        path.write_bytes(whole)


def picture(format, mode):
    """A small picture file, as bytes."""
    file = io.BytesIO()
    Image.fromarray(np.arange(48 * 40, dtype=np.uint8).reshape(48, 40)).convert(mode).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory, data_dir, smt_run):
    """Copies of files, to be damaged: {kind: their paths}."""
    place = tmp_path_factory.mktemp("files")
    run = shutil.copytree(smt_run("retrieval"), place / "run")
    for name in ("fables", "retrieval", "mnist"):
        shutil.copytree(data_dir / name, place / name)
    images = np.arange(2 * 784, dtype=np.uint8).reshape(2, 28, 28)
    idx = np.array([0x803, 2, 28, 28], ">u4").tobytes() + images.tobytes()
    contents = {"idx": {f"{split}-images-idx3-ubyte": idx for split in ("train", "t10k")},
                "stories": {f"TinyStories-{split}.txt": "One day.\n<|endoftext|>\n“Two” days.\n".encode() * 3
                            for split in ("train", "valid")},
                "text": {"text.txt": "A line.\n\nÄ and “quotes”.\n".encode() * 20},
                "pictures": {f"picture{i}.{kind}": picture(kind, mode) for i, (kind, mode) in enumerate((
                    ("png", "L"), ("png", "I;16"), ("jpeg", "RGB"), ("gif", "P"), ("bmp", "1"), ("tiff", "L"),
                    ("webp", "RGBA")))}}
    for folder, named in contents.items():
        (place / folder).mkdir()
        for name, content in named.items():
            (place / folder / name).write_bytes(content)
    sets = {name: sorted((place / name).iterdir()) for name in ("fables", "retrieval", "mnist", *contents)}
    return sets | {"run": sorted(run.iterdir())}


# ------------------------------------------------------------------------------------------------------------
# Many examples

QUIET = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
SECONDS, MEMORY = 20, 2 << 30       # of an example: CPU time, and address space beyond what is in use


@contextlib.contextmanager
def bounded():
    """At most SECONDS of CPU time, and on Linux at most MEMORY more of address space."""
    handler = signal.signal(signal.SIGPROF, lambda *_: pytest.fail(f"more than {SECONDS} s"))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux" and limits[1] == resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        if resource.getrlimit(resource.RLIMIT_AS) != limits:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(check, n, odd=ODD):
    """Call check(index, odd value) for n examples; the index chooses a field or a file."""
    def example(i, value):
        with bounded():
            check(i, value)
    settings(max_examples=n, **QUIET)(given(st.integers(0, 10**6), odd)(example))()


def many(n):
    """Parametrise n, the number of examples: 100, and more in the soak tests."""
    return pytest.mark.parametrize("n", [pytest.param(100, id="some"),
                                         pytest.param(n, id="many", marks=pytest.mark.soak)])


@many(25_000)
def test_a_meta_of_a_stranger_loads_or_is_refused(broken, n):
    shutil.copy(broken / "retrieval" / "meta.json", broken / "whole.json")
    fuzz(lambda i, value: check_meta(broken, i, value), n)
    shutil.copy(broken / "whole.json", broken / "retrieval" / "meta.json")


@many(5000)
def test_a_checkpoint_of_a_stranger_loads_or_is_refused(run, n):
    fuzz(lambda i, value: check_checkpoint(run, i, value), n)


@many(20_000)
def test_a_command_line_is_taken_or_refused_with_status_2(capsys, n):
    fuzz(check_flag, n)


@pytest.mark.parametrize("kind", "run fables retrieval mnist idx stories text pictures".split())
@many(6500)
def test_a_damaged_file_is_used_or_refused(files, kind, n):
    whole = {path: path.read_bytes() for path in files[kind]}

    def check(i, edits):
        path = files[kind][i % len(whole)]
        check_file(path, whole[path], edits, use_of(path.parent, path.name))
    fuzz(check, n, EDITS)
