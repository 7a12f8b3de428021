"""What to attend to: the sparse rule (`SparseSpec`) and where each query stands (`AttentionPlan`).

The model builds one plan per forward; every layer reuses it and whatever it has cached. No attention happens here.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

#: Most tokens that anything is counted in: a larger number in a config is a mistake or an attack, refused before anything is allocated.
MOST_TOKENS = 2**24


@dataclass(frozen=True)
class SparseSpec:
    """The fast branch's reading rule, in tokens unless named otherwise; counts start at the query's document.

    Raises ValueError for a value that cannot work.
    """

    block_size: int = 16
    n_selected_blocks: int = 16
    window: int = 128
    n_sinks: int = 4
    dense_len: int = 512  # queries with fewer earlier tokens than this read everything

    @classmethod
    def sliding(cls, window: int, block_size: int) -> "SparseSpec":
        """The rule of a sliding-window layer: the last `window` keys, the query's own included, and nothing else.

        No blocks and no sinks; queries that see no more than the window are dense. block_size only says how documents are aligned.
        """
        return cls(block_size, n_selected_blocks=0, window=window, n_sinks=0, dense_len=window)

    def __post_init__(self) -> None:
        lowest = {"block_size": 1, "n_selected_blocks": 0, "window": 1, "n_sinks": 0, "dense_len": 0}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or not lowest[field.name] <= value <= MOST_TOKENS:
                raise ValueError(f"{field.name} must be an integer in [{lowest[field.name]}, {MOST_TOKENS}], got {value!r}")


class AttentionPlan:
    """Positions of one forward's queries, and everything about them that layers can share.

    q_pos (B, T) int64: index on the key axis of each query's own key; -1 marks a padding query.
    n_keys: length S of the key axis.
    doc_start (B, T) int64: index of the first token of the query's document; None = 0 everywhere.
    Valid for one forward: build a new one when positions change. Building it synchronises with the device once;
    caches fill during the first layer. Raises ValueError for positions outside the key axis or their document.
    """

    def __init__(self, q_pos: Tensor, n_keys: int, doc_start: Tensor | None = None) -> None:
        _check_positions("q_pos", q_pos)
        if doc_start is not None:
            _check_positions("doc_start", doc_start)
            if doc_start.shape != q_pos.shape:
                raise ValueError(f"doc_start must have q_pos's shape {tuple(q_pos.shape)}, got {tuple(doc_start.shape)}")
        self.q_pos = q_pos.long()
        self.n_keys = int(n_keys)
        self.doc_start = torch.zeros_like(self.q_pos) if doc_start is None else doc_start.long()
        self._cache: dict[Any, Any] = {}
        self._summarise(doc_start is not None)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, block_size: int) -> "AttentionPlan":
        """The plan of a ragged batch: one row whose queries are the sequences' tokens, end to end, without padding.

        cu_seqlens (n + 1,) integers: sequence i is tokens [cu_seqlens[i], cu_seqlens[i + 1]); it may be empty. On the key axis every
        sequence starts at a multiple of block_size, so that no block holds keys of two: token t's key and value belong at
        `plan.q_pos[0, t]` of k, v (1, plan.n_keys, Hk, D). No query reads the slots between sequences; the plain-PyTorch path
        needs them finite (zeros will do), for it multiplies them by zero.
        Raises ValueError if cu_seqlens is no such list. Reads it back.
        """
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool or len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens must be an integer tensor (n + 1,), n >= 1, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
        if block_size < 1:
            raise ValueError(f"block_size must be >= 1, got {block_size}")
        cu_seqlens = cu_seqlens.long()
        lengths = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or (lengths < 0).any():
            raise ValueError(f"cu_seqlens must start at 0 and never fall, got {cu_seqlens.tolist()}")
        ends = ((lengths + block_size - 1) // block_size * block_size).cumsum(0)  # of the sequences' slots on the key axis
        starts = torch.nn.functional.pad(ends, (1, 0))[:-1]
        doc_start = starts.repeat_interleave(lengths)
        q_pos = doc_start + torch.arange(len(doc_start), device=ends.device) - cu_seqlens[:-1].repeat_interleave(lengths)
        return cls(q_pos.unsqueeze(0), int(ends[-1]), doc_start.unsqueeze(0))

    @classmethod
    def within(cls, q_pos: Tensor, n_keys: int, lowest: int) -> "AttentionPlan":
        """The plan of queries that stand, or will stand when it is used, anywhere in [lowest, n_keys): it doesn't look, so it synchronises with nothing.

        For the decode kernels, which read the positions where they compute: recorded in a CUDA graph they serve all of that range. q_pos (B, T)
        int64; every row is one document without padding.
        """
        plan = object.__new__(cls)
        plan.q_pos, plan.n_keys, plan.doc_start, plan._cache = q_pos, n_keys, torch.zeros_like(q_pos), {}
        plan.row_max, plan.max_pos, plan.min_rel, plan.max_rel = [n_keys - 1] * len(q_pos), n_keys - 1, lowest, n_keys - 1
        plan.has_padding = plan.has_docs = plan.rises = plan.is_prefix = False
        return plan

    def _summarise(self, has_doc_start: bool) -> None:
        """Reads back, in one transfer, the facts that steer control flow."""
        B, T = self.q_pos.shape
        if B == 0 or T == 0:
            raise ValueError(f"q_pos must hold at least one query, got shape {(B, T)}")
        rel, pad = self.q_pos - self.doc_start, self.q_pos < 0
        facts = {"lowest": self.q_pos.amin(), "min_rel": rel.masked_fill(pad, self.n_keys).amin()}
        if has_doc_start:
            facts["max_rel"], facts["doc_min"] = rel.masked_fill(pad, -1).amax(), self.doc_start.amin()
            facts["doc_max"] = self.doc_start.masked_fill(pad, 0).amax()
        facts["rises"] = ((self.q_pos == self.q_pos[:1]).all() & (self.q_pos.diff() > 0).all()).long()
        values = torch.cat([torch.stack(list(facts.values())), self.q_pos.amax(1)]).tolist()
        known = dict(zip(facts, values, strict=False))
        self.row_max: list[int] = values[len(facts) :]  # row_max[b] = last key any query of row b sees, -1 = none
        self.max_pos = max(self.row_max)
        self.min_rel, self.max_rel = known["min_rel"], known.get("max_rel", self.max_pos)
        self.has_padding = known["lowest"] < 0
        self.has_docs = known.get("doc_max", 0) > 0
        # rows of one document, the queries of all of them at the same positions, in order
        self.rises = bool(known["rises"]) and not self.has_padding and not self.has_docs
        self.is_prefix = self.rises and self.max_pos + 1 == self.n_keys == T
        if known["lowest"] < -1 or self.max_pos >= self.n_keys:
            raise ValueError(f"q_pos must lie in [-1, n_keys = {self.n_keys}), got [{known['lowest']}, {self.max_pos}]")
        if known.get("doc_min", 0) < 0 or self.min_rel < 0:
            raise ValueError("doc_start must lie in [0, q_pos]")

    def all_dense(self, dense_len: int) -> bool:
        """Every query has fewer than dense_len earlier tokens, so the sparse rule reads everything."""
        return self.max_rel < dense_len

    def any_dense(self, dense_len: int) -> bool:
        return self.min_rel < dense_len

    def cached(self, key: Any, build: Callable[[], Any]) -> Any:
        """build()'s result, computed once per plan."""
        if key not in self._cache:
            self._cache[key] = build()
        return self._cache[key]


def _check_positions(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() != 2 or x.is_floating_point() or x.dtype == torch.bool:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be an integer tensor (B, T), got {got}")
