"""A narrower branch out of a wide one: pick what matters on calibration data, then refit the output matrices in closed form.

Importance is activation-based (Minitron, Muralidharan et al. 2024): a head by the size of what it adds to the residual, a neuron by its
mean activation times the norm of its output column. The refit is ridge regression: the narrow branch's output matrix that best
reproduces the wide one's output, layer by layer, on the teacher's own stream. Seconds, no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dualbranch.block import Block, Branch
from dualbranch.cache import NoCache
from dualbranch.config import DualBranchConfig
from dualbranch.data.packing import Rows
from dualbranch.model import DualBranchModel
from dualbranch.routing import TokenGroup

#: What a student cut out of a teacher need not share with it: how deep and wide it is, and what only a dual-branch model has.
FREE = ("n_layers", "n_heads", "d_ff", "n_stem", "n_tail", "fast_n_heads", "fast_d_ff", "sparse", "d_gate", "max_seq_len")
#: What it must: everything else, the sizes its K/V and its stream have and the dialect they are written in.
DIALECT = tuple(f.name for f in dataclasses.fields(DualBranchConfig) if f.name not in FREE)


@dataclass(frozen=True)
class LayerView:
    """One teacher layer on the N calibration tokens that aren't padding: `x (N, E)` the stream entering it, `h` its norm, the keys, and who the tokens are."""

    x: Tensor
    h: Tensor
    keys: tuple[Tensor, Tensor, None]
    tokens: TokenGroup


def head_importance(branch: Branch, view: LayerView) -> Tensor:
    """`(H,)`: mean norm of each head's contribution to the residual stream."""
    heads = branch.attend(view.h, view.tokens, *view.keys).unflatten(-1, (branch.n_heads, -1))  # (N, H, D)
    w_o = branch.w_o.weight.unflatten(-1, (branch.n_heads, -1))  # (E, H, D)
    return torch.stack([(heads[:, i] @ w_o[:, i].T).norm(dim=-1).mean() for i in range(branch.n_heads)])


def neuron_importance(branch: Branch, x: Tensor) -> Tensor:
    """`(F,)`: mean absolute activation times the norm of the neuron's output column, for streams `x (N, E)`."""
    return branch.ff.hidden(branch.ff_norm(x)).abs().mean(0) * branch.ff.w_down.weight.norm(dim=0)


