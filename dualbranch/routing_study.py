"""Does the gate earn its place? Policies that choose which tokens go slow, compared at an equal measured share of slow tokens.

On packed held-out rows, teacher-forced, hard routing. What counts is how far the routed model is from its own all-slow run on trace and
answer tokens: KL(slow || routed). Two yardsticks: random choice, and an oracle that knows each token's KL(slow || fast) of the
all-fast run (greedy: it ignores what a token's route does to later ones, so it can be beaten). "reply oracle" spends nothing on prompt
tokens, which are not scored; the better of the two at a share is the one a gap is measured to. Called by `evaluate.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dualbranch.accounting import token_flops
from dualbranch.chat import render_prompt
from dualbranch.data.packing import Rows
from dualbranch.distill.losses import by_tokens, token_kl
from dualbranch.model import DualBranchModel
from dualbranch.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dualbranch.evaluate import Answer

#: Rows per forward pass; bounds memory, not results. (Logits exist for fewer tokens at a time.)
CHUNK = 16


@dataclass(frozen=True)
class TokenTable:
    """All real tokens of some rows: `where (R, T)` bool, and per real token, in row-major order, `kl (n,)` of the all-fast run against
    the all-slow one, gate value `g (n,)`, position in its document `position (n,)`, `document (n,)` ids, and `scored (n,)` bool."""

    where: Tensor
    kl: Tensor
    g: Tensor
    position: Tensor
    document: Tensor
    scored: Tensor


def chunks(rows: Rows) -> Iterator[slice]:
    for i in range(0, len(rows), CHUNK):
        yield slice(i, i + CHUNK)


def token_table(model: DualBranchModel, rows: Rows) -> TokenTable:
    """The model's own two runs over `rows`: what every policy may look at."""
    where = rows.real
    kl, g = [], []
    for part in chunks(rows):
        tokens, doc_start, real = rows.tokens[part].to(model.device), rows.doc_start[part].to(model.device), where[part]
        none = torch.zeros_like(tokens, dtype=torch.bool)
        slow = model(tokens, "slow", doc_start=doc_start, logits_at=none).hidden[real]
        fast = model(tokens, "auto", threshold=float("-inf"), doc_start=doc_start, logits_at=none)  # all fast, and the gate runs
        kl.append(by_tokens(lambda a, b: token_kl(model.logits(a), model.logits(b)), model.config.vocab_size, slow, fast.hidden[real]).cpu())
        g.append(fast.g[real].cpu())
    column = torch.arange(rows.tokens.shape[1]).expand_as(rows.tokens)
    row = torch.arange(len(rows))[:, None].expand_as(rows.tokens)
    document = (row * rows.tokens.shape[1] + rows.doc_start)[where]
    return TokenTable(where, torch.cat(kl), torch.cat(g), (column - rows.doc_start)[where], document, (rows.loss_weights > 0)[where])


def highest(score: Tensor, n_slow: int, generator: torch.Generator) -> Tensor:
    """`(n,)` bool, True for the `n_slow` highest of `score (n,)`; ties fall at random."""
    order = torch.randperm(len(score), generator=generator)
    order = order[score[order].argsort(descending=True, stable=True)]
    return torch.zeros(len(score), dtype=torch.bool).index_fill(0, order[:n_slow], True)


def position_score(table: TokenTable, reference: TokenTable) -> Tensor:
    """`(n,)`: the mean KL that scored tokens at the same position in a document had in `reference` (unscored count as 0); its overall
    mean where it has none."""
    kl = torch.where(reference.scored, reference.kl, 0.0).double()
    n = int(max(table.position.max(), reference.position.max())) + 1
    count = torch.bincount(reference.position, minlength=n)
    mean = torch.bincount(reference.position, weights=kl, minlength=n) / count.clamp(min=1)
    return torch.where(count > 0, mean, kl.mean())[table.position]


