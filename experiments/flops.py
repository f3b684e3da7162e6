"""What training costs in sequential FLOPs: those on the longest chain of dependent operations.

No number of processors makes that chain shorter. It is one token's way through each matrix of a network, two
FLOPs per entry, each time that the network waits for its own output. Attention and what is not a matrix
product are left out. The backward pass takes twice the forward pass.
"""
from pathlib import Path

import runtime
from lib.checkpoints import load, newer_source, source_of
from lib.cli import DataError


def chain(weights, *prefixes):
    """FLOPs of one token's way through the matrices among weights {name: tensor} whose names begin with one
    of the prefixes. Embeddings and registers are looked up, not multiplied."""
    return sum(2 * w.numel() for name, w in weights.items() if w.dim() == 2 and name.startswith(prefixes)
               and not name.endswith(("embed.weight", "registers")))


def step_chain(checkpoint, trunk=False):
    """Sequential FLOPs of one step of a run; trunk: of a step of train_smt.py that trains the trunk alone."""
    stage, config, meta, w = (checkpoint[key] for key in ("stage", "config", "data", "model"))
    T = config["seq_len"] if meta["kind"] == "text" else meta["longest_document"]       # tokens of a row
    encoder, decoder, updater, readout = (chain(w, f"{name}.")
                                          for name in ("encoder", "decoder", "updater", "readout"))
    if trunk:
        return 3 * chain(w, "encoder.embed.", "encoder.transformer.", "decoder.head.")
    if stage == "smt":                          # all at once, given the memories
        return 3 * (encoder + max(decoder, updater, readout))
    if stage == "dmt":                          # the roll-out has no backward pass
        return min(config["horizon"] or T, T) * updater + encoder + 3 * max(updater, readout)
    if stage == "bptt":                         # forward through the row, backward through a window
        return (T + 2 * min(config["truncate"] or T, T)) * updater + 3 * readout
    if stage == "lstm":                         # its inputs do not wait for its state
        return 3 * (chain(w, "lstm.") + (T - 1) * chain(w, "lstm.lstm.weight_hh"))
    return 3 * chain(w, "transformer.")


# ------------------------------------------------------------------------------------------------------------
# A run, and the runs that it started from

def lineage(folder):
    """The runs that a run's weights come from, the oldest first, itself last: [(folder, checkpoint)].

    DataError if one of them is gone, or has been trained anew since.
    """
    checkpoint = load(folder)
    source = source_of(checkpoint)
    if newer := newer_source(checkpoint):
        raise DataError(f"{folder} began with {newer}, which has been trained anew since")
    if source is None:
        return [(Path(folder), checkpoint)]
    return [*lineage(source if source.is_dir() else source.parent), (Path(folder), checkpoint)]


def spent(folder):
    """{step: sequential FLOPs up to it} for the steps in a run's log, with those of its sources."""
    before = 0
    for source, checkpoint in lineage(folder):
        config, last = checkpoint["config"], checkpoint["step"]
        trunk_end = 0 if config["init_from"] else config.get("trunk_iters", 0)
        first, later = step_chain(checkpoint, trunk=True), step_chain(checkpoint)
        steps = {last, *(line["step"] for line in runtime.read_log(source / "metrics.jsonl"))}
        points = {step: before + min(step, trunk_end) * first + max(0, step - trunk_end) * later
                  for step in sorted(steps) if step <= last}
        before = points[last]
    return points
