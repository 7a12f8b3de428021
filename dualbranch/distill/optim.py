"""Optimizers and the learning-rate schedule.

`torch.optim.Muon` orthogonalises in bfloat16, which on a CPU without bf16 units is a hundred times slower than the training step it
serves (docs/experiments.md), hence our own: the same algorithm in the parameter's dtype there, and in bf16 where that pays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualbranch.distill.config import OptimConfig
from kernels import has_bf16_units

#: Quintic Newton-Schulz coefficients (Jordan et al. 2024): singular values go to [0.7, 1.2] within five steps.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
#: Matrices at least this large on both sides are orthogonalised in bf16 where the device has units for it.
BF16_SIDE = 256
#: Elements orthogonalised at once: more don't stay in a CPU's cache from one product to the next.
AT_ONCE = 2**20


def orthogonalize(m: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, to a batch `m (n, rows, cols)`."""
    a, b, c = NEWTON_SCHULZ
    transposed = m.shape[-2] > m.shape[-1]
    x = m.mT if transposed else m
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; for 2-D weights. The update's RMS is 0.2, so `lr` is in AdamW's units (Liu et al. 2025)."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(buffer, group["momentum"])  # Nesterov
                full = direction.full_tensor() if hasattr(direction, "full_tensor") else direction
                by_shape.setdefault(tuple(full.shape), []).append((p, full))
            for (rows, cols), items in by_shape.items():
                in_bf16 = min(rows, cols) >= BF16_SIDE and has_bf16_units(items[0][1].device)
                size = len(items) if items[0][1].is_cuda else max(1, AT_ONCE // (rows * cols))
                for part in (items[i : i + size] for i in range(0, len(items), size)):
                    stacked = torch.stack([d for _, d in part])
                    updates = orthogonalize(stacked.bfloat16() if in_bf16 else stacked).to(stacked.dtype)
                    for (p, _), update in zip(part, updates, strict=True):
                        if hasattr(p, "device_mesh"):
                            from torch.distributed.tensor import distribute_tensor

                            update = distribute_tensor(update, p.device_mesh, p.placements)
                        p.mul_(1 - group["lr"] * group["weight_decay"])
                        p.add_(update, alpha=-group["lr"] * 0.2 * max(rows, cols) ** 0.5)


def make_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """For the parameters of `model` that require gradients. Group option `peak_lr` is what `set_lr` scales."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.dim() == 2 and n.startswith("blocks.")]
    others = [p for n, p in named if not (p.dim() == 2 and n.startswith("blocks."))]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices and config.kind == "muon":
        optimizers.append(Muon(matrices, config.lr, config.weight_decay))
    elif matrices:
        optimizers.append(torch.optim.AdamW(matrices, config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay))
    if others:
        optimizers.append(torch.optim.AdamW(others, config.lr_other, betas=(0.9, 0.95), weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, n_steps: int, config: OptimConfig) -> float:
    """Warm-up, plateau, linear decay to (almost) zero; in (0, 1]."""
    warmup, decay = max(1, round(config.warmup * n_steps)), max(1, round(config.decay * n_steps))
    return min((step + 1) / warmup, (n_steps - step) / decay, 1.0)


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
