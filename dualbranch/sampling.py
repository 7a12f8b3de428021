"""From logits to token ids: pure functions, used by `generate.py`. Which tokens are allowed at all is `modes.py`'s business."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def check_integer(name: str, value: object) -> None:
    """Raises ValueError where `value` is no integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} is {value!r}; it must be an integer")


def check_number(name: str, value: object) -> None:
    """Raises ValueError where `value` is no real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} is {value!r}; it must be a number")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch their filter off.

    `max_tokens` bounds everything that is generated: decision, reasoning, answer and `<|end|>`. Raises ValueError for values out
    of range. Greedy decoding reads neither the filters nor the seed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("top_k", "seed", "max_tokens"):
            check_integer(name, getattr(self, name))
        for name in ("temperature", "top_p", "min_p"):
            check_number(name, getattr(self, name))
        if not (self.temperature >= 0.0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}; it must be finite and at least 0 (0 = greedy)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 0 (0 = off)")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1] (1 = off)")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p is {self.min_p}; it must lie in [0, 1] (0 = off)")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2**63)")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens is {self.max_tokens}; a reply needs at least 2 (the decision to think or not, and one answer token)")


GREEDY = SamplingParams()
#: So many of the most probable tokens are looked at first; filters rarely keep more, and sorting a large vocabulary takes longer than a small model's pass.
HEADS = (256, 4096)


def filtered_probs(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The distribution that `sample` draws from: `probs (B, n)` fp64, most probable first and zero where filtered, and `ids (B, n)`. Tokens not among
    them have none. (Without a filter: all tokens, in order of their ids.)

    Each filter reads the tempered distribution of all tokens, and a token must pass all of them, so their order plays no role:
    `top_k`, the k most probable (ties: lower id first); `top_p`, the shortest head whose mass reaches top_p; `min_p`, at least
    min_p times the most probable. Every filter keeps a head of the sorted order, never empty. temperature must be above 0.
    """
    logits = logits.double()
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / params.temperature, -1)
    if not params.top_k and params.top_p == 1.0 and not params.min_p:
        return probs, torch.arange(probs.shape[-1], device=probs.device).expand_as(probs)
    for n in (*(n for n in HEADS if n < probs.shape[-1]), probs.shape[-1]):
        head, ids = most_probable(probs, n)
        keep = head >= params.min_p * head[:, :1]
        if params.top_k:
            keep[:, params.top_k :] = False
        if params.top_p < 1.0:
            keep &= head.cumsum(-1) - head < params.top_p  # mass before this token
        if n == probs.shape[-1] or not (keep & (head == head[:, -1:])).any():  # what is kept ends before the head does, and before its last ties
            break
    head = head * keep
    return head / head.sum(-1, keepdim=True), ids


def most_probable(probs: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n highest of `probs (B, V)`, descending, ties by id, and their ids. (Among those equal to the last, which ones is left open unless n is V.)"""
    if n == probs.shape[-1]:
        return probs.sort(dim=-1, descending=True, stable=True)
    ids = probs.topk(n, dim=-1, sorted=False).indices.sort(-1).values
    head, order = probs.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return head, ids.gather(-1, order)


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """One token id per row `(B,)` from `logits (B, V)`; a logit of -inf is never chosen.

    `generator` (on the CPU) is one for all rows, or a sequence with one per row, which makes a row's draws independent of its batch.
    Each row consumes one number of its generator; greedy consumes none. Mutates nothing else.
    """
    if params.temperature == 0.0:
        return logits.argmax(-1)
    if isinstance(generator, torch.Generator) or generator is None:
        u = torch.rand(logits.shape[0], dtype=torch.float64, generator=generator)
    else:
        u = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in generator])
    probs, ids = filtered_probs(logits, params)
    return ids.gather(-1, draw(probs, u)[:, None]).squeeze(-1)


def token_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that `sample` draws from, `(B, V)` fp64 by token id; greedy: all of it on the best token."""
    if params.temperature == 0.0:
        return one_hot(logits.argmax(-1), logits.shape[-1]).double()
    probs, ids = filtered_probs(logits, params)
    return torch.zeros(logits.shape, dtype=probs.dtype, device=probs.device).scatter(-1, ids, probs)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """One index per row `(B,)`, index i with probability `weights[b, i]` over their sum, by uniform numbers `u (B,)` in [0, 1).

    `weights (B, N)` fp64, at least 0, one of each row above 0. An index of weight 0 is never drawn, whatever the rounding.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, u.to(weights.device)[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)  # the last weight above 0, for a u that rounds up to all of the mass
    return torch.minimum(index, last).squeeze(-1)
