"""Run a named experiment end to end, and write its table and figure to results/<experiment>.json, .md and .png.

    python reproduce.py                     # lists the experiments: what is done, what remains, about how long
    python reproduce.py tasks --jobs=2      # run one, or go on with it: two runs at a time, one thread each
    python reproduce.py dagger length       # one after the other
    python reproduce.py tasks --scale=0.1   # a tenth of the steps, kept apart from the full runs: a first look
    python reproduce.py pixels --source=FOLDER    # with the idx files of MNIST; text: adds TinyStories, from its two files

An experiment is a list of runs of the train scripts. Runs live in runs/reproduce/<experiment>/, their data sets in
runs/reproduce/data/. A finished run is not run again unless its flags have changed; an interrupted one is resumed; one that another
experiment has finished, on such a machine and with as many --jobs, is copied. Ctrl-C stops the runs, which save first. Tables and figure
are written anew whenever a run is finished.
"""
import dataclasses
import filecmp
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

import data as datasets
import results
import runtime
import tasks
import train_bptt
import train_dmt
import train_smt
import train_transformer
from bench import device_name
from experiments import DATA, EXPERIMENTS, slug
from runtime import UsageError

SEED, RUNS = 1337, Path("runs/reproduce")
STAGES = {"smt": train_smt, "dmt": train_dmt, "bptt": train_bptt, "transformer": train_transformer}
LEAST_STEPS = 20       # of a run that --scale shortens
CURVE = ("seconds", "tokens", "sequential_flops", "val_rnn_loss", "val_rnn_accuracy", "val_drift")     # kept of each evaluation
EVALUATIONS = 8        # of a run, beside the one before the first step


# ---------------------------------------------------------------------------------------------------------------------
# What a run is told, and how far it is. `root` is the folder of the experiment's runs.

@functools.cache
def resolve(stage, flags):
    """The config that a train script makes of its flags, a tuple, as a dict."""
    return dataclasses.asdict(runtime.parse(STAGES[stage].Config, flags, presets=STAGES[stage].PRESETS))


def place_of(data):
    """The folder of a data set of DATA: with other options it is another one."""
    return RUNS / "data" / slug(" ".join([data, *(f"{name}={value}" for name, value in DATA[data][1].items())]))


def log_of(run, root):
    """The lines of a run's metrics.jsonl, as dicts."""
    return runtime.read_log(root / run.name / "metrics.jsonl")


def evaluations(run, root):
    """Those of an evaluation, with what the runs that this one goes on from had spent added."""
    before = evaluations(run.after, root)[-1] if run.after else {}
    return [line | {name: line[name] + before.get(name, 0) for name in ("seconds", "tokens", "flops", "sequential_flops")}
            for line in log_of(run, root) if "val_rnn_loss" in line]


def steps_for(amount, spent):
    """How many steps spend an amount at the rate of a log: spent is [(step, amount until then)]. The first line with a step, which
    the warm-up slows down, only counts where it is the only one."""
    (first, at_first), (last, at_last) = next(line for line in spent if line[0] > 0), spent[-1]
    rate = (at_last - at_first) / (last - first) if last > first else at_last / last
    return max(1, round(amount / rate))


def flags_of(run, root, scale):
    """The flags of a run whose needs are finished: a tuple."""
    flags = [f"--dataset={DATA[run.data][0]}", f"--data_dir={place_of(run.data)}", f"--out_dir={root / run.name}",
             f"--seed={run.seed}", "--preset=tiny", *DATA[run.data][2].split(), *run.flags.split()]
    if run.after:
        flags.append(f"--init_from={root / run.after.name}")
    if run.best_of:
        best = min(run.best_of, key=lambda other: evaluations(other, root)[-1]["val_rnn_loss"])
        flags.append(f"--lr={resolve(best.stage, flags_of(best, root, scale))['lr']:g}")
    settings = resolve(run.stage, tuple(flags))
    steps = settings["max_iters"]
    if run.equal:
        amount = sum(log_of(other, root)[-1][run.equal] for other in run.to)
        steps = steps_for(amount, [(line["step"], line[run.equal]) for line in log_of(run.probe, root)])
    elif scale != 1:
        steps = max(min(steps, LEAST_STEPS), round(scale * steps))
        if settings.get("trunk_iters"):         # the trunk's phase keeps its share
            flags.append(f"--trunk_iters={round(scale * settings['trunk_iters'])}")
    return *flags, f"--max_iters={steps}", f"--eval_interval={math.ceil(steps / EVALUATIONS)}"


