"""What the figures show against slow, obvious references; that they are written, whole and small."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, randomise, refused

from data import Data, Split
from experiments import figures, report, train_baseline
from experiments.report import Trained
from experiments.train_baseline import BaselineConfig
from lib.cli import UsageError
from model import IGNORE, ModelConfig, build, normalise
from sources import tasks

V, PAD = 5, 5
SIZES = dict(d_model=8, n_heads=2, memory_tokens=2, encoder_layers=1, updater_layers=2, decoder_layers=2,
             context_len=6, future_len=3)
ALL = "encoder", "decoder", "updater", "readout"


def checkpoint(stage):
    return {"stage": stage, "step": 4, "data": {"name": "a", "vocab_size": V}, "config": {"seq_len": 9}}


def rnn(name="a-smt", names=ALL, **sizes):
    """A checkpoint of random weights in float64, as report.py loads it."""
    config = ModelConfig(**SIZES | sizes)
    networks = randomise(build(config, V, names), seed=len(name))
    start = normalise(torch.randn(config.memory_tokens, 8, dtype=torch.float64))
    return Trained(name, Path("none"), checkpoint("smt"), config, networks, start)


def baseline(model="transformer"):
    config = BaselineConfig(model=model, d_model=8, n_heads=2, layers=2, context_len=6, hidden=6)
    module = randomise(train_baseline.build(config, V))[model]
    return Trained(model, Path("none"), checkpoint(model), config, torch.nn.ModuleDict(), torch.empty(0),
                   module)


def documents(n=4, length=9):
    """The first two tokens are the same in all documents."""
    x, y = torch.randint(V, (n, length)), torch.randint(V, (n, length))
    x[:, :2] = 1
    return x, y


def loss_from(run, memory, x, y):
    """CE(g(m), y) of the memory m after the tokens x (n,), from memory (1, K, d)."""
    for token in x:
        memory = run.networks["updater"](memory, token[None])
    return F.cross_entropy(run.networks["readout"](memory), y[None])


# ------------------------------------------------------------------------------------------------------------
# Along a document

def test_means_by_position_weigh_every_target_alike(monkeypatch):
    monkeypatch.setattr(figures, "BUCKETS", 3)
    t, weights = torch.arange(0, 40, 4), torch.rand(6, 10) < 0.6
    weights[:, 4] = False                               # a position without a target has no mean
    amounts = torch.rand(6, 10) * weights
    places, means = figures.by_position(amounts, weights, t)
    expected = [[0, 1, 2], [3, 5, 6], [7, 8, 9]]
    assert places == pytest.approx([4 * np.mean(group) for group in expected])
    sums = [[float(part[:, group].sum()) for group in expected] for part in (amounts, weights)]
    assert means == pytest.approx([a / w for a, w in zip(*sums)])
    lines = figures.position([rnn()], [{"rnn_loss": (amounts, weights)}], t, None)["lines"]
    assert lines == [{"runs": ["a-smt"], "part": "RNN", "x": places, "y": means}]


def test_position_is_not_drawn_for_a_single_place():
    weights = torch.zeros(3, 4, dtype=torch.bool)
    weights[:, 2] = True
    measured = [{"rnn_loss": (torch.rand(3, 4) * weights, weights)}]
    assert "skipped" in figures.position([rnn()], measured, torch.arange(4), None)


def test_drift_equals_a_reference_where_the_documents_differ():
    run, (x, y), t = rnn(), documents(), torch.arange(9)
    (line,) = figures.drift([run], [run.measure(x, y, t)], t)["lines"]
    expected = []
    for place in range(2, 9):
        labels = [run.networks["encoder"](x[row:row + 1], torch.tensor([place]))[0, 0] for row in range(4)]
        memories = []
        for row in x:
            memory = run.initial_memory[None]
            for token in row[:place + 1]:
                memory = run.networks["updater"](memory, token[None])
            memories.append(memory[0])
        error = sum((a - b).square().sum().item() for a, b in zip(memories, labels))
        expected.append(error / sum((b - sum(labels) / 4).square().sum().item() for b in labels))
    assert line["x"] == list(range(2, 9)) and line["y"] == pytest.approx(expected, rel=1e-5)


def test_drift_needs_an_encoder():
    runs, (x, y), t = [rnn(names=("updater", "readout")), baseline("lstm")], documents(), torch.arange(9)
    assert "skipped" in figures.drift(runs, [run.measure(x, y, t) for run in runs], t)


# ------------------------------------------------------------------------------------------------------------
# Longer documents

def answers(name, row, options):
    """The right targets of a document, a list, by the task's rule."""
    n, marker = len(row), options.get("symbols")
    y = [IGNORE] * n
    if name == "retrieval":
        y[-1] = row[row.index(marker) + 1]
    if name == "copy":
        y[n // 2:] = row[:n // 2][::-1]
    if name == "stack":
        stack = []
        for i, token in enumerate(row):
            if token == marker:
                y[i] = stack.pop()
            else:
                stack.append(token)
    if name == "keyvalue":
        pairs = {tuple(row[i:i + 2]): row[i + 2:i + 4] for i in range(0, 4 * options["keys"], 4)}
        y[-2:] = pairs[tuple(row[4 * options["keys"] + 1:4 * options["keys"] + 3])]
    if name == "modular":
        p, pairs = options["modulus"], list(zip(row[::2], row[1::2]))
        for i in range(len(pairs)):
            fits = {(w * pairs[i][0] + b) % p for w in range(1, p) for b in range(p)
                    if all((w * a + b) % p == r for a, r in pairs[:i])}
            if len(fits) == 1:
                y[2 * i] = fits.pop()
    return y


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("multiple", [1, 4])
def test_longer_documents_have_their_length_and_right_answers(name, multiple):
    options = tasks.OPTIONS[name] | ({"length": (4, 6)} if "length" in tasks.OPTIONS[name] else {"keys": 3})
    saved = json.loads(json.dumps(options))                             # as meta.json has them
    x, y = figures.longer_documents({"name": name, "options": saved}, multiple, 3)
    n = {"retrieval": 6, "stack": 6, "copy": 12, "modular": 12}.get(name, 0) * multiple
    n = n or 4 * (3 * multiple + 1)
    assert x.shape == y.shape == (3, n) and (y != IGNORE).any(1).all()
    longer = options | ({"keys": 3 * multiple} if name == "keyvalue" else {})
    for row, targets in zip(x.tolist(), y.tolist()):
        assert targets == answers(name, row, longer)
    again, _ = figures.longer_documents({"name": name, "options": options}, multiple, 3)
    assert torch.equal(x, again)


def test_lines_of_length_end_where_no_longer_documents_exist(monkeypatch):
    monkeypatch.setattr(figures, "LENGTH_DOCS", 3)
    run, options = rnn(), dict(symbols=4, keys=5, key_length=2, value_length=1)
    data = Data({"name": "keyvalue", "kind": "synthetic", "vocab_size": V, "options": options}, None, None)
    lines = figures.length([run], data)["lines"]                        # there are 16 keys: 10, but not 20
    assert [(line["part"], line["x"]) for line in lines] == [("RNN", [18, 33]), ("encoder-decoder", [18, 33])]
    assert all(0 <= y <= 1 and e >= 0 for line in lines for y, e in zip(line["y"], line["error"]))
    options["keys"] = 16
    assert "skipped" in figures.length([run], data)


def test_longer_rows_ask_the_same_targets_after_more_text():
    tokens = torch.randint(V, (101,), dtype=torch.uint8)
    meta = {"name": "a", "kind": "text", "vocab_size": V, "first_token": 0}
    data = Data(meta, None, Split(tokens, None, torch.tensor([0])))
    x, y = figures.longer_rows(data, 12, 1)
    assert x.shape == (64, 12) and ((y != IGNORE) == (torch.arange(12) >= 9)).all()
    for multiple in (2, 8):
        longer_x, longer_y = figures.longer_rows(data, 12, multiple)
        assert torch.equal(longer_x[:, -12:], x) and torch.equal(longer_y[:, -12:], y)
        assert (longer_y[:, :-3] == IGNORE).all()
        assert longer_x.shape == (64, 12 * multiple) and longer_x.max() < PAD
    stream = "".join(map(str, tokens.tolist()))
    for row, targets in zip(longer_x.tolist(), longer_y.tolist()):
        assert "".join(map(str, [*row, targets[-1]])) in stream
    with pytest.raises(UsageError, match="fewer than 8 x 13"):
        figures.longer_rows(data, 13, 8)


# ------------------------------------------------------------------------------------------------------------
# Gradients

@pytest.mark.parametrize("steps", [4, 9, 256])
def test_gradients_through_time_equal_those_with_respect_to_each_memory_alone(steps, monkeypatch):
    monkeypatch.setattr(figures, "GRADIENT_STEPS", steps)
    run, (x, y) = rnn(), documents()
    updater, readout, start = run.networks["updater"], run.networks["readout"], run.initial_memory
    norms = figures.gradients_through_time(updater, readout, start.expand(4, -1, -1), x, y[:, -1])
    expected = []
    for t in range(9)[-steps:]:
        size = 0
        for row, targets in zip(x, y):
            with torch.no_grad():
                memory = start[None]
                for token in row[:t + 1]:
                    memory = updater(memory, token[None])
            def loss(memory, x=row[t + 1:], y=targets[-1]):
                return loss_from(run, memory, x, y)
            size += torch.autograd.functional.jacobian(loss, memory).norm() / 4
        expected.append(size)
    torch.testing.assert_close(norms, torch.stack(expected))
    assert all(p.grad is None for p in run.networks.parameters())


def test_gradients_of_one_step_equal_finite_differences():
    run, (x, _) = rnn(), documents(2)
    encoder, updater, step = run.networks["encoder"], run.networks["updater"], 1e-5
    norms = figures.gradients_of_one_step(encoder, updater, x, torch.tensor([0, 7]))
    for t, norm in zip((0, 7), norms):
        size = 0
        for row in x:
            with torch.no_grad():
                before, after = encoder(row[None], torch.tensor([t - 1, t]))[0]
                slopes = []
                for i in range(before.numel()):
                    nudge = F.one_hot(torch.tensor(i), before.numel()).view_as(before) * step
                    up, down = (updater((before + sign * nudge)[None], row[t:t + 1])[0] for sign in (1, -1))
                    up, down = ((memory - after).square().mean() for memory in (up, down))
                    slopes.append((up - down) / (2 * step))
            size += torch.stack(slopes).norm() / 2
        torch.testing.assert_close(norm, size, rtol=1e-4, atol=1e-6)        # RoPE is in float32


def test_gradients_are_those_of_documents_with_the_same_last_target():
    run, (x, y) = rnn(), documents(5)
    y[1, 7:], y[2, 6:], y[3, 7:], y[4] = IGNORE, IGNORE, IGNORE, IGNORE      # most often last: 6
    lines = {line["part"]: line for line in figures.gradients([run], x, y, 0)["lines"]}
    start = run.initial_memory.expand(2, -1, -1)
    expected = figures.gradients_through_time(run.networks["updater"], run.networks["readout"], start,
                                              x[[1, 3], :7], y[[1, 3], 6])
    assert lines["through time"]["y"] == expected.tolist() and lines["through time"]["x"] == list(range(7))
    assert lines.keys() == {"through time", "one step", "at initialisation"}
    assert "skipped" in figures.gradients([run], x, torch.full_like(y, IGNORE), 0)
    assert "skipped" in figures.gradients([baseline()], x, y, 0)


def test_at_initialisation_runs_of_the_same_sizes_are_the_same():
    runs = [rnn("a"), rnn("bb", ("updater", "readout")), rnn("ccc", updater="gru"), baseline("lstm")]
    lines = figures.gradients(runs, *documents(), 0)["lines"]
    first, second, third = [line for line in lines if line["part"] == "at initialisation"]
    assert first["y"] == second["y"] != third["y"] and third["runs"] == ["ccc"]


# ------------------------------------------------------------------------------------------------------------
# Memories

def test_principal_directions_are_orthonormal_and_ordered_by_variance():
    points = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([1, 5, 0.1, 2, 1, 3]) + 7
    mean, directions, shares = figures.principal_directions(points)
    torch.testing.assert_close(directions @ directions.T, torch.eye(2, dtype=torch.float64))
    variances = np.linalg.eigvalsh(np.cov(points.T))[::-1]
    assert ((points - mean) @ directions.T).var(0).tolist() == pytest.approx(variances[:2].tolist())
    assert shares.tolist() == pytest.approx((variances[:2] / variances.sum()).tolist())
    assert shares[0] > shares[1]


@pytest.mark.parametrize("name, x, y, expected", [
    ("retrieval", "ca?bdacad?", ".........b", "...bbbbbbb"),
    ("copy", "acbb|bbc", "....bbca", "acbbbbca"),
    ("stack", "ac?b??c", "..c.ba.", "acaba.c")])
def test_what_a_memory_should_hold_is_what_the_task_will_ask(name, x, y, expected):
    x, y, expected = (torch.tensor([[-1 if c == "." else "abcd?".index(c.replace("|", "?")) for c in text]])
                      for text in (x, y, expected))
    assert torch.equal(figures.remembered(name, x, y, 5)[0], expected)
    assert torch.equal(figures.remembered("fables", x, y, 5)[0], torch.arange(x.shape[1])[None])


def test_paths_run_through_the_points_of_their_documents(monkeypatch):
    monkeypatch.setattr(figures, "PATHS", 2)
    run, (x, y) = rnn(), documents(3)
    x[2, 5:] = PAD
    series = figures.memory([run], x, y, {"name": "fables", "vocab_size": V})
    (panel,) = series["panels"]
    assert panel["held"] == [*range(9), *range(9), *range(5)] and len(panel["points"]) == 23    # none of PAD
    assert [len(path) for path in panel["paths"]] == [10, 10]                               # from m_empty on
    assert panel["paths"][0][1:] == panel["points"][:9] and panel["paths"][1][1:] == panel["points"][9:18]
    np.testing.assert_allclose(np.mean(panel["points"], axis=0), 0, atol=2e-3)


# ------------------------------------------------------------------------------------------------------------
# Costs

def test_state_is_one_memory_for_the_rnn_and_keys_and_values_for_the_transformer(monkeypatch):
    monkeypatch.setattr(figures, "POSITIONS", (3, 10))
    monkeypatch.setattr(figures, "TIMED", 2)
    rnns, memory = [rnn("a"), rnn("bb")], 2 * 8 * 8                     # K d numbers in float64
    series = figures.cost(rnns, V, 0)
    assert all(ms > 0 for line in series["ms"] for ms in line["y"])
    sizes = {line["part"]: line["y"] for line in series["bytes"]}       # 4 layers, in float32
    assert sizes == {"RNN": [memory] * 2,
                     "Transformer of as many layers": [4 * 2 * n * 8 * 4 for n in (3, 10)]}
    series = figures.cost([*rnns, baseline(), baseline("lstm")], V, 0)
    assert [line["runs"] for line in series["ms"]] == [["a"], ["bb"]]
    sizes = {line["part"]: line["y"] for line in series["bytes"]}
    assert sizes == {"RNN": [memory] * 2, "Transformer": [2 * 2 * n * 8 * 4 for n in (3, 6)],  # its context
                     "LSTM": [2 * 6 * 4] * 2}
    assert "skipped" in figures.cost([baseline()], V, 0)


def test_a_run_goes_on_where_the_run_it_started_from_ended(tmp_path, monkeypatch, capsys):
    run = rnn("a-dmt")
    run.folder = tmp_path
    numbers = [dict(step=n, tokens=10 * n, seconds=n / 8, val_rnn_loss=1 + n) for n in (0, 3, 6)]
    lines = [*numbers, {"step": 1, "train_loss": 3}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 9')
    source = (Path("a-smt"), {"spent": {"tokens": 500, "seconds": 2.0}}), (tmp_path, run.checkpoint)
    monkeypatch.setattr(figures, "spent", lambda folder: {0: 70, 1: 80, 3: 100, 6: 130})
    monkeypatch.setattr(figures, "lineage", lambda folder: list(source))
    series = figures.compute([run])
    assert {key: (lines[0]["x"], lines[0]["y"]) for key, lines in series.items()} == {      # step 6: after it
        "tokens": ([500, 530], [1, 4]), "sequential_flops": ([70, 100], [1, 4]),
        "seconds": ([2, 2.375], [1, 4])}
    monkeypatch.setattr(figures, "lineage", lambda folder: [source[1]])
    assert figures.compute([run])["tokens"][0]["x"] == [30]       # a log axis has no 0
    monkeypatch.undo()
    for missing in ("checkpoint ", "evaluation in "):
        assert "skipped" in figures.compute([run])
        (reason,) = capsys.readouterr().err.splitlines()
        assert reason.startswith(f"compute.png: without a-dmt, there is no {missing}{tmp_path}")
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)


def test_held_reads_the_same_targets_at_growing_distances():
    run, other = rnn(), baseline()
    x, y = torch.randint(V, (3, 9)), torch.randint(V, (3, 9))
    series = figures.held([run, other], x, y)["lines"]
    lines = {(one["runs"][0], one["part"]): one for one in series}
    rolled = [run.initial_memory.expand(3, -1, -1)]
    for token in x.unbind(1):
        rolled.append(run.networks["updater"](rolled[-1], token))

    def read(memory):
        return lambda t, n: run.networks["decoder"](memory(t - n), x[:, t - n + 1:t + 1])[:, -1]
    encoder = run.networks["encoder"]
    readers = {("a-smt", "RNN"): read(lambda t: rolled[t + 1]),
               ("a-smt", "encoder-decoder"): read(lambda t: encoder(x, torch.tensor([t]))[:, 0]),
               ("transformer", "Transformer"): lambda t, n: other.baseline(x[:, t - n + 1:t + 1])[:, -1],
               ("transformer", "whole past"): lambda t, n: other.baseline(x[:, :t + 1])[:, -1]}
    assert lines.keys() == readers.keys()
    for name, reader in readers.items():
        assert lines[name]["x"] == ([0, 1, 2] if name[0] == "a-smt" else [1, 2])    # below future_len = 3
        for n, loss in zip((int(n) for n in lines[name]["x"]), lines[name]["y"]):
            losses = [F.cross_entropy(reader(t, n).float(), y[:, t]) for t in range(1, 9)]
            assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5), (name, n)
    assert "skipped" in figures.held([rnn(names=("updater", "readout"))], x, y)
    assert "skipped" in figures.held([run], x, torch.full_like(y, IGNORE))


