"""The fast plain-PyTorch attention: same results as `reference.py`, memory linear in T. Called by `ops.py` only.

Ways through, chosen by shape alone:
- dense: `is_causal` SDPA for a whole prefix, otherwise masked SDPA in chunks of queries;
- masked: sparse with a mask per KV head, for rows so short that a mask costs less than gathering;
- by index: each query names the rows of the key table it reads, and nothing is copied; for decode on a CPU, dense and sparse;
- gathered: the same with copies of what is read; for decode elsewhere, and where gradients are wanted;
- by row (`_by_row`): prefill of longer rows. Queries that see few keys use a mask over just those keys; the rest meet
  only the blocks they read.
Arguments are checked already. bf16 on a CPU is computed in fp32, which is far faster there, but for products of whole prefixes and with masks where the
CPU has units for bf16.
"""

import warnings
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import reference
from kernels.backend import has_bf16_units
from kernels.reference import pool_keys, upcast
from kernels.spec import AttentionPlan, SparseSpec

MASK_ELEMENTS = 1 << 22  # most (T x S) mask entries per row alive at once in a chunk of dense attention
CACHED_MASK_ELEMENTS = 1 << 26  # masks of a plan are kept for the next layer up to this size
MASKED_ELEMENTS = 1 << 19  # rows with T * S up to this take the masked way
MASKED_RATIO = 3  # in the by-row way, a mask beats turning round until a query sees this many times the keys it reads
MASKED_RATIO_BF16 = 8  # the same where masked products are in bf16 and the others are not
MASKED_QUERIES = 128  # queries per mask there: small, so that keys after them are trimmed off
SELECT_QUERIES = 256  # queries that choose blocks at once: their scores stay in the cache
CHUNK_QUERIES = 1024  # sparse queries that are turned round at once: the more, the more of them meet in a block
BAND_QUERIES = 512  # of which so many at once have all of their scores in memory
GATHERED_ELEMENTS = 1 << 18
DENSE_QUERIES = 1024
RISING_QUERIES = 64  # queries per chunk of dense attention in bf16: their scores stay in the cache
RISING_QUERIES_SDPA = 512  # the same where SDPA computes them
DOCUMENT_QUERIES = 144  # queries per chunk of dense attention over packed documents
FEW_QUERIES = 16  # calls with up to this many queries per row go by index or gather
SORTED_SCORES = 1 << 12  # so few block scores are sorted whole: one operator instead of the seven of a topk with ties
TOPK_LENGTH = 384  # rows of block scores this long are searched in two steps
CHUNK_ELEMENTS = 1 << 22  # elements of the largest buffer in the tiled way; 16 MiB fp32, small enough that malloc reuses it
BAND_TILE = 64


