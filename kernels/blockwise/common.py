"""What the ways of `kernels.blockwise` share: dtypes, layouts, what may be NaN."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import has_bf16_units
from kernels.spec import AttentionPlan


def compute(x: Tensor) -> Tensor:
    """x in the dtype that its products are fast in."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x


def has_bf16_products(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether to compute by hand: a CPU's SDPA makes no use of its units for bf16 (but for AMX), and products do. Without gradients."""
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and not trained and has_bf16_units(q.device)


@cache
def has_bf16_sdpa() -> bool:
    """Whether this CPU's SDPA makes use of its units for bf16: it does of AMX, and then takes less time than two products and a softmax."""
    return torch.cpu._is_amx_tile_supported()


def own_columns(q: Tensor, n_kv_heads: int) -> Tensor:
    """(H, Hk * D): a row for each head of q (..., H, D), zero but in the columns of its KV head."""
    own = torch.eye(n_kv_heads, dtype=q.dtype, device=q.device)[:, None, :, None]
    return (q.view(n_kv_heads, -1, 1, q.shape[-1]) * own).flatten(2).flatten(0, 1)


def zero_unseen(k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """k, v cut to the last visible key, with what no query of a row sees set to zero (it may be NaN, and 0 * NaN is NaN)."""
    n = max(plan.max_pos + 1, 1)
    k, v = k[:, :n], v[:, :n]

    def starts() -> Tensor:
        return plan.doc_start.masked_fill(plan.q_pos < 0, plan.n_keys).amin(1, keepdim=True)  # (B, 1) first key any query of the row sees

    first = plan.cached("row_first", lambda: starts().flatten().tolist() if plan.has_docs else [0])
    if min(plan.row_max) == n - 1 and max(first) == 0:
        return k, v

    def unseen() -> Tensor:
        s = torch.arange(n, device=k.device)
        return ((s > plan.q_pos.amax(1, keepdim=True)) | (s < starts()))[:, :, None, None]

    unseen = plan.cached("unseen", unseen)
    return k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)


def zero_padding(x: Tensor, plan: AttentionPlan) -> Tensor:
    """x (B, T, H, D) with padding queries set to zero, their gradient too."""
    return x.masked_fill((plan.q_pos < 0)[:, :, None, None], 0) if plan.has_padding else x


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """SDPA on token-major tensors; mask (B, 1, T, S)."""
    gqa = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)
    return out.transpose(1, 2)
