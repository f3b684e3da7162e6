"""What every stage needs and the method does not: devices, processes, the log, the run's folder.

Nothing in here knows what a memory is. A train script uses it in this order:

    config = parse(Config, presets=PRESETS)                 lib.cli: the command line as a frozen dataclass
    run = runtime.start(config, "smt")                      device, precision, processes
    module = runtime.distribute(networks, loss, run)        a module that returns the loss: DDP, torch.compile
    first_step = runtime.begin(run, data, networks, ...)    --resume or --init_from, the run's folder, signals
    run.accumulate(losses), run.log_training(step, ...)     one JSON object a line in metrics.jsonl
    runtime.save(run, step, numbers, ...)                   the checkpoint; then the evaluation's line
    run.end(step)                                           the exit status of a run that was stopped
"""
import dataclasses
import fcntl
import json
import math
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lib.checkpoints import check_data, load, load_weights, write_atomically
from lib.cli import STOPS, DataError, Stopped, UsageError, check_fields
from lib.compiler import compile_failure
from lib.graphs import Bound

LOG_LINES = 16      # of the training loss, from one evaluation to the next

# ------------------------------------------------------------------------------------------------------------
# Flags

@dataclass(frozen=True)
class RunConfig:
    """The flags that all train scripts share."""
    dataset: str = "fables"     # data set (data.py --help lists them); prepared first if it is missing
    data_dir: str = "data"      # folder that holds the prepared data sets
    out_dir: str = ""           # folder of the run; empty: runs/<dataset>-<stage>
    preset: str = ""       # sizes: tiny, small or paper; empty: tiny, on CUDA paper for data not generated
    seed: int = 1337            # seeds the initial weights, the batches and the positions
    device: str = "auto"        # cpu, cuda, cuda:1, mps; auto: CUDA where there is one, else the CPU
    compile: bool | None = None  # torch.compile the training step; unset: on CUDA, from preset small upwards
    init_from: str = ""         # checkpoint (file or folder of a run) whose weights to start from
    resume: Literal["no", "yes", "auto"] = "no"     # go on with the run in out_dir; auto: if there is one
    max_iters: int = 1000       # optimiser steps
    batch_size: int = 32        # rows per step, over all processes
    grad_accum: int = 1         # micro-batches per step and process; saves memory
    optimizer: Literal["adamw", "muon"] = "adamw"   # muon: Muon for hidden matrices, AdamW for the others
    lr: float = 1e-3            # peak learning rate
    decay: float = 1.0          # share of the steps (SMT: after the trunk's), at the end, in which lr falls
    weight_decay: float = 0.01  # of matrices, but not of embeddings
    eval_interval: int = 250    # steps between evaluations; a checkpoint is written at each
    eval_docs: int = 64         # held-out documents to evaluate on

    def __post_init__(self):
        check_fields(self, "max_iters batch_size grad_accum eval_interval eval_docs")
        if not self.lr > 0 or not self.weight_decay >= 0 or not 0 <= self.decay <= 1:
            raise UsageError("--lr must be above 0, --weight_decay at least 0, --decay from 0 to 1")


# ------------------------------------------------------------------------------------------------------------
# A run: where it computes and where it writes

