"""Run a named experiment end to end. Results: experiments/results/<experiment>.md, .json and .png.

    python -m experiments.reproduce                     # lists the experiments: what is done, what is left
    python -m experiments.reproduce tasks --jobs=2      # start or go on: two runs at a time, one thread each
    python -m experiments.reproduce dagger length       # one after the other
    python -m experiments.reproduce tasks --scale=0.1   # a tenth of the steps, apart from the full runs

An experiment (plans.py) is a list of runs of the train scripts, in runs/reproduce/<experiment>/. An
interrupted run is resumed. A finished run is not run again unless its flags have changed. Ctrl-C stops the
runs, which save first. Whenever a run has finished, the results are written anew, over those that are there.
TinyStories and MNIST are taken from data/, where they are downloaded to if they are missing.
"""
import dataclasses
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import train_bptt
import train_dmt
import train_smt
from experiments import tables, train_baseline
from experiments.bench import device_name
from experiments.flops import spent
from experiments.plans import DATA, EXPERIMENTS, slug
from lib.checkpoints import load, write_atomically
from lib.cli import DataError, UsageError, check_fields, parse, run_main
from runtime import choose_device, read_log
from sources import prepare, tasks

SEED, RUNS, DOWNLOADED = 1337, Path("runs/reproduce"), Path("data")
STAGES = {                      # stage: (train script, flags)
    "smt": (train_smt, []), "dmt": (train_dmt, []), "bptt": (train_bptt, []),
    "transformer": (train_baseline, ["--model=transformer"]),
    "lstm": (train_baseline, ["--model=lstm", "--compile=false"])}      # unset, the script sets it to false
LEAST_STEPS = 20                # of a run that --scale shortens
EVALUATIONS = 8                 # of a run, beside the one before the first step
CURVE = ("seconds", "tokens", "sequential_flops", "val_rnn_loss", "val_rnn_accuracy", "val_drift")


# ----------------------------------------------------------------------------------------------------
# The flags of a run, and its state. root: the folder of the experiment's runs.

@functools.cache
def resolve(stage, flags):
    """The config that a train script makes of its flags, a tuple, as a dict."""
    script = STAGES[stage][0]
    config = parse(script.Config, flags, presets=script.PRESETS, generated=prepare.GENERATED)
    return dataclasses.asdict(config)


def place_of(data):
    """The folder that holds a data set of DATA: one for each choice of options."""
    name, options, _ = DATA[data]
    values = (f"{option}={value}" for option, value in options.items())
    return RUNS / "data" / slug(" ".join([data, *values])) if name in prepare.GENERATED else DOWNLOADED


def read_json(path):
    """The dict in a JSON file; {} if the file is missing or damaged."""
    content = None
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text())
    return content if isinstance(content, dict) else {}


def log_of(run, root):
    """The lines of a run's metrics.jsonl, as dicts, that have seconds and tokens."""
    return [line for line in read_log(root / run.name / "metrics.jsonl")
            if all(isinstance(line.get(name), int | float) for name in ("seconds", "tokens"))]


def evaluations(run, root):
    """The evaluations in a run's log; seconds and tokens with those of the runs it starts from."""
    lines = [line for line in log_of(run, root) if "val_rnn_loss" in line]
    if run.after:
        last = evaluations(run.after, root)[-1]
        lines = [line | {name: line[name] + last[name] for name in ("seconds", "tokens")} for line in lines]
    return lines


def steps_for(amount, spent):
    """How many steps spend `amount` at the rate of a log `spent`, [(step, spent so far)].

    The rate is that after the first line with step > 0.
    """
    (first, at_first), (last, at_last) = next(line for line in spent if line[0] > 0), spent[-1]
    rate = (at_last - at_first) / (last - first) if last > first else at_last / last
    return max(1, round(amount / rate))


def flags_of(run, root, scale):
    """The flags of a run whose needs are finished: a tuple."""
    name, _, more = DATA[run.data]
    flags = [*STAGES[run.stage][1], f"--dataset={name}", f"--data_dir={place_of(run.data)}", "--preset=tiny",
             f"--out_dir={root / run.name}", f"--seed={run.seed}", *more.split(), *run.flags.split()]
    if run.after:
        flags.append(f"--init_from={root / run.after.name}")
    if run.best_of:
        grid = [other for other in run.best_of if state(other, root, scale) == "done"]
        best = min(grid, key=lambda other: evaluations(other, root)[-1]["val_rnn_loss"])
        flags.append(f"--lr={resolve(best.stage, flags_of(best, root, scale))['lr']:g}")
    settings = resolve(run.stage, tuple(flags))
    steps = settings["max_iters"]
    if run.as_long_as:
        seconds = sum(log_of(other, root)[-1]["seconds"] for other in run.as_long_as)
        steps = steps_for(seconds, [(line["step"], line["seconds"]) for line in log_of(run.probe, root)])
    elif scale != 1:
        steps = max(min(steps, LEAST_STEPS), round(scale * steps))
        if settings.get("trunk_iters"):         # the trunk's phase keeps its share
            flags.append(f"--trunk_iters={round(scale * settings['trunk_iters'])}")
    return *flags, f"--max_iters={steps}", f"--eval_interval={math.ceil(steps / EVALUATIONS)}"


