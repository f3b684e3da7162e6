"""The experiments' plans, and the runner on runs of four steps: resume, skip, equal budgets, results."""
import contextlib
import functools
import io
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BPTT_SIZES, PAIRS, QUICK, ROLL_OUTS, SIZES, call, refused, trained

import lib.cli
import runtime
from experiments import plans, reproduce, tables, train_baseline
from experiments.plans import DATA, EXPERIMENTS, Experiment, Run, compare
from lib.checkpoints import load
from sources import prepare

ROOT = Path(reproduce.__file__).parent.parent
QUICK = [flag for flag in QUICK if not flag.startswith("--preset")]
SMT, DMT = " ".join([*QUICK, *SIZES, *PAIRS]), " ".join([*QUICK, *ROLL_OUTS])
BASELINES = {"bptt": " ".join([*QUICK, *BPTT_SIZES]), "lstm": " ".join([*QUICK, "--d_model=8", "--hidden=8"]),
             "transformer": " ".join([*QUICK, "--d_model=8", "--n_heads=2", "--layers=1"])}
COMMENTS = functools.cache(lib.cli.field_comments)          # hundreds of command lines are parsed here


@pytest.fixture
def place(tmp_path, monkeypatch, data_dir):
    """An empty folder to reproduce in, with the data set `tiny`, and an experiment `mini` of SMT alone."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(reproduce, "DOWNLOADED", tmp_path / "data")
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "results")
    monkeypatch.setitem(DATA, "tiny", ("retrieval", dict(length="8", symbols=4), ""))
    shutil.copytree(data_dir / "retrieval", reproduce.place_of("tiny") / "retrieval")
    add(monkeypatch, "mini", lambda seeds: compare("tiny", seeds, SMT, DMT)[:1])
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)          # which --jobs=2 sets to 1


def add(monkeypatch, name, runs, **changes):
    """Add an experiment of one seed, without a figure: drawing takes longer than training."""
    fields = dict(question="?", minutes=1, seeds=1, runs=runs, metrics=("val_rnn_loss", "val_rnn_accuracy"),
                  figure=lambda *_: None)
    monkeypatch.setitem(EXPERIMENTS, name, Experiment(**fields | changes))


@pytest.fixture
def commands(monkeypatch):
    """Run the train scripts in this process, each from begin to end at once; the commands so far."""
    commands, scripts = [], {script.__name__: script for script, _ in reproduce.STAGES.values()}

    class Finished:
        def __init__(self, command, stdout, **_):
            commands.append(command)
            result = call(scripts[command[2]], *command[3:])
            stdout.write(result.out + result.err)
            self.returncode = result.status

        def poll(self):
            return self.returncode

    monkeypatch.setattr(reproduce.subprocess, "Popen", Finished)
    return commands


def flag(command, name):
    return next(part.split("=", 1)[1] for part in reversed(command) if part.startswith(f"--{name}="))


def folders(commands):
    return [Path(flag(command, "out_dir")).name for command in commands]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the plans

@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_flag_of_every_planned_run_is_accepted_by_its_script(name, monkeypatch):
    monkeypatch.setattr(lib.cli, "field_comments", COMMENTS)
    runs, known = EXPERIMENTS[name].runs([1, 2]), set()
    assert len({run.name for run in runs}) == len(set(runs)) == len(runs)
    for run in runs:
        assert run.needs | {*run.best_of} <= known, f"{run.name} comes before what it needs"
        known.add(run)
        assert not run.as_long_as or run.probe
        flags = *reproduce.STAGES[run.stage][1], f"--dataset={DATA[run.data][0]}", "--preset=tiny"
        flags += *DATA[run.data][2].split(), *run.flags.split(), *["--init_from=a/run"] * bool(run.after)
        settings = reproduce.resolve(run.stage, flags)
        trunk = 0 if run.after else settings.get("trunk_iters", 0)
        assert trunk <= settings["max_iters"] / 2, f"{run.name} has little time for the four losses"
    assert set(EXPERIMENTS[name].metrics) <= set(tables.TITLES)


def test_options_of_the_data_sets_are_those_of_the_tasks():
    for name, options, _ in DATA.values():
        assert prepare.check_request(name, None, 0, 8_000_000, 500_000, options).keys() == options.keys()


def test_the_first_of_each_size_is_the_one_that_the_other_sizes_are_compared_at():
    base = next(run for run in plans.scaling_runs([1]) if run.case == "fables, preset" and run.stage == "smt")
    settings = reproduce.resolve("smt", ("--preset=tiny", *base.flags.split()))
    for size, values in plans.SCALING.items():
        assert values[0] == settings[size]


# ---- the runner

def test_an_experiment_runs_end_to_end_and_a_second_call_starts_nothing(place, monkeypatch, commands):
    metrics = "val_rnn_loss", "val_rnn_accuracy", "sequential_flops"
    runs = functools.partial(compare, "tiny", smt=SMT, dmt=DMT, baselines=BASELINES)
    add(monkeypatch, "all", runs, seeds=2, metrics=metrics)
    result = call(reproduce, "all")
    assert result.status == 0, result.out + result.err
    assert len(commands) == 3 + 2 + 6 + 2 + 3       # probes; at seed 1 SMT, DMT and grids, at seed 2 one rate
    content = json.loads((place / "results" / "all.json").read_text())
    for method in ("BPTT", "LSTM", "Transformer"):
        grid = [r for r in content["records"] if r["method"].startswith(method) and "lr=" in r["name"]]
        best = min(grid, key=lambda r: r["val_rnn_loss"])
        second, = (c for c, folder in zip(commands, folders(commands))
                   if folder == plans.slug(f"tiny {method} 1338"))
        assert len(grid) == 2 and float(flag(second, "lr")) == best["lr"]
        assert {"seconds", "tokens", "sequential_flops"} <= best["curve"][-1].keys()
    text = (place / "results" / "all.md").read_text()
    assert "| SMT | SMT+DMT | BPTT | " in text and "0.250 |" in text
    assert call(reproduce, "all").status == 0 and len(commands) == 16
    listed = {line.split()[0]: line.split()[1:4] for line in call(reproduce).out.splitlines()[1:]}
    assert listed.keys() == EXPERIMENTS.keys() and listed["all"] == ["16", "16", "0"]
    assert listed["mini"][:2] == ["1", "0"]


def test_an_interrupted_run_is_resumed_and_with_other_flags_or_data_begins_anew(place, monkeypatch, commands):
    flags, others = [SMT], [f"{DMT} --lr=0.02"]

    def runs(seeds):
        first, second = compare("tiny", seeds, flags[0], DMT)
        return [first, second, *(replace(second, case="no longer planned", flags=other) for other in others)]

    def stop(self, step):                               # as if a signal came after two steps
        self.signal = 15 * (next(steps, False))
        return self.signal > 0
    add(monkeypatch, "pair", runs)
    steps = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Run, "should_stop", stop)
        assert call(reproduce, "pair").status == 1
    here = place / "runs" / "pair" / "tiny-smt-1337"
    assert lines(here / "metrics.jsonl")[-1]["step"] == 2
    assert not (place / "results" / "pair.md").exists()
    assert call(reproduce, "pair").status == 0
    assert ["--resume" in command for command in commands] == [False, True, False, False]
    evaluated = [line["step"] for line in lines(here / "metrics.jsonl") if "val_rnn_loss" in line]
    assert evaluated[0] == 0 and evaluated[-1] == 4
    assert call(reproduce, "pair").status == 0 and len(commands) == 4

    flags[0] += " --lr=0.02"                            # SMT and all that began with its weights
    others.clear()
    assert call(reproduce, "pair").status == 0
    assert folders(commands[4:]) == ["tiny-smt-1337", "tiny-smt-dmt-1337"]
    assert {path.name for path in here.parent.iterdir()} == set(folders(commands[4:]))  # none is moved aside
    monkeypatch.setitem(DATA, "tiny", ("retrieval", dict(length="8", symbols=5), ""))
    small = functools.partial(prepare.prepare, train_tokens=4096, val_tokens=4096)
    monkeypatch.setattr(prepare, "prepare", small)
    assert call(reproduce, "pair").status == 0 and len(commands) == 8
    config = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps(config | {"lambda_gone": 1.0}))    # a flag that is no more
    assert call(reproduce, "pair").status == 0 and len(commands) == 10
    assert not any("--resume" in command for command in commands[4:])


GARBAGE = b"\xff\xfe\x00", b"3", b"null", b"[" * 100_000, b'{"step": 4, "sec', b'{"step": 4}', b""


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "measured.json", "launches.jsonl"])
def test_files_that_a_crash_has_damaged_are_made_again(place, commands, name):
    def losses():
        content = json.loads((place / "results" / "mini.json").read_text())
        return [record["val_rnn_loss"] for record in content["records"]]

    assert call(reproduce, "mini").status == 0
    run, expected = place / "runs" / "mini" / "tiny-smt-1337", losses()
    for garbage in GARBAGE:
        (run / name).write_bytes(garbage)
        (place / "results" / "mini.json").unlink()
        result = call(reproduce, "mini")
        assert result.status == 0 and not result.err, (garbage, result.err)
        assert "changes" in json.loads((run / "measured.json").read_text()), garbage
        assert losses() == expected, garbage


def test_results_that_are_there_stay_until_a_run_has_finished(place, monkeypatch, commands):
    tables.FOLDER.mkdir(parents=True)
    (tables.FOLDER / "bad.md").write_text("published")
    add(monkeypatch, "bad", lambda seeds: compare("tiny", seeds, f"{SMT} --device=cuda:77", DMT))
    refused(call(reproduce, "bad"), 1, "2 runs failed")
    assert (tables.FOLDER / "bad.md").read_text() == "published"


def test_a_failing_run_is_named_in_a_line_and_the_others_go_on(place, monkeypatch, commands):
    def runs(seeds):
        first, second = compare("tiny", seeds, f"{SMT} --device=cuda:77", DMT)
        return [first, second, Run("tiny", "BPTT", seeds[0], "tiny", "bptt", BASELINES["bptt"])]
    add(monkeypatch, "bad", runs, figure=tables.dots("val_rnn_loss"))
    result = call(reproduce, "bad")
    refused(result, 1, "2 runs failed")
    assert "tiny-smt-1337: error: --device=cuda" in result.out and "Traceback" not in result.out
    assert "tiny-smt-dmt-1337: not started, tiny-smt-1337 failed" in result.out
    assert "1 of 3  tiny-bptt-1337" in result.out
    assert "| tiny | - | - | " in (place / "results" / "bad.md").read_text()
    assert (place / "results" / "bad.png").read_bytes().startswith(b"\x89PNG")


def test_a_baseline_takes_the_best_of_the_rates_that_did_not_fail(place, monkeypatch, commands):
    def runs(seeds):
        baseline = {"lstm": BASELINES["lstm"]}
        return compare("tiny", seeds, SMT, DMT, baseline, rates=(1e-9, 0.02))
    add(monkeypatch, "grid", runs, seeds=2)
    good, broken = train_baseline.main, {"lr=1e-09", "lr=0.02"}

    def main():
        if any(f"-{name}-" in argument for name in broken for argument in sys.argv):
            raise lib.cli.DataError("the loss became nan before step 2; the last checkpoint stays")
        good()
    monkeypatch.setattr(train_baseline, "main", main)
    result = call(reproduce, "grid")
    refused(result, 1, "3 runs failed")
    assert "tiny-lstm-1338: not started, tiny-lstm-lr=0.02-1337, " in result.out

    broken.remove("lr=1e-09")
    refused(call(reproduce, "grid"), 1, "1 runs failed")
    assert folders(commands)[-1] == "tiny-lstm-1338" and float(flag(commands[-1], "lr")) == 1e-9
    before = len(commands)
    refused(call(reproduce, "grid"), 1, "1 runs failed")                # tries the failed one alone again
    assert folders(commands[before:]) == ["tiny-lstm-lr=0.02-1337"]
    assert "runs: 7 of 8 done" in (place / "results" / "grid.md").read_text()

    broken.clear()                                                      # and this rate is the better one
    assert call(reproduce, "grid").status == 0
    assert folders(commands)[-1] == "tiny-lstm-1338" and float(flag(commands[-1], "lr")) == 0.02
    assert "runs: 8 of 8 done" in (place / "results" / "grid.md").read_text()


def test_jobs_bounds_how_many_run_at_a_time_and_several_have_one_thread_each(place, monkeypatch):
    add(monkeypatch, "three", lambda seeds: [compare("tiny", [seed], SMT)[0] for seed in (1, 2, 3)])
    environments, alive, most = [], set(), []

    class Slow:
        returncode, polls = 1, 0

        def __init__(self, command, env, **_):
            environments.append(env.get("OMP_NUM_THREADS"))
            alive.add(self)
            most.append(len(alive))

        def poll(self):
            self.polls += 1
            if self.polls == 2:
                alive.discard(self)
            return 1 if self.polls == 2 else None

    monkeypatch.setattr(reproduce.subprocess, "Popen", Slow)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for jobs, threads in ((2, "1"), (1, "7")):
        most.clear(), environments.clear()
        assert call(reproduce, "three", f"--jobs={jobs}").status == 1
        assert max(most) == jobs and environments == [threads] * 3


def test_an_interrupt_lets_the_running_processes_save_and_ends(place, monkeypatch):
    add(monkeypatch, "long", lambda seeds: compare("tiny", seeds, f"{SMT} --max_iters=1000000", DMT))
    started, Popen = [], subprocess.Popen
    monkeypatch.setattr(reproduce.subprocess, "Popen",
                        lambda *args, **options: started.append(Popen(*args, **options)) or started[-1])
    here = place / "runs" / "long" / "tiny-smt-1337"

    def sleep(seconds):
        if (here / "ckpt.pt").exists():
            raise KeyboardInterrupt
        threading.Event().wait(seconds)
    monkeypatch.setattr(reproduce.time, "sleep", sleep)
    result = call(reproduce, "long")
    assert result.status == 130 and [process.returncode for process in started] == [143]
    assert "val_rnn_loss" in lines(here / "metrics.jsonl")[-1]
    assert len(runtime.read_log(here / "launches.jsonl")) == 1
    _, runs, root = reproduce.plan("long", reproduce.Config())
    assert reproduce.state(runs[0], root, 1) == "begun"


def test_an_unknown_name_or_flag_exits_with_2(place):
    refused(call(reproduce, "scalling"), 2, "scalling", "scaling")
    refused(call(reproduce, "mini", "--job=2"), 2, "--job")
    refused(call(reproduce, "mini", "--jobs=0"), 2, "--jobs")
    assert not (place / "results").exists()


def test_scaled_runs_are_shorter_and_kept_apart_from_the_full_ones(place, monkeypatch, commands):
    add(monkeypatch, "mini", lambda seeds: compare("tiny", seeds, f"{SMT} --max_iters=50", DMT)[:1])
    monkeypatch.setattr(reproduce, "LEAST_STEPS", 2)
    for scale, steps in (("0.1", "5"), ("0.01", "2")):
        assert call(reproduce, "mini", f"--scale={scale}").status == 0
        assert flag(commands[-1], "max_iters") == steps
    assert {path.name for path in (place / "results").glob("*.md")} == {"mini-x0.1.md", "mini-x0.01.md"}
    run = Run("tiny", "SMT", 1, "tiny", "smt", "--encoder=causal --max_iters=200 --trunk_iters=100")
    for scale, steps in ((1, (200, 100)), (0.25, (50, 25)), (0.01, (2, 1))):      # the trunk keeps its share
        settings = reproduce.resolve("smt", reproduce.flags_of(run, place, scale))
        assert (settings["max_iters"], settings["trunk_iters"]) == steps


# ---- numbers

def test_equal_budget_gives_the_steps_that_spend_it_at_the_probes_speed():
    probe = [(0, 0.0), (5, 8.0), (10, 9.0), (30, 13.0)]     # five steps warm up; then 0.2 seconds a step
    assert reproduce.steps_for(60, probe) == 300
    assert reproduce.steps_for(0.01, probe) == 1
    assert reproduce.steps_for(100, [(0, 0), (4, 20)]) == 20


def test_steps_of_a_baseline_spend_the_seconds_of_both_stages(place):
    first, second, root = *compare("tiny", [1], SMT, DMT), place / "runs" / "x"
    probe = Run("tiny", "probe", 1, "tiny", "bptt", BASELINES["bptt"])
    for run, seconds in ((first, 30.0), (second, 20.0), (probe, 2.0)):
        (root / run.name).mkdir(parents=True)
        log = [dict(step=step, seconds=seconds * step / 20, tokens=step, val_rnn_loss=1.0)
               for step in (0, 10, 20)]
        (root / run.name / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)))
    run = replace(probe, method="BPTT", as_long_as=(first, second), probe=probe)
    assert flag(reproduce.flags_of(run, root, 1), "max_iters") == str(50 * 20 // 2)
    assert [line["seconds"] for line in reproduce.evaluations(second, root)] == [30.0, 40.0, 50.0]


def test_what_is_measured_of_checkpoints(place, data_dir, smt_run, monkeypatch):
    checkpoint, run = load(smt_run("retrieval")), Run("tiny", "SMT", 1, "tiny", "smt")
    longer = plans.measure_lengths(run, checkpoint, "x")
    assert [(r["value"], r.get("method", "SMT")) for r in longer] == \
        [(k, method) for k in (1, 2, 4, 8) for method in ("SMT", "Encoder-decoder")]
    assert all(0 <= r["val_rnn_accuracy"] <= 1 and r["val_rnn_loss"] > 0 for r in longer)
    assert longer[0]["val_rnn_loss"] != longer[2]["val_rnn_loss"]
    trained(train_baseline, *BASELINES["lstm"].split(), "--model=lstm", "--dataset=retrieval",
            f"--data_dir={data_dir}", f"--out_dir={place / 'lstm'}")
    assert len(plans.measure_lengths(replace(run, stage="lstm"), load(place / "lstm"), "x")) == 4

    monkeypatch.setattr(plans, "SCALING", {"memory_tokens": (2, 1), "d_model": (16, 8)})
    sized = [[r["case"] for r in plans.measure_sizes(replace(run, stage=stage), checkpoint, "x")]
             for stage in ("smt", "dmt")]
    assert sized == [[], ["d_model 8"]]


def test_pictures_are_painted_again_if_they_are_gone(place, smt_run, monkeypatch, commands):
    tables.FOLDER.mkdir()
    run = Run("mnist", "SMT+DMT", 1, "mnist", "dmt")
    with contextlib.redirect_stdout(io.StringIO()):
        painted, = plans.paint_pictures(run, load(smt_run("mnist")), "x")
    assert len(painted["pictures"]) == 2
    assert {path.name for path in tables.FOLDER.iterdir()} == set(painted["pictures"])
    times = []

    def paint(run, checkpoint, name):
        times.append(run.name)
        (tables.FOLDER / "picture.png").write_text("a picture")
        return [{"pictures": ["picture.png"]}]
    add(monkeypatch, "mini", EXPERIMENTS["mini"].runs, measure=paint)
    for n in (1, 1, 2):
        if n == 2:
            (tables.FOLDER / "picture.png").unlink()
        assert call(reproduce, "mini").status == 0 and len(times) == n
    assert "![picture.png](picture.png)" in (tables.FOLDER / "mini.md").read_text()


def record(case, method, seed, loss, **numbers):
    return dict(case=case, method=method, seed=seed, done=True, panel=case, label=method,
                val_rnn_loss=loss, held_out_loss=loss) | numbers


def test_median_least_and_greatest_are_over_seeds_and_the_best_of_a_grid_counts():
    losses = [record("a", "SMT", seed, loss) for seed, loss in ((1, 0.5), (2, 0.25), (3, 1.5))]
    records = [*losses, record("a", "BPTT", 1, 0.9, lr=1), record("a", "BPTT", 1, 0.4, lr=2),
               record("b", "SMT", 1, 2.0), dict(case="b", panel="b", method="BPTT", seed=1, done=False)]
    cells = tables.summarise(records, ["val_rnn_loss", "lr"])
    assert tables.spread(cells["a", "SMT"]["val_rnn_loss"]) == dict(median=0.5, min=0.25, max=1.5, seeds=3)
    assert cells["a", "BPTT"] == {"val_rnn_loss": [0.4], "lr": [2]}
    assert tables.table(records, "val_rnn_loss").splitlines()[4:] == \
        ["| a | 0.5000 (0.2500..1.5000) | 0.4000 |", "| b | 2.0000 | - |"]


def test_a_learning_rate_is_not_chosen_by_what_is_measured_later():
    grid = [record("a, 8 x the length", "BPTT", 1, 0.4, held_out_loss=0.2, lr=1),
            record("a, 8 x the length", "BPTT", 1, 0.3, held_out_loss=0.3, lr=2)]
    assert [best["lr"] for best in tables.chosen(grid)] == [1]


def test_rows_of_a_size_are_in_its_order_whatever_ran_first():
    records = [record(f"{size} {value}", "SMT+DMT", 1, value, panel=size, value=value)
               for size, value in (("K", 16), ("d", 64), ("K", 4), ("d", 32), ("K", 8))]
    rows = [line.split("|")[1].strip() for line in tables.table(records, "val_rnn_loss").splitlines()[4:]]
    assert rows == ["K 4", "K 8", "K 16", "d 32", "d 64"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("figure", [tables.dots("val_rnn_loss", "val_drift"), tables.against("val_rnn_loss"),
                                    tables.curves(["seconds", "tokens"], ["val_rnn_loss", "val_drift"])])
def test_every_figure_is_a_small_png_with_all_some_or_none_of_the_runs(figure, tmp_path):
    curve = [dict(seconds=s, tokens=10 * s, val_rnn_loss=1.0 / (1 + s)) for s in (0, 1, 2)]
    records = [record(case, method, seed, 0.5, value=2 * seed, curve=curve)
               for case in "ab" for method in ("SMT", "BPTT") for seed in (1, 2)]
    waiting, sizes = [dict(r, done=False) for r in records], []
    for some in (records, records[:3] + waiting[3:], waiting):
        figure(some, tmp_path / "figure.png")
        content = (tmp_path / "figure.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) < 200_000
        sizes.append(len(content))
    assert sizes[0] > sizes[2]                              # something was drawn
