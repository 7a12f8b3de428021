"""Key/value storage behind one small interface, so that paging can replace the contiguous cache without touching a block.

A forward pass asks for a `writer` once, then calls `writer.layer(i)` for each block; what comes back is a `KVStore` (block.py).
`NoCache` serves a pass without a cache, `KVCache` a conversation or a batch of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualbranch.config import DualBranchConfig
from dualbranch.memory import in_huge_pages


class CacheFull(ValueError):
    """More tokens than the cache, or memory, has room for; the message gives both counts, or the cache's size."""


@dataclass(frozen=True)
class NoCache:
    """Keys of this pass only: laid out on the `(B, T)` grid of its tokens. Differentiable."""

    n_rows: int
    n_cols: int

    def layer(self, _: int, order: Tensor | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, None]]:
        def store(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
            if order is not None:
                k, v = (x.new_zeros(self.n_rows * self.n_cols, *x.shape[1:]).index_copy(0, order, x) for x in (k, v))
            shape = (self.n_rows, self.n_cols, *k.shape[1:])
            return k.view(shape), v.view(shape), None

        return store

    def advance(self, use_slow: Tensor | None) -> None:
        """Nothing is kept."""


class KVCache:
    """Contiguous cache of `n_rows` sequences of up to `capacity` tokens each (rounded up to whole selection blocks).

    `heads[i]`: keys and values of a layer `(B, Hk, C, D)`, a head's tokens side by side, so that a block of them is read in one go; `k[i], v[i]
    (B, C, Hk, D)`: the same, as views; `pooled[i] (B, C / block_size, Hk, D)` fp32 mean keys of the complete blocks of dual layers that choose blocks,
    updated once per block; `n_cached (B,)` int64 on the CPU; `from_slow (B, C)` bool on the CPU: provenance of each row's tokens.
    Slots at and after `n_cached` hold nothing meaningful.
    """

    def __init__(self, config: DualBranchConfig, n_rows: int, capacity: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        block = config.sparse.block_size
        self.config, self.capacity = config, -(-capacity // block) * block
        shape = (n_rows, config.n_kv_heads, self.capacity, config.head_dim)
        pooled_shape = (n_rows, self.capacity // block, config.n_kv_heads, config.head_dim)
        n_bytes = math.prod(shape) * dtype.itemsize
        torch.empty(0, device=device)  # an unknown device is another matter than too little memory
        try:
            if torch.device(device).type == "cpu":
                tensors = [t.view(dtype).view(shape) for t in in_huge_pages([n_bytes] * (2 * config.n_layers))]
            else:
                tensors = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * config.n_layers)]
            self.pooled = {i: torch.zeros(pooled_shape, device=device) for i in config.dual_layers if i not in config.sliding_layers}
        except (RuntimeError, MemoryError) as error:  # how torch says that there is no more memory
            size = f"{n_rows} x {self.capacity} tokens takes {2e-9 * config.n_layers * n_bytes:,.1f} GB"
            raise CacheFull(f"a cache of {size}, and so much memory isn't free; ask for fewer tokens (max_tokens) or rows (batch_size)") from error
        self._take(list(zip(tensors[::2], tensors[1::2], strict=True)))
        self.n_cached = torch.zeros(n_rows, dtype=torch.int64)
        self.from_slow = torch.ones(n_rows, self.capacity, dtype=torch.bool)

    def _take(self, heads: list[tuple[Tensor, Tensor]]) -> None:
        self.heads = heads
        self.k, self.v = ([layer[j].transpose(1, 2) for layer in heads] for j in (0, 1))

    @property
    def n_rows(self) -> int:
        return self.n_cached.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.heads[0][0].dtype

    def n_bytes(self) -> int:
        """Bytes held, whether filled or not."""
        return sum(t.numel() * t.element_size() for t in [*self.k, *self.v, *self.pooled.values()])

    @torch.inference_mode()
    def truncate(self, n_cached: Tensor | Sequence[int] | int) -> None:
        """Forgets everything after the first `n_cached` tokens of each row. Mutates the cache."""
        self.n_cached.copy_(self.n_cached.minimum(torch.as_tensor(n_cached, dtype=torch.int64)))

    def rows(self, start: int, stop: int) -> KVCache:
        """Rows [start, stop) as a cache of their own, on the same storage: whatever changes in one of the two changes in both."""
        if (start, stop) == (0, self.n_rows):
            return self
        out = object.__new__(KVCache)
        out.config, out.capacity = self.config, self.capacity
        out._take([(k[start:stop], v[start:stop]) for k, v in self.heads])
        out.pooled = {i: t[start:stop] for i, t in self.pooled.items()}
        out.n_cached, out.from_slow = self.n_cached[start:stop], self.from_slow[start:stop]
        return out

    @torch.inference_mode()
    def copy_rows(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Row `targets[i]` becomes what row `sources[i]` is; no row is both. Mutates the cache."""
        sources, targets = torch.tensor(sources), torch.tensor(targets)
        n = int(self.n_cached[sources].max())
        n_blocks = n // self.config.sparse.block_size
        tensors = [*((t, n) for t in (*self.k, *self.v, self.from_slow)), *((t, n_blocks) for t in self.pooled.values())]
        for t, n_filled in tensors:
            t[targets, :n_filled] = t[sources, :n_filled]
        self.n_cached[targets] = self.n_cached[sources]

    def writer(self, n_new: Tensor, n_cols: int) -> CacheWriter:
        """For one forward pass of `n_new (B,)` tokens per row on a grid `n_cols` wide. Raises CacheFull; mutates nothing yet."""
        writer = CacheWriter(self, n_new, n_cols)
        self.check_room(writer.n_keys)
        return writer

    def next_slot(self, n_new: int = 1) -> int:
        """Where the next `n_new` tokens of the only row begin, for a runner that writes there itself and then calls `fill_slots`. Raises CacheFull."""
        slot = int(self.n_cached[0])
        self.check_room(slot + n_new)
        return slot

    def fill_slots(self, n_new: int, slow: bool) -> None:
        """Counts the `n_new` tokens from `next_slot` on as cached, with their route. Mutates the cache."""
        start = int(self.n_cached[0])
        self.from_slow[0, start : start + n_new] = slow
        self.n_cached += n_new

    def check_room(self, n_keys: int) -> None:
        """Raises CacheFull where a row can't hold `n_keys` tokens."""
        if n_keys > self.capacity:
            raise CacheFull(f"the cache holds {self.capacity} tokens and {n_keys} are needed; ask for fewer tokens or a larger capacity (max_seq_len)")


class CacheWriter:
    """Where the tokens of one forward pass go, worked out once and used by every layer."""

    def __init__(self, cache: KVCache, n_new: Tensor, n_cols: int) -> None:
        self.cache = cache
        device, block = cache.k[0].device, cache.config.sparse.block_size
        start, self.end = cache.n_cached, cache.n_cached + n_new
        self.n_keys = int(self.end.max())
        t, rows = torch.arange(n_cols), torch.arange(cache.n_rows)
        self.dest = ((rows * cache.capacity + start)[:, None] + t).flatten().to(device)  # flat cache slot of each grid cell
        self.cells = None  # grid cells that hold a token, None = all
        if int(n_new.min()) < n_cols:
            self.cells = (t < n_new[:, None]).flatten().nonzero().squeeze(1).to(device)
        self.slots = self.dest if self.cells is None else self.dest[self.cells]  # of the tokens in the grid's order
        self._ordered = (None, self._by_head(self.slots))  # the last `order` asked for, and where its tokens' heads go
        first = start // block
        n_completed = self.end // block - first
        row = rows.repeat_interleave(n_completed)
        nth = torch.arange(len(row)) - (n_completed.cumsum(0) - n_completed)[row]  # 0, 1, ... within each row
        nth += first[row]
        self.completed = torch.stack([row, nth], 1)  # (row, block) newly complete
        self.blocks = (row * (cache.capacity // block) + nth).to(device)  # the same as flat indices
        self.blocks_by_head = self._by_head(self.blocks, block)

    def _by_head(self, slots: Tensor, block_size: int = 1) -> Tensor:
        """Of flat indices `(n,)` of rows and their slots, or blocks, the `(n * Hk,)` of rows, heads and their slots."""
        n, heads = self.cache.capacity // block_size, torch.arange(self.cache.config.n_kv_heads, device=slots.device)
        return ((slots // n * len(heads))[:, None] + heads).mul(n).add((slots % n)[:, None]).flatten()

    def layer(self, i: int, order: Tensor | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]:
        """The store of layer `i`; `order` as in `Partition`. Calling it writes into the cache."""
        cache, block = self.cache, self.cache.config.sparse.block_size
        if order is not self._ordered[0]:
            self._ordered = (order, self._by_head(self.slots if order is None else self.dest[order]))
        slots = self._ordered[1]

        def store(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            if order is None and self.cells is not None:
                k, v = k[self.cells], v[self.cells]
            for full, new in zip(cache.heads[i], (k, v), strict=True):
                full.flatten(0, 2).index_copy_(0, slots, new.detach().to(full.dtype).flatten(0, 1))
            pooled = cache.pooled.get(i)
            if pooled is not None and len(self.completed):
                complete = cache.heads[i][0].view(-1, block, k.shape[2]).index_select(0, self.blocks_by_head)  # (pairs * Hk, block_size, D)
                pooled.flatten(0, 1).index_copy_(0, self.blocks, complete.float().mean(1).view(-1, *k.shape[1:]))
            return cache.k[i][:, : self.n_keys], cache.v[i][:, : self.n_keys], pooled

        return store

    def advance(self, use_slow: Tensor | None) -> None:
        """Counts the tokens as cached, with their route `use_slow (B, T)` (None = all slow). Mutates the cache."""
        if use_slow is not None:
            use_slow = (use_slow.flatten() if self.cells is None else use_slow.flatten()[self.cells]).cpu()
        self.cache.from_slow.view(-1)[self.slots.cpu()] = True if use_slow is None else use_slow
        self.cache.n_cached.copy_(self.end)
