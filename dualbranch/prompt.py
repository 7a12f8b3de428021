"""What many tokens go through at once, as code to compile: a layer's keys and values, its queries, and all that follows its attention.

In PyTorch's own operators these are a dozen to the product, each of which reads and writes the tokens; and few tokens wait for Python. `plain_steps` are
these steps as modules, `PromptBlock` is a block that runs them, or the same compiled (`runner.py`), where its matrices are packed. Attention stays outside:
its operators depend on who reads what (`kernels`), but for that of sparse tokens in one row, which has steps of its own (`sparse_prompt.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dualbranch import sparse_prompt
from dualbranch.block import Block, Branch
from dualbranch.packed import FEW, PackedFeedForward, PackedLinear, more_rows, product_dtype
from dualbranch.routing import TokenGroup
from dualbranch.sparse_prompt import SparsePrompt

if TYPE_CHECKING:
    from dualbranch.model import DualBranchModel


#: Tokens of which hidden activations exist at once.
AT_ONCE = 2048


class ModuleStep(nn.Module):
    """A module of a model as a step: called with the weights it is to compute with, those of `weights_of` a module like it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.how = (module,)  # in a tuple it is no submodule: its weights are not this module's

    def weights_of(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}

    def forward(self, weights: dict[str, Tensor], *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        return functional_call(self.how[0], weights, args)


class Queries(nn.Module):
    """The queries of a branch, with the modules they need: `h (N, E)`, `cos, sin (N, 1, R)` to `(N, H, D)`."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.w_q, self.q_norm, self.n_heads, self.q_scale = branch.w_q, branch.q_norm, branch.n_heads, branch.q_scale

    forward = Branch.queries


class Rest(nn.Module):
    """What follows attention in a branch, with the modules it needs: `x (N, E)` and head outputs `(N, H * D)` to `(N, E)`."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.w_o, self.attn_post_norm, self.ff_norm, self.ff, self.ff_post_norm = (
            branch.w_o, branch.attn_post_norm, branch.ff_norm, branch.ff, branch.ff_post_norm
        )

    forward = Branch.rest


def modules_of(block: Block) -> dict[str, nn.Module]:
    """What of `block` many tokens go through as steps, by their names: where matrices are packed."""
    modules: dict[str, nn.Module] = {}
    if isinstance(block.kv.w_k, PackedLinear):
        modules["keys"] = block.kv
    for name in ("slow", "fast"):
        branch = getattr(block, name)
        if branch is not None and isinstance(branch.w_q, PackedLinear):
            modules[f"queries-{name}"] = Queries(branch)
            if type(branch.ff) is PackedFeedForward:  # a dynamic one has steps of its own
                modules[f"rest-{name}"] = Rest(branch)
    return modules


def attention_dtype(branch: Branch) -> torch.dtype:
    """What the sparse steps of `branch` compute many tokens in. (Its queries may come in another: where a bias is added to packed products.)"""
    return product_dtype(FEW + 1, branch.ff_norm.weight.device) if isinstance(branch.w_q, PackedLinear) else torch.float32


def plain_steps(model: DualBranchModel) -> dict[str, nn.Module]:
    """Every step that prompts of `model` go through, by name, uncompiled."""
    steps: dict[str, nn.Module] = {name: ModuleStep(module) for block in model.blocks for name, module in modules_of(block).items()}
    rules = {block.fast.reads for block in model.blocks if block.fast is not None and sparse_prompt.serves(block.fast.reads)}
    return steps | {name: step for spec in rules for name, step in sparse_prompt.plain_steps(spec).items()}  # of all layers the same


class PromptBlock:
    """`block` for many tokens, through `steps`: those of `plain_steps`, or the same compiled. What is not among them, and few tokens, the block computes
    itself; all that is asked of a block can be asked of this. Its weights are the block's as they were."""

    def __init__(self, block: Block, steps: Mapping[str, Callable]) -> None:
        modules = modules_of(block).items()
        run = {name: partial(run_step, steps[name], ModuleStep(module).weights_of(module), isinstance(module, Rest)) for name, module in modules}
        self.sliding, self.attn_norm, self.reads_all = block.sliding, block.attn_norm, block.reads_all
        self.kv = _either(block.kv, run.get("keys"))
        self.slow, self.fast = (
            None if branch is None else PromptBranch(branch, run.get(f"queries-{name}"), run.get(f"rest-{name}"), steps)
            for name, branch in (("slow", block.slow), ("fast", block.fast))
        )

    __call__ = Block.forward
    mix, together = Block.mix, Block.together


class PromptBranch:
    """A branch of a `PromptBlock`, through its steps `queries` and `rest` where there are such, and through those of sparse attention among `steps` where it
    reads by such a rule."""

    def __init__(self, branch: Branch, queries: Callable | None, rest: Callable | None, steps: Mapping[str, Callable]) -> None:
        self.sliding, self.reads = branch.sliding, branch.reads
        self.queries, self.rest_at_once = _either(branch.queries, queries), _either(branch.rest, rest)
        self.sparse = SparsePrompt(branch.reads, steps["choose"], steps["read"], attention_dtype(branch)) if sparse_prompt.serves(branch.reads) else None

    __call__ = Branch.forward

    def attend(self, h: Tensor, group: TokenGroup, k: Tensor, v: Tensor, pooled: Tensor | None) -> Tensor:
        """As `Branch.attend`."""
        if self.sparse is None or not self.sparse.takes(group.plan):
            return Branch.attend(self, h, group, k, v, pooled)
        return self.sparse(self.queries(h, *group.angles(self.sliding)), k, v, pooled, group.plan).flatten(1)

    def rest(self, x: Tensor, heads: Tensor) -> Tensor:
        """As `Branch.rest`. Hidden activations exist for `AT_ONCE` tokens at a time."""
        parts = [self.rest_at_once(*part) for part in zip(x.split(AT_ONCE), heads.split(AT_ONCE), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _either(plain: Callable, step: Callable | None) -> Callable:
    """`step`, if there is one, for many tokens; `plain` for few."""
    return plain if step is None else lambda tokens, *others: (plain if len(tokens) <= FEW else step)(tokens, *others)


def run_step(step: Callable, weights: dict[str, Tensor], residual: bool, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
    """What `step` gives for the N tokens of `args (N, ...)`, of which the first may be the residual stream (fp32). Compiled, it takes nothing but contiguous
    tensors of the dtypes it was compiled with; rows are added where products want them."""
    n = len(args[0])
    dtype = product_dtype(n, args[0].device)
    of_products = [x.to(dtype) for x in args[residual:]]
    more = more_rows(n, of_products[0])
    found = step(weights, *((F.pad(x, (0, 0) * (x.dim() - 1) + (0, more)) if more else x).contiguous() for x in (*args[:residual], *of_products)))
    if not more:
        return found
    return found[:n] if isinstance(found, Tensor) else tuple(x[:n] for x in found)
