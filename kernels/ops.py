"""The public attention ops: argument checks, then dispatch. Called by `dualbranch/`; computes nothing itself.

Shapes and rules: docs/architecture.md, "Attention ops". Definition: `reference.py`.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from kernels import blockwise, paged_reference, reference
from kernels.backend import get_backend
from kernels.paged import PagedKV, check_paged
from kernels.spec import AttentionPlan, SparseSpec

FEW_QUERIES = 16  # on a GPU, calls with up to this many queries per row split the keys over programs instead of the queries


def _on_its_device(op: Callable) -> Callable:
    """`op` with the GPU of its tensors as the current one: Triton launches on that, wherever its arguments lie."""

    @wraps(op)
    def wrapped(*args, **kwargs) -> Tensor:
        gpu = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_cuda), None)
        if gpu is None:
            return op(*args, **kwargs)
        with torch.cuda.device(gpu):
            return op(*args, **kwargs)

    return wrapped


def _impl(q: Tensor):
    """The module that computes this call. Triton is imported here and not before."""
    name = get_backend(q)
    if name == "triton":
        from kernels import triton_ops

        return triton_ops
    return reference if name == "reference" else blockwise


def _decode(q: Tensor, *others: Tensor | None):
    """The decode kernels where they serve this call: few queries per row, nothing to differentiate; else None."""
    if q.shape[1] > FEW_QUERIES or get_backend(q) != "triton" or _wants_grad(q, *others):
        return None
    from kernels import decode_triton

    return decode_triton


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


@_on_its_device
def pool_keys(k: Tensor, block_size: int) -> Tensor:
    """Mean of each complete block: k (B, S, Hk, D) -> (B, S // block_size, Hk, D) fp32. Not differentiated by selection.

    A block pooled alone equals, bit for bit, the same block pooled with others, so a cache may append block by block.
    """
    if k.dim() != 4:
        raise ValueError(f"k must be (B, S, Hk, D), got {tuple(k.shape)}")
    if block_size < 1:
        raise ValueError(f"block_size must be >= 1, got {block_size}")
    return (_impl(k) if get_backend(k) == "triton" else reference).pool_keys(k, block_size)


@_on_its_device
def select_blocks(q: Tensor, pooled: Tensor, plan: AttentionPlan, spec: SparseSpec) -> Tensor:
    """block_ids (B, T, Hk, M) int64: the M best selectable blocks of each query, ascending; -1 = unused, at the end.

    Queries below dense_len and padding choose none. Ties go to the lower id. Scores are fp32: the group's queries are
    summed first, then multiplied once; products of different shapes may differ in the last bit, so two blocks whose
    scores agree to about 1e-6 of their size may swap between prefill and decode. Rows of pooled that are not complete for a query may hold anything.
    """
    _check_q(q, plan)
    _check_pooled(q, pooled, plan, spec)
    return _impl(q).select_blocks(q, pooled, plan, spec)


@_on_its_device
def dense_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Attention of q (B, T, H, D) over all visible keys of k, v (B, S, Hk, D) -> (B, T, H, D), scaled by D**-0.5.

    Padding queries give zero. Keys after a row's last query may hold anything, NaN included.
    """
    _check_q(q, plan)
    _check_kv(q, k, v, plan)
    decode = _decode(q, k, v)
    return decode.dense_decode(q, k, v, plan) if decode else _impl(q).dense_attention(q, k, v, plan)


@_on_its_device
def sparse_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, pooled: Tensor | None = None) -> Tensor:
    """Attention over sinks, window and best blocks; dense for queries below dense_len. Shapes as dense_attention.

    pooled (B, N, Hk, D): `pool_keys` of k, kept by the caller (decode then reads only the keys it attends to);
    None computes it here. Gradients flow through q, k, v, not through the choice. Memory is linear in T.
    With `SparseSpec.sliding` this is the attention of a sliding-window layer, on every backend.
    """
    _check_q(q, plan)
    _check_kv(q, k, v, plan)
    if pooled is not None:
        _check_pooled(q, pooled, plan, spec)
        if pooled.shape[2] != k.shape[2]:
            raise ValueError(f"pooled has {pooled.shape[2]} KV heads, k has {k.shape[2]}")
    elif spec.n_selected_blocks == 0:  # nothing to choose, so nothing to pool
        pooled = k.new_empty(k.shape[0], 0, *k.shape[2:], dtype=torch.promote_types(k.dtype, torch.float32))
    if plan.has_docs:
        _check_doc_start(plan, spec)
    decode = _decode(q, k, v)
    return decode.sparse_decode(q, k, v, plan, spec, pooled) if decode else _impl(q).sparse_attention(q, k, v, plan, spec, pooled)


