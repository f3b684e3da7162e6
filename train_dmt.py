"""DAgger Memory Training: let the RNN run on its own memories and pull it back to the encoder's.

    python train_dmt.py                                        # from runs/fables-smt
    python train_dmt.py --dataset=tinystories --horizon=128 --persistent    # streams that go on from step to step
    torchrun --nproc_per_node=8 train_dmt.py --dataset=mnist   # the paper's settings on 8 GPUs

Starts from an SMT checkpoint (--init_from, else runs/<dataset>-smt) and writes runs/<dataset>-dmt. Encoder and decoder are
frozen; each iteration

    1. rolls f out over `horizon` tokens, without gradients: the memories m_hat_t of the current RNN    (sequential)
    2. asks the encoder for the memories m_t it should have had, at every `label_stride`-th step       (parallel)
    3. trains f on (m_hat_{t-1}, x_t) -> m_t, and g on m_hat_t -> y_t, all pairs at once               (parallel)
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

import data as datasets
import runtime
import tasks
from data import IGNORE
from evaluate import evaluate
from model import chain_flops, forward_flops, parameter_counts, restore, roll_out
from runtime import RunConfig, UsageError


@dataclass(frozen=True)
class Config(RunConfig):
    """What train_dmt.py can be told, beside what all train scripts can."""
    horizon: int = 0                # tokens of a roll-out; 0: the whole row
    label_stride: int = 1           # steps between two labels of the encoder
    seq_len: int = 0                # tokens T of a training row; 0: the longest document, for text the encoder's context_len
    p_start: float = 0.5            # share of the rows that begin at a document's start; the others begin anywhere (text only)
    persistent: bool = False        # each row is a long stream: its roll-out goes on from the last memory of the one before (text only)
    through_time: bool = False      # backpropagate the dynamics loss through the roll-out instead of single steps
    lambda_dyn: float = 10.0        # weight of the dynamics loss
    lambda_read: float = 1.0        # weight of the readout's loss

    def __post_init__(self):
        super().__post_init__()
        if self.horizon < 0 or self.label_stride < 1 or self.seq_len < 0 or not 0 <= self.p_start <= 1:
            raise UsageError("--horizon and --seq_len are at least 0, --label_stride at least 1, --p_start from 0 to 1")


PRESETS = {
    "tiny": dict(batch_size=8, max_iters=430, lr=2e-3, label_stride=2, p_start=0.9, eval_interval=86),
    "tiny/tinystories": dict(seq_len=256, p_start=0.5, max_iters=520),
    "tiny/text": dict(seq_len=256, p_start=0.5),
    "small": dict(batch_size=32, max_iters=1000, lr=1e-3, label_stride=2, eval_interval=100),
    "paper": dict(batch_size=32, max_iters=1500, lr=3e-5, horizon=256, label_stride=16, eval_interval=100, eval_len=1024),
}
SYNTHETIC = dict(batch_size=64, max_iters=300, lr=3e-3, label_stride=1)
PRESETS |= {f"tiny/{name}": SYNTHETIC for name in tasks.TASKS}


# ---------------------------------------------------------------------------------------------------------------------
# The three steps

def choose_window(config, step, T, H):
    """Which part of the rows of a step is rolled out, and which of its H steps get a label; a pure function of (seed, step).

    It begins at 0, from m_empty, with probability p_start, else anywhere; persistent streams go on with the last H tokens.
    """
    rng = datasets.philox(config.seed, step, "roll-out")
    begin = 0 if rng.random() < config.p_start else int(rng.integers(T - H + 1))
    steps = torch.arange(int(rng.integers(min(config.label_stride, H))), H, config.label_stride)
    return T - H if config.persistent else begin, steps


@torch.no_grad()
def start_memory(networks, initial_memory, x, begin):
    """The memories (B, K, d) that a roll-out over x[begin:] starts from: m_empty at 0, elsewhere the encoder's."""
    if begin == 0:
        return initial_memory.expand(len(x), -1, -1)
    return networks["encoder"](x, torch.tensor([begin - 1], device=x.device))[:, 0]


@torch.no_grad()
def roll_out_and_label(networks, start, x, begin, horizon, steps):
    """Steps 1 and 2 on rows x (B, T): run f from the memories `start` (B, K, d) over x[begin:begin+horizon], ask E for labels.

    steps (L,): the steps of the roll-out, 0..horizon-1, that get a label. Returns the memory before and after each step,
    m_hat_{t-1} and m_hat_t (B, H, K, d), and the labels m_t (B, L, K, d).
    """
    after = roll_out(networks["updater"], start, x[:, begin:begin + horizon])
    before = torch.cat([start[:, None], after[:, :-1]], dim=1)
    return before, after, networks["encoder"](x, begin + steps)


def dmt_loss(networks, before, after, labels, x, y, steps, counts, config):
    """Step 3, plain supervised learning on the states that the RNN itself has visited:

        L_dyn  = MSE(f(stop_gradient(m_hat_{t-1}), x_t), m_t)     at the labelled steps (L,)
        L_read = CE(g(stop_gradient(m_hat_t)), y_t)               at every step

    before, after (B, H, K, d), labels (B, L, K, d), x, y (B, H). With config.through_time the roll-out is repeated with
    gradients from its first memory, and L_dyn compares all of it. Each term is these rows' share of the global mean:
    counts (2,) are the transitions and the targets of the global batch. Returns the weighted sum and its terms.
    """
    transitions, readouts = counts.clamp(min=1)
    if config.through_time:
        predicted = roll_out(networks["updater"], before[:, 0], x)[:, steps]
    else:
        predicted = networks["updater"](before[:, steps].flatten(0, 1), x[:, steps].flatten()).view_as(labels)
    real = x[:, steps] != networks["updater"].pad
    loss_dyn = ((predicted - labels).square().mean((-2, -1)) * real).sum() / transitions
    logits = networks["readout"](after.flatten(0, 1))
    loss_read = F.cross_entropy(logits, y.flatten(), ignore_index=IGNORE, reduction="sum") / readouts
    loss = config.lambda_dyn * loss_dyn + config.lambda_read * loss_read
    return loss, dict(train_loss=loss, loss_dyn=loss_dyn, loss_read=loss_read)