def config_of(folder):
    """What the run of a folder was told, but for --resume, as a dict; empty where it has no checkpoint yet."""
    if not all((folder / name).exists() for name in ("config.json", "ckpt.pt")):
        return {}
    return json.loads((folder / "config.json").read_text()) | {"resume": False}


def is_complete(folder):
    """Whether the log of a run ends with the evaluation after its last step."""
    last = (runtime.read_log(folder / "metrics.jsonl") or [{}])[-1]
    return last.get("step") == config_of(folder).get("max_iters", -1) and "val_rnn_loss" in last


def state(run, root, scale):
    """done, begun (there is a checkpoint to go on from) or new, of a run whose needs are finished. What was run with other flags is new."""
    here = root / run.name
    if config_of(here) != resolve(run.stage, flags_of(run, root, scale)):
        return "new"
    return "done" if is_complete(here) else "begun"


def are_alike(config, other):
    """Whether two runs do the same: told the same but for the folders, they begin with the same checkpoint, byte for byte, or with none."""
    if config | dict(out_dir="", init_from="") != other | dict(out_dir="", init_from=""):
        return False
    weights = [Path(told["init_from"]) / "ckpt.pt" for told in (config, other) if told["init_from"]]
    return not weights or len(weights) == 2 and all(path.exists() for path in weights) and filecmp.cmp(*weights, shallow=False)


def find_alike(run, root, scale, machine):
    """The folder of another finished run, of this experiment or another, that did on such a machine what a run whose needs are finished
    is to do; None if there is none."""
    config = resolve(run.stage, flags_of(run, root, scale))
    for folder in sorted({path.parent for path in RUNS.glob("*/*/config.json")} - {root / run.name}):
        machines = {launch["machine"] for launch in runtime.read_log(folder / "launches.jsonl")}
        if machines == {machine} and is_complete(folder) and are_alike(config_of(folder), config):
            return folder


def finished(runs, root, scale):
    """The runs that are done, and whose needs are."""
    done = set()
    for run in runs:                # in an order in which each comes after its needs
        if run.needs <= done and state(run, root, scale) == "done":
            done.add(run)
    return done


# ---------------------------------------------------------------------------------------------------------------------
# The runner

def prepare(data, source):
    """Prepare a data set of DATA where it is missing."""
    name, options, _ = DATA[data]
    place = place_of(data)
    if not (place / name / "meta.json").exists():
        datasets.prepare(name, place, source if name not in datasets.GENERATED else None, **options)


def clear(folder):
    """Delete the folder of a run, and those of the experiment's runs that began with its weights."""
    for path in folder.parent.glob("*/config.json"):
        if json.loads(path.read_text())["init_from"] == str(folder):
            clear(path.parent)
    shutil.rmtree(folder, ignore_errors=True)


def copy_run(folder, run, root, scale):
    """Make the finished run of another folder this run, told where it is now."""
    here, config = root / run.name, resolve(run.stage, flags_of(run, root, scale))
    clear(here)
    shutil.copytree(folder, here, ignore=shutil.ignore_patterns("seen.json", "config.json"))
    runtime.write_atomically(here / "config.json", lambda path: path.write_text(json.dumps(config, indent=1) + "\n"))