def state(run, root, scale):
    """State of a run whose needs are finished: done, begun (there is a checkpoint to resume), or new.

    A run whose flags have changed is new.
    """
    here = root / run.name
    if not all((here / name).exists() for name in ("config.json", "ckpt.pt")):
        return "new"
    settings = resolve(run.stage, flags_of(run, root, scale))
    flags = read_json(here / "config.json") | {"resume": "no"}
    if settings.get("seq_len") == 0:                # DMT writes the length that it has taken over from SMT
        flags["seq_len"] = 0
    if flags != settings:
        return "new"
    last = (log_of(run, root) or [{}])[-1]
    return "done" if last.get("step") == settings["max_iters"] and "val_rnn_loss" in last else "begun"


def finished(runs, root, scale):
    """The runs that are done and whose needs are; of best_of one is enough. Runs come after their needs."""
    done = set()
    for run in runs:
        grid_is_done = not run.best_of or done & {*run.best_of}
        if run.needs <= done and grid_is_done and state(run, root, scale) == "done":
            done.add(run)
    return done


# ----------------------------------------------------------------------------------------------------
# The runner

def clear(folder):
    """Delete the folder of a run, and those of the runs that began with its weights."""
    for path in folder.parent.glob("*/config.json"):
        if read_json(path).get("init_from") == str(folder):
            clear(path.parent)
    shutil.rmtree(folder, ignore_errors=True)


def launch(run, root, scale, jobs):
    """Start or resume a run as a process that writes to output.txt: the process, and its start time."""
    here, begun = root / run.name, state(run, root, scale) == "begun"
    if not begun:
        clear(here)
    here.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
    command = [sys.executable, "-m", STAGES[run.stage][0].__name__, *flags_of(run, root, scale)]
    with open(here / "output.txt", "w") as output:
        process = subprocess.Popen(
            [*command, *["--resume"] * begun], stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True)         # Ctrl-C does not reach it: a second signal would kill it
    return process, time.perf_counter()


def note_launch(run, root, jobs, began):
    """Note where and how long a run has computed, which is part of the result."""
    machine = f"{device_name(choose_device('auto'))}, {os.cpu_count()} cores, torch {torch.__version__}, " \
              f"{jobs} at a time, threads of each: {torch.get_num_threads()}"
    line = {"step": 0, "machine": machine, "seconds": (time.perf_counter() - began) / jobs}
    with open(root / run.name / "launches.jsonl", "a") as file:
        file.write("\n" + json.dumps(line))        # a crash may have torn the last line


def reason(path, status):
    """Why a run ended too early, from its output: one line."""
    output = path.read_text().splitlines() or ["no output"]
    errors = [line for line in output if line.startswith("error: ")]
    return errors[-1] if errors else f"exit status {status}: {output[-1]}"


def execute(name, config):
    """Run what is not done of an experiment. Returns how many runs failed or could not be started."""
    if config.jobs > 1:
        torch.set_num_threads(1)        # measuring a finished run must not slow down the others
    _, runs, root = plan(name, config)
    for data in dict.fromkeys(run.data for run in runs):
        if not (place_of(data) / DATA[data][0] / "meta.json").exists():
            prepare.prepare(DATA[data][0], place_of(data), **DATA[data][1])
    done, failed, running = finished(runs, root, config.scale), set(), {}
    todo = [run for run in runs if run not in done]
    say = functools.partial(print, flush=True)
    say(f"{name}: {len(todo)} of {len(runs)} runs to do; results: {tables.FOLDER / root.name}.md")
    if done:
        report(name, config, done)
    try:
        while todo or running:
            for run in list(todo):
                grid = {*run.best_of}
                if missing := (run.needs & failed) | (grid if grid <= failed else set()):
                    names = ", ".join(sorted(other.name for other in missing))
                    say(f"{run.name}: not started, {names} failed")
                    failed.add(run)
                    todo.remove(run)
                elif run.needs <= done and grid <= done | failed and len(running) < config.jobs:
                    todo.remove(run)
                    running[run] = launch(run, root, config.scale, config.jobs)
            time.sleep(0.1)
            for run, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                note_launch(run, root, config.jobs, began)
                if process.returncode or state(run, root, config.scale) != "done":
                    say(f"{run.name}: {reason(root / run.name / 'output.txt', process.returncode)}")
                    failed.add(run)
                    continue
                done.add(run)
                stale = {other for other in done if run in other.best_of       # a run that failed before
                         and state(other, root, config.scale) != "done"}
                done -= stale
                todo += [other for other in runs if other in stale]
                last = evaluations(run, root)[-1]
                say(f"{len(done)} of {len(runs)}  {run.name}: loss {last['val_rnn_loss']:.4f}, "
                    f"accuracy {last['val_rnn_accuracy']:.3f}, {last['seconds']:.0f} s")
                report(name, config, done)
    finally:
        for process, _ in running.values():
            process.send_signal(signal.SIGTERM)         # it saves
        for run, (process, began) in running.items():
            process.wait()
            note_launch(run, root, config.jobs, began)
    return len(failed)


