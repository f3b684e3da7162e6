"""The experiments' plans, and the runner on minute runs: resuming, skipping, equal budgets, tables. Nothing here is timed."""
import contextlib
import functools
import io
import json
import shutil
import subprocess
import threading
from dataclasses import replace

import pytest
import torch
from conftest import BPTT_SIZES, PAIRS, QUICK, ROLL_OUTS, SIZES, TRANSFORMER_SIZES, call

import experiments
import model
import reproduce
import results
import runtime
from experiments import DATA, EXPERIMENTS, Experiment, Run, compare

QUICK = [flag for flag in QUICK if not flag.startswith("--preset")]
SMT, DMT = " ".join([*QUICK, *SIZES, *PAIRS]), " ".join([*QUICK, *ROLL_OUTS])
BPTT = " ".join([*QUICK, *BPTT_SIZES, "--seq_len=8"])
TRANSFORMER = " ".join([*QUICK, *TRANSFORMER_SIZES])
COMMENTS = functools.cache(runtime.field_comments)      # hundreds of command lines are parsed here


@pytest.fixture
def place(tmp_path, monkeypatch, data_dir):
    """An empty folder to reproduce in, with the data set `tiny` in it, and an experiment `mini` of SMT alone."""
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setitem(DATA, "tiny", ("retrieval", dict(length="8", symbols=4), ""))
    shutil.copytree(data_dir / "retrieval", reproduce.place_of("tiny") / "retrieval")
    add(monkeypatch, "mini", lambda seeds, source: compare("tiny", seeds, SMT, DMT)[:1])
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)          # which --jobs=2 sets to 1


def add(monkeypatch, name, runs, **changes):
    """Add an experiment of one seed."""
    fields = dict(question="?", minutes=1, seeds=1, runs=runs, metrics=("val_rnn_loss", "val_rnn_accuracy"),
                  figure=lambda records, path: ["A line below the tables."]) | changes      # drawing takes longer than training
    monkeypatch.setitem(EXPERIMENTS, name, Experiment(**fields))


def in_process(monkeypatch):
    """Run the train scripts in this process, which is quicker, each from begin to end at once; returns the commands."""
    commands = []

    class Finished:
        def __init__(self, command, stdout, stderr, env):
            commands.append(command)
            script = next(script for script in reproduce.STAGES.values() if script.__file__ == command[1])
            result = call(script, *command[2:])
            stdout.write(result.out + result.err)
            self.returncode = result.status

        def poll(self):
            return self.returncode

    monkeypatch.setattr(reproduce.subprocess, "Popen", Finished)
    return commands


def flag(command, name):
    return next(part.split("=", 1)[1] for part in reversed(command) if part.startswith(f"--{name}="))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the real experiments

@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_command_of_every_experiment_is_accepted_by_its_script(name, monkeypatch):
    monkeypatch.setattr(runtime, "field_comments", COMMENTS)
    runs = EXPERIMENTS[name].runs([1, 2], "source")
    assert len({run.name for run in runs}) == len(set(runs)) == len(runs)
    known = set()
    for run in runs:
        assert run.needs <= known, f"{run.name} comes before what it needs"
        known.add(run)
        told = f"--dataset={DATA[run.data][0]}", "--preset=tiny", *DATA[run.data][2].split(), *run.flags.split()
        after = ["--init_from=a/run"] if run.after else []                      # with it the trunk's phase is left out
        settings = reproduce.resolve(run.stage, (*told, *after))
        assert run.after or settings.get("trunk_iters", 0) <= settings["max_iters"] / 2, f"{run.name}: the trunk alone"
        assert not run.equal or run.to and run.probe
    assert set(EXPERIMENTS[name].metrics) <= set(results.TITLES)


def test_data_options_are_those_of_the_tasks():
    for name, options, _ in DATA.values():
        assert reproduce.datasets.check_request(name, None, 0, 8_000_000, 500_000, options).keys() == options.keys()


