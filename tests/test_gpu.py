"""What a GPU needs, found without one: no hidden synchronisation, no graph break, bf16 near float32, a
roll-out without CUDA graphs, machines with their own folders; and the script that checks a GPU. Marked
`cuda`: what only a GPU can show."""
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import PAIRS, QUICK, SIZES, randomise
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import runtime
import sample
import train_bptt
import train_dmt
import train_smt
from lib import graphs, optim
from lib.compiler import compile_failure
from model import IGNORE

ROOT = Path(train_smt.__file__).parent
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
V, T, B = 5, 12, 4


# ----------------------------------------------------------------------------------------------------------
# Steps of the stages

def smt_config(encoder, **more):
    sizes = dict(encoder=encoder, d_model=16, n_heads=2, memory_tokens=3, encoder_layers=1, updater_layers=1,
                 decoder_layers=1, context_len=5, future_len=4, positions=3, batch_size=B)
    return train_smt.Config(**sizes | more)


def smt(loss, encoder, device="cpu", **more):
    config = smt_config(encoder, **more)
    with torch.device(device):
        networks = model.build(config, V)
    t = torch.arange(3, device=device)

    def step(networks, x, y):
        return loss(networks, x, y, t, train_smt.count_terms(x, y, t, config, V), config)[0]
    return networks, step


def dmt(device="cpu", **more):
    with torch.device(device):
        networks = model.build(smt_config("causal", **more), V)
    for name in ("encoder", "decoder"):
        networks[name].requires_grad_(False)
    config = train_dmt.Config()
    begins, labelled = torch.arange(2, device=device) * 5, torch.arange(0, 5, 2, device=device)

    def step(networks, x, y):
        encoder, updater = networks["encoder"], networks["updater"]
        before, labels = train_dmt.roll_out_and_label(encoder, updater, x, begins, 5, labelled)
        x, y = (train_dmt.cut(tokens, begins, 5)[:, labelled] for tokens in (x, y))
        return train_dmt.dmt_loss(networks, before, labels, x, y, train_dmt.count_terms(x, y, V), config)[0]
    return networks, step


def bptt(device="cpu", **more):
    with torch.device(device):
        networks = model.build(smt_config("window", **more), V, ("updater", "readout"))
        networks.initial_memory = nn.Parameter(torch.randn(3, 16))
    return networks, lambda networks, x, y: train_bptt.bptt_loss(networks, x, y, (y != IGNORE).sum(), 4)[0]


STEPS = {
    "smt window": partial(smt, train_smt.smt_loss, "window"),
    "smt causal": partial(smt, train_smt.smt_loss, "causal"),
    "trunk": partial(smt, train_smt.trunk_alone, "causal"),
    "dmt": dmt, "dmt mlp": partial(dmt, updater="mlp"),
    "bptt": bptt, "bptt gru": partial(bptt, updater="gru"),
}
EACH_STEP = pytest.mark.parametrize("name", STEPS)


def batch():
    x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    x[1, 7:], y[1, 7:], y[2, ::3] = V, IGNORE, IGNORE
    return x, y


# ----------------------------------------------------------------------------------------------------------
# Synchronisation

