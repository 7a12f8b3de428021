"""Sparse attention: which way is taken, and the two ways of small calls."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.blockwise.by_index import fits, indexable, sparse_by_index
from kernels.blockwise.by_row import by_row
from kernels.blockwise.common import compute, has_bf16_products, zero_padding, zero_unseen
from kernels.blockwise.dense import dense_attention
from kernels.blockwise.select import select_blocks, window_and_sinks
from kernels.reference import pool_keys
from kernels.spec import AttentionPlan, SparseSpec

MASKED_ELEMENTS = 1 << 19  # rows with T * S up to this take the masked way
FEW_QUERIES = 24  # calls with up to this many queries per row go by index or gather


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, pooled: Tensor | None = None) -> Tensor:
    B, T, H, D = q.shape
    if plan.all_dense(spec.dense_len):
        return dense_attention(q, k, v, plan)
    if T > FEW_QUERIES and (T * (plan.max_pos + 1) > MASKED_ELEMENTS or has_bf16_products(q, k, v)):
        return by_row(q, k, v, plan, spec, pooled)
    if pooled is None:
        pooled = pool_keys(k.detach(), spec.block_size)
    if T <= FEW_QUERIES and indexable(q, k, v) and fits(k, spec):
        return sparse_by_index(q, k, v, plan, spec, pooled)
    block_ids = select_blocks(q, pooled, plan, spec)
    way = _gathered if T <= FEW_QUERIES else _masked
    return way(compute(q), compute(k) if way is _masked else k, compute(v) if way is _masked else v, plan, spec, block_ids).to(q.dtype)


def _masked(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, block_ids: Tensor) -> Tensor:
    B, T, H, D = q.shape
    Hk = k.shape[2]
    G = H // Hk
    mask = reference.sparse_mask(block_ids, plan, spec)  # (B, T, Hk, S)
    k, v = zero_unseen(k, v, plan)
    S = k.shape[1]
    mask = mask[..., :S]
    if plan.has_padding:
        mask = mask | (plan.q_pos < 0)[:, :, None, None]
    mask = mask.permute(0, 2, 1, 3).reshape(B * Hk, 1, T, S).expand(-1, G, -1, -1)
    qg = zero_padding(q, plan).reshape(B, T, Hk, G, D).permute(0, 2, 3, 1, 4).reshape(B * Hk, G, T, D)
    kg, vg = (x.transpose(1, 2).reshape(B * Hk, 1, S, D).expand(-1, G, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(qg, kg, vg, attn_mask=mask)
    out = out.reshape(B, Hk, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
    return zero_padding(out, plan)


def _gathered(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, block_ids: Tensor) -> Tensor:
    """Each query gathers exactly the keys it reads (a masked entry gathers the query's own key instead)."""
    B, T, H, D = q.shape
    Hk, M = block_ids.shape[2:]
    window, keys, keep = plan.cached(("gathered", spec), lambda: window_and_sinks(plan, spec))
    bs = spec.block_size
    own = plan.q_pos.clamp(min=0)[:, :, None, None]
    # chosen[b, t, hk, i]: i-th key of the chosen blocks; those in the window or the sinks are read there
    chosen = (block_ids[..., None] * bs + torch.arange(bs, device=q.device)).flatten(3)
    before_window = chosen <= plan.q_pos[:, :, None, None] - spec.window
    after_sinks = chosen >= plan.doc_start[:, :, None, None] + spec.n_sinks
    chosen_keep = before_window & after_sinks & (chosen >= 0)
    keys = torch.cat([keys.expand(-1, -1, Hk, -1), chosen], -1)
    keep = torch.cat([keep.expand(-1, -1, Hk, -1), chosen_keep], -1)  # (B, T, Hk, L)
    keys = torch.where(keep, keys, own)
    rows = torch.arange(B, device=q.device)[:, None, None, None]
    heads = torch.arange(Hk, device=q.device)[:, None]
    k_read, v_read = compute(k[rows, keys, heads]), compute(v[rows, keys, heads])  # (B, T, Hk, L, D)
    if plan.has_padding:  # a row of padding may hold nothing valid at all
        pad = (plan.q_pos < 0)[:, :, None, None, None]
        k_read, v_read = k_read.masked_fill(pad, 0), v_read.masked_fill(pad, 0)
        keep = keep | pad[..., 0]
    qg = zero_padding(q, plan).reshape(B, T, Hk, H // Hk, D) * D**-0.5
    scores = (qg @ k_read.transpose(-1, -2)).masked_fill(~keep.unsqueeze(3), float("-inf"))
    p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v_read.dtype)
    return zero_padding((p @ v_read).reshape(B, T, H, D), plan)
