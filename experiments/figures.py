"""The figures of evaluate.py: for each, a function that measures it, as plain data (which --json writes), and one that draws that data.

    python evaluate.py --ckpt=runs/retrieval-smt,runs/retrieval-dmt,runs/retrieval-bptt --figures=runs/figures

    held.png         loss against n, read by the decoder from the memory of n tokens earlier and the tokens since
    position.png     loss by position in the document, of the RNN and of encoder and decoder
    drift.png        squared error of the rolled-out memory over the variance of the encoder's, at each t
    length.png       documents of 1, 2, 4 and 8 times the trained length
    gradients.png    norm of the loss's gradient with respect to the memory, t by t: through time, and in one step
    memory.png       the RNN's memories, projected on their two main directions
    cost.png         time and bytes of state for a generated token, at positions 100, 1000 and 10,000
    compute.png      held-out loss during training, against tokens, sequential FLOPs and seconds

A line is a dict: the runs it is about, what of them (part), and its points x, y; a figure that makes no sense for the checkpoints
at hand is {"skipped": why}. `trained` are evaluate.Trained, all of one data set.
"""
import dataclasses
import math
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

import data as datasets
import runtime
import sample
import tasks
from data import IGNORE
from evaluate import PLACES, measure, measure_held, ratio, spread, standard_error
from model import build, normalise, roll_out, roll_out_without_gradients
from runtime import UsageError

BUCKETS = 32                                  # groups of neighbouring positions in position.png, at most
HELD_DOCS = 32                                # documents of held.png
LENGTHS, LENGTH_DOCS = (1, 2, 4, 8), 64       # of length.png: multiples of the trained length; documents of each
GRADIENT_DOCS, GRADIENT_STEPS = 16, 256       # of gradients.png: documents; last steps that the gradient goes back through
MEMORY_DOCS, MEMORY_POINTS, PATHS, PATH_STEPS = 64, 1800, 3, 16     # of memory.png: documents, points, documents with arrows, arrows each
POSITIONS, TIMED, CHUNK = (100, 1000, 10_000), 30, 500    # of cost.png: tokens before, tokens timed, tokens read at once into a cache


def line(runs, part, x, y, **more):
    """A line of a figure, as plain numbers; None where a y is not finite."""
    return dict(runs=list(runs), part=part, x=[float(a) for a in x], y=[float(a) if math.isfinite(a) else None for a in y], **more)


def rnn_groups(trained):
    """The RNNs, those of the same sizes together: lists of runs."""
    groups = {}
    for run in (run for run in trained if "updater" in run.networks):
        c = run.config
        groups.setdefault((c.updater, c.d_model, c.n_heads, c.memory_tokens, c.updater_layers, c.decoder_layers), []).append(run)
    return list(groups.values())


def own_part(run):
    """What the network that is judged is called."""
    return "RNN" if "updater" in run.networks else "Transformer"


