"""The benchmark, on tiny sizes: each row is there, the JSON says the same, the numbers are those of the stages. No time is asserted."""
import json
import subprocess

import pytest
import torch
from conftest import call, trained

import bench
import runtime
import train_dmt
import train_smt
from data import IGNORE, sample_batch
from flops import forward_flops

TINY = dict(d_model=8, n_heads=2, memory_tokens=2, encoder_layers=1, decoder_layers=1, updater_layers=1, context_len=8,
            future_len=3)
SIZES = {"smt": TINY | dict(batch_size=4, seq_len=8, positions=2),
         "bptt": dict(d_model=8, n_heads=2, memory_tokens=2, updater_layers=1, decoder_layers=1, batch_size=3, seq_len=5),
         "dmt": dict(batch_size=2, seq_len=12, horizon=6, label_stride=2),
         "transformer": dict(d_model=8, n_heads=2, decoder_layers=1, context_len=8, batch_size=5)}
CAUSAL = dict(encoder="causal", optimizer="muon", conv_width=2, positions=8)
DMT = ["DMT iteration", "DMT roll-out", "DMT roll-out, one step", "DMT labels", "DMT supervised pass"]
STEPS = ["SMT step", "data loading", *DMT, "BPTT step", "Transformer step"]
NUMBERS = ["ms", "min_ms", "max_ms", "ratio", "tokens_per_second", "utilisation", "peak_mib"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A preset of tiny sizes, and growth by little."""
    monkeypatch.setitem(bench.SIZES, "mini", SIZES)
    monkeypatch.setattr(bench, "GROWTH", {"T": (8, 16), "batch": (1, 4), "processes": (2,)})
    monkeypatch.setattr(bench, "STREAMS", (1, 3))
    monkeypatch.setattr(bench, "SAMPLED", 2)
    monkeypatch.setattr(bench, "PRODUCTS", 1)


@pytest.fixture
def threads():
    """The number of threads as it was."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def measured(tmp_path, *arguments):
    """What bench.py prints, and the JSON it writes, which must be standard JSON."""
    result = trained(bench, "--device=cpu", "--preset=mini", "--rounds=2", f"--json={tmp_path / 'bench.json'}", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]

    def refuse(constant):
        raise AssertionError(constant)
    return result.out.splitlines(), json.loads((tmp_path / "bench.json").read_text(), parse_constant=refuse)


def parts(config):
    """The rows of work {row: (tokens, FLOPs)} of all stages at sizes `config`, and what was noted in one step of each."""
    run = runtime.Run(torch.device("cpu"), 0, 1, None, False, 1)
    data, (note, spent) = bench.random_data(0), bench.stopwatch(run.device)
    work, noted = {}, {}
    for rows, measure in (bench.optimiser_step("SMT step", "smt", config["smt"], data, run, note),
                          bench.dmt(config["dmt"], config["smt"], data, run, note, spent),
                          bench.optimiser_step("BPTT step", "bptt", config["bptt"], data, run, note),
                          bench.optimiser_step("Transformer step", "transformer", config["transformer"], data, run, note)):
        spent.clear()
        measure(0)
        work, noted = work | rows, noted | spent
    return work, noted


# ---------------------------------------------------------------------------------------------------------------------
# The program

def test_every_item_has_a_row_and_the_json_has_the_same_numbers(tmp_path):
    lines, told = measured(tmp_path)
    assert [row["item"] for row in told["rows"]] == [*STEPS, "sampling, 1 stream", "sampling, 3 streams", "matrix product"]
    assert len(lines) == 2 + len(told["rows"])
    assert lines[0].startswith(f"{told['device']}, torch {torch.__version__}, threads {torch.get_num_threads()}, float32, compile off")
    assert f"{told['matrix_flops_per_second'] / 1e9:,.1f} GFLOP/s" in lines[0]
    for line, row in zip(lines[2:], told["rows"]):
        assert line.startswith(row["item"] + " ")
        shown = line[24:].split()
        absent = [name for name in NUMBERS if row[name] is None]
        assert len(shown) == len(NUMBERS) and [name for name, text in zip(NUMBERS, shown) if text == "-"] == absent
        assert absent == {"data loading": ["utilisation"], "matrix product": ["tokens_per_second"]}.get(row["item"], [])
        for name, text in zip(NUMBERS, shown):
            if text != "-":
                value = float(text.rstrip("%").replace(",", "")) / (100 if text.endswith("%") else 1)
                assert value == pytest.approx(row[name], abs={"ms": 0.006, "min_ms": 0.006, "max_ms": 0.006}.get(name, 0.51), rel=1e-3)
        assert 0 < row["min_ms"] <= row["ms"] <= row["max_ms"] and row["peak_mib"] > 1
    by_item = {row["item"]: row for row in told["rows"]}
    assert by_item["SMT step"]["ratio"] == 1 and by_item["matrix product"]["utilisation"] == 1


@pytest.mark.parametrize("grow", ["T", "batch"])
def test_growth_has_every_item_at_every_size_side_by_side(tmp_path, grow):
    lines, told = measured(tmp_path, f"--grow={grow}", "--rounds=1")
    items = [*STEPS, *(["sampling"] if grow == "batch" else []), "matrix product"]
    sizes = bench.GROWTH[grow]
    assert [(row["at"], row["item"]) for row in told["rows"]] == [(at, item) for at in sizes for item in items]
    assert [line[:35].split() for line in lines[2:]] == [[*item.split(), str(at)] for item in items for at in sizes]
    rows = {(row["at"], row["item"]): row for row in told["rows"]}
    for (at, item), row in rows.items():
        assert row["growth"] == pytest.approx(row["ms"] / rows[sizes[0], item]["ms"])
        if item in ("SMT step", "BPTT step", "Transformer step", "DMT iteration") and grow == "T":
            assert row["tokens"] == bench.GROWN_ROWS * at


def test_compiled_steps_run(tmp_path, monkeypatch):
    """What is captured, without the compiler behind it, which takes minutes."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: compile(*arguments, **options, backend="eager"))
    lines, told = measured(tmp_path, "--compile", "--rounds=1")
    assert "compile on" in lines[0] and all(row["ms"] > 0 for row in told["rows"])


def test_processes_are_timed_by_the_train_script_itself(tmp_path, threads):
    lines, told = measured(tmp_path, "--grow=processes", "--rounds=1")
    rows = {(row["at"], row["item"]): row for row in told["rows"]}
    assert list(rows) == [(2, "SMT step"), (2, "matrix product")] and len(lines) == 4
    assert rows[2, "SMT step"]["tokens_per_second"] > 0 and rows[2, "SMT step"]["tokens"] == 32 and told["threads"] == 1


def test_a_failing_train_script_is_one_line(monkeypatch, threads):
    told = "W1124 run.py] something\nerror: --batch_size=3 must be even\nerror: --batch_size=3 must be even\nTraceback: ChildFailedError\n"
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", told))
    result = call(bench, "--preset=mini", "--grow=processes", "--rounds=1")
    assert result.status == 1 and result.err == "error: train_smt.py by 2 processes: --batch_size=3 must be even\n"


@pytest.mark.parametrize("argument, named", [("--present=tiny", "--preset"), ("--preset=huge", "cpu, tiny, small, paper"),
                                             ("--grow=heads", "T, batch, processes"), ("--rounds=0", "--rounds"),
                                             ("--rounds=x", "--rounds"), ("--json=no/such/folder.json", "no/such"),
                                             ("--device=mps:0", "--device"), ("--threads=-1", "--threads")])
def test_a_wrong_argument_is_one_line_with_status_2(argument, named):
    result = call(bench, argument)
    assert result.status == 2 and named in result.err and result.err.count("\n") == 1 and not result.out


def test_processes_take_no_gpu():
    result = call(bench, "--grow=processes", "--device=cuda")
    assert result.status == 2 and "--device" in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize("preset", ["cpu", "tiny", "small", "paper"])
@pytest.mark.parametrize("grow, at", [("", 0), ("T", 64), ("T", 2048), ("batch", 2), ("batch", 128)])
def test_presets_grow_into_sizes_that_the_stages_take(preset, grow, at):
    before, configs = bench.stage_configs(preset, 5), bench.stage_configs(preset, 5, grow, at)
    for stage, config in configs.items():
        assert config.seed == 5 and config.seq_len == (at if grow == "T" else before[stage].seq_len) > 0
        assert config.batch_size == {"": before[stage].batch_size, "T": bench.GROWN_ROWS, "batch": at}[grow]
    begins, labelled = train_dmt.choose_steps(configs["dmt"], 0, configs["dmt"].seq_len, configs["dmt"].horizon)
    assert 1 <= len(labelled) <= max(1, before["dmt"].horizon // before["dmt"].label_stride)
    assert 0 <= begins[0] and begins[-1] + configs["dmt"].horizon <= configs["dmt"].seq_len


# ---------------------------------------------------------------------------------------------------------------------
# The numbers

def test_ratio_is_the_median_of_the_rounds_ratios():
    """Not the ratio of the medians, which is 10 / 4 here."""
    assert bench.ratio([1, 10, 12], [4, 5, 3]) == 2
    assert bench.ratio([3, 4], [1, 2]) == 2.5
    with pytest.raises(ValueError):
        bench.ratio([1, 2], [1])


def test_numbers_are_medians_and_utilisation_is_against_the_products_of_the_same_round():
    work = {"SMT step": (100, 4000), "matrix product": (0, 1000), "gone": (1, 1)}
    noted = {"SMT step": [(2.0, 5.0), (8.0, 7.0), (4.0, 6.0)], "matrix product": [(1.0, 1.0), (1.0, 1.0), (0.5, 1.0)], "gone": [(1.0, 1.0)]}
    smt, product, gone = bench.summarise(work, noted, 3)
    assert (smt["ms"], smt["min_ms"], smt["max_ms"], smt["peak_mib"]) == (4000, 2000, 8000, 7)
    assert smt["tokens_per_second"] == 25 and smt["ratio"] == 1
    assert smt["utilisation"] == 0.5            # 2000, 500 and 1000 FLOP/s over 1000, 1000 and 2000: 2, 0.5 and 0.5
    assert product["ratio"] == 0.125 and product["utilisation"] == 1 and product["tokens_per_second"] is None
    assert all(gone[name] is None for name in NUMBERS)          # not in every round: it ran out of memory
    assert "gone" in bench.table([smt, product, gone], "").splitlines()[-1]


def test_what_runs_out_of_memory_is_left_out_and_the_rest_is_measured():
    spent, calls = {}, []

    def fits(step):
        calls.append("fits")
        spent["fits"] = (1.0, 1.0)

    def does_not(step):
        calls.append("does not")
        raise torch.OutOfMemoryError
    assert bench.repeat([does_not, fits], 2, 1, spent, "rounds") == {"fits": [(1.0, 1.0)] * 2}
    assert calls == ["does not", "fits", "fits", "fits"]


def test_rounds_interleave_what_is_measured_and_warm_ups_do_not_count():
    spent, calls = {}, []

    def item(name):
        def measure(step):
            calls.append((step, name))
            spent[name] = (float(step), 0.0)
        return measure
    noted = bench.repeat([item("a"), item("b")], 2, 1, spent, "rounds")
    assert calls == [(step, name) for step in range(3) for name in "ab"]
    assert noted == {"a": [(1.0, 0.0), (2.0, 0.0)], "b": [(1.0, 0.0), (2.0, 0.0)]}


@pytest.mark.parametrize("stage", bench.STAGES)
def test_flops_are_those_that_the_stages_count(monkeypatch, stage):
    monkeypatch.setattr(bench, f"{stage}_flops", lambda *_: (12345678, 1))
    work, _ = parts(bench.stage_configs("mini", 0))
    rows = {"smt": "SMT step", "dmt": "DMT iteration", "bptt": "BPTT step", "transformer": "Transformer step"}
    assert {row for row, (_, flops) in work.items() if flops == 12345678} == {rows[stage]}


@pytest.mark.parametrize("more", [{}, CAUSAL], ids=["window", "causal"])
def test_phases_of_dmt_add_up_to_the_iteration(monkeypatch, more):
    monkeypatch.setitem(bench.SIZES, "mini", SIZES | {"smt": TINY | dict(batch_size=4, seq_len=8) | more})
    configs = bench.stage_configs("mini", 0)
    work, noted = parts(configs)
    phases = ["DMT roll-out", "DMT labels", "DMT supervised pass"]
    assert set(DMT) <= set(work) and all(noted[row][0] > 0 for row in DMT)
    assert noted["DMT iteration"][0] == pytest.approx(sum(noted[row][0] for row in phases))
    assert noted["DMT roll-out, one step"][0] == pytest.approx(noted["DMT roll-out"][0] / 6)
    assert work["DMT iteration"][1] == sum(work[row][1] for row in phases)
    forward = forward_flops(configs["smt"], bench.VOCAB_SIZE, 12, 2 * (1 + 3))   # two roll-outs of 6 tokens, a label every second
    assert work["DMT labels"][1] == 2 * forward["encoder"] and work["DMT roll-out"][1] == 2 * 12 * forward["updater"]
    assert {work[row][0] for row in ("DMT iteration", *phases)} == {2 * 12}


def test_a_step_is_the_loss_of_the_stage_and_an_optimiser_step(monkeypatch):
    """The parameters that it leaves are those of the stage's own functions, called on the same batch."""
    seen, config = [], bench.stage_configs("mini", 0)["smt"]
    monkeypatch.setattr(runtime, "distribute", lambda networks, loss, run, parts: seen.append(networks) or runtime.LossModule(networks, loss))
    data, run = bench.random_data(0), runtime.Run(torch.device("cpu"), 0, 1, None, False, 1)
    torch.manual_seed(7)
    bench.optimiser_step("SMT step", "smt", config, data, run, bench.stopwatch(run.device)[0])[1](3)

    torch.manual_seed(7)
    networks = bench.build(config, data.vocab_size)
    optimizers = runtime.optimizers(networks, config)
    x, y, t = sample_batch(data, 0, 3, 4, 8, 2, config.p_start)
    train_smt.smt_loss(networks, x, y, t, train_smt.count_terms(x, y, t, config, data.pad), config)[0].backward()
    runtime.optimizer_step(optimizers, config.lr)
    for own, reference in zip(seen[0].parameters(), networks.parameters(), strict=True):
        torch.testing.assert_close(own, reference, rtol=0, atol=0)


def test_random_text_is_one_that_rows_can_be_drawn_from():
    data = bench.random_data(3)
    assert data.train.tokens.dtype == torch.uint8 and (data.train.tokens[data.train.starts] == 0).all() and data.train.tokens[-1] == 0
    x, y, _ = sample_batch(data, 0, 0, 64, 300, 1, 0.5)
    assert x.max() <= data.pad and (y[:, :-1][y[:, :-1] != IGNORE] == x[:, 1:][y[:, :-1] != IGNORE]).all()
    assert torch.equal(data.train.tokens, bench.random_data(3).train.tokens)
