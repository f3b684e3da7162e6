"""Speed, memory, and how they grow: all stages side by side, on random tokens. No data set is needed.

    python bench.py                                    # sizes for a CPU; a minute or two on 2 cores
    python bench.py --device=cuda --preset=paper       # the paper's sizes
    python bench.py --grow=T                           # 64 to 2048 tokens, 4 rows
    python bench.py --grow=batch --json=batch.json     # 2 to 128 rows; the same numbers as JSON, too
    python bench.py --grow=processes                   # train_smt.py by 1 and by 2 processes on this CPU

Everything is timed once in a round, one after the other: what slows the machine down for a while slows all of it. A step is the
losses, the backward pass and the optimiser; drawing its rows is a line of its own. Sampling is as in sample.py, in float32.

    ms, min, max    median over the rounds, and their range; of sampling: for one token of every stream
    x SMT           median over the rounds of the time over that of the SMT step in the same round
    tokens/s        tokens trained on, as the stage counts them, or generated
    use             FLOPs, as the stages count them, per second, over the rate at which this process multiplies 512 x 512 matrices in
                    the precision of training, in the same round: the median
    peak MiB        CUDA: allocated meanwhile, with all that is loaded; CPU: of the process, meanwhile
    x first         --grow: the time over that at the first size
    -               does not apply, or CUDA ran out of memory

DMT's roll-out and sampling replay CUDA graphs on CUDA; `DMT roll-out, plain` is the same without. Of the preset paper BPTT gets 32
rows, because the activations of all steps of 128 need not fit on a GPU.

--grow=T: T is the length of a row, of what encoder and Transformer read, and of DMT's roll-out, which gets about as many labels
as in the preset, and no more (at most one in label_stride steps).
"""
import contextlib
import dataclasses
import functools
import gc
import io
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import nn
from tqdm import tqdm

import data as datasets
import fables
import runtime
import sample
import train_bptt
import train_dmt
import train_smt
import train_transformer
from data import IGNORE
from flops import bptt_flops, dmt_flops, forward_flops, smt_flops, transformer_flops
from model import ModelConfig, build, empty_memory, model_fields, roll_out
from runtime import DataError, UsageError

STAGES = {"smt": train_smt, "dmt": train_dmt, "bptt": train_bptt, "transformer": train_transformer}
CPU = dict(d_model=128, n_heads=4, memory_tokens=8, encoder_layers=4, decoder_layers=2, updater_layers=4, context_len=128,
           future_len=32)
SIZES = {"cpu": {"smt": CPU | dict(batch_size=32, seq_len=128),
                 "dmt": dict(batch_size=16, seq_len=64, horizon=64, label_stride=16),
                 "bptt": dict(d_model=128, n_heads=4, memory_tokens=8, updater_layers=4, decoder_layers=2, batch_size=16,
                              seq_len=64),
                 "transformer": dict(d_model=128, n_heads=4, decoder_layers=6, context_len=128, batch_size=32)},
         **{name: {stage: script.PRESETS[name] for stage, script in STAGES.items()} for name in ("tiny", "small", "paper")}}
SIZES["paper"]["bptt"] = SIZES["paper"]["bptt"] | dict(batch_size=32)
GROWTH = {"T": (64, 128, 256, 512, 1024, 2048), "batch": (2, 8, 32, 128), "processes": (1, 2)}
GROWN_ROWS = 4           # of --grow=T: BPTT keeps the activations of all T steps
STREAMS, SAMPLED = (1, 128), 16          # sampled from at once; tokens of each in a round
VOCAB_SIZE, STORY, STORIES = 256, 200, 5000
PRODUCTS = 8             # of 512 x 512 matrices in a round; on CUDA of 256 pairs each
LAUNCH_STEPS, LAUNCH_WARM_UPS = 8, 3     # optimiser steps of a run of train_smt.py; how many of the first do not count
COLUMNS = {"ms": ("ms", 10, ",.2f"), "min_ms": ("min", 10, ",.2f"), "max_ms": ("max", 10, ",.2f"), "ratio": ("x SMT", 9, ".3f"),
           "tokens_per_second": ("tokens/s", 13, ",.0f"), "utilisation": ("use", 8, ".1%"), "peak_mib": ("peak MiB", 10, ",.0f")}


