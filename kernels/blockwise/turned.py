"""Sparse prefill where neighbours do not agree: each block meets the queries that chose it.

Sinks and window are a band (tiles of consecutive queries against one list of keys); the scores of chosen blocks are turned round, from "the blocks of a
query" to "the queries of a block", so that each block meets its queries in one product; their values are summed where they lie. One softmax covers both.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.blockwise.common import compute
from kernels.spec import SparseSpec

BAND_QUERIES = 512  # queries that have all of their scores in memory at once
BAND_TILE = 64
GATHERED_ELEMENTS = 1 << 18


class Band(NamedTuple):
    """The sinks and windows of some queries, in tiles: the queries of a tile meet one list of L keys."""

    keys: Tensor  # (n_tiles, L) the sinks, then a range that covers the tile's windows; never after the chunk's last query
    bias: Tensor  # (n_tiles or 1, tile, 1, L) added to each score: 0, or -inf for a key that the query does not read here


def make_bands(q_pos: Tensor, doc_start: int, spec: SparseSpec) -> list[Band]:
    """Of each BAND_QUERIES of one document's queries, in order of position."""
    return [_make_band(pos, doc_start, spec) for pos in q_pos.split(BAND_QUERIES)]


def _make_band(pos: Tensor, doc_start: int, spec: SparseSpec) -> Band:
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
    return Band(torch.cat([sinks.expand(len(window), -1), window], 1).clamp(max=highest), bias.unsqueeze(2))


def keys_to_turn(k: Tensor, v: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `read_turned` takes of one KV head's k, v (S, D): both, and k's whole blocks as (S // block_size, D, block_size)."""
    k, v, n = compute(k), compute(v), len(k) // block_size
    return k, v, k[: n * block_size].view(n, block_size, k.shape[1]).transpose(1, 2).contiguous()


def read_turned(
    q: Tensor, k: Tensor, v: Tensor, k_blocks: Tensor, block_ids: Tensor, q_pos: Tensor, doc_start: int, bands: list[Band], spec: SparseSpec
) -> Tensor:
    """One KV head's queries q (Tc, G, D) over k, v (S, D) and k_blocks (n, D, bs), reading block_ids (Tc, M), all in use -> (Tc, G, D)."""
    Tc, G, D = q.shape
    M, bs = spec.n_selected_blocks, spec.block_size
    q = q * D**-0.5
    if M:
        turned = _turn_round(block_ids, len(k_blocks))
        slot_of_pair, scores = turned[0], _block_scores(q, k_blocks, turned)
        slots = slot_of_pair.view(Tc, 1, M) * G + torch.arange(G, device=q.device)[:, None]  # (Tc, G, M) rows of scores
        keys = (block_ids.int() * bs).unsqueeze(-1) + torch.arange(bs, dtype=torch.int32, device=q.device)
    out, weights = [], []
    for i, band in enumerate(bands):
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
            chosen = _count_once(chosen, block_ids[part], q_pos[part], doc_start, spec)
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