def top_heads(importance: Tensor, n_kv_heads: int, n_keep: int) -> Tensor:
    """Indices of the heads to keep: the best of every K/V group, as many in each, so that groups stay whole. Ascending."""
    groups = importance.view(n_kv_heads, -1)
    best = groups.topk(n_keep // n_kv_heads, dim=1).indices.sort(dim=1).values
    return (best + torch.arange(n_kv_heads, device=best.device)[:, None] * groups.shape[1]).flatten()


def ridge(inputs: Tensor, outputs: Tensor, strength: float = 1e-3) -> Tensor:
    """`(out, in)` matrix W minimising `|inputs W^T - outputs|^2 + strength * scale * |W|^2`, in fp64. `inputs (N, in)`, `outputs (N, out)`."""
    a, b = inputs.double(), outputs.double()
    gram = a.T @ a
    gram.diagonal().add_(strength * gram.diagonal().mean().clamp(min=1e-12))
    return torch.linalg.solve(gram, a.T @ b).T.to(inputs.dtype)


def copy_rows(target: nn.Linear, source: nn.Linear, rows: Tensor) -> None:
    target.weight.copy_(source.weight[rows])
    if target.bias is not None:
        target.bias.copy_(source.bias[rows])


def cut_branch(target: Branch, source: Branch, view: LayerView, n_kv_heads: int) -> None:
    """Fills `target` (at most as wide) from `source` on one layer's calibration view. Mutates `target`."""
    head_dim = source.w_q.out_features // source.n_heads
    heads = top_heads(head_importance(source, view), n_kv_heads, target.n_heads)
    rows = (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()
    copy_rows(target.w_q, source.w_q, rows)
    for name in ("q_norm", "attn_post_norm", "ff_norm", "ff_post_norm"):
        getattr(target, name).load_state_dict(getattr(source, name).state_dict())
    attended = source.w_o(source.attend(view.h, view.tokens, *view.keys))
    source_mid = view.x + source.attn_post_norm(attended)
    fed = source.ff(source.ff_norm(source_mid))
    y = target.attend(view.h, view.tokens, *view.keys)
    target.w_o.weight.copy_(ridge(y, attended))
    neurons = neuron_importance(source, source_mid).topk(target.ff.w_act.out_features).indices.sort().values
    for name in ("w_act", "w_up"):
        copy_rows(getattr(target.ff, name), getattr(source.ff, name), neurons)
    mid = view.x + target.attn_post_norm(target.w_o(y))
    if isinstance(source.ff_post_norm, nn.Identity):  # without a norm behind it the feed-forward can also mend what attention lost
        fed = source_mid + fed - mid
    target.ff.w_down.weight.copy_(ridge(target.ff.hidden(target.ff_norm(mid)), fed))


def view_of(block: Block, x: Tensor, tokens: TokenGroup, rows: Rows) -> LayerView:
    """What `block` sees of the stream `x (N, E)` of packed `rows`, whose real tokens are `tokens`."""
    h = block.attn_norm(x)
    return LayerView(x, h, NoCache(*rows.tokens.shape).layer(0, tokens.cells)(*block.kv(h, *tokens.angles(block.sliding))), tokens)


@torch.no_grad()
def slow_pass(model: DualBranchModel, rows: Rows) -> Iterator[tuple[Block, LayerView, Tensor]]:
    """Runs `model` all-slow on packed `rows`; yields each block, what it sees, and the stream `(N, E)` that leaves it. Padding is left out."""
    tokens = model._place(rows.tokens, None, None, rows.doc_start)[0].subset(rows.real.flatten().nonzero().squeeze(1))
    x = model.embed(rows.tokens[rows.real])
    for block in model.blocks:
        view = view_of(block, x, tokens, rows)
        x = block.slow(x, view.h, tokens, *view.keys)
        yield block, view, x


def layer_views(model: DualBranchModel, rows: Rows) -> Iterator[tuple[Block, LayerView]]:
    """`slow_pass` without what leaves the blocks."""
    return ((block, view) for block, view, _ in slow_pass(model, rows))


def kept_layers(n_source: int, n_target: int) -> list[int]:
    """Which teacher layers a shallower student keeps: first and last, and evenly between."""
    return [0] if n_target == 1 else [round(i * (n_source - 1) / (n_target - 1)) for i in range(n_target)]


@torch.no_grad()
def init_from_teacher(student: DualBranchModel, teacher: DualBranchModel, rows: Rows) -> None:
    """Fills `student` from `teacher` on calibration `rows`. Mutates `student`.

    Equal shapes are copied, so a student with the teacher's slow sizes is the teacher on route slow; narrower branches and
    fewer layers are cut. Raises ValueError where a student is wider than its teacher or speaks another dialect.
    """
    s, t = student.config, teacher.config
    for name in DIALECT:
        if getattr(s, name) != getattr(t, name):
            raise ValueError(
                f"model.{name} is {getattr(s, name)} but the teacher has {getattr(t, name)}; a student cut out of it must keep it (or student.init: scratch)"
            )
    for name, limit in (("n_layers", "n_layers"), ("n_heads", "n_heads"), ("d_ff", "d_ff"), ("fast_n_heads", "n_heads"), ("fast_d_ff", "d_ff")):
        if getattr(s, name) > getattr(t, limit):
            raise ValueError(f"model.{name} is {getattr(s, name)}, more than the teacher's {getattr(t, limit)}; lower it, or set student.init: scratch")
    student.embed.load_state_dict(teacher.embed.state_dict())
    student.norm.load_state_dict(teacher.norm.state_dict())
    if student.head is not None:
        student.head.load_state_dict(teacher.head.state_dict())
    targets = dict(zip(kept_layers(t.n_layers, s.n_layers), student.blocks, strict=True))
    for i, (block, view) in enumerate(layer_views(teacher, rows)):
        if i not in targets:
            continue
        target: Block = targets[i]
        target.attn_norm.load_state_dict(block.attn_norm.state_dict())
        target.kv.load_state_dict(block.kv.state_dict())
        if s.n_heads == t.n_heads and s.d_ff == t.d_ff:
            target.slow.load_state_dict(block.slow.state_dict())
        else:
            cut_branch(target.slow, block.slow, view, s.n_kv_heads)
        if target.fast is not None:
            cut_branch(target.fast, block.slow, view, s.n_kv_heads)
