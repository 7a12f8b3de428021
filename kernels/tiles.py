"""Tiles of queries: how a plan's queries are grouped into the programs of the Triton prefill kernels. Plain PyTorch.

A tile holds up to `size` queries of one row and one document, in order of position, such that the keys they read next to
themselves (windows, or everything for dense queries) form one interval without holes. So a kernel that reads the interval
[first, last position] reads no key that nobody sees, and such a key may be NaN. Padding queries are in no tile.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.spec import AttentionPlan

EVERYTHING = 1 << 30  # a dense_len that makes every query dense
KEY_TILE = 64  # keys per program of the backward's key tiles


class Tiles(NamedTuple):
    order: Tensor  # (B, n_tiles * size) int32: order[b, slot] = query in that slot, -1 = empty
    pos: Tensor  # (B, n_tiles * size) int32: the query's position, -1 = empty
    start: Tensor  # (B, n_tiles) int32: first key of the tile's document
    size: int
    n_tiles: int


def make_tiles(plan: AttentionPlan, size: int, window: int, dense_len: int) -> Tiles:
    """The plan's tiles, built once per plan: one read-back unless the queries are a whole prefix."""
    return plan.cached(("tiles", size, window, dense_len), lambda: _build(plan, size, window, dense_len))


def _build(plan: AttentionPlan, size: int, window: int, dense_len: int) -> Tiles:
    B, T = plan.q_pos.shape
    device = plan.q_pos.device
    if plan.is_prefix:  # neighbours are one apart: no holes
        n_tiles = -(-T // size)
        order = F.pad(torch.arange(T, dtype=torch.int32, device=device), (0, n_tiles * size - T), value=-1).expand(B, -1).contiguous()
        return Tiles(order, order, torch.zeros(B, n_tiles, dtype=torch.int32, device=device), size, n_tiles)
    # one sort by (padding last, document, position); positions and starts are below n_keys
    far = plan.n_keys + 1
    key = torch.where(plan.q_pos < 0, far * far, plan.doc_start * far + plan.q_pos)
    key, index = torch.sort(key, dim=1, stable=True)
    valid = key < far * far
    start, pos = key // far, key % far
    low = torch.where(pos - start < dense_len, start, torch.maximum(start, pos - window + 1))  # first key read next to the query
    breaks = torch.ones(B, T, dtype=torch.bool, device=device)
    breaks[:, 1:] = (start[:, 1:] != start[:, :-1]) | (low[:, 1:] > pos[:, :-1] + 1)
    i = torch.arange(T, device=device).expand(B, -1)
    offset = i - torch.where(breaks, i, 0).cummax(1).values  # place since the last break
    tile = ((offset % size == 0) & valid).cumsum(1) - 1
    n_tiles = max(1, int(tile.max()) + 1)
    slot = torch.where(valid, tile * size + offset % size, n_tiles * size)  # the last column takes the padding
    order, slots_pos = (torch.full((B, n_tiles * size + 1), -1, dtype=torch.int32, device=device) for _ in range(2))
    order = order.scatter_(1, slot, index.int())[:, :-1].contiguous()
    slots_pos = slots_pos.scatter_(1, slot, pos.int())[:, :-1].contiguous()
    tile_start = torch.zeros(B, n_tiles + 1, dtype=torch.int32, device=device)
    tile_start = tile_start.scatter_(1, torch.where(valid, tile, n_tiles), start.int())[:, :-1].contiguous()
    return Tiles(order, slots_pos, tile_start, size, n_tiles)


class KeyRanges(NamedTuple):
    """For the backward: which tiles may read the keys of key tile j next to themselves: tiles [first[b, j], stop[b, j])."""

    first: Tensor  # (B, n_key_tiles) int32
    stop: Tensor  # (B, n_key_tiles) int32


def make_key_ranges(plan: AttentionPlan, tiles: Tiles, key_tile: int, window: int, dense_len: int) -> KeyRanges:
    def build() -> KeyRanges:
        B, n = tiles.start.shape
        pos = tiles.pos.view(B, n, tiles.size)
        start = tiles.start.unsqueeze(-1)
        low = torch.where(pos - start < dense_len, start, torch.maximum(start, pos - window + 1)).masked_fill(pos < 0, plan.n_keys).amin(-1)
        high = pos.amax(-1)  # (B, n); an empty tile gets an empty interval
        n_key_tiles = -(-plan.n_keys // key_tile)
        first, stop = (torch.zeros(B, n_key_tiles, dtype=torch.int32, device=pos.device) for _ in range(2))
        t = torch.arange(n, dtype=torch.int32, device=pos.device)
        step = max(1, (1 << 24) // max(1, B * n))
        for j in range(0, n_key_tiles, step):  # chunks, so that nothing of size key tiles x tiles is made
            a = torch.arange(j, min(j + step, n_key_tiles), device=pos.device)[:, None] * key_tile
            meets = (low[:, None] < a + key_tile) & (high[:, None] >= a)  # (B, step, n)
            first[:, j : j + step] = torch.where(meets, t, n).amin(-1)
            stop[:, j : j + step] = torch.where(meets, t + 1, 0).amax(-1)
        return KeyRanges(first, stop)

    return plan.cached(("key_ranges", tiles.size, key_tile, window, dense_len), build)
