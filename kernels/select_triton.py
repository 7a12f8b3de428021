"""Block selection of many queries: scores and the best blocks in one kernel. Called by `triton_ops.py`.

A program serves a tile of queries of one KV head and goes twice over the pooled keys. The first pass multiplies in bf16
and keeps the largest of these rough scores per column of a tile and per stretch of BN neighbouring blocks. The M-th
largest of the columns', less what bf16 may be wrong by, is a floor that at least M blocks reach. The second pass scores
exactly, but only stretches where some query may reach its floor: of a long row a part, since neighbours choose alike. It
collects the blocks above the floor, a few more than M, in a small buffer; when it fills up, it is cut to its M best,
which raises the floor. Scores and ids are packed into one 64-bit key, best first, so ties go to the lower id.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.prefill_triton import TYPE_NAME, aot_shapes, by_rows, dot, padded_dim
from kernels.sort_triton import INTERPRETED, smallest
from kernels.spec import AttentionPlan, SparseSpec
from kernels.tiles import make_tiles

UNUSED = tl.constexpr(2**63 - 1)
LOWEST = tl.constexpr(-(2**31))
#: How far a rough score may be from the score, as a share of the product of both lengths: what rounding both to bf16 makes possible, and more.
ROUGH = tl.constexpr(1.05 * 2.0**-8)
SCRATCH_BYTES = 1 << 27  # most scratch memory of one launch


@triton.jit
def in_order(x):
    """fp32 numbers as int32 in the same order; -0.0 as 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def rough_scores(rows, rough, n, seen, D: tl.constexpr, BD: tl.constexpr, HK):
    """(BT, BW) scores of the queries' sums (BT, BD) with blocks n, in bf16; and the largest squared length of those blocks' mean keys."""
    d = tl.arange(0, BD)
    block = tl.load(rough + n[:, None] * (HK * D) + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)  # (BW, BD)
    longest = tl.max(tl.sum(block.to(tl.float32) * block.to(tl.float32), 1), 0)
    return dot(rows, tl.trans(block), None), longest


