"""Sparse prefill of long rows: a tile of neighbouring queries meets all that one of them reads, with a mask."""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.blockwise.common import compute, has_bf16_products, has_bf16_sdpa, sdpa
from kernels.blockwise.dense import rising_chunks, rising_in_bf16
from kernels.blockwise.select import best_scores, selectable_range
from kernels.blockwise.turned import keys_to_turn, make_bands, read_turned
from kernels.reference import pool_keys, upcast
from kernels.spec import AttentionPlan, SparseSpec

SHARED_RATIO = 3  # in the by-row way, tiles beat turning round until they hold this many times the keys that a query reads
SHARED_RATIO_BF16 = 8  # the same where the products of tiles are in bf16 and the others are not
TILE_QUERIES = 128  # queries per tile there
TILE_KEYS = 128  # a tile copies a multiple of so many keys: oneDNN keeps code for every shape of a product in bf16, 0.7 MB each
QUERY_STEP = 32  # for the same reason its queries are made up to a multiple of so many, with some that nobody asked for
FILLED = 0.75  # a tile that reads so much of what lies between its first and last block reads all of it, as a slice: that costs less than a copy
FILLED_TRAINED = 0.5  # the same where gradients are wanted, which come through a copy as a sum by index
SELECT_QUERIES = 512  # queries that choose blocks at once: their scores stay in the cache
CHUNK_QUERIES = 1024  # sparse queries that are turned round at once: the more, the more of them meet in a block
DENSE_QUERIES = 1024


class _DenseChunk(NamedTuple):
    index: Tensor  # (Tc,) which queries of the row, in order of position
    q_pos: Tensor  # (Tc,)
    doc_start: Tensor
    lo: int  # keys [lo, hi) cover what the chunk sees
    hi: int
    is_prefix: bool  # query i stands at position i of the row, its document starts there
    rising: list[tuple[slice, int, Tensor | None]] | None  # `rising_chunks` where the row is one document and products are in bf16


class _Tile(NamedTuple):
    """Some of a chunk's queries, and the blocks they read whatever they choose."""

    part: slice  # which ones
    sinks: Tensor  # blocks of the sinks
    window: Tensor  # blocks of the windows
    last: int  # of those


class _SparseChunk(NamedTuple):
    """Queries of one document that all read sparsely, in order of position."""

    index: Tensor  # (Tc,) which queries of the row
    q_pos: Tensor  # (Tc,)
    doc_start: int
    highest: int  # q_pos of the last query
    tiles: list[_Tile]  # of each TILE_QUERIES queries


