"""Command line, checkpoints, resuming, processes: what a user does to every script, and what it must answer."""
import importlib
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BPTT_SIZES, PAIRS, QUICK, ROLL_OUTS, SIZES, TRANSFORMER_SIZES, call, trained

import data
import evaluate
import fables
import model
import runtime
import sample
import train_bptt
import train_dmt
import train_smt
import train_transformer
from runtime import DataError, RunConfig, learning_rate

ROOT = Path(runtime.__file__).parent
TRAIN = {"smt": train_smt, "dmt": train_dmt, "bptt": train_bptt, "transformer": train_transformer}
SCRIPTS = pytest.mark.parametrize("script", [*TRAIN.values(), sample, data, evaluate], ids=lambda s: s.__name__)
TIMED = ("seconds", "tokens_per_second")
TRUNK_FIRST = "--encoder=causal --encoder_layers=2 --conv_width=3 --positions=8 --trunk_iters={}".format


def flags(stage, data_dir, smt_run, out, dataset="retrieval"):
    more = {"smt": [*SIZES, *PAIRS], "bptt": [*BPTT_SIZES, "--seq_len=8"],
            "dmt": [*ROLL_OUTS, f"--init_from={smt_run(dataset)}", "--seq_len=8"], "transformer": [*TRANSFORMER_SIZES, "--seq_len=8"]}
    return [*QUICK, f"--dataset={dataset}", f"--data_dir={data_dir}", f"--out_dir={out}", *more[stage]]


def refused(result, status, *messages):
    """One line on stderr, no traceback."""
    assert result.status == status and len(result.err.splitlines()) == 1 and result.err.startswith("error: "), result
    for message in messages:
        assert message in result.err


def metrics(folder):
    """The lines of a run's log, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def checkpoint(folder):
    """A run's checkpoint as a flat dict, without what depends on the clock or says where it was written."""
    def flatten(value, path):
        if isinstance(value, dict):
            return {k: v for name, inner in value.items() for k, v in flatten(inner, f"{path}.{name}").items()}
        if isinstance(value, (list, tuple)):
            return flatten(dict(enumerate(value)), path)
        return {path: value}
    content = flatten(torch.load(folder / "ckpt.pt", weights_only=True), "")
    return {name: value for name, value in content.items()
            if name not in (".spent.seconds", ".config.out_dir", ".config.resume", ".config.max_iters", ".config.init_from")}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        assert same, name


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@SCRIPTS
def test_help_lists_every_field_with_its_type_its_default_and_its_comment(script):
    result = call(script, "--help")
    text = " ".join(result.out.split())
    assert result.status == 0 and script.__doc__.splitlines()[0] in result.out
    comments = runtime.field_comments(script.Config)
    for field in fields(script.Config):
        comment = comments[field.name]
        assert len(comment) > 5
        kind = "bool" if "bool" in str(field.type) else next(k for k in ("int", "float", "str") if k in str(field.type))
        default = "unset" if field.default in (None, "") else field.default
        flag = f"--{field.name} [true|false]" if kind == "bool" else f"--{field.name} {kind}"
        instead = getattr(script, "PRESETS", {"tiny": {}})["tiny"].get(field.name)
        default = f"{default})" if instead is None else f"{default}; preset tiny: {instead})"
        assert f"{flag} {' '.join(comment.split())} (default {default}" in text, field.name


@SCRIPTS
@pytest.mark.parametrize("arguments, messages", [
    (["--sede=3"], ["unknown argument --sede=3", "the nearest flag is --seed"]),
    (["--data_dri", "x"], ["unknown argument --data_dri", "--data_dir"]),
    (["--see=3"], ["unknown argument --see=3", "--seed"]),                        # no abbreviations
    (["fables"], ["unexpected argument 'fables'", "--name=value"]),
    (["--seed=many"], ["--seed", "int", "many"]), (["--seed"], ["--seed"])])
def test_a_wrong_flag_is_refused_in_one_line_that_names_the_nearest(script, arguments, messages):
    refused(call(script, *arguments), 2, *messages)


@pytest.mark.parametrize("script", TRAIN.values(), ids=lambda s: s.__name__)
@pytest.mark.parametrize("argument, messages", [
    ("--preset=huge", ["--preset is one of", "tiny", "'huge'"]), ("--preset=tiny/copy", ["--preset is one of", "'tiny/copy'"]),
    ("--lr=0", ["--lr"]), ("--lr=nan", ["--lr"]), ("--lr=fast", ["--lr", "float"]), ("--p_start=1.5", ["--p_start"]),
    ("--batch_size=0", ["--batch_size must be at least 1"]), ("--max_iters=1.5", ["--max_iters", "int"]),
    ("--lr_decay=linear", ["--lr_decay is constant or cosine, not 'linear'"]),
    ("--optimizer=sgd", ["--optimizer is adamw or muon, not 'sgd'"]),
    ("--compile=perhaps", ["--compile"]), ("--device=gpu", ["--device", "'gpu'"]),
    ("--grad_accum=5 --batch_size=16", ["--batch_size=16 must be a multiple of processes x grad_accum = 1 x 5"])])