@dataclass(frozen=True)
class Config:
    """What bench.py can be told."""
    device: str = "auto"        # cpu, cuda, cuda:1; auto: CUDA where there is one, else the CPU
    preset: str = "cpu"         # sizes: cpu, or those of the train scripts: tiny, small, paper
    rounds: int = 5             # times that everything is timed
    threads: int = 0            # CPU threads of a process; 0: torch's default, with --grow=processes 1
    compile: bool | None = None  # torch.compile the training steps; unset: on CUDA only
    json: str = ""              # file to write the numbers to
    seed: int = 1337            # seeds weights, tokens and batches
    grow: str = ""              # what to vary: T, batch or processes; unset: nothing

    def __post_init__(self):
        if self.preset not in SIZES:
            raise UsageError(f"--preset is one of {', '.join(SIZES)}, not {self.preset!r}")
        if self.grow not in ("", *GROWTH):
            raise UsageError(f"--grow is one of {', '.join(GROWTH)}, not {self.grow!r}")
        if self.rounds < 1 or self.threads < 0:
            raise UsageError("--rounds is at least 1, --threads is not negative")
        if self.grow == "processes" and self.device not in ("auto", "cpu"):
            raise UsageError("--grow=processes is for CPU processes: it takes no --device but cpu")
        if self.json and not Path(self.json).parent.is_dir():
            raise UsageError(f"--json: there is no folder {Path(self.json).parent}")