class Copies(TorchDispatchMode):
    """Counts the copies on which CUDA waits: from the device, and to it unless they are non_blocking."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("_to_copy", "copy_"):
            source = [a.device.type for a in tree_leaves(args) if torch.is_tensor(a)][-1]
            waits = source == "meta" or not (kwargs or {}).get("non_blocking")
            self.count += source != result.device.type and waits
        return result


@contextmanager
def fake_device():
    """Tensors without data on a device that is not the CPU: what looks at their data, or mixes devices,
    raises."""
    no_autocast = patch.object(torch, "autocast", lambda *args, **options: nullcontext())     # meta has none
    with no_autocast, FakeTensorMode():
        yield


def test_the_fake_device_refuses_what_would_synchronise():
    with fake_device():
        x = torch.zeros(3, device="meta")
        for look in (torch.Tensor.item, torch.Tensor.tolist, torch.nonzero, lambda x: x[x > 0],
                     lambda x: 1 if x.sum() > 0 else 0, lambda x: x + torch.zeros(3)):
            with pytest.raises((RuntimeError, NotImplementedError, DataDependentOutputException)):
                look(x)
        with Copies() as copies:
            x.cpu()
            torch.zeros(3).to(x.device)
            torch.zeros(3).to(x.device, non_blocking=True)
        assert copies.count == 2


@EACH_STEP
def test_a_training_step_on_a_device_never_looks_at_its_data(name):
    with fake_device():
        networks, step = STEPS[name](device="meta")
        optimizers = optim.make_optimizers(networks, runtime.RunConfig(optimizer="muon"))
        x, y = torch.zeros(2, B, T, dtype=torch.long, device="meta")
        with Copies() as copies:
            loss = step(networks, x, y)
            loss.backward()
            norm = optim.optimizer_step(optimizers, 1e-3)
        assert loss.device.type == norm.device.type == "meta" and copies.count == 0


@pytest.mark.parametrize("updater", ["transformer", "mlp", "gru"])
@pytest.mark.parametrize("temperature, top_k", [(0.0, 0), (1.0, 0), (1.0, 2)])
def test_tokens_are_sampled_without_waiting(updater, temperature, top_k, monkeypatch):
    with fake_device():
        numbers = torch.zeros(2, device="meta")             # fake tensors take no generators
        monkeypatch.setattr(sample, "uniform", lambda *_: itertools.repeat(numbers))
        with torch.device("meta"):
            networks = model.build(smt_config("causal", updater=updater), V)
            memory = torch.zeros(2, 3, 16)
        with Copies() as copies:
            tokens = sample.generate(networks, memory, temperature, top_k, None)
            token = [next(tokens) for _ in range(3)][-1]
        assert token.device.type == "meta" and copies.count == 0


# ----------------------------------------------------------------------------------------------------------
# Compilation

@pytest.mark.parametrize("name", ["smt window", "smt causal", "dmt"])
def test_a_loss_is_one_graph_which_a_second_step_does_not_compile_again(name):
    compiled = []

    def count(module, inputs):
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    networks = model.build(smt_config("window" if "window" in name else "causal"), V)
    config, counts = smt_config("window" if "window" in name else "causal"), torch.tensor([9, 8, 7, 6])
    if name == "dmt":
        loss = partial(train_dmt.dmt_loss, config=train_dmt.Config())
    else:
        loss = partial(train_smt.smt_loss, config=config)
    module = graphs.Bound(loss, networks)
    whole = torch.compile(module, dynamic=False, fullgraph=True, backend=count)
    for seed in range(3):
        torch.manual_seed(seed)
        x, y = batch()
        arguments = x, y, torch.randperm(T)[:3], counts + seed
        if name == "dmt":
            memories = model.normalise(torch.randn(2, B, 5, 3, 16))
            arguments = *memories, x[:, :5], y[:, :5], counts[:2] + seed
        found, expected = whole(*arguments)[0], module(*arguments)[0]
        torch.testing.assert_close(found, expected)
        found.backward()
    assert len(compiled) == 1


@pytest.mark.parametrize("device, processes, more, mode", [
    ("cuda", 1, {}, "reduce-overhead"), ("cpu", 1, {}, None), ("cuda", 2, {}, None),
    ("cuda", 1, dict(grad_accum=2), None)], ids=["cuda", "cpu", "processes", "micro-batches"])
def test_a_step_is_one_cuda_graph_where_no_gradient_is_kept_from_one_call_to_the_next(
        device, processes, more, mode, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: given.append(options))
    monkeypatch.setattr(runtime, "DistributedDataParallel", lambda module, **options: module)
    config, device = runtime.RunConfig(**more), torch.device(device)
    run = runtime.Run(config, "smt", device, 0, processes, tmp_path, resume=False, compile=True)
    for allowed in (True, False):
        runtime.distribute(nn.ModuleDict(), None, run, graphs=allowed)
    assert [options["mode"] for options in given] == [mode, None]


COMPILING = """
import os, signal, time
from lib.compiler import start_compile_workers
signal.signal(signal.SIGTERM, lambda *_: None)
start_compile_workers()
from torch._inductor.async_compile import AsyncCompile
workers = AsyncCompile.process_pool()
workers.submit(time.sleep, 0).result()          # they run
job = workers.submit(time.sleep, 1)
os.killpg(0, signal.SIGTERM)
job.result(timeout=60)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="torch.compile has no workers for a single core")
def test_a_signal_to_all_processes_of_a_run_does_not_end_those_it_waits_for_to_compile():
    process = subprocess.run([sys.executable, "-c", COMPILING], cwd=ROOT, start_new_session=True, timeout=300,
                             capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


# ----------------------------------------------------------------------------------------------------------
# bf16

@EACH_STEP
def test_losses_and_gradients_in_bf16_are_near_those_in_float32(name):
    networks, step = STEPS[name]()
    randomise(networks, std=0.1).float()
    x, y = batch()
    loss, found = {}, {}
    for bf16 in (False, True):
        networks.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled="bptt" not in name):
            value = step(networks, x, y)
        assert value.dtype == torch.float32
        value.backward()
        loss[bf16] = value.item()
        found[bf16] = torch.cat([p.grad.flatten() for p in networks.parameters() if p.grad is not None])
    assert loss[True] == pytest.approx(loss[False], rel=0.02)
    assert (found[True] - found[False]).norm() < 0.02 * found[False].norm()


