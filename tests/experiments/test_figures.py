"""What the figures show against slow, obvious references; that they are written, whole and small."""
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, randomise

import evaluate as evaluation
import figures
import tasks
from data import IGNORE, Data, Split
from evaluate import Trained, measure
from model import ModelConfig, build, normalise
from runtime import UsageError

V, PAD = 5, 5
SIZES = dict(d_model=8, n_heads=2, memory_tokens=2, encoder_layers=1, updater_layers=2, decoder_layers=2, context_len=6, future_len=3)


def trained(name="a-smt", names=("encoder", "decoder", "updater", "readout"), folder=None, stage="smt", settings=None, step=4, **sizes):
    """A checkpoint of random weights in float64, as evaluate.py loads it."""
    config = ModelConfig(**SIZES | sizes)
    networks = randomise(build(config, V, names), seed=len(name))
    K = config.memory_tokens if "updater" in names else 0
    return Trained(name, folder, stage, step, {"name": "a", "vocab_size": V}, settings or {}, config, networks,
                   normalise(torch.randn(K, 8, dtype=torch.float64)))


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


# ---------------------------------------------------------------------------------------------------------------------
# Along a document

def test_means_by_position_weigh_every_target_alike(monkeypatch):
    monkeypatch.setattr(figures, "BUCKETS", 3)
    t, weights = torch.arange(0, 40, 4), torch.rand(6, 10) < 0.6
    weights[:, 4] = False                                               # a place where nothing is asked has no mean
    amounts = torch.rand(6, 10) * weights
    places, means = figures.by_position(amounts, weights, t)
    expected = [[0, 1, 2], [3, 5, 6], [7, 8, 9]]
    assert places == pytest.approx([4 * np.mean(group) for group in expected])
    assert means == pytest.approx([float(amounts[:, group].sum() / weights[:, group].sum()) for group in expected])
    lines = figures.position([trained()], [{"rnn_loss": (amounts, weights)}], t, None)["lines"]
    assert lines == [{"runs": ["a-smt"], "part": "RNN", "x": places, "y": means}]


def test_position_is_not_drawn_for_a_single_place():
    weights = torch.zeros(3, 4, dtype=torch.bool)
    weights[:, 2] = True
    assert "skipped" in figures.position([trained()], [{"rnn_loss": (torch.rand(3, 4) * weights, weights)}], torch.arange(4), None)


def test_drift_equals_a_reference_where_the_documents_differ():
    run, (x, y), t = trained(), documents(), torch.arange(9)
    (line,) = figures.drift([run], [measure(run.networks, run.initial_memory, x, y, t)], t)["lines"]
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
    run, (x, y), t = trained(names=("updater", "readout")), documents(), torch.arange(9)
    assert "skipped" in figures.drift([run], [measure(run.networks, run.initial_memory, x, y, t)], t)


# ---------------------------------------------------------------------------------------------------------------------
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
    x, y = figures.longer_documents({"name": name, "options": json.loads(json.dumps(options))}, multiple, 3)    # as meta.json has them
    n = {"retrieval": 6, "stack": 6, "copy": 12, "modular": 12}.get(name, 0) * multiple or 4 * (3 * multiple + 1)
    assert x.shape == y.shape == (3, n) and (y != IGNORE).any(1).all()
    longer = options | ({"keys": 3 * multiple} if name == "keyvalue" else {})
    for row, targets in zip(x.tolist(), y.tolist()):
        assert targets == answers(name, row, longer)
    again, _ = figures.longer_documents({"name": name, "options": options}, multiple, 3)
    assert torch.equal(x, again)


def test_lines_of_length_end_where_no_longer_documents_exist(monkeypatch):
    monkeypatch.setattr(figures, "LENGTH_DOCS", 3)
    run = trained()
    run.meta = {"name": "keyvalue", "vocab_size": 5, "options": dict(symbols=4, keys=5, key_length=2, value_length=1)}
    lines = figures.length([run], Data(run.meta | {"kind": "synthetic"}, None, None))["lines"]
    assert [(line["part"], line["x"]) for line in lines] == [("RNN", [18, 33]), ("encoder-decoder", [18, 33])]      # of 16 keys 10, not 20
    assert all(0 <= y <= 1 and error >= 0 for line in lines for y, error in zip(line["y"], line["error"]))
    run.meta["options"]["keys"] = 16
    assert "skipped" in figures.length([run], Data(run.meta | {"kind": "synthetic"}, None, None))