def stage_configs(preset, seed, grow="", at=0):
    """The configs {stage: config} of a preset, lengths written out, of rows of `at` tokens (grow T) or of `at` rows (grow batch)."""
    configs = {stage: script.Config(**SIZES[preset][stage], seed=seed) for stage, script in STAGES.items()}
    default = configs["smt"].context_len
    for stage, c in configs.items():
        own = c.seq_len or getattr(c, "context_len", default)
        change = dict(seq_len=own, batch_size=at if grow == "batch" else c.batch_size)
        if stage == "smt":
            change |= dict(trunk_iters=0)
        if stage == "dmt":
            change |= dict(horizon=min(c.horizon or own, own))
        if grow == "T":
            change |= dict(seq_len=at, batch_size=GROWN_ROWS)
            if stage == "dmt":
                labels = max(1, change["horizon"] // c.label_stride)
                change |= dict(horizon=at, label_stride=max(c.label_stride, -(-at // labels)))
            else:
                change["context_len"] = at
        configs[stage] = replace(c, **change)
    return configs


def random_data(seed):
    """A text in memory: stories of random tokens, each behind a separator, 0, and one more separator at the end."""
    tokens = torch.randint(1, VOCAB_SIZE, (STORIES * STORY + 1,), generator=torch.Generator().manual_seed(seed % 2**63)).to(torch.uint8)
    tokens[::STORY] = 0
    split = datasets.Split(tokens, None, torch.arange(STORIES) * STORY)
    meta = {"name": "random", "kind": "text", "vocab_size": VOCAB_SIZE, "first_token": 0, "longest_document": STORY}
    return datasets.Data(meta, split, split)


def stopwatch(device):
    """note(row), and the dict it fills, {row: (seconds, peak MiB)}: what passed since the note before it."""
    spent, began, cuda = {}, 0.0, device.type == "cuda"

    def note(row=None, parts=1):
        """Add it to the row, divided by the `parts` that were equally long; without a row it counts for nothing."""
        nonlocal began
        if cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        if row:
            peak = torch.cuda.max_memory_allocated(device) if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            before = spent.get(row, (0.0, 0.0))
            spent[row] = before[0] + seconds / parts, max(before[1], peak / 2**20)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):              # Linux; elsewhere the peak is that since the start
                Path("/proc/self/clear_refs").write_text("5")
        began = time.perf_counter()
    return note, spent


# ---------------------------------------------------------------------------------------------------------------------
# What is timed: each function returns {row: (its tokens, its FLOPs)} and measure(step), which notes each row

def optimiser_step(row, stage, config, data, run, note):
    """A step of SMT, BPTT or the Transformer; of SMT also the time that it takes to draw the rows and positions."""
    V, T, S = data.vocab_size, config.seq_len, getattr(config, "positions", 1)
    if stage == "smt":
        networks, loss = build(config, V), functools.partial(train_smt.smt_loss, config=config)
        flops, _ = smt_flops(config, networks, V, T)
    elif stage == "bptt":
        sizes, loss = train_bptt.model_config(config), functools.partial(train_bptt.bptt_loss, truncate=config.truncate)
        networks = build(sizes, V, ("updater", "readout"))
        flops, _ = bptt_flops(config, sizes, networks, V, T)
        networks.initial_memory = nn.Parameter(torch.randn(config.memory_tokens, config.d_model))
    else:
        networks, loss = build(train_transformer.model_config(config), V, ("decoder",)), train_transformer.transformer_loss
        flops, _ = transformer_flops(config, networks, V, T)
    networks.to(run.device)
    parts = train_bptt.compiled_parts(run.device) if stage == "bptt" else ()
    optimizers, module = runtime.optimizers(networks, config), runtime.distribute(networks, loss, run, parts)

    def measure(step):
        note()
        x, y, t = datasets.sample_batch(data, config.seed, step, config.batch_size, T, S, config.p_start)
        t = t.to(run.device)
        note("data loading" if stage == "smt" else None)
        terms = (t, train_smt.count_terms(x, y, t, config, data.pad)) if stage == "smt" else ((y != IGNORE).sum(),)
        update(module, optimizers, config, run, x, y, *terms)
        note(row)

    tokens = config.batch_size * T
    work = {row: (tokens, flops)}
    return work | ({"data loading": (tokens, 0)} if stage == "smt" else {}), measure


def update(module, optimizers, config, run, *batch):
    """What a train script does with a batch."""
    with run.autocast():
        loss, _ = module(*batch)
    loss.backward()
    runtime.optimizer_step(optimizers, config.lr)


def dmt(config, smt_config, data, run, note, spent):
    """An iteration of DMT. The encoder's hooks tell labels from roll-out, which the stage has in one function."""
    model_config, T, h, device = ModelConfig(**model_fields(smt_config)), config.seq_len, config.horizon, run.device
    networks = build(model_config, data.vocab_size).to(device).requires_grad_(False)
    for name in ("updater", "readout"):
        networks[name].requires_grad_()
    optimizers = runtime.optimizers(networks, config)
    module = runtime.distribute(networks, lambda *batch: train_dmt.dmt_loss(*batch, config), run)
    if run.compile:
        networks["updater"].compile(dynamic=False)      # for the roll-outs
    networks["encoder"].register_forward_pre_hook(lambda *_: note("DMT roll-out"))
    networks["encoder"].register_forward_hook(lambda *_: note("DMT labels"))

    def measure(step):
        begins, labelled = train_dmt.choose_steps(config, step, T, h)
        labelled = labelled.to(device)
        x, y, _ = datasets.sample_batch(data, config.seed, step, config.batch_size, T, 1, config.p_start)
        note()
        with run.autocast():
            before, labels = train_dmt.roll_out_and_label(networks, x, begins, h, labelled)
        note("DMT roll-out")
        labelled_x, labelled_y = (train_dmt.cut(tokens, begins, h)[:, labelled] for tokens in (x, y))
        counts = train_dmt.count_terms(labelled_x, labelled_y, data.pad)
        update(module, optimizers, config, run, before, labels, labelled_x, labelled_y, counts)
        note("DMT supervised pass")
        seconds, peaks = zip(*spent.values())
        spent["DMT iteration"] = sum(seconds), max(peaks)
        spent["DMT roll-out, one step"] = spent["DMT roll-out"][0] / h, spent["DMT roll-out"][1]
        if device.type == "cuda":
            note()
            with torch.no_grad(), run.autocast():
                roll_out(networks["updater"], before[:, 0], train_dmt.cut(x, begins, h))
            note("DMT roll-out, plain")

    n, R = (len(chosen) for chosen in train_dmt.choose_steps(config, 0, T, h))
    rows, forward = config.batch_size * n, forward_flops(model_config, data.vocab_size, T, n * (R + 1))
    flops, _ = dmt_flops(config, model_config, networks, data.vocab_size, T, n, h, R)
    labels, step = config.batch_size * forward["encoder"], rows * forward["updater"]
    plain = {"DMT roll-out, plain": (rows * h, h * step)} if device.type == "cuda" else {}
    return {"DMT iteration": (rows * h, flops), "DMT roll-out": (rows * h, h * step), "DMT roll-out, one step": (rows, step), **plain,
            "DMT labels": (rows * h, labels), "DMT supervised pass": (rows * h, flops - labels - h * step)}, measure


def sampling(row, streams, config, data, run, note):
    """A token of each stream, by the RNN that an SMT config describes."""
    networks, forward = build(config, data.vocab_size).to(run.device), forward_flops(config, data.vocab_size, config.seq_len, 1)
    with torch.no_grad():
        memory = sample.begin(networks, empty_memory(networks["encoder"]), streams)
    tokens = sample.generate(networks, memory, 1.0, 0, sample.seeded(config.seed, streams))

    def measure(step):
        note()
        for _ in range(SAMPLED):
            next(tokens)
        note(row, SAMPLED)
    return {row: (streams, streams * (forward["updater"] + forward["readout"]))}, measure


def products(run, note):
    """A 512 x 512 matrix product in the precision of training; on CUDA many at once: one alone would time its launch."""
    cuda = run.device.type == "cuda"
    a, b = torch.randn(2, *([256] if cuda else []), 512, 512, device=run.device, dtype=torch.bfloat16 if cuda else torch.float32)

    def measure(step):
        note()
        for _ in range(PRODUCTS):
            a @ b
        note("matrix product", PRODUCTS * a.numel() // 512**2)
    return {"matrix product": (0, 2 * 512**3)}, measure


def launch(n, config, spent):
    """A step of train_smt.py by n processes on this CPU, as metrics.jsonl has it; `use` is that of each process."""
    tokens, V = config.batch_size * config.seq_len, fables.VOCAB_SIZE

    def measure(step):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            datasets.prepare("fables", folder, train_tokens=100_000, val_tokens=2000)
            told = replace(config, data_dir=folder, out_dir=f"{folder}/run", device="cpu", max_iters=LAUNCH_STEPS, log_interval=1,
                           eval_interval=LAUNCH_STEPS, eval_docs=1, eval_len=1)
            flags = [f"--{name}={value}" for name, value in dataclasses.asdict(told).items() if value not in (None, "")]
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", train_smt.__file__, *flags]
            environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            if result.returncode:
                reason = re.findall("^error: (.+)", result.stderr, re.M) or result.stderr.splitlines()[-1:]
                raise DataError(f"train_smt.py by {n} processes: {''.join(reason[:1])}")
            lines = map(json.loads, Path(folder, "run", "metrics.jsonl").read_text().splitlines())
        speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
        spent["SMT step"] = tokens / median(speeds[LAUNCH_WARM_UPS:]), 0.0
    return {"SMT step": (tokens, smt_flops(config, build(config, V), V, config.seq_len)[0] // n)}, measure


# ---------------------------------------------------------------------------------------------------------------------
# Rounds and numbers

def repeat(measures, rounds, warm_ups, spent, what):
    """{row: [(seconds, peak MiB) of each round]}, one measure after the other. What runs out of CUDA memory is left out from then on."""
    noted = {}
    for step in tqdm(range(warm_ups + rounds), desc=what, leave=False, disable=None):
        for measure in list(measures):
            spent.clear()
            try:
                measure(step)
            except torch.OutOfMemoryError:
                measures.remove(measure)
                continue
            for row, numbers in spent.items() if step >= warm_ups else ():
                noted.setdefault(row, []).append(numbers)
    return noted


def ratio(seconds, reference):
    """Median over the rounds of the time of one thing over that of another in the same round."""
    return median(a / b for a, b in zip(seconds, reference, strict=True))


def summarise(work, noted, rounds):
    """A dict of numbers for each row of work, {row: (tokens, FLOPs)}; None where there is none."""
    seconds = {row: [s for s, _ in noted[row]] for row in work if len(noted.get(row, ())) == rounds}
    product, rows = work["matrix product"][1], []
    for row, (tokens, flops) in work.items():
        numbers = dict.fromkeys(COLUMNS)
        if row in seconds:
            s = seconds[row]
            numbers |= dict(ms=1000 * median(s), min_ms=1000 * min(s), max_ms=1000 * max(s), tokens_per_second=tokens / median(s) or None,
                            ratio=ratio(s, seconds["SMT step"]) if "SMT step" in seconds else None,
                            utilisation=flops / product * ratio(seconds["matrix product"], s) or None,
                            peak_mib=max(peak for _, peak in noted[row]) or None)
        rows.append({"item": row, **numbers, "tokens": tokens, "flops": flops})
    return rows


def bench(config, run):
    """The rows of all sizes; with --grow each has its size, `at`, and its `growth` since the first."""
    (note, spent), data, grow, rows, first = stopwatch(run.device), random_data(config.seed).to(run.device), config.grow, [], {}
    for at in GROWTH.get(grow, (0,)):
        torch.manual_seed(config.seed % 2**63)
        configs = stage_configs(config.preset, config.seed, grow, at)
        if grow == "processes":
            items = [launch(at, replace(configs["smt"], compile=config.compile), spent)]
        else:
            items = [optimiser_step("SMT step", "smt", configs["smt"], data, run, note),
                     dmt(configs["dmt"], configs["smt"], data, run, note, spent),
                     optimiser_step("BPTT step", "bptt", configs["bptt"], data, run, note),
                     optimiser_step("Transformer step", "transformer", configs["transformer"], data, run, note)]
            streams = {"T": (), "batch": (at,)}.get(grow, STREAMS)             # the RNN's speed does not depend on T
            names = ["sampling" if grow else f"sampling, {n} stream{'s' * (n > 1)}" for n in streams]
            items += [sampling(*pair, configs["smt"], data, run, note) for pair in zip(names, streams)]
        items.append(products(run, note))
        work = {row: numbers for part, _ in items for row, numbers in part.items()}
        warm_ups = 0 if grow == "processes" else 3 if run.compile else 1
        noted = repeat([measure for _, measure in items], config.rounds, warm_ups, spent, f"{grow} {at}" if grow else "rounds")
        for numbers in summarise(work, noted, config.rounds):
            if grow:
                before = first.setdefault(numbers["item"], numbers["ms"])
                numbers |= dict(at=at, growth=numbers["ms"] / before if before and numbers["ms"] else None)
            rows.append(numbers)
        del items
        gc.collect()            # a compiled module refers to itself
        torch.compiler.reset()  # the next size would compile no more where this one has used up the limit on shapes
    return rows


def table(rows, grow):
    """The rows as lines of text; with --grow, those of one item below each other."""
    columns = {"at": (grow, 11, "")} | COLUMNS | {"growth": ("x first", 9, ".2f")} if grow else COLUMNS
    lines = [f"{'':24}" + "".join(f"{title:>{width}}" for title, width, _ in columns.values())]
    items = list(dict.fromkeys(row["item"] for row in rows))
    for row in sorted(rows, key=lambda row: items.index(row["item"])):
        lines.append(f"{row['item']:24}" + "".join(f"{'-' if row[name] is None else format(row[name], form):>{width}}"
                                                   for name, (_, width, form) in columns.items()))
    return "\n".join(lines)


def device_name(device):
    """What the GPU or the CPU is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def main():
    config = runtime.parse(Config)
    device = runtime.choose_device("cpu" if config.grow == "processes" else config.device)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device is auto, cpu, cuda or cuda:N, not {config.device}")
    cuda = device.type == "cuda"
    if config.threads or config.grow == "processes":
        torch.set_num_threads(config.threads or 1)
    run = runtime.Run(device, 0, 1, Path(), cuda if config.compile is None else config.compile, 1)
    torch._dynamo.config.cache_size_limit = runtime.COMPILED_SHAPES
    rows = bench(config, run)
    smt = build(stage_configs(config.preset, config.seed)["smt"], VOCAB_SIZE)
    gradient_bytes = sum(p.numel() * p.element_size() for p in smt.parameters())
    rate = 1000 * 2 * 512**3 / median(row["ms"] for row in rows if row["item"] == "matrix product")
    facts = dict(device=device_name(device), torch=torch.__version__, threads=torch.get_num_threads(),
                 precision="bf16 autocast" if cuda else "float32", compile=run.compile, matrix_flops_per_second=rate,
                 gradient_bytes=gradient_bytes,
                 preset=config.preset, rounds=config.rounds, seed=config.seed, grow=config.grow)
    print(f"{facts['device']}, torch {facts['torch']}, threads {facts['threads']}, {facts['precision']}, "
          f"compile {'on' if run.compile else 'off'}, {rate / 1e9:,.1f} GFLOP/s with 512 x 512 matrices, "
          f"preset {config.preset}, rounds {config.rounds}, {gradient_bytes / 1e6:,.1f} MB of gradients to exchange in an SMT step")
    print(table(rows, config.grow))
    if config.json:
        text = json.dumps(facts | {"rows": rows}, indent=1) + "\n"
        runtime.write_atomically(config.json, lambda path: path.write_text(text))


if __name__ == "__main__":
    runtime.run_main(main)