def test_listing_names_every_experiment_and_how_many_of_its_runs_are_done(place, monkeypatch):
    in_process(monkeypatch)
    assert call(reproduce, "mini").status == 0
    listed = {line.split()[0]: line.split()[1:4] for line in call(reproduce).out.splitlines()[1:]}
    assert listed.keys() == EXPERIMENTS.keys()
    assert listed["mini"] == ["1", "1", "0"] and listed["tasks"][1:] == ["0", str(EXPERIMENTS["tasks"].minutes)]


# ---- the runner

def test_an_experiment_runs_end_to_end_and_a_second_call_starts_nothing(place, monkeypatch):
    add(monkeypatch, "all", lambda seeds, source: compare("tiny", seeds, SMT, DMT, BPTT, TRANSFORMER, rates=(1e-3, 1e-2)), seeds=2)
    commands = in_process(monkeypatch)
    result = call(reproduce, "all")
    assert result.status == 0, result.out + result.err
    assert len(commands) == 11 and result.out.count(" of 11  tiny") == 11      # 2 probes; at seed 1 5 more, at seed 2 4 more
    written = {path: path.read_bytes() for path in (place / "results").iterdir()}
    assert {path.name for path in written} == {"all.json", "all.md"}
    tables = written[place / "results" / "all.md"].decode()
    assert "| SMT | SMT+DMT | BPTT, same seconds | Transformer, same seconds | chance |" in tables and "| - |" not in tables
    assert "0.250 |" in tables and "A line below the tables." in tables

    content = json.loads(written[place / "results" / "all.json"])
    assert content["runs"].endswith(" done")
    grid = [r for r in content["records"] if "lr=" in r["name"]]
    best = min(grid, key=lambda r: r["val_rnn_loss"])
    other = next(command for command in commands if flag(command, "out_dir").endswith("bptt-same-seconds-1338"))
    assert float(flag(other, "lr")) == best["lr"]
    assert call(reproduce, "all").status == 0 and len(commands) == 11


def test_an_interrupted_run_is_resumed_and_other_flags_or_data_begin_it_and_what_follows_anew(place, monkeypatch):
    flags = [SMT]
    add(monkeypatch, "pair", lambda seeds, source: compare("tiny", seeds, flags[0], DMT))
    commands = in_process(monkeypatch)
    steps = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Run, "should_stop", lambda self, step: next(steps, False))     # as if Ctrl-C came after two steps
        assert call(reproduce, "pair").status == 1
    here = place / "runs" / "pair" / "tiny-smt-1337"
    assert lines(here / "metrics.jsonl")[-1]["step"] == 2
    tables = (place / "results" / "pair.md").read_text()
    assert "runs: 0 of 2 done" in tables
    assert call(reproduce, "pair").status == 0
    assert "--resume" in commands[1] and "--resume" not in commands[2] and len(commands) == 3
    evaluated = [line["step"] for line in lines(here / "metrics.jsonl") if "val_rnn_loss" in line]
    assert evaluated[0] == 0 and evaluated[-1] == 4

    flags[0] += " --lr=0.02"
    assert call(reproduce, "pair").status == 0
    assert [flag(command, "out_dir").split("/")[-1] for command in commands[3:]] == ["tiny-smt-1337", "tiny-smt-dmt-1337"]
    monkeypatch.setitem(DATA, "tiny", ("retrieval", dict(length="8", symbols=5), ""))
    monkeypatch.setattr(reproduce.datasets, "prepare", functools.partial(reproduce.datasets.prepare, train_tokens=4096, val_tokens=4096))
    assert call(reproduce, "pair").status == 0
    assert len(commands) == 7 and not any("--resume" in command for command in commands[3:])
    told = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps(told | {"lambda_gone": 1.0}))    # a flag that there is no more
    assert call(reproduce, "pair").status == 0 and len(commands) == 9


