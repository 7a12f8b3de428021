"""One transformer block with a slow and, if it is dual, a fast branch over the same keys and values.

`model.py` calls `Block.forward` layer by layer. Tokens travel as a flat `(N, E)` matrix; a `TokenGroup` (routing.py) says which
tokens they are and how they see the keys. A block never decides a route: it is told.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dualbranch.config import DualBranchConfig
from dualbranch.layers import FeedForward, apply_rope
from dualbranch.routing import Partition, TokenGroup
from kernels import SparseSpec

#: Stores a layer's new keys and values and returns all it may read: k, v `(B, S, Hk, D)` and pooled keys or None.
KVStore = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]


class KVProjection(nn.Module):
    """Keys and values of every token, whichever branch computes it: the reason why no token is ever missing from the cache."""

    def __init__(self, c: DualBranchConfig) -> None:
        super().__init__()
        self.n_kv_heads = c.n_kv_heads
        self.w_k = nn.Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.w_v = nn.Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """`h (N, E)` -> k (rotated), v, each `(N, Hk, D)`."""
        k = self.w_k(h).unflatten(-1, (self.n_kv_heads, -1))
        v = self.w_v(h).unflatten(-1, (self.n_kv_heads, -1))
        k = apply_rope(self.k_norm(k), cos, sin)
        return k, v.to(k.dtype)


class Branch(nn.Module):
    """Queries, output matrix and feed-forward of one branch; reads and writes the full residual. `reads`: which keys its queries read, None = all."""

    def __init__(self, c: DualBranchConfig, n_heads: int, d_ff: int, reads: SparseSpec | None, sliding: bool) -> None:
        super().__init__()
        self.n_heads, self.reads, self.sliding = n_heads, reads, sliding
        self.q_scale = None if c.attn_scale is None else c.attn_scale * c.head_dim**0.5  # attention itself scales by head_dim ** -0.5
        self.w_q = nn.Linear(c.d_model, n_heads * c.head_dim, bias=c.qkv_bias)
        self.w_o = nn.Linear(n_heads * c.head_dim, c.d_model, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.attn_post_norm = nn.RMSNorm(c.d_model, c.norm_eps) if c.post_norms else nn.Identity()
        self.ff_norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.ff = FeedForward(c.d_model, d_ff, c.activation)
        self.ff_post_norm = nn.RMSNorm(c.d_model, c.norm_eps) if c.post_norms else nn.Identity()

    def queries(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normed inputs `h (N, E)` to rotated queries `(N, H, D)`."""
        q = self.q_norm(self.w_q(h).unflatten(-1, (self.n_heads, -1)))
        if self.q_scale is not None:
            q = q * self.q_scale
        return apply_rope(q, cos.to(q.dtype), sin.to(q.dtype))  # the other branch's dtype may be another

    def attend(self, h: Tensor, group: TokenGroup, k: Tensor, v: Tensor, pooled: Tensor | None) -> Tensor:
        """Head outputs `(N, H * D)` before the output matrix, for normed inputs `h (N, E)`."""
        return group.attend(self.queries(h, *group.angles(self.sliding)), k, v, pooled, self.reads).flatten(1)

    def rest(self, x: Tensor, heads: Tensor) -> Tensor:
        """What follows attention: residual stream in `(N, E)` and head outputs `(N, H * D)` to residual stream out."""
        x = x + self.attn_post_norm(self.w_o(heads))
        return x + self.ff_post_norm(self.ff(self.ff_norm(x)))

    def forward(self, x: Tensor, h: Tensor, group: TokenGroup, k: Tensor, v: Tensor, pooled: Tensor | None) -> Tensor:
        """The whole block as this branch computes it: residual stream in `(N, E)`, residual stream out."""
        return self.rest(x, self.attend(h, group, k, v, pooled))


class Block(nn.Module):
    """`out = g * fast(x) + (1 - g) * slow(x)` over one residual stream and one set of K/V. Without a fast branch it is an ordinary block.

    In a sliding-window layer both branches read a window (`kernels.SparseSpec.sliding`): the layer never learned to look further.
    """

    def __init__(self, c: DualBranchConfig, dual: bool, sliding: bool = False) -> None:
        super().__init__()
        self.sliding = sliding
        slow_reads, fast_reads = None, c.sparse
        if sliding:
            slow_reads, fast_reads = (SparseSpec.sliding(window, c.sparse.block_size) for window in (c.sliding_window, c.fast_window))
        self.attn_norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.kv = KVProjection(c)
        self.slow = None if dual and c.fast_only else Branch(c, c.n_heads, c.d_ff, slow_reads, sliding)
        self.fast = Branch(c, c.fast_n_heads, c.fast_d_ff, fast_reads, sliding) if dual else None

    def forward(self, x: Tensor, partition: Partition, store: KVStore, only: TokenGroup | None = None) -> Tensor:
        """Hard route: `x (N, E)`, ordered as `partition` says ([slow | fast]), to `(N, E)`; each token pays for one branch.

        `only`: the tokens whose output is wanted, by the slow branch; of the others there are keys and values alone."""
        h = self.attn_norm(x)
        keys = store(*self.kv(h, *partition.angles(self.sliding)))
        if only is not None:
            return self.slow(x[only.cells], h[only.cells], only, *keys)
        if partition.whole is not None and self.reads_all(partition.whole):
            return self.together(x, h, partition, *keys[:2])
        n, parts = partition.n_slow, []
        if partition.slow is not None:
            parts.append(self.slow(x[:n], h[:n], partition.slow, *keys))
        if partition.fast is not None:
            parts.append(self.fast(x[n:], h[n:], partition.fast, *keys))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def reads_all(self, tokens: TokenGroup) -> bool:
        """Whether each of `tokens` reads all keys before it, with as many heads and in the same dtype, whichever branch computes it."""
        alike = self.slow.n_heads == self.fast.n_heads and type(self.slow.w_q) is type(self.fast.w_q)
        return alike and self.slow.reads is None and tokens.plan.all_dense(self.fast.reads.dense_len)

    def together(self, x: Tensor, h: Tensor, partition: Partition, k: Tensor, v: Tensor) -> Tensor:
        """The hard route of a real split whose tokens read all keys: one attention for both branches."""
        n = partition.n_slow
        q = self.slow.queries(h[:n], *partition.slow.angles(self.sliding)), self.fast.queries(h[n:], *partition.fast.angles(self.sliding))
        dtype = max(q, key=len).dtype  # packed matrices multiply few tokens in another
        heads = partition.attend(torch.cat([of_branch.to(dtype) for of_branch in q]), k, v).flatten(1)
        return torch.cat([self.slow.rest(x[:n], heads[:n]), self.fast.rest(x[n:], heads[n:])])

    def mix(self, x: Tensor, tokens: TokenGroup, store: KVStore, g: Tensor) -> Tensor:
        """Soft route: both branches on every token, mixed by `g (N,)`. At g = 0 and g = 1 it equals the hard route exactly."""
        h = self.attn_norm(x)
        keys = store(*self.kv(h, *tokens.angles(self.sliding)))
        w = g[:, None].to(x.dtype)
        return w * self.fast(x, h, tokens, *keys) + (1 - w) * self.slow(x, h, tokens, *keys)
