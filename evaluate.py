"""What a checkpoint is worth, in numbers."""
import torch
import torch.nn.functional as F

from data import IGNORE
from model import roll_out


def masked_mean(values, mask):
    """Mean of values where mask holds; 0 where it holds nowhere."""
    return float((values * mask).sum() / mask.sum().clamp(min=1))


@torch.no_grad()
def evaluate(networks, initial_memory, x, y, meta, rows=16, most_positions=64):
    """The numbers that all stages report, on held-out documents x, y (N, L), read from m_empty.

    val_rnn_loss, val_rnn_accuracy: Updater and Readout alone, rolled out from m_empty; nats per target, share of right ones.
    val_teacher_loss: Encoder, then the Decoder's first position. val_drift: the squared error of the rolled-out memory over
    the variance of the encoder's (0: the same; 1: no better than the mean memory). Both need an encoder (BPTT has none)
    and are measured at up to most_positions places, spread over those that have targets.
    """
    n, length = x.shape
    asked = y != IGNORE
    memories, logits = [], []
    for part in x.split(rows):
        memory = roll_out(networks["updater"], initial_memory.expand(len(part), -1, -1), part)
        memories.append(memory)
        logits.append(networks["readout"](memory.flatten(0, 1)).float().view(len(part), length, -1))
    memories, logits = torch.cat(memories), torch.cat(logits)
    targets = y.clamp(min=0)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(n, length)
    numbers = {"val_rnn_loss": masked_mean(loss, asked),
               "val_rnn_accuracy": masked_mean((logits.argmax(-1) == targets).float(), asked)}
    if "statistics" in meta:
        numbers["val_gap_to_floor"] = numbers["val_rnn_loss"] - meta["statistics"]["entropy_per_character"]
    if "encoder" not in networks:
        return numbers

    places = asked.any(0).nonzero().flatten()
    t = places[torch.linspace(0, len(places) - 1, min(most_positions, len(places)), device=x.device).long()]
    labels = torch.cat([networks["encoder"](part, t) for part in x.split(rows)])                     # (N, S, K, d)
    no_future = x.new_empty(n * len(t), 0)
    logits = networks["decoder"](labels.flatten(0, 1), no_future)[:, 0].float()
    loss = F.cross_entropy(logits, targets[:, t].flatten(), reduction="none").view(n, len(t))
    real = (x[:, t] != networks["encoder"].pad)[:, :, None, None]                                    # a document may have ended
    count = real.sum(0).clamp(min=1)
    variance = (labels - (labels * real).sum(0) / count).square()
    error = (memories[:, t] - labels).square()
    return numbers | {"val_teacher_loss": masked_mean(loss, asked[:, t]),
                      "val_drift": float((error * real).sum() / (variance * real).sum().clamp(min=1e-12))}