def test_longer_rows_ask_the_same_targets_after_more_text():
    tokens = torch.randint(V, (101,), dtype=torch.uint8)
    data = Data({"name": "a", "kind": "text", "vocab_size": V, "first_token": 0}, None, Split(tokens, None, torch.tensor([0])))
    x, y = figures.longer_rows(data, 12, 1)
    assert x.shape == (64, 12) and ((y != IGNORE) == (torch.arange(12) >= 9)).all()
    for multiple in (2, 8):
        longer_x, longer_y = figures.longer_rows(data, 12, multiple)
        assert torch.equal(longer_x[:, -12:], x) and torch.equal(longer_y[:, -12:], y) and (longer_y[:, :-3] == IGNORE).all()
        assert longer_x.shape == (64, 12 * multiple) and longer_x.max() < PAD
    stream = "".join(map(str, tokens.tolist()))
    assert all("".join(map(str, [*row, targets[-1]])) in stream for row, targets in zip(longer_x.tolist(), longer_y.tolist()))
    with pytest.raises(UsageError, match="fewer than 8 x 13"):
        figures.longer_rows(data, 13, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients

@pytest.mark.parametrize("steps", [4, 9, 256])
def test_gradients_through_time_equal_those_with_respect_to_each_memory_alone(steps, monkeypatch):
    monkeypatch.setattr(figures, "GRADIENT_STEPS", steps)
    run, (x, y) = trained(), documents()
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
            size += torch.autograd.functional.jacobian(lambda m: loss_from(run, m, row[t + 1:], targets[-1]), memory).norm() / 4
        expected.append(size)
    torch.testing.assert_close(norms, torch.stack(expected))
    assert all(p.grad is None for p in run.networks.parameters())


def test_gradients_of_one_step_equal_finite_differences():
    run, (x, _) = trained(), documents(2)
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
                    up, down = ((updater((before + sign * nudge)[None], row[t:t + 1])[0] - after).square().mean() for sign in (1, -1))
                    slopes.append((up - down) / (2 * step))
            size += torch.stack(slopes).norm() / 2
        torch.testing.assert_close(norm, size, rtol=1e-4, atol=1e-6)        # the rotary embedding works in float32


def test_gradients_are_those_of_documents_with_the_same_last_target():
    run, (x, y) = trained(), documents(5)
    y[1, 7:], y[2, 6:], y[3, 7:], y[4] = IGNORE, IGNORE, IGNORE, IGNORE                        # most often last: place 6
    lines = {line["part"]: line for line in figures.gradients([run], x, y, 0)["lines"]}
    expected = figures.gradients_through_time(run.networks["updater"], run.networks["readout"], run.initial_memory.expand(2, -1, -1),
                                              x[[1, 3], :7], y[[1, 3], 6])
    assert lines["through time"]["y"] == expected.tolist() and lines["through time"]["x"] == list(range(7))
    assert lines.keys() == {"through time", "one step", "at initialisation"}
    assert "skipped" in figures.gradients([run], x, torch.full_like(y, IGNORE), 0)
    assert "skipped" in figures.gradients([trained(names=("decoder",))], x, y, 0)


def test_runs_of_the_same_sizes_share_what_does_not_depend_on_their_weights():
    runs = [trained("a"), trained("bb", ("updater", "readout")), trained("ccc", updater="gru"), trained("dddd", ("decoder",)),
            trained("eeeee", decoder_layers=1)]
    assert [[run.name for run in group] for group in figures.rnn_groups(runs)] == [["a", "bb"], ["ccc"], ["eeeee"]]
    lines = figures.gradients(runs, *documents(), 0)["lines"]
    assert [line["runs"] for line in lines if line["part"] == "at initialisation"] == [["a", "bb"], ["ccc"], ["eeeee"]]


# ---------------------------------------------------------------------------------------------------------------------
# Memories

def test_principal_directions_are_orthonormal_and_ordered_by_variance():
    points = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([1, 5, 0.1, 2, 1, 3]) + 7
    mean, directions, shares = figures.principal_directions(points)
    torch.testing.assert_close(directions @ directions.T, torch.eye(2, dtype=torch.float64))
    variances = np.linalg.eigvalsh(np.cov(points.T))[::-1]
    assert ((points - mean) @ directions.T).var(0).tolist() == pytest.approx(variances[:2].tolist())
    assert shares.tolist() == pytest.approx((variances[:2] / variances.sum()).tolist()) and shares[0] > shares[1]


@pytest.mark.parametrize("name, x, y, expected", [
    ("retrieval", "ca?bdacad?", ".........b", "...bbbbbbb"),
    ("copy", "acbb|bbc", "....bbca", "acbbbbca"),
    ("stack", "ac?b??c", "..c.ba.", "acaba.c")])
def test_what_a_memory_should_hold_is_what_the_task_will_ask(name, x, y, expected):
    tokens = [[("abcd?".index(c.replace("|", "?")) if c != "." else IGNORE) for c in text] for text in (x, y, expected)]
    x, y, expected = (torch.tensor([row]) for row in tokens)
    assert torch.equal(figures.remembered(name, x, y, 5)[0], expected)
    assert torch.equal(figures.remembered("fables", x, y, 5)[0], torch.arange(x.shape[1])[None])


def test_paths_run_through_the_points_of_their_documents(monkeypatch):
    monkeypatch.setattr(figures, "PATHS", 2)
    run, (x, y) = trained(), documents(3)
    x[2, 5:] = PAD
    series = figures.memory([run], x, y, {"name": "fables", "vocab_size": V})
    (panel,) = series["panels"]
    assert panel["held"] == [*range(9), *range(9), *range(5)] and len(panel["points"]) == 23        # none where there is no token
    assert [len(path) for path in panel["paths"]] == [10, 10]                                       # from m_empty on
    assert panel["paths"][0][1:] == panel["points"][:9] and panel["paths"][1][1:] == panel["points"][9:18]
    np.testing.assert_allclose(np.mean(panel["points"], axis=0), 0, atol=2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Costs

def test_state_is_one_memory_for_the_rnn_and_keys_and_values_for_the_transformer(monkeypatch):
    monkeypatch.setattr(figures, "POSITIONS", (3, 10))
    monkeypatch.setattr(figures, "CHUNK", 4)
    rnns = [trained("a"), trained("bb")]
    sizes = {"RNN": [2 * 8 * 8] * 2, "Transformer": [2 * 2 * n * 8 * 4 for n in (3, 10)]}          # float64, float32
    for runs in (rnns, [*rnns, trained("ccc", ("decoder",))], [trained("ccc", ("decoder",))]):
        series = figures.cost(runs, V, 0)
        assert [line["x"] for line in series["ms"]] == [[3, 10]] * len(series["bytes"])
        assert all(ms > 0 for line in series["ms"] for ms in line["y"])
        for line in series["bytes"]:
            more = 4 / 2 if "random" in line["part"] else 1             # the four layers that updater and readout have
            assert line["y"] == [more * size for size in sizes[line["part"].split()[0]]]
    assert [line["runs"] for line in series["bytes"]] == [["ccc"]]


def test_a_cache_filled_in_chunks_is_the_one_filled_token_by_token(monkeypatch):
    monkeypatch.setattr(figures, "CHUNK", 4)
    decoder, (x, _) = trained(names=("decoder",)).networks["decoder"], documents(1)
    logits, past = figures.fill_cache(decoder, x)
    step = None
    for token in x[0]:
        own, step = decoder.read(token[None, None], step)
    torch.testing.assert_close(logits[:, -1:], own)
    for ours, theirs in zip(itertools.chain(*past[2]), itertools.chain(*step[2]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_run_goes_on_where_the_given_run_it_started_from_ended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = []
    for name, stage, settings, logged in (("a-smt", "smt", {}, (0, 2, 4, 6)), ("a-dmt", "dmt", {}, (0, 3)),
                                          ("a-bptt", "bptt", {"init_from": "runs/a-dmt/ckpt.pt"}, (0, 1)), ("b", "bptt", {}, (0, 5))):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        lines = [{"step": n, "tokens": 10 * n, "sequential_flops": 100 * n, "seconds": n / 8, "val_rnn_loss": 1 + n} for n in logged]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"step": 1, "train_loss": 3}])) + '\n{"step": 9')
        runs.append(trained(name, folder=folder, stage=stage, settings=settings, step=5))

    def points(some):
        series = figures.compute(some)
        assert list(series) == ["tokens", "sequential_flops", "seconds"]
        return {line["runs"][0]: (line["x"], line["y"]) for line in series["tokens"]}

    assert points(runs) == {"a-smt": ([20, 40], [3, 5]), "a-dmt": ([40, 70], [1, 4]),               # after the checkpoint: not of this run
                            "a-bptt": ([70, 80], [1, 2]), "b": ([50], [6])}
    assert points(runs[1:2]) == {"a-dmt": ([30], [4])} and points(runs[1:3])["a-bptt"] == ([30, 40], [1, 2])
    assert "skipped" in figures.compute([trained(folder=tmp_path)])


