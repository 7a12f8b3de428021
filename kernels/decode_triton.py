"""Decode and verification on a GPU: a few queries per row against a long cache, contiguous or paged. Definition: `reference.py`, `paged_reference.py`.

One query per row leaves a GPU empty unless the keys are split over programs (split-K):
  sparse: `score_kernel` (pooled keys) -> `choose_kernel` (best blocks) -> `sparse_kernel` in splits -> `merge_kernel`
  dense:                                                                   `dense_kernel` in splits  -> `merge_kernel`
A call that one split serves writes its result at once and needs no merge. Every kernel is deterministic, and the splits follow
from shapes and the plan's largest position alone, so where pages lie changes no bit. Nothing here synchronises with the device.
Forward only. Launch configurations are those of `launch_config`; nothing is tuned at run time.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.paged import PagedKV, check_paged
from kernels.spec import AttentionPlan, SparseSpec

LOG2_E = tl.constexpr(1.4426950408889634)
UNIT = tl.constexpr(16)  # strides travel in units of 16 elements, so the compiler knows that every row starts at a multiple of 16 bytes
TARGET_PROGRAMS = 396  # three for each of an H100's 132 SMs: what their registers and shared memory have room for
CHOOSE_SIZES = (512, 2048, 8192)  # blocks ranked at once; more are ranked in several passes over the last size
# arguments that change from call to call: no recompilation when one happens to be 1 or a multiple of 16
RUNTIME = "T n_blocks n_pages_per_row stride_row stride_block stride_key stride_head n_sinks window dense_len keys_per_split n_splits".split()
SCORE_ELEMENTS = 4096  # elements of a tile of pooled keys: fp32, 32 registers of each of 128 threads


# --- shared pieces -------------------------------------------------------------------------------------------------


@triton.jit
def _row_of_keys(keys, ok, b, page_table_ptr, n_pages_per_row, PAGED: tl.constexpr, PER_PAGE: tl.constexpr):
    """(row, slot, ok) of each key: its page and place there, or simply its batch row and itself. PER_PAGE keys to a page."""
    if PAGED:
        page = tl.load(page_table_ptr + b.to(tl.int64) * n_pages_per_row + keys // PER_PAGE, mask=ok, other=-1)
        ok = ok & (page >= 0)
        return page, keys % PER_PAGE, ok
    else:
        return tl.zeros_like(keys) + b, keys, ok


@triton.jit
def _offsets(row, slot, hk, stride_row, stride_key, stride_head):
    """Element offset (int64) of each key's vector; strides in UNITs."""
    return (row.to(tl.int64) * stride_row + slot.to(tl.int64) * stride_key + hk.to(tl.int64) * stride_head) * UNIT


