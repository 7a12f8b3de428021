"""Distillation losses. Each returns a weighted *sum* over tokens; the caller divides once by the weight of the whole batch, over all
micro-batches and ranks, so that no split of the batch changes the gradient.

Logits of a large vocabulary never exist for all tokens at once: `by_tokens` computes what is wanted of them some tokens at a time, and
`token_loss` a loss with its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Logits (tokens times vocabulary) held at once: 24 MiB in fp32, of which a CPU's cache keeps much from one operator to the next.
LOGITS_AT_ONCE = 3 * 2**21


def token_slices(n_tokens: int, vocab_size: int) -> list[slice]:
    """`[0, n_tokens)` in slices whose logits may exist at once; at least one."""
    n = max(1, LOGITS_AT_ONCE // vocab_size)
    return [slice(i, i + n) for i in range(0, n_tokens, n)] or [slice(0, 0)]


def by_tokens(function: Callable[..., Tensor], vocab_size: int, *columns: Tensor) -> Tensor:
    """`function(*columns)` for `columns (N, ...)`, computed in slices of tokens: its results `(N, ...)`. For use without gradients."""
    return torch.cat([function(*(c[part] for c in columns)) for part in token_slices(len(columns[0]), vocab_size)])


def token_loss(
    loss: Callable[..., dict[str, Tensor]], vocab_size: int, hidden: Tensor, columns: Sequence[Tensor], params: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """`loss(hidden, *columns)`, sums over tokens by name, whose gradient flows to `hidden (N, E)` and to those of `params` (the head's) that want it.

    Where the logits of all tokens would be too many, the loss is computed in slices, each with its gradient at once, so that nothing of it is
    kept but one `(N, E)` tensor and nothing is computed twice. The sum of all values then carries the gradient; single ones are for the log.
    """
    slices = token_slices(len(hidden), vocab_size)
    if len(slices) == 1:
        return loss(hidden, *columns)
    values: dict[str, Tensor] = {}
    total = _SlicedLoss.apply(loss, slices, columns, values, hidden, *params)
    first, *rest = values
    return {first: total - sum(values[name] for name in rest)} | {name: values[name] for name in rest}


class _SlicedLoss(torch.autograd.Function):
    """The sum of a loss over slices of tokens; its gradient is computed with it. Fills `values` with the sums by name."""

    @staticmethod
    def forward(ctx, loss, slices: list[slice], columns: Sequence[Tensor], values: dict[str, Tensor], hidden: Tensor, *params: Tensor) -> Tensor:
        wanted = [p for p, needed in zip(params, ctx.needs_input_grad[5:], strict=True) if needed]
        grads = [torch.zeros_like(p) for p in wanted]
        grad_hidden = torch.empty_like(hidden)
        for part in slices:
            with torch.enable_grad():
                x = hidden[part].detach().requires_grad_()
                found = loss(x, *(c[part] for c in columns))
                partial = torch.autograd.grad(sum(found.values()), [x, *wanted])
            grad_hidden[part] = partial[0]
            for grad, more in zip(grads, partial[1:], strict=True):
                grad += more
            for name, value in found.items():
                values[name] = values.get(name, 0.0) + value.detach()
        ctx.save_for_backward(grad_hidden, *grads)
        return sum(values.values())

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        grad_hidden, *grads = (g * grad_total for g in ctx.saved_tensors)
        of_params = [grads.pop(0) if needed else None for needed in ctx.needs_input_grad[5:]]
        return None, None, None, None, grad_hidden, *of_params


def hard_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy against `targets (N,)`: `logits (N, V)`, `weights (N,)` -> scalar sum, nats."""
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def token_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per token `(N,)`, times T^2 so that its gradient keeps its size as T grows (Hinton et al. 2015, eq. 4).

    As T goes to infinity it tends to `|z_t - z_s|^2 / (2 V)` over centred logits. Raises ValueError for unequal vocabularies.
    """
    check_vocabularies(teacher_logits, student_logits)
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2


def check_vocabularies(teacher_logits: Tensor, student_logits: Tensor) -> None:
    """Raises ValueError for unequal ones."""
    if teacher_logits.shape[-1] != student_logits.shape[-1]:
        raise ValueError(f"teacher has {teacher_logits.shape[-1]} logits and student {student_logits.shape[-1]}: they must share one tokenizer")


def distill_loss(teacher_logits: Tensor, student_logits: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """Weighted sum of `token_kl`; zero when student equals teacher. Its gradient flows to the student alone."""
    check_vocabularies(teacher_logits, student_logits)
    return _DistillLoss.apply(teacher_logits, student_logits, weights, temperature)


class _DistillLoss(torch.autograd.Function):
    """`token_kl`, summed, with its gradient `(q - p) * T * weights` computed at once: a third of autograd's passes over the vocabulary."""

    @staticmethod
    def forward(ctx, teacher_logits: Tensor, student_logits: Tensor, weights: Tensor, temperature: float) -> Tensor:
        teacher, student = (z if temperature == 1.0 else z / temperature for z in (teacher_logits, student_logits))
        p, q = teacher.softmax(-1), student.softmax(-1)
        log_z = [z.amax(-1) - probabilities.amax(-1).log() for z, probabilities in ((teacher, p), (student, q))]
        kl = (torch.linalg.vecdot(p, teacher - student) - log_z[0] + log_z[1]) * temperature**2
        ctx.save_for_backward(q.sub_(p).mul_(temperature * weights[:, None]))
        return (kl * weights).sum()

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        return None, ctx.saved_tensors[0] * grad_loss, None, None


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