# ------------------------------------------------------------------------------------------------------------
# Drawing

@pytest.fixture
def quick(monkeypatch):
    for name, value in dict(POSITIONS=(3, 6), MULTIPLES=(1, 2), LENGTH_DOCS=4, TIMED=2).items():
        monkeypatch.setattr(figures, name, value)


@pytest.mark.parametrize("dataset, left_out", [("retrieval", ["position"]), ("mnist", ["length"])])
def test_figures_are_whole_and_small_and_what_makes_no_sense_is_left_out(dataset, left_out, data_dir, smt_run,
                                                                         tmp_path, quick):
    from matplotlib.image import imread
    flags = "--eval_docs=5", "--device=cpu", f"--ckpt={smt_run(dataset)}"
    out = f"--figures={tmp_path / 'new' / 'figures'}", f"--json={tmp_path / 'a.json'}"
    result = call(report, *flags, *out, f"--data_dir={data_dir}")
    assert result.status == 0 and not result.err
    drawn = {path.name: path for path in (tmp_path / "new" / "figures").iterdir()}
    assert drawn.keys() == {f"{name}.png" for name in figures.DRAW if name not in left_out}
    for path in drawn.values():
        assert path.stat().st_size < 200_000 and imread(path).std() > 0.01
    series = json.loads((tmp_path / "a.json").read_text())["figures"]
    assert series.keys() == figures.DRAW.keys()
    for name in left_out:
        assert f"{name}.png: not drawn, {series[name]['skipped']}" in result.out