@dataclass
class Run:
    """One training run: where it computes and writes, what it has spent, the signal that asked it to stop."""
    config: RunConfig
    stage: str
    device: torch.device
    rank: int
    world_size: int
    out_dir: Path
    resume: bool
    compile: bool
    spent: dict = field(default_factory=lambda: {"tokens": 0, "seconds": 0.0})
    clock: float = 0.0                                  # when `seconds` was last brought up to date
    sums: dict = field(default_factory=dict)            # of the losses since the last log line, tensors
    since: dict = field(default_factory=lambda: {"step": 0, "tokens": 0, "seconds": 0.0})   # spent then
    first_step: int = 0
    signal: int = 0
    bar: tqdm | None = None
    lock: int | None = None                             # file descriptor of the locked folder

    @property
    def checkpoint_path(self):
        return self.out_dir / "ckpt.pt"

    @property
    def is_main(self):
        return self.rank == 0

    def print(self, line):
        """Print a line on the main process. A terminal that is gone, or a full disk, does not stop a run."""
        if self.is_main:
            try:
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # later lines go nowhere

    def autocast(self, cache=True):
        """bf16 on CUDA, nothing elsewhere. One block per forward pass: a block caches the casts of weights.

        cache=False: gradients of a weight that is used many times are then summed in float32.
        """
        if self.device.type != "cuda":
            return nullcontext()
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=cache)

    def all_reduce(self, tensor):
        """The sum of a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_gradients(self, networks):
        """Sum the gradients over all processes where a step does without DDP."""
        for p in networks.parameters():
            if p.grad is not None:
                self.all_reduce(p.grad)

    def should_stop(self, step):
        """Whether a signal arrived. Several processes agree on it, in every second step: they wait for it."""
        if self.world_size > 1 and step % 2 == 0:
            arrived = self.all_reduce(torch.tensor(self.signal, device=self.device)).item()
            self.signal = self.signal or signal.SIGTERM * (arrived > 0)
        return self.signal > 0 and (self.world_size == 1 or step % 2 == 0)

    def end(self, step):
        """After the last step: Stopped if a signal came before max_iters."""
        if self.bar:
            self.bar.close()
        if step < self.config.max_iters:
            self.print(f"stopped at step {step:,} of {self.config.max_iters:,}; --resume goes on")
            raise Stopped(self.signal)

    # -- the log: one JSON object a line, one line on the terminal

    def start_clock(self):
        self.clock = time.perf_counter()

    def read_clock(self):
        """Add the time since the clock was started or read to the seconds spent."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.spent["seconds"] += now - self.clock
        self.clock = now

    def log(self, step, **numbers):
        """Append what was spent up to a step, and the numbers, to metrics.jsonl."""
        if self.is_main:
            with open(self.out_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **self.spent, **numbers}) + "\n")

    def accumulate(self, losses):
        """Add a micro-batch's losses (tensors) to the sums of the next log line, without synchronising."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach()

    def log_training(self, step, tokens, grad_norm, lr, phase_end=0):
        """Call after each step, which read `tokens`. LOG_LINES times between evaluations, and where a phase
        or the run ends, log the means of the losses since the last line. DataError if they are not finite."""
        self.spent["tokens"] += tokens
        if self.compile and step - 1 == max(self.first_step, phase_end):   # compiling is not training
            self.print(f"compiled in {duration(time.perf_counter() - self.clock)}")
            self.start_clock()
        if self.bar:
            self.bar.update(step - self.bar.n)
        ends = sorted({phase_end, self.config.max_iters})
        log_interval = max(1, min(self.config.eval_interval, self.config.max_iters) // LOG_LINES)
        stopping = self.signal and self.world_size == 1     # several processes have not agreed on it yet
        if step % log_interval and step not in ends and not stopping:
            return
        self.read_clock()
        since, steps = self.since, step - self.since["step"]
        means = self.all_reduce(torch.stack(list(self.sums.values()))) / steps
        losses = dict(zip(self.sums, means.tolist(), strict=True))
        for name, value in {"loss": losses["train_loss"], "gradient's norm": float(grad_norm)}.items():
            if not math.isfinite(value):
                raise DataError(f"the {name} became {value} before step {step}; the last checkpoint stays")
        seconds = max(self.spent["seconds"] - since["seconds"], 1e-9)
        end = next(end for end in ends if end >= step)      # the steps of the next phase may take longer
        left = duration((end - step) * seconds / steps) + " left" + " of this phase" * (end < ends[-1])
        speed = round((self.spent["tokens"] - since["tokens"]) / seconds)
        self.log(step, **losses, grad_norm=float(grad_norm), lr=lr, tokens_per_second=speed)
        shown = "  ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in losses.items())
        self.print(f"{step:>6}/{self.config.max_iters}  {shown}  norm {float(grad_norm):.2f}  lr {lr:.1e}  "
                   f"{seconds / steps * 1000:.0f} ms/step  {speed:,} tokens/s  {left}")
        if self.bar:
            self.bar.set_postfix_str(f"loss {losses['train_loss']:.3f}", refresh=False)
        self.sums, self.since = {}, {"step": step, **self.spent}

    @contextmanager
    def evaluating(self):
        """Inside, the clock stands and there are no gradients: evaluate, and save."""
        self.read_clock()
        with torch.no_grad(), self.autocast():
            yield
        self.start_clock()


def duration(seconds):
    """Seconds as a text to read."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def choose_device(name, local_rank=0):
    """torch.device for --device; UsageError where this machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", local_rank if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise UsageError(f"--device={name} cannot be used here: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")      # TF32; torch.compile may fail after the newer switch
        torch.backends.cuda.enable_cudnn_sdp(False)     # slow for new shapes, and NaN for some
    return device


def start(config, stage):
    """Join the other processes (torchrun), choose device and precision, print them in one line."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world_size > 1 and ":" in config.device:
        raise UsageError(f"--device={config.device} is one device: several processes need --device=cuda")
    device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    if config.batch_size % (world_size * config.grad_accum):
        raise UsageError(f"--batch_size={config.batch_size} must be a multiple of processes x grad_accum "
                         f"= {world_size} x {config.grad_accum}")
    if world_size > 1 and not dist.is_initialized():
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(minutes=10), device_id=device_id)
    torch.manual_seed(config.seed % 2**63)

    by_default = device.type == "cuda" and config.preset != "tiny"
    compiles = by_default if config.compile is None else config.compile
    failure = compile_failure(device) if compiles else ""
    compiles = compiles and not failure
    out_dir = Path(config.out_dir or f"runs/{config.dataset}-{stage}")
    there = (out_dir / "ckpt.pt").exists()
    if config.resume == "yes" and not there:
        raise DataError(f"--resume: there is no {out_dir / 'ckpt.pt'}")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0    # by torchrun, after a crash
    resume = there and (config.resume != "no" or restarted)
    run = Run(config, stage, device, rank, world_size, out_dir, resume, compiles)
    threads = torch.get_num_threads()
    machine = {"tiny": "for a CPU", "small": "for a small GPU", "paper": "for a GPU"}.get(config.preset)
    run.print(f"{stage}: {config.dataset}, preset {config.preset} ({machine}), {device} ({threads} threads), "
              f"{'bf16' if device.type == 'cuda' else 'float32'}, compile {'on' if compiles else 'off'}, "
              f"{world_size} process{'es' if world_size > 1 else ''}, writes {run.out_dir}")
    if failure:
        run.print(f"note: torch.compile does not work here, the run goes on without: {failure}")
    if config.preset == "paper" and device.type == "cpu":
        run.print("note: the preset paper is for a GPU: 70 days on 2 CPU cores; --preset=tiny takes minutes")
    return run