def measure_all(trained, data, x, y, seed):
    """What all figures show, {figure: its data}; x, y (N, L) held-out documents on the networks' device."""
    real = x != data.pad
    end = int((real.sum(0) >= max(1, len(x) // 10)).sum())          # further on there are too few documents for a mean
    t = spread(torch.arange(end, device=x.device), 2 * BUCKETS)
    measured = [measure(run.networks, run.initial_memory, x[:, :end], y[:, :end], t) for run in trained]
    asked = (y[:, :end] != IGNORE).any(0).nonzero().flatten()
    return {"held": held(trained, x[:HELD_DOCS, :end], y[:HELD_DOCS, :end]), "position": position(trained, measured, asked, t), "drift": drift(trained, measured, t), "length": length(trained, data),
            "gradients": gradients(trained, x, y, seed), "memory": memory(trained, x, y, data.meta),
            "cost": cost(trained, data.vocab_size, seed), "compute": compute(trained)}


# ---------------------------------------------------------------------------------------------------------------------
# What they show

def by_position(amounts, weights, t):
    """Means over the documents, and over neighbours of the places t (S,) that have a weight: their mean places and values, <= BUCKETS."""
    a, w = amounts.float().sum(0), weights.float().sum(0)
    groups = [group for group in (w > 0).nonzero().flatten().tensor_split(BUCKETS) if len(group)]
    return [float(t[group].float().mean()) for group in groups], [float(a[group].sum() / w[group].sum()) for group in groups]


def position(trained, measured, asked, t):
    """Loss, nats, by position: of RNN or Transformer at all places asked (P,), of encoder and decoder at those of them among t (S,)."""
    lines = []
    for run, found in zip(trained, measured):
        lines.append(line([run.name], own_part(run), *by_position(*found["rnn_loss"], asked)))
        if "teacher_loss" in found:
            lines.append(line([run.name], "encoder-decoder", *by_position(*found["teacher_loss"], t)))
    return {"lines": lines} if any(len(one["x"]) > 1 for one in lines) else {"skipped": "there are no targets at two positions"}


@torch.no_grad()
def held(trained, x, y):
    """Loss against the distance n = 0, 1, 2, 4, .. of a memory from the target: of the encoder's memories and of the RNN's, and what the
    trunk reads from the whole past, at the same targets of documents x, y (N, L)."""
    asked, lines = (y != IGNORE).any(0).nonzero().flatten(), []
    for run in (run for run in trained if "encoder" in run.networks and len(asked)):
        most = min(run.config.future_len - 1, int(asked[-1]) + 1)
        distances = [0] + [2 ** i for i in range(most.bit_length())]
        t = spread(asked[asked >= distances[-1] - 1], PLACES)
        rolled = roll_out_without_gradients(run.networks["updater"], run.initial_memory.expand(len(x), -1, -1), x)
        rolled = torch.cat([run.initial_memory.expand(len(x), 1, -1, -1), rolled], dim=1)           # m_{-1} first
        for part, memories in (("encoder-decoder", None), ("RNN", lambda t: rolled[:, t + 1])):
            found = measure_held(run.networks, x, y, t, distances, memories)
            lines.append(line([run.name], part, distances, [ratio(*found[f"held_{n}"]) for n in distances]))
        if "held_full" in found:
            lines.append(line([run.name], "whole past", distances, [ratio(*found["held_full"])] * len(distances)))
    lines = [one for one in lines if len(one["x"]) > 1]
    return {"lines": lines} if lines else {"skipped": "no checkpoint has a decoder of more than one target"}


def drift(trained, measured, t):
    """MSE(m_hat_t, m_t) over the variance of m_t between the documents, at each of t (S,) where the documents differ at all."""
    lines = []
    for run, found in zip(trained, measured):
        if "drift" in found:
            error, variance = (part.sum(0) for part in found["drift"])
            differ = variance > 1e-6 * len(found["drift"][1])       # of memories of unit mean square
            lines.append(line([run.name], "RNN", t[differ], error[differ] / variance[differ]))
    lines = [one for one in lines if one["x"]]
    return {"lines": lines} if lines else {"skipped": "no checkpoint has an encoder that tells these documents apart"}


def longer_documents(meta, multiple, count):
    """x, y (count, n): held-out documents of a synthetic task, `multiple` times as long as the longest trained on.

    Only what makes a document long changes: length, or the number of keys. UsageError where there are no such documents.
    """
    options = tasks.OPTIONS[meta["name"]] | meta.get("options", {})
    if "length" in options:
        options["length"] = (multiple * options["length"][1],) * 2
    else:
        options["keys"] *= multiple

    def generate(n_tokens):
        return tasks.TASKS[meta["name"]](datasets.philox(0, multiple, "held out"), n_tokens, **options)[:2]
    n = len(generate(1)[0])                                         # of one document
    x, y = (torch.from_numpy(part).long().view(count, n) for part in generate(count * n))
    return x, y.masked_fill(y == tasks.NOTHING, IGNORE)


def longer_rows(data, T, multiple):
    """x, y (LENGTH_DOCS, multiple T): rows of held-out text of which the last T / 4 targets are asked, the same for each multiple.

    So the rows differ in how much was read before only. UsageError where there is too little text.
    """
    last = len(data.val.tokens) - 1
    if multiple * T > last:
        raise UsageError(f"the held-out text has {last + 1} tokens, fewer than {multiple} x {T}")
    longest = max(m for m in LENGTHS if m * T <= last)
    ends = torch.from_numpy(datasets.philox(0, 0, "held out").integers(longest * T, last + 1, size=LENGTH_DOCS))
    x, y = datasets.document_rows(data.val, data.meta, ends - multiple * T, multiple * T, cut=False)
    y[:, :-max(1, T // 4)] = IGNORE
    return x, y


def length(trained, data):
    """Accuracy on longer documents of a synthetic task; of text, the loss in the last part of longer rows. With standard errors."""
    if data.kind == "image":
        return {"skipped": "pictures have one length"}
    what, lines = "accuracy" if data.kind == "synthetic" else "loss", []
    for run in trained:
        T, device, found = run.settings.get("seq_len") or run.config.context_len, run.initial_memory.device, {}
        for multiple in LENGTHS:
            try:
                x, y = longer_documents(run.meta, multiple, LENGTH_DOCS) if data.kind == "synthetic" else longer_rows(data, T, multiple)
            except UsageError:
                break
            places = (y != IGNORE).any(0).nonzero().flatten()
            x, y, t = x.to(device), y.to(device), spread(places, 16).to(device)
            measured = measure(run.networks, run.initial_memory, x, y, t, rows=LENGTH_DOCS)
            for name, part in (("rnn", own_part(run)), ("teacher", "encoder-decoder")):
                if f"{name}_{what}" in measured:
                    pair = measured[f"{name}_{what}"]
                    found.setdefault(part, []).append((x.shape[1], ratio(*pair), standard_error(*pair)))
        for part, points in found.items():
            n, y, error = zip(*points)
            lines.append(line([run.name], part, n, y, error=list(error)))
    return {"what": what, "lines": lines} if any(len(one["x"]) > 1 for one in lines) else {"skipped": "there are no longer documents"}


def gradients_through_time(updater, readout, start, x, y):
    """Norm of dL/dm_t (GRADIENT_STEPS,) or (T,) for the last of the T tokens of x (B, T), L = CE(g(m_{T-1}), y), y (B,); mean over B.

    start (B, K, d): the memory before x.
    """
    head, tail = x[:, :-GRADIENT_STEPS], x[:, -GRADIENT_STEPS:]
    with torch.no_grad():
        memory = roll_out(updater, start, head)[:, -1] if head.shape[1] else start
        memory = updater(memory, tail[:, 0])
    memories = [memory.requires_grad_()]
    for token in tail[:, 1:].unbind(1):
        memories.append(updater(memories[-1], token))
    loss = F.cross_entropy(readout(memories[-1]).float(), y, reduction="sum")       # of each document to its own memories
    return torch.stack([g.flatten(1).norm(dim=1).mean() for g in torch.autograd.grad(loss, memories)])


def gradients_of_one_step(encoder, updater, x, t):
    """Norm of dL_t/dm_{t-1} (S,), L_t = MSE(f(m_{t-1}, x_t), m_t) with the encoder's m of x (B, T), at t (S,); mean over B."""
    with torch.no_grad():
        before, after = encoder(x, torch.cat([t - 1, t])).split(len(t), dim=1)
    before = before.flatten(0, 1).requires_grad_()
    error = updater(before, x[:, t].flatten()) - after.flatten(0, 1)
    (gradient,) = torch.autograd.grad(error.square().mean((-2, -1)).sum(), before)
    return gradient.flatten(1).norm(dim=1).view(len(x), -1).mean(0)


def gradients(trained, x, y, seed):
    """Norms of gradients with respect to the memory, against t, the mean over documents that have their last target at the same place.

    through time: of the loss at that target, through all steps of the RNN between (at most GRADIENT_STEPS): what BPTT learns from.
    at initialisation: the same with fresh weights; an updater that begins as the identity (all but the GRU) loses little.
    one step: SMT's, of the squared error at t alone with respect to the m_{t-1} it starts from. Another loss: compare slopes only.
    """
    asked = (y != IGNORE).any(1)
    if not asked.any() or not rnn_groups(trained):
        return {"skipped": "nothing is asked in these documents" if rnn_groups(trained) else "no checkpoint is an RNN"}
    x, y = x[asked], y[asked]
    last = (y != IGNORE).cumsum(1).argmax(1)
    rows, end = (last == last.mode().values).nonzero().flatten()[:GRADIENT_DOCS], int(last.mode().values)
    x, y = x[rows, :end + 1], y[rows, end]
    t = torch.arange(end + 1, device=x.device)[-GRADIENT_STEPS:]
    lines = []
    for group in rnn_groups(trained):
        for run in group:
            net, start = run.networks, run.initial_memory.expand(len(x), -1, -1)
            lines.append(line([run.name], "through time", t, gradients_through_time(net["updater"], net["readout"], start, x, y)))
            if "encoder" in net:
                some = spread(t, BUCKETS)
                lines.append(line([run.name], "one step", some, gradients_of_one_step(net["encoder"], net["updater"], x, some)))
        with torch.random.fork_rng([]):
            torch.manual_seed(seed % 2**63)
            fresh = build(run.config, run.meta["vocab_size"], ("updater", "readout")).to(x.device)
            start = normalise(torch.randn(1, *run.initial_memory.shape)).to(x.device).expand(len(x), -1, -1)
        lines.append(line([run.name for run in group], "at initialisation", t,
                          gradients_through_time(fresh["updater"], fresh["readout"], start, x, y)))
    return {"lines": lines}


def remembered(name, x, y, vocab_size):
    """What a memory should hold after each token of x, y (N, L), and what that is called: a symbol (N, L), -1: none; else the position.

    retrieval: the needle, once it was read. copy: the last symbol read, then the next to say. stack: the symbol on top.
    """
    marker, place = vocab_size - 1, torch.arange(x.shape[1]).expand(x.shape)
    if name == "retrieval":
        at = (x == marker).int().argmax(1, keepdim=True)
        return torch.where(place > at, x.gather(1, (at + 1).clamp(max=x.shape[1] - 1)), -1), "needle"
    if name == "copy":
        return torch.where((x == marker).int().cumsum(1) > 0, y, x), "last symbol read, or next to say"
    if name != "stack":
        return place, "position"
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
    """Mean (D,), the two directions (2, D) in which points (P, D) vary most, and their shares of the variance (2,)."""
    mean = points.mean(0)
    _, size, directions = torch.linalg.svd(points - mean, full_matrices=False)
    return mean, directions[:2], (size.square() / size.square().sum().clamp(min=1e-12))[:2]


@torch.no_grad()
def memory(trained, x, y, meta):
    """The RNN's memories m_hat_t of held-out documents in the plane of their two main directions, and paths of a few documents there."""
    runs = [run for run in trained if "updater" in run.networks][:6]        # panels enough
    if not runs or x.shape[1] < 2:
        return {"skipped": "no checkpoint is an RNN"}
    x, y = x[:MEMORY_DOCS], y[:MEMORY_DOCS]
    t = spread(torch.arange(x.shape[1], device=x.device), max(2, MEMORY_POINTS // max(3, len(runs)) // len(x)))
    held, what = remembered(meta["name"], x.cpu(), y.cpu(), meta["vocab_size"])
    real = (x[:, t] != meta["vocab_size"]).cpu()
    panels = []
    for run in runs:
        start = run.initial_memory.expand(len(x), 1, -1, -1)
        memories = torch.cat([start, roll_out(run.networks["updater"], start[:, 0], x)], dim=1).flatten(2).float().cpu()
        points = memories[:, t.cpu() + 1][real]                     # (P, K d); m_empty is at place 0
        mean, directions, shares = principal_directions(points)
        steps = 1 + (x[:PATHS, :PATH_STEPS] != meta["vocab_size"]).sum(1)
        paths = [((memories[i, :n] - mean) @ directions.T).round(decimals=3).tolist() for i, n in enumerate(steps.tolist())]
        points = ((points - mean) @ directions.T).round(decimals=3).tolist()
        panels.append(dict(run=run.name, points=points, held=held[:, t.cpu()][real].tolist(), paths=paths, shares=shares.tolist()))
    return {"what": what, "panels": panels}


def time_tokens(networks, state):
    """Milliseconds in which sample.py generates a token in one stream from a state: the median of TIMED."""
    seconds, tokens = [], sample.generate(networks, state, 1.0, 0, sample.seeded(0, 1))
    for _ in range(TIMED):
        begin = time.perf_counter()
        next(tokens).cpu()      # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 1000 * median(seconds)


@torch.inference_mode()
def fill_cache(decoder, x):
    """What a Transformer carries along after x (1, n), read in chunks: its last logits and its past."""
    state = None, None
    for chunk in x.split(CHUNK, dim=1):
        state = decoder.read(chunk, state[1])
    return state


def state_bytes(state):
    """Bytes of a memory (B, K, d), or of the keys and values that a Transformer carries along."""
    return state.nbytes if torch.is_tensor(state) else sum(k.nbytes + v.nbytes for k, v in state[1][2])


def cost(trained, vocab_size, seed):
    """Milliseconds and bytes of state per generated token after so many POSITIONS of random tokens.

    The RNN reads them one by one. The Transformer attends to all of them: its window is as long as the position. Where no
    checkpoint is one, it has random weights, and the width and the layers of the first RNN and its readout.
    """
    groups, device = rnn_groups(trained), trained[0].initial_memory.device
    x = torch.randint(vocab_size, (1, POSITIONS[-1]), generator=torch.Generator().manual_seed(seed % 2**63)).to(device)
    points = {}                                                     # (runs, part): a pair for each position
    for group in groups:
        run = group[0]
        state, begin = sample.begin(run.networks, run.initial_memory, 1), 0
        for n in POSITIONS:
            state, begin = sample.read(run.networks, state, x[:, begin:n]), n
            points.setdefault((*(run.name for run in group), "RNN"), []).append((time_tokens(run.networks, state), state_bytes(state)))
    transformers = [((run.name, own_part(run)), run.config, run.networks.state_dict()) for run in trained if own_part(run) != "RNN"]
    if not transformers:
        size = groups[0][0].config
        size = dataclasses.replace(size, decoder_layers=size.updater_layers + size.decoder_layers, conv_width=1)
        transformers = [(("Transformer of as many layers, random weights",), size, None)]
    for key, size, weights in transformers:
        for n in POSITIONS:
            with torch.random.fork_rng([]):
                torch.manual_seed(seed % 2**63)
                networks = build(dataclasses.replace(size, context_len=n), vocab_size, ("decoder",)).to(device)
            if weights:
                networks.load_state_dict(weights)
            state = fill_cache(networks["decoder"], x[:, :n])
            points.setdefault(key, []).append((time_tokens(networks, state), state_bytes(state)))
    return {name: [line(runs, part, POSITIONS, [pair[i] for pair in pairs]) for (*runs, part), pairs in points.items()]
            for i, name in enumerate(("ms", "bytes"))}


def log_lines(run):
    """The evaluations in the metrics.jsonl beside a checkpoint, up to the checkpoint's step."""
    return [line for line in runtime.read_log(run.folder / "metrics.jsonl") if "val_rnn_loss" in line and line["step"] <= run.step]


def spent_before(run, trained, key):
    """Tokens, FLOPs or seconds that the weights had cost when the run took them over, as far as the runs they come from are given."""
    source = run.settings.get("init_from") or (f"runs/{run.meta['name']}-smt" if run.stage == "dmt" else "")
    others = [other for other in trained if other is not run]
    for other in others if source else ():
        if Path(source).resolve() in (other.folder.resolve(), (other.folder / "ckpt.pt").resolve()) and log_lines(other):
            return log_lines(other)[-1][key] + spent_before(other, others, key)
    return 0


def compute(trained):
    """Held-out loss of the RNN against what was spent on it; a run that starts from another one that is given begins where that ended."""
    found = {}
    for key in ("tokens", "sequential_flops", "seconds"):
        for run in trained:
            before = spent_before(run, trained, key)
            points = [(before + one[key], one["val_rnn_loss"]) for one in log_lines(run) if before or one["step"]]    # a log axis has no 0
            if points:
                found.setdefault(key, []).append(line([run.name], own_part(run), *zip(*points)))
    return found or {"skipped": "there is no metrics.jsonl beside the checkpoints"}


# ---------------------------------------------------------------------------------------------------------------------
# How they are drawn

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")     # told apart by the colour-blind, too
DASHES = {"encoder-decoder": "--", "whole past": ":", "one step": "--", "at initialisation": ":"}


def canvas(title, panels=1, width=6.4, height=4.2, lines=1):
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
    """Lines on a panel: a colour for each run, black for what runs share; a dash for each part. Those that are the same are one."""
    same = {}
    for one in lines:
        key = one["part"], *one["x"], *one["y"]
        same[key] = one | {"runs": same.get(key, {"runs": []})["runs"] + one["runs"]}
    for one in same.values():
        colour = colours[one["runs"][0]] if len(one["runs"]) == 1 else "black" if one["runs"] else "grey"
        style = dict(color=colour, linestyle=DASHES.get(one["part"], "-"), linewidth=1.5,
                     label=": ".join(filter(None, (", ".join(one["runs"]), one["part"]))),
                     marker="o" if len(one["x"]) <= 12 else None, markersize=4)
        y = np.array(one["y"], float)                               # None becomes NaN: a gap
        if "error" in one:
            axis.errorbar(one["x"], y, [error or 0 for error in one["error"]], capsize=2, **style)
        else:
            axis.plot(one["x"], y, **style)
    axis.set(xlabel=xlabel, ylabel=ylabel, **scales)


def few_ticks(axis, formatter="{x:g}"):
    """Ticks at 1, 2, 5, 10, .. of a log axis, whether it spans a decade or many."""
    from matplotlib.ticker import LogLocator, NullFormatter
    axis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=formatter, minor_formatter=NullFormatter())


def legend(picture, axis, columns=2):
    """The panel's lines, named below the figure."""
    picture.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def draw_position(series, colours, meta):
    """Loss by position."""
    picture, (axis,) = canvas(f"{meta['name']}: loss by position in the document")
    draw_lines(axis, series["lines"], colours, "position t of the target, tokens", "loss, nats per target")
    axis.set_ylim(bottom=0)
    legend(picture, axis)
    return picture


def draw_held(series, colours, meta):
    """Loss against the distance of the memory."""
    picture, (axis,) = canvas(f"{meta['name']}: what a memory still holds n tokens later")
    draw_lines(axis, series["lines"], colours, "n: tokens between the memory and the target", "loss, nats per target")
    axis.set_xscale("symlog", base=2, linthresh=1)
    ticks = sorted({n for one in series["lines"] for n in one["x"]})
    axis.set_xticks(ticks, [f"{n:.0f}" for n in ticks])
    axis.set_ylim(bottom=0)
    legend(picture, axis)
    return picture


def draw_drift(series, colours, meta):
    """Relative drift, on a log axis: 1 is no better than the mean memory."""
    picture, (axis,) = canvas(f"{meta['name']}: drift of the rolled-out memory")
    draw_lines(axis, series["lines"], colours, "position t, tokens", "squared error / variance of $m_t$", yscale="log")
    few_ticks(axis.yaxis)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.annotate("no better than the mean memory", (1, 1), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", fontsize=8, color="grey")
    legend(picture, axis)
    return picture


def draw_length(series, colours, meta):
    """Accuracy or loss against length, with standard errors."""
    picture, (axis,) = canvas(f"{meta['name']}: 1, 2, 4, 8 times the trained length")
    ylabel = "accuracy" if series["what"] == "accuracy" else "loss in the last part, nats per target"
    draw_lines(axis, series["lines"], colours, "length, tokens; each line begins at the trained one", ylabel)
    axis.set_xscale("log", base=2)
    ticks = sorted({n for one in series["lines"] for n in one["x"]})
    axis.set_xticks(ticks, [f"{n:.0f}" for n in ticks])
    if series["what"] == "accuracy":
        axis.set_ylim(0, 1.03)
    legend(picture, axis)
    return picture


def draw_gradients(series, colours, meta):
    """Norms against t, on a log axis."""
    picture, (axis,) = canvas(f"{meta['name']}: gradient with respect to the memory")
    draw_lines(axis, series["lines"], colours, "position t, tokens; the loss is at the last one", "norm of the gradient", yscale="log")
    legend(picture, axis)
    return picture


def draw_memory(series, colours, meta):
    """A panel for each run, points coloured by what should be held, paths as arrows."""
    from matplotlib import colormaps
    panels = series["panels"]
    lines = -(-len(panels) // 3)
    title = f"{meta['name']}: memories of the RNN on held-out documents\narrows: the first tokens of a few of them"
    picture, axes = canvas(title, len(panels), width=0.8 + 3.3 * min(len(panels), 3), height=0.3 + 3.3 * lines, lines=lines)
    greatest = max(max(panel["held"]) for panel in panels)
    discrete = series["what"] != "position" and greatest < 10
    colour = dict(cmap=colormaps["tab10"].resampled(10) if discrete else "viridis", vmin=-0.5 if discrete else 0,
                  vmax=9.5 if discrete else max(1, greatest))
    for axis, panel in zip(axes, panels):
        points, held = np.array(panel["points"]), np.array(panel["held"])
        axis.scatter(*points[held < 0].T, s=5, color="lightgrey", linewidths=0)
        shown = axis.scatter(*points[held >= 0].T, s=8, c=held[held >= 0], linewidths=0, **colour)
        for path in map(np.array, panel["paths"]):
            arrows = dict(angles="xy", scale_units="xy", scale=1, width=0.004, color="black", alpha=0.6)
            axis.quiver(*path[:-1].T, *np.diff(path, axis=0).T, **arrows)
        axis.set(xlabel=f"first direction, {panel['shares'][0]:.0%} of the variance", ylabel=f"second, {panel['shares'][1]:.0%}")
        axis.set_title(panel["run"], fontsize=9, color=colours.get(panel["run"], "black"))
    for axis in axes[len(panels):]:
        axis.set_visible(False)
    bar = picture.colorbar(shown, ax=axes, label=series["what"], shrink=0.8)
    if discrete:
        bar.ax.set_ylim(-0.5, greatest + 0.5)
        bar.ax.set_yticks(range(greatest + 1), [tasks.to_text(meta["name"], [symbol], meta) for symbol in range(greatest + 1)])
    return picture


def draw_cost(series, colours, meta):
    """Time and bytes against what was read before."""
    picture, axes = canvas(f"{meta['name']}: what a generated token costs", 2, width=9)
    for axis, (key, ylabel) in zip(axes, {"ms": "time per token, ms", "bytes": "state, bytes"}.items()):
        draw_lines(axis, series[key], colours, "tokens before it", ylabel, xscale="log", yscale="log")
    few_ticks(axes[0].yaxis)
    legend(picture, axes[0], columns=1)
    return picture


def draw_compute(series, colours, meta):
    """Held-out loss against tokens, sequential FLOPs and seconds."""
    from matplotlib.ticker import EngFormatter
    labels = {"tokens": "tokens trained on", "sequential_flops": "sequential FLOPs", "seconds": "seconds of training"}
    picture, axes = canvas(f"{meta['name']}: held-out loss during training", 3, width=11)
    for axis, (key, xlabel) in zip(axes, labels.items()):
        draw_lines(axis, series[key], colours, xlabel, "held-out loss, nats per target", xscale="log")
        few_ticks(axis.xaxis, EngFormatter(sep=""))
        if "statistics" in meta:
            axis.axhline(meta["statistics"]["entropy_per_character"], color="grey", linewidth=0.8, label="entropy: no model is better")
    legend(picture, axes[0], columns=4)
    return picture


DRAW = {"held": draw_held, "position": draw_position, "drift": draw_drift, "length": draw_length, "gradients": draw_gradients, "memory": draw_memory,
        "cost": draw_cost, "compute": draw_compute}


def draw_all(series, names, meta, folder):
    """Write <figure>.png of each figure's data into a folder; the runs `names` have the same colour in all of them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise runtime.DataError(f"cannot make the folder {folder}: {error.strerror}") from None
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for name, draw in DRAW.items():
        path = folder / f"{name}.png"
        if "skipped" in series[name]:
            print(f"{path}: not drawn, {series[name]['skipped']}")
            continue
        picture = draw(series[name], colours, meta)
        runtime.write_atomically(path, lambda temporary: picture.savefig(temporary, format="png"))
        print(path)