def test_a_value_that_makes_no_sense_is_refused_before_anything_is_written(script, argument, messages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(call(script, *argument.split()), 2, *messages)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, argument, message", [
    (train_smt, "--d_model=20 --n_heads=4", "--d_model=20 must be a multiple of 2 x n_heads = 8"),
    (train_smt, "--encoder=bidirectional", "--encoder is one of window, causal"),
    (train_smt, "--encoder=causal --memory_tokens=1", "--encoder=causal needs --memory_tokens of at least 2"),
    (train_smt, "--positions=0", "--positions is at least 1"), (train_smt, "--seq_len=-1", "--seq_len at least 0"),
    (train_smt, "--conv_width=0", "--conv_width must be at least 1"),
    (train_smt, "--encoder=window --trunk_iters=50", "--encoder=window takes --trunk_iters=0"),
    (train_smt, "--encoder=causal --trunk_iters=-10", "--trunk_iters and --seq_len at least 0"),
    (train_smt, "--trunk_iters=900 --max_iters=500", "--trunk_iters=900 leaves no step to SMT: it must be below --max_iters=500"),
    (train_smt, "--max_iters=900", "--trunk_iters=900 leaves no step to SMT"),                  # which the preset has
    (train_bptt, "--updater=lstm", "--updater is one of"), (train_bptt, "--truncate=-1", "--truncate"),
    (train_dmt, "--horizon=-1", "--horizon"), (train_dmt, "--label_stride=0", "--label_stride at least 1"),
    (train_transformer, "--d_model=20", "--d_model=20 must be a multiple of 2 x n_heads = 8"),
    (train_transformer, "--context_len=0", "--context_len must be at least 1"), (train_transformer, "--seq_len=-1", "--seq_len"),
    (sample, "--temperature=-1", "--temperature"), (sample, "--keep=2", "--keep"), (sample, "--max_new_tokens=0", "--max_new_tokens")])
def test_an_impossible_combination_is_refused(script, argument, message):
    refused(call(script, *argument.split()), 2, message)


@dataclass(frozen=True)
class Some(RunConfig):
    """A config like those of the train scripts."""


@pytest.mark.parametrize("arguments, expected", [
    ([], dict(resume=False, compile=None, lr=1e-3, preset="tiny", seed=1337)), (["--resume"], dict(resume=True)),
    (["--resume=false", "--compile=false"], dict(resume=False, compile=False)), (["--compile"], dict(compile=True)),
    (["--compile", "--resume=no"], dict(compile=True, resume=False)), (["--lr", "3e-4"], dict(lr=3e-4)),
    (["--dataset=mnist"], dict(preset="paper", batch_size=128)), (["--dataset=mnist", "--preset=tiny"], dict(preset="tiny", batch_size=4)),
    (["--dataset=copy"], dict(batch_size=4, lr=0.5)), (["--dataset=copy", "--lr=0.1"], dict(lr=0.1)),
    (["--batch_size=7"], dict(batch_size=7)), (["--seed=-1"], dict(seed=-1))])
def test_flags_go_before_presets_and_presets_before_defaults(arguments, expected):
    presets = {"tiny": dict(batch_size=4), "tiny/copy": dict(lr=0.5), "paper": dict(batch_size=128)}
    config = runtime.parse(Some, arguments, presets)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("script", TRAIN.values(), ids=lambda s: s.__name__)
def test_every_preset_is_a_valid_config(script):
    for name, values in script.PRESETS.items():
        base, _, dataset = name.partition("/")
        assert base in script.PRESETS and (not dataset or dataset in data.DATASETS)
        assert script.Config(**script.PRESETS[base] | values)


# ---------------------------------------------------------------------------------------------------------------------
# Learning rate and optimiser

def test_learning_rate_warms_up_then_decays_to_a_tenth_or_stays(monkeypatch):
    monkeypatch.setattr(runtime, "WARMUP", 0.1)
    config = RunConfig(lr=2.0, max_iters=100)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)]) and rates[10] == 2.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and rates[100] == pytest.approx(0.2) and rates[55] == pytest.approx(1.1)
    assert {learning_rate(step, replace(config, lr_decay="constant")) for step in range(10, 100)} == {2.0}
    assert learning_rate(0, replace(config, max_iters=4)) == 2.0                   # its warm-up would be less than a step
    late = [learning_rate(step, config, decay_from=60) for step in range(101)]
    assert late[:10] == rates[:10] and set(late[10:61]) == {2.0} and late[80] == pytest.approx(1.1) and late[100] == pytest.approx(0.2)


MATRICES = {                # of the networks, by the end of their names; what has a name of another end is not decayed
    "hidden": ("qkv.weight", "out.weight", "up.weight", "down.weight", "mix.weight", "present.weight",
               "layers.0.1.weight", "layers.0.3.weight"),
    "others": ("head.weight", "gate.weight", "cell.weight_ih", "cell.weight_hh", "registers", "initial_memory")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("sizes", [dict(encoder="causal", updater="mlp", conv_width=2), {}, dict(updater="gru")],
                         ids=["causal-mlp", "window-transformer", "window-gru"])
def test_muon_gets_the_hidden_matrices_adamw_the_rest_and_all_are_decayed_but_embeddings(monkeypatch, sizes, optimizer):
    monkeypatch.setattr(runtime, "WEIGHT_DECAY", 0.5)
    networks = model.build(model.ModelConfig(d_model=8, n_heads=2, updater_layers=1, **sizes), 5)
    networks.initial_memory = torch.nn.Parameter(torch.randn(4, 8))                 # as BPTT has it
    networks["readout"].requires_grad_(False)                                       # what is frozen belongs to none
    names, trained_by, decay = {id(p): name for name, p in networks.named_parameters()}, {}, {}
    found = runtime.optimizers(networks, RunConfig(optimizer=optimizer, lr=0.25))
    for one in found:
        for group in one.param_groups:
            assert group["lr"] == 0.25
            for name in (names[id(p)] for p in group["params"]):
                assert name not in trained_by, name
                trained_by[name], decay[name] = type(one).__name__, group["weight_decay"]
    assert trained_by.keys() == {name for name in names.values() if not name.startswith("readout")}
    hidden, others = ({name for name in trained_by if name.endswith(ends)} for ends in MATRICES.values())
    assert {name for name, kind in trained_by.items() if kind == "Muon"} == (hidden if optimizer == "muon" else set())
    assert [type(one).__name__ for one in found] == ["AdamW", "Muon"][:len(found)]
    assert [group["weight_decay"] for group in found[0].param_groups] == [0.5, 0.0]
    assert {name for name, value in decay.items() if value == 0.5} == hidden | others and set(decay.values()) == {0.5, 0.0}
    linear = {f"{name}.weight" for name, module in networks.named_modules() if isinstance(module, torch.nn.Linear)}
    assert hidden == {name for name in linear & trained_by.keys() if name.split(".")[-2] not in ("head", "gate")}


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_muon_makes_the_steps_of_torchs_muon_which_computes_in_bf16(shape):
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizers = runtime.Muon([ours], lr=0.1, weight_decay=0.5), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        before = ours.detach().clone()
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        moved = (ours - before * 0.95).detach()
        assert moved.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.4)
        assert (ours - theirs).norm() < 0.1 * moved.norm()


