"""Tables and figures of reproduce.py: an experiment's records -> FOLDER/<experiment>.json, .md and .png.

A record is a dict: case and method (its row and its column), seed, done, panel and label (for figures), and
the numbers of a finished run: of its last evaluation, with tokens and seconds summed over the runs it starts
from. `curve` has these numbers at each evaluation, `pictures` the names of further PNG files.
"""
import io
import json
from itertools import product
from pathlib import Path

import numpy as np

from lib.checkpoints import write_atomically

TITLES = {                      # metric: (title, format)
    "val_rnn_accuracy": ("Accuracy", ".3f"), "val_rnn_loss": ("Loss, nats per target", ".4f"),
    "val_teacher_loss": ("Loss of encoder and decoder, nats per target", ".4f"),
    "val_drift": ("Drift", ".4f"), "val_gap_to_floor": ("Loss above the floor, nats per target", ".4f"),
    "seconds": ("Seconds of training", ",.0f"), "tokens": ("Tokens of training", ",.0f"),
    "sequential_flops": ("Sequential FLOPs of training", ".3g"),
    "lr": ("Learning rate", "g"), "max_iters": ("Steps of the last stage", ",.0f")}
LOGARITHMIC = ("val_rnn_loss", "val_gap_to_floor", "val_drift", "tokens", "sequential_flops")   # axes
LEAST = 1e-4            # smaller losses are drawn here
FOLDER = Path("experiments/results")
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777"]     # for all eyes


# ----------------------------------------------------------------------------------------------------
# Numbers and tables

def chosen(records):
    """The finished records; of a grid, which has the same case, method and seed, that of the run with the
    least loss on its own held-out documents."""
    best = {}
    for record in (r for r in records if r["done"]):
        key = record["case"], record["method"], record["seed"]
        if key not in best or record["held_out_loss"] < best[key]["held_out_loss"]:
            best[key] = record
    return list(best.values())


def summarise(records, metrics):
    """{(case, method): {metric: its values, one for each seed}} of the chosen records."""
    cells = {}
    for record in chosen(records):
        cell = cells.setdefault((record["case"], record["method"]), {})
        for metric in (m for m in metrics if m in record):
            cell.setdefault(metric, []).append(record[metric])
    return cells


def spread(values):
    """Median, least and greatest over the seeds, and how many seeds there are."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values), "seeds": len(values)}


def cell(values, form):
    """median (least..greatest) as text; the number alone for a single seed, - for none."""
    if not values:
        return "-"
    median, low, high = (format(number, form) for number in list(spread(values).values())[:3])
    return median if len(values) == 1 else f"{median} ({low}..{high})"


def table(records, metric):
    """Markdown: a row for each case, a column for each method, and for accuracies one for chance.

    Rows are in the order of the records; those of one panel that have a value, in the order of the values.
    """
    title, form = TITLES[metric]
    cells, order = summarise(records, [metric]), list(dict.fromkeys(r["panel"] for r in records))
    records = sorted(records, key=lambda r: (order.index(r["panel"]), r.get("value", 0)))
    cases, methods = (list(dict.fromkeys(r[key] for r in records)) for key in ("case", "method"))
    chance = {r["case"]: r["chance"] for r in records if metric == "val_rnn_accuracy" and "chance" in r}
    rows = [["", *methods, *["chance"] * bool(chance)], ["---"] * (1 + len(methods) + bool(chance))]
    for case in cases:
        numbers = [cell(cells.get((case, method), {}).get(metric), form) for method in methods]
        rows.append([case, *numbers, *[cell([chance[case]] if case in chance else [], form)] * bool(chance)])
    return f"## {title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(name, facts, records, metrics, figure):
    """Write FOLDER/<name>.json, .md and .png. facts: {key: text above the tables}; figure: made below."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure(records, FOLDER / f"{name}.png")
    rows = [{"case": case, "method": method, **{metric: spread(values) for metric, values in numbers.items()}}
            for (case, method), numbers in summarise(records, metrics).items()]
    content = json.dumps(facts | {"rows": rows, "records": records}, indent=1) + "\n"
    write_atomically(FOLDER / f"{name}.json", lambda path: path.write_text(content))
    there = {key for record in records if record["done"] for key in record}
    pictures = [f"{name}.png", *(picture for record in records for picture in record.get("pictures", ()))]
    text = "\n".join([f"# {name}\n", *(f"- {key}: {value}" for key, value in facts.items()), "",
                      *(table(records, metric) for metric in metrics if metric in there),
                      *(f"![{name}]({name})\n" for name in pictures)])
    write_atomically(FOLDER / f"{name}.md", lambda path: path.write_text(text))


# ----------------------------------------------------------------------------------------------------
# Figures: each maker returns figure(records, path), which draws a PNG

def panels(heights, columns, width):
    """A matplotlib figure, without pyplot's state, and its axes (rows, columns). Sizes in inches."""
    from matplotlib.figure import Figure
    figure = Figure((width * columns, sum(heights)), layout="constrained")
    return figure, figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)


def shown(metric, values):
    """The values of a metric as they are drawn."""
    return [max(value, LEAST) for value in values] if metric in LOGARITHMIC else list(values)