def test_a_run_that_another_experiment_has_finished_is_copied_if_the_run_it_goes_on_from_is_the_same_too(place, monkeypatch):
    def looked_at(run, checkpoint, place, name):
        return [{"val_drift": {"first": 1.0, "same": 2.0, "other": 3.0}[name]}]

    add(monkeypatch, "first", lambda seeds, source: compare("tiny", seeds, SMT, DMT, BPTT), look=looked_at)
    commands = in_process(monkeypatch)
    lr = reproduce.resolve("smt", ("--dataset=retrieval", "--preset=tiny", *SMT.split()))["lr"]
    add(monkeypatch, "same", lambda seeds, source: compare("tiny", seeds, f"{SMT} --lr={lr:g}", DMT, BPTT, case="another name"), look=looked_at)
    add(monkeypatch, "other", lambda seeds, source: compare("tiny", seeds, f"{SMT} --lr={2 * lr:g}", DMT), look=looked_at)
    assert call(reproduce, "first").status == 0 and len(commands) == 4
    result = call(reproduce, "same")
    assert result.status == 0 and len(commands) == 4 and result.out.count(f", from {place / 'runs' / 'first'}") == 4
    first, same = (json.loads((place / "results" / f"{name}.json").read_text()) for name in ("first", "same"))
    assert [r["val_rnn_loss"] for r in first["records"]] == [r["val_rnn_loss"] for r in same["records"]]
    noted = [(place / "runs" / folder / "launches.jsonl").read_text() for folder in ("first/tiny-smt-1337", "same/another-name-smt-1337")]
    assert noted[0] == noted[1] and first["machine"] == same["machine"]
    assert {r["val_drift"] for r in same["records"]} == {2.0}                 # it is asked what its own experiment asks
    here = place / "runs" / "same"
    assert reproduce.config_of(here / "another-name-smt-dmt-1337")["init_from"] == str(here / "another-name-smt-1337")
    assert call(reproduce, "other").status == 0                               # DMT is told the same, but of other weights
    assert [flag(command, "out_dir") for command in commands[4:]] == [str(place / "runs" / "other" / f"tiny-{m}-1337") for m in ("smt", "smt-dmt")]

    (here / "another-name-smt-1337" / "config.json").unlink()                 # as if it had been interrupted while copying
    shutil.rmtree(place / "runs" / "first" / "tiny-smt-dmt-1337")
    assert call(reproduce, "same").status == 0
    assert flag(commands[6], "out_dir") == str(here / "another-name-smt-dmt-1337")
    add(monkeypatch, "slower", lambda seeds, source: compare("tiny", seeds, SMT, DMT)[:1])
    assert call(reproduce, "slower", "--jobs=2").status == 0                  # on half of the machine: its seconds are others
    assert flag(commands[-1], "out_dir") == str(place / "runs" / "slower" / "tiny-smt-1337")


def test_what_began_with_the_weights_of_a_run_goes_when_it_begins_anew_though_no_plan_names_it(place, monkeypatch):
    flags, others = [SMT], [f"{DMT} --lr=0.02"]
    def runs(seeds, source):
        first, second = compare("tiny", seeds, flags[0], DMT)
        return [first, second, *(replace(second, case="no longer asked", flags=other) for other in others)]
    add(monkeypatch, "pair", runs)
    in_process(monkeypatch)
    assert call(reproduce, "pair").status == 0
    folders = place / "runs" / "pair"
    assert {path.name for path in folders.iterdir()} == {"tiny-smt-1337", "tiny-smt-dmt-1337", "no-longer-asked-smt-dmt-1337"}
    flags[0] += " --lr=0.02"
    others.clear()
    assert call(reproduce, "pair").status == 0
    assert {path.name for path in folders.iterdir()} == {"tiny-smt-1337", "tiny-smt-dmt-1337"}