def _compute(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x


def _zero_unseen(k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """k, v cut to the last visible key, with what no query of a row sees set to zero (it may be NaN, and 0 * NaN is NaN)."""
    n = max(plan.max_pos + 1, 1)
    k, v = k[:, :n], v[:, :n]

    def starts() -> Tensor:
        return plan.doc_start.masked_fill(plan.q_pos < 0, plan.n_keys).amin(1, keepdim=True)  # (B, 1) first key any query of the row sees

    first = plan.cached("row_first", lambda: starts().flatten().tolist() if plan.has_docs else [0])
    if min(plan.row_max) == n - 1 and max(first) == 0:
        return k, v

    def unseen() -> Tensor:
        s = torch.arange(n, device=k.device)
        return ((s > plan.q_pos.amax(1, keepdim=True)) | (s < starts()))[:, :, None, None]

    unseen = plan.cached("unseen", unseen)
    return k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)


def _zero_padding(x: Tensor, plan: AttentionPlan) -> Tensor:
    """x (B, T, H, D) with padding queries set to zero, their gradient too."""
    return x.masked_fill((plan.q_pos < 0)[:, :, None, None], 0) if plan.has_padding else x


# --- dense ---------------------------------------------------------------------------------------------------------


def dense_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    if plan.max_pos < 0:
        return _zero_padding(q, plan)
    dtype = q.dtype
    if plan.rises and q.shape[1] > 1 and _has_bf16_products(q, k, v):
        return _rising_in_bf16(q, k, v, plan.cached("rising", lambda: _rising_chunks(plan.q_pos[0])))
    if plan.q_pos.numel() == 1 and not plan.has_docs:  # decode of one sequence sees a slice
        k, v = k[:, : plan.max_pos + 1], v[:, : plan.max_pos + 1]
        if _has_bf16_products(q, k, v):
            return _one_query_in_bf16(q, k, v)
        return _sdpa(_compute(q), _compute(k), _compute(v)).to(dtype)
    q, k, v = _compute(q), _compute(k), _compute(v)
    if plan.is_prefix:
        return _sdpa(q, k, v, is_causal=True).to(dtype)
    if q.shape[1] == 1 and _indexable(q, k, v):
        return _dense_by_index(q, k, v, plan).to(dtype)
    k, v = _zero_unseen(k, v, plan)
    q = _zero_padding(q, plan)
    out = [_sdpa(q[:, t0:t1], k[:, lo:hi], v[:, lo:hi], _chunk_mask(plan, t0, t1, lo, hi)) for t0, t1, lo, hi in _chunks(plan)]
    return _zero_padding(torch.cat(out, 1) if len(out) > 1 else out[0], plan).to(dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """SDPA on token-major tensors; mask (B, 1, T, S)."""
    gqa = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)
    return out.transpose(1, 2)


def _has_bf16_products(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether to compute by hand: a CPU's SDPA makes no use of its units for bf16 (but for AMX), and products do. Without gradients."""
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and not trained and has_bf16_units(q.device)


@cache
def _has_bf16_sdpa() -> bool:
    """Whether this CPU's SDPA makes use of its units for bf16: it does of AMX, and then takes less time than two products and a softmax."""
    return torch.cpu._is_amx_tile_supported()


def _rising_chunks(q_pos: Tensor) -> list[tuple[slice, int, Tensor]]:
    """Chunks of queries at rising positions q_pos (T,): which ones, the last key that one of them sees, and a bias in bf16 for keys up to it, -inf where
    a query does not see it; earlier keys than it has columns are seen by all."""
    chunks, size = [], RISING_QUERIES_SDPA if _has_bf16_sdpa() else RISING_QUERIES
    for t0 in range(0, len(q_pos), size):
        pos = q_pos[t0 : t0 + size]
        later = torch.arange(int(pos[0]) + 1, int(pos[-1]) + 1, device=pos.device) > pos[:, None]
        bias = torch.zeros(later.shape, dtype=torch.bfloat16, device=pos.device).masked_fill_(later, float("-inf"))
        chunks.append((slice(t0, t0 + len(pos)), int(pos[-1]), bias))
    return chunks


def _rising_in_bf16(q: Tensor, k: Tensor, v: Tensor, chunks: list[tuple[slice, int, Tensor]]) -> Tensor:
    """Causal attention of q (B, T, H, D) over k, v (B, S, Hk, D) in bf16: two products and a softmax for each chunk of queries, or SDPA."""
    if _has_bf16_sdpa():
        masks = (F.pad(bias, (last + 1 - bias.shape[1], 0))[None, None] for _, last, bias in chunks)
        return torch.cat([_sdpa(q[:, part], k[:, : last + 1], v[:, : last + 1], mask) for (part, last, _), mask in zip(chunks, masks, strict=True)], 1)
    B, T, H, D = q.shape
    Hk, S = k.shape[2], chunks[-1][1] + 1
    G = H // Hk
    qg = (q * D**-0.5).view(B, T, Hk, G, D).permute(0, 2, 3, 1, 4).reshape(B * Hk, G, T, D)
    k = k[:, :S].permute(0, 2, 3, 1).reshape(B * Hk, D, S)
    v = v[:, :S].transpose(1, 2).reshape(B * Hk, S, D)
    out = torch.empty_like(qg)
    for part, last, bias in chunks:
        n, width = bias.shape
        scores = torch.bmm(qg[:, :, part].reshape(-1, G * n, D), k[:, :, : last + 1])  # (B * Hk, G * n, last + 1)
        scores.view(-1, G, n, last + 1)[..., last + 1 - width :] += bias
        out[:, :, part] = torch.bmm(scores.softmax(-1), v[:, : last + 1]).view(-1, G, n, D)
    return out.view(B, Hk, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def _one_query_in_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query q (1, 1, H, D) over all of k, v (1, S, Hk, D), by two products that read keys and values as they lie, once, and copy nothing."""
    _, _, H, D = q.shape
    Hk = k.shape[2]
    if any(x.stride()[1:] != (Hk * D, D, 1) for x in (k, v)):  # as in a cache, where a head's tokens lie side by side
        p = torch.bmm((q * D**-0.5).view(Hk, H // Hk, D), k[0].permute(1, 2, 0)).softmax(-1)  # (Hk, G, S)
        return torch.bmm(p, v[0].transpose(0, 1)).view(q.shape)
    own = torch.eye(Hk, dtype=q.dtype, device=q.device)[:, None, :, None]  # (Hk, 1, Hk, 1): each query head is a row that is zero but at its KV head
    rows = ((q * D**-0.5).view(Hk, H // Hk, 1, D) * own).view(H, Hk * D)
    p = (rows @ k[0].flatten(1).t()).softmax(-1)
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


# --- selection -----------------------------------------------------------------------------------------------------


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
    first, stop = _selectable_range(q_pos, doc_start, spec)
    n = torch.arange(N, device=scores.device)
    scores.masked_fill_(((n < first) | (n >= stop)).unsqueeze(2), float("-inf"))
    values, ids = _best(scores, M)
    ids = torch.sort(ids.masked_fill(values == float("-inf"), N), dim=-1).values
    ids = ids.masked_fill_(ids == N, -1)
    return F.pad(ids, (0, M - ids.shape[-1]), value=-1)


def _best(scores: Tensor, M: int) -> tuple[Tensor, Tensor]:
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


def _selectable_range(q_pos: Tensor, doc_start: Tensor, spec: SparseSpec) -> tuple[Tensor, Tensor]:
    """Selectable blocks are one range [first, stop): after the sinks' whole blocks, before the first one wholly in the window."""
    bs = spec.block_size
    first = (doc_start + bs - 1) // bs
    first = torch.maximum(first, (doc_start + spec.n_sinks) // bs)  # block n ends in the sinks iff n < this
    stop = torch.minimum((q_pos + 1) // bs, (q_pos - spec.window).div(bs, rounding_mode="floor") + 1)
    return first, torch.where(q_pos - doc_start >= spec.dense_len, stop, 0)


# --- sparse --------------------------------------------------------------------------------------------------------


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, pooled: Tensor | None = None) -> Tensor:
    B, T, H, D = q.shape
    if plan.all_dense(spec.dense_len):
        return dense_attention(q, k, v, plan)
    if T > FEW_QUERIES and (T * (plan.max_pos + 1) > MASKED_ELEMENTS or _has_bf16_products(q, k, v)):
        return _by_row(q, k, v, plan, spec, pooled)
    if pooled is None:
        pooled = pool_keys(k.detach(), spec.block_size)
    if T <= FEW_QUERIES and _indexable(q, k, v) and _fits(k, spec):
        return _sparse_by_index(q, k, v, plan, spec, pooled)
    block_ids = select_blocks(q, pooled, plan, spec)
    way = _gathered if T <= FEW_QUERIES else _masked
    return way(_compute(q), _compute(k) if way is _masked else k, _compute(v) if way is _masked else v, plan, spec, block_ids).to(q.dtype)


def _masked(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, block_ids: Tensor) -> Tensor:
    B, T, H, D = q.shape
    Hk = k.shape[2]
    G = H // Hk
    mask = reference.sparse_mask(block_ids, plan, spec)  # (B, T, Hk, S)
    k, v = _zero_unseen(k, v, plan)
    S = k.shape[1]
    mask = mask[..., :S]
    if plan.has_padding:
        mask = mask | (plan.q_pos < 0)[:, :, None, None]
    mask = mask.permute(0, 2, 1, 3).reshape(B * Hk, 1, T, S).expand(-1, G, -1, -1)
    qg = _zero_padding(q, plan).reshape(B, T, Hk, G, D).permute(0, 2, 3, 1, 4).reshape(B * Hk, G, T, D)
    kg, vg = (x.transpose(1, 2).reshape(B * Hk, 1, S, D).expand(-1, G, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(qg, kg, vg, attn_mask=mask)
    out = out.reshape(B, Hk, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
    return _zero_padding(out, plan)


def _gathered(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, block_ids: Tensor) -> Tensor:
    """Each query gathers exactly the keys it reads (a masked entry gathers the query's own key instead)."""
    B, T, H, D = q.shape
    Hk, M = block_ids.shape[2:]
    window, keys, keep = plan.cached(("gathered", spec), lambda: _window_and_sinks(plan, spec))
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
    k_read, v_read = _compute(k[rows, keys, heads]), _compute(v[rows, keys, heads])  # (B, T, Hk, L, D)
    if plan.has_padding:  # a row of padding may hold nothing valid at all
        pad = (plan.q_pos < 0)[:, :, None, None, None]
        k_read, v_read = k_read.masked_fill(pad, 0), v_read.masked_fill(pad, 0)
        keep = keep | pad[..., 0]
    qg = _zero_padding(q, plan).reshape(B, T, Hk, H // Hk, D) * D**-0.5
    scores = (qg @ k_read.transpose(-1, -2)).masked_fill(~keep.unsqueeze(3), float("-inf"))
    p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v_read.dtype)
    return _zero_padding((p @ v_read).reshape(B, T, H, D), plan)


def _window_and_sinks(plan: AttentionPlan, spec: SparseSpec) -> tuple[int, Tensor, Tensor]:
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


# --- by index ------------------------------------------------------------------------------------------------------
# Keys are seen as a table (R, D) of one row per token and KV head, and a query as a list of row numbers. Scores are a sampled
# product (only the named entries of q @ table.T), the weighted sum is an embedding bag. Rows of a batch may differ in length and
# queries may be any few of them: only what is read costs anything.


def _indexable(q: Tensor, k: Tensor, v: Tensor) -> bool:
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    plain = q.device.type == "cpu" and q.dtype == torch.float32 and not trained
    return (plain or _has_bf16_products(q, k, v)) and k.stride() == v.stride() and k.stride(3) == 1 and not any(s % k.shape[3] for s in k.stride()[:3])


def _fits(k: Tensor, spec: SparseSpec) -> bool:
    """Whether a query's list is no longer than the table: PyTorch drops entries of a sparse row that has more of them than columns."""
    longest = max(spec.n_sinks + spec.window, spec.dense_len) + spec.n_selected_blocks * spec.block_size
    return longest <= k.shape[1] * k.shape[2]


def _table(x: Tensor) -> Tensor:
    """x (B, S, Hk, D), maybe a slice of a longer cache, heads or tokens side by side, as (R, D): token s of row b, head hk, is row
    `_row_starts(x)[b] + s * _step(x) + _heads(x)[hk]`."""
    D = x.shape[3]
    return x.as_strided((sum((n - 1) * (s // D) for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)) + 1, D), (D, 1))


def _row_starts(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) * (x.stride(0) // x.shape[3])


def _step(x: Tensor) -> int:
    """Rows of `_table(x)` from a token to the next."""
    return x.stride(1) // x.shape[3]


def _heads(x: Tensor) -> Tensor:
    """(Hk, 1): rows of `_table(x)` from head 0 to each."""
    return (torch.arange(x.shape[2], device=x.device) * (x.stride(2) // x.shape[3]))[:, None]


def _valid(plan: AttentionPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The n queries that are not padding: flat index b * T + t, row b, q_pos, doc_start, each (n,)."""

    def build() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q_pos, doc_start = plan.q_pos.flatten(), plan.doc_start.flatten()
        index = torch.arange(q_pos.numel(), device=q_pos.device)
        if plan.has_padding:
            index = (q_pos >= 0).nonzero().squeeze(1)
            q_pos, doc_start = q_pos.index_select(0, index), doc_start.index_select(0, index)
        return index, index // plan.q_pos.shape[1], q_pos, doc_start

    return plan.cached("valid", build)


class _Reads(NamedTuple):
    """What n queries read: a sparse matrix of query heads by rows of a table. A scratch that the layers of one forward take in turn."""

    matrix: Tensor  # (n * H, R) CSR; its values become scores
    rows: Tensor  # (n, Hk, G, L) its column indices
    bias: Tensor  # (n, Hk, G, L) added to each score: 0, or -inf where a row only fills up


def _make_reads(rows: Tensor, hidden: Tensor, n_groups: int, table: Tensor) -> _Reads:
    """For G = n_groups query heads per KV head. rows (n, Hk, L) of `table`, hidden (n, Hk or 1, L)."""
    n, Hk, L = rows.shape
    shape = (n, Hk, n_groups, L)
    bias = torch.where(hidden, float("-inf"), 0.0).unsqueeze(2).expand(shape).contiguous()
    ends = torch.arange(0, bias.numel() + 1, L, device=rows.device)
    _hush_beta_warning()
    size = (n * Hk * n_groups, table.shape[0])
    matrix = torch.sparse_csr_tensor(ends, rows.unsqueeze(2).expand(shape).flatten(), torch.empty(bias.numel()), size, check_invariants=False)
    return _Reads(matrix, matrix.col_indices().view(shape), bias)


@cache
def _hush_beta_warning() -> None:
    """Makes the process's first sparse CSR tensor, the one PyTorch warns about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def _scores(q: Tensor, table: Tensor, reads: _Reads, scale: float) -> Tensor:
    """(n * H, L): scale * q . row + bias; q (n, H, D). Valid until the next call with these reads."""
    scores = reads.matrix.values()
    scores.copy_(reads.bias.flatten())
    torch.sparse.sampled_addmm(reads.matrix, q.reshape(-1, q.shape[-1]), table.t(), alpha=scale, out=reads.matrix)
    return scores.view(-1, reads.bias.shape[-1])


def _read(q: Tensor, k: Tensor, v: Tensor, reads: _Reads, plan: AttentionPlan) -> Tensor:
    """Attention of the valid queries q (n, H, D) over k and v -> (B, T, H, D), zero at padding."""
    if q.dtype == torch.bfloat16:
        out = _copied(q, k, v, reads)
    else:
        p = _scores(q, _table(k), reads, q.shape[-1] ** -0.5).softmax(-1)
        out = F.embedding_bag(reads.rows.view(p.shape), _table(v), mode="sum", per_sample_weights=p).view(q.shape)
    if plan.has_padding:
        out = out.new_zeros(plan.q_pos.numel(), *out.shape[1:]).index_copy_(0, _valid(plan)[0], out)
    return out.view(*plan.q_pos.shape, *out.shape[1:])


def _copied(q: Tensor, k: Tensor, v: Tensor, reads: _Reads) -> Tensor:
    """The same in bf16, for which PyTorch has no sampled product: what a KV head reads is copied, and multiplied."""
    n, Hk, G, L = reads.rows.shape
    rows, D = reads.rows[:, :, 0].flatten(), q.shape[-1]
    k_read, v_read = (_table(x).index_select(0, rows).view(n * Hk, L, D) for x in (k, v))
    scores = torch.bmm((q * D**-0.5).reshape(n * Hk, G, D), k_read.transpose(1, 2)) + reads.bias.view(n * Hk, G, L)
    return torch.bmm(scores.softmax(-1).to(q.dtype), v_read).view(q.shape)


def _valid_queries(q: Tensor, plan: AttentionPlan) -> Tensor:
    """(n, H, D) from q (B, T, H, D)."""
    q = q.flatten(0, 1)
    return q.index_select(0, _valid(plan)[0]) if plan.has_padding else q


def _dense_by_index(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    def build() -> _Reads:
        _, row, q_pos, doc_start = (x[:, None, None] for x in _valid(plan))
        keys = doc_start + torch.arange(plan.max_rel + 1, device=k.device)  # (n, 1, L)
        hidden = keys > q_pos
        rows = _row_starts(k)[row] + torch.where(hidden, q_pos, keys) * _step(k) + _heads(k)
        return _make_reads(rows, hidden, q.shape[2] // k.shape[2], _table(k))

    reads = plan.cached(("dense by index", q.shape[2], k.shape, k.stride()), build)
    return _read(_valid_queries(q, plan), k, v, reads, plan)


class _SparseReads(NamedTuple):
    """What n sparse queries read whatever they choose, and where they may choose. Table rows are numbers of rows of k."""

    reads: _Reads  # the last n_chosen * block_size entries are the chosen blocks', filled in by each layer
    n_chosen: int  # blocks per query
    blocks: _Reads | None  # of the pooled keys: the selectable ones; None where all are chosen
    first: Tensor  # (n, Hk, 1, block_size) rows of the first selectable block
    low: Tensor  # (n, Hk, 1) rows before it are read as sinks
    high: Tensor  # (n, Hk, 1) rows after it are in the window, or in no selectable block; -1 where none is left
    own: Tensor  # (n, Hk, 1) row of the query's own key


def _sparse_reads(H: int, k: Tensor, pooled: Tensor, plan: AttentionPlan, spec: SparseSpec) -> _SparseReads:
    _, row, q_pos, doc_start = (x[:, None, None] for x in _valid(plan))
    bs, step = spec.block_size, _step(k)
    start = _row_starts(k)[row] + _heads(k)  # (n, Hk, 1)
    own = start + q_pos * step
    _, keys, keep = _window_and_sinks(plan, spec)
    keys, keep = _valid_queries(keys, plan), _valid_queries(keep, plan)  # (n, 1, L)
    rows, hidden = torch.where(keep, start + keys * step, own), ~keep
    first, stop = _selectable_range(q_pos, doc_start, spec)
    n_blocks = max(0, int((stop - first).amax()))
    n_chosen = min(n_blocks, spec.n_selected_blocks)
    blocks = None
    if n_blocks > n_chosen > 0:
        n = first + torch.arange(n_blocks, device=k.device)
        unused = n >= stop
        n = torch.where(unused, torch.minimum(first, stop - 1).clamp(min=0), n)
        blocks = _make_reads(_row_starts(pooled)[row] + n * _step(pooled) + _heads(pooled), unused, 1, _table(pooled))
    room = (0, n_chosen * bs)
    reads = _make_reads(F.pad(rows, room), F.pad(hidden, room), H // k.shape[2], _table(k))
    low, high = start + (doc_start + spec.n_sinks) * step, start + (torch.minimum(q_pos - spec.window + 1, stop * bs) - 1) * step
    high = high.masked_fill(high < low, -1)
    return _SparseReads(reads, n_chosen, blocks, (start + (first * bs + torch.arange(bs, device=k.device)) * step).unsqueeze(2), low, high, own)


def _sparse_by_index(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, pooled: Tensor) -> Tensor:
    B, T, H, D = q.shape
    Hk, bs, pooled = k.shape[2], spec.block_size, pooled.contiguous()
    s = plan.cached(("sparse by index", spec, H, k.shape, k.stride(), pooled.shape), lambda: _sparse_reads(H, k, pooled, plan, spec))
    q = _valid_queries(q, plan)
    if s.n_chosen:
        if s.blocks is None:
            ids = torch.arange(s.n_chosen, device=q.device)
        else:
            scores = _scores(upcast(q).view(-1, Hk, H // Hk, D).sum(2), _table(upcast(pooled)), s.blocks, 1.0)
            ids = _best(scores.view(*s.own.shape[:2], -1), s.n_chosen)[1]  # (n, Hk, M), counted from the first selectable block
        chosen = (s.first + (ids * (bs * _step(k))).unsqueeze(-1)).flatten(2)  # (n, Hk, M * bs)
        hidden = chosen.clamp(s.low, s.high) != chosen
        s.reads.rows[..., -chosen.shape[2] :] = torch.where(hidden, s.own, chosen).unsqueeze(2)
        s.reads.bias[..., -chosen.shape[2] :] = torch.where(hidden, float("-inf"), 0.0).unsqueeze(2)
    return _read(q, k, v, s.reads, plan)


# --- by row --------------------------------------------------------------------------------------------------------


class _DenseChunk(NamedTuple):
    index: Tensor  # (Tc,) which queries of the row, in order of position
    q_pos: Tensor  # (Tc,)
    doc_start: Tensor
    lo: int  # keys [lo, hi) cover what the chunk sees
    hi: int
    is_prefix: bool  # query i stands at position i of the row, its document starts there
    rising: list[tuple[slice, int, Tensor]] | None  # `_rising_chunks` where the row is one document and products are in bf16


class _Band(NamedTuple):
    """The sinks and windows of some queries, in tiles: the queries of a tile meet one list of L keys."""

    keys: Tensor  # (n_tiles, L) the sinks, then a range that covers the tile's windows; never after the chunk's last query
    bias: Tensor  # (n_tiles or 1, tile, 1, L) added to each score: 0, or -inf for a key that the query does not read here


class _SparseChunk(NamedTuple):
    """Queries of one document that all read sparsely, in order of position."""

    index: Tensor  # (Tc,) which queries of the row
    q_pos: Tensor  # (Tc,)
    doc_start: int
    lowest: int  # q_pos of the first query
    highest: int  # and of the last
    bands: list[_Band]  # of each BAND_QUERIES queries


def _split_rows(plan: AttentionPlan, spec: SparseSpec, by_hand: bool) -> list[tuple[list[_DenseChunk], list[_SparseChunk], list[_SparseChunk]]]:
    """Each row's dense, masked and sparse chunks. `by_hand`: masked ones are computed in bf16."""
    n_keys_read = spec.n_sinks + spec.window + spec.n_selected_blocks * spec.block_size
    rows = []
    for b in range(plan.q_pos.shape[0]):
        q_pos, doc_start = plan.q_pos[b], plan.doc_start[b]
        order = torch.sort(doc_start * plan.n_keys + q_pos, stable=True).indices
        order = order[q_pos[order] >= 0]
        pos, start = q_pos[order], doc_start[order]
        is_dense = pos - start < spec.dense_len
        first, stop = _selectable_range(pos, start, spec)
        masked = (pos - start < (MASKED_RATIO_BF16 if by_hand else MASKED_RATIO) * n_keys_read) | (stop - first < spec.n_selected_blocks)
        dense = [_make_dense_chunk(i, q_pos, doc_start, by_hand) for i in _parts(order[is_dense], DENSE_QUERIES)]
        few, many = order[~is_dense & masked], order[~is_dense & ~masked]
        few = [_make_sparse_chunk(i, q_pos, doc_start, spec, False) for i in _parts_of_documents(few, doc_start, MASKED_QUERIES)]
        many = [_make_sparse_chunk(i, q_pos, doc_start, spec, True) for i in _parts_of_documents(many, doc_start, CHUNK_QUERIES)]
        rows.append((dense, few, many))
    return rows


def _parts(index: Tensor, size: int) -> list[Tensor]:
    return list(index.split(size)) if index.numel() else []


def _parts_of_documents(index: Tensor, doc_start: Tensor, size: int) -> list[Tensor]:
    counts = doc_start[index].unique_consecutive(return_counts=True)[1].tolist()
    return [part for document in index.split(counts) for part in _parts(document, size)]


def _call(f, *args, use_reentrant: bool) -> Tensor:
    """Stands in for `checkpoint` where no gradient is wanted."""
    return f(*args)


def _make_dense_chunk(index: Tensor, q_pos: Tensor, doc_start: Tensor, by_hand: bool) -> _DenseChunk:
    q_pos, doc_start = q_pos[index], doc_start[index]
    lo, hi = int(doc_start.min()), int(q_pos.max()) + 1
    one_document = int(doc_start.max()) == 0
    is_prefix = one_document and hi == len(index) and bool((q_pos == torch.arange(hi, device=q_pos.device)).all())  # not some positions twice
    return _DenseChunk(index, q_pos, doc_start, lo, hi, is_prefix, _rising_chunks(q_pos) if by_hand and one_document else None)


def _make_sparse_chunk(index: Tensor, q_pos: Tensor, doc_start: Tensor, spec: SparseSpec, with_bands: bool) -> _SparseChunk:
    pos, start = q_pos[index], int(doc_start[index[0]])
    bands = [_make_band(part, start, spec) for part in pos.split(BAND_QUERIES)] if with_bands else []
    return _SparseChunk(index, pos, start, int(pos[0]), int(pos[-1]), bands)


def _make_band(pos: Tensor, doc_start: int, spec: SparseSpec) -> _Band:
    n, highest = len(pos), pos[-1]
    tile = min(BAND_TILE, 1 << (n - 1).bit_length())
    pos = torch.cat([pos, pos[-1:].expand(-n % tile)])  # whole tiles: the last query is repeated
    while True:  # queries far apart get smaller tiles, or their bands would hold many keys that none of them reads
        ends = pos.view(-1, tile)
        lowest = (ends[:, 0] - spec.window + 1).clamp(min=doc_start)
        L = int((ends[:, -1] - lowest).max()) + 1
        if tile == 1 or 2 * (spec.window + BAND_TILE) >= L:
            break
        tile //= 2
    sinks = doc_start + torch.arange(spec.n_sinks, device=pos.device)
    window = lowest[:, None] + torch.arange(L, device=pos.device)
    query = pos.view(-1, tile, 1)
    in_window = (window[:, None] > query - spec.window) & (window[:, None] <= query)
    keep = torch.cat([sinks <= query - spec.window, in_window], -1)
    if (keep == keep[:1]).all():  # consecutive queries: the same for each tile
        keep = keep[:1]
    bias = torch.zeros(keep.shape, device=pos.device).masked_fill_(~keep, float("-inf"))
    return _Band(torch.cat([sinks.expand(len(window), -1), window], 1).clamp(max=highest), bias.unsqueeze(2))


def _by_row(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, pooled: Tensor | None) -> Tensor:
    """Sparse prefill of long rows.

    A row's queries are put in order of document and position. Those below dense_len are dense. The next ones see few more
    keys than they read: masked SDPA over those keys (`_read_masked`). The rest go in chunks, one KV head at a time
    (`_read_chunk`): sinks and window are a band (tiles of consecutive queries against one list of keys); the scores of chosen
    blocks are turned round, from "the blocks of a query" to "the queries of a block", so that each block meets its queries in
    one product; their values are summed where they lie. One softmax covers both parts.
    """
    B, T, H, D = q.shape
    Hk, bs = k.shape[2], spec.block_size
    G = H // Hk
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    run = checkpoint if trained else _call
    dtype, by_hand = q.dtype, _has_bf16_products(q, k, v)
    if not by_hand:
        q, k, v = _compute(q), _compute(k), _compute(v)
    pooled = pool_keys(k[:, : plan.max_pos + 1].detach(), bs) if pooled is None else upcast(pooled.detach())
    out = torch.zeros_like(q) if plan.has_padding else torch.empty_like(q)
    parts = []  # what is trained is put together at the end: a write into `out` would copy all of its gradient

    def write(b: int, index: Tensor, heads: slice, x: Tensor) -> None:
        if trained:
            parts.append(((b * T + index)[:, None] * H + torch.arange(H, device=q.device)[heads], x))
        else:
            out[b, :, heads].index_copy_(0, index, x.to(out.dtype))

    for b, (dense, masked, sparse) in enumerate(plan.cached(("rows", spec, by_hand), lambda: _split_rows(plan, spec, by_hand))):
        qb, kb, vb, pooled_b = q[b], k[b], v[b], pooled[b].transpose(0, 1)
        for chunk in dense:
            write(b, chunk.index, slice(None), _dense_chunk(qb.index_select(0, chunk.index), kb, vb, chunk))
        if masked and by_hand:
            turned, read_masked = (kb.permute(1, 2, 0).contiguous(), vb.transpose(0, 1).contiguous()), _read_masked_by_hand
        else:
            turned, read_masked = (kb, vb), _read_masked
        for chunk in masked:
            qc = qb.index_select(0, chunk.index)
            q_sum = upcast(qc.detach()).view(-1, Hk, G, D).sum(2).transpose(0, 1)
            write(b, chunk.index, slice(None), run(read_masked, qc, *turned, _choose(q_sum, pooled_b, chunk, spec), chunk, spec, use_reentrant=False))
        for h in range(Hk) if sparse else ():
            n = max(chunk.highest + 1 for chunk in sparse)
            k_h, v_h = _compute(kb[:, h]), _compute(vb[:n, h]).contiguous()
            k_blocks = k_h[: n // bs * bs].reshape(-1, bs, D).transpose(1, 2).contiguous()  # (n // bs, D, bs)
            for chunk in sparse:
                qc = _compute(qb[:, h * G : (h + 1) * G].index_select(0, chunk.index))  # (Tc, G, D)
                ids = _choose(qc.detach().sum(1), pooled_b[h], chunk, spec)
                write(b, chunk.index, slice(h * G, (h + 1) * G), run(_read_chunk, qc, k_h, v_h, k_blocks, ids, chunk, spec, use_reentrant=False))
    if trained:
        rows, values = torch.cat([i.flatten() for i, _ in parts]), torch.cat([x.reshape(-1, D) for _, x in parts])
        out = q.new_zeros(B * T * H, D).index_copy(0, rows, values).view(q.shape)
    return out.to(dtype)


def _choose(q_sum: Tensor, pooled: Tensor, chunk: _SparseChunk, spec: SparseSpec) -> Tensor:
    """block_ids (..., Tc, M) of one document's queries q_sum (..., Tc, D) from pooled (..., N, D); in no particular order, -1 = unused."""
    M = spec.n_selected_blocks
    ids = torch.full((*q_sum.shape[:-1], M), -1, dtype=torch.int64, device=q_sum.device)
    start = torch.full_like(chunk.q_pos, chunk.doc_start)
    first, stop = _selectable_range(chunk.q_pos, start, spec)
    bounds = torch.stack([torch.stack([a[0], z[0], z[-1]]) for a, z in zip(first.split(SELECT_QUERIES), stop.split(SELECT_QUERIES), strict=True)]).tolist()
    for i, (first, low_stop, high_stop) in enumerate(bounds):  # queries in order: their stops ascend
        part = slice(i * SELECT_QUERIES, (i + 1) * SELECT_QUERIES)
        if M == 0 or high_stop <= first:
            continue
        scores = q_sum[..., part, :] @ pooled[..., first:high_stop, :].transpose(-1, -2)
        low_stop = max(low_stop, first)
        if low_stop < high_stop:
            n = torch.arange(low_stop, high_stop, device=q_sum.device)
            scores[..., low_stop - first :].masked_fill_(n >= stop[part, None], float("-inf"))
        values, best = _best(scores, M)
        best += first
        if low_stop - first < M:
            best.masked_fill_(values == float("-inf"), -1)
        ids[..., part, : best.shape[-1]] = best
    return ids


def _dense_chunk(q: Tensor, k: Tensor, v: Tensor, chunk: _DenseChunk) -> Tensor:
    """q (Tc, H, D) over k, v (S, Hk, D) -> (Tc, H, D)."""
    k, v = (x[None, chunk.lo : chunk.hi] for x in (k, v))
    if chunk.rising is not None:
        return _rising_in_bf16(q[None], k, v, chunk.rising)[0]
    mask = None
    if not chunk.is_prefix:
        s = torch.arange(chunk.lo, chunk.hi, device=q.device)
        mask = ((s <= chunk.q_pos[:, None]) & (s >= chunk.doc_start[:, None]))[None, None]
    return _sdpa(q.unsqueeze(0), k, v, mask, chunk.is_prefix)[0]


def _masked_range(chunk: _SparseChunk, spec: SparseSpec) -> tuple[int, int]:
    """The keys [lo, hi) that hold all a masked chunk reads."""
    if spec.n_sinks == spec.n_selected_blocks == 0:  # a window alone: the keys before it are left out
        return max(chunk.doc_start, (chunk.lowest - spec.window + 1) // spec.block_size * spec.block_size), chunk.highest + 1
    return chunk.doc_start, chunk.highest + 1


def _bias(block_ids: Tensor, chunk: _SparseChunk, spec: SparseSpec, dtype: torch.dtype) -> Tensor:
    """(Hk, Tc, hi - lo) of `_masked_range`: 0 for keys that a query reads, -inf for others; from block_ids (Hk, Tc, M)."""
    Hk, Tc, bs = *block_ids.shape[:2], spec.block_size
    lo, hi = _masked_range(chunk, spec)
    first, n_blocks = lo // bs, -(-(hi - lo) // bs)
    ids = torch.where(block_ids < 0, n_blocks, block_ids - first)  # the last column takes the -1s
    blocks = torch.full((Hk, Tc, n_blocks + 1), float("-inf"), dtype=dtype, device=ids.device).scatter_(-1, ids, 0.0)[..., :n_blocks]
    bias = blocks.unsqueeze(-1).expand(-1, -1, -1, bs).contiguous().flatten(2)[..., : hi - lo]  # chosen blocks are complete: no key of the future
    s, pos = torch.arange(lo, hi, device=ids.device), chunk.q_pos[:, None]
    window = max(0, chunk.lowest - spec.window + 1 - lo)
    bias[..., window:].masked_fill_((s[window:] > pos - spec.window) & (s[window:] <= pos), 0.0)
    bias[..., : spec.n_sinks].masked_fill_(s[: spec.n_sinks] <= pos, 0.0)
    return bias


def _read_masked(q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor, chunk: _SparseChunk, spec: SparseSpec) -> Tensor:
    """q (Tc, H, D) over all that k, v (S, Hk, D) hold of the document, with a mask from block_ids (Hk, Tc, M) -> (Tc, H, D)."""
    Tc, H, D = q.shape
    Hk, (lo, hi) = k.shape[1], _masked_range(chunk, spec)
    G = H // Hk
    bias = _bias(block_ids, chunk, spec, q.dtype).unsqueeze(1).expand(-1, G, -1, -1)  # (Hk, G, Tc, hi - lo)
    qg = q.view(Tc, Hk, G, D).permute(1, 2, 0, 3)
    kg, vg = (x[lo:hi].transpose(0, 1).unsqueeze(1).expand(-1, G, -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(qg, kg, vg, attn_mask=bias).permute(2, 0, 1, 3).reshape(Tc, H, D)


def _read_masked_by_hand(q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor, chunk: _SparseChunk, spec: SparseSpec) -> Tensor:
    """The same in bf16, as two products and a softmax: k (Hk, D, S), v (Hk, S, D)."""
    Tc, H, D = q.shape
    Hk, (lo, hi) = k.shape[0], _masked_range(chunk, spec)
    qg = (q * D**-0.5).view(Tc, Hk, -1, D).permute(1, 2, 0, 3).reshape(Hk, -1, D)
    scores = torch.bmm(qg, k[:, :, lo:hi]).view(Hk, -1, Tc, hi - lo)
    scores += _bias(block_ids, chunk, spec, q.dtype).unsqueeze(1)
    return torch.bmm(scores.softmax(-1).flatten(1, 2), v[:, lo:hi]).view(Hk, -1, Tc, D).permute(2, 0, 1, 3).reshape(Tc, H, D)


def _read_chunk(q: Tensor, k: Tensor, v: Tensor, k_blocks: Tensor, block_ids: Tensor, chunk: _SparseChunk, spec: SparseSpec) -> Tensor:
    """One KV head's queries q (Tc, G, D) over k, v (S, D) and k_blocks (n, D, bs), reading block_ids (Tc, M) -> (Tc, G, D)."""
    Tc, G, D = q.shape
    M, bs = spec.n_selected_blocks, spec.block_size
    q = q * D**-0.5
    if M:
        turned = _turn_round(block_ids, len(k_blocks))
        slot_of_pair, scores = turned[0], _block_scores(q, k_blocks, turned)
        slots = slot_of_pair.view(Tc, 1, M) * G + torch.arange(G, device=q.device)[:, None]  # (Tc, G, M) rows of scores
        keys = (block_ids.int() * bs).unsqueeze(-1) + torch.arange(bs, dtype=torch.int32, device=q.device)
    out, weights = [], []
    for i, band in enumerate(chunk.bands):
        part = slice(i * BAND_QUERIES, (i + 1) * BAND_QUERIES)
        qc, tile, (n_tiles, L) = q[part], band.bias.shape[1], band.keys.shape
        n, left_over = len(qc), n_tiles * tile - len(qc)
        if left_over:
            qc = F.pad(qc, (0, 0, 0, 0, 0, left_over))
        rows = band.keys.flatten()
        k_band, v_band = (x.index_select(0, rows).view(n_tiles, L, D) for x in (k, v))
        logits = torch.bmm(qc.view(-1, tile * G, D), k_band.transpose(1, 2)).view(n_tiles, tile, G, L).add_(band.bias).view(-1, G, L)[:n]
        if M:
            chosen = scores.index_select(0, slots[part].flatten()).view(n, G, M, bs)
            chosen = _count_once(chosen, block_ids[part], chunk.q_pos[part], chunk.doc_start, spec)
            logits = torch.cat([chosen.flatten(2), logits], -1)
        p = logits.softmax(-1)
        p_band = p[..., M * bs :]
        if left_over:
            p_band = F.pad(p_band, (0, 0, 0, 0, 0, left_over))
        read = torch.bmm(p_band.reshape(-1, tile * G, L), v_band).view(-1, G, D)[:n]
        if M and p.requires_grad:
            weights.append(p[..., : M * bs])
        elif M:
            rows = keys[part].view(n, 1, M * bs).expand(-1, G, -1).reshape(n * G, -1)
            read = read + F.embedding_bag(rows, v, mode="sum", per_sample_weights=p[..., : M * bs].reshape(n * G, -1)).view(n, G, D)
        out.append(read)
    out = torch.cat(out) if len(out) > 1 else out[0]
    return out + _block_values(torch.cat(weights), v, turned) if weights else out


def _block_values(p: Tensor, v: Tensor, turned: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
    """(Tc, G, D): what p (Tc, G, M * bs) weighs of the chosen blocks of v (S, D). For training: a bag of single rows has a slow gradient."""
    Tc, G, D = *p.shape[:2], v.shape[1]
    slot_of_pair, pair_of_slot, block_of_tile, width = turned
    M = len(slot_of_pair) // Tc
    bs = p.shape[2] // M
    row = (pair_of_slot // M * G)[:, None] + torch.arange(G, device=p.device)  # of p, for each slot and head of the group
    p_tile = p.reshape(-1, bs).index_select(0, (row * M + (pair_of_slot % M)[:, None]).flatten()).view(-1, width * G, bs)
    v_tile = v[: len(v) // bs * bs].view(-1, bs, D).index_select(0, block_of_tile)
    read = torch.bmm(p_tile, v_tile).view(-1, G * D)  # a row per slot
    return F.embedding_bag(slot_of_pair.view(Tc, M), read, mode="sum").view(Tc, G, D)


def _count_once(scores: Tensor, block_ids: Tensor, q_pos: Tensor, doc_start: int, spec: SparseSpec) -> Tensor:
    """Sets scores (n, G, M, bs) of keys that are read as sinks or in the window to -inf; only blocks across their edges hold such keys."""
    bs, sink_end = spec.block_size, doc_start + spec.n_sinks
    window_start = (q_pos - spec.window + 1)[:, None]
    edge = block_ids == window_start.div(bs, rounding_mode="floor")
    if sink_end % bs:
        edge |= block_ids == sink_end // bs
    query, m = edge.nonzero(as_tuple=True)
    keys = (block_ids[query, m] * bs)[:, None] + torch.arange(bs, device=q_pos.device)
    hidden = (keys >= window_start[query]) | (keys < sink_end)
    scores[query, :, m] = scores[query, :, m].masked_fill(hidden[:, None], float("-inf"))
    return scores


def _block_scores(q: Tensor, k_blocks: Tensor, turned: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
    """(n_slots * G, bs): q (Tc, G, D) times each chosen block of k_blocks (n, D, bs), a row per slot and head of the group."""
    Tc, G, D = q.shape
    slot_of_pair, pair_of_slot, block_of_tile, width = turned
    query = pair_of_slot // (len(slot_of_pair) // Tc)
    q, size = q.view(Tc, G * D), max(1, GATHERED_ELEMENTS // (width * G * D))
    parts = zip(query.split(size * width), block_of_tile.split(size), strict=True)  # few tiles at a time: what is gathered stays in the cache
    scores = [torch.bmm(q.index_select(0, i).view(-1, width * G, D), k_blocks.index_select(0, j)) for i, j in parts]
    return torch.cat(scores).view(-1, k_blocks.shape[2])


def _turn_round(block_ids: Tensor, n_blocks: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """From blocks of a query to queries of a block: (slot_of_pair (P,), pair_of_slot (n_tiles * width,), block_of_tile, width).

    Pair p = query p // R and its block number p % R. Pairs are sorted by block; each block's share is rounded up to whole
    tiles of `width` slots. Slots left over point at pair 0; nobody reads their result.
    """
    block = block_ids.flatten()
    P = block.numel()
    sorted_block, pair = torch.sort(block)
    count = torch.bincount(block, minlength=n_blocks)
    width = 1 << max(3, min(5, (P // int(count.count_nonzero())).bit_length() - 2))  # a quarter to a half of a block's share: little is left over
    n_tiles = (count + width - 1) // width
    first_pair, first_tile = count.cumsum(0) - count, n_tiles.cumsum(0) - n_tiles
    slot = (first_tile * width - first_pair)[sorted_block] + torch.arange(P, device=block.device)
    block_of_tile = torch.repeat_interleave(torch.arange(n_blocks, device=block.device), n_tiles)
    slot_of_pair = torch.empty_like(slot).index_copy_(0, pair, slot)
    pair_of_slot = slot.new_zeros(block_of_tile.numel() * width).index_copy_(0, slot, pair)
    return slot_of_pair, pair_of_slot, block_of_tile, width