@triton.jit
def add_columns(score, q_sum, pooled, d0, n, seen, pooled_sn, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
    """score (BT, BN) plus the products of columns [d0, d0 + STEP)."""
    d = d0 + tl.arange(0, STEP)
    rows = tl.load(q_sum + tl.arange(0, BT)[:, None] * BD + d[None, :])  # (BT, STEP)
    block = tl.load(pooled + n[:, None] * pooled_sn + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)  # (BN, STEP)
    return tl.dot(rows, tl.trans(block), score, input_precision=PRECISION)


@triton.jit
def block_scores(q_sum, pooled, n, seen, stop, pooled_sn, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):
    """(BT, BN) scores as int32 in the order of the numbers; LOWEST where a query may not select the block.

    The queries are read again, a few columns at a time: "tf32x3" splits its operands in registers, which cannot hold them all.
    """
    STEP: tl.constexpr = 32 if BD > 32 else BD
    score = tl.zeros((BT, n.shape[0]), tl.float32)
    if BD > 64:
        for d0 in tl.range(0, BD, STEP):
            score = add_columns(score, q_sum, pooled, d0, n, seen, pooled_sn, D, BD, BT, STEP, PRECISION)
    else:
        for d0 in tl.static_range(0, BD, STEP):
            score = add_columns(score, q_sum, pooled, d0, n, seen, pooled_sn, D, BD, BT, STEP, PRECISION)
    return tl.where(n[None, :] < stop[:, None], in_order(score), LOWEST)


@triton.jit
def cut_to_best(buffer, count, M: tl.constexpr, MP: tl.constexpr, CAP: tl.constexpr, COUNTING: tl.constexpr):
    """(BT, MP) best keys of each query's buffer, UNUSED past the M-th."""
    c = tl.arange(0, CAP)
    tl.debug_barrier()
    keys = tl.load(buffer[:, None] + c[None, :], mask=c[None, :] < count[:, None], other=UNUSED)
    tl.debug_barrier()
    best = smallest(keys, MP, COUNTING)
    return tl.where((tl.arange(0, MP) < M)[None, :], best, UNUSED)


@triton.jit
def select_kernel(
    q,  # (B, T, H, D) by strides
    pooled, rough,  # (B, N, HK, D) fp32 by strides, and the same in bf16, contiguous; rows that no query may select can hold anything
    block_ids,  # (B, T, HK, M) int32, ascending, -1 = unused, at the end
    q_sums, maxima, buffers, visits,  # scratch: per query of the launch BD fp32, n_stretches fp32 and CAP int64; per tile n_stretches int32
    order, tile_pos, tile_start,  # tiles of plan (see tiles.py)
    q_sb, q_st, q_sh, pooled_sb, pooled_sn, pooled_sh,
    T, N, HK, n_tiles, tile0, n_stretches, window, n_sinks, dense_len,
    M: tl.constexpr, MP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, COUNTING: tl.constexpr,
):  # fmt: skip
    tile, h, b = tile0 + tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, d, column = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BN)
    at = b * n_tiles + tile
    query = tl.load(order + at * BT + slot)
    pos = tl.load(tile_pos + at * BT + slot)
    start = tl.load(tile_start + at)
    b64 = b.to(tl.int64)
    pooled += b64 * pooled_sb + h * pooled_sh
    rough += (b64 * N * HK + h) * D
    # selectable blocks are one range [first, stop): complete, in the document, not wholly in the sinks or the window
    first = tl.maximum((start + BLOCK - 1) // BLOCK, (start + n_sinks) // BLOCK)
    stop = tl.minimum((pos + 1) // BLOCK, tl.maximum(pos - window + BLOCK, 0) // BLOCK)
    stop = tl.where((query >= 0) & (pos - start >= dense_len), stop, 0)  # (BT,)
    last = tl.max(stop, 0)

    q += b64 * q_sb + (h * GROUP) * q_sh
    q_rows = q + query.to(tl.int64)[:, None] * q_st + d[None, :]
    q_mask = (query >= 0)[:, None] & (d < D)[None, :]
    rows = tl.zeros((BT, BD), tl.float32)
    for g in range(GROUP):
        rows += tl.load(q_rows + g * q_sh, mask=q_mask, other=0.0).to(tl.float32)
    program = (b * tl.num_programs(1) + h).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    q_sum = q_sums + program * BT * BD
    tl.store(q_sum + slot[:, None] * BD + d[None, :], rows)
    tl.debug_barrier()  # the program's own stores become readable

    # first pass: `floor`, below which a score is of no block chosen, and `worth`, the same for rough scores
    maxima += (program * BT + slot) * n_stretches
    top = tl.full((BT, BW), float("-inf"), tl.float32)
    longest = 0.0
    rough_rows = rows.to(tl.bfloat16)
    for n0 in tl.range(first, last, BW):
        n = n0 + tl.arange(0, BW)
        score, length = rough_scores(rough_rows, rough, n, n < last, D, BD, HK)
        score = tl.where(n[None, :] < stop[:, None], score, float("-inf"))
        longest = tl.maximum(longest, length)
        top = tl.maximum(top, score)
        i = (n0 - first) // BN + tl.arange(0, BW // BN)
        tl.store(maxima[:, None] + i[None, :], tl.max(tl.reshape(score, (BT, BW // BN, BN)), 2))
    best = smallest(~in_order(top), MP, COUNTING)  # ~x turns the order round
    nth = ~tl.max(tl.where((tl.arange(0, MP) < M)[None, :], best, LOWEST), 1)
    rough_floor = tl.where(nth < 0, nth ^ 0x7FFFFFFF, nth).to(tl.float32, bitcast=True)
    error = ROUGH * tl.sqrt(tl.sum(rows * rows, 1)) * tl.sqrt(longest)
    error = tl.where(error == error, error, float("inf"))
    floor = in_order(rough_floor - error) - 1
    worth = rough_floor - 2 * error

    # stretches that are worth it for some query
    visits += program * n_stretches
    n_visits, n_here = 0, (last - first + BN - 1) // BN
    tl.debug_barrier()
    for i0 in tl.range(0, n_here, BW):
        i = i0 + tl.arange(0, BW)
        best_of = tl.load(maxima[:, None] + i[None, :], mask=(slot >= 0)[:, None] & (i < n_here)[None, :], other=float("-inf"))
        visit = tl.max(((best_of >= worth[:, None]) & (best_of > float("-inf"))).to(tl.int32), 0)
        tl.store(visits + n_visits + tl.cumsum(visit, 0) - 1, first + i * BN, mask=visit > 0)
        n_visits += tl.sum(visit, 0)
    tl.debug_barrier()

    buffer = buffers + (program * BT + slot) * CAP
    count = tl.zeros((BT,), tl.int32)
    for i in tl.range(0, n_visits):
        n = tl.load(visits + i) + column
        score = block_scores(q_sum, pooled, n, n < last, stop, pooled_sn, D, BD, BT, PRECISION)
        found = (score > floor[:, None]).to(tl.int32)
        n_found = tl.sum(found, 1)
        if tl.max(count + n_found, 0) > CAP:
            kept = cut_to_best(buffer, count, M, MP, CAP, COUNTING)
            m = tl.arange(0, MP)
            tl.store(buffer[:, None] + m[None, :], kept, mask=(m[None, :] < count[:, None]) & (m < M)[None, :])
            worst = tl.max(tl.where((m < M)[None, :], kept, -UNUSED), 1)
            floor = tl.where(count >= M, (~(worst >> 32)).to(tl.int32), floor)
            count = tl.minimum(count, M)
            found = (score > floor[:, None]).to(tl.int32)
            n_found = tl.sum(found, 1)
        place = count[:, None] + tl.cumsum(found, 1) - 1
        key = ((~score).to(tl.int64) << 32) | n[None, :].to(tl.int64)  # ascending: best score first, then the lower id
        tl.store(buffer[:, None] + place, key, mask=found > 0)
        count += n_found

    m = tl.arange(0, MP)
    ids = tl.full((BT, MP), -1, tl.int32)
    if last > first:
        kept = cut_to_best(buffer, count, M, MP, CAP, COUNTING)
        ids = smallest(tl.where(kept == UNUSED, 0x7FFFFFFF, kept.to(tl.int32)), MP, COUNTING)
        ids = tl.where(ids == 0x7FFFFFFF, -1, ids)
    tl.store(block_ids + ((b64 * T + query) * HK + h)[:, None] * M + m[None, :], ids, mask=(query >= 0)[:, None] & (m < M)[None, :])


def launch_config(head_dim: int, n_selected_blocks: int, hopper: bool) -> dict:
    """BT queries against BW blocks at a time, roughly, then BN, exactly, BW > M and a multiple of BN; a buffer of CAP >= M + BN keys per query.
    `hopper`: the device is one, or newer.

    "ieee" products run on the ordinary cores; "tf32x3" on the tensor cores, to about 1e-6 of the score. Before Hopper both factors of a product sit in
    registers, and wide heads leave none to load ahead into.
    """
    m = max(16, triton.next_power_of_2(n_selected_blocks))
    wide = max(64, 2 * m)
    options = {"num_warps": 8, "num_stages": 2 if hopper or head_dim <= 64 else 1}
    return {"BT": 64 if m == 16 else 32, "BN": m, "BW": wide, "CAP": 4 * m, "PRECISION": "tf32x3"} | options


def select_blocks(q: Tensor, pooled: Tensor, plan: AttentionPlan, spec: SparseSpec) -> Tensor:
    """block_ids (B, T, Hk, M) int32 of q (B, T, H, D) against pooled (B, N, Hk, D): what `reference.select_blocks` defines."""
    q, pooled = by_rows(q.detach()), by_rows(pooled.detach().float())
    B, T, H, D = q.shape
    Hk, M = pooled.shape[2], spec.n_selected_blocks
    ids = torch.full((B, T, Hk, M), -1, dtype=torch.int32, device=q.device)
    if M == 0 or plan.all_dense(spec.dense_len) or pooled.shape[1] == 0:
        return ids
    config = launch_config(D, M, not q.is_cuda or torch.cuda.get_device_capability(q.device) >= (9, 0))
    tiles = make_tiles(plan, config["BT"], spec.window, spec.dense_len)
    rough = pooled[:, : (plan.max_pos + 1) // spec.block_size].to(torch.bfloat16).contiguous()
    n_stretches = triton.cdiv(rough.shape[1], config["BW"]) * config["BW"] // config["BN"]
    per_query = 8 * config["CAP"] + 4 * (padded_dim(D) + n_stretches)
    step = min(tiles.n_tiles, max(1, SCRATCH_BYTES // (B * Hk * config["BT"] * per_query)))
    n_queries = B * Hk * step * config["BT"]
    q_sums = torch.empty(n_queries * padded_dim(D), dtype=torch.float32, device=q.device)
    maxima = torch.empty(n_queries * n_stretches, dtype=torch.float32, device=q.device)
    visits = torch.empty(n_queries // config["BT"] * n_stretches, dtype=torch.int32, device=q.device)
    buffers = torch.empty(n_queries * config["CAP"], dtype=torch.int64, device=q.device)
    for tile0 in range(0, tiles.n_tiles, step):
        select_kernel[(min(step, tiles.n_tiles - tile0), Hk, B)](
            q, pooled, rough, ids, q_sums, maxima, buffers, visits, tiles.order, tiles.pos, tiles.start, *q.stride()[:3], *pooled.stride()[:3],
            T, rough.shape[1], Hk, tiles.n_tiles, tile0, n_stretches, spec.window, spec.n_sinks, spec.dense_len,
            M=M, MP=triton.next_power_of_2(M), GROUP=H // Hk, D=D, BD=padded_dim(D), BLOCK=spec.block_size, COUNTING=INTERPRETED, **config,
        )  # fmt: skip
    return ids


def aot_cases(target: str):
    """(kernel, signature, constexprs, options, label) of what `kernels.aot` compiles ahead of time."""
    pointers = dict.fromkeys(("pooled", "q_sums", "maxima"), "*fp32") | {"rough": "*bf16", "buffers": "*i64"}
    pointers |= dict.fromkeys(("block_ids", "visits", "order", "tile_pos", "tile_start"), "*i32")
    numbers = ("q_sb", "q_st", "q_sh", "pooled_sb", "pooled_sn", "pooled_sh")
    numbers += ("T", "N", "HK", "n_tiles", "tile0", "n_stretches", "window", "n_sinks", "dense_len")
    shapes = {(head_dim, dtype): group for head_dim, group, dtype in aot_shapes()}  # a group's size only changes the length of a loop
    for (head_dim, dtype), group in shapes.items():
        for m in (16, 32) if head_dim <= 128 and dtype == torch.bfloat16 else (16,):
            constexprs = launch_config(head_dim, m, target != "sm_80")
            options = {x: constexprs.pop(x) for x in ("num_warps", "num_stages")}
            constexprs |= {"M": m, "MP": triton.next_power_of_2(m), "GROUP": group, "D": head_dim, "BD": padded_dim(head_dim), "BLOCK": 16, "COUNTING": False}
            signature = {"q": f"*{TYPE_NAME[dtype]}"} | pointers | dict.fromkeys(numbers, "i32")
            yield select_kernel, signature, constexprs, options, f"select {TYPE_NAME[dtype]} d{head_dim} g{group} m{m}"
