"""Sparse attention of a prompt, as code to compile: which blocks each of many tokens chooses, and what it reads.

PyTorch's own operators let neighbours read together what any of them chose, with masks: several times as many keys as a query reads, or sort. Written as
sums, a KV head and a few hundred queries at a time, the same rule compiles to two loop nests that touch exactly what is read and copy nothing:
`Choose` compares TILE queries side by side in the lanes of a vector register, `Read` multiplies the keys of a block side by side. `kernels` holds the rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualbranch.packed import kept
from kernels import AttentionPlan, SparseSpec, dense_attention, pool_keys
from kernels.blockwise.sparse import FEW_QUERIES

#: Queries that choose blocks side by side.
TILE = 16
#: Blocks (of prompts neighbours) that stand for one at first: the best blocks lie in the groups of the best maxima. A multiple of AHEAD.
GROUP = 8
#: Maxima and minima are taken of so many numbers before they are compared with the best so far: comparisons in a row wait for each other.
AHEAD = 4
#: Queries of one KV head at a time: what is between their steps stays in the cache.
AT_ONCE = 256
#: Both steps take multiples of so many queries and blocks (two of each at least, for which the compiler makes one code).
QUERIES, BLOCKS = 2 * TILE, 2 * AHEAD * GROUP
#: Most blocks chosen, of prompts and of single tokens: passes are written out for each, and take the compiler two seconds.
MOST_BLOCKS = 32
#: More than any block's number.
NONE = float(1 << 24)


def best(scores: Tensor, ids: Tensor, n: int, ahead: int = AHEAD) -> tuple[Tensor, Tensor]:
    """The n best of `scores (t, N, ...)` along N, a multiple of `ahead`, and of equal ones those of the lowest `ids` (like scores, distinct, fp32): both
    `(t, n, ...)`. Where fewer than n are above -inf, the scores left over are -inf.

    One after the other: n passes in which nothing is moved take less time than a sort, and compile."""

    def largest(x: Tensor) -> Tensor:
        return reduce(torch.maximum, x.unflatten(1, (-1, ahead)).unbind(2)).amax(1)

    def lowest_id(where: Tensor) -> Tensor:
        return reduce(torch.minimum, torch.where(where, ids, NONE).unflatten(1, (-1, ahead)).unbind(2)).amin(1)

    score = largest(scores)
    found = [(score, lowest_id(scores == score[:, None]))]
    while len(found) < n:
        score, i = found[-1]
        left = (scores < score[:, None]) | ((scores == score[:, None]) & (ids > i[:, None]))
        following = largest(torch.where(left, scores, float("-inf")))
        after = torch.where(following == score, i, -1.0)
        found.append((following, lowest_id((scores == following[:, None]) & (ids > after[:, None]))))
    of_scores, of_ids = zip(*found, strict=True)
    return torch.stack(of_scores, 1), torch.stack(of_ids, 1)


class Choose(nn.Module):
    """`kernels.select_blocks` for sparse queries of one KV head and one document.

    `q (t, TILE, G, D)`, mean keys `pooled (n, GROUP, D)` fp32, n a multiple of AHEAD, positions `at (t, TILE)` int64: `(t * TILE, M)` int64, best first,
    -1 where a query has no further block. What is in `pooled` for blocks that no query may choose doesn't matter.
    """

    def __init__(self, spec: SparseSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, q: Tensor, pooled: Tensor, at: Tensor) -> Tensor:
        spec, M, inf = self.spec, self.spec.n_selected_blocks, float("inf")
        size, device = spec.block_size, q.device
        q = kept(q.float().sum(2).transpose(1, 2).contiguous())  # (t, D, TILE)
        last_end = kept(torch.minimum(at - spec.window + size, at + 1).float())[:, None]  # a block that a query may choose ends there or before
        group, member = torch.arange(pooled.shape[0], device=device).float()[:, None], torch.arange(GROUP, device=device)
        scores = []
        for i in range(GROUP):
            end = (group * GROUP + (i + 1)) * size
            score = kept((q[:, None] * pooled[:, i, :, None]).sum(2))  # (t, n, TILE)
            scores.append(torch.where((end <= last_end) & (end > spec.n_sinks), score, -inf))
        of_group, groups = best(kept(reduce(torch.maximum, scores)), group, M)  # (t, M, TILE)
        scores, groups, exists = kept(torch.stack(scores, 2)), kept(groups), of_group > -inf
        first = kept(torch.where(exists, groups, 0.0).long() * (GROUP * TILE) + torch.arange(TILE, device=device))[:, :, None]
        candidates = scores.flatten(1).gather(1, (first + member[:, None] * TILE).flatten(1)).view(-1, M, GROUP, TILE)
        candidates = kept(torch.where(exists[:, :, None], candidates, -inf)).flatten(1, 2)
        ids = kept(groups[:, :, None] * GROUP + member[:, None]).flatten(1, 2)
        score, chosen = best(candidates, ids, M)
        return torch.where(score > -inf, chosen, -1.0).long().transpose(1, 2).flatten(0, 1).contiguous()


class Read(nn.Module):
    """`kernels.sparse_attention` for sparse queries of one KV head and one document.

    `q (n, G, D)`, the head's keys block by block and turned, `k (N, D, block_size)`, `v (N, block_size, D)`, the blocks that each query chose, `ids (n, M)`
    int64, -1 for none, and positions `at (n,)` int64: `(n, G, D)` in q's dtype. No key counts twice. Keys and values of the blocks read must be finite.
    """

    def __init__(self, spec: SparseSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, at: Tensor) -> Tensor:
        _, G, D = q.shape
        size, device = self.spec.block_size, q.device
        blocks, first, end = ranges(ids, at, self.spec)
        within = torch.arange(size, device=device).float()
        seen = (within >= first[..., None]) & (within < end[..., None])  # (n, P, block_size)
        dims, keys = math.gcd(AHEAD, D), math.gcd(AHEAD, size)  # that are summed at once: sums in a row wait for each other
        of_q = kept((q.float() * D**-0.5).contiguous()).unflatten(2, (dims, -1)).unbind(2)  # each (n, G, D / dims)
        of_k = k.unflatten(1, (dims, -1))[blocks].float().unbind(2)  # each (n, P, D / dims, block_size)
        of_v = v.unflatten(1, (keys, -1))[blocks].float().unbind(2)  # each (n, P, block_size / keys, D)
        out = []
        scores = [sum(a[:, g, None, :, None] * b for a, b in zip(of_q, of_k, strict=True)).sum(2) for g in range(G)]
        scores = [kept(torch.where(seen, s, float("-inf"))) for s in scores]
        weights = [kept((s - s.amax((1, 2), keepdim=True)).exp()) for s in scores]
        for w in weights:
            parts = w.unflatten(2, (keys, -1)).unbind(2)
            out.append(sum(a[..., None] * b for a, b in zip(parts, of_v, strict=True)).sum((1, 2)) / w.sum((1, 2))[:, None])
        return torch.stack(out, 1).to(q.dtype)


def ranges(ids: Tensor, at: Tensor, spec: SparseSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The P blocks that each sparse query at `at (n,)` int64 reads who chose the blocks `ids (n, M)` int64, -1 for none, and which of their keys: `blocks
    (n, P)` int64, and from the `first` to before the `end` of their keys, both `(n, P)` fp32. No key is in two of them; of a block that does not exist, none
    is."""
    size, n = spec.block_size, ids.shape[0]
    at, newest = at[:, None], at[:, None] // size
    window_start = at - spec.window + 1
    sinks = torch.arange(-(-spec.n_sinks // size), device=ids.device).expand(n, -1)
    window = newest - torch.arange((spec.window + size - 2) // size + 1, device=ids.device)
    blocks = torch.cat([sinks, window, ids], 1)
    none, of_sinks = torch.zeros_like(ids), torch.full_like(sinks, spec.n_sinks)
    first = torch.cat([torch.zeros_like(sinks), window_start.expand_as(window), none + spec.n_sinks], 1) - blocks * size
    end = torch.cat([torch.minimum(of_sinks, window_start), (at + 1).expand_as(window), window_start.expand_as(ids)], 1) - blocks * size
    blocks, first, end = blocks.clamp(min=0).minimum(newest), first.float(), torch.where(blocks < 0, 0, end).float()
    return kept(blocks.contiguous()), kept(first.contiguous()), kept(end.contiguous())


def serves(spec: SparseSpec | None) -> bool:
    """Whether there are steps for this rule: one that chooses blocks, and not so many that the code would grow too long."""
    return spec is not None and 0 < spec.n_selected_blocks <= MOST_BLOCKS


def plain_steps(spec: SparseSpec) -> dict[str, nn.Module]:
    """Both steps, uncompiled."""
    return {"choose": Choose(spec), "read": Read(spec)}


class SparsePrompt:
    """Attention by the rule `spec` through `choose` and `read`, which are `plain_steps`, or the same compiled, for queries and keys of `dtype`."""

    def __init__(self, spec: SparseSpec, choose: Callable, read: Callable, dtype: torch.dtype) -> None:
        self.spec, self.choose, self.read, self.dtype = spec, choose, read, dtype

    def takes(self, plan: AttentionPlan) -> bool:
        """Whether it serves a pass: queries of one row and one document, in order, some of them sparse; more than `kernels` serves by index, copying no
        keys (here a head's are all turned)."""
        return len(plan.q_pos) == 1 and plan.q_pos.numel() > FEW_QUERIES and plan.rises and not plan.all_dense(self.spec.dense_len)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, pooled: Tensor | None, plan: AttentionPlan) -> Tensor:
        """Attention of `q (N, H, D)` over `k, v (1, S, Hk, D)` with mean keys `pooled (1, n, Hk, D)` of complete blocks (None: made here): `(N, H, D)`, in
        q's dtype."""
        dtype, q = q.dtype, q.to(self.dtype)
        n_keys, n_heads, size = plan.max_pos + 1, k.shape[2], self.spec.block_size
        k, v = k[:, :n_keys], v[:, :n_keys]
        if pooled is None:  # a head at a time: they are means of copies in fp32
            pooled = torch.cat([pool_keys(x, size) for x in k.split(1, 2)], 2)
        n_dense, of_dense = plan.cached(("dense queries", self.spec), lambda: _dense_part(plan, self.spec.dense_len))
        dense = q[:0]
        if n_dense:  # before there is room for all: it takes some
            of_keys = slice(of_dense.n_keys)
            dense = dense_attention(q[None, :n_dense], k[:, of_keys].to(self.dtype), v[:, of_keys].to(self.dtype), of_dense)[0]
        out = torch.empty_like(q)
        out[:n_dense] = dense
        del dense
        at, of_q, of_out = plan.q_pos[0, n_dense:], q[n_dense:].unflatten(1, (n_heads, -1)), out[n_dense:].unflatten(1, (n_heads, -1))
        for i in range(n_heads):
            self._head(of_out[:, i], of_q[:, i], k[0, :, i], v[0, :, i], pooled[0, : n_keys // size, i], at)
        return out.to(dtype)

    def _head(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, pooled: Tensor, at: Tensor) -> None:
        """Writes the attention of sparse queries `q (n, G, D)` over one head's `k, v (S, D)` to `out`."""
        size = self.spec.block_size
        keys, values = (_whole(x, size).to(self.dtype).unflatten(0, (-1, size)) for x in (k, v))
        keys, values = keys.transpose(1, 2).contiguous(), values.contiguous()
        pooled = _whole(pooled, BLOCKS).contiguous().view(-1, GROUP, pooled.shape[1])
        for start in range(0, len(at), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            out[part] = self._part(q[part], keys, values, pooled, at[part])

    def _part(self, q: Tensor, k: Tensor, v: Tensor, pooled: Tensor, at: Tensor) -> Tensor:
        """Some queries of one KV head, as `Read` takes them, but any number."""
        n, more, n_seen = len(q), -len(q) % QUERIES, int(at[-1]) // self.spec.block_size + 1
        if more:  # the last query is repeated
            q, at = torch.cat([q, q[-1:].expand(more, -1, -1)]), torch.cat([at, at[-1:].expand(more)])
        q = q.contiguous()  # compiled steps take nothing else
        ids = self.choose(q.unflatten(0, (-1, TILE)), pooled[: -(-n_seen // BLOCKS) * BLOCKS // GROUP], at.view(-1, TILE))
        return self.read(q, k, v, ids, at)[:n]


def _dense_part(plan: AttentionPlan, dense_len: int) -> tuple[int, AttentionPlan | None]:
    """How many queries of one row in order are dense, and their plan, over the keys that they see."""
    q_pos = plan.q_pos[:, : int((plan.q_pos < dense_len).sum())]
    return q_pos.shape[1], AttentionPlan(q_pos, int(q_pos[0, -1]) + 1) if q_pos.shape[1] else None


def _whole(x: Tensor, size: int) -> Tensor:
    """`x (n, D)` with rows of zeros, so that they are a multiple of `size`, at least one."""
    more = -len(x) % size if len(x) else size
    return F.pad(x, (0, 0, 0, more)) if more else x
