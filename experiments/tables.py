"""Tables and figures of reproduce.py: from the records of an experiment's runs to results/<experiment>.json, .md and .png.

A record is a dict: case and method (its row and its column), seed, done, and the numbers of a finished run: those of its last evaluation,
with tokens, seconds and FLOPs summed over the runs that it goes on from; `curve` has the same numbers at each of its evaluations,
`pictures` the names of further PNG files.
"""
import io
import itertools
import json
from pathlib import Path

import numpy as np

from runtime import write_atomically

TITLES = {"val_rnn_accuracy": ("Accuracy", ".3f"), "val_rnn_loss": ("Loss, nats per target", ".4f"),
          "val_teacher_loss": ("Loss of encoder and decoder, nats per target", ".4f"), "val_drift": ("Drift", ".4f"),
          "val_gap_to_floor": ("Loss above the floor, nats per target", ".4f"), "seconds": ("Seconds of training", ",.0f"),
          "tokens": ("Tokens", ",.0f"), "flops": ("FLOPs of training", ".3g"),
          "sequential_flops": ("Sequential FLOPs", ".3g"), "lr": ("Learning rate", "g"),
          "max_iters": ("Steps of the last stage (DMT: iterations)", ",.0f"), "uniformity": ("Uniformity of the encoder's memories", ".3f"),
          "effective_rank": ("Effective rank of the encoder's memories", ".1f"),
          "parameters": ("Parameters of updater and readout", ",.0f"), "chance": ("Accuracy of chance", ".3f")}
LOGARITHMIC = ("val_rnn_loss", "val_drift", "tokens", "sequential_flops")       # axes
LEAST = 1e-4            # losses below are drawn here
FOLDER = Path("results")
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777"]     # told apart by the colour-blind, too


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and tables

def chosen(records):
    """The finished records; of several with the same case, method and seed (a grid of learning rates) that of the least held-out loss."""
    best = {}
    for record in (r for r in records if r["done"]):
        key = record["case"], record["method"], record["seed"]
        if key not in best or record["val_rnn_loss"] < best[key]["val_rnn_loss"]:
            best[key] = record
    return list(best.values())


def summarise(records, metrics):
    """{(case, method): {metric: its values, one for each seed}} of the chosen records."""
    cells = {}
    for record in chosen(records):
        for metric in (m for m in metrics if m in record):
            cells.setdefault((record["case"], record["method"]), {}).setdefault(metric, []).append(record[metric])
    return cells


def spread(values):
    """Mean, least and greatest over the seeds, and how many there are."""
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values), "seeds": len(values)}


def cell(values, form):
    """mean (min..max) as text; the number alone for a single seed, - for none."""
    if not values:
        return "-"
    mean, low, high = (format(number, form) for number in (float(np.mean(values)), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low}..{high})"