def test_a_failing_run_is_named_in_a_line_and_the_others_go_on(place, monkeypatch):
    def runs(seeds, source):
        first, second = compare("tiny", seeds, f"{SMT} --device=cuda:77", DMT)
        return [first, second, Run("tiny", "BPTT", seeds[0], "tiny", "bptt", BPTT)]
    add(monkeypatch, "bad", runs, figure=results.dots("val_rnn_loss"))
    in_process(monkeypatch)
    result = call(reproduce, "bad")
    assert result.status == 1 and "Traceback" not in result.out + result.err
    assert "tiny-smt-1337: error: --device=cuda" in result.out
    assert "tiny-smt-dmt-1337: not started, tiny-smt-1337 failed" in result.out
    assert "1 of 3  tiny-bptt-1337" in result.out and result.err == "error: 2 runs failed: the same command tries them again; " \
                                                                    "their output.txt says more\n"
    assert "| tiny | - | - | " in (place / "results" / "bad.md").read_text()
    assert (place / "results" / "bad.png").read_bytes().startswith(b"\x89PNG")


def test_jobs_bounds_how_many_run_at_a_time_and_several_have_one_thread_each(place, monkeypatch):
    add(monkeypatch, "three", lambda seeds, source: [run for seed in (1, 2, 3) for run in compare("tiny", [seed], SMT)[:1]])
    environments, alive, most = [], set(), []

    class Slow:
        returncode = 1

        def __init__(self, command, stdout, stderr, env):
            environments.append(env.get("OMP_NUM_THREADS"))
            alive.add(self)
            most.append(len(alive))
            self.polls = 0

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
    add(monkeypatch, "long", lambda seeds, source: compare("tiny", seeds, f"{SMT} --max_iters=1000000", DMT))
    started, Popen = [], subprocess.Popen
    monkeypatch.setattr(reproduce.subprocess, "Popen", lambda *args, **kwargs: started.append(Popen(*args, **kwargs)) or started[-1])
    here = place / "runs" / "long" / "tiny-smt-1337"

    def sleep(seconds):
        if (here / "ckpt.pt").exists():
            raise KeyboardInterrupt
        threading.Event().wait(seconds)
    monkeypatch.setattr(reproduce.time, "sleep", sleep)
    result = call(reproduce, "long")
    assert result.status == 130 and len(started) == 1 and started[0].returncode == 0
    assert "val_rnn_loss" in lines(here / "metrics.jsonl")[-1] and len(lines(here / "launches.jsonl")) == 1
    experiment, runs, root = reproduce.plan("long", reproduce.Config())
    assert reproduce.state(runs[0], root, 1) == "begun"


def test_an_unknown_name_or_flag_exits_with_2_and_names_the_nearest(place):
    result = call(reproduce, "scalling")
    assert result.status == 2 and "the nearest is scaling" in result.err and result.err.count("\n") == 1
    assert call(reproduce, "mini", "--job=2").status == 2 and call(reproduce, "mini", "--jobs=0").status == 2
    assert not (place / "results").exists()


def test_scaled_runs_are_shorter_and_kept_apart_from_the_full_ones(place, monkeypatch):
    add(monkeypatch, "mini", lambda seeds, source: compare("tiny", seeds, f"{SMT} --max_iters=50", DMT)[:1])
    monkeypatch.setattr(reproduce, "LEAST_STEPS", 2)
    commands = in_process(monkeypatch)
    assert call(reproduce, "mini", "--scale=0.1").status == 0
    assert flag(commands[0], "max_iters") == "5"
    assert (place / "results" / "mini-x0.1.md").exists() and not (place / "results" / "mini.md").exists()
    assert call(reproduce, "mini", "--scale=0.01").status == 0 and flag(commands[1], "max_iters") == "2"


def test_scaled_runs_keep_the_share_of_their_first_phase(place):
    run = Run("tiny", "SMT", 1, "tiny", "smt", "--encoder=causal --max_iters=200 --trunk_iters=100")
    for scale, expected in ((1, (200, 100)), (0.25, (50, 25)), (0.01, (20, 1))):
        settings = reproduce.resolve("smt", reproduce.flags_of(run, place, scale))
        assert (settings["max_iters"], settings["trunk_iters"]) == expected


