"""The command line: what every script answers to flags, right and wrong."""
import fcntl
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PAIRS, QUICK, SIZES, call, refused

import data
import evaluate
import sample
import train_bptt
import train_dmt
import train_smt
from lib.cli import DataError, UsageError, field_comments, parse
from runtime import RunConfig
from sources import fables
from sources.prepare import DATASETS, GENERATED

TRAIN = [train_smt, train_dmt, train_bptt]
ALL = [*TRAIN, sample, data, evaluate]
SCRIPTS = pytest.mark.parametrize("script", ALL, ids=lambda script: script.__name__)
TRAIN_SCRIPTS = pytest.mark.parametrize("script", TRAIN, ids=lambda script: script.__name__)
ROOT = Path(data.__file__).parent


@SCRIPTS
def test_help_lists_every_field_with_its_default_and_its_comment(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    result = call(script, "--help")
    text, tiny = " ".join(result.out.split()), getattr(script, "PRESETS", {"tiny": {}})["tiny"]
    assert result.status == 0 and script.__doc__.splitlines()[0] in result.out
    for field in fields(script.Config):
        comment = " ".join(field_comments(script.Config)[field.name].split())
        default = "unset" if field.default in (None, "") else field.default
        more = f"; tiny, fables: {tiny[field.name]})" if field.name in tiny else ")"
        assert f"--{field.name} " in text and f"{comment} (default {default}{more}" in text, field.name


@SCRIPTS
@pytest.mark.parametrize("arguments", [
    "--datasets=copy", "--data_dri x", "--data=x", "--dataset", "--data_dir=x fables"])
def test_a_wrong_flag_is_refused_in_one_line_that_names_it(script, arguments, tmp_path, monkeypatch):
    """--data, too: there are no abbreviations."""
    monkeypatch.chdir(tmp_path)
    refused(call(script, *arguments.split()), 2, arguments.split()[-1].split("=")[0])
    assert not list(tmp_path.iterdir())


@SCRIPTS
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
def test_a_number_that_is_not_finite_is_refused_by_every_float_flag(script, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hints = typing.get_type_hints(script.Config)
    for name in [name for name, hint in hints.items() if float in (typing.get_args(hint) or (hint,))]:
        refused(call(script, f"--{name}={value}"), 2, f"--{name}")
    assert not list(tmp_path.iterdir())


@TRAIN_SCRIPTS
@pytest.mark.parametrize("arguments", [
    "--preset=huge", "--preset=tiny/copy", "--lr=0", "--lr=-1", "--lr=fast", "--weight_decay=-1",
    "--p_start=1.5", "--batch_size=0", "--max_iters=1.5", "--max_iters=0", "--eval_docs=-1", "--seed=many",
    "--optimizer=sgd", "--compile=perhaps", "--device=gpu", "--resume=maybe", "--seq_len=-1",
    "--grad_accum=5 --batch_size=16"])
def test_a_value_that_makes_no_sense_is_refused_before_anything_is_written(
        script, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(call(script, *arguments.split()), 2, arguments.split()[-1].split("=")[0])
    assert not list(tmp_path.iterdir())


def test_a_truth_value_that_is_none_is_told_what_it_may_be(capsys):
    with pytest.raises(SystemExit):
        parse(Some, ["--compile=perhaps"])
    assert "--compile: true or false, not 'perhaps'" in capsys.readouterr().err


@pytest.mark.parametrize("script, arguments, flag", [
    (train_smt, "--d_model=20 --n_heads=4", "--d_model"), (train_smt, "--encoder=bidirectional", "--encoder"),
    (train_smt, "--encoder=causal --memory_tokens=1", "--memory_tokens"),
    (train_smt, "--encoder=causal --encoder_layers=3 --decoder_layers=2", "--encoder_layers"),
    (train_smt, "--positions=0", "--positions"), (train_smt, "--conv_width=0", "--conv_width"),
    (train_smt, "--encoder=window --trunk_iters=50", "--trunk_iters"),
    (train_smt, "--encoder=causal --trunk_iters=-10", "--trunk_iters"),
    (train_smt, "--trunk_iters=900 --max_iters=500", "--trunk_iters=900"),
    (train_smt, "--max_iters=900", "--trunk_iters=900"),                        # which the preset has
    (train_bptt, "--updater=lstm", "--updater"), (train_bptt, "--truncate=-1", "--truncate"),
    (train_bptt, "--context_len=8", "--context_len"),                           # an RNN has none
    (train_dmt, "--horizon=-1", "--horizon"), (train_dmt, "--label_stride=0", "--label_stride"),
    (sample, "--temperature=-1", "--temperature"), (sample, "--keep=2", "--keep"),
    (sample, "--max_new_tokens=0", "--max_new_tokens"), (sample, "--top_k=-1", "--top_k"),
    (evaluate, "--eval_docs=0", "--eval_docs"), (evaluate, "--ckpt=a,", "--ckpt"),
    (data, "--noise=2 --dataset=retrieval", "noise"), (data, "--seed=-1", "--seed")])
def test_an_impossible_combination_is_refused(script, arguments, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(call(script, *arguments.split()), 2, flag)
    assert not list(tmp_path.glob("runs/*"))


@dataclass(frozen=True)
class Some(RunConfig):
    """A config like those of the train scripts."""


PRESETS = {"tiny": dict(batch_size=4), "tiny/copy": dict(lr=0.5), "paper": dict(batch_size=128)}


@pytest.mark.parametrize("arguments, expected", [
    ("", dict(resume="no", compile=None, lr=1e-3, preset="tiny", seed=1337)),
    ("--resume", dict(resume="yes")), ("--resume=auto", dict(resume="auto")),
    ("--compile=false", dict(compile=False)),
    ("--compile", dict(compile=True)), ("--compile --resume=no", dict(compile=True, resume="no")),
    ("--lr 3e-4", dict(lr=3e-4)), ("--preset=paper", dict(preset="paper", batch_size=128)),
    ("--dataset=copy", dict(batch_size=4, lr=0.5)), ("--dataset=copy --lr=0.1", dict(lr=0.1)),
    ("--batch_size=7", dict(batch_size=7)), ("--seed=-1", dict(seed=-1))])
def test_flags_go_before_presets_and_presets_before_defaults(arguments, expected):
    config = parse(Some, ["--device=cpu", *arguments.split()], PRESETS)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("arguments, cuda, preset", [
    ("--dataset=mnist", True, "paper"), ("--dataset=mnist", False, "tiny"),
    ("--dataset=fables", True, "tiny"),
    ("--dataset=mnist --device=cpu", True, "tiny"), ("--dataset=text --device=cuda:1", True, "paper"),
    ("--dataset=mnist --preset=tiny", True, "tiny"), ("--dataset=copy --preset=paper", False, "paper")])
def test_the_preset_is_tiny_but_paper_for_text_and_pictures_on_cuda(monkeypatch, arguments, cuda, preset):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert parse(Some, arguments.split(), PRESETS, GENERATED).preset == preset


@TRAIN_SCRIPTS
def test_every_preset_is_a_valid_config(script):
    for name, values in script.PRESETS.items():
        base, _, dataset = name.partition("/")
        assert base in script.PRESETS and (not dataset or dataset in DATASETS)
        assert script.Config(**script.PRESETS[base] | values)


@SCRIPTS
def test_a_tilde_is_the_home_folder_in_every_flag_of_a_path(script, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    names = {f.name for f in fields(script.Config)}
    paths = names & {"data_dir", "out_dir", "init_from", "ckpt", "source", "out"}
    assert "data_dir" in paths
    for name in paths:
        assert getattr(parse(script.Config, [f"--{name}=~/x"]), name) == "/home/somebody/x"


@SCRIPTS
def test_every_command_in_a_docstring_is_one_that_its_script_takes(script):
    commands = re.findall(r"(?:python|torchrun --nproc_per_node=\d+) (\w+)\.py([^\n`#&]*)", script.__doc__)
    assert commands
    for name, arguments in commands:
        module = next(other for other in ALL if other.__name__ == name)
        parse(module.Config, shlex.split(arguments), getattr(module, "PRESETS", None))


# ----------------------------------------------------------------------------------------------------------
# How a script ends

@pytest.mark.parametrize("error, status", [
    (UsageError("two\nlines"), 2), (DataError("two\nlines"), 1), (OSError(28, "No space left", "/a/file"), 1),
    (torch.OutOfMemoryError("CUDA out of memory.\nmore lines"), 1)])
def test_a_mistake_is_one_line_and_a_status(error, status):
    def main():
        raise error
    refused(call(SimpleNamespace(main=main, __file__="train_smt.py")), status)


def test_an_error_of_ours_is_a_traceback():
    def main():
        raise ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        call(SimpleNamespace(main=main, __file__="train_smt.py"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_data_is_prepared_ends_the_run_at_once_and_leaves_nothing(
        tmp_path, monkeypatch, number):
    generate = fables.generate

    def interrupted(*arguments):
        assert any((tmp_path / "data").iterdir())                   # the folder that becomes the data set
        signal.raise_signal(number)
        return generate(*arguments)
    monkeypatch.setattr(fables, "generate", interrupted)
    result = call(train_smt, *QUICK, *SIZES, *PAIRS, f"--data_dir={tmp_path / 'data'}",
                  f"--out_dir={tmp_path / 'run'}")
    assert result.status == 130 and len(result.err.splitlines()) == 1
    assert not (tmp_path / "run").exists() and not list((tmp_path / "data").rglob("*.*in"))


def test_several_processes_do_not_share_one_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(call(train_smt, "--device=cuda:1"), 2, "--device=cuda:1")


def without_stdout(how, script, *arguments):
    """A process of a script whose standard output is closed, a full disk, or a pipe nobody reads."""
    command = [sys.executable, ROOT / script, *arguments]
    if how == "closed":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    with open("/dev/full" if how == "full" else os.devnull, "w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE if how == "gone" else file, text=True,
                                   stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if how == "gone":
        process.stdout.close()
    return process


def ended(process):
    """Status and errors of a process, at its end."""
    with process.stderr as stream:
        errors = stream.read()
    return process.wait(timeout=300), errors


HOW = "gone", "full", "closed"


def test_a_terminal_that_is_gone_or_full_does_not_stop_a_run(tmp_path, data_dir):
    processes = {how: without_stdout(how, "train_smt.py", *QUICK, *SIZES, *PAIRS, "--dataset=retrieval",
                                     f"--data_dir={data_dir}", f"--out_dir={tmp_path / how}") for how in HOW}
    for how, process in processes.items():
        assert ended(process) == (0, ""), how
        assert torch.load(tmp_path / how / "ckpt.pt", weights_only=True)["step"] == 4


def test_what_cannot_be_printed_is_an_error_in_one_line(smt_run, data_dir):
    run = f"--ckpt={smt_run('fables')}", f"--data_dir={data_dir}"
    processes = {(how, script): without_stdout(how, script, *run)
                 for how in HOW for script in ("sample.py", "evaluate.py")}
    for (how, script), process in processes.items():
        status, errors = ended(process)
        assert status == 1 and errors.splitlines()[-1].startswith("error: a file or stdout: "), (how, errors)
        assert len(errors.splitlines()) == 1 + (script == "sample.py")      # which names its checkpoint


def test_a_terminal_gets_a_bar_with_steps_and_loss(tmp_path, data_dir):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    where = f"--data_dir={data_dir}", f"--out_dir={tmp_path}"
    command = [sys.executable, ROOT / "train_smt.py", *QUICK, *SIZES, *PAIRS, "--dataset=retrieval", *where]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "4/4" in shown and re.search(r"loss \d+\.\d", shown)
