"""Attention of many queries, forward: Triton kernels for the sparse rule and, with everything in reach, for dense attention.

A program serves one tile of queries (see `tiles.py`) of one KV head: its rows are (query, head of the group). It reads
1. the keys next to the queries, [first, last]: windows of sparse queries, everything for dense ones;
2. the sinks of the tile's document, 16 keys at a time;
3. the union of the blocks that the tile's queries chose; a 32-bit word per block says which of the queries it is for.
Parts 2 and 3 leave out what part 1 holds for the same query, and part 3 leaves out the sinks, so a key counts once.
Called by `triton_ops.py`; the backward is in `prefill_backward_triton.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sort_triton import INTERPRETED, smallest
from kernels.spec import AttentionPlan, SparseSpec
from kernels.tiles import EVERYTHING, Tiles, make_tiles

LOG2_E = 1.4426950408889634
NO_BLOCK = tl.constexpr(2**31 - 1)


# --- the union of a tile's blocks ----------------------------------------------------------------------------------


@triton.jit
def union_kernel(
    block_ids,  # (B, T, HK, M) int32, -1 = unused, any order
    order,  # (B, n_tiles * BT) int32
    union_ids, union_words, n_union,  # (B, HK, n_tiles, BT * M) int32 twice, (B, HK, n_tiles) int32
    T, HK, n_tiles,
    M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, COUNTING: tl.constexpr,
):  # fmt: skip
    """Ascending ids of the blocks that the tile's queries chose, and for each the set of these queries as a word."""
    tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, m = tl.arange(0, BT), tl.arange(0, MP)
    query = tl.load(order + (b * n_tiles + tile) * BT + slot)
    row = (b.to(tl.int64) * T + query) * HK + h
    ids = tl.load(block_ids + row[:, None] * M + m[None, :], mask=(query >= 0)[:, None] & (m < M)[None, :], other=-1)
    pair = tl.where(ids >= 0, ids * BT + slot[:, None], NO_BLOCK)  # (BT, MP): sorted by block, then by query
    pair = tl.reshape(smallest(tl.reshape(pair, (1, BT * MP)), BT * MP, COUNTING), (BT * MP,))
    i = tl.arange(0, BT * MP)
    before = tl.gather(pair, tl.maximum(i - 1, 0), 0)
    used = pair != NO_BLOCK
    opens = used & ((i == 0) | (pair // BT != before // BT))
    bit = tl.where(used & ((i == 0) | (pair != before)), 1, 0).to(tl.int64) << (pair % BT)
    # the bits of a block are a range of distinct powers of two, so a difference of running sums is their union
    running = tl.cumsum(bit, 0) - bit
    rank = tl.cumsum(opens.to(tl.int32), 0) - 1
    n = tl.sum(opens.to(tl.int32), 0)
    at = (b * HK + h).to(tl.int64) * n_tiles + tile
    union_ids += at * BT * M
    union_words += at * BT * M
    tl.store(union_ids + rank, pair // BT, mask=opens)
    tl.store(union_words + rank, running.to(tl.int32), mask=opens)
    tl.store(n_union + at, n)
    tl.debug_barrier()
    low = tl.load(union_words + i, mask=i < n, other=0)
    high = tl.load(union_words + i + 1, mask=i + 1 < n, other=0)
    high = tl.where(i + 1 < n, high, tl.sum(bit, 0).to(tl.int32))
    tl.debug_barrier()
    tl.store(union_words + i, high - low, mask=i < n)


# --- pieces shared with the backward -------------------------------------------------------------------------------


@triton.jit
def dot(a, b, c):
    """a @ b + c in fp32 (c None = 0); fp32 operands are not rounded to tf32."""
    if INTERPRETED:  # the interpreter would multiply the bits of bf16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def load_rows(ptr, index, valid, stride, D: tl.constexpr, BD: tl.constexpr):
    """(rows, BD): row index[r] of ptr where valid, else zero; columns past D are zero."""
    d = tl.arange(0, BD)
    ptrs = ptr + index[:, None] * stride + d[None, :]
    if BD == D:
        return tl.load(ptrs, mask=valid[:, None], other=0.0)
    else:
        return tl.load(ptrs, mask=valid[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def tile_rows(order, tile_pos, tile_start, b, tile, n_tiles, window, dense_len, GROUP: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr):
    """What every row (query, head of the group) of a tile needs: index r of the tile is query r // GP, head r % GP.

    Returns (slot, head, query, pos, valid, low, limit, start): the row reads keys [low, pos] next to itself, and sinks and
    blocks up to key `limit`, which is -1 for dense queries.
    """
    r = tl.arange(0, BT * GP)
    slot, head = r // GP, r % GP
    at = (b * n_tiles + tile) * BT
    query = tl.load(order + at + slot)
    pos = tl.load(tile_pos + at + slot)
    start = tl.load(tile_start + b * n_tiles + tile)
    valid = (query >= 0) & (head < GROUP)
    dense = pos - start < dense_len
    low = tl.where(dense, start, tl.maximum(start, pos - window + 1))
    limit = tl.where(dense | (query < 0), -1, pos - window)
    return slot, head, query, pos, valid, low, limit, start


@triton.jit
def union_part(union_ids, union_words, n, c0, BN: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [c0, c0 + BN) of a union laid out key after key: (key, word of queries, column in use)."""
    column = c0 + tl.arange(0, BN)
    entry = column // BLOCK
    inside = entry < n
    key = tl.load(union_ids + entry, mask=inside, other=0) * BLOCK + column % BLOCK
    word = tl.load(union_words + entry, mask=inside, other=0)
    return key, word, inside


@triton.jit
def online_softmax(total, m, norm, q, k, v, mask, scale):
    """Takes one tile of keys into the running softmax; scores are in powers of two. m starts finite, so no NaN arises."""
    s = dot(q, tl.trans(k), None) * scale  # (rows, keys)
    s = tl.where(mask, s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - new_m[:, None])
    shrink = tl.exp2(m - new_m)
    norm = norm * shrink + tl.sum(p, 1)
    total = dot(p.to(v.dtype), v, total * shrink[:, None])
    return total, new_m, norm


# --- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    q, k, v,  # (B, T, H, D), (B, S, HK, D) twice, by strides
    out, lse,  # (B, T, H, D) and (B, T, H) fp32, contiguous; lse is the base-2 logarithm of the softmax's denominator
    order, tile_pos, tile_start, union_ids, union_words, n_union,
    q_sb, q_st, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh,
    T, HK, n_tiles, window, n_sinks, dense_len, scale,
    M: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    tile, h, b = n_tiles - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)  # the longest first
    slot, head, query, pos, valid, low, limit, start = tile_rows(order, tile_pos, tile_start, b, tile, n_tiles, window, dense_len, GROUP, GP, BT)
    b64 = b.to(tl.int64)
    q += b64 * q_sb + (h * GROUP) * q_sh
    k += b64 * k_sb + h * k_sh
    v += b64 * v_sb + h * v_sh
    rows = load_rows(q, query.to(tl.int64) * q_st + head * q_sh, valid, 1, D, BD)  # (BT * GP, BD)
    total = tl.zeros((BT * GP, BD), tl.float32)
    m = tl.full((BT * GP,), -1e30, tl.float32)
    norm = tl.zeros((BT * GP,), tl.float32)

    first = tl.min(tl.where(query >= 0, low, 2147483647), 0)
    stop = tl.max(pos, 0) + 1
    for k0 in tl.range(first, stop, BN):
        key = k0 + tl.arange(0, BN)
        inside = key < stop
        mask = (key[None, :] <= pos[:, None]) & (key[None, :] >= low[:, None])
        total, m, norm = online_softmax(total, m, norm, rows, load_rows(k, key, inside, k_ss, D, BD), load_rows(v, key, inside, v_ss, D, BD), mask, scale)

    if SPARSE:
        last = tl.max(limit, 0)
        for k0 in tl.range(start, tl.minimum(start + n_sinks, last + 1), 16):
            key = k0 + tl.arange(0, 16)
            inside = (key < start + n_sinks) & (key <= last)
            mask = inside[None, :] & (key[None, :] <= limit[:, None])
            total, m, norm = online_softmax(total, m, norm, rows, load_rows(k, key, inside, k_ss, D, BD), load_rows(v, key, inside, v_ss, D, BD), mask, scale)

    if M > 0:
        at = (b * HK + h).to(tl.int64) * n_tiles + tile
        n = tl.load(n_union + at)
        for c0 in tl.range(0, n * BLOCK, BN):
            key, word, inside = union_part(union_ids + at * BT * M, union_words + at * BT * M, n, c0, BN, BLOCK)
            mask = (((word[None, :] >> slot[:, None]) & 1) != 0) & (key >= start + n_sinks)[None, :] & (key[None, :] <= limit[:, None])
            total, m, norm = online_softmax(total, m, norm, rows, load_rows(k, key, inside, k_ss, D, BD), load_rows(v, key, inside, v_ss, D, BD), mask, scale)

    result = total / tl.where(norm > 0, norm, 1.0)[:, None]
    row = (b64 * T + query) * (HK * GROUP) + h * GROUP + head
    d = tl.arange(0, BD)
    tl.store(out + row[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])
    tl.store(lse + row, m + tl.log2(tl.where(norm > 0, norm, 1.0)), mask=valid)


def launch_config(head_dim: int, group: int, dtype: torch.dtype) -> dict:
    """Tile sizes and launch options of the forward: BT queries (at most 32: a word of bits) times the padded group are the rows."""
    group = triton.next_power_of_2(group)
    if dtype == torch.float32:  # no tensor cores: both factors of a product sit in registers
        return {"BT": max(1, min(32, (32 if head_dim <= 64 else 16) // group)), "BN": 16, "num_warps": 4 if head_dim <= 64 else 8, "num_stages": 2}
    rows = 64 if head_dim <= 128 else 32
    return {"BT": max(1, min(32, rows // group)), "BN": 64 if head_dim <= 128 else 32, "num_warps": 4, "num_stages": 3 if head_dim <= 64 and group > 1 else 2}


def padded_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def by_rows(x: Tensor) -> Tensor:
    """x with its last dimension dense, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Union(NamedTuple):
    ids: Tensor  # (B, Hk, n_tiles, tile size * M) int32: blocks that a tile's queries chose, ascending
    words: Tensor  # the same shape, int32: bit i = the tile's query in slot i chose the block
    n: Tensor  # (B, Hk, n_tiles) int32: how many there are


def make_union(block_ids: Tensor, tiles: Tiles) -> Union:
    """The sorted union of block_ids (B, T, Hk, M) of each tile's queries."""
    block_ids = block_ids.int().contiguous()
    B, T, Hk, M = block_ids.shape
    shape = (B, Hk, tiles.n_tiles, tiles.size * M)
    ids, words = (torch.empty(shape, dtype=torch.int32, device=block_ids.device) for _ in range(2))
    n = torch.empty(shape[:3], dtype=torch.int32, device=block_ids.device)
    union_kernel[(tiles.n_tiles, Hk, B)](
        block_ids, tiles.order, ids, words, n, T, Hk, tiles.n_tiles,
        M=M, MP=triton.next_power_of_2(M), BT=tiles.size, COUNTING=INTERPRETED, num_warps=4,
    )  # fmt: skip
    return Union(ids, words, n)


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, plan: AttentionPlan, spec: SparseSpec | None
) -> tuple[Tensor, Tensor, Tiles, Union | None]:
    """(out (B, T, H, D), lse (B, T, H), tiles, union) of the queries over what block_ids (B, T, Hk, M) and spec name; spec None = all."""
    B, T, H, D = q.shape
    Hk = k.shape[2]
    G = H // Hk
    config = launch_config(D, G, q.dtype)
    window, n_sinks, dense_len, block = (1, 0, EVERYTHING, 16) if spec is None else (spec.window, spec.n_sinks, spec.dense_len, spec.block_size)
    M = 0 if spec is None else block_ids.shape[-1]
    tiles = make_tiles(plan, config["BT"], window, dense_len)
    union = make_union(block_ids, tiles) if M else None
    new = torch.zeros if plan.has_padding else torch.empty
    out = new(q.shape, dtype=q.dtype, device=q.device)
    lse = new((B, T, H), dtype=torch.float32, device=q.device)
    forward_kernel[(tiles.n_tiles, Hk, B)](
        q, k, v, out, lse, tiles.order, tiles.pos, tiles.start, *(union or (tiles.order,) * 3), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        T, Hk, tiles.n_tiles, window, n_sinks, dense_len, D**-0.5 * LOG2_E,
        M=M, GROUP=G, GP=triton.next_power_of_2(G), D=D, BD=padded_dim(D), BLOCK=block, SPARSE=spec is not None, **config,
    )  # fmt: skip
    return out, lse, tiles, union


AOT_SHAPES = [(64, 1), (64, 2), (64, 4), (64, 7), (64, 16), (96, 3), (128, 2), (128, 4), (128, 8), (256, 4)]  # (head_dim, group)


def aot_shapes():
    """(head_dim, group, dtype) of the prefill kernels' ahead-of-time cases."""
    for head_dim, group in AOT_SHAPES:
        yield head_dim, group, torch.bfloat16
    yield 64, 2, torch.float16
    yield 64, 2, torch.float32
    yield 128, 4, torch.float32


TYPE_NAME = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
STRIDES = ("q_sb", "q_st", "q_sh", "k_sb", "k_ss", "k_sh", "v_sb", "v_ss", "v_sh")
TABLES = ("order", "tile_pos", "tile_start", "union_ids", "union_words", "n_union")


def aot_cases(target: str):
    """(kernel, signature, constexprs, options, label) of what `kernels.aot` compiles ahead of time."""
    for bt, m in ((32, 16), (16, 16), (4, 32)):
        pointers = dict.fromkeys(("block_ids", "order", "union_ids", "union_words", "n_union"), "*i32")
        constexprs = {"M": m, "MP": triton.next_power_of_2(m), "BT": bt, "COUNTING": False}
        yield union_kernel, pointers | dict.fromkeys(("T", "HK", "n_tiles"), "i32"), constexprs, {"num_warps": 4, "num_stages": 3}, f"union bt{bt} m{m}"
    for head_dim, group, dtype in aot_shapes():
        name = TYPE_NAME[dtype]
        signature = dict.fromkeys(("q", "k", "v", "out"), f"*{name}") | {"lse": "*fp32"} | dict.fromkeys(TABLES, "*i32")
        signature |= dict.fromkeys((*STRIDES, "T", "HK", "n_tiles", "window", "n_sinks", "dense_len"), "i32") | {"scale": "fp32"}
        constexprs, options = forward_constants(head_dim, group, dtype)
        for kind, extra in (("sparse", {"M": 16, "SPARSE": True}), ("dense", {"M": 0, "SPARSE": False})):
            yield forward_kernel, signature, constexprs | extra, options, f"prefill forward {kind} {name} d{head_dim} g{group}"


def forward_constants(head_dim: int, group: int, dtype: torch.dtype, block: int = 16) -> tuple[dict, dict]:
    config = launch_config(head_dim, group, dtype)
    options = {x: config.pop(x) for x in ("num_warps", "num_stages")}
    return config | {"GROUP": group, "GP": triton.next_power_of_2(group), "D": head_dim, "BD": padded_dim(head_dim), "BLOCK": block}, options
