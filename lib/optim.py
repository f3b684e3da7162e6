"""Optimisers, learning rate, and one step."""
import math

import torch

WARMUP = 0.01          # share of the steps
GRAD_CLIP = 1.0        # largest norm of the gradient


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): SGD with Nesterov momentum and an orthogonalised step, as large as AdamW's
    (Liu et al. 2025).

    torch.optim.Muon computes in bf16, for which a CPU without such instructions needs seconds a step; this
    one only on CUDA.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, mu, alike = group["lr"], group["momentum"], {}
            for p in (p for p in group["params"] if p.grad is not None):
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - mu)
                alike.setdefault(p.shape, []).append((p, p.grad.lerp(momentum, mu)))
            for shape, pairs in alike.items():              # matrices of one size in one call: many are small
                steps = orthogonalise(torch.stack([step for _, step in pairs]))
                for (p, _), step in zip(pairs, steps):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(step.type_as(p), alpha=-0.2 * max(shape) ** 0.5 * lr)


def orthogonalise(matrices, steps=5):
    """About U V^T of each matrix U S V^T, (n, rows, columns), by the quintic Newton-Schulz iteration."""
    x = matrices.to(torch.bfloat16 if matrices.device.type == "cuda" else torch.float32)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


def make_optimizers(networks, config):
    """Fused AdamW (0.9, 0.95) of all parameters; with --optimizer=muon, Muon of the hidden matrices and AdamW
    of the others.

    Hidden matrices are the weights of linear layers except heads and gates, whose outputs are logits.
    Matrices are decayed, but not embeddings.
    """
    parameters = [p for p in networks.parameters() if p.requires_grad]
    embeddings = {id(m.weight) for m in networks.modules() if isinstance(m, torch.nn.Embedding)}
    hidden = {id(m.weight) for name, m in networks.named_modules() if config.optimizer == "muon"
              and isinstance(m, torch.nn.Linear) and name.split(".")[-1] not in ("head", "gate")}
    matrices, groups = [], {}                               # groups: by weight decay
    for p in parameters:
        decay = config.weight_decay if p.dim() >= 2 and id(p) not in embeddings else 0.0
        (matrices if id(p) in hidden else groups.setdefault(decay, [])).append(p)
    groups = [{"params": group, "weight_decay": decay} for decay, group in groups.items()]
    fused = parameters[0].device.type in ("cpu", "cuda")
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=fused)]
    return optimizers + ([Muon(matrices, config.lr, config.weight_decay)] if matrices else [])


def learning_rate(step, config, begin=0):
    """Linear warm-up to config.lr, constant, then a cosine down to a tenth of it at max_iters, over the last
    share config.decay of the steps from `begin` on."""
    warmup = max(1, round(WARMUP * config.max_iters))
    fall = max(warmup, config.max_iters - round(config.decay * (config.max_iters - begin)))
    if step < fall:
        return config.lr * min(1, (step + 1) / warmup)
    share = (step - fall) / max(1, config.max_iters - fall)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def optimizer_step(optimizers, lr):
    """Clip, step, forget the gradients; returns their norm before clipping, a tensor: nothing is
    synchronised."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    norm = torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], GRAD_CLIP)
    for group in groups:
        group["lr"] = lr
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm
