"""Optimisers, the folder of a run, resuming, signals, the log, CUDA graphs."""
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PAIRS, QUICK, SIZES, call, refused, trained

import model
import runtime
import sample
import train_smt
from lib import graphs, optim
from lib.checkpoints import load, newer_source, source_of
from lib.cli import DataError
from runtime import RunConfig, read_log
from sources.prepare import prepare

ROOT = Path(runtime.__file__).parent


# ----------------------------------------------------------------------------------------------------------
# Learning rate and optimiser

def test_learning_rate_warms_up_stays_and_decays_to_a_tenth(monkeypatch):
    monkeypatch.setattr(optim, "WARMUP", 0.1)
    config = RunConfig(lr=2.0, max_iters=100)
    rates = [optim.learning_rate(step, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)]) and rates[10] == 2.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert [rates[55], rates[100]] == pytest.approx([1.1, 0.2])
    late = [optim.learning_rate(step, replace(config, decay=0.5), begin=20) for step in range(101)]
    assert late[:10] == rates[:10] and set(late[10:61]) == {2.0}
    assert [late[80], late[100]] == pytest.approx([1.1, 0.2])
    assert optim.learning_rate(0, RunConfig(lr=2.0, max_iters=4)) == 2.0        # less than a step of warm-up


MATRICES = {                # by the end of their names; what has another end is not decayed
    "hidden": ("qkv.weight", "out.weight", "up.weight", "down.weight", "mix.weight", "present.weight",
               "layers.0.1.weight", "layers.0.3.weight", "updater.input.weight", "updater.hidden.weight"),
    "others": ("head.weight", "gate.weight", "registers", "initial_memory")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("sizes", [
    dict(encoder="causal", updater="mlp", conv_width=2), {}, dict(updater="gru")],
    ids=["causal-mlp", "window-transformer", "window-gru"])
def test_muon_gets_the_hidden_matrices_adamw_the_rest_and_all_are_decayed_but_embeddings(
        sizes, optimizer):
    one_layer = dict(d_model=8, n_heads=2, updater_layers=1, encoder_layers=1)
    networks = model.build(model.ModelConfig(**one_layer, **sizes), 5)
    networks.initial_memory = torch.nn.Parameter(torch.randn(4, 8))         # as BPTT has it
    networks["readout"].requires_grad_(False)                               # what is frozen belongs to none
    names, trained_by, decay = {id(p): name for name, p in networks.named_parameters()}, {}, {}
    found = optim.make_optimizers(networks, RunConfig(optimizer=optimizer, lr=0.25, weight_decay=0.5))
    for one in found:
        for group in one.param_groups:
            assert group["lr"] == 0.25
            for name in (names[id(p)] for p in group["params"]):
                assert name not in trained_by, name
                trained_by[name], decay[name] = type(one).__name__, group["weight_decay"]
    assert trained_by.keys() == {name for name in names.values() if not name.startswith("readout")}
    hidden, others = ({name for name in trained_by if name.endswith(ends)} for ends in MATRICES.values())
    by_muon = {name for name, kind in trained_by.items() if kind == "Muon"}
    assert by_muon == (hidden if optimizer == "muon" else set())
    assert [type(one).__name__ for one in found] == ["AdamW", "Muon"][:len(found)]
    assert [group["weight_decay"] for group in found[0].param_groups] == [0.5, 0.0]
    assert {name for name, value in decay.items() if value == 0.5} == hidden | others
    assert set(decay.values()) == {0.5, 0.0}
    linear = {f"{name}.weight" for name, m in networks.named_modules() if isinstance(m, torch.nn.Linear)}
    linear = {name for name in linear if name.split(".")[-2] not in ("head", "gate")}
    assert hidden == linear & trained_by.keys()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_muon_makes_the_steps_of_torchs_muon_which_computes_in_bf16(shape):
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    settings = dict(lr=0.1, weight_decay=0.5)
    optimizers = optim.Muon([ours], **settings), torch.optim.Muon(
        [theirs], **settings, adjust_lr_fn="match_rms_adamw")
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
    found = optim.make_optimizers(networks, RunConfig(optimizer="muon", lr=1.0))
    for rate in (1e-3, 0.0):
        before = [p.detach().clone() for p in networks.parameters()]
        for p in networks.parameters():
            p.grad = torch.randn_like(p)
        optim.optimizer_step(found, rate)
        for p, old in zip(networks.parameters(), before):
            moved = (p - old).square().mean().sqrt().item()
            assert p.grad is None and moved == pytest.approx(rate, rel=0.9, abs=1e-9)


@pytest.mark.parametrize("clip, expected", [(1.0, 1.0), (100.0, 5.0)])
def test_gradients_are_clipped_and_the_norm_before_is_told(monkeypatch, clip, expected):
    monkeypatch.setattr(optim, "GRAD_CLIP", clip)
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]        # each of an optimiser of its own
    for weight, gradient in zip(weights, (3.0, 4.0)):
        weight.grad = torch.tensor([gradient])
    norm = optim.optimizer_step([torch.optim.SGD([weight], lr=9.0) for weight in weights], 1.0)
    assert norm == 5 and all(weight.grad is None for weight in weights)
    assert torch.cat(weights).detach().norm().item() == pytest.approx(expected, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------
# A run's folder

@pytest.fixture
def arguments(tmp_path, data_dir):
    """Of a short run of SMT in tmp_path/run."""
    where = [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}"]
    return [*QUICK, *SIZES, *PAIRS, "--dataset=retrieval", *where]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def training_lines(folder):
    return [line for line in read_log(folder / "metrics.jsonl") if "train_loss" in line]


def test_the_same_command_again_moves_the_old_run_and_loses_nothing(tmp_path, arguments):
    runs = []
    for seed in (1, 2, 3):
        result = trained(train_smt, *arguments, f"--seed={seed}")
        runs.append(files(tmp_path / "run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert runs == [files(tmp_path / name) for name in ("run.1", "run.2", "run")]
    assert str(tmp_path / "run.2") in result.out and runs[0]["ckpt.pt"] != runs[1]["ckpt.pt"]


@pytest.mark.parametrize("source", ["run", "run/ckpt.pt", "run/../run"])
def test_a_run_does_not_start_from_the_folder_that_it_writes_to(tmp_path, arguments, source):
    """The folder would be moved, and then not be what the new run's config names."""
    trained(train_smt, *arguments)
    before = files(tmp_path / "run")
    refused(call(train_smt, *arguments, f"--init_from={tmp_path / source}"), 2, "--out_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and files(tmp_path / "run") == before


def test_a_source_that_was_trained_anew_is_found_out(tmp_path, arguments):
    trained(train_smt, *arguments)
    (tmp_path / "run").rename(tmp_path / "source")
    trained(train_smt, *arguments, f"--init_from={tmp_path / 'source'}")
    checkpoint = load(tmp_path / "run")
    assert source_of(checkpoint) == tmp_path / "source" and newer_source(checkpoint) is None
    os.utime(tmp_path / "source" / "ckpt.pt", (2 * time.time(),) * 2)
    assert newer_source(checkpoint) == tmp_path / "source" / "ckpt.pt"


def test_resume_auto_goes_on_if_there_is_a_run_and_begins_one_if_not(tmp_path, arguments):
    for steps in (2, 4):
        trained(train_smt, *arguments, "--resume=auto", f"--max_iters={steps}")
        assert [line["step"] for line in training_lines(tmp_path / "run")] == list(range(1, steps + 1))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    refused(call(train_smt, *arguments, "--resume", f"--out_dir={tmp_path / 'none'}"), 1, tmp_path / "none")


def test_a_run_that_torchrun_starts_again_resumes_by_itself(tmp_path, arguments, monkeypatch):
    arguments, step, calls = [*arguments, "--eval_interval=2"], train_smt.optimizer_step, []

    def crashes_once(*some):
        calls.append(some)
        if len(calls) == 4:
            raise RuntimeError("a crash")
        return step(*some)

    monkeypatch.setattr(train_smt, "optimizer_step", crashes_once)
    with pytest.raises(RuntimeError, match="a crash"):
        call(train_smt, *arguments)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    trained(train_smt, *arguments)
    assert [line["step"] for line in training_lines(tmp_path / "run")] == [1, 2, 3, 4] and len(calls) == 6
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    trained(train_smt, *arguments, "--max_iters=2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1"]


def test_a_run_that_torchrun_starts_again_leaves_the_run_of_another_command_alone(
        tmp_path, arguments, monkeypatch):
    trained(train_smt, *arguments)
    before = files(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    refused(call(train_smt, *arguments, "--seed=5"), 2, "--seed=5")
    assert files(tmp_path / "run") == before and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("resume", [False, True])
def test_processes_that_do_not_see_the_same_folder_do_not_resume(tmp_path, resume):
    run = runtime.Run(RunConfig(), "smt", torch.device("cpu"), 0, 2, tmp_path, resume, False)
    run.all_reduce = lambda resumes: resumes + (not resume)         # the other process has the other answer
    with pytest.raises(DataError, match="ckpt.pt"):
        runtime.begin(run, None, torch.nn.ModuleDict(), [])
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_after_its_end_keeps_the_evaluation_there(tmp_path, arguments):
    for steps in (3, 7):
        trained(train_smt, *arguments, "--resume=auto", "--eval_interval=2", f"--max_iters={steps}")
    lines = [line["step"] for line in read_log(tmp_path / "run" / "metrics.jsonl") if "val_rnn_loss" in line]
    assert lines == [0, 2, 3, 4, 6, 7]


@pytest.mark.parametrize("flag", ["--resume=no", "--resume"])
def test_a_folder_in_which_another_process_is_at_work_is_refused_and_left_alone(tmp_path, arguments, flag):
    trained(train_smt, *arguments)
    before = files(tmp_path / "run")
    program = ("import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); "
               "print(flush=True); input()")
    other = subprocess.Popen([sys.executable, "-c", program, tmp_path / "run"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    refused(call(train_smt, *arguments, flag, "--max_iters=6"), 1, tmp_path / "run")
    assert files(tmp_path / "run") == before and [path.name for path in tmp_path.iterdir()] == ["run"]
    other.communicate(b"\n")
    trained(train_smt, *arguments, flag, "--max_iters=6")


def test_the_folder_of_a_run_is_locked_while_it_runs(tmp_path, arguments, monkeypatch):
    step, found = train_smt.optimizer_step, []

    def tried(*some):
        folder = os.open(tmp_path / "run", os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found.append("free")
        except BlockingIOError:
            found.append("locked")
        os.close(folder)
        return step(*some)
    monkeypatch.setattr(train_smt, "optimizer_step", tried)
    trained(train_smt, *arguments)
    trained(train_smt, *arguments, "--resume", "--max_iters=6")
    assert found == ["locked"] * 6


def test_a_folder_that_cannot_be_made_is_named(tmp_path, arguments):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        refused(call(train_smt, *arguments, f"--out_dir={tmp_path / place}"), 1, tmp_path / place)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path, arguments):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".ckpt.pt.123.tmp").write_text("half")
    trained(train_smt, *arguments)
    assert sorted(files(tmp_path / "run")) == ["ckpt.pt", "config.json", "metrics.jsonl"]


def test_what_the_log_has_an_evaluation_of_is_saved(tmp_path, monkeypatch, arguments):
    save, saved = torch.save, []

    def full(content, path):
        if saved:
            raise OSError(28, "No space left on device")
        save(content, path)
        saved.append(content["step"])
    monkeypatch.setattr(torch, "save", full)
    refused(call(train_smt, *arguments, "--eval_interval=2"), 1, "ckpt.pt")
    logged = [line["step"] for line in read_log(tmp_path / "run" / "metrics.jsonl") if "val_rnn_loss" in line]
    assert logged == saved == [0]


# ----------------------------------------------------------------------------------------------------------
# Resuming

def test_a_finished_run_goes_on_where_more_steps_are_asked_for(tmp_path, arguments):
    for steps in (2, 4, 6):
        result = trained(train_smt, *arguments, "--eval_interval=2", f"--max_iters={steps}", "--resume=auto")
    lines = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert "resumed at step 4" in result.out and "--max_iters=6, was 4" in result.out


def test_a_run_is_not_resumed_beyond_its_end(tmp_path, arguments):
    trained(train_smt, *arguments)
    before = files(tmp_path / "run")
    refused(call(train_smt, *arguments, "--resume", "--max_iters=3"), 2, "--max_iters=3")
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("change, status", [
    ("--d_model=16", 2), ("--updater_layers=2", 2), ("--n_heads=1", 2), ("--updater=gru", 2),
    ("--encoder=causal", 2), ("--context_len=9", 2), ("--conv_width=2", 2), ("--optimizer=muon", 1),
    ("--dataset=fables", 1)])
def test_a_run_is_not_resumed_with_another_architecture_optimiser_or_data_set(
        tmp_path, arguments, change, status):
    trained(train_smt, *arguments)
    before = files(tmp_path / "run")
    refused(call(train_smt, *arguments, change, "--resume", "--max_iters=6"), status)
    assert files(tmp_path / "run") == before
    trained(train_smt, *arguments, "--resume", "--max_iters=6")


def test_a_log_with_garbage_in_it_is_read(tmp_path, arguments):
    log = tmp_path / "run" / "metrics.jsonl"
    trained(train_smt, *arguments)
    good = log.read_text().splitlines()
    garbage = [b"\xff\xfe\x00", b"[" * 100_000, b"null", b"7", b"[1]", b'"step"', b"{}", b'{"step": "x"}',
               b'{"step": true}', b'{"step": 1.5}', b"9" * 10_000, b'{"step": 5, "tok']
    log.write_bytes(b"\n".join([*garbage, *map(str.encode, good), *garbage]))
    assert read_log(log) == [json.loads(line) for line in good]
    assert read_log(tmp_path / "missing") == []
    trained(train_smt, *arguments, "--resume")
    assert [line["step"] for line in read_log(log)] == [json.loads(line)["step"] for line in good]


def test_a_run_of_a_version_with_other_flags_is_resumed(tmp_path, arguments):
    trained(train_smt, *arguments)
    content = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    del content["config"]["positions"]
    content["config"]["lambda_gone"] = 1.0
    content["optimizers"][0]["param_groups"] = [
        {"params": group["params"], "lr": "high"} for group in content["optimizers"][0]["param_groups"]]
    torch.save(content, tmp_path / "run" / "ckpt.pt")
    trained(train_smt, *arguments, "--resume", "--max_iters=5")


def test_a_run_is_resumed_only_on_the_data_it_was_trained_on(tmp_path, arguments, data_dir):
    """Made anew with another seed: the fingerprint of the bins tells."""
    prepare("retrieval", tmp_path / "data", seed=1, train_tokens=4000, val_tokens=400, length="8", symbols=4)
    trained(train_smt, *arguments)
    other = [*arguments, f"--data_dir={tmp_path / 'data'}", "--max_iters=6"]
    refused(call(train_smt, *other, "--resume"), 1, tmp_path / "run")
    begun = trained(train_smt, *other, f"--init_from={tmp_path / 'run'}", f"--out_dir={tmp_path / 'begun'}")
    warnings = [line for line in begun.out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and str(tmp_path / "run") in warnings[0]
    same = trained(train_smt, *arguments, f"--init_from={tmp_path / 'run'}", f"--out_dir={tmp_path / 'same'}")
    assert "warning: " not in same.out


@pytest.mark.parametrize("seed", [-1, 2**63 - 1])
def test_any_number_below_2_to_the_63_is_a_seed(tmp_path, arguments, data_dir, seed):
    trained(train_smt, *arguments, f"--seed={seed}", "--max_iters=1")
    assert call(sample, f"--ckpt={tmp_path / 'run'}", f"--seed={seed}", f"--data_dir={data_dir}").status == 0
    refused(call(train_smt, *arguments, f"--seed={2**63}"), 2, "--seed")


# ----------------------------------------------------------------------------------------------------------
# Signals

def started(program, arguments):
    """A Python process in the repository."""
    return subprocess.Popen([sys.executable, *program, *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=ROOT,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def test_a_process_that_is_told_to_stop_saves_says_so_and_has_its_status(tmp_path, arguments, request):
    statuses = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
    processes = {number: started(["train_smt.py"], [*arguments, "--max_iters=1000000",
                                                    f"--out_dir={tmp_path / number.name}"])
                 for number in statuses}
    for process in processes.values():
        request.addfinalizer(process.kill)
    for number, process in processes.items():
        for line in process.stdout:
            step = line.split("/")[0].strip()
            if step.isdigit() and int(step) >= 3:
                process.send_signal(number)
                break
        out, errors = process.communicate(timeout=300)
        assert process.returncode == statuses[number] and not errors, errors
        step = torch.load(tmp_path / number.name / "ckpt.pt", weights_only=True)["step"]
        last = read_log(tmp_path / number.name / "metrics.jsonl")[-1]
        assert out.splitlines()[-1] == f"stopped at step {step:,} of 1,000,000; --resume goes on"
        assert step >= 3 and last["step"] == step and "val_rnn_loss" in last


TWICE = """
import os, signal, sys
import torch, train_smt
from lib.cli import run_main
save, saved = torch.save, []
def half(content, path):
    save(content, path)
    saved.append(path)
    if len(saved) == 2:
        os.truncate(path, 100)
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
torch.save = half
run_main(train_smt.main)
"""


def test_a_second_signal_ends_the_process_at_once_and_the_checkpoint_is_whole(tmp_path, arguments):
    """Both come while the second checkpoint is written."""
    process = started(["-c", TWICE], [*arguments, "--eval_interval=2"])
    out, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT and "Traceback" not in errors and "stopped" not in out
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 0
    trained(train_smt, *arguments, "--resume")
    assert sorted(files(tmp_path / "run")) == ["ckpt.pt", "config.json", "metrics.jsonl"]
    assert [line["step"] for line in training_lines(tmp_path / "run")] == [1, 2, 3, 4]


def two_processes(tmp_path, **more):
    """A Run that counts how often its processes would talk, as if the other one was not told to stop."""
    config, calls = RunConfig(eval_interval=1000), []
    run = runtime.Run(config, "smt", torch.device("cpu"), 0, 2, tmp_path, False, False, **more)
    run.all_reduce = lambda tensor: calls.append(tensor) or tensor
    return run, calls


def test_several_processes_agree_to_stop_soon_however_seldom_they_log(tmp_path):
    run, calls = two_processes(tmp_path, signal=15)
    assert [step for step in range(1, 9) if run.should_stop(step)] == [2, 4, 6, 8] and len(calls) == 4


def test_a_signal_to_one_of_several_processes_starts_no_exchange_that_the_others_do_not_join(tmp_path):
    run, calls = two_processes(tmp_path, signal=15)
    run.accumulate({"train_loss": torch.ones(())})
    run.log_training(3, 10, torch.ones(()), 1e-3)
    assert calls == []


def test_a_log_line_has_the_mean_losses_of_the_steps_since_the_last_one(tmp_path):
    config = RunConfig(max_iters=100, eval_interval=3 * runtime.LOG_LINES)
    run = runtime.Run(config, "smt", torch.device("cpu"), 0, 1, tmp_path, False, False)
    for step in range(1, 8):
        run.accumulate({"train_loss": torch.tensor(float(step))})
        run.log_training(step, 5, torch.ones(()), 1e-3)
    assert [(line["step"], line["train_loss"]) for line in training_lines(tmp_path)] == [(3, 2.0), (6, 5.0)]


def test_the_time_left_is_that_of_the_phase_whose_steps_were_timed(tmp_path, capsys):
    config = runtime.RunConfig(max_iters=100, eval_interval=1)
    run = runtime.Run(config, "smt", torch.device("cpu"), 0, 1, tmp_path, False, False)
    for step, phase in (10, True), (11, False):
        run.accumulate({"train_loss": torch.ones(())})
        run.log_training(step, 5, torch.ones(()), 1e-3, phase_end=10)
        assert ("of this phase" in capsys.readouterr().out) == phase


# ----------------------------------------------------------------------------------------------------------
# CUDA graphs

def double(module, a, b):
    return (module(a) + b).T


def test_without_graphs_a_captured_function_is_the_function_without_gradients():
    module, a, b = torch.nn.Linear(3, 3), torch.randn(3, 3), torch.randn(3, 3)
    found = graphs.captured(double)(module, a, b)
    assert torch.equal(found, double(module, a, b)) and not found.requires_grad
    (found * torch.ones(3, requires_grad=True)).sum().backward()            # what it returns may enter a loss


def test_a_captured_function_may_return_a_tuple_and_a_replay_leaves_what_was_returned(monkeypatch):
    def capture(function, module, tensors):
        inputs = [tensor.clone() for tensor in tensors]
        outputs = tuple(map(torch.clone, function(module, *inputs)))

        def replay():
            for own, new in zip(outputs, function(module, *inputs), strict=True):
                own.copy_(new)
        return inputs, SimpleNamespace(replay=replay), outputs

    monkeypatch.setattr(graphs, "capture", capture)
    module, some = torch.nn.Linear(3, 3), torch.randn(4, 2, 3)
    for device in ("none", "cpu"):
        monkeypatch.setattr(graphs, "GRAPH_DEVICE", device)
        call = graphs.captured(lambda module, a: (module(a), 2 * a))
        found = [call(module, a) for a in some]
        assert all(torch.equal(both[0], module(a)) and torch.equal(both[1], 2 * a)
                   for both, a in zip(found, some))
        assert not any(part.requires_grad or part.is_inference() for both in found for part in both)


def test_a_graph_is_captured_once_for_each_module_and_shape_and_its_result_stays(monkeypatch):
    """With a graph that calls the function again on the tensors of its capture, as a CUDA graph does."""
    captures = []

    def capture(function, module, tensors):
        inputs = [tensor.clone() for tensor in tensors]
        output = torch.full_like(function(module, *inputs), torch.nan)
        captures.append((module, tensors[0].shape))
        return inputs, SimpleNamespace(replay=lambda: output.copy_(function(module, *inputs))), output

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "GRAPH_DEVICE", "cpu")
    call, modules, kept = graphs.captured(double), [torch.nn.Linear(3, 3) for _ in range(2)], []
    for i in range(12):
        module, a, b = modules[i % 2], torch.randn(2 + i % 3, 3), torch.randn(2 + i % 3, 3)
        with torch.inference_mode(i % 4 == 1), torch.no_grad():             # whichever the caller is in
            kept.append((call(module, a, b), double(module, a, b)))
            if i % 4 != 1:
                module.weight += 1                                          # in place, as an optimiser does
    assert captures == [(modules[i % 2], (2 + i % 3, 3)) for i in range(6)]
    assert all(torch.equal(found, expected) for found, expected in kept)
    assert not torch.is_inference(kept[0][0])
