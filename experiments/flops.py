"""What training costs in arithmetic: one step of a run is done on a CPU and counted.

FLOPs are those of matrix products and attention, two per multiply-add, as a CPU does them: attention in full
n x n products, futures trimmed to their length (model.chunks_by_length).

Sequential FLOPs are those on the longest chain of dependent operations, which no number of processors makes
shorter: one token's way through each matrix of a network, each time that the network waits for its output.
The backward pass takes twice the forward pass.
"""
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data as datasets
import model
import runtime
import train_bptt
import train_dmt
import train_smt
from experiments import train_baseline
from lib.checkpoints import load

CONFIGS = {"smt": train_smt.Config, "dmt": train_dmt.Config, "bptt": train_bptt.Config,
           "transformer": train_baseline.Config, "lstm": train_baseline.Config}
ROWS = 4        # of a batch that are counted; the other rows cost as much


def step_flops(run, data, trunk=False):
    """(flops, sequential_flops) of one step of a run, of its whole batch on all processes together.

    run: a checkpoint, or the Config of a train script; of train_dmt.py the checkpoint it starts from must
    be there. trunk: of the first steps of train_smt.py, which train the trunk alone.
    """
    config = CONFIGS[run["stage"]](**run["config"]) if isinstance(run, dict) else run
    sizes = run["model_config"] if isinstance(run, dict) else None
    rows = min(ROWS, config.batch_size)
    with torch.random.fork_rng([]):
        compute, longest = step_of(replace(config, batch_size=rows), sizes, data, trunk)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            compute()
    return counter.get_total_flops() * config.batch_size // rows, longest


def step_of(config, sizes, data, trunk):
    """A function that computes a step of a Config, with fresh weights, and the FLOPs on its longest chain."""
    if isinstance(config, train_smt.Config):
        return smt_step(config, data, trunk)
    if isinstance(config, train_dmt.Config):
        return dmt_step(config, sizes, data)
    return (bptt_step if isinstance(config, train_bptt.Config) else baseline_step)(config, data)


# ------------------------------------------------------------------------------------------------------------
# The stages

def chain(*modules):
    """FLOPs of one token's way through each matrix of the modules, embeddings apart."""
    parts = [part for module in modules for part in module.modules() if not isinstance(part, nn.Embedding)]
    return sum(2 * p.numel() for part in parts for name, p in part.named_parameters(recurse=False)
               if p.dim() == 2 and name != "registers")


def smt_step(config, data, trunk):
    """A function that computes a step of SMT (trunk: of its first phase); FLOPs of its longest chain."""
    networks = model.build(config, data.vocab_size)
    x, y, t = draw(config, data, datasets.row_length(data, config.seq_len), config.positions)
    counts = train_smt.count_terms(x, y, t, config, data.pad)
    loss = train_smt.trunk_alone if trunk else train_smt.smt_loss
    encoder, decoder = networks["encoder"], networks["decoder"]
    if trunk:
        longest = chain(encoder.embed, encoder.transformer, decoder.head)
    else:
        longest = chain(encoder) + max(map(chain, (decoder, networks["updater"], networks["readout"])))
    return lambda: loss(networks, x, y, t, counts, config)[0].backward(), 3 * longest


def dmt_step(config, sizes, data):
    """The same of an iteration of DMT; sizes: the fields of its ModelConfig, unset those of the source."""
    sizes, seq_len, source = sizes, config.seq_len, {"stage": "dmt", "config": vars(config)}
    while not (sizes and seq_len):                      # 0: as in SMT
        source = load(source_of(source))
        sizes, seq_len = sizes or source["model_config"], seq_len or source["config"]["seq_len"]
    networks, T = model.build(model.ModelConfig(**sizes), data.vocab_size), datasets.row_length(data, seq_len)
    h = min(config.horizon or T, T)
    x, y, _ = draw(config, data, T)
    begins, labelled = train_dmt.choose_steps(config, 0, T, h)

    def compute():
        before, labels = train_dmt.roll_out_and_label(networks, x, begins, h, labelled)
        rows = [train_dmt.cut(tokens, begins, h)[:, labelled] for tokens in (x, y)]
        counts = train_dmt.count_terms(*rows, data.pad)
        train_dmt.dmt_loss(networks, before, labels, *rows, counts, config)[0].backward()
    updater, readout = chain(networks["updater"]), chain(networks["readout"])
    return compute, h * updater + chain(networks["encoder"]) + 3 * max(updater, readout)


def bptt_step(config, data):
    """The same of a step of BPTT."""
    networks = model.build(config, data.vocab_size, ("updater", "readout"))
    networks.initial_memory = nn.Parameter(torch.randn(config.memory_tokens, config.d_model))
    x, y, _ = draw(config, data, T := datasets.row_length(data, config.seq_len))
    updates = T + 2 * min(config.truncate or T, T)      # forward through the row, backward through a window
    longest = updates * chain(networks["updater"]) + 3 * chain(networks["readout"])
    count = (y != model.IGNORE).sum()
    return lambda: train_bptt.bptt_loss(networks, x, y, count, config.truncate)[0].backward(), longest


def baseline_step(config, data):
    """The same of a step of a baseline."""
    networks = train_baseline.build(config, data.vocab_size).double()       # a float32 LSTM is not counted
    module = networks[config.model]
    x, y, _ = draw(config, data, T := datasets.row_length(data, config.seq_len))
    longest = chain(module)
    if config.model == "lstm":                          # its inputs do not wait for its state
        longest += (T - 1) * 2 * module.lstm.weight_hh_l0.numel()
    count = (y != model.IGNORE).sum()
    return lambda: train_baseline.baseline_loss(networks, x, y, count)[0].backward(), 3 * longest


def draw(config, data, T, positions=1):
    """The rows x, y (B, T) and positions t (S,) of a run's first step."""
    return datasets.sample_batch(data, config.seed, 0, config.batch_size, T, positions, config.p_start)


# ------------------------------------------------------------------------------------------------------------
# A run, and the runs that it started from

def source_of(checkpoint):
    """The path of the checkpoint that a run started from; None if it started from fresh weights."""
    config = checkpoint["config"]
    source = config["init_from"] or f"runs/{config['dataset']}-smt" * (checkpoint["stage"] == "dmt")
    return Path(source) if source else None


def lineage(folder):
    """The runs that a run's weights come from, the oldest first, itself last: [(folder, checkpoint)]."""
    checkpoint = load(folder)
    source = source_of(checkpoint)
    if source is None:
        return [(Path(folder), checkpoint)]
    return [*lineage(source if source.is_dir() else source.parent), (Path(folder), checkpoint)]


def spent(folder, data=None):
    """[(step, flops, sequential_flops)] at each step in a run's log, with those of the runs it started from.

    data: the data set of the run; unless given, the one in the data_dir that the run was trained with.
    """
    before = 0, 0
    for source, checkpoint in lineage(folder):
        config, last = checkpoint["config"], checkpoint["step"]
        data = data or datasets.load(checkpoint["data"]["name"], config["data_dir"])
        trunk_end = 0 if config["init_from"] else config.get("trunk_iters", 0)
        trunk = step_flops(checkpoint, data, trunk=True) if trunk_end else (0, 0)
        costs = list(zip(before, trunk, step_flops(checkpoint, data)))
        steps = {last, *(line["step"] for line in runtime.read_log(source / "metrics.jsonl"))}
        points = [(step, *(start + min(step, trunk_end) * first + max(0, step - trunk_end) * later
                           for start, first, later in costs)) for step in sorted(steps) if step <= last]
        before = points[-1][1:]
    return points