def policy_routes(table: TokenTable, reference: TokenTable, share: float, seed: int, n_random: int = 3) -> dict[str, Tensor]:
    """Decisions `(n,)` bool of every policy over the real tokens, exactly `round(share * n)` of them slow.

    "random 0", "random 1", ...: single draws. "random in replies" knows which tokens are scored, and nothing else.
    "constant": whole documents in random order are slow until the share is spent.
    """
    n = len(table.kl)
    n_slow = round(share * n)
    generator = torch.Generator().manual_seed(seed)
    routes = {f"random {i}": highest(torch.rand(n, generator=generator), n_slow, generator) for i in range(n_random)}
    routes["random in replies"] = highest(torch.rand(n, generator=generator) + table.scored, n_slow, generator)
    _, document = table.document.unique(return_inverse=True)
    rank = torch.randperm(int(document.max()) + 1, generator=generator)[document] * n + torch.arange(n)  # documents shuffled, each in order
    routes["constant"] = highest(-rank, n_slow, generator)
    routes["position"] = highest(position_score(table, reference), n_slow, generator)
    routes["gate"] = highest(-table.g, n_slow, generator)
    routes["oracle"] = highest(table.kl, n_slow, generator)
    routes["reply oracle"] = highest(torch.where(table.scored, table.kl, table.kl - table.kl.max()), n_slow, generator)  # then prompt tokens
    return routes


def to_grid(flat: Tensor, where: Tensor) -> Tensor:
    """Decisions of the real tokens as a route `(R, T)`; padding goes fast and is never counted."""
    route = torch.zeros_like(where)
    route[where] = flat
    return route


@dataclass(frozen=True)
class Case:
    """A run to score: a route `(R, T)` or a name, and optionally a branch put out of action (`ablated`)."""

    route: Tensor | str
    branch: str | None = None
    replaced_by: str | None = None


