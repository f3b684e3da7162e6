"""The figures of report.py: for each a function that measures it, as plain data, and one that draws it.

    held.png         loss against n: the decoder's, from the memory of n tokens earlier and the tokens since;
                     a baseline's, if the text before the last n tokens is cut off
    position.png     loss by position in the document
    drift.png        squared error of the rolled-out memory over the variance of the encoder's
    length.png       documents of 1, 2, 4 and 8 times the trained length
    gradients.png    norm of the loss's gradient with respect to the memory: through time, and in one step
    memory.png       the RNN's memories, projected on their two main directions
    cost.png         time and bytes of state for a generated token, after 100, 1000 and 10,000 tokens
    compute.png      held-out loss during training, against tokens, sequential FLOPs and seconds

A line is a dict: the names of its runs, what of them (part), and its points x, y. A figure that makes no
sense for the checkpoints at hand is {"skipped": why}. `trained`: report.Trained of one data set, a list.
"""
import math
import sys
import textwrap
import time
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

import data as datasets
import runtime
import sample
from evaluate import SAME, held_targets, loss_of, measure_held, ratio, spread, standard_error, targets_of
from experiments.flops import lineage, spent
from lib.checkpoints import write_atomically
from lib.cli import DataError, UsageError
from lib.seeds import philox
from model import IGNORE, build, normalise, roll_out, roll_out_without_gradients
from sources import tasks

BUCKETS = 32                            # of position.png: groups of neighbouring positions, at most
HELD_DOCS, HELD_FUTURE = 32, 65         # of held.png: documents; future_len if all runs are baselines
MULTIPLES, LENGTH_DOCS = (1, 2, 4, 8), 64     # of length.png: times the trained length; documents
GRADIENT_DOCS, GRADIENT_STEPS = 16, 256     # of gradients.png: documents; steps back through time, at most
MEMORY_DOCS, MEMORY_POINTS = 64, 1800   # of memory.png: documents; points in all its panels
PATHS, PATH_STEPS = 3, 16               # of memory.png: documents with arrows; arrows of each
POSITIONS, TIMED = (100, 1000, 10_000), 30      # of cost.png: tokens before; tokens timed
PARTS = {"transformer": "Transformer", "lstm": "LSTM"}      # what a baseline is called; all else is an RNN


def line(runs, part, x, y, **more):
    """A line of a figure, as plain numbers; None where a y is not finite."""
    y = [float(a) if math.isfinite(a) else None for a in y]
    return dict(runs=list(runs), part=part, x=[float(a) for a in x], y=y, **more)


def own_part(run):
    """What the network is called that stands alone after training."""
    return PARTS.get(run.checkpoint["stage"], "RNN")


