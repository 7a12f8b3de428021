"""Attention ops of dualbranch: what each op computes, and how it is computed fast.

`reference.py` is the definition, `ops.py` the public surface (checks, dispatch), `blockwise/` the fast plain-PyTorch
implementation, `*_triton.py` the GPU kernels, `backend.py` the choice between them. Importing this package has no side
effects and never imports Triton. `__version__` stays below 1: `transformers` probes for another package of this name and must not take ours for it.
"""

from kernels.backend import get_backend, has_bf16_units, set_backend
from kernels.ops import FEW_QUERIES, dense_attention, paged_dense_attention, paged_sparse_attention, pool_keys, select_blocks, sparse_attention
from kernels.paged import PagedKV, PagedWriter
from kernels.spec import AttentionPlan, SparseSpec

__version__ = "0.0.0"

__all__ = [
    "FEW_QUERIES",
    "AttentionPlan",
    "PagedKV",
    "PagedWriter",
    "SparseSpec",
    "dense_attention",
    "get_backend",
    "has_bf16_units",
    "paged_dense_attention",
    "paged_sparse_attention",
    "pool_keys",
    "select_blocks",
    "set_backend",
    "sparse_attention",
]