def table(records, metric):
    """Markdown: a line for each case, a column for each method. The numbers that have a chance level get it as a column, too."""
    title, form = TITLES[metric]
    cells = summarise(records, [metric])
    cases, methods = (list(dict.fromkeys(r[key] for r in records)) for key in ("case", "method"))
    chance = {r["case"]: r["chance"] for r in records if metric == "val_rnn_accuracy" and "chance" in r}
    rows = [["", *methods, *["chance"] * bool(chance)], ["---"] * (1 + len(methods) + bool(chance))]
    for case in cases:
        numbers = [cell(cells.get((case, method), {}).get(metric), form) for method in methods]
        rows.append([case, *numbers, *[cell([chance[case]] if case in chance else [], form)] * bool(chance)])
    return f"## {title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(name, facts, records, metrics, figure):
    """FOLDER/<name>.json, .md and .png. facts: {what is said above the tables: text}; figure: made by one of the makers below."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = figure(records, FOLDER / f"{name}.png")
    rows = [{"case": case, "method": method, **{metric: spread(values) for metric, values in numbers.items()}}
            for (case, method), numbers in summarise(records, metrics).items()]
    each, rows = (",\n  ".join(map(json.dumps, some)) for some in (records, rows))                # a line each
    content = json.dumps(facts | {"notes": lines}, indent=1)[:-2] + f',\n "rows": [\n  {rows}],\n "records": [\n  {each}]\n}}\n'
    write_atomically(FOLDER / f"{name}.json", lambda path: path.write_text(content))
    tables = [table(records, metric) for metric in metrics if any(metric in record for record in records if record["done"])]
    pictures = [f"{name}.png", *(picture for record in records for picture in record.get("pictures", ()))]
    text = "\n".join([f"# {name}\n", *(f"- {key}: {value}" for key, value in facts.items()), "",
                      *tables, *(f"{line}\n" for line in lines), *(f"![{picture}]({picture})\n" for picture in pictures)])
    write_atomically(FOLDER / f"{name}.md", lambda path: path.write_text(text))


# ---------------------------------------------------------------------------------------------------------------------
# Figures: each maker returns figure(records, path), which draws the chosen records and returns lines to print below the tables

def panels(heights, columns, width):
    """A matplotlib figure without the global state of pyplot, and its axes (rows, columns); sizes in inches, of a panel."""
    from matplotlib.figure import Figure
    figure = Figure((width * columns, sum(heights)), layout="constrained")
    return figure, figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)


def shown(metric, values):
    """The values of a metric as they are drawn."""
    return [max(value, LEAST) for value in values] if metric in LOGARITHMIC else list(values)


def scale(ax, which, metric):
    """Make the axis `which`, x or y, logarithmic where the numbers of a metric, drawn before, range over powers of ten."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
    if metric in LOGARITHMIC:
        ax.set(**{f"{which}scale": "log"})
        axis = ax.xaxis if which == "x" else ax.yaxis
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axis.set_major_formatter(EngFormatter(sep="") if metric in ("tokens", "sequential_flops") else "{x:g}")
        axis.set_minor_formatter(NullFormatter())


def save(figure, path):
    """Give the figure a legend of all that its panels show, and write it as a PNG of 64 colours, atomically: a third of the bytes."""
    from PIL import Image
    labelled = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels())}
    for ax in figure.axes:
        ax.xaxis.label.set_size(9), ax.yaxis.label.set_size(9), ax.title.set_size(10)
    if labelled:
        columns = 2 * figure.axes[0].get_gridspec().ncols
        figure.legend(labelled.values(), labelled.keys(), loc="outside upper center", ncols=columns, fontsize=8)
    figure.savefig(drawn := io.BytesIO(), format="png", dpi=100)
    picture = Image.open(drawn).convert("RGB").quantize(64)
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))


def colours(records, key="method"):
    """{method, or line of a curve: its colour}, the same in all panels."""
    return dict(zip(dict.fromkeys(r[key] for r in records), COLOURS * 2))


def dots(*metrics, apart=False):
    """A panel for each metric: a line for each case; for each method a dot at the mean and a bar from the least to the greatest seed.

    apart: panels for each data set.
    """
    def figure(records, path):
        cells, colour, groups = summarise(records, metrics), colours(records), {}
        for record in records:
            cases = groups.setdefault(record["panel"] if apart else "", [])
            cases += [record["case"]] * (record["case"] not in cases)
        drawing, axes = panels([1.2 + 0.3 * len(cases) for cases in groups.values()], len(metrics), 4.5)
        for row, (name, cases) in zip(axes, groups.items()):
            labels = [case.removeprefix(f"{name}, ") for case in cases]
            for ax, metric in zip(row, metrics):
                for (case, method), numbers in cells.items():
                    if case in cases and (values := shown(metric, numbers.get(metric, ()))):
                        at = cases.index(case) + 0.6 * (list(colour).index(method) + 0.5) / len(colour) - 0.3
                        ax.plot([min(values), max(values)], [at, at], color=colour[method], lw=2)
                        ax.plot([np.mean(values)], [at], "o", ms=5, color=colour[method], label=method)
                scale(ax, "x", metric)
                ax.set(xlabel=TITLES[metric][0], ylim=(len(cases) - 0.5, -0.5), title=name)
                ax.set_yticks(range(len(cases)), labels if ax is row[0] else [""] * len(cases))
                ax.grid(alpha=0.3)
        save(drawing, path)
        return []
    return figure


