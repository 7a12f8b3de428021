"""Attention of many queries, backward. Every gradient element is summed by one program in a fixed order: no atomics, and two runs agree bit for bit.

- `dq_kernel`: by tile of queries, the forward's loops again (it also makes delta, the row sums of out * d_out);
- `near_kernel`: by tile of keys, the queries that read them as window or, being dense, as part of everything; writes dk, dv;
- `sinks_kernel`, `add_sinks_kernel`: the sinks' keys meet every query of their document, so that is split in two steps;
- `blocks_kernel`: by key block, the tiles of queries whose union holds it (the unions turned round: `invert_union`); adds to dk, dv.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.prefill_triton import (
    LOG2_E,
    STRIDES,
    TABLES,
    TYPE_NAME,
    Union,
    aot_shapes,
    by_rows,
    dot,
    forward_constants,
    load_rows,
    padded_dim,
    tile_rows,
    union_part,
)
from kernels.spec import AttentionPlan, SparseSpec
from kernels.tiles import EVERYTHING, Tiles, make_key_ranges

SINK_RUN = 64  # tiles of queries that one program of sinks_kernel sums over


# --- dq ------------------------------------------------------------------------------------------------------------


@triton.jit
def query_gradient(dq, rows, do, lse, delta, k, v, mask, scale):
    """dq (rows, BD) with one tile of keys added."""
    s = dot(rows, tl.trans(k), None) * scale  # (rows, keys)
    p = tl.where(mask, tl.exp2(s - lse[:, None]), 0.0)
    dp = dot(do, tl.trans(v), None)
    ds = p * (dp - delta[:, None])
    return dot(ds.to(k.dtype), k, dq)


@triton.jit
def dq_kernel(
    q, k, v, do,  # (B, T, H, D), (B, S, HK, D) twice, (B, T, H, D), by strides
    out, lse, delta, dq,  # (B, T, H, D), (B, T, H) fp32 twice, (B, T, H, D), contiguous; delta and dq are written
    order, tile_pos, tile_start, union_ids, union_words, n_union,
    q_sb, q_st, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, do_sb, do_st, do_sh,
    T, HK, n_tiles, window, n_sinks, dense_len, scale, score_scale,
    M: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    tile, h, b = n_tiles - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, head, query, pos, valid, low, limit, start = tile_rows(order, tile_pos, tile_start, b, tile, n_tiles, window, dense_len, GROUP, GP, BT)
    b64 = b.to(tl.int64)
    k += b64 * k_sb + h * k_sh
    v += b64 * v_sb + h * v_sh
    rows = load_rows(q + b64 * q_sb + (h * GROUP) * q_sh, query.to(tl.int64) * q_st + head * q_sh, valid, 1, D, BD)  # (BT * GP, BD)
    d_rows = load_rows(do + b64 * do_sb + (h * GROUP) * do_sh, query.to(tl.int64) * do_st + head * do_sh, valid, 1, D, BD)
    row = (b64 * T + query) * (HK * GROUP) + h * GROUP + head
    row_delta = tl.sum(load_rows(out, row, valid, D, D, BD).to(tl.float32) * d_rows.to(tl.float32), 1)
    tl.store(delta + row, row_delta, mask=valid)
    row_lse = tl.load(lse + row, mask=valid, other=0.0)
    total = tl.zeros((BT * GP, BD), tl.float32)

    first = tl.min(tl.where(query >= 0, low, 2147483647), 0)
    stop = tl.max(pos, 0) + 1
    for k0 in tl.range(first, stop, BN):
        key = k0 + tl.arange(0, BN)
        inside = key < stop
        mask = (key[None, :] <= pos[:, None]) & (key[None, :] >= low[:, None])
        total = query_gradient(
            total, rows, d_rows, row_lse, row_delta, load_rows(k, key, inside, k_ss, D, BD), load_rows(v, key, inside, v_ss, D, BD), mask, score_scale
        )
    if SPARSE:
        last = tl.max(limit, 0)
        for k0 in tl.range(start, tl.minimum(start + n_sinks, last + 1), 16):
            key = k0 + tl.arange(0, 16)
            inside = (key < start + n_sinks) & (key <= last)
            mask = inside[None, :] & (key[None, :] <= limit[:, None])
            total = query_gradient(
                total, rows, d_rows, row_lse, row_delta, load_rows(k, key, inside, k_ss, D, BD), load_rows(v, key, inside, v_ss, D, BD), mask, score_scale
            )
    if M > 0:
        at = (b * HK + h).to(tl.int64) * n_tiles + tile
        n = tl.load(n_union + at)
        for c0 in tl.range(0, n * BLOCK, BN):
            key, word, inside = union_part(union_ids + at * BT * M, union_words + at * BT * M, n, c0, BN, BLOCK)
            mask = (((word[None, :] >> slot[:, None]) & 1) != 0) & (key >= start + n_sinks)[None, :] & (key[None, :] <= limit[:, None])
            total = query_gradient(
                total, rows, d_rows, row_lse, row_delta, load_rows(k, key, inside, k_ss, D, BD), load_rows(v, key, inside, v_ss, D, BD), mask, score_scale
            )
    d = tl.arange(0, BD)
    tl.store(dq + row[:, None] * D + d[None, :], (total * scale).to(dq.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])


# --- dk, dv --------------------------------------------------------------------------------------------------------


@triton.jit
def key_gradients(
    dk, dv,  # (keys, BD), what is summed up so far
    keys_k, keys_v, mask,  # (keys, BD) twice, (keys, rows)
    q, do, lse, delta,  # at this row of the batch and KV head, except lse and delta
    b, h, query, head, valid, q_st, q_sh, do_st, do_sh, T, HK, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """(dk, dv) with the queries of one tile added."""
    rows = load_rows(q, query.to(tl.int64) * q_st + head * q_sh, valid, 1, D, BD)  # (rows, BD)
    d_rows = load_rows(do, query.to(tl.int64) * do_st + head * do_sh, valid, 1, D, BD)
    row = (b.to(tl.int64) * T + query) * (HK * GROUP) + h * GROUP + head
    row_lse = tl.load(lse + row, mask=valid, other=0.0)
    row_delta = tl.load(delta + row, mask=valid, other=0.0)
    s = dot(keys_k, tl.trans(rows), None) * scale  # (keys, rows)
    p = tl.where(mask, tl.exp2(s - row_lse[None, :]), 0.0)
    dv = dot(p.to(d_rows.dtype), d_rows, dv)
    dp = dot(keys_v, tl.trans(d_rows), None)
    ds = tl.where(mask, p * (dp - row_delta[None, :]), 0.0)  # the mask again: a key that nobody reads may be NaN
    dk = dot(ds.to(rows.dtype), rows, dk)
    return dk, dv


@triton.jit
def near_kernel(
    q, k, v, do, lse, delta,
    dk, dv,  # (B, S, HK, D) fp32, contiguous, written
    order, tile_pos, tile_start, range_first, range_stop,
    q_sb, q_st, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, do_sb, do_st, do_sh,
    T, S, HK, n_tiles, window, dense_len, scale, score_scale,
    GROUP: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    key_tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b64 = b.to(tl.int64)
    key = key_tile * BN + tl.arange(0, BN)
    keys_k = load_rows(k + b64 * k_sb + h * k_sh, key, key < S, k_ss, D, BD)  # (BN, BD)
    keys_v = load_rows(v + b64 * v_sb + h * v_sh, key, key < S, v_ss, D, BD)
    q += b64 * q_sb + (h * GROUP) * q_sh
    do += b64 * do_sb + (h * GROUP) * do_sh
    sum_k, sum_v = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    at = b * tl.num_programs(0) + key_tile
    for tile in tl.range(tl.load(range_first + at), tl.load(range_stop + at)):
        slot, head, query, pos, valid, low, limit, start = tile_rows(order, tile_pos, tile_start, b, tile, n_tiles, window, dense_len, GROUP, GP, BT)
        mask = (key[:, None] <= pos[None, :]) & (key[:, None] >= low[None, :]) & valid[None, :]
        sum_k, sum_v = key_gradients(
            sum_k, sum_v, keys_k, keys_v, mask, q, do, lse, delta, b, h, query, head, valid, q_st, q_sh, do_st, do_sh, T, HK, score_scale, GROUP, D, BD
        )
    d = tl.arange(0, BD)
    at_key = ((b64 * S + key)[:, None] * HK + h) * D + d[None, :]
    inside = (key < S)[:, None] & (d < D)[None, :]
    tl.store(dk + at_key, sum_k * scale, mask=inside)
    tl.store(dv + at_key, sum_v, mask=inside)


@triton.jit
def sinks_kernel(
    q, k, v, do, lse, delta,
    partial_k, partial_v,  # (n_runs, HK, n_chunks * 16, D) fp32, written
    order, tile_pos, tile_start,
    runs,  # (n_runs, 3) int32: row of the batch, first tile, stop tile; all of one document
    q_sb, q_st, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, do_sb, do_st, do_sh,
    T, S, HK, n_tiles, window, n_sinks, dense_len, scale, score_scale,
    GROUP: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    run, h, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, first, stop = tl.load(runs + run * 3), tl.load(runs + run * 3 + 1), tl.load(runs + run * 3 + 2)
    b64 = b.to(tl.int64)
    j = chunk * 16 + tl.arange(0, 16)
    key = tl.load(tile_start + b * n_tiles + first) + j
    in_row = (j < n_sinks) & (key < S)
    keys_k = load_rows(k + b64 * k_sb + h * k_sh, key, in_row, k_ss, D, BD)  # (16, BD)
    keys_v = load_rows(v + b64 * v_sb + h * v_sh, key, in_row, v_ss, D, BD)
    q += b64 * q_sb + (h * GROUP) * q_sh
    do += b64 * do_sb + (h * GROUP) * do_sh
    sum_k, sum_v = tl.zeros((16, BD), tl.float32), tl.zeros((16, BD), tl.float32)
    for tile in tl.range(first, stop):
        slot, head, query, pos, valid, low, limit, start = tile_rows(order, tile_pos, tile_start, b, tile, n_tiles, window, dense_len, GROUP, GP, BT)
        mask = in_row[:, None] & (key[:, None] <= limit[None, :]) & valid[None, :]
        sum_k, sum_v = key_gradients(
            sum_k, sum_v, keys_k, keys_v, mask, q, do, lse, delta, b, h, query, head, valid, q_st, q_sh, do_st, do_sh, T, HK, score_scale, GROUP, D, BD
        )
    d = tl.arange(0, BD)
    at = (((run * HK + h).to(tl.int64) * tl.num_programs(2) + chunk) * 16 + tl.arange(0, 16))[:, None] * D + d[None, :]
    tl.store(partial_k + at, sum_k * scale, mask=(d < D)[None, :])
    tl.store(partial_v + at, sum_v, mask=(d < D)[None, :])


@triton.jit
def add_sinks_kernel(
    partial_k, partial_v, dk, dv,
    run_start,  # (n_runs,) int32: first key of the run's document
    run_offset,  # (B + 1,) int32: runs of row b are [run_offset[b], run_offset[b + 1])
    S, HK, n_chunks, n_sinks,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BD)
    for run in tl.range(tl.load(run_offset + b), tl.load(run_offset + b + 1)):
        for chunk in tl.range(0, n_chunks):
            j = chunk * 16 + tl.arange(0, 16)
            key = tl.load(run_start + run) + j
            inside = ((j < n_sinks) & (key < S))[:, None] & (d < D)[None, :]
            here = ((run * HK + h).to(tl.int64) * n_chunks * 16 + j)[:, None] * D + d[None, :]
            there = ((b.to(tl.int64) * S + key)[:, None] * HK + h) * D + d[None, :]
            tl.store(dk + there, tl.load(dk + there, mask=inside, other=0.0) + tl.load(partial_k + here, mask=inside, other=0.0), mask=inside)
            tl.store(dv + there, tl.load(dv + there, mask=inside, other=0.0) + tl.load(partial_v + here, mask=inside, other=0.0), mask=inside)
            tl.debug_barrier()  # documents of a strange plan may share keys; then the next run adds to what this one stored


@triton.jit
def blocks_kernel(
    q, k, v, do, lse, delta,
    dk, dv,  # (B, S, HK, D) fp32, contiguous, added to
    order, tile_pos, tile_start,
    block_offset,  # (B, HK, N + 1) int32: block n's entries are [block_offset[n], block_offset[n + 1])
    entry_tile, entry_word,  # (B, HK, n_entries) int32: a tile of queries, and which of them chose the block
    q_sb, q_st, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, do_sb, do_st, do_sh,
    T, S, HK, n_tiles, n_entries, window, n_sinks, dense_len, scale, score_scale,
    GROUP: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    n, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = (b * HK + h).to(tl.int64)
    begin = tl.load(block_offset + at * (tl.num_programs(0) + 1) + n)
    end = tl.load(block_offset + at * (tl.num_programs(0) + 1) + n + 1)
    entry_tile += at * n_entries
    entry_word += at * n_entries
    q += b.to(tl.int64) * q_sb + (h * GROUP) * q_sh
    do += b.to(tl.int64) * do_sb + (h * GROUP) * do_sh
    d = tl.arange(0, BD)
    if end > begin:
        for part in tl.range(0, BLOCK, BN):
            key = n * BLOCK + part + tl.arange(0, BN)
            inside = part + tl.arange(0, BN) < BLOCK
            keys_k = load_rows(k + b.to(tl.int64) * k_sb + h * k_sh, key, inside, k_ss, D, BD)  # (BN, BD)
            keys_v = load_rows(v + b.to(tl.int64) * v_sb + h * v_sh, key, inside, v_ss, D, BD)
            sum_k, sum_v = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
            for e in tl.range(begin, end):
                tile, word = tl.load(entry_tile + e), tl.load(entry_word + e)
                slot, head, query, pos, valid, low, limit, start = tile_rows(order, tile_pos, tile_start, b, tile, n_tiles, window, dense_len, GROUP, GP, BT)
                chose = valid & (((word >> slot) & 1) != 0)
                mask = chose[None, :] & inside[:, None] & (key >= start + n_sinks)[:, None] & (key[:, None] <= limit[None, :])
                sum_k, sum_v = key_gradients(
                    sum_k, sum_v, keys_k, keys_v, mask, q, do, lse, delta, b, h, query, head, valid, q_st, q_sh, do_st, do_sh, T, HK, score_scale, GROUP, D, BD
                )
            there = ((b.to(tl.int64) * S + key)[:, None] * HK + h) * D + d[None, :]
            both = inside[:, None] & (d < D)[None, :]
            tl.store(dk + there, tl.load(dk + there, mask=both, other=0.0) + sum_k * scale, mask=both)
            tl.store(dv + there, tl.load(dv + there, mask=both, other=0.0) + sum_v, mask=both)


# --- host ----------------------------------------------------------------------------------------------------------


def launch_config(head_dim: int, group: int, dtype: torch.dtype) -> dict[str, dict]:
    """Options per kernel; BT is the forward's, for the unions are built for it. BN: keys per step or program."""
    if dtype == torch.float32:  # no tensor cores: both factors of a product sit in registers
        near = far = {"BN": 16, "num_warps": 4 if head_dim <= 64 else 8, "num_stages": 2}
    else:
        far = {"BN": 32, "num_warps": 8, "num_stages": 2}
        near = far | ({"num_warps": 4} if head_dim <= 64 else {"BN": 64} if head_dim <= 128 else {})  # 64 keys at head_dim 64 spill on sm_80
    few = {"num_warps": 4, "num_stages": 2}  # 16 keys at a time; the sinks in 16 bits spill with two stages under Triton 3.7
    return {"dq": far, "near": near, "sinks": few | ({} if dtype == torch.float32 else {"num_stages": 1}), "blocks": few}


