"""Checkpoints: written whole or not at all, restored as they were, and never trusted."""
import os
import pickle
import shutil

import pytest
import torch
from conftest import BPTT_SIZES, PAIRS, QUICK, ROLL_OUTS, SIZES, call, randomise, refused

import evaluate
import sample
import train_bptt
import train_dmt
import train_smt
from lib.checkpoints import load, restore, write_atomically
from lib.cli import DataError
from model import ModelConfig, build
from sources.prepare import prepare

V = 5
TRAIN = {train_smt: [*SIZES, *PAIRS], train_dmt: ROLL_OUTS, train_bptt: [*BPTT_SIZES, "--seq_len=8"]}


# ----------------------------------------------------------------------------------------------------------
# Writing and restoring

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "ckpt.pt"
    path.write_text("good")

    def fails_with(error):
        def write(temporary):
            assert temporary != path and temporary.parent == path.parent
            temporary.write_text("half")
            raise error
        return write

    for error in (OSError(28, "No space left on device"), RuntimeError("enforce fail: file write failed")):
        with pytest.raises(DataError, match="ckpt.pt"):
            write_atomically(path, fails_with(error))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fails_with(KeyboardInterrupt()))
    with pytest.raises(DataError, match="ckpt.pt"):
        write_atomically(path / "within", lambda temporary: temporary.write_text("half"))
    assert path.read_text() == "good" and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]
    write_atomically(path, lambda temporary: temporary.write_text("better"))
    assert path.read_text() == "better" and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("names", [("encoder", "decoder", "updater", "readout"), ("updater", "readout")])
def test_a_checkpoint_restores_the_same_functions(names):
    config = ModelConfig(d_model=8, n_heads=2, memory_tokens=3)
    networks = randomise(build(config, V, names)).float()
    content = {"model_config": vars(config), "data": {"vocab_size": V}, "model": networks.state_dict(),
               "initial_memory": torch.ones(3, 8)}
    found, restored, initial_memory = restore(content)
    assert found == config and list(restored) == list(names)
    assert torch.equal(initial_memory, torch.ones(3, 8))
    memory, x = torch.randn(2, 3, 8), torch.tensor([0, 4])
    assert torch.equal(restored["updater"](memory, x), networks["updater"](memory, x))
    assert torch.equal(restored["readout"](memory), networks["readout"](memory))


# ----------------------------------------------------------------------------------------------------------
# What is refused

@pytest.fixture
def run(tmp_path, smt_run):
    """A copy of a run on fables."""
    return shutil.copytree(smt_run("fables"), tmp_path / "run")


def scripts(run, data_dir, new):
    """Every script with the checkpoint of a run, as results: the first two only read it."""
    for script in (sample, evaluate):
        yield call(script, f"--ckpt={run}", f"--data_dir={data_dir}")
    for script, sizes in TRAIN.items():
        flags = [*QUICK, *sizes, f"--data_dir={data_dir}"]
        yield call(script, *flags, f"--init_from={run}", f"--out_dir={new}")
        yield call(script, *flags, "--resume", f"--out_dir={run}", "--max_iters=5")


