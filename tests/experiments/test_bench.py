"""The benchmark, on tiny sizes: the lines are there, and the numbers are those of the stages."""
from types import SimpleNamespace

import pytest
import torch
from conftest import call, refused, trained

import data as datasets
import model
import runtime
import train_smt
from experiments import bench
from lib import graphs
from lib.optim import make_optimizers, optimizer_step

RNN = dict(d_model=8, n_heads=2, memory_tokens=2, updater_layers=1, decoder_layers=1)
SMT = dict(RNN, encoder_layers=1, context_len=8, future_len=3, batch_size=4, seq_len=8, positions=2)
SIZES = {"smt": SMT, "dmt": dict(batch_size=2, seq_len=12, horizon=5, label_stride=2),
         "bptt": dict(RNN, batch_size=3, seq_len=5), "lstm": dict(d_model=8, hidden=8, batch_size=5),
         "transformer": dict(d_model=8, n_heads=2, layers=1, batch_size=5)}
ALL = [*bench.SCRIPTS, "sample, 1 stream", "sample, 3 streams", "matrix product", "copy"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in dict(STREAMS=(1, 3), SAMPLED=2, MATRIX={"cpu": 64}, COPIED=2**16, WARM_UPS=1).items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "stage_config", lambda stage, config: config_of(stage))


def config_of(stage, **changes):
    more = {"model": stage} if stage in ("lstm", "transformer") else {}
    return bench.SCRIPTS[stage].Config(**SIZES[stage] | more | changes)


def lines_of(data_dir, *flags):
    return trained(bench, "--device=cpu", f"--data_dir={data_dir}", "--rounds=1", *flags).out.splitlines()


def test_every_stage_has_a_line_with_all_numbers(data_dir):
    lines = lines_of(data_dir)
    assert [line[:20].strip() for line in lines[2:]] == ALL and "GFLOP/s" in lines[0]
    for name, line in zip(ALL, lines[2:]):
        numbers = [float(text.rstrip("%").replace(",", "")) for text in line[20:].split()]
        assert len(numbers) == len(bench.COLUMNS) and (numbers[3] > 1 or name == "copy")
    lines = lines_of(data_dir, "--stages=bptt")
    assert [line[:20].strip() for line in lines[2:]] == ["bptt", "matrix product", "copy"]


def test_compiled_steps_run(data_dir, monkeypatch):
    """The graphs are captured; the compiler behind them, which takes minutes, is left out."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile(*args, **options, backend="eager"))
    lines = lines_of(data_dir, "--compile", "--stages=smt,dmt")
    assert [line[:20].strip() for line in lines[2:4]] == ["smt", "dmt"]


@pytest.mark.parametrize("flag", ["--preset=huge", "--stages=smt,sgd", "--rounds=0", "--device=mps:0"])
def test_a_wrong_flag_is_one_line_with_status_2(flag, data_dir, monkeypatch):
    monkeypatch.undo()
    refused(call(bench, flag, f"--data_dir={data_dir}"), 2, flag.split("=")[0])


def test_a_step_is_the_loss_of_the_stage_and_an_optimiser_step(data_dir, monkeypatch):
    """The parameters that it leaves are those of the stage's own functions on the same batch."""
    data, config, built = datasets.load("fables", data_dir), config_of("smt"), []
    run = runtime.Run(config, "smt", torch.device("cpu"), 0, 1, data_dir, False, False)
    monkeypatch.setattr(runtime, "distribute", lambda networks, loss, *_, **__: built.append(networks)
                        or graphs.Bound(loss, networks))
    step, tokens = bench.training("smt", config, config, data, run)
    torch.manual_seed(0)
    step(3)
    assert tokens == 4 * 8

    torch.manual_seed(0)
    networks = model.build(config, data.vocab_size)
    x, y, t = datasets.sample_batch(data, config.seed, 3, 4, 8, 2, config.p_start)
    counts = train_smt.count_terms(x, y, t, config, data.pad)
    train_smt.smt_loss(networks, x, y, t, counts, config)[0].backward()
    optimizer_step(make_optimizers(networks, config), config.lr)
    for own, reference in zip(built[0].parameters(), networks.parameters(), strict=True):
        torch.testing.assert_close(own, reference, rtol=0, atol=0)


