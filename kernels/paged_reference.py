"""The definition of attention over pages: gather them, dequantise, and it is `reference.py`. For reading and checking, not for speed."""

from torch import Tensor

from kernels import reference
from kernels.paged import PagedKV, check_paged
from kernels.spec import AttentionPlan, SparseSpec


def gather_pages(pages: Tensor, page_table: Tensor, scale: Tensor | None = None) -> Tensor:
    """Rows laid end to end: pages (n_pages, n, Hk, D) -> (B, n_pages_per_row * n, Hk, D), fp32 if a scale (n_pages, Hk) is given.

    A table entry of -1 shows some page or other: nobody sees its keys.
    """
    index = page_table.clamp(min=0).long()
    rows = pages[index]  # (B, n_pages_per_row, n, Hk, D)
    if scale is not None:
        rows = rows.float() * scale[index][:, :, None, :, None]
    return rows.flatten(1, 2)


def paged_dense_attention(q: Tensor, kv: PagedKV, plan: AttentionPlan) -> Tensor:
    """`reference.dense_attention` of q (B, T, H, D) over the rows of kv."""
    check_paged(q, kv, plan)
    k, v = gather_pages(kv.k_pages, kv.page_table, kv.k_scale), gather_pages(kv.v_pages, kv.page_table, kv.v_scale)
    return reference.dense_attention(q, k, v, plan)


def paged_sparse_attention(q: Tensor, kv: PagedKV, plan: AttentionPlan, spec: SparseSpec) -> Tensor:
    """`reference.sparse_attention` of q (B, T, H, D) over the rows of kv, choosing blocks by its pooled keys."""
    check_paged(q, kv, plan, spec)
    k, v = gather_pages(kv.k_pages, kv.page_table, kv.k_scale), gather_pages(kv.v_pages, kv.page_table, kv.v_scale)
    return reference.sparse_attention(q, k, v, plan, spec, gather_pages(kv.pooled_pages, kv.page_table))