def measure_all(trained, data, x, y, seed):
    """What all figures show, {figure: its data}; x, y (N, L) held-out documents on the networks' device."""
    real = x != data.pad
    end = int((real.sum(0) >= max(1, len(x) // 10)).sum())      # beyond are too few documents for a mean
    t = spread(torch.arange(end, device=x.device), 2 * BUCKETS)
    measured = [run.measure(x[:, :end], y[:, :end], t) for run in trained]
    targets = targets_of(y[:, :end], end)
    return {"held": held(trained, x[:HELD_DOCS, :end], y[:HELD_DOCS, :end]),
            "position": position(trained, measured, targets, t), "drift": drift(trained, measured, t),
            "length": length(trained, data), "gradients": gradients(trained, x, y, seed),
            "memory": memory(trained, x, y, data.meta), "cost": cost(trained, data.vocab_size, seed),
            "compute": compute(trained)}


# ------------------------------------------------------------------------------------------------------------
# What they show

@torch.no_grad()
def measure_last(module, x, y, t, distances, rows=16):
    """last_<n>, last_all: a baseline's loss of y_t from x_{t-n+1..t}, from x_{<=t}, at t (S,) of x, y (N, L).

    Returns {name: (amounts, weights)}, (N, S) each.
    """
    measured = {}
    for n in distances:
        since = t[:, None] + torch.arange(1 - n, 1, device=t.device)                    # (S, n)
        logits = torch.cat([module(part[:, since].flatten(0, 1))[:, -1].float() for part in x.split(rows)])
        measured |= loss_of(f"last_{n}", logits.view(len(x), len(t), -1), y[:, t])
    whole = torch.cat([module(part)[:, t].float() for part in x.split(rows)])
    return measured | loss_of("last_all", whole, y[:, t])


@torch.no_grad()
def held(trained, x, y):
    """Loss against the distance n = 0, 1, 2, 4, .. of a memory from the target: by the encoder's memory, the
    RNN's, the whole past; of a baseline by the last n tokens. At the same targets of x, y (N, L)."""
    t, powers, lines = targets_of(y), [], []
    futures = [run.config.future_len for run in trained if "encoder" in run.networks]
    if len(t):
        powers = [0, *(2 ** i for i in range(20))]
        t, (_, *powers) = held_targets(t, powers, max(futures, default=HELD_FUTURE))
    for run in trained if powers else ():
        if run.baseline is not None:
            found = measure_last(run.baseline, x, y, t, powers)
            losses = [ratio(*found[f"last_{n}"]) for n in powers]
            lines.append(line([run.name], own_part(run), powers, losses))
            lines.append(line([run.name], "whole past", powers, [ratio(*found["last_all"])] * len(powers)))
        if "encoder" not in run.networks:
            continue
        distances = [0, *(n for n in powers if n < run.config.future_len)]
        start = run.initial_memory.expand(len(x), 1, -1, -1)
        rolled = roll_out_without_gradients(run.networks["updater"], start[:, 0], x)
        rolled = torch.cat([start, rolled], dim=1)                                      # m_{-1} first
        for part, memories in (("encoder-decoder", None), ("RNN", lambda t: rolled[:, t + 1])):  # noqa: B023
            found = measure_held(run.networks, x, y, t, distances, memories)
            losses = [ratio(*found[f"held_{n}"]) for n in distances]
            lines.append(line([run.name], part, distances, losses))
        if "held_full" in found:
            losses = [ratio(*found["held_full"])] * len(distances)
            lines.append(line([run.name], "whole past", distances, losses))
    lines = [one for one in lines if len(one["x"]) > 1]
    return {"lines": lines} if lines else {"skipped": "no checkpoint reads targets from several distances"}


def by_position(amounts, weights, t):
    """Means over documents and neighbours among the positions t (S,) that have a weight: at most BUCKETS mean
    positions, and their means."""
    a, w = amounts.float().sum(0), weights.float().sum(0)
    groups = [group for group in (w > 0).nonzero().flatten().tensor_split(BUCKETS) if len(group)]
    return ([float(t[group].float().mean()) for group in groups],
            [float(a[group].sum() / w[group].sum()) for group in groups])


def position(trained, measured, targets, t):
    """Loss, nats per target, by position in the document. measured: of each run what Trained.measure returns.

    targets (P,): the positions of rnn_loss, all that have a target. t (S,): those of teacher_loss.
    """
    lines = []
    for run, found in zip(trained, measured):
        lines.append(line([run.name], own_part(run), *by_position(*found["rnn_loss"], targets)))
        if "teacher_loss" in found:
            lines.append(line([run.name], "encoder-decoder", *by_position(*found["teacher_loss"], t)))
    several = any(len(one["x"]) > 1 for one in lines)
    return {"lines": lines} if several else {"skipped": "there are no targets at two positions"}


def drift(trained, measured, t):
    """MSE(m_hat_t, m_t) over the variance of m_t between documents, at those of t (S,) where they differ."""
    lines = []
    for run, found in zip(trained, measured):
        if "drift" in found:
            error, variance = (part.sum(0) for part in found["drift"])
            differ = variance > SAME * len(found["drift"][1])
            lines.append(line([run.name], "RNN", t[differ], error[differ] / variance[differ]))
    lines = [one for one in lines if one["x"]]
    return {"lines": lines} if lines else {"skipped": "no encoder tells these documents apart"}


def longer_documents(meta, multiple, count):
    """x, y (count, n): documents of a task with `multiple` times the length, or the keys, of the longest one
    in training. UsageError where there are none.
    """
    options = tasks.OPTIONS[meta["name"]] | meta.get("options", {})
    if "length" in options:
        options["length"] = (multiple * options["length"][1],) * 2
    else:
        options["keys"] *= multiple

    def generate(n_tokens):
        return tasks.TASKS[meta["name"]](philox(0, multiple, "held out"), n_tokens, **options)[:2]
    n = len(generate(1)[0])                             # of one document
    x, y = (torch.from_numpy(part).long().view(count, n) for part in generate(count * n))
    return x, y.masked_fill(y == tasks.NO_TARGET, IGNORE)


def longer_rows(data, T, multiple):
    """x, y (LENGTH_DOCS, multiple T): rows of held-out text with targets in the last T / 4 tokens alone.

    The targets are the same for each multiple: only the text before differs. UsageError where it is short.
    """
    last = len(data.val.tokens) - 1
    if multiple * T > last:
        raise UsageError(f"the held-out text has {last + 1} tokens, fewer than {multiple} x {T}")
    longest = max(m for m in MULTIPLES if m * T <= last)
    ends = torch.from_numpy(philox(0, 0, "held out").integers(longest * T, last + 1, size=LENGTH_DOCS))
    x, y = datasets.document_rows(data.val, data.meta, ends - multiple * T, multiple * T, cut=False)
    y[:, :-max(1, T // 4)] = IGNORE
    return x, y


def length(trained, data):
    """Accuracy on longer documents of a task; of text the loss at the end of longer rows. With errors."""
    if data.meta["kind"] == "image":
        return {"skipped": "pictures have one length"}
    what, lines = "accuracy" if data.meta["kind"] == "synthetic" else "loss", []
    for run in trained:
        T, found = run.checkpoint["config"]["seq_len"], {}
        for multiple in MULTIPLES:
            try:
                x, y = longer_documents(data.meta, multiple, LENGTH_DOCS) if what == "accuracy" \
                    else longer_rows(data, T, multiple)
            except UsageError:
                break
            x, y = x.to(run.initial_memory.device), y.to(run.initial_memory.device)
            t = targets_of(y, 16)
            measured = run.measure(x, y, t, rows=LENGTH_DOCS)
            for name, part in (("rnn", own_part(run)), ("teacher", "encoder-decoder")):
                if pair := measured.get(f"{name}_{what}"):
                    found.setdefault(part, []).append((x.shape[1], ratio(*pair), standard_error(*pair)))
        for part, points in found.items():
            n, y, error = zip(*points)
            lines.append(line([run.name], part, n, y, error=list(error)))
    several = any(len(one["x"]) > 1 for one in lines)
    return {"what": what, "lines": lines} if several else {"skipped": "there are no longer documents"}


def gradients_through_time(updater, readout, start, x, y):
    """Norms of dL/dm_t, L = CE(g(m_{T-1}), y), at the last GRADIENT_STEPS of the T tokens; means over B.

    start (B, K, d): the memory before x (B, T). y (B,): the target of the last token.
    """
    head, tail = x[:, :-GRADIENT_STEPS], x[:, -GRADIENT_STEPS:]
    with torch.no_grad():
        memory = roll_out(updater, start, head)[:, -1] if head.shape[1] else start
        memory = updater(memory, tail[:, 0])
    memories = [memory.requires_grad_()]
    for token in tail[:, 1:].unbind(1):
        memories.append(updater(memories[-1], token))
    loss = F.cross_entropy(readout(memories[-1]).float(), y, reduction="sum")   # each row's own
    return torch.stack([g.flatten(1).norm(dim=1).mean() for g in torch.autograd.grad(loss, memories)])


def gradients_of_one_step(encoder, updater, x, t):
    """Norms (S,) of dL_t/dm_{t-1}, L_t = MSE(f(m_{t-1}, x_t), m_t), at t (S,) of x (B, T); means over B."""
    with torch.no_grad():
        before, after = encoder(x, torch.cat([t - 1, t])).split(len(t), dim=1)
    before = before.flatten(0, 1).requires_grad_()
    error = updater(before, x[:, t].flatten()) - after.flatten(0, 1)
    (gradient,) = torch.autograd.grad(error.square().mean((-2, -1)).sum(), before)
    return gradient.flatten(1).norm(dim=1).view(len(x), -1).mean(0)


def gradients(trained, x, y, seed):
    """Norms of gradients with respect to the memory, against t: means over documents of the same length.

    through time: of the loss at that target, back through the RNN's steps: what BPTT learns from.
    at initialisation: the same with fresh weights.
    one step: SMT's, of the squared error at t with respect to m_{t-1}. Another loss: compare slopes only.
    """
    valid, runs = (y != IGNORE).any(1), [run for run in trained if run.baseline is None]
    if not valid.any() or not runs:
        return {"skipped": "no document has a target" if runs else "no checkpoint is an RNN"}
    x, y = x[valid], y[valid]
    last = (y != IGNORE).cumsum(1).argmax(1)            # the last target of each document
    end = int(last.mode().values)
    rows = (last == end).nonzero().flatten()[:GRADIENT_DOCS]
    x, y = x[rows, :end + 1], y[rows, end]
    t, lines = torch.arange(end + 1, device=x.device)[-GRADIENT_STEPS:], []
    for run in runs:
        with torch.random.fork_rng([]):                 # of the same sizes: the same weights, and one line
            torch.manual_seed(seed % 2**63)
            fresh = build(run.config, run.checkpoint["data"]["vocab_size"], ("updater", "readout"))
            fresh.to(x.device)
            begin = normalise(torch.randn(run.initial_memory.shape)).to(x.device)
        for part, networks, start in (("through time", run.networks, run.initial_memory),
                                      ("at initialisation", fresh, begin)):
            norms = gradients_through_time(networks["updater"], networks["readout"],
                                           start.expand(len(x), -1, -1), x, y)
            lines.append(line([run.name], part, t, norms))
        if "encoder" in run.networks:
            few = spread(t, BUCKETS)
            norms = gradients_of_one_step(run.networks["encoder"], run.networks["updater"], x, few)
            lines.append(line([run.name], "one step", few, norms))
    return {"lines": lines}


def remembered(name, x, y, vocab_size):
    """What a memory should hold after each token of x, y (N, L): symbols (N, L), -1: none, and what they are.

    retrieval: the needle, once read. copy: the last symbol read, then the next target. stack: its top.
    Elsewhere: the position.
    """
    marker, t = vocab_size - 1, torch.arange(x.shape[1]).expand(x.shape)
    if name == "retrieval":
        at = (x == marker).int().argmax(1, keepdim=True)
        return torch.where(t > at, x.gather(1, (at + 1).clamp(max=x.shape[1] - 1)), -1), "needle"
    if name == "copy":
        return torch.where((x == marker).int().cumsum(1) > 0, y, x), "last symbol read, or next target"
    if name != "stack":
        return t, "position"
    top = torch.full_like(x, -1)
    for row, tokens in enumerate(x.tolist()):
        stack = []
        for i, token in enumerate(tokens):
            if token == marker:
                stack.pop()
            elif token < marker:
                stack.append(token)
            top[row, i] = stack[-1] if stack else -1
    return top, "top of the stack"


def principal_directions(points):
    """Mean (D,), the two directions (2, D) in which points (P, D) vary most, their shares of the variance."""
    mean = points.mean(0)
    _, size, directions = torch.linalg.svd(points - mean, full_matrices=False)
    return mean, directions[:2], (size.square() / size.square().sum().clamp(min=1e-12))[:2]


@torch.no_grad()
def memory(trained, x, y, meta):
    """The RNN's memories of documents in the plane of their two main directions, and paths of a few."""
    runs = [run for run in trained if run.baseline is None][:6]         # panels enough
    if not runs or x.shape[1] < 2:
        return {"skipped": "no checkpoint is an RNN"}
    x, y = x[:MEMORY_DOCS], y[:MEMORY_DOCS]
    per_document = max(2, MEMORY_POINTS // max(3, len(runs)) // len(x))
    t = spread(torch.arange(x.shape[1]), per_document)
    symbols, what = remembered(meta["name"], x.cpu(), y.cpu(), meta["vocab_size"])
    real, panels = (x.cpu() != meta["vocab_size"])[:, t], []
    for run in runs:
        start = run.initial_memory.expand(len(x), 1, -1, -1)
        memories = torch.cat([start, roll_out(run.networks["updater"], start[:, 0], x)], dim=1)
        memories = memories.flatten(2).float().cpu()                    # (N, L + 1, K d), m_empty first
        mean, directions, shares = principal_directions(memories[:, t + 1][real])
        plane = ((memories - mean) @ directions.T).round(decimals=3)
        steps = 1 + (x[:PATHS, :PATH_STEPS] != meta["vocab_size"]).sum(1)
        panels.append(dict(run=run.name, points=plane[:, t + 1][real].tolist(), shares=shares.tolist(),
                           held=symbols[:, t][real].tolist(),
                           paths=[plane[i, :n].tolist() for i, n in enumerate(steps.tolist())]))
    return {"what": what, "panels": panels}


def cost(trained, vocab_size, seed):
    """Milliseconds of the RNN and bytes of state for a generated token, after POSITIONS random tokens.

    Milliseconds are the median of TIMED tokens. A Transformer's bytes, in float32, are the keys and values of
    the last context_len tokens, which are all that it attends to. Where no checkpoint is a Transformer, those
    of all tokens before, for one with the width and the layers of the first RNN.
    """
    rnns, ms, state_bytes = [run for run in trained if run.baseline is None], [], []
    if not rnns:
        return {"skipped": "no checkpoint is an RNN"}
    x = torch.randint(vocab_size, (1, POSITIONS[-1]), generator=torch.Generator().manual_seed(seed % 2**63))
    for run in rnns:
        state, begin, times = run.initial_memory[None], 0, []
        for n in POSITIONS:
            state, begin = sample.read(run.networks, state, x[:, begin:n].to(state.device)), n
            tokens, clock = sample.generate(run.networks, state, 1.0, 0, sample.seeded(0, 1)), []
            for _ in range(TIMED + 1):
                next(tokens).cpu()                      # waits for the device
                clock.append(time.perf_counter())
            times.append(1000 * median(b - a for a, b in zip(clock, clock[1:])))
        ms.append(line([run.name], "RNN", POSITIONS, times))
        state_bytes.append(line([run.name], "RNN", POSITIONS, [state.nbytes] * len(POSITIONS)))
    config = rnns[0].config
    sizes = [([run.name], own_part(run), run.config.layers, run.config.d_model, run.config.context_len)
             for run in trained if own_part(run) == "Transformer"]
    sizes = sizes or [([], "Transformer of as many layers", config.updater_layers + config.decoder_layers,
                       config.d_model, math.inf)]
    for names, part, layers, d, most in sizes:
        cached = [2 * 4 * layers * d * min(n, most) for n in POSITIONS]
        state_bytes.append(line(names, part, POSITIONS, cached))
    for run in (run for run in trained if own_part(run) == "LSTM"):
        state_bytes.append(line([run.name], "LSTM", POSITIONS, [2 * 4 * run.config.hidden] * len(POSITIONS)))
    return {"ms": ms, "bytes": state_bytes}


def compute(trained):
    """Held-out loss against what was spent; a run begins where the run ended that it started from.

    Why a run is left out is printed to stderr.
    """
    found = {}
    for run in trained:
        log = [one for one in runtime.read_log(run.folder / "metrics.jsonl")
               if "val_rnn_loss" in one and one["step"] <= run.checkpoint["step"]]
        try:
            if not log:
                raise DataError(f"there is no evaluation in {run.folder / 'metrics.jsonl'}")
            *sources, _ = lineage(run.folder)
            flops = spent(run.folder)
        except DataError as error:
            print(f"compute.png: without {run.name}, {error}", file=sys.stderr)
            continue
        for key in ("tokens", "sequential_flops", "seconds"):
            before = sum(checkpoint["spent"].get(key, 0) for _, checkpoint in sources)
            points = [(before + one[key] if key in one else flops[one["step"]], one["val_rnn_loss"])
                      for one in log if sources or one["step"]]         # a log axis has no 0
            if points:
                found.setdefault(key, []).append(line([run.name], own_part(run), *zip(*points)))
    return found or {"skipped": "of no checkpoint it is known what was spent on it"}


# ------------------------------------------------------------------------------------------------------------
# How they are drawn

COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f"   # for the colour-blind
DASHES = {"encoder-decoder": "--", "whole past": ":", "one step": "--", "at initialisation": ":"}
NATS = "loss, nats per target"
CURVES = {      # figures of one panel: title, labels of the axes, scale of the y axis
    "held": ("what a memory still holds n tokens later", "n: tokens from memory to target", NATS, "linear"),
    "position": ("loss by position in the document", "position t of the target, tokens", NATS, "linear"),
    "drift": ("drift of the rolled-out memory", "position t, tokens", "squared error / variance", "log"),
    "length": ("1, 2, 4, 8 times the trained length", "length, tokens; a line begins at the trained one", "",
               "linear"),
    "gradients": ("gradient with respect to the memory", "position t, tokens; the loss is at the last one",
                  "norm of the gradient", "log")}


def canvas(title, panels=1, width=6.4, height=4.6, lines=1):
    """An empty figure and its panels."""
    from matplotlib.figure import Figure
    picture = Figure(figsize=(width, height), dpi=100 if lines == 1 else 70, layout="constrained")
    picture.suptitle(title, fontsize=11)
    axes = picture.subplots(lines, -(-panels // lines), squeeze=False).flatten()
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return picture, axes


def draw_lines(axis, lines, colours, xlabel, ylabel, **scales):
    """Lines on a panel: a colour for each run, a dash for each part. What runs share is one black line."""
    same = {}
    for one in lines:
        key = one["part"], *one["x"], *one["y"]
        same[key] = one | {"runs": same.get(key, {"runs": []})["runs"] + one["runs"]}
    for one in same.values():
        colour = colours[one["runs"][0]] if len(one["runs"]) == 1 else "black" if one["runs"] else "grey"
        style = dict(color=colour, linestyle=DASHES.get(one["part"], "-"), linewidth=1.5,
                     label=": ".join(filter(None, (", ".join(one["runs"]), one["part"]))),
                     marker="o" if len(one["x"]) <= 12 else None, markersize=4)
        y = np.array(one["y"], float)                   # None becomes NaN: a gap
        if "error" in one:
            axis.errorbar(one["x"], y, [error or 0 for error in one["error"]], capsize=2, **style)
        else:
            axis.plot(one["x"], y, **style)
    axis.set(xlabel=xlabel, ylabel=ylabel, **scales)


def few_ticks(axis, formatter="{x:g}"):
    """Ticks at 1, 2, 5, 10, .. of a log axis that spans two decades at most, else at 1, 10, .."""
    from matplotlib.ticker import LogLocator, NullFormatter
    low, high = axis.get_view_interval()
    locator = LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,))
    axis.set(major_locator=locator, major_formatter=formatter, minor_formatter=NullFormatter())


def legend(picture, axes, columns=2):
    """The lines of all panels, named once below the figure, in as many columns as its width has room for."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    room = round(15 * picture.get_figwidth())                                   # 15 characters an inch
    columns = max(1, min(columns, room // (6 + max(map(len, handles), default=0))))
    labels = [textwrap.fill(label, room - 6) for label in handles]
    picture.legend(handles.values(), labels, loc="outside lower center", ncols=columns, fontsize=8,
                   frameon=False)


def draw_curves(name, series, colours, meta):
    """A figure of CURVES."""
    title, xlabel, ylabel, yscale = CURVES[name]
    picture, (axis,) = canvas(f"{meta['name']}: {title}")
    ylabel = ylabel or {"accuracy": "accuracy", "loss": f"{NATS}, at the end"}[series["what"]]
    draw_lines(axis, series["lines"], colours, xlabel, ylabel, yscale=yscale)
    if name in ("held", "length"):
        axis.set_xscale("symlog", base=2, linthresh=1)
        ticks = sorted({n for one in series["lines"] for n in one["x"]})
        axis.set_xticks(ticks, [f"{n:.0f}" for n in ticks])
        axis.minorticks_off()
    if yscale == "linear":
        axis.set_ylim(0, 1.03 if series.get("what") == "accuracy" else None)
    else:
        few_ticks(axis.yaxis)
    if name == "drift":
        axis.axhline(1, color="grey", linewidth=0.8, label="no better than the mean memory")
    legend(picture, [axis])
    return picture


def draw_memory(_, series, colours, meta):
    """A panel for each run, points coloured by what should be held, paths as arrows."""
    from matplotlib import colormaps
    panels = series["panels"]
    lines, columns = -(-len(panels) // 3), min(len(panels), 3)
    title = f"{meta['name']}: memories of the RNN\narrows: the first tokens of {PATHS} documents"
    picture, axes = canvas(title, len(panels), 1.8 + 3.3 * columns, 0.3 + 3.3 * lines, lines)
    most = max(max(panel["held"]) for panel in panels)
    discrete = series["what"] != "position" and most < 10
    colour = dict(cmap="viridis", vmin=0, vmax=max(1, most))
    if discrete:
        colour = dict(cmap=colormaps["tab10"].resampled(10), vmin=-0.5, vmax=9.5)
    for axis, panel in zip(axes, panels):
        points, held = np.array(panel["points"]), np.array(panel["held"])
        axis.scatter(*points[held < 0].T, s=5, color="lightgrey", linewidths=0)
        shown = axis.scatter(*points[held >= 0].T, s=8, c=held[held >= 0], linewidths=0, **colour)
        for path in map(np.array, panel["paths"]):
            axis.quiver(*path[:-1].T, *np.diff(path, axis=0).T, angles="xy", scale_units="xy", scale=1,
                        width=0.004, color="black", alpha=0.6)
        first, second = panel["shares"]
        axis.set(xlabel=f"first direction, {first:.0%} of the variance", ylabel=f"second, {second:.0%}")
        axis.set_title(panel["run"], fontsize=9, color=colours.get(panel["run"], "black"))
    for axis in axes[len(panels):]:
        axis.set_visible(False)
    bar = picture.colorbar(shown, ax=axes, label=series["what"], shrink=0.8)
    if discrete:
        bar.ax.set_ylim(-0.5, most + 0.5)
        letters = [tasks.to_text(meta["name"], [symbol], meta) for symbol in range(most + 1)]
        bar.ax.set_yticks(range(most + 1), letters)
    return picture


def draw_cost(_, series, colours, meta):
    """Time and bytes against what was read before."""
    picture, axes = canvas(f"{meta['name']}: what a generated token costs", 2, width=9)
    for axis, (key, ylabel) in zip(axes, {"ms": "time per token, ms", "bytes": "state, bytes"}.items()):
        draw_lines(axis, series[key], colours, "tokens before it", ylabel, xscale="log", yscale="log")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low / 2, high * 2)                 # so that noise does not fill the panel
    few_ticks(axes[0].yaxis)
    legend(picture, axes)
    return picture


def draw_compute(_, series, colours, meta):
    """Held-out loss against tokens, sequential FLOPs and seconds."""
    from matplotlib.ticker import EngFormatter
    labels = {"tokens": "tokens trained on", "sequential_flops": "sequential FLOPs",
              "seconds": "seconds of training"}
    picture, axes = canvas(f"{meta['name']}: held-out loss during training", 3, width=11)
    for axis, (key, xlabel) in zip(axes, labels.items()):
        draw_lines(axis, series[key], colours, xlabel, f"held-out {NATS}", xscale="log", yscale="log")
        few_ticks(axis.xaxis, EngFormatter(sep=""))
        few_ticks(axis.yaxis)
        if "statistics" in meta:
            floor = meta["statistics"]["entropy_per_character"]
            axis.axhline(floor, color="grey", linewidth=0.8, label="entropy: no model is better")
    legend(picture, axes, columns=3)
    return picture


DRAW = dict.fromkeys(CURVES, draw_curves) | dict(memory=draw_memory, cost=draw_cost, compute=draw_compute)


def draw_all(series, names, meta, folder):
    """Write <figure>.png of each figure's data into a folder; the runs `names` keep their colours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {folder}: {error.strerror}") from None
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for name, draw in DRAW.items():
        path = folder / f"{name}.png"
        if "skipped" in series[name]:
            print(f"{path}: not drawn, {series[name]['skipped']}")
            continue
        picture = draw(name, series[name], colours, meta)
        write_atomically(path, lambda temporary: picture.savefig(temporary, format="png"))      # noqa: B023
        print(path)