def many_lines(names, parts, x):
    pairs = [(name, part) for name in names for part in parts]
    y = [np.sort(np.random.default_rng(i).uniform(1, 1000, len(x))) for i in range(len(pairs))]
    return [figures.line([name], part, x, values) for (name, part), values in zip(pairs, y)]


def texts(picture):
    """All texts that a picture shows; of the labels of ticks those within the limits of their axis."""
    found = [picture._suptitle, *(text for one in picture.legends for text in one.get_texts())]
    for axes in (axes for axes in picture.axes if axes.get_visible()):
        found += [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [label for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
                      for label in (tick.label1, tick.label2) if label.get_visible()]
    return [text for text in found if text.get_text()]


def test_no_text_of_a_figure_overlaps_another(tmp_path):
    """Five runs with long names, axes of many decades."""
    names = [f"tinystories-transformer-{i}" for i in range(5)]
    lines = many_lines(names, ("encoder-decoder", "RNN", "whole past"), [1, 10, 2e4])
    shared = [figures.line([name], "at initialisation", [1, 10, 2e4], [1, 1, 1]) for name in names]
    short = many_lines(names, ("RNN", "whole past"), [1, 2, 4, 8, 16])
    panel = dict(points=[[0, 1], [1, 0]], held=[0, 7], paths=[], shares=[0.5, 0.2])
    panels = [panel | {"run": name} for name in names]
    series = {name: {"lines": short if name in ("held", "length") else lines, "what": "loss"}
              for name in figures.CURVES}
    series["gradients"] = {"lines": lines + shared}
    series |= {"memory": {"what": "needle", "panels": panels}, "cost": {"ms": lines, "bytes": lines},
               "compute": dict.fromkeys(("tokens", "sequential_flops", "seconds"), lines)}
    meta = {"name": "retrieval", "vocab_size": 9, "statistics": {"entropy_per_character": 0.1}}
    for name, draw in figures.DRAW.items():
        picture = draw(name, series[name], dict.fromkeys(names, "red"), meta)
        picture.savefig(tmp_path / "a.png")
        boxes = [(text.get_text(), text.get_window_extent().padded(-1)) for text in texts(picture)]
        for i, (text, box) in enumerate(boxes):
            assert box.x0 >= 0 and box.x1 <= picture.bbox.x1 and box.y0 >= 0, (name, text)
            overlapping = [other for other, second in boxes[:i] if box.overlaps(second)]
            assert not overlapping, (name, text, overlapping)


def test_the_largest_picture_of_memories_is_small(tmp_path):
    rng = np.random.default_rng(0)
    paths = figures.PATHS, figures.PATH_STEPS + 1, 2
    panels = [dict(run=str(i), points=rng.normal(size=(333, 2)).tolist(), shares=[0.5, 0.2],
                   held=rng.integers(-1, 8, 333).tolist(), paths=rng.normal(size=paths).tolist())
              for i in range(6)]
    series = dict.fromkeys(figures.DRAW, {"skipped": ""}) | {"memory": {"what": "needle", "panels": panels}}
    figures.draw_all(series, "012345", {"name": "retrieval", "vocab_size": 9}, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "memory.png" and path.stat().st_size < 200_000


def test_what_cannot_be_drawn_is_left_blank_and_the_same_line_is_drawn_once():
    _, (axis,) = figures.canvas("")
    lines = [figures.line([name], part, [1, 2, 3], [1, math.inf, 2])
             for name, part in (("a", "RNN"), ("b", "RNN"), ("b", "one step"))]
    figures.draw_lines(axis, lines, {"a": "red", "b": "blue"}, "x", "y")
    drawn = [(line.get_label(), line.get_color()) for line in axis.get_lines()]
    assert drawn == [("a, b: RNN", "black"), ("b: one step", "blue")]
    assert math.isnan(axis.get_lines()[0].get_ydata()[1]) and lines[0]["y"] == [1, None, 2]


def test_measuring_changes_no_weight_and_no_random_state(quick):
    runs, (x, y) = [rnn("a"), baseline(), baseline("lstm")], documents()
    modules = [runs[0].networks, runs[1].baseline, runs[2].baseline]
    weights = [p.clone() for module in modules for p in module.parameters()]
    data = Data({"name": "a", "kind": "image", "vocab_size": V}, None, None)
    state = torch.get_rng_state()
    first, second = (figures.measure_all(runs, data, x, y, 0) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    for p, before in zip((p for module in modules for p in module.parameters()), weights, strict=True):
        assert torch.equal(p, before) and p.grad is None
    for series in (first, second):
        series["cost"].pop("ms")
    assert first == second


def test_a_folder_that_cannot_be_made_ends_with_one_line(data_dir, smt_run, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "measure_all", lambda *_: {})
    (tmp_path / "file").write_text("")
    flags = f"--ckpt={smt_run('retrieval')}", f"--data_dir={data_dir}", "--device=cpu"
    refused(call(report, *flags, f"--figures={tmp_path / 'file' / 'figures'}"), 1, "cannot make the folder")