def scale(ax, which, metric):
    """Make the axis `which`, x or y, logarithmic if the metric is in LOGARITHMIC. Draw the numbers before."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
    if metric in LOGARITHMIC:
        ax.set(**{f"{which}scale": "log"})
        axis = ax.xaxis if which == "x" else ax.yaxis
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axis.set_major_formatter(EngFormatter(sep="") if not metric.startswith("val_") else "{x:g}")
        axis.set_minor_formatter(NullFormatter())


def save(figure, path):
    """Add a legend of all panels and write a PNG of 64 colours, a third of the bytes."""
    from PIL import Image
    labelled = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels())}
    if labelled:
        n = 2 * figure.axes[0].get_gridspec().ncols
        figure.legend(labelled.values(), labelled.keys(), loc="outside upper center", ncols=n, fontsize=8)
    figure.savefig(drawn := io.BytesIO(), format="png", dpi=100)
    picture = Image.open(drawn).convert("RGB").quantize(64)
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))


def colours(records, key="method"):
    """{method or label: its colour}, the same in all panels."""
    return dict(zip(dict.fromkeys(r[key] for r in records), COLOURS * 2))


def dots(*metrics, apart=False):
    """A panel for each metric, a line for each case, a dot for each method: the median; a bar: the range.

    apart: a row of panels for each data set.
    """
    def figure(records, path):
        cells, colour, groups = summarise(records, metrics), colours(records), {}
        for record in records:
            groups.setdefault(record["panel"] if apart else "", {})[record["case"]] = None
        drawing, axes = panels([1.2 + 0.3 * len(cases) for cases in groups.values()], len(metrics), 4.5)
        for (i, (name, cases)), (j, metric) in product(enumerate(groups.items()), enumerate(metrics)):
            ax, cases = axes[i, j], list(cases)
            for (case, method), numbers in cells.items():
                if case in cases and (values := shown(metric, numbers.get(metric, ()))):
                    at = cases.index(case) + 0.6 * (list(colour).index(method) + 0.5) / len(colour) - 0.3
                    ax.plot([min(values), max(values)], [at, at], color=colour[method], lw=2)
                    ax.plot([np.median(values)], [at], "o", ms=5, color=colour[method], label=method)
            scale(ax, "x", metric)
            ax.set(xlabel=TITLES[metric][0], ylim=(len(cases) - 0.5, -0.5), title=name)
            ax.set_yticks(range(len(cases)), ["" if j else case.removeprefix(f"{name}, ") for case in cases])
            ax.grid(alpha=0.3)
        save(drawing, path)
    return figure


def curves(spent, metrics):
    """A row of panels for each data set and metric, a panel for each of `spent`; a line for each run."""
    def figure(records, path):
        runs, colour = chosen(records), colours(records, "label")
        rows = [(data, metric) for data in dict.fromkeys(r["panel"] for r in records) for metric in metrics]
        drawing, axes = panels([3.0] * len(rows), len(spent), 4.5)
        for (i, (data, metric)), (j, amount) in product(enumerate(rows), enumerate(spent)):
            ax = axes[i, j]
            for run in (r for r in runs if r["panel"] == data):
                points = [point for point in run["curve"] if metric in point and point.get(amount, 0) > 0]
                values = shown(metric, [point[metric] for point in points])
                ax.plot([point[amount] for point in points], values, ".-", lw=1, color=colour[run["label"]],
                        label=run["label"])
            ax.set(xlabel=TITLES[amount][0], ylabel=TITLES[metric][0], title=data)
            ax.grid(alpha=0.3)
            if any(len(line.get_xdata()) for line in ax.lines):
                scale(ax, "x", amount)
                scale(ax, "y", metric)
        save(drawing, path)
    return figure


def against(*metrics):
    """A panel for each metric and record["panel"]: the metric by record["value"], a line for each method.

    Lines go through the medians over the seeds, bars are the ranges.
    """
    def figure(records, path):
        runs, colour = chosen(records), colours(records)
        names = list(dict.fromkeys(r["panel"] for r in runs))
        drawing, axes = panels([3.6] * len(metrics), max(1, len(names)), 4.0)
        for (i, metric), (j, name) in product(enumerate(metrics), enumerate(names)):
            ax = axes[i, j]
            here = [r for r in runs if r["panel"] == name]
            values = sorted({r["value"] for r in here})
            limits = values[0] / 1.1, values[-1] * 1.1
            ax.set(xlabel=name, ylabel=TITLES[metric][0], xscale="log", xlim=limits)
            ax.set_xticks(values, map(str, values), minor=False)
            ax.xaxis.minorticks_off()
            ax.grid(alpha=0.3)
            for method in colour:
                points = {}
                for r in (r for r in here if r["method"] == method and metric in r):
                    points.setdefault(r["value"], []).extend(shown(metric, [r[metric]]))
                if not points:          # no run of the method has finished
                    continue
                x, y = zip(*((value, float(np.median(points[value]))) for value in sorted(points)))
                ax.plot(x, y, "o-", color=colour[method], label=method)
                ax.vlines(x, [min(points[v]) for v in x], [max(points[v]) for v in x], color=colour[method])
            scale(ax, "y", metric)
        save(drawing, path)
    return figure