class SinkRuns(NamedTuple):
    runs: Tensor  # (n_runs, 3) int32: row of the batch, first tile, stop tile
    start: Tensor  # (n_runs,) int32
    offset: Tensor  # (B + 1,) int32


def make_sink_runs(plan: AttentionPlan, tiles: Tiles, window: int, dense_len: int) -> SinkRuns:
    """Runs of up to SINK_RUN tiles of one document that hold sparse queries. Reads back once per plan."""

    def build() -> SinkRuns:
        B, n = tiles.start.shape
        pos = tiles.pos.view(B, n, tiles.size)
        away = pos - tiles.start.unsqueeze(-1)
        reads = ((pos >= 0) & (away >= dense_len) & (away >= window)).any(-1)
        runs, starts, offset = [], [], [0]
        for b, (row_start, row_reads) in enumerate(zip(tiles.start.tolist(), reads.tolist(), strict=True)):
            for t, (start, read) in enumerate(zip(row_start, row_reads, strict=True)):
                if not read:
                    continue
                if len(runs) > offset[-1] and runs[-1][2] == t and starts[-1] == start and t - runs[-1][1] < SINK_RUN:
                    runs[-1][2] = t + 1
                else:
                    runs.append([b, t, t + 1])
                    starts.append(start)
            offset.append(len(runs))
        device = pos.device
        return SinkRuns(*(torch.tensor(x, dtype=torch.int32, device=device) for x in (runs, starts, offset)))

    return plan.cached(("sink_runs", tiles.size, window, dense_len), build)


