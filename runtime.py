"""What every stage needs and the method does not: command line, device, precision, processes, learning rate, checkpoints, log.

Nothing in here knows what a memory is. A train script uses it in this order:

    config = runtime.parse(Config, presets=PRESETS)     the command line, from a frozen dataclass
    run = runtime.start(config, "smt")                  device, precision, processes
    module = runtime.distribute(networks, loss, run)    one module that returns the loss: DDP, torch.compile
    first_step = runtime.begin(run, config, ...)        --resume or --init_from, the run's folder, signals
    run.count(losses), run.log_training(step, ...)      one JSON object a line in metrics.jsonl
    runtime.save(run, "smt", step, numbers, ...)        the checkpoint, atomically; then the evaluation's line
"""
import argparse
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import types
import typing
import weakref
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


class UsageError(Exception):
    """A bad argument: one line on stderr, exit status 2."""


class DataError(Exception):
    """Bad data or a bad file: one line on stderr, exit status 1."""


def run_main(main):
    """Call main(); a mistake of the user's becomes one line on stderr and an exit status, never a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # like Ctrl-C: what is half-written is removed
    try:
        main()
    except (UsageError, DataError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        print(f"error: {str(error).splitlines()[0]} A smaller --batch_size or a larger --grad_accum needs less.", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@dataclass(frozen=True)
class RunConfig:
    """The flags that all train scripts share."""
    dataset: str = "fables"     # data set to train on; prepared first if it is missing (python data.py --help lists them)
    data_dir: str = "data"      # folder that holds the prepared data sets
    out_dir: str = ""           # folder of the run; empty: runs/<dataset>-<stage>
    preset: str = ""            # sizes to start from: tiny, small or paper; empty: paper for tinystories, mnist and sketchy, else tiny
    seed: int = 1337            # seeds the initial weights, the batches and the positions
    device: str = "auto"        # cpu, cuda, cuda:1, mps; auto: CUDA where there is one, else the CPU
    compile: bool | None = None  # torch.compile the training step; unset: on CUDA only
    init_from: str = ""         # checkpoint (file or folder of a run) whose weights to start from
    resume: bool = False        # continue the run in out_dir: with the same flags, bit for bit
    max_iters: int = 1000       # optimiser steps
    batch_size: int = 32        # rows per step, over all processes
    grad_accum: int = 1         # micro-batches per step and process; saves memory
    optimizer: str = "adamw"    # adamw, or muon: Muon for hidden matrices, AdamW for the others
    lr: float = 1e-3            # peak learning rate
    lr_decay: str = "cosine"    # after the warm-up (SMT: in the last third after the trunk's steps): constant, or cosine down to a tenth
    eval_interval: int = 250    # steps between evaluations; a checkpoint is written at each
    eval_docs: int = 64         # held-out documents to evaluate on
    eval_len: int = 512         # tokens read of each of them at most (synthetic documents are read whole)
    log_interval: int = 10      # steps between log lines

    def __post_init__(self):
        positive = "max_iters batch_size grad_accum eval_interval eval_docs eval_len log_interval".split()
        for name in (n for n in positive if getattr(self, n) < 1):
            raise UsageError(f"--{name} must be at least 1")
        if not self.lr > 0:
            raise UsageError("--lr must be above 0")
        for name, kinds in (("lr_decay", ("constant", "cosine")), ("optimizer", ("adamw", "muon"))):
            if getattr(self, name) not in kinds:
                raise UsageError(f"--{name} is {' or '.join(kinds)}, not {getattr(self, name)!r}")


def field_comments(cls):
    """The trailing `# comment` of every field of a dataclass and of those it inherits from: name -> comment."""
    comments = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", inspect.getsource(base), re.M))
    return comments


def parse_bool(text):
    """true/false, yes/no, 1/0 in any case -> bool; ValueError otherwise."""
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise ValueError(text)


class OneLineParser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line."""

    def error(self, message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def parse(Config, argv=None, presets=None):
    """The command line as a Config (a frozen dataclass): defaults, then the preset's values, then the flags given.

    A field's trailing comment is its --help. An unknown flag, a wrong type or a value that Config's __post_init__
    refuses ends the program with status 2 and one line. presets: {name: {field: value}}; "<name>/<dataset>" adds to it.
    """
    hints, comments = typing.get_type_hints(Config), field_comments(Config)
    doc = inspect.getdoc(sys.modules[Config.__module__]) or ""
    parser = OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(Config):
        kind = next((t for t in typing.get_args(hints[f.name]) if t is not types.NoneType), hints[f.name])
        default = "unset" if f.default in (None, "") else f.default
        instead = f"; preset tiny: {presets['tiny'][f.name]}" if presets and f.name in presets["tiny"] else ""
        text = f"{comments.get(f.name, '')} (default {default}{instead})".replace("%", "%%")
        optional = dict(nargs="?", const=True, type=parse_bool) if kind is bool else dict(type=kind)
        parser.add_argument(f"--{f.name}", metavar="true|false" if kind is bool else kind.__name__, default=None, help=text, **optional)

    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag, [f"--{name}" for name in comments], n=1, cutoff=0.0)
        parser.error(f"unknown argument {unknown[0]}; the nearest flag is {near[0]} (--help lists all)"
                     if flag.startswith("-") else f"unexpected argument {unknown[0]!r}: flags are --name=value")
    given = {name: value for name, value in vars(known).items() if value is not None}
    if presets is not None:
        dataset = given.get("dataset", Config.dataset)
        name = given.get("preset") or ("paper" if dataset in ("tinystories", "mnist", "sketchy") else "tiny")
        if name not in presets or "/" in name:
            parser.error(f"--preset is one of {', '.join(p for p in presets if '/' not in p)}, not {name!r}")
        given = presets[name] | presets.get(f"{name}/{dataset}", {}) | given | {"preset": name}
    try:
        return Config(**given)
    except UsageError as error:
        parser.error(str(error))


