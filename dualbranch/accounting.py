"""What a token costs: parameters read, floating-point operations, bytes of cache. Plain arithmetic on the config.

Conventions: a multiply-add is 2 FLOPs; only matrices count (norms, activations and the embedding look-up do not); attention counts
scores and the weighted sum, and for the fast branch the block scores as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualbranch.config import DualBranchConfig


@dataclass(frozen=True)
class Cost:
    """`params`: all weights of the model. The rest is per token: `params_read`, `flops`, `kv_bytes` (bytes the token adds to the cache)."""

    params: int
    params_read: float
    flops: float
    kv_bytes: int


def branch_params(c: DualBranchConfig, n_heads: int, d_ff: int) -> int:
    """Matrices of one branch: queries, output, feed-forward."""
    return 2 * c.d_model * n_heads * c.head_dim + 3 * c.d_model * d_ff


def kv_params(c: DualBranchConfig) -> int:
    """Matrices of one layer's K/V projection, paid by every token."""
    return 2 * c.d_model * c.n_kv_heads * c.head_dim


def gate_params(c: DualBranchConfig) -> int:
    return 0 if c.is_dense or c.fast_only else c.d_model * c.d_gate + c.d_gate


def fast_keys(c: DualBranchConfig, n_visible: int) -> int:
    """Keys a fast query reads when `n_visible` are visible (its own included): all below `dense_len`, a bounded number above."""
    s = c.sparse
    return n_visible if n_visible <= s.dense_len else min(n_visible, s.n_sinks + s.window + s.n_selected_blocks * s.block_size)


def norm_params(c: DualBranchConfig) -> int:
    """Norms of one branch: before the feed-forward, of queries, and of what it adds to the residual."""
    return c.d_model * (3 if c.post_norms else 1) + (c.head_dim if c.qk_norm else 0)


def total_params(c: DualBranchConfig) -> int:
    """Parameter count of `DualBranchModel(c)`, without building it."""
    n_dual = len(c.dual_layers)
    n_slow = c.n_layers - n_dual if c.fast_only else c.n_layers
    norms_and_biases = n_slow * norm_params(c) + n_dual * norm_params(c)
    norms_and_biases += (n_slow * c.n_heads + n_dual * c.fast_n_heads) * c.head_dim if c.qkv_bias else 0
    # the shared part: attention norm, key norm, K/V biases
    norms_and_biases += c.n_layers * (c.d_model + (c.head_dim if c.qk_norm else 0) + (2 * c.n_kv_heads * c.head_dim if c.qkv_bias else 0))
    matrices = c.n_layers * kv_params(c) + n_slow * branch_params(c, c.n_heads, c.d_ff)
    matrices += n_dual * branch_params(c, c.fast_n_heads, c.fast_d_ff)
    embeddings = c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)
    gate = 0 if c.is_dense or c.fast_only else gate_params(c) + c.d_model + c.d_gate + 1
    return embeddings + matrices + norms_and_biases + c.d_model + gate


def layer_flops(c: DualBranchConfig, slow: bool, n_cached: int, sliding: bool = False) -> float:
    """One layer, one token that sees `n_cached` earlier tokens and itself; `sliding`: a sliding-window layer."""
    n = n_cached + 1
    n_heads, d_ff = (c.n_heads, c.d_ff) if slow else (c.fast_n_heads, c.fast_d_ff)
    if sliding:
        n_read = min(n, c.sliding_window if slow else c.fast_window)
    else:
        n_read = n if slow else fast_keys(c, n)
    flops = 2 * (kv_params(c) + branch_params(c, n_heads, d_ff)) + 4 * n_heads * c.head_dim * n_read
    if not slow and not sliding and n > c.sparse.dense_len:  # block scores, of the sum over each group's heads
        flops += 2 * c.n_kv_heads * c.head_dim * (n // c.sparse.block_size)
    return flops


def head_flops(c: DualBranchConfig) -> float:
    """Logits of one token; in a prompt only the last token pays for them."""
    return 2 * c.vocab_size * c.d_model


def unread_flops(c: DualBranchConfig, n_cached: int) -> float:
    """What every token of a prompt but the last one spares: logits, and of the last layer all but keys and values (`model.forward`, `last_only`)."""
    last = c.n_layers - 1
    if last in c.dual_layers:
        return head_flops(c)
    return head_flops(c) + layer_flops(c, True, n_cached, last in c.sliding_layers) - 2 * kv_params(c)


def token_flops(c: DualBranchConfig, slow_share: float, n_cached: int) -> float:
    """The whole model for one token, of which `slow_share` in [0, 1] is computed slow (0 or 1 for a single token)."""
    flops = head_flops(c) + 2 * gate_params(c)
    for sliding in (False, True):
        n_layers = len(c.sliding_layers) if sliding else c.n_layers - len(c.sliding_layers)
        if not n_layers:
            continue
        n_dual = sum((i in c.sliding_layers) == sliding for i in c.dual_layers)
        slow, fast = (layer_flops(c, s, n_cached, sliding) for s in (True, False))
        flops += (n_layers - n_dual) * slow + n_dual * (slow_share * slow + (1 - slow_share) * fast)
    return flops


def token_cost(c: DualBranchConfig, route: str | float, n_cached: int, kv_element_bytes: int) -> Cost:
    """The cost of one token; `route` is "slow", "fast" or the share of slow tokens in [0, 1]."""
    share = {"slow": 1.0, "fast": 0.0}.get(route, route) if isinstance(route, str) else float(route)
    if not isinstance(share, float) or not 0.0 <= share <= 1.0:
        raise ValueError(f"cost of route {route!r} is not defined; give 'slow', 'fast' or the share of slow tokens in [0, 1]")
    if c.fast_only and share:
        raise ValueError(f"cost of route {route!r} is not defined: this model has its fast branch alone")
    n_dual = len(c.dual_layers)
    slow, fast = branch_params(c, c.n_heads, c.d_ff), branch_params(c, c.fast_n_heads, c.fast_d_ff)
    read = c.n_layers * kv_params(c) + (c.n_layers - n_dual) * slow + n_dual * (share * slow + (1 - share) * fast)
    read += c.vocab_size * c.d_model + gate_params(c)
    return Cost(total_params(c), read, token_flops(c, share, n_cached), c.n_layers * kv_params(c) // c.d_model * kv_element_bytes)
