"""Long runs and large files, by hand: python -m pytest -m soak -s. Each test prints its figures."""
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BPTT_SIZES, PAIRS, QUICK, ROLL_OUTS, SIZES, trained

import data
import runtime
import train_smt
from runtime import read_log
from sources import fables
from sources.prepare import prepare

pytestmark = pytest.mark.soak
ROOT, MIB = Path(runtime.__file__).parent, 1 << 20
KILLS = 50
STEPS = 1500        # of a run: more than it makes between the kills
COMMANDS = {
    "smt": ["train_smt.py", *SIZES, *PAIRS, "--encoder=causal", "--optimizer=muon", "--trunk_iters=100"],
    "dmt": ["train_dmt.py", *ROLL_OUTS],
    "bptt": ["train_bptt.py", *BPTT_SIZES],
    "lstm": ["-m", "experiments.train_baseline", "--model=lstm", "--hidden=8", "--d_model=8"],
}


def start(*arguments, **options):
    """A process of this repository with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, **options)


def same(one, other):
    """Whether nested dicts and lists hold the same values, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def numbers(folder):
    """The log of a run, without times and speeds."""
    clock = {"seconds", "tokens_per_second"}
    return [{key: value for key, value in line.items() if key not in clock}
            for line in read_log(folder / "metrics.jsonl")]


# ------------------------------------------------------------------------------------------------------------
# Kills

@pytest.mark.parametrize("stage", COMMANDS)
def test_a_run_killed_50_times_ends_with_the_same_bits(stage, tmp_path, smt_run, data_dir):
    command = [*COMMANDS[stage], *QUICK, "--dataset=retrieval", f"--data_dir={data_dir}",
               "--eval_interval=7", f"--max_iters={STEPS}", "--resume=auto"]
    if stage == "dmt":
        command.append(f"--init_from={smt_run('retrieval')}")
    undisturbed = start(*command, f"--out_dir={tmp_path / 'whole'}", stdout=subprocess.DEVNULL)
    assert undisturbed.wait() == 0
    rng, killed, log = random.Random(0), tmp_path / "killed", tmp_path / "killed" / "metrics.jsonl"
    for i in range(KILLS):
        before = log.stat().st_size if log.exists() else 0
        process = start(*command, f"--out_dir={killed}", stdout=subprocess.DEVNULL)
        if i % 5:                       # one in five is killed while it starts
            while process.poll() is None and (log.stat().st_size if log.exists() else 0) == before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.15))
        else:
            time.sleep(rng.uniform(0, 2))
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.wait()
    reached = read_log(log)[-1]["step"]
    assert reached > KILLS
    assert start(*command, f"--out_dir={killed}", stdout=subprocess.DEVNULL).wait() == 0
    print(f"{stage}: {KILLS} kills in {reached} of {STEPS} steps")
    whole = tmp_path / "whole"
    checkpoints = [torch.load(folder / "ckpt.pt", weights_only=True) for folder in (whole, killed)]
    for part in ("model", "optimizers", "initial_memory", "step"):
        assert same(*(checkpoint[part] for checkpoint in checkpoints)), part
    assert numbers(whole)[-1] == numbers(killed)[-1]
    assert sorted(path.name for path in killed.iterdir()) == ["ckpt.pt", "config.json", "metrics.jsonl"]


def test_a_data_set_whose_preparation_is_killed_50_times_is_always_whole(tmp_path):
    prepare("fables", tmp_path, train_tokens=300_000, val_tokens=1000)
    rng, whole, killed = random.Random(0), data.load("fables", tmp_path).meta["fingerprint"], 0
    for _ in range(4 * KILLS):
        if killed == KILLS:
            break
        process = start("data.py", "--dataset=fables", f"--data_dir={tmp_path}", "--train_tokens=300000",
                        "--val_tokens=1000", stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.5, 3))
        killed += process.poll() is None                # some have finished
        process.kill()
        process.wait()
        prepare("fables", tmp_path, anew=False)         # as at the start of a training script
        assert data.load("fables", tmp_path).meta["fingerprint"] == whole
    assert killed == KILLS
    print(f"preparation: {KILLS} kills")


# ------------------------------------------------------------------------------------------------------------
# A million tokens, two gigabytes

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux tells it")


@on_linux
def test_a_million_tokens_take_no_more_memory_than_a_hundred_thousand(tmp_path):
    (tmp_path / "plain.txt").write_text("to be or not to be\n" * 3000)
    prepare("text", tmp_path, tmp_path / "plain.txt")
    trained(train_smt, *QUICK, *SIZES, *PAIRS, "--dataset=text", f"--data_dir={tmp_path}",
            f"--out_dir={tmp_path / 'run'}")
    seen, out = [], tmp_path / "out"                    # (bytes written, seconds, resident MiB)
    with open(out, "wb") as file:
        process = start("sample.py", f"--ckpt={tmp_path / 'run'}", f"--data_dir={tmp_path}",
                        "--max_new_tokens=1000000", stdout=file)
        began = time.monotonic()
        while process.poll() is None:
            pages = Path(f"/proc/{process.pid}/statm").read_text().split()
            if len(pages) > 1 and int(pages[1]):
                resident = int(pages[1]) * os.sysconf("SC_PAGE_SIZE") / MIB
                seen.append((out.stat().st_size, time.monotonic() - began, resident))
            time.sleep(0.2)
    assert process.returncode == 0 and out.stat().st_size >= 1_000_000
    marks = [next(line for line in seen if line[0] >= n) for n in (1, 100_000, 900_000)] + seen[-1:]
    (n0, t0, _), (n1, t1, early), (n2, t2, _), (n3, t3, late) = marks
    print(f"a million tokens: {(n1 - n0) / (t1 - t0):.0f} tokens/s in the first tenth, "
          f"{(n3 - n2) / (t3 - t2):.0f} in the last; {early:.0f} MiB after the first, {late:.0f} at the end")
    assert late < early + 8


@on_linux
@pytest.mark.parametrize("dataset", ["text", "tinystories"])
def test_two_gigabytes_of_text_are_prepared_within_500_mb(dataset, tmp_path):
    separator = "\n<|endoftext|>\n" if dataset == "tinystories" else "\n\n"
    drawn = fables.draw(np.random.default_rng(0), 50_000)
    block = (separator.join(story + " “Oh”, said the cat." * (i % 9 == 0) for i, story in enumerate(drawn))
             + separator).encode()
    names = ("TinyStories-train.txt", "TinyStories-valid.txt") if dataset == "tinystories" else ("text.txt",)
    for name, size in zip(names, (2 * 10**9, 10**7)):
        with open(tmp_path / name, "wb") as file:
            for _ in range(-(-size // len(block))):
                file.write(block)
    source = tmp_path if dataset == "tinystories" else tmp_path / names[0]
    began = time.monotonic()
    process = start("data.py", f"--dataset={dataset}", f"--source={source}", f"--data_dir={tmp_path}")
    _, status, usage = os.wait4(process.pid, 0)
    seconds, most = time.monotonic() - began, usage.ru_maxrss / 1024
    busy = usage.ru_utime + usage.ru_stime
    print(f"{dataset}: {2000 / seconds:.0f} MB/s, {busy:.0f} s of CPU, {most:.0f} MiB at most")
    assert status == 0 and most < 500 * 10**6 / MIB
    meta = json.loads((tmp_path / dataset / "meta.json").read_text())
    assert meta["counts"]["train"]["tokens"] > 1.7 * 10**9