def test_held_reads_the_same_targets_from_memories_of_growing_distance_of_the_encoder_and_of_the_rnn():
    run = trained()
    x, y = torch.randint(V, (3, 9)), torch.randint(V, (3, 9))
    lines = {one["part"]: one for one in figures.held([run], x, y)["lines"]}
    distances = [0, 1, 2]                                                         # below future_len = 3, and powers of 2
    assert all(one["x"] == distances for one in lines.values()) and {"encoder-decoder", "RNN"} <= lines.keys()
    rolled = [run.initial_memory.expand(3, -1, -1)]
    for token in x.unbind(1):
        rolled.append(run.networks["updater"](rolled[-1], token))
    for n in distances:
        for part, memory in (("RNN", lambda i: rolled[i + 1]), ("encoder-decoder", lambda i: run.networks["encoder"](x, torch.tensor([i]))[:, 0])):
            losses = []
            for t in range(distances[-1] - 1, 9):
                logits = run.networks["decoder"](memory(t - n), x[:, t - n + 1:t + 1])[:, -1].float()
                losses.append(torch.nn.functional.cross_entropy(logits, y[:, t]))
            assert lines[part]["y"][n] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5), (part, n)
    assert "skipped" in figures.held([trained(names=("updater", "readout"))], x, y)
    assert "skipped" in figures.held([run], x, torch.full_like(y, IGNORE))


