"""The experiments of reproduce.py: what is run, with which flags, and what is made of it.

First the flags, to be read and edited; then the runs that each experiment needs; then what a finished run is asked beside its last
evaluation; at the end EXPERIMENTS, all of it by name.
"""
import functools
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import data as datasets
import results
import sample
import train_smt
from evaluate import evaluate
from figures import longer_documents
from model import restore

# ---------------------------------------------------------------------------------------------------------------------
# Flags are those of the train scripts; what is not said is the preset tiny.

PROBE = "--max_iters=30 --log_interval=5 --eval_docs=4"       # a run that only tells how long a step takes
MANY = "--eval_docs=256"        # documents that ask one question each: 64 are too few to tell 0.95 from 0.99
DATA = {                        # {name here: (data set, its options, flags of all its runs)}
    **{f"retrieval {n}": ("retrieval", dict(length=str(n)), MANY) for n in (32, 64, 128)},
    "copy 6": ("copy", dict(length="6"), MANY), "copy 10": ("copy", dict(length="10"), MANY),
    "stack 32": ("stack", dict(length="32", depth=4), MANY),
    "stack 64": ("stack", dict(length="64", depth=6), MANY),
    "keyvalue 1": ("keyvalue", dict(keys=4, key_length=1, value_length=1), MANY),
    "keyvalue 2": ("keyvalue", dict(keys=4, key_length=2, value_length=2), MANY),
    "modular 5": ("modular", dict(length="16", modulus=5), MANY), "modular 7": ("modular", dict(length="16", modulus=7), MANY),
    "fables": ("fables", {}, ""), "tinystories": ("tinystories", {}, ""), "mnist": ("mnist", {}, "--eval_docs=32 --eval_len=784")}

TASKS = {name: dict(smt="", dmt="", bptt="") for name in ("copy 6", "keyvalue 1", "stack 32", "retrieval 64", "modular 5")}
HARDER = {name: dict(smt="", dmt="", bptt="") for name in ("copy 10", "keyvalue 2", "stack 64", "retrieval 128", "modular 7")}
TASKS["retrieval 64"]["smt"], HARDER["retrieval 128"]["smt"] = "--future_len=64", "--future_len=128"
HARDER["retrieval 128"]["dmt"], HARDER["copy 10"]["dmt"] = "--max_iters=150", "--max_iters=2000"
LEARNING_RATES = (1e-3, 3e-3)                       # of BPTT; the better one at the first seed, by held-out loss, serves the other seeds
HARDER["copy 10"]["rates"] = HARDER["stack 64"]["rates"] = (3e-3,)      # which BPTT learns at either rate
FABLES = dict(smt="--max_iters=1000 --trunk_iters=400", dmt="--max_iters=250", bptt="")     # where runs are many

UPDATERS = {                                        # BPTT at the learning rate that is the better one of such data in `tasks` and `text`
    "copy 6": TASKS["copy 6"] | dict(rates=(3e-3,)), "retrieval 32": dict(smt="", dmt="", bptt="", rates=(1e-3,)),
    "fables": FABLES | dict(rates=(3e-3,))}

ABLATION = {                                        # one factor at a time: a line of flags, of SMT or, after SMT as it is, of DMT
    "copy 6": dict(TASKS["copy 6"], change_smt=[
        "--lambda_dyn=1", "--lambda_unif=0", "--trunk_iters=0", "--future_len=1", "--future_len=4", "--positions=4",
        "--positions=1", "--optimizer=adamw"],
        change_dmt=["--label_stride=4", "--lambda_dyn=10", "--optimizer=adamw", "--max_iters=250"]),
    "fables": dict(FABLES, change_smt=["--lambda_dyn=1", "--trunk_iters=0", "--future_len=16", "--positions=1",
                                       "--optimizer=adamw"],
                   change_dmt=["--label_stride=4", "--horizon=110", "--p_start=0.1", "--optimizer=adamw"])}

ENCODERS = {                                        # (times the rows, flags of SMT); the other gets as many seconds as the first
    "causal, many positions": (1, ""),
    "window, 1 position": (4, "--encoder=window --trunk_iters=0 --positions=1")}
