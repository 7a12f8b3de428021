"""Rounding to 4 bits that answers for its own errors: each column's error is made up for by the columns still to be rounded, as far as the inputs that a
matrix sees allow (GPTQ, Frantar et al. 2022). Used where a model is rounded once and shipped (`delta.py`); `precision.py` rounds to nearest, without data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualbranch.data.packing import Rows
from dualbranch.model import DualBranchModel
from dualbranch.packed import GROUP, quantize_groups


@torch.no_grad()
def input_grams(model: DualBranchModel, rows: Rows) -> dict[str, Tensor]:
    """What each linear layer of the fast branches sees on route fast: name -> `(K, K)`, the sum over the tokens of `rows` of `x x^T`."""
    grams: dict[str, Tensor] = {}
    hooks, real = [], rows.real.flatten()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".fast." in name:

            def add(_module: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                x = inputs[0].flatten(0, -2)[real].float()
                grams[name] = grams.get(name, 0) + x.T @ x

            hooks.append(module.register_forward_pre_hook(add))
    try:
        model(rows.tokens, "fast", doc_start=rows.doc_start, logits_at=torch.zeros_like(rows.tokens, dtype=torch.bool))
    finally:
        for hook in hooks:
            hook.remove()
    return grams


@torch.no_grad()
def round_groups(weight: Tensor, gram: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """`q (N, K)` int32 in [0, 15], `scale, low (N, K / GROUP)` like `packed.quantize_groups`, of `weight (N, K)` whose inputs have `gram (K, K)` (or smaller,
    where the last columns are padding). `damping`: share of the mean diagonal added to it."""
    N, K = weight.shape
    h = F.pad(gram.double(), (0, K - len(gram), 0, K - len(gram)))
    h.diagonal().add_(damping * gram.diagonal().double().mean().clamp(min=1e-12))
    # spread (K, K): row j says what an error in column j asks of the columns after it
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    weight, parts = weight.float().clone(), []
    for begin in range(0, K, GROUP):
        end = begin + GROUP
        _, scale, low = quantize_groups(weight[:, begin:end])
        q, errors = torch.empty(N, GROUP), torch.empty(N, GROUP)
        for j in range(begin, end):
            column = weight[:, j]
            q[:, j - begin] = ((column - low[:, 0]) / scale[:, 0]).round().clamp(0, 15)
            errors[:, j - begin] = error = (column - q[:, j - begin] * scale[:, 0] - low[:, 0]) / spread[j, j]
            weight[:, j:end] -= error[:, None] * spread[j, j:end]
        weight[:, end:] -= errors @ spread[begin:end, end:]
        parts.append((q.int(), scale, low))
    return tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))
