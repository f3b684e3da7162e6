"""The experiments of reproduce.py: their flags, their runs, and further measurements of a finished run.

The table of flags comes first. EXPERIMENTS, at the end, has every experiment by name.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import sample
from evaluate import evaluate
from experiments import tables, train_baseline
from experiments.figures import MULTIPLES, longer_documents
from lib.checkpoints import restore

# ----------------------------------------------------------------------------------------------------
# Flags, on top of the preset tiny.

MANY = "--eval_docs=256"        # a document has few targets: 64 are too few to tell 0.95 from 0.99
DATA = {                        # name here: (data set, its options, flags of all its runs)
    "copy 6": ("copy", dict(length="6"), MANY),
    "copy 10": ("copy", dict(length="10"), MANY),
    "keyvalue 1": ("keyvalue", dict(keys=4, key_length=1, value_length=1), MANY),
    "keyvalue 2": ("keyvalue", dict(keys=4, key_length=2, value_length=2), MANY),
    "stack 32": ("stack", dict(length="32", depth=4), MANY),
    "stack 64": ("stack", dict(length="64", depth=6), MANY),
    "retrieval 32": ("retrieval", dict(length="32"), MANY),
    "retrieval 64": ("retrieval", dict(length="64"), MANY),
    "retrieval 128": ("retrieval", dict(length="128"), MANY),
    "modular 5": ("modular", dict(length="16", modulus=5), MANY),
    "modular 7": ("modular", dict(length="16", modulus=7), MANY),
    "fables": ("fables", {}, ""),
    "tinystories": ("tinystories", {}, ""),
    "mnist": ("mnist", {}, "--eval_docs=32"),
}
TASKS = {                       # name in DATA: (flags of SMT, flags of DMT)
    "copy 6": ("", ""), "keyvalue 1": ("", ""), "stack 32": ("", ""), "modular 5": ("", ""),
    "retrieval 64": ("--future_len=64", "")}
HARDER = {"keyvalue 2": ("", ""), "stack 64": ("", ""), "modular 7": ("", ""),
          "copy 10": ("", "--max_iters=2000"), "retrieval 128": ("--future_len=128", "--max_iters=150")}
KINDS = {"gru": "--updater=gru", "transformer": "--updater=transformer --updater_layers=2",
         "mlp": "--updater=mlp"}
SMT_CHANGES = ("--lambda_dyn=0.01", "--lambda_dyn=1", "--lambda_unif=0", "--future_len=1", "--future_len=4",
               "--future_len=12", "--trunk_iters=0", "--conv_width=1", "--optimizer=adamw")    # one at a time
DMT_CHANGES = ("--lambda_dyn=10", "--optimizer=adamw")
WINDOW = "--encoder=window --trunk_iters=0 --positions=1 --batch_size=16", "--label_stride=8"    # SMT, DMT
LENGTHS = "retrieval 32", "stack 32"
LOOK_BACK = "--context_len=256"                                         # as long as the longest document
SCALING = {"memory_tokens": (16, 4, 8), "context_len": (220, 64, 128), "d_model": (64, 16, 32)}
# the first of each size is the preset's

BASELINES = {"bptt": "", "lstm": "", "transformer": ""}                 # stage: its flags
RECURRENT = {"bptt": "", "lstm": ""}
NAMES = {"bptt": "BPTT", "lstm": "LSTM", "transformer": "Transformer"}
RATES = (1e-3, 3e-3)    # learning rates of a baseline at the first seed; the better one is for the others
PROBE = "--max_iters=30 --eval_docs=4"     # a run that measures the time of a step


# ----------------------------------------------------------------------------------------------------
# Runs

def slug(text):
    """A name for a folder."""
    return re.sub(r"[^a-z0-9.=_]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class Run:
    """One command: a train script, its flags and its data set.

    It starts after its `needs` are finished, and all of `best_of` have ended, one of them at least finished.
    """
    case: str                       # what is compared: a row of the table
    method: str                     # a column; of several runs of a case, method and seed the best one counts
    seed: int
    data: str                       # a key of DATA
    stage: str                      # smt, dmt, bptt, lstm or transformer
    flags: str = ""
    after: "Run | None" = None      # run whose weights it starts from
    as_long_as: tuple = ()          # trains for as many seconds as these runs, at the speed of `probe`
    probe: "Run | None" = None
    best_of: tuple = ()             # takes the learning rate of the best of these runs, after all have ended
    tag: str = ""                   # tells runs of a case, method and seed apart

    @property
    def name(self):
        """The name of its folder."""
        return slug(f"{self.case} {self.method} {self.tag} {self.seed}")

    @property
    def needs(self):
        return {run for run in (self.after, self.probe, *self.as_long_as) if run}

    @property
    def label(self):
        """The name of its curve in a figure."""
        return self.case.removeprefix(f"{self.data}, ") if self.case != self.data else self.method


def compare(data, seeds, smt="", dmt="", baselines=None, rates=RATES, case=""):
    """SMT, SMT then DMT, and baselines {stage: flags} that train for as many seconds as both together.

    rates: the grid of a baseline's learning rates, at the first seed; () takes the preset's.
    """
    case, runs, grids = case or data, [], {}
    probes = {stage: Run(case, "probe", seeds[0], data, stage, f"{flags} {PROBE}", tag=stage)
              for stage, flags in (baselines or {}).items()}
    for seed in seeds:
        first = Run(case, "SMT", seed, data, "smt", smt)
        second = Run(case, "SMT+DMT", seed, data, "dmt", dmt, after=first)
        runs += [first, second]
        for stage, probe in probes.items():
            run = Run(case, NAMES[stage], seed, data, stage, baselines[stage], as_long_as=(first, second),
                      probe=probe, best_of=grids.get(stage, ()))
            if rates and stage not in grids:
                grids[stage] = tuple(replace(run, flags=f"{run.flags} --lr={rate:g}", tag=f"lr={rate:g}")
                                     for rate in rates)
                runs += grids[stage]
            else:
                runs.append(run)
    return [*probes.values(), *runs]


def against_baselines(which, seeds, baselines=BASELINES):
    """Each data set by SMT, DMT and the baselines; all data sets at one seed, then at the next."""
    runs = [run for data, flags in which.items() for run in compare(data, seeds, *flags, baselines)]
    return sorted(runs, key=lambda run: run.seed)


def dagger_runs(seeds):
    """After SMT, DMT or as many more seconds of SMT: labels on the RNN's memories or on the encoder's."""
    runs = []
    for seed in seeds:
        first, second = compare("keyvalue 1", [seed], *TASKS["keyvalue 1"])
        probe = replace(first, method="probe", after=first, flags=f"{first.flags} {PROBE}")
        more = replace(first, method="SMT+SMT", after=first, as_long_as=(second,), probe=probe)
        runs += [first, second, probe, more]
    return runs


def updaters_runs(seeds):
    """Each kind of updater by SMT, DMT and BPTT; beside the preset's, mlp, an LSTM."""
    runs = []
    for kind, change in KINDS.items():
        baselines = {"bptt": change} | ({"lstm": ""} if kind == "mlp" else {})
        runs += compare("copy 6", seeds, change, "", baselines, case=f"copy 6, {kind}")
    return runs


