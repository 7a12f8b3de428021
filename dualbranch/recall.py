"""Recall at distance: what was said long ago in a text, asked for at its end. `dualbranch eval MODEL --on recall`, and a part of a conversion's report.

A sentence gives somebody's password, real text follows for so many tokens, then the sentence begins again and the model should complete it. Two more
sentences of the kind stand beside the first, so that a password alone is not the answer. This is what a fast branch loses first: it reads sinks, a window
and the blocks it chooses, and the sentence is in none but the last.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dualbranch.model import DualBranchModel
from dualbranch.tokenizer import TokenizerBase

DISTANCES = (256, 1024, 2048, 4096)
OWNERS = ("Alice", "Martin", "Helen", "Oscar", "Julia", "Peter", "Laura", "Simon", "Clara", "David", "Emma", "Frank")
PASSWORDS = ("river", "garden", "silver", "window", "forest", "orange", "bridge", "winter", "castle", "copper", "island", "mirror")
#: Tokens of text before the first sentence.
_OPENING = 32


@dataclass(frozen=True)
class Question:
    """`tokens (T,)`, the last `n_answer` of which are the password; it was first given `distance` tokens before the question begins."""

    tokens: Tensor
    n_answer: int
    distance: int


def distances_within(max_seq_len: int) -> tuple[int, ...]:
    """Those of `DISTANCES` that fit a context, with room for the sentences."""
    return tuple(d for d in DISTANCES if d + 4 * _OPENING <= max_seq_len)


def ask(tok: TokenizerBase, texts: Sequence[str], distance: int, n: int, seed: int = 0) -> list[Question]:
    """`n` questions over pieces of `texts`, the same for the same seed; texts shorter than `distance` are repeated. Raises ValueError without text."""
    rng, ids = random.Random(f"recall:{seed}:{distance}"), [i for text in texts for i in tok.encode(text)]
    if not ids:
        raise ValueError("recall needs some text to stand between what is said and when it is asked for; there is none")
    ids *= -(-(distance + _OPENING) // len(ids))
    questions = []
    for _ in range(n):
        owners, passwords = rng.sample(OWNERS, 3), rng.sample(PASSWORDS, 3)
        sentences = [tok.encode(f"\n\n{owner}'s password is {password}.") for owner, password in zip(owners, passwords, strict=True)]
        asked = rng.randrange(3)
        question = tok.encode(f"\n\n{owners[asked]}'s password is")
        whole = tok.encode(f"\n\n{owners[asked]}'s password is {passwords[asked]}")
        before, given = ([i for sentence in part for i in sentence] for part in (sentences[:asked], sentences[asked:]))
        at = rng.randrange(len(ids) - distance - _OPENING + 1)
        filler = ids[at + _OPENING : at + _OPENING + max(0, distance - len(given))]
        start = [*tok.start_ids, *ids[at : at + _OPENING], *before]
        questions.append(Question(torch.tensor([*start, *given, *filler, *whole]), len(whole) - len(question), distance))
    return questions


@torch.inference_mode()
def recall(
    model: DualBranchModel, tok: TokenizerBase, texts: Sequence[str], budgets: Sequence[float], distances: Sequence[int], n: int = 16, seed: int = 0
) -> list[dict]:
    """One record per distance and route: slow, fast, and auto at each of `budgets` (by the gate alone, without second looks), where the model has them (a fast
    branch alone: fast).

    `accuracy`: share of the `n` passwords of which each token is the likeliest after those before it; `nll`: nats per password; `slow_share` of all tokens.
    Raises ValueError: a distance beyond the model's context, no text, no questions.
    """
    if n < 1 or any(d < 1 for d in distances):
        raise ValueError(f"recall asks {n} questions at distances of {', '.join(map(str, distances))} tokens; both must be at least 1")
    routes: list[tuple[str, float | None]] = [("fast" if model.config.fast_only else "slow", None)]
    if model.gate is not None:
        routes += [("fast", None), *(("auto", b) for b in budgets if model.calibration is not None)]
    found = []
    for distance in distances:
        questions = ask(tok, texts, distance, n, seed)
        if (longest := max(len(q.tokens) for q in questions)) > model.config.max_seq_len:
            raise ValueError(f"recall at a distance of {distance} tokens takes {longest}; the model's max_seq_len is {model.config.max_seq_len}")
        for route, budget in routes:
            right, nats, slow = 0, 0.0, 0.0
            for q in questions:
                tokens = q.tokens[None].to(model.device)
                wanted = torch.zeros_like(tokens, dtype=torch.bool)
                wanted[0, -1 - q.n_answer : -1] = True
                out = model(tokens, route, budget=budget, logits_at=wanted)
                answer = tokens[0, -q.n_answer :]
                right += bool((out.logits.argmax(-1) == answer).all())
                nats += float(F.cross_entropy(out.logits, answer, reduction="sum"))
                slow += 1.0 if out.use_slow is None else float(out.use_slow.float().mean())
            found.append({"distance": distance, "route": route, "budget": budget, "n": n, "accuracy": right / n, "nll": nats / n, "slow_share": slow / n})
    return found


def recall_rows(records: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """`records` as a table: one column per distance, one row per route."""
    distances = list(dict.fromkeys(r["distance"] for r in records))
    routes = dict.fromkeys((r["route"], r["budget"]) for r in records)
    cells = {(r["route"], r["budget"], r["distance"]): f"{r['accuracy']:.0%} ({r['nll']:.2f})" for r in records}
    rows = [[route if budget is None else f"{route} {budget:g}", *(cells[route, budget, d] for d in distances)] for route, budget in routes]
    return ["route", *(f"{d} tokens" for d in distances)], rows