def test_flops_of_a_step_are_those_of_its_matrix_products_and_attention(monkeypatch):
    """Rows that begin at the only document's start have a target at every token."""
    V, d, K = 7, 8, 2
    split = datasets.Split(torch.randint(V, (50,), dtype=torch.uint8), None, torch.tensor([0]))
    data = datasets.Data({"name": "a", "kind": "text", "vocab_size": V, "first_token": 0}, split, split)
    monkeypatch.setattr(datasets, "load", lambda *_: data)
    monkeypatch.setattr(bench, "stage_config", lambda stage, config: config_of(
        stage, p_start=1.0, seq_len=6, **{"updater": "mlp"} if stage == "bptt" else {}))
    _, work = bench.prepare(bench.Config(stages="bptt,transformer,lstm"), torch.device("cpu"))

    def block(n, outputs):
        """A layer on n tokens, of which so many outputs are used: qkv; scores and mixing; out, up, down."""
        return n * 2 * d * 3 * d + outputs * n * 2 * d * 2 + outputs * (2 * d * d + 2 * 2 * d * 4 * d)
    updater = 2 * (K * d + d) * 4 * d + 2 * 4 * d * K * d + K * 2 * d   # two matrices, a gate for each token
    assert work["bptt"][:2] == (3 * 6, 3 * 3 * 6 * (updater + block(K, 1) + 2 * d * V))
    assert work["transformer"][:2] == (5 * 6, 3 * 5 * (block(6, 6) + 6 * 2 * d * V))
    assert work["lstm"][:2] == (5 * 6, 3 * 5 * 6 * 2 * (d * 4 * 8 + 8 * 4 * 8 + 8 * V))


@pytest.mark.parametrize("platform, unit", [("linux", 2**10), ("darwin", 1)])
def test_the_peak_of_a_cpu_is_in_mib_whatever_the_unit_of_the_system(platform, unit, monkeypatch):
    monkeypatch.setattr(bench.sys, "platform", platform)
    monkeypatch.setattr(bench.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3 * 2**20 // unit))
    assert bench.timed(lambda i: None, 0, torch.device("cpu"))[1] == 3


def test_bytes_are_what_operations_read_and_write():
    a, b, table = torch.ones(4, 8), torch.ones(8, 4), torch.ones(1000, 4)
    rows = torch.tensor([1, 2])
    for function, elements in ((lambda: a @ b, 32 + 32 + 16), (lambda: a.t().expand(3, 8, 4), 0),
                               (lambda: a.add_(1), 32 + 32), (lambda: table[rows], 8 + 8)):
        with bench.Traffic() as traffic:
            function()
        assert traffic.bytes == 4 * elements


def test_numbers_are_medians_of_the_rounds_own_ratios(monkeypatch):
    monkeypatch.setattr(bench, "WARM_UPS", 1)
    work = {"smt": (100, 4000, 0, 1), "dmt": (100, 4000, 500, 2), "matrix product": (0, 1000, 0, 1),
            "copy": (0, 0, 1000, 1)}
    noted = {"smt": [(99.0, 7.0), (2.0, 5.0), (8.0, 6.0), (4.0, 6.0)], "dmt": [(2.0, 1.0)] * 4,
             "matrix product": [(0.1, 1.0), (1.0, 1.0), (1.0, 1.0), (0.5, 1.0)], "copy": [(1.0, 1.0)] * 4}
    rows = bench.summarise(noted, work)             # the warm-up's time does not count, its memory does
    ms, ratio, speed, peak, use, flops_ms, bytes_ms = rows["smt"]
    assert (ms, ratio, speed, peak) == (4000, 1, 25, 7)
    assert use == 4000 / 1000 / 8 and flops_ms == 2000      # 2000, 500, 1000 FLOP/s over 1000, 1000, 2000
    assert rows["dmt"][:3] == (1000, 0.25, 50) and rows["dmt"][6] == 250        # twice in a step
    del noted["dmt"]
    assert "out of memory" in bench.table(work, bench.summarise(noted, work)).splitlines()[2]


def test_rounds_interleave_the_steps_and_what_runs_out_of_memory_is_left_out(monkeypatch):
    calls = []

    def large(i):
        raise torch.OutOfMemoryError
    steps = {"a": lambda i: calls.append((i, "a")), "large": large, "b": lambda i: calls.append((i, "b"))}
    noted = bench.repeat(steps, torch.device("cpu"), rounds=2)
    assert {name: len(numbers) for name, numbers in noted.items()} == {"a": 3, "b": 3}
    assert calls == [(i, name) for i in range(3) for name in "ab"]              # the first round warms up