# ----------------------------------------------------------------------------------------------------------
# CUDA graphs

def double(module, a):
    return module(a) * 2


def test_a_capture_that_fails_leaves_the_plain_function_and_one_line(monkeypatch, capfd):
    captures = []

    def capture(function, module, tensors):
        captures.append(module)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "GRAPH_DEVICE", "cpu")
    call, modules = graphs.captured(double), [torch.nn.Linear(3, 3) for _ in range(2)]
    for i in range(6):
        module, a = modules[i % 2], torch.randn(2 + i % 3, 3)
        found = call(module, a)
        assert torch.equal(found, double(module, a)) and not found.requires_grad and not found.is_inference()
    lines = capfd.readouterr().err.splitlines()
    assert len(captures) == len(lines) == 1
    assert "not permitted" in lines[0] and "and more" not in lines[0]


@pytest.mark.parametrize("broken", [False, True], ids=["at once", "behind the error of a broken capture"])
def test_a_capture_that_runs_out_of_memory_is_not_hidden(broken, monkeypatch):
    def capture(*_):
        try:
            raise torch.OutOfMemoryError("out of memory")
        finally:
            if broken:
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "GRAPH_DEVICE", "cpu")
    with pytest.raises(torch.OutOfMemoryError):
        graphs.captured(double)(torch.nn.Linear(3, 3), torch.randn(2, 3))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.captured_with_gradients(double, torch.nn.Linear(3, 3), [(torch.randn(2, 3),)])


def graphed_on_a_cpu(modules, inputs):
    """torch.cuda.make_graphed_callables, in what its user must know: results and gradients are in buffers
    that the next call writes to."""
    def graphed(module, sample):
        parameters, held = list(module.parameters()), {}

        def buffer(name, value):
            held[name] = value.clone() if name not in held else held[name].copy_(value)
            return held[name].detach()

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, memory, x, *_):
                assert memory.shape == sample[0].shape and x.shape == sample[1].shape
                memory = buffer("memory", memory.detach()).requires_grad_()
                with torch.enable_grad():
                    held["graph"] = memory, module.forward(memory, x)
                return buffer("output", held["graph"][1].detach())

            @staticmethod
            def backward(ctx, gradient):
                memory, output = held["graph"]
                found = torch.autograd.grad(output, [memory, *parameters], gradient)
                memory_gradient, *others = [buffer(i, value) for i, value in enumerate(found)]
                return memory_gradient, None, *others

        return lambda memory, x: Graphed.apply(memory, x, *parameters)
    return tuple(graphed(module, sample) for module, sample in zip(modules, inputs, strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NEEDS_CUDA])])
