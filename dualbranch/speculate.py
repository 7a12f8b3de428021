"""Lossless self-speculation: the fast branch drafts tokens on the shared cache, the slow branch verifies them in one pass.

For one sequence in route slow. The reply is that of `generate.decode`, token for token when greedy (in fp32, where a pass of several tokens
and passes of one agree to rounding) and in distribution when sampled, and so is the cache. Called by `generate.stream`.
The rule is speculative sampling: Leviathan et al. 2023 (arXiv 2211.17192, algorithm 1); Chen et al. 2023 (arXiv 2302.01318, algorithm 2).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dualbranch.cache import KVCache
from dualbranch.generate import Pending, prefill, spent_flops
from dualbranch.model import DualBranchModel
from dualbranch.modes import Mode, Phase, ThinkingController
from dualbranch.packed import FEW
from dualbranch.sampling import SamplingParams, draw, token_probs

logger = logging.getLogger(__name__)

#: Most tokens drafted before a verification: with the newest one as many as packed weights multiply in the precision of single tokens.
MAX_DRAFT = FEW - 1
#: Drafts over which the acceptance rate is averaged, and the rate assumed before any was seen.
MEMORY, FIRST_ACCEPTANCE = 32, 0.8


def check_speculation(model: DualBranchModel, mode: Mode) -> None:
    """Raises ValueError where there is nothing to draft with or to verify with."""
    if mode.route != "slow":
        raise ValueError(f"speculation speeds up route slow, and the route is {mode.route}; set route slow (mode think), or leave speculation out")
    if model.config.is_dense or model.config.fast_only:
        raise ValueError("speculation needs both branches, a fast one that drafts and a slow one that verifies; this model has one, so leave speculation out")


class DraftLength:
    """How many tokens to draft next: as many as promise the most tokens per cost.

    At acceptance rate a, k drafts give 1 + a + ... + a^k tokens on average and cost k fast passes and one slow pass, of however many tokens: a pass
    of few tokens costs what its weights cost to read (Leviathan et al. 2023, theorem 3.8). `cost_ratio`: weights that a fast pass reads, in
    slow passes. The rate is a running mean over the drafts tested; those after a rejected one are not. (So it is on GPUs. Compiled for a CPU, no draft pays.)
    """

    def __init__(self, cost_ratio: float) -> None:
        self.cost_ratio, self.acceptance = cost_ratio, FIRST_ACCEPTANCE

    @property
    def best(self) -> int:
        """In [1, MAX_DRAFT]; the shortest of equals."""
        a = self.acceptance
        return max(range(1, MAX_DRAFT + 1), key=lambda k: sum(a**i for i in range(k + 1)) / (k * self.cost_ratio + 1))

    def observe(self, accepted: bool) -> None:
        """Counts a tested draft. Mutates the rate."""
        self.acceptance += (accepted - self.acceptance) / MEMORY


class Draft(NamedTuple):
    """A token proposed by the fast branch, and the distribution `q (V,)` that it was drawn from."""

    token: int
    q: Tensor


def speculate(model: DualBranchModel, sequence: Pending, params: SamplingParams, cache: KVCache | None = None) -> Iterator[list[Pending]]:
    """Generates for `sequence` what `generate.decode` would in route slow, and yields `[sequence]` for every token, several per pass of the slow branch.

    Mutates the sequence, and `cache` (one row, holding the prompt's first `n_reused` tokens) if given. While the tokens of one verification are
    handed out the cache is ahead of them; in the end, or when the iterator is closed, it holds slow rows of everything but the newest token.
    Raises ValueError at once for a route other than slow, and for a model that has not both branches.
    """
    check_speculation(model, sequence.controller.mode)
    if model.device.type == "cpu" and model.runner is not None:
        _warn_once()
    if cache is None:
        cache = model.new_cache(1, len(sequence.prompt) + sequence.controller.remaining)
    return _rounds(model, sequence, params, cache)


@cache
def _warn_once() -> None:
    logger.warning("speculation takes longer than plain decoding where a CPU decodes by compiled code: tokens are verified one by one there; leave it out")


def _rounds(model: DualBranchModel, s: Pending, params: SamplingParams, cache: KVCache) -> Iterator[list[Pending]]:
    """Draft, verify, accept, until the reply has ended."""
    banned = s.controller.rules.banned.to(model.device)
    length = DraftLength(model.cost("fast").params_read / model.cost("slow").params_read)
    try:
        logits = prefill(model, [s.prompt[s.n_reused :]], s.controller.mode, cache).logits[0]  # (1, V): nothing is drafted yet
        s.use_slow += [True] * (len(s.prompt) - s.n_reused)
        drafts: list[Draft] = []
        while True:
            for row, proposed in zip_longest(logits, drafts):  # one row more than drafts
                p = next_probs(row, s.controller, banned, params)
                token, accepted = (_pick(p, s.generator), False) if proposed is None else accept(*proposed, p, s.generator)
                if proposed is not None:
                    length.observe(accepted)
                    s.n_accepted += accepted
                stands = s.take(token, float(row.softmax(-1)[token]) if s.controller.on_trial else 1.0, model.config)
                yield [s]
                if s.done:
                    return
                if not (accepted and stands):
                    break
                s.use_slow.append(True)  # the draft's own row, computed with the others, is needed
                s.extra_flops -= spent_flops(model.config, [True], len(s.use_slow) - 1)
            n = len(s.use_slow)
            cache.truncate(n)
            drafts = draft(model, s, min(length.best, s.controller.remaining - 1), params, banned, cache)
            s.n_drafted += len(drafts)
            cache.truncate(n)
            logits = verify(model, s, drafts, cache)
            s.use_slow.append(True)
            s.extra_flops += spent_flops(model.config, [False] * len(drafts), n) + spent_flops(model.config, [True] * len(drafts), n + 1)
    finally:
        cache.truncate(len(s.prompt) + len(s.ids) - 1)


@torch.inference_mode()
def run(model: DualBranchModel, tokens: Sequence[int], route: str, cache: KVCache) -> Tensor:
    """Feeds `tokens` to the one row of `cache`, which it writes and advances; logits `(T, V)` after each."""
    return model(torch.tensor([tokens], device=model.device), route, cache=cache).logits[0]


def draft(model: DualBranchModel, s: Pending, n: int, params: SamplingParams, banned: Tensor, cache: KVCache) -> list[Draft]:
    """The `n` tokens that the fast branch puts after `s.ids`, fewer if it ends the reply. Mutates the sequence's generator, and the cache: fast rows."""
    controller = copy.deepcopy(s.controller, {id(s.controller.rules): s.controller.rules})  # the rules are shared
    drafts, token = [], s.ids[-1]
    while len(drafts) < n and controller.phase is not Phase.DONE:
        q = next_probs(run(model, [token], "fast", cache)[0], controller, banned, params)
        token = _pick(q, s.generator)
        controller.advance(token)
        drafts.append(Draft(token, q))
    return drafts


def verify(model: DualBranchModel, s: Pending, drafts: Sequence[Draft], cache: KVCache) -> Tensor:
    """The slow branch's logits `(n + 1, V)` after the newest token and after each of the `n` drafts. Writes their slow rows to the cache."""
    return run(model, [s.ids[-1], *(d.token for d in drafts)], "slow", cache)


def accept(token: int, q: Tensor, p: Tensor, generator: torch.Generator) -> tuple[int, bool]:
    """A token distributed exactly as `p (V,)`, given `token` drawn from `q (V,)`, and whether it is that one.

    It is with probability min(1, p / q); otherwise one is drawn from max(p - q, 0), normalised. Where all of p is on one token (greedy, forced
    tokens) that one comes out. Consumes numbers of the generator.
    """
    if float(torch.rand(1, dtype=torch.float64, generator=generator)) * float(q[token]) < float(p[token]):
        return token, True
    rest = (p - q).clamp(min=0)
    return _pick(rest if rest.any() else p, generator), False  # none is left only where p and q differ by rounding


@torch.inference_mode()
def next_probs(logits: Tensor, controller: ThinkingController, banned: Tensor, params: SamplingParams) -> Tensor:
    """What `generate.choose_tokens` draws the next token from, `(V,)` fp64: `logits (V,)` under the controller's rule, or all on a token it forces."""
    r = controller.rules
    forced = controller.forced(float(torch.sigmoid(logits[r.think] - logits[r.skip])) if controller.undecided else None)
    if forced is not None:
        return one_hot(torch.tensor(forced, device=logits.device), len(logits)).double()
    return token_probs(logits.masked_fill(banned[controller.rule], float("-inf"))[None], params)[0]


def _pick(weights: Tensor, generator: torch.Generator) -> int:
    return int(draw(weights[None], torch.rand(1, dtype=torch.float64, generator=generator)))
