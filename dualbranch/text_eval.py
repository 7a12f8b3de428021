"""Perplexity and bits per byte of text, by route and budget, with what each costs: `dualbranch eval MODEL --on text FILE`, and the "Text" part of a report.

A text is cut in windows of `window` tokens, each read on its own, teacher-forced, hard routing: what a model would compute that was given exactly
these tokens. The first token of a window is predicted by nothing and not counted, unless the tokenizer opens every text with a token of its own.
Logits exist for some tokens at a time (distill/losses.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dualbranch.accounting import token_flops
from dualbranch.distill.losses import by_tokens
from dualbranch.model import DualBranchModel
from dualbranch.tokenizer import TokenizerBase

#: WikiText's token spacing, in the order in which it is undone.
_WIKITEXT = [
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([,.;:!?%)\]}])"), r"\1"),
    (re.compile(r"([(\[{$]) "), r"\1"),
    (re.compile(r" (n't|'(?:s|t|re|ve|m|ll|d)\b)"), r"\1"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
]


def undo_wikitext(text: str) -> str:
    """Word-tokenised WikiText as people write: ` @-@ ` is `-`, no space before punctuation or inside brackets and quotes. `<unk>` stays."""
    for pattern, instead in _WIKITEXT:
        text = pattern.sub(instead, text)
    return text


def read_text(path: str | Path, wikitext: bool = False, last: float = 1.0) -> str:
    """The text of a UTF-8 file; with `wikitext` its spacing undone; only the last share `last` of its lines. Raises ValueError."""
    if not 0 < last <= 1:
        raise ValueError(f"the share of text to read is {last}; it must lie in (0, 1]")
    try:
        text = Path(path).read_text(encoding="utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error
    lines = text.splitlines(keepends=True)
    text = "".join(lines[len(lines) - max(1, round(last * len(lines))) :])
    if not text.strip():
        raise ValueError(f"{path}: is empty, it holds no text")
    return undo_wikitext(text) if wikitext else text


@dataclass(frozen=True)
class Windows:
    """`tokens`: one `(T,)` per window; `n_bytes`: UTF-8 bytes of the text they hold, those of uncounted first tokens left out."""

    tokens: list[Tensor]
    n_bytes: int

    @property
    def n_tokens(self) -> int:
        """Predicted tokens."""
        return sum(len(t) - 1 for t in self.tokens)


def cut_windows(tok: TokenizerBase, texts: Sequence[str], window: int = 1024, max_tokens: int | None = None) -> Windows:
    """`texts`, each cut in windows of `window` tokens, at most `max_tokens` in all (one window at least), spread evenly."""
    start = list(tok.start_ids)
    size = window - len(start)
    if size < 2:
        raise ValueError(f"the window is {window} tokens; it must be at least {2 + len(start)}")
    pieces: list[list[int]] = []
    n_written: list[int] = []  # bytes of each piece's predicted tokens
    for text in texts:
        ids = tok.encode(text)
        for i in range(0, len(ids), size):
            piece = ids[i : i + size]
            if len(piece) + len(start) > 1:
                pieces.append(piece)
                n_written.append(len(tok.written(piece if start else piece[1:], opens=bool(start) and i == 0)))
    if not pieces:
        raise ValueError("the text has fewer than two tokens; nothing can be predicted")
    length = sum(map(len, pieces)) + len(start) * len(pieces)
    if max_tokens is not None and max_tokens < length:
        n = max(1, max_tokens * len(pieces) // length)
        pieces, n_written = ([part[i * len(part) // n] for i in range(n)] for part in (pieces, n_written))
        while len(pieces) > 1 and sum(map(len, pieces)) + len(start) * len(pieces) > max_tokens:
            pieces.pop(), n_written.pop()
    return Windows([torch.tensor(start + p) for p in pieces], sum(n_written))


@torch.inference_mode()
def text_quality(model: DualBranchModel, windows: Windows, budgets: Sequence[float] = (), second_looks: bool = True) -> list[dict]:
    """One record per route: slow, fast, and auto at each of `budgets`, where the model has them (a fast branch alone: fast, which then is its own slow).

    `nll` in nats per predicted token, `perplexity`, `bits_per_byte`, `of_slow` (perplexity over that of route slow), `slow_share` as measured,
    `flops` per token. With `second_looks`, auto also sends slow what generation would compute again: tokens that the gate let go fast and whose
    likeliest successor is less probable than the calibration asks for, judged in a pass of its own; they pay for both branches.
    """
    routes: list[tuple[str, float | None]] = [("fast" if model.config.fast_only else "slow", None)]
    if model.gate is not None:
        routes.append(("fast", None))
        routes += [("auto", b) for b in budgets if model.calibration is not None]
    sums = [dict.fromkeys(("nll", "slow", "flops", "looks"), 0.0) for _ in routes]
    costs = {share: _cumulative(model, share, max(map(len, windows.tokens))) for share in (0.0, 1.0)}
    for tokens in windows.tokens:
        tokens = tokens[None].to(model.device)
        for (route, budget), total in zip(routes, sums, strict=True):
            use_slow, looks, chosen = None, None, route
            if route == "auto":
                use_slow, looks = decide(model, tokens, budget, second_looks)
                chosen = use_slow
            elif route == "fast":
                use_slow = torch.zeros_like(tokens, dtype=torch.bool)
            else:
                use_slow = torch.ones_like(tokens, dtype=torch.bool)
            total["nll"] += float(token_nll(model, tokens, chosen).double().sum())
            total["slow"] += float(use_slow.sum())
            n = tokens.shape[1]
            flops = torch.where(use_slow[0].cpu(), costs[1.0][:n], costs[0.0][:n])
            if looks is not None:
                total["looks"] += float(looks.sum())
                flops = flops + torch.where(looks[0].cpu(), costs[0.0][:n], 0.0)  # it was computed fast before
            total["flops"] += float(flops.sum())
    n_computed = sum(map(len, windows.tokens))
    records = []
    for (route, budget), total in zip(routes, sums, strict=True):
        nll = total["nll"] / windows.n_tokens
        records.append({
            "route": route, "budget": budget, "nll": nll, "perplexity": math.exp(min(nll, 700.0)), "of_slow": math.exp(nll - sums[0]["nll"] / windows.n_tokens),
            "bits_per_byte": total["nll"] / math.log(2) / max(1, windows.n_bytes), "slow_share": total["slow"] / n_computed,
            "second_looks": total["looks"] / n_computed, "flops": total["flops"] / n_computed,
        })  # fmt: skip
    return records


def decide(model: DualBranchModel, tokens: Tensor, budget: float | None, second_looks: bool = True) -> tuple[Tensor, Tensor]:
    """Which of `tokens (1, T)` go slow at `budget`, and which of those only at a second look: two `(1, T)` bool."""
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    out = model(tokens, "auto", budget=budget, logits_at=nothing)
    least = model.calibration.confidence(budget) if second_looks else 0.0
    if least <= 0:
        return out.use_slow, nothing
    confidence = by_tokens(lambda x: model.logits(x).softmax(-1).amax(-1), model.config.vocab_size, out.hidden[0])[None]
    looks = ~out.use_slow & (confidence < least)
    return out.use_slow | looks, looks


def token_nll(model: DualBranchModel, tokens: Tensor, route: str | Tensor) -> Tensor:
    """`(T - 1,)` nats of each next token of `tokens (1, T)`."""
    hidden = model(tokens, route, logits_at=torch.zeros_like(tokens, dtype=torch.bool)).hidden[0, :-1]
    return by_tokens(lambda x, y: F.cross_entropy(model.logits(x), y, reduction="none"), model.config.vocab_size, hidden, tokens[0, 1:])


def _cumulative(model: DualBranchModel, share: float, n: int) -> Tensor:
    """FLOPs of a token by its position `(n,)`."""
    return torch.tensor([token_flops(model.config, share, i) for i in range(n)], dtype=torch.float64)


def evaluate_texts(
    model: DualBranchModel, tok: TokenizerBase, texts: dict[str, Sequence[str]], budgets: Sequence[float], window: int = 1024,
    max_tokens: int | None = None, note: Callable[[str, list[dict]], None] = lambda name, records: None,
) -> dict:  # fmt: skip
    """`{name: {"n_tokens", "n_bytes", "window", "routes": text_quality(...)}}` of each of `texts`; `note` hears of each."""
    found = {}
    for name, parts in texts.items():
        try:
            windows = cut_windows(tok, parts, window, max_tokens)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        records = text_quality(model, windows, budgets)
        note(name, records)
        found[name] = {"n_tokens": windows.n_tokens, "n_bytes": windows.n_bytes, "window": window, "routes": records}
    return found
