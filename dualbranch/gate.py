"""The gating controller: one decision per token, read off the stem's output, used by every dual block.

Causal by construction (a token's gate sees only its own residual, which sees only its past). `Calibration` turns a budget (the
allowed share of slow tokens) into a threshold, measured on held-out text and stored in the checkpoint.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Calibration:
    """`thresholds[i]`: a token goes slow when `g < thresholds[i]`, which sent a share `budgets[i]` of held-out tokens slow.

    `budgets` ascend strictly inside (0, 1). `think_threshold`: the probability of `<think>` from which on `auto` reasons.
    """

    budgets: tuple[float, ...]
    thresholds: tuple[float, ...]
    default_budget: float = 0.3
    think_threshold: float = 0.5

    def __post_init__(self) -> None:
        if not self.budgets or len(self.budgets) != len(self.thresholds) or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError("calibration needs ascending budgets with one threshold each; run the calibration stage again")
        check_budget(self.default_budget)

    def threshold(self, budget: float) -> float:
        """The threshold for `budget` in [0, 1], linear between measured points; 0 sends nothing slow and 1 everything."""
        check_budget(budget)
        if budget in (0.0, 1.0):
            return float("-inf") if budget == 0.0 else float("inf")
        xs, ys = (0.0, *self.budgets, 1.0), (0.0, *self.thresholds, 1.0)
        i = next(i for i in range(1, len(xs)) if budget <= xs[i])
        return ys[i - 1] + (ys[i] - ys[i - 1]) * (budget - xs[i - 1]) / (xs[i] - xs[i - 1])

    @staticmethod
    def measure(g: Tensor, default_budget: float = 0.3) -> Calibration:
        """From gate values `g (n,)` of held-out tokens."""
        budgets = tuple(round(0.05 * i, 2) for i in range(1, 20))
        quantiles = torch.quantile(g.double().flatten().cpu(), torch.tensor(budgets, dtype=torch.float64))
        return Calibration(budgets, tuple(quantiles.tolist()), default_budget)


def check_budget(budget: float) -> None:
    """Raises ValueError unless `budget` lies in [0, 1]."""
    if not 0.0 <= budget <= 1.0:
        raise ValueError(f"budget is {budget}; it is the share of tokens that may go slow and must lie in [0, 1]")