@pytest.mark.parametrize("truncate, windows", [(0, 3), (3, 4), (8, 2), (100, 1)])
@pytest.mark.parametrize("steps", [4, 100], ids=["windows", "one window"])
def test_unrolled_by_cuda_graphs_losses_and_summed_gradients_are_those_of_the_plain_loop(
        device, truncate, windows, steps, monkeypatch, tmp_path):
    monkeypatch.setattr(train_bptt, "GRAPH_STEPS", steps)
    if device == "cpu":
        monkeypatch.setattr(graphs, "GRAPH_DEVICE", "cpu")
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed_on_a_cpu)
    tolerance = 1e-4 if device == "cpu" else 0.01               # of float32, of bf16
    config = train_bptt.Config(batch_size=2 * B, grad_accum=2, truncate=truncate, d_model=16, n_heads=2,
                               memory_tokens=3, updater_layers=1)
    run = runtime.Run(config, "bptt", torch.device(device), 0, 1, tmp_path, resume=False, compile=False)
    networks = randomise(model.build(config, V, ("updater", "readout")), std=0.3).float()
    networks.initial_memory = nn.Parameter(torch.randn(3, 16))
    networks.to(device)
    batches = [[batch(), batch()] for _ in range(2)]            # two steps of two micro-batches

    def train(captured):
        found = []
        for micro_batches in batches:
            networks.zero_grad()
            for x, y in micro_batches:
                x, y = x.to(device), y.to(device)
                with run.autocast(cache=False):
                    loss, _ = train_bptt.bptt_loss(networks, x, y, (y != IGNORE).sum(), truncate, captured)
                loss.backward()
                found.append(loss.detach())
            found += [p.grad.clone() for p in networks.parameters()]
        return found

    expected, captured = train(()), train_bptt.capture(networks["updater"], config, run, T)
    if steps == 4:
        assert len(captured) == windows
    assert train_bptt.capture(networks["updater"], config, replace(run, world_size=2), T) == ()
    for value, other in zip(train(captured), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("how", ["captured", "compiled"])
def test_the_backward_pass_of_a_gru_stays_in_float32_when_its_forward_pass_is_in_autocast(
        how, monkeypatch, tmp_path):
    def bf16(run=None, cache=True):
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=cache)

    found = []

    def make_graphed_callables(modules, inputs):                # as torch: back where it is called
        for module, (memory, x) in zip(modules, inputs, strict=True):
            found.append(torch.autograd.grad(module(memory, x).sum(), memory)[0])
        return modules

    monkeypatch.setattr(graphs, "GRAPH_DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(runtime.Run, "autocast", bf16)
    config = train_bptt.Config(batch_size=B, d_model=16, n_heads=2, memory_tokens=3, updater="gru")
    run = runtime.Run(config, "bptt", torch.device("cpu"), 0, 1, tmp_path, resume=False, compile=False)
    updater = randomise(model.Updater(config, V), std=0.3).float()
    memory = torch.ones(B, 3, 16, requires_grad=True)
    x = torch.zeros(B, T, dtype=torch.long)
    if how == "captured":
        assert train_bptt.capture(updater, config, run, T)
    else:
        torch._dynamo.reset()
        assert not compile_failure(run.device)
        compiled = torch.compile(partial(model.roll_out, updater), backend="aot_eager", dynamic=False)
        with bf16():
            output = compiled(memory, x)
        found += torch.autograd.grad(output.sum(), memory)
    expected, = torch.autograd.grad(model.roll_out(updater, memory, x).sum(), memory)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-6)


