"""Which tokens a computation covers: the bookkeeping behind hard routing.

A forward pass lays its tokens out on a grid of B rows by T columns. `TokenGroup` is a set of grid cells, flat, with everything
attention needs to know about them; `Partition` splits one group in slow and fast once, for all dual blocks. Used by `model.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import AttentionPlan, SparseSpec, dense_attention, sparse_attention

#: cos and sin `(N, 1, R)` at each token's position, in the model's dtype.
Angles = tuple[Tensor, Tensor]
#: `decide(gate)` gives `g` and `use_slow` of a pass's tokens, from the gate's values `gate()` if it needs them.
Decide = Callable[[Callable[[], Tensor]], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class TokenGroup:
    """N tokens of a `(B, T)` grid, as queries against a key axis of length S.

    `cells (N,)`: flat index `b * T + t` of each token, or None when the group is the whole grid in order.
    `slots (N,)`: flat index in the group's own `(B, Tg)` query grid (rows padded to the longest), None with `cells`.
    `cos, sin (N, 1, R)`: rotary factors at each token's position, in the model's dtype; `sliding`: those of the sliding-window layers,
    where they differ. `shape` is `(B, Tg)`.
    """

    plan: AttentionPlan
    cos: Tensor
    sin: Tensor
    shape: tuple[int, int]
    cells: Tensor | None = None
    slots: Tensor | None = None
    sliding: Angles | None = None

    def angles(self, sliding: bool) -> Angles:
        """The rotary factors of a layer, which is a sliding-window layer or not."""
        return self.sliding if sliding and self.sliding is not None else (self.cos, self.sin)

    def to_grid(self, x: Tensor) -> Tensor:
        """`(N, ...) -> (B, Tg, ...)`; padding slots are zero."""
        if self.slots is None:
            return x.view(*self.shape, *x.shape[1:])
        grid = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return grid.index_copy(0, self.slots, x).view(*self.shape, *x.shape[1:])

    def from_grid(self, grid: Tensor) -> Tensor:
        """`(B, Tg, ...) -> (N, ...)`, the inverse of `to_grid`."""
        flat = grid.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pooled: Tensor | None, reads: SparseSpec | None) -> Tensor:
        """Attention of queries `q (N, H, D)` over keys and values `(B, S, Hk, D)`, all of them or what `reads` chooses: `(N, H, D)`."""
        q = self.to_grid(q)
        if q.dtype != k.dtype:  # a cache may keep keys in another dtype than this pass computes in: what is less is converted (a CPU computes in fp32)
            q, k, v = (q.to(k.dtype), k, v) if q.shape[1] == 1 and q.is_cuda else (q, k.to(q.dtype), v.to(q.dtype))
        y = dense_attention(q, k, v, self.plan) if reads is None else sparse_attention(q, k, v, self.plan, reads, pooled)
        return self.from_grid(y)


def goes_slow(route: str | Tensor, use_slow: Tensor | None) -> bool:
    """Whether tokens that all take one branch take the slow one, by `forward`'s `route` and decisions `use_slow (B, T)`: read only where the route
    leaves it open, for that waits for the device."""
    return use_slow is None or (not (isinstance(route, str) and route == "fast") and bool(use_slow.all()))


def pick(angles: Angles | None, index: Tensor) -> Angles | None:
    """The rotary factors of the tokens `index (N,)`."""
    return None if angles is None else (angles[0].index_select(0, index), angles[1].index_select(0, index))


@dataclass(frozen=True)
class Grid:
    """The whole input of one forward pass: key-axis position and document start of each of the B x T tokens.

    `q_pos (B, T)` int64 is -1 at padding. `cos, sin (B*T, 1, R)`, and `sliding` as in `TokenGroup`. Mutates nothing.
    """

    q_pos: Tensor
    doc_start: Tensor | None
    n_keys: int
    cos: Tensor
    sin: Tensor
    sliding: Angles | None = None

    def whole(self) -> TokenGroup:
        B, T = self.q_pos.shape
        return TokenGroup(AttentionPlan(self.q_pos, self.n_keys, self.doc_start), self.cos, self.sin, (B, T), sliding=self.sliding)

    def subset(self, cells: Tensor) -> TokenGroup:
        """The tokens at flat grid indices `cells (N,)`, ascending, N >= 1."""
        B, T = self.q_pos.shape
        width, slots = 1, cells
        if T > 1:
            row = cells // T
            n_in_row = torch.bincount(row, minlength=B)
            width = int(n_in_row.max())
            first = n_in_row.cumsum(0) - n_in_row  # index of each row's first token in the flat order
            slots = row * width + torch.arange(cells.numel(), device=cells.device) - first[row]
        q_pos = self.q_pos.new_full((B * width,), -1).index_copy(0, slots, self.q_pos.flatten()[cells]).view(B, width)
        doc_start = None
        if self.doc_start is not None:
            doc_start = self.doc_start.new_zeros(B * width).index_copy(0, slots, self.doc_start.flatten()[cells]).view(B, width)
        plan = AttentionPlan(q_pos, self.n_keys, doc_start)
        return TokenGroup(plan, *pick((self.cos, self.sin), cells), (B, width), cells, slots, pick(self.sliding, cells))


@dataclass(frozen=True)
class Partition:
    """A hard split of the grid: the flat order of computation is [slow tokens | fast tokens].

    `order (N,)` is the flat grid index of each token in that order; None means the grid's own order (one branch takes everything).
    A real split leaves padding out, and has the grid as one group, `whole`. At least one side is present.
    """

    slow: TokenGroup | None
    fast: TokenGroup | None
    order: Tensor | None
    cos: Tensor
    sin: Tensor
    sliding: Angles | None = None
    whole: TokenGroup | None = None

    angles = TokenGroup.angles

    @property
    def n_slow(self) -> int:
        return 0 if self.slow is None else self.slow.cos.shape[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of a real split: attention over all keys of all its queries `q (N, H, D)`, in one call: `(N, H, D)`. Neighbours are cheaper than the scattered
        tokens of a branch."""
        grid = q.new_zeros(self.whole.cos.shape[0], *q.shape[1:]).index_copy(0, self.order, q)
        return self.whole.attend(grid, k, v, None, None).index_select(0, self.order)

    @staticmethod
    def uniform(tokens: TokenGroup, slow: bool) -> Partition:
        """Every token to one branch."""
        return Partition(tokens if slow else None, None if slow else tokens, None, tokens.cos, tokens.sin, tokens.sliding)

    @staticmethod
    def split(grid: Grid, whole: TokenGroup, use_slow: Tensor) -> Partition:
        """By `use_slow (B, T)` bool; `whole` is the grid's. One host sync."""
        if use_slow.numel() == 1:
            return Partition.uniform(whole, slow=bool(use_slow))
        valid = grid.q_pos >= 0
        slow_cells = (use_slow & valid).flatten().nonzero().squeeze(1)
        fast_cells = (~use_slow & valid).flatten().nonzero().squeeze(1)
        if fast_cells.numel() == 0 or slow_cells.numel() == 0:
            return Partition.uniform(whole, slow=slow_cells.numel() > 0)
        order = torch.cat([slow_cells, fast_cells])
        return Partition(grid.subset(slow_cells), grid.subset(fast_cells), order, *pick((grid.cos, grid.sin), order), pick(grid.sliding, order), whole)