# ---------------------------------------------------------------------------------------------------------------------
# A run: where it computes and where it writes

@dataclass
class Run:
    """One training run: its device, processes and output folder, what it has spent so far, and whether it was asked to stop."""
    device: torch.device
    rank: int
    world_size: int
    out_dir: Path
    compile: bool
    log_interval: int
    spent: dict = field(default_factory=lambda: {"tokens": 0, "seconds": 0.0, "flops": 0, "sequential_flops": 0})
    clock: float = 0.0                                  # when `seconds` was last brought up to date
    sums: dict = field(default_factory=dict)            # of the losses since the last log line: tensors, not synchronised
    since: dict = field(default_factory=lambda: {"step": 0, "tokens": 0, "seconds": 0.0})       # what had been spent then
    stop_asked: bool = False

    @property
    def checkpoint_path(self):
        return self.out_dir / "ckpt.pt"

    @property
    def is_main(self):
        return self.rank == 0

    def print(self, *args):
        if self.is_main:
            print(*args, flush=True)

    def autocast(self):
        """bf16 on CUDA, nothing elsewhere. Use one block per forward pass: casts of weights are cached inside a block."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def first(self, function):
        """Call function() on the main process while the others wait."""
        if self.is_main:
            function()
        if self.world_size > 1:
            dist.barrier()

    def sum(self, tensor):
        """The sum of a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, networks):
        """Sum the gradients over all processes where a step does without DDP, which averages them."""
        if self.world_size > 1:
            for p in networks.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad)

    def should_stop(self, step):
        """Whether SIGINT or SIGTERM arrived. Several processes agree on it at some steps only, as it costs a synchronisation; but
        soon, since torchrun kills them after 30 seconds."""
        if self.world_size == 1:
            return self.stop_asked
        return step % min(self.log_interval, 10) == 0 and self.sum(torch.tensor(float(self.stop_asked), device=self.device)).item() > 0

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
        if not self.is_main:
            return
        try:
            with open(self.out_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **self.spent, **numbers}) + "\n")
        except OSError as error:
            raise DataError(f"cannot write {self.out_dir / 'metrics.jsonl'}: {error.strerror}") from None

    def spend(self, **amounts):
        """Add tokens, flops and sequential_flops of a step to what the run has spent."""
        for name, amount in amounts.items():
            self.spent[name] += amount

    def count(self, losses):
        """Add the losses (tensors) of a micro-batch to the sums of the next log line, without synchronising."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach()

    def log_training(self, step, grad_norm, lr, phase_ends=()):
        """Every log_interval steps, and where a phase ends: the losses' means over the steps since the last line. DataError if they
        are not finite."""
        if step % self.log_interval and step not in phase_ends:
            return
        self.read_clock()
        since, steps = self.since, step - self.since["step"]
        means = self.sum(torch.stack(list(self.sums.values()))) / steps
        losses = {name: float(mean) for name, mean in zip(self.sums, means.tolist())}
        for name, value in {"loss": losses["train_loss"], "gradient's norm": float(grad_norm)}.items():
            if not math.isfinite(value):
                raise DataError(f"the {name} became {value} before step {step}; the last checkpoint stays as it was")
        seconds = self.spent["seconds"] - since["seconds"]
        speed = round((self.spent["tokens"] - since["tokens"]) / seconds)
        self.log(step, **losses, grad_norm=float(grad_norm), lr=lr, tokens_per_second=speed)
        shown = "  ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in losses.items())
        self.print(f"step {step:6d}  {shown}  norm {float(grad_norm):.2f}  lr {lr:.1e}  "
                   f"{seconds / steps * 1000:.0f} ms/step  {speed:,} tokens/s")
        self.sums, self.since = {}, {"step": step, **self.spent}

    def log_evaluation(self, step, numbers):
        """Log and print the numbers of an evaluation."""
        self.log(step, **numbers)
        shown = "  ".join(f"{name.removeprefix('val_')} {value:.4f}" for name, value in numbers.items())
        self.print(f"step {step:6d}  held out:  {shown}  ({self.spent['seconds']:.0f} s of training)")

    @contextmanager
    def evaluating(self):
        """Inside, the clock stands and there are no gradients: evaluate, and save."""
        self.read_clock()
        with torch.no_grad(), self.autocast():
            yield
        self.start_clock()


def choose_device(name, local_rank=0):
    """torch.device for --device; UsageError where this machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device is auto, cpu, cuda, cuda:N or mps, not {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("--device=cuda, but torch sees no CUDA device here")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UsageError(f"--device={name}, but there are {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # TF32; after backends.cuda.matmul.fp32_precision torch.compile may fail
        torch.backends.cuda.enable_cudnn_sdp(False)     # else the first choice on an H100: a plan for each new shape, and NaN for some
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device=mps, but torch sees no such device here")
    elif device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device is auto, cpu, cuda, cuda:N or mps, not {name!r}")
    return device


COMPILED_SHAPES = 32    # DMT has one for each horizon and part of a roll-out; past the limit torch.compile silently compiles no more


def start(config, stage):
    """Join the other processes (torchrun), choose device and precision, print it all in one line."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world_size > 1 and ":" in config.device:
        raise UsageError(f"--device={config.device} is a single one; several processes take one each with --device=cuda")
    device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    if config.batch_size % (world_size * config.grad_accum):
        raise UsageError(f"--batch_size={config.batch_size} must be a multiple of processes x grad_accum "
                         f"= {world_size} x {config.grad_accum}")
    if world_size > 1 and not dist.is_initialized():
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(hours=6), device_id=own)     # hours: of a download
    torch.manual_seed(config.seed % 2**63)

    compile = config.compile if config.compile is not None else device.type == "cuda"
    if compile:
        torch._dynamo.config.cache_size_limit = COMPILED_SHAPES
    run = Run(device, rank, world_size, Path(config.out_dir or f"runs/{config.dataset}-{stage}"), compile, config.log_interval)

    if config.resume and not run.checkpoint_path.exists():
        raise DataError(f"--resume: there is no {run.checkpoint_path}")
    run.print(f"{stage}: {config.dataset}, preset {config.preset}, {device} ({torch.get_num_threads()} threads), "
              f"{'bf16 autocast' if device.type == 'cuda' else 'float32'}, compile {'on' if compile else 'off'}, "
              f"{world_size} process{'es' if world_size > 1 else ''}, writes {run.out_dir}")
    return run


def begin(run, config, data, networks, optimizers, fixed=()):
    """Start or resume: load the weights that --resume or --init_from ask for, make the run's folder. Returns the first step.

    --resume also restores the optimisers and what was spent, and drops the log lines that will be written again. UsageError for
    --resume where one of the flags `fixed` has changed.
    """
    step, kept, told = 0, [], dataclasses.asdict(config)
    log = run.out_dir / "metrics.jsonl"
    if config.resume:
        checkpoint = load(run.checkpoint_path, run.device)
        check_data(checkpoint, data)
        check_architecture(checkpoint, config, checkpoint["model_config"], run.checkpoint_path)
        load_weights(networks, checkpoint["model"], run.checkpoint_path)
        try:
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        except (KeyError, ValueError):
            raise DataError(f"{run.checkpoint_path} is of another stage, {checkpoint['stage']}, or another --optimizer: "
                            "its optimiser does not fit") from None
        step, run.spent = checkpoint["step"], checkpoint["spent"]
        if step > config.max_iters:
            raise UsageError(f"--resume: the run is at step {step} already, beyond --max_iters={config.max_iters}")
        changed = {name: f"--{name}={value}, was {checkpoint['config'].get(name)}" for name, value in told.items()
                   if name != "resume" and checkpoint["config"].get(name) != value}
        for name in changed.keys() & set(fixed):
            raise UsageError(f"--resume goes on with the same --{name}: {changed[name]}")
        run.since = {"step": step, **run.spent}
        kept = [line for line in read_log(log) if line["step"] < step or line["step"] == step and "train_loss" in line]  # it evaluates anew
        run.print("; ".join([f"resumed at step {step}", *changed.values()]))
    elif config.init_from:
        checkpoint = load(config.init_from, run.device)
        check_data(checkpoint, data)
        check_architecture(checkpoint, config, ["n_heads"], config.init_from)       # no shape shows it
        load_weights(networks, {"initial_memory": checkpoint["initial_memory"], **checkpoint["model"]}, config.init_from)
    if run.is_main:
        try:
            run.out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the folder {run.out_dir}: {error.strerror}") from None
        write_atomically(run.out_dir / "config.json", lambda path: path.write_text(json.dumps(told, indent=1) + "\n"))
        write_atomically(log, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in kept)))

    def ask_to_stop(*_):
        run.stop_asked = True
    signal.signal(signal.SIGINT, ask_to_stop)       # from here on there is something to save
    signal.signal(signal.SIGTERM, ask_to_stop)
    return step


def read_log(path):
    """The lines of a metrics.jsonl as dicts, none if there is no file; one that a crash has cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def check_architecture(checkpoint, config, names, path):
    """DataError if a field of the checkpoint's ModelConfig, one of `names`, has another value in the stage's config."""
    for name in names:
        value = checkpoint["model_config"].get(name)
        if getattr(config, name, value) != value:
            raise DataError(f"{path} has another architecture: --{name}={value}, not {getattr(config, name)}")


def check_data(checkpoint, data):
    """DataError unless a checkpoint was trained on this data set."""
    trained, here = (f"{meta['name']} (vocabulary {meta['vocab_size']})" for meta in (checkpoint["data"], data.meta))
    if trained != here:
        raise DataError(f"the checkpoint was trained on {trained}, this data set is {here}")


def load_weights(networks, weights, path):
    """Load the weights of those networks that a checkpoint has too. DataError where they do not fit."""
    own = networks.state_dict()
    both = {name.split(".")[0] for name in own} & {name.split(".")[0] for name in weights}
    shapes, given = ({name: tensor.shape for name, tensor in some.items() if name.split(".")[0] in both} for some in (own, weights))
    wrong = [name for name in shapes | given if shapes.get(name) != given.get(name)]
    if wrong or not both:
        raise DataError(f"{path} has another architecture: {wrong[0] if wrong else 'no network'} does not fit")
    networks.load_state_dict({name: weights[name] for name in shapes}, strict=False)


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs

GRAPH_DEVICE = "cuda"   # the kind of device that has them


def captured(function):
    """function(module, *tensors), without gradients, from one CUDA graph for each module and each shape of the tensors.

    A step of an RNN is hundreds of small kernels that take longer to launch than to run: a graph is one launch of all of them.
    It reads the module's parameters where they are, so they may change in place (an optimiser's step, load_state_dict) and must
    not be replaced. function must not synchronise or draw random numbers, and returns a tensor or a tuple of tensors, which are
    the caller's to keep. On devices without graphs it is called as it is.
    """
    graphs = weakref.WeakKeyDictionary()                # module -> {shapes: (inputs, graph, outputs)}

    def call(module, *tensors):
        if tensors[0].device.type != GRAPH_DEVICE:
            with torch.inference_mode():
                outputs = function(module, *tensors)
        else:
            with torch.inference_mode(False), torch.no_grad():
                known = graphs.setdefault(module, {})
                key = (torch.is_autocast_enabled(GRAPH_DEVICE), *((tensor.shape, tensor.dtype) for tensor in tensors))
                if key not in known:
                    known[key] = capture(function, module, tensors)
                inputs, graph, outputs = known[key]
                for own, given in zip(inputs, tensors):
                    own.copy_(given)
                graph.replay()
        return outputs.clone() if torch.is_tensor(outputs) else tuple(output.clone() for output in outputs)
    return call


def capture(function, module, tensors):
    """A CUDA graph of function(module, *tensors): the tensors it reads, the graph, and what a replay writes its results to.

    Autocast is entered inside, without its cache: a cast of a weight that was cached outside would be an old one at the next replay.
    """
    inputs = [tensor.clone() for tensor in tensors]
    autocast = torch.autocast(GRAPH_DEVICE, enabled=torch.is_autocast_enabled(GRAPH_DEVICE), cache_enabled=False,
                              dtype=torch.get_autocast_dtype(GRAPH_DEVICE))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), autocast:             # libraries allocate, and torch.compile compiles, before the capture
        for _ in range(2):
            function(module, *inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), autocast:      # NCCL's own thread may go on
        outputs = function(module, *inputs)
    return inputs, graph, outputs


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation

WARMUP, WEIGHT_DECAY, GRAD_CLIP = 0.01, 0.01, 1.0       # share of the steps; of matrices; greatest norm of the gradient


def at_least_float32(x):
    """bf16 to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LossModule(torch.nn.Module):
    """The networks and their loss as one module whose forward returns the loss: what DDP wraps and torch.compile compiles."""

    def __init__(self, networks, loss):
        super().__init__()
        self.networks, self.loss = networks, loss

    def forward(self, *args):
        return self.loss(self.networks, *args)


def distribute(networks, loss, run, parts=()):
    """LossModule, wrapped for DDP where there are several processes and compiled where asked: as a whole, or else only the networks
    named in `parts`, for a loss that calls them so often that all of it would take too long to compile."""
    module = LossModule(networks, loss)
    for name in parts if run.compile else ():
        networks[name].compile(dynamic=False)
    if run.world_size > 1:
        ids = [run.device.index] if run.device.type == "cuda" else None
        module = torch.nn.parallel.DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)
    return torch.compile(module, dynamic=False) if run.compile and not parts else module


def micro_step(module, last):
    """Context of one micro-batch, forward and backward: DDP exchanges gradients in the last one of a step only."""
    return nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): SGD with Nesterov momentum whose step is orthogonalised, at the size of AdamW's steps (Liu et al. 2025).

    torch.optim.Muon computes in bf16, for which a CPU without such instructions needs seconds a step; this one only on CUDA.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(state["momentum"], group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.type_as(p), alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


def orthogonalise(matrix, steps=5):
    """About U V^T of a matrix U S V^T (n, m), by the quintic Newton-Schulz iteration."""
    x = matrix.to(torch.bfloat16 if matrix.device.type == "cuda" else torch.float32)
    x = x.T if len(x) > x.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


def optimizers(networks, config):
    """Fused AdamW (0.9, 0.95) of all parameters; with --optimizer=muon, Muon of the hidden matrices and AdamW of the others.

    Hidden matrices are the weights of linear layers but for heads and gates, which answer with logits. Matrices are decayed but for
    embeddings.
    """
    parameters = [p for p in networks.parameters() if p.requires_grad]
    embeddings = {id(m.weight) for m in networks.modules() if isinstance(m, torch.nn.Embedding)}
    hidden = {id(m.weight) for name, m in networks.named_modules()
              if isinstance(m, torch.nn.Linear) and name.split(".")[-1] not in ("head", "gate")} if config.optimizer == "muon" else set()
    groups = {WEIGHT_DECAY: [], 0.0: []}
    for p in parameters:
        if id(p) not in hidden:
            groups[WEIGHT_DECAY if p.dim() >= 2 and id(p) not in embeddings else 0.0].append(p)
    groups = [{"params": group, "weight_decay": decay} for decay, group in groups.items()]
    found = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=parameters[0].device.type in ("cpu", "cuda"))]
    if matrices := [p for p in parameters if id(p) in hidden]:
        found.append(Muon(matrices, config.lr, WEIGHT_DECAY))
    return found


def learning_rate(step, config, decay_from=0):
    """Linear warm-up to config.lr, then constant, or, from the step `decay_from` on, a cosine down to a tenth of it at max_iters."""
    warmup = max(1, round(WARMUP * config.max_iters))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    begin = max(warmup, decay_from)
    if config.lr_decay == "constant" or step < begin:
        return config.lr
    share = (step - begin) / max(1, config.max_iters - begin)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def optimizer_step(optimizers, lr):
    """Clip, step, forget the gradients; returns their norm before clipping, a tensor: nothing is synchronised."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    norm = torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], GRAD_CLIP)
    for group in groups:
        group["lr"] = lr
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# Files

def write_atomically(path, write):
    """write(temporary path), then rename it to path: path is whole or not there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # torch.save raises the latter for a full disk
        raise DataError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def save(run, stage, step, numbers, config, data, networks, optimizers, **content):
    """Write the run's checkpoint atomically: tensors and plain Python values only, so that weights_only=True can load it.

    Then log the numbers of its evaluation: what the log has an evaluation of is saved. DataError if their loss or a weight is
    not finite.
    """
    if not math.isfinite(numbers["val_rnn_loss"]):
        raise DataError(f"the held-out loss is {numbers['val_rnn_loss']} at step {step}; the last checkpoint stays as it was")
    if not all(bool(p.isfinite().all()) for p in networks.parameters()):
        raise DataError(f"a weight became infinite or NaN before step {step}; the last checkpoint stays as it was")
    content |= dict(stage=stage, step=step, spent=run.spent, config=dataclasses.asdict(config), data=data.meta,
                    model=networks.state_dict(), optimizers=[optimizer.state_dict() for optimizer in optimizers])
    if run.is_main:
        write_atomically(run.checkpoint_path, lambda path: torch.save(content, path))
    run.log_evaluation(step, numbers)


def load(path, map_location="cpu"):
    """A checkpoint file, or the ckpt.pt of a run's folder, as a dict. DataError if it is missing, truncated or not ours."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # noqa: BLE001  torch raises many kinds for a damaged or foreign file
        raise DataError(f"{path} is not a checkpoint that can be trusted and read ({type(error).__name__})") from None
    if not (isinstance(checkpoint, dict) and {"stage", "step", "config", "data", "model", "model_config", "initial_memory", "spent",
                                              "optimizers"} <= checkpoint.keys()
            and isinstance(checkpoint["data"], dict) and {"name", "kind", "vocab_size"} <= checkpoint["data"].keys()):
        raise DataError(f"{path} is not a checkpoint of this project")
    return checkpoint