def invert_union(union: Union, n_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """(block_offset (B, Hk, N + 1), entry_tile, entry_word (B, Hk, n_entries)): for each block the tiles whose union holds it, ascending."""
    B, Hk, n_tiles, capacity = union.ids.shape
    place = torch.arange(capacity, dtype=torch.int32, device=union.ids.device)
    ids = torch.where(place < union.n.unsqueeze(-1), union.ids, n_blocks).flatten(2)
    ids, index = torch.sort(ids, dim=-1, stable=True)
    bounds = torch.arange(n_blocks + 1, dtype=torch.int32, device=ids.device).expand(B, Hk, -1).contiguous()
    offset = torch.searchsorted(ids, bounds, out_int32=True)
    return offset, (index // capacity).int(), union.words.flatten(2).gather(-1, index)


def keys_at_once(block_size: int, head_dim: int) -> int:
    """How many keys of a block `blocks_kernel` holds; more of them spill."""
    return max(16, min(32 if head_dim <= 64 else 16, triton.next_power_of_2(block_size)))


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, union: Union | None, tiles: Tiles, plan: AttentionPlan, spec: SparseSpec | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) for the outputs of `prefill_triton.forward`."""
    do = by_rows(do)
    B, T, H, D = q.shape
    S, Hk = k.shape[1:3]
    G = H // Hk
    config = launch_config(D, G, q.dtype)
    window, n_sinks, dense_len, block = (1, 0, EVERYTHING, 16) if spec is None else (spec.window, spec.n_sinks, spec.dense_len, spec.block_size)
    M = 0 if union is None else union.ids.shape[-1] // tiles.size
    shape = {"GROUP": G, "GP": triton.next_power_of_2(G), "D": D, "BD": padded_dim(D), "BT": tiles.size}
    scales = (D**-0.5, D**-0.5 * LOG2_E)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    tables = (tiles.order, tiles.pos, tiles.start)
    dq = (torch.zeros if plan.has_padding else torch.empty)(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    dq_kernel[(tiles.n_tiles, Hk, B)](
        q, k, v, do, out, lse, delta, dq, *tables, *(union or (tiles.order,) * 3), *strides, T, Hk, tiles.n_tiles, window, n_sinks, dense_len, *scales,
        M=M, BLOCK=block, SPARSE=spec is not None, **shape, **config["dq"],
    )  # fmt: skip
    dk, dv = (torch.empty(B, S, Hk, D, dtype=torch.float32, device=q.device) for _ in range(2))
    inputs = (q, k, v, do, lse, delta)
    ranges = make_key_ranges(plan, tiles, config["near"]["BN"], window, dense_len)
    near_kernel[(ranges.first.shape[1], Hk, B)](
        *inputs, dk, dv, *tables, *ranges, *strides, T, S, Hk, tiles.n_tiles, window, dense_len, *scales, **shape, **config["near"]
    )
    if n_sinks:
        sinks = make_sink_runs(plan, tiles, window, dense_len)
        n_runs, n_chunks = len(sinks.start), -(-n_sinks // 16)
        if n_runs:
            partial = torch.empty(2, n_runs, Hk, n_chunks * 16, D, dtype=torch.float32, device=q.device)
            sinks_kernel[(n_runs, Hk, n_chunks)](
                *inputs, *partial, *tables, sinks.runs, *strides, T, S, Hk, tiles.n_tiles, window, n_sinks, dense_len, *scales, **shape, **config["sinks"]
            )
            add_sinks_kernel[(Hk, B)](*partial, dk, dv, sinks.start, sinks.offset, S, Hk, n_chunks, n_sinks, D=D, BD=padded_dim(D), num_warps=4)
    if union is not None:
        n_blocks = -(-S // block)
        entries = invert_union(union, n_blocks)
        blocks_kernel[(n_blocks, Hk, B)](
            *inputs, dk, dv, *tables, *entries, *strides, T, S, Hk, tiles.n_tiles, entries[1].shape[-1], window, n_sinks, dense_len, *scales,
            BLOCK=block, BN=keys_at_once(block, D), **shape, **config["blocks"],
        )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def aot_cases(target: str):
    """(kernel, signature, constexprs, options, label) of what `kernels.aot` compiles ahead of time."""
    numbers = (*STRIDES, "do_sb", "do_st", "do_sh", "T", "S", "HK", "n_tiles", "n_entries", "n_chunks", "window", "n_sinks", "dense_len")
    tables = (*TABLES, "range_first", "range_stop", "runs", "run_start", "run_offset", "block_offset", "entry_tile", "entry_word")
    types = dict.fromkeys(numbers, "i32") | dict.fromkeys(tables, "*i32") | {"scale": "fp32", "score_scale": "fp32"}
    types |= dict.fromkeys(("lse", "delta", "dk", "dv", "partial_k", "partial_v"), "*fp32")
    for head_dim, group, dtype in aot_shapes():
        types |= dict.fromkeys(("q", "k", "v", "do", "out", "dq"), f"*{TYPE_NAME[dtype]}")
        shared, _ = forward_constants(head_dim, group, dtype)  # the tiles are the forward's
        config = launch_config(head_dim, group, dtype)
        kinds = {
            "dq sparse": (dq_kernel, config["dq"] | {"M": 16, "SPARSE": True}),
            "dq dense": (dq_kernel, config["dq"] | {"M": 0, "SPARSE": False}),
            "near": (near_kernel, config["near"]),
            "sinks": (sinks_kernel, config["sinks"]),
            "add sinks": (add_sinks_kernel, {"num_warps": 4, "num_stages": 3}),
            "blocks": (blocks_kernel, config["blocks"] | {"BN": keys_at_once(16, head_dim)}),
            "blocks of 64": (blocks_kernel, config["blocks"] | {"BLOCK": 64, "BN": keys_at_once(64, head_dim)}),
        }
        for kind, (kernel, chosen) in kinds.items():
            if kind == "add sinks" and (group != 2 or dtype != torch.bfloat16):
                continue  # depends on head_dim alone
            constexprs = {name: value for name, value in (shared | chosen).items() if name in kernel.arg_names}
            signature = {name: types[name] for name in kernel.arg_names if name not in constexprs}
            options = {"num_warps": chosen["num_warps"], "num_stages": chosen["num_stages"]}
            yield kernel, signature, constexprs, options, f"prefill backward {kind} {TYPE_NAME[dtype]} d{head_dim} g{group}"