class Malicious:
    """Unpickling it makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


DAMAGES = {
    "truncated": lambda p, c: p.write_bytes(p.read_bytes()[:p.stat().st_size // 2]),
    "empty": lambda p, c: p.write_bytes(b""),
    "text": lambda p, c: p.write_text("not a checkpoint"),
    "missing": lambda p, c: p.unlink(),
    "malicious": lambda p, c: torch.save(c | {"config": Malicious(p.parent / "was-here")}, p),
    "pickle": lambda p, c: p.write_bytes(pickle.dumps(Malicious(p.parent / "was-here"), 2)),
    "other": lambda p, c: torch.save({"state_dict": c["model"]}, p),
    "list": lambda p, c: torch.save([1, 2], p),
    "nan": lambda p, c: c["model"]["updater.embed.weight"].fill_(torch.nan),
    "inf": lambda p, c: c["initial_memory"].fill_(torch.inf),
    "half": lambda p, c: c["model"].update({"updater.embed.weight": torch.ones(3).half()}),
    "no tensor": lambda p, c: c["model"].update({"updater.embed.weight": 5}),
    "step": lambda p, c: c.update(step="4"), "late": lambda p, c: c.update(step=2**70),
    "negative": lambda p, c: c.update(step=-1),
    "spent": lambda p, c: c.update(spent={"tokens": "512", "seconds": "1"}),
    "spent nan": lambda p, c: c["spent"].update(seconds=float("nan")),
    "no config": lambda p, c: c.pop("config"), "empty config": lambda p, c: c["config"].clear(),
    "length": lambda p, c: c["config"].update(seq_len="8"),
    "below 0": lambda p, c: c["config"].update(seq_len=-1),
    "source": lambda p, c: c["config"].update(init_from=5),
    "data set": lambda p, c: c["config"].update(dataset=5),
    "config": lambda p, c: c.update(config=[]),
    "stage": lambda p, c: c.update(stage=3), "time": lambda p, c: c.update(time="now"),
    "kind": lambda p, c: c["data"].update(kind="poem"),
    "name": lambda p, c: c["data"].update(name=["fables"]),
    "vocabulary": lambda p, c: c["data"].update(vocab_size=10**9),
    "alphabet": lambda p, c: c["data"].pop("alphabet"),
    "first token": lambda p, c: c["data"].update(first_token="0"),
    "statistics": lambda p, c: c["data"].update(statistics={"entropy_per_character": "low"}),
}


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), torch.OutOfMemoryError("full")])
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(run, monkeypatch, error):
    def fail(*given, **more):
        raise error
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        load(run)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_or_malicious_checkpoint_is_refused_by_every_script(tmp_path, data_dir, run, how):
    content = torch.load(run / "ckpt.pt", weights_only=True)
    before = (run / "ckpt.pt").read_bytes()
    DAMAGES[how](run / "ckpt.pt", content)
    if (run / "ckpt.pt").exists() and (run / "ckpt.pt").read_bytes() == before:
        torch.save(content, run / "ckpt.pt")
    for result in scripts(run, data_dir, tmp_path / "new"):
        refused(result, 1, run / "ckpt.pt")
    assert not (run / "was-here").exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [
    dict(d_model=16), dict(updater="gru"), dict(updater_layers=3), dict(conv_width=3), dict(n_heads=3),
    dict(n_heads="2"), dict(d_model=8.0), dict(updater=["mlp"]), dict(width=3), dict(memory_tokens=-1),
    dict(context_len=10**9), dict(future_len=10**9), dict(encoder_layers=10**6), dict(decoder_layers=10**9),
    dict(updater_layers=10**6), dict(d_model=2**40), dict(memory_tokens=10**12), dict(conv_width=10**9),
    dict(d_model=10**30)], ids=str)
def test_sizes_that_do_not_fit_the_weights_are_refused(data_dir, run, tmp_path, change):
    """Before anything is made of them: giant ones would fill the memory."""
    content = torch.load(run / "ckpt.pt", weights_only=True)
    content["model_config"].update(change)
    torch.save(content, run / "ckpt.pt")
    with pytest.raises(DataError):
        restore(load(run))
    for script in (sample, evaluate):
        refused(call(script, f"--ckpt={run}", f"--data_dir={data_dir}"), 1)
    new = tmp_path / "new"
    refused(call(train_dmt, *QUICK, f"--data_dir={data_dir}", f"--init_from={run}", f"--out_dir={new}"), 1)
    assert not new.exists()


@pytest.fixture
def resume(run, data_dir):
    """resume(): what train_smt.py --resume answers in the folder of the run."""
    return lambda: call(train_smt, *QUICK, *SIZES, *PAIRS, f"--data_dir={data_dir}", f"--out_dir={run}",
                        "--resume", "--max_iters=6")


@pytest.mark.parametrize("change", [
    lambda model: model.pop("updater.embed.weight"), lambda model: model.clear(),
    lambda model: model.update({"updater.extra": torch.ones(2)}),
    lambda model: model.update({"readout.norm.weight": torch.ones(9)})],
    ids=["missing", "none", "extra", "shape"])
def test_weights_that_do_not_fit_the_sizes_are_refused(run, resume, change):
    content = torch.load(run / "ckpt.pt", weights_only=True)
    change(content["model"])
    torch.save(content, run / "ckpt.pt")
    refused(call(sample, f"--ckpt={run}"), 1)
    refused(resume(), 1, run)


@pytest.mark.parametrize("change", [
    lambda content: content.update(optimizers=[1]), lambda content: content.update(optimizers=[]),
    lambda content: content["optimizers"][0].update(state=5),
    lambda content: content["optimizers"][0]["param_groups"].clear(),
    lambda content: content["optimizers"][0].update(param_groups=3)],
    ids=["ints", "none", "state", "groups", "int"])
def test_the_state_of_an_optimiser_that_is_not_ours_is_refused(run, resume, change):
    content = torch.load(run / "ckpt.pt", weights_only=True)
    change(content)
    torch.save(content, run / "ckpt.pt")
    refused(resume(), 1, run)


@pytest.mark.parametrize("change", ["--d_model=16", "--updater_layers=2", "--updater=gru", "--n_heads=1",
                                    "--memory_tokens=3"])
def test_weights_of_another_architecture_are_refused(tmp_path, data_dir, smt_run, change):
    for script in (train_smt, train_bptt):
        result = call(script, *QUICK, *TRAIN[script], f"--data_dir={data_dir}", change,
                      f"--init_from={smt_run('fables')}", f"--out_dir={tmp_path / 'new'}")
        refused(result, 1, smt_run("fables"))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_data_set_is_refused(tmp_path, data_dir, smt_run):
    for script, sizes in TRAIN.items():
        flags = [*QUICK, *sizes, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'new'}"]
        refused(call(script, *flags, f"--init_from={smt_run('retrieval')}"), 1, smt_run("retrieval"))
    prepare("retrieval", tmp_path, train_tokens=4000, val_tokens=400, symbols=7)        # another vocabulary
    for script in (sample, evaluate):
        refused(call(script, f"--ckpt={smt_run('retrieval')}", f"--data_dir={tmp_path}"), 1)


def test_data_made_anew_since_the_training_are_warned_of(tmp_path, data_dir, smt_run):
    prepare("retrieval", tmp_path, seed=1, train_tokens=4000, val_tokens=400, length="8", symbols=4)
    for script in (sample, evaluate):
        for folder, warned in ((tmp_path, True), (data_dir, False)):
            result = call(script, f"--ckpt={smt_run('retrieval')}", f"--data_dir={folder}")
            assert result.status == 0 and ("warning: " in result.err) == warned, result.err