def launch(run, root, scale, jobs):
    """Start a run, or go on with it, as a process; its output goes to output.txt."""
    here, begun = root / run.name, state(run, root, scale) == "begun"
    if not begun:
        clear(here)
    here.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
    command = [sys.executable, STAGES[run.stage].__file__, *flags_of(run, root, scale), *["--resume"] * begun]
    with open(here / "output.txt", "w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment), time.perf_counter()


def this_machine(jobs):
    """Where a run is running, and how much of it is its own: part of the result."""
    threads = torch.get_num_threads()
    return f"{device_name(runtime.choose_device('auto'))}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)} a run, " \
           f"{jobs} at a time, torch {torch.__version__}"


def note_launch(run, root, jobs, began):
    """Note where and how long a run was running."""
    with open(root / run.name / "launches.jsonl", "a") as file:
        file.write(json.dumps({"machine": this_machine(jobs), "seconds": (time.perf_counter() - began) / jobs}) + "\n")


def last_words(path, status):
    """Why a run ended too early, in one line, from its output."""
    output = path.read_text().splitlines()
    errors = [line for line in output if line.startswith("error: ")]
    return errors[-1] if errors else f"ended with status {status} after {output[-1] if output else 'no output'!r}"


def execute(name, config):
    """Run what is not done of an experiment and write its results; returns how many runs failed or could not be started."""
    if config.jobs > 1:
        torch.set_num_threads(1)        # what is asked of a finished run must not slow down the others
    _, runs, root = plan(name, config)
    for data in dict.fromkeys(run.data for run in runs):
        prepare(data, config.source)
    done, failed, running = finished(runs, root, config.scale), set(), {}
    todo = [run for run in runs if run not in done]
    print(f"{name}: {len(todo)} of {len(runs)} runs to do; table and figure: {results.FOLDER / root.name}.md", flush=True)
    report(name, config, done)

    def finish(run, note=""):
        done.add(run)
        last = evaluations(run, root)[-1]
        print(f"{len(done)} of {len(runs)}  {run.name}: loss {last['val_rnn_loss']:.4f}, accuracy {last['val_rnn_accuracy']:.3f}, "
              f"{last['seconds']:.0f} s{note}", flush=True)
        report(name, config, done)

    try:
        while todo or running:
            for run in list(todo):
                if run.needs & failed:
                    print(f"{run.name}: not started, {', '.join(sorted(other.name for other in run.needs & failed))} failed", flush=True)
                    failed.add(run)
                    todo.remove(run)
                elif run.needs <= done and len(running) < config.jobs:
                    todo.remove(run)
                    if source := find_alike(run, root, config.scale, this_machine(config.jobs)):
                        copy_run(source, run, root, config.scale)
                        finish(run, f", from {source}")
                    else:
                        running[run] = launch(run, root, config.scale, config.jobs)
            time.sleep(0.1)
            for run, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                note_launch(run, root, config.jobs, began)
                if process.returncode or state(run, root, config.scale) != "done":
                    print(f"{run.name}: {last_words(root / run.name / 'output.txt', process.returncode)}", flush=True)
                    failed.add(run)
                    continue
                finish(run)
    finally:
        for run, (process, began) in running.items():
            process.send_signal(signal.SIGINT)      # it saves
        for run, (process, began) in running.items():
            process.wait()
            note_launch(run, root, config.jobs, began)
    return len(failed)


def report(name, config, done):
    """Write tables and figure of the runs that are done."""
    experiment, runs, root = plan(name, config)
    launches = [line for run in runs for line in runtime.read_log(root / run.name / "launches.jsonl")]
    told = {flag: value for flag, value in vars(config).items() if value != getattr(Config, flag)}
    told |= {"source": "FOLDER"} if config.source else {}
    command = " ".join(["python reproduce.py", name, *(f"--{flag}={value}" for flag, value in told.items())])
    facts = {"question": experiment.question, "command": f"`{command}`", "seeds": ", ".join(map(str, seeds_of(name, config))),
             "runs": f"{len(done)} of {len(runs)} done", "machine": "; ".join(sorted({line["machine"] for line in launches})) or "-",
             "time": f"{sum(line['seconds'] for line in launches) / 60:.0f} minutes", "cells": "mean (least..greatest) over the seeds"}
    records = [record for run in runs if run.method != "probe"
               for record in records_of(run, root, config.scale, run in done, experiment.look)]
    results.write(root.name, facts, records, experiment.metrics, experiment.figure)


def records_of(run, root, scale, done, look):
    """The records of a run, as results.py describes them. What `look` says of a finished run is kept in its folder: seen.json."""
    record = dict(case=run.case, method=run.method, seed=run.seed, panel=run.data, line=run.line, name=run.name, done=done)
    options = tasks.OPTIONS.get(DATA[run.data][0], {}) | DATA[run.data][1]
    if options:
        record["chance"] = 1 / options.get("symbols", options.get("modulus"))
    if not done:
        return [record]
    curve, seen = evaluations(run, root), root / run.name / "seen.json"
    settings = resolve(run.stage, flags_of(run, root, scale))
    changes = json.loads(seen.read_text()) if seen.exists() else None
    if changes is None or not all((results.FOLDER / name).exists() for change in changes for name in change.get("pictures", ())):
        results.FOLDER.mkdir(parents=True, exist_ok=True)
        changes = look(run, runtime.load(root / run.name), settings["data_dir"], root.name)
        runtime.write_atomically(seen, lambda path: path.write_text(json.dumps(changes)))
    points = [{key: point[key] for key in CURVE if key in point} for point in curve]
    record |= {**curve[-1], "lr": settings["lr"], "max_iters": settings["max_iters"], "flags": run.flags, "curve": points}
    return [{key: value for key, value in (record | change).items() if value is not None} for change in changes]


# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """What reproduce.py can be told, after the names of experiments."""
    jobs: int = 1           # runs at a time; of several, each uses one thread
    seeds: int = 0          # seeds 1337, 1338, ..; 0: as many as the experiment asks for
    scale: float = 1.0      # share of the optimiser steps; the runs and results of another scale are kept apart
    source: str = ""        # folder of original files: the idx files of MNIST for pixels, the two of TinyStories for text

    def __post_init__(self):
        if self.jobs < 1 or self.seeds < 0 or not self.scale > 0:
            raise UsageError("--jobs is at least 1, --seeds is not negative, --scale is above 0")


def seeds_of(name, config):
    """SEED and those after it, as many as asked for."""
    return [SEED + i for i in range(config.seeds or EXPERIMENTS[name].seeds)]


def plan(name, config):
    """An experiment, its runs, each after its needs, and their folder."""
    experiment = EXPERIMENTS[name]
    root = RUNS / (name if config.scale == 1 else f"{name}-x{config.scale:g}")
    source = config.source or (place_of("tinystories") / "tinystories" / "meta.json").exists()      # once prepared it is not asked for again
    return experiment, experiment.runs(seeds_of(name, config), source), root


def overview(config):
    """Print a line for each experiment."""
    print(f"{'experiment':16}{'runs':>6}{'done':>6}{'minutes left':>14}  question")
    for name, experiment in EXPERIMENTS.items():
        _, runs, root = plan(name, config)
        done, all_runs = len(finished(runs, root, config.scale)), len(experiment.runs(range(experiment.seeds), ""))
        left = experiment.minutes * config.scale * (len(runs) - done) / all_runs
        print(f"{name:16}{len(runs):>6}{done:>6}{left:>14.0f}  {experiment.question}")


def command_line(arguments):
    """The names of experiments, and the Config of the flags after them. UsageError for an unknown name."""
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    for name in names:
        if name not in EXPERIMENTS:
            near = get_close_matches(name, EXPERIMENTS, n=1, cutoff=0.0)[0]
            raise UsageError(f"there is no experiment {name!r}; the nearest is {near}, all are {', '.join(EXPERIMENTS)}")
    return names, runtime.parse(Config, arguments[len(names):])


def main():
    names, config = command_line(sys.argv[1:])
    failed = [execute(name, config) for name in names]
    if not names:
        overview(config)
    if sum(failed):
        raise runtime.DataError(f"{sum(failed)} runs failed: the same command tries them again; their output.txt says more")


if __name__ == "__main__":
    runtime.run_main(main)