def step_flops(config, model_config, networks, vocab_size, T, H):
    """FLOPs of an iteration (backward costs twice the forward), all of them and the longest chain of dependent ones."""
    labels = -(-H // config.label_stride)
    forward = forward_flops(model_config, vocab_size, T, labels)
    chain = {name: chain_flops(network) for name, network in networks.items()}
    supervised = (3 if not config.through_time else 3 * H / labels) * labels * forward["updater"] + 3 * H * forward["readout"]
    chained = (3 * H if config.through_time else 3) * chain["updater"]
    return (round(config.batch_size * (H * forward["updater"] + forward["encoder"] + supervised)),
            H * chain["updater"] + chain["encoder"] + max(chained, 3 * chain["readout"]))


# ---------------------------------------------------------------------------------------------------------------------

def main():
    config = runtime.parse(Config, presets=PRESETS)
    run = runtime.start(config, "dmt")
    run.first(lambda: datasets.ensure(config.dataset, config.data_dir))
    data = datasets.load(config.dataset, config.data_dir).to(run.device)
    val_x, val_y = datasets.held_out(data, config.eval_docs, min(config.eval_len, data.longest_document), seed=0)

    source = runtime.load(run.checkpoint_path if config.resume else config.init_from or f"runs/{config.dataset}-smt", run.device)
    runtime.check_data(source, data)
    model_config, networks, initial_memory = restore(source, run.device)
    if "encoder" not in networks:
        raise UsageError("DMT takes its labels from an encoder: --init_from must be a checkpoint of train_smt.py or train_dmt.py")
    T = config.seq_len or (data.longest_document if data.rows_are_documents else model_config.context_len)
    H = min(config.horizon or T, T)
    if config.persistent:
        datasets.stream_rows(data, 0, config.batch_size, T, H)      # refuses what cannot go on, before anything is written
    networks.requires_grad_(False)
    trained = torch.nn.ModuleDict({name: networks[name].requires_grad_() for name in ("updater", "readout")})
    optimizer = runtime.adamw(trained, config)
    module = runtime.distribute(trained, lambda *batch: dmt_loss(*batch, config), run)
    first_step = runtime.begin(run, config, data, networks, optimizer)
    run.print(parameter_counts(networks))

    flops, sequential_flops = step_flops(config, model_config, networks, data.vocab_size, T, H)
    memory = None
    if config.resume and config.persistent and "memory" in source:
        if len(source["memory"]) != config.batch_size:
            raise UsageError(f"the run has {len(source['memory'])} streams: --resume it with that --batch_size, not {config.batch_size}")
        memory = source["memory"].chunk(run.world_size)[run.rank]

    run.start_clock()
    for step in range(first_step, config.max_iters + 1):
        last = step == config.max_iters or run.should_stop(step)
        if step % config.eval_interval == 0 or last:
            with run.evaluating():
                numbers = evaluate(networks, initial_memory, val_x, val_y, data.meta)
            run.log_evaluation(step, numbers)
            extra = {"memory": run.gather(memory)} if memory is not None else {}
            runtime.save(run, "dmt", step, config, data, networks, optimizer, model_config=asdict(model_config),
                         initial_memory=initial_memory, **extra)
        if last:
            break

        begin, steps = choose_window(config, step, T, H)
        steps = steps.to(run.device)
        if config.persistent:
            x, y, new_streams = datasets.stream_rows(data, step, config.batch_size, T, H, run.rank, run.world_size)
            memory = None if new_streams else memory
        else:
            x, y, _ = datasets.sample_batch(data, config.seed, step, config.batch_size, T, 1, config.p_start, run.rank, run.world_size)
        rolled_x, rolled_y = x[:, begin:begin + H], y[:, begin:begin + H]
        counts = run.sum(torch.stack([(rolled_x[:, steps] != data.pad).sum(), (rolled_y != IGNORE).sum()]))

        ends = []
        for i, rows in enumerate(torch.arange(len(x), device=run.device).chunk(config.grad_accum)):
            with run.autocast():
                start = start_memory(networks, initial_memory, x[rows], begin) if memory is None else memory[rows]
                before, after, labels = roll_out_and_label(networks, start, x[rows], begin, H, steps)
            ends.append(after[:, -1])
            with runtime.micro_step(module, last=i == config.grad_accum - 1):
                with run.autocast():
                    loss, losses = module(before, after, labels, rolled_x[rows], rolled_y[rows], steps, counts)
                (loss * run.world_size).backward()      # DDP averages over processes; our losses are to be summed
            run.count(losses)
        memory = torch.cat(ends) if config.persistent else None

        lr = runtime.learning_rate(step, config)
        grad_norm = runtime.optimizer_step(optimizer, lr, config.grad_clip)
        run.spend(tokens=config.batch_size * H, flops=flops, sequential_flops=sequential_flops)
        run.log_training(step + 1, grad_norm, lr)


if __name__ == "__main__":
    runtime.run_main(main)