def test_rows_of_very_many_windows_are_unrolled_without_graphs(monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "GRAPH_DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed_on_a_cpu)
    updater = model.Updater(model.RNNConfig(d_model=16, n_heads=2, memory_tokens=3), V)
    for truncate, windows in ((2, 32), (1, 0)):
        config = train_bptt.Config(d_model=16, n_heads=2, memory_tokens=3, truncate=truncate)
        run = runtime.Run(config, "bptt", torch.device("cpu"), 0, 1, tmp_path, resume=False, compile=False)
        assert len(train_bptt.capture(updater, config, run, 64)) == windows


def test_a_training_graph_that_cannot_be_captured_leaves_the_plain_loop_and_one_line(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "GRAPH_DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    assert graphs.captured_with_gradients(double, torch.nn.Linear(3, 3), [(torch.randn(2, 3),)]) == ()
    assert capsys.readouterr().err.endswith("not permitted when stream is capturing\n")


class Waits:
    """Inside, what makes the CPU wait for the GPU raises."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@NEEDS_CUDA
@EACH_STEP
def test_a_step_on_cuda_equals_the_cpus_and_never_waits(name):
    networks, step = STEPS[name]()
    randomise(networks, std=0.1).float()
    x, y = batch()
    expected = step(networks, x, y)
    on_gpu, step = STEPS[name](device="cuda")
    on_gpu.load_state_dict(networks.state_dict())
    on_gpu.cuda()
    optimizers = optim.make_optimizers(on_gpu, runtime.RunConfig())
    x, y = x.cuda(), y.cuda()
    for warm in (True, False):
        with nullcontext() if warm else Waits():        # a first call sets libraries up
            found = step(on_gpu, x, y)
            found.backward()
            if warm:
                torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
            optim.optimizer_step(optimizers, 1e-3)


@pytest.mark.cuda
@NEEDS_CUDA
@pytest.mark.parametrize("updater, top_k", [("transformer", 0), ("mlp", 2), ("gru", 0)])
def test_tokens_sampled_by_cuda_graphs_are_those_of_the_cpu(updater, top_k):
    networks = randomise(model.build(smt_config("causal", updater=updater), V)).float()
    memory = torch.randn(2, 3, 16)
    rows = []
    for device in ("cpu", "cuda"):
        tokens = sample.generate(networks.to(device), memory.to(device), 2.0, top_k, sample.seeded(0, 2))
        rows.append(torch.stack([next(tokens).cpu() for _ in range(30)]))
    assert torch.equal(*rows)


@pytest.mark.cuda
@NEEDS_CUDA
def test_muon_on_cuda_orthogonalises_in_bf16_what_the_cpu_does_in_float32():
    matrices = torch.randn(3, 48, 32)
    found, expected = optim.orthogonalise(matrices.cuda()).float().cpu(), optim.orthogonalise(matrices)
    assert (found - expected).norm() < 0.05 * expected.norm()


# ----------------------------------------------------------------------------------------------------------
# Two machines

MACHINE = """
import torch, train_smt
from lib.cli import run_main
from sources import prepare
write, step = prepare.write_generated, train_smt.optimizer_step
def write_little(folder, name, seed, n_tokens, options):
    return write(folder, name, seed, (6000, 2000), options)
def step_and_keep(optimizers, lr):
    norm = step(optimizers, lr)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    torch.save([p.data for group in groups for p in group["params"]], "weights")
    return norm
prepare.write_generated, train_smt.optimizer_step = write_little, step_and_keep
run_main(train_smt.main)
"""


def test_two_machines_prepare_their_own_data_and_train_the_same_weights(tmp_path):
    """Two processes, each the first of its machine, with folders of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | dict(WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", OMP_NUM_THREADS="1",
                                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    environment["PYTHONPATH"] = str(ROOT)
    processes, folders = [], [tmp_path / "first", tmp_path / "second"]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        processes.append(subprocess.Popen(
            [sys.executable, "-c", MACHINE, *QUICK, *SIZES, *PAIRS, "--data_dir=data", "--out_dir=run"],
            cwd=folder, env=environment | dict(RANK=str(rank)), stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    metas = [(folder / "data" / "fables" / "meta.json").read_text() for folder in folders]
    assert metas[0] == metas[1]
    weights = [torch.load(folder / "weights") for folder in folders]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert (folders[0] / "run" / "ckpt.pt").exists() and not (folders[1] / "run").exists()


# ----------------------------------------------------------------------------------------------------------
# The script

def script(out, *flags):
    command = [ROOT / ".ci" / "gpu", f"--out={out}", *flags]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=900,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_gpu_script_runs_its_parts_at_toy_sizes(tmp_path, data_dir):
    result = script(tmp_path, "--device=cpu", f"--data_dir={data_dir}", "--parts=stages,ddp,mnist")
    assert result.returncode == 0, (result.stdout, result.stderr)
    lines = result.stdout.splitlines()[-3:]
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["part"] for row in rows] == ["stages", "ddp", "mnist"]
    assert {row["result"] for row in rows} == {"ok"}
    for row, line in zip(rows, lines):
        assert line.split()[0] == row["part"] and line.split()[2] == "ok" and line.endswith(row["text"])
    assert "rnn" in rows[2]["text"]
    for name in ("samples.png", "completions.png", "stages.log", "table.txt"):
        assert (tmp_path / name).stat().st_size > 0


def test_a_part_of_the_gpu_script_that_was_named_and_could_not_run_makes_the_status_1(tmp_path):
    result = script(tmp_path, "--device=cpu", f"--data_dir={tmp_path}", "--parts=mnist")
    assert result.returncode == 1 and "not prepared" in result.stdout


def test_a_part_of_the_gpu_script_that_fails_stops_no_other_and_makes_the_status_1(tmp_path):
    result = script(tmp_path, "--device=cuda:99", "--parts=versions,graphs")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    rows = json.loads((tmp_path / "table.json").read_text())
    assert {row["part"]: row["result"] for row in rows} == {"graphs": "failed", "versions": "failed"}
    assert all("cuda:99" in row["text"] for row in rows)


def test_the_gpu_script_that_is_stopped_prints_the_table_so_far_and_ends_its_parts(tmp_path):
    flags = [f"--out={tmp_path}", "--device=cpu", "--parts=versions,bench"]
    process = subprocess.Popen([sys.executable, ROOT / ".ci" / "gpu", *flags], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while process.stderr.readline() not in ("bench: started\n", ""):
            pass
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    found = [line.split()[::2][:2] for line in out.splitlines()[-2:]]
    assert found == [["versions", "ok"], ["bench", "stopped"]]