ENCODED = {                                         # rows of the reference; DMT with the window has fewer labels, which it pays for one by one
    "retrieval 64": dict(rows=16, smt="--future_len=64 --context_len=64", causal_dmt="", window_dmt="--label_stride=8"),
    "stack 32": dict(rows=16, smt="--context_len=32", causal_dmt="--max_iters=400", window_dmt="--max_iters=400 --label_stride=8"),
    "fables": dict(rows=4, smt=f"{FABLES['smt']} --eval_docs=16", causal_dmt=f"{FABLES['dmt']} --eval_docs=16",
                   window_dmt=f"{FABLES['dmt']} --eval_docs=16 --label_stride=8")}

MULTIPLES = (1, 2, 4, 8)                            # of 32 tokens: the Transformer and the encoder look back over all of them
LENGTHS = {name: dict(smt="--context_len=256", dmt="", transformer="--context_len=256") for name in ("retrieval 32", "stack 32")}

TEXT = {"fables": dict(smt="", dmt="", bptt="", transformer="", rates=LEARNING_RATES),
        "tinystories": dict(smt="--max_iters=2500 --trunk_iters=1000", dmt="", bptt="", transformer="", rates=(3e-3,))}

PIXELS = "--context_len=784 --batch_size=8"
MNIST = dict(smt=f"{PIXELS} --max_iters=900 --trunk_iters=300 --future_len=64",
             dmt="--max_iters=150 --horizon=112 --label_stride=4", bptt="--batch_size=8", transformer=PIXELS)

SCALING = {"memory_tokens": (8, 2, 4), "context_len": (220, 32, 64, 128), "d_model": (64, 16, 32, 48)}    # first the preset's


