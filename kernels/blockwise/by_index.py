"""Attention of few queries by row numbers, for decode on a CPU.

Keys are seen as a table (R, D) of one row per token and KV head, and a query as a list of row numbers. Scores are a sampled product (only the named
entries of q @ table.T), the weighted sum is an embedding bag. Rows of a batch may differ in length and queries may be any few of them: only what is
read costs anything.
"""

import warnings
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.blockwise.common import has_bf16_products, own_columns
from kernels.blockwise.select import best_scores, selectable_range, window_and_sinks
from kernels.reference import upcast
from kernels.spec import AttentionPlan, SparseSpec


def indexable(q: Tensor, k: Tensor, v: Tensor) -> bool:
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    plain = q.device.type == "cpu" and q.dtype == torch.float32 and not trained
    return (plain or has_bf16_products(q, k, v)) and k.stride() == v.stride() and k.stride(3) == 1 and not any(s % k.shape[3] for s in k.stride()[:3])


def fits(k: Tensor, spec: SparseSpec) -> bool:
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


def dense_by_index(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
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
    blocks: _Reads | tuple[int, slice] | None  # of the pooled keys: the selectable ones, of one query its row and a range; None where all are chosen
    first: Tensor  # (n, Hk, 1, block_size) rows of the first selectable block
    low: Tensor  # (n, Hk, 1) rows before it are read as sinks
    high: Tensor  # (n, Hk, 1) rows after it are in the window, or in no selectable block; -1 where none is left
    own: Tensor  # (n, Hk, 1) row of the query's own key


def _sparse_reads(H: int, k: Tensor, pooled: Tensor, plan: AttentionPlan, spec: SparseSpec) -> _SparseReads:
    _, row, q_pos, doc_start = (x[:, None, None] for x in _valid(plan))
    bs, step = spec.block_size, _step(k)
    start = _row_starts(k)[row] + _heads(k)  # (n, Hk, 1)
    own = start + q_pos * step
    _, keys, keep = window_and_sinks(plan, spec)
    keys, keep = _valid_queries(keys, plan), _valid_queries(keep, plan)  # (n, 1, L)
    rows, hidden = torch.where(keep, start + keys * step, own), ~keep
    first, stop = selectable_range(q_pos, doc_start, spec)
    n_blocks = max(0, int((stop - first).amax()))
    n_chosen = min(n_blocks, spec.n_selected_blocks)
    blocks = None
    if n_blocks > n_chosen > 0 and len(q_pos) == 1:
        blocks = (int(row), slice(int(first), int(first) + n_blocks))
    elif n_blocks > n_chosen > 0:
        n = first + torch.arange(n_blocks, device=k.device)
        unused = n >= stop
        n = torch.where(unused, torch.minimum(first, stop - 1).clamp(min=0), n)
        blocks = _make_reads(_row_starts(pooled)[row] + n * _step(pooled) + _heads(pooled), unused, 1, _table(pooled))
    room = (0, n_chosen * bs)
    reads = _make_reads(F.pad(rows, room), F.pad(hidden, room), H // k.shape[2], _table(k))
    low, high = start + (doc_start + spec.n_sinks) * step, start + (torch.minimum(q_pos - spec.window + 1, stop * bs) - 1) * step
    high = high.masked_fill(high < low, -1)
    return _SparseReads(reads, n_chosen, blocks, (start + (first * bs + torch.arange(bs, device=k.device)) * step).unsqueeze(2), low, high, own)


def sparse_by_index(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, pooled: Tensor) -> Tensor:
    B, T, H, D = q.shape
    Hk, bs, pooled = k.shape[2], spec.block_size, pooled.contiguous()
    s = plan.cached(("sparse by index", spec, H, k.shape, k.stride(), pooled.shape), lambda: _sparse_reads(H, k, pooled, plan, spec))
    q = _valid_queries(q, plan)
    if s.n_chosen:
        if s.blocks is None:
            ids = torch.arange(s.n_chosen, device=q.device)
        else:
            q_sum = upcast(q).view(-1, Hk, H // Hk, D).sum(2)
            if isinstance(s.blocks, _Reads):
                scores = _scores(q_sum, _table(upcast(pooled)), s.blocks, 1.0)
            else:  # pooled keys are read as they lie; products with few columns are faster than with few rows
                scores = (upcast(pooled[s.blocks]).flatten(1) @ own_columns(q_sum, Hk).t()).t()
            ids = best_scores(scores.reshape(*s.own.shape[:2], -1), s.n_chosen)[1]  # (n, Hk, M), counted from the first selectable block
        chosen = (s.first + (ids * (bs * _step(k))).unsqueeze(-1)).flatten(2)  # (n, Hk, M * bs)
        hidden = chosen.clamp(s.low, s.high) != chosen
        s.reads.rows[..., -chosen.shape[2] :] = torch.where(hidden, s.own, chosen).unsqueeze(2)
        s.reads.bias[..., -chosen.shape[2] :] = torch.where(hidden, float("-inf"), 0.0).unsqueeze(2)
    return _read(q, k, v, s.reads, plan)
