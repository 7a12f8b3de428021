"""Dense attention: whole prefixes, chunks of queries with a mask, one query, and bf16 by hand where a CPU has units for it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.blockwise.by_index import dense_by_index, indexable
from kernels.blockwise.common import compute, has_bf16_products, has_bf16_sdpa, own_columns, sdpa, zero_padding, zero_unseen
from kernels.spec import AttentionPlan

MASK_ELEMENTS = 1 << 22  # most (T x S) mask entries per row alive at once in a chunk of dense attention
CACHED_MASK_ELEMENTS = 1 << 26  # masks of a plan are kept for the next layer up to this size
RISING_QUERIES = 128  # queries per chunk of dense attention in bf16: their scores stay in the cache
RISING_SCORES = 5 << 19  # most scores of theirs that are computed at once, by KV heads, for the same reason
RISING_QUERIES_SDPA = 512  # the same where SDPA computes them
DOCUMENT_QUERIES = 144  # queries per chunk of dense attention over packed documents


def dense_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    if plan.max_pos < 0:
        return zero_padding(q, plan)
    dtype = q.dtype
    if plan.rises and q.shape[1] > 1 and has_bf16_products(q, k, v):
        return rising_in_bf16(q, k, v, plan.cached("rising", lambda: rising_chunks(plan.q_pos[0])))
    if plan.q_pos.numel() == 1 and not plan.has_docs:  # decode of one sequence sees a slice
        k, v = k[:, : plan.max_pos + 1], v[:, : plan.max_pos + 1]
        if has_bf16_products(q, k, v):
            return _one_query_in_bf16(q, k, v)
        return sdpa(compute(q), compute(k), compute(v)).to(dtype)
    q, k, v = compute(q), compute(k), compute(v)
    if plan.is_prefix:
        return sdpa(q, k, v, is_causal=True).to(dtype)
    if q.shape[1] == 1 and indexable(q, k, v):
        return dense_by_index(q, k, v, plan).to(dtype)
    k, v = zero_unseen(k, v, plan)
    q = zero_padding(q, plan)
    out = [sdpa(q[:, t0:t1], k[:, lo:hi], v[:, lo:hi], _chunk_mask(plan, t0, t1, lo, hi)) for t0, t1, lo, hi in _chunks(plan)]
    return zero_padding(torch.cat(out, 1) if len(out) > 1 else out[0], plan).to(dtype)


def rising_chunks(q_pos: Tensor) -> list[tuple[slice, int, Tensor | None]]:
    """Chunks of queries at rising positions q_pos (T,): which ones, the last key that one of them sees, and a bias in bf16 for keys up to it, -inf where
    a query does not see it; earlier keys than it has columns are seen by all. Where SDPA computes them, neighbours are one chunk without a bias."""
    by_sdpa = has_bf16_sdpa()
    if by_sdpa and bool((q_pos.diff() == 1).all()):
        return [(slice(0, len(q_pos)), int(q_pos[-1]), None)]
    chunks, size = [], RISING_QUERIES_SDPA if by_sdpa else RISING_QUERIES
    for t0 in range(0, len(q_pos), size):
        pos = q_pos[t0 : t0 + size]
        later = torch.arange(int(pos[0]) + 1, int(pos[-1]) + 1, device=pos.device) > pos[:, None]
        bias = torch.zeros(later.shape, dtype=torch.bfloat16, device=pos.device).masked_fill_(later, float("-inf"))
        chunks.append((slice(t0, t0 + len(pos)), int(pos[-1]), bias))
    return chunks


def rising_in_bf16(q: Tensor, k: Tensor, v: Tensor, chunks: list[tuple[slice, int, Tensor | None]]) -> Tensor:
    """Causal attention of q (B, T, H, D) over k, v (B, S, Hk, D) in bf16: two products and a softmax for each chunk of queries, or SDPA."""
    if has_bf16_sdpa():
        return torch.cat([_chunk_by_sdpa(q[:, part], k[:, : last + 1], v[:, : last + 1], bias) for part, last, bias in chunks], 1)
    B, T, H, D = q.shape
    Hk, S = k.shape[2], chunks[-1][1] + 1
    G = H // Hk
    qg = (q * D**-0.5).view(B, T, Hk, G, D).permute(0, 2, 3, 1, 4).reshape(B * Hk, G, T, D)
    k = k[:, :S].permute(0, 2, 3, 1).reshape(B * Hk, D, S)
    v = v[:, :S].transpose(1, 2).reshape(B * Hk, S, D)
    out = torch.empty_like(qg)
    for part, last, bias in chunks:
        n, width = bias.shape
        n_heads = max(1, RISING_SCORES // (G * n * (last + 1)))
        for some in (slice(i, i + n_heads) for i in range(0, B * Hk, n_heads)):
            scores = torch.bmm(qg[some, :, part].reshape(-1, G * n, D), k[some, :, : last + 1])  # (heads, G * n, last + 1)
            scores.view(-1, G, n, last + 1)[..., last + 1 - width :] += bias
            out[some, :, part] = torch.bmm(scores.softmax(-1), v[some, : last + 1]).view(-1, G, n, D)
    return out.view(B, Hk, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def _chunk_by_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """A chunk of `rising_chunks`, over the keys up to its last. Masks take SDPA half as long again: neighbours (no bias) go without, in two calls, over
    what lies before the first of them and, causally, from there on, which are mixed by the sums of their weights."""
    if bias is not None:
        return sdpa(q, k, v, F.pad(bias, (k.shape[1] - bias.shape[1], 0))[None, None])
    B, T, H, D = q.shape
    Hk, n = k.shape[2], k.shape[1] - T
    q = q.unflatten(2, (Hk, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (B * Hk, G, T, D)
    k, v = (x.transpose(1, 2).reshape(B * Hk, 1, n + T, D) for x in (k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # SDPA's, with the logarithm of the sum of weights, (B * Hk, G, T)
    out, log_sum = flash(q, *(x[:, :, n:].expand(-1, H // Hk, -1, -1) for x in (k, v)), is_causal=True)
    if n:  # without a mask the heads of a group are so many queries more: the more at once, the less each costs
        before, log_sum_before = (x.view(out.shape[:3] + x.shape[3:]) for x in flash(q.reshape(B * Hk, 1, -1, D), k[:, :, :n], v[:, :, :n]))
        out = torch.lerp(out.float(), before.float(), torch.sigmoid(log_sum_before - log_sum)[..., None]).to(q.dtype)
    return out.view(B, Hk, H // Hk, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def _one_query_in_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query q (1, 1, H, D) over all of k, v (1, S, Hk, D), by two products that read keys and values as they lie, once, and copy nothing."""
    _, _, H, D = q.shape
    Hk = k.shape[2]
    if any(x.stride()[1:] != (Hk * D, D, 1) for x in (k, v)):  # as in a cache, where a head's tokens lie side by side
        p = torch.bmm((q * D**-0.5).view(Hk, H // Hk, D), k[0].permute(1, 2, 0)).softmax(-1)  # (Hk, G, S)
        return torch.bmm(p, v[0].transpose(0, 1)).view(q.shape)
    p = (own_columns(q * D**-0.5, Hk) @ k[0].flatten(1).t()).softmax(-1)
    out = (p @ v[0].flatten(1)).view(Hk, H // Hk, Hk, D)
    return out.diagonal(dim1=0, dim2=2).permute(2, 0, 1).reshape(1, 1, H, D)


def _chunks(plan: AttentionPlan) -> list[tuple[int, int, int, int]]:
    """Chunks of queries and the keys each may see: (t0, t1, lo, hi), half-open."""

    def build() -> list[tuple[int, int, int, int]]:
        T, S = plan.q_pos.shape[1], plan.max_pos + 1
        size = min(T, max(64, MASK_ELEMENTS // max(S, 1)))
        if plan.has_docs:  # no query sees its whole row: the keys that no query of a chunk sees are left out
            size = min(size, DOCUMENT_QUERIES)
        starts = range(0, T, size)
        lows, highs = [], []
        for t in starts:
            pos, start = plan.q_pos[:, t : t + size], plan.doc_start[:, t : t + size]
            lows.append(start.masked_fill(pos < 0, plan.n_keys).min())
            highs.append(pos.max())
        bounds = torch.stack(lows + highs).tolist()
        n = len(starts)
        # a chunk of padding alone sees nothing: it gets one (zeroed or visible) key, and its output is set to zero
        return [(t, min(t + size, T), *((lo, hi + 1) if hi >= 0 else (0, 1))) for t, lo, hi in zip(starts, bounds[:n], bounds[n:], strict=True)]

    return plan.cached("chunks", build)


def _chunk_mask(plan: AttentionPlan, t0: int, t1: int, lo: int, hi: int) -> Tensor:
    """mask (B, 1, t1 - t0, hi - lo); a padding query is given all keys, so that its softmax is finite."""

    def build() -> Tensor:
        s = torch.arange(lo, hi, device=plan.q_pos.device)
        pos, start = plan.q_pos[:, t0:t1, None], plan.doc_start[:, t0:t1, None]
        mask = (s <= pos) & (s >= start)
        return ((mask | (pos < 0)) if plan.has_padding else mask).unsqueeze(1)

    if plan.q_pos.numel() * plan.n_keys <= CACHED_MASK_ELEMENTS:
        return plan.cached(("mask", t0), build)
    return build()