def ablation_runs(seeds):
    """The preset; one change of SMT at a time, then DMT as it is; one change of DMT at a time."""
    runs = []
    for seed in seeds:
        first, second = compare("copy 6", [seed], case="copy 6, preset")
        runs += [first, second]
        for change in SMT_CHANGES:
            runs += compare("copy 6", [seed], change, case=f"copy 6, {change}")
        for change in DMT_CHANGES:
            runs.append(replace(second, case=f"copy 6, DMT {change}", flags=change))
    return runs


def encoders_runs(seeds):
    """SMT and DMT with each encoder; each stage with the window encoder as long as with the causal one."""
    runs, probes = [], {}
    for seed in seeds:
        causal = compare("fables", [seed], case="fables, causal, many positions")
        window = compare("fables", [seed], *WINDOW, case="fables, window, 1 position")
        runs += causal
        for run, other in zip(window, causal):
            run = replace(run, after=run.after and runs[-1])
            probe = replace(run, method="probe", tag=run.stage, flags=f"{run.flags} {PROBE}")
            probe = probes.setdefault(run.stage, probe)             # the first seed's
            runs += [probe, replace(run, as_long_as=(other,), probe=probe)]
    return list(dict.fromkeys(runs))


def length_runs(seeds):
    """All methods on short documents; `measure_lengths` adds the longer ones."""
    baselines = BASELINES | {"transformer": LOOK_BACK}
    return [run for data in LENGTHS for run in compare(data, seeds, LOOK_BACK, "", baselines)]


def pixels_runs(seeds):
    """MNIST; a Transformer that sees the whole picture."""
    flags = {stage: "--batch_size=8" for stage in BASELINES}
    flags["transformer"] += " --context_len=784"
    return compare("mnist", seeds, baselines=flags, rates=())


def scaling_runs(seeds):
    """The preset, and one size at a time."""
    changes = ["", *(f"--{name}={value}" for name, values in SCALING.items() for value in values[1:])]
    return [run for change in changes
            for run in compare("fables", seeds, change, "", case=f"fables, {change or 'preset'}")]


# ----------------------------------------------------------------------------------------------------
# Further measurements of a finished run. Each function returns dicts; each dict, on top of the run's record,
# is one record of the results. checkpoint: of the run; name: of the results' files.

def measure_lengths(run, checkpoint, name):
    """Loss and accuracy on 256 new documents of each of MULTIPLES; the encoder's as a method of its own."""
    meta, records = checkpoint["data"], []
    if run.stage in ("lstm", "transformer"):
        numbers_of = partial(train_baseline.evaluate, train_baseline.load_baseline(checkpoint))
    else:
        numbers_of = partial(evaluate, *restore(checkpoint)[1:])
    for k in MULTIPLES:
        numbers = numbers_of(*longer_documents(meta, k, 256), meta)
        here = dict(case=f"{run.case}, {k} x the length", panel=f"{run.case}: times the length of training",
                    value=k, curve=None)
        records.append({**here, **numbers})
        if run.stage == "smt":
            teacher = {f"val_rnn_{what}": numbers[f"val_teacher_{what}"] for what in ("loss", "accuracy")}
            records.append({**here, "method": "Encoder-decoder", **teacher})
    return records


