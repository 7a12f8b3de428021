"""The gating controller: one decision per token, read off the stem's output, used by every dual block.

Causal by construction (a token's gate sees only its own residual, which sees only its past). `Calibration` turns a budget (the
allowed share of slow tokens) into a threshold, measured on held-out text and stored in the checkpoint.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualbranch.config import DualBranchConfig


class GatingController(nn.Module):
    """A small probe: `(N, E) -> g (N,)` in (0, 1), the weight of the fast branch."""

    def __init__(self, c: DualBranchConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.w_in = nn.Linear(c.d_model, c.d_gate)
        self.w_out = nn.Linear(c.d_gate, 1)

    def need(self, x: Tensor) -> Tensor:
        """How much the token is expected to gain from the slow branch `(N,)` fp32, in standard deviations of log KL(slow || fast)."""
        return self.w_out(F.silu(self.w_in(self.norm(x)))).squeeze(-1).float()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(-self.need(x))


#: Of a budget, at most this share of all tokens is kept for second looks; the gate has the rest, and never less than half.
MOST_SECOND_LOOKS = 0.1


@dataclass(frozen=True)
class Calibration:
    """What a budget buys, and when to reason: thresholds measured on held-out text, stored in the checkpoint.

    At budget `budgets[i]` a token goes slow when `g < thresholds[i]`. A *second look* is what the gate could not foresee: a decoded token that
    went fast is computed once more, slow, when its likeliest successor has a probability below `confidences[i]` (empty = never). Together
    they sent a share `budgets[i]` of held-out tokens slow. `budgets` ascend strictly inside (0, 1).

    `think_threshold`: the probability of `<think>` from which on thinking auto reasons at once. Below it a reply begins without reasoning; if
    `direct_confidence` is given and one of its tokens is less probable than that, it is dropped and the model reasons after all.
    """

    budgets: tuple[float, ...]
    thresholds: tuple[float, ...]
    default_budget: float = 0.3
    think_threshold: float = 0.5
    confidences: tuple[float, ...] = ()
    direct_confidence: float | None = None

    def __post_init__(self) -> None:
        n = len(self.budgets)
        if not n or len(self.thresholds) != n or len(self.confidences) not in (0, n) or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError("calibration needs ascending budgets with one threshold (and confidence) each; run the calibration stage again")
        check_budget(self.default_budget)

    def threshold(self, budget: float | None = None) -> float:
        """The gate's threshold for `budget` in [0, 1] (None = the default), linear between measured points; 0 sends nothing slow and 1 everything."""
        budget = self.default_budget if budget is None else check_budget(budget)
        return float("-inf") if budget == 0.0 else float("inf") if budget == 1.0 else self._between(budget, self.thresholds)

    def confidence(self, budget: float | None = None) -> float:
        """The confidence below which a decoded fast token gets a second look; 0 (never) at budgets 0 and 1, and where looks do not pay."""
        budget = self.default_budget if budget is None else check_budget(budget)
        return 0.0 if not self.confidences or budget in (0.0, 1.0) else self._between(budget, self.confidences)

    def _between(self, budget: float, values: tuple[float, ...]) -> float:
        xs, ys = (0.0, *self.budgets, 1.0), (0.0, *values, 1.0)
        i = next(i for i in range(1, len(xs)) if budget <= xs[i])
        return ys[i - 1] + (ys[i] - ys[i - 1]) * (budget - xs[i - 1]) / (xs[i] - xs[i - 1])

    @staticmethod
    def measure(g: Tensor, confidence: Tensor | None = None, kl: Tensor | None = None, default_budget: float = 0.3, look_cost: float = 0.5) -> Calibration:
        """From gate values `g (n,)` of held-out tokens, the fast branch's `confidence (n,)` in its prediction (1 where nobody uses it), and what each
        token gains by going slow, `kl (n,)`.

        A budget is shared with second looks where they gain more than the gate alone would for the same FLOPs; a look wastes `look_cost` of a slow
        token on the fast one before it. (Unsure means wrong in a calculation, but not in prose, where the slow branch is as unsure.) Without
        `confidence` there are none; without `kl` they are taken to pay.
        """
        budgets = tuple(round(0.05 * i, 2) for i in range(1, 20))
        g = g.double().flatten().cpu()
        thresholds = [float(torch.quantile(g, b)) for b in budgets]
        confidences = [0.0] * len(budgets)
        if confidence is not None:
            confidence = confidence.double().flatten().cpu()
            for i, budget in enumerate(budgets):
                looks = min(budget / 2, MOST_SECOND_LOOKS)
                threshold = float(torch.quantile(g, budget - looks))
                of_fast = torch.where(g < threshold, 1.0, confidence)
                least = float(torch.quantile(of_fast, looks))
                if kl is not None:
                    alone = g < torch.quantile(g, min(1.0, budget + looks * look_cost))
                    if kl[(g < threshold) | (of_fast < least)].sum() <= kl[alone].sum():
                        continue
                thresholds[i], confidences[i] = threshold, least
        return Calibration(budgets, tuple(thresholds), default_budget, confidences=tuple(confidences) if any(confidences) else ())


def check_budget(budget: float) -> float:
    """`budget`; raises ValueError unless it lies in [0, 1]."""
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not 0.0 <= budget <= 1.0:
        raise ValueError(f"budget is {budget!r}; it is the share of tokens that may go slow and must lie in [0, 1]")
    return budget
