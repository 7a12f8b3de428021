"""The attention ops on Triton kernels; the same signatures and results as `reference.py`. Called by `ops.py` under backend `triton`.

Needs CUDA, or TRITON_INTERPRET=1 in the environment before Triton is imported. Arguments are checked already.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import select_triton
from kernels.pool_triton import pool_keys
from kernels.prefill_backward_triton import backward
from kernels.prefill_triton import Union, by_rows, forward
from kernels.spec import AttentionPlan, SparseSpec

__all__ = ["attend", "dense_attention", "pool_keys", "select_blocks", "sparse_attention"]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, plan: AttentionPlan, spec: SparseSpec | None) -> Tensor:
        q, k, v = by_rows(q), by_rows(k), by_rows(v)
        out, lse, tiles, union = forward(q, k, v, block_ids, plan, spec)
        ctx.save_for_backward(q, k, v, out, lse, *(union or ()))
        ctx.rest = tiles, plan, spec
        return out

    @staticmethod
    @once_differentiable  # the kernels leave no graph: a second derivative would be silently wrong
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *union = ctx.saved_tensors
        tiles, plan, spec = ctx.rest
        return *backward(d_out, q, k, v, out, lse, Union(*union) if union else None, tiles, plan, spec), None, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, plan: AttentionPlan, spec: SparseSpec | None) -> Tensor:
    """Attention of q (B, T, H, D) over what spec and block_ids (B, T, Hk, M) name; spec None = every visible key."""
    if plan.max_pos < 0:
        return q.masked_fill(torch.ones_like(q, dtype=torch.bool), 0)
    return _Attend.apply(q, k, v, block_ids, plan, spec)


def select_blocks(q: Tensor, pooled: Tensor, plan: AttentionPlan, spec: SparseSpec) -> Tensor:
    return select_triton.select_blocks(q, pooled, plan, spec).long()


def dense_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    if plan.is_prefix:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
    return attend(q, k, v, None, plan, None)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, spec: SparseSpec, pooled: Tensor | None = None) -> Tensor:
    if plan.all_dense(spec.dense_len):
        return dense_attention(q, k, v, plan)
    pooled = pool_keys(k, spec.block_size) if pooled is None else pooled
    return attend(q, k, v, select_triton.select_blocks(q, pooled, plan, spec), plan, spec)
