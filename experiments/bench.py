"""The speed of a step of each stage, beside what the machine could do at best.

    python -m experiments.bench                                     # fables, preset tiny
    python -m experiments.bench --device=cuda --preset=paper --dataset=tinystories
    python -m experiments.bench --stages=smt,bptt --compile

A step draws its rows, computes the loss of the train script, goes backward and updates the weights. All lines
of the table are timed in turn, round after round: a machine that slows down for a while slows all. Columns:

    ms          median over the rounds; of sampling: of a token of each stream
    x first     ms over that of the first line, the median of the rounds' ratios
    tokens/s    tokens trained on, or generated
    peak MiB    CUDA: allocated during the step, with all rows' weights, the most of all rounds: a CUDA graph
                allocates in the first ones only; CPU: of the process
    use         FLOP/s over those of a large matrix product in the precision of training
    FLOPs ms    time of the step's FLOPs at the speed of that matrix product: the step takes no less
    bytes ms    time of the bytes that the step's operations read and write, at the speed of a large copy;
                what caches hold, or torch.compile fuses, does not move, so that a step may take less

SMT's step is one with all losses, after the trunk's phase.
"""
import platform
import re
import resource
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data as datasets
import model
import runtime
import sample
import train_bptt
import train_dmt
import train_smt
from experiments import train_baseline
from experiments.flops import chain
from lib import compiler, graphs
from lib.cli import UsageError, check_fields, parse, run_main
from lib.optim import make_optimizers, optimizer_step
from model import IGNORE
from sources.prepare import GENERATED, ensure

SCRIPTS = {"smt": train_smt, "dmt": train_dmt, "bptt": train_bptt, "lstm": train_baseline,
           "transformer": train_baseline}
STREAMS, SAMPLED = (1, 128), sample.DRAWN   # sampled side by side; tokens of each in a round
MATRIX = {"cpu": 1024, "cuda": 8192}    # rows and columns of the matrix product
COPIED = 2 ** 28                        # bytes of the copy: more than caches hold
WARM_UPS = 3                            # rounds that do not count


@dataclass(frozen=True)
class Config:
    """Flags of bench.py."""
    dataset: str = "fables"     # data set; prepared first if it is missing
    data_dir: str = "data"      # folder that holds the prepared data sets
    preset: str = "tiny"        # sizes of the train scripts: tiny, small or paper
    device: str = "auto"        # cpu, cuda, cuda:1; auto: CUDA where there is one, else the CPU
    compile: bool | None = None  # torch.compile the steps; unset: on CUDA from preset small on, not the LSTM
    stages: str = "smt,dmt,bptt,lstm,transformer,sample"   # what to time
    rounds: int = 7             # times that everything is timed

    def __post_init__(self):
        check_fields(self, "rounds")
        for stage in self.stages.split(","):
            if stage not in (*SCRIPTS, "sample"):
                raise UsageError(f"--stages is a list of {', '.join(SCRIPTS)} and sample, not {stage!r}")


def stage_config(stage, config):
    """The Config of a train script at the preset, for the data set."""
    flags = [f"--{name}={getattr(config, name)}" for name in ("dataset", "data_dir", "preset", "device")]
    flags += [f"--model={stage}"] if SCRIPTS[stage] is train_baseline else []
    return parse(SCRIPTS[stage].Config, flags, presets=SCRIPTS[stage].PRESETS, generated=GENERATED)


# ----------------------------------------------------------------------------------------------------
# What is timed

