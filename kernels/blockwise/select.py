"""Which blocks and other keys a query reads: block selection and the part that does not depend on scores."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import upcast
from kernels.spec import AttentionPlan, SparseSpec

CHUNK_ELEMENTS = 1 << 22  # block scores in memory at once; 16 MiB fp32, small enough that malloc reuses it
SORTED_SCORES = 1 << 12  # so few block scores are sorted whole: one operator instead of the seven of a topk with ties
TOPK_LENGTH = 384  # rows of block scores this long are searched in two steps


def select_blocks(q: Tensor, pooled: Tensor, plan: AttentionPlan, spec: SparseSpec) -> Tensor:
    B, T, H, D = q.shape
    Hk = pooled.shape[2]
    N = min(pooled.shape[1], (plan.max_pos + 1) // spec.block_size)
    q_sum = upcast(q.detach()).reshape(B, T, Hk, H // Hk, D).sum(3)
    pooled = upcast(pooled.detach()[:, :N])
    size = max(1, CHUNK_ELEMENTS // max(1, B * Hk * N))
    ids = []
    for t in range(0, T, size):
        scores = torch.einsum("btkd,bnkd->btkn", q_sum[:, t : t + size], pooled)
        pos, start = plan.q_pos[:, t : t + size, None], plan.doc_start[:, t : t + size, None]
        ids.append(_best_blocks(scores, pos, start, spec))
    return torch.cat(ids, 1) if len(ids) > 1 else ids[0]


def _best_blocks(scores: Tensor, q_pos: Tensor, doc_start: Tensor, spec: SparseSpec) -> Tensor:
    """block_ids (B, T, Hk, M) from scores (B, T, Hk, N); overwrites scores. q_pos, doc_start (B, T, 1)."""
    N, M = scores.shape[-1], spec.n_selected_blocks
    if N == 0 or M == 0:
        return torch.full((*scores.shape[:-1], M), -1, dtype=torch.int64, device=scores.device)
    first, stop = selectable_range(q_pos, doc_start, spec)
    n = torch.arange(N, device=scores.device)
    scores.masked_fill_(((n < first) | (n >= stop)).unsqueeze(2), float("-inf"))
    values, ids = best_scores(scores, M)
    ids = torch.sort(ids.masked_fill(values == float("-inf"), N), dim=-1).values
    ids = ids.masked_fill_(ids == N, -1)
    return F.pad(ids, (0, M - ids.shape[-1]), value=-1)


def best_scores(scores: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the M best along the last axis of scores (..., N), all of them if N <= M; ties go to the lower id."""
    if scores.is_cuda or scores.shape[-1] <= M or scores.numel() <= SORTED_SCORES:
        values, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    else:
        values, ids = _topk(scores, M + 1)
        tied = (values[..., M - 1] == values[..., M]) & (values[..., M] > float("-inf"))  # topk breaks ties at will
        if tied.any():
            ids[tied] = torch.sort(scores[tied], dim=-1, descending=True, stable=True).indices[..., : M + 1]
    return values[..., :M], ids[..., :M]


def _topk(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`scores.topk(n)`. Long rows are first cut to the n best of N / 4 groups by their maxima: whatever ranks above n lies in those."""
    N = scores.shape[-1]
    if N < TOPK_LENGTH:
        return scores.topk(n, dim=-1)
    scores = F.pad(scores, (0, -N % 4), value=float("-inf")) if N % 4 else scores
    groups = scores.unflatten(-1, (4, -1))  # group j holds entries j, j + W, j + 2 W, j + 3 W: its maximum is taken in whole vectors
    group = _topk(groups.amax(-2), n)[1]
    values, i = groups.gather(-1, group.unsqueeze(-2).expand(*group.shape[:-1], 4, n)).flatten(-2).topk(n, dim=-1)
    return values, group.gather(-1, i % n) + i // n * groups.shape[-1]


def selectable_range(q_pos: Tensor, doc_start: Tensor, spec: SparseSpec) -> tuple[Tensor, Tensor]:
    """Selectable blocks are one range [first, stop): after the sinks' whole blocks, before the first one wholly in the window."""
    bs = spec.block_size
    first = (doc_start + bs - 1) // bs
    first = torch.maximum(first, (doc_start + spec.n_sinks) // bs)  # block n ends in the sinks iff n < this
    stop = torch.minimum((q_pos + 1) // bs, (q_pos - spec.window).div(bs, rounding_mode="floor") + 1)
    return first, torch.where(q_pos - doc_start >= spec.dense_len, stop, 0)


def window_and_sinks(plan: AttentionPlan, spec: SparseSpec) -> tuple[int, Tensor, Tensor]:
    """The keys a query reads whatever it chooses, and which of them count: (L, keys (B, T, 1, L), keep (B, T, 1, L))."""
    device = plan.q_pos.device
    q_pos, doc_start = plan.q_pos.unsqueeze(-1), plan.doc_start.unsqueeze(-1)
    sinks = doc_start + torch.arange(min(spec.n_sinks, plan.n_keys), device=device)
    window = q_pos - torch.arange(min(spec.window, plan.n_keys), device=device)
    keys = torch.cat([sinks, window], -1)
    keep = torch.cat([sinks <= q_pos - spec.window, window >= doc_start], -1)
    if plan.any_dense(spec.dense_len):  # dense queries read the same table from their document's start
        L = max(keys.shape[-1], min(spec.dense_len, plan.n_keys))
        keys, keep = F.pad(keys, (0, L - keys.shape[-1])), F.pad(keep, (0, L - keep.shape[-1]))
        dense_keys = doc_start + torch.arange(L, device=device)
        is_dense = q_pos - doc_start < spec.dense_len
        keys, keep = torch.where(is_dense, dense_keys, keys), torch.where(is_dense, dense_keys <= q_pos, keep)
    return keys.shape[-1], keys.unsqueeze(2), (keep & (q_pos >= 0).expand_as(keep)).unsqueeze(2)
