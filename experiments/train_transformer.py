"""A causal Transformer, the other baseline: the decoder without a memory, trained on the rows that the RNNs are trained on.

    python train_transformer.py                                        # fables, preset tiny
    python train_transformer.py --dataset=retrieval                    # a synthetic task
    python train_transformer.py --dataset=mnist --context_len=784      # every pixel attends to all before it
    torchrun --nproc_per_node=8 train_transformer.py --dataset=tinystories    # the paper's sizes on 8 GPUs

Writes runs/<dataset>-transformer. In every layer a token attends to itself and to the context_len - 1 tokens before it, in training,
on held-out documents of any length and in sampling alike. Sampling keeps their keys and values, where the RNN has K memory tokens.
"""
from dataclasses import asdict, dataclass

import torch

import data as datasets
import runtime
import tasks
from data import IGNORE, cross_entropy
from evaluate import evaluate
from flops import transformer_flops
from model import ModelConfig, build, parameter_counts
from runtime import RunConfig, UsageError


@dataclass(frozen=True)
class Config(RunConfig):
    """Flags of train_transformer.py, on top of the shared ones."""
    d_model: int = 64               # width d of tokens
    n_heads: int = 4                # attention heads
    decoder_layers: int = 3         # layers
    context_len: int = 256          # tokens that a token attends to: itself and those before it
    seq_len: int = 0                # tokens T of a training row; 0: the longest document, for text context_len
    p_start: float = 0.5            # share of the rows that begin at a document's start; the others begin anywhere (text only)

    def __post_init__(self):
        super().__post_init__()
        model_config(self)          # refuses sizes that make no sense
        if self.seq_len < 0 or not 0 <= self.p_start <= 1:
            raise UsageError("--seq_len is at least 0, --p_start from 0 to 1")


def model_config(config):
    """The ModelConfig of the stage's config."""
    return ModelConfig(d_model=config.d_model, n_heads=config.n_heads, decoder_layers=config.decoder_layers, context_len=config.context_len)


# As many parameters as the updater and the readout of the same preset have together.
PRESETS = {
    "tiny": dict(d_model=128, n_heads=4, decoder_layers=6, context_len=220, p_start=0.9,
                 batch_size=8, max_iters=3000, lr=3e-3, eval_interval=600, log_interval=50),
    **{f"tiny/{name}": dict(decoder_layers=9, context_len=128, seq_len=256, p_start=0.5) for name in ("tinystories", "text")},
    "small": dict(d_model=264, n_heads=4, decoder_layers=6, context_len=256,
                  batch_size=64, max_iters=20_000, lr=1e-3, eval_interval=1000, log_interval=50),
    "paper": dict(d_model=256, n_heads=8, decoder_layers=12, context_len=256,
                  batch_size=128, max_iters=150_000, lr=3e-4, lr_decay="constant", eval_interval=5000, eval_len=1024, log_interval=100),
}
SYNTHETIC = dict(decoder_layers=2, batch_size=64, max_iters=1000, lr=1e-3, eval_interval=250)
TASKS = {name: SYNTHETIC for name in tasks.TASKS} | {"keyvalue": SYNTHETIC | dict(decoder_layers=6)}
PRESETS |= {f"{size}/{name}": flags for size in ("tiny", "small") for name, flags in TASKS.items()}


def transformer_loss(networks, x, y, count):
    """CE(D(x_{<=t}), y_t) at every t; x, y (B, T). These rows' share of the mean over the global batch, which has `count` targets."""
    logits, _ = networks["decoder"].read(x)
    loss = cross_entropy(logits, y) / count.clamp(min=1)
    return loss, dict(train_loss=loss)


# ---------------------------------------------------------------------------------------------------------------------

def main():
    config = runtime.parse(Config, presets=PRESETS)
    run = runtime.start(config, "transformer")
    run.first(lambda: datasets.ensure(config.dataset, config.data_dir))
    data = datasets.load(config.dataset, config.data_dir).to(run.device)
    T = datasets.row_length(data, config.seq_len, config.context_len)
    val_x, val_y = datasets.held_out(data, config.eval_docs, config.eval_len, seed=0)

    networks = build(model_config(config), data.vocab_size, ("decoder",)).to(run.device)
    no_memory = torch.empty(0, config.d_model, device=run.device)
    optimizers = runtime.optimizers(networks, config)
    module = runtime.distribute(networks, transformer_loss, run)
    first_step = runtime.begin(run, config, data, networks, optimizers)
    run.print(parameter_counts(networks))
    flops, sequential_flops = transformer_flops(config, networks, data.vocab_size, T)

    run.start_clock()
    for step in range(first_step, config.max_iters + 1):
        last = step == config.max_iters or run.should_stop(step)
        if step % config.eval_interval == 0 or last:
            with run.evaluating():
                numbers = evaluate(networks, no_memory, val_x, val_y, data.meta)
                runtime.save(run, "transformer", step, numbers, config, data, networks, optimizers, model_config=asdict(model_config(config)),
                             initial_memory=no_memory)
        if last:
            break

        x, y, _ = datasets.sample_batch(data, config.seed, step, config.batch_size, T, 1, config.p_start, run.rank, run.world_size)
        count = run.sum((y != IGNORE).sum())
        for i, (micro_x, micro_y) in enumerate(zip(x.chunk(config.grad_accum), y.chunk(config.grad_accum))):
            with runtime.micro_step(module, last=i == config.grad_accum - 1):
                with run.autocast():
                    loss, losses = module(micro_x, micro_y, count)
                (loss * run.world_size).backward()      # DDP averages over processes; our losses are to be summed
            run.count(losses)
        lr = runtime.learning_rate(step, config)
        grad_norm = runtime.optimizer_step(optimizers, lr)
        run.spend(tokens=config.batch_size * T, flops=flops, sequential_flops=sequential_flops)
        run.log_training(step + 1, grad_norm, lr)


if __name__ == "__main__":
    runtime.run_main(main)