# ---------------------------------------------------------------------------------------------------------------------
# Drawing

@pytest.fixture
def quick(monkeypatch):
    for name, value in dict(POSITIONS=(3, 6), LENGTHS=(1, 2), LENGTH_DOCS=4, TIMED=2).items():
        monkeypatch.setattr(figures, name, value)


@pytest.mark.parametrize("dataset, left_out", [("retrieval", ["position"]), ("mnist", ["length"])])
def test_figures_are_whole_and_small_and_what_makes_no_sense_is_left_out(dataset, left_out, data_dir, smt_run, tmp_path, quick):
    from matplotlib.image import imread
    result = call(evaluation, f"--ckpt={smt_run(dataset)}", f"--data_dir={data_dir}", "--eval_docs=5", "--eval_len=60", "--device=cpu",
                  f"--figures={tmp_path / 'new' / 'figures'}", f"--json={tmp_path / 'a.json'}")
    assert result.status == 0 and not result.err
    drawn = {path.name: path for path in (tmp_path / "new" / "figures").iterdir()}
    assert drawn.keys() == {f"{name}.png" for name in figures.DRAW if name not in left_out}
    for path in drawn.values():
        assert path.stat().st_size < 200_000 and imread(path).std() > 0.01
    series = json.loads((tmp_path / "a.json").read_text())["figures"]
    assert series.keys() == figures.DRAW.keys()
    for name in left_out:
        assert f"{name}.png: not drawn, {series[name]['skipped']}" in result.out


def test_the_largest_picture_of_memories_is_small(tmp_path):
    rng = np.random.default_rng(0)
    panels = [dict(run=str(i), points=rng.normal(size=(333, 2)).tolist(), held=rng.integers(-1, 8, 333).tolist(),
                   paths=rng.normal(size=(figures.PATHS, figures.PATH_STEPS + 1, 2)).tolist(), shares=[0.5, 0.2]) for i in range(6)]
    series = dict.fromkeys(figures.DRAW, {"skipped": ""}) | {"memory": {"what": "needle", "panels": panels}}
    figures.draw_all(series, "012345", {"name": "retrieval", "vocab_size": 9}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.png"] and (tmp_path / "memory.png").stat().st_size < 200_000


def test_what_cannot_be_drawn_is_left_blank_and_the_same_line_is_drawn_once():
    _, (axis,) = figures.canvas("")
    lines = [figures.line([name], part, [1, 2, 3], [1, math.inf, 2]) for name, part in (("a", "RNN"), ("b", "RNN"), ("b", "one step"))]
    figures.draw_lines(axis, lines, {"a": "red", "b": "blue"}, "x", "y")
    assert [(line.get_label(), line.get_color()) for line in axis.get_lines()] == [("a, b: RNN", "black"), ("b: one step", "blue")]
    assert math.isnan(axis.get_lines()[0].get_ydata()[1]) and lines[0]["y"] == [1, None, 2]


def test_measuring_changes_no_weight_and_no_random_state(quick):
    runs, (x, y) = [trained("a", folder=evaluation.Path("none")), trained("bb", ("decoder",), evaluation.Path("none"))], documents()
    weights = [p.clone() for run in runs for p in run.networks.parameters()]
    data = Data({"name": "a", "kind": "image", "vocab_size": V}, None, None)
    state = torch.get_rng_state()
    first = figures.measure_all(runs, data, x, y, 0)
    second = figures.measure_all(runs, data, x, y, 0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip((p for run in runs for p in run.networks.parameters()), weights))
    for series in (first, second):
        series["cost"].pop("ms")
    assert first == second


def test_a_folder_that_cannot_be_made_ends_with_one_line(data_dir, smt_run, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "measure_all", lambda *_: {})
    (tmp_path / "file").write_text("")
    result = call(evaluation, f"--ckpt={smt_run('retrieval')}", f"--data_dir={data_dir}", f"--figures={tmp_path / 'file' / 'figures'}")
    assert result.status == 1 and len(result.err.splitlines()) == 1 and "cannot make the folder" in result.err