@_on_its_device
def paged_dense_attention(q: Tensor, kv: PagedKV, plan: AttentionPlan) -> Tensor:
    """`dense_attention` of q (B, T, H, D) over keys and values in pages; the plan's n_keys is `kv.n_keys`. No gradients."""
    _check_q(q, plan)
    check_paged(q, kv, plan)
    _check_no_grad(q, kv)
    name = get_backend(q)
    if name == "triton":
        from kernels import decode_triton

        return decode_triton.paged_dense_attention(q, kv, plan)
    if name == "reference":
        return paged_reference.paged_dense_attention(q, kv, plan)
    return blockwise.dense_attention(q, *_gathered(q, kv), plan)


@_on_its_device
def paged_sparse_attention(q: Tensor, kv: PagedKV, plan: AttentionPlan, spec: SparseSpec) -> Tensor:
    """`sparse_attention` of q (B, T, H, D) over keys and values in pages, choosing blocks by their pooled keys. No gradients."""
    _check_q(q, plan)
    check_paged(q, kv, plan, spec)
    if plan.has_docs:
        _check_doc_start(plan, spec)
    _check_no_grad(q, kv)
    name = get_backend(q)
    if name == "triton":
        from kernels import decode_triton

        return decode_triton.paged_sparse_attention(q, kv, plan, spec)
    if name == "reference":
        return paged_reference.paged_sparse_attention(q, kv, plan, spec)
    pooled = paged_reference.gather_pages(kv.pooled_pages, kv.page_table)
    return blockwise.sparse_attention(q, *_gathered(q, kv), plan, spec, pooled)


def _gathered(q: Tensor, kv: PagedKV) -> tuple[Tensor, Tensor]:
    """k, v (B, S, Hk, D) of kv's rows, end to end, in q's dtype. A copy of the whole cache: plain PyTorch reads no page tables."""
    pairs = ((kv.k_pages, kv.k_scale), (kv.v_pages, kv.v_scale))
    k, v = (paged_reference.gather_pages(pages, kv.page_table, scale).to(q.dtype) for pages, scale in pairs)
    return k, v


def _check_no_grad(q: Tensor, kv: PagedKV) -> None:
    if _wants_grad(q, kv.k_pages, kv.v_pages):
        raise ValueError("attention over pages has no gradient; call it under torch.no_grad(), or train with k and v as tensors")


def _check_q(q: Tensor, plan: AttentionPlan) -> None:
    if q.dim() != 4 or q.shape[:2] != plan.q_pos.shape:
        raise ValueError(f"q must be (B, T, H, D) with (B, T) = {tuple(plan.q_pos.shape)} of the plan, got {tuple(q.shape)}")
    if q.device != plan.q_pos.device:
        raise ValueError(f"q is on {q.device}, the plan on {plan.q_pos.device}")


def _check_kv(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
    B, T, H, D = q.shape
    if k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"k and v must be (B, S, Hk, D) and alike, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}: batch and head_dim must agree")
    if k.shape[1] != plan.n_keys:
        raise ValueError(f"k holds {k.shape[1]} keys, the plan was built for n_keys = {plan.n_keys}")
    if H % k.shape[2]:
        raise ValueError(f"{H} query heads cannot be shared out over {k.shape[2]} KV heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")


def _check_pooled(q: Tensor, pooled: Tensor, plan: AttentionPlan, spec: SparseSpec) -> None:
    B, T, H, D = q.shape
    if pooled.dim() != 4 or pooled.shape[0] != B or pooled.shape[3] != D or H % pooled.shape[2]:
        raise ValueError(f"pooled must be (B, N, Hk, D) fitting q {tuple(q.shape)}, got {tuple(pooled.shape)}")
    if pooled.device != q.device:
        raise ValueError(f"pooled is on {pooled.device}, q on {q.device}")
    needed = (plan.max_pos + 1) // spec.block_size
    if pooled.shape[1] < needed and not plan.all_dense(spec.dense_len):
        raise ValueError(f"pooled holds {pooled.shape[1]} blocks, the queries see {needed} complete ones of {spec.block_size} keys")


def _check_doc_start(plan: AttentionPlan, spec: SparseSpec) -> None:
    def aligned() -> bool:
        return bool((plan.doc_start.masked_fill(plan.q_pos < 0, 0) % spec.block_size == 0).all())

    if not plan.cached(("aligned", spec.block_size), aligned):
        raise ValueError(f"doc_start must be a multiple of block_size = {spec.block_size}; pack rows with that alignment")