def begin(run, data, networks, optimizers, fixed=()):
    """Start or resume: load the weights asked for, make the run's folder. Returns the first step.

    --resume also restores the optimisers and what was spent, and drops the log lines that will be written
    again. UsageError where --init_from, a size or one of the flags `fixed` has changed; any flag, if torchrun
    has started the run again. Another run in the same folder is moved, not replaced.
    """
    config, step, lines, flags = run.config, 0, [], dataclasses.asdict(run.config)
    log = run.out_dir / "metrics.jsonl"
    if config.init_from and Path(config.init_from).resolve().is_relative_to(run.out_dir.resolve()):
        raise UsageError(f"--init_from={config.init_from} is where this run writes: choose another --out_dir")
    if run.all_reduce(torch.tensor(int(run.resume), device=run.device)) not in (0, run.world_size):
        raise DataError(f"not all machines see {run.checkpoint_path}: to resume they must share the folder")
    if run.resume:
        lock_folder(run)
        checkpoint = load(run.checkpoint_path, run.device)
        step, run.spent, was = checkpoint["step"], checkpoint["spent"], checkpoint["config"]
        changed = {name: f"--{name}={value}, was {was.get(name)}" for name, value in flags.items()
                   if name != "resume" and was.get(name) != value}
        fixed = flags if config.resume == "no" else {"init_from", *fixed, *checkpoint["model_config"]}
        for name in changed.keys() & fixed:             # no: torchrun has started the same command again
            raise UsageError(f"a resumed run keeps its --{name}: {changed[name]}")
        if step > config.max_iters:
            raise UsageError(f"--resume: the run is at step {step}, beyond --max_iters={config.max_iters}")
        check_data(checkpoint, data, run.checkpoint_path)
        load_weights(networks, checkpoint, config, run.checkpoint_path)
        try:
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                groups = optimizer.state_dict()["param_groups"]         # with our rates
                if [g["params"] for g in groups] != [g["params"] for g in state["param_groups"]]:
                    raise ValueError("other parameters")
                optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
        except (KeyError, ValueError, TypeError, AttributeError):
            raise DataError(f"{run.checkpoint_path} is of another stage or another --optimizer") from None
        run.since, run.first_step = {"step": step, **run.spent}, step
        finished = step == was.get("max_iters") < config.max_iters and step % config.eval_interval > 0
        lines = [line for line in read_log(log) if line["step"] < step      # no evaluation of a stopped run
                 or line["step"] == step and ("train_loss" in line or finished)]
        run.print("; ".join([f"resumed at step {step}", *changed.values()]))
    else:
        if config.init_from:
            checkpoint = load(config.init_from, run.device)
            check_data(checkpoint, data, config.init_from, warn=run.print)
            load_weights(networks, checkpoint, config, config.init_from)
        if run.is_main and run.checkpoint_path.exists():
            lock_folder(run)                            # nobody else is at work there
            moved = next(path for i in range(1, 10**6) if not (path := Path(f"{run.out_dir}.{i}")).exists())
            run.out_dir.rename(moved)
            run.print(f"the run that was in {run.out_dir} is now in {moved}")
        lock_folder(run)
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in networks.named_children()}
    run.print("parameters: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))
    if run.is_main:
        for leftover in run.out_dir.glob(".*.tmp"):     # of a killed process
            leftover.unlink()
        for path, text in {run.out_dir / "config.json": json.dumps(flags, indent=1) + "\n",
                           log: "".join(json.dumps(line) + "\n" for line in lines)}.items():
            write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        if sys.stderr and sys.stderr.isatty():
            run.bar = tqdm(total=config.max_iters, initial=step, desc=run.stage, unit="step")

    def ask_to_stop(number, _):
        run.signal = number
        signal.signal(number, signal.SIG_DFL)           # a second one ends the process at once
    for number in STOPS:                                # from here on there is something to save
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, ask_to_stop)
    return step