def score(model: DualBranchModel, rows: Rows, cases: Mapping[str, Case]) -> dict[str, dict[str, float]]:
    """`{name: {"nll", "kl"}}` in nats per scored token (those with a loss weight): against the text, and KL(slow || case)."""

    def compare(slow: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = model.logits(hidden)
        return torch.stack([F.cross_entropy(logits, targets, reduction="none"), token_kl(model.logits(slow), logits)], dim=-1)

    sums = {name: torch.zeros(2, dtype=torch.float64) for name in cases}
    n_scored = max(1, int((rows.loss_weights > 0).sum()))
    for part in chunks(rows):
        tokens, doc_start = rows.tokens[part].to(model.device), rows.doc_start[part].to(model.device)
        scored = (rows.loss_weights[part] > 0).to(model.device)
        targets = rows.targets[part].to(model.device)[scored]
        none = torch.zeros_like(scored)
        slow = model(tokens, "slow", doc_start=doc_start, logits_at=none).hidden[scored]
        for name, case in cases.items():
            route = case.route if isinstance(case.route, str) else case.route[part].to(model.device)
            with nullcontext() if case.branch is None else ablated(model, case.branch, case.replaced_by):
                hidden = model(tokens, route, doc_start=doc_start, logits_at=none).hidden[scored]
            sums[name] += by_tokens(compare, model.config.vocab_size, slow, hidden, targets).sum(0).double().cpu()
    return {name: {"nll": float(s[0]) / n_scored, "kl": float(s[1]) / n_scored} for name, s in sums.items()}


def mean_flops(model: DualBranchModel, table: TokenTable, use_slow: Tensor) -> float:
    """Mean FLOPs per real token, each by its route and its position in its document."""
    n = int(table.position.max()) + 1
    flops = torch.tensor([[token_flops(model.config, share, i) for i in range(n)] for share in (0.0, 1.0)], dtype=torch.float64)
    return float(flops[use_slow.long(), table.position].mean())


def gap_closed(kl: Mapping[str, float], policy: str) -> float | None:
    """Share of the way from random to the better oracle that `policy` goes; None where neither is better than random."""
    gap = kl["random"] - min(kl["oracle"], kl["reply oracle"])
    return (kl["random"] - kl[policy]) / gap if gap > 0 else None


@torch.inference_mode()
def routing_study(
    model: DualBranchModel, rows: Rows, reference: Rows, shares: Sequence[float], headline: float, seed: int = 0, n_random: int = 3
) -> dict:
    """Every policy at every slow share of `shares`, on `rows`; `reference` are other rows, for the position policy to learn from.

    `gap_closed` is the gate's at the share nearest to `headline`. "random" is the mean over its draws; `kl_spread` their range.
    """
    table, learned = token_table(model, rows), token_table(model, reference)
    routes = {share: policy_routes(table, learned, share, seed, n_random) for share in shares}
    cases = {f"{share} {name}": Case(to_grid(flat, table.where)) for share, by_name in routes.items() for name, flat in by_name.items()}
    scores = score(model, rows, {"slow": Case("slow"), "fast": Case("fast"), **cases})
    at_share = []
    for share, by_name in routes.items():
        policies = {}
        for name, flat in by_name.items():
            measured = scores[f"{share} {name}"]
            policies[name] = {**measured, "slow_share": float(flat.double().mean()), "flops_per_token": mean_flops(model, table, flat)}
        draws = [policies.pop(f"random {i}") for i in range(n_random)]
        policies["random"] = {key: sum(d[key] for d in draws) / n_random for key in draws[0]}
        policies["random"]["kl_spread"] = max(d["kl"] for d in draws) - min(d["kl"] for d in draws)
        kl = {name: p["kl"] for name, p in policies.items()}
        closed = {name: gap_closed(kl, name) for name in ("gate", "random in replies", "constant", "position")}
        at_share.append({"share": share, "policies": policies, "gap_closed": closed})
    nearest = min(at_share, key=lambda s: abs(s["share"] - headline))
    return {
        "n_tokens": len(table.kl),
        "n_scored": int((rows.loss_weights > 0).sum()),
        "slow": scores["slow"],
        "fast": scores["fast"],
        "shares": at_share,
        "headline": nearest["share"],
        "gap_closed": nearest["gap_closed"]["gate"],
    }


@contextmanager
def ablated(model: DualBranchModel, branch: str, replaced_by: str) -> Iterator[None]:
    """While open, what `branch` ("slow" | "fast") of every dual block adds to the stream is "zero", or its "mean" over the tokens of the pass."""
    if branch not in ("slow", "fast") or replaced_by not in ("zero", "mean"):
        raise ValueError(f"cannot replace branch {branch!r} by {replaced_by!r}; branches are slow and fast, replacements zero and mean")

    def replaced(rest: Callable[[Tensor, Tensor], Tensor], x: Tensor, heads: Tensor) -> Tensor:
        return x if replaced_by == "zero" or not len(x) else x + (rest(x, heads) - x).mean(0)

    branches = [getattr(model.blocks[i], branch) for i in model.config.dual_layers]
    for b in branches:
        b.rest = partial(replaced, b.rest)  # whatever a branch adds, it adds there
    runner, model.runner = model.runner, None  # it has steps of its own
    try:
        yield
    finally:
        model.runner = runner
        for b in branches:
            del b.rest


@torch.inference_mode()
def ablations(model: DualBranchModel, rows: Rows) -> dict:
    """Each branch replaced by zero and by its mean, under the gate at its default budget; `delta_nll > 0` means that it was needed."""
    where = rows.real
    none = torch.zeros_like(where).to(model.device)
    route = torch.cat(
        [model(rows.tokens[p].to(model.device), "auto", doc_start=rows.doc_start[p].to(model.device), logits_at=none[p]).use_slow.cpu() for p in chunks(rows)]
    )
    cases = {f"{b} {r}": Case(route & where, b, r) for b in ("slow", "fast") for r in ("zero", "mean")}
    scores = score(model, rows, {"intact": Case(route & where), **cases})
    intact = scores["intact"]
    return {
        "budget": model.calibration.default_budget,
        "slow_share": float(route[where].double().mean()),
        **intact,
        "cases": [
            {"branch": c.branch, "replaced_by": c.replaced_by, **scores[name], **{f"delta_{k}": scores[name][k] - intact[k] for k in intact}}
            for name, c in cases.items()
        ],
    }


@torch.inference_mode()
def gate_examples(model: DualBranchModel, tok: Tokenizer, answers: Sequence[Answer]) -> list[dict]:
    """Whole conversations, prompt and reply, token by token: its text `piece`, `g` and `use_slow` at the default budget.

    A token that only ends a character holds the character; those before it are empty. Control tokens are spelled out.
    """
    examples = []
    for a in answers:
        ids = render_prompt(tok, [{"role": "user", "content": a.problem.prompt}]) + a.generation.ids
        out = model(torch.tensor([ids], device=model.device), "auto")
        text = tok.stream(skip_control=False)
        tokens = [
            {"piece": text.push(i), "g": round(g, 4), "use_slow": slow} for i, g, slow in zip(ids, out.g[0].tolist(), out.use_slow[0].tolist(), strict=True)
        ]
        p = a.problem
        examples.append({"task": p.task, "level": p.level, "lang": p.lang, "n_prompt": a.generation.n_prompt, "correct": a.correct, "tokens": tokens})
    return examples