def paint_pictures(run, checkpoint, name):
    """Samples and completions of held-out pictures by the RNN, as PNG files beside the results."""
    if run.stage in ("lstm", "transformer"):
        return [{}]
    pictures, (_, networks, initial_memory) = [], restore(checkpoint)
    for what, prompt, n in (("samples", "", 16), ("completions", "held-out", 8)):
        config = sample.Config(data_dir=checkpoint["config"]["data_dir"], prompt=prompt, num_samples=n)
        pictures.append(f"{name}-{slug(run.method)}-{run.seed}-{what}.png")
        path = tables.FOLDER / pictures[-1]
        sample.paint(networks, initial_memory, checkpoint["data"], config, path)
    return [{"pictures": pictures}]


def measure_sizes(run, checkpoint, name):
    """After DMT, a record for each size of SCALING in whose panel the run is: the base is in all."""
    sizes = {size: checkpoint["model_config"][size] for size in SCALING}
    changed = {size for size in SCALING if sizes[size] != SCALING[size][0]}
    return [dict(case=f"{size} {value}", panel=size, value=value) for size, value in sizes.items()
            if run.stage == "dmt" and changed <= {size}]


# ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Experiment:
    """A question, about how long the answer takes, the runs it needs and what becomes of them."""
    question: str
    minutes: int                    # of all runs, two at a time on 2 cores
    seeds: int
    runs: Callable                  # seeds -> runs, each after its needs
    metrics: tuple                  # a table each
    figure: Callable
    measure: Callable = lambda run, checkpoint, name: [{}]      # further measurements, see above


BOTH, COST = ("val_rnn_accuracy", "val_rnn_loss"), ("seconds", "tokens", "sequential_flops")
MEMORY = ("val_teacher_loss", "val_drift", "seconds")
EXPERIMENTS = {
    "fables": Experiment(
        "Which method tells stories best, in the same time?", 110, 3,
        partial(against_baselines, {"fables": ("", "")}),
        ("val_rnn_loss", "val_gap_to_floor", *COST, "lr"), tables.curves(COST, ["val_rnn_loss"])),
    "tasks": Experiment(
        "Does SMT+DMT learn what the baselines learn, in the same time?", 140, 3,
        partial(against_baselines, TASKS),
        (*BOTH, "seconds", "tokens", "max_iters", "lr"), tables.dots("val_rnn_accuracy")),
    "harder": Experiment(
        "Which RNN still learns the tasks when they are harder?", 90, 1,
        partial(against_baselines, HARDER, baselines=RECURRENT),
        (*BOTH, "seconds", "max_iters", "lr"), tables.dots("val_rnn_accuracy")),
    "dagger": Experiment(
        "Is it DMT that makes the RNN stand alone, or would more of SMT do?", 5, 2, dagger_runs,
        (*BOTH, *MEMORY), tables.curves(["seconds"], ["val_rnn_accuracy", "val_drift"])),
    "updaters": Experiment(
        "Does it depend on the kind of RNN?", 30, 2, updaters_runs,
        (*BOTH, "val_drift", "seconds"), tables.dots("val_rnn_loss", apart=True)),
    "ablation": Experiment(
        "What does each part of SMT and DMT contribute?", 25, 2, ablation_runs,
        (*BOTH, *MEMORY), tables.dots("val_rnn_loss", "val_drift", apart=True)),
    "encoders": Experiment(
        "One window for each memory, or many memories from one pass?", 35, 2, encoders_runs,
        (*BOTH, *MEMORY, "tokens"), tables.curves(["seconds", "tokens"], ["val_rnn_loss"])),
    "length": Experiment(
        "Does it hold on documents longer than those of training?", 45, 2, length_runs,
        BOTH, tables.against("val_rnn_accuracy", "val_rnn_loss"), measure_lengths),
    "tinystories": Experiment(
        "Which method models text best, in the same time?", 120, 3,
        partial(compare, "tinystories", baselines=BASELINES, rates=()),
        ("val_rnn_loss", *COST, "lr"), tables.curves(COST, ["val_rnn_loss"])),
    "pixels": Experiment(
        "Does it hold over 784 steps?", 45, 1, pixels_runs,
        ("val_rnn_loss", "val_drift", *COST), tables.curves(COST, ["val_rnn_loss"]), paint_pictures),
    "scaling": Experiment(
        "How does the loss fall with the memory, the context and the width?", 80, 2, scaling_runs,
        ("val_rnn_loss", "val_gap_to_floor", "val_teacher_loss", "seconds"),
        tables.against("val_gap_to_floor", "val_teacher_loss"), measure_sizes),
}