# ---- numbers

def test_equal_budget_gives_the_steps_that_spend_it_at_the_probes_speed():
    probe = [(0, 0.0), (5, 8.0), (10, 9.0), (30, 13.0)]                    # the first five steps warm up; then 0.2 seconds a step
    assert reproduce.steps_for(60, probe) == 300
    assert reproduce.steps_for(0.01, probe) == 1
    assert reproduce.steps_for(100, [(0, 0), (4, 20)]) == 20


def test_steps_of_a_baseline_spend_the_seconds_and_tokens_of_both_stages(place):
    first, second = compare("tiny", [1], SMT, DMT)
    probe, root = Run("tiny", "probe", 1, "tiny", "bptt", BPTT), place / "runs" / "x"
    for run, seconds, tokens in ((first, 30.0, 4000), (second, 20.0, 1000), (probe, 2.0, 500)):
        (root / run.name).mkdir(parents=True)
        spent = {"val_rnn_loss": 1.0, "flops": 1, "sequential_flops": 1}
        content = [{"step": step, "seconds": seconds * step / 20, "tokens": tokens * step // 20, **spent} for step in (0, 10, 20)]
        (root / run.name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    for amount, steps in (("seconds", 50 * 20 / 2), ("tokens", 5000 * 20 / 500)):
        run = Run("tiny", "BPTT", 1, "tiny", "bptt", BPTT, equal=amount, to=(first, second), probe=probe)
        assert flag(reproduce.flags_of(run, root, 1), "max_iters") == str(int(steps))
    assert [line["seconds"] for line in reproduce.evaluations(second, root)] == [30.0, 40.0, 50.0]      # SMT's are added


def test_pictures_that_are_gone_are_painted_again(place, monkeypatch):
    painted = []

    def look(run, checkpoint, place, name):
        painted.append(run.name)
        (results.FOLDER / "picture.png").write_text("a picture")
        return [{"pictures": ["picture.png"]}]

    add(monkeypatch, "mini", EXPERIMENTS["mini"].runs, look=look)
    in_process(monkeypatch)
    for deleted, times in (((), 1), ((), 1), (("picture.png",), 2)):
        for name in deleted:
            (place / "results" / name).unlink()
        assert call(reproduce, "mini").status == 0 and len(painted) == times
    assert "![picture.png](picture.png)" in (place / "results" / "mini.md").read_text()


def test_text_has_tinystories_where_its_files_are_given_or_it_is_prepared(place):
    def names():
        return {run.data for run in reproduce.plan("text", config)[1]}
    config = reproduce.Config(source="folder")
    assert names() == {"fables", "tinystories"}
    config = reproduce.Config()
    assert names() == {"fables"}
    (reproduce.place_of("tinystories") / "tinystories").mkdir(parents=True)
    (reproduce.place_of("tinystories") / "tinystories" / "meta.json").write_text("{}")
    assert names() == {"fables", "tinystories"}


def record(case, method, seed, loss, **numbers):
    return dict(case=case, method=method, seed=seed, done=True, val_rnn_loss=loss, panel=case, line=method, **numbers)


def test_mean_least_and_greatest_are_over_seeds_and_the_best_of_a_grid_counts():
    records = [record("a", "SMT", 1, 0.5), record("a", "SMT", 2, 0.25), record("a", "SMT", 3, 0.75), record("a", "BPTT", 1, 0.9, lr=1),
               record("a", "BPTT", 1, 0.4, lr=2), record("b", "SMT", 1, 2.0), dict(case="b", method="BPTT", seed=1, done=False)]
    cells = results.summarise(records, ["val_rnn_loss", "lr"])
    assert results.spread(cells["a", "SMT"]["val_rnn_loss"]) == {"mean": 0.5, "min": 0.25, "max": 0.75, "seeds": 3}
    assert cells["a", "BPTT"] == {"val_rnn_loss": [0.4], "lr": [2]}
    assert results.table(records, "val_rnn_loss").splitlines()[2:] == [
        "|  | SMT | BPTT |", "| --- | --- | --- |", "| a | 0.5000 (0.2500..0.7500) | 0.4000 |", "| b | 2.0000 | - |"]


def test_power_law_is_recovered_and_said_below_the_tables(tmp_path):
    values = (1, 2, 4, 8)
    assert results.power_law(values, [3 * v ** -0.5 for v in values]) == pytest.approx((3, -0.5))
    records = [record(f"k {v}", "SMT", seed, 1.0, value=v, val_gap_to_floor=3 * v ** -0.5) | {"panel": "k"}
               for v in values for seed in (1, 2)]
    noted = results.against("val_gap_to_floor", fit=True)(records, tmp_path / "k.png")
    assert noted == ["SMT: loss above the floor, nats per target = 3 x k^-0.500 (4 points)"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_has_one_size_yet_is_not_drawn_as_a_power_law(tmp_path):
    first = [record(f"{panel} {v}", "SMT+DMT", 1, 0.1939, value=v, val_gap_to_floor=0.0868, val_teacher_loss=0.1581) | {"panel": panel}
             for panel, v in (("memory_tokens", 8), ("context_len", 220), ("d_model", 64))]
    second = record("memory_tokens 1", "SMT+DMT", 1, 0.2504, value=1, val_gap_to_floor=0.1433, val_teacher_loss=0.1689) | {"panel": "memory_tokens"}
    draw = results.against("val_gap_to_floor", "val_teacher_loss", fit=True)
    assert draw(first, tmp_path / "1.png") == []
    assert [line.count("memory_tokens") for line in draw([*first, second], tmp_path / "2.png")] == [1, 1]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_sizes_are_the_ticks_also_while_a_method_or_all_but_one_size_is_missing(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(results, "save", lambda drawing, path, save=results.save: drawn.append(drawing) or save(drawing, path))
    sized = [record(f"a {v}", "SMT", 1, 1.0, value=v) | {"panel": "a"} for v in (32, 64)]
    other = record("b 32", "BPTT", 1, 1.0, value=32) | {"panel": "b"}
    results.against("val_rnn_loss")([*sized, other], tmp_path / "x.png")
    assert [[label.get_text() for label in ax.get_xticklabels()] for ax in drawn[0].axes] == [["32", "64"], ["32"]]
    assert all(ax.get_xlim()[0] < 32 < ax.get_xlim()[1] and not len(ax.get_xticks(minor=True)) for ax in drawn[0].axes)


@pytest.mark.parametrize("figure", [results.dots("val_rnn_loss", "val_drift"), results.against("val_rnn_loss"),
                                    results.curves(["seconds", "tokens"], ["val_rnn_loss", "val_drift"])])
def test_every_figure_is_a_small_png_with_all_some_or_none_of_the_runs(figure, tmp_path):
    curve = [dict(seconds=s, tokens=10 * s, val_rnn_loss=1.0 / (1 + s)) for s in (0, 1, 2)]
    records = [record(case, method, seed, 0.5, value=2, curve=curve) for case in "ab" for method in ("SMT", "BPTT") for seed in (1, 2)]
    waiting = [dict(r, done=False) for r in records]
    sizes = []
    long = [r | dict(case=f"{r['case']} {i}", panel=f"panel {i}", curve=[dict(point, val_rnn_loss=(7 * j * i) % 5 + 0.1, seconds=j, tokens=j + 1)
            for j, point in enumerate(20 * curve)]) for i in range(3) for r in records]
    for some in (records, records[:3] + waiting[3:], waiting, long):
        figure(some, tmp_path / "figure.png")
        content = (tmp_path / "figure.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) < 200_000
        sizes.append(len(content))
    assert sizes[0] > sizes[2]                                              # something was drawn


def test_effective_rank_counts_the_directions_in_which_memories_vary():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    corners = torch.cat([torch.eye(3), -torch.eye(3)])                      # three directions, each of the same variance
    memories = (corners @ directions[:3] + torch.randn(12, generator=generator)).view(6, 3, 4)
    assert experiments.effective_rank(memories) == pytest.approx(3, rel=1e-4)
    values = torch.tensor([0.7, 0.2, 0.1])                                  # shares of the variance
    memories = (corners * values.sqrt() @ directions[:3]).view(6, 3, 4)
    assert experiments.effective_rank(memories) == pytest.approx(float((-(values * values.log()).sum()).exp()), rel=1e-4)
    assert experiments.effective_rank(torch.ones(5, 3, 4)) == 0


def test_the_first_of_each_size_is_the_one_that_the_other_sizes_are_compared_at():
    run, = (run for run in experiments.scaling_runs([1], "") if run.case == "fables, base" and run.stage == "smt")
    settings = reproduce.resolve("smt", ("--preset=tiny", *run.flags.split()))
    assert {size: values[0] for size, values in experiments.SCALING.items()} == {size: settings[size] for size in experiments.SCALING}


def test_what_is_asked_of_checkpoints(place, monkeypatch, data_dir, smt_run):
    checkpoint = runtime.load(smt_run("retrieval"))
    run = Run("tiny", "SMT", 1, "tiny", "smt")
    numbers, = experiments.look_at_memories(run, checkpoint, data_dir, "x")
    assert numbers["uniformity"] < 0 and 0 < numbers["effective_rank"] <= 16
    longer = experiments.look_at_length(run, checkpoint, data_dir, "x")
    assert [(r["value"], r.get("method", run.method)) for r in longer] == [(k, m) for k in (1, 2, 4, 8) for m in ("SMT", "Encoder-decoder")]
    assert numbers["parameters"] == sum(w.numel() for name, w in checkpoint["model"].items() if name.startswith(("updater", "readout")))
    assert all(0 <= r["val_rnn_accuracy"] <= 1 for r in longer)             # the encoder's, too
    assert all(r["val_rnn_loss"] > 0 for r in longer) and longer[0]["val_rnn_loss"] != longer[2]["val_rnn_loss"]
    monkeypatch.setattr(experiments, "SCALING", {"memory_tokens": (2, 1), "d_model": (16, 8)})
    sized = [[r["case"] for r in experiments.look_at_sizes(replace(run, stage=stage), checkpoint, data_dir, "x")] for stage in ("smt", "dmt")]
    assert sized == [[], ["d_model 8"]]
    assert experiments.look_at_readout(replace(run, case="tiny, preset"), checkpoint, data_dir, "x") == [{}]
    own, read = experiments.look_at_readout(replace(run, case="tiny, preset", stage="dmt"), checkpoint, data_dir, "x")
    _, networks, initial_memory = model.restore(checkpoint)
    data, config = reproduce.datasets.load("retrieval", data_dir), checkpoint["config"]
    x, y = reproduce.datasets.held_out(data, config["eval_docs"], config["eval_len"], seed=0)
    memories = model.roll_out(networks["updater"], initial_memory.expand(len(x), -1, -1), x)
    at_first = networks["decoder"](memories.flatten(0, 1), x.new_zeros(x.numel(), 0))[:, 0]
    loss = torch.nn.functional.cross_entropy(at_first, y.flatten(), ignore_index=reproduce.datasets.IGNORE)
    assert own == {} and read["case"] == "tiny, DMT read by the decoder" and read["val_rnn_loss"] == pytest.approx(loss.item(), rel=1e-4)
    (place / "results").mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        painted, = experiments.look_at_pictures(Run("mnist", "SMT+DMT", 1, "mnist", "dmt"), runtime.load(smt_run("mnist")), data_dir, "x")
    assert painted["pictures"] == ["x-smt-dmt-1-samples.png", "x-smt-dmt-1-completions.png"]
    assert {path.name for path in (place / "results").iterdir()} == set(painted["pictures"])