# ----------------------------------------------------------------------------------------------------
# Results

def report(name, config, done):
    """Write tables and figure of the runs that are done."""
    experiment, runs, root = plan(name, config)
    launches = [line for run in runs for line in read_log(root / run.name / "launches.jsonl")
                if {"machine", "seconds"} <= line.keys()]
    flags = (f"--{flag}={value}" for flag, value in vars(config).items() if value != getattr(Config, flag))
    facts = {"question": experiment.question,
             "command": f"`{' '.join(['python -m experiments.reproduce', name, *flags])}`",
             "seeds": ", ".join(map(str, seeds_of(name, config))), "runs": f"{len(done)} of {len(runs)} done",
             "machine": "; ".join(sorted({line["machine"] for line in launches})) or "-",
             "time": f"{sum(line['seconds'] for line in launches) / 60:.0f} minutes",
             "cells": "median (least..greatest) over the seeds"}
    records = []
    for run in (run for run in runs if run.method != "probe"):
        records += records_of(run, root, config.scale, run in done, experiment)
    tables.write(root.name, facts, records, experiment.metrics, experiment.figure)


def records_of(run, root, scale, done, experiment):
    """The records of a run, as in tables.py. measured.json caches what experiment.measure returned."""
    record = {key: getattr(run, key) for key in ("case", "method", "seed", "label", "name")}
    record |= dict(panel=run.data, done=done)
    options = tasks.OPTIONS.get(DATA[run.data][0], {}) | DATA[run.data][1]
    if options:
        record["chance"] = 1 / options.get("symbols", options.get("modulus"))
    if not done:
        return [record]
    settings, kept = resolve(run.stage, flags_of(run, root, scale)), root / run.name / "measured.json"
    measured = read_json(kept)
    pictures = [name for change in measured.get("changes", ()) for name in change.get("pictures", ())]
    if "changes" not in measured or not all((tables.FOLDER / name).exists() for name in pictures):
        tables.FOLDER.mkdir(parents=True, exist_ok=True)
        checkpoint = load(root / run.name)
        measured = {"changes": experiment.measure(run, checkpoint, root.name)}
        if "sequential_flops" in experiment.metrics:
            flops = spent(root / run.name)
            measured["sequential_flops"] = {str(step): amount for step, amount in flops.items()}
        write_atomically(kept, lambda path: path.write_text(json.dumps(measured)))
    curve = evaluations(run, root)
    for line in curve if "sequential_flops" in measured else ():
        line["sequential_flops"] = measured["sequential_flops"][str(line["step"])]
    points = [{key: point[key] for key in CURVE if key in point} for point in curve]
    record |= {**curve[-1], "held_out_loss": curve[-1]["val_rnn_loss"], "flags": run.flags, "curve": points}
    record |= {name: settings[name] for name in ("lr", "max_iters")}
    return [{key: value for key, value in (record | change).items() if value is not None}
            for change in measured["changes"]]


# ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """Flags of reproduce.py, after the names of experiments."""
    jobs: int = 1           # runs at a time; of several, each has one thread
    seeds: int = 0          # seeds 1337, 1338, ..; 0: as many as the experiment has
    scale: float = 1.0      # share of the optimiser steps; runs and results of another scale are kept apart

    def __post_init__(self):
        check_fields(self, "jobs")
        if self.seeds < 0 or not self.scale > 0:
            raise UsageError("--seeds is at least 0, --scale above 0")


def seeds_of(name, config):
    """The seeds of an experiment, from SEED on: --seeds of them, unset as many as it asks for."""
    return [SEED + i for i in range(config.seeds or EXPERIMENTS[name].seeds)]


def plan(name, config):
    """An experiment, its runs, each after its needs, and their folder."""
    experiment = EXPERIMENTS[name]
    root = RUNS / (name if config.scale == 1 else f"{name}-x{config.scale:g}")
    return experiment, experiment.runs(seeds_of(name, config)), root


def overview(config):
    """Print a line for each experiment."""
    print(f"{'experiment':12}{'runs':>6}{'done':>6}{'minutes left':>14}  question")
    for name, experiment in EXPERIMENTS.items():
        _, runs, root = plan(name, config)
        done, planned = len(finished(runs, root, config.scale)), len(experiment.runs(range(experiment.seeds)))
        left = experiment.minutes * config.scale * (len(runs) - done) / planned
        print(f"{name:12}{len(runs):>6}{done:>6}{left:>14.0f}  {experiment.question}")


def main():
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), sys.argv[1:]))
    for name in names:
        if name not in EXPERIMENTS:
            raise UsageError(f"there is no experiment {name!r}; all are {', '.join(EXPERIMENTS)}")
    config = parse(Config, sys.argv[1 + len(names):])
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)        # a closed terminal is like Ctrl-C
    failed = sum(execute(name, config) for name in names)
    if not names:
        overview(config)
    if failed:
        raise DataError(f"{failed} runs failed; the same command tries them again, output.txt says more")


if __name__ == "__main__":
    run_main(main)
