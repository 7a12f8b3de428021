"""Documents of any length into rows of one length, for training without padding waste.

`pack` is the only entry. Documents never cross rows, start at multiples of the selection block size (`align`), and
see only themselves: `doc_start` tells attention where each token's document begins. What isn't here: making the
documents (`chat.py`, `data/text.py`), batching and shuffling rows (the trainer).

    row   | doc A (start 0) .......|gap| doc B (start 2 * align) ......|gap| padding document |
    gap tokens belong to the document before them, behind all its tokens: nothing real ever sees them
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

Example = tuple[Sequence[int], Sequence[float]]
"""Ids of one document and, for each of them, the weight of predicting it (so `loss_weights[0]` is 0)."""


@dataclass(frozen=True)
class Rows:
    """Packed rows. R rows of T = seq_len tokens.

    Attributes:
        tokens (R, T) int64: the documents, `pad_id` between and behind them.
        targets (R, T) int64: the next token of the same document; `pad_id` where there is none.
        loss_weights (R, T) float32: weight of predicting `targets` at this position; 0 where there is none.
        doc_start (R, T) int64: index in the row of the first token of this token's document, a multiple of `align`.
        real (R, T) bool: a document's token, not padding.
        n_documents: documents packed.
        n_tokens: tokens of the packed documents, without padding.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    loss_weights: torch.Tensor
    doc_start: torch.Tensor
    real: torch.Tensor
    n_documents: int
    n_tokens: int

    def __len__(self) -> int:
        return len(self.tokens)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Rows":
        """The same documents with every tensor changed: moved to a device, or some of the rows."""
        return replace(self, **{name: change(getattr(self, name)) for name in ("tokens", "targets", "loss_weights", "doc_start", "real")})

    @property
    def efficiency(self) -> float:
        """Share of all positions that hold a document's token, in [0, 1]."""
        return self.n_tokens / max(1, self.tokens.numel())


def pack(examples: Iterable[Example], seq_len: int, align: int, pad_id: int) -> Rows:
    """Pack `examples`, (ids, loss_weights) pairs, into rows of `seq_len`: each goes to the fullest row it still fits.

    An example's `loss_weights[i]` weights predicting `ids[i]`, which happens at the position of `ids[i - 1]`. So in the
    rows it stands one place earlier, beside the target `ids[i]`; the last token of a document has weight 0. The sum of
    weights is preserved. The result depends on the order of the examples only, and keeps it where it can.

    Raises ValueError for a document longer than `seq_len`, for an empty one, for ids and weights of different lengths, and
    for a non-zero `loss_weights[0]`, which nothing predicts.
    """
    if seq_len < 1 or align < 1:
        raise ValueError(f"seq_len is {seq_len} and align is {align}, needed at least 1")
    ids_parts: list[np.ndarray] = []
    weight_parts: list[np.ndarray] = []
    offsets: list[int] = []  # where each document starts in the flattened (R * T) rows
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted; only rows with free tokens
    n_rows = 0
    for i, (ids, weights) in enumerate(examples):
        n = len(ids)
        if n == 0 or n != len(weights):
            raise ValueError(f"example {i} has {n} ids and {len(weights)} loss_weights, needed as many of each, and >= 1")
        if weights[0] != 0:
            raise ValueError(f"example {i}: loss_weights[0] is {weights[0]}, needed 0: nothing predicts the first token")
        if n > seq_len:
            raise ValueError(f"example {i} has {n} tokens, seq_len is {seq_len}: raise seq_len, or leave such examples out")
        best = bisect_left(open_rows, (n, -1))
        if best == len(open_rows):
            free, row = seq_len, n_rows
            n_rows += 1
        else:
            free, row = open_rows.pop(best)
        start = seq_len - free
        offsets.append(row * seq_len + start)
        end = -(-(start + n) // align) * align  # first aligned position behind the document
        if end < seq_len:
            insort(open_rows, (seq_len - end, row))
        ids_parts.append(np.asarray(ids, dtype=np.int64))
        weight_parts.append(np.asarray(weights, dtype=np.float32))

    n_documents = len(offsets)
    tokens = np.full(n_rows * seq_len, pad_id, dtype=np.int64)
    targets = np.full(n_rows * seq_len, pad_id, dtype=np.int64)
    loss_weights = np.zeros(n_rows * seq_len, dtype=np.float32)
    doc_start = np.zeros(n_rows * seq_len, dtype=np.int64)
    real = np.zeros(n_rows * seq_len, dtype=bool)
    n_tokens = 0
    if n_documents:
        lengths = np.array([len(p) for p in ids_parts])
        n_tokens = int(lengths.sum())
        starts = np.array(offsets)
        flat_ids, flat_weights = np.concatenate(ids_parts), np.concatenate(weight_parts)
        first = np.cumsum(lengths) - lengths  # of each document, in the concatenation
        position = np.arange(n_tokens) + np.repeat(starts - first, lengths)
        tokens[position] = flat_ids
        real[position] = True
        is_first = np.zeros(n_tokens, dtype=bool)
        is_first[first] = True
        targets[position[~is_first] - 1] = flat_ids[~is_first]
        loss_weights[position[~is_first] - 1] = flat_weights[~is_first]
        # Starts of documents, and of the padding document at each row's end; each position takes the last one before it.
        ends = -(-(starts % seq_len + lengths) // align) * align  # in the row; aligned
        padding_starts = (starts // seq_len * seq_len + ends)[ends < seq_len]
        begins = np.concatenate([np.arange(n_rows) * seq_len, starts, padding_starts])
        is_begin = np.zeros(len(tokens), dtype=bool)
        is_begin[begins] = True
        begins = np.flatnonzero(is_begin)
        doc_start = np.repeat(begins, np.diff(np.append(begins, len(tokens)))) % seq_len
    return Rows(
        tokens=torch.from_numpy(tokens).view(n_rows, seq_len),
        targets=torch.from_numpy(targets).view(n_rows, seq_len),
        loss_weights=torch.from_numpy(loss_weights).view(n_rows, seq_len),
        doc_start=torch.from_numpy(np.ascontiguousarray(doc_start)).view(n_rows, seq_len),
        real=torch.from_numpy(real).view(n_rows, seq_len),
        n_documents=n_documents,
        n_tokens=n_tokens,
    )
