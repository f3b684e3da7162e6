"""Files and command lines of strangers: a correct load, or one line and a status, never a traceback."""
import copy
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import evaluate
import sample
import train_bptt
import train_dmt
import train_smt
from lib.checkpoints import load, restore
from lib.cli import DataError, parse

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


QUIET = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def fuzz(check, n):
    """check(a number that says which field, an odd value) for n examples."""
    settings(max_examples=n, **QUIET)(given(st.integers(0, 10**6), ODD)(lambda i, value: check(i, value)))()


MANY = [pytest.param(100, id="some"), pytest.param(30_000, id="many", marks=pytest.mark.soak)]


@pytest.mark.parametrize("n", MANY)
def test_a_meta_of_a_stranger_loads_or_is_refused(broken, n):
    shutil.copy(broken / "retrieval" / "meta.json", broken / "whole.json")
    fuzz(lambda i, value: check_meta(broken, i, value), n)
    shutil.copy(broken / "whole.json", broken / "retrieval" / "meta.json")


@pytest.mark.parametrize("n", MANY)
def test_a_checkpoint_of_a_stranger_loads_or_is_refused(run, n):
    fuzz(lambda i, value: check_checkpoint(run, i, value), n)


@pytest.mark.parametrize("n", MANY)
def test_a_command_line_is_taken_or_refused_with_status_2(capsys, n):
    fuzz(check_flag, n)
