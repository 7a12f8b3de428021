"""The public attention ops: argument checks, then dispatch. Called by `dualbranch/`; computes nothing itself.

Shapes and rules: docs/architecture.md, "Attention ops". Definition: `reference.py`.
"""

from torch import Tensor

from kernels import blockwise, reference
from kernels.backend import get_backend
from kernels.spec import AttentionPlan, SparseSpec


def _impl():
    return reference if get_backend() == "reference" else blockwise


def pool_keys(k: Tensor, block_size: int) -> Tensor:
    """Mean of each complete block: k (B, S, Hk, D) -> (B, S // block_size, Hk, D) fp32. Not differentiated by selection.

    A block pooled alone equals, bit for bit, the same block pooled with others, so a cache may append block by block.
    """
    if k.dim() != 4:
        raise ValueError(f"k must be (B, S, Hk, D), got {tuple(k.shape)}")
    if block_size < 1:
        raise ValueError(f"block_size must be >= 1, got {block_size}")
    return reference.pool_keys(k, block_size)


def select_blocks(q: Tensor, pooled: Tensor, plan: AttentionPlan, spec: SparseSpec) -> Tensor:
    """block_ids (B, T, Hk, M) int64: the M best selectable blocks of each query, ascending; -1 = unused, at the end.

    Queries below dense_len and padding choose none. Ties go to the lower id. Scores are fp32: the group's queries are
    summed first, then multiplied once; products of different shapes may differ in the last bit, so two blocks whose
    scores agree to about 1e-6 of their size may swap between prefill and decode. Rows of pooled that are not complete for a query may hold anything.
    """
    _check_q(q, plan)
    _check_pooled(q, pooled, plan, spec)
    return _impl().select_blocks(q, pooled, plan, spec)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Attention of q (B, T, H, D) over all visible keys of k, v (B, S, Hk, D) -> (B, T, H, D), scaled by D**-0.5.

    Padding queries give zero. Keys after a row's last query may hold anything, NaN included.
    """
    _check_q(q, plan)
    _check_kv(q, k, v, plan)
    return _impl().dense_attention(q, k, v, plan)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, pooled: Tensor | None = None) -> Tensor:
    """Attention over sinks, window and best blocks; dense for queries below dense_len. Shapes as dense_attention.

    pooled (B, N, Hk, D): `pool_keys` of k, kept by the caller (decode then reads only the keys it attends to);
    None computes it here. Gradients flow through q, k, v, not through the choice. Memory is linear in T.
    """
    _check_q(q, plan)
    _check_kv(q, k, v, plan)
    if pooled is not None:
        _check_pooled(q, pooled, plan, spec)
        if pooled.shape[2] != k.shape[2]:
            raise ValueError(f"pooled has {pooled.shape[2]} KV heads, k has {k.shape[2]}")
    if plan.has_docs:
        _check_doc_start(plan, spec)
    return _impl().sparse_attention(q, k, v, plan, spec, pooled)


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


def _check_pooled(q: Tensor, pooled: Tensor, plan: AttentionPlan, spec: SparseSpec) -> None:
    B, T, H, D = q.shape
    if pooled.dim() != 4 or pooled.shape[0] != B or pooled.shape[3] != D or H % pooled.shape[2]:
        raise ValueError(f"pooled must be (B, N, Hk, D) fitting q {tuple(q.shape)}, got {tuple(pooled.shape)}")
    needed = (plan.max_pos + 1) // spec.block_size
    if pooled.shape[1] < needed and not plan.all_dense(spec.dense_len):
        raise ValueError(f"pooled holds {pooled.shape[1]} blocks, the queries see {needed} complete ones of {spec.block_size} keys")


def _check_doc_start(plan: AttentionPlan, spec: SparseSpec) -> None:
    def aligned() -> bool:
        return bool((plan.doc_start.masked_fill(plan.q_pos < 0, 0) % spec.block_size == 0).all())

    if not plan.cached(("aligned", spec.block_size), aligned):
        raise ValueError(f"doc_start must be a multiple of block_size = {spec.block_size}; pack rows with that alignment")
