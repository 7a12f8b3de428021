"""What to attend to: the sparse rule (`SparseSpec`) and where each query stands (`AttentionPlan`).

The model builds one plan per forward; every layer reuses it and whatever it has cached. No attention happens here.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


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

    def __post_init__(self) -> None:
        lowest = {"block_size": 1, "n_selected_blocks": 0, "window": 1, "n_sinks": 0, "dense_len": 0}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest[field.name]:
                raise ValueError(f"{field.name} must be an integer >= {lowest[field.name]}, got {value!r}")


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
        self._summarise()

    def _summarise(self) -> None:
        """Reads back, in one transfer, the facts that steer control flow."""
        B, T = self.q_pos.shape
        if B == 0 or T == 0:
            raise ValueError(f"q_pos must hold at least one query, got shape {(B, T)}")
        rel = self.q_pos - self.doc_start
        pad = self.q_pos < 0
        arange = torch.arange(T, device=self.q_pos.device)
        facts = [
            self.q_pos.min(),
            self.doc_start.min(),
            self.doc_start.masked_fill(pad, 0).max(),
            rel.masked_fill(pad, self.n_keys).min(),
            rel.masked_fill(pad, -1).max(),
            (self.q_pos == arange).all().long(),
        ]
        values = torch.cat([torch.stack(facts), self.q_pos.amax(1)]).tolist()
        lowest, doc_min, doc_max, self.min_rel, self.max_rel, is_arange = values[:6]
        self.row_max: list[int] = values[6:]  # row_max[b] = last key any query of row b sees, -1 = none
        self.max_pos = max(self.row_max)
        self.has_padding = lowest < 0
        self.has_docs = doc_max > 0
        self.is_prefix = bool(is_arange) and not self.has_docs and self.n_keys == T
        if lowest < -1 or self.max_pos >= self.n_keys:
            raise ValueError(f"q_pos must lie in [-1, n_keys = {self.n_keys}), got [{lowest}, {self.max_pos}]")
        if doc_min < 0 or self.min_rel < 0:
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
