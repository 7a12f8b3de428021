"""Paged keys and values: fixed-size pages anywhere in one pool, and a table that says which page holds which part of a row.

Read by `paged_reference.py` (the definition) and `decode_triton.py`; written through `PagedWriter`. Storage is one layer's; which
page belongs to whom is the caller's business (a radix tree, a free list): nothing here allocates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.spec import AttentionPlan, SparseSpec

INT8_MAX = 127  # symmetric: -128 is not used


@dataclass(frozen=True)
class PagedKV:
    """One layer's keys and values in pages, and the pages of each row.

    k_pages, v_pages (n_pages, page_size, Hk, D): key s of row b lies in slot s % page_size of page page_table[b, s // page_size].
    page_table (B, n_pages_per_row) int32: -1 = none. Rows may share pages. Every key a query sees must have a page.
    pooled_pages (n_pages, page_size // block_size, Hk, D) fp32: mean key of each complete block; None where only dense attention reads.
    k_scale, v_scale (n_pages, Hk) fp32: what one int8 step is worth; exactly when the pages are int8.
    Slots before the first and after the last key that queries of a row see, unused pages and unfinished pooled keys may hold anything, NaN included.
    Raises ValueError for parts that do not fit.
    """

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    pooled_pages: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def __post_init__(self) -> None:
        k, v, table = self.k_pages, self.v_pages, self.page_table
        if k.dim() != 4 or k.shape != v.shape or k.dtype != v.dtype or k.shape[0] == 0:
            raise ValueError(f"k_pages and v_pages must be (n_pages, page_size, Hk, D) and alike, got {_describe(k)} and {_describe(v)}")
        if not (k.dtype.is_floating_point or k.dtype == torch.int8):
            raise ValueError(f"pages must be floating point or int8, got {k.dtype}")
        if table.dim() != 2 or table.dtype != torch.int32:
            raise ValueError(f"page_table must be (B, n_pages_per_row) int32, got {_describe(table)}")
        scales = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        for name, scale in scales.items():
            if (scale is not None) != self.is_int8:
                raise ValueError(f"{name} goes with int8 pages and no others: pages are {k.dtype}, {name} is {'missing' if scale is None else 'given'}")
            if scale is not None and (scale.shape != (k.shape[0], k.shape[2]) or scale.dtype != torch.float32):
                raise ValueError(f"{name} must be (n_pages, Hk) = {(k.shape[0], k.shape[2])} fp32, got {_describe(scale)}")
        pooled = self.pooled_pages
        if pooled is not None:
            fits = pooled.dim() == 4 and (pooled.shape[0], *pooled.shape[2:]) == (k.shape[0], *k.shape[2:]) and pooled.shape[1] > 0
            if not fits or self.page_size % pooled.shape[1] or pooled.dtype != torch.float32:
                wanted = f"({k.shape[0]}, page_size // block_size, {k.shape[2]}, {k.shape[3]}) fp32 with page_size = {self.page_size} a multiple of block_size"
                raise ValueError(f"pooled_pages must be {wanted}, got {_describe(pooled)}")
        for name, x in {"v_pages": v, "page_table": table, "pooled_pages": pooled, **scales}.items():
            if x is not None and x.device != k.device:
                raise ValueError(f"{name} is on {x.device}, k_pages on {k.device}")

    @classmethod
    def empty(cls, n_pages: int, page_size: int, n_kv_heads: int, head_dim: int, page_table: Tensor, block_size: int | None, dtype: torch.dtype) -> PagedKV:
        """A pool of zeroed pages on page_table's device; block_size None = no pooled keys. Raises ValueError for sizes that cannot work."""
        if block_size is not None and (block_size < 1 or page_size % block_size):
            raise ValueError(f"page_size must be a multiple of block_size, got {page_size} and {block_size}")
        device = page_table.device
        k, v = (torch.zeros(n_pages, page_size, n_kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
        pooled = None if block_size is None else torch.zeros(n_pages, page_size // block_size, n_kv_heads, head_dim, device=device)
        scales = (torch.zeros(n_pages, n_kv_heads, device=device) if dtype == torch.int8 else None for _ in range(2))
        return cls(k, v, page_table, pooled, *scales)

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[1]

    @property
    def block_size(self) -> int | None:
        """Tokens per pooled key; None without pooled keys."""
        return None if self.pooled_pages is None else self.page_size // self.pooled_pages.shape[1]

    @property
    def n_keys(self) -> int:
        """Length of a row's key axis, which is what an `AttentionPlan` over these pages is built for."""
        return self.page_size * self.page_table.shape[1]

    @property
    def is_int8(self) -> bool:
        return self.k_pages.dtype == torch.int8


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"


def check_paged(q: Tensor, kv: PagedKV, plan: AttentionPlan, spec: SparseSpec | None = None) -> None:
    """Raises ValueError where q, the pages, the plan and the rule do not fit together."""
    B, T, H, D = q.shape
    n_kv_heads, head_dim = kv.k_pages.shape[2:]
    if plan.q_pos.shape != (B, T) or kv.page_table.shape[0] != B:
        raise ValueError(f"q {tuple(q.shape)}, the plan {tuple(plan.q_pos.shape)} and page_table {tuple(kv.page_table.shape)} must agree on rows and queries")
    if head_dim != D or H % n_kv_heads:
        raise ValueError(f"pages of {n_kv_heads} heads x {head_dim} do not fit q {tuple(q.shape)}")
    if plan.n_keys != kv.n_keys:
        raise ValueError(f"the pages of a row hold {kv.n_keys} keys, the plan was built for n_keys = {plan.n_keys}")
    if not kv.is_int8 and kv.k_pages.dtype != q.dtype:
        raise ValueError(f"pages must be int8 or of q's dtype {q.dtype}, got {kv.k_pages.dtype}")
    if spec is not None and kv.block_size != spec.block_size:
        raise ValueError(f"pages pool blocks of {kv.block_size} keys, the rule needs block_size = {spec.block_size}")
    if q.device != kv.k_pages.device:
        raise ValueError(f"q is on {q.device}, the pages on {kv.k_pages.device}")


def quantize_pages(pages: Tensor) -> tuple[Tensor, Tensor]:
    """int8 pages and their scale (n_pages, Hk) fp32, from pages (n_pages, page_size, Hk, D); a page's largest value becomes 127.

    Unused slots must hold finite values (zeros), for they count. A value v comes back within scale / 2.
    """
    x = pages.float()
    scale = x.abs().amax((1, 3)) / INT8_MAX  # (n_pages, Hk)
    return _to_int8(x, scale[:, None, :, None]), scale


def dequantize_pages(pages: Tensor, scale: Tensor) -> Tensor:
    """fp32 pages from int8 pages (n_pages, page_size, Hk, D) and scale (n_pages, Hk)."""
    return pages.float() * scale[:, None, :, None]


def _to_int8(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


class PagedWriter:
    """Where the tokens of one forward pass go: worked out once, used by every layer whose pages share the table.

    page_table (B, n_pages_per_row) int32; n_cached, n_new (B,) integers on the CPU: row b's new tokens take positions
    [n_cached[b], n_cached[b] + n_new[b]) and columns [0, n_new[b]) of the (B, n_cols) grid. block_size None = no pooled keys.
    Reads the table back once. Raises ValueError for a position without a page and for a page that two rows would write.
    """

    def __init__(self, page_table: Tensor, n_cached: Tensor, n_new: Tensor, n_cols: int, page_size: int, block_size: int | None) -> None:
        if block_size is not None and page_size % block_size:
            raise ValueError(f"page_size must be a multiple of block_size, got {page_size} and {block_size}")
        device, table = page_table.device, page_table.cpu().long()
        self.page_size, self.block_size, self.n_cols = page_size, block_size, n_cols
        end = n_cached + n_new
        if int(n_new.max()) > n_cols:
            raise ValueError(f"a row has {int(n_new.max())} new tokens, the grid has {n_cols} columns")
        if int(end.max()) > table.shape[1] * page_size:
            raise ValueError(f"a row needs room for {int(end.max())} tokens, its table holds {table.shape[1]} pages of {page_size}; give it more pages")
        t = torch.arange(n_cols)
        valid = t < n_new[:, None]  # (B, n_cols)
        row, col = valid.nonzero().unbind(1)
        pos = n_cached[row] + col
        page = table[row, pos // page_size]
        if len(page) and int(page.min()) < 0:
            b, p = next((b, p) for b, p, i in zip(row.tolist(), pos.tolist(), page.tolist(), strict=True) if i < 0)
            raise ValueError(f"row {b} has no page for position {p}: allocate one before writing")
        owners = torch.unique(torch.stack([page, row]), dim=1)[0]
        if len(torch.unique(owners)) != len(owners):
            raise ValueError("two rows would write into one page: copy a shared page before its row grows")
        self.cells = (row * n_cols + col).to(device)  # grid cells that hold a token
        self.slots = (page * page_size + pos % page_size).to(device)  # flat slot of each
        touched, index = torch.unique(page, return_inverse=True)
        # kept[i] = slots of touched[i] that held tokens before; the rest hold nothing, and must not count in a page's scale
        kept = torch.full((len(touched),), page_size).scatter_reduce_(0, index, pos % page_size, "amin")
        self.touched, self.kept, self.page_index = touched.to(device), kept.to(device), index.to(device)
        pairs = []
        if block_size is not None:
            first, last = n_cached // block_size, end // block_size
            pairs = [(b, n) for b in range(len(table)) for n in range(int(first[b]), int(last[b]))]
        b, n = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
        per_page = page_size // (block_size or page_size)
        self.completed = (table[b, n // per_page] * per_page + n % per_page).to(device)  # flat pooled key of each block newly complete

    def write(self, kv: PagedKV, k: Tensor, v: Tensor) -> None:
        """Writes k, v (B, n_cols, Hk, D) into their slots and pools each newly complete block once. Mutates kv's pages."""
        if kv.page_size != self.page_size or kv.block_size != self.block_size:
            raise ValueError(f"pages of {kv.page_size} and blocks of {kv.block_size}, the writer was built for {self.page_size} and {self.block_size}")
        if k.shape != v.shape or k.shape[1] != self.n_cols or k.shape[2:] != kv.k_pages.shape[2:]:
            raise ValueError(f"k and v must be (B, {self.n_cols}, {kv.k_pages.shape[2]}, {kv.k_pages.shape[3]}), got {tuple(k.shape)} and {tuple(v.shape)}")
        for pages, scale, new in ((kv.k_pages, kv.k_scale, k), (kv.v_pages, kv.v_scale, v)):
            new = new.detach().flatten(0, 1)[self.cells]  # (n_tokens, Hk, D)
            if scale is not None:
                new = self._rescale(pages, scale, new.float())
            pages.view(-1, *pages.shape[2:]).index_copy_(0, self.slots, new.to(pages.dtype))
        if len(self.completed):
            assert kv.pooled_pages is not None and self.block_size is not None
            page = self.completed // kv.pooled_pages.shape[1]
            blocks = kv.k_pages.view(-1, self.block_size, *kv.k_pages.shape[2:])[self.completed].float()  # (n_completed, block_size, Hk, D)
            if kv.k_scale is not None:
                blocks = blocks * kv.k_scale[page][:, None, :, None]
            kv.pooled_pages.view(-1, *kv.pooled_pages.shape[2:])[self.completed] = blocks.mean(1)

    def _rescale(self, pages: Tensor, scale: Tensor, new: Tensor) -> Tensor:
        """int8 values of new (n_tokens, Hk, D). A page's scale only grows, and only then are its old values rounded again."""
        kept = self.kept[:, None]
        old_scale = scale[self.touched].masked_fill(kept == 0, 0)  # (n_touched, Hk); a fresh page's scale may be anything
        index = self.page_index[:, None].expand(-1, new.shape[1])
        largest = torch.zeros_like(old_scale).scatter_reduce_(0, index, new.abs().amax(2), "amax")  # (n_touched, Hk) of the new values
        new_scale = torch.maximum(old_scale, largest / INT8_MAX)
        shrink = (old_scale / new_scale.clamp(min=torch.finfo(torch.float32).tiny))[:, None, :, None]
        old = pages[self.touched]  # (n_touched, page_size, Hk, D)
        pages[self.touched] = torch.where(shrink == 1, old, (old.float() * shrink).round().to(torch.int8))
        scale[self.touched] = new_scale
        return _to_int8(new, new_scale[self.page_index].unsqueeze(2))
