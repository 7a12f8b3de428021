"""The definition of every attention op: fp32, mask-based, one screen each.

`ops.py` and the tests call it. It materialises (B, T, Hk, S) masks, so it is for reading and for checking, not for speed.
Arithmetic is fp32 (fp64 stays fp64, for gradient checks); results come back in q's dtype.
"""

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from kernels.spec import AttentionPlan, SparseSpec


def upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pool_keys(k: Tensor, block_size: int) -> Tensor:
    """Mean of each complete block: k (B, S, Hk, D) -> (B, S // block_size, Hk, D), in fp32."""
    whole = k.shape[1] // block_size * block_size
    return reduce(upcast(k[:, :whole]), "b (n s) hk d -> b n hk d", "mean", s=block_size)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of q (B, T, H, D) over the keys that mask (B, T, Hk, S) allows; zero where it allows none."""
    unseen = rearrange(~mask.any(1), "b hk s -> b s hk 1")  # 0 * NaN is NaN, so what nobody reads is zeroed
    k, v = upcast(k).masked_fill(unseen, 0), upcast(v).masked_fill(unseen, 0)
    qg = rearrange(upcast(q), "b t (hk g) d -> b t hk g d", hk=k.shape[2])  # query head h reads KV head h // g
    scores = einsum(qg, k, "b t hk g d, b s hk d -> b t hk g s") * q.shape[-1] ** -0.5
    mask = mask.unsqueeze(3)
    p = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask  # finite fill: no NaN in empty rows
    return rearrange(einsum(p, v, "b t hk g s, b s hk d -> b t hk g d"), "b t hk g d -> b t (hk g) d").to(q.dtype)


def visible_keys(plan: AttentionPlan) -> Tensor:
    """visible[b, t, s]: key s is in [doc_start, q_pos] of query t; all False for padding."""
    s = torch.arange(plan.n_keys, device=plan.q_pos.device)
    return (s <= plan.q_pos.unsqueeze(-1)) & (s >= plan.doc_start.unsqueeze(-1))


def dense_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Attention of q (B, T, H, D) over every visible key of k, v (B, S, Hk, D)."""
    mask = visible_keys(plan).unsqueeze(2).expand(-1, -1, k.shape[2], -1)
    return attend(q, k, v, mask)


def selectable_blocks(plan: AttentionPlan, spec: SparseSpec, n_blocks: int) -> Tensor:
    """selectable[b, t, n]: block n is complete at q_pos, in the document, and not wholly inside window or sinks.

    Queries below dense_len read everything and choose nothing.
    """
    q_pos, doc_start = plan.q_pos.unsqueeze(-1), plan.doc_start.unsqueeze(-1)
    start = torch.arange(n_blocks, device=q_pos.device) * spec.block_size
    end = start + spec.block_size
    complete = (end <= q_pos + 1) & (start >= doc_start)
    in_window = start > q_pos - spec.window
    in_sinks = end <= doc_start + spec.n_sinks
    return complete & ~in_window & ~in_sinks & (q_pos - doc_start >= spec.dense_len)


def block_scores(q: Tensor, pooled: Tensor) -> Tensor:
    """scores[b, t, hk, n] = (sum of the group's queries) . pooled[b, n, hk].  The sum comes first: one product per group."""
    q_sum = reduce(upcast(q), "b t (hk g) d -> b t hk d", "sum", hk=pooled.shape[2])
    return einsum(q_sum, upcast(pooled), "b t hk d, b n hk d -> b t hk n")


def select_blocks(q: Tensor, pooled: Tensor, plan: AttentionPlan, spec: SparseSpec) -> Tensor:
    """block_ids (B, T, Hk, M): ascending ids of the M best selectable blocks (ties: lower id), -1 = unused, at the end."""
    N, M = pooled.shape[1], spec.n_selected_blocks
    selectable = selectable_blocks(plan, spec, N).unsqueeze(2)
    scores = block_scores(q.detach(), pooled.detach()).masked_fill(~selectable, float("-inf"))
    ids = scores.sort(dim=-1, descending=True, stable=True).indices[..., :M]
    ids = ids.masked_fill(~selectable.expand_as(scores).gather(-1, ids), N).sort(dim=-1).values  # N sorts unused ids last
    ids = torch.nn.functional.pad(ids, (0, M - ids.shape[-1]), value=N)
    return ids.masked_fill(ids == N, -1)


def sparse_mask(block_ids: Tensor, plan: AttentionPlan, spec: SparseSpec) -> Tensor:
    """mask[b, t, hk, s]: key s is read by query t: dense below dense_len, else sinks | window | chosen blocks."""
    B, T, Hk, M = block_ids.shape
    s = torch.arange(plan.n_keys, device=block_ids.device)
    q_pos, doc_start = plan.q_pos.unsqueeze(-1), plan.doc_start.unsqueeze(-1)
    everywhere = (q_pos - doc_start < spec.dense_len) | (s < doc_start + spec.n_sinks) | (s > q_pos - spec.window)
    n_blocks = -(-plan.n_keys // spec.block_size)
    chosen = torch.zeros(B, T, Hk, n_blocks + 1, dtype=torch.bool, device=s.device)  # the last column takes the -1s
    chosen.scatter_(-1, torch.where(block_ids < 0, n_blocks, block_ids), True)
    chosen = chosen[..., s // spec.block_size]
    return (everywhere.unsqueeze(2) | chosen) & visible_keys(plan).unsqueeze(2)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, pooled: Tensor | None = None) -> Tensor:
    """Attention over sinks, window and chosen blocks; the choice is not differentiated."""
    pooled = pool_keys(k, spec.block_size) if pooled is None else pooled
    return attend(q, k, v, sparse_mask(select_blocks(q, pooled, plan, spec), plan, spec))