def test_every_optimiser_steps_at_the_rate_it_is_given():
    networks = model.build(model.ModelConfig(d_model=8, n_heads=2, updater_layers=1), 5)
    found = runtime.optimizers(networks, RunConfig(optimizer="muon", lr=1.0))
    for rate in (1e-3, 0.0):
        before = [p.detach().clone() for p in networks.parameters()]
        for p in networks.parameters():
            p.grad = torch.randn_like(p)
        runtime.optimizer_step(found, rate)
        for p, old in zip(networks.parameters(), before):
            assert p.grad is None and (p - old).square().mean().sqrt().item() == pytest.approx(rate, rel=0.9, abs=1e-9)


@pytest.mark.parametrize("clip, expected", [(1.0, 1.0), (100.0, 5.0)])
def test_gradients_are_clipped_and_the_norm_before_is_told(monkeypatch, clip, expected):
    monkeypatch.setattr(runtime, "GRAD_CLIP", clip)
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]                # each of an optimiser of its own
    for weight, gradient in zip(weights, (3.0, 4.0)):
        weight.grad = torch.tensor([gradient])
    norm = runtime.optimizer_step([torch.optim.SGD([weight], lr=9.0) for weight in weights], 1.0)
    assert norm == 5 and all(weight.grad is None for weight in weights)
    assert torch.cat(weights).detach().norm().item() == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming

def stop_after(monkeypatch, steps, number):
    """Send this process a signal in the middle of the given step."""
    chosen = runtime.learning_rate

    def rate(step, config, **more):
        if step == steps:
            signal.raise_signal(number)
        return chosen(step, config, **more)
    monkeypatch.setattr(runtime, "learning_rate", rate)