def slug(text):
    """A name for a folder."""
    return re.sub(r"[^a-z0-9.=_]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class Run:
    """One command: a train script, its flags and its data set. The other runs it refers to must be finished before it starts."""
    case: str                       # what is compared: a line of the table
    method: str                     # a column of the table; several runs of a method and seed: the best one by held-out loss counts
    seed: int
    data: str                       # of DATA
    stage: str                      # of STAGES
    flags: str = ""
    after: "Run | None" = None      # whose weights it starts from
    equal: str = ""                 # it spends as many seconds, or tokens, as the runs `to`: so many steps, at the speed of `probe`
    to: tuple = ()
    probe: "Run | None" = None
    best_of: tuple = ()             # takes the learning rate of the best of these runs
    tag: str = ""                   # tells runs of the same case, method and seed apart

    @property
    def name(self):
        """Of its folder."""
        return slug(f"{self.case} {self.method} {self.tag} {self.seed}")

    @property
    def needs(self):
        return {run for run in (self.after, self.probe, *self.to, *self.best_of) if run}

    @property
    def line(self):
        """What a curve of the figure is called."""
        return self.case.removeprefix(f"{self.data}, ") if self.case != self.data else self.method


def compare(data, seeds, smt="", dmt="", bptt=None, transformer=None, equal=("seconds",), rates=(), case=""):
    """SMT, SMT then DMT, and the baselines whose flags are given, for as many seconds or tokens as both together.

    equal: the first for every seed, the others for the first seed alone. rates: learning rates for BPTT to try at the first seed.
    """
    case, runs, grid = case or data, [], ()
    baselines = {stage: flags for stage, flags in (("bptt", bptt), ("transformer", transformer)) if flags is not None}
    probes = {stage: Run(case, "probe", seeds[0], data, stage, f"{flags} {PROBE}", tag=stage) for stage, flags in baselines.items()}
    for seed in seeds:
        first = Run(case, "SMT", seed, data, "smt", smt)
        second = Run(case, "SMT+DMT", seed, data, "dmt", dmt, after=first)
        runs += [first, second]
        for (stage, flags), amount in itertools.product(baselines.items(), equal if seed == seeds[0] else equal[:1]):
            method = f"{'BPTT' if stage == 'bptt' else 'Transformer'}, same {amount}"
            baseline = functools.partial(Run, case, method, seed, data, stage, equal=amount, to=(first, second), probe=probes[stage])
            if stage == "bptt" and rates and not grid:
                grid = tuple(baseline(f"{flags} --lr={rate:g}", tag=f"lr={rate:g}") for rate in rates)
                runs += grid
            else:
                runs.append(baseline(flags, best_of=grid if stage == "bptt" else ()))
    return [*probes.values(), *runs]


def tasks_runs(seeds, source, which=TASKS):
    """Each task by SMT, DMT and BPTT, with BPTT's learning rate chosen among LEARNING_RATES; all tasks at one seed, then at the next."""
    runs = [run for data, flags in which.items()
            for run in compare(data, seeds, **dict(rates=LEARNING_RATES) | flags, equal=("seconds", "tokens"))]
    return sorted(runs, key=lambda run: run.seed)


def dagger_runs(seeds, source):
    """After SMT, DMT against as many seconds more of SMT: labels on the RNN's own memories, or more of them on the encoder's."""
    runs, flags = [], TASKS["keyvalue 1"]
    for seed in seeds:
        first, second = compare("keyvalue 1", [seed], flags["smt"], flags["dmt"])
        probe = replace(first, method="probe", after=first, flags=f"{first.flags} {PROBE}")
        runs += [first, second, probe, replace(first, method="SMT+SMT", after=first, equal="seconds", to=(second,), probe=probe)]
    return runs


def updaters_runs(seeds, source):
    """Each kind of updater by SMT, DMT and BPTT."""
    kinds = {"mlp": "--updater=mlp", "transformer": "--updater=transformer --updater_layers=2", "gru": "--updater=gru"}
    return [run for data, flags in UPDATERS.items() for kind, change in kinds.items()
            for run in compare(data, seeds, f"{flags['smt']} {change}", flags["dmt"], f"{flags['bptt']} {change}", rates=flags["rates"],
                               case=f"{data}, {kind}")]


def ablation_runs(seeds, source):
    """The preset, then one change of SMT at a time with DMT as it is, then one change of DMT at a time after the preset's SMT.
    What the decoder says in place of the readout comes from `look_at_readout`."""
    runs = []
    for data, flags in ABLATION.items():
        for seed in seeds:
            first, second = compare(data, [seed], flags["smt"], flags["dmt"], case=f"{data}, preset")
            runs += [first, second]
            for change in flags["change_smt"]:
                runs += compare(data, [seed], f"{flags['smt']} {change}", flags["dmt"], case=f"{data}, {change}")
            for change in flags["change_dmt"]:
                runs.append(Run(f"{data}, DMT {change}", "SMT+DMT", seed, data, "dmt", f"{flags['dmt']} {change}", after=first))
    return runs


def encoders_runs(seeds, source):
    """SMT and DMT with each encoder, each stage for as many seconds as the reference takes; fables, where they are far apart, at the
    first seed alone."""
    runs, probes = [], {}

    def as_long_as(other, run):
        """A probe, the first seed's, and the run."""
        probe = probes.setdefault((run.case, run.stage), replace(run, method="probe", tag=run.stage, flags=f"{run.flags} {PROBE}"))
        return [probe, replace(run, equal="seconds", to=(other,), probe=probe)]

    for data, seed in ((data, seed) for data in ENCODED for seed in (seeds if data != "fables" else seeds[:1])):
        flags, reference = ENCODED[data], None
        for kind, (times, change) in ENCODERS.items():
            first, second = compare(data, [seed], f"{flags['smt']} --batch_size={times * flags['rows']} {change}",
                                    flags[f"{kind.split(',')[0]}_dmt"], case=f"{data}, {kind}")
            if reference:
                some = as_long_as(reference[0], first)
                some += as_long_as(reference[1], replace(second, after=some[-1]))
            else:
                reference = some = [first, second]
            runs += some
    return list(dict.fromkeys(runs))


def length_runs(seeds, source):
    """SMT, DMT and a Transformer; the lengths come from `look_at_length`."""
    return [run for data, flags in LENGTHS.items() for run in compare(data, seeds, **flags)]


def text_runs(seeds, source):
    """TinyStories only where its files are: its download is 2 GB."""
    return [run for data, flags in TEXT.items() if data == "fables" or source
            for run in compare(data, seeds, **flags, equal=("seconds", "tokens"))]


def pixels_runs(seeds, source):
    """MNIST at a size for a CPU by all four methods."""
    return compare("mnist", seeds, **MNIST)


def scaling_runs(seeds, source):
    """One size at a time; rows of 220 tokens whatever the context."""
    changes = [("", ""), *((f"--{name}={value}", "--seq_len=220" if name == "context_len" else "")
                           for name, values in SCALING.items() for value in values[1:])]
    return [run for change, rows in changes
            for run in compare("fables", seeds, f"{FABLES['smt']} {change} {rows}", f"{FABLES['dmt']} {rows}",
                               case=f"fables, {change or 'base'}")]


# ---- what a finished run is asked beside its last evaluation: a list of changes to its record, one record for each.
# place: the folder of its data set; name: of the results.

def effective_rank(memories):
    """In how many directions memories (n, K, d) vary: exp of the entropy of the normalised eigenvalues of their covariance (K d, K d)
    (Roy and Vetterli 2007), from 1 to K d; 0 if all memories are the same."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(memories.double().flatten(1).T)).clamp(min=0)
    total = float(eigenvalues.sum())
    return math.exp(float(torch.special.entr(eigenvalues / total).sum())) if total > 1e-12 else 0.0


@torch.no_grad()
def look_at_memories(run, checkpoint, place, name):
    """The size of updater and readout; uniformity and effective rank of the encoder's memories at 16 positions of 64 held-out
    documents."""
    _, networks, _ = restore(checkpoint)
    size = {"parameters": sum(p.numel() for name in ("updater", "readout") for p in networks[name].parameters())}
    if "encoder" not in networks:
        return [size]
    data = datasets.load(checkpoint["data"]["name"], place)
    x, _ = datasets.held_out(data, 64, 512, seed=0)
    t = torch.linspace(0, x.shape[1] - 1, min(16, x.shape[1])).long()
    memories = networks["encoder"](x, t)[x[:, t] != data.pad]                                       # (n, K, d)
    uniformity = float(train_smt.uniformity(memories))
    return [{**size, "uniformity": uniformity, "effective_rank": effective_rank(memories)}]


def look_at_readout(run, checkpoint, place, name):
    """Of the preset also what the RNN is worth with the decoder in place of the readout, put there after training."""
    if not run.case.endswith(", preset") or run.stage != "dmt":
        return [{}]
    _, networks, initial_memory = restore(checkpoint)
    networks["readout"].start_from(networks["decoder"])
    data, config = datasets.load(checkpoint["data"]["name"], place), checkpoint["config"]
    numbers = evaluate(networks, initial_memory, *datasets.held_out(data, config["eval_docs"], config["eval_len"], seed=0), data.meta)
    return [{}, dict(case=f"{run.data}, DMT read by the decoder", curve=None, **numbers)]


def look_at_length(run, checkpoint, place, name):
    """Loss and accuracy on 256 new documents of 1, 2, 4 and 8 times the length; the encoder's under a method of its own."""
    _, networks, initial_memory = restore(checkpoint)
    meta, records = checkpoint["data"], []
    for k in MULTIPLES:
        numbers = evaluate(networks, initial_memory, *longer_documents(meta, k, 256), meta)
        here = dict(case=f"{run.case}, {k} x the length", panel=f"{run.case}: times the length of training", value=k, curve=None)
        records.append({**here, **numbers})
        if run.stage == "smt":
            records.append({**here, "method": "Encoder-decoder", "val_rnn_loss": numbers["val_teacher_loss"],
                            "val_rnn_accuracy": numbers["val_teacher_accuracy"]})
    return records


def look_at_pictures(run, checkpoint, place, name):
    """Paint samples and completions of held-out pictures beside the results."""
    pictures, (_, networks, initial_memory) = [], restore(checkpoint)
    for what, prompt, n in (("samples", "", 16), ("completions", "held-out", 8)):
        config = sample.Config(data_dir=str(place), prompt=prompt, num_samples=n)
        pictures.append(f"{name}-{slug(run.method)}-{run.seed}-{what}.png")
        sample.paint(networks, initial_memory, checkpoint["data"], config, results.FOLDER / pictures[-1])
    return [{"pictures": pictures}]


def look_at_sizes(run, checkpoint, place, name):
    """After DMT, a record for each size of SCALING that the run stands for: all the others are those of the base."""
    sizes = {size: checkpoint["model_config"][size] for size in SCALING}
    return [dict(case=f"{size} {value}", panel=size, value=value) for size, value in sizes.items()
            if run.stage == "dmt" and all(sizes[other] == SCALING[other][0] for other in SCALING if other != size)]


@dataclass(frozen=True)
class Experiment:
    """What is asked, about how long the answer takes, the runs it needs and what is made of them."""
    question: str
    minutes: int                    # of all runs, two at a time on 2 cores
    seeds: int
    runs: Callable                  # (seeds, source) -> runs
    metrics: tuple                  # a table each
    figure: Callable
    look: Callable = lambda run, checkpoint, place, name: [{}]


ACCURACY = ("val_rnn_accuracy", "val_rnn_loss")
COST = ("seconds", "tokens", "sequential_flops")
EXPERIMENTS = {
    "tasks": Experiment("Does SMT then DMT learn what BPTT learns, in the same time, and from as many sequences?", 60, 2, tasks_runs,
                        (*ACCURACY, "seconds", "max_iters", "lr"), results.dots("val_rnn_accuracy")),
    "harder": Experiment("Which method still learns the tasks when they are harder?", 60, 1, functools.partial(tasks_runs, which=HARDER),
                         (*ACCURACY, "seconds", "max_iters", "lr"), results.dots("val_rnn_accuracy")),
    "dagger": Experiment("Is it DMT that makes the RNN stand alone, or would more of SMT do?", 10, 2, dagger_runs,
                         (*ACCURACY, "val_teacher_loss", "val_drift", "seconds"),
                         results.curves(["seconds"], ["val_rnn_accuracy", "val_drift"])),
    "updaters": Experiment("Does it depend on the kind of RNN?", 40, 1, updaters_runs,
                           (*ACCURACY, "uniformity", "effective_rank", "parameters", "seconds"),
                           results.dots("val_rnn_loss", "effective_rank", apart=True), look_at_memories),
    "ablation": Experiment("What does each part of SMT and DMT contribute?", 40, 1, ablation_runs,
                           (*ACCURACY, "val_teacher_loss", "val_drift", "flops"), results.dots("val_rnn_loss", "val_drift", apart=True),
                           look_at_readout),
    "encoders": Experiment("One window for each memory, or many memories from one pass?", 30, 2, encoders_runs,
                           (*ACCURACY, "val_teacher_loss", "val_drift", "seconds", "tokens"),
                           results.curves(["seconds", "tokens"], ["val_rnn_loss"])),
    "length": Experiment("Does it hold on documents longer than those of training?", 20, 2, length_runs, ACCURACY,
                         results.against("val_rnn_accuracy", "val_rnn_loss"), look_at_length),
    "text": Experiment("What is text worth to each method, for the same time and for the same tokens?", 35, 1, text_runs,
                       ("val_rnn_loss", "val_gap_to_floor", *COST), results.curves(COST, ["val_rnn_loss"])),
    "pixels": Experiment("Does it hold over 784 steps?", 20, 1, pixels_runs, ("val_rnn_loss", "val_drift", *COST),
                         results.curves(COST, ["val_rnn_loss"]), look_at_pictures),
    "scaling": Experiment("How does the loss fall with the memory, the context and the width?", 30, 1, scaling_runs,
                          ("val_rnn_loss", "val_gap_to_floor", "val_teacher_loss", "seconds"),
                          results.against("val_gap_to_floor", "val_teacher_loss", fit=True), look_at_sizes),
}