def training(stage, config, smt_config, data, run):
    """step(i), which does what the stage's train script does in step i, and the tokens it trains on."""
    V, T, parts = data.vocab_size, datasets.row_length(data, config.seq_len or smt_config.seq_len), ()
    h, positions = min(getattr(config, "horizon", 0) or T, T), getattr(config, "positions", 1)
    if stage == "smt":
        networks, loss_of = model.build(config, V), partial(train_smt.smt_loss, config=config)
    elif stage == "dmt":
        networks, loss_of = model.build(smt_config, V), partial(train_dmt.dmt_loss, config=config)
        networks["encoder"].requires_grad_(False)
        networks["decoder"].requires_grad_(False)
    elif stage == "bptt":
        networks = model.build(config, V, ("updater", "readout"))
        networks.initial_memory = torch.nn.Parameter(torch.randn(config.memory_tokens, config.d_model))
        captured = []
        loss_of = partial(train_bptt.bptt_loss, truncate=config.truncate, graphs=captured)
        parts = train_bptt.compiled_parts(run.device)
    else:
        networks, loss_of = train_baseline.build(config, V), train_baseline.baseline_loss
    networks.to(run.device)
    optimizers = make_optimizers(networks, config)
    module = runtime.distribute(networks, loss_of, run, parts, graphs=stage == "smt")
    if stage == "dmt":
        encoder, updater = networks["encoder"], networks["updater"]
        if run.compile:
            encoder = train_dmt.compile_parts(encoder, updater)

    def step(i):
        x, y, t = datasets.sample_batch(data, config.seed, i, config.batch_size, T, positions, config.p_start)
        if stage == "smt":
            rows, shared = (x, y), (t, train_smt.count_terms(x, y, t, config, data.pad))
        elif stage == "dmt":
            chosen = train_dmt.choose_steps(config, i, T, h)
            begins, labelled = (steps.to(run.device, non_blocking=True) for steps in chosen)
            with run.autocast():
                before, labels = train_dmt.roll_out_and_label(encoder, updater, x, begins, h, labelled)
            x, y = (train_dmt.cut(tokens, begins, h)[:, labelled] for tokens in (x, y))
            rows, shared = (before, labels, x, y), (train_dmt.count_terms(x, y, data.pad),)
        else:
            rows, shared = (x, y), ((y != IGNORE).sum(),)
        if stage == "bptt" and i == 0:
            captured.extend(train_bptt.capture(networks["updater"], config, run, T))
        for micro in zip(*(part.chunk(config.grad_accum) for part in rows)):
            with run.autocast(cache=stage != "bptt"):
                loss, _ = module(*micro, *shared)
            loss.backward()
        optimizer_step(optimizers, config.lr)
    return step, config.batch_size * (T // h) * h


def sampling(streams, config, data, device):
    """step(i), which generates SAMPLED tokens of each stream as sample.py does."""
    networks = model.build(config, data.vocab_size).to(device)
    with torch.no_grad():
        memory = model.empty_memory(networks["encoder"]).expand(streams, -1, -1)
    tokens = sample.generate(networks, memory, 1.0, 0, sample.seeded(config.seed, streams))
    return lambda i: [next(tokens) for _ in range(SAMPLED)]


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write: a lookup only what it returns, a view nothing."""
    LOOKUPS, bytes = ("index", "gather", "embedding", "index_select"), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            lookup = function.overloadpacket.__name__ in self.LOOKUPS
            moved = tree_leaves((result, result) if lookup else (args, kwargs, result))
            tensors = (t for t in moved if torch.is_tensor(t))
            self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        return result


def count(step, device):
    """FLOPs, two per multiply-add of matrix products and attention, and bytes of a step."""
    known, graphs.GRAPH_DEVICE = graphs.GRAPH_DEVICE, "none"        # counters do not see into a CUDA graph,
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()     # or a CPU's attention
    try:
        with plain, Traffic() as traffic, FlopCounterMode(display=False) as counter:
            step(0)
    finally:
        graphs.GRAPH_DEVICE = known
    return counter.get_total_flops(), traffic.bytes


# ----------------------------------------------------------------------------------------------------
# Rounds and numbers

def timed(step, i, device):
    """Seconds and peak MiB of step(i)."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):                         # Linux; elsewhere the peak is that since the start
            Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    step(i)
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    if cuda:
        return seconds, torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10     # bytes of ru_maxrss
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def repeat(steps, device, rounds):
    """{name: [(seconds, peak MiB) of each round]} of {name: step}, without what runs out of memory. The first
    WARM_UPS rounds are warm-ups."""
    noted = {name: [] for name in steps}
    for i in tqdm(range(WARM_UPS + rounds), desc="rounds", leave=False, disable=None):
        for name in list(noted):
            try:
                noted[name].append(timed(steps[name], i, device))
            except torch.OutOfMemoryError:
                del noted[name]
    return noted


def summarise(noted, work):
    """{name: its numbers in COLUMNS} from the rounds and work {name: (tokens, FLOPs, bytes, repetitions)}."""
    seconds = {name: [s / work[name][3] for s, _ in rounds[WARM_UPS:]] for name, rounds in noted.items()}
    rows, first = {}, next(iter(noted))
    for name in noted:
        def ratio(other, own=seconds[name]):
            """This row's time over another's: the median over the rounds."""
            return median(a / b for a, b in zip(own, seconds[other]))
        tokens, flops, moved = (amount / work[name][3] for amount in work[name][:3])
        ms, peak = 1000 * median(seconds[name]), max(peak for _, peak in noted[name])
        use = flops / work["matrix product"][1] / ratio("matrix product")
        bytes_ms = moved / work["copy"][2] / ratio("copy") * ms
        rows[name] = ms, ratio(first), 1000 * tokens / ms, peak, use, use * ms, bytes_ms
    return rows


COLUMNS = {"ms": "10,.2f", "x first": "9,.3f", "tokens/s": "12,.0f", "peak MiB": "10,.0f", "use": "8.1%",
           "FLOPs ms": "10,.2f", "bytes ms": "10,.2f"}


def table(work, rows):
    """The rows as lines of text."""
    titles = (f"{title:>{re.match('[0-9]+', form)[0]}}" for title, form in COLUMNS.items())
    lines = [f"{'':20}" + "".join(titles)]
    for name in work:
        cells = [format(number, form) for number, form in zip(rows.get(name, ()), COLUMNS.values())]
        lines.append(f"{name:20}" + ("".join(cells) or "  out of memory"))
    return "\n".join(lines)


def device_name(device):
    """The name of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def prepare(config, device):
    """All steps {name: step}, and their work {name: (tokens, FLOPs, bytes, repetitions)}."""
    data = datasets.load(config.dataset, config.data_dir).to(device)
    smt_config = stage_config("smt", config)
    torch.manual_seed(smt_config.seed)
    steps, work = {}, {}
    for stage in dict.fromkeys(config.stages.split(",")):
        for streams in STREAMS if stage == "sample" else ():
            name = f"sample, {streams} stream{'s' * (streams > 1)}"
            steps[name] = sampling(streams, smt_config, data, device)
            work[name] = streams * SAMPLED, *count(steps[name], device), SAMPLED
        if stage != "sample":
            own = stage_config(stage, config)
            run = runtime.Run(own, stage, device, 0, 1, Path(), False, False)
            step, tokens = training(stage, own, smt_config, data, run)
            flops, moved = count(step, device)
            if stage == "lstm":                         # fused: its FLOPs are not seen
                weights = train_baseline.build(own, data.vocab_size).state_dict()
                flops = 3 * tokens * chain(weights, "lstm.")        # forward, and twice as much back
            by_default = device.type == "cuda" and config.preset != "tiny" and stage != "lstm"
            run.compile = by_default if config.compile is None else config.compile
            steps[stage], _ = training(stage, own, smt_config, data, run)
            work[stage] = tokens, flops, moved, 1
    n, kind = MATRIX[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    a, source = torch.randn(n, n, device=device, dtype=kind), torch.empty(COPIED // 4, device=device)
    product, copy = torch.empty_like(a), torch.empty_like(source)
    steps |= {"matrix product": lambda i: torch.mm(a, a, out=product), "copy": lambda i: copy.copy_(source)}
    work |= {"matrix product": (0, 2 * n**3, 0, 1), "copy": (0, 0, 2 * COPIED, 1)}
    return steps, work


def main():
    config = parse(Config)
    device = runtime.choose_device(config.device)
    if device.type not in MATRIX:
        raise UsageError(f"--device is auto, cpu, cuda or cuda:N, not {config.device}")
    compiler.configure()
    ensure(config.dataset, config.data_dir)
    steps, work = prepare(config, device)
    rows = summarise(repeat(steps, device, config.rounds), work)
    speed, width = (work[name][i] / rows[name][0] / 1e6 for name, i in (("matrix product", 1), ("copy", 2)))
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{speed:,.0f} GFLOP/s, {width:,.1f} GB/s; {config.dataset}, preset {config.preset}")
    print(table(work, rows))


if __name__ == "__main__":
    run_main(main)