def by_row(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, pooled: Tensor | None) -> Tensor:
    """Sparse prefill of long rows.

    A row's queries are put in order of document and position. Those below dense_len are dense. The rest go in chunks, one KV head at a time. Where
    neighbours agree, tiles of them meet the keys that any of them reads (`_read_shared`); where they do not, they are turned round (`turned.py`).
    """
    B, T, H, D = q.shape
    Hk, bs = k.shape[2], spec.block_size
    G = H // Hk
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    run = checkpoint if trained else _call
    dtype, by_hand = q.dtype, has_bf16_products(q, k, v)
    if not by_hand:
        q, k, v = compute(q), compute(k), compute(v)
    pooled = pool_keys(k[:, : plan.max_pos + 1].detach(), bs) if pooled is None else upcast(pooled.detach())
    out = torch.zeros_like(q) if plan.has_padding else torch.empty_like(q)
    parts = []  # what is trained is put together at the end: a write into `out` would copy all of its gradient

    def write(b: int, index: Tensor, heads: slice, x: Tensor) -> None:
        if trained:
            parts.append(((b * T + index)[:, None] * H + torch.arange(H, device=q.device)[heads], x))
        else:
            out[b, :, heads].index_copy_(0, index, x.to(out.dtype))

    limit = (SHARED_RATIO_BF16 if by_hand else SHARED_RATIO) * (spec.n_sinks + spec.window + spec.n_selected_blocks * bs)
    for b, (dense, sparse) in enumerate(plan.cached(("rows", spec, by_hand), lambda: _split_rows(plan, spec, by_hand))):
        qb, kb, vb, pooled_b = q[b], k[b], v[b], pooled[b].transpose(0, 1)
        for chunk in dense:
            write(b, chunk.index, slice(None), _dense_chunk(qb.index_select(0, chunk.index), kb, vb, chunk))
        for h in range(Hk) if sparse else ():
            n, heads = max(chunk.highest + 1 for chunk in sparse), slice(h * G, (h + 1) * G)
            k_h, v_h = kb[:n, h].contiguous(), vb[:n, h].contiguous()
            to_turn = cache(lambda k=k_h, v=v_h: keys_to_turn(k, v, bs))
            for i, chunk in enumerate(sparse):
                qc = qb[:, heads].index_select(0, chunk.index)  # (Tc, G, D)
                ids = _choose(upcast(qc.detach()).sum(1), pooled_b[h], chunk, spec)
                shared = _share(ids, chunk, spec, limit, FILLED_TRAINED if trained else FILLED)
                if shared:
                    masks = plan.cached(("masks", spec, b, i), lambda c=chunk: _masks(c, spec))
                    read = run(_read_shared, qc, k_h, v_h, shared, masks, chunk, spec, by_hand, use_reentrant=False)
                else:
                    bands = plan.cached(("bands", spec, b, i), lambda c=chunk: make_bands(c.q_pos, c.doc_start, spec))
                    read = run(read_turned, compute(qc), *to_turn(), ids, chunk.q_pos, chunk.doc_start, bands, spec, use_reentrant=False)
                write(b, chunk.index, heads, read)
    if trained:
        rows, values = torch.cat([i.flatten() for i, _ in parts]), torch.cat([x.reshape(-1, D) for _, x in parts])
        out = q.new_zeros(B * T * H, D).index_copy(0, rows, values).view(q.shape)
    return out.to(dtype)


def _split_rows(plan: AttentionPlan, spec: SparseSpec, by_hand: bool) -> list[tuple[list[_DenseChunk], list[_SparseChunk]]]:
    """Each row's dense and sparse chunks. `by_hand`: products are in bf16."""
    rows = []
    for b in range(plan.q_pos.shape[0]):
        q_pos, doc_start = plan.q_pos[b], plan.doc_start[b]
        order = torch.sort(doc_start * plan.n_keys + q_pos, stable=True).indices
        order = order[q_pos[order] >= 0]
        is_dense = (q_pos - doc_start)[order] < spec.dense_len
        first, stop = selectable_range(q_pos[order], doc_start[order], spec)
        short = stop - first < spec.n_selected_blocks  # they choose fewer blocks than the others, and can't be turned round
        dense = [_make_dense_chunk(i, q_pos, doc_start, by_hand) for i in _parts(order[is_dense], DENSE_QUERIES)]
        sparse = [part for some in (short, ~short) for part in _parts_of_documents(order[~is_dense & some], doc_start, CHUNK_QUERIES)]
        rows.append((dense, [_make_sparse_chunk(i, q_pos, doc_start, spec) for i in sparse]))
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
    return _DenseChunk(index, q_pos, doc_start, lo, hi, is_prefix, rising_chunks(q_pos) if by_hand and one_document else None)


def _make_sparse_chunk(index: Tensor, q_pos: Tensor, doc_start: Tensor, spec: SparseSpec) -> _SparseChunk:
    pos, start = q_pos[index], int(doc_start[index[0]])
    tiles = [_make_tile(t, pos[t : t + TILE_QUERIES], start, spec) for t in range(0, len(pos), TILE_QUERIES)]
    return _SparseChunk(index, pos, start, int(pos[-1]), tiles)


