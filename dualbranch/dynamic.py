"""`int8-dynamic`: feed-forwards that multiply 8-bit activations by 8-bit weights where many tokens go through together.

A CPU with VNNI multiplies 8-bit integers twice as fast as bf16, and feed-forwards are three quarters of a layer's products. Each token's activations are
scaled by their own largest ("dynamic"). So that a few large channels don't take all the bits, part of their size is first moved into the weights, by what
a calibration text shows: `smooth`, after SmoothQuant (Xiao et al. 2023, arXiv 2211.10438). Attention's matrices keep bf16 activations: a quarter of
the products, for as much perplexity again (docs/experiments.md). Few tokens, and CPUs without VNNI, are computed as at int8. `precision.py` puts these
modules into a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualbranch.layers import FeedForward, activate
from dualbranch.packed import FEW, PackedFeedForward, PackedMatrix

if TYPE_CHECKING:
    from dualbranch.block import Branch
    from dualbranch.model import DualBranchModel

#: Shows which channels are large; of many kinds, since a channel that it doesn't show keeps its size.
CALIBRATION_TEXT = """The river rises in the hills north of the town, and for most of the year it is shallow enough to cross on foot. In 1897 a stone \
bridge of three arches was built there; it cost 4,250 pounds, of which the county paid half. "Why half?" asked the mayor. Nobody could say.

How do I reverse a list in Python? Use slicing: `xs[::-1]`, or reverse it in place:

def reverse(xs):
    xs.reverse()  # returns None
    return xs

1. Heat 250 g of water to 80 °C. 2. Add the tea, wait three minutes, and pour. If 3x + 5 = 20, then x = (20 - 5) / 3 = 5.

春天来了，河边的柳树发出了新芽。小明问：“鸡和兔一共有八只，腿有二十二条，各有几只？”老师说，先假设全是鸡，应有十六条腿，多出的六条说明有三只兔子、五只鸡。"""


def to_8bit(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x (M, K)` to int8 and a scale per row, `(M, 1)` fp32: `x ~ q * scale`."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round().to(torch.int8), scale


class To8Bit(nn.Module):
    """`to_8bit` as a step to compile."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return to_8bit(x)


class Gated(nn.Module):
    """`act(a) * u`, from the integers that two products gave, back to 8 bits.

    `a, u (M, N)` int32 times `scale (M, 1)`, the tokens', times `scales_a, scales_u (N,)`, the weight rows'.
    """

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, a: Tensor, u: Tensor, scale: Tensor, scales_a: Tensor, scales_u: Tensor) -> tuple[Tensor, Tensor]:
        return to_8bit(activate(a * scale * scales_a, self.activation) * (u * scale * scales_u))


class From8Bit(nn.Module):
    """The product that integers `y (M, N)` int32 stand for, fp32; `scale (M, 1)` and `scales (N,)` as in `Gated`."""

    def forward(self, y: Tensor, scale: Tensor, scales: Tensor) -> Tensor:
        return y * scale * scales


class DynamicFeedForward(PackedFeedForward):
    """A feed-forward of 8-bit packed matrices, taken from `ff`. `steps`: what it does between products, or the same compiled."""

    def __init__(self, ff: FeedForward) -> None:
        super().__init__(ff)
        self._plain()

    def _plain(self) -> None:
        self.steps = {name: step.forward for name, step in plain_steps(self.activation).items()}

    def _apply(self, fn, recurse: bool = True) -> DynamicFeedForward:
        super()._apply(fn, recurse)
        self._plain()  # compiled code is for one device
        return self

    def forward(self, x: Tensor) -> Tensor:
        if len(x) <= FEW or x.device.type != "cpu" or not torch.cpu._is_vnni_supported():
            return super().forward(x)
        act, up, down = (linear.matrix for linear in (self.w_act, self.w_up, self.w_down))
        q, scale = self.steps["to-8bit"](x)
        q, scale = self.steps["gated"](_product(q, act), _product(q, up), scale, act.scales, up.scales)
        return self.steps["from-8bit"](_product(q, down), scale, down.scales)[:, : down.n_rows]


def plain_steps(activation: str) -> dict[str, nn.Module]:
    """What a dynamic feed-forward does between its products, uncompiled."""
    return {"to-8bit": To8Bit(), "gated": Gated(activation), "from-8bit": From8Bit()}


def _product(q: Tensor, matrix: PackedMatrix) -> Tensor:
    """`q (M, K or more)` int8 times the transposed integers of the matrix, with what pads them: `(M, N')` int32. What q holds beyond K is zero."""
    weight = matrix.integers()
    if q.shape[1] < len(weight):
        q = F.pad(q, (0, len(weight) - q.shape[1]))
    return torch._int_mm(q, weight)


@torch.no_grad()
def smooth(model: DualBranchModel, parts: Sequence[str], tokens: Tensor) -> None:
    """Moves the size of large channels from the feed-forwards' activations into their weights, in the branches `parts`; it computes the same. Mutates it.

    `tokens (B, T)` show the sizes. The channel of largest activation a and largest weight w is multiplied by sqrt(w / a), its weights by the inverse.
    """
    c = model.config
    for part in parts:
        branches = [b for b in (getattr(block, part) for block in model.blocks) if b is not None]
        with _largest(branches) as largest:
            model(tokens, "fast" if c.fast_only else "slow" if c.is_dense else part)
        for branch, (at_input, hidden) in zip(branches, largest, strict=True):
            ff = branch.ff
            s = _grow(at_input, ff.w_act.weight, ff.w_up.weight)
            branch.ff_norm.weight.div_(s)
            s = _grow(hidden, ff.w_down.weight)
            ff.w_up.weight.div_(s[:, None])


def _grow(largest: Tensor, *weights: Tensor) -> Tensor:
    """Multiplies the columns of `weights` by what evens them out with activations of at most `largest (K,)`; returns those factors. Mutates the weights."""
    of_weights = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    s = (largest.clamp(min=1e-6) / of_weights.clamp(min=1e-6)).sqrt()
    for w in weights:
        w.mul_(s)
    return s


@contextmanager
def _largest(branches: Sequence[Branch]) -> Iterator[list[list[Tensor]]]:
    """The largest absolute value of each channel that passes inside: of each branch at its feed-forward's input, `(E,)`, and before `w_down`, `(d_ff,)`."""
    found = [[torch.zeros(w.in_features, device=w.weight.device) for w in (b.ff.w_up, b.ff.w_down)] for b in branches]
    hooks = []
    for of_branch, branch in zip(found, branches, strict=True):
        for seen, linear in zip(of_branch, (branch.ff.w_up, branch.ff.w_down), strict=True):
            hooks.append(linear.register_forward_pre_hook(partial(_note, seen)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _note(largest: Tensor, linear: nn.Module, args: tuple[Tensor]) -> None:
    torch.maximum(largest, args[0].float().abs().amax(0), out=largest)