@triton.jit
def _load_rows(ptr, offsets, ok, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile (keys, BLOCK_D); zero where not ok, so that what nobody sees (NaN perhaps) never meets a product."""
    d = tl.arange(0, BLOCK_D)
    mask = ok[:, None]
    if D != BLOCK_D:
        mask = mask & (d < D)[None, :]
    return tl.load(ptr + offsets[:, None] + d[None, :], mask=mask, other=0)


@triton.jit
def _attend(q, acc, m, total, valid, k, v, k_scale, v_scale, scale, INT8: tl.constexpr, UPCAST: tl.constexpr):
    """One tile of keys into the running softmax: acc (R, BLOCK_D) and total (R) are relative to the maximum m (R), in powers of two."""
    if UPCAST:  # on a CPU: Triton's interpreter multiplies the bits of a bf16 as if they were integers
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    elif INT8:
        k, v = k.to(q.dtype), v.to(q.dtype)  # exact: int8 fits into 8 bits of significand
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (R, BLOCK_S)
    if INT8:
        s = s * k_scale[None, :]
    s = tl.where(valid, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing: -inf - -inf is NaN
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m - shift)
    total = total * alpha + tl.sum(p, 1)
    if INT8:
        p = p * v_scale[None, :]
    acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return acc, m_new, total


@triton.jit
def _store(acc, m, total, out_row, row_ok, split, out_ptr, part_ptr, stat_ptr, n_splits, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr):
    """The answer of rows out_row (R) of out (B * T * H, D), or this split's share of it. A row that saw nothing is zero."""
    d = tl.arange(0, BLOCK_D)
    mask = row_ok[:, None] & (d < D)[None, :]
    if SPLIT:
        place = out_row.to(tl.int64) * n_splits + split
        tl.store(part_ptr + place[:, None] * D + d[None, :], acc, mask=mask)
        tl.store(stat_ptr + place * 2, m, mask=row_ok)
        tl.store(stat_ptr + place * 2 + 1, total, mask=row_ok)
    else:
        out = acc / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(out_ptr + out_row.to(tl.int64)[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _selectable_range(q_pos, doc_start, n_sinks, window, dense_len, BLOCK_SIZE: tl.constexpr):
    """Selectable blocks are one range [first, stop): after the sinks' whole blocks, before the first one wholly in the window."""
    first = tl.maximum((doc_start + BLOCK_SIZE - 1) // BLOCK_SIZE, (doc_start + n_sinks) // BLOCK_SIZE)
    stop = tl.minimum((q_pos + 1) // BLOCK_SIZE, tl.where(q_pos >= window, (q_pos - window) // BLOCK_SIZE + 1, 0))
    return first, tl.where((q_pos >= 0) & (q_pos - doc_start >= dense_len), stop, 0)


# --- choosing blocks -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME)
def score_kernel(
    q_ptr, pooled_ptr, page_table_ptr, q_pos_ptr, doc_start_ptr, scores_ptr,
    T, n_blocks, n_pages_per_row, stride_row, stride_block, stride_head, n_sinks, window, dense_len,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr, PER_PAGE: tl.constexpr, HAS_DOCS: tl.constexpr,
):  # fmt: skip
    """scores (B, T, HK, n_blocks) fp32; -inf where not selectable. Program (b * HK + hk, tile of blocks): pooled keys are read once for all T."""
    b, hk = tl.program_id(0) // HK, tl.program_id(0) % HK
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lowest, highest = n_blocks, 0
    for t in range(T):
        q_pos = tl.load(q_pos_ptr + b * T + t)
        doc_start = tl.load(doc_start_ptr + b * T + t) if HAS_DOCS else 0
        first, stop = _selectable_range(q_pos, doc_start, n_sinks, window, dense_len, BLOCK_SIZE)
        lowest, highest = tl.minimum(lowest, first), tl.maximum(highest, stop)
    row, slot, ok = _row_of_keys(n, (n >= lowest) & (n < highest), b, page_table_ptr, n_pages_per_row, PAGED, PER_PAGE)
    offsets = _offsets(row, slot, hk, stride_row, stride_block, stride_head)
    pooled = _load_rows(pooled_ptr, offsets, ok, D, BLOCK_D).to(tl.float32)  # (BLOCK_N, BLOCK_D)
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    for t in range(T):
        q_rows = ((b * T + t) * HK + hk).to(tl.int64) * G + g
        q = tl.load(q_ptr + q_rows[:, None] * D + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0)
        q_sum = tl.sum(q.to(tl.float32), 0)  # the group's queries are summed first
        scores = tl.sum(pooled * q_sum[None, :], 1)
        q_pos = tl.load(q_pos_ptr + b * T + t)
        doc_start = tl.load(doc_start_ptr + b * T + t) if HAS_DOCS else 0
        first, stop = _selectable_range(q_pos, doc_start, n_sinks, window, dense_len, BLOCK_SIZE)
        scores = tl.where((n >= first) & (n < stop), scores, float("-inf"))
        tl.store(scores_ptr + ((b * T + t) * HK + hk).to(tl.int64) * n_blocks + n, scores, mask=n < n_blocks)


@triton.jit
def _ranks(scores_ptr, n, n_blocks):
    """Unsigned integers in the order of the scores; 0 for what cannot be chosen."""
    score = tl.load(scores_ptr + n, mask=n < n_blocks, other=float("-inf"))
    score = tl.where(score == 0, 0.0, score)  # -0.0 ties with 0.0
    bits = score.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(score == float("-inf"), 0, ordered.to(tl.uint32))


@triton.jit(do_not_specialize=RUNTIME)
def choose_kernel(
    scores_ptr, block_ids_ptr, n_blocks,
    M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """block_ids (rows, M) int32: the M best blocks of each row of scores (rows, n_blocks), ascending, ties to the lower id, -1 = unused.

    The M-th best score is found bit by bit (32 counts), then one scan places what beats it and as many of its equals as are needed.
    """
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * n_blocks
    block_ids_ptr += row * M
    n0 = tl.arange(0, BLOCK_N)
    ranks = _ranks(scores_ptr, n0, n_blocks)
    threshold = tl.zeros((), tl.uint32)  # largest value that M ranks reach; 0 if fewer can be chosen at all
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = threshold | bit
        count = tl.sum((ranks >= candidate).to(tl.int32), 0)
        if not ONE_TILE:
            for start in range(BLOCK_N, n_blocks, BLOCK_N):
                count += tl.sum((_ranks(scores_ptr, start + n0, n_blocks) >= candidate).to(tl.int32), 0)
        threshold = tl.where(count >= M, candidate, threshold)
        bit = bit >> 1
    n_above = tl.sum((ranks > threshold).to(tl.int32), 0)
    if not ONE_TILE:
        for start in range(BLOCK_N, n_blocks, BLOCK_N):
            n_above += tl.sum((_ranks(scores_ptr, start + n0, n_blocks) > threshold).to(tl.int32), 0)
    n_equal = tl.where(threshold > 0, M - n_above, 0)  # how many of the equals to take: those of lowest id
    seen_above = tl.zeros((), tl.int32)
    seen_equal = tl.zeros((), tl.int32)
    for start in range(0, BLOCK_N if ONE_TILE else n_blocks, BLOCK_N):
        if not ONE_TILE:
            ranks = _ranks(scores_ptr, start + n0, n_blocks)
        above, equal = ranks > threshold, ranks == threshold
        counts = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)  # two scans in one: a tile has < 2**15 blocks
        above_so_far, equal_so_far = seen_above + (counts & 0xFFFF), seen_equal + (counts >> 16)
        chosen = above | (equal & (equal_so_far <= n_equal))
        place = above_so_far + tl.minimum(equal_so_far, n_equal) - 1
        tl.store(block_ids_ptr + place, start + n0, mask=chosen)
        seen_above += tl.sum(above.to(tl.int32), 0)
        seen_equal += tl.sum(equal.to(tl.int32), 0)
    m = tl.arange(0, BLOCK_M)
    tl.store(block_ids_ptr + m, tl.full((BLOCK_M,), -1, tl.int32), mask=(m >= n_above + n_equal) & (m < M))


# --- attending -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME)
def sparse_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_table_ptr, block_ids_ptr, q_pos_ptr, doc_start_ptr, out_ptr, part_ptr, stat_ptr,
    T, n_pages_per_row, stride_row, stride_key, stride_head, n_sinks, window, dense_len, keys_per_split, n_splits, scale,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    M: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr, PER_PAGE: tl.constexpr, INT8: tl.constexpr, HAS_DOCS: tl.constexpr, SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One group's queries at one position over their list of keys: window, then sinks, then chosen blocks (or, below dense_len, everything).

    Program ((b * T + t) * HK + hk, split, tile of the group's heads). Places in the list that repeat a key, or hold none, are skipped.
    """
    index, split = tl.program_id(0), tl.program_id(1)
    hk = index % HK
    b = index // HK // T
    q_pos = tl.load(q_pos_ptr + index // HK)
    doc_start = tl.load(doc_start_ptr + index // HK) if HAS_DOCS else 0
    n_before = q_pos - doc_start
    is_dense = n_before < dense_len
    window_start = q_pos - window + 1
    n_listed = tl.where(is_dense, n_before + 1, window + n_sinks + M * BLOCK_SIZE)
    n_listed = tl.where(q_pos >= 0, n_listed, 0)

    g, d = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    out_row = index * G + g
    q_mask = (g < G)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + out_row.to(tl.int64)[:, None] * D + d[None, :], mask=q_mask, other=0)  # (BLOCK_R, BLOCK_D)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(split * keys_per_split, tl.minimum((split + 1) * keys_per_split, n_listed), BLOCK_S):
        i = start + tl.arange(0, BLOCK_S)
        if M > 0:
            c = tl.maximum(i - window - n_sinks, 0)  # place among the keys of chosen blocks
            is_chosen = (i >= window + n_sinks) & (c < M * BLOCK_SIZE) & (not is_dense)
            block_id = tl.load(block_ids_ptr + index.to(tl.int64) * M + c // BLOCK_SIZE, mask=is_chosen, other=-1)
            chosen = block_id * BLOCK_SIZE + c % BLOCK_SIZE
            chosen_ok = (block_id >= 0) & (chosen >= doc_start + n_sinks) & (chosen < window_start)
        else:
            chosen, chosen_ok = i, i < 0
        sink = doc_start + i - window
        in_window, in_sinks = i < window, i < window + n_sinks
        keys = tl.where(in_window, window_start + i, tl.where(in_sinks, sink, chosen))
        ok = tl.where(in_window, keys >= doc_start, tl.where(in_sinks, keys < window_start, chosen_ok))
        keys = tl.where(is_dense, doc_start + i, keys)
        ok = tl.where(is_dense, i <= n_before, ok)
        row, slot, ok = _row_of_keys(keys, ok, b, page_table_ptr, n_pages_per_row, PAGED, PER_PAGE)
        offsets = _offsets(row, slot, hk, stride_row, stride_key, stride_head)
        k, v = _load_rows(k_ptr, offsets, ok, D, BLOCK_D), _load_rows(v_ptr, offsets, ok, D, BLOCK_D)
        k_scale = tl.load(k_scale_ptr + row * HK + hk, mask=ok, other=0) if INT8 else scale
        v_scale = tl.load(v_scale_ptr + row * HK + hk, mask=ok, other=0) if INT8 else scale
        acc, m, total = _attend(q, acc, m, total, ok[None, :], k, v, k_scale, v_scale, scale, INT8, UPCAST)
    _store(acc, m, total, out_row, g < G, split, out_ptr, part_ptr, stat_ptr, n_splits, D, BLOCK_D, SPLIT)


@triton.jit(do_not_specialize=RUNTIME)
def dense_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_table_ptr, q_pos_ptr, doc_start_ptr, out_ptr, part_ptr, stat_ptr,
    T, n_pages_per_row, stride_row, stride_key, stride_head, keys_per_split, n_splits, scale,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    PAGED: tl.constexpr, PER_PAGE: tl.constexpr, INT8: tl.constexpr, HAS_DOCS: tl.constexpr, SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """All T queries of one group over every key they see. Program (b * HK + hk, split, tile of the T * G query rows)."""
    b, hk, split = tl.program_id(0) // HK, tl.program_id(0) % HK, tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    t, g = r // G, r % G
    row_ok = t < T
    q_pos = tl.load(q_pos_ptr + b * T + t, mask=row_ok, other=-1)
    doc_start = tl.load(doc_start_ptr + b * T + t, mask=row_ok, other=0) if HAS_DOCS else tl.zeros_like(q_pos)
    last = tl.max(q_pos, 0)
    first = split * keys_per_split
    if HAS_DOCS:  # nothing before the tile's first document is read
        lowest = tl.min(tl.where(q_pos >= 0, doc_start, last + 1), 0)
        first = tl.maximum(first, lowest // BLOCK_S * BLOCK_S)

    d = tl.arange(0, BLOCK_D)
    out_row = ((b * T + t) * HK + hk) * G + g
    q_mask = row_ok[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + out_row.to(tl.int64)[:, None] * D + d[None, :], mask=q_mask, other=0)  # (BLOCK_R, BLOCK_D)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(first, tl.minimum((split + 1) * keys_per_split, last + 1), BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        valid = keys[None, :] <= q_pos[:, None]  # (BLOCK_R, BLOCK_S)
        if HAS_DOCS:
            valid = valid & (keys[None, :] >= doc_start[:, None])
            ok = tl.max(valid.to(tl.int32), 0) > 0  # between two documents may lie keys that no query sees
        else:
            ok = keys <= last
        row, slot, ok = _row_of_keys(keys, ok, b, page_table_ptr, n_pages_per_row, PAGED, PER_PAGE)
        offsets = _offsets(row, slot, hk, stride_row, stride_key, stride_head)
        k, v = _load_rows(k_ptr, offsets, ok, D, BLOCK_D), _load_rows(v_ptr, offsets, ok, D, BLOCK_D)
        k_scale = tl.load(k_scale_ptr + row * HK + hk, mask=ok, other=0) if INT8 else scale
        v_scale = tl.load(v_scale_ptr + row * HK + hk, mask=ok, other=0) if INT8 else scale
        acc, m, total = _attend(q, acc, m, total, valid & ok[None, :], k, v, k_scale, v_scale, scale, INT8, UPCAST)
    _store(acc, m, total, out_row, row_ok, split, out_ptr, part_ptr, stat_ptr, n_splits, D, BLOCK_D, SPLIT)


@triton.jit(do_not_specialize=RUNTIME)
def merge_kernel(part_ptr, stat_ptr, out_ptr, n_splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """out (rows, D) from each split's part (rows, n_splits, D), relative to its own maximum. Program: row. Always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    m = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, n_splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        place = row * n_splits + split
        m_part = tl.load(stat_ptr + place * 2, mask=split < n_splits, other=float("-inf"))
        l_part = tl.load(stat_ptr + place * 2 + 1, mask=split < n_splits, other=0)
        part = tl.load(part_ptr + place[:, None] * D + d[None, :], mask=(split < n_splits)[:, None] & (d < D)[None, :], other=0)
        m_new = tl.maximum(m, tl.max(m_part, 0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight, alpha = tl.exp2(m_part - shift), tl.exp2(m - shift)
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        total = total * alpha + tl.sum(l_part * weight, 0)
        m = m_new
    tl.store(out_ptr + row * D + d, (acc / tl.where(total == 0, 1.0, total)).to(out_ptr.dtype.element_ty), mask=d < D)


# --- launching -----------------------------------------------------------------------------------------------------


def launch_config(kernel: str, head_dim: int, group: int, n_queries: int = 1, dtype: torch.dtype = torch.bfloat16, n_blocks: int = 0) -> dict[str, Any]:
    """Tile sizes and compiler options of one launch: {constexpr: value, ..., "num_warps": w, "num_stages": s}. The only place that knows them.

    kernel: score, choose, sparse, dense or merge; dtype: q's. Raises ValueError for a head_dim that is no multiple of 16.
    """
    if head_dim % 16:
        raise ValueError(f"Triton kernels need head_dim to be a multiple of 16, got {head_dim}; use another backend")
    block_d = triton.next_power_of_2(head_dim)
    if kernel == "score":
        return {"BLOCK_G": triton.next_power_of_2(group), "BLOCK_D": block_d, "BLOCK_N": max(16, SCORE_ELEMENTS // block_d), "num_warps": 4, "num_stages": 1}
    if kernel == "choose":
        size = next((n for n in CHOOSE_SIZES if n >= n_blocks), CHOOSE_SIZES[-1])
        return {"BLOCK_N": size, "ONE_TILE": n_blocks <= size, "num_warps": 8 if size > 2048 else 4, "num_stages": 1}
    if kernel == "merge":
        return {"BLOCK_D": block_d, "BLOCK_SPLITS": 16, "num_warps": 4, "num_stages": 1}
    rows = group if kernel == "sparse" else n_queries * group
    block_r = min(max(16, triton.next_power_of_2(rows)), 64 if block_d <= 128 else 32)
    block_s = 64 if block_d <= 64 or block_r * block_d <= 2048 else 32
    if dtype == torch.float32:  # no tensor cores: both factors of a product sit in registers
        block_r, block_s = 16, 32 if block_d <= 64 else 16
    # a sparse split is a tile or two, with nothing to run ahead of; a dense one keeps two tiles on their way, where registers and shared memory last
    return {"BLOCK_R": block_r, "BLOCK_D": block_d, "BLOCK_S": block_s, "num_warps": 4, "num_stages": 2 if kernel == "sparse" or dtype == torch.float32 else 3}


def split_keys(n_keys: int, n_programs: int, block_s: int) -> tuple[int, int]:
    """(n_splits, keys_per_split): splits of whole tiles, enough of them for the grid to fill the device, none empty."""
    n_tiles = max(1, triton.cdiv(n_keys, block_s))
    wanted = min(n_tiles, max(1, TARGET_PROGRAMS // n_programs))
    per_split = triton.cdiv(n_tiles, wanted)
    return triton.cdiv(n_tiles, per_split), per_split * block_s


def sparse_decode(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, pooled: Tensor | None = None) -> Tensor:
    """`reference.sparse_attention` for a few queries per row: q (B, T, H, D), k, v (B, S, Hk, D), pooled (B, N, Hk, D)."""
    k, v = _aligned(k, v)
    if pooled is None:
        pooled = reference.pool_keys(k, spec.block_size)
    return _sparse(q, k, v, _aligned(pooled)[0], plan, spec, None)


def dense_decode(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """`reference.dense_attention` for a few queries per row: q (B, T, H, D), k, v (B, S, Hk, D)."""
    return _dense(q, *_aligned(k, v), plan, None)


def paged_sparse_attention(q: Tensor, kv: PagedKV, plan: AttentionPlan, spec: SparseSpec) -> Tensor:
    """`paged_reference.paged_sparse_attention`: q (B, T, H, D) over pages, blocks chosen by their pooled keys."""
    check_paged(q, kv, plan, spec)
    return _sparse(q, *_aligned(kv.k_pages, kv.v_pages), _aligned(kv.pooled_pages)[0], plan, spec, kv)


def paged_dense_attention(q: Tensor, kv: PagedKV, plan: AttentionPlan) -> Tensor:
    """`paged_reference.paged_dense_attention`: q (B, T, H, D) over every visible key of the pages."""
    check_paged(q, kv, plan)
    return _dense(q, *_aligned(kv.k_pages, kv.v_pages), plan, kv)


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """The tensors (rows, keys, Hk, D) with one set of strides, vectors whole and on 16-byte boundaries; a cache's slices are so already."""

    def fits(x: Tensor) -> bool:
        return x.stride(3) == 1 and all(s % UNIT.value == 0 for s in x.stride()[:3]) and x.data_ptr() % 16 == 0 and x.stride() == tensors[0].stride()

    return list(tensors) if all(fits(x) for x in tensors) else [x.clone(memory_format=torch.contiguous_format) for x in tensors]


def _units(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0) // UNIT.value, x.stride(1) // UNIT.value, x.stride(2) // UNIT.value


def _positions(plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """q_pos, doc_start (B, T) int32 and contiguous: made once per plan, not per layer."""
    return plan.cached("positions_int32", lambda: (plan.q_pos.to(torch.int32).contiguous(), plan.doc_start.to(torch.int32).contiguous()))


def _table(kv: PagedKV | None, q: Tensor) -> tuple[Tensor, int]:
    """page_table and its width; a kernel without pages gets any pointer and never reads it."""
    if kv is None:
        return q, 0
    table = kv.page_table if kv.page_table.stride(1) == 1 and kv.page_table.stride(0) == kv.page_table.shape[1] else kv.page_table.contiguous()
    return table, table.shape[1]


def _split_config(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    return config, options


def _choose(q: Tensor, pooled: Tensor, plan: AttentionPlan, spec: SparseSpec, kv: PagedKV | None) -> tuple[Tensor, int]:
    """block_ids (B, T, Hk, M) int32, ascending, -1 = unused, and M: no more than there are blocks, 0 if none can be chosen."""
    B, T, H, D = q.shape
    Hk = pooled.shape[2]
    n_blocks = (plan.max_pos + 1) // spec.block_size
    if kv is None:
        n_blocks = min(n_blocks, pooled.shape[1])
    M = min(spec.n_selected_blocks, n_blocks)
    if M == 0 or plan.max_rel < max(spec.window, spec.dense_len):  # every complete block lies in a window
        return q, 0
    table, n_pages_per_row = _table(kv, q)
    q_pos, doc_start = _positions(plan)
    scores = torch.empty(B, T, Hk, n_blocks, dtype=torch.float32, device=q.device)
    config, options = _split_config(launch_config("score", D, H // Hk))
    score_kernel[(B * Hk, triton.cdiv(n_blocks, config["BLOCK_N"]))](
        q, pooled, table, q_pos, doc_start, scores, T, n_blocks, n_pages_per_row, *_units(pooled), spec.n_sinks, spec.window, spec.dense_len,
        HK=Hk, G=H // Hk, D=D, BLOCK_SIZE=spec.block_size, PAGED=kv is not None, PER_PAGE=pooled.shape[1] if kv is not None else 1, HAS_DOCS=plan.has_docs,
        **config, **options,
    )  # fmt: skip
    block_ids = torch.empty(B, T, Hk, M, dtype=torch.int32, device=q.device)
    config, options = _split_config(launch_config("choose", D, H // Hk, n_blocks=n_blocks))
    choose_kernel[(B * T * Hk,)](scores, block_ids, n_blocks, M=M, BLOCK_M=triton.next_power_of_2(M), **config, **options)
    return block_ids, M


def _sparse(q: Tensor, k: Tensor, v: Tensor, pooled: Tensor, plan: AttentionPlan, spec: SparseSpec, kv: PagedKV | None) -> Tensor:
    B, T, H, D = q.shape
    Hk = k.shape[2]
    if plan.all_dense(spec.dense_len):
        return _dense(q, k, v, plan, kv)
    q = q.contiguous()
    block_ids, M = _choose(q, pooled, plan, spec, kv)
    config, options = _split_config(launch_config("sparse", D, H // Hk, dtype=q.dtype))
    longest = plan.max_rel + 1  # no list need be longer than the keys there are
    window, n_sinks = min(spec.window, longest), min(spec.n_sinks, longest)
    n_listed = window + n_sinks + M * spec.block_size
    if plan.any_dense(spec.dense_len):
        n_listed = max(n_listed, min(spec.dense_len, longest))
    n_row_tiles = triton.cdiv(H // Hk, config["BLOCK_R"])
    n_splits, keys_per_split = split_keys(n_listed, B * T * Hk * n_row_tiles, config["BLOCK_S"])
    out, part, stat = _buffers(q, n_splits)
    table, n_pages_per_row = _table(kv, q)
    k_scale, v_scale = _scales(kv, q)
    sparse_kernel[(B * T * Hk, n_splits, n_row_tiles)](
        q, k, v, k_scale, v_scale, table, block_ids, *_positions(plan), out, part, stat,
        T, n_pages_per_row, *_units(k), n_sinks, window, spec.dense_len, keys_per_split, n_splits, D**-0.5 * LOG2_E.value,
        HK=Hk, G=H // Hk, D=D, M=M, BLOCK_SIZE=spec.block_size, PAGED=kv is not None, PER_PAGE=k.shape[1] if kv is not None else 1,
        INT8=k.dtype == torch.int8, HAS_DOCS=plan.has_docs, SPLIT=n_splits > 1, UPCAST=q.device.type == "cpu", **config, **options,
    )  # fmt: skip
    return _merge(out, part, stat, n_splits)


def _dense(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, kv: PagedKV | None) -> Tensor:
    B, T, H, D = q.shape
    Hk = k.shape[2]
    q = q.contiguous()
    config, options = _split_config(launch_config("dense", D, H // Hk, T, q.dtype))
    n_row_tiles = triton.cdiv(T * (H // Hk), config["BLOCK_R"])
    n_splits, keys_per_split = split_keys(plan.max_pos + 1, B * Hk * n_row_tiles, config["BLOCK_S"])
    out, part, stat = _buffers(q, n_splits)
    table, n_pages_per_row = _table(kv, q)
    k_scale, v_scale = _scales(kv, q)
    dense_kernel[(B * Hk, n_splits, n_row_tiles)](
        q, k, v, k_scale, v_scale, table, *_positions(plan), out, part, stat,
        T, n_pages_per_row, *_units(k), keys_per_split, n_splits, D**-0.5 * LOG2_E.value,
        HK=Hk, G=H // Hk, D=D, PAGED=kv is not None, PER_PAGE=k.shape[1] if kv is not None else 1,
        INT8=k.dtype == torch.int8, HAS_DOCS=plan.has_docs, SPLIT=n_splits > 1, UPCAST=q.device.type == "cpu", **config, **options,
    )  # fmt: skip
    return _merge(out, part, stat, n_splits)


def _scales(kv: PagedKV | None, q: Tensor) -> tuple[Tensor, Tensor]:
    if kv is None or kv.k_scale is None or kv.v_scale is None:
        return q, q  # never read
    return kv.k_scale.contiguous(), kv.v_scale.contiguous()


def _buffers(q: Tensor, n_splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """out as q, part (B * T * H, n_splits, D) and stat (B * T * H, n_splits, 2 = maximum and sum) fp32; no parts for a single split."""
    B, T, H, D = q.shape
    out = torch.empty_like(q)
    if n_splits == 1:
        return out, out, out
    part = torch.empty(B * T * H, n_splits, D, dtype=torch.float32, device=q.device)
    return out, part, torch.empty(B * T * H, n_splits, 2, dtype=torch.float32, device=q.device)


def _merge(out: Tensor, part: Tensor, stat: Tensor, n_splits: int) -> Tensor:
    if n_splits > 1:
        D = out.shape[-1]
        config, options = _split_config(launch_config("merge", D, 1))
        merge_kernel[(part.shape[0],)](part, stat, out, n_splits, D=D, **config, **options)
    return out


# --- ahead of time -------------------------------------------------------------------------------------------------

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8"}


def aot_cases(target: str) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Everything to compile without a GPU: (kernel, signature {argument: type}, constexprs, {num_warps, num_stages}, label)."""
    bf16, fp16, fp32, int8 = _TYPES
    for M, n_blocks in ((8, 512), (16, 2048), (32, 8192), (16, 16384)):
        yield _case("choose", 64, 4, bf16, label=f"choose {M} of {n_blocks}", n_blocks=n_blocks, M=M)
    for D in (64, 96, 128, 256):
        for dtype in (bf16, fp16, fp32):
            yield _case("merge", D, 4, dtype)
        for G in (1, 2, 4, 7, 16):
            yield _case("score", D, G, bf16)
            yield _case("sparse", D, G, bf16)
            for T in (1, 8):
                yield _case("dense", D, G, bf16, T=T)
        for kernel in ("score", "sparse", "dense"):
            yield _case(kernel, D, 4, bf16, paged=True)
            yield _case(kernel, D, 4, bf16, has_docs=True)
        for kernel in ("sparse", "dense"):
            yield _case(kernel, D, 4, bf16, split=False)
            for dtype, pages in ((bf16, int8), (fp16, int8), (fp16, fp16), (fp32, fp32)):
                yield _case(kernel, D, 4, dtype, pages, paged=True)


def _case(kernel: str, D: int, G: int, dtype: torch.dtype, pages: torch.dtype | None = None, *, T: int = 1, n_blocks: int = 0, M: int = 16,
          paged: bool = False, has_docs: bool = False, split: bool = True, label: str = ""):  # fmt: skip
    """One case of aot_cases: 4 KV heads, blocks of 16, pages of 64 keys."""
    fn = {"score": score_kernel, "choose": choose_kernel, "sparse": sparse_kernel, "dense": dense_kernel, "merge": merge_kernel}[kernel]
    pages = pages or dtype
    config, options = _split_config(launch_config(kernel, D, G, T, dtype, n_blocks))
    per_page = (4 if kernel == "score" else 64) if paged else 1
    values = {"HK": 4, "G": G, "D": D, "M": M, "BLOCK_M": triton.next_power_of_2(M), "BLOCK_SIZE": 16, "PAGED": paged, "PER_PAGE": per_page,
              "INT8": pages == torch.int8, "HAS_DOCS": has_docs, "SPLIT": split, "UPCAST": False, **config}  # fmt: skip
    types = {"q_ptr": dtype, "out_ptr": dtype, "k_ptr": pages, "v_ptr": pages}
    constexprs = {name: values[name] for name in fn.arg_names if name in values}
    signature = {}
    for name in fn.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            is_index = name in ("page_table_ptr", "block_ids_ptr", "q_pos_ptr", "doc_start_ptr")
            signature[name] = "*i32" if is_index else "*" + _TYPES[types.get(name, torch.float32)]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    flags = [f"T={T}" if T > 1 else "", "paged" if paged else "", "docs" if has_docs else "", "" if split else "whole"]
    kinds = _TYPES[dtype] if pages == dtype else f"{_TYPES[dtype]}/{_TYPES[pages]}"
    return fn, signature, constexprs, options, label or " ".join([kernel, f"D={D}", f"G={G}", kinds, *filter(None, flags)])