def _make_tile(t: int, pos: Tensor, doc_start: int, spec: SparseSpec) -> _Tile:
    bs, n_blocks = spec.block_size, int(pos[-1]) // spec.block_size + 1
    sinks = torch.arange(doc_start // bs, min(-(-(doc_start + spec.n_sinks) // bs), n_blocks), device=pos.device)
    window = torch.arange(max(doc_start, int(pos[0]) - spec.window + 1) // bs, n_blocks, device=pos.device)
    return _Tile(slice(t, t + len(pos)), sinks, window, n_blocks - 1)


def _masks(chunk: _SparseChunk, spec: SparseSpec) -> list[tuple[Tensor, Tensor]]:
    """For each tile which keys of its sinks' and of its windows' blocks a query reads whatever it chooses: (n, keys) and (n, keys)."""
    within, masks = torch.arange(spec.block_size, device=chunk.q_pos.device), []
    for tile in chunk.tiles:
        pos = chunk.q_pos[tile.part, None]
        sinks, window = ((x[:, None] * spec.block_size + within).flatten() for x in (tile.sinks, tile.window))
        mask = (sinks < chunk.doc_start + spec.n_sinks) & (sinks <= pos), (window > pos - spec.window) & (window <= pos)  # documents begin with a block
        if masks and all(map(torch.equal, mask, masks[-1])):  # consecutive queries: the same for all tiles
            mask = masks[-1]
        masks.append(mask)
    return masks


def _choose(q_sum: Tensor, pooled: Tensor, chunk: _SparseChunk, spec: SparseSpec) -> Tensor:
    """block_ids (Tc, M) of one document's queries q_sum (Tc, D) from pooled (N, D); in no particular order, -1 = unused."""
    M = spec.n_selected_blocks
    ids = torch.full((len(q_sum), M), -1, dtype=torch.int64, device=q_sum.device)
    start = torch.full_like(chunk.q_pos, chunk.doc_start)
    first, stop = selectable_range(chunk.q_pos, start, spec)
    bounds = torch.stack([torch.stack([a[0], z[0], z[-1]]) for a, z in zip(first.split(SELECT_QUERIES), stop.split(SELECT_QUERIES), strict=True)]).tolist()
    for i, (first, low_stop, high_stop) in enumerate(bounds):  # queries in order: their stops ascend
        part = slice(i * SELECT_QUERIES, (i + 1) * SELECT_QUERIES)
        if M == 0 or high_stop <= first:
            continue
        scores = q_sum[part] @ pooled[first:high_stop].t()
        low_stop = max(low_stop, first)
        if low_stop < high_stop:
            n = torch.arange(low_stop, high_stop, device=q_sum.device)
            scores[:, low_stop - first :].masked_fill_(n >= stop[part, None], float("-inf"))
        values, best = best_scores(scores, M)
        best += first
        if low_stop - first < M:
            best.masked_fill_(values == float("-inf"), -1)
        ids[part, : best.shape[1]] = best
    return ids


def _dense_chunk(q: Tensor, k: Tensor, v: Tensor, chunk: _DenseChunk) -> Tensor:
    """q (Tc, H, D) over k, v (S, Hk, D) -> (Tc, H, D)."""
    k, v = (x[None, chunk.lo : chunk.hi] for x in (k, v))
    if chunk.rising is not None:
        return rising_in_bf16(q[None], k, v, chunk.rising)[0]
    mask = None
    if not chunk.is_prefix:
        s = torch.arange(chunk.lo, chunk.hi, device=q.device)
        mask = ((s <= chunk.q_pos[:, None]) & (s >= chunk.doc_start[:, None]))[None, None]
    return sdpa(q.unsqueeze(0), k, v, mask, chunk.is_prefix)[0]


def _share(block_ids: Tensor, chunk: _SparseChunk, spec: SparseSpec, limit: int, filled: float) -> list[tuple[Tensor, Tensor]]:
    """For each tile of the chunk the blocks (L,) that it reads, ascending, and which of them each query chose (n, M), L for none; from block_ids (Tc, M).

    Those are what one of its queries reads, and others between them that make up whole TILE_KEYS; where that is `filled` of all from the first to the
    last, all of those. Empty if the tiles read more than `limit` keys on average, unless some query chose fewer than M blocks."""
    Tc, M = block_ids.shape
    N, n_tiles = chunk.highest // spec.block_size + 1, len(chunk.tiles)
    ids = block_ids.masked_fill(block_ids < 0, N)  # one more column takes what is not used
    ids = F.pad(ids, (0, 0, 0, -Tc % TILE_QUERIES), value=N).view(n_tiles, TILE_QUERIES * M)
    is_read = torch.zeros(n_tiles, N + 1, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
    is_read = is_read[:, :N]
    for row, tile in zip(is_read, chunk.tiles, strict=True):
        row[tile.sinks] = row[tile.window] = True
    n, firsts = torch.arange(N, device=ids.device), is_read.int().argmax(1, keepdim=True)
    spare = ~is_read & (n > firsts) & (n <= torch.tensor([tile.last for tile in chunk.tiles], device=ids.device)[:, None])
    is_read |= spare & (spare.cumsum(1) <= -is_read.sum(1, keepdim=True) % max(1, TILE_KEYS // spec.block_size))
    counts = is_read.sum(1).tolist()
    for i, (first, tile) in enumerate(zip(firsts.flatten().tolist(), chunk.tiles, strict=True)):
        between = tile.last + 1 - first
        if counts[i] >= filled * between:
            is_read[i, first : tile.last + 1], counts[i] = True, between
    if sum(counts) * spec.block_size > limit * n_tiles and not (block_ids < 0).any():
        return []
    column = F.pad(is_read.cumsum(1) - 1, (0, 1))
    column[:, N] = torch.tensor(counts)
    column = column.gather(1, ids).view(n_tiles * TILE_QUERIES, M)[:Tc]
    blocks = is_read.nonzero()[:, 1].split(counts)
    return [(x, column[tile.part]) for x, tile in zip(blocks, chunk.tiles, strict=True)]


def _read_shared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared: list[tuple[Tensor, Tensor]],
    masks: list[tuple[Tensor, Tensor]],
    chunk: _SparseChunk,
    spec: SparseSpec,
    by_hand: bool,
) -> Tensor:
    """One KV head's queries q (Tc, G, D) over k, v (S, D), each tile over what `_share` found -> (Tc, G, D)."""
    bs, attend = spec.block_size, _by_products if by_hand and not has_bf16_sdpa() else _by_sdpa
    within = torch.arange(bs, device=q.device)
    out = []
    for tile, (blocks, chosen), (sinks, window) in zip(chunk.tiles, shared, masks, strict=True):
        n, L, first = len(chosen), len(blocks), int(blocks[0])
        bias = q.new_full((n, L + 1), float("-inf")).scatter_(1, chosen, 0.0)[:, :L].repeat_interleave(bs, 1)
        bias[:, : sinks.shape[1]].masked_fill_(sinks, 0.0)
        bias[:, L * bs - window.shape[1] :].masked_fill_(window, 0.0)
        if tile.last + 1 - first == L:
            k_tile, v_tile = (x[first * bs : (tile.last + 1) * bs] for x in (k, v))
        else:
            rows = (blocks[:, None] * bs + within).flatten().clamp(max=chunk.highest)  # later keys may be NaN
            k_tile, v_tile = (x.index_select(0, rows) for x in (k, v))
        out.append(attend(q[tile.part].transpose(0, 1), k_tile, v_tile, bias[:, : len(k_tile)]).transpose(0, 1))
    return torch.cat(out) if len(out) > 1 else out[0]


def _by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """q (G, n, D) over k, v (L, D), bias (n, L) -> (G, n, D), as two products and a softmax: fast in bf16 on a CPU that has units for it."""
    n, D = q.shape[1:]
    if n % QUERY_STEP:
        q, bias = (F.pad(x, (0, 0, 0, -n % QUERY_STEP)) for x in (q, bias))
    scores = ((q * D**-0.5).reshape(-1, D) @ k.t()).view(len(q), *bias.shape)
    return (scores.add_(bias).softmax(-1).flatten(0, 1) @ v).view(q.shape)[:, :n]


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[None], k.expand(1, len(q), -1, -1), v.expand(1, len(q), -1, -1), attn_mask=bias[None, None])[0]
