"""Distillation losses. Each returns a weighted *sum* over tokens; the caller divides once by the weight of the whole batch, over all
micro-batches and ranks, so that no split of the batch changes the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hard_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy against `targets (N,)`: `logits (N, V)`, `weights (N,)` -> scalar sum, nats."""
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def token_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per token `(N,)`, times T^2 so that its gradient keeps its size as T grows (Hinton et al. 2015, eq. 4).

    As T goes to infinity it tends to `|z_t - z_s|^2 / (2 V)` over centred logits. Raises ValueError for unequal vocabularies.
    """
    if teacher_logits.shape[-1] != student_logits.shape[-1]:
        raise ValueError(f"teacher has {teacher_logits.shape[-1]} logits and student {student_logits.shape[-1]}: they must share one tokenizer")
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2


def distill_loss(teacher_logits: Tensor, student_logits: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """Weighted sum of `token_kl`; zero when student equals teacher."""
    return (token_kl(teacher_logits, student_logits, temperature) * weights).sum()


def truncated_targets(teacher_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What the teacher cache stores per token: `ids (N, k)` and log-probabilities `(N, k + 1)`, the last of all other tokens together.

    With k = V the tail is log 0 = -inf.
    """
    log_p = F.log_softmax(teacher_logits.float(), dim=-1)
    top, ids = log_p.topk(k, dim=-1)
    tail = torch.log1p(-top.exp().sum(-1, keepdim=True).clamp(max=1.0))
    return ids, torch.cat([top, tail], dim=-1)


def truncated_distill_loss(ids: Tensor, target_log_p: Tensor, student_logits: Tensor, weights: Tensor) -> Tensor:
    """KL over k tokens and one tail bucket, both sides normalised over the whole vocabulary: at most the dense KL, equal to it at k = V.

    `ids (N, k)`, `target_log_p (N, k + 1)`, `student_logits (N, V)`, `weights (N,)` -> scalar sum.
    """
    log_q = F.log_softmax(student_logits, dim=-1)
    top = log_q.gather(-1, ids)
    rest = torch.ones_like(log_q, dtype=torch.bool).scatter(-1, ids, False)
    tail = log_q.masked_fill(~rest, float("-inf")).logsumexp(-1, keepdim=True) if ids.shape[-1] < log_q.shape[-1] else top[:, :1].detach()
    log_q = torch.cat([top, tail], dim=-1)
    p = target_log_p.exp()
    kl = torch.where(p > 0, p * (target_log_p - log_q), 0.0).sum(-1)
    return (kl * weights).sum()


def align_loss(fast: Tensor, slow: Tensor, weights: Tensor) -> Tensor:
    """Squared distance of the fast stream to the slow one, relative to the slow one's size: `fast, slow (N, E)`, `weights (N,)` -> sum."""
    slow = slow.detach()
    return ((fast - slow).square().mean(-1) / slow.square().mean(-1).clamp(min=1e-6) * weights).sum()