def curves(spent, metrics):
    """A line of panels for each data set and metric, a panel for each of the `spent`: how a number falls, a line for each run."""
    def figure(records, path):
        runs, colour = chosen(records), colours(records, "line")
        lines = [(case, metric) for case in dict.fromkeys(r["panel"] for r in records) for metric in metrics]
        drawing, axes = panels([3.0] * len(lines), len(spent), 4.5)
        for row, (case, metric) in zip(axes, lines):
            for ax, amount in zip(row, spent):
                for run in (r for r in runs if r["panel"] == case):
                    points = [point for point in run["curve"] if metric in point and point[amount] > 0]
                    if points:
                        ax.plot([point[amount] for point in points], shown(metric, [point[metric] for point in points]), ".-", lw=1,
                                color=colour[run["line"]], label=run["line"])
                ax.set(xlabel=TITLES[amount][0], ylabel=TITLES[metric][0], title=case)
                ax.grid(alpha=0.3)
                scale(ax, "x", amount)
                scale(ax, "y", metric)
        save(drawing, path)
        return []
    return figure


def power_law(values, losses):
    """a, b of loss = a value^b, the least-squares line through the means in log-log."""
    b, log_a = np.polyfit(np.log(values), np.log(losses), 1)
    return float(np.exp(log_a)), float(b)


def against(*metrics, fit=False):
    """A panel for each metric and record["panel"]: the metric against record["value"], a line for each method through the means over
    the seeds; with `fit` their power law instead, both axes logarithmic."""
    def figure(records, path):
        runs, colour, lines = chosen(records), colours(records), []
        names = list(dict.fromkeys(r["panel"] for r in runs))
        drawing, axes = panels([3.2] * len(metrics), max(1, len(names)), 4.0)
        for (metric, row), (column, name) in itertools.product(zip(metrics, axes), enumerate(names)):
            values = sorted({r["value"] for r in runs if r["panel"] == name})
            row[column].set(xlabel=name, ylabel=TITLES[metric][0], xscale="log", yscale="log" if fit else "linear",
                            xlim=(values[0] / 1.1, values[-1] * 1.1))
            row[column].set_xticks(values, map(str, values), minor=False)
            row[column].xaxis.minorticks_off()
            row[column].grid(alpha=0.3)
        for (metric, row), (name, method) in itertools.product(zip(metrics, axes), itertools.product(names, colour)):
            ax, points = row[names.index(name)], {}
            for r in (r for r in runs if (r["panel"], r["method"]) == (name, method) and metric in r):
                points.setdefault(r["value"], []).append(r[metric])
            x, y = sorted(points), [float(np.mean(points[value])) for value in sorted(points)]
            if len(points) < 1 + fit:               # nothing to draw, or to fit, until further runs are finished
                continue
            ax.plot(x, shown(metric, y), "o" if fit else "o-", color=colour[method], label=method)
            ax.vlines(x, *zip(*(shown(metric, (min(points[value]), max(points[value]))) for value in x)), color=colour[method])
            scale(ax, "y", metric)
            if fit:
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter("{x:g}")
            if fit and min(y) > 0:
                a, b = power_law(x, y)
                ax.plot(x, [a * value ** b for value in x], "--", color=colour[method])
                lines.append(f"{method}: {TITLES[metric][0].lower()} = {a:.3g} x {name}^{b:.3f} ({len(x)} points)")
        save(drawing, path)
        return lines
    return figure