@pytest.mark.parametrize("stage, dataset, more", [
    ("smt", "retrieval", []), ("smt", "fables", ["--encoder=causal", "--grad_accum=2"]),
    *(("smt", "fables", [*TRUNK_FIRST(n).split(), "--optimizer=muon"]) for n in (1, 3, 5)),  # it stops at step 3
    ("bptt", "fables", []), ("transformer", "fables", ["--seq_len=12"]), ("dmt", "retrieval", []),
    *((stage, "fables", ["--optimizer=muon"]) for stage in ("smt", "bptt", "transformer")),
    ("dmt", "fables", ["--optimizer=muon", "--horizon=3", "--label_stride=2", "--p_start=0"])])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_and_resumed_equals_one_that_was_not_bit_for_bit(tmp_path, monkeypatch, data_dir, smt_run, stage,
                                                                               dataset, more, number):
    script, more = TRAIN[stage], [*more, "--max_iters=6", "--eval_interval=2", "--lr_decay=cosine"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    trained(script, *flags(stage, data_dir, smt_run, whole, dataset), *more)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, number)
        trained(script, *flags(stage, data_dir, smt_run, halves, dataset), *more)
    assert torch.load(halves / "ckpt.pt", weights_only=True)["step"] == 3 and metrics(halves)[-1]["step"] == 3
    trained(script, *flags(stage, data_dir, smt_run, halves, dataset), *more, "--resume")
    a, b = checkpoint(whole), checkpoint(halves)
    assert_same_bits(a, b)
    assert a[".step"] == 6 and any(name.startswith(".optimizers.0.state") for name in a)
    assert any(name.startswith(".optimizers.1.state") for name in a) == ("--optimizer=muon" in more)
    assert metrics(whole) == metrics(halves)


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(tmp_path, data_dir, smt_run):
    for folder, parts in (("whole", [6]), ("parts", [2, 4, 6])):
        for steps in parts:
            trained(train_smt, *flags("smt", data_dir, smt_run, tmp_path / folder), "--eval_interval=2",
                    f"--max_iters={steps}", f"--resume={steps > parts[0]}")
    assert_same_bits(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert [line["step"] for line in metrics(tmp_path / "whole")] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_resuming_needs_a_checkpoint_of_the_same_stage_and_architecture(tmp_path, data_dir, smt_run):
    refused(call(train_smt, *flags("smt", data_dir, smt_run, tmp_path / "none"), "--resume"), 1, "there is no", "ckpt.pt")
    shutil.copytree(smt_run("retrieval"), tmp_path / "run")
    for change in ("--d_model=16", "--updater_layers=2", "--n_heads=1", "--updater=gru", "--encoder=causal", "--context_len=9",
                   "--conv_width=2"):
        refused(call(train_smt, *flags("smt", data_dir, smt_run, tmp_path / "run"), change, "--resume"), 1, "another architecture")
    for stage in ("bptt", "dmt", "transformer"):
        refused(call(TRAIN[stage], *flags(stage, data_dir, smt_run, tmp_path / "run"), "--resume"), 1, "is of another stage, smt")
    result = call(train_smt, *flags("smt", data_dir, smt_run, tmp_path / "run"), "--optimizer=muon", "--resume")
    refused(result, 1, "or another --optimizer")
    refused(call(train_smt, *flags("smt", data_dir, smt_run, tmp_path / "run", "fables"), "--resume"), 1, "was trained on retrieval")
    trained(train_smt, *flags("smt", data_dir, smt_run, tmp_path / "run"), "--resume")


def test_a_log_line_that_a_crash_cut_off_does_not_prevent_resuming(tmp_path, data_dir, smt_run):
    shutil.copytree(smt_run("retrieval"), tmp_path / "run")
    before = metrics(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "tok')
    trained(train_smt, *flags("smt", data_dir, smt_run, tmp_path / "run"), "--resume")
    assert metrics(tmp_path / "run") == before


def test_resuming_says_from_where_and_which_flags_are_others(tmp_path, data_dir, smt_run):
    arguments = flags("smt", data_dir, smt_run, tmp_path)
    trained(train_smt, *arguments)
    assert trained(train_smt, *arguments, "--resume").out.splitlines()[1] == "resumed at step 4"
    changed = trained(train_smt, *arguments, "--resume", "--lr=0.5", "--max_iters=6").out.splitlines()[1]
    assert changed == "resumed at step 4; --max_iters=6, was 4; --lr=0.5, was 0.01"


def test_a_run_is_not_resumed_beyond_its_end(tmp_path, data_dir, smt_run):
    arguments = flags("smt", data_dir, smt_run, tmp_path)
    trained(train_smt, *arguments)
    before = (tmp_path / "metrics.jsonl").read_text()
    refused(call(train_smt, *arguments, "--resume", "--max_iters=3"), 2, "at step 4 already, beyond --max_iters=3")
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_run_of_a_version_with_other_flags_is_resumed_or_refused_in_one_line(tmp_path, data_dir, smt_run):
    arguments = flags("smt", data_dir, smt_run, tmp_path)
    trained(train_smt, *arguments)
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    del content["config"]["positions"], content["config"]["lr_decay"]
    content["config"]["lambda_gone"] = 1.0
    torch.save(content, tmp_path / "ckpt.pt")
    trained(train_smt, *arguments, "--resume", "--max_iters=5")
    del content["model_config"]["n_heads"]
    torch.save(content, tmp_path / "ckpt.pt")
    refused(call(train_smt, *arguments, f"--init_from={tmp_path}"), 1, "another architecture: --n_heads=None, not 2")
    del content["spent"]
    torch.save(content, tmp_path / "ckpt.pt")
    refused(call(train_smt, *arguments, "--resume"), 1, "is not a checkpoint of this project")


def test_several_processes_agree_to_stop_soon_however_seldom_they_log(tmp_path):
    run = runtime.Run(torch.device("cpu"), 0, 2, tmp_path, False, log_interval=1000, stop_asked=True)
    run.sum = lambda tensor: tensor                     # as if the other process was not asked
    assert [step for step in range(1, 31) if run.should_stop(step)] == [10, 20, 30]


def test_several_processes_do_not_share_one_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(call(train_smt, "--device=cuda:1"), 2, "--device=cuda:1 is a single one")


def test_too_little_memory_is_one_line():
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")
    refused(call(SimpleNamespace(main=main, __file__="train_smt.py")), 1, "CUDA out of memory", "--grad_accum")


def test_a_run_whose_first_phase_would_end_elsewhere_is_not_resumed(tmp_path, data_dir, smt_run):
    """Its next steps would train the trunk again, and then replace the decoder."""
    arguments = [*flags("smt", data_dir, smt_run, tmp_path), *TRUNK_FIRST(2).split(), "--max_iters=3"]
    trained(train_smt, *arguments)
    before, told = checkpoint(tmp_path), (tmp_path / "config.json").read_text()
    for n in (0, 1, 3, 5):
        result = call(train_smt, *arguments, "--resume", f"--trunk_iters={n}", "--max_iters=6")
        refused(result, 2, f"--resume goes on with the same --trunk_iters: --trunk_iters={n}, was 2")
    assert_same_bits(before, checkpoint(tmp_path))
    assert (tmp_path / "config.json").read_text() == told
    trained(train_smt, *arguments, "--resume", "--max_iters=6")


def test_a_run_that_would_begin_with_other_weights_is_not_resumed(tmp_path, data_dir, smt_run):
    """With --init_from there is no first phase: its steps would change their objective."""
    arguments = [*flags("smt", data_dir, smt_run, tmp_path / "a"), *TRUNK_FIRST(3).split()]
    begun = [*arguments, f"--out_dir={tmp_path / 'b'}", f"--init_from={tmp_path / 'a'}"]
    trained(train_smt, *arguments)
    trained(train_smt, *begun, "--max_iters=2")
    before, told = checkpoint(tmp_path / "b"), (tmp_path / "b" / "config.json").read_text()
    refused(call(train_smt, *begun, "--init_from=", "--resume"), 2,
            f"--resume goes on with the same --init_from: --init_from=, was {tmp_path / 'a'}")
    refused(call(train_smt, *arguments, f"--init_from={tmp_path / 'b'}", "--max_iters=6", "--resume"), 2, "the same --init_from")
    assert_same_bits(before, checkpoint(tmp_path / "b"))
    assert (tmp_path / "b" / "config.json").read_text() == told
    trained(train_smt, *begun, "--resume")
    assert all("loss_dec" in line for line in metrics(tmp_path / "b") if "train_loss" in line)


def test_what_the_log_has_an_evaluation_of_is_saved(tmp_path, monkeypatch, data_dir, smt_run):
    save, saved = torch.save, []

    def full(content, path):
        if saved:
            raise OSError(28, "No space left on device")
        save(content, path)
        saved.append(content["step"])

    monkeypatch.setattr(torch, "save", full)
    refused(call(train_smt, *flags("smt", data_dir, smt_run, tmp_path), "--eval_interval=2"), 1, "No space left on device")
    assert [line["step"] for line in metrics(tmp_path) if "val_rnn_loss" in line] == saved == [0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_data_is_prepared_ends_the_run_at_once_and_leaves_nothing(tmp_path, data_dir, smt_run, monkeypatch, number):
    generate = fables.generate

    def interrupted(*arguments):
        assert any((tmp_path / "data").iterdir())                   # the folder that becomes the data set
        signal.raise_signal(number)
        return generate(*arguments)
    monkeypatch.setattr(fables, "generate", interrupted)
    result = call(train_smt, *flags("smt", tmp_path / "data", smt_run, tmp_path / "run", "fables"))
    assert result.status == 130 and result.err.splitlines()[-1] == "interrupted"
    assert not (tmp_path / "run").exists() and not any((tmp_path / "data").iterdir())


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    run = runtime.Run(torch.device("cpu"), 0, 1, tmp_path / "gone", False, 1)
    with pytest.raises(runtime.DataError, match="cannot write .*metrics.jsonl: No such file"):
        run.log(1)


# ---------------------------------------------------------------------------------------------------------------------
# A run's files

@pytest.mark.parametrize("stage", TRAIN)
def test_a_run_writes_its_config_a_log_and_a_checkpoint_and_nothing_else(tmp_path, data_dir, smt_run, stage):
    result = trained(TRAIN[stage], *flags(stage, data_dir, smt_run, tmp_path), "--eval_interval=2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt", "config.json", "metrics.jsonl"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["out_dir"] == str(tmp_path) and TRAIN[stage].Config(**config)
    lines = metrics(tmp_path)
    training, held_out = ([line for line in lines if key in line] for key in ("train_loss", "val_rnn_loss"))
    assert [line["step"] for line in training] == [1, 2, 3, 4] and [line["step"] for line in held_out] == [0, 2, 4]
    assert all({"tokens", "flops", "sequential_flops", "grad_norm", "lr"} <= line.keys() for line in training)
    assert [line["tokens"] for line in training] == [128 * i for i in range(1, 5)]
    assert all(0 < line["sequential_flops"] < line["flops"] for line in training)
    assert f"{stage}: retrieval" in result.out and "float32" in result.out and "compile off" in result.out
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert content["stage"] == stage and content["step"] == 4
    assert content["initial_memory"].shape == (0 if stage == "transformer" else 2, 8)
    assert content["data"]["name"] == "retrieval" and not any(name.startswith(("module", "_orig")) for name in content["model"])


@pytest.mark.parametrize("first, second", [("smt", "bptt"), ("dmt", "bptt"), ("bptt", "smt"), ("dmt", "dmt"), ("smt", "smt"),
                                           ("bptt", "bptt"), ("transformer", "transformer")])
def test_weights_go_from_stage_to_stage(tmp_path, data_dir, smt_run, first, second):
    trained(TRAIN[first], *flags(first, data_dir, smt_run, tmp_path / "a"))
    trained(TRAIN[second], *flags(second, data_dir, smt_run, tmp_path / "b"), f"--init_from={tmp_path / 'a'}", "--max_iters=1", "--lr=1e-9")
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in "ab")
    shared = [name for name in a["model"] if name in b["model"] and name != "initial_memory"]
    assert {name.split(".")[0] for name in shared} >= ({"decoder"} if first == "transformer" else {"updater", "readout"})
    for name in shared:
        torch.testing.assert_close(a["model"][name], b["model"][name], rtol=0, atol=1e-6)
    if second == "bptt":
        torch.testing.assert_close(a["initial_memory"], b["initial_memory"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", ["--d_model=16", "--updater_layers=2", "--updater=gru", "--n_heads=1", "--memory_tokens=3"])
def test_weights_of_another_architecture_are_refused(tmp_path, data_dir, smt_run, change):
    for script in (train_smt, train_bptt):
        stage = script.__name__.removeprefix("train_")
        result = call(script, *flags(stage, data_dir, smt_run, tmp_path), change, f"--init_from={smt_run('retrieval')}")
        refused(result, 1, "another architecture")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["bptt", "transformer"])
def test_labels_need_an_encoder(tmp_path, data_dir, smt_run, stage):
    trained(TRAIN[stage], *flags(stage, data_dir, smt_run, tmp_path / "a"))
    refused(call(train_dmt, *flags("dmt", data_dir, smt_run, tmp_path / "b"), f"--init_from={tmp_path / 'a'}"), 2, "encoder")


class Malicious:
    """Unpickling it makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def damaged(path, how):
    good = path.read_bytes()
    content = torch.load(path, weights_only=True)
    if how == "truncated":
        path.write_bytes(good[:len(good) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "missing":
        path.unlink()
    elif how == "malicious":
        torch.save(content | {"config": Malicious(path.parent / "was-here")}, path)
    elif how == "malicious pickle":
        path.write_bytes(pickle.dumps(Malicious(path.parent / "was-here"), 2))
    elif how == "other":
        torch.save({"state_dict": content["model"]}, path)
    elif how == "list":
        torch.save([1, 2], path)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "missing", "malicious", "malicious pickle", "other", "list"])
def test_a_damaged_or_malicious_checkpoint_is_refused_in_one_line_by_every_script(tmp_path, data_dir, smt_run, how):
    shutil.copytree(smt_run("fables"), tmp_path / "run")
    damaged(tmp_path / "run" / "ckpt.pt", how)
    for stage, script in TRAIN.items():
        arguments = flags(stage, data_dir, smt_run, tmp_path / "new", "fables")
        refused(call(script, *arguments, f"--init_from={tmp_path / 'run'}"), 1, "ckpt.pt")
        refused(call(script, *arguments, "--resume", f"--out_dir={tmp_path / 'run'}"), 1, "ckpt.pt")
    for script in (sample, evaluate):
        refused(call(script, f"--ckpt={tmp_path / 'run'}", f"--data_dir={data_dir}"), 1, "ckpt.pt")
    assert not (tmp_path / "run" / "was-here").exists() and not (tmp_path / "new").exists()


def test_a_checkpoint_of_another_data_set_is_refused(tmp_path, data_dir, smt_run):
    for stage, script in TRAIN.items():
        arguments = flags(stage, data_dir, smt_run, tmp_path / "new", "fables")
        refused(call(script, *arguments, f"--init_from={smt_run('retrieval')}"), 1, "trained on retrieval (vocabulary 5)", "fables")
    data.prepare("retrieval", tmp_path, train_tokens=4000, val_tokens=400, symbols=7)
    for script in (sample, evaluate):
        refused(call(script, f"--ckpt={smt_run('retrieval')}", f"--data_dir={tmp_path}"), 1, "vocabulary 5", "vocabulary 8")


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    path.write_text("good")

    def fails_after(content, error):
        def write(temporary):
            assert temporary != path and temporary.parent == path.parent
            temporary.write_text(content)
            raise error
        return write

    with pytest.raises(DataError, match="cannot write .*Not a directory"):
        runtime.write_atomically(path / "within", lambda temporary: temporary.write_text("half"))
    for error in (OSError(28, "No space left on device"), RuntimeError("enforce fail: file write failed")):
        with pytest.raises(DataError, match="cannot write .*ckpt.pt: (No space|enforce fail)"):
            runtime.write_atomically(path, fails_after("half", error))
    with pytest.raises(KeyboardInterrupt):
        runtime.write_atomically(path, fails_after("half", KeyboardInterrupt()))
    assert path.read_text() == "good" and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]
    runtime.write_atomically(path, lambda temporary: temporary.write_text("better"))
    assert path.read_text() == "better" and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path, data_dir, smt_run):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        refused(call(train_smt, *flags("smt", data_dir, smt_run, tmp_path / place)), 1, str(tmp_path / place))


@pytest.mark.parametrize("stage", TRAIN)
def test_a_loss_that_became_nan_ends_the_run_in_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch, data_dir, smt_run, stage):
    arguments = [*flags(stage, data_dir, smt_run, tmp_path), "--max_iters=50", "--eval_interval=2"]
    step = runtime.optimizer_step

    def poisoned(optimizers, lr):
        parameters = optimizers[0].param_groups[0]["params"]
        if poisoned.steps == 3:
            for parameter in parameters:
                (parameter.grad if where == "gradient" else parameter.data).fill_(float("nan"))
        poisoned.steps += 1
        return step(optimizers, lr)

    monkeypatch.setattr(runtime, "optimizer_step", poisoned)
    for where, log_interval, message in (("gradient", 1, "gradient's norm became nan before step 4"),
                                         ("weight", 1000, "the held-out loss is nan at step 4"),
                                         ("weight", 5, "the loss became nan before step 5")):
        poisoned.steps = 0
        every = 1000 if log_interval == 5 else 2
        result = call(TRAIN[stage], *arguments, f"--log_interval={log_interval}", f"--eval_interval={every}")
        refused(result, 1, message, "checkpoint stays")
        if every == 1000:
            continue
        content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
        assert content["step"] == 2 and all(w.isfinite().all() for w in content["model"].values())
        assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    monkeypatch.undo()
    trained(TRAIN[stage], *arguments, "--max_iters=4", "--resume")


def test_an_evaluation_never_cuts_off_what_a_task_asks(tmp_path, data_dir, smt_run):
    found = []
    for length in (4, 16):                              # documents have 8 tokens
        trained(train_smt, *flags("smt", data_dir, smt_run, tmp_path), f"--eval_len={length}")
        found.append(runtime.read_log(tmp_path / "metrics.jsonl")[-1]["val_rnn_loss"])
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("seed", [-1, 2**64 + 5])
def test_any_whole_number_is_a_seed(tmp_path, data_dir, smt_run, seed):
    trained(train_smt, *flags("smt", data_dir, smt_run, tmp_path, "fables"), f"--seed={seed}", "--max_iters=1")
    trained(sample, f"--ckpt={tmp_path}", f"--seed={seed}", "--max_new_tokens=3")


def test_the_trunk_is_trained_first_then_all_and_no_log_line_averages_both(tmp_path, monkeypatch, data_dir, smt_run):
    arguments = [*flags("smt", data_dir, smt_run, tmp_path), *TRUNK_FIRST(4).split(), "--log_interval=2", "--eval_interval=2",
                 "--max_iters=8"]
    stopped, tries = [], (2, 4, 6)
    for step in tries:
        with monkeypatch.context() as patch:
            stop_after(patch, step - 1, signal.SIGTERM)
            trained(train_smt, *arguments, f"--resume={step > 2}")
        stopped.append(torch.load(tmp_path / "ckpt.pt", weights_only=True))
    assert [checkpoint["step"] for checkpoint in stopped] == list(tries)
    trunk = ("encoder.embed", "encoder.transformer", "decoder.norm", "decoder.head")
    for before, after, moved in ((0, 1, trunk), (1, 2, ("encoder", "decoder", "updater", "readout"))):
        for name, weight in stopped[before]["model"].items():
            assert torch.equal(weight, stopped[after]["model"][name]) != name.startswith(moved), name
    trained(train_smt, *arguments, "--resume")
    lines = [line for line in metrics(tmp_path) if "train_loss" in line]
    terms = [{name.removeprefix("loss_") for name in line if name.startswith("loss_")} for line in lines]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert terms == [{"trunk"}] * 2 + [{"trunk", "dec", "dyn", "unif", "read"}] * 2
    assert all(line["train_loss"] == line["loss_trunk"] for line in lines[:2])


def test_a_log_line_averages_the_steps_of_one_phase(tmp_path, data_dir, smt_run):
    trained(train_smt, *flags("smt", data_dir, smt_run, tmp_path), *TRUNK_FIRST(3).split(), "--max_iters=8", "--log_interval=4")
    lines = [line for line in runtime.read_log(tmp_path / "metrics.jsonl") if "train_loss" in line]
    assert [line["step"] for line in lines] == [3, 4, 8] and ["loss_dec" in line for line in lines] == [False, True, True]
    assert lines[0]["train_loss"] == pytest.approx(lines[0]["loss_trunk"])


@pytest.mark.parametrize("trunk_iters", [1, 0])
def test_the_decoder_goes_on_from_the_trunk_after_its_phase(tmp_path, data_dir, smt_run, trunk_iters):
    arguments = [*flags("smt", data_dir, smt_run, tmp_path), *TRUNK_FIRST(trunk_iters).split()]
    trained(train_smt, *arguments, "--max_iters=2", "--lr=1e-9")
    weights = checkpoint(tmp_path)
    for name in ("embed.embed.weight", "embed.mix.weight", "transformer.blocks.0.qkv.weight", "transformer.blocks.0.down.weight"):
        same = torch.allclose(weights[f".model.encoder.{name}"], weights[f".model.decoder.{name}"], rtol=0, atol=1e-6)
        assert same == (trunk_iters > 0), name


def test_a_run_that_begins_with_given_weights_has_no_first_phase(tmp_path, data_dir, smt_run):
    arguments = [*flags("smt", data_dir, smt_run, tmp_path / "first"), *TRUNK_FIRST(2).split()]
    trained(train_smt, *arguments)
    trained(train_smt, *arguments, f"--init_from={tmp_path / 'first'}", f"--out_dir={tmp_path / 'second'}")
    assert all("loss_dec" in line for line in metrics(tmp_path / "second") if "train_loss" in line)


@pytest.mark.parametrize("arguments", ["", "--preset=small", "--dataset=copy", "--dataset=keyvalue", "--dataset=keyvalue --preset=small",
                                       "--dataset=tinystories --preset=tiny"])
def test_presets_leave_steps_after_the_first_phase_and_bptt_trains_the_same_rnn_on_the_same_rows(arguments):
    smt, bptt = (runtime.parse(script.Config, arguments.split(), script.PRESETS) for script in (train_smt, train_bptt))
    assert 0 < smt.trunk_iters <= smt.max_iters / 2
    for name in ("updater", "d_model", "n_heads", "memory_tokens", "updater_layers", "decoder_layers", "seq_len", "p_start"):
        assert getattr(smt, name) == getattr(bptt, name), name


def test_an_rnn_is_fine_tuned_by_bptt_whatever_the_encoder_was(tmp_path, data_dir, smt_run):
    trained(train_smt, *flags("smt", data_dir, smt_run, tmp_path / "smt"), "--encoder=causal", "--encoder_layers=2")
    trained(train_bptt, *flags("bptt", data_dir, smt_run, tmp_path / "bptt"), f"--init_from={tmp_path / 'smt'}")


def test_a_trunk_reads_rows_and_documents_longer_than_its_context(tmp_path, data_dir, smt_run):
    arguments = [*flags("smt", data_dir, smt_run, tmp_path, "fables"), *TRUNK_FIRST(0).split()]
    trained(train_smt, *arguments, "--seq_len=20", "--eval_len=30")


# ---------------------------------------------------------------------------------------------------------------------
# Processes

def test_a_process_that_is_told_to_stop_saves_and_ends_well(tmp_path, data_dir, smt_run):
    """The one test in which the signal comes from outside."""
    arguments = [*flags("smt", data_dir, smt_run, tmp_path), "--max_iters=1000000"]
    process = subprocess.Popen([sys.executable, ROOT / "train_smt.py", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("step      3"):
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors, errors
    step = torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"]
    lines = metrics(tmp_path)
    assert step >= 3 and lines[-1]["step"] == step and "val_rnn_loss" in lines[-1]


DRIVER = """
import sys
import runtime, train_dmt, train_smt, train_transformer
def main():
    for line in open(sys.argv[1]):
        name, *arguments = line.split()
        sys.argv[1:] = arguments
        {"smt": train_smt, "dmt": train_dmt, "transformer": train_transformer}[name].main()
runtime.run_main(main)
"""


def test_two_processes_or_micro_batches_train_like_one_process(tmp_path, data_dir, smt_run):
    """Runs of the same global batch; the two processes talk through gloo. Uniformity is that within a micro-batch: with it one
    process, whose batch is whole, trains otherwise."""
    more = {"smt": ["--lambda_unif=0"], "smt-trunk": [*TRUNK_FIRST(2).split(), "--lambda_unif=0"],
            "smt-unif": ["--lambda_unif=0.1"], "dmt": ["--horizon=6"], "dmt-stride": ["--label_stride=2"], "transformer": []}
    stages = {name: name.split("-")[0] for name in more}
    cases = {name: [*flags(stages[name], data_dir, smt_run, "", "fables"), "--seq_len=16", *some] for name, some in more.items()}
    (tmp_path / "driver.py").write_text(DRIVER)
    lines = [" ".join([stages[name], *case, "--eval_interval=2", f"--out_dir={tmp_path / name}-2"]) for name, case in cases.items()]
    (tmp_path / "runs").write_text("\n".join(lines))
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "driver.py",
                             tmp_path / "runs"], capture_output=True, text=True, timeout=120,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stdout and result.stdout.count("step      4  ") == 2 * len(cases)
    for name, case in cases.items():
        for kind, more in (("1", []), ("accumulated", ["--grad_accum=2"])):
            trained(TRAIN[stages[name]], *case, "--eval_interval=2", f"--out_dir={tmp_path / name}-{kind}", *more)
        for first, second in (("accumulated", "2"), *([("1", "2")] if name != "smt-unif" else [])):
            one, other = (Path(f"{tmp_path / name}-{kind}") for kind in (first, second))
            for a, b in zip(metrics(one), metrics(other), strict=True):
                assert a.keys() == b.keys()
                for term in a.keys() - ({"loss_unif"} if first == "1" else set()):
                    assert a[term] == pytest.approx(b[term], rel=1e-5, abs=1e-6), term
            one, other = checkpoint(one), checkpoint(other)
            assert one.keys() == other.keys()
            for key, value in one.items():
                if key.startswith((".model.", ".initial_memory")) and value.is_floating_point():
                    torch.testing.assert_close(other[key], value, rtol=0, atol=1e-5, msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("path", ["README.md", *(f"{name}.py" for name in
                                  ("data", *(script.__name__ for script in TRAIN.values()), "sample", "evaluate", "bench", "reproduce"))])
def test_every_documented_command_is_one_that_its_script_takes(path):
    text = (ROOT / path).read_text()
    text = text if path == "README.md" else text.split('"""')[1]
    commands = re.findall(r"(?:python|torchrun --nproc_per_node=\d+) (\w+)\.py([^\n`#&]*)", text)
    assert commands
    for name, arguments in commands:
        script = importlib.import_module(name)
        if name == "reproduce":                     # its flags come after the names of experiments
            script.command_line(shlex.split(arguments))
            continue
        runtime.parse(script.Config, shlex.split(arguments), getattr(script, "PRESETS", None))


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs

def double_after(module, a, b):
    """Two results from two tensors, the second a view of one of them."""
    return module(a) + b, b.T


def test_without_graphs_a_captured_function_is_the_function_without_gradients():
    module, a, b = torch.nn.Linear(3, 3), torch.randn(3, 3), torch.randn(3, 3)
    found = runtime.captured(double_after)(module, a, b)
    for ours, expected in zip(found, double_after(module, a, b), strict=True):
        assert torch.equal(ours, expected) and not ours.requires_grad
    (found[0] * torch.ones(3, requires_grad=True)).sum().backward()             # what it returns may enter a loss


def test_a_graph_is_captured_once_for_each_module_and_shape_and_what_it_returns_is_not_overwritten(monkeypatch):
    """With a graph that calls the function again on the tensors it was captured with, as a CUDA graph does."""
    captures = []

    def capture(function, module, tensors):
        inputs = [tensor.clone() for tensor in tensors]
        outputs = tuple(torch.full_like(output, torch.nan) for output in function(module, *inputs))

        def replay():
            for output, value in zip(outputs, function(module, *inputs)):
                output.copy_(value)
        captures.append((module, tensors[0].shape))
        return inputs, SimpleNamespace(replay=replay), outputs

    monkeypatch.setattr(runtime, "capture", capture)
    monkeypatch.setattr(runtime, "GRAPH_DEVICE", "cpu")
    call, modules, kept = runtime.captured(double_after), [torch.nn.Linear(3, 3) for _ in range(2)], []
    for i in range(12):
        module, a, b = modules[i % 2], torch.randn(2 + i % 3, 3), torch.randn(2 + i % 3, 3)
        with torch.inference_mode(i % 4 == 1), torch.no_grad():                 # whichever the caller is in
            kept.append((call(module, a, b), double_after(module, a, b)))
            if i % 4 != 1:
                module.weight += 1                                              # in place, as an optimiser does
    assert captures == [(modules[i % 2], (2 + i % 3, 3)) for i in range(6)]
    for found, expected in kept:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert not torch.is_inference(kept[0][0][0])