def lock_folder(run):
    """Make the run's folder and lock it for the process's life; DataError if another run is at work there."""
    if run.is_main:
        run.out_dir.mkdir(parents=True, exist_ok=True)
        if run.lock is not None:
            os.close(run.lock)
        run.lock = os.open(run.out_dir, os.O_RDONLY)
        try:
            fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another run is writing to {run.out_dir}: choose another --out_dir") from None


def read_log(path):
    """The lines of a metrics.jsonl as dicts with a step; without those that a crash has damaged."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and type(line.get("step")) is int]


# ------------------------------------------------------------------------------------------------------------
# Several processes, compilation

def distribute(networks, loss, run, parts=(), graphs=False):
    """The networks and their loss as one module: under DDP with several processes; compiled with --compile.

    parts: names of networks to compile instead of the whole, for a loss that calls them so often that it
    compiles for too long. graphs: on CUDA, forward and backward as one CUDA graph, of which the CPU launches
    the kernels at once; with one process and one micro-batch only, because the next launch overwrites the
    gradients. Not for DMT: replays of the roll-outs' own graphs then failed (illegal access).
    """
    module = Bound(loss, networks)
    for name in parts if run.compile else ():
        networks[name].compile(dynamic=False)
    if run.world_size > 1:
        ids = [run.device.index] if run.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)      # torch 2.13 renames broadcast_buffers
            module = DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)
    graphs = graphs and run.device.type == "cuda" and run.world_size == run.config.grad_accum == 1
    mode = "reduce-overhead" if graphs else None
    return torch.compile(module, dynamic=False, mode=mode) if run.compile and not parts else module


def micro_step(module, last):
    """Context of one micro-batch, forward and backward: DDP exchanges gradients in the last of a step."""
    return nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync()


# ------------------------------------------------------------------------------------------------------------
# Checkpoint

def save(run, step, numbers, data, networks, optimizers, **content):
    """Write the run's checkpoint atomically: tensors and plain values only, for weights_only=True.

    Then log the numbers of its evaluation: what the log has an evaluation of is saved. DataError if they are
    not finite.
    """
    finite = all(bool(p.isfinite().all()) for p in networks.parameters())
    if not finite or not math.isfinite(numbers["val_rnn_loss"]):
        raise DataError(f"a weight or the held-out loss is not finite at step {step}; nothing is saved")
    content |= dict(stage=run.stage, step=step, time=time.time(), spent=run.spent, data=data.meta,
                    config=dataclasses.asdict(run.config), model=networks.state_dict(),
                    optimizers=[optimizer.state_dict() for optimizer in optimizers])
    if run.is_main:
        write_atomically(run.checkpoint_path, lambda path: torch.save(content, path))
    run.log(step, **numbers)
    shown = "  ".join(f"{name.removeprefix('val_')} {value:.4f}" for name, value in numbers.items())
    seconds = run.spent["seconds"]
    run.print(f"{step:>6}/{run.config.max_iters}  held out:  {shown}  ({seconds:.0f} s of training)")
